# SPDX-License-Identifier: Apache-2.0
"""The one file that touches what transformers does not document: the implementation field, masks, cache internals.

Every function here has a contract test, so that a new release of the host shows up as a red test with a name.
"""

from __future__ import annotations

import copy
import dataclasses
import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_outputs import BaseModelOutputWithPast
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape, unpad_image

# Versions the tests run against; a newer one warns once, it is not refused.
TESTED = ("5.17", "5.24")

# One name per mask format: the mask a model builds must be in the format of the implementation it had.
NAMES = {"sdpa": "vlm_attn", "eager": "vlm_attn_eager"}

# Arguments of text models that run along the sequence, and the dimension they do it in.
SEQUENCE_ARGUMENTS = {
    "inputs_embeds": 1,
    "input_ids": 1,
    "position_ids": -1,
    "cache_position": -1,
    "visual_pos_masks": 1,
    "per_layer_inputs": 1,
}

# Arguments that bring images to a text model that takes them itself (Chameleon).
IMAGE_ARGUMENTS = {"pixel_values", "mm_encoder_outputs"}

Attention = Callable[..., tuple[Tensor, Tensor | None]]
_ours: dict[str, Attention] = {}


def register(function: Attention) -> None:
    """Register the attention function and the mask functions of both formats with the host."""
    for base, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
        _ours[NAMES[base]] = function
        AttentionInterface.register(NAMES[base], function)
        AttentionMaskInterface.register(NAMES[base], mask)


def warn_if_untested() -> None:
    """Warn when the installed transformers is newer than the tested range."""
    installed = tuple(int(part) for part in transformers.__version__.split(".")[:2])
    if installed > tuple(int(part) for part in TESTED[1].split(".")):
        warnings.warn(
            f"vlm_attn is tested with transformers {TESTED[0]} to {TESTED[1]}, this is {transformers.__version__}. "
            "It will probably work; if something looks odd, compare with a tested version.",
            UserWarning,
            stacklevel=3,
        )


def implementation(config: Any) -> str:
    """The attention implementation that a config names, empty if it names none."""
    return getattr(config, "_attn_implementation", None) or ""


def check_editable(model: Any, text_config: Any) -> str:
    """The attention implementation of the text model, if it can be edited.

    Raises:
        NotImplementedError: the architecture does not route through the attention interface, or its implementation
            hides the scores (flash, flex, paged).
    """
    for part in model.modules():
        if getattr(part, "config", None) is text_config and hasattr(part, "_can_set_attn_implementation"):
            if not part._can_set_attn_implementation():
                raise NotImplementedError(
                    f"{type(part).__name__} does not route its attention through transformers' AttentionInterface, "
                    "so it cannot be edited"
                )
            break
    base = implementation(text_config)
    if base not in NAMES:
        raise NotImplementedError(
            f"attention implementation {base!r} cannot be edited. "
            'Load the model with attn_implementation="sdpa" (or "eager") and patch again'
        )
    check_capped(text_config, base)
    return base


def base_of(name: str) -> str | None:
    """The implementation that can be edited under a name, ours among them; None if it cannot."""
    return next((base for base, ours in NAMES.items() if name in (base, ours)), None)


def check_capped(text_config: Any, base: str) -> None:
    """Refuse SDPA where the model caps its attention logits.

    Raises:
        NotImplementedError: it does.
    """
    if base == "sdpa" and getattr(text_config, "attn_logit_softcapping", None):
        raise NotImplementedError(
            "this model caps its attention logits (attn_logit_softcapping), which SDPA cannot do: "
            'load it with attn_implementation="eager" and patch again'
        )


def check_bias(vision_config: Any, method: str) -> None:
    """Refuse a vision tower whose attention takes no additive mask.

    Raises:
        NotImplementedError: flash and flex implementations.
    """
    base = implementation(vision_config)
    if base not in NAMES:
        raise NotImplementedError(
            f"{method} weighs keys of the vision tower, which attention implementation {base!r} "
            'cannot: load the model with attn_implementation="sdpa" (or "eager") and patch again'
        )


def base_attention(module: nn.Module, base: str) -> Attention:
    """The function an attention module called before it was patched."""
    if base == "eager":
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


_IMPLEMENTATION = "_attn_implementation_internal"


def in_place(text_config: Any, base: str) -> bool:
    """Whether a config names our attention, and the host still has our function under that name."""
    name = NAMES[base]
    return implementation(text_config) == name and ALL_ATTENTION_FUNCTIONS.get(name) is _ours.get(name)


def put_in_place(text_config: Any, base: str) -> None:
    """Make :func:`in_place` true again."""
    register(_ours[NAMES[base]])
    vars(text_config)[_IMPLEMENTATION] = NAMES[base]


@dataclasses.dataclass
class OwnConfig:
    """A patched model's own copy of a config.

    Attributes:
        original: what the model had.
        copy: what it has while it is patched.
        before: the copy's attributes when it was made, with the implementation of the original.
    """

    original: Any
    copy: Any
    before: dict[str, Any]

    def write_back(self) -> None:
        """Give the original what others have changed in the copy since (another vocabulary, a new attribute)."""
        now, gone = dict(vars(self.copy)), object()
        if now.get(_IMPLEMENTATION) in NAMES.values():
            now[_IMPLEMENTATION] = base_of(now[_IMPLEMENTATION])
        for key in now.keys() | self.before.keys():
            value, old = now.get(key, gone), self.before.get(key, gone)
            if value is gone:
                vars(self.original).pop(key, None)
            elif value is not old:
                vars(self.original)[key] = value
        self.before = now


def own_configs(model: Any, text_config: Any, base: str) -> list[OwnConfig]:
    """Give a model its own text config that names our attention; returns what :func:`restore` needs to know.

    Configs are shared: two models built from one config would otherwise switch together. Every submodule that holds
    the old config (or the top-level one, which holds it in turn) is pointed to the copy.
    """
    top = model.config
    own_text = copy.copy(text_config)
    own = [OwnConfig(text_config, own_text, dict(vars(own_text)))]
    if top is not text_config:
        own_top = copy.copy(top)
        for key in top.sub_configs:
            if getattr(top, key, None) is text_config:
                setattr(own_top, key, own_text)
        own.append(OwnConfig(top, own_top, dict(vars(own_top))))
    own_text._attn_implementation = NAMES[base]
    _exchange(model.modules(), {id(config.original): config.copy for config in own})
    return own


def restore(modules: Iterable[nn.Module], own: Sequence[OwnConfig]) -> None:
    """Put the original configs back where the copies are, with what others have changed in these."""
    modules = list(modules)
    for config in own:
        config.write_back()
    _exchange(modules, {id(config.copy): config.original for config in own})
    for module in modules:  # built or copied while the model was patched, with configs of their own
        other = vars(module).get("config")
        if implementation(other) in NAMES.values():
            vars(other)[_IMPLEMENTATION] = base_of(implementation(other))


def _exchange(modules: Iterable[nn.Module], by: Mapping[int, Any]) -> None:
    for module in modules:
        for attribute, value in list(vars(module).items()):
            if id(value) in by:
                setattr(module, attribute, by[id(value)])


def inside(model: Any) -> Any:
    """The model inside wrappers that run it as it is: ``torch.compile``, ``DistributedDataParallel``, PEFT's adapters.

    Raises:
        NotImplementedError: a PEFT model that puts virtual tokens into the prompt.
    """
    while True:
        if isinstance(model, nn.parallel.DistributedDataParallel):
            model = model.module
        elif "_orig_mod" in getattr(model, "_modules", ()):
            model = model._orig_mod
        elif hasattr(model, "get_base_model"):
            adapter = getattr(model, "active_peft_config", None)
            if getattr(adapter, "is_prompt_learning", False):
                raise NotImplementedError(
                    f"{type(adapter).__name__} puts virtual tokens before the prompt, so its columns cannot "
                    "be known: use an adapter of another kind (LoRA), or none"
                )
            model = model.get_base_model()
        else:
            return model


def processes(model: Any) -> int:
    """Over how many processes the host has spread a model's layers (tensor parallelism); 1 = it has not."""
    return getattr(model, "_tp_size", None) or 1


def is_causal(text_config: Any) -> bool:
    """Whether every layer is ordinary causal attention: no sliding windows, chunks or linear layers, no bidirectional mode."""
    kinds = getattr(text_config, "layer_types", None) or ["full_attention"]
    both_ways = getattr(text_config, "use_bidirectional_attention", None)
    return set(kinds) == {"full_attention"} and not both_ways and getattr(text_config, "is_causal", True)


# Caches

# What the host calls its cache, in arguments and outputs: "cache" since 5.24. Both names are understood in arguments.
CACHE_NAMES = ("cache", "past_key_values")
CACHE = next(
    name for name in CACHE_NAMES if name in {field.name for field in dataclasses.fields(BaseModelOutputWithPast)}
)


def cache_of(arguments: Mapping[str, Any]) -> Any:
    """The cache among the arguments of a model, a layer or ``generate``, or in an output; None if there is none."""
    name = next((name for name in CACHE_NAMES if name in arguments), CACHE)
    return arguments.get(name)


def with_cache(arguments: Mapping[str, Any], cache: Any) -> dict[str, Any]:
    """The arguments with another cache, under the name they have for it (the host's own, if none)."""
    name = next((name for name in CACHE_NAMES if name in arguments), CACHE)
    return {**arguments, name: cache}


def without_cache(output: Any) -> Any:
    """An output that says nothing of a cache. A new one: setting a field to None leaves it among the output's items."""
    return type(output)(**{name: value for name, value in output.items() if name != CACHE})


def cached_length(cache: Any) -> int:
    """Columns a cache holds, as a Python int (reads a tensor under a static cache: prompt only, never while decoding)."""
    return 0 if cache is None else int(cache.get_seq_length())


def new_cache(text_config: Any) -> DynamicCache:
    """An empty dynamic cache."""
    return DynamicCache(config=text_config)


def rewind(cache: Any, columns: int) -> None:
    """Forget the newest columns of every layer.

    Raises:
        NotImplementedError: a sliding layer has already dropped older columns.
    """
    for layer in cache.layers:
        length = getattr(layer, "cumulative_length", None)
        if isinstance(length, Tensor):
            if getattr(layer, "is_sliding", False):
                raise NotImplementedError(
                    "a static cache with sliding-window layers cannot be rewound: use a dynamic cache"
                )
            length.sub_(columns)
        else:
            layer.crop(-columns)


def can_rewind(cache: Any) -> bool:
    """Whether a cache can forget its newest columns: not what layers with a state have read (linear attention, convolution)."""
    return not any(hasattr(layer, "conv_states") or hasattr(layer, "recurrent_states") for layer in cache.layers)


def repeat_rows(cache: Any, times: int) -> None:
    """Repeat every row of a cache, a state's too."""
    for layer in cache.layers if times > 1 else ():
        if hasattr(layer, "batch_repeat_interleave") and not hasattr(layer, "conv_states"):
            layer.batch_repeat_interleave(times)
            continue
        states = [*layer.conv_states.values(), *layer.recurrent_states.values()]
        rows = next(torch.arange(len(state), device=state.device) for state in states if state is not None)
        layer.reorder_cache(rows.repeat_interleave(times))


class ShortLayer(DynamicLayer):
    """One layer of a dynamic cache that holds fewer columns than it counts.

    It counts every column of the sequence, so that positions, masks and ``generate`` stay in step; ``dropped`` of them are
    not there. A sliding layer turns into one too: it then keeps its old keys, and its mask is what hides them.
    """

    def __init__(self, layer: DynamicLayer) -> None:
        super().__init__()
        self.is_sliding = layer.is_sliding
        self.dropped = 0
        keys, values = layer.keys, layer.values
        if layer.is_initialized and keys is not None and values is not None:
            self.lazy_initialization(keys, values)
            self.keys, self.values = keys, values

    def get_seq_length(self) -> int:
        """Columns seen, dropped ones counted."""
        held = super().get_seq_length()
        return held + self.dropped if held else 0

    def reset(self) -> None:
        """Empty the layer."""
        super().reset()
        self.dropped = 0

    def activate_past_recording(self) -> None:
        """Nothing to do: no past key is ever let go."""

    def keep(self, index: Tensor) -> None:
        """Let columns go: ``index [B, n]`` are those that stay, ascending, counted among those that are there."""
        assert self.keys is not None
        assert self.values is not None
        wide = index.to(self.keys.device)[:, None, :, None]
        self.dropped += self.keys.shape[-2] - index.shape[1]
        self.keys, self.values = (
            x.gather(2, wide.expand(-1, x.shape[1], -1, x.shape[3])) for x in (self.keys, self.values)
        )


class _Pairs:
    """Of a layer of a cache whose rows belong to two streams, those of the second after those of the first: rows are named by
    the first stream, as ``generate`` knows them, and the second's go with them."""

    def _pairs(self, index: Tensor) -> Tensor:
        keys: Tensor = self.keys  # type: ignore[attr-defined]
        index = index.to(keys.device)
        return torch.cat([index, index + len(keys) // 2])

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put pairs of rows in another order."""
        super().reorder_cache(self._pairs(beam_idx))  # type: ignore[misc]

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some pairs of rows."""
        super().batch_select_indices(self._pairs(indices))  # type: ignore[misc]


class PairedLayer(_Pairs, DynamicLayer):
    """A layer of two streams that keeps every column."""


class PairedSlidingLayer(_Pairs, DynamicSlidingWindowLayer):
    """A layer of two streams with a sliding window. Their columns stand at the right, so a window is the same for both."""


_PAIRED: dict[type, type] = {DynamicLayer: PairedLayer, DynamicSlidingWindowLayer: PairedSlidingLayer}


def _as(kind: Any, layer: Any, keys: Tensor, values: Tensor) -> Any:
    """A layer of another kind with all else that this one has."""
    new = kind.__new__(kind)
    new.__dict__.update({**layer.__dict__, "keys": keys, "values": values})
    return new


def join_rows(cache: Any, other: Any) -> int | str:
    """Put the rows of another cache after those of a cache, which must be alike.

    Args:
        cache: the cache that gets them.
        other: the other one, which is empty afterwards.

    Returns:
        How many columns without meaning were put before those of ``cache``, where ``other`` is the longer one; or, in words,
        why these caches cannot be joined. Then both are as they were.
    """
    if not (type(cache) is DynamicCache and type(other) is DynamicCache and len(cache.layers) == len(other.layers)):
        return f"{type(cache).__name__} cannot hold the rows of two streams"
    pad = max(0, other.get_seq_length() - cache.get_seq_length())
    held: list[tuple[Any, Any]] = list(zip(cache.layers, other.layers, strict=True))
    kinds = [(type(one), type(two)) for one, two in held]
    if not all(one is two and one in _PAIRED for one, two in kinds):
        return "its layers hold states of their own, or fewer columns than they count"
    if not all(layer.is_initialized for pair in held for layer in pair):
        return "a layer holds nothing (its keys are those of another layer)"
    if pad and any(one is DynamicSlidingWindowLayer for one, _ in kinds):
        return "the second prompt is longer than the first, and layers have sliding windows"
    for number, (first, second) in enumerate(held):
        width = first.keys.shape[-2] + pad
        tensors = [
            torch.cat([nn.functional.pad(part, (0, 0, width - part.shape[-2], 0)) for part in parts])
            for parts in ((first.keys, second.keys), (first.values, second.values))
        ]
        cache.layers[number] = _as(_PAIRED[type(first)], first, *tensors)
        second.keys = second.values = None
    other.layers.clear()
    return pad


def part_rows(cache: Any, rows: int, pad: int) -> None:
    """Undo :func:`join_rows`: keep the first ``rows`` rows, without their ``pad`` first columns, in ordinary layers."""
    usual = {paired: kind for kind, paired in _PAIRED.items()}
    for number, layer in enumerate(cache.layers):
        if type(layer) in usual:
            cache.layers[number] = _as(
                usual[type(layer)], layer, layer.keys[:rows, :, pad:].clone(), layer.values[:rows, :, pad:].clone()
            )


def shorten(cache: Any, layers: int) -> bool:
    """Let every layer of a cache hold fewer columns than it counts. False where this kind of cache cannot.

    Raises:
        NotImplementedError: a sliding layer has already let old columns go.
    """
    if not isinstance(cache, DynamicCache):
        return False
    held: Any = cache.layers
    while len(held) < layers and cache.layer_class_to_replicate is not None:
        held.append(cache.layer_class_to_replicate())
    if not all(
        type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) or isinstance(layer, ShortLayer) for layer in held
    ):
        return False
    for layer in held:
        sliding = layer.is_initialized and type(layer) is DynamicSlidingWindowLayer
        if sliding and layer.keys.shape[-2] < layer.cumulative_length:
            raise NotImplementedError(
                "the cache passed in has sliding-window layers that have let old columns go, so no visual token can be "
                "taken away any more: pass no cache"
            )
    cache.layers = [layer if isinstance(layer, ShortLayer) else ShortLayer(layer) for layer in held]
    return True


def readable(cache: Any) -> bool:
    """Whether the keys that a cache holds can be read as they are (:class:`Peek`)."""
    known = DynamicLayer, DynamicSlidingWindowLayer
    return isinstance(cache, DynamicCache) and all(
        type(layer) in known or isinstance(layer, ShortLayer) for layer in cache.layers
    )


class Peek:
    """A :func:`readable` cache for a layer that runs for a look: it gives what is held and the new keys, and keeps none."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache

    def update(self, key: Tensor, value: Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """What the layer would get from the cache."""
        held = self.cache.layers[layer]
        if held.keys is None or not held.keys.numel():
            return key, value
        return torch.cat([held.keys, key], 2), torch.cat([held.values, value], 2)


def is_short(cache: Any) -> bool:
    """Whether a cache holds fewer columns than it counts."""
    return any(getattr(layer, "dropped", 0) for layer in getattr(cache, "layers", ()))


def set_dropped(cache: Any, layer: int, dropped: int) -> None:
    """Say how many columns of a layer of a shortened cache are not there once this forward has run."""
    cache.layers[layer].dropped = dropped


def key_window(cache: Any, rows: int, layer: int) -> tuple[int, int]:
    """``(length, first column)`` of the keys that a layer will return for ``rows`` new rows."""
    length, offset = cache.get_mask_sizes(rows, layer)
    return int(length), int(offset)


def layer_of_type(text_config: Any, kind: str) -> int:
    """Index of the first layer of a type, for dict masks."""
    kinds = getattr(text_config, "layer_types", None) or []
    return kinds.index(kind) if kind in kinds else 0


# Positions


def prompt_positions(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """Positions of a prompt as ``generate`` counts them: padding has no place, pictures may have theirs (M-RoPE).

    Args:
        model: the model.
        inputs: the prompt's inputs, ``input_ids`` or ``inputs_embeds`` and ``attention_mask`` ``[B, L]`` among them.

    Returns:
        ``[B, L]``, or ``[4, B, L]`` (text, then time, height, width) under M-RoPE. What the host notes on the model about them
        is put back: it belongs to the stream that ``generate`` runs.
    """
    holders = [module for module in model.modules() if hasattr(module, "rope_deltas")]
    noted = [module.rope_deltas for module in holders]
    tokens: Any = inputs.get("input_ids", inputs.get("inputs_embeds"))
    if not hasattr(model, "_prepare_position_ids_for_generation"):  # an encoder: it counts columns, padding too
        return torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape[:2])
    try:
        return model._prepare_position_ids_for_generation(tokens, dict(inputs))
    finally:
        for module, value in zip(holders, noted, strict=True):
            module.rope_deltas = value


# Models that denoise a canvas beside the cache of their prompt (DiffusionGemma)


def canvas_decoder(model: Any) -> nn.Module | None:
    """The part that reads a canvas and the prompt's cache and writes none; None in a model that has no such part."""
    return _part(inside(model), "decoder", "self_conditioning")


def prompt_reader(model: Any) -> Any:
    """What runs a prompt and nothing else: the model inside its wrappers, or the encoder beside a :func:`canvas_decoder`."""
    model = inside(model)
    return model if canvas_decoder(model) is None else _part(model, "encoder", "language_model")


def _part(model: Any, name: str, has: str) -> nn.Module | None:
    if getattr(model.config, "canvas_length", None) is None:
        return None
    return next((m for path, m in model.named_modules() if path.split(".")[-1] == name and hasattr(m, has)), None)


# Tiles of LLaVA-NeXT


def tile_grid(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    """Rows and columns of the tiles that a picture of ``(height, width)`` pixels is cut into."""
    rows, columns = get_anyres_image_grid_shape(size, config.image_grid_pinpoints, config.vision_config.image_size)
    return int(rows), int(columns)


def without_padding(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """``[d, H, W]`` over the tiles, without what was padded around a picture of ``(height, width)`` pixels."""
    return unpad_image(picture, size)


# Arguments


def slice_arguments(kwargs: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Rows ``start .. stop - 1`` of a text model's arguments; masks and everything else are left as they are."""
    sliced = dict(kwargs)
    for name, dim in SEQUENCE_ARGUMENTS.items():
        value = sliced.get(name)
        if isinstance(value, Tensor):
            sliced[name] = value.narrow(dim, start, stop - start)
    # A text model that puts the images in by itself did so with the first rows.
    if start and isinstance(kwargs.get("input_ids"), Tensor):
        sliced.update(dict.fromkeys(IMAGE_ARGUMENTS & sliced.keys()))
    masks = kwargs.get("visual_pos_masks")
    if isinstance(masks, Tensor) and kwargs.get("deepstack_visual_embeds") is not None:
        before = int(masks[:, :start].sum())
        here = int(sliced["visual_pos_masks"].sum())
        sliced["deepstack_visual_embeds"] = (
            [e[before : before + here] for e in kwargs["deepstack_visual_embeds"]] if here else None
        )
        if not here:
            sliced["visual_pos_masks"] = None
    return sliced


def slice_mask(
    mask: Any,
    *,
    start: int,
    stop: int,
    first: int,
    windows: Mapping[str | None, tuple[int, int, int]],
    like: Tensor,
) -> Any:
    """Rows ``start .. stop - 1`` of a prepared mask, with the columns the cache will return for them.

    Args:
        mask: None, 2-D, 4-D, or a dict of 4-D masks (or None) per layer type.
        start: first row, counted from this forward's first.
        stop: one past the last row.
        first: absolute column of this forward's first row.
        windows: per layer type (None for a mask that is no dict): length and first column of the keys for these rows,
            and the first column of the given mask.
        like: a float tensor whose device and dtype a new mask takes.

    Returns:
        The mask in the form it came in. A missing mask inside a dict is built from absolute columns: it stands for
        "causal", which is wrong for a lone row over the unfilled slots of a static cache.
    """
    if isinstance(mask, dict):
        return {kind: _slice_4d(part, start, stop, first, windows[kind], like) for kind, part in mask.items()}
    if isinstance(mask, Tensor) and mask.ndim == 4:
        return _slice_4d(mask, start, stop, first, windows[None], like)
    if isinstance(mask, Tensor) and mask.ndim == 2:
        return mask[:, : first + stop]
    return mask


def _slice_4d(
    mask: Tensor | None, start: int, stop: int, first: int, window: tuple[int, int, int], like: Tensor
) -> Tensor:
    length, offset, mask_offset = window
    if mask is None:
        columns = torch.arange(length, device=like.device) + offset
        rows = torch.arange(start, stop, device=like.device) + first
        return (columns <= rows[:, None])[None, None]
    shift = offset - mask_offset
    part = mask[..., start:stop, shift : shift + length]
    lacking = length - part.shape[-1]
    if lacking > 0:
        hidden = False if mask.dtype == torch.bool else torch.finfo(mask.dtype).min
        part = nn.functional.pad(part, (0, lacking), value=hidden)
    return part


def check_rotary(text_model: Any, method: str) -> None:
    """Refuse to renumber positions where they are not one number per token, or go into the model otherwise.

    Raises:
        NotImplementedError: names the method and the kind of model.
    """
    config = text_model.config
    given = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if not isinstance(getattr(text_model, "rotary_emb", None), nn.Module) or "mrope_section" in given:
        why = (
            "has positions of three numbers"
            if "mrope_section" in given
            else "has no rotary positions that can be made anew"
        )
        raise NotImplementedError(
            f'{method}: positions="packed" numbers what is left anew, but the text model of type {config.model_type!r} {why}: '
            'leave positions="original"'
        )


def rotary_kinds(text_model: Any) -> list[str] | None:
    """Per decoder layer the kind of rotation it has, where there are several."""
    rotary = getattr(text_model, "rotary_emb", None)
    if rotary is None or "layer_type" not in inspect.signature(rotary.forward).parameters:
        return None
    return list(text_model.config.layer_types)


# Arguments of decoder layers that hold one entry per row, and the dimension they do it in (the batch is the one before).
ROW_ARGUMENTS = {"position_embeddings": -2, "position_ids": -1}


def gather_arguments(kwargs: Mapping[str, Any], rows: Tensor) -> dict[str, Any]:
    """A decoder layer's arguments for the rows ``[B, q]`` of its forward; the mask is left as it is."""

    def gather(value: Any, dim: int) -> Any:
        if isinstance(value, tuple | list):
            return type(value)(gather(part, dim) for part in value)
        if not isinstance(value, Tensor):
            return value
        wide = [-1] * value.ndim
        wide[dim - 1] = len(rows)
        index = rows if dim == -1 else rows[..., None].expand(-1, -1, value.shape[-1])
        value = value.expand(wide)
        return value.gather(dim, index.expand(*value.shape[: value.ndim - index.ndim], *index.shape))

    return {**kwargs, **{name: gather(kwargs[name], dim) for name, dim in ROW_ARGUMENTS.items() if name in kwargs}}


def mask_like(shown: Tensor, base: str, like: Tensor) -> Tensor:
    """A boolean mask (True = visible) in the format of an implementation."""
    if base == "sdpa":
        return shown
    return torch.zeros(shown.shape, dtype=like.dtype, device=like.device).masked_fill(
        ~shown, torch.finfo(like.dtype).min
    )


def hide(mask: Tensor, shown: Tensor) -> Tensor:
    """A mask of either format with what is not ``shown`` hidden as well."""
    if mask.dtype == torch.bool:
        return mask & shown
    return mask.masked_fill(~shown, torch.finfo(mask.dtype).min)


def biased(mask: Tensor, bias: Tensor) -> Tensor:
    """A mask of either format as an additive one with a bias on what it shows."""
    return (mask_like(mask, "eager", bias) if mask.dtype == torch.bool else mask) + bias


# Caches whose columns can be written again


class SlotLayer(ShortLayer):
    """One layer of a cache whose columns are overwritten in place, as denoising steps need it.

    Attributes:
        start: column that the next keys are written to; None = behind what is there.
        at: ``[B, Q]`` columns that the next keys are written to, where they are no run.
        held: columns that are there.
    """

    keys: Any
    values: Any

    def __init__(self) -> None:
        DynamicLayer.__init__(self)
        self.dropped = 0
        self.start: int | None = None
        self.at: Tensor | None = None
        self.held = 0

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write keys and values ``[B, G, Q, D]`` to their columns and return all columns."""
        if self.at is not None:
            index = self.at[:, None, :, None].expand_as(key_states)
            self.keys.scatter_(2, index, key_states)
            self.values.scatter_(2, index, value_states)
            return self.keys[..., : self.held, :], self.values[..., : self.held, :]
        at = self.held if self.start is None else self.start - self.dropped
        stop = at + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states[..., :0, :], value_states[..., :0, :]
        if stop > self.keys.shape[-2]:
            self.keys, self.values = (
                torch.cat([old[..., :at, :], new], -2)
                for old, new in ((self.keys, key_states), (self.values, value_states))
            )
        else:
            self.keys[..., at:stop, :], self.values[..., at:stop, :] = key_states, value_states
        self.held = max(self.held, stop)
        return self.keys[..., : self.held, :], self.values[..., : self.held, :]

    def get_seq_length(self) -> int:
        """Columns before what runs next, dropped ones counted."""
        return self.start if self.start is not None else self.held + self.dropped if self.held else 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """All columns, those counted that are about to be written."""
        return max(self.held + self.dropped, self.get_seq_length() + query_length), 0

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest columns."""
        self.held -= abs(tokens_to_remove)
        self.keys, self.values = self.keys[..., : self.held, :], self.values[..., : self.held, :]

    def keep(self, index: Tensor) -> None:
        """Let columns go: ``index [B, n]`` are those that stay, ascending, counted among those that are there."""
        index = index.to(self.keys.device)
        wide = index[:, None, :, None]
        self.dropped += self.held - index.shape[1]
        self.keys, self.values = (
            x[..., : self.held, :].gather(2, wide.expand(-1, x.shape[1], -1, x.shape[3]))
            for x in (self.keys, self.values)
        )
        self.held = index.shape[1]


def slot_cache(text_config: Any) -> DynamicCache:
    """An empty cache of :class:`SlotLayer`."""
    cache = DynamicCache()
    held: Any = [SlotLayer() for _ in range(text_config.num_hidden_layers)]
    cache.layers = held
    return cache


def write_to(cache: Any, start: int | None) -> None:
    """Say which column the next keys of a :func:`slot_cache` are written to; None = behind what is there."""
    for layer in cache.layers:
        layer.start = start


def keep_columns(cache: Any, layer: int, index: Tensor, of: int) -> None:
    """Let columns of one layer of a shortened cache go: of the first ``of``, ``index [B, n]`` stay; later ones all do."""
    held = cache.layers[layer]
    there = getattr(held, "held", held.keys.shape[-2])
    rest = torch.arange(of, there, device=index.device).expand(len(index), -1)
    held.keep(torch.cat([index, rest], 1))


def put_mean(cache: Any, layer: int, slot: Tensor, weight: Tensor) -> None:
    """Put the weighted mean of a layer's keys, and of its values, in the place of one of them.

    Args:
        cache: a shortened cache.
        layer: the layer.
        slot: ``[B, 1]`` the place, counted among the columns that are there.
        weight: ``[B, n]`` weights >= 0 of the first n columns; a row without any stays as it is.
    """
    held = cache.layers[layer]
    slot, weight = slot.to(held.keys.device), weight.to(held.keys.device)
    some = (weight.sum(1) > 0)[:, None, None, None]
    share = weight / weight.sum(1, keepdim=True).clamp_min(1)
    for name in ("keys", "values"):
        old = getattr(held, name)
        index = slot[:, None, :, None].expand(-1, old.shape[1], -1, old.shape[3])
        mean = torch.einsum("bn,bgnd->bgd", share, old[..., : weight.shape[1], :].float())[:, :, None].to(old.dtype)
        setattr(held, name, old.scatter(2, index, torch.where(some, mean, old.gather(2, index))))
