# SPDX-License-Identifier: Apache-2.0
"""What heads do with a long context: which copy from it, which look at the object they name, how far they look.

Retrieval heads: arXiv 2404.15574. Windowed distance (WAAD) and future attention (FAI): arXiv 2510.13554; the windows are those
of an independent implementation, the paper's were not found. The visual variants are ours.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.branch import with_answer
from vlm_attn.layout import ImageSpan
from vlm_attn.method import Method
from vlm_attn.patching import engine_of, patched

Box = tuple[float, float, float, float]


class _Looker(Method):
    """Does nothing, to a prompt with or without an image."""

    name: ClassVar[str] = "look"
    edited_rows: ClassVar[Literal["last", "text", "none"]] = "none"
    needs_image: ClassVar[bool] = False

    def edit(self, call: Any, layer: int) -> None:
        """Nothing."""


def answer_maps(model: Any, inputs: Mapping[str, Any], answer: Sequence[int]) -> tuple[Tensor, tuple[ImageSpan, ...]]:
    """Attention of the rows that an answer's tokens were read from, in one forward with the answer shown.

    Args:
        model: a model that is not patched.
        inputs: what the processor returned for one prompt.
        answer: the answer's T token ids.

    Returns:
        ``[L, H, T, S]`` float32 on the CPU, S = prompt and answer; and the prompt's images.

    Raises:
        ValueError: more than one prompt, no answer, the model is patched.
    """
    whole = with_answer(inputs, answer)
    found: list[Tensor] = []

    def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        found.append(attend(slice(-len(answer) - 1, -1))[0].cpu())
        return out

    with patched(model, _Looker()):
        engine = engine_of(model)
        with engine.running(whole) as call, engine.aside(tap=tap), torch.no_grad():
            model(**whole, use_cache=False)
            return torch.stack(found), call.prompt.images


def copied(maps: Tensor, tokens: Tensor, answer: Sequence[int], needle: tuple[int, int]) -> Tensor:
    """How much of a needle every head copies: where its most attended key lies in the needle and is the token being written.

    Args:
        maps: ``[L, H, T, S]`` attention of the rows that the answer was read from.
        tokens: ``[S]`` ids of the columns.
        answer: the T token ids.
        needle: half-open columns.

    Returns:
        ``[L, H]`` share of the needle's columns that are copied, 0..1.

    Raises:
        ValueError: the needle lies outside the columns, or is empty.
    """
    start, stop = needle
    if not 0 <= start < stop <= maps.shape[3]:
        raise ValueError(f"needle {needle} lies outside the {maps.shape[3]} columns: give (start, stop), half open")
    top = maps.argmax(-1)
    written = torch.as_tensor(list(answer))
    hit = (top >= start) & (top < stop) & (tokens[top] == written)
    place = torch.nn.functional.one_hot((top - start).clamp(0, stop - start - 1), stop - start).bool()
    return (place & hit[..., None]).any(2).float().mean(-1)


def retrieval_heads(model: Any, inputs: Mapping[str, Any], needle: tuple[int, int], answer: Sequence[int]) -> Tensor:
    """Retrieval score of every head on one needle; average it over needles whose answer is right. From 0.1 on a head retrieves.

    Args:
        model: a model that is not patched.
        inputs: one prompt that holds the needle.
        needle: its half-open columns.
        answer: what the model answered, token ids.

    Returns:
        ``[L, H]``, 0..1.

    Raises:
        ValueError: see :func:`answer_maps` and :func:`copied`.
    """
    maps, _ = answer_maps(model, inputs, answer)
    tokens = torch.cat([inputs["input_ids"][0].cpu(), torch.tensor(list(answer))])
    return copied(maps, tokens, answer, needle)


def visual_retrieval_heads(
    model: Any, inputs: Mapping[str, Any], answer: Sequence[int], mentions: Sequence[tuple[int, Box]], image: int = 0
) -> tuple[Tensor, Tensor]:
    """Which heads look at an object while its name is written.

    Args:
        model: a model that is not patched.
        inputs: one prompt.
        answer: its answer's token ids.
        mentions: ``(step, box)``: the answer's token that names an object, and where that is: left, top, right, bottom as
            shares of the picture's width and height.
        image: number of the image.

    Returns:
        ``[L, H]`` share of the mentions at which the image token a head looks at most has its middle in the box, and
        ``[L, H]`` the mean attention to the image then.

    Raises:
        ValueError: no mention, a step beyond the answer, no such image; see :func:`answer_maps`.
    """
    if not mentions or not all(0 <= step < len(answer) for step, _ in mentions):
        raise ValueError(f"mentions must name steps 0..{len(answer) - 1} of the answer, got {[s for s, _ in mentions]}")
    maps, images = answer_maps(model, inputs, answer)
    if not 0 <= image < len(images):
        raise ValueError(f"image={image}: the prompt has {len(images)} images")
    span = images[image]
    on_grid = maps[..., span.cell_columns.to(maps.device)]
    hits = torch.stack([in_box(on_grid[:, :, step].argmax(-1), span.grid, box) for step, box in mentions])
    mass = torch.stack([maps[:, :, step, span.columns.to(maps.device)].sum(-1) for step, _ in mentions])
    return hits.float().mean(0), mass.mean(0)


def in_box(cell: Tensor, grid: tuple[int, int], box: Box) -> Tensor:
    """Whether the middle of cells (integers, row by row) of a ``(h, w)`` grid lies in a box of shares of the picture."""
    h, w = grid
    x, y = (cell % w + 0.5) / w, (cell // w + 0.5) / h
    return (x >= box[0]) & (x <= box[2]) & (y >= box[1]) & (y <= box[3])


def head_spans(maps: Tensor, rows: Tensor | None = None) -> Tensor:
    """Mean distance that heads look back: ``mean_t sum_s A[t, s] (t - s)``.

    Args:
        maps: ``[..., N, N]`` attention, rows t, keys s.
        rows: the rows t that count; None = all.

    Returns:
        ``[...]`` in tokens.
    """
    place = torch.arange(maps.shape[-1])
    away = (maps * (place[:, None] - place)).sum(-1)
    return (away if rows is None else away[..., rows]).mean(-1)


def local_and_global(maps: Tensor, share: float = 0.3, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """The mean maps of the heads that look back least and most.

    Args:
        maps: ``[..., N, N]``; all dimensions in front are heads.
        share: of the heads, in either group; at least one. Range (0, 1].
        rows: see :func:`head_spans`.

    Returns:
        two ``[N, N]``.

    Raises:
        ValueError: ``share`` is out of range.
    """
    if not 0 < share <= 1:
        raise ValueError(f"share={share!r} is outside (0, 1]")
    heads = maps.reshape(-1, *maps.shape[-2:])
    order = head_spans(heads, rows).argsort(stable=True)
    count = max(1, int(share * len(heads)))
    return heads[order[:count]].mean(0), heads[order[-count:]].mean(0)


def waad(near: Tensor, window: int = 10) -> Tensor:
    """Windowed average attention distance of every row: ``sum_s A[t, s] min(t - s, window)``.

    Args:
        near: ``[N, N]`` mean map of the local heads.
        window: W, in tokens.

    Returns:
        ``[N]``.
    """
    place = torch.arange(near.shape[-1])
    return (near * (place[:, None] - place).clamp(0, window)).sum(-1)


def fai(
    far: Tensor, low: int = 10, high: int = 50, *, rows: Tensor | None = None, columns: Tensor | None = None
) -> Tensor:
    """Future attention influence of every column: the mean of ``A[t, s]`` over rows ``s + low <= t <= s + high``.

    Args:
        far: ``[N, N]`` mean map of the global heads.
        low: first row that counts, behind the column.
        high: last row that counts; rows beyond the map do not.
        rows: the rows t that count at all, such as the answer's; None = all.
        columns: the columns wanted; the image's give the visual FAI. None = all.

    Returns:
        ``[N]``, or ``[len(columns)]``; 0 for a column that no row lies far enough behind.

    Raises:
        ValueError: ``low`` is above ``high``, or below 0.
    """
    if not 0 <= low <= high:
        raise ValueError(f"low={low!r}, high={high!r}: must be 0 <= low <= high")
    place = torch.arange(far.shape[-1])
    behind = place[:, None] - place
    counts = (behind >= low) & (behind <= high)
    if rows is not None:
        counts &= torch.zeros(len(far), 1, dtype=torch.bool).index_fill(0, rows, True)
    found = (far * counts).sum(0) / counts.sum(0).clamp_min(1)
    return found if columns is None else found[columns]


__all__ = [
    "answer_maps",
    "copied",
    "fai",
    "head_spans",
    "in_box",
    "local_and_global",
    "retrieval_heads",
    "visual_retrieval_heads",
    "waad",
]
