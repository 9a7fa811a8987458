# SPDX-License-Identifier: Apache-2.0
"""Block-wise denoising of masked answers: LLaDA's loop (arXiv 2502.09992) over a stock LLaVA-style model.

The answer starts as ``gen_length`` mask tokens behind the prompt. Block after block, step after step, the model reads the
whole canvas; the surest open positions of the block get their token, the others stay masked. A token once written stays.

The model is made bidirectional by the mask it is called with; nothing in it is changed. ``attention`` says who sees whom:
a name of ``vlm_attn.kernels.masks``, to which "the answer sees all of itself" is added. ``full`` is LLaDA(-V),
``prefix_diffusion`` LaViDa (the prompt sees the prompt), ``causal`` a prompt read as by an ordinary decoder.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn import host
from vlm_attn.branch import Run
from vlm_attn.diffusion import sampling
from vlm_attn.diffusion.streams import DelayedStream, Stream, Work, image_ids
from vlm_attn.families import family_of
from vlm_attn.kernels import Group, masks
from vlm_attn.patching import engine_of, find_decoder, is_patched

#: What is kept between steps, and what that changes.
CACHES = {
    "none": "every step runs prompt and answer: the reference",
    "prefix": "the prompt runs once, every step the whole answer (LaViDa); exact where the prompt does not see the answer",
    "block": "the first step of a block runs everything, the others the block and what follows (Fast-dLLM's prefix cache); "
    "approximate: earlier blocks and the prompt stay as the first step saw them",
    "dual": "like block, the others run the block alone (Fast-dLLM's dual cache); approximate: later blocks stay too. With a "
    "single block and a prompt that does not see the answer, block and dual are exact",
    "delayed": "prompt and answer are refreshed every few steps, between them only the answer tokens whose values moved most "
    "(dLLM-Cache); exact with answer_every=1 where the prompt does not see the answer, or with prompt_every=1 as well",
}


@dataclass(frozen=True)
class Settings:
    """What :func:`generate` takes beside model and inputs; see there."""

    steps: int = 32
    gen_length: int = 32
    block_length: int | None = None
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    schedule: str | float = "linear"
    seed: int = 0
    attention: str | None = None
    cache: str = "none"
    threshold: float | None = None
    prompt_every: int = 25
    answer_every: int = 7
    refresh: float = 0.25
    logit_shift: bool | None = None
    mask_id: int | None = None
    eos_id: int | None = None
    suppress: tuple[int, ...] = ()
    stop: tuple[tuple[int, ...], ...] = ()
    unconditional: Any = None


@dataclass(frozen=True)
class Canvas:
    """The answer after a step.

    Attributes:
        tokens: ``[B, gen_length]`` ids; the mask id where nothing is written yet.
        written: ``[B, gen_length]`` bool, what this step wrote.
        confidence: ``[B, gen_length]`` float64 score of the written tokens, NaN elsewhere.
        block: index of the block.
        step: number of steps done, this one included.
        forwards: forwards of the model so far.
        work: what each forward ran, for counting FLOPs.
    """

    tokens: Tensor
    written: Tensor
    confidence: Tensor
    block: int
    step: int
    forwards: int
    work: tuple[Work, ...] = field(default=(), repr=False)


@dataclass(frozen=True)
class Output:
    """A finished answer.

    Attributes:
        tokens: ``[B, gen_length]``; the end token in positions behind a stop that were never filled.
        answers: per row the ids before the first end token or stop sequence.
        steps: denoising steps.
        forwards: forwards of the model.
        work: see :class:`Canvas`.
    """

    tokens: Tensor
    answers: list[list[int]]
    steps: int
    forwards: int
    work: tuple[Work, ...] = field(default=(), repr=False)


def generate(
    model: nn.Module,
    inputs: Mapping[str, Any],
    *,
    on_step: Callable[[Canvas], None] | None = None,
    **options: Any,
) -> Output:
    """Write answers with a masked-diffusion vision-language model.

    Args:
        model: a LLaVA-style Hugging Face model, patched or not. A model that was not trained to denoise gives noise.
        inputs: what its processor made of the prompts, padded on the left.
        on_step: is shown every step's :class:`Canvas`.
        **options: fields of :class:`Settings`:

            steps: denoising steps over all blocks; a multiple of their number. Ignored with ``threshold``.
            gen_length: positions of the answer.
            block_length: divides ``gen_length``; blocks are filled from left to right. Default: one block.
            temperature: of the Gumbel noise on the logits; 0 = argmax.
            cfg_scale: w of ``u + (w + 1)(l - u)`` with the unconditional logits u.
            remasking: what "sure" means: low_confidence, random, entropy, margin.
            schedule: "linear", "dream", or LaViDa's shift as a number.
            seed: of all noise; equal seeds give equal answers for the same batch.
            attention: see the module; default: the model's ``trained_mask``, else ``full``.
            cache: one of ``CACHES``.
            threshold: parallel decoding: a step writes every position of at least this probability, one at least, and
                a block ends when it is full.
            prompt_every, answer_every, refresh: of ``cache="delayed"``: steps between refreshes, and the share of answer
                tokens recomputed in between.
            logit_shift: the logits of a position stand one to its left (Dream and other models made from next-token
                ones). Default: the config's ``logit_shift``, else False.
            mask_id: default: the config's ``mask_token_id``.
            eos_id: end token; default: the model's. A row that has one in a finished block is not filled further.
            suppress: ids never written. The mask token never is (LLaDA's own loop may "write" a mask).
            stop: token sequences; what follows the earliest is never filled.
            unconditional: for ``cfg_scale``: "mask" = the prompt replaced by mask tokens (LLaDA), or the processor's
                output for other prompts, one a row.

    Returns:
        The answers.

    Raises:
        ValueError: see :func:`stream`. Before anything runs.

    Examples:
        >>> out = vlm_attn.diffusion.generate(denoiser, inputs, steps=8, gen_length=16, cache="prefix")
        >>> out.tokens.shape, len(out.answers)
        (torch.Size([1, 16]), 1)
    """
    last = None
    for last in stream(model, inputs, **options):
        if on_step is not None:
            on_step(last)
    assert last is not None
    settings = resolve(model, inputs, Settings(**options))
    stops = [*settings.stop, (settings.eos_id,)] if settings.eos_id is not None else list(settings.stop)
    answers = []
    for row in last.tokens.tolist():
        ends = [place for stop in stops if (place := _find(row, stop)) is not None]
        answers.append(row[: min(ends, default=len(row))])
    return Output(last.tokens, answers, last.step, last.forwards, last.work)


def stream(model: nn.Module, inputs: Mapping[str, Any], **options: Any) -> Iterator[Canvas]:
    """Like :func:`generate`, one :class:`Canvas` a step, as soon as the step is done.

    ``canvas.tokens [B, gen_length]`` is what stands there now, ``canvas.written [B, gen_length]`` which positions this very
    step fixed (each is fixed once), ``canvas.confidence`` how sure the model was of them. Positions behind an end token or a
    stop sequence are closed without being written. To know of every position the step that fixed it, 0 for closed ones::

        order = torch.zeros(batch, gen_length, dtype=torch.long)
        for canvas in stream(model, inputs):
            order[canvas.written] = canvas.step

    Raises:
        ValueError: an option out of range, lengths that do not divide, a mask token that is missing or a real token, a
            model that writes token after token, guidance without an unconditional prompt, a cache the model cannot use.
        TypeError: an unknown option.
        NotImplementedError: a model whose attention cannot be made bidirectional by a mask.

    Examples:
        >>> canvases = vlm_attn.diffusion.stream(denoiser, inputs, steps=4, gen_length=8, cache="prefix")
        >>> [canvas.step for canvas in canvases]
        [1, 2, 3, 4]
    """
    settings = resolve(model, inputs, Settings(**options))
    return _run(model, inputs, settings)


@torch.no_grad()
def _run(model: Any, inputs: Mapping[str, Any], settings: Settings) -> Iterator[Canvas]:
    ids = inputs["input_ids"]
    device, batch, length = ids.device, len(ids), settings.gen_length
    size = settings.block_length or length
    blocks, mask_id = length // size, settings.mask_id
    assert mask_id is not None
    per_block = size if settings.threshold is not None else settings.steps // blocks
    generator = torch.Generator(device).manual_seed(settings.seed)
    tokens = torch.full((batch, length), mask_id, device=device)
    banned = [*settings.suppress, mask_id]
    done = torch.zeros(batch, dtype=torch.bool, device=device)
    step, total, late = 0, per_block * blocks, False
    with ExitStack() as stack:
        streams = [_stream(stack, model, inputs, settings)]
        if settings.cfg_scale:
            streams.append(_stream(None, model, _unconditional(inputs, settings), settings))
        for block in range(blocks):
            part = slice(block * size, (block + 1) * size)
            wanted = sampling.counts((tokens[:, part] == mask_id).sum(1), per_block, settings.schedule)
            for i in range(per_block):
                if not (tokens[:, part] == mask_id).any():
                    break
                every = [s.logits(tokens, block, i, step / total)[:, part].double() for s in streams]
                logits = every[0]
                if settings.cfg_scale:
                    logits = every[1] + (settings.cfg_scale + 1) * (logits - every[1])
                logits[..., banned] = -torch.inf
                new = sampling.propose(logits, settings.temperature, generator)
                score = sampling.confidence(logits, new, settings.remasking, generator)
                open_ = tokens[:, part] == mask_id
                chosen = sampling.pick(score, open_, wanted[:, i], settings.threshold)
                tokens = tokens.clone()
                tokens[:, part] = torch.where(chosen, new, tokens[:, part])
                written = torch.zeros_like(tokens, dtype=torch.bool)
                written[:, part] = chosen
                surety = torch.full(tokens.shape, torch.nan, dtype=torch.float64, device=device)
                surety[:, part] = score.where(chosen, torch.nan)
                _stop(tokens, settings)
                step += 1
                work = tuple(w for s in streams for w in s.work)
                late = False
                yield Canvas(tokens, written, surety, block, step, len(work), work)
            if settings.eos_id is not None:
                done = done | (tokens[:, part] == settings.eos_id).any(1)
                closed = torch.where(done[:, None] & (tokens == mask_id), settings.eos_id, tokens)
                late = late or not closed.equal(tokens)
                tokens = closed
                if done.all():
                    break
        if late:  # rows were closed after the last step
            work = tuple(w for s in streams for w in s.work)
            nothing = torch.zeros_like(tokens, dtype=torch.bool)
            yield Canvas(tokens, nothing, nothing.double() * torch.nan, block, step, len(work), work)


def _stop(tokens: Tensor, settings: Settings) -> None:
    """Close what follows the earliest stop sequence of a row."""
    for row in range(len(tokens)) if settings.stop else ():
        ids = tokens[row].tolist()
        found = [p + len(stop) for stop in settings.stop if (p := _find(ids, stop)) is not None]
        if found:
            rest = tokens[row, min(found) :]
            rest.masked_fill_(rest.eq(settings.mask_id or 0), settings.eos_id or 0)


def _find(row: Sequence[int], part: Sequence[int]) -> int | None:
    return next((i for i in range(len(row) - len(part) + 1) if tuple(row[i : i + len(part)]) == tuple(part)), None)


def _unconditional(inputs: Mapping[str, Any], settings: Settings) -> dict[str, Any]:
    if settings.unconditional != "mask":
        return dict(settings.unconditional)
    ids = inputs["input_ids"].new_full(inputs["input_ids"].shape, settings.mask_id or 0)
    return {"input_ids": ids, "attention_mask": inputs.get("attention_mask")}


def _stream(stack: ExitStack | None, model: Any, inputs: Mapping[str, Any], settings: Settings) -> Stream:
    """The forwards of one prompt; inside a patched model's call unless ``stack`` is None."""
    engine = engine_of(model) if is_patched(model) else None
    call = (
        stack.enter_context(engine.running(inputs, canvas=True))
        if stack is not None and engine and engine.active
        else None
    )
    mask = engine.mask if engine is not None and engine.mask is not None else masks.named(settings.attention or "full")
    mask = mask | masks.pairs([Group.GENERATED], [Group.GENERATED])
    if engine is not None and call is not None:
        engine.rehearse(Run(engine, model, call, inputs, mask))
    made = DelayedStream if settings.cache == "delayed" else Stream
    return made(model, dict(inputs), mask, settings, engine, call)


# Wrong input


def resolve(model: Any, inputs: Mapping[str, Any] | None, settings: Settings) -> Settings:
    """Fill in what the model knows, and refuse what cannot work.

    Args:
        model: the model.
        inputs: the prompts; None where they are not known yet.
        settings: the options.

    Raises:
        ValueError, NotImplementedError: see :func:`stream`.
    """
    s, config = settings, model.config
    text = config.get_text_config(decoder=True)
    _check_numbers(s)
    for name, known in (("remasking", sampling.REMASKING), ("cache", CACHES)):
        if getattr(s, name) not in known:
            raise ValueError(f"{name}={getattr(s, name)!r}: there are {', '.join(known)}")
    ids = inputs.get("input_ids") if inputs is not None else torch.empty(1, 0, dtype=torch.long)
    if not isinstance(ids, Tensor) or ids.ndim != 2:
        raise ValueError("inputs must hold input_ids [B, P]: pass what the processor returns")
    given = getattr(config, "mask_token_id", None)
    if s.mask_id is None and given is None:
        raise ValueError(
            f"{type(model).__name__}: its config names no mask_token_id, so this looks like a model that writes token after "
            "token: use model.generate, or pass mask_id= if it was trained as a masked-diffusion model"
        )
    mask_id: Any = given if s.mask_id is None else s.mask_id
    generation = getattr(model, "generation_config", None)
    eos = s.eos_id if s.eos_id is not None else getattr(generation, "eos_token_id", None) or text.eos_token_id
    eos = eos[0] if isinstance(eos, list | tuple) else eos
    real = {"end": eos, "padding": text.pad_token_id, "begin": text.bos_token_id}
    real |= {"image": next(iter(image_ids(config)), None)}
    for name, value in real.items():
        if value == mask_id:
            raise ValueError(f"mask_id={mask_id} is the {name} token: the mask needs a token of its own")
    if not 0 <= mask_id < text.vocab_size:
        raise ValueError(f"mask_id={mask_id} is outside the vocabulary of {text.vocab_size} tokens")
    if (ids == mask_id).any():
        raise ValueError(f"the prompt holds the mask token {mask_id}: the mask needs a token that no text has")
    bad = [i for i in (*s.suppress, *sum(s.stop, ())) if not 0 <= i < text.vocab_size]
    if bad:
        raise ValueError(f"token {bad[0]} of suppress or stop is outside the vocabulary of {text.vocab_size} tokens")
    if s.stop and eos is None:
        raise ValueError("stop sequences need an end token to fill up with: pass eos_id=")
    trained = getattr(config, "trained_mask", "causal" if hasattr(config, "trained_objective") else "full")
    attention = s.attention or {"mma": "modality-mutual"}.get(trained, trained)
    masks.named(attention)
    if s.cfg_scale and s.unconditional is None:
        raise ValueError(
            f'cfg_scale={s.cfg_scale} needs an unconditional prompt: unconditional="mask" (the prompt replaced by mask '
            "tokens), or the processor's output for other prompts"
        )
    if s.cfg_scale and s.unconditional != "mask" and len(s.unconditional["input_ids"]) != len(ids):
        raise ValueError(f"unconditional has {len(s.unconditional['input_ids'])} rows, inputs {len(ids)}")
    _check_model(model, text, replace(s, attention=attention))
    shift = getattr(config, "logit_shift", False) if s.logit_shift is None else s.logit_shift
    return replace(s, mask_id=mask_id, eos_id=eos, attention=attention, logit_shift=shift)


def _check_numbers(s: Settings) -> None:
    for name in ("steps", "gen_length", "block_length", "prompt_every", "answer_every"):
        value = getattr(s, name)
        if name == "block_length" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise ValueError(f"{name}={value!r}: give a whole number from 1 on")
    size = s.block_length or s.gen_length
    if s.gen_length % size:
        raise ValueError(f"block_length={size} does not divide gen_length={s.gen_length}")
    if s.threshold is None and s.steps % (s.gen_length // size):
        raise ValueError(
            f"steps={s.steps} is no multiple of the {s.gen_length // size} blocks "
            f"(gen_length={s.gen_length}, block_length={size})"
        )
    if s.temperature < 0 or s.cfg_scale < 0:
        raise ValueError(f"temperature={s.temperature}, cfg_scale={s.cfg_scale}: both must be 0 or more")
    if s.threshold is not None and not 0 < s.threshold <= 1:
        raise ValueError(f"threshold={s.threshold} is outside (0, 1]")
    if s.threshold is not None and s.remasking not in ("low_confidence", "margin"):
        raise ValueError(f"threshold={s.threshold} is one of probabilities: remasking={s.remasking!r} gives none")
    if not 0 <= s.refresh <= 1:
        raise ValueError(f"refresh={s.refresh} is outside [0, 1]")
    number = isinstance(s.schedule, int | float) and not isinstance(s.schedule, bool)
    if s.schedule not in sampling.SCHEDULES and not (number and float(s.schedule) > 0):
        raise ValueError(f"schedule={s.schedule!r}: there are {', '.join(sampling.SCHEDULES)}, or a shift above 0")


def _check_model(model: Any, text: Any, s: Settings) -> None:
    engine = engine_of(model) if is_patched(model) else None
    kind = model.config.model_type
    base = engine.base if engine is not None else host.implementation(text)
    if base not in host.NAMES:
        raise NotImplementedError(
            f'attention implementation {base!r} takes no mask: load the model with attn_implementation="sdpa"'
        )
    rope = getattr(text, "rope_parameters", None) or {}
    if not host.is_causal(text) or family_of(model.config).prefix_lm or "mrope_section" in rope:
        raise NotImplementedError(
            f"{kind} is no plain decoder (sliding windows, masks or positions of its own): no mask makes it bidirectional"
        )
    active = engine.active if engine is not None else ()
    names = "+".join(m.name for m in active)
    ahead = [m.name for m in active if m.token_by_token]
    if ahead:
        raise ValueError(
            f"{'+'.join(ahead)} acts on one token after the other, and a canvas is written all at once: patch without (what "
            "contrasts two streams here is cfg_scale)"
        )
    if active and s.cache == "delayed":
        raise ValueError(f"cache='delayed' runs parts of layers, which {names} cannot follow: use prefix or none")
    if s.cache == "delayed":
        text_model, layers, _ = find_decoder(model, text)
        lacking = DelayedStream.lacking(text_model, layers[0])
        if lacking:
            raise ValueError(f"cache='delayed' needs layers with {', '.join(lacking)}, which {kind} does not have")
    frozen = s.attention != "full"
    if active and not frozen and s.cache not in ("none", "prefix"):
        raise ValueError(
            f"cache={s.cache!r} runs the prompt again with every block where it sees the answer (attention='full'), "
            f"which {names} cannot follow: use cache='prefix' or 'none'"
        )
    if active and not frozen and s.cache == "none" and any(m.edited_rows == "last" for m in active):
        raise ValueError(
            f"{names} reads the prompt before it edits, which is not possible where the prompt sees the answer "
            "(attention='full') and nothing is cached: use cache='prefix'"
        )
    if active and s.cfg_scale and s.cache == "none":
        raise ValueError(f"cfg_scale beside {names} needs streams of their own: use cache='prefix'")
