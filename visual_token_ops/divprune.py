# SPDX-License-Identifier: Apache-2.0
"""DivPrune: keep the tokens that are least alike (arXiv 2503.02175, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.reduction import Keep, Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class DivPrune(Reducer):
    """Keep the most diverse visual tokens: greedy max-min over cosine distance of the projected features.

    Overview:
        in short: the tokens that are least alike
        keeps: the tokens least alike, greedy max-min over cosine distance
        where: before the language model

    Equation:
        next = argmax_i min_j (1 - cos(x_i, x_j))                 j kept so far; first: the one farthest from its nearest

    Attributes:
        keep: default 0.098, the paper's ratio (56 of 576).

    The question has no say: the choice is made before the language model. Cosines are those of the features in float32,
    whatever the model's dtype: in half precision the differences between tokens drown in rounding, and other tokens are
    chosen (the released code, which stays in half precision, has 0.82 of its tokens in common with itself in float32). A
    share is rounded as Python's ``round`` does, of equal distances the earlier token is taken. Cost: the cosines of all
    pairs of tokens.
    """

    name: ClassVar[str] = "divprune"
    paper: ClassVar[str] = "DivPrune, arXiv 2503.02175"

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper-56": {"keep": 0.098}}

    keep: Keep = 0.098

    @staticmethod
    def whole(tokens: float) -> int:
        """Rounded to the nearest number, halves to the even one."""
        return round(tokens)

    def choose(self, picture: Picture) -> Tensor:
        """The max-min diverse set."""
        return farthest(cosine_distance(picture.tokens), picture.count)


def cosine_distance(tokens: Tensor) -> Tensor:
    """``[n, n]`` one minus the cosine of every pair, float32."""
    unit = nn.functional.normalize(tokens.float(), dim=-1)
    return 1 - unit @ unit.T


def farthest(distance: Tensor, count: int) -> Tensor:
    """Greedy max-min: first the token whose nearest neighbour is farthest, then whichever is farthest from all chosen.

    Args:
        distance: ``[n, n]``.
        count: how many, at least 1.

    Returns:
        ``[count]`` indices, ascending.
    """
    alone = distance.clone().fill_diagonal_(float("inf")).amin(1)
    chosen = [alone.argmax()]
    nearest = distance[chosen[0]]
    for _ in range(count - 1):
        nearest = nearest.index_fill(0, chosen[-1], -float("inf"))
        chosen.append(nearest.argmax())
        nearest = torch.minimum(nearest, distance[chosen[-1]])
    return torch.stack(chosen).sort().values
