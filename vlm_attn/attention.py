# SPDX-License-Identifier: Apache-2.0
"""The attention function transformers calls in a patched model.

It looks at the tag on the attention module. Without a tag, or with nothing to do in this layer and step, it goes
straight to the implementation the model had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.heads import choose_keys, view_of
from vlm_attn.kernels import attention_rows, edited_attention

if TYPE_CHECKING:
    from vlm_attn.call import Call
    from vlm_attn.engine import Engine, Tap
    from vlm_attn.paired import Pairing
    from vlm_attn.sharding import Heads

TAG = "_vlm_attn"
ROWS_AT_ONCE = 64  # prompt rows edited per step: bounds the [B, H, rows, S] scores
ALONE = (
    "an attention layer of a patched model ran outside a call, so the prompt it belongs to is unknown: it was called on its "
    "own, or a backward pass ran it again (activation checkpointing). Run the whole model, or unpatch it"
)
REFUSED = {
    "s_aux": "attention sinks as parameters",
    "position_bias": "a position bias",
    "cache": "a paged cache",
}


@dataclass
class Tag:
    """Marks an attention module of a patched model."""

    engine: Engine
    layer: int
    base: str
    canvas: bool = False  # a layer of a canvas decoder: no prompt row runs in it

    @property
    def heads(self) -> Heads:
        """Which of the layer's heads run in this process."""
        return self.engine.heads[self.layer]


def vlm_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attention of one layer, edited where the call asks for it.

    Args:
        module: the attention module.
        query: ``[B, H, Q, D]``, rotated.
        key: ``[B, G, S, D]``, the whole cache.
        value: ``[B, G, S, D]``.
        attention_mask: in the format of the module's own implementation.
        scaling: factor on the dot products, default ``D ** -0.5``.
        dropout: must be 0 on an edited row.
        **kwargs: the host's other arguments; ``softcap`` is honoured.

    Returns:
        ``[B, Q, H, D]`` and None (attention maps are never returned).

    Raises:
        NotImplementedError: paged caches (continuous batching), learned sinks, position biases, dropout.
    """
    tag: Tag | None = getattr(module, TAG, None)
    call = tag.engine.call if tag is not None else None
    options = {"scaling": scaling, "dropout": dropout, **kwargs}
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling

    def plain() -> tuple[Tensor, Tensor | None]:
        base = host.base_attention(module, tag.base if tag is not None else _base_of(module))
        return base(module, query, key, value, attention_mask, **options)

    if tag is not None and tag.engine.tap is not None and not (tag.canvas and call is None):
        return _tapped(tag, tag.engine.tap, plain, query, key, attention_mask, scale, kwargs.get("softcap"))
    if tag is not None and call is None and not tag.canvas and tag.engine.active:
        tag.engine.look()
        raise RuntimeError(ALONE)
    if tag is None or call is None or call.mode == "other":
        return plain()
    if not call.done:
        call.reached.add(tag.layer)
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"vlm_attn cannot edit attention with {what} ({name}=)")
    if dropout:
        raise NotImplementedError("vlm_attn edits attention at inference only: call model.eval()")
    layer = _Layer(tag, call, module, query, key, value, attention_mask, scale, kwargs.get("softcap"), options)
    if (pairing := tag.engine.paired) is not None:
        return layer.paired(pairing), None
    layer.draw_mask()
    layer.choose()
    return (layer.edited(), None) if call.mode == "edited" else layer.prompt()


@dataclass
class _Layer:
    """The attention of one layer in a forward of a call: what the host asks for, and what the methods make of it.

    Attributes:
        mask: the host's, or what methods put in its place.
        options: the host's other arguments.
        drawn: ``[B, Q, H, D]`` the plain attention, where the kernel has drawn the mask; ``mask`` then only stands in for it.
        whole: ``[B, Q, H, D]`` the attention before keys were chosen, where a method takes part of it.
        share: ``[H]`` how much of that goes into every head's output.
    """

    tag: Tag
    call: Call
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    mask: Tensor | None
    scale: float
    softcap: float | None
    options: dict[str, Any]
    drawn: Tensor | None = None
    whole: Tensor | None = None
    share: Tensor | None = None

    def plain(self) -> tuple[Tensor, Tensor | None]:
        """What the model had, over the keys and the mask as they are now."""
        if self.drawn is not None:
            return self.drawn, None
        base = host.base_attention(self.module, self.tag.base)
        return base(self.module, self.query, self.key, self.value, self.mask, **self.options)

    def draw_mask(self) -> None:
        """Let the kernel draw a method's mask of the prompt; where it cannot, write it."""
        prompt = self.call.mask
        if prompt is None:
            return
        first, rows = int(self.call.past), self.query.shape[2]
        # A method that chooses keys goes on from a written mask.
        fits = self.call.mode == "prompt" and self.value.shape == self.key.shape
        if fits and self.tag.engine.chooser(self.call) is None:
            pattern = prompt.pattern(first, rows, self.key)
            if pattern.backend(self.query, self.key, self.value, softcap=self.softcap).name == "triton":
                found = pattern.attend(self.query, self.key, self.value, scale=self.scale, softcap=self.softcap)
                self.drawn = found.out.transpose(1, 2)
                return
        self.mask = host.mask_like(prompt.written(first, rows, self.key), self.tag.base, self.query)

    def choose(self) -> None:
        """Let the method that chooses keys say what every head sees."""
        chooser = self.tag.engine.chooser(self.call)
        if chooser is None or getattr(self.module, "sliding_window", None) is not None:
            return
        view = view_of(
            self.call,
            self.tag.layer,
            self.query,
            self.key,
            self.value,
            self.mask,
            scale=self.scale,
            softcap=self.softcap,
            heads=self.tag.heads,
        )
        if self.call.mode == "edited" or chooser.edited_rows == "text":
            chosen = choose_keys(chooser, self.call, view, self.mask, self.tag.base)
            if chosen is not None:
                self.whole = self.plain()[0] if chosen[3] is not None else None
                self.mask, self.key, self.value, self.share = chosen
        elif self.call.ahead is None:
            chooser.read(self.call, view)

    def edited(self) -> Tensor:
        """``[B, Q, H, D]`` with every row edited."""
        tag, call = self.tag, self.call
        edits, watch = tag.engine.edits(call, tag.layer, self.query.device), tag.engine.watch
        if not edits and watch is None:
            return self.scaled(self.plain()[0])
        mask, rows = self.mask, self.query.shape[2]
        if mask is None and rows > 1 and not tag.canvas:
            mask = _causal(call, self.key, torch.arange(rows, device=self.query.device)[None])
        offset = _offset(self.module, call, self.key)

        def attend(value: Tensor) -> Tensor:
            return edited_attention(
                self.query,
                self.key,
                value,
                edits,
                mask=mask,
                scale=self.scale,
                softcap=self.softcap,
                offset=offset,
                row=call.past,
            )

        if watch is not None:
            watch(tag.layer, lambda value: tag.heads.all(attend(value)), self.value, offset)
            if not edits:
                return self.scaled(self.plain()[0])
        out = attend(self.value)
        if call.open is not None:  # of a canvas, what is written already is left alone
            front = rows - call.open.shape[1]
            wanted = nn.functional.pad(call.open, (front, 0), value=True)[:, None, :, None]
            out = out.where(wanted, self.plain()[0].transpose(1, 2))
        if call.blind is not None:
            blind = call.rows_without_image(out.device)[:, None, None, None]
            out = self.plain()[0].transpose(1, 2).where(blind, out)
        return self.scaled(out.transpose(1, 2).contiguous())

    def paired(self, pairing: Pairing) -> Tensor:
        """``[2R, Q, H, D]`` of two streams: the first edited, the second plain."""
        engine, number = self.tag.engine, self.tag.layer
        edits = engine.edits(self.call, number, self.query.device)
        if not edits and engine.head_scale(self.call, number) is None:
            return self.plain()[0]
        rows, pad = pairing.rows, pairing.pad

        def part(of: slice, first: int) -> _Layer:
            mask = self.mask if self.mask is None or len(self.mask) == 1 else self.mask[of]
            mask = mask if mask is None else mask[..., first : self.key.shape[2]]
            return replace(
                self, query=self.query[of], key=self.key[of, :, first:], value=self.value[of, :, first:], mask=mask
            )

        return torch.cat([part(slice(rows), pad).edited(), part(slice(rows, None), 0).plain()[0]])

    def prompt(self) -> tuple[Tensor, Tensor | None]:
        """``[B, Q, H, D]`` of prompt rows, those of the text edited where a method wants it, and the host's maps."""
        if self.call.ahead is not None:  # only its attention is wanted
            self.read()
            return self.scaled(self.query.transpose(1, 2)), None
        out, weights = self.plain()
        self.read()
        return self.scaled(self.edit_text(out)), weights

    def read(self) -> None:
        """Keep the attention rows that methods read of this layer."""
        tag, call = self.tag, self.call
        for method in tag.engine.readers(tag.layer):
            rows, valid = (part.to(self.query.device) for part in call.find_rows(method.read_rows(call)))
            if valid.any():
                attention = attention_rows(
                    _take(self.query, rows), self.key, mask=self.rows_mask(rows), scale=self.scale, softcap=self.softcap
                )
                offset = int(_offset(self.module, call, self.key))
                call.store_rows(method, tag.layer, tag.heads.all(attention), valid, offset)

    def edit_text(self, out: Tensor) -> Tensor:
        """``[B, Q, H, D]`` with the text rows edited, a bounded number at a time."""
        edits = self.tag.engine.edits(self.call, self.tag.layer, self.query.device)
        for rows, valid in _text_rows(self.call, self.query.device) if edits else ():
            edited = edited_attention(
                _take(self.query, rows),
                self.key,
                self.value,
                edits,
                mask=self.rows_mask(rows),
                scale=self.scale,
                softcap=self.softcap,
                offset=int(_offset(self.module, self.call, self.key)),
            ).transpose(1, 2)
            index = rows[:, :, None, None].expand_as(edited)
            out = out.scatter(1, index, torch.where(valid[:, :, None, None], edited, out.gather(1, index)))
        return out

    def rows_mask(self, rows: Tensor) -> Tensor:
        """The mask of single rows ``[B, R]`` of this forward."""
        if self.drawn is not None and self.call.mask is not None:
            return self.call.mask.rows(rows + self.call.past, self.key.shape[2])
        if self.mask is None:
            return _causal(self.call, self.key, rows)
        mask = self.mask[..., : self.key.shape[2]].expand(rows.shape[0], -1, -1, -1)
        return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))

    def scaled(self, out: Tensor) -> Tensor:
        """An output with the share of the plain one that a method asks for, every head as loud as the methods want it."""
        if self.whole is not None and self.share is not None:
            out = out + self.share[:, None] * (self.whole - out)
        factor = self.tag.engine.head_scale(self.call, self.tag.layer)
        return out if factor is None else scale_heads(out, self.tag.heads.own(factor))


def scale_heads(out: Tensor, factor: Tensor) -> Tensor:
    """``[B, Q, H, D]`` outputs of the heads times ``[B, H]``."""
    return out * factor.to(out)[:, None, :, None]


def _tapped(
    tag: Tag,
    tap: Tap,
    plain: Callable[[], tuple[Tensor, Tensor | None]],
    query: Tensor,
    key: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float | None,
) -> tuple[Tensor, Tensor | None]:
    """The plain attention, shown to a method that looks at it in a stream beside the call."""

    def attend(rows: slice = slice(-1, None)) -> Tensor:
        seen = mask
        if seen is None:  # "no mask" means causal
            size = query.shape[2], key.shape[2]
            seen = torch.ones(size, dtype=torch.bool, device=key.device).tril(size[1] - size[0])[None, None]
        return tag.heads.all(
            attention_rows(query[:, :, rows], key, mask=seen[:, :, rows], scale=scale, softcap=softcap)
        )

    out, weights = plain()
    return tag.heads.own(tap(tag.layer, tag.heads.all(out, 2), attend), 2), weights


def _base_of(module: nn.Module) -> str:
    """The format an untagged module's config names (a module that was moved in from elsewhere)."""
    name = host.implementation(getattr(module, "config", None))
    return next((base for base, ours in host.NAMES.items() if ours == name), "sdpa")


def _offset(module: nn.Module, call: Call, key: Tensor) -> int | Tensor:
    """Column of the first key: 0, or more in a sliding layer that has dropped its oldest keys."""
    if getattr(module, "sliding_window", None) is None or (call.reduction is not None and call.reduction.drop):
        return 0
    total = call.past + call.length
    if isinstance(total, Tensor):
        return (total - key.shape[2]).clamp_min(0)
    return max(0, total - key.shape[2])


def _take(query: Tensor, rows: Tensor) -> Tensor:
    """Rows ``[B, R]`` of ``[B, H, Q, D]``."""
    return query.gather(2, rows[:, None, :, None].expand(-1, query.shape[1], -1, query.shape[3]))


def _causal(call: Call, key: Tensor, rows: Tensor) -> Tensor:
    """``[B or 1, 1, R, S]``: what "no mask" means for rows counted from this forward's first."""
    if call.reduction is not None and call.reduction.drop and call.mode == "prompt":
        return (torch.arange(key.shape[2], device=key.device) <= rows[..., None] + call.reduction.held(key.shape[2]))[
            :, None
        ]
    total = call.past + call.length
    offset = max(0, int(total) - key.shape[2]) if not isinstance(total, Tensor) else (total - key.shape[2]).clamp_min(0)
    columns = torch.arange(key.shape[2], device=key.device) + offset
    return (columns <= rows[..., None] + call.past)[:, None]


def _text_rows(call: Call, device: torch.device) -> list[tuple[Tensor, Tensor]]:
    """The text rows of this forward from the first image on, a bounded number at a time: ``(rows, valid)``, each ``[B, R]``."""
    first, stop = int(call.past), int(call.past) + call.length
    wanted = nn.functional.pad(call.layout.text_after_image, (0, max(0, stop - call.prompt.length)), value=True)
    if call.open is not None and call.open.shape[1]:
        wanted = torch.cat([wanted[:, : stop - call.open.shape[1]], call.open.expand(len(wanted), -1)], 1)
    wanted = wanted[:, first:stop].int()
    if call.reduction is not None and call.reduction.rows is not None:
        wanted = wanted.gather(1, call.reduction.rows)
    count = int(wanted.sum(1).max())
    order = wanted.argsort(dim=1, descending=True, stable=True)[:, :count]
    order, valid = order.to(device), wanted.gather(1, order).bool().to(device)
    return list(zip(order.split(ROWS_AT_ONCE, 1), valid.split(ROWS_AT_ONCE, 1), strict=True)) if count else []


host.register(vlm_attention)
