# SPDX-License-Identifier: Apache-2.0
"""Attention of many rows under a mask of ``masks.py``: prompts, cross attention, and canvases without causal order.

    logits = score(softcap(q k scale)) + log weight,   p = softmax over the keys the mask shows,   out = p v

and, where asked for, of the same p: the log-sum-exp of every row, its mass in every segment of the keys, and the sum of every
key's column over some rows (what pruning methods rank by).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from vlm_attn.kernels.dispatch import (
    MOST_SEGMENTS,
    Backend,
    Facts,
    check_qkv,
    check_segments,
    choose,
    register,
    sdpa_refuses,
    takes_all,
    triton_refuses,
    wants_grad,
)
from vlm_attn.kernels.groups import Group
from vlm_attn.kernels.masks import Mask, Tokens, check_tokens, extended, image_index, packed, visible
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


class Attended(NamedTuple):
    """What :func:`masked_attention` returns where more than the output is asked for; a row that sees nothing is zeros."""

    out: Tensor  # [B, H, Q, D] in the dtype of value
    lse: Tensor | None  # [B, H, Q] float32, -inf in a row that sees nothing
    mass: Tensor | None  # [B, H, Q, N] float32
    column_sum: Tensor | None  # [B, H, S] float32


@dataclass(eq=False)
class Pattern:
    """A mask laid over the tokens of a call: worked out once, used by every layer.

    Attributes:
        mask: the mask.
        rows: columns, groups, images and documents of the rows, ``[B or 1, Q]``.
        keys: ... and of the keys, ``[B or 1, S]``.
        first: column of the first row.
        tiles: which tiles of keys a tile of rows visits, by their sizes, as the Triton backend found them.
    """

    mask: Mask
    rows: Tokens
    keys: Tokens
    first: int
    tiles: dict[tuple[int, int], Any] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        mask: Mask,
        group: Tensor,
        rows: int,
        length: int,
        *,
        image: Tensor | None = None,
        document: Tensor | None = None,
        first: int | None = None,
        row_group: Tensor | None = None,
        row_document: Tensor | None = None,
    ) -> Pattern:
        """Lay a mask over ``rows`` rows and ``length`` keys; see :func:`masked_attention`.

        Raises:
            ValueError: tokens that do not fit these numbers or each other.
        """
        check_tokens(group, image, document)
        batch, device = group.shape[0], group.device
        if group.shape[1] > length:
            raise ValueError(f"group {list(group.shape)} must be [{batch}, up to {length}]")
        images = extended(image_index(group) if image is None else image.to(torch.int32), length, -1)
        groups = extended(group, length, int(Group.GENERATED)).to(torch.uint8)
        numbers = None if document is None else packed(document.to(torch.int32), length).contiguous()
        if row_group is not None:
            check_tokens(row_group, None, row_document)
            if row_group.shape != (batch, rows) or row_group.device != device:
                raise ValueError(f"row_group {list(row_group.shape)} must be [{batch}, {rows}] on {device}")
            if (row_document is None) != (document is None):
                raise ValueError("document and row_document: rows that are no keys need both or neither")
            first, row_groups = first or 0, row_group.to(torch.uint8)
            row_images = torch.full_like(row_group, -1, dtype=torch.int32)
            row_numbers = None if row_document is None else row_document.to(torch.int32).contiguous()
        else:
            if row_document is not None:
                raise ValueError("row_document is for rows that are no keys: give row_group with it, or leave it out")
            first = length - rows if first is None else first
            if not 0 <= first <= length - rows:
                raise ValueError(
                    f"first={first}: {rows} rows must lie within the {length} columns of the keys (or give row_group)"
                )
            row_groups, row_images = groups[:, first : first + rows], images[:, first : first + rows]
            row_numbers = None if numbers is None else numbers[:, first : first + rows].contiguous()
        columns = torch.arange(first, first + rows, device=device)[None]
        return cls(
            mask,
            Tokens(columns, row_groups.contiguous(), row_images.contiguous(), row_numbers),
            Tokens(torch.arange(length, device=device)[None], groups.contiguous(), images.contiguous(), numbers),
            first,
        )

    def matrix(self) -> Tensor:
        """The mask, ``[B, 1, Q, S]`` bool."""
        rows, keys = (
            Tokens(*(None if t is None else t.unsqueeze(axis) for t in tokens))  # type: ignore[arg-type]
            for tokens, axis in ((self.rows, 2), (self.keys, 1))
        )
        return visible(self.mask, rows, keys)[:, None]

    def backend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        softcap: float | None = None,
        score: bool = False,
        extras: str = "",
        name: str | None = None,
    ) -> Backend:
        """The backend that :meth:`attend` runs on.

        Raises:
            ValueError: there is none of that name.
            RuntimeError: the backend asked for cannot run this call.
        """
        facts = Facts(
            query.device.type,
            query.dtype,
            query.shape[3],
            query.shape[2],
            wants_grad(query, key, value),
            softcap is not None,
            segments=len(self.mask.clauses),
            score="groups" if score else "",
            extras=extras,
        )
        return choose("masked_attention", facts, name)

    def attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        scale: float,
        softcap: float | None = None,
        score: Score | None = None,
        score_from: Tensor | int = 0,
        log_weight: Tensor | None = None,
        segments: Tensor | None = None,
        summed: Tensor | None = None,
        lse: bool = False,
        backend: str | None = None,
    ) -> Attended:
        """Attention under the mask; see :func:`masked_attention`. What is not asked for may be None or not.

        Raises:
            ValueError: tensors that do not fit each other or the pattern, or no backend of that name.
            RuntimeError: the backend asked for cannot run this call.
        """
        check_qkv(query, key, value)
        batch, _, rows, _ = query.shape
        length = key.shape[2]
        fits = (len(self.keys.group), self.rows.group.shape[1], self.keys.group.shape[1]) == (batch, rows, length)
        if not fits or self.keys.group.device != key.device:
            raise ValueError(
                f"group {list(self.keys.group.shape)} must be [{batch}, up to {length}] on {key.device}, for {rows} rows"
            )
        if isinstance(score_from, Tensor) and score_from.shape != (batch,):
            raise ValueError(f"score_from {list(score_from.shape)} must be an integer or [{batch}]")
        if log_weight is not None and (
            log_weight.dim() != 2
            or log_weight.shape not in ((1, length), (batch, length))
            or not log_weight.is_floating_point()
        ):
            raise ValueError(
                f"log_weight {list(log_weight.shape)} {log_weight.dtype} must be [{batch} or 1, {length}] of floating point"
            )
        if segments is not None:
            check_segments(segments, key)
            if segments.shape[2] > MOST_SEGMENTS:
                raise ValueError(f"segments has {segments.shape[2]} columns: allowed are {MOST_SEGMENTS}")
        if summed is not None and (summed.shape not in ((1, rows), (batch, rows)) or summed.dtype != torch.bool):
            raise ValueError(f"summed {list(summed.shape)} {summed.dtype} must be [{batch} or 1, {rows}] of bool")
        start = None
        if score is not None:
            start = torch.as_tensor(score_from, device=key.device).to(torch.int64).expand(batch).contiguous()
        wanted = {"lse": lse, "segments": segments is not None, "summed": summed is not None}
        extras = ", ".join(name for name, asked in wanted.items() if asked)
        run = self.backend(query, key, value, softcap=softcap, score=score is not None, extras=extras, name=backend).run
        return run(Problem(query, key, value, self, scale, softcap, score, start, log_weight, segments, summed))


class Problem(NamedTuple):
    """A checked call, as every backend takes it."""

    query: Tensor
    key: Tensor
    value: Tensor
    pattern: Pattern
    scale: float
    softcap: float | None
    score: Score | None
    score_from: Tensor | None
    log_weight: Tensor | None
    segments: Tensor | None
    summed: Tensor | None


def masked_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Mask,
    group: Tensor,
    *,
    image: Tensor | None = None,
    document: Tensor | None = None,
    first: int | None = None,
    row_group: Tensor | None = None,
    row_document: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    score: Score | None = None,
    score_from: Tensor | int = 0,
    log_weight: Tensor | None = None,
    segments: Tensor | None = None,
    summed: Tensor | None = None,
    lse: bool = False,
    backend: str | None = None,
) -> Tensor | Attended:
    """Attention under a mask, on the backend that fits.

    Args:
        query: ``[B, H, Q, D]``, rows of consecutive columns.
        key: ``[B, G, S, D]``, H a multiple of G; key j stands at column j.
        value: ``[B, G, S, D]``.
        mask: a mask of ``masks``, of at most four clauses in the Triton backend.
        group: ``[B, P]`` integers of :class:`Group`, the groups of the keys; those past P are GENERATED, PAD is never seen.
        image: ``[B, P]`` integers, the image of every key, -1 for text; default: every run of VISUAL keys is one.
        document: ``[B, P]`` integers, the prompt of every key where several are packed into a row (``masks.documents`` makes
            them of ``cu_seqlens``): rows see keys of their own prompt only. Keys past P belong to the last one.
        first: column of the first row; default: the rows are the last of the keys.
        row_group: ``[B, Q]``, the groups of the rows where they are not keys (cross attention). Row i then stands at column
            ``first + i``, default ``i``, beside the keys: with a causal mask it sees the keys up to that column.
        row_document: ``[B, Q]``, the documents of such rows.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        score: see :class:`Score`.
        score_from: column, or one per sample ``[B]``, of the first row that score changes.
        log_weight: ``[B or 1, S]``, added to the logits of every key: one of ``log n`` counts as n keys, ``-inf`` hides it.
        segments: ``[B or 1, S, N]`` membership of the keys, at most eight: their masses are returned.
        summed: ``[B or 1, Q]`` bool, the rows whose attention is added up per key.
        lse: also return the log-sum-exp of every row.
        backend: ``triton``, ``sdpa`` or ``reference``; None = the first that fits.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``value``, zeros in rows that see nothing; with ``segments``, ``summed`` or ``lse`` an
        :class:`Attended` that holds it with what else was asked for.

    Raises:
        ValueError: tensors that do not fit each other, or no backend of that name.
        RuntimeError: the backend asked for cannot run this call.
    """
    check_qkv(query, key, value)
    if len(group) != len(query) or group.device != key.device:
        raise ValueError(f"group {list(group.shape)} must be [{len(query)}, up to {key.shape[2]}] on {key.device}")
    pattern = Pattern.of(
        mask,
        group,
        query.shape[2],
        key.shape[2],
        image=image,
        document=document,
        first=first,
        row_group=row_group,
        row_document=row_document,
    )
    found = pattern.attend(
        query,
        key,
        value,
        scale=scale,
        softcap=softcap,
        score=score,
        score_from=score_from,
        log_weight=log_weight,
        segments=segments,
        summed=summed,
        lse=lse,
        backend=backend,
    )
    if not lse and segments is None and summed is None:
        return found.out
    return Attended(
        found.out,
        found.lse if lse else None,
        None if segments is None else found.mass,
        None if summed is None else found.column_sum,
    )


def _prefill_refuses(facts: Facts) -> str | None:
    if facts.segments > MOST_CLAUSES:
        return f"the mask has {facts.segments} clauses, allowed are {MOST_CLAUSES}"
    return triton_refuses(facts)


@register("masked_attention", "triton", _prefill_refuses)
def _masked_triton(problem: Problem) -> Attended:
    pattern = problem.pattern
    clauses = [int(number) for clause in pattern.mask.clauses for number in clause]
    tokens = [t for side in zip(pattern.rows[1:], pattern.keys[1:], strict=True) for t in side if t is not None]
    score = None if problem.score is None else list(problem.score)
    arguments = (
        *problem[:3],
        clauses,
        tokens,
        pattern.first,
        problem.scale,
        problem.softcap,
        score,
        problem.score_from,
        problem.log_weight,
        problem.segments,
        problem.summed,
    )
    if torch.compiler.is_compiling():
        from vlm_attn.kernels import ops

        return Attended(*ops.masked_attention(*arguments))
    from vlm_attn.kernels import triton_prefill

    return Attended(*triton_prefill.masked_attention(*arguments, known=pattern.tiles))


@register("masked_attention", "sdpa", sdpa_refuses)
def _masked_sdpa(problem: Problem) -> Attended:
    query, key, value = problem[:3]
    seen = mask = problem.pattern.matrix()
    if problem.log_weight is not None:
        weight = problem.log_weight.to(query.dtype)[:, None, None]
        mask = torch.where(seen, weight, float("-inf"))
        seen = seen & (weight > float("-inf"))
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=problem.scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    return Attended(out.masked_fill(~seen.any(-1, keepdim=True), 0.0), None, None, None)


@register("masked_attention", "reference", takes_all)
def _masked_reference(problem: Problem) -> Attended:
    """The twin. Holds ``[B, H, Q, S]``."""
    pattern = problem.pattern
    logits = masked_logits(problem.query, problem.key, scale=problem.scale, softcap=problem.softcap)
    if problem.score is not None:
        assert problem.score_from is not None
        scored = pattern.rows.column >= problem.score_from[:, None]
        logits = torch.where(scored[:, None, :, None], problem.score(logits, pattern.keys.group), logits)
    if problem.log_weight is not None:
        logits = logits + problem.log_weight.to(logits)[:, None, None]
    logits = logits.masked_fill(~pattern.matrix(), float("-inf"))
    value = problem.value.repeat_interleave(problem.query.shape[1] // problem.value.shape[1], 1)
    attention = torch.softmax(logits, -1).nan_to_num(0.0)
    mass = None if problem.segments is None else attention @ problem.segments.to(attention)[:, None]
    columns = None
    if problem.summed is not None:
        columns = attention.masked_fill(~problem.summed[:, None, :, None], 0.0).sum(2)
    return Attended(attention @ value, torch.logsumexp(logits, -1), mass, columns)
