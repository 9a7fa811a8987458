# SPDX-License-Identifier: Apache-2.0
"""Attention whose logits get a bias per group of keys, decided from the mass each group holds.

With ``M[b, s, n]`` the membership of key ``s`` in segment ``n`` and ``p`` the plain attention of a row, an edit is

    mass_n  = sum_s p_s M_sn                      (what the policy sees)
    w       = policy(mass)                        (one factor per head, row and segment)
    p'_s    = p_s (M w)_s / sum_s p_s (M w)_s

which is ``softmax(logits + bias)`` with a bias, ``log w``, that is constant on every segment. A column of M may hold
``exp(weight)`` instead of 1 on the keys of a segment: the weighted twin, through which a saliency map enters.

A :class:`ScoreEdit` comes before all of that: it changes the raw logits, by their own size, before the mask and the bias.

This is the PyTorch path, the one a CPU uses; ``reference.py`` states the same through log-sum-exps, ``dispatch.py``
chooses between this and the others.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import reduce
from typing import ClassVar, Literal, Self

import torch
from torch import Tensor

Policy = Callable[[Tensor], Tensor]
MOST_SEGMENTS = 8  # that a pass over K and V keeps apart: four groups and a weighted twin, or two edits at once
NEVER = -60000.0  # log membership, in base 2, of a key that is no member; float16 holds it
SMALLEST_TOTAL = 1e-25  # keeps a row without any visible key at zero


class Columns:
    """Numbers ``[B, P, N]`` per column of the prompt; columns beyond it hold ``rest`` in place 0 and zeros elsewhere."""

    rest: ClassVar[float] = 1.0

    def __init__(self, segments: Tensor) -> None:
        self.segments = segments

    def over(self, length: int, offset: int | Tensor = 0) -> Tensor:
        """The numbers ``[B, length, N]`` of the keys at columns ``offset .. offset + length - 1``.

        The buffer grows in steps, so that a decode loop seldom pays for it.
        """
        if isinstance(offset, Tensor):
            columns = torch.arange(length, device=self.segments.device) + offset
            last = self.segments.shape[1] - 1
            inside = (columns <= last)[None, :, None]
            rest = torch.zeros_like(self.segments[:, :1])
            rest[..., 0] = self.rest
            return torch.where(inside, self.segments[:, columns.clamp(max=last)], rest)
        missing = offset + length - self.segments.shape[1]
        if missing > 0:
            size = self.segments.shape
            more = self.segments.new_zeros(size[0], max(missing, 64), size[2])
            more[..., 0] = self.rest
            self.segments = torch.cat([self.segments, more], dim=1)
        return self.segments.narrow(1, offset, length)

    def picked(self, columns: Tensor) -> Self:
        """The same for the columns ``[B, n]`` that are there, generated ones among them."""
        new = copy.copy(self)
        last = self.segments.shape[1] - 1
        index = columns.clamp(max=last)[..., None].expand(-1, -1, self.segments.shape[2])
        rest = torch.zeros_like(self.segments[:, :1])
        rest[..., 0] = self.rest
        new.segments = torch.where((columns <= last)[..., None], self.segments.gather(1, index), rest)
        return new

    def to(self, device: torch.device) -> Self:
        """The same on another device."""
        if self.segments.device == device:
            return self
        new = copy.copy(self)
        new.segments = self.segments.to(device)
        return new


class Edit(Columns):
    """One method's edit of one layer: a partition of the keys and the policy that weighs its segments.

    Args:
        segments: ``[B, P, N]`` float32, membership of the prompt's columns. Column 0 is "everything else", to which all
            columns beyond the prompt belong.
        policy: maps masses ``[B, H, Q, N]`` (float32) to weights >= 0 of that shape; 1 changes nothing, 0 removes a segment.
        conserves: the policy keeps every row's total, so that nothing is left to renormalise.
        partition: how many of the segments, the first, hold every key once (the others are twins); 0 = not known. The Triton
            kernel then adds up their masses instead of keeping one more segment of all keys.

    Raises:
        ValueError: ``partition`` names more segments than there are.
    """

    def __init__(self, segments: Tensor, policy: Policy, *, conserves: bool = False, partition: int = 0) -> None:
        if not 0 <= partition <= segments.shape[-1]:
            raise ValueError(
                f"partition={partition}: allowed are 0 (not known) to {segments.shape[-1]}, the segments there are"
            )
        super().__init__(segments)
        self.policy = policy
        self.conserves = conserves
        self.partition = partition
        self._prepared: tuple[Tensor, torch.dtype, Tensor] | None = None

    def prepared(
        self,
        how: Callable[[Tensor, torch.dtype], Tensor],
        dtype: torch.dtype,
        segments: Tensor,
        offset: int | Tensor = 0,
    ) -> Tensor:
        """``how(segments, dtype)`` of what :meth:`over` gave from ``offset`` on, kept until the buffer grows."""
        if isinstance(offset, Tensor) or torch.compiler.is_compiling():
            return how(segments, dtype)
        if self._prepared is None or self._prepared[0] is not self.segments or self._prepared[1] != dtype:
            self._prepared = self.segments, dtype, how(self.segments, dtype)
        return self._prepared[2].narrow(1, offset, segments.shape[1])


class ScoreEdit(Columns):
    """One method's change of the raw logits of one layer: ``s + w |s|``, ``s + w mean_h |s|`` or ``s + w s``.

    It comes after the softcap and before the mask and every bias, so the masses an :class:`Edit` sees are those after it.

    Args:
        weight: ``[B, P]`` float32, w of the prompt's columns; 0 changes nothing and holds beyond the prompt.
        of: ``"magnitude"`` (PAI, PAINT), ``"head_mean"``, the magnitude's mean over the heads (head-guided), or ``"logit"``
            (VAF).
        from_row: column of the first row that is changed; None = every row.
    """

    rest = 0.0

    def __init__(
        self,
        weight: Tensor,
        of: Literal["magnitude", "head_mean", "logit"] = "magnitude",
        *,
        from_row: int | None = None,
    ) -> None:
        super().__init__(weight[..., None])
        self.of = of
        self.from_row = from_row
        self.head_mean: Policy = _head_mean

    @property
    def kind(self) -> str:
        """What of the logits is added, as the dispatch asks a backend for it."""
        return self.of if self.head_mean is _head_mean else f"{self.of} over processes"

    def weights(self, length: int, rows: int, offset: int | Tensor = 0, row: int | Tensor = 0) -> Tensor:
        """w of every row and key, ``[B, rows or 1, length]``."""
        weight = self.over(length, offset)[:, None, :, 0]
        if self.from_row is None or (isinstance(row, int) and row >= self.from_row):
            return weight
        columns = torch.arange(rows, device=weight.device) + row
        return weight * (columns >= self.from_row)[:, None]

    def __call__(self, logits: Tensor, offset: int | Tensor = 0, row: int | Tensor = 0) -> Tensor:
        """Changed logits ``[B, H, Q, S]``; key 0 stands at column ``offset``, row 0 at column ``row``."""
        weight = self.weights(logits.shape[3], logits.shape[2], offset, row)[:, None].to(logits.dtype)
        size = logits if self.of == "logit" else logits.abs()
        if self.of == "head_mean":
            size = self.head_mean(size)
        return torch.addcmul(logits, weight, size)


def _head_mean(size: Tensor) -> Tensor:
    """``[B, H, Q, S]`` to ``[B, 1, Q, S]``."""
    return size.mean(1, keepdim=True)


def one_hot_segments(ids: Tensor, count: int, twin_of: int | None = None, log_weight: Tensor | None = None) -> Tensor:
    """Membership matrix of a partition.

    Args:
        ids: ``[B, S]`` integer segment of every key, in ``0 .. count - 1``.
        count: number of segments.
        twin_of: the segment that gets a weighted twin as an extra last column.
        log_weight: ``[B, S]`` log weight of every key, read on the keys of ``twin_of``.

    Returns:
        ``[B, S, count]`` float32, or ``[B, S, count + 1]`` with a twin.
    """
    segments = torch.nn.functional.one_hot(ids.long(), count).float()
    if twin_of is None:
        return segments
    assert log_weight is not None
    twin = segments[..., twin_of] * log_weight.float().exp()
    return torch.cat([segments, twin[..., None]], dim=-1)


def split(numbers: Tensor, dtype: torch.dtype, places: int = MOST_SEGMENTS) -> Tensor:
    """Numbers as a matrix product takes them: ``[..., N]`` float32 to ``[..., 2 * places]``, in half precision as a sum of two.

    Place n holds number n and place ``places + n`` the rest of it, so that 22 bits are left of its 24 (of products in float32,
    all of them).
    """
    numbers = torch.nn.functional.pad(numbers, (0, places - numbers.shape[-1]))
    if dtype == torch.float32:
        return torch.cat([numbers, torch.zeros_like(numbers)], -1)
    first = numbers.half()
    return torch.cat([first, (numbers - first).half()], -1)


def log_members(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """What the Triton kernel takes of memberships ``[B, S, N]``, N <= 8, beside queries of a dtype: ``[B, S, 16]``."""
    return split(segments.float().log2().clamp_min(NEVER), dtype)


class Product:
    """The policy of several edits at once: every one sees its own masses, and the weights multiply.

    Args:
        parts: of every edit its policy, ``[C, N]`` which of the C products add up to each of its N masses, and ``[C]`` the
            segment of it that every product lies in.
    """

    def __init__(self, parts: Sequence[tuple[Policy, Tensor, Tensor]]) -> None:
        self.parts = tuple(parts)

    def __call__(self, mass: Tensor) -> Tensor:
        """Weights of masses ``[B, H, Q, C]``, of that shape."""
        weights = [policy(mass @ sums.to(mass))[..., index.to(mass.device)] for policy, sums, index in self.parts]
        return torch.stack(weights).prod(0)


def merged(edits: Sequence[Edit], most: int = MOST_SEGMENTS) -> Edit | None:
    """Several edits of a layer as one, whose segments are the products of theirs: one pass over the keys instead of several.

    ``prod_e (M_e w_e)_s = sum_c prod_e w_(e, c_e) prod_e M_(e, s, c_e)`` with ``c`` running over tuples of segments, of which
    few hold any key. An edit's masses are sums over the tuples in which the others' segments are no twin.

    Args:
        edits: two or more, of partitions (every key in one segment), each perhaps with a twin as its last column.
        most: number of products allowed.

    Returns:
        The edit; None where there are more products, or where the segments of an edit do not add up to one.
    """
    length = max(edit.segments.shape[1] for edit in edits)
    members = [edit.over(length) for edit in edits]
    plain = []  # number of columns that form the partition
    for part in members:
        count = part.shape[2]
        fits = [n for n in (count, count - 1) if n and bool((part[..., :n].sum(-1) == 1).all())]
        if not fits:
            return None
        plain.append(fits[0])
    index = torch.cartesian_prod(*(torch.arange(part.shape[2], device=part.device) for part in members))  # [C, edits]
    segments = reduce(torch.mul, [part[..., i] for part, i in zip(members, index.unbind(1), strict=True)])
    used = segments.amax((0, 1)) > 0
    used[0] = True  # "everything else" of all of them, where the columns beyond the prompt belong
    index, segments = index[used], segments[..., used]
    if len(index) > most:
        return None
    no_twin = index < torch.tensor(plain, device=index.device)
    first = torch.argsort((~no_twin).any(1).int(), stable=True)  # products without a twin: they hold every key once
    index, segments, no_twin = index[first], segments[..., first], no_twin[first]
    parts = []
    for e, (edit, part) in enumerate(zip(edits, members, strict=True)):
        others = torch.cat([no_twin[:, :e], no_twin[:, e + 1 :]], 1).all(1)
        sums = torch.nn.functional.one_hot(index[:, e], part.shape[2]) * others[:, None]
        parts.append((edit.policy, sums.float(), index[:, e]))
    return Edit(segments.contiguous(), Product(parts), partition=int(no_twin.all(1).sum()))


def attention_rows(
    query: Tensor, key: Tensor, *, mask: Tensor | None = None, scale: float, softcap: float | None = None
) -> Tensor:
    """Attention probabilities of a few rows.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, G, S, D]``; H must be a multiple of G (grouped query heads).
        mask: ``[B or 1, H or 1, Q, S]``, boolean (True = visible) or additive; None = every key is visible.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.

    Returns:
        ``[B, H, Q, S]`` float32. A row without any visible key is all zeros.
    """
    return _softmax(_logits(query, key, scale=scale, softcap=softcap), mask)


def _logits(query: Tensor, key: Tensor, *, scale: float, softcap: float | None) -> Tensor:
    """Raw logits ``[B, H, Q, S]`` float32."""
    batch, heads, rows, dim = query.shape
    kv_heads, length = key.shape[1], key.shape[2]
    grouped = query.reshape(batch * kv_heads, (heads // kv_heads) * rows, dim)
    transposed = key.flatten(0, 1).transpose(1, 2)
    logits = torch.baddbmm(query.new_empty(()), grouped, transposed, beta=0, alpha=scale)  # beta 0: input is not read
    logits = logits.float().view(batch, heads, rows, length)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _softmax(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return torch.softmax(logits, dim=-1)
    mask = mask[..., : logits.shape[3]]
    if mask.dtype == torch.bool:
        logits = logits.masked_fill(~mask, float("-inf"))
    else:
        # A host's additive mask holds the dtype's minimum for "hidden": make that an exact zero.
        logits = (logits + mask).masked_fill(mask <= torch.finfo(mask.dtype).min / 2, float("-inf"))
    return torch.softmax(logits, dim=-1).nan_to_num(0.0)


def edited_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    scores: Sequence[ScoreEdit] = (),
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    row: int | Tensor = 0,
    head_scale: Tensor | None = None,
) -> Tensor:
    """Attention of a few rows under a list of edits. Every policy sees the masses before any edit; weights multiply.

    Args:
        query: ``[B, H, Q, D]``; meant for Q up to about 64.
        key: ``[B, G, S, D]``, H a multiple of G.
        value: ``[B, G, S, D]``.
        edits: the edits of this layer.
        scores: its changes of the raw logits, one after the other, before the mask.
        mask: see :func:`attention_rows`.
        scale: factor on the dot products.
        softcap: see :func:`attention_rows`.
        offset: column of the first key (sliding-window caches drop the oldest keys).
        row: column of the first row, where a score edit asks for it.
        head_scale: ``[H]``, a factor on the output of every head.

    Returns:
        ``[B, H, Q, D]`` in the dtype of ``value``.
    """
    batch, heads, rows, _ = query.shape
    kv_heads, length, dim = value.shape[1:]
    if heads % kv_heads:
        raise ValueError(f"query has {heads} heads, which is no multiple of the {kv_heads} heads of key and value")
    logits = _logits(query, key, scale=scale, softcap=softcap)
    for score in scores:
        logits = score(logits, offset, row)
    plain = _softmax(logits, mask)
    flat = plain.view(batch, heads * rows, length)
    probability = flat
    for edit in edits:
        segments = edit.over(length, offset)
        mass = torch.matmul(flat, segments)
        weight = edit.policy(mass.view(batch, heads, rows, -1)).view(batch, heads * rows, -1)
        if len(edits) == 1 and not edit.conserves:  # the row's new total, without another pass over the keys
            weight = weight / (weight * mass).sum(dim=-1, keepdim=True).clamp_min(SMALLEST_TOTAL)
        probability = probability * torch.matmul(weight, segments.transpose(1, 2))
    if len(edits) > 1:
        probability = probability / probability.sum(dim=-1, keepdim=True).clamp_min(SMALLEST_TOTAL)
    grouped = probability.to(value.dtype).view(batch * kv_heads, (heads // kv_heads) * rows, length)
    out = torch.bmm(grouped, value.flatten(0, 1)).view(batch, heads, rows, dim)
    return out if head_scale is None else (out * head_scale[:, None, None]).to(out.dtype)


def edited_sdpa(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    edits: Sequence[Edit],
    *,
    scores: Sequence[ScoreEdit] = (),
    mask: Tensor | None = None,
    scale: float,
    softcap: float | None = None,
    offset: int | Tensor = 0,
    row: int | Tensor = 0,
    head_scale: Tensor | None = None,
) -> Tensor:
    """The same through the host's fused attention: masses first, then one call with their bias. No softcap."""
    assert softcap is None
    raw = logits = _logits(query, key, scale=scale, softcap=None)
    for score in scores:
        logits = score(logits, offset, row)
    plain = _softmax(logits, mask)
    length = key.shape[2]
    bias = logits - raw
    for edit in edits:
        segments = edit.over(length, offset)[:, None]
        bias = bias + torch.log(edit.policy(plain @ segments) @ segments.transpose(2, 3))
    if mask is not None:
        mask = mask[..., :length]
        least = None if mask.dtype == torch.bool else torch.finfo(mask.dtype).min / 2
        bias = bias.masked_fill(~mask if least is None else mask <= least, float("-inf"))
        if least is not None:
            bias = bias + mask.clamp_min(least)
    out = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, attn_mask=bias.to(query.dtype), scale=scale, enable_gqa=query.shape[1] != key.shape[1]
    )
    out = out.masked_fill((bias == float("-inf")).all(-1, keepdim=True), 0.0)  # a row without any visible key
    return out if head_scale is None else (out * head_scale[:, None, None]).to(out.dtype)
