# SPDX-License-Identifier: Apache-2.0
"""Layers that visual tokens bypass: their rows and keys are absent there, their states are carried past and put back.

The study (arXiv 2511.15098, CVPR 2026 Findings) recommends it for models adapted from next-token ones, whose answers look at
the image in few layers, and gives no figures. It works while denoising and while writing token after token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

from vlm_attn.call import Call
from vlm_attn.method import Method, ModelFacts, check_layers, layer_tuple
from vlm_attn.reduction import Keep, Reducer


@dataclass(frozen=True, kw_only=True)
class LayerSkip(Reducer):
    """Keep visual tokens out of some layers.

    Overview:
        in short: all; they bypass some layers
        keeps: all; they bypass some layers and are put back behind them
        where: in `layers` (the upper half)

    Equation:
        left = 0 in layers, n in the others                       x_j behind such a layer = x_j before it

    Attributes:
        layers: the layers they bypass; none given: the upper half.
        keep: 1.0 keeps them in every layer after all; nothing but 0.0 and 1.0.

    The study names no layers and gives no figures: the upper half is our default.
    """

    name: ClassVar[str] = "layer_skip"
    paper: ClassVar[str] = "recommended in arXiv 2511.15098"

    layers: tuple[int, ...] = ()
    keep: Keep = 0.0

    def check(self) -> None:
        """Check the layers' type."""
        if self.keep not in (0.0, 1.0):
            raise ValueError(f"layer_skip: keep={self.keep!r}: visual tokens bypass the layers (0.0) or do not (1.0)")
        object.__setattr__(self, "keep", float(self.keep))
        if self.layers != ():
            layer_tuple(self, "layers")

    @property
    def stages(self) -> tuple[int, ...]:
        """Nothing is taken away for good."""
        return ()

    @property
    def skipped(self) -> tuple[int, ...]:
        """The layers they bypass."""
        return self.layers

    def bind(self, facts: ModelFacts) -> Method:
        """The upper half, unless layers are given."""
        layers = self.layers or tuple(range(facts.layers // 2, facts.layers))
        check_layers(self, "layers", layers, facts)
        return replace(self, layers=layers)

    def start(self, call: Call, processor: Any) -> None:
        """Refuse to skip where another method takes tokens away in the middle."""
        super().start(call, processor)
        others = [m.name for m in call.methods if isinstance(m, Reducer) and any(stage > 0 for stage in m.stages)]
        if others:
            raise ValueError(
                f"layer_skip puts visual tokens back after its layers, {'+'.join(others)} takes them away between layers: "
                "combine it with a reducer that chooses before the language model"
            )
