# SPDX-License-Identifier: Apache-2.0
"""PyramidDrop: fewer and fewer visual tokens, layer by layer (arXiv 2410.17247, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

from torch import Tensor

from vlm_attn.method import Method, ModelFacts, layer_tuple
from vlm_attn.reduction import Keep, Picture, Staged, kept_count, scaled, truncated

PUBLISHED = (8, 16, 24)  # of 32


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Staged):
    """Keep what the last prompt token is about to attend to, fewer at every stage.

    Overview:
        in short: what the last prompt token is about to attend to, fewer and fewer
        keeps: what the last prompt token is about to attend to, the same share of the rest at each stage
        where: before layers 8, 16, 24 of 32, scaled

    Equation:
        score_j = mean_h softmax(q_last k)[h, j]                  at every stage, before its layer
        left    = keep^(s / S) n                                  behind stage s of S

    Attributes:
        layers: the layers before which tokens go; empty = 8, 16 and 24 of 32 as in the paper, scaled to the model's depth.
        keep: what is left after the last stage. Every stage keeps the same share of the one before: 0.125 over three
            stages is the paper's 50, 25, 12.5 %. Shares of tokens are cut off, not rounded.
        counts: tokens left after each stage, in place of ``keep``: all shares or all numbers, none above the one before it.
            Empty = by ``keep``.

    The rank is the attention (mean over heads) that the last row would pay in the layer itself, read from that layer's own
    projections before anything is taken away. The released code numbers what is left anew after every stage:
    ``positions="packed"``. Deviation: chosen per image. The row ``paper`` is what is left by default; with these layers the
    mean over them cannot be less than a quarter of the tokens.
    """

    name: ClassVar[str] = "pyramid_drop"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    reads_ahead: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {"paper": {"counts": (0.5, 0.25, 0.125)}}
    whole = staticmethod(truncated)

    layers: tuple[int, ...] = ()
    keep: Keep = 0.125

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers != ():
            layer_tuple(self, "layers")
        if list(self.layers) != sorted(set(self.layers)) or min(self.layers, default=1) < 1:
            raise ValueError(f"pyramid_drop: layers={self.layers} must be ascending and begin at 1 or later")

    def bind(self, facts: ModelFacts) -> Method:
        """The paper's layers, unless others are given."""
        return Staged.bind(replace(self, layers=self.layers or scaled(PUBLISHED, facts.layers)), facts)

    @property
    def stages(self) -> tuple[int, ...]:
        """Before each of the layers."""
        return self.layers

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layers themselves."""
        return self.layers

    def left_of_keep(self, at: int, total: int) -> int:
        """``total * share ** (at + 1)``, the share such that the last stage leaves ``keep``."""
        assert not isinstance(self.keep, str)
        last = self.keep / total if isinstance(self.keep, int) else self.keep
        return kept_count(last ** ((at + 1) / len(self.layers)), total, self.whole)

    def score(self, picture: Picture) -> Tensor:
        """Mean over heads of the last row's attention."""
        assert picture.rows is not None
        return picture.rows.mean((0, 1))
