# SPDX-License-Identifier: Apache-2.0
"""The Triton operations as torch sees them: registered with fake implementations, so that ``torch.compile`` keeps one graph.

Annotations are real types here: torch reads the schemas from them.
"""

import torch
from torch import Tensor

from vlm_attn.kernels import tuning


@torch.library.custom_op("vlm_attn::segmented_partials", mutates_args=())
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
) -> tuple[Tensor, Tensor]:
    """See ``triton_segmented.partials``."""
    from vlm_attn.kernels import triton_segmented

    return triton_segmented.partials(query, key, value, logs, count, whole, mask, scale, softcap, score, score_of)


@partials.register_fake
def _(query, key, value, logs, count, whole, mask, scale, softcap, score=None, score_of="magnitude"):  # type: ignore[no-untyped-def]
    batch, heads, rows, dim = query.shape
    parts = -(-key.shape[2] // tuning.chunk(query, key, count + whole))
    total = batch * heads * rows
    lse = torch.empty(total, count + whole, parts, dtype=torch.float32, device=query.device)
    return lse, torch.empty(total, count, parts, dim, dtype=torch.float32, device=query.device)


@torch.library.custom_op("vlm_attn::segment_masses", mutates_args=())
def masses(lse: Tensor, count: int, partition: int) -> Tensor:
    """See ``triton_segmented.masses``."""
    from vlm_attn.kernels import triton_segmented

    return triton_segmented.masses(lse, count, partition)


@masses.register_fake
def _(lse, count, partition):  # type: ignore[no-untyped-def]
    return lse.new_empty(lse.shape[0], count)


@torch.library.custom_op("vlm_attn::combine_segments", mutates_args=())
def combine(
    lse: Tensor, out: Tensor, weight: Tensor, head_scale: Tensor | None, batch: int, heads: int, dtype: torch.dtype
) -> Tensor:
    """See ``triton_segmented.combine``."""
    from vlm_attn.kernels import triton_segmented

    return triton_segmented.combine(lse, out, weight, head_scale, batch, heads, dtype)


@combine.register_fake
def _(lse, out, weight, head_scale, batch, heads, dtype):  # type: ignore[no-untyped-def]
    rows = out.shape[0] // (batch * heads)
    return torch.empty(batch, rows, heads, out.shape[3], dtype=dtype, device=out.device).transpose(1, 2)


@torch.library.custom_op("vlm_attn::masked_attention", mutates_args=())
def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    clauses: list[int],
    tokens: list[Tensor],
    first: int,
    scale: float,
    softcap: float | None,
    score: list[float] | None,
    score_from: Tensor | None,
    log_weight: Tensor | None,
    segments: Tensor | None,
    summed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """See ``triton_prefill.masked_attention``."""
    from vlm_attn.kernels import triton_prefill

    return triton_prefill.masked_attention(
        query, key, value, clauses, tokens, first, scale, softcap, score, score_from, log_weight, segments, summed
    )


@masked_attention.register_fake
def _(query, key, value, clauses, tokens, first, scale, softcap, score, score_from, log_weight, segments, summed):  # type: ignore[no-untyped-def]
    batch, heads, rows, dim = query.shape

    def made(*size):  # type: ignore[no-untyped-def]
        return torch.empty(batch, heads, *size, dtype=torch.float32, device=query.device)

    out = value.new_empty(batch, rows, heads, dim).transpose(1, 2)
    mass = made(rows, 0 if segments is None else segments.shape[2])
    return out, made(rows), mass, made(0 if summed is None else key.shape[2])


@torch.library.custom_op("vlm_attn::probe", mutates_args=())
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
    """See ``triton_probe.probe``."""
    from vlm_attn.kernels import triton_probe

    return triton_probe.probe(query, key, segments, mask, last, keys, scale, softcap, maps)


@probe.register_fake
def _(query, key, segments, mask, last, keys, scale, softcap, maps):  # type: ignore[no-untyped-def]
    (batch, heads, rows, _), length = query.shape, key.shape[2]
    count = 0 if segments is None else segments.shape[2]

    def made(*size):  # type: ignore[no-untyped-def]
        return torch.empty(batch, heads, *size, dtype=torch.float32, device=query.device)

    return made(rows if maps else 0, length), made(rows, count), made(length), made(rows)
