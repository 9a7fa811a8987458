"""Attention of many rows under a mask of ``masks.py``: prompts, cross attention, and canvases without causal order.

logits = score(softcap(q k scale)),   p = softmax over the keys the mask shows,   out = p v
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from vlm_attn.kernels.dispatch import (
    Facts,
    _fits,
    _grad,
    _sdpa_refuses,
    check_qkv,
    choose,
    register,
    triton_refuses,
)
from vlm_attn.kernels.groups import Group
from vlm_attn.kernels.masks import Mask, Tokens, check_tokens, extended, image_index
from vlm_attn.kernels.reference import masked_logits

MOST_CLAUSES = 4


class Score(NamedTuple):
    """A function of the raw logits, after the softcap and before the mask.

    On VISUAL keys ``(s + visual_abs * |s|) * visual_factor``, on SYSTEM keys ``s * system_factor``. PAI (arXiv 2407.21771) is
    ``Score(visual_abs=alpha)`` from the last row on, VAF (CVPR 2025) ``Score(0.0, 1.15, 0.95)`` from the image on.
    """

    visual_abs: float = 0.0
    visual_factor: float = 1.0
    system_factor: float = 1.0

    def __call__(self, logits: Tensor, group: Tensor) -> Tensor:
        """Changed logits ``[B, H, Q, S]`` for keys of the groups ``[B, S]``."""
        group = group[:, None, None]
        raised = (logits + self.visual_abs * logits.abs()) * self.visual_factor
        logits = torch.where(group == int(Group.VISUAL), raised, logits)
        return torch.where(group == int(Group.SYSTEM), logits * self.system_factor, logits)


class Problem(NamedTuple):
    """A checked call, as every backend takes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    mask: Mask
    rows: Tokens  # columns, groups and images of the rows, [B, Q]
    keys: Tokens  # ... and of the keys, [B, S]
    first: int
    scale: float
    softcap: float | None
    score: Score | None
    score_from: Tensor | None

    def matrix(self) -> Tensor:
        """The mask, ``[B, 1, Q, S]`` bool."""
        rows, keys = (Tokens(*(t.unsqueeze(axis) for t in tokens)) for tokens, axis in ((self.rows, 2), (self.keys, 1)))
        return (self.mask(rows, keys) & (keys.group != int(Group.PAD)))[:, None]


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    group: Tensor,
    *,
    image: Tensor | None = None,
    first: int | None = None,
    row_group: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    score: Score | None = None,
    score_from: Tensor | int = 0,
    lse: bool = False,
    backend: str | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention under a mask, on the backend that fits.

    Args:
        query: ``[B, H, Q, D]``, rows of consecutive columns.
        key: ``[B, G, S, D]``, H a multiple of G; key j stands at column j.
        value: ``[B, G, S, D]``.
        mask: a mask of ``masks``, of at most four clauses in the Triton backend.
        group: ``[B, P]`` integers of :class:`Group`, the groups of the keys; those past P are GENERATED, PAD is never seen.
        image: ``[B, P]`` integers, the image of every key, -1 for text; default: every run of VISUAL keys is one.
        first: column of the first row; default: the rows are the last of the keys.
        row_group: ``[B, Q]``, the groups of the rows where they are not keys (cross attention); first is 0 then.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        score: see :class:`Score`.
        score_from: column, or one per sample ``[B]``, of the first row that score changes.
        lse: also return the log-sum-exp of every row.
        backend: ``triton``, ``sdpa`` or ``reference``; None = the first that fits.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``value``, zeros in rows that see nothing; with ``lse`` also ``[B, H, Q]``.

    Raises:
        ValueError: tensors that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_qkv(query, key, value)
    check_tokens(group, image)
    batch, _, rows, dim = query.shape
    length = key.shape[2]
    if group.shape[0] != batch or group.shape[1] > length or group.device != key.device:
        raise ValueError(f"group {list(group.shape)} must be [{batch}, up to {length}] on {key.device}")
    images = extended(image_index(group) if image is None else image.to(torch.int32), length, -1)
    groups = extended(group, length, int(Group.GENERATED)).to(torch.uint8)
    columns = torch.arange(length, device=key.device)[None]
    if row_group is not None:
        check_tokens(row_group, None)
        if row_group.shape != (batch, rows) or first:
            raise ValueError(
                f"row_group {list(row_group.shape)} must be [{batch}, {rows}], and first=0 with it, got {first}"
            )
        first, row_groups = 0, row_group.to(torch.uint8)
        row_images = torch.full_like(row_group, -1, dtype=torch.int32)
    else:
        first = length - rows if first is None else first
        if not 0 <= first <= length - rows:
            raise ValueError(
                f"first={first}: {rows} rows must lie within the {length} columns of the keys (or give row_group)"
            )
        row_groups, row_images = groups[:, first : first + rows], images[:, first : first + rows]
    if isinstance(score_from, Tensor) and score_from.shape != (batch,):
        raise ValueError(f"score_from {list(score_from.shape)} must be an integer or [{batch}]")
    start = None
    if score is not None:
        start = torch.as_tensor(score_from, device=key.device).to(torch.int64).expand(batch).contiguous()
    problem = Problem(
        query,
        key,
        value,
        mask,
        Tokens(
            torch.arange(first, first + rows, device=key.device)[None], row_groups.contiguous(), row_images.contiguous()
        ),
        Tokens(columns, groups.contiguous(), images.contiguous()),
        first,
        scale,
        softcap,
        score,
        start,
    )
    facts = Facts(
        query.device.type,
        query.dtype,
        dim,
        rows,
        _grad(query, key, value),
        softcap is not None,
        segments=len(mask.clauses),
        score="groups" if score is not None else "",
        lse=lse,
    )
    out, sums = choose("masked_attention", facts, backend).run(problem)
    return (out, sums) if lse else out


def _prefill_refuses(facts: Facts) -> str | None:
    if facts.segments > MOST_CLAUSES:
        return f"the mask has {facts.segments} clauses, allowed are {MOST_CLAUSES}"
    return triton_refuses(facts)


@register("masked_attention", "triton", _prefill_refuses)
def _masked_triton(problem: Problem) -> tuple[Tensor, Tensor]:
    run: Callable[..., tuple[Tensor, Tensor]]
    if torch.compiler.is_compiling():
        from vlm_attn.kernels import ops

        run = ops.masked_attention
    else:
        from vlm_attn.kernels import triton_prefill

        run = triton_prefill.masked_attention
    clauses = [int(number) for clause in problem.mask.clauses for number in clause]
    tokens = [problem.rows.group, problem.keys.group, problem.rows.image, problem.keys.image]
    score = None if problem.score is None else list(problem.score)
    return run(
        problem.query,
        problem.key,
        problem.value,
        clauses,
        tokens,
        problem.first,
        problem.scale,
        problem.softcap,
        score,
        problem.score_from,
    )


@register("masked_attention", "sdpa", _sdpa_refuses)
def _masked_sdpa(problem: Problem) -> tuple[Tensor, None]:
    query, key, value = problem[:3]
    visible = problem.matrix()
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=visible, scale=problem.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return out.masked_fill(~visible.any(-1, keepdim=True), 0.0), None


@register("masked_attention", "reference", _fits)
def _masked_reference(problem: Problem) -> tuple[Tensor, Tensor]:
    """The twin. Holds ``[B, H, Q, S]``."""
    logits = masked_logits(problem.query, problem.key, scale=problem.scale, softcap=problem.softcap)
    if problem.score is not None:
        assert problem.score_from is not None
        scored = problem.rows.column >= problem.score_from[:, None]
        logits = torch.where(scored[:, None, :, None], problem.score(logits, problem.keys.group), logits)
    logits = logits.masked_fill(~problem.matrix(), float("-inf"))
    value = problem.value.repeat_interleave(problem.query.shape[1] // problem.value.shape[1], 1)
    return torch.softmax(logits, -1).nan_to_num(0.0) @ value, torch.logsumexp(logits, -1)
