# SPDX-License-Identifier: Apache-2.0
"""VTW: from layer K on the text knows what the image said, and the image can go (arXiv 2405.05803, AAAI 2025)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from vlm_attn.method import Method, ModelFacts, check_range
from vlm_attn.reduction import Keep, Reducer, scaled


@dataclass(frozen=True, kw_only=True)
class VTW(Reducer):
    """Withdraw all visual tokens before layer K.

    Overview:
        in short: nothing
        keeps: no visual token
        where: before layer K

    Equation:
        left = n in layers below K, 0 from K on

    Attributes:
        layer: K, at least 1; 0 = the paper's 15 of 32 (LLaVA-1.5-7B), scaled to the model's depth.
        keep: 0.0 takes them all, 1.0 takes none; there is nothing in between.

    What a later word needs of the image must have reached the text by layer K. The paper's K is for one model: at the same
    depth of another it was not measured.
    """

    name: ClassVar[str] = "vtw"
    paper: ClassVar[str] = "VTW, arXiv 2405.05803"

    layer: int = 0
    keep: Keep = 0.0

    def check(self) -> None:
        """All or nothing."""
        if self.keep not in (0.0, 1.0):
            raise ValueError(f"vtw: keep={self.keep!r}: it takes all visual tokens (0.0) or none (1.0)")
        object.__setattr__(self, "keep", float(self.keep))
        check_range(self, "layer", 0, 10_000)

    def bind(self, facts: ModelFacts) -> Method:
        """The paper's layer, unless another is given."""
        return Reducer.bind(replace(self, layer=self.layer or scaled((15,), facts.layers)[0]), facts)

    @property
    def stages(self) -> tuple[int, ...]:
        """Once, before layer K."""
        return (self.layer,)
