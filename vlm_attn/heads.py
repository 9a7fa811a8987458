# SPDX-License-Identifier: Apache-2.0
"""Which keys every head sees: what a method that chooses them is, and how its choice is carried out.

A method is shown a layer's queries and keys and says, per head and row, which keys are seen; it may add keys that stand for
others. The choice becomes part of the mask, so edits, readers and every backend work on what is left. Where no head of a
layer will ever see a column again, it is let go: the cache then holds fewer columns than it counts, as for the reducers.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Self

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.dropping import Kept, Reduction, places
from vlm_attn.method import Method, ModelFacts, unknown_turn
from vlm_attn.sharding import Heads

if TYPE_CHECKING:
    from vlm_attn.call import Call
    from vlm_attn.engine import Engine

Scores = tuple[tuple[float, ...], ...]  # [layers][heads]
SLACK = 32  # columns that wait to be let go: taking them one by one would copy the cache at every step


@dataclass
class View:
    """What a method sees of a layer. Columns are those of the sequence, counted whether they are still there or not.

    Attributes:
        layer: the layer.
        query: ``[B, H, Q, D]``, rotated.
        key: ``[B, G, S, D]``, rotated.
        value: ``[B, G, S, D]``.
        rows: ``[B or 1, Q]`` column of every row.
        columns: ``[B or 1, S]`` column of every key, ascending.
        allowed: ``[B or 1, H or 1, Q, S]`` bool, what the mask lets through.
        scale: factor on the dot products.
        softcap: ``cap * tanh(logits / cap)`` before the mask, if given.
        counts: ``[B, S]`` how many columns a key stands for, None = every key for its own.
        heads: which heads of the layer run in this process.
    """

    layer: int
    query: Tensor
    key: Tensor
    value: Tensor
    rows: Tensor
    columns: Tensor
    allowed: Tensor
    scale: float
    softcap: float | None = None
    counts: Tensor | None = None
    heads: Heads = field(default_factory=Heads)

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.query.shape[1] // self.key.shape[1]


@dataclass
class Seen:
    """A method's choice in one layer.

    Attributes:
        visible: ``[B or 1, H or 1, Q, S]`` bool, True = seen (if the mask lets it through); None = all.
        key: ``[B, G, E, D]`` keys to add, rotated.
        value: ``[B, G, E, D]``.
        bias: ``[B or 1, H or 1, Q, E]`` float32, what the logits of added keys are raised by; ``-inf`` hides one.
        plain: ``[H]`` share of the plain attention in every head's output; None = 0.
    """

    visible: Tensor | None = None
    key: Tensor | None = None
    value: Tensor | None = None
    bias: Tensor | None = None
    plain: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class HeadMethod(Method):
    """Base of the methods that choose which keys a head sees. A subclass fills in :meth:`sees`.

    Layers with a sliding window are left alone: their heads see what is recent only, as it is.

    Class attributes:
        edited_rows: ``"last"``: rows from the last prompt token on choose; ``"text"``: every row does.
        whole_prompt: the choice needs the whole prompt at once.
        adds_keys: the choice may add keys.
    """

    edited_rows: ClassVar[Literal["last", "text"]] = "last"
    needs_image: ClassVar[bool] = False
    token_by_token: ClassVar[bool] = True  # it chooses among earlier columns, and a canvas sees later ones too
    whole_prompt: ClassVar[bool] = False
    adds_keys: ClassVar[bool] = False

    def bind(self, facts: ModelFacts) -> Self:
        """Refuse a model that has sliding windows only.

        Raises:
            NotImplementedError: every layer has one.
        """
        if facts.sliding and set(facts.sliding) | set(facts.uncovered) >= set(range(facts.layers)):
            raise NotImplementedError(
                f"{self.name}: every attention layer of {facts.model_type} has a sliding window, so there is no head left to "
                "choose keys for"
            )
        return self

    def start(self, call: Call, processor: Any) -> None:
        """Where every row chooses, those of a cache must have chosen.

        Raises:
            ValueError: the cache was filled without the method.
        """
        if self.edited_rows == "text" and call.first and (call.earlier is None or self not in call.earlier.patched):
            raise unknown_turn(self, "what its rows would hold is")

    def edit(self, call: Call, layer: int) -> None:
        """No attention weight is edited."""

    def read(self, call: Call, view: View) -> None:
        """What the method wants to know of a layer while the prompt runs, where only its last row is edited."""

    def sees(self, call: Call, view: View) -> Seen | None:
        """The choice for the rows that run now, None = the layer is left alone."""
        raise NotImplementedError

    def held(self, call: Call, layer: int) -> Held | None:
        """What the heads of a layer go on seeing once the prompt has run; None = every column."""
        return None


@dataclass(frozen=True)
class Held:
    """The columns that rows to come still see: a row's first ones and its latest.

    Attributes:
        sink: number of first columns, padding not counted.
        recent: number of latest columns, the row's own counted; the most that any row of the batch has.
        rows: the same per row of the batch, where rows differ.
        summed: whether those between are kept as one key, their mean.
    """

    sink: int
    recent: int
    rows: tuple[int, ...] = ()
    summed: bool = False


def first_columns(call: Call, method: Method, device: torch.device | None = None) -> Tensor:
    """``[B, 1]`` first column of every row that is no padding, on the device it is wanted on (the prompt's)."""
    memory, key = call.memory(method), ("first", call.batch)
    if key not in memory:
        memory[key] = call.layout.first[:, None]
    return memory[key] if device is None else memory[key].to(device)


def streams(view: View, first: Tensor, sink: int, recent: int | Tensor) -> Tensor:
    """``[B, 1, Q, S]`` bool: the first ``sink`` columns from ``first`` ``[B, 1]`` on, and every row's latest ``recent``."""
    if isinstance(recent, Tensor):
        recent = recent[..., None]
    near = view.rows[..., None] - view.columns[:, None] < recent
    return (near | (view.columns < first + sink)[:, None])[:, None]


def choose_keys(
    method: HeadMethod,
    call: Call,
    view: View,
    mask: Tensor | None,
    base: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None] | None:
    """A method's choice as a mask over keys.

    Args:
        method: the method.
        call: the running call.
        view: the layer.
        mask: the host's, in the format of ``base``; None = causal.
        base: the implementation whose format the mask has.

    Returns:
        The mask, ``key`` and ``value`` (with those that are added) and the share of plain attention; None = nothing changes.
    """
    seen = method.sees(call, view)
    if seen is None:
        return None
    if mask is None:
        mask = host.mask_like(view.allowed, base, view.query)
    mask = mask[..., : view.key.shape[2]]
    if seen.visible is not None:
        mask = host.hide(mask, seen.visible)
    if seen.key is None or seen.value is None or seen.bias is None:
        return mask, view.key, view.value, seen.plain
    if mask.dtype == torch.bool:
        mask = host.mask_like(mask, "eager", view.query)
    batch, heads, rows, _ = view.query.shape
    bias = seen.bias.clamp_min(torch.finfo(mask.dtype).min).to(mask.dtype)
    mask = torch.cat([mask.expand(batch, heads, -1, -1), bias.expand(batch, heads, rows, -1)], 3)
    return (
        mask,
        torch.cat([view.key, seen.key.to(view.key.dtype)], 2),
        torch.cat([view.value, seen.value.to(view.value.dtype)], 2),
        seen.plain,
    )


def view_of(
    call: Call,
    layer: int,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
    heads: Heads,
) -> View:
    """What a method is shown of a layer."""
    state, device = call.reduction, query.device
    rows = (torch.arange(query.shape[2], device=query.device) + call.past)[None]
    if state is not None and state.rows is not None and call.mode == "prompt":
        rows = state.rows.to(device) + call.past
    kept = state.layers.get(layer) if state is not None else None
    counts = None
    if kept is None or kept.columns is None:
        columns = torch.arange(key.shape[2], device=key.device)[None]
    else:
        columns = kept.keys(kept.dropped + key.shape[2]).to(device)
        if kept.counts is not None:
            tail = columns.shape[1] - kept.counts.shape[1]
            counts = nn.functional.pad(kept.counts, (0, tail), value=1).to(device)
    if mask is None:
        allowed = (columns[:, None] <= rows[..., None])[:, None]
    else:
        mask = mask[..., : key.shape[2]]
        allowed = mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2
    return View(layer, query, key, value, rows, columns, allowed, scale, softcap, counts, heads)


def let_go(engine: Engine, method: HeadMethod, call: Call, cache: Any) -> None:
    """Take out of a cache what no head of a layer will see again, before rows behind the prompt run.

    A column goes when no row from the next one on sees it, so that rows which are taken back (speculation) find what they need.
    """
    if cache is None or isinstance(call.past, Tensor) or engine.watch is not None:
        return
    state, made = call.reduction, {}
    for layer in range(len(engine.text_model.layers)):  # type: ignore[arg-type]
        held = method.held(call, layer)
        if held is None:
            continue
        kept = state.layers.get(layer) if state is not None else None
        there = call.past - (kept.dropped if kept is not None else 0)
        if there - held.sink - held.recent - held.summed < SLACK:
            continue
        if state is None:
            if not host.shorten(cache, len(engine.text_model.layers)):  # type: ignore[arg-type]
                return
            state = call.reduction = taken_over(engine, call, None)
        key = (id(state.layers[layer]), held)
        before = state.layers[layer]
        if key not in made:
            made[key] = (_left(call, method, before, held), before)
        (left, index, slot, weight), _ = made[key]
        if slot is not None and weight is not None:
            host.put_mean(cache, layer, slot, weight)
        host.keep_columns(cache, layer, index, there)
        state.layers[layer] = left
    if made:
        call.edits.clear()  # they are over the keys that are there


def _left(call: Call, method: HeadMethod, kept: Kept, held: Held) -> tuple[Kept, Tensor, Tensor | None, Tensor | None]:
    """What is left of a layer's columns; where they stand, where the mean of the others is put, and what it is made of."""
    past = int(call.past)
    first = first_columns(call, method)
    device = first.device
    if kept.columns is None:
        columns = torch.arange(past, device=device).expand(call.batch, -1)
        counts = torch.ones_like(columns)
    else:
        columns = kept.keys(past)
        counts = torch.ones_like(columns)
        if kept.counts is not None:
            counts[:, : kept.counts.shape[1]] = kept.counts
    counts = counts * (columns >= first)  # padding stands for nothing
    recent = torch.tensor(held.rows or (held.recent,), device=device)[:, None]
    keep = ((columns >= first) & (columns < first + held.sink)) | (columns > past - recent)
    slot = weight = None
    if held.summed:
        weight = counts * ~keep
        slot = (weight > 0).int().argmax(1, keepdim=True)  # the first that goes makes room
        total = weight.sum(1, keepdim=True)
        counts = counts * keep
        counts = torch.where(total > 0, counts.scatter(1, slot, total), counts)
        keep = keep.scatter(1, slot, True)
    index = places(keep)
    columns = columns.gather(1, index)
    visible = nn.functional.pad(kept.visible, (0, past - kept.visible.shape[1]), value=True)
    size = None if kept.size is None else nn.functional.pad(kept.size, (0, past - kept.size.shape[1]), value=1)
    left = Kept(visible, columns, kept.full, size, counts.gather(1, index) if held.summed else None)
    return left, index, slot, weight


def taken_over(engine: Engine, call: Call, earlier: Reduction | None) -> Reduction:
    """The state of a call whose cache holds fewer columns: of none yet, or of those that an earlier turn left."""
    visible = torch.ones(call.batch, call.prompt.length, dtype=torch.bool, device=call.prompt.group.device)
    whole = Kept(visible, None, True)
    layers = range(len(engine.text_model.layers))  # type: ignore[arg-type]
    held = dict.fromkeys(layers, whole) if earlier is None else dict(earlier.layers)
    return Reduction(True, call.length, visible, layers=held)


def check_alone(methods: list[Method]) -> None:
    """Refuse methods that do not go together with one that chooses keys.

    Raises:
        ValueError: two that choose keys; one that adds keys, beside one that edits weights or takes columns away.
    """
    choosers = [m for m in methods if isinstance(m, HeadMethod)]
    if len(choosers) > 1:
        raise ValueError(f"{'+'.join(m.name for m in choosers)}: each of them says which keys a head sees; choose one")
    if not choosers or not choosers[0].adds_keys:
        return
    others = [m.name for m in methods if m is not choosers[0] and m.edited_rows != "none" and m.mask is None]
    if others:
        raise ValueError(
            f"{choosers[0].name} adds keys that belong to no column, so {'+'.join(others)} would not know them: "
            "choose one of them"
        )


def score_table(method: Method, name: str) -> None:
    """Turn a field given as nested sequences of numbers into tuples; None stays.

    Raises:
        TypeError: anything else.
    """
    value = getattr(method, name)
    if value is None:
        return
    try:
        table = tuple(tuple(float(number) for number in row) for row in value)
    except (TypeError, ValueError):
        table = ()
    if not table or not table[0] or len({len(row) for row in table}) != 1:
        raise TypeError(f"{method.name}: {name} must be a table [layers][heads] of numbers, got {value!r}")
    object.__setattr__(method, name, table)


def check_scores(method: Method, name: str, facts: ModelFacts, heads: int) -> None:
    """Refuse a table of another model.

    Raises:
        ValueError: its size is not that of the model.
    """
    table: Scores = getattr(method, name)
    if (len(table), len(table[0])) != (facts.layers, heads):
        raise ValueError(
            f"{method.name}: {name} is [{len(table)}][{len(table[0])}], but {facts.model_type} has {facts.layers} layers of "
            f"{heads} heads: measure it with `vlm-attn calibrate MODEL --method {method.name}`"
        )


def masked_where_needed(method: Any, facts: ModelFacts) -> Any:
    """A method with a ``mode``, masked where the model's cache cannot let columns go."""
    return method if facts.causal or method.mode == "mask" else replace(method, mode="mask")


__all__ = [
    "HeadMethod",
    "Held",
    "Scores",
    "Seen",
    "View",
    "check_scores",
    "first_columns",
    "masked_where_needed",
    "score_table",
    "streams",
]
