"""PyramidDrop: fewer and fewer visual tokens, layer by layer (arXiv 2410.17247, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import Tensor

from vlm_attn.method import Method, ModelFacts, layer_tuple
from vlm_attn.reduction import Keep, Picture, Reducer, kept_count, scaled

PUBLISHED = (8, 16, 24)  # of 32


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(Reducer):
    """Keep what the last prompt token is about to attend to, fewer at every stage.

    Equation:
        score_j = mean_h softmax(q_last k)[h, j]                  at every stage, before its layer
        left    = keep^(s / S) n                                  behind stage s of S

    Attributes:
        layers: the layers before which tokens go; empty = 8, 16 and 24 of 32 as in the paper, scaled to the model's depth.
        keep: what is left after the last stage. Every stage keeps the same share of the one before: 0.125 over three
            stages is the paper's 50, 25, 12.5 %.

    The rank is the attention (mean over heads) that the last row would pay in the layer itself, read from that layer's own
    projections before anything is taken away. Deviations: original positions (the released code numbers what is left
    anew); chosen per image.
    """

    name: ClassVar[str] = "pyramid_drop"
    paper: ClassVar[str] = "PyramidDrop, arXiv 2410.17247"
    reads_ahead: ClassVar[bool] = True

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
        return Reducer.bind(replace(self, layers=self.layers or scaled(PUBLISHED, facts.layers)), facts)

    @property
    def stages(self) -> tuple[int, ...]:
        """Before each of the layers."""
        return self.layers

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layers themselves."""
        return self.layers

    def left(self, stage: int, total: int) -> int:
        """``total * share ** (stage + 1)``, the share such that the last stage leaves ``keep``."""
        last = self.keep / total if isinstance(self.keep, int) else self.keep
        return kept_count(last ** ((stage + 1) / len(self.layers)), total)

    def score(self, picture: Picture) -> Tensor:
        """Mean over heads of the last row's attention."""
        assert picture.rows is not None
        return picture.rows.mean((0, 1))
