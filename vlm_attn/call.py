# SPDX-License-Identifier: Apache-2.0
"""The state of one call of a patched model: what its prompt holds, how much of it has run, what the methods have read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import Tensor

from vlm_attn.kernels import Edit, Group, Pattern, ScoreEdit
from vlm_attn.kernels.masks import Mask, extended, materialise
from vlm_attn.layout import TokenLayout

if TYPE_CHECKING:
    from vlm_attn.dropping import Reduction
    from vlm_attn.method import Method, Wide
    from vlm_attn.reduction import Picture, Reducer

Mode = Literal["prompt", "edited", "other"]
T = TypeVar("T")


@dataclass
class PromptMask:
    """A method's mask of the prompt: as a matrix, as single rows of it, or laid out for the kernel that draws it by itself.

    Attributes:
        mask: the mask.
        group: ``[B, P]`` of the prompt; columns behind it are GENERATED.
        blind: ``[B]`` bool: rows of the batch that stay causal, None = none.
    """

    mask: Mask
    group: Tensor
    blind: Tensor | None = None
    _patterns: dict[Any, Pattern] = field(default_factory=dict)
    _written: dict[Any, Tensor] = field(default_factory=dict)

    def rows(self, columns: Tensor, length: int) -> Tensor:
        """``[B, 1, R, length]`` bool: what rows at the columns ``[R]`` or ``[B, R]`` see of the first ``length`` columns."""
        group = extended(self.group.to(columns.device), max(length, int(columns.max()) + 1), int(Group.GENERATED))
        seen = materialise(self.mask, group, rows=columns)[..., :length]
        if self.blind is not None:
            causal = torch.arange(length, device=columns.device) <= columns[..., None]
            real = (group[:, :length] != Group.PAD)[:, None, None]
            seen = seen.where(
                ~self.blind.to(seen.device)[:, None, None, None],
                (causal[:, None] if causal.ndim == 3 else causal) & real,
            )
        # Padded rows are never read; they see something, so that no softmax runs over nothing.
        return seen | (group.gather(1, columns.expand(len(group), -1)) == Group.PAD)[:, None, :, None]

    def written(self, first: int, rows: int, key: Tensor) -> Tensor:
        """``[B, 1, rows, S]`` bool over the keys ``[B, G, S, D]``, for a layer whose kernel cannot draw the mask."""
        where = first, rows, key.shape[2], key.device
        if where not in self._written:
            columns = torch.arange(first, first + rows, device=key.device)
            self._written[where] = self.rows(columns, key.shape[2])
        return self._written[where]

    def pattern(self, first: int, rows: int, key: Tensor) -> Pattern:
        """The mask over ``rows`` rows from column ``first`` on and the keys ``[B, G, S, D]``."""
        where = first, rows, key.shape[2], key.device
        if where not in self._patterns:
            group = self.group[:, : key.shape[2]].to(key.device)
            self._patterns[where] = Pattern.of(self.mask, group, rows, key.shape[2], first=first)
        return self._patterns[where]


@dataclass
class Call:
    """One ``generate`` or one bare forward (with the decode steps that follow on its cache).

    Plain data: copied with a cache, it shares nothing with the original.

    Attributes:
        prompt: layout of the prompt as it was given, one row per sample.
        methods: the methods that are applied.
        patched: those of the model; without an image, some of them leave the prompt alone.
        blind: ``[B]`` bool: which rows have no image, where others have one; no edit changes them. None = all are alike.
        input_ids: ``[B, P]`` ids of the prompt, None for ``inputs_embeds``.
        mode: ``"prompt"`` while prompt rows run, ``"edited"`` once every row of a forward is edited, ``"other"`` in a forward
            that is not this call's.
        done: whether the whole prompt has run.
        cached_prompt: whether a cache holds it, so that what follows comes with that cache.
        past: columns before this forward; a tensor under a static cache while decoding.
        length: rows of this forward.
        ran: whether any of the prompt has run.
        first: columns that were in the cache when the call began.
        readable: whether their keys can be read.
        earlier: the call that filled those columns, if it is known.
        batch: rows of the batch that run now: samples, or beams of them.
        edits: the edits of each layer from the end of the prompt on.
        scales: the factors on every layer's heads, likewise.
        mask: while the prompt runs under a mask that the kernel draws: what the host's own mask only stands in for.
        reduction: which columns are kept, while a method keeps fewer.
        ahead: the method for which a layer's attention is being read ahead.
        canvas: whether the answer is denoised (``vlm_attn.diffusion``), and not written token after token.
        whole: while it is: whether earlier prompt rows see the last one.
        open: while it is: ``[B, rows]`` which canvas rows of this forward are still masked; only these are edited.
        progress: while it is: share of the steps that is done.
        chosen: what was chosen of each image before the language model, by method, image, count and tokens to choose from.
        pictures: what a method saw of each image that keeps fewer tokens at later steps.
        seen: what was read of each layer of the vision tower, a part for each of its runs.
        pixels: the pictures' pixel values, while methods check the prompt.
        reached: layers whose attention ran in this forward, while the prompt runs.
    """

    prompt: TokenLayout
    methods: tuple[Method, ...] = ()
    patched: tuple[Method, ...] = ()
    blind: Tensor | None = None
    input_ids: Tensor | None = None
    mode: Mode = "prompt"
    done: bool = False
    cached_prompt: bool = False
    past: int | Tensor = 0
    length: int = 0
    ran: bool = False
    first: int = 0
    readable: bool = True
    earlier: Call | None = None
    batch: int = 0
    edits: dict[int, list[Edit | ScoreEdit]] = field(default_factory=dict)
    scales: dict[int, Tensor | None] = field(default_factory=dict)
    mask: PromptMask | None = None
    reduction: Reduction | None = None
    ahead: Reducer | None = None
    canvas: bool = False
    whole: bool = False
    open: Tensor | None = None
    progress: float = 0.0
    chosen: dict[tuple[str, int, int, int], Tensor] = field(default_factory=dict)
    pictures: dict[int, tuple[Reducer, Picture]] = field(default_factory=dict)
    seen: dict[int | Wide, list[tuple[Tensor, Tensor]]] = field(default_factory=dict)
    pixels: Tensor | None = None
    reached: set[int] = field(default_factory=set)
    _layouts: dict[int, TokenLayout] = field(default_factory=dict)
    _memory: dict[str, dict[Any, Any]] = field(default_factory=dict)
    _rows: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    _tokens: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    @property
    def layout(self) -> TokenLayout:
        """The layout of the rows that run now (samples repeated for beams)."""
        if self.batch not in self._layouts:
            self._layouts[self.batch] = self.prompt.expand(self.batch)
        return self._layouts[self.batch]

    @property
    def image_in_cache(self) -> bool:
        """Whether an image stands among the columns that were in the cache when the call began."""
        return any(image.start < self.first for image in self.prompt.images)

    def rows_without_image(self, device: torch.device | None = None) -> Tensor:
        """``[B]`` bool: the same as ``blind``, of the rows that run now."""
        assert self.blind is not None
        blind = self.blind.repeat_interleave(self.batch // len(self.blind), 0)
        return blind if device is None else blind.to(device)

    def memory(self, method: Method) -> dict[Any, Any]:
        """Where a method keeps its results for the length of the call."""
        return self._memory.setdefault(method.name, {})

    def once(self, method: Method, build: Callable[[], T]) -> T:
        """What ``build`` makes, made once for the rows that run now: an edit that is the same in every layer."""
        memory, key = self.memory(method), ("once", self.batch)
        if key not in memory:
            memory[key] = build()
        return memory[key]

    def finish(self) -> None:
        """The prompt has run: let go of what only reading it needed. A cache keeps the call for as long as it lives."""
        self.done = True
        self.earlier = None
        if self.cached_prompt:  # else the prompt runs again, without the tower
            self.seen.clear()
        self._rows.clear()

    def restart(self) -> None:
        """Forget what was read: the whole sequence runs again (``use_cache=False``)."""
        self.done, self.ran, self.reduction = False, False, None
        for read in (self.edits, self.scales, self._rows, self._tokens):
            read.clear()

    # Readings. Buffers cover the whole prompt and are filled as its parts run.

    def store_rows(self, method: Method, layer: int, attention: Tensor, valid: Tensor, offset: int) -> None:
        """Keep attention ``[B, H, R, S]`` of the read rows where ``valid [B, R]``; key 0 is column ``offset``."""
        key = (method.name, layer)
        device = self.prompt.group.device  # layers may lie on several
        attention, valid = attention.to(device), valid.to(device)
        if self.reduction is not None:
            attention = self.reduction.spread_keys(layer, attention)
        size = (*attention.shape[:3], self.prompt.length)
        if key not in self._rows or self._rows[key].shape != size:
            self._rows[key] = attention.new_zeros(size)
        stop = min(offset + attention.shape[3], self.prompt.length)
        part = self._rows[key][..., offset:stop]
        part.copy_(torch.where(valid[:, None, :, None], attention[..., : stop - offset], part))

    def find_rows(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where prompt columns ``[B, R]`` stand among the rows that run now: ``(rows, valid)``."""
        if self.reduction is not None:
            return self.reduction.find_rows(columns, int(self.past), self.length)
        rows = columns - int(self.past)
        return rows.clamp(0, self.length - 1), (rows >= 0) & (rows < self.length)

    def vision(self, image: int, layer: int | Wide) -> tuple[Tensor, Tensor]:
        """What was read of a layer of the vision tower at one image of the prompt: ``[tiles, T]`` and ``[tiles, T, d]``.

        Raises:
            ValueError: the tower has not run in this call (``inputs_embeds``).
        """
        if layer not in self.seen:
            raise ValueError(
                "the vision tower did not run in this call, so what its CLS token looks at is unknown: "
                "pass pixel_values, not inputs_embeds"
            )
        parts = [torch.cat(part) for part in zip(*self.seen[layer], strict=True)]
        tiles = {n: span.tiles for n, span in enumerate(self.prompt.images)}
        shown = {n: tiles[n] for n in tiles if self.prompt.images[n].start >= self.first}  # this turn's
        if len(parts[0]) % sum(shown.values()) or (len(parts[0]) == sum(tiles.values()) and image not in shown):
            shown = tiles
        times = len(parts[0]) // sum(shown.values())  # some hosts run the tower once per beam
        start = times * sum(count for n, count in shown.items() if n < image)
        cls, keys = (part[start : start + shown[image]] for part in parts)
        return cls, keys

    def rows(self, method: Method) -> dict[int, Tensor]:
        """Attention rows by layer, as :meth:`~vlm_attn.method.Method.prompt_read` gets them."""
        return {layer: rows for (name, layer), rows in self._rows.items() if name == method.name}

    def store_tokens(self, method: Method, layer: int, values: Tensor, at: int | None = None) -> None:
        """Keep one value per token ``[B, Q]`` of this forward, or of the columns from ``at`` on."""
        key, values = (method.name, layer), values.to(self.prompt.group.device)
        if key not in self._tokens or self._tokens[key].shape[0] != values.shape[0]:
            self._tokens[key] = values.new_zeros(values.shape[0], self.prompt.length)
            if self.first and self.earlier is not None:
                known = self.earlier.tokens(method, layer)
                if known is not None and known.shape[0] == values.shape[0]:
                    width = min(self.first, known.shape[1])
                    self._tokens[key][:, :width] = known[:, :width]
        start = int(self.past) if at is None else at
        stop = min(start + values.shape[1], self.prompt.length)
        if start < stop:
            self._tokens[key][:, start:stop] = values[:, : stop - start]

    def tokens(self, method: Method, layer: int) -> Tensor | None:
        """Values per prompt column ``[B, P]`` read at a layer, None if it has not run."""
        return self._tokens.get((method.name, layer))
