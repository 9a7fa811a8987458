# SPDX-License-Identifier: Apache-2.0
"""What some rows look at, in Triton: attention, group masses, entropy and column sums, without a [Q, S] matrix of other rows.

Two passes over K, none over V. The first leaves log-sum-exp, entropy and, per segment, ``sum_s p_s M_sn`` of
every chunk of keys; the second knows the rows' totals and writes probabilities or their sums.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.kernels import tuning
from vlm_attn.kernels.triton_segmented import (
    ADDED_MASK,
    BOOL_MASK,
    LN2,
    LOG2E,
    NO_MASK,
    finite,
    next_power,
    on_its_device,
    soft_cap,
)


@triton.jit
def row_logits(
    q, key_at, mask_at, keys_at, last, s, d, inside, valid, dim, scale, cap, hidden, key_s, key_d, mask_s,
    MASK: tl.constexpr, CAP: tl.constexpr, LAST: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in base e, ``-inf`` where hidden."""
    k = tl.load(key_at + s[None, :] * key_s + d[:, None] * key_d, mask=(d < dim)[:, None] & valid[None, :], other=0.0)
    logits = tl.dot(q, k, input_precision="ieee") * scale
    if CAP:
        logits = soft_cap(logits, cap)
    visible = inside[:, None] & valid[None, :]
    if LAST:
        visible = visible & (s[None, :] <= last[:, None])
    if KEYS:
        visible = visible & (tl.load(keys_at + s, mask=valid, other=0) != 0)[None, :]
    if MASK == 1:
        seen = tl.load(mask_at[:, None] + s[None, :] * mask_s, mask=visible, other=0)
        visible = visible & (seen != 0)
    if MASK == 2:
        added = tl.load(mask_at[:, None] + s[None, :] * mask_s, mask=visible, other=float("-inf")).to(tl.float32)
        visible = visible & (added > hidden)
        logits += tl.where(visible, added, 0.0)
    return tl.where(visible, logits, float("-inf"))


@triton.jit
def totals_kernel(
    query, key, mask, keys, last_column, segments, lse, entropy, mass,
    scale, cap, hidden,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, mask_b, mask_h, mask_q, mask_s,
    segments_b, segments_s, segments_n,
    heads, ratio, rows, length, dim, chunk, parts,
    COUNT: tl.constexpr, N: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, LAST: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of keys, one tile of rows, one head: log-sum-exp, entropy and masses within the chunk."""
    part, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    n = tl.arange(0, N)
    q_at = query + b * query_b + h * query_h + row * query_q
    q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    last = tl.load(last_column + b * rows + row, mask=inside, other=-1) if LAST else row
    mask_at = mask + b * mask_b + h * mask_h + row.to(tl.int64) * mask_q
    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    distance = tl.zeros([BLOCK_R], tl.float32)  # sum of p * (logit - top), which does not cancel
    sums = tl.zeros([BLOCK_R, N], tl.float32)
    stop = tl.minimum((part + 1) * chunk, length)
    if LAST:
        stop = tl.minimum(stop, tl.max(last, 0) + 1)
    for first in range(part * chunk, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        valid = s < stop
        logits = row_logits(
            q, key + b * key_b + h // ratio * key_h, mask_at, keys + b * length, last, s, d, inside, valid, dim,
            scale, cap, hidden, key_s, key_d, mask_s, MASK, CAP, LAST, KEYS,
        )  # fmt: skip
        new = tl.maximum(top, tl.max(logits, 1))
        base = finite(new)
        p = tl.exp2((logits - base[:, None]) * LOG2E)
        fade = tl.exp2((top - base) * LOG2E)
        moved = tl.where(total > 0, top - base, 0.0)
        distance = (distance + total * moved) * fade + tl.sum(p * tl.where(p > 0, logits - base[:, None], 0.0), 1)
        total = total * fade + tl.sum(p, 1)
        sums = sums * fade[:, None]
        for i in tl.static_range(COUNT):
            member = tl.load(segments + b * segments_b + s * segments_s + i * segments_n, mask=valid, other=0.0)
            sums += tl.where(n == i, 1.0, 0.0)[None, :] * tl.sum(p * member[None, :], 1)[:, None]
        top = new
    some = total > 0
    whole = tl.where(some, total, 1.0)
    at = (pair.to(tl.int64) * rows + row) * parts + part
    tl.store(lse + at, tl.where(some, finite(top) + tl.log2(whole) * LN2, float("-inf")), mask=inside)
    tl.store(entropy + at, tl.log2(whole) * LN2 - distance / whole, mask=inside)
    tl.store(
        mass + at[:, None] * COUNT + n[None, :], sums / whole[:, None], mask=inside[:, None] & (n < COUNT)[None, :]
    )


@triton.jit
def columns_kernel(
    query, key, mask, keys, last_column, lse, attention, column_sum,
    scale, cap, hidden,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, mask_b, mask_h, mask_q, mask_s,
    heads, ratio, rows, length, dim,
    MAPS: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, LAST: tl.constexpr, KEYS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one head: all rows' probabilities, kept or added up per key."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < length
    d = tl.arange(0, BLOCK_D)
    column = tl.zeros([BLOCK_S], tl.float32)
    for first in range(0, rows, BLOCK_R):
        row = first + tl.arange(0, BLOCK_R)
        inside = row < rows
        last = tl.load(last_column + b * rows + row, mask=inside, other=-1) if LAST else row
        reached = True
        if LAST:
            reached = tl.max(last, 0) >= tile * BLOCK_S
        if MAPS or reached:
            q_at = query + b * query_b + h * query_h + row * query_q
            q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
            logits = row_logits(
                q, key + b * key_b + h // ratio * key_h, mask + b * mask_b + h * mask_h + row.to(tl.int64) * mask_q,
                keys + b * length, last, s, d, inside, valid, dim,
                scale, cap, hidden, key_s, key_d, mask_s, MASK, CAP, LAST, KEYS,
            )  # fmt: skip
            at = pair.to(tl.int64) * rows + row
            whole = finite(tl.load(lse + at, mask=inside, other=0.0))
            p = tl.exp2((logits - whole[:, None]) * LOG2E)
            if MAPS:
                tl.store(attention + at[:, None] * length + s[None, :], p, mask=inside[:, None] & valid[None, :])
            column += tl.sum(p, 0)
    tl.store(column_sum + pair.to(tl.int64) * length + s, column, mask=valid)


@on_its_device
def probe(
    query: Tensor,
    key: Tensor,
    segments: Tensor | None,
    mask: Tensor | None,
    last: Tensor | None,
    keys: Tensor | None,
    scale: float,
    softcap: float | None,
    maps: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``probe.probe``; attention is empty without ``maps``."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    count = 0 if segments is None else segments.shape[2]
    block = tuning.probe(query, rows, dim)
    tiles = triton.cdiv(rows, block["BLOCK_R"])
    parts = tuning.parts(query, batch * heads * tiles, length, block["BLOCK_S"])
    chunk = triton.cdiv(triton.cdiv(length, parts), block["BLOCK_S"]) * block["BLOCK_S"]
    parts = triton.cdiv(length, chunk)
    made: dict[str, Any] = {"dtype": torch.float32, "device": query.device}
    lse, entropy = torch.empty(2, batch, heads, rows, parts, **made).unbind(0)
    mass = torch.empty(batch, heads, rows, parts, count, **made)
    attention = torch.empty(batch, heads, rows if maps else 0, length, **made)
    column_sum = torch.empty(batch, heads, length, **made)
    kind, hidden, seen = NO_MASK, 0.0, query
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        hidden = 0.0 if kind == BOOL_MASK else max(torch.finfo(mask.dtype).min / 2, -3e38)
        seen = (mask.view(torch.uint8) if kind == BOOL_MASK else mask)[..., :length].expand(batch, heads, rows, length)
        mask_strides = seen.stride()
    last_column = query if last is None else last.expand(batch, rows).to(torch.int32).contiguous()
    visible = query if keys is None else keys.expand(batch, length).to(torch.uint8).contiguous()
    members = query.new_empty(1, 1, 1) if segments is None else segments.float()
    members = members.expand(batch, length, max(count, 1))
    flags = {
        "MASK": kind,
        "CAP": softcap is not None,
        "LAST": last is not None,
        "KEYS": keys is not None,
        "BLOCK_D": next_power(dim, 16),
    }
    shared = (*query.stride(), *key.stride(), *mask_strides)
    totals_kernel[(parts, tiles, batch * heads)](
        query, key, seen, visible, last_column, members, lse, entropy, mass, scale, softcap or 1.0, hidden,
        *shared, *members.stride(), heads, heads // kv_heads, rows, length, dim, chunk, parts,
        COUNT=count, N=next_power(count), **flags, **block,
    )  # fmt: skip
    # Few numbers: the chunks are added up by PyTorch.
    whole = torch.logsumexp(lse, -1)
    share = torch.exp(lse - whole[..., None]).nan_to_num(0.0)
    entropy = (share * entropy + torch.special.entr(share)).sum(-1)
    masses = (share[..., None] * mass).sum(-2)
    columns_kernel[(triton.cdiv(length, block["BLOCK_S"]), batch * heads)](
        query, key, seen, visible, last_column, whole, attention, column_sum, scale, softcap or 1.0, hidden,
        *shared, heads, heads // kv_heads, rows, length, dim, MAPS=maps, **flags, **block,
    )  # fmt: skip
    return attention, masses, column_sum, entropy
