"""Slow, readable twins, in any float dtype up to float64: the oracle of every faster path.

Segmented attention keeps, per head and row, for each segment its own log-sum-exp and normalised partial output; the
edited output is then a weighted recombination, so the full attention map is never needed:

    combine(lse, out, w) = sum_n w_n e^lse_n out_n / sum_n w_n e^lse_n
"""

from __future__ import annotations

import torch
from torch import Tensor


def segmented_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Tensor, *, mask: Tensor | None = None, scale: float
) -> tuple[Tensor, Tensor]:
    """Per-segment attention.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        segments: ``[B, S, N]`` non-negative membership; a twin column holds ``exp(log weight)``.
        mask: boolean ``[B or 1, H or 1, Q, S]``, True = visible.
        scale: factor on the dot products.

    Returns:
        ``lse [B, H, Q, N]`` (``-inf`` for an empty segment) and ``out [B, H, Q, N, D]`` (zeros for an empty segment).
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    logits = query @ key.transpose(-1, -2) * scale
    if mask is not None:
        logits = logits.masked_fill(~mask, float("-inf"))
    weighted = logits[:, :, :, None, :] + segments.to(logits).log().transpose(1, 2)[:, None, None]
    lse = torch.logsumexp(weighted, dim=-1)
    probability = torch.exp(weighted - lse[..., None]).nan_to_num(0.0)
    return lse, torch.einsum("bhqns,bhsd->bhqnd", probability, value)


def combine(lse: Tensor, out: Tensor, log_weight: Tensor) -> Tensor:
    """Recombine segments with new weights.

    Args:
        lse: ``[B, H, Q, N]``.
        out: ``[B, H, Q, N, D]``.
        log_weight: ``[B, H, Q, N]``; ``-inf`` leaves a segment out.

    Returns:
        ``[B, H, Q, D]``; zeros where no segment has any weight.
    """
    share = torch.softmax(lse + log_weight, dim=-1).nan_to_num(0.0)
    return (share[..., None] * out).sum(dim=-2)
