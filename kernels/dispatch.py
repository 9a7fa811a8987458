# SPDX-License-Identifier: Apache-2.0
"""One entry per operation, several backends behind it: the first whose constraints the call meets is used.

A backend says what it cannot do; asking for one by name that does not fit raises with its reason, before anything is
computed. A decision is remembered per kind of call, so that a decode step pays for one look-up.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_attn.kernels import edited, reference
from vlm_attn.kernels.edited import Edit, ScoreEdit

MOST_SEGMENTS = edited.MOST_SEGMENTS
MOST_ROWS = 256  # of the segmented kernel: its rows are filled up to 16 and K and V are read once per such tile
MOST_DIM = 256
TRITON_DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Facts(NamedTuple):
    """What decides which backend fits. Equal facts, equal decision."""

    device: str
    dtype: torch.dtype
    dim: int
    rows: int
    grad: bool
    softcap: bool = False
    edits: int = 1
    segments: int = 1
    score: str = ""  # what of the logits a score is added to; several edits: joined by commas
    extras: str = ""  # what is wanted beside the output


class Backend(NamedTuple):
    """One way to run an operation: its name, the function, and why it does not fit a call (None: it does)."""

    name: str
    run: Callable[..., Any]
    refuses: Callable[[Facts], str | None]


TRITON = importlib.util.find_spec("triton") is not None

BACKENDS: dict[str, list[Backend]] = {}
_preferred: str | None = None
_chosen: dict[tuple[str, str | None, Facts], Backend] = {}


def register(operation: str, name: str, refuses: Callable[[Facts], str | None]) -> Callable[..., Any]:
    """Decorator: add a backend behind those an operation has."""

    def add(run: Callable[..., Any]) -> Callable[..., Any]:
        BACKENDS.setdefault(operation, []).append(Backend(name, run, refuses))
        return run

    return add


def choose(operation: str, facts: Facts, name: str | None = None) -> Backend:
    """The backend for a call.

    Args:
        operation: a key of :data:`BACKENDS`.
        facts: the call.
        name: the backend asked for; None = the first that fits.

    Raises:
        ValueError: there is no backend of that name.
        RuntimeError: the backend asked for does not fit, or none does; the message says which constraint.
    """
    if name is None and _preferred is not None and any(b.name == _preferred for b in BACKENDS[operation]):
        name = _preferred
    known = (operation, name, facts)
    if not torch.compiler.is_compiling() and known in _chosen:
        return _chosen[known]
    offered = BACKENDS[operation]
    if name is not None:
        offered = [backend for backend in offered if backend.name == name]
        if not offered:
            names = ", ".join(backend.name for backend in BACKENDS[operation])
            raise ValueError(f"backend={name!r}: {operation} has {names}")
    reasons = []
    for backend in offered:
        reason = backend.refuses(facts)
        if reason is None and backend.name == "triton" and name is None and facts.device == "cpu":
            reason = "the interpreter is for tests: ask for it by name"
        if reason is None:
            if not torch.compiler.is_compiling():
                _chosen[known] = backend
            return backend
        reasons.append(f"backend {backend.name!r} cannot run this {operation}: {reason}")
    raise RuntimeError("; ".join(reasons))


@contextmanager
def prefer(name: str) -> Iterator[None]:
    """Within the block, ask for this backend wherever an operation has one of the name (in all threads).

    Args:
        name: ``triton``, ``grouped``, ``sdpa``, ``eager`` or ``reference``.

    Raises:
        ValueError: no operation has such a backend.
    """
    global _preferred
    names = sorted({backend.name for offered in BACKENDS.values() for backend in offered})
    if name not in names:
        raise ValueError(f"backend {name!r}: there are {', '.join(names)}")
    before, _preferred = _preferred, name
    try:
        yield
    finally:
        _preferred = before


def triton_first(device: torch.device) -> bool:
    """Whether the Triton kernels are what a call on a device gets, if its tensors fit."""
    return _preferred == "triton" or (_preferred is None and TRITON and device.type == "cuda")


def triton_refuses(facts: Facts) -> str | None:
    """What every Triton kernel needs."""
    if facts.device != "cuda" and not (facts.device == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"):
        return f"device is {facts.device}, Triton needs cuda (to test on a CPU: TRITON_INTERPRET=1 before the first import)"
    if not TRITON:
        return "triton is not installed"
    if facts.device == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability() < (8, 0):
        return f"compute capability is {torch.cuda.get_device_capability()}, the kernels need (8, 0) or later"
    if facts.dtype not in TRITON_DTYPES:
        return f"dtype is {facts.dtype}, allowed are float16, bfloat16 and float32"
    if not 1 <= facts.dim <= MOST_DIM:
        return f"head dimension is {facts.dim}, allowed are 1 to {MOST_DIM}"
    if facts.grad:
        return "gradients are asked for, which only the PyTorch backends give (or run under torch.no_grad())"
    return None


def _segmented_refuses(facts: Facts) -> str | None:
    if facts.score not in ("", "magnitude", "logit", "head_mean"):
        return f"score edits of {facts.score}: allowed is one, of magnitude, logit or head_mean, with all heads in one process"
    if facts.edits > 1:
        return f"{facts.edits} edits in one layer, allowed is 1: edited.merged makes one of several where it can"
    if facts.segments > MOST_SEGMENTS:
        return f"{facts.segments} segments, allowed are {MOST_SEGMENTS}"
    if facts.rows > MOST_ROWS:
        return f"{facts.rows} query rows, allowed are {MOST_ROWS}"
    return triton_refuses(facts)


def sdpa_refuses(facts: Facts) -> str | None:
    """What PyTorch's fused attention does not have."""
    for name in ("softcap" * facts.softcap, "score" if facts.score else "", facts.extras):
        if name:
            return f"{name} is asked for, which scaled_dot_product_attention does not have"
    return None


def _biased_refuses(facts: Facts) -> str | None:
    return sdpa_refuses(facts._replace(score=""))  # a changed logit is a bias


def takes_all(facts: Facts) -> None:
    """For a backend that takes every call."""
    return None


def check_qkv(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> None:
    """Raise for tensors that do not belong together.

    Raises:
        ValueError: names the argument, what it is and what is allowed.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if tensor.dim() != 4:
            raise ValueError(f"{name} must have 4 dimensions [B, heads, rows, D], got {list(tensor.shape)}")
        if tensor.dtype != query.dtype or tensor.device != query.device:
            raise ValueError(f"{name} is {tensor.dtype} on {tensor.device}, query {query.dtype} on {query.device}")
    batch, heads, rows, dim = query.shape
    if key.shape[0] != batch or key.shape[3] != dim:
        raise ValueError(f"key {list(key.shape)} does not fit query {list(query.shape)}: batch and D must be equal")
    if value.shape != key.shape:
        raise ValueError(f"value {list(value.shape)} must have key's shape {list(key.shape)}")
    if not key.shape[1] or heads % key.shape[1]:
        raise ValueError(f"query has {heads} heads, which is no multiple of the {key.shape[1]} heads of key and value")
    if mask is None:
        return
    fits = mask.dim() == 4 and all(m in (1, n) for m, n in zip(mask.shape, (batch, heads, rows), strict=False))
    if not fits or mask.shape[3] < key.shape[2]:
        raise ValueError(
            f"mask {list(mask.shape)} must be [{batch} or 1, {heads} or 1, {rows} or 1, {key.shape[2]} or more]"
        )
    if mask.dtype != torch.bool and not mask.dtype.is_floating_point:
        raise ValueError(f"mask is {mask.dtype}: allowed are bool (True = visible) and floating point (added)")
    if mask.device != query.device:
        raise ValueError(f"mask is on {mask.device}, query on {query.device}")


def check_segments(segments: Tensor, key: Tensor) -> None:
    """Raise for a membership matrix that does not fit.

    Raises:
        ValueError: a wrong shape or dtype.
    """
    batch, length = key.shape[0], key.shape[2]
    if segments.dim() != 3 or segments.shape[0] not in (1, batch) or segments.shape[1] != length:
        raise ValueError(f"segments {list(segments.shape)} must be [{batch} or 1, {length}, N], one row per key")
    if not segments.dtype.is_floating_point or segments.device != key.device:
        raise ValueError(f"segments are {segments.dtype} on {segments.device}: must be floating point on {key.device}")


def wants_grad(*tensors: Tensor) -> bool:
    """Whether gradients of any of them are asked for."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit | ScoreEdit],
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    row: int | Tensor = 0,
    head_scale: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """Attention of a few rows under a list of edits, on the backend that fits.

    Args:
        query: ``[B, H, Q, D]``; meant for Q up to about 64.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        edits: the edits of this layer. Score edits change the raw logits, one after the other, before the mask; every policy
            sees the masses after them and before any edit; weights multiply.
        mask: ``[B or 1, H or 1, Q, >= S]``, bool (True = visible) or additive.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        offset: column of the first key (sliding-window caches drop the oldest keys).
        row: column of the first row, where a score edit asks for it (``from_row``).
        head_scale: ``[H]`` float32, a factor on the output of every head.
        backend: ``triton``, ``grouped``, ``sdpa`` or ``reference``; None = the first that fits.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``value``. A row without any visible key is zeros.

    Raises:
        ValueError: tensors that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    scores = [edit for edit in edits if isinstance(edit, ScoreEdit)]
    weighed = [edit for edit in edits if isinstance(edit, Edit)]
    facts = Facts(
        query.device.type,
        query.dtype,
        query.shape[-1],
        query.shape[-2],
        wants_grad(query, key, value),
        softcap is not None,
        len(weighed),
        weighed[0].segments.shape[2] if weighed else 0,
        score=",".join(score.kind for score in scores),
    )
    run = choose("edited_attention", facts, backend).run
    where = {"offset": offset, "row": row}
    return run(
        query,
        key,
        value,
        weighed,
        scores=scores,
        mask=mask,
        scale=scale,
        softcap=softcap,
        head_scale=head_scale,
        **where,
    )


@register("edited_attention", "triton", _segmented_refuses)
def _edited_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    scores: Sequence[ScoreEdit],
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    offset: int | Tensor,
    row: int | Tensor,
    head_scale: Tensor | None,
) -> Tensor:
    check_qkv(query, key, value, mask)
    batch, heads, rows, _ = query.shape
    length = key.shape[2]
    run = _triton_operations()
    weights = scores[0].weights(length, rows, offset, row) if scores else None
    last = (mask, scale, softcap, weights, scores[0].of if scores else "magnitude")
    if edits:
        segments = edits[0].over(length, offset)
        check_segments(segments, key)
        logs, count = edits[0].prepared(edited.log_members, query.dtype, segments, offset), segments.shape[2]
        lse, out = run.partials(query, key, value, logs, count, not edits[0].partition, *last)
        mass = run.masses(lse, count, edits[0].partition)
        weight = edits[0].policy(mass.view(batch, heads, rows, -1))
        weight = weight.to(torch.float32).reshape(mass.shape).contiguous()
    else:
        logs = edited.log_members(query.new_ones(1, 1, 1), query.dtype).expand(-1, length, -1)
        lse, out = run.partials(query, key, value, logs, 1, False, *last)
        weight = lse.new_ones(len(lse), 1)
    return run.combine(lse, out, weight, head_scale, batch, heads, value.dtype)


register("edited_attention", "grouped", takes_all)(edited.edited_attention)
register("edited_attention", "sdpa", _biased_refuses)(edited.edited_sdpa)
register("edited_attention", "reference", takes_all)(reference.edited_attention)


def _triton_operations() -> Any:
    """The Triton functions, or the same as operations torch.compile can keep: these are some microseconds slower."""
    if torch.compiler.is_compiling():
        from vlm_attn.kernels import ops

        return ops
    from vlm_attn.kernels import triton_segmented

    return triton_segmented


def segmented_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exp and normalised output of every segment, on the backend that fits.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        segments: ``[B or 1, S, N]`` membership >= 0; a twin column holds ``exp(log weight)``.
        mask: ``[B or 1, H or 1, Q, >= S]``, bool (True = visible) or additive.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        backend: ``triton`` or ``reference``; None = the first that fits.

    Returns:
        ``lse [B, H, Q, N]`` (``-inf`` for an empty segment) and ``out [B, H, Q, N, D]`` (zeros for one); float32 from Triton.

    Raises:
        ValueError: tensors that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_qkv(query, key, value, mask)
    check_segments(segments, key)
    facts = Facts(
        query.device.type,
        query.dtype,
        query.shape[3],
        query.shape[2],
        wants_grad(query, key, value, segments),
        softcap is not None,
        1,
        segments.shape[2],
    )
    run = choose("segmented_attention", facts, backend).run
    return run(query, key, value, segments, mask=mask, scale=scale, softcap=softcap)


@register("segmented_attention", "triton", _segmented_refuses)
def _segmented_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor]:
    from vlm_attn.kernels import triton_segmented

    logs = edited.log_members(segments, query.dtype)
    lse, out = triton_segmented.partials(query, key, value, logs, segments.shape[2], False, mask, scale, softcap)
    return triton_segmented.gathered(lse, out, query.shape[0], query.shape[1])


register("segmented_attention", "reference", takes_all)(reference.segmented_attention)


def combine(
    lse: Tensor, out: Tensor, log_weight: Tensor, head_scale: Tensor | None = None, *, backend: str | None = None
) -> Tensor:
    """Recombine segments with new weights, on the backend that fits.

    Args:
        lse: ``[B, H, Q, N]``.
        out: ``[B, H, Q, N, D]``.
        log_weight: ``[B, H, Q, N]`` or what broadcasts to it; ``-inf`` leaves a segment out.
        head_scale: ``[H]``, a factor on the output of every head.
        backend: ``triton`` or ``reference``; None = the first that fits.

    Returns:
        ``[B, H, Q, D]``; zeros where no segment has any weight.

    Raises:
        ValueError: shapes that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    try:
        fits = out.dim() == 5 and out.shape[:4] == lse.shape == torch.broadcast_shapes(log_weight.shape, lse.shape)
    except RuntimeError:
        fits = False
    if not fits:
        raise ValueError(
            f"lse {list(lse.shape)} must be [B, H, Q, N], log_weight {list(log_weight.shape)} must broadcast to it, and "
            f"out {list(out.shape)} must be [B, H, Q, N, D]"
        )
    if head_scale is not None and head_scale.shape != out.shape[1:2]:
        raise ValueError(f"head_scale {list(head_scale.shape)} must have one entry for each of {out.shape[1]} heads")
    facts = Facts(
        out.device.type, out.dtype, out.shape[4], out.shape[2], wants_grad(lse, out, log_weight), False, 1, out.shape[3]
    )
    return choose("combine", facts, backend).run(lse, out, log_weight, head_scale)


@register("combine", "triton", triton_refuses)
def _combine_triton(lse: Tensor, out: Tensor, log_weight: Tensor, head_scale: Tensor | None) -> Tensor:
    from vlm_attn.kernels import triton_segmented

    return triton_segmented.combined(lse, out, log_weight, head_scale)


register("combine", "reference", takes_all)(reference.combine)
