# SPDX-License-Identifier: Apache-2.0
"""PAI: pay attention to the image ("Paying more attention to image", arXiv 2407.21771, ECCV 2024).

The row that the next token is read from attends by the image's logits raised by a share of their own size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from vlm_attn.call import Call
from vlm_attn.kernels import ScoreEdit
from vlm_attn.method import Method, ModelFacts, at_depth, check_flag, check_range, layer_tuple


@dataclass(frozen=True, kw_only=True)
class Pai(Method):
    """Raise what the last row's attention gives the image.

    Overview:
        in short: raises what the image gets, in the row that the next token is read from
        what it does: raises every image logit by a share of its size, `s + alpha abs(s)`
        edits: last prompt row and generated rows, nearly all layers

    Equation:
        s'[j] = s[j] + alpha |s[j]|                               j in the image, before the softmax

    Attributes:
        alpha: share of a logit's size that is added, in all heads; the released README's 0.2. Range 0..10.
        layers: layers to edit; empty = from 2 of 32 on, at the same depth of other models.
        skip_first: do as the released code does with its guidance on: leave the prompt's last row alone and begin with the
            first generated token.

    Rows: the last prompt token and all later ones. The paper's guidance by a second stream without the image is the method
    ``guidance``: PAI as a whole is ``patch(model, ["pai", "guidance"])``, as released ``[Pai(skip_first=True), "guidance"]``.
    """

    name: ClassVar[str] = "pai"
    paper: ClassVar[str] = "PAI, arXiv 2407.21771"

    alpha: float = 0.2
    layers: tuple[int, ...] = ()
    skip_first: bool = False

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 10)
        layer_tuple(self, "layers", empty=True)
        check_flag(self, "skip_first")

    @property
    def neutral(self) -> bool:
        """Nothing is raised."""
        return self.alpha == 0

    def bind(self, facts: ModelFacts) -> Pai:
        """Check the layers; without any, those of the released code."""
        return at_depth(self, facts, 2, 32)

    def edit(self, call: Call, layer: int) -> ScoreEdit | None:
        """``s + alpha |s|`` on the image."""
        if layer not in self.layers:
            return None
        start = call.prompt.length if self.skip_first else None
        return call.once(self, lambda: ScoreEdit(self.alpha * call.layout.visual, "magnitude", from_row=start))
