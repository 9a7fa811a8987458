"""VisionZip: what the vision tower itself looks at, and summaries of the rest (arXiv 2412.04467, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, check_range
from vlm_attn.reduction import Keep, Picture, Reducer, highest


@dataclass(frozen=True, kw_only=True)
class VisionZip(Reducer):
    """Keep dominant tokens, by the attention of the tower's CLS token, and contextual ones that take in the rest.

    Equation:
        dominant: largest a_j                                     a: the CLS token's attention
        x'_c = x_c + mean of the x_i with c = argmax cos(k_i, k)  c contextual, k the tower's keys

    Attributes:
        keep: default 64 of 576, as a share.
        contextual: share of the kept tokens that are contextual; the paper's 10 of 64. Range [0, 1).

    Contextual tokens stand evenly spaced among what is not dominant; every other token goes to the one whose key is most
    like its own (cosine), and their mean is added to it. The CLS attention is that of the layer that is projected (-2 in
    LLaVA-1.5). Deviations: tokens are merged behind the projector, not before it; CLS itself, which the released code
    keeps as one of the dominant tokens, is no token of the language model here.
    """

    name: ClassVar[str] = "visionzip"
    paper: ClassVar[str] = "VisionZip, arXiv 2412.04467"
    cls_layers: ClassVar[tuple[int, ...]] = (PROJECTED,)

    keep: Keep = 1 / 9
    contextual: float = 10 / 64

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "contextual", 0, 1)
        if self.contextual == 1:
            raise ValueError("visionzip: contextual=1 leaves no dominant token: give a share below 1")

    def choose(self, picture: Picture) -> Tensor:
        """Dominant and contextual tokens."""
        return torch.cat(self.split(picture)).sort().values

    def split(self, picture: Picture) -> tuple[Tensor, Tensor]:
        """Indices of the dominant and of the contextual tokens."""
        assert picture.cls is not None
        spaced = round(picture.count * self.contextual)
        dominant = highest(picture.cls, picture.count - spaced)
        rest = others(len(picture.tokens), dominant)
        return dominant, rest[torch.arange(spaced, device=rest.device) * (len(rest) // max(1, spaced))]

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The contextual token whose key is most similar."""
        assert picture.keys is not None
        _, targets = self.split(picture)
        if not len(targets):
            return super().owners(picture, chosen)
        unit = nn.functional.normalize(picture.keys, dim=-1)
        return targets[(unit @ unit[targets].T).argmax(1)].index_copy(0, chosen, chosen)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor:
        """``x_c + mean of the tokens that go to c``."""
        _, targets = self.split(picture)
        rest = others(len(picture.tokens), chosen)
        tokens = picture.tokens.float()
        if len(targets) and len(rest):
            goes = torch.searchsorted(targets, self.owners(picture, chosen)[rest])
            share = nn.functional.one_hot(goes, len(targets)).float()  # [rest, contextual]
            added = share.T @ tokens[rest] / share.sum(0).clamp_min(1)[:, None]
            tokens = tokens.index_add(0, targets, added)
        return tokens[chosen]


def others(count: int, chosen: Tensor) -> Tensor:
    """Indices below ``count`` that are not among the chosen ones, ascending."""
    return torch.ones(count, dtype=torch.bool, device=chosen.device).index_fill(0, chosen, False).nonzero().flatten()
