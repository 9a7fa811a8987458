# SPDX-License-Identifier: Apache-2.0
"""LLaVA-PruMerge: keep what stands out for CLS, merge into each what is most like it (arXiv 2403.15388, ICCV 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, Wide, check_flag, check_range
from vlm_attn.reduction import ADAPTIVE, Keep, Picture, Reducer, outliers, truncated, with_seat
from vlm_attn.visual_token_ops.visionzip import patches


@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Keep the tokens CLS attends to most, each with the tokens most like it added, and one more token for all that go.

    Overview:
        in short: what stands out for CLS, each with the tokens most like it added, and one token more for the rest;
            `plus=True` adds evenly spaced ones
        keeps: what CLS attends to, to each the 32 tokens most like it added by their attention, and one token more that
            sums up what goes; with `plus=True` evenly spaced tokens as well
        where: before the language model
        needs: as `visionzip`

    Equation:
        kept: largest a_j                                         a = softmax(q_cls K^T / sqrt(D)), all heads as one
        f'_c = f_c + sum of a_j f_j over the 32 j with the largest cos(k_c, k_j)
        f'_m = sum of a_j f_j over all that go                    m: one token more
        x = projector(f')                                         f: the features that the projector gets

    Attributes:
        keep: how many are kept, beside the one token more; default 0.0625, about the paper's mean of 5.5 %. ``"adaptive"``
            is the paper's rule: as many as have more than 1.5 interquartile ranges above the upper quartile of ``a``.
            Shares are cut off, not rounded.
        plus: PruMerge+: evenly spaced tokens beside those CLS attends to. With a ``keep`` half of it each (what is both counts
            once, so it can be fewer); with ``"adaptive"`` every third part of the spacing that the outliers have on average.
        neighbours: how many tokens are added to a kept one. At least 0.
        last_layer: take attention and keys from the layer behind the features, as the released code does, whose text says the
            layer before last; False = the layer that the features come from.

    Neighbours are looked for among all other tokens, kept ones too; weights are not normalised. What goes is also in the one
    token more, which sits in the middle of what it stands for; the order of the released code (by attention, then spaced,
    then the one more) comes with ``positions="packed"``. Deviation: in the released PruMerge+ with a ratio a token that is
    both stands there twice.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "LLaVA-PruMerge, arXiv 2403.15388"
    reads_features: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"keep": ADAPTIVE},
        "paper-plus": {"keep": ADAPTIVE, "plus": True},
        "paper-plus-144": {"keep": 0.25, "plus": True},
    }
    whole = staticmethod(truncated)

    keep: Keep = 0.0625
    plus: bool = False
    neighbours: int = 32
    last_layer: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "plus")
        check_flag(self, "last_layer")
        check_range(self, "neighbours", 0, 100_000)

    @property
    def cls_layers(self) -> tuple[int | Wide, ...]:  # type: ignore[override]
        """All heads as one, of either layer."""
        return (Wide(23 if self.last_layer else PROJECTED),)

    def ranked(self, picture: Picture) -> Tensor:
        """Indices of the kept tokens, as the released code has them: by attention, then those evenly spaced."""
        assert picture.cls is not None
        n = len(picture.tokens)
        by_attention = picture.cls.float().sort(descending=True, stable=True).indices
        if self.keep == ADAPTIVE:
            count = max(1, outliers(picture.cls))
            step = max(1, int(n / count) // 3)
            first = 0
        else:
            count = max(1, picture.count // 2) if self.plus else picture.count
            step = max(1, int(n / count))
            first = step // 2
        chosen = by_attention[:count]
        if not self.plus:
            return chosen
        spaced = torch.arange(first, max(first + 1, n - 1), step, device=chosen.device)
        spaced = patches(picture, spaced[~torch.isin(spaced, chosen)])
        room = n if self.keep == ADAPTIVE else picture.count - count
        return torch.cat([chosen, spaced[:room]])

    def choose(self, picture: Picture) -> Tensor:
        """The kept ones, and a seat for the one token more."""
        return with_seat(len(picture.tokens), self.ranked(picture).sort().values)[0]

    def order(self, picture: Picture, chosen: Tensor) -> Tensor:
        """By attention, spaced, the one more."""
        ranked = self.ranked(picture)
        _, seat = with_seat(len(picture.tokens), ranked.sort().values)
        return torch.searchsorted(chosen, torch.cat([ranked, seat]))

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The one token more stands for all that go."""
        kept = self.ranked(picture).sort().values
        _, seat = with_seat(len(picture.tokens), kept)
        stands = seat if len(seat) else kept[:1]
        return stands.expand(len(picture.tokens)).index_copy(0, kept, kept)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor:
        """``f_c + sum a_j f_j`` over the nearest, ``sum a_j f_j`` over what goes, through the projector."""
        assert picture.cls is not None
        assert picture.keys is not None
        kept = self.ranked(picture).sort().values
        _, seat = with_seat(len(picture.tokens), kept)
        weighted = picture.cls.float()[:, None] * picture.source
        unit = nn.functional.normalize(picture.keys.float(), dim=-1)
        alike = (unit[kept] @ unit.T).scatter(1, kept[:, None], -torch.inf)
        near = alike.topk(min(self.neighbours, len(unit) - 1), dim=1).indices
        new = picture.source[kept] + weighted[near].sum(1)
        if len(seat):
            new = torch.cat([new, (weighted.sum(0) - weighted[kept].sum(0))[None]])
        return picture.with_new(torch.cat([kept, seat]), new)[chosen]
