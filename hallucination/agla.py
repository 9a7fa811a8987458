# SPDX-License-Identifier: Apache-2.0
"""AGLA: assembly of global and local attention (arXiv 2406.12718, CVPR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from vlm_attn.branch import PIXELS, Branch, Run, plausible, with_pixels
from vlm_attn.call import Call
from vlm_attn.clip import check_clip, gradient_map, load, shown
from vlm_attn.method import ModelFacts, at_depth, check_range, layer_tuple


@dataclass(frozen=True, kw_only=True)
class Agla(Branch):
    """Add what the model says to a picture of which only the parts that the question looks at are left.

    Overview:
        in short: adds what it says to the parts that the question looks at
        contrasts the next token with: adds what it says to a picture of which only what the question looks at is left
        formula: `l + alpha l'`
        needs: one grid per picture; with `clip=` also a processor and `vlm-attn[clip]`

    Equation:
        l -> l + alpha l'                                         l' with part of the picture; only tokens with p >= beta max p

    Attributes:
        alpha: weight of the second stream. Range 0..20.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.
        keep: share of a picture's tokens that is left. Range (0, 1]; ``"similarity"`` (with ``clip``): ``1 - s / 2``, where
            s is the cosine of picture and question, as in the paper.
        layers: layers whose attention from the question to the image ranks the tokens; empty = the middle one.
        clip: ``architecture:weights`` of open_clip, such as ``"ViT-L-14-336:openai"``: a CLIP model ranks instead, by Grad-CAM
            of its cosine of picture and question. It needs ``patch(processor=)`` and pictures of one block of pixels each.

    Deviations: the paper's second opinion is Grad-CAM of BLIP's image-text matching. Here it is CLIP's, or the model's own
    attention, read while the prompt runs; and the share is fixed unless told otherwise. The cells are the model's tokens, where
    the released code masks pixels of a blurred map. What is taken away becomes zero in the processor's normalised pixels, a
    grey; that code paints it black. Beside a method that edits the last row, that row does not count as part of the question.
    Cost: a second prompt, its picture included, and further rows in the forward of every token.
    """

    name: ClassVar[str] = "agla"
    paper: ClassVar[str] = "AGLA, arXiv 2406.12718"
    after_prompt: ClassVar[bool] = True
    loads: ClassVar[tuple[str, ...]] = ("clip",)

    alpha: float = 2.0
    beta: float = 0.5
    keep: float | Literal["similarity"] = 0.75
    layers: tuple[int, ...] = ()
    clip: str = ""

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 20)
        check_range(self, "beta", 0, 1)
        if self.clip:
            check_clip(self.name, self.clip)
        if self.keep != "similarity":
            check_range(self, "keep", 0, 1, open_low=True)
        elif not self.clip:
            raise ValueError(
                'agla: keep="similarity" asks a CLIP model: give clip="architecture:weights", or keep= a share'
            )
        layer_tuple(self, "layers", empty=True)

    @property
    def neutral(self) -> bool:
        """Nothing is added and nothing is cut."""
        return self.alpha == 0 and self.beta == 0

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layers that rank."""
        return () if self.clip else self.layers

    def bind(self, facts: ModelFacts) -> Agla:
        """Check the layers; without any, the middle one. Load CLIP, so that a wrong name is told when the model is patched."""
        if self.clip and not self.neutral:
            load(self.clip)
        return at_depth(self, facts, 16, 17)

    def start(self, call: Call, processor: Any) -> None:
        """Let CLIP look at the pictures.

        Raises:
            ValueError, NotImplementedError: see :func:`vlm_attn.clip.shown`.
        """
        if self.clip:
            for number, image, pixels, text in shown(self.name, call, processor):
                call.memory(self)[number] = gradient_map(self.clip, pixels, text, image.grid)

    def read_rows(self, call: Call) -> Tensor:
        """The question's columns ``[B, M]``, padded on the right with -1."""
        spans, device = call.layout.query, call.layout.group.device
        rows = [torch.arange(start, stop, device=device) for start, stop in spans]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def prompt_read(self, call: Call, rows: dict[int, Tensor]) -> None:
        """Attention of the question to every column, summed over layers, heads and words: ``[B, P]``."""
        if self.clip:
            return
        valid = (self.read_rows(call) >= 0)[:, None, :, None]
        looks: Any = sum((rows[layer] * valid).sum((1, 2)) for layer in self.layers)
        times = len(looks) // call.prompt.batch  # beams
        for number, image in enumerate(call.prompt.images):
            call.memory(self)[number] = looks[image.row * times, image.columns.to(looks.device)], 0.0

    def refuse(self, run: Run) -> None:
        """One block of pixels for every picture, whose tokens form a grid."""
        super().refuse(run)
        pixels, grid = run.inputs.get("pixel_values"), run.inputs.get(PIXELS["pixel_values"])
        images = run.call.prompt.images
        held = len(grid) if grid is not None else len(pixels) if pixels is not None and pixels.ndim == 4 else None
        whole = all(
            image.grid[0] * image.grid[1] == image.stop - image.start for image in images
        )  # no row breaks either
        if pixels is None or "pixel_values_videos" in run.inputs:
            raise ValueError("agla changes pictures, no videos: pass pixel_values to generate()")
        if held != len(images) or not whole or any(image.grid[0] == 1 for image in images):
            raise NotImplementedError(
                "agla hides parts of a picture by its grid of tokens, and here tokens and pixels are not laid out alike "
                "(tiles): use a family with one grid for every picture, such as LLaVA-1.5 or Qwen-VL"
            )

    def second(self, run: Run) -> dict[str, Tensor]:
        """The same prompt with what the question does not look at taken out of its pictures."""

        def hide(pixels: Tensor, number: int) -> Tensor:
            looks, similar = run.call.memory(self)[number]
            share = 1 - max(0.0, similar) / 2 if self.keep == "similarity" else self.keep
            left = most(looks, share).view(run.call.prompt.images[number].grid).to(pixels)
            if pixels.ndim == 4:
                return pixels * interpolate(left[None, None], pixels.shape[-2:], mode="nearest")
            return pixels * left.flatten().repeat_interleave(len(pixels) // left.numel())[:, None]

        return with_pixels(run, hide)

    def combine(self, main: Tensor, second: Tensor) -> Tensor:
        """The sum, on what is plausible."""
        return plausible(main + self.alpha * second, main, self.beta)


def most(score: Tensor, share: float) -> Tensor:
    """``[n]`` bool: the ``max(1, round(share * n))`` highest."""
    best: Any = score.topk(max(1, round(share * len(score)))).indices
    return torch.zeros_like(score, dtype=torch.bool).index_fill(0, best, True)
