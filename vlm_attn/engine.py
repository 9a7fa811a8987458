# SPDX-License-Identifier: Apache-2.0
"""Runs methods inside a patched model: hooks on the model, its text model and its layers, and the bound ``generate``.

A method that edits the last prompt row needs the whole prompt to have been read first. The prompt therefore runs as
*body* (every row but the last, unedited) and then *last token* (edited): exact for causal families, because no
earlier row sees the last one. Families whose prompt rows see the whole prompt run it all and then run the last token
once more.
"""

from __future__ import annotations

import inspect
import math
import threading
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn import dropping, heads, host, prompts
from vlm_attn.branch import Decoding, Run
from vlm_attn.call import Call, PromptMask
from vlm_attn.chat import ChatTemplate
from vlm_attn.families import family_of, image_token_ids, split_images, split_videos, video_columns
from vlm_attn.kernels import Edit, ScoreEdit, merged, triton_first
from vlm_attn.kernels.masks import Mask
from vlm_attn.layout import Span, build_layout, check_span, is_span, padding, per_row, runs, visual_columns
from vlm_attn.marks import Marks
from vlm_attn.method import Method
from vlm_attn.paired import Pairing
from vlm_attn.question import find_questions
from vlm_attn.reduction import KeptImage, Reducer
from vlm_attn.sharding import Heads
from vlm_attn.tower import on_tokens
from vlm_attn.turns import Turns, running_forward

# (layer, out [B, Q, H, D], attention [B, H, R, S] of some rows on demand, of the last one by default) -> out
Tap = Callable[[int, Tensor, Callable[..., Tensor]], Tensor]
_OF_A_TURN = ("call", "_pending", "_depth", "pairing", "tap", "_aside", "methods", "watch", "force", "looked_at")
CACHE_NOTE = "_vlm_attn_call"  # a cache remembers the call that filled it, for decode loops and later turns


class Engine:
    """The patched state of one model.

    Calls are serialised: two threads that generate on one patched model take turns.
    """

    def __init__(
        self,
        model: nn.Module,
        text_model: nn.Module,
        methods: Sequence[Method],
        *,
        processor: Any = None,
        template: ChatTemplate | None = None,
        query_span: Any = None,
    ) -> None:
        self.model_config = model.config
        self.text_config = text_model.config
        self.text_model = text_model
        self.canvas = host.canvas_decoder(model)  # reads the prompt's cache, in a model that denoises a canvas
        self.layers = len(text_model.layers)  # type: ignore[arg-type]
        self.heads: dict[int, Heads] = {}  # of every layer with attention, those that run in this process
        self.methods = tuple(methods)
        self.processor = processor
        self.template = template
        self.query_span = query_span
        self.rotary_kinds: list[str] | None = (
            None  # of every layer, where there are several and a method renumbers positions
        )
        self.base = "sdpa"  # implementation the model had
        self.told: set[str] = set()  # warnings that are given once
        self.kept: tuple[KeptImage, ...] = ()  # of the last prompt
        self.projector: nn.Module | None = None  # makes tokens of the tower's features, where a method merges these
        self.force = False  # run neutral methods through the edit path too
        self.looked_at = False  # runs are for looking at the model, and a prompt without an image is an error
        self.watch: Callable[..., None] | None = None  # is shown how every row of an edited forward attends
        self.tap: Tap | None = None  # stands behind every layer's attention in a stream beside the call
        self.call: Call | None = None
        self.pairing: Pairing | None = None  # a second stream that shares the forwards of generate
        self.spans: dict[str, Any] | None = None
        self.configs: list[host.OwnConfig] = []  # the model's own copies while it is patched
        self.handles: list[Any] = []
        self.tags: list[Any] = []  # on the attention modules
        self.marks: Marks | None = None  # what has to be in place
        self.shadowed: dict[str, Any] = {}  # what others had bound to the model under the names that patch() binds
        self._pending: dict[str, Any] | None = None
        self._aside: tuple[int, tuple[Method, ...]] | None = None  # a thread beside its own call, and its methods there
        self._depth = 0  # calls that are running, one inside the other
        self._looked = False  # whether this forward's marks were looked at
        self._turns = Turns(self._state, self._settle)

    def __getstate__(self) -> dict[str, Any]:
        idle = dict.fromkeys(("call", "watch", "tap", "pairing", "spans", "_pending", "_aside", "_turns"))
        return {**self.__dict__, **idle, "_depth": 0}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._turns = Turns(self._state, self._settle)

    def _state(self) -> tuple[Any, ...]:
        """What a turn changes."""
        return *(getattr(self, name) for name in _OF_A_TURN), len(self.handles)

    def _settle(self, state: tuple[Any, ...]) -> None:
        """Go back to what it was before a turn that nobody has ended."""
        *values, handles = state
        for name, value in zip(_OF_A_TURN, values, strict=True):
            setattr(self, name, value)
        for handle in self.handles[handles:]:
            handle.remove()
        del self.handles[handles:]

    # Whether the patch is still there

    def look(self) -> None:
        """See that everything is in place; put back what can be.

        Raises:
            RuntimeError: a layer, a tag, a hook or a config is no longer there.
            NotImplementedError: the attention implementation was set to one that cannot be edited.
        """
        if torch.compiler.is_compiling() or self.marks is None:
            return
        if not host.in_place(self.text_config, self.base):
            self._put_back()
        lost = self.marks.lost()
        if not lost and len(self.text_model.layers) != self.layers:  # type: ignore[arg-type]
            lost = f"the model has {len(self.text_model.layers)} decoder layers now, not {self.layers}"  # type: ignore[arg-type]
        if lost:
            raise RuntimeError(
                f"the model was patched with {self.names}, and since then {lost}: it would run without what was asked for. "
                "Call vlm_attn.unpatch(model), or vlm_attn.patch(model, ..., replace=True) to patch the model as it is now"
            )

    def _put_back(self) -> None:
        """The attention implementation was set by somebody else: edit that one, or say that it cannot be edited."""
        now = host.implementation(self.text_config)
        base = host.base_of(now)
        if base is None:
            raise NotImplementedError(
                f"the attention implementation was set to {now!r} while the model is patched with {self.names}: that one "
                f"cannot be edited, and the model would run plain. Set it back with "
                f"model.set_attn_implementation({self.base!r}), or call vlm_attn.unpatch(model)"
            )
        host.check_capped(self.text_config, base)
        self.warn_once(
            f"the attention implementation was set to {now!r} while the model is patched: {self.names} is still applied, over "
            f"{base!r}. Call vlm_attn.unpatch(model) to take it away"
        )
        self.base = base
        for tag in self.tags:
            tag.base = base
        host.put_in_place(self.text_config, base)

    @property
    def names(self) -> str:
        """The methods' names."""
        return "+".join(m.name for m in self.methods)

    # What runs

    @property
    def active(self) -> tuple[Method, ...]:
        """The methods that do something."""
        methods = self._aside[1] if self._aside is not None and self._is_aside else self.methods
        return tuple(m for m in methods if self.force or not m.neutral)

    @property
    def acting(self) -> tuple[Method, ...]:
        """Those that do something in the call that runs."""
        return self.active if self.call is None else self.call.methods

    @property
    def _is_aside(self) -> bool:
        """Whether this thread runs something beside its own call."""
        return self._aside is not None and self._aside[0] == threading.get_ident()

    @property
    def splits(self) -> bool:
        """Whether the prompt runs as body and last token."""
        return any(m.edited_rows == "last" for m in self.acting)

    @property
    def mask(self) -> Mask | None:
        """The mask a method puts in place of the prompt's own."""
        return next((m.mask for m in self.acting if m.mask is not None), None)

    def readers(self, layer: int) -> list[Method]:
        """Methods that read attention rows of a layer."""
        if self.call is not None and self.call.ahead is not None:
            return [self.call.ahead]
        return [m for m in self.acting if layer in m.read_layers and not (isinstance(m, Reducer) and m.reads_ahead)]

    @property
    def reduces(self) -> bool:
        """Whether visual tokens are taken away."""
        return any(isinstance(m, Reducer) for m in self.acting)

    @property
    def paired(self) -> Pairing | None:
        """The second stream that shares the forward which runs now, if any."""
        return self.pairing if self.pairing is not None and self.pairing.running else None

    def chooser(self, call: Call) -> heads.HeadMethod | None:
        """The method that chooses which keys a head sees."""
        return next((m for m in call.methods if isinstance(m, heads.HeadMethod)), None)

    def edits(self, call: Call, layer: int, device: torch.device | None = None) -> list[Edit | ScoreEdit]:
        """Edits of a layer for the rows that run now, in the methods' order, on the device it runs on. They stay the same once
        the prompt has run."""
        edits = call.edits[layer] if layer in call.edits else self._new_edits(call, layer)
        if device is not None:
            edits = [edit.to(device) for edit in edits]
        if call.done:
            call.edits[layer] = edits
        return edits

    def _new_edits(self, call: Call, layer: int) -> list[Edit | ScoreEdit]:
        now = [m for m in call.methods if call.done or call.mode == "edited" or m.edited_rows == "text"]
        edits = [edit for m in now if (edit := m.edit(call, layer)) is not None]
        if edits and call.reduction is not None:
            edits = call.reduction.edits(layer, edits)
        if call.done or triton_first(call.prompt.group.device):
            weighed = [edit for edit in edits if isinstance(edit, Edit)]
            if len(weighed) > 1 and (one := merged(weighed)) is not None:  # one pass over the keys for all of them
                edits = [*(edit for edit in edits if isinstance(edit, ScoreEdit)), one]
        return [self.heads[layer].edit(edit) for edit in edits if layer in self.heads]

    def head_scale(self, call: Call, layer: int) -> Tensor | None:
        """Factors ``[B, H]`` on the heads of a layer, the methods' together; None = 1."""
        if layer in call.scales:
            return call.scales[layer]
        factors = [factor for m in call.methods if (factor := m.head_scale(call, layer)) is not None]
        scale = math.prod(factors[1:], start=factors[0]) if factors else None
        if scale is not None and call.blind is not None:
            scale = scale.where(~call.rows_without_image(scale.device)[:, None], 1.0)
        if call.done:
            call.scales[layer] = scale
        return scale

    # Calls

    def build_call(self, inputs: Mapping[str, Any], canvas: bool = False) -> Call:
        """Lay out a prompt. Fails before anything runs.

        Args:
            inputs: the model's inputs, ``input_ids`` or ``inputs_embeds`` among them.
            canvas: whether the answer is denoised.

        Raises:
            ValueError: no usable question span, a prompt that ends in an image token, maps asked for, several samples in a row,
                labels that the prompt would see; while the model is looked at, a prompt without an image.
        """
        spans = self.spans or {}
        if inputs.get("output_attentions"):
            raise ValueError(
                "output_attentions=True cannot be used while patched: edited rows have no attention map to return"
            )
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        batch, length = embeds.shape[:2] if isinstance(embeds, Tensor) else ids.shape  # type: ignore[union-attr]
        mask = inputs.get("attention_mask")
        mask = mask if isinstance(mask, Tensor) and mask.shape == (batch, length) else None
        device = embeds.device if isinstance(embeds, Tensor) else ids.device  # type: ignore[union-attr]
        first = padding(mask, batch)
        visual, video = self._visual(ids, first, (batch, length), device)
        methods = self._with_image(visual)
        prompts.check_packed(inputs, (batch, length), mask, visual)
        query, role = self._question(ids, mask, visual, first, spans.get("query"))
        images = split_images(self.model_config, [runs(row) for row in visual & ~video], inputs, ids)
        images += split_videos(self.model_config, [runs(row) for row in video], inputs)
        images = tuple(sorted(images, key=lambda image: (image.row, image.start)))
        layout = build_layout(visual, mask, query, role, images)
        call = Call(layout, methods, self.active, input_ids=ids if isinstance(ids, Tensor) else None, batch=batch)
        call.canvas = canvas
        lacks = ~visual.any(1)
        if lacks.any() and not lacks.all() and any(m.needs_image for m in methods):
            call.blind = lacks
        if isinstance(inputs.get("labels"), Tensor) and methods:
            self.warn_once(prompts.check_labels(inputs["labels"], call))
        cache = host.cache_of(inputs)
        call.first = host.cached_length(cache) if cache is not None and hasattr(cache, "get_seq_length") else 0
        call.readable = cache is None or host.readable(cache)
        call.earlier = getattr(cache, CACHE_NOTE, None)
        goes_on = call.earlier is not None and call.earlier.patched == call.patched
        if host.is_short(cache) and not goes_on and not any(isinstance(m, Reducer) for m in self.active):
            raise ValueError(
                "the cache passed in holds fewer columns than it counts, from a call that let some go: "
                "go on with the methods it was filled with, or pass no cache"
            )
        call.pixels = inputs.get("pixel_values")
        for method in methods:
            method.start(call, self.processor)
        call.pixels = None  # a cache keeps the call for as long as it lives
        return call

    def _visual(self, ids: Any, first: list[int], size: tuple[int, int], device: torch.device) -> tuple[Tensor, Tensor]:
        """``[B, P]`` bool: where images and videos stand, and which of these columns are a video's."""
        spans = self.spans or {}
        video = torch.zeros(size, dtype=torch.bool, device=device)
        if spans.get("visual") is not None:
            visual = torch.zeros_like(video)
            for row, row_spans in enumerate(per_row(spans["visual"], size[0], "visual")):
                for span in [row_spans] if is_span(row_spans) else row_spans:
                    start, stop = check_span(span, row, first[row], size[1], "visual")
                    visual[row, start:stop] = True
        elif isinstance(ids, Tensor) and ids.shape == size:
            video = video_columns(self.model_config, ids)
            visual = visual_columns(ids, image_token_ids(self.model_config)) | video
        else:
            raise ValueError(
                "inputs_embeds hide where the image and the question are: "
                "wrap the call in `with vlm_attn.spans(model, visual=[(a, b)], query=[(c, d)]):` (one entry per row)"
            )
        return visual, video

    def _with_image(self, visual: Tensor) -> tuple[Method, ...]:
        """The methods that act on a prompt. Those that need an image leave one without alone, which is said once; a prompt that
        ends in an image token is refused."""
        methods, lacks = self.active, ~visual.any(1)
        idle = [m.name for m in methods if m.needs_image or isinstance(m, Reducer)]
        if lacks.any() and idle:
            if self.looked_at:
                raise ValueError(
                    f"no image token in the prompt of row {lacks.nonzero().flatten().tolist()}: the processor must see an "
                    "image and its placeholder (an image part in the chat message)"
                )
            which = "a prompt has" if lacks.all() else "some rows of a prompt have"
            self.warn_once(
                f"{which} no image: {'+'.join(idle)} leaves them as the plain model has them. If there should be one, the "
                "processor must see an image and its placeholder (an image part in the chat message)"
            )
        if lacks.all():
            methods = tuple(m for m in methods if m.name not in idle)
        if visual[:, -1].any() and any(m.edited_rows == "last" for m in methods):
            raise ValueError(
                "the prompt ends in an image token, so there is no last text row to edit: put text after the image"
            )
        return methods

    def _question(
        self, ids: Tensor | None, mask: Tensor | None, visual: Tensor, first: list[int], given: Any
    ) -> tuple[list[Span], list[int]]:
        batch, length = visual.shape
        given = given if given is not None else self.query_span
        if callable(given):
            given = given(ids, mask)
        if given is not None:
            given = per_row(given, batch, "query")
            query = [check_span(span, row, first[row], length) for row, span in enumerate(given)]
            return query, [length - stop for _, stop in query]
        return find_questions(ids, visual, first, self.template if visual.any() else None)  # text alone: nothing looks

    @contextmanager
    def running(self, inputs: Mapping[str, Any], canvas: bool = False) -> Iterator[Call]:
        """One call: its context is there inside and gone outside, whatever happens."""
        with self._turn():
            outer, outer_depth = self.call, self._depth
            try:
                self.look()
                self.call = self.build_call(inputs, canvas)
                self._depth = outer_depth + 1
                yield self.call
            finally:
                self.call, self._depth, self._pending = outer, outer_depth, None

    @contextmanager
    def _turn(self) -> Iterator[None]:
        """Wait for this thread's turn."""
        before = len(self._turns.held) if self._turns.mine else 0
        try:
            self._turns.take()
            yield
        finally:
            if self._turns.mine and len(self._turns.held) > before:  # else an interrupt came before the turn
                self._turns.give()

    def _end_bare(self) -> None:
        self.call, self._pending = self._turns.held[-1].before[:2]  # the first of _OF_A_TURN
        self._turns.give()

    def _inside(self) -> bool:
        """Whether this forward belongs to a call that is running. A compiled step always does."""
        return self._depth > 0 and (torch.compiler.is_compiling() or self._turns.mine)

    def generate(self, model: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The class's own ``generate`` inside a call."""
        stock = self.shadowed.get("generate") or partial(type(model).generate, model)
        if not self.active:
            return stock(*args, **kwargs)
        if getattr(self.model_config, "mask_token_id", None) is not None:
            raise ValueError(
                "this model fills in masked answers, it does not write token after token: use vlm_attn.diffusion.generate"
            )
        inputs = dict(kwargs)
        if args and "input_ids" not in inputs:
            inputs["input_ids"] = args[0]
        if inputs.get("inputs") is not None and inputs.get("input_ids") is None:
            inputs["input_ids"] = inputs["inputs"]
        config = inputs.get("generation_config") or getattr(model, "generation_config", None)
        if inputs.get("output_attentions") is None and getattr(config, "output_attentions", False):
            inputs["output_attentions"] = True
        if "prepare_inputs_for_generation" in vars(model):
            raise NotImplementedError(
                "the inputs of this model's generate() are prepared by something else, which may put virtual tokens into the "
                "prompt (prompt tuning): leave it out, or unpatch the model"
            )
        if inputs.get("input_ids") is None and inputs.get("inputs_embeds") is None:
            raise ValueError("a patched model generates from input_ids or inputs_embeds; neither was given")
        with self.running(inputs) as call:
            self.rehearse(Run(self, model, call, inputs))
            decoding = next((m for m in call.methods if isinstance(m, Decoding)), None)
            if decoding is None:
                return stock(*args, **kwargs)
            with decoding.decoding(Run(self, model, call, inputs)) as changes:
                return stock(*args, **{**kwargs, **changes})

    def rehearse(self, run: Run) -> None:
        """What the methods want to see of the plain model before the prompt runs."""
        for method in run.call.methods:
            method.rehearse(run)

    @contextmanager
    def aside(self, methods: Sequence[Method] = (), tap: Tap | None = None) -> Iterator[None]:
        """Other runs of this model inside, with other methods (none: a second stream); nothing of them is noted in the call.

        Args:
            methods: those that this thread's runs apply; other threads wait for their turn, and have their own.
            tap: gets what comes out of every layer's attention, ``[B, Q, H, D]``, with a function that gives the attention of
                the last row, or of a slice of rows, ``[B, H, R, S]`` float32; it gives what goes on to the output projection.
        """
        before = self.call, self.tap, self._aside
        self.call, self.tap, self._aside = None, tap, (threading.get_ident(), tuple(methods))
        try:
            yield
        finally:
            self.call, self.tap, self._aside = before

    @contextmanager
    def observed(
        self,
        methods: Callable[[Sequence[Method]], Sequence[Method]] = tuple,
        *,
        watch: Callable[..., None] | None = None,
        force: bool = False,
    ) -> Iterator[None]:
        """Runs inside are for looking at the model. Other threads wait, so that theirs keep what the model is patched with.

        Args:
            methods: from the model's methods to those that run instead, one of them not neutral.
            watch: is shown how every edited row attends.
            force: run neutral methods too.
        """
        with self._turn():
            before = self.methods, self.watch, self.force, self.looked_at
            try:
                self.methods = tuple(methods(self.methods))
                self.watch, self.force, self.looked_at = watch, force, True
                yield
            finally:
                self.methods, self.watch, self.force, self.looked_at = before

    def warn_once(self, message: str) -> None:
        """Warn of something that is told once for as long as the model is patched."""
        if message not in self.told:
            self.told.add(message)
            warnings.warn(message, UserWarning, stacklevel=3)

    # Hooks

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A bare forward starts a call, or goes on with the one its cache knows; a decode step takes a second stream along."""
        active = self.active
        if not active and not self._is_aside:
            return None
        self.look()
        self._looked = True
        if self.pairing is not None and self.call is not None and self._inside():
            both = self.pairing.before(self.call, {**_named(module, args), **kwargs})
            return None if both is None else ((), both)
        if not active or self._inside():
            return None
        prompts.check_checkpointing(module, self.text_model, self.names)
        alone = next((m.name for m in active if isinstance(m, Decoding)), None)
        if alone is not None:
            raise NotImplementedError(
                f"{alone} acts on what is decoded, so a forward alone has nothing for it to do: call model.generate, or patch "
                f"without {alone}"
            )
        inputs = {**_named(module, args), **kwargs}
        cache = host.cache_of(inputs)
        known: Call | None = getattr(cache, CACHE_NOTE, None)
        self._turns.take(running_forward())
        try:
            goes_on = known is not None and known.done and known.patched == active
            if goes_on and inputs.get("pixel_values") is None and host.cached_length(cache):
                self.call = known
            elif host.cached_length(cache):
                raise ValueError(
                    "a bare forward on a cache that was filled by other methods, or by the plain model: its prompt is not "
                    "known. Call generate() with the ids of the whole conversation, or pass no cache"
                )
            else:
                self.call = self.build_call(inputs)
                self.rehearse(Run(self, module, self.call, inputs))
        except BaseException:
            self._end_bare()
            raise

    def after_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """End a bare forward (also after an exception, also after one that was refused before it began)."""
        if self.pairing is not None and self.pairing.running:
            return self.pairing.after(output)
        held = self._turns.held
        if not self._depth and held and held[-1].frame is not None and held[-1].frame is running_forward():
            self._end_bare()

    def before_text(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        """Start of a forward of the text model: decide what runs, and run the prompt's body."""
        call = self.call
        if not self._looked and (self.active or self._is_aside):
            self.look()
        self._looked = False  # by the model's hook, for one forward
        if call is None:
            if self.active:
                raise RuntimeError(
                    "the text model of a patched model was called on its own, so the prompt is unknown: "
                    "call the model that was given to patch()"
                )
            return None
        kwargs = {**_named(module, args), **kwargs}
        cache = host.cache_of(kwargs)
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]
        if not self._continues(call, cache):
            call.mode = "other"
            return None
        call.batch, call.length = embeds.shape[:2]
        call.mask = None
        if call.done and cache is not None:
            past = cache.get_seq_length()
            if (pairing := self.paired) is not None:
                call.batch, past = pairing.rows, past - pairing.pad
            call.past = past.clone() if isinstance(past, Tensor) else past  # a static cache counts in place
            call.mode = "edited"
            chooser = self.chooser(call)
            if chooser is not None:
                heads.let_go(self, chooser, call, cache)
            return (), kwargs
        if kwargs.get("output_attentions") or getattr(self.text_config, "output_attentions", False):
            raise ValueError(
                "output_attentions=True cannot be used while patched: edited rows have no attention map to return"
            )
        if call.done:
            call.restart()
        call.reached.clear()
        call.mode = "prompt"
        past = host.cached_length(cache)
        if not call.ran and past != call.first:
            raise NotImplementedError(
                f"the cache holds {past} columns, but the prompt goes on from {call.first}: something puts columns in that "
                "the prompt does not name (prefix tuning), so they cannot be told apart"
            )
        call.past, call.ran = past, True
        end, prompt = past + call.length, call.prompt.length
        if self.reduces and (end < prompt or past != call.first):
            raise NotImplementedError(
                "visual tokens can only be taken away when the whole prompt runs at once: "
                "leave out prefill_chunk_size, or patch without "
                + "+".join(m.name for m in call.methods if isinstance(m, Reducer))
            )
        self._before_choosing(call, end)
        if self.mask is not None and not call.canvas:  # the denoising loop's mask has it
            kwargs["attention_mask"] = self._prompt_mask(call, cache, embeds)
        if end < prompt or not self.splits:
            self._pending = {"done": end >= prompt}
            return (), kwargs
        return (), self._run_body(module, kwargs, cache, past, prompt)

    def _before_choosing(self, call: Call, end: int) -> None:
        """A prompt begins to run, or goes on, under a method that chooses keys."""
        chooser = self.chooser(call)
        if chooser is None:
            return
        if chooser.whole_prompt and (end < call.prompt.length or call.past != call.first):
            raise NotImplementedError(
                f"{chooser.name}: the choice needs the whole prompt, so it must run in one piece: leave out "
                "prefill_chunk_size, or call the model on the whole prompt"
            )
        earlier = call.earlier.reduction if call.first and call.earlier is not None else None
        if earlier is not None and not self.reduces:
            call.reduction = call.reduction or heads.taken_over(self, call, earlier)
            call.reduction.length = call.length

    def _prompt_mask(self, call: Call, cache: Any, embeds: Tensor) -> Tensor:
        """The methods' mask for the rows that run now, in the host's format; where the kernel draws it, what has its shape."""
        assert self.mask is not None
        assert isinstance(call.past, int)
        if call.past != call.first or call.past + call.length < call.prompt.length:
            raise ValueError(
                f"{self.mask.name}: rows of the prompt see later ones, so the prompt must run in one piece: "
                "leave out prefill_chunk_size, or call the model on the whole prompt"
            )
        total = call.past + call.length
        length, _ = host.key_window(cache, call.length, 0) if cache is not None else (total, 0)
        blind = call.rows_without_image(embeds.device) if call.blind is not None else None
        mask = PromptMask(self.mask, call.layout.group, blind)
        if call.first and call.earlier is None:
            prompts.check_prefix(self.names, mask, call)
        if triton_first(embeds.device) and not self.reduces and blind is None:
            call.mask = mask
            stand_in = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=embeds.device)
            return host.mask_like(stand_in, self.base, embeds).expand(len(embeds), 1, call.length, length)
        columns = torch.arange(call.past, total, device=embeds.device)
        return host.mask_like(mask.rows(columns, length), self.base, embeds)

    def _continues(self, call: Call, cache: Any) -> bool:
        """Whether a forward is the call's own, and not that of another stream beside it (classifier-free guidance runs the text
        alone, on a cache of its own)."""
        if not call.done or torch.compiler.is_compiling():
            return True
        if cache is None:
            return not call.cached_prompt
        return getattr(cache, CACHE_NOTE, None) is call

    def _run_body(
        self, module: nn.Module, kwargs: dict[str, Any], cache: Any, past: int, prompt: int
    ) -> dict[str, Any]:
        """Run the prompt's body; returns the arguments of what is left: the last prompt token and what follows it."""
        call = self.call
        assert call is not None
        keep_cache = kwargs.get("use_cache")
        if self.canvas is not None:
            keep_cache = True  # the canvas has nothing else to read
        elif keep_cache is None:
            keep_cache = getattr(self.text_config, "use_cache", True)
        private = cache is None
        if private:
            cache = host.new_cache(self.text_config)
        kwargs = {**host.with_cache(kwargs, cache), "use_cache": True}
        total = call.length
        cut = prompt - 1 - past  # rows before the last prompt token
        # What is kept may hang on the last row, and rows that see later ones must have seen it: it then runs with the body, and
        # once more, edited.
        whole = self.reduces or self.mask or call.whole or family_of(self.model_config).prefix_lm
        body = cut + 1 if whole else cut
        mask = kwargs.get("attention_mask")
        kinds = (
            {kind: host.layer_of_type(self.text_config, kind) for kind in mask} if isinstance(mask, dict) else {None: 0}
        )
        given = {kind: host.key_window(cache, total, layer)[1] for kind, layer in kinds.items()}
        embeds = kwargs["inputs_embeds"] if kwargs.get("inputs_embeds") is not None else kwargs["input_ids"]

        def rows(start: int, stop: int) -> dict[str, Any]:
            windows = {
                kind: (*host.key_window(cache, stop - start, layer), given[kind]) for kind, layer in kinds.items()
            }
            part = host.slice_arguments(kwargs, start, stop)
            part["attention_mask"] = host.slice_mask(
                mask, start=start, stop=stop, first=past, windows=windows, like=embeds
            )
            return part

        output = None
        if body:
            call.length = body
            output = module.forward(**rows(0, body))
            dropping.restore(call, output)
            if body > cut:
                host.rewind(cache, body - cut)
        self._prompt_read(call)
        call.mode, call.past, call.length = "edited", past + cut, total - cut
        self._pending = {"done": True, "body": output, "cut": cut, "drop_cache": private and not keep_cache}
        return rows(cut, total)

    def _prompt_read(self, call: Call) -> None:
        """Hand the methods what was read while the prompt ran."""
        for method in call.methods:
            towers = () if isinstance(method, Reducer) else method.cls_layers  # a reducer looks where it chooses
            for number, image in enumerate(call.prompt.images if towers else ()):
                if image.start >= call.first:
                    seen = (on_tokens(self.model_config, image, *call.vision(number, layer)) for layer in towers)
                    method.tower_read(call, number, [attention for attention, _ in seen])
            method.prompt_read(call, call.rows(method))

    def after_text(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """End of a forward of the text model: put body and last token together, note the call on the cache."""
        call, pending, self._pending = self.call, self._pending, None
        if call is None or pending is None:
            return None
        call.mask = None
        self._check_reached(call)
        cache = getattr(output, host.CACHE, None)
        call.cached_prompt = cache is not None and not pending.get("drop_cache")
        if pending["done"]:
            if call.reduction is not None and self.reduces:
                self.kept = call.reduction.report(self.model_config, call.prompt.images)
                if call.mode == "prompt":
                    dropping.restore(call, output)
            if "cut" not in pending:
                self._prompt_read(call)
            call.finish()
            # A compiled decode step must find what it needs, not build it inside its graph.
            for layer in range(len(self.text_model.layers)):  # type: ignore[arg-type]
                self.head_scale(call, layer)
                for edit in self.edits(call, layer):
                    if cache is not None:
                        edit.over(sum(host.key_window(cache, 1, layer)))
        if cache is not None:
            setattr(cache, CACHE_NOTE, call)
        body = pending.get("body")
        if body is not None:
            cut = pending["cut"]
            output.last_hidden_state = torch.cat([body.last_hidden_state[:, :cut], output.last_hidden_state], dim=1)
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(
                    torch.cat([a[:, :cut], b], dim=1)
                    for a, b in zip(body.hidden_states, output.hidden_states, strict=True)
                )
        if pending.get("drop_cache"):
            output = host.without_cache(output)
        return output

    def _check_reached(self, call: Call) -> None:
        """See that the attention of every layer was ours."""
        count = min(self.layers, getattr(self.text_config, "num_hidden_layers", self.layers))  # some stop early
        missed = [layer for layer in self.heads if layer < count and layer not in call.reached]
        if missed and not torch.compiler.is_compiling():
            raise RuntimeError(
                f"layers {', '.join(map(str, missed))} did not run the attention that {self.names} edits: their forward was "
                "replaced by one that computes attention by itself (a fused kernel, another library's patch). Take that away, "
                "or call vlm_attn.unpatch(model)"
            )

    def before_canvas(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A denoising step: all its rows are edited, beside the cache of the prompt and of what is written already."""
        call, given = self.call, {**_named(module, args), **kwargs}
        if call is None:
            if self.active:
                raise RuntimeError(
                    "the canvas decoder of a patched model was called on its own, so the prompt is unknown: "
                    "call the model that was given to patch()"
                )
            return
        cache = host.cache_of(given)
        if not call.done or not self._continues(call, cache):
            call.mode = "other"
            return
        call.mode, call.past = "edited", cache.get_seq_length()
        call.batch, call.length = given["decoder_input_ids"].shape

    def before_layer(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Reduce a layer's input for the methods that read it, while the prompt runs."""
        call = self.call
        if call is None or call.done or call.mode == "other":
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        for method in self.active:
            if method.read_hidden:
                values = method.read_tokens(hidden)
                if call.reduction is not None and call.mode == "prompt":
                    values = call.reduction.spread_rows(values, call.length)
                call.store_tokens(method, layer, values)


class LayerHook:
    """Pre-forward hook of one decoder layer (an object, so that it copies and pickles with the model)."""

    def __init__(self, engine: Engine, layer: int) -> None:
        self.engine, self.layer = engine, layer

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Take tokens away, then hand the layer's input to the engine."""
        new = dropping.before_layer(self.engine, module, self.layer, args, kwargs)
        self.engine.before_layer(self.layer, *(new or (args, kwargs)))
        return new


def _named(module: nn.Module, args: tuple[Any, ...]) -> dict[str, Any]:
    """Positional arguments by name."""
    if not args:
        return {}
    names = [p for p in inspect.signature(module.forward).parameters if p != "self"]
    return dict(zip(names, args, strict=False))
