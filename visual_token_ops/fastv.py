"""FastV: after layer K most visual tokens are worth nothing to the last prompt token (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_attn.method import check_range
from vlm_attn.reduction import Keep, Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class FastV(Reducer):
    """Keep what the last prompt token attends to in layer K - 1, from layer K on.

    Equation:
        score_j = mean_h A[h, last, j] in layer K - 1             the largest keep n stay from layer K on

    Attributes:
        layer: K, the first layer that runs on fewer tokens. At least 1.
        keep: 1 - R of the paper.

    Original positions, order kept. Deviations: chosen per image, once per prompt (cached and uncached decoding agree);
    the attention row comes from one extra row product, not from an eager layer.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"

    layer: int = 3
    keep: Keep = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "layer", 1, 10_000)

    @property
    def stages(self) -> tuple[int, ...]:
        """Once, before layer K."""
        return (self.layer,)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layer before."""
        return (self.layer - 1,)

    def score(self, picture: Picture) -> Tensor:
        """Mean over heads of the last row's attention."""
        assert picture.rows is not None
        return picture.rows.mean((0, 1))
