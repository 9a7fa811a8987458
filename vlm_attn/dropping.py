# SPDX-License-Identifier: Apache-2.0
"""Carrying out what a reducer chooses, before any decoder layer.

Columns stay what they are: the prompt's own. A reducer names the columns it keeps; from its layer on the others are

* **dropped**: hidden states, positions and mask are gathered, the cache holds fewer keys than it counts, or
* **masked**: every later row is kept from seeing them, in any cache.

Both give the same logits, so each is the other's oracle. Nothing is ever cut out of a decode step's mask by place: it
is rebuilt from the columns that are kept. Rows that keep fewer tokens than others are filled up with hidden ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.families import cells
from vlm_attn.kernels import Edit, ScoreEdit
from vlm_attn.layout import ImageSpan
from vlm_attn.reduction import FEATURES, MERGED, KeptImage, Picture, Reducer
from vlm_attn.tower import features_on_tokens, on_tokens

if TYPE_CHECKING:
    from vlm_attn.call import Call
    from vlm_attn.engine import Engine


@dataclass
class Kept:
    """What one layer's keys are, as far as the prompt goes. What follows the prompt follows here as well.

    Attributes:
        visible: ``[B, P]`` bool, the prompt's columns that later rows may see.
        columns: ``[B, n]`` the columns that are there at all, ascending; None = all of them (masked, not dropped).
        full: whether nothing that is there has to be hidden.
        size: ``[B, P]`` how many tokens each column counts for in attention; None = 1.
        counts: ``[B, n]`` how many columns each of these stands for; None = each for itself.
    """

    visible: Tensor
    columns: Tensor | None
    full: bool
    size: Tensor | None = None
    counts: Tensor | None = None

    @property
    def dropped(self) -> int:
        """How many columns are not there."""
        return 0 if self.columns is None else self.visible.shape[1] - self.columns.shape[1]

    def keys(self, total: int) -> Tensor:
        """``[B, n + ...]`` the column of every key, up to column ``total``."""
        assert self.columns is not None
        tail = torch.arange(self.visible.shape[1], total, device=self.columns.device)
        return torch.cat([self.columns, tail.expand(len(self.columns), -1)], 1)


@dataclass
class Reduction:
    """The state of a call that reduces. Plain data, copied with the call.

    Attributes:
        drop: whether tokens are dropped; else masked.
        rows: ``[B, q]`` which rows of the prompt's forward are still there at the layer that runs; None = all.
        length: rows of the prompt's forward.
        visible: ``[B, P]`` columns of the prompt that are kept so far.
        size: ``[B, P]`` how many tokens each of them counts for; None = 1.
        layers: per layer, what its keys are.
        stages: per image, what each stage left.
        owners: per image, what stands for each of its tokens; absent = they all stand for themselves.
        masks: per mask of the host, what was made of it for which keys; one for all layers that share both.
        gathered: per rows and arguments of a layer that hold one entry per row, what was gathered of them.
        turned: per keys and position embeddings of a layer, those of the new numbers (``positions="packed"``).
        rotations: per layer that a method wants them of, its position embeddings.
        moved: per image, which of its tokens sits in the place of each; absent = every one in its own.
        carried: hidden states, ``rows`` and ``visible`` of before the layers that visual tokens bypass; None outside these.
    """

    drop: bool
    length: int
    visible: Tensor
    size: Tensor | None = None
    rows: Tensor | None = None
    layers: dict[int, Kept] = field(default_factory=dict)
    stages: dict[int, list[tuple[int, Tensor]]] = field(default_factory=dict)
    owners: dict[int, Tensor] = field(default_factory=dict)
    masks: list[tuple[Any, Kept, Any]] = field(default_factory=list)
    gathered: list[tuple[Tensor, dict[str, Any], dict[str, Any]]] = field(default_factory=list)
    turned: list[tuple[Kept, Any, dict[str, Any]]] = field(default_factory=list)
    rotations: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    moved: dict[int, Tensor] = field(default_factory=dict)
    carried: tuple[Tensor, Tensor | None, Tensor] | None = None

    def report(self, config: Any, images: Sequence[ImageSpan]) -> tuple[KeptImage, ...]:
        """What is left of every image."""
        kept = []
        for n, image in enumerate(images):
            total = image.total
            owner = self.owners[n].cpu() if n in self.owners else torch.arange(total)
            stages = tuple(self.stages.get(n, ()))
            kept.append(KeptImage(n, image.row, image.grid, image.first, total, stages, owner, cells(config, image)))
        return tuple(kept)

    def hand_over(self, number: int, total: int, places: Tensor, owners: Tensor) -> None:
        """Note what stands for the tokens of an image: ``owners [n]`` of those at ``places [n]`` that were still there."""
        now = torch.arange(-1, total, device=places.device)  # place -1 is nobody's
        now[places + 1] = torch.where(owners < 0, -1, places[owners])
        self.owners[number] = now[self.owners.get(number, now.new_tensor(range(total))) + 1]

    def edits(self, layer: int, edits: list[Edit | ScoreEdit]) -> list[Edit | ScoreEdit]:
        """Edits of a layer over the keys that are there."""
        kept = self.layers.get(layer)
        if kept is None or kept.columns is None:
            return edits
        return [edit.picked(kept.columns) for edit in edits]

    def find_rows(self, columns: Tensor, first: int, length: int) -> tuple[Tensor, Tensor]:
        """Where prompt columns ``[B, R]`` stand among the rows that run now: ``(rows, valid)``."""
        place = columns - first
        valid = (place >= 0) & (place < length)
        valid &= self.visible.gather(1, columns.clamp(0, self.visible.shape[1] - 1)) | (
            columns >= self.visible.shape[1]
        )
        place = place.clamp(0, length - 1)
        if self.rows is not None:
            place = torch.searchsorted(self.rows, place).clamp_max(self.rows.shape[1] - 1)
        return place, valid

    def held(self, keys: int) -> int:
        """How many of a layer's keys come from earlier turns while the prompt runs."""
        return keys - (self.length if self.rows is None else self.rows.shape[1])

    def spread_keys(self, layer: int, attention: Tensor) -> Tensor:
        """``[B, H, R, n]`` over the keys that are there to ``[B, H, R, columns]``."""
        kept = self.layers.get(layer)
        if kept is None or kept.columns is None:
            return attention
        index = kept.keys(kept.dropped + attention.shape[3])[:, None, None].expand_as(attention)
        wide = attention.new_zeros(*attention.shape[:3], attention.shape[3] + kept.dropped)
        return wide.scatter(3, index, attention)

    def spread_rows(self, values: Tensor, length: int) -> Tensor:
        """``[B, q, ...]`` of the rows that are there to ``[B, length, ...]``; zeros for the others."""
        if self.rows is None or values.shape[1] == length:
            return values
        index = self.rows.reshape(*self.rows.shape, *[1] * (values.ndim - 2)).expand_as(values)
        return values.new_zeros(len(values), length, *values.shape[2:]).scatter(1, index, values)


def before_layer(
    engine: Engine, module: nn.Module, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Before a decoder layer runs: choose, gather, mask. Returns the layer's new arguments, None where they stay."""
    call = engine.call
    if call is None or call.mode == "other":
        return None
    hidden = args[0] if args else kwargs["hidden_states"]
    if layer == 0 and call.reduction is not None:  # what was made for the forward before
        call.reduction.masks.clear()
        call.reduction.gathered.clear()
        call.reduction.turned.clear()
    if call.mode == "prompt" and any(isinstance(m, Reducer) for m in call.methods):
        if layer == 0:
            call.reduction = _begin(engine, call, host.cache_of(kwargs), len(hidden))
        state = call.reduction
        assert state is not None
        hidden = _reduce(engine, call, state, module, layer, hidden, kwargs)
        state.layers[layer] = _layer_keys(call, state, layer)
        if state.drop and host.cache_of(kwargs) is not None:
            host.set_dropped(host.cache_of(kwargs), layer, state.layers[layer].dropped)
        kwargs = _renumbered(engine, call, state, layer, hidden, kwargs)
        if any(isinstance(m, Reducer) and layer in m.turn_layers for m in call.methods):
            state.rotations[layer] = kwargs["position_embeddings"]
        kwargs = _gathered(state, kwargs)
    state = call.reduction
    if state is None or layer not in state.layers:
        return None
    before = kwargs
    if call.mode != "prompt":
        kwargs = _renumbered(engine, call, state, layer, hidden, kwargs)
    mask = kwargs.get("attention_mask")
    new = _layer_mask(engine, call, state, module, layer, mask, hidden, host.cache_of(kwargs))
    if new is mask and call.mode != "prompt" and kwargs is before:
        return None
    kwargs = {**kwargs, "attention_mask": new}
    return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})


def _begin(engine: Engine, call: Call, cache: Any, batch: int) -> Reduction:
    """State of a prompt that begins to run."""
    drop = all(m.mode == "drop" for m in call.methods if isinstance(m, Reducer))
    drop &= engine.watch is None  # who watches the attention counts every column
    if drop and cache is not None and not host.shorten(cache, len(engine.text_model.layers)):  # type: ignore[arg-type]
        drop = False
        engine.warn_once(
            f"{type(cache).__name__} cannot hold fewer columns: visual tokens are masked, not dropped. "
            "The result is the same, the speed is that of the plain model"
        )
    visible = torch.ones(batch, call.prompt.length, dtype=torch.bool, device=call.prompt.group.device)
    return Reduction(drop, call.length, visible)


def _layer_keys(call: Call, state: Reduction, layer: int) -> Kept:
    """What the keys of a layer are once this forward's are added to those of earlier turns."""
    below = state.layers.get(layer - 1)
    earlier = call.earlier.reduction if call.first and call.earlier is not None else None
    held = earlier.layers.get(layer) if earlier is not None else None
    visible, size = state.visible, state.size
    if held is not None:
        seen = min(held.visible.shape[1], call.first)
        visible = visible.clone()
        visible[:, :seen] = held.visible[:, :seen]
        if held.size is not None:
            size = torch.ones_like(visible, dtype=held.size.dtype) if size is None else size.clone()
            size[:, :seen] = held.size[:, :seen]
    if below is not None and visible is below.visible and size is below.size:
        return below
    if not state.drop:
        return Kept(visible, None, bool(visible.all()), size)
    past = held.keys(call.first) if held is not None else torch.arange(call.first, device=visible.device)
    past = past.expand(len(visible), -1) if past.ndim == 1 else past
    length = call.prompt.length - call.first
    new = torch.arange(length, device=visible.device).expand(len(visible), -1) if state.rows is None else state.rows
    new = new[:, : (new[0] < length).sum()]  # guesses of assisted decoding stand behind the prompt, and stay
    columns = torch.cat([past, new + call.first], 1)
    return Kept(visible, columns, bool(visible.gather(1, columns).all()), size)


def _reduce(
    engine: Engine, call: Call, state: Reduction, module: nn.Module, layer: int, hidden: Tensor, kwargs: dict[str, Any]
) -> Tensor:
    """Let every reducer with a stage here choose; returns the hidden states that are left."""
    new = any(image.start >= call.first for image in call.prompt.images)  # those of earlier turns were reduced there
    for method in call.methods:
        for stage, at in enumerate(method.stages) if isinstance(method, Reducer) else ():
            if at != layer or not new:
                continue
            assert isinstance(method, Reducer)
            if method.reads_ahead:
                _look_ahead(engine, call, state, module, method, layer, hidden, kwargs)
            rows = call.rows(method).get(layer if method.reads_ahead else layer - 1)
            hidden = _choose(engine, call, state, method, stage, hidden, rows)
            if state.drop:
                hidden = _gather(call, state, hidden)
    return _bypass(call, state, layer, hidden)


def _bypass(call: Call, state: Reduction, layer: int, hidden: Tensor) -> Tensor:
    """Take visual tokens out before the first of some layers they bypass, put them back behind the last."""
    inside = any(layer in m.skipped for m in call.methods if isinstance(m, Reducer))
    if inside == (state.carried is not None):
        return hidden
    if inside:
        state.carried = (hidden, state.rows, state.visible)
        state.visible = state.visible & ~call.layout.visual
        return _gather(call, state, hidden) if state.drop else hidden
    assert state.carried is not None
    before, rows, visible = state.carried
    columns = torch.arange(call.length, device=hidden.device) if state.rows is None else state.rows
    columns = columns.expand(len(hidden), -1)
    # Rows that only fill up the batch are not visible: they must not come back changed.
    ran = nn.functional.pad(state.visible[:, call.first :], (0, call.length), value=True).gather(1, columns)[..., None]
    index = columns if rows is None else torch.searchsorted(rows, columns)
    index = index[..., None].expand_as(hidden)
    hidden = before.scatter(1, index, torch.where(ran, hidden, before.gather(1, index)))
    state.carried, state.rows, state.visible = None, rows, visible
    return hidden


def _choose(
    engine: Engine, call: Call, state: Reduction, method: Reducer, stage: int, hidden: Tensor, rows: Tensor | None
) -> Tensor:
    """One reducer, image by image. Marks what goes in ``state.visible``; returns the hidden states, merged ones in place."""
    times = len(hidden) // call.prompt.batch  # beams are alike while the prompt runs
    state.visible = state.visible.clone()  # layers below keep theirs
    for number, image in enumerate(call.prompt.images):
        if image.start < call.first:
            continue  # reduced in an earlier turn
        row = image.row * times
        columns = image.columns.to(state.visible.device)
        seats = state.visible[row, columns].nonzero().flatten()
        columns = columns[seats]
        index = _place(state, row, columns - call.first)
        places = state.moved[number][seats] if number in state.moved else seats  # which tokens sit there
        seen = [on_tokens(engine.model_config, image, *call.vision(number, layer)) for layer in method.cls_layers]
        patches = on_tokens(engine.model_config, image, *call.vision(number, MERGED)) if method.merges else None
        features, cls_feature, project = _features(engine, call, method, number, hidden[row, index], places)
        text = call.prompt.text_after_image[image.row].nonzero().flatten()
        picture = Picture(
            tokens=hidden[row, index],
            places=places,
            total=image.total,
            count=min(method.left_at(stage, image.total, call.progress), len(columns)),
            stage=stage,
            memory=call.memory(method).setdefault(number, {}),
            grid=image.grid,
            first=image.first,
            number=number,
            text=hidden[row, _place(state, row, text[text >= call.first] - call.first)],
            rows=None if rows is None else rows[row][:, :, columns],
            cls=seen[0][0][places] if seen else None,
            keys=seen[0][1][places] if seen else None,
            local=seen[1][0][places] if len(seen) > 1 else None,
            patch=None if patches is None else patches[0][places].long(),
            into=None if patches is None else patches[1][places, 0].long(),
            features=features,
            cls_feature=cls_feature,
            project=project,
            turns=_turns(call, state, method, method.stages[stage] - 1, row, columns),
        )
        if method.timed:
            call.pictures[number] = (method, picture)
            if picture.count == len(columns):
                continue
        chosen = _chosen(call, method, picture)
        if len(chosen) == len(columns) == picture.count:
            continue
        merged = method.merge(picture, chosen)
        owners = method.owners(picture, chosen)
        changed = chosen
        if method.compensate:
            changed, merged, owners = _summed_up(state, slice(row, row + times), columns, picture.tokens, owners)
            chosen = torch.cat([chosen, changed]).sort().values
        order = method.order(picture, chosen) if method.positions == "packed" and not method.compensate else None
        if order is not None:
            merged = (picture.tokens[chosen] if merged is None else merged)[order]
            moved = state.moved.get(number, torch.arange(picture.total, device=places.device)).clone()
            moved[seats[chosen]] = places[chosen[order]]
            state.moved[number] = moved
        if merged is not None:
            hidden = hidden.clone()
            hidden[row : row + times, index[changed]] = merged.to(hidden.dtype)
        gone = torch.ones_like(columns, dtype=torch.bool)
        gone[chosen] = False
        state.visible[row : row + times, columns[gone]] = False
        state.stages.setdefault(number, []).append((method.stages[stage], places[chosen].sort().values.cpu()))
        state.hand_over(number, picture.total, places, owners)
    return hidden


def _features(
    engine: Engine, call: Call, method: Reducer, number: int, tokens: Tensor, places: Tensor
) -> tuple[Tensor | None, Tensor | None, Callable[[Tensor], Tensor] | None]:
    """What the projector made an image's tokens of: their features, the CLS token's, and the projector.

    Raises:
        NotImplementedError: the tokens are not what the projector makes of these features.
    """
    if not method.reads_features or engine.projector is None:
        return None, None, None
    made_by: Any = engine.projector
    cls, given = call.vision(number, FEATURES)
    features = features_on_tokens(engine.model_config, call.prompt.images[number], given)[places]

    def project(x: Tensor) -> Tensor:
        return made_by.forward(x[None].to(given.dtype))[0]  # not through its hooks: the call did not ask for it

    first = int(features.any(1).int().argmax())  # a newline token has no feature
    one, made = tokens[first].float(), project(features[first][None])[0].float()
    if not torch.linalg.vector_norm(one - made) <= 0.05 * torch.linalg.vector_norm(made):
        raise NotImplementedError(
            f"{method.name} merges what goes into the projector, but the tokens are not what comes out of it: another "
            "reducer has merged them before, or the text model scales them. Use one of these reducers alone"
        )
    whole = cls[0, 0] if cls.shape[1] and cls.shape[2] == features.shape[1] else None
    return features, whole, project


def _turns(call: Call, state: Reduction, method: Reducer, layer: int, row: int, columns: Tensor) -> Tensor | None:
    """``[R, n]``: what the rotation alone makes of a logit, of the rows that a method reads and an image's columns."""
    if layer not in method.turn_layers:
        return None
    cos, sin = (x[row if len(x) > 1 else 0].float() for x in state.rotations[layer])
    half = torch.ones_like(cos).index_fill_(1, torch.arange(cos.shape[1] // 2, device=cos.device), -1.0)
    ones = cos + half * sin  # a vector of ones, turned: its halves turn against each other
    rows = method.read_rows(call)[row].clamp_min(call.first)
    return ones[rows - call.first] @ ones[columns - call.first].T / cos.shape[1] ** 0.5


def _summed_up(
    state: Reduction, rows: slice, columns: Tensor, tokens: Tensor, owners: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What goes of an image as one token that counts for all of it: ``[1]`` where it stands, ``[1, D]``, and the owners."""
    state.size = torch.ones(state.visible.shape, device=columns.device) if state.size is None else state.size.clone()
    gone = (owners < 0).nonzero().flatten()
    size = state.size[rows.start, columns[gone]]
    mean = (size[:, None] * tokens[gone].float()).sum(0) / size.sum()
    seat = gone[len(gone) // 2]
    state.size[rows, columns[seat]] = size.sum()
    return seat[None], mean[None], torch.where(owners < 0, seat, owners)


def _chosen(call: Call, method: Reducer, picture: Picture) -> Tensor:
    """What a method chooses. Before the language model it sees the same whenever the prompt runs again, and chooses once."""
    if not picture.count:
        return picture.places[:0]
    if method.stages[picture.stage]:
        return method.choose(picture)
    key = method.name, picture.number, picture.count, len(picture.places)
    if key not in call.chosen:
        call.chosen[key] = method.choose(picture)
    return call.chosen[key]


def thin(call: Call, cache: Any) -> bool:
    """Take more columns out of a prompt that has run, where a method keeps fewer at this denoising step.

    Args:
        call: a call whose prompt is in ``cache``; ``call.progress`` says how far the denoising is.
        cache: from :func:`vlm_attn.host.slot_cache`.

    Returns:
        Whether anything was taken.
    """
    state = call.reduction
    if state is None or not call.pictures:
        return False
    visible = state.layers[0].visible.clone()
    for number, (method, picture) in call.pictures.items():
        image = call.prompt.images[number]
        count = min(method.left_at(0, picture.total, call.progress), len(picture.places))
        if count == len(picture.places):
            continue
        picked = _chosen(call, method, replace(picture, count=count))
        chosen = picture.places[picked]
        gone = torch.ones(picture.total, dtype=torch.bool, device=visible.device)
        gone[chosen] = False
        visible[image.row, image.columns.to(visible.device)[gone]] = False
        state.stages.setdefault(number, []).append((0, chosen.cpu()))
        state.hand_over(number, picture.total, picture.places, method.owners(picture, picked))
    if visible.equal(state.layers[0].visible):
        return False
    made: dict[int, Kept] = {}  # layers whose keys are alike share what describes them, and their masks
    for layer, kept in state.layers.items():
        here = kept.visible & visible
        if kept.columns is None:
            state.layers[layer] = made.setdefault(id(kept), Kept(here, None, False, kept.size))
            continue
        seen = here.gather(1, kept.columns)
        index = places(seen)
        columns = kept.columns.gather(1, index)
        host.keep_columns(cache, layer, index, kept.columns.shape[1])
        full = bool(here.gather(1, columns).all())
        state.layers[layer] = made.setdefault(id(kept), Kept(here, columns, full, kept.size))
    state.masks.clear()
    call.edits.clear()
    return True


def places(stays: Tensor) -> Tensor:
    """``[B, n]`` where ``stays [B, m]`` is True, ascending; rows with fewer are filled up with other places."""
    return (~stays).int().argsort(dim=1, stable=True)[:, : int(stays.sum(1).max())].sort(1).values


def _place(state: Reduction, row: int, index: Tensor) -> Tensor:
    """Where rows of the whole forward stand among those that are there."""
    return index if state.rows is None else torch.searchsorted(state.rows[row], index)


def _gather(call: Call, state: Reduction, hidden: Tensor) -> Tensor:
    """Take the rows out that are no longer visible, in every row of the batch the same number."""
    visible = nn.functional.pad(state.visible[:, call.first :], (0, call.length), value=True)[:, : call.length]
    order = (~visible).int()
    if state.rows is not None:  # what is not there any more cannot fill up a row
        there = torch.zeros_like(visible).scatter(1, state.rows, True)
        order += (~there).int()
    rows = order.argsort(dim=1, stable=True)[:, : int(visible.sum(1).max())].sort(1).values
    index = rows if state.rows is None else torch.searchsorted(state.rows, rows)
    state.rows = rows
    return hidden.gather(1, index[..., None].expand(-1, -1, hidden.shape[2]))


def _renumbered(
    engine: Engine, call: Call, state: Reduction, layer: int, hidden: Tensor, kwargs: dict[str, Any]
) -> dict[str, Any]:
    """A layer's arguments with the positions of its rows counted over what is left, where a method wants that."""
    if not any(isinstance(m, Reducer) and m.positions == "packed" for m in call.methods):
        return kwargs
    kept, given, kind = state.layers[layer], kwargs["position_embeddings"], None
    compiling = torch.compiler.is_compiling()
    if not compiling:
        for of, turned, made in state.turned:
            if of is kept and turned is given:
                return {**kwargs, **made}
    gone = (~kept.visible).cumsum(1)
    positions = kwargs["position_ids"]
    columns = torch.arange(positions.shape[-1], device=gone.device) + call.past
    before = gone.gather(1, columns.clamp(max=gone.shape[1] - 1).expand(len(gone), -1))
    positions = (positions - before).clamp_min(0)
    if engine.rotary_kinds is not None:
        kind = engine.rotary_kinds[layer]
    rotary: Any = engine.text_model.rotary_emb
    turned = rotary(hidden, positions) if kind is None else rotary(hidden, positions, kind)
    made = {"position_embeddings": turned, "position_ids": positions}
    if not compiling:
        state.turned.append((kept, given, made))
    return {**kwargs, **made}


def _gathered(state: Reduction, kwargs: dict[str, Any]) -> dict[str, Any]:
    """A layer's arguments for the rows that are left; the mask is another matter."""
    if state.rows is None:
        return kwargs
    given = {name: kwargs[name] for name in host.ROW_ARGUMENTS if name in kwargs}
    for rows, of, made in state.gathered:  # most layers get the same: positions are computed once per forward
        if rows is state.rows and of.keys() == given.keys() and all(of[name] is given[name] for name in given):
            return {**kwargs, **made}
    made = host.gather_arguments(given, state.rows)
    if not torch.compiler.is_compiling():
        state.gathered.append((state.rows, given, made))
    return {**kwargs, **made}


def _layer_mask(
    engine: Engine, call: Call, state: Reduction, module: nn.Module, layer: int, mask: Any, hidden: Tensor, cache: Any
) -> Any:
    """The mask of a layer, over the keys that are there."""
    kept = state.layers[layer]
    if not torch.compiler.is_compiling():
        for given, of, made in state.masks:
            if given is mask and of is kept:
                return made
    made = (_short_mask if state.drop else _hiding_mask)(engine, call, state, kept, layer, mask, hidden, cache)
    if not torch.compiler.is_compiling():
        state.masks.append((mask, kept, made))
    return made


def _row_columns(call: Call, state: Reduction, hidden: Tensor) -> Tensor:
    """``[B or 1, q]`` the columns of the rows that run now."""
    if call.mode == "prompt" and state.rows is not None:
        return state.rows + call.past
    return (torch.arange(hidden.shape[1], device=hidden.device) + call.past)[None]


def _short_mask(
    engine: Engine, call: Call, state: Reduction, kept: Kept, layer: int, mask: Any, hidden: Tensor, cache: Any
) -> Any:
    plain = kept.full and kept.size is None
    if plain and not kept.dropped and (call.mode != "prompt" or state.rows is None):
        return mask
    alone = len(call.methods) == sum(isinstance(m, Reducer) for m in call.methods)
    if mask is None and plain and (call.mode == "prompt" or alone or hidden.shape[1] == 1):
        return None  # "causal", which leaving columns out does not change
    total = mask.shape[-1] if call.canvas else int(call.past) + call.length  # later canvas columns are keys as well
    keys = kept.keys(total)
    shown = nn.functional.pad(kept.visible, (0, total - kept.visible.shape[1]), value=True).gather(1, keys)
    rows = _row_columns(call, state, hidden)
    if mask is None:
        made = (keys[:, None, :] <= rows[..., None])[:, None] & shown[:, None, None]
        return _weighed(kept, keys, host.mask_like(made, engine.base, hidden), hidden)
    mask = mask.expand(len(keys), -1, -1, -1)
    if call.mode == "prompt" and state.rows is not None:
        mask = mask.gather(2, state.rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))
    mask = mask.gather(3, keys[:, None, None, :].expand(-1, mask.shape[1], mask.shape[2], -1))
    return _weighed(kept, keys, mask if kept.full else host.hide(mask, shown[:, None, None]), hidden)


def _hiding_mask(
    engine: Engine, call: Call, state: Reduction, kept: Kept, layer: int, mask: Any, hidden: Tensor, cache: Any
) -> Any:
    if kept.full and kept.size is None:
        return mask
    rows = _row_columns(call, state, hidden)
    length, offset = (rows.shape[1], 0) if cache is None else cache.get_mask_sizes(hidden.shape[1], layer)
    length = length if mask is None else mask.shape[-1]
    keys = torch.arange(length, device=hidden.device) + offset
    last = kept.visible.shape[1] - 1
    shown = kept.visible[:, keys.clamp(max=last)] | (keys > last)
    # A row that nobody sees any more still runs: it must see something, or it turns into NaN.
    shown = shown[:, None, None] | (keys == rows[..., None])[:, None]
    if mask is None:
        made = host.mask_like(shown & (keys <= rows[..., None])[:, None], engine.base, hidden)
    else:
        made = host.hide(mask, shown)
    return _weighed(kept, keys.expand(len(shown), -1), made, hidden)


def _weighed(kept: Kept, keys: Tensor, mask: Tensor, like: Tensor) -> Tensor:
    """A mask over keys at the columns ``[B, S]`` with ``log n`` added for those that count for n."""
    if kept.size is None:
        return mask
    last = kept.visible.shape[1] - 1
    bias = kept.size.log().gather(1, keys.clamp(max=last)).masked_fill(keys > last, 0.0)
    return host.biased(mask, bias[:, None, None].to(like.dtype))


def _look_ahead(
    engine: Engine,
    call: Call,
    state: Reduction,
    module: Any,
    method: Reducer,
    layer: int,
    hidden: Tensor,
    kwargs: Mapping[str, Any],
) -> None:
    """Read the attention that a layer would pay if this method took nothing away before it: its keys, and the queries of the
    rows that are read. Methods that choose first have chosen."""
    state.layers[layer] = _layer_keys(call, state, layer)
    arguments = _gathered(state, _renumbered(engine, call, state, layer, hidden, dict(kwargs)))
    mask = arguments.get("attention_mask")
    held = host.cache_of(arguments) if call.first else None  # earlier columns are keys, too
    arguments["attention_mask"] = _layer_mask(engine, call, state, module, layer, mask, hidden, held)
    arguments = host.with_cache(arguments, None if held is None else host.Peek(held))
    rows, _ = call.find_rows(method.read_rows(call))
    call.ahead = method
    try:
        with _few_rows(engine, module.self_attn, rows):
            module.self_attn(hidden_states=module.input_layernorm(hidden), **arguments)
    finally:
        call.ahead = None
    del state.layers[layer]


@contextmanager
def _few_rows(engine: Engine, attention: nn.Module, rows: Tensor) -> Iterator[None]:
    """Let an attention module project one row ``[B, 1]`` only, but for its keys: the others get that row's query and value.

    Modules that project everything at once, and several rows, run as they are.
    """
    length = 0

    def take(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        nonlocal length
        length = args[0].shape[1]
        return (args[0].gather(1, rows[..., None].expand(-1, -1, args[0].shape[2])),)

    def repeat(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return output.expand(-1, length, -1)

    kept = len(engine.handles)
    try:
        for name in ("q_proj", "v_proj", "o_proj"):
            projection = getattr(attention, name, None)
            if projection is not None and rows.shape[1] == 1:
                engine.handles.append(projection.register_forward_pre_hook(take))
                engine.handles.append(projection.register_forward_hook(repeat))
        yield
    finally:
        for handle in engine.handles[kept:]:
            handle.remove()
        del engine.handles[kept:]


def restore(call: Call, output: Any) -> None:
    """Give a forward's hidden states the prompt's length again: zeros where tokens were dropped."""
    state = call.reduction
    if state is None or not state.drop or state.rows is None:
        return

    def widen(hidden: Tensor, layer: int) -> Tensor:
        kept = state.layers[layer]
        if hidden.shape[1] == call.length or kept.columns is None:
            return hidden
        tail = call.first + call.length - call.prompt.length
        columns = kept.keys(call.first + call.length)[:, -hidden.shape[1] :]
        visible = nn.functional.pad(kept.visible, (0, tail), value=True).gather(1, columns)[..., None]
        wide = hidden.new_zeros(len(hidden), call.length, hidden.shape[2])
        return wide.scatter(1, (columns - call.first)[..., None].expand_as(hidden), hidden * visible)

    last = max(state.layers)
    output.last_hidden_state = widen(output.last_hidden_state, last)
    if getattr(output, "hidden_states", None) is not None:  # number 0 is the first layer's input, 1 its output
        output.hidden_states = tuple(widen(h, max(0, i - 1)) for i, h in enumerate(output.hidden_states))
