# SPDX-License-Identifier: Apache-2.0
"""What some rows look at: attention rows, group masses, column sums and entropy of one layer.

attention_rs = softmax_s(logits_rs)
mass_rn      = sum_s attention_rs M_sn
column_s     = sum_r attention_rs            (the score of a key that pruning methods rank by)
entropy_r    = -sum_s attention_rs log attention_rs
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_attn.kernels import edited
from vlm_attn.kernels.dispatch import (
    Facts,
    check_qkv,
    check_segments,
    choose,
    register,
    takes_all,
    triton_refuses,
    wants_grad,
)
from vlm_attn.kernels.reference import masked_logits

MOST_MAPS = 64  # rows whose attention is kept: [B, H, rows, S] float32


class Probe(NamedTuple):
    """Results, all float32; a row without any visible key is zeros in all of them."""

    attention: Tensor | None  # [B, H, R, S]
    mass: Tensor | None  # [B, H, R, N]
    column_sum: Tensor  # [B, H, S]
    entropy: Tensor  # [B, H, R]


def probe(
    query: Tensor,
    key: Tensor,
    *,
    segments: Tensor | None = None,
    mask: Tensor | None = None,
    last: Tensor | None = None,
    keys: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    maps: bool = False,
    backend: str | None = None,
) -> Probe:
    """Look at some rows of one layer, on the backend that fits.

    Args:
        query: ``[B, H, R, D]``, the rows; any number without ``maps``.
        key: ``[B, G, S, D]``, H a multiple of G.
        segments: ``[B or 1, S, N]`` membership of the keys, for the masses; N <= 16.
        mask: ``[B or 1, H or 1, R, >= S]``, bool (True = visible) or additive.
        last: ``[B or 1, R]`` integers: the last key every row sees, its own column where attention is causal; None = all.
        keys: ``[B or 1, S]`` bool, False on padding; None = all are visible.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        maps: also return the rows' attention; R <= 64 then.
        backend: ``triton`` or ``eager``; None = the first that fits.

    Returns:
        See :class:`Probe`; attention is None without ``maps``, mass without ``segments``.

    Raises:
        ValueError: tensors that do not fit each other, too many rows or segments, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_qkv(query, key, key, mask)
    batch, _, rows, dim = query.shape
    length = key.shape[2]
    if maps and rows > MOST_MAPS:
        raise ValueError(
            f"maps=True with {rows} rows: attention is kept for at most {MOST_MAPS}; the rest works for any"
        )
    if segments is not None:
        check_segments(segments, key)
        if segments.shape[2] > 16:
            raise ValueError(f"segments has {segments.shape[2]} columns: allowed are 16")
    if last is not None and (last.dim() != 2 or last.shape[0] not in (1, batch) or last.shape[1] != rows):
        raise ValueError(f"last {list(last.shape)} must be [{batch} or 1, {rows}]")
    if last is not None and (last.is_floating_point() or last.dtype == torch.bool):
        raise ValueError(f"last is {last.dtype}: must be integers")
    if keys is not None and (keys.dtype != torch.bool or keys.dim() != 2 or keys.shape[1] != length):
        raise ValueError(f"keys {list(keys.shape)} {keys.dtype} must be [{batch} or 1, {length}] of bool")
    facts = Facts(query.device.type, query.dtype, dim, rows, wants_grad(query, key), softcap is not None)
    run = choose("probe", facts, backend).run
    attention, mass, column_sum, entropy = run(query, key, segments, mask, last, keys, scale, softcap, maps)
    return Probe(attention if maps else None, mass if segments is not None else None, column_sum, entropy)


@register("probe", "triton", triton_refuses)
def _probe_triton(*args: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]
    if torch.compiler.is_compiling():
        from vlm_attn.kernels import ops

        run = ops.probe
    else:
        from vlm_attn.kernels import triton_probe

        run = triton_probe.probe
    return run(*args)


@register("probe", "eager", takes_all)
def probe_eager(
    query: Tensor,
    key: Tensor,
    segments: Tensor | None,
    mask: Tensor | None,
    last: Tensor | None,
    keys: Tensor | None,
    scale: float,
    softcap: float | None,
    maps: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor, Tensor]:
    """The twin: the rows' whole attention in float32 or float64, then its sums. Holds ``[B, H, R, S]``."""
    visible = torch.ones(1, 1, 1, key.shape[2], dtype=torch.bool, device=key.device)
    if last is not None:
        visible = visible & (torch.arange(key.shape[2], device=key.device) <= last[:, None, :, None])
    if keys is not None:
        visible = visible & keys[:, None, None]
    if mask is None:
        mask = visible
    elif mask.dtype == torch.bool:
        mask = mask[..., : key.shape[2]] & visible
    else:
        mask = mask[..., : key.shape[2]].masked_fill(~visible, torch.finfo(mask.dtype).min)
    if query.dtype == torch.float64:
        logits = masked_logits(query, key, mask=mask, scale=scale, softcap=softcap)
        attention = torch.softmax(logits, -1).nan_to_num(0.0)
    else:
        attention = edited.attention_rows(query, key, mask=mask, scale=scale, softcap=softcap)
    mass = None if segments is None else attention @ segments.to(attention)[:, None]
    entropy = torch.special.entr(attention).sum(-1)
    return attention, mass, attention.sum(-2), entropy


def attention_rows(
    query: Tensor,
    key: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention probabilities of some rows and nothing else, on the backend that fits.

    Args:
        query: ``[B, H, R, D]``; any number of rows, of which ``[B, H, R, S]`` is kept.
        key: ``[B, G, S, D]``, H a multiple of G.
        mask: ``[B or 1, H or 1, R, >= S]``, bool (True = visible) or additive; None = every key is visible.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        backend: ``triton`` or ``eager``; None = the first that fits.

    Returns:
        ``[B, H, R, S]`` float32. A row without any visible key is all zeros.

    Raises:
        ValueError: tensors that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_qkv(query, key, key, mask)
    facts = Facts(
        query.device.type, query.dtype, query.shape[3], query.shape[2], wants_grad(query, key), softcap is not None
    )
    return choose("attention_rows", facts, backend).run(query, key, mask=mask, scale=scale, softcap=softcap)


@register("attention_rows", "triton", triton_refuses)
def _rows_triton(query: Tensor, key: Tensor, *, mask: Tensor | None, scale: float, softcap: float | None) -> Tensor:
    return _probe_triton(query, key, None, mask, None, None, scale, softcap, True)[0]


register("attention_rows", "eager", takes_all)(edited.attention_rows)
