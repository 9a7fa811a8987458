"""Attention whose logits get a bias per group of keys, decided from the mass each group holds.

With ``M[b, s, n]`` the membership of key ``s`` in segment ``n`` and ``p`` the plain attention of a row, an edit is

    mass_n  = sum_s p_s M_sn                      (what the policy sees)
    w       = policy(mass)                        (one factor per head, row and segment)
    p'_s    = p_s (M w)_s / sum_s p_s (M w)_s

which is ``softmax(logits + bias)`` with a bias, ``log w``, that is constant on every segment. A column of M may hold
``exp(weight)`` instead of 1 on the keys of a segment: the weighted twin, through which a saliency map enters.

This is the PyTorch path, the one a CPU uses; ``reference.py`` states the same through log-sum-exps, ``dispatch.py``
chooses between this and the others.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Policy = Callable[[Tensor], Tensor]
SMALLEST_TOTAL = 1e-25  # keeps a row without any visible key at zero


class Edit:
    """One method's edit of one layer: a partition of the keys and the policy that weighs its segments.

    Args:
        segments: ``[B, P, N]`` float32, membership of the prompt's columns. Column 0 is "everything else".
        policy: maps masses ``[B, H, Q, N]`` (float32) to weights >= 0 of that shape; 1 changes nothing, 0 removes a segment.
        conserves: the policy keeps every row's total, so that nothing is left to renormalise.
    """

    def __init__(self, segments: Tensor, policy: Policy, *, conserves: bool = False) -> None:
        self.segments = segments
        self.policy = policy
        self.conserves = conserves

    def over(self, length: int, offset: int | Tensor = 0) -> Tensor:
        """Membership ``[B, length, N]`` of the keys at columns ``offset .. offset + length - 1``.

        Columns beyond the prompt belong to segment 0. The buffer grows in steps, so that a decode loop seldom pays
        for it.
        """
        if isinstance(offset, Tensor):
            columns = torch.arange(length, device=self.segments.device) + offset
            last = self.segments.shape[1] - 1
            inside = (columns <= last)[None, :, None]
            rest = torch.zeros_like(self.segments[:, :1])
            rest[..., 0] = 1.0
            return torch.where(inside, self.segments[:, columns.clamp(max=last)], rest)
        missing = offset + length - self.segments.shape[1]
        if missing > 0:
            size = self.segments.shape
            more = self.segments.new_zeros(size[0], max(missing, 64), size[2])
            more[..., 0] = 1.0
            self.segments = torch.cat([self.segments, more], dim=1)
        return self.segments.narrow(1, offset, length)


def one_hot_segments(ids: Tensor, count: int, twin_of: int | None = None, log_weight: Tensor | None = None) -> Tensor:
    """Membership matrix of a partition.

    Args:
        ids: ``[B, S]`` integer segment of every key, in ``0 .. count - 1``.
        count: number of segments.
        twin_of: the segment that gets a weighted twin as an extra last column.
        log_weight: ``[B, S]`` log weight of every key, read on the keys of ``twin_of``.

    Returns:
        ``[B, S, count]`` float32, or ``[B, S, count + 1]`` with a twin.
    """
    segments = torch.nn.functional.one_hot(ids.long(), count).float()
    if twin_of is None:
        return segments
    assert log_weight is not None
    twin = segments[..., twin_of] * log_weight.float().exp()
    return torch.cat([segments, twin[..., None]], dim=-1)


def attention_rows(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention probabilities of a few rows.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``; H must be a multiple of G (grouped query heads).
        mask: ``[B or 1, H or 1, Q, S]``, boolean (True = visible) or additive; None = every key is visible.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.

    Returns:
        ``[B, H, Q, S]`` float32. A row without any visible key is all zeros.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch * kv_heads, (heads // kv_heads) * rows, dim)
    transposed = key.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(query.new_empty(()), grouped, transposed, beta=0, alpha=scale)  # beta 0: input is not read
    logits = logits.float().view(batch, heads, rows, length)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    if mask is None:
        return torch.softmax(logits, dim=-1)
    mask = mask[..., :length]
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    else:
        # A host's additive mask holds the dtype's minimum for "hidden": make that an exact zero.
        logits = (logits + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
    return torch.softmax(logits, dim=-1).nan_to_num(0.0)


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Attention of a few rows under a list of edits. Every policy sees the masses before any edit; weights multiply.

    Args:
        query: ``[B, H, Q, D]``; meant for Q up to about 64.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        edits: the edits of this layer.
        mask: see :func:`attention_rows`.
        scale: factor on the dot products.
        softcap: see :func:`attention_rows`.
        offset: column of the first key (sliding-window caches drop the oldest keys).
        head_scale: ``[H]``, a factor on the output of every head.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``value``.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, length, dim = value.shape[1:]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is no multiple of the {kv_heads} heads of key and value")
    plain = attention_rows(query, key, mask=mask, scale=scale, softcap=softcap)
    flat = plain.view(batch, heads * rows, length)
    probability = flat
    for edit in edits:
        segments = edit.over(length, offset)
        mass = torch.matmul(flat, segments)
        weight = edit.policy(mass.view(batch, heads, rows, -1)).view(batch, heads * rows, -1)
        if len(edits) == 1 and not edit.conserves:  # the row's new total, without another pass over the keys
            weight = weight / (weight * mass).sum(dim=-1, keepdim=True).clamp_min(SMALLEST_TOTAL)
        probability = probability * torch.matmul(weight, segments.transpose(1, 2))
    if len(edits) > 1:
        probability = probability / probability.sum(dim=-1, keepdim=True).clamp_min(SMALLEST_TOTAL)
    grouped = probability.to(value.dtype).view(batch * kv_heads, (heads // kv_heads) * rows, length)
    out = torch.bmm(grouped, value.flatten(0, 1)).view(batch, heads, rows, dim)
    return out if head_scale is None else (out * head_scale[:, None, None]).to(out.dtype)


def edited_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    head_scale: Tensor | None = None,
) -> Tensor:
    """The same through the host's fused attention: masses first, then one call with their bias. No softcap."""
    assert softcap is None
    plain = attention_rows(query, key, mask=mask, scale=scale)
    length = key.shape[2]
    bias = torch.zeros_like(plain)
    for edit in edits:
        segments = edit.over(length, offset)[:, None]
        bias = bias + torch.log(edit.policy(plain @ segments) @ segments.transpose(2, 3))
    if mask is not None:
        mask = mask[..., :length]
        least = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
        bias = bias.masked_fill(~mask if least is None else mask <= least, float("-inf"))
        if least is not None:
            bias = bias + mask.clamp_min(least)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    out = out.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0.0)  # a row without any visible key
    return out if head_scale is None else (out * head_scale[:, None, None]).to(out.dtype)
