"""Masked attention of a whole prompt, in Triton: online softmax over tiles of keys, tiles without a visible pair skipped.

A mask of ``masks.py`` becomes part of the compiled kernel: its clauses are unrolled into comparisons of columns, groups
and images, and no matrix of the mask is ever stored. What a tile holds (nothing, something, everything) is found once
by ``tiles_kernel`` and serves every head of a layer, and every layer when it is passed on; full tiles skip the mask.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.kernels import tuning
from vlm_attn.kernels.groups import Group
from vlm_attn.kernels.masks import EVERY_PAIR, GROUPS
from vlm_attn.kernels.triton_segmented import LN2, LOG2E, finite, next_power, on_its_device, soft_cap

_GROUPS = tl.constexpr(GROUPS)
_EVERY_PAIR = tl.constexpr(EVERY_PAIR)
_ROW = tl.constexpr((1 << GROUPS) - 1)
_PAD = tl.constexpr(int(Group.PAD))
_SYSTEM = tl.constexpr(int(Group.SYSTEM))
_VISUAL = tl.constexpr(int(Group.VISUAL))


@triton.jit
def clause(column_q, column_k, group_q, group_k, image_q, image_k, pairs, MASK: tl.constexpr, AT: tl.constexpr):
    """Those of ``pairs`` that one clause lets through; its four numbers stand in MASK from AT on."""
    if MASK[AT]:
        pairs = pairs & (column_k[None, :] <= column_q[:, None])
    if MASK[AT + 1] > 0:
        pairs = pairs & (column_q[:, None] - column_k[None, :] < MASK[AT + 1])
    if MASK[AT + 2] != _EVERY_PAIR:
        # The row's own line of the table first: what is left of it fits 32 bits.
        table = tl.zeros_like(group_q).to(tl.int64) + MASK[AT + 2]
        line = ((table >> (group_q * _GROUPS).to(tl.int64)) & _ROW).to(tl.int32)
        pairs = pairs & (((line[:, None] >> group_k[None, :]) & 1) == 1)
    if MASK[AT + 3]:
        pairs = pairs & (image_q[:, None] == image_k[None, :]) & (image_q >= 0)[:, None]
    return pairs


@triton.jit
def visible_pairs(
    column_q, column_k, group_q, group_k, image_q, image_k, pairs, COUNT: tl.constexpr, MASK: tl.constexpr
):
    """Those of ``pairs`` that the mask lets through: an OR over its clauses, of which there are at most four."""
    seen = clause(column_q, column_k, group_q, group_k, image_q, image_k, pairs, MASK, 0)
    if COUNT > 1:
        seen = seen | clause(column_q, column_k, group_q, group_k, image_q, image_k, pairs, MASK, 4)
    if COUNT > 2:
        seen = seen | clause(column_q, column_k, group_q, group_k, image_q, image_k, pairs, MASK, 8)
    if COUNT > 3:
        seen = seen | clause(column_q, column_k, group_q, group_k, image_q, image_k, pairs, MASK, 12)
    return seen


@triton.jit
def tiles_kernel(
    state, group_of_rows, group, image_of_rows, image, rows, length, first, row_tiles, key_tiles,
    COUNT: tl.constexpr, MASK: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What one tile holds: 0 no visible pair, 1 some, 2 all."""
    i, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, s = i * BLOCK_R + tl.arange(0, BLOCK_R), j * BLOCK_S + tl.arange(0, BLOCK_S)
    inside, valid = row < rows, s < length
    group_q = tl.load(group_of_rows + b * rows + row, mask=inside, other=_PAD).to(tl.int32)
    group_k = tl.load(group + b * length + s, mask=valid, other=_PAD).to(tl.int32)
    image_q = tl.load(image_of_rows + b * rows + row, mask=inside, other=-1)
    image_k = tl.load(image + b * length + s, mask=valid, other=-1)
    pairs = inside[:, None] & (group_k != _PAD)[None, :]
    seen = visible_pairs(first + row, s, group_q, group_k, image_q, image_k, pairs, COUNT, MASK)
    number = tl.sum(tl.sum(seen.to(tl.int32), 1), 0)
    wanted = BLOCK_S * tl.minimum(BLOCK_R, rows - i * BLOCK_R)
    tl.store(state + (b * row_tiles + i) * key_tiles + j, tl.where(number == wanted, 2, tl.where(number > 0, 1, 0)))


@triton.jit
def prefill_kernel(
    query, key, value, out, lse, order, full, some,
    group_of_rows, group, image_of_rows, image, score_from,
    scale, cap, visual_abs, visual_factor, system_factor,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    out_b, out_h, out_q,
    heads, ratio, rows, length, dim, first_column, row_tiles, key_tiles,
    COUNT: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, SCORE: tl.constexpr, KEEP_LSE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head, all tiles of keys that hold a visible pair."""
    tile, pair = row_tiles - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows of a causal mask first
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    d = tl.arange(0, BLOCK_D)
    q_at = query + b * query_b + h * query_h + row * query_q
    q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    key_at = key + b * key_b + h // ratio * key_h
    value_at = value + b * value_b + h // ratio * value_h
    group_q = tl.load(group_of_rows + b * rows + row, mask=inside, other=_PAD).to(tl.int32)
    image_q = tl.load(image_of_rows + b * rows + row, mask=inside, other=-1)
    scored = row + first_column >= (tl.load(score_from + b) if SCORE else 0)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    at = b * row_tiles + tile
    whole = tl.load(full + at)  # the first so many tiles of the list are full, the next are partly visible
    for n in range(0, whole + tl.load(some + at)):
        s = tl.load(order + at * key_tiles + n) * BLOCK_S + tl.arange(0, BLOCK_S)
        valid = s < length
        k = tl.load(
            key_at + s[None, :] * key_s + d[:, None] * key_d, mask=(d < dim)[:, None] & valid[None, :], other=0.0
        )
        v = tl.load(
            value_at + s[:, None] * value_s + d[None, :] * value_d, mask=valid[:, None] & (d < dim)[None, :], other=0.0
        )
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if CAP:
            logits = soft_cap(logits, cap)
        if SCORE:
            group_k = tl.load(group + b * length + s, mask=valid, other=_PAD).to(tl.int32)
            raised = logits + visual_abs * tl.maximum(logits, -logits)
            changed = tl.where((group_k == _VISUAL)[None, :], raised * visual_factor, logits)
            changed = tl.where((group_k == _SYSTEM)[None, :], changed * system_factor, changed)
            logits = tl.where(scored[:, None], changed, logits)
        logits = logits * LOG2E
        if n >= whole:
            group_k = tl.load(group + b * length + s, mask=valid, other=_PAD).to(tl.int32)
            image_k = tl.load(image + b * length + s, mask=valid, other=-1)
            pairs = inside[:, None] & (group_k != _PAD)[None, :]
            seen = visible_pairs(first_column + row, s, group_q, group_k, image_q, image_k, pairs, COUNT, MASK)
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = finite(new)
        p = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    any_key = total > 0
    sums = tl.where(any_key, total, 1.0)
    acc = acc / sums[:, None]
    out_at = out + b * out_b + h * out_h + row * out_q
    tl.store(out_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < dim)[None, :])
    if KEEP_LSE:
        value_lse = tl.where(any_key, (finite(top) + tl.log2(sums)) * LN2, float("-inf"))
        tl.store(lse + pair.to(tl.int64) * rows + row, value_lse, mask=inside)


def padded(clauses: Sequence[int]) -> tuple[int, ...]:
    """The four numbers of every clause, filled up to four clauses."""
    return (*clauses, *[0] * (16 - len(clauses)))


def tiles(clauses: Sequence[int], tokens: Sequence[Tensor], first: int, block: dict[str, int]) -> tuple[Tensor, ...]:
    """Which tiles of keys every tile of rows visits.

    Args:
        clauses: causal, window, pairs, same image of every clause of the mask, at most four clauses.
        tokens: groups of rows ``[B, Q]`` and keys ``[B, S]`` (uint8), images of rows and keys (int32), contiguous.
        first: column of the first row.
        block: ``BLOCK_R`` and ``BLOCK_S``.

    Returns:
        ``order [B, row tiles, key tiles]`` int32, full tiles first, then partly visible, then empty ones; the numbers of full
        and of partly visible ones, ``[B, row tiles]`` int32.
    """
    group_q, group_k, image_q, image_k = tokens
    batch, rows, length = group_q.shape[0], group_q.shape[1], group_k.shape[1]
    row_tiles, key_tiles = triton.cdiv(rows, block["BLOCK_R"]), triton.cdiv(length, block["BLOCK_S"])
    state = torch.empty(batch, row_tiles, key_tiles, dtype=torch.int8, device=group_q.device)
    tiles_kernel[(row_tiles, key_tiles, batch)](
        state, group_q, group_k, image_q, image_k, rows, length, first, row_tiles, key_tiles,
        COUNT=len(clauses) // 4, MASK=padded(clauses), BLOCK_R=block["BLOCK_R"], BLOCK_S=block["BLOCK_S"],
    )  # fmt: skip
    order = torch.argsort(state, dim=-1, descending=True, stable=True).to(torch.int32)
    return order, (state == 2).sum(-1, dtype=torch.int32), (state == 1).sum(-1, dtype=torch.int32)


@on_its_device
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clauses: Sequence[int],
    tokens: Sequence[Tensor],
    first: int,
    scale: float,
    softcap: float | None,
    score: Sequence[float] | None,
    score_from: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """See ``prefill.masked_attention``: output ``[B, H, Q, D]`` and log-sum-exp ``[B, H, Q]`` float32."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    block = tuning.prefill(query, dim)
    block["BLOCK_R"] = min(block["BLOCK_R"], max(16, next_power(rows)))
    order, full, some = tiles(clauses, tokens, first, block)
    out = torch.empty(batch, rows, heads, dim, dtype=value.dtype, device=value.device).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, dtype=torch.float32, device=value.device)
    group_q, group_k, image_q, image_k = tokens
    prefill_kernel[(order.shape[1], batch * heads)](
        query, key, value, out, lse, order, full, some,
        group_q, group_k, image_q, image_k, group_q if score_from is None else score_from,
        scale, softcap or 1.0, *(score or (0.0, 1.0, 1.0)),
        *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3],
        heads, heads // kv_heads, rows, length, dim, first, order.shape[1], order.shape[2],
        COUNT=len(clauses) // 4, MASK=padded(clauses), CAP=softcap is not None, SCORE=score is not None, KEEP_LSE=True,
        BLOCK_D=next_power(dim, 16), **block,
    )  # fmt: skip
    return out, lse
