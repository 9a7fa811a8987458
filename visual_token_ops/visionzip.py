# SPDX-License-Identifier: Apache-2.0
"""VisionZip: what the vision tower itself looks at, and summaries of the rest (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, Wide, check_flag, check_range
from vlm_attn.reduction import Keep, Picture, Reducer, highest, others


@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """Keep dominant tokens, by the attention of the tower's CLS token, and contextual ones that take in the rest.

    Overview:
        in short: the tower's CLS token, what it looks at, and summaries of the rest (LLaVA, LLaVA-NeXT, InternVL)
        keeps: the vision tower's CLS token and what it attends to (dominant), and evenly spaced tokens that take in the
            rest (contextual)
        where: before the language model
        needs: a tower with a CLS token: LLaVA and LLaVA-NeXT with CLIP, InternVL

    Equation:
        dominant: the CLS token, and the largest a_j              a: the CLS token's attention
        f'_c = f_c + mean of the f_i with c = argmax cos(k_i, k)  c contextual, k the tower's keys
        x = projector(f)                                          f: the features that the projector gets

    Attributes:
        keep: default 64 of 576, as a share.
        contextual: share of the kept tokens that are contextual; the paper's 10 of 64. Range [0, 1).
        cls_token: whether the CLS token counts as one of the dominant tokens, as in the released code, and goes on to the
            language model; else all of them are patches.

    Contextual tokens stand evenly spaced among what is not dominant; every other token goes to the one whose key is most
    like its own (cosine), and their mean is added to it before the projector. The CLS attention is that of the layer that is
    projected (-2 in LLaVA-1.5). The CLS token sits in the place of the first token that goes; the order of the released code,
    CLS, dominant, contextual, comes with ``positions="packed"``. Where a family's projector takes no single patch (InternVL),
    the CLS token counts but cannot be handed on: there is one token less.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    cls_layers: ClassVar[tuple[int | Wide, ...]] = (PROJECTED,)
    reads_features: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"paper-{count}": {"keep": count / 576} for count in (192, 128, 64)
    }

    keep: Keep = 1 / 9
    contextual: float = 10 / 64
    cls_token: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "cls_token")
        check_range(self, "contextual", 0, 1)
        if self.contextual == 1:
            raise ValueError("visionzip: contextual=1 leaves no dominant token: give a share below 1")

    def choose(self, picture: Picture) -> Tensor:
        """Dominant and contextual tokens."""
        return torch.cat(self.split(picture)).sort().values

    def split(self, picture: Picture) -> tuple[Tensor, Tensor, Tensor]:
        """Indices of the dominant and of the contextual tokens, and the seat of the CLS token, if it has one."""
        assert picture.cls is not None
        n, count = len(picture.tokens), picture.count
        if count == n:
            every = torch.arange(n, device=picture.tokens.device)
            return every, every[:0], every[:0]
        spaced = round(count * self.contextual)
        dominant = highest(picture.cls, max(1, count - spaced - self.cls_token))
        rest = patches(picture, others(n, dominant))
        targets = rest[torch.arange(spaced, device=rest.device)[: len(rest)] * (len(rest) // max(1, spaced))]
        goes = others(n, torch.cat([dominant, targets]))
        handed_on = self.cls_token and picture.cls_feature is not None and len(dominant) + spaced < count
        return dominant, targets, goes[: int(handed_on)]

    def order(self, picture: Picture, chosen: Tensor) -> Tensor:
        """CLS, dominant, contextual."""
        dominant, targets, seat = self.split(picture)
        return torch.searchsorted(chosen, torch.cat([seat, dominant, targets]))

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The contextual token whose key is most similar."""
        assert picture.keys is not None
        dominant, targets, _ = self.split(picture)
        stay = torch.cat([dominant, targets])
        if not len(targets):
            return torch.full_like(picture.places, -1).index_copy(0, stay, stay)
        unit = nn.functional.normalize(picture.keys, dim=-1)
        return targets[(unit @ unit[targets].T).argmax(1)].index_copy(0, stay, stay)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor:
        """``f_c + mean of the features that go to c``, and the CLS token's, through the projector."""
        dominant, targets, seat = self.split(picture)
        rest = patches(picture, others(len(picture.tokens), torch.cat([dominant, targets])))
        features, new = picture.source, picture.source[targets]
        if len(targets) and len(rest):
            goes = torch.searchsorted(targets, self.owners(picture, chosen)[rest])
            share = nn.functional.one_hot(goes, len(targets)).float()  # [rest, contextual]
            new = new + share.T @ features[rest] / share.sum(0).clamp_min(1)[:, None]
        if len(seat):
            assert picture.cls_feature is not None
            new = torch.cat([new, picture.cls_feature.float()[None]])
        return picture.with_new(torch.cat([targets, seat]), new)[chosen]


def patches(picture: Picture, index: Tensor) -> Tensor:
    """Those of some tokens that are patches: a newline token has no key, and nothing to merge."""
    assert picture.keys is not None
    return index[picture.keys[index].any(1)]
