# SPDX-License-Identifier: Apache-2.0
"""What the demo computes, without a page: checked pictures, captions side by side, what a word looks at, yes or no."""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import itertools
import json
import os
import re
import threading
import time
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from transformers import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

import vlm_attn
from vlm_attn import diffusion, presets, registry
from vlm_attn.demo.controls import CLOSED, all_controls, kept_back, needs_model
from vlm_attn.demo.overlay import draw_path, overlay, seen_box
from vlm_attn.evals import pope, scenes
from vlm_attn.evals.chair import coco_vocabulary
from vlm_attn.evals.coco import UnknownRange, as_rgb
from vlm_attn.evals.prompts import build_inputs, denoising
from vlm_attn.evals.specs import MethodSpec, parse_specs
from vlm_attn.families import image_token_ids
from vlm_attn.patching import engine_of
from vlm_attn.reduction import KeptImage

MAX_BYTES = 10 * 2**20
MAX_PIXELS = 40_000_000
MAX_SIDE = 2048  # larger pictures are made smaller: no model here looks closer
MAX_RATIO = 10  # models scale the short side to a fixed size: a thin strip would become a huge picture
FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
MAX_RUNS = 6
MAX_CHARACTERS = 500
MAX_TOKENS = 256
WAIT = 1.0  # seconds without anything new after which a page is told so
PATH = 8  # newest words of a gaze path: more would hide the image
CANVAS = 32  # positions of a masked-diffusion model's answer, where nothing else is asked for
SPLIT = "validation"
SCENES = 500
_WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Picture:
    """A picture and, where they are known, the objects in it."""

    image: Image.Image
    objects: tuple[str, ...] | None = None
    name: str = "your picture"


@dataclass
class Run:
    """One caption as it is written.

    Attributes:
        spec: the methods it runs with.
        visual: image tokens of its prompt.
        ids: the tokens so far.
        text: what they say.
        seconds: how long it took.
        done: nothing more will come.
        error: what went wrong, as a sentence.
        mentions: objects it names: text, category, start, end, hallucinated; None where the truth is unknown.
        gaze: attention ``[T, h, w]`` of every token, once it was asked for.
        kept: which image tokens it kept, None where its methods keep all.
        steps: denoising steps done, of a masked-diffusion model.
        shown: those of them that a page was told of.
        canvas: its positions so far: the text, and the step that wrote it; 0 = none.
    """

    spec: MethodSpec
    visual: int
    ids: list[int] = field(default_factory=list)
    text: str = ""
    seconds: float = 0.0
    done: bool = False
    error: str = ""
    mentions: list[dict[str, Any]] | None = None
    gaze: Tensor | None = None
    kept: KeptImage | None = None
    steps: int = 0
    shown: int = 0
    canvas: list[tuple[str, int]] = field(default_factory=list)

    @property
    def whole(self) -> bool:
        """Whether its caption is shown when it is finished, because nothing is settled before."""
        return any(getattr(registry.method_class(name), "beam_search", False) for name in self.spec.names)

    @property
    def hallucinated(self) -> list[str]:
        """Words for what is not in the picture, in order, with repetition."""
        return [mention["text"] for mention in self.mentions or () if mention["hallucinated"]]

    @property
    def words(self) -> list[tuple[int, int]]:
        """``[start, end)`` of every word of the text."""
        return [match.span() for match in _WORD.finditer(self.text)]


@dataclass
class Result:
    """What :meth:`Studio.describe` makes: a picture, a prompt, the captions so far, and how they are denoised, if they are."""

    picture: Picture
    prompt: str
    runs: list[Run]
    denoise: dict[str, Any] | None = None


@dataclass(frozen=True)
class Answer:
    """An answer to a yes/no question.

    Attributes:
        label: the run.
        text: what the model said.
        says: "yes", "no" or "unclear" (neither word is in it).
        truth: "yes" or "no" where it is known, else "".
    """

    label: str
    text: str
    says: str
    truth: str


class _Tokens(BaseStreamer):
    """Collects new tokens as generate() makes them; its first call brings the prompt."""

    def __init__(self, ids: list[int]) -> None:
        self.ids, self.prompt = ids, True

    def put(self, value: Tensor) -> None:
        """Tokens of one step."""
        if not self.prompt:
            self.ids += value.flatten().tolist()
        self.prompt = False

    def end(self) -> None:
        """Nothing to flush."""


class _Stop(StoppingCriteria):
    """Ends a generation nobody waits for any more."""

    def __init__(self, stop: threading.Event) -> None:
        self.stop = stop

    def __call__(self, input_ids: Tensor, scores: Tensor, **kwargs: Any) -> Any:
        return torch.full((len(input_ids),), self.stop.is_set(), dtype=torch.bool, device=input_ids.device)


def open_upload(path: str | os.PathLike[str]) -> Image.Image:
    """Open a picture that somebody sent, as RGB, upright, at most ``MAX_SIDE`` pixels a side.

    Raises:
        ValueError: too many bytes or pixels, not one of ``FORMATS``, cut off or broken. The message is for that person.
    """
    if not Path(path).is_file():
        raise ValueError("The image is not there any more: please choose it again.")
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise ValueError(f"The image has {size / 2**20:.1f} MB, at most {MAX_BYTES >> 20} MB are taken.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # refused below, by our own limit
            with Image.open(path, formats=FORMATS) as image:
                width, height = image.size
                if width * height > MAX_PIXELS:
                    limit = f"at most {MAX_PIXELS // 10**6} million pixels are taken"
                    raise ValueError(f"The image has {width} x {height} pixels, {limit}.")
                if max(width, height) > MAX_RATIO * min(width, height):
                    raise ValueError(f"The image has {width} x {height} pixels, which is too narrow.")
                image.verify()
            with Image.open(path, formats=FORMATS) as image:  # verify() leaves nothing to read from
                image.draft("RGB", (MAX_SIDE, MAX_SIDE))
                upright = as_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"The file is not an image: {', '.join(FORMATS)} are taken.") from error
    except UnknownRange as error:
        raise ValueError(f"The image {error}.") from error
    except (OSError, SyntaxError, Image.DecompressionBombError, EOFError) as error:
        raise ValueError("The image cannot be read: the file is cut off or broken.") from error
    if max(upright.size) > MAX_SIDE:
        upright.thumbnail((MAX_SIDE, MAX_SIDE))
    return upright


def large(image: Image.Image) -> Image.Image:
    """An image large enough to look at: by a whole factor, to 448 pixels of its shorter side where it can be."""
    factor = max(1, min(448 // min(image.size), MAX_SIDE // max(image.size)))
    return image.resize((image.width * factor, image.height * factor), Image.Resampling.BICUBIC)


def scene_picture(number: int) -> Picture:
    """A drawn scene of the validation split, with the objects in it.

    Raises:
        ValueError: there is no such scene.
    """
    if not 0 <= number < SCENES:
        raise ValueError(f"There are scenes 0 to {SCENES - 1}, not {number}.")
    scene = scenes.scene(SPLIT, number)
    return Picture(scenes.render(scene), tuple(scene.categories), f"scenes:{SPLIT}/{number}")


class _Stopped(Exception):
    """Nobody waits for this denoising any more."""


class Studio:
    """A model and what the demo does with it. Every call may come from any thread.

    Each run gets a copy of the modules that shares the weights, so that runs with different methods go side by side
    without a second model in memory, and the model itself is never patched.

    Args:
        model: an image-text-to-text model.
        processor: its processor.
        name: what it is called on the page.
        params: ``"gift.alpha=4"``: parameters of whoever starts the demo. Visitors may choose others, but not those that name a
            file or a model.
        preset: the name or file of a preset with constants of methods; default: the bundled one that fits the model.

    Attributes:
        controls: parameters of every method that it can run with.
        fits: name of the preset that the model runs with, None where none fits.
        denoises: whether the model fills in masked answers, in place of writing token after token.
    """

    def __init__(
        self, model: Any, processor: Any, name: str = "", params: Sequence[str] = (), preset: str | None = None
    ) -> None:
        self.model, self.processor, self.name, self.preset = model, processor, name, preset
        if preset is not None:
            presets.fitting(preset, model.config)
        given = parse_specs(list(dict.fromkeys(text.partition(".")[0].strip() for text in params)), params, preset)
        self.given = {spec.label: spec.params[spec.label] for spec in given}
        self.controls = all_controls(model.config, self.given, preset)
        bundled = (key for key, data in presets.bundled().items() if presets.mismatch(data, model.config) is None)
        self.fits = preset or next(bundled, None)
        self.denoises = denoising(model, {}) is not None
        self._encoding = threading.Lock()
        # As many captions are written at a time as there are cores: more threads would only keep the page waiting.
        self._turns = threading.BoundedSemaphore(max(2, os.cpu_count() or 1))
        for spec in given:  # what cannot be loaded shows now, and not to a visitor
            with spec.applied(self.shell(), processor):
                pass

    def shell(self) -> Any:
        """A copy of the model's modules over the same weights."""
        tensors = itertools.chain(self.model.parameters(), self.model.buffers())
        return copy.deepcopy(self.model, {id(tensor): tensor for tensor in tensors})

    def _inputs(self, picture: Picture, prompt: str) -> Any:
        with self._encoding:  # tokenizers change their padding in place: one thread at a time
            return build_inputs(self.model, self.processor, [picture.image], [prompt])

    def specs(self, methods: Sequence[str], params: Sequence[str] = ()) -> list[MethodSpec]:
        """The runs, checked against this model before anything is computed.

        Args:
            methods: ``"baseline"``, a method's name or several joined by ``+``.
            params: ``"gift.alpha=4"``, of a visitor.

        Raises:
            ValueError, TypeError, NotImplementedError: as the command line and ``patch`` say it; a parameter that is no
                visitor's to choose, or a method that needs a model which was not given.
        """
        if not methods:
            raise ValueError("Choose at least one method.")
        if len(methods) > MAX_RUNS:
            raise ValueError(f"At most {MAX_RUNS} methods at a time, not {len(methods)}.")
        for text in params:
            method, _, parameter = text.partition("=")[0].strip().partition(".")
            if method in registry.names() and parameter in kept_back(registry.method_class(method)):
                raise ValueError(f"{method}.{parameter} is set by who runs this demo, not by its visitors.")
        found = []
        for spec in parse_specs(methods, params, self.preset):
            merged = {n: {**self.given.get(n, {}), **spec.params.get(n, {})} for n in spec.names}
            found.append(replace(spec, params={name: values for name, values in merged.items() if values}))
        # Also a method that is another's parameter, as late_step.reducer is.
        texts = [v for spec in found for values in spec.params.values() for v in values.values() if isinstance(v, str)]
        named = [*(name for spec in found for name in spec.names), *(v for v in texts if v in registry.names())]
        for name in dict.fromkeys(named):
            for parameter in needs_model(registry.method_class(name), self.given.get(name, {})):
                raise ValueError(
                    f"{name} asks another model, which who runs this demo has not given (--param {name}.{parameter}=...)."
                )
        shell = self.shell()
        for spec in found:
            try:
                with spec.applied(shell, self.processor):
                    pass
            except (ValueError, TypeError, NotImplementedError) as error:
                raise type(error)(self._discreet(str(error))) from error
        return found

    def defaults(self, names: Iterable[str]) -> list[str]:
        """What whoever started the demo has set of these methods, as ``--param`` takes it, but for files and models."""
        texts = []
        for name in sorted(set(names) & set(self.given)):
            hidden = kept_back(registry.method_class(name))
            for parameter, value in self.given[name].items():
                if parameter not in hidden:
                    shown = json.dumps(list(value)) if isinstance(value, tuple) else json.dumps(value)
                    texts.append(f"{name}.{parameter}={value if isinstance(value, str) else shown}")
        return texts

    def _discreet(self, text: str) -> str:
        """A message without what only who runs the demo knows: the files and models that were given."""
        for method, params in self.given.items():
            for parameter in kept_back(registry.method_class(method)):
                whole = str(params.get(parameter, ""))
                for secret in filter(
                    None, (whole, whole.partition(":")[2])
                ):  # the longer one first: it holds the other
                    text = text.replace(secret, f"({method}.{parameter})")
        return text

    def describe(
        self, picture: Picture, prompt: str, specs: Sequence[MethodSpec], tokens: int, steps: int | None = None
    ) -> Iterator[Result]:
        """Let all runs write at the same time.

        Args:
            picture: what to describe.
            prompt: what to ask for.
            specs: the runs.
            tokens: longest caption.
            steps: of a masked-diffusion model; default: half as many.

        Yields:
            The same result over and over, each time with more in it; the last time every run is done. A run that
            fails carries its error, the others go on. Closing the iterator ends the generations.

        Raises:
            ValueError: an empty or overlong prompt; ``tokens`` or ``steps`` out of range; a method that cannot describe.
        """
        for name in {name for spec in specs for name in spec.names} & set(CLOSED):
            raise ValueError(CLOSED[name])
        return self._answers(picture, prompt, specs, tokens, steps)

    def _answers(
        self, picture: Picture, prompt: str, specs: Sequence[MethodSpec], tokens: int, steps: int | None = None
    ) -> Iterator[Result]:
        """See :meth:`describe`."""
        prompt = _text(prompt, "prompt")
        if not 1 <= tokens <= MAX_TOKENS:
            raise ValueError(f"A caption can have 1 to {MAX_TOKENS} tokens, not {tokens}.")
        if steps is not None and not 1 <= steps <= tokens:
            raise ValueError(f"{tokens} positions can be written in 1 to {tokens} steps, not {steps}.")
        denoise = denoising(self.model, {"gen_length": tokens, "steps": steps}) if self.denoises else None
        inputs = self._inputs(picture, prompt)
        visual = torch.isin(inputs["input_ids"].cpu(), torch.tensor(image_token_ids(self.model.config)))
        result = Result(picture, prompt, [Run(spec, int(visual.sum())) for spec in specs], denoise)
        stop = threading.Event()
        threads = [
            threading.Thread(target=self._write, args=(run, inputs, tokens, denoise, stop), daemon=True)
            for run in result.runs
        ]
        try:
            for thread in threads:
                thread.start()
            finished, told = False, time.monotonic()
            while not finished:
                finished = not any(thread.is_alive() for thread in threads)  # asked first: then nothing is missed
                # Also while there is nothing new, as it can only be closed here.
                if self._read(result) or finished or time.monotonic() > told + WAIT:
                    told = time.monotonic()
                    yield result
                time.sleep(0 if finished else 0.05)
        finally:
            stop.set()
            for thread in threads:
                thread.join()

    def _write(self, run: Run, inputs: Any, tokens: int, denoise: dict[str, Any] | None, stop: threading.Event) -> None:
        start = time.perf_counter()
        try:
            with self._turn(stop):
                self._generate(run, inputs, tokens, denoise, stop)
        except _Stopped:
            pass
        except Exception as error:  # it must reach the page, whatever it is: this thread has nobody else to tell
            run.error = self._discreet(f"{type(error).__name__}: {' '.join(str(error).split())}")
            run.seconds = time.perf_counter() - start
        run.done = True

    @contextlib.contextmanager
    def _turn(self, stop: threading.Event) -> Iterator[None]:
        """Wait until one of the cores is free for a caption."""
        while not self._turns.acquire(timeout=0.1):
            if stop.is_set():
                raise _Stopped
        try:
            yield
        finally:
            self._turns.release()

    def _generate(
        self, run: Run, inputs: Any, tokens: int, denoise: dict[str, Any] | None, stop: threading.Event
    ) -> None:
        shell = self.shell()
        start = time.perf_counter()
        try:
            with run.spec.applied(shell, self.processor), torch.inference_mode():
                start = time.perf_counter()
                if denoise is not None:
                    self._denoise(shell, run, inputs, denoise, stop)
                else:
                    # A search of its own writes nothing before it has ended: its caption comes whole.
                    whole = run.whole
                    sequences = shell.generate(
                        **inputs,
                        max_new_tokens=tokens,
                        do_sample=False,
                        num_beams=1,
                        temperature=None,
                        top_p=None,
                        top_k=None,
                        pad_token_id=self.processor.tokenizer.pad_token_id,
                        streamer=None if whole else _Tokens(run.ids),
                        stopping_criteria=[_Stop(stop)],
                    )
                    if whole and not stop.is_set():
                        run.ids = sequences[0, inputs["input_ids"].shape[1] :].tolist()
                if run.spec.names and engine_of(shell).reduces:
                    run.kept = vlm_attn.kept(shell)[0]
        finally:
            run.seconds = time.perf_counter() - start

    def _denoise(self, shell: Any, run: Run, inputs: Any, denoise: dict[str, Any], stop: threading.Event) -> None:
        """The canvas step by step; the caption once it is whole."""
        wrote = [0] * denoise["gen_length"]

        def step(canvas: diffusion.Canvas) -> None:
            if stop.is_set():
                raise _Stopped
            for place in canvas.written[0].nonzero().flatten().tolist():
                wrote[place] = canvas.step
            pieces = self.processor.tokenizer.batch_decode(canvas.tokens[0][:, None], skip_special_tokens=True)
            run.canvas = list(zip((piece.strip() for piece in pieces), wrote, strict=True))
            run.steps = canvas.step

        run.ids = diffusion.generate(shell, inputs, on_step=step, **denoise).answers[0]

    def _read(self, result: Result) -> bool:
        """Bring texts up to date; whether anything is new."""
        news = False
        for run in result.runs:
            text, steps = self._decode(run.ids), run.steps
            news |= text != run.text or steps != run.shown
            run.text, run.shown = text, steps
            run.mentions = _mentions(text, result.picture.objects)
        return news

    def _decode(self, ids: Sequence[int]) -> str:
        return self.processor.tokenizer.decode(list(ids), skip_special_tokens=True).strip()

    def look(self, result: Result, run: int, word: int, path: bool = False) -> tuple[Image.Image, str]:
        """Where a run looked while it wrote a word.

        Args:
            result: what :meth:`describe` made.
            run: index of the run.
            word: index into its words.
            path: also draw where the words up to this one looked most, numbered as they stand in the caption.

        Returns:
            The picture with the attention over it (brightest = most), and a sentence.

        Raises:
            ValueError: no such word.
        """
        if not (0 <= run < len(result.runs) and 0 <= word < len(result.runs[run].words)):
            raise ValueError("That word is not there any more: describe the image again.")
        chosen = result.runs[run]
        if chosen.gaze is None:
            shell = self.shell()
            inputs = self._inputs(result.picture, result.prompt)
            with chosen.spec.applied(shell, self.processor):
                options = {} if chosen.spec.names else {"processor": self.processor}
                if result.denoise is None:
                    maps = vlm_attn.gaze(shell, inputs, chosen.ids, **options)
                else:
                    again = partial(diffusion.stream, shell, inputs, **result.denoise)
                    maps = vlm_attn.canvas_gaze(shell, inputs, again, **options)
                chosen.gaze = maps[0]
        start, end = chosen.words[word]
        rows = chosen.gaze[self._tokens_of(chosen, start, end)]
        share = float(rows.sum((1, 2)).mean())
        shown = self._over(result.picture.image, rows.mean(0))
        if path:
            box = seen_box(self.processor, shown.size)
            places = [self._peak(chosen, number, box) for number in range(word + 1)]
            draw_path(shown, places, PATH)
        text = (
            f'Word {word + 1} of {len(chosen.words)}, "{chosen.text[start:end]}" ({chosen.spec.label}): '
            f"{share:.0%} of the attention is on the image."
        )
        return shown, text

    def _peak(self, run: Run, word: int, box: tuple[float, float, float, float]) -> tuple[float, float]:
        """Where a word looked most, in pixels of an image of which ``box`` is what the model sees."""
        assert run.gaze is not None
        values = run.gaze[self._tokens_of(run, *run.words[word])].mean(0)
        row, column = divmod(int(values.argmax()), values.shape[1])
        left, top, right, bottom = box
        x = left + (column + 0.5) / values.shape[1] * (right - left)
        return x, top + (row + 0.5) / values.shape[0] * (bottom - top)

    def can(self, name: str, result: Result) -> bool:
        """Whether ``saliency`` (``"gift"``) or ``sinks`` (``"var"``) can be computed: whether the method has its constants."""
        try:
            with self._single(name, result):
                return True
        except (ValueError, TypeError, NotImplementedError):
            return False

    def _tokens_of(self, run: Run, start: int, end: int) -> list[int]:
        """Indices of the tokens that a stretch of the text was decoded from."""
        assert run.gaze is not None
        ids = run.ids[: len(run.gaze)]
        whole = self.processor.tokenizer.decode(ids, skip_special_tokens=True)
        lead = len(whole) - len(whole.lstrip())
        ends = [
            len(self.processor.tokenizer.decode(ids[:n], skip_special_tokens=True)) - lead for n in range(len(ids) + 1)
        ]
        found = [n for n, (a, b) in enumerate(itertools.pairwise(ends)) if a < end and start < b]
        return found or [len(ids) - 1]

    def saliency(self, result: Result) -> tuple[Image.Image, str]:
        """Where the prompt makes the model look, by gift's map (with the parameters of the first run that has gift)."""
        inputs = self._inputs(result.picture, result.prompt)
        with self._single("gift", result) as shell:
            (values, *_) = vlm_attn.saliency(shell, inputs)
        return self._over(result.picture.image, values, scale=False), f'Saliency of "{result.prompt}" (gift).'

    def sinks(self, result: Result) -> tuple[Image.Image, str]:
        """Which image tokens are sinks, by var's test (with the parameters of the first run that has var)."""
        inputs = self._inputs(result.picture, result.prompt)
        with self._single("var", result) as shell:
            (values, *_) = vlm_attn.sinks(shell, inputs)
        count = int((values > 0).sum())
        text = f"{count} of {values.numel()} image tokens are sinks in at least one layer (var)."
        if not count:
            text = "No image token is a sink at this tau (var)."
        return self._over(result.picture.image, values, scale=False), text

    def kept(self, result: Result) -> tuple[Image.Image, str]:
        """The image tokens that are left, for every run that keeps fewer, side by side.

        Raises:
            ValueError: no run does.
        """
        runs = [(run, run.kept) for run in result.runs if run.kept is not None]
        if not runs:
            raise ValueError("All runs kept all image tokens: choose a method that keeps fewer, such as divprune.")
        shown = [self._over(result.picture.image, left.mask.float(), scale=False) for _, left in runs]
        width, height = shown[0].size
        row = Image.new("RGB", (len(shown) * (width + 8) - 8, height), (128, 128, 128))
        for place, image in enumerate(shown):
            row.paste(image, (place * (width + 8), 0))
        counts = [f"{run.spec.label} {len(left.index)} of {left.total}" for run, left in runs]
        return row, f"Kept image tokens, from left to right: {', '.join(counts)}."

    @contextlib.contextmanager
    def _single(self, name: str, result: Result) -> Iterator[Any]:
        """A shell patched with one method, with the parameters of the first run that has it."""
        params = next((run.spec.params.get(name, {}) for run in result.runs if name in run.spec.names), {})
        spec = MethodSpec(name, (name,), {name: params}, self.preset)
        shell = self.shell()
        with spec.applied(shell, self.processor):
            yield shell

    def _over(self, image: Image.Image, values: Tensor, scale: bool = True) -> Image.Image:
        """A map over its picture, large enough to look at. ``scale``: the largest value is shown brightest."""
        top = float(values.max())
        shown = values / top if scale and top > 0 else values
        drawn = large(image)
        return overlay(drawn, shown, box=seen_box(self.processor, drawn.size))

    def ask(self, picture: Picture, question: str, specs: Sequence[MethodSpec]) -> list[Answer]:
        """A yes/no question to every run.

        Args:
            picture: what it is about.
            question: the question; what is true is known where it names one kind of object and the objects are known.
            specs: the runs.

        Raises:
            ValueError: an empty or overlong question.
        """
        question = _text(question, "question")
        named = {mention["category"] for mention in _mentions(question, picture.objects) or ()}
        truth = ""
        if picture.objects is not None and len(named) == 1:
            truth = "yes" if named <= set(picture.objects) else "no"
        *_, result = self._answers(picture, question, specs, CANVAS if self.denoises else 10)
        answers = []
        for run in result.runs:
            # A rule that takes "No!" for yes is for figures that are compared; here somebody reads along.
            rule = None if pope.is_unparsed(run.text) else pope.parse_official(run.text)
            says = "unclear" if run.error else pope.parse_plain(run.text) or rule or "unclear"
            answers.append(Answer(run.spec.label, run.error or run.text, says, truth))
        return answers


def _text(text: str, what: str) -> str:
    text = text.strip()
    if not text:
        raise ValueError(f"The {what} is empty.")
    if len(text) > MAX_CHARACTERS:
        raise ValueError(f"The {what} has {len(text)} characters, at most {MAX_CHARACTERS} are taken.")
    return text


def _mentions(text: str, objects: Sequence[str] | None) -> list[dict[str, Any]] | None:
    """Objects that a text names, as CHAIR finds them; None where the truth or the word list is not there."""
    if objects is None or importlib.util.find_spec("simplemma") is None:
        return None
    return coco_vocabulary().score(text, objects)["mentions"]
