# SPDX-License-Identifier: Apache-2.0
"""VCD: visual contrastive decoding (arXiv 2311.16922, CVPR 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_attn.branch import Contrastive, Run, with_pixels

STEPS = 1000  # of the diffusion


@dataclass(frozen=True, kw_only=True)
class Vcd(Contrastive):
    """Contrast with what the model says to a noisy picture.

    What it says to noise as well comes from the language, not from the picture.

    Overview:
        in short: contrasts with what the model says to a noisy picture
        contrasts the next token with: what the model says to a noisy picture
        formula: `(1 + alpha) l - alpha l'`
        needs: `pixel_values`

    Equation:
        x' = sqrt(a_t) x + sqrt(1 - a_t) noise                    the picture at step t = noise_step of a diffusion
        l  -> (1 + alpha) l(x) - alpha l(x')                      only tokens with p >= beta max p

    Attributes:
        alpha: strength of the contrast. Range 0..20.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.
        noise_step: step of the 1000 of the diffusion whose noise is added. Range 0..999.
        seed: of the noise.

    The paper samples; greedy and beams work as well, but compare with the same way of decoding. Deviation: the noise is drawn
    per picture from the seed, so that a picture gets the same noise in any batch. Cost: a second prompt, and
    further rows in the forward of every token.
    """

    name: ClassVar[str] = "vcd"
    paper: ClassVar[str] = "VCD, arXiv 2311.16922"

    noise_step: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        for field, high in (("noise_step", STEPS - 1), ("seed", 2**63 - 1)):
            value = getattr(self, field)
            if isinstance(value, bool) or value != int(value) or not 0 <= value <= high:
                raise ValueError(f"vcd: {field}={value!r} is no integer in [0, {high}]")
            object.__setattr__(self, field, int(value))

    def second(self, run: Run) -> dict[str, Tensor]:
        """The same prompt with noisy pictures."""
        return with_pixels(run, lambda pixels, number: self.noisy(pixels))

    def noisy(self, pixels: Tensor) -> Tensor:
        """``x' = sqrt(abar_t) x + sqrt(1 - abar_t) eps`` (equation 2), of one picture."""
        kept = signal_kept()[self.noise_step]
        noise = torch.randn(pixels.shape, generator=torch.Generator().manual_seed(self.seed)).to(pixels.device)
        return (kept.sqrt() * pixels.float() + (1 - kept).sqrt() * noise).to(pixels.dtype)


def signal_kept() -> Tensor:
    """``abar_t`` ``[1000]``, the product of ``1 - beta_t`` up to t, the betas spaced by a sigmoid from 1e-5 to 5e-3."""
    betas = torch.linspace(-6, 6, STEPS).sigmoid() * (5e-3 - 1e-5) + 1e-5
    return (1 - betas).cumprod(0)
