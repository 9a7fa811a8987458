# SPDX-License-Identifier: Apache-2.0
"""Slow, readable twins, in any float dtype up to float64: the oracle of every faster path.

Segmented attention keeps, per head and row, for each segment its own log-sum-exp and normalised partial output; the
edited output is then a weighted recombination, so the full attention map is never needed:

    combine(lse, out, w) = sum_n w_n e^lse_n out_n / sum_n w_n e^lse_n
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlm_attn.kernels.edited import Edit, ScoreEdit


def masked_logits(
    query: Tensor,
    key: Tensor,
    *,
    scores: Sequence[ScoreEdit] = (),
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    row: int | Tensor = 0,
) -> Tensor:
    """Logits ``[B, H, Q, S]``, ``-inf`` where hidden; arguments as in ``edited.edited_attention``."""
    logits = query @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).transpose(-1, -2) * scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    for score in scores:
        logits = score(logits, offset, row)
    if mask is None:
        return logits
    mask = mask[..., : key.shape[2]]
    if mask.dtype == torch.bool:
        return logits.masked_fill(~mask, float("-inf"))
    return (logits + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Per-segment attention.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        segments: ``[B, S, N]`` non-negative membership; a twin column holds ``exp(log weight)``.
        mask: ``[B or 1, H or 1, Q, >= S]``, boolean (True = visible) or additive (its dtype's minimum hides).
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.

    Returns:
        ``lse [B, H, Q, N]`` (``-inf`` for an empty segment) and ``out [B, H, Q, N, D]`` (zeros for an empty segment).
    """
    logits = masked_logits(query, key, mask=mask, scale=scale, softcap=softcap)
    value = value.repeat_interleave(query.shape[1] // key.shape[1], 1)
    weighted = logits[:, :, :, None, :] + segments.to(logits).log().transpose(1, 2)[:, None, None]
    empty = (weighted == float("-inf")).all(-1, keepdim=True)
    safe = weighted.masked_fill(empty, 0.0)  # so that nothing has no gradient, and not NaN
    lse = torch.logsumexp(safe, dim=-1).masked_fill(empty[..., 0], float("-inf"))
    probability = torch.softmax(safe, dim=-1).masked_fill(empty, 0.0)
    return lse, torch.einsum("bhqns,bhsd->bhqnd", probability, value)


def combine(lse: Tensor, out: Tensor, log_weight: Tensor, head_scale: Tensor | None = None) -> Tensor:
    """Recombine segments with new weights.

    Args:
        lse: ``[B, H, Q, N]``.
        out: ``[B, H, Q, N, D]``.
        log_weight: ``[B, H, Q, N]``; ``-inf`` leaves a segment out.
        head_scale: ``[H]``, a factor on the output of every head.

    Returns:
        ``[B, H, Q, D]``; zeros where no segment has any weight.
    """
    share = torch.softmax(lse + log_weight, dim=-1).nan_to_num(0.0)
    result = (share[..., None] * out).sum(dim=-2)
    return result if head_scale is None else result * head_scale[:, None, None]


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    scores: Sequence[ScoreEdit] = (),
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    row: int | Tensor = 0,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Edited attention as the equations have it, with one bias per key; see ``edited.edited_attention``."""
    logits = masked_logits(query, key, scores=scores, mask=mask, scale=scale, softcap=softcap, offset=offset, row=row)
    plain = torch.softmax(logits, -1).nan_to_num(0.0)
    bias = torch.zeros_like(logits)
    for edit in edits:
        segments = edit.over(key.shape[2], offset).to(logits)[:, None]
        mass = plain @ segments
        weight = edit.policy(mass.to(torch.promote_types(mass.dtype, torch.float32))).to(logits)
        bias = bias + (weight @ segments.transpose(-1, -2)).log()
    edited = torch.softmax(logits + bias, -1).nan_to_num(0.0)
    out = edited @ value.to(edited.dtype).repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (out if head_scale is None else out * head_scale[:, None, None]).to(value.dtype)
