# SPDX-License-Identifier: Apache-2.0
"""FastV: after layer K most visual tokens are worth nothing to the last prompt token (arXiv 2403.06764, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_attn.method import check_range
from vlm_attn.reduction import Keep, Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class FastV(Reducer):
    """Keep what the last prompt token attends to in layer K - 1, from layer K on.

    Overview:
        in short: what the last prompt token attends to
        keeps: what the last prompt token attends to in layer K - 1
        where: before layer K

    Equation:
        score_j = mean_h A[h, last, j] in layer K - 1             the largest keep n stay from layer K on

    Attributes:
        layer: K, the first layer that runs on fewer tokens. At least 1.
        keep: 1 - R of the paper.

    A share is rounded as Python's ``round`` does, of equal scores the earlier token stays. Deviations: chosen per image, once
    per prompt (cached and uncached decoding agree); the attention row comes from one extra row product, not from an eager
    layer.

    Rows: the paper's own, ``paper-k2-r50`` and ``paper-k3-r50`` (K, R). ``paper-192``, ``-128`` and ``-64`` are the rows of
    later papers' tables, which count the mean over 32 layers: K = 2 and the share that gives it, since those papers do not
    say theirs.
    """

    name: ClassVar[str] = "fastv"
    paper: ClassVar[str] = "FastV, arXiv 2403.06764"

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "paper-k2-r50": {"layer": 2, "keep": 0.5},
        "paper-k3-r50": {"layer": 3, "keep": 0.5},
        "paper-192": {"layer": 2, "keep": 166 / 576},
        "paper-128": {"layer": 2, "keep": 98 / 576},
        "paper-64": {"layer": 2, "keep": 30 / 576},
    }

    layer: int = 3
    keep: Keep = 0.5

    @staticmethod
    def whole(tokens: float) -> int:
        """Rounded to the nearest number, halves to the even one."""
        return round(tokens)

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
