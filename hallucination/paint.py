# SPDX-License-Identifier: Apache-2.0
"""PAINT ("Fixing imbalanced attention", arXiv 2501.12206): two kinds of image tokens are raised, each by its own share.

The vision tower says which: its first layer looks at details (local tokens), its last but one at a few tokens that stand for
the whole picture (summary tokens).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.kernels import ScoreEdit
from vlm_attn.method import (
    PROJECTED,
    Method,
    ModelFacts,
    at_depth,
    check_flag,
    check_range,
    layer_tuple,
    unknown_turn,
)


@dataclass(frozen=True, kw_only=True)
class Paint(Method):
    """Raise what the vision tower's CLS token looks at, early and late.

    Overview:
        in short: raises what the image tokens get that the vision tower's CLS token looks at, early and late (LLaVA,
            LLaVA-NeXT, InternVL)
        what it does: raises the logits of two sets of image tokens only, each by a share of its size: those the vision
            tower's CLS token looks at in its first layer (`alpha`), and the few that stand out in the projected one
            (`beta`)
        edits: last prompt row and generated rows, nearly all layers
        needs: a tower with a CLS token, as `visionzip`

    Equation:
        summary = { j : c[j] > Q3 + fence (Q3 - Q1) }             c attention of CLS in the projected layer, Q its quartiles
        local   = the share of c0 that is highest, no summary     c0 the same in the tower's first layer
        s'[j]   = s[j] + alpha |s[j]|                             j local, before the softmax
        s'[j]   = s[j] + beta |s[j]|                              j a summary

    Attributes:
        alpha: share of a logit's size that is added for local tokens. Range 0..10.
        beta: the same for summary tokens. Range 0..10.
        layers: layers to edit; empty = from 2 of 32 on, at the same depth of other models.
        share: of an image's tokens that are local: those CLS looks at most in the tower's first layer, without the summary
            tokens. Range 0..1.
        fence: a token is a summary where CLS, in the layer that is projected, gives it more than the third quartile plus this
            many times the distance of the quartiles. Range 0..100.
        skip_first: do as the released code does with its guidance on: leave the prompt's last row alone and begin with the
            first generated token.

    Rows: the last prompt token and all later ones, in all heads, as the released code has it; the paper also speaks of heads.
    What that code calls its CFG is the method ``guidance`` as well: ``patch(model, [Paint(skip_first=True), "guidance"])``.
    Deviations: the sets are taken image by image; a second
    "spatial" stream of the code is left out, which ranks sums that are always 1 and whose share is 0 by default. Towers
    without a CLS token (SigLIP, Qwen-VL) are refused.
    """

    name: ClassVar[str] = "paint"
    paper: ClassVar[str] = "PAINT, arXiv 2501.12206"
    cls_layers: ClassVar[tuple[int, ...]] = (0, PROJECTED)

    alpha: float = 0.7
    beta: float = 0.3
    layers: tuple[int, ...] = ()
    share: float = 0.25
    fence: float = 1.5
    skip_first: bool = False

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 10)
        check_range(self, "beta", 0, 10)
        check_range(self, "share", 0, 1)
        check_range(self, "fence", 0, 100)
        layer_tuple(self, "layers", empty=True)
        check_flag(self, "skip_first")

    @property
    def neutral(self) -> bool:
        """Nothing is raised."""
        return self.alpha == self.beta == 0

    def bind(self, facts: ModelFacts) -> Paint:
        """Check the layers; without any, those of the released code."""
        return at_depth(self, facts, 2, 32)

    def start(self, call: Call, processor: Any) -> None:
        """The tower must run, or the call that filled the cache must know what it saw."""
        if any(image.start >= call.first for image in call.prompt.images) and call.pixels is None:
            raise ValueError("paint reads the vision tower: pass pixel_values, not inputs_embeds")
        call.memory(self)["weight"] = weight = torch.zeros(call.prompt.group.shape, device=call.prompt.group.device)
        if any(image.start < call.first for image in call.prompt.images):
            if call.earlier is None or self not in call.earlier.methods:
                raise unknown_turn(self, "what the tower looked at is")
            known = call.earlier.memory(self)["weight"][:, : call.first]
            weight[:, : known.shape[1]] = known

    def tower_read(self, call: Call, number: int, attention: list[Tensor]) -> None:
        """``alpha`` on an image's local tokens, ``beta`` on its summary tokens."""
        local, summary = token_sets(*attention, share=self.share, fence=self.fence)
        image = call.prompt.images[number]
        weight = call.memory(self)["weight"]
        weight[image.row, image.columns.to(weight.device)] = self.alpha * local + self.beta * summary

    def edit(self, call: Call, layer: int) -> ScoreEdit | None:
        """``s + w |s|`` on the image."""
        if layer not in self.layers:
            return None
        weight, start = call.memory(self)["weight"], call.prompt.length if self.skip_first else None
        return call.once(
            self, lambda: ScoreEdit(weight.repeat_interleave(call.batch // len(weight), 0), from_row=start)
        )


def token_sets(early: Tensor, late: Tensor, *, share: float, fence: float) -> tuple[Tensor, Tensor]:
    """Local and summary tokens of an image.

    Args:
        early: ``[n]`` attention of CLS in the tower's first layer.
        late: ``[n]`` attention of CLS in the layer that is projected.
        share: of tokens that are local, before the summary tokens are taken out.
        fence: distances of the quartiles above the third.

    Returns:
        Two ``[n]`` bool tensors.
    """
    low, high = late.float().quantile(late.new_tensor([0.25, 0.75], dtype=torch.float32)).unbind()
    summary = late > high + fence * (high - low)
    best = early.topk(int(share * len(early))).indices
    return torch.zeros_like(summary).index_fill(0, best, True) & ~summary, summary
