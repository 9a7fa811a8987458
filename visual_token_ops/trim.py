# SPDX-License-Identifier: Apache-2.0
"""TRIM: keep the tokens that CLIP finds least like the question, as the released code ranks them (arXiv 2409.10994)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.method import check_flag
from vlm_attn.reduction import ADAPTIVE, Keep, Picture, highest, others, outliers, truncated, with_seat
from vlm_attn.visual_token_ops.clip import ClipReducer


@dataclass(frozen=True, kw_only=True)
class Trim(ClipReducer):
    """Keep the tokens whose patch has the smallest product with the question, and the mean of all others as one more.

    Overview:
        in short: the patches with the smallest CLIP product with the question (the released code's sign), and the mean
            of the rest (extra `clip`)
        keeps: the patches whose CLIP product with the question is smallest, as the released code ranks them, and the
            mean of all others
        where: before the language model
        needs: as `cdpruner`

    Equation:
        kept: largest softmax_j(-p_j . t)                         p: CLIP's projected patch, t: its text embedding
        x_m = projector(mean of the f_j that go)                  m: one token more; f: what the projector gets

    Attributes:
        keep: how many are kept, beside the one token more; default 0.21, about the paper's mean. ``"adaptive"`` is the paper's
            rule: as many as lie more than 1.5 interquartile ranges above the upper quartile. Shares are cut off, not rounded.
        summary: whether the mean of all that go is handed on as one token more; it sits in the middle of what it stands for.
        clip: see :class:`~vlm_attn.visual_token_ops.clip.ClipReducer`.

    The sign is the released code's: it negates the product before it ranks, as CDPruner does, so what is kept is *least*
    like the question by that product; the paper speaks of the tokens that matter most for it. Deviation: where a family's
    tokens are not made of one feature each (Gemma 3, PaliGemma), the mean is taken behind the projector.
    ``positions="packed"`` puts the mean last, as the released code does.
    """

    name: ClassVar[str] = "trim"
    paper: ClassVar[str] = "TRIM, arXiv 2409.10994"
    cosine: ClassVar[bool] = False
    reads_features: ClassVar[bool] = True
    adaptive: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper": {"keep": ADAPTIVE},
        "paper-121": {"keep": 121 / 576},
    }
    whole = staticmethod(truncated)

    keep: Keep = 0.21
    summary: bool = True

    def check(self) -> None:
        """Check ``summary`` as well."""
        super().check()
        check_flag(self, "summary")

    def score(self, picture: Picture) -> Tensor:
        """The negated product's share."""
        return torch.softmax(-self.similarity(picture).float(), 0)

    def kept(self, picture: Picture) -> Tensor:
        """Indices of the kept tokens, ascending."""
        score = -self.similarity(picture)
        count = max(1, outliers(self.score(picture))) if self.keep == ADAPTIVE else picture.count
        return highest(score, count)

    def choose(self, picture: Picture) -> Tensor:
        """The kept ones, and a seat for the mean."""
        kept = self.kept(picture)
        return with_seat(len(picture.tokens), kept)[0] if self.summary else kept

    def order(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """The mean last."""
        kept = self.kept(picture)
        return (
            torch.searchsorted(chosen, torch.cat([kept, with_seat(len(picture.tokens), kept)[1]]))
            if self.summary
            else None
        )

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The mean stands for all that go."""
        if not self.summary:
            return super().owners(picture, chosen)
        kept = self.kept(picture)
        _, seat = with_seat(len(picture.tokens), kept)
        return (seat if len(seat) else kept[:1]).expand(len(picture.tokens)).index_copy(0, kept, kept)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """The mean in its seat."""
        if not self.summary:
            return None
        kept = self.kept(picture)
        _, seat = with_seat(len(picture.tokens), kept)
        gone = others(len(picture.tokens), kept)
        new = picture.source[gone].mean(0, keepdim=True) if len(seat) else picture.source[:0]
        return picture.with_new(seat, new)[chosen]
