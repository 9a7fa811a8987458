"""A method in the style of LLaVA-PruMerge (arXiv 2403.15388): keep what CLS looks at, merge the rest into it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED
from vlm_attn.reduction import Keep, Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class PruMerge(Reducer):
    """Keep the tokens CLS attends to most; each takes in the dropped tokens that are most like it.

    Equation:
        kept: largest a_j                                         a: the CLS token's attention
        x'_c = sum_i a_i x_i / sum_i a_i                          over c and the i with c = argmax cos(k_i, k)

    Attributes:
        keep: default 0.0625, about the paper's mean of 5.5 %.

    Every dropped token goes to the kept one with the most similar key (cosine); the kept token becomes the mean of itself
    and these, weighted by CLS attention. In the paper's style, not its letter: the number of tokens is asked for instead of
    found by an outlier rule, every dropped token counts once, and merging happens behind the projector.
    """

    name: ClassVar[str] = "prumerge"
    paper: ClassVar[str] = "after LLaVA-PruMerge, arXiv 2403.15388"
    cls_layers: ClassVar[tuple[int, ...]] = (PROJECTED,)

    keep: Keep = 0.0625

    def score(self, picture: Picture) -> Tensor:
        """The attention of CLS."""
        assert picture.cls is not None
        return picture.cls

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The kept token whose key is most similar."""
        assert picture.keys is not None
        unit = nn.functional.normalize(picture.keys, dim=-1)
        return chosen[(unit @ unit[chosen].T).argmax(1)].index_copy(0, chosen, chosen)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor:
        """``sum_j a_j x_j / sum_j a_j`` over the kept token and those that go to it."""
        assert picture.cls is not None
        goes = torch.searchsorted(chosen, self.owners(picture, chosen))
        weight = nn.functional.one_hot(goes, len(chosen)).float() * picture.cls[:, None]
        return weight.T @ picture.tokens.float() / weight.sum(0)[:, None]
