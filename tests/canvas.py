# SPDX-License-Identifier: Apache-2.0
"""Runs of a model that denoises a canvas beside its prompt's cache (DiffusionGemma)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

Inputs = dict[str, Any]


def step(model: Any, inputs: Inputs, mask: Tensor, **more: Any) -> Any:
    """One step of every row's canvas, the same random one; ``mask [B, P]`` hides padding from it."""
    length = model.config.canvas_length
    canvas = torch.randint(3, 90, (1, length), generator=torch.Generator().manual_seed(0)).expand(len(mask), -1)
    shown = torch.nn.functional.pad(mask, (0, length), value=1)
    with torch.no_grad():
        return model(**inputs, decoder_input_ids=canvas, decoder_attention_mask=shown, **more)


def logits(model: Any, inputs: Inputs, **more: Any) -> Tensor:
    """``[B, canvas, V]`` of one step behind a prompt."""
    return step(model, inputs, inputs["attention_mask"], **more).logits


def denoise(model: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """``generate`` of two canvases in three steps each: the tokens, and the logits of every step ``[6, B, canvas, V]``."""
    seen: list[Tensor] = []
    handle = model.lm_head.register_forward_hook(lambda m, a, out: seen.append(out.clone()))
    torch.manual_seed(0)
    length = 2 * model.config.canvas_length
    sizes = {"max_new_tokens": length, "max_denoising_steps": 3, "eos_token_id": None}
    try:
        out = model.generate(**inputs, **sizes, **options)
    finally:
        handle.remove()
    return out.sequences[:, -length:], torch.stack(seen)
