"""SparseVLM: the question's words rate the image; what is dropped is summed up (arXiv 2410.04417, ICML 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.method import Method, ModelFacts, check_range, layer_tuple
from vlm_attn.reduction import Keep, Picture, Reducer, check_keep, highest, kept_count, scaled
from vlm_attn.visual_token_ops.visionzip import others

RATING = (2, 6, 15)  # layers, of 32
# Tokens left after each of three stages, of 576, by mean budget: the paper's lists.
PUBLISHED = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}


@dataclass(frozen=True, kw_only=True)
class SparseVLM(Reducer):
    """Keep what the text tokens that belong to the image attend to, in several layers.

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
        recycle: share of the dropped tokens, the best rated, that is summed up; 0 = no recycling. Range 0..1.
        clusters: their number, as a share of what is recycled, plus one. Range 0..1.

    Raters are the text tokens behind the image whose mean softmax (over the text) of image-text products of the input
    embeddings is above average. Clusters: density peaks (k = 5); their mean stands in the place of their centre, on top of
    what is kept. Deviations: the mean stands in the centre's place instead of at the end; positions are the original ones; the
    released code takes as many neighbours for a density as there are clusters.
    """

    name: ClassVar[str] = "sparsevlm"
    paper: ClassVar[str] = "SparseVLM, arXiv 2410.04417"

    layers: tuple[int, ...] = ()
    keep: Keep = 1 / 3
    counts: tuple[Keep, ...] = ()
    recycle: float = 0.3
    clusters: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != ():
            layer_tuple(self, "layers")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=0) < 0:
            raise ValueError(f"sparsevlm: layers={self.layers} must be ascending and begin at 0 or later")
        given: Any = self.counts
        object.__setattr__(self, "counts", (given,) if isinstance(given, int | float) else tuple(given))
        for count in self.counts:
            check_keep(self, "counts", count)
        if len(set(map(type, self.counts))) > 1 or list(self.counts) != sorted(self.counts, reverse=True):
            raise ValueError(
                f"sparsevlm: counts={self.counts} must be all shares (floats) or all numbers (ints), none above the one before"
            )
        check_range(self, "recycle", 0, 1)
        check_range(self, "clusters", 0, 1)

    @property
    def neutral(self) -> bool:
        """Everything is kept."""
        return self.counts[-1] == 1.0 and isinstance(self.counts[-1], float) if self.counts else super().neutral

    def bind(self, facts: ModelFacts) -> Method:
        """The paper's layers, unless others are given."""
        layers = self.layers or scaled(RATING, facts.layers)
        if self.counts and len(self.counts) != len(layers):
            raise ValueError(f"sparsevlm: counts={self.counts} for layers {layers}: give one for every layer")
        return Reducer.bind(replace(self, layers=layers), facts)

    def start(self, call: Call, processor: Any) -> None:
        """Check the largest count as well."""
        super().start(call, processor)
        least = min((image.stop - image.start for image in call.prompt.images), default=0)
        most = max(self.counts, default=0)
        if least and isinstance(most, int) and most > least:
            raise ValueError(
                f"sparsevlm: counts={self.counts} begins with more than the {least} tokens of an image: give numbers of "
                f"1..{least}, or shares in (0, 1]"
            )

    @property
    def stages(self) -> tuple[int, ...]:
        """The raters are found at the embeddings; tokens go behind each rating layer."""
        return (0, *(layer + 1 for layer in self.layers))

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The rating layers."""
        return self.layers

    def left(self, stage: int, total: int) -> int:
        """Tokens after a stage; the first takes none."""
        if stage == 0:
            return total
        if self.counts:
            return kept_count(self.counts[stage - 1], total)
        budget = kept_count(self.keep, total) / total
        if len(self.layers) != 3:
            return kept_count(budget ** (stage / len(self.layers)), total)
        nearest = min(PUBLISHED, key=lambda known: abs(known / 576 - budget))
        return kept_count(min(1.0, PUBLISHED[nearest][stage - 1] / nearest * budget), total)

    def read_rows(self, call: Call) -> Tensor:
        """All text behind the image ``[B, T]``: few rows, and which of them rate is another question."""
        text = call.layout.text_after_image.clone()
        text[:, : call.first] = False  # an earlier turn's
        order = (~text).int().argsort(dim=1, stable=True)[:, : int(text.sum(1).max())]
        return order.masked_fill(~text.gather(1, order), -1)

    def score(self, picture: Picture) -> Tensor:
        """Mean over heads and raters."""
        assert picture.rows is not None
        return picture.rows[:, picture.memory["raters"]].mean((0, 1))

    def choose(self, picture: Picture) -> Tensor:
        """The best rated, and the centres of what is recycled."""
        if picture.stage == 0:
            assert picture.text is not None
            picture.memory["raters"] = raters(picture.tokens, picture.text)
            return torch.arange(len(picture.tokens), device=picture.tokens.device)
        score = self.score(picture)
        chosen = highest(score, picture.count)
        rest = others(len(score), chosen)
        recycled = rest[highest(score[rest], int(self.recycle * len(rest)))]
        if not len(recycled):
            return chosen
        tokens = picture.tokens[recycled].float()
        centre, goes = density_peaks(tokens, int(self.clusters * len(recycled)) + 1)
        sums = torch.zeros(len(centre), tokens.shape[1], device=tokens.device).index_add(0, goes, tokens)
        picture.memory["means"] = sums / goes.bincount(minlength=len(centre))[:, None]
        picture.memory["centres"] = recycled[centre]
        picture.memory["recycled"], picture.memory["goes"] = recycled, goes
        return torch.cat([chosen, recycled[centre]]).sort().values

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


def density_peaks(tokens: Tensor, count: int, neighbours: int = 5) -> tuple[Tensor, Tensor]:
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
