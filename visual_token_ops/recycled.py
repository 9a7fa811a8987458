# SPDX-License-Identifier: Apache-2.0
"""Recycled attention: between full steps, look at what the last full step looked at (arXiv 2411.05787)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_attn.branch import Run
from vlm_attn.call import Call
from vlm_attn.heads import HeadMethod, Seen, View
from vlm_attn.kernels import attention_rows
from vlm_attn.method import check_range
from vlm_attn.reduction import check_keep, kept_count

STATIC = "recycled counts steps, which a compiled step on a static cache cannot: leave out cache_implementation="


@dataclass(frozen=True, kw_only=True)
class Recycled(HeadMethod):
    """Every ``stride``-th row sees everything; the others see the keys it looked at most, and what came since.

    Overview:
        in short: what the last full step looked at most, and what came since
        which keys a head sees: every `stride`-th row all, the others its top `keep` keys and what is newer
        rows: from the last prompt token on
        needs: no beams, no static cache

    Equation:
        top  = the keep largest keys of mean_(h in group) A[h, f]      f = the last full row
        seen = top and every j > f                                    rows f + 1 ... f + stride - 1

    Attributes:
        keep: number of keys, or the share in (0, 1] of those that the full row sees. ``1.0`` is neutral.
        stride: rows from one full row to the next; the last prompt token is the first. Range 1..100000; 1 is neutral.

    Per layer and KV head, by attention averaged over the group's query heads. The cache stays whole: this saves time where a
    kernel reads chosen keys only, never memory. Deviations: between full rows nothing is taken out again as new tokens come
    (at most ``stride - 1`` more keys); the variant that goes by the likeness of queries is left out. Beams and static
    caches are refused: what a row chose belongs to that row.
    """

    name: ClassVar[str] = "recycled"
    paper: ClassVar[str] = "Recycled Attention, arXiv 2411.05787"

    keep: float | int = 4096
    stride: int = 50

    def __post_init__(self) -> None:
        check_keep(self, "keep", self.keep)
        check_range(self, "stride", 1, 100_000)

    @property
    def neutral(self) -> bool:
        """Every row, or every key."""
        return self.stride == 1 or (isinstance(self.keep, float) and self.keep == 1)

    def rehearse(self, run: Run) -> None:
        """Refuse beams and static caches.

        Raises:
            NotImplementedError: either is asked for.
        """
        if run.option("num_beams") not in (None, 1):
            raise NotImplementedError(
                "recycled: a beam may go on from another, which chose other keys: leave out num_beams="
            )
        if "static" in str(run.option("cache_implementation")):
            raise NotImplementedError(STATIC)

    def sees(self, call: Call, view: View) -> Seen | None:
        """What the last full row chose, per row."""
        rows = range(int(call.past), int(call.past) + view.query.shape[2]) if isinstance(call.past, int) else ()
        if not rows or view.key.shape[2] > rows.stop:
            raise NotImplementedError(STATIC)
        start = call.prompt.length - 1
        known: dict[int, Tensor] = call.memory(self).setdefault(view.layer, {})
        latest = max((row for row in known if row < rows.start), default=start)
        for row in [row for row in known if row != latest]:  # earlier ones, and those of rows that were taken back
            del known[row]
        shown = torch.ones(len(view.key), view.key.shape[1], len(rows), view.key.shape[2], dtype=torch.bool)
        shown = shown.to(view.key.device)
        for place, row in enumerate(rows):
            full = row - (row - start) % self.stride
            if full == row:
                known[row] = self.choose(view, place, view.key.shape[2] - (len(rows) - 1 - place))
                continue
            picked = known[full]
            shown[:, :, place, : picked.shape[2]] = picked
        return Seen(shown.repeat_interleave(view.group, 1))

    def choose(self, view: View, place: int, keys: int) -> Tensor:
        """``[B, G, keys]`` bool: the keys that a row looks at most, of those up to its own."""
        allowed = view.allowed[:, :, place : place + 1]
        query = view.query[:, :, place : place + 1]
        paid = attention_rows(query, view.key, mask=allowed, scale=view.scale, softcap=view.softcap)
        paid = paid.view(len(paid), view.key.shape[1], view.group, -1).mean(2)
        total = allowed[:, 0, 0].sum(-1).expand(len(paid)).tolist()
        count = torch.tensor([kept_count(self.keep, n) for n in total], device=paid.device)
        rank = torch.arange(paid.shape[2], device=paid.device) < count[:, None, None]
        order = paid.argsort(dim=-1, descending=True, stable=True)
        chosen = torch.zeros_like(paid, dtype=torch.bool).scatter(2, order, rank.expand_as(order))
        return chosen[..., :keys]
