# SPDX-License-Identifier: Apache-2.0
"""Floating-point operations of a forward: one function for every transformer here, gated MLPs and grouped heads included."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vlm_attn.diffusion import Work


def layer_flops(
    rows: int,
    keys: int,
    *,
    hidden: int,
    intermediate: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    gated: bool = True,
    causal: bool = True,
) -> int:
    """Operations (a multiply and an add are two) of one layer. Norms, rotations and softmax are left out.

    Args:
        rows: rows that run.
        keys: keys they attend to, their own included.
        hidden: size of the residual stream.
        intermediate: size of the MLP.
        heads: query heads.
        kv_heads: heads of keys and values.
        head_dim: size of a head.
        gated: three matrices in the MLP instead of two.
        causal: a row sees the keys up to its own only.
    """
    projections = hidden * head_dim * (2 * heads + 2 * kv_heads)
    mlp = (3 if gated else 2) * hidden * intermediate
    pairs = rows * keys - rows * (rows - 1) // 2 if causal else rows * keys
    return 2 * rows * (projections + mlp) + 4 * pairs * heads * head_dim


def prefill_flops(config: Any, columns: Sequence[int], images: int, patches: Sequence[int] | None = None) -> int:
    """Operations from pixels to the first token's logits of a LLaVA-shaped model.

    Args:
        config: a LLaVA config.
        columns: for every decoder layer, how many columns of the prompt it runs on.
        images: number of images.
        patches: for every layer of the tower, on how many patches of an image it runs; None = all.
    """
    text, vision = config.text_config, config.vision_config
    whole = (vision.image_size // vision.patch_size) ** 2
    heads = vision.num_attention_heads
    tower = sum(
        layer_flops(
            n + 1,
            n + 1,
            hidden=vision.hidden_size,
            intermediate=vision.intermediate_size,
            heads=heads,
            kv_heads=heads,
            head_dim=vision.hidden_size // heads,
            gated=False,
            causal=False,
        )
        for n in patches or [whole] * vision.num_hidden_layers
    )
    projector = 2 * whole * text.hidden_size * (vision.hidden_size + text.hidden_size)
    decoder = sum(
        layer_flops(
            n,
            n,
            hidden=text.hidden_size,
            intermediate=text.intermediate_size,
            heads=text.num_attention_heads,
            kv_heads=text.num_key_value_heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads,
        )
        for n in columns
    )
    return images * (tower + projector) + decoder + 2 * text.hidden_size * text.vocab_size


def denoising_flops(config: Any, work: Sequence[Work], images: int) -> int:
    """Operations of a denoised answer of a LLaVA-shaped model, pixels included.

    Args:
        config: a LLaVA config.
        work: of `vlm_attn.diffusion.Output`.
        images: number of images.
    """
    text = config.text_config
    size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    total = prefill_flops(config, [], images) - 2 * text.hidden_size * text.vocab_size
    for forward in work:
        total += 2 * forward.logits * text.hidden_size * text.vocab_size
        total += 2 * forward.compared * text.hidden_size * size * text.num_key_value_heads * text.num_hidden_layers
        prompt = forward.rows == forward.keys  # only then visual tokens are among the rows
        for gone in forward.gone or [0] * text.num_hidden_layers:
            total += layer_flops(
                forward.rows - gone * prompt,
                forward.keys - gone,
                hidden=text.hidden_size,
                intermediate=text.intermediate_size,
                heads=text.num_attention_heads,
                kv_heads=text.num_key_value_heads,
                head_dim=size,
                causal=False,
            )
    return total


def study_flops(layers: int, hidden: int, intermediate: int, active: Sequence[int]) -> int:
    """The count of the visual-redundancy study (arXiv 2511.15098), for parity with it only: multiply-adds, a two-matrix MLP.

    Args:
        layers: L.
        hidden: d.
        intermediate: m.
        active: n_s, the tokens that run at every step.
    """
    return layers * sum(4 * n * hidden**2 + 2 * n**2 * hidden + 2 * n * hidden * intermediate for n in active)
