"""Looking inside: what a question and each token of an answer look at, which tokens are sinks, what columns are taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from vlm_attn.branch import Decoding
from vlm_attn.call import Call
from vlm_attn.chat import find_question, read_template, tokenizer_of
from vlm_attn.engine import _padding
from vlm_attn.kernels import Group
from vlm_attn.layout import build_layout, check_span, runs
from vlm_attn.method import Method
from vlm_attn.patching import engine_of, is_patched, patched


def saliency(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> list[Tensor]:
    """Where the question makes the model look: one map per image, from a single forward of the prompt.

    Uses the saliency method the model is patched with, or patches it with ``gift`` for the length of the call.

    Args:
        model: a model, patched or not.
        inputs: what the processor returned.
        **options: for a model that is not patched: parameters of :func:`vlm_attn.patch` (``processor=``,
            ``saliency_layers=`` ...).

    Returns:
        For every image in order a float32 tensor ``[h, w]`` in [0, 1] on the CPU; ``[1, n]`` for families without a
        grid.

    Raises:
        ValueError: the model is patched with methods that make no map; whatever :func:`vlm_attn.patch` raises.
    """
    if not is_patched(model):
        if "saliency_layers" in options:  # the map alone needs no layers to enhance
            options.setdefault("enhance_layers", options["saliency_layers"])
        with patched(model, "gift", **options):
            return saliency(model, inputs)
    if options:
        raise ValueError(ALREADY)
    with _prompt_read(model, inputs) as call:
        maps = [memory["saliency"] for m in call.methods if "saliency" in (memory := call.memory(m))]
    if not maps:
        raise ValueError(
            f"the model is patched with {_names(model)!r}, which makes no saliency map: unpatch it, or patch with 'gift'"
        )
    return _on_images(call, maps[0])


def sinks(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> list[Tensor]:
    """Which image tokens are sinks: one map per image, from a single forward of the prompt.

    Uses the ``var`` the model is patched with, or patches it with ``var`` for the length of the call.

    Args:
        model: a model, patched or not.
        inputs: what the processor returned.
        **options: for a model that is not patched: parameters of :func:`vlm_attn.patch` (``sink_dims=``, ``tau=`` ...).

    Returns:
        For every image in order a float32 tensor ``[h, w]`` on the CPU: the share of the edited layers in which the
        token is a sink; ``[1, n]`` for families without a grid.

    Raises:
        ValueError: the model is patched without ``var``; whatever :func:`vlm_attn.patch` raises.
    """
    if not is_patched(model):
        with patched(model, "var", **options):
            return sinks(model, inputs)
    if options:
        raise ValueError(ALREADY)
    method: Any = next((m for m in engine_of(model).methods if m.name == "var"), None)
    if method is None:
        raise ValueError(
            f"the model is patched with {_names(model)!r}, which knows no sinks: unpatch it, or patch with 'var'"
        )
    with _prompt_read(model, inputs) as call:
        found = [call.tokens(method, layer) for layer in method.layers]
    return _on_images(call, torch.stack([flags.float() for flags in found if flags is not None]).mean(0))


class _Bystander(Method):
    """Edits nothing; makes the engine run every row from the last prompt token on by itself, so that it can be watched."""

    name: ClassVar[str] = "gaze"

    def edit(self, call: Call, layer: int) -> None:
        """Nothing."""


class _Follow(LogitsProcessor):
    """Makes a generation repeat given tokens."""

    def __init__(self, tokens: Sequence[int], prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        forced = torch.full_like(scores, -torch.inf)
        forced[:, self.tokens[input_ids.shape[1] - self.prompt]] = 0.0
        return forced


def gaze(model: nn.Module, inputs: Mapping[str, Any], answer: Sequence[int], **options: Any) -> list[Tensor]:
    """Where the model looks while it writes each token of an answer, edits of its methods included.

    The answer is generated once more, token by token, with the attention of every step kept.

    Args:
        model: a model, patched or not.
        inputs: what the processor returned for one prompt.
        answer: the answer's token ids, such as ``generate`` gave them; read up to the first end token.
        **options: for a model that is not patched: ``processor=``, ``query_span=`` (see :func:`vlm_attn.patch`).

    Returns:
        For every image in order a float32 tensor ``[T, h, w]`` on the CPU: the attention, averaged over heads and
        layers, of the row that token ``t`` was read from. It sums to the share of attention that goes to the image.
        ``[T, 1, n]`` for families without a grid.

    Raises:
        ValueError: more than one prompt, no answer; whatever :func:`vlm_attn.patch` raises.
    """
    if not is_patched(model):
        with patched(model, _Bystander(), **options):
            return gaze(model, inputs, answer)
    if options:
        raise ValueError(ALREADY)
    answer = [int(token) for token in answer]
    if not answer or len(inputs["input_ids"]) != 1:
        raise ValueError(
            f"gaze() follows one answer to one prompt, got {len(answer)} tokens, {len(inputs['input_ids'])} prompts"
        )
    engine = engine_of(model)
    seen: dict[int, list[Tensor]] = {}
    calls: list[Call] = []

    def watch(layer: int, attend: Callable[[Tensor], Tensor], value: Tensor, offset: Any) -> None:
        call = engine.call
        assert call is not None
        calls[:] = [call]
        left = call.reduction.layers.get(layer) if call.reduction is not None else None
        if left is None or left.columns is None:
            columns = torch.arange(value.shape[2], device=value.device) + offset
        else:
            columns = left.keys(left.dropped + value.shape[2])[0]
        visual = torch.nn.functional.pad(call.prompt.visual[0], (0, 1))
        keys = visual[columns.clamp_max(call.prompt.length)].nonzero().flatten()
        row = torch.zeros(call.prompt.length, device=value.device)
        # Attention to a key is what comes out where its value is 1 and all others are 0: as many keys at a time as
        # values have numbers, so that every kernel takes them.
        for part in keys.split(value.shape[-1]):
            chosen = torch.zeros_like(value)
            chosen[:, :, part, torch.arange(len(part), device=part.device)] = 1
            row[columns[part]] = attend(chosen)[0, :, -1, : len(part)].float().mean(0)
        seen.setdefault(layer, []).append(row)

    before = engine.methods
    kept = (m for m in before if m.name != "gaze" and not isinstance(m, Decoding))  # the tokens are given
    engine.methods, engine.watch = (*kept, _Bystander()), watch
    try:
        with torch.no_grad():
            model.generate(
                **inputs,
                max_new_tokens=len(answer),
                logits_processor=[_Follow(answer, inputs["input_ids"].shape[1])],
                do_sample=False,
                num_beams=1,
                temperature=None,
                top_p=None,
                top_k=None,
            )  # type: ignore[operator]
    finally:
        engine.methods, engine.watch = before, None
    rows = torch.stack([torch.stack(layer) for layer in seen.values()]).mean(0)
    steps = [_on_images(calls[0], row[None]) for row in rows]
    return [torch.stack(maps) for maps in zip(*steps, strict=True)]


ALREADY = "the model is patched already: options would have no effect"


def _names(model: nn.Module) -> str:
    return "+".join(m.name for m in engine_of(model).methods)


@contextmanager
def _prompt_read(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Call]:
    """Run a prompt through a patched model, neutral methods included; what they read is in the call."""
    engine = engine_of(model)
    was, engine.force = engine.force, True
    try:
        with engine.running(inputs) as call, torch.no_grad():
            model(**{**inputs, "use_cache": True})
            yield call
    finally:
        engine.force = was


def _on_images(call: Call, values: Tensor) -> list[Tensor]:
    """One number per prompt column ``[B, P]`` as one map ``[h, w]`` per image."""
    found = []
    for image in call.prompt.images:
        h, w = image.grid
        first = image.start + image.first
        found.append(values[image.row, first : first + h * w].reshape(h, w).float().cpu())
    return found


@dataclass(frozen=True)
class Explanation:
    """A prompt cut into groups.

    Attributes:
        rows: per row of the batch, ``(group name, start, stop, text)`` with half-open columns.
    """

    rows: tuple[tuple[tuple[str, int, int, str], ...], ...]

    def __str__(self) -> str:
        lines = []
        for number, row in enumerate(self.rows):
            if len(self.rows) > 1:
                lines.append(f"row {number}")
            for name, start, stop, text in row:
                shown = text if len(text) <= 90 else f"{text[:60]} ... {text[-20:]}"
                lines.append(f"  {name:<9} {start:>5}..{stop - 1:<5} {shown!r}")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return str(self)


def explain(processor: Any, inputs: Mapping[str, Any], *, query_span: Any = None) -> Explanation:
    """What the columns of a prompt are taken for: SYSTEM, VISUAL, QUERY, ROLE, PAD.

    Args:
        processor: the model's processor.
        inputs: what it returned for a prompt, or a batch of prompts padded on the left.
        query_span: ``(start, stop)`` of the question in the unpadded prompt, to see what an override does.

    Returns:
        An :class:`Explanation`; ``print`` it.

    Raises:
        ValueError: the processor has no image token; padding on the right.
    """
    ids = torch.as_tensor(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    tokenizer = tokenizer_of(processor)
    image = getattr(processor, "image_token_id", None)
    if image is None and isinstance(getattr(processor, "image_token", None), str):
        image = tokenizer.convert_tokens_to_ids(processor.image_token)
    if image is None:
        raise ValueError(
            f"{type(processor).__name__} names no image token: explain() needs the processor of a vision-language model"
        )
    visual = ids == image
    first = _padding(mask, len(ids))
    template = read_template(processor, (image,))
    query, role = [], []
    for row in range(len(ids)):
        if query_span is not None:
            span, tail = check_span(query_span, row, first[row], ids.shape[1]), 0
            tail = ids.shape[1] - span[1]
        else:
            (start, stop), tail = find_question(
                ids[row, first[row] :].tolist(), visual[row, first[row] :].tolist(), template
            )
            span = (start + first[row], stop + first[row])
        query.append(span)
        role.append(tail)
    group = build_layout(visual, mask, query, role, ()).group
    rows = []
    for row in range(len(ids)):
        parts = []
        for kind in Group:
            for start, stop in runs(group[row] == int(kind)):
                parts.append((kind.name, start, stop, tokenizer.decode(ids[row, start:stop].tolist())))
        rows.append(tuple(sorted(parts, key=lambda part: part[1])))
    return Explanation(rows=tuple(rows))


__all__ = ["Explanation", "explain", "gaze", "saliency", "sinks"]
