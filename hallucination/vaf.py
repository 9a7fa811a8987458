# SPDX-License-Identifier: Apache-2.0
"""VAF: visual amplification fusion ("ClearSight", arXiv 2503.13107, CVPR 2025).

In the middle layers, where text and image meet, logits of image tokens are multiplied up and those of the system prompt
down.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from vlm_attn.call import Call
from vlm_attn.kernels import Group, ScoreEdit
from vlm_attn.method import Method, ModelFacts, at_depth, check_range, layer_tuple


@dataclass(frozen=True, kw_only=True)
class Vaf(Method):
    """Multiply the logits of the image up and those of the system prompt down.

    Overview:
        in short: multiplies the image's logits up and the system prompt's down, in the middle layers
        what it does: multiplies image logits up and those before the image down
        edits: text rows behind the image, a band of middle layers

    Equation:
        s'[j] = visual s[j]                                       j in the image, before the softmax
        s'[j] = system s[j]                                       j before the first image

    Attributes:
        visual: factor on the logits of image tokens. Range (0, 10].
        system: factor on the logits of what stands before the first image. Range (0, 10].
        layers: layers to edit; empty = 9..14 of 32, at the same depth of other models.

    Rows: all text rows behind the image, in the prompt and later (the released code: all rows behind it, which with one
    image is the same). All heads, as the released code has it; the paper also speaks of choosing heads. Mind that a factor
    above 1 *lowers* a logit that is negative: so does the released code.
    """

    name: ClassVar[str] = "vaf"
    paper: ClassVar[str] = "VAF (ClearSight), arXiv 2503.13107"
    edited_rows: ClassVar[Literal["last", "text"]] = "text"

    visual: float = 1.15
    system: float = 0.95
    layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        check_range(self, "visual", 0, 10, open_low=True)
        check_range(self, "system", 0, 10, open_low=True)
        layer_tuple(self, "layers", empty=True)

    @property
    def neutral(self) -> bool:
        """Both factors are 1."""
        return self.visual == self.system == 1

    def bind(self, facts: ModelFacts) -> Vaf:
        """Check the layers; without any, the paper's."""
        return at_depth(self, facts, 9, 15)

    def edit(self, call: Call, layer: int) -> ScoreEdit | None:
        """``visual s`` on the image, ``system s`` before it."""
        if layer not in self.layers:
            return None
        return call.once(self, lambda: self.factors(call))

    def factors(self, call: Call) -> ScoreEdit:
        """The same in every layer."""
        visual = call.layout.visual
        system = (visual.cumsum(1) == 0) & (call.layout.group != Group.PAD)
        return ScoreEdit((self.visual - 1) * visual + (self.system - 1) * system, "logit")
