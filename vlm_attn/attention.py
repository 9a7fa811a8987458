"""The attention function transformers calls in a patched model.

It looks at the tag on the attention module. Without a tag, or with nothing to do in this layer and step, it goes
straight to the implementation the model had.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.heads import choose_keys, view_of
from vlm_attn.kernels import attention_rows, edited_attention

if TYPE_CHECKING:
    from vlm_attn.call import Call
    from vlm_attn.engine import Engine, Tap
    from vlm_attn.sharding import Heads

TAG = "_vlm_attn"
ROWS_AT_ONCE = 64  # prompt rows edited per step: bounds the [B, H, rows, S] scores
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

    drawn: Tensor | None = None

    def plain() -> tuple[Tensor, Tensor | None]:
        if drawn is not None:
            return drawn, None
        base = host.base_attention(module, tag.base if tag is not None else _base_of(module))
        return base(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **kwargs)

    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    call = tag.engine.call if tag is not None else None
    if tag is not None and tag.canvas and call is None:
        return plain()
    if tag is not None and tag.engine.tap is not None:
        return _tapped(tag, tag.engine.tap, plain, query, key, attention_mask, scale, kwargs.get("softcap"))
    if tag is None or call is None or call.mode == "other":
        return plain()
    for name, what in REFUSED.items():
        if kwargs.get(name) is not None:
            raise NotImplementedError(f"vlm_attn cannot edit attention with {what} ({name}=)")
    if dropout:
        raise NotImplementedError("vlm_attn edits attention at inference only: call model.eval()")
    softcap = kwargs.get("softcap")
    shared: dict[str, Any] = {"scale": scale, "softcap": softcap}
    chooser = tag.engine.chooser(call)
    if call.mask is not None:
        drawn = _drawn(call, query, key, value, **shared) if chooser is None else None
        if drawn is None:
            attention_mask = host.mask_like(call.mask.written(int(call.past), query.shape[2], key), tag.base, query)

    whole = share = None
    if chooser is not None and getattr(module, "sliding_window", None) is None:
        view = view_of(call, tag.layer, query, key, value, attention_mask, **shared, shared=tag.heads)
        if call.mode == "edited" or chooser.edited_rows == "text":
            chosen = choose_keys(chooser, call, view, attention_mask, tag.base)
            if chosen is not None:
                whole = plain()[0] if chosen[3] is not None else None
                attention_mask, key, value, share = chosen
        elif call.ahead is None:
            chooser.read(call, view)

    def scaled(out: Tensor) -> Tensor:
        if whole is not None and share is not None:
            out = out + share[:, None] * (whole - out)
        factor = tag.engine.head_scale(call, tag.layer)
        return out if factor is None else scale_heads(out, tag.heads.own(factor))

    if call.mode == "edited":
        edits = tag.engine.edits(call, tag.layer, query.device)
        if not edits and tag.engine.watch is None:
            return scaled(plain()[0]), None
        mask = attention_mask
        if mask is None and query.shape[2] > 1 and not tag.canvas:
            mask = _causal(call, key, torch.arange(query.shape[2], device=query.device)[None])
        offset = _offset(module, call, key)

        def attend(value: Tensor) -> Tensor:
            return edited_attention(query, key, value, edits, mask=mask, offset=offset, row=call.past, **shared)

        if tag.engine.watch is not None:
            tag.engine.watch(tag.layer, lambda value: tag.heads.all(attend(value)), value, offset)
            if not edits:
                return scaled(plain()[0]), None
        out = attend(value)
        if call.open is not None:  # of a canvas, what is written already is left alone
            front = query.shape[2] - call.open.shape[1]
            edited = nn.functional.pad(call.open, (front, 0), value=True)[:, None, :, None]
            out = out.where(edited, plain()[0].transpose(1, 2))
        return scaled(out.transpose(1, 2).contiguous()), None

    out, weights = plain() if call.ahead is None else (query.transpose(1, 2), None)
    for method in tag.engine.readers(tag.layer):
        rows, valid = (part.to(query.device) for part in call.find_rows(method.read_rows(call)))
        if valid.any():
            attention = tag.heads.all(
                attention_rows(_take(query, rows), key, mask=_rows_mask(call, attention_mask, key, rows), **shared)
            )
            call.store_rows(method, tag.layer, attention, valid, int(_offset(module, call, key)))
    edits = tag.engine.edits(call, tag.layer, query.device) if call.ahead is None else []
    if edits:
        for rows, valid in _text_rows(call, query.device):
            edited = edited_attention(
                _take(query, rows),
                key,
                value,
                edits,
                mask=_rows_mask(call, attention_mask, key, rows),
                offset=int(_offset(module, call, key)),
                **shared,
            ).transpose(1, 2)
            index = rows[:, :, None, None].expand_as(edited)
            out = out.scatter(1, index, torch.where(valid[:, :, None, None], edited, out.gather(1, index)))
    return scaled(out), weights


def _drawn(
    call: Call, query: Tensor, key: Tensor, value: Tensor, *, scale: float, softcap: float | None
) -> Tensor | None:
    """``[B, Q, H, D]``: prompt rows under a mask that the kernel draws; None where it cannot, and the mask must be written."""
    if call.mask is None or call.mode != "prompt" or value.shape != key.shape:
        return None
    pattern = call.mask.pattern(int(call.past), query.shape[2], key)
    if pattern.backend(query, key, value, softcap=softcap).name != "triton":
        return None
    return pattern.attend(query, key, value, scale=scale, softcap=softcap).out.transpose(1, 2)


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
    name = getattr(getattr(module, "config", None), "_attn_implementation", host.NAMES["sdpa"])
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


def _rows_mask(call: Call, mask: Tensor | None, key: Tensor, rows: Tensor) -> Tensor:
    """The mask of single rows ``[B, R]`` of this forward."""
    if call.mask is not None:
        return call.mask.rows(rows + call.past, key.shape[2])
    if mask is None:
        return _causal(call, key, rows)
    mask = mask[..., : key.shape[2]].expand(rows.shape[0], -1, -1, -1)
    return mask.gather(2, rows[:, None, :, None].expand(-1, mask.shape[1], -1, mask.shape[3]))


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
