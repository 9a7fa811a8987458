"""Looking inside: the saliency map of a question, and what a prompt's columns are taken for."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn.chat import find_question, read_template, tokenizer_of
from vlm_attn.engine import _padding
from vlm_attn.kernels import Group
from vlm_attn.layout import build_layout, check_span, runs
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
        raise ValueError("the model is patched already: options would have no effect")
    engine = engine_of(model)
    was, engine.force = engine.force, True
    try:
        with engine.running(inputs) as call, torch.no_grad():
            model(**{**inputs, "use_cache": True})
            maps = [memory["saliency"] for m in engine.methods if "saliency" in (memory := call.memory(m))]
    finally:
        engine.force = was
    if not maps:
        names = "+".join(m.name for m in engine.methods)
        raise ValueError(
            f"the model is patched with {names!r}, which makes no saliency map: unpatch it, or patch with 'gift'"
        )
    found = []
    for image in call.prompt.images:
        h, w = image.grid
        first = image.start + image.first
        found.append(maps[0][image.row, first : first + h * w].reshape(h, w).float().cpu())
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


__all__ = ["Explanation", "explain", "saliency"]
