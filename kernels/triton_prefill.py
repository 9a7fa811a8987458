# SPDX-License-Identifier: Apache-2.0
"""Masked attention of a whole prompt, in Triton: online softmax over tiles of keys, tiles without a visible pair skipped.

A mask of ``masks.py`` becomes part of the compiled kernel: its clauses are unrolled into comparisons of columns, groups
and images, and no matrix of the mask is ever stored. What a tile holds (nothing, something, everything) is found once
by ``tiles_kernel`` and serves every head of a layer, and every layer when it is passed on; full tiles skip the mask.

Sums of columns need the rows' totals, which are known at the end only: a second kernel goes once more over the tiles that
hold a row of the sum, without the values.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.kernels import tuning
from vlm_attn.kernels.edited import MOST_SEGMENTS, NEVER, split
from vlm_attn.kernels.groups import Group
from vlm_attn.kernels.masks import EVERY_PAIR, GROUPS
from vlm_attn.kernels.triton_segmented import LN2, LOG2E, finite, next_power, on_its_device, soft_cap

_GROUPS = tl.constexpr(GROUPS)
_NEVER, _PLACES = tl.constexpr(NEVER), tl.constexpr(2 * MOST_SEGMENTS)
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
def seen_pairs(
    row, s, inside, valid, group_q, image_q, document_q, group_at, image_at, document_at, first_column,
    COUNT: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr,
):  # fmt: skip
    """What rows, whose tokens are loaded, see of the keys ``s``."""
    group_k = tl.load(group_at + s, mask=valid, other=_PAD).to(tl.int32)
    image_k = tl.load(image_at + s, mask=valid, other=-1)
    pairs = inside[:, None] & (group_k != _PAD)[None, :]
    if DOCUMENTS:
        pairs = pairs & (document_q[:, None] == tl.load(document_at + s, mask=valid, other=0)[None, :])
    return visible_pairs(first_column + row, s, group_q, group_k, image_q, image_k, pairs, COUNT, MASK)


@triton.jit
def tiles_kernel(
    state, group_of_rows, group, image_of_rows, image, document_of_rows, document,
    rows, length, first_column, row_tiles, key_tiles,
    COUNT: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """What one tile holds: 0 no visible pair, 1 some, 2 all."""
    i, j, b = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row, s = i * BLOCK_R + tl.arange(0, BLOCK_R), j * BLOCK_S + tl.arange(0, BLOCK_S)
    inside, valid = row < rows, s < length
    group_q = tl.load(group_of_rows + b * rows + row, mask=inside, other=_PAD).to(tl.int32)
    image_q = tl.load(image_of_rows + b * rows + row, mask=inside, other=-1)
    document_q = tl.load(document_of_rows + b * rows + row, mask=inside, other=0) if DOCUMENTS else row
    seen = seen_pairs(
        row, s, inside, valid, group_q, image_q, document_q, group + b * length, image + b * length,
        document + b * length, first_column, COUNT, MASK, DOCUMENTS,
    )  # fmt: skip
    number = tl.sum(tl.sum(seen.to(tl.int32), 1), 0)
    wanted = BLOCK_S * tl.minimum(BLOCK_R, rows - i * BLOCK_R)
    tl.store(state + (b * row_tiles + i) * key_tiles + j, tl.where(number == wanted, 2, tl.where(number > 0, 1, 0)))


@triton.jit
def every_row(at, n, s, valid, BLOCK_R: tl.constexpr):
    """Number n of every key, the same for every row: ``[BLOCK_R, keys]``.

    By a matrix product with numbers stored as ``edited.split`` does: threads that hold many rows would load each many times.
    """
    place = tl.arange(0, _PLACES)
    numbers = tl.load(at + s[None, :] * _PLACES + place[:, None], mask=valid[None, :], other=0.0)
    which = tl.zeros([BLOCK_R, _PLACES], tl.int32) + (place % (_PLACES // 2) == n).to(tl.int32)[None, :]
    return tl.dot(which.to(numbers.dtype), numbers, input_precision="ieee")


@triton.jit
def add_masses(sums, p, members):
    """``sums + p @ members``, in half precision with p as a sum of two, as ``edited.split`` stores the members."""
    first = p.to(members.dtype)
    sums += tl.dot(first, members, input_precision="ieee")
    if members.dtype != tl.float32:
        sums += tl.dot((p - first.to(tl.float32)).to(members.dtype), members, input_precision="ieee")
    return sums


@triton.jit
def tile_logits(
    q, k, group_at, weight_at, s, valid, scored, scale, cap, visual_abs, visual_factor, system_factor,
    CAP: tl.constexpr, SCORE: tl.constexpr, WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Logits of a tile in base 2, before the mask."""
    logits = tl.dot(q, k, input_precision="ieee")
    logits *= scale if CAP or SCORE else scale * LOG2E
    if CAP:
        logits = soft_cap(logits, cap)
    if SCORE:
        group_k = tl.load(group_at + s, mask=valid, other=_PAD).to(tl.int32)
        raised = logits + visual_abs * tl.maximum(logits, -logits)
        changed = tl.where((group_k == _VISUAL)[None, :], raised * visual_factor, logits)
        changed = tl.where((group_k == _SYSTEM)[None, :], changed * system_factor, changed)
        logits = tl.where(scored[:, None], changed, logits)
    if CAP or SCORE:
        logits *= LOG2E
    if WEIGHT:
        weight = every_row(weight_at, 0, s, valid, BLOCK_R)
        logits = tl.where(weight > _NEVER / 2, logits + weight, float("-inf"))
    return logits


@triton.jit
def prefill_kernel(
    query, key, value, out, lse, mass, order, full, some,
    group_of_rows, group, image_of_rows, image, document_of_rows, document, score_from, log_weight, segments,
    scale, cap, visual_abs, visual_factor, system_factor,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    out_b, out_h, out_q, weight_b, segments_b,
    heads, ratio, rows, length, dim, first_column, row_tiles, key_tiles,
    COUNT: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr, CAP: tl.constexpr, SCORE: tl.constexpr,
    WEIGHT: tl.constexpr, SEGMENTS: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of rows, one head, all tiles of keys that hold a visible pair."""
    tile, pair = row_tiles - 1 - tl.program_id(0), tl.program_id(1)  # the longest rows of a causal mask first
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = row < rows
    d, place = tl.arange(0, BLOCK_D), tl.arange(0, _PLACES)
    q_at = query + b * query_b + h * query_h + row * query_q
    q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    key_at = key + b * key_b + h // ratio * key_h
    value_at = value + b * value_b + h // ratio * value_h
    group_q = tl.load(group_of_rows + b * rows + row, mask=inside, other=_PAD).to(tl.int32)
    image_q = tl.load(image_of_rows + b * rows + row, mask=inside, other=-1)
    document_q = tl.load(document_of_rows + b * rows + row, mask=inside, other=0) if DOCUMENTS else row
    scored = row + first_column >= (tl.load(score_from + b) if SCORE else 0)

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    sums = tl.zeros([BLOCK_R, _PLACES], tl.float32)
    at = b * row_tiles + tile
    whole = tl.load(full + at)  # the first so many tiles of the list are full, the next are partly visible
    for index in range(0, whole + tl.load(some + at)):
        s = tl.load(order + at * key_tiles + index) * BLOCK_S + tl.arange(0, BLOCK_S)
        valid = s < length
        k = tl.load(
            key_at + s[None, :] * key_s + d[:, None] * key_d, mask=(d < dim)[:, None] & valid[None, :], other=0.0
        )
        v = tl.load(
            value_at + s[:, None] * value_s + d[None, :] * value_d, mask=valid[:, None] & (d < dim)[None, :], other=0.0
        )
        logits = tile_logits(
            q, k, group + b * length, log_weight + b * weight_b, s, valid, scored,
            scale, cap, visual_abs, visual_factor, system_factor, CAP, SCORE, WEIGHT, BLOCK_R,
        )  # fmt: skip
        if index >= whole:
            seen = seen_pairs(
                row, s, inside, valid, group_q, image_q, document_q, group + b * length, image + b * length,
                document + b * length, first_column, COUNT, MASK, DOCUMENTS,
            )  # fmt: skip
            logits = tl.where(seen, logits, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = finite(new)
        p = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        if SEGMENTS:
            members = segments + b * segments_b + s[:, None] * _PLACES + place[None, :]
            sums = add_masses(sums * fade[:, None], p, tl.load(members, mask=valid[:, None], other=0.0))
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new
    any_key = total > 0
    total = tl.where(any_key, total, 1.0)
    acc = acc / total[:, None]
    out_at = out + b * out_b + h * out_h + row * out_q
    tl.store(out_at[:, None] + d[None, :], acc.to(out.dtype.element_ty), mask=inside[:, None] & (d < dim)[None, :])
    row_at = pair.to(tl.int64) * rows + row
    tl.store(lse + row_at, tl.where(any_key, (finite(top) + tl.log2(total)) * LN2, float("-inf")), mask=inside)
    if SEGMENTS:
        mass_at = mass + row_at[:, None] * _PLACES + place[None, :]
        tl.store(mass_at, sums / total[:, None], mask=inside[:, None])


@triton.jit
def sums_kernel(
    query, key, lse, column_sum, state, summed, holding, number,
    group_of_rows, group, image_of_rows, image, document_of_rows, document, score_from, log_weight,
    scale, cap, visual_abs, visual_factor, system_factor,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, weight_b,
    heads, ratio, rows, length, dim, first_column, row_tiles, key_tiles,
    COUNT: tl.constexpr, MASK: tl.constexpr, DOCUMENTS: tl.constexpr, CAP: tl.constexpr, SCORE: tl.constexpr,
    WEIGHT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one head: the attention of the summed rows, added up, from the rows' log-sum-exp."""
    tile, pair = tl.program_id(0), tl.program_id(1)
    b, h = (pair // heads).to(tl.int64), (pair % heads).to(tl.int64)
    s = tile * BLOCK_S + tl.arange(0, BLOCK_S)
    valid = s < length
    d = tl.arange(0, BLOCK_D)
    key_at = key + b * key_b + h // ratio * key_h
    k = tl.load(key_at + s[None, :] * key_s + d[:, None] * key_d, mask=(d < dim)[:, None] & valid[None, :], other=0.0)
    start = tl.load(score_from + b) if SCORE else 0
    column = tl.zeros([BLOCK_S], tl.float32)
    for j in range(0, tl.load(number + b)):  # tiles of rows that hold a summed one
        i = tl.load(holding + b * row_tiles + j)
        kind = tl.load(state + (b * row_tiles + i) * key_tiles + tile)
        if kind > 0:
            row = i * BLOCK_R + tl.arange(0, BLOCK_R)
            inside = row < rows
            q_at = query + b * query_b + h * query_h + row * query_q
            q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
            logits = tile_logits(
                q, k, group + b * length, log_weight + b * weight_b, s, valid, row + first_column >= start,
                scale, cap, visual_abs, visual_factor, system_factor, CAP, SCORE, WEIGHT, BLOCK_R,
            )  # fmt: skip
            if kind == 1:
                group_q = tl.load(group_of_rows + b * rows + row, mask=inside, other=_PAD).to(tl.int32)
                image_q = tl.load(image_of_rows + b * rows + row, mask=inside, other=-1)
                document_q = tl.load(document_of_rows + b * rows + row, mask=inside, other=0) if DOCUMENTS else row
                seen = seen_pairs(
                    row, s, inside, valid, group_q, image_q, document_q, group + b * length, image + b * length,
                    document + b * length, first_column, COUNT, MASK, DOCUMENTS,
                )  # fmt: skip
                logits = tl.where(seen, logits, float("-inf"))
            wanted = inside & (tl.load(summed + b * rows + row, mask=inside, other=0) != 0)
            total = finite(tl.load(lse + pair.to(tl.int64) * rows + row, mask=inside, other=0.0))
            p = tl.exp2(logits - total[:, None] * LOG2E)
            column += tl.sum(tl.where(wanted[:, None], p, 0.0), 0)
    tl.store(column_sum + pair.to(tl.int64) * length + s, column, mask=valid)


def padded(clauses: Sequence[int]) -> tuple[int, ...]:
    """The four numbers of every clause, filled up to four clauses."""
    return (*clauses, *[0] * (16 - len(clauses)))


def tiles(clauses: Sequence[int], tokens: Sequence[Tensor], first: int, block: dict[str, int]) -> tuple[Tensor, ...]:
    """Which tiles of keys every tile of rows visits.

    Args:
        clauses: causal, window, pairs, same image of every clause of the mask, at most four clauses.
        tokens: groups of rows ``[B, Q]`` and keys ``[B, S]`` (uint8), images of rows and keys (int32) and perhaps documents of
            rows and keys (int32), contiguous.
        first: column of the first row.
        block: ``BLOCK_R`` and ``BLOCK_S``.

    Returns:
        ``order [B, row tiles, key tiles]`` int32, full tiles first, then partly visible, then empty ones; the numbers of full
        and of partly visible ones, ``[B, row tiles]`` int32; and what every tile holds, ``[B, row tiles, key tiles]`` int8: 2,
        1 or 0.
    """
    batch, rows, length = tokens[0].shape[0], tokens[0].shape[1], tokens[1].shape[1]
    row_tiles, key_tiles = triton.cdiv(rows, block["BLOCK_R"]), triton.cdiv(length, block["BLOCK_S"])
    state = torch.empty(batch, row_tiles, key_tiles, dtype=torch.int8, device=tokens[0].device)
    tiles_kernel[(row_tiles, key_tiles, batch)](
        state, *tokens, *tokens[:6 - len(tokens)], rows, length, first, row_tiles, key_tiles,
        COUNT=len(clauses) // 4, MASK=padded(clauses), DOCUMENTS=len(tokens) > 4,
        BLOCK_R=block["BLOCK_R"], BLOCK_S=block["BLOCK_S"],
    )  # fmt: skip
    order = torch.argsort(state, dim=-1, descending=True, stable=True).to(torch.int32)
    return order, (state == 2).sum(-1, dtype=torch.int32), (state == 1).sum(-1, dtype=torch.int32), state


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
    log_weight: Tensor | None,
    segments: Tensor | None,
    summed: Tensor | None,
    known: dict[tuple[int, int], tuple[Tensor, ...]] | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``prefill.masked_attention``: output ``[B, H, Q, D]``, log-sum-exp ``[B, H, Q]``, masses ``[B, H, Q, N]`` and sums
    ``[B, H, S]``, all but the first float32; the last two are empty where they are not asked for.

    ``known`` keeps what :func:`tiles` finds, for the next layer.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    block = tuning.prefill(query, dim, numbers=log_weight is not None or segments is not None)
    block["BLOCK_R"] = min(block["BLOCK_R"], max(16, next_power(rows)))
    known = {} if known is None else known
    size = block["BLOCK_R"], block["BLOCK_S"]
    if size not in known:
        known[size] = tiles(clauses, tokens, first, block)
    order, full, some, state = known[size]
    made: dict[str, Any] = {"dtype": torch.float32, "device": value.device}
    count = 0 if segments is None else segments.shape[2]
    out = torch.empty(batch, rows, heads, dim, dtype=value.dtype, device=value.device).transpose(1, 2)
    lse = torch.empty(batch, heads, rows, **made)
    mass = torch.empty(batch, heads, rows, 0 if segments is None else 2 * MOST_SEGMENTS, **made)
    column_sum = torch.empty(batch, heads, 0 if summed is None else length, **made)
    members = lse if segments is None else split(segments.float(), query.dtype)
    weight = (
        lse
        if log_weight is None
        else split((log_weight.float() * LOG2E.value).clamp_min(NEVER)[..., None], query.dtype)
    )
    weight_b, members_b = (t.stride(0) if t.dim() == 3 and len(t) > 1 else 0 for t in (weight, members))
    places = (*tokens, *tokens[: 6 - len(tokens)], tokens[0] if score_from is None else score_from)
    numbers = (scale, softcap or 1.0, *(score or (0.0, 1.0, 1.0)))
    sizes = (heads, heads // kv_heads, rows, length, dim, first, order.shape[1], order.shape[2])
    flags = {
        "COUNT": len(clauses) // 4,
        "MASK": padded(clauses),
        "DOCUMENTS": len(tokens) > 4,
        "CAP": softcap is not None,
        "SCORE": score is not None,
        "WEIGHT": log_weight is not None,
        "BLOCK_D": next_power(dim, 16),
    }
    prefill_kernel[(order.shape[1], batch * heads)](
        query, key, value, out, lse, mass, order, full, some, *places, weight, members, *numbers,
        *query.stride(), *key.stride(), *value.stride(), *out.stride()[:3], weight_b, members_b, *sizes,
        SEGMENTS=segments is not None, **flags, **block,
    )  # fmt: skip
    if summed is not None:
        kept = summed.expand(batch, rows)
        parts = torch.nn.functional.pad(kept, (0, order.shape[1] * block["BLOCK_R"] - rows))
        holds = parts.view(batch, order.shape[1], block["BLOCK_R"]).any(-1)
        holding = torch.argsort(holds, dim=-1, descending=True, stable=True).to(torch.int32)
        number = holds.sum(-1, dtype=torch.int32)
        sums_kernel[(order.shape[2], batch * heads)](
            query, key, lse, column_sum, state, kept.to(torch.uint8).contiguous(), holding, number, *places, weight, *numbers,
            *query.stride(), *key.stride(), weight_b, *sizes, **flags, **block,
        )  # fmt: skip
    if segments is not None:
        mass = mass.unflatten(-1, (2, -1)).sum(-2)[..., :count].contiguous()
    return out, lse, mass, column_sum
