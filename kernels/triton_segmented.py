"""Segmented attention of a few rows, in Triton: one pass over K and V, then one small pass that recombines.

The equations are those of ``reference.py``. The keys are cut into T chunks, which run side by side; every chunk leaves, per
row and segment, its log-sum-exp and its normalised output. Chunks and segments recombine by the same rule, so that
adding up the chunks and weighing the segments is one kernel.

All query heads that share a KV head run in one program: a program's rows are ``head in the group * Q + query row``,
filled up to the 16 rows a matrix instruction takes, so the ratio of heads need not be a power of two.

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

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NO_MASK, BOOL_MASK, ADDED_MASK = 0, 1, 2
SCORES = {"magnitude": 1, "logit": 2, "head_mean": 3}
# Triton compiles again for sizes that are 1 or multiples of 16. These change while a cache grows: one version for all.
GROWING = ["length", "chunk", "parts", "mask_b", "mask_h", "mask_q", "segments_b", "lse_row", "score_b", "score_q"]


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


@triton.jit
def fold(logits, member, value, top, total, out):
    """Add a tile of keys, logits in base 2, to one segment's running maximum, sum and output."""
    weighted = logits + tl.where(member > 0, tl.log2(tl.maximum(member, 1.2e-38)), float("-inf"))[None, :]
    new = tl.maximum(top, tl.max(weighted, 1))
    base = finite(new)
    p = tl.exp2(weighted - base[:, None])
    fade = tl.exp2(top - base)
    total = total * fade + tl.sum(p, 1)
    out = out * fade[:, None] + tl.dot(p.to(value.dtype), value, input_precision="ieee")
    return new, total, out


@triton.jit
def leave(lse_at, out_at, top, total, out, inside, d, dim, part, parts):
    """Store one segment of one chunk; an empty one leaves no output, only the sign that it is empty."""
    some = total > 0
    tl.store(
        lse_at + part, tl.where(some, (top + tl.log2(tl.where(some, total, 1.0))) * LN2, float("-inf")), mask=inside
    )
    out = out / tl.where(some, total, 1.0)[:, None]
    tl.store(out_at[:, None] + part * dim + d[None, :], out, mask=(inside & some)[:, None] & (d < dim)[None, :])


@jit_growing
def partials_kernel(
    query, key, value, segments, mask, score, lse, out,
    scale, cap, hidden,
    query_b, query_h, query_q, query_d, key_b, key_h, key_s, key_d, value_b, value_h, value_s, value_d,
    segments_b, segments_s, segments_n, mask_b, mask_h, mask_q, mask_s,
    score_b, score_q, score_s, kv_heads, ratio, rows, length, dim, chunk, parts,
    N: tl.constexpr, MASK: tl.constexpr, CAP: tl.constexpr, SCORE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One chunk of keys, one tile of rows, one KV head."""
    part, tile, pair = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    b, g = (pair // kv_heads).to(tl.int64), (pair % kv_heads).to(tl.int64)
    r = tile * BLOCK_R + tl.arange(0, BLOCK_R)
    inside = r < ratio * rows
    head, row = g * ratio + r // rows, r % rows
    d = tl.arange(0, BLOCK_D)
    q_at = query + b * query_b + head * query_h + row * query_q
    q = tl.load(q_at[:, None] + d[None, :] * query_d, mask=inside[:, None] & (d < dim)[None, :], other=0.0)
    mask_at = mask + b * mask_b + head * mask_h + row * mask_q
    key_at = key + b * key_b + g * key_h
    value_at = value + b * value_b + g * value_h
    segments_at = segments + b * segments_b
    score_at = score + b * score_b + row * score_q

    nothing = tl.full([BLOCK_R], float("-inf"), tl.float32)
    zeros = tl.zeros([BLOCK_R], tl.float32)
    empty = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    top_all, total_all = nothing, zeros
    top0, total0, out0 = nothing, zeros, empty
    top1, total1, out1 = nothing, zeros, empty
    top2, total2, out2 = nothing, zeros, empty
    top3, total3, out3 = nothing, zeros, empty
    top4, total4, out4 = nothing, zeros, empty
    top5, total5, out5 = nothing, zeros, empty
    top6, total6, out6 = nothing, zeros, empty
    top7, total7, out7 = nothing, zeros, empty

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
        logits = tl.dot(q, k, input_precision="ieee") * scale
        if CAP:
            logits = soft_cap(logits, cap)
        visible = inside[:, None] & valid[None, :]
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
        logits = tl.where(visible, logits * LOG2E, float("-inf"))

        new = tl.maximum(top_all, tl.max(logits, 1))
        base = finite(new)
        total_all = total_all * tl.exp2(top_all - base) + tl.sum(tl.exp2(logits - base[:, None]), 1)
        top_all = new
        # Most tiles hold one segment only: the others cost a look at their membership.
        member = tl.load(segments_at + s * segments_s, mask=valid, other=0.0)
        if tl.max(member, 0) > 0:
            top0, total0, out0 = fold(logits, member, v, top0, total0, out0)
        if N > 1:
            member = tl.load(segments_at + s * segments_s + segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top1, total1, out1 = fold(logits, member, v, top1, total1, out1)
        if N > 2:
            member = tl.load(segments_at + s * segments_s + 2 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top2, total2, out2 = fold(logits, member, v, top2, total2, out2)
        if N > 3:
            member = tl.load(segments_at + s * segments_s + 3 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top3, total3, out3 = fold(logits, member, v, top3, total3, out3)
        if N > 4:
            member = tl.load(segments_at + s * segments_s + 4 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top4, total4, out4 = fold(logits, member, v, top4, total4, out4)
        if N > 5:
            member = tl.load(segments_at + s * segments_s + 5 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top5, total5, out5 = fold(logits, member, v, top5, total5, out5)
        if N > 6:
            member = tl.load(segments_at + s * segments_s + 6 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top6, total6, out6 = fold(logits, member, v, top6, total6, out6)
        if N > 7:
            member = tl.load(segments_at + s * segments_s + 7 * segments_n, mask=valid, other=0.0)
            if tl.max(member, 0) > 0:
                top7, total7, out7 = fold(logits, member, v, top7, total7, out7)

    at = pair.to(tl.int64) * ratio * rows + r  # row of [B * H * Q]
    lse_at = lse + at * ((N + 1) * parts)
    out_at = out + at * (N * parts * dim)
    step = parts * dim
    leave(lse_at, out_at, top0, total0, out0, inside, d, dim, part, parts)
    if N > 1:
        leave(lse_at + parts, out_at + step, top1, total1, out1, inside, d, dim, part, parts)
    if N > 2:
        leave(lse_at + 2 * parts, out_at + 2 * step, top2, total2, out2, inside, d, dim, part, parts)
    if N > 3:
        leave(lse_at + 3 * parts, out_at + 3 * step, top3, total3, out3, inside, d, dim, part, parts)
    if N > 4:
        leave(lse_at + 4 * parts, out_at + 4 * step, top4, total4, out4, inside, d, dim, part, parts)
    if N > 5:
        leave(lse_at + 5 * parts, out_at + 5 * step, top5, total5, out5, inside, d, dim, part, parts)
    if N > 6:
        leave(lse_at + 6 * parts, out_at + 6 * step, top6, total6, out6, inside, d, dim, part, parts)
    if N > 7:
        leave(lse_at + 7 * parts, out_at + 7 * step, top7, total7, out7, inside, d, dim, part, parts)
    some = total_all > 0
    all_at = lse_at + N * parts + part
    tl.store(
        all_at, tl.where(some, (top_all + tl.log2(tl.where(some, total_all, 1.0))) * LN2, float("-inf")), mask=inside
    )


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
def masses_kernel(lse, mass, N, parts, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr):
    """Masses of one row from its chunks: segment n's sum over the sum of all keys, which stands behind the segments."""
    row = tl.program_id(0).to(tl.int64)
    n, t = tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_T)
    x = tl.load(
        lse + row * (N + 1) * parts + n[:, None] * parts + t[None, :],
        mask=(n <= N)[:, None] & (t < parts)[None, :],
        other=float("-inf"),
    )
    base = finite(tl.max(tl.max(tl.where((n == N)[:, None], x, float("-inf")), 1), 0))
    sums = tl.sum(tl.exp2((x - base) * LOG2E), 1)
    total = tl.sum(tl.where(n == N, sums, 0.0), 0)
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
    segments: Tensor,
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
        segments: ``[B or 1, S, N]`` float32, N <= 8.
        mask: bool or additive ``[B or 1, H or 1, Q, >= S]``.
        scale: factor on the dot products.
        softcap: see ``attention_rows``.
        score: ``[B or 1, Q or 1, S]`` float32, w of a ``ScoreEdit``.
        score_of: ``magnitude``, ``logit`` or ``head_mean``, for which K is read twice.
        parts: number of chunks the keys are cut into, at most; 0 = as many as keep the device busy.

    Returns:
        ``lse [B * H * Q, N + 1, T]`` float32, index N for all keys together, and ``out [B * H * Q, N, T, D]`` float32,
        not written where lse is ``-inf``.
    """
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    count, ratio = segments.shape[2], heads // kv_heads
    block = tuning.decode(query, ratio * rows, dim)
    chunk = tuning.chunk(query, key, parts)
    tiles, parts = triton.cdiv(ratio * rows, block["BLOCK_R"]), triton.cdiv(length, chunk)
    lse = torch.empty(batch * heads * rows, count + 1, parts, dtype=torch.float32, device=query.device)
    out = torch.empty(batch * heads * rows, count, parts, dim, dtype=torch.float32, device=query.device)
    kind, hidden, seen = NO_MASK, 0.0, query
    mask_strides: tuple[int, ...] = (0, 0, 0, 0)
    if mask is not None:
        kind = BOOL_MASK if mask.dtype == torch.bool else ADDED_MASK
        hidden = 0.0 if kind == BOOL_MASK else max(torch.finfo(mask.dtype).min / 2, -3e38)
        seen = mask.view(torch.uint8) if kind == BOOL_MASK else mask
        seen = seen[..., :length].expand(batch, heads, rows, length)
        mask_strides = seen.stride()
    segments = segments.expand(batch, length, count)
    if score is not None and score_of == "head_mean":
        score = score * head_mean(query, key, scale, softcap)
    weights = query[0] if score is None else score.expand(batch, rows, length)
    partials_kernel[(parts, tiles, batch * kv_heads)](
        query, key, value, segments, seen, weights, lse, out,
        scale, softcap or 1.0, hidden,
        *query.stride(), *key.stride(), *value.stride(), *segments.stride(), *mask_strides,
        *weights.stride(), kv_heads, ratio, rows, length, dim, chunk, parts,
        N=count, MASK=kind, CAP=softcap is not None, SCORE=0 if score is None else SCORES[score_of],
        BLOCK_D=next_power(dim, 16), **block,
    )  # fmt: skip
    return lse, out


@on_its_device
def head_mean(query: Tensor, key: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Mean over the heads of the logits' magnitude, ``[B, Q, S]`` float32."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    block = tuning.decode(query, rows, dim)
    size = torch.empty(batch, rows, length, dtype=torch.float32, device=query.device)
    head_mean_kernel[(triton.cdiv(length, block["BLOCK_S"]), triton.cdiv(rows, block["BLOCK_R"]), batch)](
        query, key, size, scale, softcap or 1.0, *query.stride(), *key.stride(),
        kv_heads, heads // kv_heads, rows, length, dim, CAP=softcap is not None, BLOCK_D=next_power(dim, 16), **block,
    )  # fmt: skip
    return size


@on_its_device
def masses(lse: Tensor) -> Tensor:
    """Masses ``[B * H * Q, N]`` float32 from ``lse [B * H * Q, N + 1, T]``."""
    count, parts = lse.shape[1] - 1, lse.shape[2]
    mass = torch.empty(lse.shape[0], count, dtype=torch.float32, device=lse.device)
    masses_kernel[(lse.shape[0],)](lse, mass, count, parts, BLOCK_N=next_power(count + 1, 8), BLOCK_T=64, num_warps=1)
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
    combine_kernel[(batch * heads * rows,)](
        lse, out, lse if weight is None else weight, lse if head_scale is None else head_scale, result,
        lse if result_lse is None else result_lse,
        lse.stride(0), out.stride(0), count, parts, heads, rows, dim, *result.stride()[:3],
        WEIGHT=0 if weight is None else kind, SCALE=head_scale is not None, KEEP_LSE=result_lse is not None,
        BLOCK_M=64 if count * parts <= 64 else 512, BLOCK_D=next_power(dim), STEP=16, num_warps=4,
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
