# SPDX-License-Identifier: Apache-2.0
"""Heads-guided attention in the middle layers ("Devils in middle layers", arXiv 2411.16724, CVPR 2025).

Heads disagree on what to look at; what they look at together, on average, is added to each of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlm_attn.call import Call
from vlm_attn.kernels import ScoreEdit
from vlm_attn.method import Method, ModelFacts, at_depth, check_range, layer_tuple


@dataclass(frozen=True, kw_only=True)
class HeadGuided(Method):
    """Add to every head what the heads look at on average.

    Overview:
        in short: adds to every head what the heads look at on average, in the middle layers
        what it does: adds to every head's image logits the heads' mean size of them
        edits: last prompt row and generated rows, middle layers

    Equation:
        s'[h, j] = s[h, j] + alpha mean_h |s[h, j]|               j in the image, before the softmax

    Attributes:
        alpha: share of the heads' mean size that is added. Range 0..10.
        layers: layers to edit; empty = 5..18 of 32 (the released ``--guide-range 5,18`` means both ends), at the same depth
            of other models.

    Rows: the last prompt token and all later ones.
    """

    name: ClassVar[str] = "head_guided"
    paper: ClassVar[str] = "Devils in middle layers, arXiv 2411.16724"

    alpha: float = 0.5
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 10)
        layer_tuple(self, "layers", empty=True)

    @property
    def neutral(self) -> bool:
        """Nothing is added."""
        return self.alpha == 0

    def bind(self, facts: ModelFacts) -> HeadGuided:
        """Check the layers; without any, those of the released command."""
        return at_depth(self, facts, 5, 19)

    def edit(self, call: Call, layer: int) -> ScoreEdit | None:
        """``s_h + alpha mean_h |s_h|`` on the image."""
        if layer not in self.layers:
            return None
        return call.once(self, lambda: ScoreEdit(self.alpha * call.layout.visual, "head_mean"))
