# SPDX-License-Identifier: Apache-2.0
"""Methods that act on what is decoded: they contrast the model's logits with a second stream's, or steer ``generate``.

They join the host's own ``generate`` as one of its logits processors, so greedy, sampling and beams stay the host's. A
second stream is a second forward of the same model on other inputs, with a cache and positions of its own.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from copy import copy
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor
from transformers import LogitsProcessor, LogitsProcessorList

from vlm_attn import host
from vlm_attn.call import Call
from vlm_attn.families import image_marker_ids
from vlm_attn.kernels.masks import Mask, materialise
from vlm_attn.method import Method, check_range
from vlm_attn.paired import Pairing

if TYPE_CHECKING:
    from vlm_attn.engine import Engine, Tap

PIXELS = {"pixel_values": "image_grid_thw", "pixel_values_videos": "video_grid_thw"}


@dataclass(frozen=True)
class Run:
    """One ``generate`` of a patched model, as a decoding method sees it.

    Attributes:
        engine: the patched state.
        model: the model.
        call: the call, with the prompt's layout.
        options: every argument of ``generate`` by name.
        mask: who sees whom in the prompt, where it is not the model's own.
    """

    engine: Engine
    model: Any
    call: Call
    options: Mapping[str, Any]
    mask: Mask | None = None

    def option(self, name: str) -> Any:
        """A generation option: from the arguments, the ``generation_config`` among them, or the model's own."""
        config = self.options.get("generation_config") or getattr(self.model, "generation_config", None)
        value = self.options.get(name)
        return value if value is not None else getattr(config, name, None)

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors of the prompt that the model's forward gets. Left out are positions, which follow from the mask, and what
        asks for something (``labels``): nobody asks it of a second forward."""
        known = signature(type(host.prompt_reader(self.model)).forward).parameters
        own = {"position_ids", "labels", "logits_to_keep"}
        given = {k: v for k, v in self.options.items() if isinstance(v, Tensor) and k in known and k not in own}
        if given.get("attention_mask") is None:
            tokens = given.get("input_ids", given.get("inputs_embeds"))
            assert tokens is not None
            given["attention_mask"] = tokens.new_ones(tokens.shape[:2], dtype=torch.long)
        return given


@dataclass(frozen=True, kw_only=True)
class Decoding(Method):
    """Base of methods that act on what is decoded. A model takes one of them, beside any that edit attention.

    They act inside ``generate`` only: a bare forward of a model that is patched with one is refused.

    Class attributes:
        alone: no method that edits attention may stand beside it.
        beam_search: it is a search of its own, which no streamer can follow.
    """

    alone: ClassVar[bool] = False
    beam_search: ClassVar[bool] = False
    token_by_token: ClassVar[bool] = True
    edited_rows: ClassVar[Literal["last", "text", "none"]] = "none"

    def edit(self, call: Call, layer: int) -> Any:
        """Attention is left alone."""
        return None

    def refuse(self, run: Run) -> None:
        """Say what ``generate`` was asked for that cannot be done, before anything runs.

        Raises:
            NotImplementedError: another model's guesses, a custom strategy.
            ValueError: a cache that holds an image, ``inputs_embeds``.
        """
        for name, what in (("assistant_model", "an assistant model"), ("custom_generate", "a custom strategy")):
            if run.options.get(name) is not None:
                raise NotImplementedError(f"{self.name} does not work with {what}: leave out {name}=")
        if not isinstance(run.options.get("input_ids"), Tensor):
            raise ValueError(f"{self.name} needs the prompt's tokens: pass input_ids, not inputs_embeds")
        if run.call.image_in_cache:  # text can be read again, from the tokens
            raise ValueError(
                f"{self.name} cannot go on with a cache that holds {run.call.first} columns, an image among them: pass the "
                "whole conversation and no cache"
            )

    @contextmanager
    def decoding(self, run: Run) -> Iterator[dict[str, Any]]:
        """What ``generate`` is called with instead, for the length of the call.

        Yields:
            Arguments that are added to those given.
        """
        self.refuse(run)
        yield {}


@dataclass(frozen=True, kw_only=True)
class Branch(Decoding):
    """Base of methods with a second stream: :meth:`second` says what it is shown, :meth:`combine` what becomes of both logits.

    Class attributes:
        same_image: both streams see the same pictures, so they are encoded once.
        after_prompt: :meth:`second` needs what was read while the prompt ran, and is called after it.
        paired: the second stream shares the forwards of the first while decoding, where that can work (``vlm_attn.paired``).
    """

    same_image: ClassVar[bool] = False
    after_prompt: ClassVar[bool] = False
    paired: ClassVar[bool] = True

    def second(self, run: Run) -> dict[str, Tensor]:
        """Inputs of the second stream: ``input_ids`` and ``attention_mask`` ``[B, P2]``, padded on the left, and its pictures.

        Raises:
            ValueError: the prompt lacks what the method needs.
        """
        raise NotImplementedError

    def combine(self, main: Tensor, second: Tensor) -> Tensor:
        """Logits of the model and of its second stream, each ``[R, V]`` float32, to logits ``[R, V]``."""
        raise NotImplementedError

    @contextmanager
    def decoding(self, run: Run) -> Iterator[dict[str, Any]]:
        """Add the contrast to the logits processors."""
        self.refuse(run)
        # Prompt lookup asks about candidates that no forward has read yet.
        shares = self.paired and run.option("prompt_lookup_num_tokens") is None
        stream = cache(lambda: Stream(run.engine, run.model, self.second(run), paired=shares))
        if not self.after_prompt:
            stream()
        with encoded_once(run.model) if self.same_image else nullcontext(), paired(run.engine):
            yield with_processor(run, Contrast(lambda ids, scores: self.seeing(run, scores, stream().logits(ids))))

    def seeing(self, run: Run, main: Tensor, second: Tensor) -> Tensor:
        """:meth:`combine` in the rows that have an image."""
        combined = self.combine(main, second)
        if run.call.blind is None:
            return combined
        blind = run.call.blind.to(main.device).repeat_interleave(len(main) // len(run.call.blind), 0)
        return main.where(blind[:, None], combined)


@dataclass(frozen=True, kw_only=True)
class Contrastive(Branch):
    """Base of the contrast ``(1 + alpha) l - alpha l'`` under the plausibility cut (VCD, arXiv 2311.16922, equations 3 and 4).

    Attributes:
        alpha: strength of the contrast. Range 0..20.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.
    """

    alpha: float = 1.0
    beta: float = 0.1

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 20)
        check_range(self, "beta", 0, 1)

    @property
    def neutral(self) -> bool:
        """No contrast and no cut. The cut alone changes what is sampled."""
        return self.alpha == 0 and self.beta == 0

    def combine(self, main: Tensor, second: Tensor) -> Tensor:
        """The contrast, on what is plausible."""
        return plausible((1 + self.alpha) * main - self.alpha * second, main, self.beta)


def plausible(logits: Tensor, main: Tensor, beta: float) -> Tensor:
    """Adaptive plausibility (arXiv 2210.15097, equation 2): tokens less likely than ``beta`` times the likeliest are out.

    Args:
        logits: ``[R, V]`` what is cut.
        main: ``[R, V]`` the model's own logits (or log probabilities), which decide.
        beta: share of the largest probability; 0 = no cut.

    Returns:
        ``[R, V]`` with -inf where ``main < max(main) + log(beta)``.
    """
    cut = main.amax(-1, keepdim=True) + (math.log(beta) if beta else -math.inf)
    return logits.masked_fill(main < cut, -math.inf)


class Contrast(LogitsProcessor):
    """A decoding method as a logits processor. It gives log probabilities: beams add them up."""

    def __init__(self, contrast: Callable[[Tensor, Tensor], Tensor]) -> None:
        self.contrast = contrast

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """``[R, L]`` tokens so far, ``[R, V]`` logits of the next."""
        return self.contrast(input_ids, scores.float()).log_softmax(-1)


def with_processor(run: Run, processor: LogitsProcessor) -> dict[str, Any]:
    """``logits_processor`` of a run with one more behind those given."""
    return {"logits_processor": LogitsProcessorList([*(run.options.get("logits_processor") or []), processor])}


@contextmanager
def paired(engine: Engine) -> Iterator[None]:
    """A ``generate`` whose second stream may share its forwards; afterwards its cache holds the first stream only."""
    try:
        yield
    finally:
        if engine.pairing is not None:
            engine.pairing.end()
            engine.pairing = None


class Stream:
    """A second forward beside ``generate``: inputs, cache and positions of its own, attention unedited.

    It reads what the host has decoded off the ``input_ids`` that a logits processor gets. A row there may go on from any row
    of the same sample (beams), or have fewer tokens than before (speculation): the cache is brought in step first.

    Args:
        engine: the patched state.
        model: the model.
        inputs: inputs of the prompt, as :meth:`Branch.second` gives them.
        tap: see :meth:`~vlm_attn.engine.Engine.aside`.
        paired: whether it may share the forwards of the first stream while that decodes (see ``vlm_attn.paired``).
    """

    def __init__(
        self,
        engine: Engine,
        model: Any,
        inputs: Mapping[str, Tensor],
        tap: Tap | None = None,
        *,
        paired: bool = False,
    ) -> None:
        self.engine, self.model, self.tap, self.paired = engine, model, tap, paired
        self.inputs = {name: value.to(model.device) for name, value in inputs.items()}
        self.mask = self.inputs["attention_mask"]
        self.cache = host.new_cache(engine.text_config)
        self.prompt = 0  # columns of the host's ids before the first decoded one
        self.first: Tensor | None = None  # [R, V] logits at the prompt's end
        self.last = torch.empty(0)  # [.., R, 1] position of the prompt's last token
        self.read = torch.empty(0)  # [R, n] decoded tokens that are in the cache

    def logits(self, input_ids: Tensor) -> Tensor:
        """``[R, L]`` the host's tokens, prompt included, to the next token's logits ``[R, V]`` in this stream, float32."""
        input_ids = input_ids.to(self.model.device)
        if self.first is None:
            self._start(input_ids)
        assert self.first is not None
        decoded = input_ids[:, self.prompt :]
        if self.engine.pairing is not None and self.engine.pairing.cache is not None:
            return self.engine.pairing.logits(decoded)
        self._follow(decoded)
        known, total = self.read.shape[1], decoded.shape[1]
        if not total:
            return self.first
        self.read = decoded
        positions = self.last + torch.arange(known + 1, total + 1, device=decoded.device)
        mask = torch.cat([self.mask, torch.ones_like(decoded)], 1)
        return self._forward({"input_ids": decoded[:, known:], "attention_mask": mask}, positions)

    def _start(self, input_ids: Tensor) -> None:
        positions = host.prompt_positions(self.model, self.inputs)
        first = self._forward(self.inputs, positions)
        self.mask = self.inputs["attention_mask"]
        times = len(input_ids) // len(first)
        self.samples, self.prompt, self.read = len(first), input_ids.shape[1], input_ids[:, :0]
        self.first, self.mask = first.repeat_interleave(times, 0), self.mask.repeat_interleave(times, 0)
        self.last = positions[..., -1:].repeat_interleave(times, -2)
        host.repeat_rows(self.cache, times)
        if host.can_rewind(self.cache):
            self.inputs = {}
        if self.paired:
            self.engine.pairing = Pairing(self)

    def _follow(self, decoded: Tensor) -> None:
        """Put the cache's rows in the order of ``decoded`` ``[R, m]`` and forget what is not in it."""
        if len(decoded) != len(self.read):
            raise RuntimeError(f"the host decodes {len(decoded)} rows, its second stream began with {len(self.read)}")
        # At least one token must be left to run, for its logits.
        known, width = self.read.shape[1], max(0, min(self.read.shape[1], decoded.shape[1] - 1))
        if width == known and torch.equal(self.read, decoded[:, :width]):
            return
        size = (self.samples, len(decoded) // self.samples, width)
        mine, wanted = (tokens[:, :width].reshape(size) for tokens in (self.read, decoded))
        common = (wanted[:, :, None] == mine[:, None]).cumprod(-1).sum(-1)  # [samples, row, row that it goes on from]
        length, source = common.max(-1)
        rows = source + torch.arange(self.samples, device=source.device)[:, None] * size[1]
        self.cache.reorder_cache(rows.flatten())  # type: ignore[arg-type]
        keep = int(length.min())
        if known > keep and not host.can_rewind(self.cache):  # read it all again
            self.cache, self.paired = host.new_cache(self.engine.text_config), False
            self._start(torch.cat([decoded.new_zeros(len(decoded), self.prompt), decoded[:, :0]], 1))
            keep = 0
        elif known > keep:
            host.rewind(self.cache, known - keep)
        self.read = decoded[:, :keep]

    def _forward(self, inputs: Mapping[str, Tensor], positions: Tensor) -> Tensor:
        """Logits of the last row ``[R, V]`` after running ``inputs`` behind the cache."""
        given: dict[str, Any] = {**inputs, "position_ids": positions, "use_cache": True, host.CACHE: self.cache}
        if "logits_to_keep" in signature(type(self.model).forward).parameters:
            given["logits_to_keep"] = 1
        with self.engine.aside(tap=self.tap), torch.no_grad():
            return self.model(**given).logits[:, -1].float()


def look(run: Run, inputs: Mapping[str, Tensor], tap: Tap | None = None, group: Tensor | None = None) -> None:
    """One forward of the plain model over a prompt, for what hooks or a tap see of it.

    Args:
        run: the run it is beside.
        inputs: the model's inputs, without positions.
        tap: see :meth:`~vlm_attn.engine.Engine.aside`.
        group: ``[B, L]`` groups of these inputs; default: those of the run's prompt.
    """
    reader = host.prompt_reader(run.model)
    given: dict[str, Any] = {**inputs, "position_ids": host.prompt_positions(reader, inputs), "use_cache": False}
    if run.mask is not None:
        group = run.call.prompt.group if group is None else group
        visible = materialise(run.mask, group) | torch.eye(group.shape[1], dtype=torch.bool, device=group.device)
        given["attention_mask"] = host.mask_like(visible, run.engine.base, run.model.get_input_embeddings().weight)
    if "logits_to_keep" in signature(type(reader).forward).parameters:
        given["logits_to_keep"] = 1
    with run.engine.aside(tap=tap), torch.no_grad():
        reader(**given)


@contextmanager
def encoded_once(model: Any) -> Iterator[None]:
    """For the length of a ``with`` block, the vision tower is not run again on the pictures it was last given."""
    owner = next((m for m in reversed(list(model.modules())) if hasattr(type(m), "get_image_features")), None)
    if owner is None:
        yield
        return
    kinds = [name for name in ("get_image_features", "get_video_features") if hasattr(type(owner), name)]
    for name in kinds:
        setattr(owner, name, _remembering(getattr(owner, name)))
    try:
        yield
    finally:
        for name in kinds:
            delattr(owner, name)


def _remembering(stock: Callable[..., Any]) -> Callable[..., Any]:
    """A function that says again what it said to the tensors that it was last given."""
    names = signature(stock)
    last: list[tuple[dict[str, Tensor], Any]] = []

    @wraps(stock)  # the host looks at its parameters
    def remembered(*args: Any, **kwargs: Any) -> Any:
        given = {name: v for name, v in names.bind(*args, **kwargs).arguments.items() if isinstance(v, Tensor)}
        if not (last and given.keys() == last[0][0].keys() and all(map(_equal, given.values(), last[0][0].values()))):
            last[:] = [(given, stock(*args, **kwargs))]
        return copy(last[0][1])  # beams repeat what is in it, in place

    return remembered


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and one.device == other.device and torch.equal(one, other)


# Inputs of a second stream


def without_image(run: Run) -> dict[str, Tensor]:
    """The prompt without its images: their tokens and markers taken out of every row, padded on the left again."""
    inputs, (order, there) = run.inputs, images_out(run)
    width = int(there.sum(1).max())
    order, there = order[:, -width:], there[:, -width:]
    taken = {name: x.gather(1, order) for name, x in inputs.items() if x.shape == inputs["input_ids"].shape}
    return {**taken, "attention_mask": there.to(inputs["attention_mask"].dtype)}


def images_out(run: Run) -> tuple[Tensor, Tensor]:
    """``[B, P]`` an order of the prompt's columns that has what is left without images and their markers at the right end, and
    which of these columns are left."""
    mask, ids = run.inputs["attention_mask"], run.inputs.get("input_ids")
    stays = ~run.call.prompt.visual.to(mask.device) & (mask != 0)
    if ids is not None:
        stays &= ~torch.isin(ids, torch.tensor(image_marker_ids(run.engine.model_config), device=mask.device))
    order = stays.int().argsort(dim=1, stable=True)
    return order, stays.gather(1, order)


def with_tokens(run: Run, tokens: Tensor, at: list[int]) -> dict[str, Tensor]:
    """The prompt with ``tokens`` ``[n]`` put in before column ``at`` of every row."""
    ids = run.inputs["input_ids"]

    def put(value: Tensor, new: Tensor) -> Tensor:
        new = new.to(value)
        return torch.stack(
            [torch.cat([row[:column], new, row[column:]]) for row, column in zip(value, at, strict=True)]
        )

    filled = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    return {
        name: put(value, filled.get(name, torch.zeros_like(tokens))) if value.shape == ids.shape else value
        for name, value in run.inputs.items()
    }


def answered(inputs: Mapping[str, Any], answer: Tensor) -> dict[str, Any]:
    """A prompt's inputs with tokens ``[B, n]`` behind every row; ``inputs_embeds`` stay as they are."""
    shape = inputs["input_ids" if "input_ids" in inputs else "attention_mask"].shape
    new = {"input_ids": answer, "attention_mask": torch.ones_like(answer)}
    return {
        name: torch.cat([value, new.get(name, torch.zeros_like(answer)).to(value)], 1)
        if isinstance(value, Tensor) and value.shape == shape
        else value
        for name, value in inputs.items()
    }


def with_answer(inputs: Mapping[str, Any], answer: Sequence[int]) -> dict[str, Any]:
    """One prompt's inputs with its answer's token ids behind it.

    Raises:
        ValueError: more than one prompt, no answer.
    """
    ids = inputs["input_ids"]
    if len(ids) != 1 or not len(answer):
        raise ValueError(f"one answer to one prompt is needed, got {len(answer)} tokens, {len(ids)} prompts")
    return answered(inputs, torch.tensor([list(answer)], device=ids.device))


def with_pixels(run: Run, change: Callable[[Tensor, int], Tensor]) -> dict[str, Tensor]:
    """The prompt with every picture changed.

    Args:
        run: the run.
        change: from the pixels of one picture, ``[1, ...]`` or Qwen-VL's ``[patches, values]``, and its number to new ones.

    Raises:
        ValueError: the inputs hold no pixels.
    """
    inputs = run.inputs
    names = [name for name in PIXELS if name in inputs]
    if not names:
        raise ValueError("the pictures are changed for the second stream: pass pixel_values to generate()")
    for name in names:
        grid = inputs.get(PIXELS[name])
        sizes: Any = grid.prod(-1).tolist() if grid is not None else 1
        inputs[name] = torch.cat([change(part, number) for number, part in enumerate(inputs[name].split(sizes))])
    return inputs


def one_row(run: Run, row: int) -> dict[str, Tensor]:
    """The inputs of one row of a batch, without its padding and with its own pictures only.

    Raises:
        NotImplementedError: the pictures of the batch cannot be told apart (tiles of different number).
    """
    images = run.call.prompt.images
    still = [image for image in images if image.video is None]
    mine = {  # numbers of the row's pictures, and of its videos
        False: [number for number, image in enumerate(still) if image.row == row],
        True: list(dict.fromkeys(image.video for image in images if image.row == row and image.video is not None)),
    }
    count = {False: len(still), True: len({image.video for image in images} - {None})}
    inputs = run.inputs
    shape, shown = inputs["input_ids"].shape, inputs["attention_mask"][row] != 0
    taken = {}
    for name, value in inputs.items():
        grid = inputs.get(PIXELS.get(name, ""))
        if value.shape == shape:
            taken[name] = value[row : row + 1, shown]
            continue
        if shape[0] == 1:
            taken[name] = value
            continue
        of_video = "video" in name
        if grid is None and (not count[of_video] or len(value) % count[of_video]):
            raise NotImplementedError(f"the pictures in {name} cannot be told apart: give one prompt at a time")
        parts = value.split(grid.prod(-1).tolist() if grid is not None else len(value) // count[of_video])
        if mine[of_video]:
            taken[name] = torch.cat([parts[number] for number in mine[of_video]])
    return taken
