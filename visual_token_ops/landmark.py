# SPDX-License-Identifier: Apache-2.0
"""In the style of landmark attention (arXiv 2305.16300): every chunk of the image is opened, or seen as one summary."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.heads import HeadMethod, Seen, View
from vlm_attn.method import check_flag, check_range
from vlm_attn.reduction import check_keep
from vlm_attn.visual_token_ops.chunks import best, chunks_of, mean_of, of_keys, scores, tiles


@dataclass(frozen=True, kw_only=True)
class Landmark(HeadMethod):
    """Behind the prompt every head opens the image chunks whose landmarks it looks at most; the others are one key each.

    Overview:
        in short: the text, and the rows or tiles of the image that its query fits, the others as one mean key each (in
            the paper's style)
        which keys a head sees: all text, and the share `keep` of the image's rows (or tiles) whose mean key fits the
            query best; a closed chunk is one key with `+ log n`
        rows: from the last prompt token on

    Equation:
        open = the keep chunks c of the largest q mean_(j in c) k_j
        A    = softmax([s_open, q mean_c k + log n_c])          c shut; its value is mean_c v

    Attributes:
        keep: share of a row's chunks that are opened, in (0, 1], or their number. ``1.0`` is neutral.
        tile: side of a chunk in tokens; 0 = a row of the picture. Range 0..1000.
        summaries: whether a closed chunk is still seen, as its mean key and value, counted as often as it has tokens
            (the logit is raised by ``log n``); else it is hidden.

    Deviations: the paper trains landmark tokens and a grouped softmax; here, without training, a landmark is the mean of its
    chunk's rotated keys, chunks are parts of images, text is always seen, and every row from the last prompt token on
    opens chunks of its own.
    """

    name: ClassVar[str] = "landmark"
    paper: ClassVar[str] = "in the style of landmark attention, arXiv 2305.16300"
    adds_keys: ClassVar[bool] = True

    keep: float | int = 0.25
    tile: int = 0
    summaries: bool = True

    def __post_init__(self) -> None:
        check_keep(self, "keep", self.keep)
        check_range(self, "tile", 0, 1000)
        check_flag(self, "summaries")

    @property
    def neutral(self) -> bool:
        """Everything is open."""
        return isinstance(self.keep, float) and self.keep == 1

    def landmarks(self, call: Call, view: View) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[B, G, C, D]`` mean keys and values, ``[B, C]`` tokens of every chunk, ``[B]`` how many are opened; made once, from
        the prompt's keys."""
        memory = call.memory(self)
        if view.layer not in memory:
            chunks = chunks_of(call, self, partial(tiles, size=self.tile), view.key.device)
            place, there = chunks.places(view.columns)
            means = (mean_of(x, place, there) for x in (view.key, view.value))
            memory[view.layer] = (*means, there.sum(2), chunks.counts(self.keep))
        return memory[view.layer]

    def sees(self, call: Call, view: View) -> Seen | None:
        """Open chunks, and the landmarks of the others."""
        key, value, tokens, count = self.landmarks(call, view)
        chunks = chunks_of(call, self, partial(tiles, size=self.tile), view.key.device)
        open_ = best(scores(view.query, key, tokens > 0, view.scale), count)
        visible = of_keys(open_, chunks.member(view.columns))
        if not self.summaries:
            return Seen(visible)
        bias = tokens.float().log()[:, None, None].masked_fill(open_, float("-inf"))
        return Seen(visible, key, value, bias)
