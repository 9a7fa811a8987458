"""HoloV: every part of the image keeps its share of tokens (arXiv 2510.02912, NeurIPS 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, check_range
from vlm_attn.reduction import Keep, Picture, Reducer, highest


@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Cut the image into chunks, give each a quota by its mean score, keep in each what CLS attends to most.

    Equation:
        score_j  = attention_weight a_j + variance_weight v_j     a: CLS attention, v: variance of cos(x_j, x) in the chunk
        quota(c) ~ mean of score_j in chunk c                     and in every chunk the largest a_j

    Attributes:
        keep: default 64 of 576, as a share.
        chunks: number of chunks, contiguous in raster order (36 tokens each for 576, that is 1.5 rows, not squares). 1..1024.
        attention_weight: of the CLS attention in a token's score.
        variance_weight: of the variance of its cosines with its chunk, scaled to a maximum of 1 over the image.

    Deviations: the released code scales the variance chunk by chunk to the mean of the attention, so that it raises all chunks
    alike and decides nothing; here one scale holds for the image. That code leaves a token's cosine with itself out of the
    mean, and pads with zeros what a full chunk cannot take; here it goes to the others. Similarities are those of the
    projected features.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"
    cls_layers: ClassVar[tuple[int, ...]] = (PROJECTED,)

    keep: Keep = 1 / 9
    chunks: int = 16
    attention_weight: float = 1000.0
    variance_weight: float = 0.09

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "chunks", 1, 1024)
        check_range(self, "attention_weight", 0, 1e6)
        check_range(self, "variance_weight", 0, 1e6)

    def choose(self, picture: Picture) -> Tensor:
        """The best of every chunk."""
        assert picture.cls is not None
        index = torch.arange(len(picture.tokens), device=picture.tokens.device)
        parts = [part for part in index.tensor_split(self.chunks) if len(part)]
        score = self.score(picture)
        quotas = quota(torch.stack([score[part].mean() for part in parts]), [len(p) for p in parts], picture.count)
        return torch.cat([p[highest(picture.cls[p], n)] for p, n in zip(parts, quotas, strict=True)])

    def score(self, picture: Picture) -> Tensor:
        """``1000 a + 0.09 v``."""
        assert picture.cls is not None
        unit = nn.functional.normalize(picture.tokens.float(), dim=-1)
        varied = torch.cat([(u @ u.T).var(1, correction=0) for u in unit.tensor_split(self.chunks)])
        return self.attention_weight * picture.cls + self.variance_weight * varied / varied.max().clamp_min(1e-12)


def quota(score: Tensor, room: list[int], count: int) -> list[int]:
    """Share ``count`` out in proportion to ``score``, whole numbers, at most ``room`` each; what is over goes on by need."""
    given = [0] * len(room)
    while count > sum(given):
        open_ = [i for i, size in enumerate(room) if given[i] < size]
        weight = score[open_].double().clamp_min(1e-12)
        share = (weight / weight.sum() * (count - sum(given))).tolist()
        whole = [min(int(s), room[i] - given[i]) for i, s in zip(open_, share, strict=True)]
        if not any(whole):  # less than one each: the largest shares first
            for place in sorted(range(len(open_)), key=lambda p: -share[p])[: count - sum(given)]:
                whole[place] = 1
        for i, n in zip(open_, whole, strict=True):
            given[i] += n
    return given
