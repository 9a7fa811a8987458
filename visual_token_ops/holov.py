# SPDX-License-Identifier: Apache-2.0
"""HoloV: every part of the image keeps its share of tokens (arXiv 2510.02912, NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, Wide, check_flag, check_range
from vlm_attn.reduction import Keep, Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class HoloV(Reducer):
    """Cut the image into chunks, give each a quota by its mean score, keep in each what CLS attends to most.

    Overview:
        in short: every part of the image its share, by CLS attention and variety
        keeps: of every raster chunk its quota, by CLS attention
        where: before the language model
        needs: as `visionzip`

    Equation:
        score_j  = attention_weight a_j + variance_weight v_j     a: CLS attention, v: variance of cos(x_j, x) in the chunk
        quota(c) = floor(n mean_c / sum of the means), and one more for the largest until n are given
        kept: in every chunk the largest a_j                      mean_c: of score_j in chunk c

    Attributes:
        keep: default 64 of 576, as a share.
        chunks: number of chunks, contiguous in raster order (36 tokens each for 576, that is 1.5 rows, not squares). 1..1024.
        attention_weight: of the CLS attention in a token's score.
        variance_weight: of the variance of its cosines with its chunk, scaled to a maximum of 1 over the image.
        code_parity: score as the released code does. It scales the variance chunk by chunk to the mean of the attention, so
            that it raises all chunks alike and decides next to nothing, and it counts a token's cosine with itself as 0.

    Deviation: the released code pads with zeros what a full chunk cannot take; here it goes to the others, the largest first.
    Similarities are those of the projected features. The order within a chunk, by attention, comes with ``positions="packed"``.
    """

    name: ClassVar[str] = "holov"
    paper: ClassVar[str] = "HoloV, arXiv 2510.02912"
    cls_layers: ClassVar[tuple[int | Wide, ...]] = (PROJECTED,)

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"paper-{count}": {"keep": count / 576} for count in (192, 128, 64)
    }

    keep: Keep = 1 / 9
    chunks: int = 16
    attention_weight: float = 1000.0
    variance_weight: float = 0.09
    code_parity: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag(self, "code_parity")
        check_range(self, "chunks", 1, 1024)
        check_range(self, "attention_weight", 0, 1e6)
        check_range(self, "variance_weight", 0, 1e6)

    def choose(self, picture: Picture) -> Tensor:
        """The best of every chunk."""
        return torch.cat(self.best(picture)).sort().values

    def best(self, picture: Picture) -> list[Tensor]:
        """Of every chunk what it keeps, by attention; a chunk that keeps all as it stands."""
        assert picture.cls is not None
        index = torch.arange(len(picture.tokens), device=picture.tokens.device)
        parts = [part for part in index.tensor_split(self.chunks) if len(part)]
        score = self.score(picture)
        quotas = quota(torch.stack([score[part].mean() for part in parts]), [len(p) for p in parts], picture.count)
        ranked = (p[picture.cls[p].float().sort(descending=True, stable=True).indices] for p in parts)
        return [p if n == len(p) else r[:n] for p, r, n in zip(parts, ranked, quotas, strict=True)]

    def order(self, picture: Picture, chosen: Tensor) -> Tensor:
        """Chunk by chunk, by attention."""
        return torch.searchsorted(chosen, torch.cat(self.best(picture)))

    def score(self, picture: Picture) -> Tensor:
        """``1000 a + 0.09 v``."""
        assert picture.cls is not None
        unit = nn.functional.normalize(picture.tokens.float(), dim=-1)
        if self.code_parity:
            attention = self.attention_weight * picture.cls
            scored = [
                a + self.variance_weight * spread(u) * (a.abs().mean() / (spread(u).abs().mean() + 1e-6))
                for a, u in zip(attention.tensor_split(self.chunks), unit.tensor_split(self.chunks), strict=True)
                if len(u)
            ]
            return torch.cat(scored)
        varied = torch.cat([(u @ u.T).var(1, correction=0) for u in unit.tensor_split(self.chunks)])
        return self.attention_weight * picture.cls + self.variance_weight * varied / varied.max().clamp_min(1e-12)


def spread(unit: Tensor) -> Tensor:
    """``[n]`` variance of the cosines of vectors ``[n, D]`` of unit length as the released code has it: the one of a token with
    itself counts as 0, and the sums are divided by n - 1."""
    if len(unit) < 2:
        return unit.new_zeros(len(unit))
    cosine = (unit @ unit.T).fill_diagonal_(0)
    mean = cosine.sum(1, keepdim=True) / (len(unit) - 1)
    return (cosine - mean).square().sum(1) / (len(unit) - 1)


def quota(score: Tensor, room: list[int], count: int) -> list[int]:
    """Share ``count`` out in proportion to ``score``: rounded down, then one more each for the largest until all is given.
    At most ``room`` each; what does not fit goes on in the same way."""
    weight = score.double().clamp_min(1e-12)
    share = (weight / weight.sum() * count + 1e-9).tolist()
    ranked = sorted(range(len(room)), key=lambda i: -share[i])
    given = [int(s) for s in share]
    for i in ranked[: count - sum(given)]:
        given[i] += 1
    given = [min(n, size) for n, size in zip(given, room, strict=True)]
    while sum(given) < count:
        for i in [i for i in ranked if given[i] < room[i]][: count - sum(given)]:
            given[i] += 1
    return given
