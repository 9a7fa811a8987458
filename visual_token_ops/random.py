# SPDX-License-Identifier: Apache-2.0
"""Random tokens: the baseline every reducer has to beat (UniPruneBench, arXiv 2511.02650, finds it strong)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_attn.reduction import Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class Random(Reducer):
    """Keep random visual tokens.

    Overview:
        in short: baseline: random tokens
        keeps: random tokens
        where: before the language model

    Equation:
        kept = a uniform draw of keep n of n tokens

    Attributes:
        seed: of the draw. The same image of a call is drawn the same way on every device, cached or not; images of one call
            differ.

    A baseline: a method that does not beat it gains nothing by its scores.
    """

    name: ClassVar[str] = "random"
    paper: ClassVar[str] = "baseline of UniPruneBench, arXiv 2511.02650"

    seed: int = 0

    def score(self, picture: Picture) -> Tensor:
        """Uniform numbers."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + picture.number)
        return torch.rand(picture.total, generator=generator).to(picture.places.device)[picture.places]
