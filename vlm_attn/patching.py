# SPDX-License-Identifier: Apache-2.0
"""``patch`` and what undoes it."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, TypeVar

from torch import nn

from vlm_attn import host, presets, registry
from vlm_attn.attention import TAG, Tag
from vlm_attn.branch import Decoding
from vlm_attn.chat import probe, read_template, tokenizer_of
from vlm_attn.engine import Engine, LayerHook
from vlm_attn.families import (
    check_maskable,
    check_reducible,
    cls_attention_module,
    family_of,
    image_token_ids,
    merging_tower,
    projector,
    video_token_ids,
)
from vlm_attn.heads import HeadMethod, check_alone
from vlm_attn.layout import is_span
from vlm_attn.marks import Marks
from vlm_attn.method import Method, ModelFacts
from vlm_attn.reduction import KeptImage, Reducer
from vlm_attn.sharding import check_sharding, heads_of
from vlm_attn.tower import FeatureHook, Merger, VisionHook

LOGGER = logging.getLogger("vlm_attn")
Model = TypeVar("Model", bound=nn.Module)
MethodLike = str | Method | Sequence["str | Method"]
_REFUSED_CALLS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


def patch(
    model: Model,
    method: MethodLike,
    *,
    processor: Any = None,
    preset: str | None = None,
    query_span: Any = None,
    replace: bool = False,
    **parameters: Any,
) -> Model:
    """Edit how a vision-language model attends while it generates. Everything else about the model stays as it is.

    Args:
        model: a Hugging Face image-text-to-text model, also inside ``torch.compile``, ``DistributedDataParallel`` or PEFT:
            what is patched is the model inside.
        method: a registered name (see :func:`vlm_attn.methods`), an instance, or a list of either, applied in order.
        processor: the model's processor; its chat template tells where the question stands and where the template's
            tail begins. Without it, the question is all text after the last image.
        preset: name or path of a preset with constants for this checkpoint; default: the one that fits the model's
            config.
        query_span: the question's columns in the unpadded prompt, ``(start, stop)`` half open, or a callable
            ``(input_ids, attention_mask) -> [(start, stop), ...]``. :func:`spans` overrides it per call.
        replace: replace the methods of a model that is already patched.
        **parameters: parameters of the method; only with a single name.

    Returns:
        The same object.

    Raises:
        ValueError: unknown method, parameter out of range, layer beyond the model, processor of another model,
            already patched.
        TypeError: parameters beside an instance or a list; unknown parameter.
        NotImplementedError: an architecture or attention implementation that cannot be edited.
        Nothing is changed when one of them is raised.

    Examples:
        >>> model = vlm_attn.patch(model, "pai", alpha=0.2)
        >>> tokens = model.generate(**inputs, max_new_tokens=8)
        >>> model = vlm_attn.unpatch(model)

        Several methods at once, the second with parameters of its own:

        >>> from vlm_attn.hallucination import Gift
        >>> model = vlm_attn.patch(model, ["var", Gift(alpha=4.0)], processor=processor)
        >>> model = vlm_attn.unpatch(model)
    """
    if is_patched(model) and not replace:
        names = "+".join(m.name for m in engine_of(model).methods)
        raise ValueError(
            f"the model is already patched with {names!r}: call vlm_attn.unpatch(model) first, or pass replace=True"
        )
    wrapper, model = model, host.inside(model)
    if not isinstance(model, nn.Module) or not hasattr(model, "config"):
        raise TypeError(f"patch() takes a Hugging Face model, got {type(model).__name__}")
    previous = engine_of(model) if is_patched(model) else None
    for config in previous.configs if previous is not None else ():
        config.write_back()  # what others have changed since
    top: Any = _original(previous, model.config)
    text_config = top.get_text_config(decoder=True)
    if previous is None:
        base = host.check_editable(model, text_config)
        text_model, layers, attentions = find_decoder(model, text_config)
    else:
        own = top is not model.config  # else somebody gave it another
        base = previous.base if own else host.check_editable(model, text_config)
        text_model, layers, attentions = find_decoder(model, previous.text_config if own else text_config)
    shards = {index: heads_of(attention) for index, attention in attentions}
    image_token_ids(top)  # refuses a family without
    facts = ModelFacts(
        model_type=top.model_type,
        layers=len(layers),
        heads=text_config.num_attention_heads,
        hidden=text_config.hidden_size,
        causal=host.is_causal(text_config) and not family_of(top).prefix_lm,
        uncovered=tuple(sorted(set(range(len(layers))) - {index for index, _ in attentions})),
        sliding=tuple(index for index, module in attentions if getattr(module, "sliding_window", None) is not None),
        kv_heads=getattr(text_config, "num_key_value_heads", None) or 0,
    )
    methods = resolve(method, parameters, top, facts, preset)
    canvas = host.canvas_decoder(model)
    ahead = next((m.name for m in methods if m.token_by_token), None)
    if canvas is not None and ahead is not None:
        raise NotImplementedError(
            f"{ahead} acts on one token after the other, and {top.model_type} writes all tokens of a canvas at once: choose "
            "a method that edits attention, such as gift"
        )
    check_covered(methods, facts)
    check_maskable(top, methods)
    reducers = [m for m in methods if isinstance(m, Reducer)]
    for reducer in reducers:
        check_reducible(top, reducer)
        check_one_device(model, reducer.name)
    seen = {layer: cls_attention_module(model, top, layer, m.name) for m in methods for layer in m.cls_layers}
    check_sharding(facts.heads, shards, [heads_of(module) for module in seen.values()], host.processes(model))
    merging = [m.name for m in reducers if m.merges and not m.neutral]
    if merging and seen:
        readers = "+".join(m.name for m in methods if m.cls_layers)
        raise ValueError(
            f"{merging[0]} merges the patches that {readers} ranks by the tower's CLS token: choose one of them"
        )
    tower = merging_tower(model, top, merging[0]) if merging else None
    projected = projector(model, top) if any(m.reads_features for m in reducers) else None
    renumbering = next((m.name for m in reducers if m.positions == "packed" and not m.neutral), None)
    if renumbering is not None:
        host.check_rotary(text_model, renumbering)
    if not (query_span is None or callable(query_span) or (is_span(query_span) and 0 <= query_span[0] < query_span[1])):
        raise ValueError(
            f"query_span={query_span!r}: give half-open columns (start, stop) with 0 <= start < stop, or a callable"
        )
    template = None
    if processor is not None:
        check_processor(processor, top, text_config)
        template = read_template(processor)

    host.warn_if_untested()

    # Nothing has been touched up to here; from here on nothing can fail, warnings that are made errors among it.
    if previous is not None:
        unpatch(model)
    engine = Engine(model, text_model, methods, processor=processor, template=template, query_span=query_span)
    engine.base, engine.heads = base, shards
    engine.configs = host.own_configs(model, text_config, base)
    engine.text_config = text_model.config
    tagged = {attention: Tag(engine, index, base) for index, attention in attentions}
    for index, layer in enumerate(canvas.layers if canvas is not None else ()):  # type: ignore[arg-type,union-attr]
        tagged[layer.self_attn] = Tag(engine, index, base, canvas=True)
    for attention, tag in tagged.items():
        setattr(attention, TAG, tag)
    engine.tags = list(tagged.values())
    engine.handles = [
        model.register_forward_pre_hook(engine.before_model, with_kwargs=True),
        model.register_forward_hook(engine.after_model, with_kwargs=True, always_call=True),
        text_model.register_forward_pre_hook(engine.before_text, with_kwargs=True),
        text_model.register_forward_hook(engine.after_text, with_kwargs=True),
    ]
    if canvas is not None:
        engine.handles.append(canvas.register_forward_pre_hook(engine.before_canvas, with_kwargs=True))
    if any(m.read_hidden or isinstance(m, Reducer | HeadMethod) for m in methods):
        engine.handles += [
            layer.register_forward_pre_hook(LayerHook(engine, index), with_kwargs=True)
            for index, layer in enumerate(layers)
        ]
    for layer, module in seen.items():
        engine.handles.append(module.register_forward_pre_hook(VisionHook(engine, layer), with_kwargs=True))
    if tower is not None:
        engine.handles += Merger(engine, *tower).handles
    if renumbering is not None:
        engine.rotary_kinds = host.rotary_kinds(text_model)
    if projected is not None:
        engine.projector = projected[0]
        engine.handles += FeatureHook(engine, *projected).handles
    setattr(model, TAG, engine)
    hooks = {handle.id for handle in engine.handles}
    engine.marks = Marks(model, [text_model, *tagged], (TAG, "config"), hooks)
    engine.shadowed = {name: model.__dict__[name] for name in ("generate", *_REFUSED_CALLS) if name in model.__dict__}
    for name in ("generate", *_REFUSED_CALLS):
        if hasattr(type(model), name):  # a bound method would not pickle
            setattr(model, name, partial(_generate if name == "generate" else _refuse_batching, model, name))
    LOGGER.info("patched %s with %s", type(model).__name__, ", ".join(map(repr, methods)))
    return wrapper


def unpatch(model: Model) -> Model:
    """Undo :func:`patch` exactly: hooks, configs, ``generate``, tags. What others have changed since stays as they left it.

    Raises:
        ValueError: the model is not patched.

    Examples:
        >>> model = vlm_attn.unpatch(vlm_attn.patch(model, "pai"))
        >>> vlm_attn.is_patched(model)
        False
    """
    engine, patched_one = engine_of(model), host.inside(model)
    for handle in engine.handles:
        handle.remove()
    marked = engine.marks.modules.values() if engine.marks is not None else ()  # some may be elsewhere by now
    modules = list(dict.fromkeys([*patched_one.modules(), *(part for module in marked for part in module.modules())]))
    host.restore(modules, engine.configs)
    for module in modules:
        module.__dict__.pop(TAG, None)
    for name in ("generate", *_REFUSED_CALLS):
        if getattr(patched_one.__dict__.get(name), "func", None) in (_generate, _refuse_batching):
            del patched_one.__dict__[name]
            patched_one.__dict__.update({name: engine.shadowed[name]} if name in engine.shadowed else {})
    LOGGER.info("unpatched %s", type(patched_one).__name__)
    return model


@contextmanager
def patched(model: Model, method: MethodLike, **options: Any) -> Iterator[Model]:
    """:func:`patch` for the length of a ``with`` block; undone on leaving, also on an exception.

    Args:
        model: see :func:`patch`.
        method: see :func:`patch`.
        **options: see :func:`patch`; ``replace`` is not allowed.

    Examples:
        >>> with vlm_attn.patched(model, "gift", processor=processor):
        ...     tokens = model.generate(**inputs, max_new_tokens=24)
        >>> vlm_attn.is_patched(model)
        False
    """
    if options.pop("replace", False):
        raise ValueError("patched() cannot replace: leave the other patch first")
    patch(model, method, **options)
    try:
        yield model
    finally:
        if is_patched(model):
            unpatch(model)


@contextmanager
def spans(model: nn.Module, *, query: Any = None, visual: Any = None) -> Iterator[None]:
    """Say where the question (and, for ``inputs_embeds``, the image) stands, for the calls inside the block, from any thread.

    Args:
        model: a patched model.
        query: one half-open ``(start, stop)`` per row, columns of the unpadded prompt.
        visual: one ``(start, stop)`` or list of them per row.

    Raises:
        ValueError: the model is not patched; spans outside the prompt (when the call begins).

    Examples:
        >>> with vlm_attn.patched(model, "gift"), vlm_attn.spans(model, query=(66, 72)):
        ...     tokens = model.generate(**inputs, max_new_tokens=8)
    """
    engine = engine_of(model)
    before, engine.spans = engine.spans, {"query": query, "visual": visual}
    try:
        yield
    finally:
        engine.spans = before


def kept(model: nn.Module) -> tuple[KeptImage, ...]:
    """Which visual tokens the last prompt of a patched model kept, image by image.

    Args:
        model: a patched model that has run a prompt.

    Returns:
        One :class:`~vlm_attn.reduction.KeptImage` per image: the tokens left after every stage, their cells, a mask to draw.

    Raises:
        ValueError: the model is not patched, no method keeps fewer tokens, or nothing has run yet.

    Examples:
        >>> with vlm_attn.patched(model, "divprune", keep=16):
        ...     tokens = model.generate(**inputs, max_new_tokens=8)
        ...     (image,) = vlm_attn.kept(model)
        >>> image.total, len(image.index), image.mask.shape
        (64, 16, torch.Size([8, 8]))
    """
    engine = engine_of(model)
    if not engine.kept:
        names = "+".join(m.name for m in engine.methods)
        why = "no prompt with an image has run yet" if engine.reduces else "no such method is active"
        raise ValueError(f"the model is patched with {names!r}: {why}, so nothing was taken away")
    return engine.kept


def is_patched(model: Any) -> bool:
    """Whether a model is patched.

    Examples:
        >>> with vlm_attn.patched(model, "pai"):
        ...     vlm_attn.is_patched(model)
        True
    """
    return isinstance(getattr(host.inside(model), "__dict__", {}).get(TAG), Engine)


def engine_of(model: Any) -> Engine:
    """The engine of a patched model.

    Raises:
        ValueError: the model is not patched.
    """
    if not is_patched(model):
        raise ValueError(f"this {type(model).__name__} is not patched: call vlm_attn.patch(model, method=...) first")
    return host.inside(model).__dict__[TAG]


def resolve(
    method: MethodLike, parameters: dict[str, Any], config: Any, facts: ModelFacts, preset: str | None
) -> list[Method]:
    """Names and instances to bound methods, with the preset's constants where a field is None.

    Raises:
        ValueError, TypeError: see :func:`patch`.
    """
    several = isinstance(method, Sequence) and not isinstance(method, str)
    items: Sequence[str | Method] = method if several else [method]  # type: ignore[list-item,assignment]
    if not all(isinstance(item, str | Method) for item in items):
        raise TypeError(
            f"a method is a name such as 'gift', an instance such as Gift(alpha=4.0), or a list of them; got {method!r}"
        )
    if not items:
        raise ValueError("no method given: pass a name such as 'gift', an instance, or a list of them")
    if parameters and (several or isinstance(method, Method)):
        raise TypeError(
            f"parameters ({', '.join(parameters)}) go with a single name; "
            "inside a list, give instances: [Gift(alpha=4.0), 'var']"
        )
    if preset is not None:
        presets.fitting(preset, config)
    built = [
        item if isinstance(item, Method) else registry.build(item, **{**_constants(item, config, preset), **parameters})
        for item in items
    ]
    names = [m.name for m in built]
    if len(set(names)) != len(names):
        raise ValueError(f"each method can be applied once, got {'+'.join(names)}")
    bound = [presets.complete(m, config, facts, preset).bind(facts) for m in built]
    decoders = [m.name for m in bound if isinstance(m, Decoding)]
    if len(decoders) > 1:
        raise ValueError(f"{'+'.join(decoders)}: each of them decides what the next token is chosen from; choose one")
    alone = next((m.name for m in bound if isinstance(m, Decoding) and m.alone), None)
    if alone is not None and len(bound) > 1:
        others = "+".join(m.name for m in bound if m.name != alone)
        raise ValueError(f"{alone} goes by the attention of the plain model, which {others} changes; choose one")
    check_alone(bound)
    masks = [m.name for m in bound if m.mask is not None]
    if len(masks) > 1:
        raise ValueError(f"{'+'.join(masks)}: each of them sets the attention mask of the prompt; choose one")
    if masks and not facts.causal:
        raise NotImplementedError(
            f"{masks[0]}: {facts.model_type} is no plain causal decoder (sliding windows, or prompt rows that see later ones), "
            "so its mask cannot be replaced"
        )
    return bound


def _constants(name: str, config: Any, preset: str | None) -> dict[str, Any]:
    registry.method_class(name)  # an unknown name is the first thing to say
    return presets.constants(name, config, preset)


def find_decoder(
    model: nn.Module, text_config: Any
) -> tuple[nn.Module, Sequence[nn.Module], list[tuple[int, nn.Module]]]:
    """The text model, its decoder layers and the attention module of each layer that has one.

    Raises:
        NotImplementedError: names what is missing for this family.
    """
    config: Any = model.config
    kind = getattr(config, "model_type", type(model).__name__)
    if text_config.is_encoder_decoder or config.is_encoder_decoder:
        raise NotImplementedError(
            f"{kind}: an encoder-decoder model; its image is read by the encoder, so no generated row attends to image "
            "tokens directly"
        )
    text_model = next(
        (
            m
            for m in model.modules()
            if getattr(m, "config", None) is text_config and isinstance(getattr(m, "layers", None), nn.ModuleList)
        ),
        None,
    )
    if text_model is None:
        raise NotImplementedError(f"{kind}: no text model with decoder layers was found under this model")
    layers = list(text_model.layers)  # type: ignore[arg-type]
    if any(hasattr(layer, name) for layer in layers for name in ("cross_attn", "encoder_attn")):
        raise NotImplementedError(
            f"{kind}: its decoder looks at the image through cross-attention layers; the prompt holds no image tokens whose "
            "attention could be edited"
        )
    attentions = [
        (index, module)
        for index, layer in enumerate(layers)
        if (module := getattr(layer, "self_attn", None)) is not None
    ]
    if not attentions:
        raise NotImplementedError(f"{kind}: its decoder layers have no self_attn module to edit")
    return text_model, layers, attentions


def check_covered(methods: Sequence[Method], facts: ModelFacts) -> None:
    """Say which layers have no attention; refuse to read attention there.

    Raises:
        ValueError: a method reads attention of such a layer.
    """
    if not facts.uncovered:
        return
    listed = ", ".join(map(str, facts.uncovered))
    for method in methods:
        if set(method.read_layers) & set(facts.uncovered):
            raise ValueError(
                f"{method.name} reads the attention of layers {method.read_layers}, but layers {listed} of "
                f"{facts.model_type} have none (linear attention or convolution): choose others of 0..{facts.layers - 1}"
            )
    warnings.warn(
        f"layers {listed} of {facts.model_type} have no attention that could be edited (linear attention or convolution): "
        "they cannot be edited and stay as they are",
        UserWarning,
        stacklevel=3,
    )


def check_one_device(model: Any, method: str) -> None:
    """Refuse to take visual tokens from a model whose layers are spread over accelerators.

    Raises:
        NotImplementedError: names the devices.
    """
    placed = getattr(model, "hf_device_map", None) or {}
    devices = sorted({str(device) for device in placed.values()} - {"cpu", "disk", "meta"})
    if len(devices) > 1:
        raise NotImplementedError(
            f"{method} takes visual tokens out of the sequence, which cannot be done across devices ({', '.join(devices)}): "
            'load the model onto one, for example device_map={"": 0}'
        )


def check_processor(processor: Any, config: Any, text_config: Any) -> None:
    """Refuse the processor of another model.

    Raises:
        ValueError: its image token or vocabulary is not the model's.
    """
    tokenizer = tokenizer_of(processor)
    expected = (*image_token_ids(config), *video_token_ids(config))
    asked = probe(processor)
    own = [
        *asked.visual,
        *([] if asked.media else asked.named),
    ]  # a processor that cannot be asked may mean its placeholder
    if own and not set(own) & set(expected):
        token = tokenizer.convert_ids_to_tokens(own[0])
        raise ValueError(
            f"this processor belongs to another model: its image token {token!r} has id {own[0]}, "
            f"the model expects {expected[0]}"
        )
    size, room = len(tokenizer), text_config.vocab_size
    if size > room and max(expected) < room:
        raise ValueError(f"this processor belongs to another model: it has {size} tokens, the model {room}")


def _original(engine: Engine | None, config: Any) -> Any:
    """The config that a patched model's own was copied from; any other as it is."""
    configs = engine.configs if engine is not None else ()
    return next((own.original for own in configs if own.copy is config), config)


def _generate(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    """``generate`` of the model's class, with the method applied (see ``vlm_attn.patch``)."""
    if not is_patched(self):  # somebody's wrapper still has it
        return getattr(type(self), name)(self, *args, **kwargs)
    return engine_of(self).generate(self, args, kwargs)


def _refuse_batching(self: Any, name: str, *args: Any, **kwargs: Any) -> Any:
    if not is_patched(self):
        return getattr(type(self), name)(self, *args, **kwargs)
    raise NotImplementedError(
        "continuous batching hides which keys belong to which prompt, so attention cannot be edited there: "
        "use model.generate with a padded batch, or unpatch the model"
    )
