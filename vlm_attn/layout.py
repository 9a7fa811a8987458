# SPDX-License-Identifier: Apache-2.0
"""Which column of the prompt is what: system text, image, question, template tail, padding.

The layout covers the prompt only. Every column from the prompt's end on is GENERATED, whatever its token id, so
nothing has to be extended while decoding, and beams stay within their sample (rows repeat).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from vlm_attn.kernels import Group

Span = tuple[int, int]


@dataclass(frozen=True)
class ImageSpan:
    """One image of one row, or one frame of a video: its columns in the prompt and the grid they form.

    Attributes:
        row: row of the batch.
        start: first column.
        stop: one past the last column.
        grid: ``(h, w)`` of the tokens that form a picture, ``(1, n)`` where the family has no grid.
        first: index of the first grid token inside the image's tokens (an overview may stand before or behind tiles).
        tiles: how many pictures the vision tower sees of it.
        size: ``(height, width)`` of the picture in pixels, where the processor says it.
        video: number of the video that it is a frame of, in the order of rows and columns; None = an image.
        frame: number of the frame: a video's grid is ``(t, h, w)``, with t spans of ``(h, w)``.
        breaks: columns between ``start`` and ``stop`` that hold none of its tokens (row ends, what parts tiles).
        order: which of its tokens is each cell of the grid, row by row; None = the ``h w`` tokens from ``first`` on.
        overview: ``(first, (h, w))`` of the tokens that show the whole image once more, small, apart from its tiles.
    """

    row: int
    start: int
    stop: int
    grid: tuple[int, int]
    first: int = 0
    tiles: int = 1
    size: tuple[int, int] | None = None
    video: int | None = None
    frame: int = 0
    breaks: tuple[int, ...] = ()
    order: tuple[int, ...] | None = None
    overview: tuple[int, tuple[int, int]] | None = None

    @property
    def total(self) -> int:
        """Number of its tokens."""
        return self.stop - self.start - len(self.breaks)

    @property
    def columns(self) -> Tensor:
        """``[total]`` the columns of its tokens."""
        columns = torch.arange(self.start, self.stop)
        return columns[~torch.isin(columns, torch.tensor(self.breaks))] if self.breaks else columns

    @property
    def cells(self) -> Tensor:
        """``[h w]`` which of its tokens is each cell of the grid, row by row."""
        h, w = self.grid
        return torch.arange(self.first, self.first + h * w) if self.order is None else torch.tensor(self.order)

    @property
    def cell_columns(self) -> Tensor:
        """``[h w]`` the column of each cell of the grid, row by row."""
        return self.columns[self.cells]


@dataclass(frozen=True)
class TokenLayout:
    """Groups of the prompt's columns.

    Attributes:
        group: ``[B, P]`` uint8 of :class:`~vlm_attn.kernels.Group`.
        images: the images in order of rows and columns.
        query: the question's columns per row, half open, absolute (padding counted).
    """

    group: Tensor
    images: tuple[ImageSpan, ...]
    query: tuple[Span, ...]

    @property
    def batch(self) -> int:
        """Number of rows."""
        return self.group.shape[0]

    @property
    def length(self) -> int:
        """Number of prompt columns P."""
        return self.group.shape[1]

    @property
    def first(self) -> Tensor:
        """``[B]`` the first column of every row that is no padding."""
        return (self.group != Group.PAD).int().argmax(1)

    @property
    def visual(self) -> Tensor:
        """``[B, P]`` bool: image tokens."""
        return self.group == Group.VISUAL

    @property
    def text_after_image(self) -> Tensor:
        """``[B, P]`` bool: every token after the first image token that is neither image nor padding."""
        return (self.visual.cumsum(dim=1) > 0) & ~self.visual & (self.group != Group.PAD)

    def expand(self, batch: int) -> TokenLayout:
        """The layout of ``batch`` rows, each sample repeated (beams, several return sequences).

        Raises:
            ValueError: ``batch`` is no multiple of the number of rows.
        """
        if batch == self.batch:
            return self
        if batch % self.batch:
            raise ValueError(f"the model runs {batch} rows, which is no multiple of the prompt's {self.batch}")
        times = batch // self.batch
        return replace(
            self,
            group=self.group.repeat_interleave(times, dim=0),
            query=tuple(span for span in self.query for _ in range(times)),
        )


def visual_columns(input_ids: Tensor, image_token_ids: Sequence[int]) -> Tensor:
    """``[B, P]`` bool: where the prompt holds an image token. Only the prompt counts: a generated token that happens to have
    the id of an image token is a generated token."""
    visual = torch.zeros_like(input_ids, dtype=torch.bool)
    for token_id in image_token_ids:
        visual |= input_ids == token_id
    return visual


def runs(row: Tensor) -> list[Span]:
    """Half-open column ranges of the True runs of a 1-D bool tensor."""
    edges = torch.diff(
        row.to(torch.int8).cpu(),
        prepend=torch.zeros(1, dtype=torch.int8),
        append=torch.zeros(1, dtype=torch.int8),
    )
    starts = (edges == 1).nonzero().flatten().tolist()
    stops = (edges == -1).nonzero().flatten().tolist()
    return list(zip(starts, stops, strict=True))


def build_layout(
    visual: Tensor,
    attention_mask: Tensor | None,
    query: Sequence[Span],
    role: Sequence[int],
    images: Sequence[ImageSpan],
) -> TokenLayout:
    """Put the parts together.

    Args:
        visual: ``[B, P]`` bool.
        attention_mask: ``[B, P]``, zero on padding; None = no padding.
        query: one span per row, absolute columns.
        role: number of template-tail tokens at the end of every row.
        images: the images.
    """
    batch, length = visual.shape
    group = torch.full((batch, length), int(Group.SYSTEM), dtype=torch.uint8, device=visual.device)
    for row, ((start, stop), tail) in enumerate(zip(query, role, strict=True)):
        group[row, start:stop] = int(Group.QUERY)
        if tail:
            group[row, length - tail :] = int(Group.ROLE)
    group[visual] = int(Group.VISUAL)
    if attention_mask is not None:
        group[attention_mask.to(visual.device) == 0] = int(Group.PAD)
    return TokenLayout(group=group, images=tuple(images), query=tuple(query))


def padding(mask: Tensor | None, batch: int) -> list[int]:
    """Number of padding columns before each row's prompt.

    Raises:
        ValueError: padding on the right or in the middle.
    """
    if mask is None:
        return [0] * batch
    kept = mask != 0
    first = kept.int().argmax(1)
    if not bool((kept.int().cumsum(1)[:, -1] == mask.shape[1] - first).all()):
        raise ValueError('prompts must be padded on the left: processor.tokenizer.padding_side = "left"')
    return first.tolist()


def is_span(value: Any) -> bool:
    """Whether a value is a pair of integers."""
    return isinstance(value, Sequence) and len(value) == 2 and all(isinstance(v, int) for v in value)


def per_row(given: Any, batch: int, what: str) -> Sequence[Any]:
    """Spans as they may be given, one entry per row; a single pair stands for every row.

    Raises:
        TypeError: neither a pair nor a list.
        ValueError: another number of entries than rows.
    """
    if is_span(given):
        return [given] * batch
    if not isinstance(given, Sequence) or isinstance(given, str):
        raise TypeError(f"{what} spans must be (start, stop) or a list with one entry per row, got {given!r}")
    if len(given) != batch:
        raise ValueError(f"{len(given)} {what} spans for {batch} rows: give one (start, stop) per row, or one for all")
    return given


def check_span(span: Any, row: int, first: int, length: int, what: str = "query") -> Span:
    """Turn a span of the unpadded prompt into absolute columns.

    Args:
        span: half-open ``(start, stop)`` in the unpadded prompt.
        row: row of the batch, for the message.
        first: number of padding columns before the prompt.
        length: number of columns with padding.
        what: what it is a span of, for the message.

    Raises:
        TypeError: not a pair of integers.
        ValueError: empty, reversed or outside the prompt.
    """
    if not is_span(span):
        raise TypeError(f"{what} span {span!r} of row {row} is no pair of integers (start, stop)")
    start, stop = span
    if not 0 <= start < stop <= length - first:
        raise ValueError(
            f"{what} span ({start}, {stop}) of row {row} lies outside its prompt of {length - first} tokens: "
            "give half-open columns of the unpadded prompt, 0 <= start < stop <= length"
        )
    return start + first, stop + first
