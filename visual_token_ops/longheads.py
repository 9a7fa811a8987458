# SPDX-License-Identifier: Apache-2.0
"""LongHeads: every head looks at the chunks that suit it, here parts of images (arXiv 2402.10685, EMNLP 2024 Findings)."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch

from vlm_attn.call import Call
from vlm_attn.heads import HeadMethod, Seen, View
from vlm_attn.method import check_range, unknown_turn
from vlm_attn.reduction import check_keep
from vlm_attn.visual_token_ops.chunks import best, chunks_of, gathered, of_keys, scores, tiles


@dataclass(frozen=True, kw_only=True)
class LongHeads(HeadMethod):
    """Behind the prompt every head sees the text and the image chunks that its query fits best.

    Overview:
        in short: the text, and the rows or tiles of the image that its query fits
        which keys a head sees: all text, and the share `keep` of the image's rows (or tiles) whose pooled key fits the
            query best
        rows: from the last prompt token on
        needs: the prompt in one piece

    Equation:
        w_j  = mean_(i in c) softmax_(j in c)(q_i k_j)          attention inside a chunk
        seen = the keep chunks c of the largest q sum_j w_j k_j, and all text

    Attributes:
        keep: share of a row's chunks that are seen, in (0, 1], or their number. ``1.0`` is neutral.
        tile: side of a chunk in tokens; 0 = a row of the picture. Range 0..1000.

    A chunk's key is its keys, weighted by what the chunk's own rows pay them in attention inside the chunk. Every row from the
    last prompt token on chooses; all text is seen, as the paper's first, current and previous chunk. Deviations: the paper
    makes the weights with a second query, the mean output of that attention, and compares unrotated queries with keys
    rotated within the chunk; here both stay as the model rotated them, and kept chunks keep their positions.
    """

    name: ClassVar[str] = "longheads"
    paper: ClassVar[str] = "LongHeads, arXiv 2402.10685"
    whole_prompt: ClassVar[bool] = True

    keep: float | int = 0.25
    tile: int = 0

    def __post_init__(self) -> None:
        check_keep(self, "keep", self.keep)
        check_range(self, "tile", 0, 1000)

    @property
    def neutral(self) -> bool:
        """Every chunk is seen."""
        return isinstance(self.keep, float) and self.keep == 1

    def start(self, call: Call, processor: Any) -> None:
        """A later turn needs the chunk keys of the call that filled its cache."""
        super().start(call, processor)
        if not call.first or not any(image.start < call.first for image in call.prompt.images):
            return
        known = call.earlier.memory(self) if call.earlier is not None else {}
        if "keys" not in known:
            raise unknown_turn(self, "the keys of its image chunks are")
        call.memory(self)["earlier"] = known["keys"]

    def read(self, call: Call, view: View) -> None:
        """The chunk keys of a layer, ``[B, H, C, D]``, from the prompt's queries and keys."""
        chunks = chunks_of(call, self, partial(tiles, size=self.tile), view.key.device)
        place, there = chunks.places(view.columns)
        row, asks = chunks.places(view.rows)
        query = gathered(view.query, row)  # [B, H, C, M, D]
        key = gathered(view.key, place).repeat_interleave(view.group, 1)
        logits = (query @ key.transpose(3, 4) * view.scale).masked_fill(~there[:, None, :, None], float("-inf"))
        asks = (asks & there)[:, None, :, :, None]
        weight = (torch.softmax(logits, -1).nan_to_num(0.0) * asks).sum(3) / asks.sum(3).clamp_min(1)  # [B, H, C, M]
        pooled = (weight[..., None] * key).sum(3)
        earlier = call.memory(self).get("earlier", {}).get(view.layer)
        if earlier is not None:
            pooled[:, :, : earlier.shape[2]] = earlier[: len(pooled)]
        call.memory(self).setdefault("keys", {})[view.layer] = pooled
        call.memory(self).setdefault("there", {})[view.layer] = there.any(2), chunks.counts(self.keep)

    def sees(self, call: Call, view: View) -> Seen | None:
        """The chunks with the highest scores, and what is in none."""
        chunks = chunks_of(call, self, partial(tiles, size=self.tile), view.key.device)
        there, count = call.memory(self)["there"][view.layer]
        score = scores(view.query, call.memory(self)["keys"][view.layer], there, view.scale)
        return Seen(of_keys(best(score, count), chunks.member(view.columns)))
