# SPDX-License-Identifier: Apache-2.0
"""Looking inside: what a question and each token of an answer look at, which tokens are sinks, what columns are taken for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn
from transformers import LogitsProcessor

from vlm_attn import host, presets
from vlm_attn.attention import ROWS_AT_ONCE
from vlm_attn.branch import Decoding, Run, look
from vlm_attn.call import Call
from vlm_attn.chat import read_template, tokenizer_of, visual_ids
from vlm_attn.detectors import CANDIDATES, ByDimension, ByDirection, SinkDetector, layer_states
from vlm_attn.kernels import Group
from vlm_attn.layout import build_layout, check_span, padding, runs, visual_columns
from vlm_attn.method import Method
from vlm_attn.patching import engine_of, is_patched, patched
from vlm_attn.question import find_questions


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

    Examples:
        >>> (map,) = vlm_attn.saliency(model, inputs, processor=processor)
        >>> map.shape, map.dtype
        (torch.Size([8, 8]), torch.float32)
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

    Examples:
        >>> (map,) = vlm_attn.sinks(model, inputs)
        >>> map.shape
        torch.Size([8, 8])
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
        found = [method.sinks(call, layer) for layer in method.layers]
    return _on_images(call, torch.stack([flags.float() for flags in found if flags is not None]).mean(0))


@dataclass(frozen=True)
class Sink:
    """One sink of a prompt.

    Attributes:
        column: its column, padding counted.
        group: what stands there: SYSTEM, VISUAL, QUERY or ROLE.
        kind: ``"primary"``, a sink nearly as long as the first token; ``"secondary"``, made later or gone earlier; ``"brief"``,
            for so few layers that it may be noise.
        layers: in whose input it is a sink, ascending.
        score: attention it gets from a later row, mean of these rows, the heads and its layers.
    """

    column: int
    group: str
    kind: Literal["primary", "secondary", "brief"]
    layers: tuple[int, ...]
    score: float

    @property
    def creation(self) -> int:
        """The first layer in whose input it is a sink: the layer before it made it."""
        return self.layers[0]

    @property
    def lifetime(self) -> int:
        """In how many layers it is a sink."""
        return len(self.layers)


@dataclass(frozen=True)
class RowSinks:
    """The sinks of one row of a batch.

    Attributes:
        band: layers ``(start, stop)``, half open, in which anything is a sink; ``(0, 0)`` where nothing is.
        sinks: in order of their columns.
    """

    band: tuple[int, int]
    sinks: tuple[Sink, ...]

    def at(self, layer: int) -> tuple[int, ...]:
        """Columns of the sinks of a layer."""
        return tuple(sink.column for sink in self.sinks if layer in sink.layers)


def find_sinks(
    model: nn.Module,
    inputs: Mapping[str, Any],
    by: Literal["dimension", "direction"] = "dimension",
    *,
    sink_dims: Sequence[int] | None = None,
    tau: float = 20.0,
    cosine: float = 0.9,
    primary: float = 0.6,
    brief: float = 0.1,
    **options: Any,
) -> tuple[RowSinks, ...]:
    """Which tokens of a prompt are attention sinks of the plain model, from which layer on and for how long.

    Args:
        model: a model, patched or not.
        inputs: what the processor returned.
        by: ``"dimension"``: one of ``sink_dims`` of a layer's input exceeds ``tau`` times the token's RMS (VAR, arXiv
            2503.03321); ``"direction"``: the cosine with the first token's state is above ``cosine``, either way, between the
            layers where that token's norm rises and falls most (arXiv 2512.22213), which needs no constants of the model.
        sink_dims: the dimensions; None = from the preset.
        tau: see ``by``.
        cosine: see ``by``.
        primary: a sink is primary if it lives for at least this share of the band, or is the first token.
        brief: a sink is brief if it lives for at most this share of the model's layers (4 of 40).
        **options: for a model that is not patched: ``processor=``, ``query_span=``, ``preset=`` (see :func:`vlm_attn.patch`).

    Returns:
        One :class:`RowSinks` per row of the batch.

    Raises:
        ValueError: unknown ``by``, no sink dimensions, a dimension the model does not have; whatever :func:`vlm_attn.patch`
            raises.

    What is ours: the second paper counts absolute layers (primary from ``L - 15`` on, noise up to 4), which says nothing about
    models of another depth, so shares stand here. It was measured on language models, not on visual tokens. It names no formula
    for a sink's score: ``Sink.score`` is our reading.

    Examples:
        >>> (row,) = vlm_attn.find_sinks(model, inputs, by="direction")
        >>> sink = row.sinks[0]
        >>> sink.column, sink.group, sink.kind, sink.layers
        (1, 'SYSTEM', 'primary', (1, 2, 3, 4))
    """
    if by not in ("dimension", "direction"):
        raise ValueError(f'by={by!r} is neither "dimension" nor "direction"')
    if not is_patched(model):
        with patched(model, _Bystander(), **options):
            preset = options.get("preset")
            given = {"sink_dims": sink_dims, "tau": tau, "cosine": cosine, "primary": primary, "brief": brief}
            if by == "dimension" and sink_dims is None and preset is not None:
                given["sink_dims"] = presets.constants("var", engine_of(model).model_config, preset).get("sink_dims")
            return find_sinks(model, inputs, by, **given)  # type: ignore[arg-type]
    if options:
        raise ValueError(ALREADY)
    engine = engine_of(model)
    detector: SinkDetector = ByDirection(cosine)
    if by == "dimension":
        dims = sink_dims or presets.constants("var", engine.model_config, None).get("sink_dims")
        config: Any = engine.text_config
        hidden = config.hidden_size
        if not dims or not all(0 <= dim < hidden for dim in dims):
            raise ValueError(
                f"sink_dims={sink_dims}: the dimensions in which sinks are massive are needed, of 0..{hidden - 1}. Pass them, "
                "name a preset= that has them (`vlm-attn calibrate` measures one), or use by='direction', which needs none"
            )
        detector = ByDimension(tuple(dims), tau)
    layers: Any = engine.text_model.layers
    got: list[Tensor] = []  # of every layer with attention [B, P], from its later rows
    with engine.observed(lambda _: [_Bystander()]), engine.running(inputs) as call:
        run, group, first = Run(engine, host.inside(model), call, inputs), call.prompt.group, call.prompt.first
        numbers: list[int] = []

        def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
            numbers.append(layer)
            got.append(_received(attend, group != Group.PAD))
            return out

        states = layer_states(layers, detector, first, lambda: look(run, run.inputs, tap))
        flags = detector.find(states, first)[: len(layers)].cpu()
    scores = dict(zip(numbers, got, strict=True))
    found = []
    for row in range(len(group)):
        alive = flags[:, row].any(1).nonzero().flatten().tolist()
        span = (alive[0], alive[-1] + 1) if alive else (0, 0)
        sinks: list[Sink] = []
        for column in flags[:, row].any(0).nonzero().flatten().tolist():
            lives = tuple(flags[:, row, column].nonzero().flatten().tolist())
            leads = not sinks and column - int(first[row]) < CANDIDATES
            long = len(lives) >= primary * (span[1] - span[0])
            kind: Any = "primary" if leads or long else "brief" if len(lives) <= brief * len(layers) else "secondary"
            seen = [float(scores[layer][row, column]) for layer in lives if layer in scores]
            name = Group(int(group[row, column])).name
            sinks.append(Sink(column, name, kind, lives, sum(seen) / max(1, len(seen))))
        found.append(RowSinks(span, tuple(sinks)))
    return tuple(found)


def _received(attend: Callable[..., Tensor], shown: Tensor) -> Tensor:
    """``[B, P]`` attention of every token from the rows behind it, mean of rows and heads."""
    length, total = shown.shape[1], torch.zeros_like(shown, dtype=torch.float32)
    for start in range(0, length, ROWS_AT_ONCE):
        rows = torch.arange(start, min(start + ROWS_AT_ONCE, length), device=shown.device)
        behind = (rows[:, None] > torch.arange(length, device=shown.device)) & shown[:, rows, None]  # [B, R, P]
        attention = attend(slice(start, start + ROWS_AT_ONCE))[..., :length]
        total += (attention.mean(1) * behind).sum(1)
    return total / torch.arange(length - 1, -1, -1, device=shown.device).clamp_min(1)


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
        NotImplementedError: a model that denoises a canvas (DiffusionGemma).

    Examples:
        >>> tokens = model.generate(**inputs, max_new_tokens=24)
        >>> answer = tokens[0, inputs["input_ids"].shape[1] :]
        >>> (maps,) = vlm_attn.gaze(model, inputs, answer)
        >>> len(maps) == len(answer), maps[0].shape
        (True, torch.Size([8, 8]))
    """
    if host.canvas_decoder(model) is not None:
        raise NotImplementedError(
            f"gaze() follows an answer token by token, and {type(model).__name__} writes all tokens of a canvas at once"
        )
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
    with _watched(engine_of(model)) as (seen, calls), torch.no_grad():
        host.inside(model).generate(
            **inputs,
            max_new_tokens=len(answer),
            logits_processor=[_Follow(answer, inputs["input_ids"].shape[1])],
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
        )
    rows = torch.stack([torch.stack([step[-1] for step in layer]) for layer in seen.values()]).mean(0)
    return _per_position(calls[0], rows)


def canvas_gaze(
    model: nn.Module, inputs: Mapping[str, Any], denoise: Callable[[], Iterable[Any]], **options: Any
) -> list[Tensor]:
    """Where a masked-diffusion model looks in the step that writes each position of its answer, edits included.

    The answer is denoised once more with the attention of every step kept.

    Args:
        model: a model, patched or not.
        inputs: what the processor returned for one prompt.
        denoise: gives the canvases of the answer, such as ``lambda: diffusion.stream(model, inputs, steps=16, cache="prefix")``
            of :mod:`vlm_attn.diffusion`.
        **options: for a model that is not patched, as :func:`gaze` takes them.

    Returns:
        For every image in order a float32 tensor ``[L, h, w]`` as :func:`gaze` gives it, for the L positions of the canvas;
        zeros where none was written (behind the end).

    Raises:
        ValueError: more than one prompt; whatever :func:`vlm_attn.patch` and ``denoise`` raise.
        NotImplementedError: a model whose logits stand one to the left of their positions.

    Examples:
        >>> from vlm_attn import diffusion
        >>> answer = lambda: diffusion.stream(denoiser, inputs, steps=4, gen_length=8, cache="prefix")
        >>> (maps,) = vlm_attn.canvas_gaze(denoiser, inputs, answer)
        >>> maps.shape
        torch.Size([8, 8, 8])
    """
    if not is_patched(model):
        with patched(model, _Bystander(), **options):
            return canvas_gaze(model, inputs, denoise)
    if options:
        raise ValueError(ALREADY)
    if len(inputs["input_ids"]) != 1:
        raise ValueError(f"canvas_gaze() follows one answer to one prompt, got {len(inputs['input_ids'])} prompts")
    if getattr(host.inside(model).config, "logit_shift", False):
        raise NotImplementedError("canvas_gaze() does not follow models whose logits are shifted by one (logit_shift)")
    with _watched(engine_of(model)) as (seen, calls):
        rows = torch.zeros(0, 0)
        for canvas in denoise():
            length = canvas.tokens.shape[1]
            if not len(rows):
                rows = torch.zeros(length, calls[0].prompt.length, device=canvas.tokens.device)
            if seen:  # the last canvas may only say where rows were closed
                now = torch.stack([layer[-1][-length:] for layer in seen.values()]).mean(0)
                rows = torch.where(canvas.written[0, :, None], now, rows)
            seen.clear()
    return _per_position(calls[0], rows)


@contextmanager
def _watched(engine: Any) -> Iterator[tuple[dict[int, list[Tensor]], list[Call]]]:
    """Inside, how the edited rows of every forward attend to the prompt: per layer and forward ``[Q, P]``, the mean over heads;
    and the call they belong to."""
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
        parts = []
        # Attention to a key is what comes out where its value is 1 and all others are 0: as many keys at a time as
        # values have numbers, so that every kernel takes them.
        for part in keys.split(value.shape[-1]):
            chosen = torch.zeros_like(value)
            chosen[:, :, part, torch.arange(len(part), device=part.device)] = 1
            parts.append(attend(chosen)[0, :, :, : len(part)].float().mean(0))
        among = torch.cat(parts, 1)
        rows = torch.zeros(len(among), call.prompt.length, device=value.device)
        rows[:, columns[keys]] = among
        seen.setdefault(layer, []).append(rows)

    def looked_at(methods: Sequence[Method]) -> list[Method]:
        return [
            *(m for m in methods if m.name != "gaze" and not isinstance(m, Decoding)),
            _Bystander(),
        ]  # tokens are given

    with engine.observed(looked_at, watch=watch):
        yield seen, calls


def _per_position(call: Call, rows: Tensor) -> list[Tensor]:
    """Rows ``[T, P]`` of one prompt as maps ``[T, h, w]`` per image."""
    steps = [_on_images(call, row[None]) for row in rows]
    return [torch.stack(maps) for maps in zip(*steps, strict=True)]


ALREADY = "the model is patched already: options would have no effect"


def _names(model: nn.Module) -> str:
    return "+".join(m.name for m in engine_of(model).methods)


@contextmanager
def _prompt_read(model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[Call]:
    """Run a prompt through a patched model, neutral methods included; what they read is in the call."""
    engine = engine_of(model)
    with engine.observed(force=True), engine.running(inputs) as call, torch.no_grad():
        engine.rehearse(Run(engine, host.inside(model), call, inputs))
        host.prompt_reader(model)(**{**inputs, "use_cache": True})
        yield call


def _on_images(call: Call, values: Tensor) -> list[Tensor]:
    """One number per prompt column ``[B, P]`` as one map ``[h, w]`` per image."""
    found = []
    for image in call.prompt.images:
        columns = image.cell_columns.to(values.device)
        found.append(values[image.row, columns].reshape(image.grid).float().cpu())
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
        ValueError: the processor has no image token; padding on the right; the prompt is not one of its template's, or can be
            read in two ways.

    Examples:
        >>> print(vlm_attn.explain(processor, inputs))  # doctest: +ELLIPSIS
          SYSTEM        0..1     '<s> user:'
          VISUAL        2..65    '<image> <image> ... <image>'
          QUERY        66..72    'please describe this image in detail.'
          ROLE         73..73    'assistant:'
    """
    ids = torch.as_tensor(inputs["input_ids"])
    mask = inputs.get("attention_mask")
    tokenizer = tokenizer_of(processor)
    visual = visual_columns(ids, visual_ids(processor))
    first = padding(mask, len(ids))
    if query_span is None:
        query, role = find_questions(ids, visual, first, read_template(processor))
    else:
        query = [check_span(query_span, row, first[row], ids.shape[1]) for row in range(len(ids))]
        role = [ids.shape[1] - stop for _, stop in query]
    group = build_layout(visual, mask, query, role, ()).group
    rows = []
    for row in range(len(ids)):
        parts = []
        for kind in Group:
            for start, stop in runs(group[row] == int(kind)):
                parts.append((kind.name, start, stop, tokenizer.decode(ids[row, start:stop].tolist())))
        rows.append(tuple(sorted(parts, key=lambda part: part[1])))
    return Explanation(rows=tuple(rows))


__all__ = ["Explanation", "RowSinks", "Sink", "canvas_gaze", "explain", "find_sinks", "gaze", "saliency", "sinks"]
