# SPDX-License-Identifier: Apache-2.0
"""An attention of the tests' own: eager, with a hand on the raw scores, on the probabilities
after the softmax and on the heads' outputs. Shares nothing with the engine."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import eager_mask

NAME = "test_oracle"
# (layer, probabilities [B, H, Q, S]) -> probabilities; scores of that shape and outputs [B, H, Q, D] likewise
Hand = Callable[[int, Tensor], Tensor]


def leave(layer: int, values: Tensor) -> Tensor:
    return values


def attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float, **_: Any
) -> tuple[Tensor, Tensor]:
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    scores = module.test_oracle_scores(module.layer_idx, query @ key.transpose(2, 3) * scaling)
    if mask is not None:
        scores = scores + mask[..., : key.shape[2]]
    probability = module.test_oracle_hand(module.layer_idx, scores.softmax(-1))
    out = module.test_oracle_output(module.layer_idx, probability @ value)
    return out.transpose(1, 2).contiguous(), probability


AttentionInterface.register(NAME, attention)
AttentionMaskInterface.register(NAME, eager_mask)


def oracle(model: Any, hand: Hand = leave, *, scores: Hand = leave, output: Hand = leave) -> Any:
    """A copy of an unpatched model whose language model attends through :func:`attention`."""
    own = copy.deepcopy(model)
    own.set_attn_implementation({"text_config": NAME})
    for layer in own.model.language_model.layers:
        layer.self_attn.test_oracle_hand = hand
        layer.self_attn.test_oracle_scores = scores
        layer.self_attn.test_oracle_output = output
    return own


def attentions(model: Any, inputs: dict[str, Any]) -> list[Tensor]:
    """Attention maps ``[B, H, T, S]`` of every layer, from a copy on the host's own eager attention."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        return list(own(**inputs, output_attentions=True).attentions)
