# SPDX-License-Identifier: Apache-2.0
"""The guidance of PAI (arXiv 2407.21771, ECCV 2024): classifier-free guidance against the prompt without its picture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlm_attn.branch import Branch, Run, plausible, without_image
from vlm_attn.method import check_range


@dataclass(frozen=True, kw_only=True)
class Guidance(Branch):
    """Contrast with what the model says without the picture.

    The second half of PAI; ``["pai", "guidance"]`` is the whole of it.

    Overview:
        in short: contrasts with what it says without the picture
        contrasts the next token with: what it says without the picture; `["pai", "guidance"]` is all of PAI
        formula: `gamma (log p - log p') + log p'`

    Equation:
        gamma (log p - log p') + log p'                           p' without the picture; only tokens with p >= beta max p

    Attributes:
        gamma: strength; 1 = no guidance. The released README's 1.1; its caption evaluation uses 2. Range 1..20.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.

    Deviations from the released code: its second cache does not follow the beams, so with ``num_beams`` a beam may be
    contrasted with another one's past; here it follows, and the answers differ. With ``gamma = 1`` that code returns before
    its cut, here the cut stays: greedy and beams above it are the same, samples are not (``beta = 0`` leaves the cut out).
    Cost: a second prompt, without the image's tokens, and further rows in the forward of every token.
    """

    name: ClassVar[str] = "guidance"
    paper: ClassVar[str] = "PAI, arXiv 2407.21771"

    gamma: float = 1.1
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "gamma", 1, 20)
        check_range(self, "beta", 0, 1)

    @property
    def neutral(self) -> bool:
        """No guidance and no cut."""
        return self.gamma == 1 and self.beta == 0

    def second(self, run: Run) -> dict[str, Tensor]:
        """The prompt without its images."""
        return without_image(run)

    def combine(self, main: Tensor, second: Tensor) -> Tensor:
        """Both as log probabilities, on what is plausible."""
        main, second = main.log_softmax(-1), second.log_softmax(-1)
        return plausible(self.gamma * (main - second) + second, main, self.beta)
