# SPDX-License-Identifier: Apache-2.0
"""SparseVLM: the question's words rate the image; what is dropped is summed up (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.method import Method, ModelFacts, check_range, layer_tuple
from vlm_attn.reduction import Keep, Picture, Staged, highest, kept_count, others, scaled, truncated

RATING = (2, 6, 15)  # layers, of 32
# Tokens left after each of three stages, of 576, by version and mean budget: the released lists.
PUBLISHED = {
    1: {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)},
    2: {192: (300, 200, 118), 128: (238, 108, 60), 96: (246, 54, 28), 64: (66, 34, 20)},
}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Staged):
    """Keep what the text tokens that belong to the image attend to, in several layers.

    Overview:
        in short: what the question's relevant words attend to; the best of the rest summed up; `version=2` is
            SparseVLM+
        keeps: what the text tokens that belong to the image attend to; clusters of the best dropped tokens are put back
            as their means (not in `version=2`, SparseVLM+)
        where: behind layers 2, 6, 15 of 32, scaled
        needs: text behind the image

    Equation:
        raters  = text tokens t with mean_j softmax_t(x_j e_t) above average
        score_j = mean_h,t A[h, t, j]                             t in raters; the largest stay
        x'_c    = mean of the cluster of c                        of the best rated that go

    Attributes:
        layers: layers whose attention rates; tokens go before the next one. Empty = 2, 6 and 15 of 32 as in the paper,
            scaled to the model's depth.
        keep: the mean budget, as the paper counts it (192, 128, 96 or 64 of 576): its list of tokens per stage is used. For
            anything between, the nearest list is scaled; with another number of layers, ``keep`` is left after the last
            one and the stages before it go down evenly.
        counts: tokens left after each stage in place of all that, one for every layer: all shares or all numbers, none above
            the one before it. Empty = by ``keep``.
        recycle: share of the dropped tokens, the best rated, that is summed up, plus one; 0 = no recycling. Range 0..1.
        clusters: their number, as a share of what is recycled, plus one. Range 0..1.
        neighbours: k of the density; 0 = as many as there are clusters.
        version: 1, or 2 for SparseVLM+: its own lists of tokens per stage, no recycling, the ``heads`` that give the image
            most, and attention divided by what the rotation alone makes of a logit (two vectors of ones, turned as query
            and key are).
        heads: how many heads rate in version 2; all there are, where there are fewer.

    Raters are the text tokens behind the image whose mean softmax (over the text) of image-text products of the input
    embeddings is above average. Clusters: density peaks; their mean stands in the place of their centre, on top of what is
    kept. The released code of version 1 numbers what is left anew and puts the means at the end, best cluster first:
    ``positions="packed"``; that of version 2 keeps positions. Deviation: the little noise that the released code adds to
    densities is a fixed one here, which prefers the earlier of two alike.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **{f"paper-{mean}": {"keep": mean / 576} for mean in PUBLISHED[1]},
        **{f"paper-plus-{mean}": {"keep": mean / 576, "version": 2} for mean in PUBLISHED[2]},
    }

    layers: tuple[int, ...] = ()
    keep: Keep = 1 / 3
    recycle: float = 0.3
    clusters: float = 0.1
    neighbours: int = 0
    version: int = 1
    heads: int = 14

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != ():
            layer_tuple(self, "layers")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"sparsevlm: layers={self.layers} must be ascending and begin at 0 or later")
        check_range(self, "recycle", 0, 1)
        check_range(self, "clusters", 0, 1)
        check_range(self, "neighbours", 0, 100_000)
        check_range(self, "heads", 1, 100_000)
        if self.version not in PUBLISHED:
            raise ValueError(f"sparsevlm: version={self.version!r} is neither 1 nor 2 (SparseVLM+)")

    def bind(self, facts: ModelFacts) -> Method:
        """The paper's layers, unless others are given."""
        return Staged.bind(replace(self, layers=self.layers or scaled(RATING, facts.layers)), facts)

    @property
    def stages(self) -> tuple[int, ...]:
        """The raters are found at the embeddings; tokens go behind each rating layer."""
        return (0, *(layer + 1 for layer in self.layers))

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The rating layers."""
        return self.layers

    @property
    def taking(self) -> tuple[int, ...]:
        """All but the first."""
        return self.stages[1:]

    @property
    def turn_layers(self) -> tuple[int, ...]:
        """Version 2 wants to know the rotation in the rating layers."""
        return self.layers if self.version == 2 else ()

    def left_of_keep(self, at: int, total: int) -> int:
        """By the list nearest to ``keep``."""
        budget = kept_count(self.keep, total) / total
        if len(self.layers) != 3:
            return kept_count(budget ** ((at + 1) / len(self.layers)), total)
        lists = PUBLISHED[self.version]
        nearest = min(lists, key=lambda known: abs(known / 576 - budget))
        return kept_count(min(1.0, lists[nearest][at] / nearest * budget), total)

    def read_rows(self, call: Call) -> Tensor:
        """All text behind the image ``[B, T]``: few rows, and which of them rate is another question."""
        text = call.layout.text_after_image.clone()
        text[:, : call.first] = False  # an earlier turn's
        order = (~text).int().argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
        return order.masked_fill(~text.gather(1, order), -1)

    def score(self, picture: Picture) -> Tensor:
        """Mean over heads and raters; in version 2 over the heads that give the image most, the rotation divided out."""
        assert picture.rows is not None
        rows = picture.rows[:, picture.memory["raters"]]
        if self.version == 2:
            assert picture.turns is not None
            rows = rows / picture.turns[picture.memory["raters"]]
            rows = rows[highest(rows.sum((1, 2)), min(self.heads, len(rows)))]
        return rows.mean((0, 1))

    def choose(self, picture: Picture) -> Tensor:
        """The best rated, and the centres of what is recycled."""
        if picture.stage == 0:
            assert picture.text is not None
            picture.memory["raters"] = raters(picture.tokens, picture.text)
            return torch.arange(len(picture.tokens), device=picture.tokens.device)
        picture.memory.pop("centre_order", None)  # of an earlier stage
        score = self.score(picture)
        chosen = highest(score, picture.count)
        rest = others(len(score), chosen)
        if not self.recycle or self.version == 2 or not len(rest):
            return chosen
        recycled = rest[highest(score[rest], truncated(self.recycle * len(rest)) + 1)]
        tokens = picture.tokens[recycled].float()
        clusters = truncated(self.clusters * len(recycled)) + 1
        centre, goes = density_peaks(tokens, clusters, self.neighbours or clusters)
        sums = torch.zeros(len(centre), tokens.shape[1], device=tokens.device).index_add(0, goes, tokens)
        picture.memory["means"] = sums / goes.bincount(minlength=len(centre))[:, None]
        picture.memory["centres"] = picture.memory["centre_order"] = recycled[centre]
        picture.memory["recycled"], picture.memory["goes"] = recycled, goes
        return torch.cat([chosen, recycled[centre]]).sort().values

    def order(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """The means at the end."""
        if "centre_order" not in picture.memory:
            return None
        centres = picture.memory.pop("centre_order")
        return torch.searchsorted(chosen, torch.cat([chosen[~torch.isin(chosen, centres)], centres]))

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """Cluster means in the place of their centres."""
        if "means" not in picture.memory:
            return None
        means, centres = picture.memory.pop("means"), picture.memory["centres"]
        return picture.tokens.float().index_copy(0, centres, means)[chosen]

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The centre of its cluster for what is recycled, nobody for the rest."""
        owners = super().owners(picture, chosen)
        if "centres" in picture.memory:
            centres, recycled, goes = (picture.memory.pop(name) for name in ("centres", "recycled", "goes"))
            owners = owners.index_copy(0, recycled, centres[goes])
        return owners


def raters(image: Tensor, text: Tensor) -> Tensor:
    """Indices of the text tokens ``[T, D]`` whose mean over the image ``[n, D]`` of softmax(image text^T) is above average."""
    share = torch.softmax(image.float() @ text.float().T, dim=1).mean(0)
    chosen = (share > share.mean()).nonzero().flatten()
    return chosen if len(chosen) else torch.arange(len(text), device=text.device)  # all alike


def density_peaks(tokens: Tensor, count: int, neighbours: int) -> tuple[Tensor, Tensor]:
    """DPC-kNN: centres are dense and far from anything denser.

    Args:
        tokens: ``[n, D]``.
        count: number of clusters.
        neighbours: k of the density.

    Returns:
        ``[count]`` indices of the centres and ``[n]`` the cluster of every token.
    """
    count = min(count, len(tokens))
    distance = torch.cdist(tokens, tokens) / tokens.shape[1] ** 0.5
    near = distance.topk(min(neighbours, len(tokens)), largest=False).values
    density = torch.exp(-near.square().mean(1))
    density = density - torch.arange(len(tokens), device=tokens.device) * 1e-6  # of equal ones the earlier
    denser = density[None] > density[:, None]
    apart = distance.masked_fill(~denser, float("inf")).amin(1)
    apart = torch.where(denser.any(1), apart, distance.max())
    centre = (apart * density).topk(count).indices
    goes = distance[:, centre].argmin(1)
    goes[centre] = torch.arange(count, device=goes.device)
    return centre, goes
