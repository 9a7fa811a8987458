# SPDX-License-Identifier: Apache-2.0
"""Segmented attention of a few rows, in Triton: one pass over K and V, then one small pass that recombines.

The equations are those of ``reference.py``. The keys are cut into T chunks, which run side by side; every chunk leaves, per
row and segment, its log-sum-exp and its normalised output. Chunks and segments recombine by the same rule, so that
adding up the chunks and weighing the segments is one kernel.

All query heads that share a KV head run in one program, and every one of them once per segment: a program's rows are
(segment, head of the group, query row), whose logits differ by the log membership only. Few of them fill the 16 rows
that a matrix instruction takes, so that segments cost little, and the ratio of heads need not be a power of two.

Only this module and its siblings ``triton_*.py`` import triton; they are loaded when a backend that needs them is used.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlm_attn.kernels import tuning
from vlm_attn.kernels.edited import MOST_SEGMENTS, NEVER

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
_NEVER, _PLACES = tl.constexpr(NEVER), tl.constexpr(2 * MOST_SEGMENTS)
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
SCORES = {"magnitude": 1, "logit": 2, "head_mean": 3}
# Triton compiles again for sizes that are 1 or multiples of 16. These change while a cache grows: one version for all.
GROWING = ["length", "chunk", "parts", "mask_b", "mask_h", "mask_q", "logs_b", "lse_row", "score_b", "score_q"]


def jit_growing(kernel):  # type: ignore[no-untyped-def]
    """``triton.jit`` without a version of its own for values of the arguments in ``GROWING``."""
    names = kernel.__code__.co_varnames[: kernel.__code__.co_argcount]
    return triton.jit(kernel, do_not_specialize=[name for name in GROWING if name in names])


Run = TypeVar("Run", bound=Callable[..., Any])


def on_its_device(run: Run) -> Run:
    """Launch on the device of the first argument; Triton takes the current one, which a model on several does not follow."""

    @wraps(run)
    def inner(first: Tensor, *args: Any, **kwargs: Any) -> Any:
        if first.is_cuda and first.device.index != torch.cuda.current_device():
            with torch.cuda.device(first.device):
                return run(first, *args, **kwargs)
        return run(first, *args, **kwargs)

    return cast(Run, inner)


@triton.jit
def soft_cap(logits, cap):
    """``cap * tanh(logits / cap)``; a series near zero, where the quotient of exponentials would cancel."""
    x = logits / cap
    size = tl.maximum(x, -x)
    e = tl.exp2(size * (-2.0 * LOG2E))
    far = (1.0 - e) / (1.0 + e)
    far = tl.where(x < 0, -far, far)
    y = x * x
    near = x * (1.0 + y * (-1.0 / 3 + y * (2.0 / 15 + y * (-17.0 / 315 + y * (62.0 / 2835)))))
    return cap * tl.where(size < 0.25, near, far)


@triton.jit
def finite(top):
    """A running maximum to subtract: 0 where no key was visible yet."""
    return tl.where(top == float("-inf"), 0.0, top)


@jit_growing
def partials_kernel(
    query, key, value, logs, mask, score, lse, out,
    scale, cap, hidden,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    logs_b, logs_s, mask_b, mask_h, mask_q, mask_s,
    score_b, score_q, score_s, kv_heads, ratio, rows, length, dim, chunk, parts,
    N: tl.constexpr, WHOLE: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, SCORE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of keys, one tile of rows, one KV head. A row is (segment, head of the group, query row)."""
    part, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    i = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    n, r = i // (ratio * rows), i % (ratio * rows)
    inside = n < N + WHOLE
    head, row = g * ratio + r // rows, r % rows
    d = tl.arange(0, BLOCK_D)
    q_at = query + b * query_b + head * query_h + row * query_q
    q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    mask_at = mask + b * mask_b + head * mask_h + row * mask_q
    key_at = key + b * key_b + g * key_h
    value_at = value + b * value_b + g * value_h
    score_at = score + b * score_b + row * score_q

    # A row's log memberships by a product with what it is a row of: loading them for every row would cost more than K and V.
    # WHOLE: behind the segments stands one more, to which every key belongs: log membership 0, a row of zeros.
    place = tl.arange(0, _PLACES)
    which = ((place[None, :] % (_PLACES // 2) == n[:, None]) & (n < N)[:, None]).to(logs.dtype.element_ty)
    logs_at = logs + b * logs_b

    top = tl.full([BLOCK_R], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_R], tl.float32)
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    stop = tl.minimum((part + 1) * chunk, length)
    for first in range(part * chunk, stop, BLOCK_S):
        s = first + tl.arange(0, BLOCK_S)
        valid = s < stop
        k = tl.load(
            key_at + s[None, :] * key_s + d[:, None] * key_d, mask=(d < dim)[:, None] & valid[None, :], other=0.0
        )
        v = tl.load(
            value_at + s[:, None] * value_s + d[None, :] * value_d, mask=valid[:, None] & (d < dim)[None, :], other=0.0
        )
        log = tl.load(logs_at + s[None, :] * logs_s + place[:, None], mask=valid[None, :], other=0.0)
        visible = inside[:, None] & valid[None, :]
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if CAP:
            logits = soft_cap(logits, cap)
        if SCORE:
            w = tl.load(score_at[:, None] + s[None, :] * score_s, mask=visible, other=0.0)
            if SCORE == 1:
                w *= tl.maximum(logits, -logits)
            if SCORE == 2:
                w *= logits
            logits += w
        if MASK == 1:
            seen = tl.load(mask_at[:, None] + s[None, :] * mask_s, mask=visible, other=0)
            visible = visible & (seen != 0)
        if MASK == 2:
            added = tl.load(mask_at[:, None] + s[None, :] * mask_s, mask=visible, other=float("-inf")).to(tl.float32)
            visible = visible & (added > hidden)
            logits += tl.where(visible, added, 0.0)
        logits *= LOG2E
        weight = tl.dot(which, log, input_precision="ieee")
        logits = tl.where(visible & (weight > _NEVER / 2), logits + weight, float("-inf"))
        new = tl.maximum(top, tl.max(logits, 1))
        base = finite(new)
        p = tl.exp2(logits - base[:, None])
        fade = tl.exp2(top - base)
        total = total * fade + tl.sum(p, 1)
        acc = acc * fade[:, None] + tl.dot(p.to(v.dtype), v, input_precision="ieee")
        top = new

    some = total > 0
    at = pair.to(tl.int64) * ratio * rows + r  # row of [B * H * Q]
    lse_at = lse + (at * (N + WHOLE) + n) * parts + part
    tl.store(lse_at, tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf")), mask=inside)
    # An empty segment leaves no output, only the sign that it is empty.
    out_at = out + ((at * N + n) * parts + part) * dim
    kept = some & (n < N)
    acc = acc / tl.where(some, total, 1.0)[:, None]
    tl.store(out_at[:, None] + d[None, :], acc, mask=kept[:, None] & (d < dim)[None, :])


@jit_growing
def head_mean_kernel(
    query, key, size, scale, cap,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, kv_heads, ratio, rows, length, dim,
    CAP: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One tile of keys, one tile of rows: the logits' magnitude, its mean over all heads. Reads K once, no V."""
    tile, b = tl.program_id(1), tl.program_id(2).to(tl.int64)
    s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    row = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    valid, inside = s < length, row < rows
    d = tl.arange(0, BLOCK_D)
    total = tl.zeros([BLOCK_R, BLOCK_S], tl.float32)
    for g in range(0, kv_heads):
        k = tl.load(
            key + b * key_b + g * key_h + s[None, :] * key_s + d[:, None] * key_d,
            mask=(d < dim)[:, None] & valid[None, :],
            other=0.0,
        )
        for i in range(0, ratio):
            q_at = query + b * query_b + (g * ratio + i) * query_h + row * query_q
            q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
            logits = tl.dot(q, k, input_precision="ieee") * scale
            if CAP:
                logits = soft_cap(logits, cap)
            total += tl.maximum(logits, -logits)
    at = size + (b * rows + row)[:, None] * length + s[None, :]
    tl.store(at, total / (kv_heads * ratio), mask=inside[:, None] & valid[None, :])


@jit_growing
def masses_kernel(lse, mass, N, begin, end, parts, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Masses of one row from its chunks: segment n's sum over that of all keys, the segments ``begin .. end - 1`` together."""
    row = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    stored = tl.maximum(N, end)
    x = tl.load(
        lse + row * stored * parts + n[:, None] * parts + t[None, :],
        mask=(n < stored)[:, None] & (t < parts)[None, :],
        other=float("-inf"),
    )
    all_keys = (n >= begin) & (n < end)
    base = finite(tl.max(tl.max(tl.where(all_keys[:, None], x, float("-inf")), 1), 0))
    sums = tl.sum(tl.exp2((x - base) * LOG2E), 1)
    total = tl.sum(tl.where(all_keys, sums, 0.0), 0)
    tl.store(mass + row * N + n, tl.where(total > 0, sums / tl.where(total > 0, total, 1.0), 0.0), mask=n < N)


@jit_growing
def combine_kernel(
    lse, out, weight, head_scale, result, result_lse,
    lse_row, out_row, N, parts, heads, rows, dim, result_b, result_h, result_q,
    WEIGHT: tl.constexpr, SCALE: tl.constexpr, KEEP_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, STEP: tl.constexpr,
):  # fmt: skip
    """One row: ``sum_m w_m e^lse_m out_m / sum_m w_m e^lse_m`` over the N * parts pieces m.

    WEIGHT: 0 none, 1 linear, 2 log.
    """
    index = tl.program_id(0).to(tl.int64)
    pieces = N * parts
    d = tl.arange(0, BLOCK_D)
    m = tl.arange(0, BLOCK_M)
    x = tl.load(lse + index * lse_row + m, mask=m < pieces, other=float("-inf"))
    x = x + log_weights(weight + index * N, m, parts, pieces, WEIGHT)
    base = finite(tl.max(x, 0))
    total = tl.sum(tl.exp2((x - base) * LOG2E), 0)
    acc = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, pieces, STEP):
        i = first + tl.arange(0, STEP)
        y = tl.load(lse + index * lse_row + i, mask=i < pieces, other=float("-inf"))
        share = tl.exp2((y + log_weights(weight + index * N, i, parts, pieces, WEIGHT) - base) * LOG2E)
        # Pieces without a share were perhaps never written.
        piece = tl.load(
            out + index * out_row + i[:, None] * dim + d[None, :],
            mask=(share > 0)[:, None] & (d < dim)[None, :],
            other=0.0,
        )
        acc += tl.sum(share[:, None] * piece, 0)
    some = total > 0
    acc = tl.where(some, acc / tl.where(some, total, 1.0), 0.0)
    b, h, q = index // (heads * rows), index // rows % heads, index % rows
    if SCALE:
        acc *= tl.load(head_scale + h)
    at = result + b * result_b + h * result_h + q * result_q
    tl.store(at + d, acc.to(result.dtype.element_ty), mask=d < dim)
    if KEEP_LSE:
        tl.store(result_lse + index, tl.where(some, base + tl.log2(tl.where(some, total, 1.0)) * LN2, float("-inf")))


@triton.jit
def log_weights(weight, m, parts, pieces, WEIGHT: tl.constexpr):
    """Log weight of pieces m, whose segment is ``m // parts``."""
    if WEIGHT == 0:
        return tl.zeros(m.shape, tl.float32)
    else:
        w = tl.load(weight + m // parts, mask=m < pieces, other=0.0).to(tl.float32)
        if WEIGHT == 1:
            w = tl.where(w > 0, tl.log2(tl.maximum(w, 1.2e-38)) * LN2, float("-inf"))
        return w


def next_power(n: int, least: int = 1) -> int:
    """The next power of two."""
    return max(least, triton.next_power_of_2(n))


@on_its_device
def partials(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    logs: Tensor,
    count: int,
    whole: bool,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    score: Tensor | None = None,
    score_of: str = "magnitude",
    parts: int = 0,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and output of every chunk and segment.

    Args:
        query: ``[B, H, Q, D]``, any strides, as all inputs.
        key: ``[B, G, S, D]``.
        value: ``[B, G, S, D]``.
        logs: ``[B or 1, S, 16]``, see ``edited.log_members``.
        count: number of segments, N.
        whole: also the log-sum-exp of all keys together, as index N; where segments form a partition it is theirs.
        mask: bool or additive ``[B or 1, H or 1, Q, >= S]``.
        scale: factor on the dot products.
        softcap: see ``attention_rows``.
        score: ``[B or 1, Q or 1, S]`` float32, w of a ``ScoreEdit``.
        score_of: ``magnitude``, ``logit`` or ``head_mean``, for which K is read twice.
        parts: number of chunks the keys are cut into, at most; 0 = as many as keep the device busy.

    Returns:
        ``lse [B * H * Q, N or N + 1, T]`` float32 and ``out [B * H * Q, N, T, D]`` float32, not written where lse is ``-inf``.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    ratio = heads // kv_heads
    stored = count + whole
    lines = stored * ratio * rows
    block, _ = tuning.decode(query, lines, dim)
    chunk = tuning.chunk(query, key, stored, parts)
    tiles, parts = triton.cdiv(lines, block["BLOCK_R"]), triton.cdiv(length, chunk)
    lse = torch.empty(batch * heads * rows, stored, parts, dtype=torch.float32, device=query.device)
    out = torch.empty(batch * heads * rows, count, parts, dim, dtype=torch.float32, device=query.device)
    kind, hidden, seen = NO_MASK, 0.0, query
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        hidden = 0.0 if kind == BOOL_MASK else max(torch.finfo(mask.dtype).min / 2, -3e38)
        seen = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        seen = seen[..., :length].expand(batch, heads, rows, length)
        mask_strides = seen.stride()
    logs = logs.expand(batch, -1, -1)
    if score is not None and score_of == "head_mean":
        score = score * head_mean(query, key, scale, softcap)
    weights = query[0] if score is None else score.expand(batch, rows, length)
    partials_kernel[(parts, tiles, batch * kv_heads)](
        query, key, value, logs, seen, weights, lse, out,
        scale, softcap or 1.0, hidden,
        *query.stride(), *key.stride(), *value.stride(), *logs.stride()[:2], *mask_strides,
        *weights.stride(), kv_heads, ratio, rows, length, dim, chunk, parts,
        N=count, WHOLE=int(whole), MASK=kind, CAP=softcap is not None, SCORE=0 if score is None else SCORES[score_of],
        BLOCK_D=next_power(dim, 16), **block,
    )  # fmt: skip
    return lse, out


@on_its_device
def head_mean(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Mean over the heads of the logits' magnitude, ``[B, Q, S]`` float32."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    block, _ = tuning.decode(query, rows, dim)
    size = torch.empty(batch, rows, length, dtype=torch.float32, device=query.device)
    head_mean_kernel[(triton.cdiv(length, block["BLOCK_S"]), triton.cdiv(rows, block["BLOCK_R"]), batch)](
        query, key, size, scale, softcap or 1.0, *query.stride(), *key.stride(),
        kv_heads, heads // kv_heads, rows, length, dim, CAP=softcap is not None, BLOCK_D=next_power(dim, 16), **block,
    )  # fmt: skip
    return size


@on_its_device
def masses(lse: Tensor, count: int, partition: int) -> Tensor:
    """Masses ``[B * H * Q, N]`` float32 from ``lse`` of :func:`partials`.

    Args:
        lse: ``[B * H * Q, N, T]``, or ``[B * H * Q, N + 1, T]`` with all keys together as index N.
        count: N.
        partition: how many of the segments, the first, hold every key once; not read where lse holds all keys together.
    """
    stored, parts = lse.shape[1:]
    begin, end = (0, partition) if stored == count else (count, count + 1)
    mass = torch.empty(lse.shape[0], count, dtype=torch.float32, device=lse.device)
    blocks = {"BLOCK_N": next_power(stored, 8), "BLOCK_T": 64}
    masses_kernel[(lse.shape[0],)](lse, mass, count, begin, end, parts, **blocks, num_warps=1)
    return mass


@on_its_device
def combine(
    lse: Tensor, out: Tensor, weight: Tensor, head_scale: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor:
    """The chunks of :func:`partials` under weights ``[B * H * Q, N]`` >= 0: ``[B, H, Q, D]``, laid out ``[B, Q, H, D]``."""
    total, count, parts, dim = out.shape
    rows = total // (batch * heads)
    result = torch.empty(batch, rows, heads, dim, dtype=dtype, device=out.device).transpose(1, 2)
    _launch_combine(lse, out, weight, 1, head_scale, result, None, count, parts)
    return result


def _launch_combine(
    lse: Tensor,
    out: Tensor,
    weight: Tensor | None,
    kind: int,
    head_scale: Tensor | None,
    result: Tensor,
    result_lse: Tensor | None,
    count: int,
    parts: int,
) -> None:
    """``result [B, H, Q, D]`` of any strides but the last."""
    batch, heads, rows, dim = result.shape
    pieces = count * parts
    combine_kernel[(batch * heads * rows,)](
        lse, out, lse if weight is None else weight, lse if head_scale is None else head_scale, result,
        lse if result_lse is None else result_lse,
        lse.stride(0), out.stride(0), count, parts, heads, rows, dim, *result.stride()[:3],
        WEIGHT=0 if weight is None else kind, SCALE=head_scale is not None, KEEP_LSE=result_lse is not None,
        BLOCK_M=64 if pieces <= 64 else 512, BLOCK_D=next_power(dim), STEP=16 if pieces <= 32 else 64, num_warps=4,
    )  # fmt: skip


@on_its_device
def gathered(lse: Tensor, out: Tensor, batch: int, heads: int) -> tuple[Tensor, Tensor]:
    """Chunks added up: ``lse [B, H, Q, N]`` and ``out [B, H, Q, N, D]``, float32, as the reference gives them."""
    total, count, parts, dim = out.shape
    rows = total // (batch * heads)
    by_segment = lse[:, :count].reshape(total * count, parts)
    result = torch.empty(total * count, 1, 1, dim, dtype=torch.float32, device=out.device)
    result_lse = torch.empty(total * count, dtype=torch.float32, device=out.device)
    _launch_combine(by_segment, out.view(total * count, parts, dim), None, 0, None, result, result_lse, 1, parts)
    return result_lse.view(batch, heads, rows, count), result.view(batch, heads, rows, count, dim)


@on_its_device
def combined(lse: Tensor, out: Tensor, log_weight: Tensor, head_scale: Tensor | None) -> Tensor:
    """``combine`` of the reference on ``lse [B, H, Q, N]``, ``out [B, H, Q, N, D]``, in float32."""
    batch, heads, rows, count, dim = out.shape
    result = torch.empty(batch, heads, rows, dim, dtype=torch.float32, device=out.device)
    lse, out = lse.float().reshape(-1, count), out.float().reshape(-1, count, dim)
    log_weight = log_weight.float().expand(batch, heads, rows, count).contiguous()
    _launch_combine(lse, out, log_weight, 2, head_scale, result, None, count, 1)
    return result
