# SPDX-License-Identifier: Apache-2.0
"""The page of ``vlm-attn demo``. What it shows is computed in :mod:`vlm_attn.demo.studio`."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import logging
import math
import os
import signal
import sys
import tempfile
import threading
from abc import ABCMeta
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from html import escape
from typing import Any

from vlm_attn.evals._extras import require

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when gradio is imported: nothing is reported to anybody
os.environ.setdefault("MPLBACKEND", "agg")  # gradio asks for it; matplotlib would look for one and write to the home
require("gradio", "demo")

import gradio as gr  # noqa: E402
import httpx  # noqa: E402
from PIL import Image  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402

from vlm_attn.demo import link, markup  # noqa: E402
from vlm_attn.demo.controls import Control, params  # noqa: E402
from vlm_attn.demo.studio import (  # noqa: E402
    CANVAS,
    MAX_BYTES,
    MAX_CHARACTERS,
    MAX_TOKENS,
    SCENES,
    Picture,
    Result,
    Studio,
    large,
    open_upload,
    scene_picture,
)
from vlm_attn.evals.coco import is_transparent  # noqa: E402
from vlm_attn.evals.models import caption_tokens  # noqa: E402
from vlm_attn.evals.scenes import CATEGORIES  # noqa: E402
from vlm_attn.evals.specs import parse_specs  # noqa: E402

SWITCH = 0.0005  # seconds after which a thread that computes lets another one have the interpreter
AT_ONCE = 2  # visitors who are served at the same time; the others wait in the queue
WAITING = 100  # and more than that are asked to come back
SESSIONS = 200  # visitors whose last captions, with their picture, are kept in memory
EXAMPLES = (3, 0, 8, 2, 12, 15)
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError, KeyError)
TO_LINK = """query => {
  const url = location.origin + location.pathname + '?' + query;
  history.replaceState(null, '', url);
  return url;
}"""
# Words that were chosen while another was looked at were let pass: look at the last of them.
CATCH_UP = """() => setTimeout(() => {
  const word = document.querySelector('#captions button.word[aria-pressed=true]');
  const said = document.querySelector('#sentence [data-word]');
  if (word && said && said.dataset.word !== word.dataset.run + ' ' + word.dataset.word) word.click();
}, 100)"""
AGAIN = "() => { document.querySelector('#captions button.word[aria-pressed=true]')?.click(); }"
TO_RESULTS = """() => {
  const results = document.querySelector('#results'), box = results.getBoundingClientRect();
  const still = matchMedia('(prefers-reduced-motion: reduce)').matches;
  if (box.top < 0 || box.bottom > innerHeight)
    results.scrollIntoView({block: 'start', behavior: still ? 'auto' : 'smooth'});
}"""

log = logging.getLogger(__name__)


def _path(self: Any, payload: Any) -> str | None:
    """An upload as a path, unopened: whether it is a picture is for ``open_upload`` to say. Gradio has checked its folder."""
    return None if payload is None else payload.path


async def _sent(self: Any, path: str) -> str | None:
    """Gradio would fetch an address: the server reads what it was sent, and nothing else."""
    if path.lower().startswith(("http:", "https:")):
        raise gr.Error("Send the picture itself, not its address.", print_exception=False)
    return await gr.Image.async_move_resource_to_block_cache(self, path)


# A gr.Image with these two, shown as one (is_template). Gradio's metaclass would write a .pyi file beside this one.
def _unchecked(base: Any) -> Any:
    """A number of the page as it was given: one out of range is refused with the others, by `Studio.specs`, in its place."""
    return ABCMeta.__new__(
        type(base), base.__name__, (base,), {"preprocess": lambda self, payload: payload, "is_template": True}
    )


Slider, Number = _unchecked(gr.Slider), _unchecked(gr.Number)
Upload: Any = ABCMeta.__new__(
    type(gr.Image),
    "Upload",
    (gr.Image,),
    {"preprocess": _path, "async_move_resource_to_block_cache": _sent, "is_template": True},
)


def sentence_of(error: Exception, what: str) -> str:
    """An error as a sentence for the page; what nobody expected is logged as well."""
    if isinstance(error, USER_ERRORS):
        return " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
    log.exception("demo: %s", what)
    return f"Something went wrong ({type(error).__name__}). The details are in the server's log."


def told(show: Callable[[str], Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Show an error on the page in the place of the result, where it stays, and tell callers of the API as well.

    Args:
        show: what the outputs become, from the error as HTML.
    """

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def stream(*args: Any) -> Iterator[Any]:
            try:
                if inspect.isgeneratorfunction(function):
                    yield from function(*args)
                else:
                    yield function(*args)
            except gr.Error:
                raise
            except Exception as error:
                text = sentence_of(error, function.__name__)
                yield show(markup.problem(text))
                raise gr.Error(escape(text, quote=False), visible=False, print_exception=False) from error

        return stream

    return wrap


class SameForAll:
    """The page and what describes it, made once for all visitors and kept: they are the same for everybody.

    Gradio makes them anew for each, by copying the whole configuration: while captions are written that takes so long that of
    thirty visitors who come at once half give up (a client waits five seconds).
    """

    PATHS = ("/", "/config", "/gradio_api/info")
    HEADERS = (
        b"host",
        b"x-forwarded-host",
        b"x-forwarded-proto",
        b"x-gradio-server",
    )  # what the page's address is made of
    AT_MOST = 16  # addresses: the headers are anybody's

    def __init__(self, app: Any) -> None:
        self.app = app
        self.kept: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
        self.making = asyncio.Lock()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Serve one request, as ASGI has it."""
        path, query = scope.get("path"), scope.get("query_string", b"")
        shared = path in self.PATHS and not (query if path != "/" else b"deep_link" in query or b"page=" in query)
        if scope["type"] != "http" or scope["method"] != "GET" or not shared:
            return await self.app(scope, receive, send)
        headers = dict(scope["headers"])
        key = (path, scope.get("root_path"), scope.get("scheme"), *(headers.get(name) for name in self.HEADERS))
        if key not in self.kept and len(self.kept) >= self.AT_MOST:
            return await self.app(scope, receive, send)
        async with self.making:
            messages = self.kept.get(key)
            if messages is None:
                messages = []

                async def keep(message: dict[str, Any]) -> None:
                    messages.append(message)

                await self.app(scope, receive, keep)
                lasting = messages[0].get("status") == 200 and not any(
                    name.lower() == b"set-cookie" for name, _ in messages[0].get("headers", ())
                )
                if lasting and len(self.kept) < self.AT_MOST:
                    self.kept[key] = messages
        for message in messages:
            await send(message)
        return None


def component(control: Control) -> Any:
    """The control on the page."""
    label, value, info = control.name, control.shown(control.default), control.text or None
    common: dict[str, Any] = {
        "label": label,
        "info": info,
        "interactive": True,
        "elem_id": control.key.replace(".", "-"),
    }
    if control.kind == "switch":
        return gr.Checkbox(value=value, **common)
    if control.kind == "choice":
        return gr.Dropdown(list(control.choices), value=value, **common)
    if control.kind == "text":
        return gr.Textbox(value=value, **common)
    if control.low is not None and control.high is not None and control.high - control.low <= 100:
        step = 1 if control.kind == "whole" else 10 ** math.floor(math.log10((control.high - control.low) / 200))
        low, high = control.low + step * control.open_low, control.high - step * control.open_high
        return Slider(low, high, value=value, step=step, **common)
    return Number(value=value, precision=0 if control.kind == "whole" else None, **common)


def model_line(studio: Studio) -> str:
    """The model that runs, with its preset."""
    config = studio.model.config
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    facts = {"kind": str(config.model_type)}
    facts |= {"layers": str(layers)} if layers else {}
    facts |= {"dtype": str(studio.model.dtype).removeprefix("torch."), "on": str(studio.model.device)}
    facts["preset"] = studio.fits or "none"
    note = ""
    if studio.fits is None:
        note = (
            "Methods with constants of the model (gift, var and others) need them as parameters, or a preset: "
            f"vlm-attn calibrate {studio.name} -o preset.json, then vlm-attn demo --preset preset.json."
        )
    elif studio.name.startswith("scenes"):
        note = "It knows nothing but drawn scenes: what it says of photographs means nothing."
    return markup.model(studio.name, facts, note)


def build(studio: Studio) -> gr.Blocks:
    """The page over a studio."""
    known = [control for controls in studio.controls.values() for control in controls]
    start = link.START
    if studio.denoises:
        start = link.State(methods=("baseline", "late_step"), tokens=CANVAS, steps=CANVAS // 2)
    elif studio.name == "scenes-smol":  # its captions are longer, and gift's constants are not known for it
        start = link.State(methods=("baseline", "pai"), tokens=caption_tokens(studio.name) or start.tokens)

    def picture_of(path: str | None, scene: float | None) -> Picture:
        if scene is not None:
            return scene_picture(int(scene))
        if path is None:
            raise ValueError("Choose an image first: drop one, paste one, or take an example.")
        picture = Picture(open_upload(path))
        with Image.open(path) as image:
            if is_transparent(image):
                gr.Warning("The image has transparent parts: the model is shown the colours below them.")
        return picture

    def changed(methods: Sequence[str], values: Sequence[Any]) -> list[str]:
        return params(studio.controls, methods, {c.key: value for c, value in zip(known, values, strict=True)})

    def on(*buttons: bool) -> list[Any]:
        """Buttons that can work, or not: Describe, saliency, sinks, kept; Stop is there where Describe cannot work."""
        go, *maps = buttons
        return [gr.Button(interactive=go), gr.Button(visible=not go), *(gr.Button(interactive=can) for can in maps)]

    @told(lambda html: (html, None, *on(True, False, False, False)))
    def describe(
        path: str | None,
        scene: float | None,
        methods: list[str],
        prompt: str,
        tokens: float,
        steps: float,
        *values: Any,
    ) -> Any:
        picture = picture_of(path, scene)
        specs = studio.specs(methods, changed(methods, values))
        last, buttons = None, on(False, False, False, False)
        for last in studio.describe(picture, prompt, specs, int(tokens), int(steps) if studio.denoises else None):
            if not all(run.done for run in last.runs):
                yield markup.captions(last), last, *buttons
                buttons = [gr.skip()] * len(buttons)  # once: a button that is made anew cannot be clicked meanwhile
        if last is not None:
            kept = any(run.kept is not None for run in last.runs)
            yield markup.captions(last), last, *on(True, studio.can("gift", last), studio.can("var", last), kept)

    @told(lambda html: html)
    def ask(path: str | None, scene: float | None, methods: list[str], question: str, *values: Any) -> str:
        specs = studio.specs(methods, changed(methods, values))
        return markup.answers(studio.ask(picture_of(path, scene), question, specs))

    def needs(result: Result | None) -> Result:
        if result is None or not result.runs:
            raise ValueError("Describe the image first.")
        return result

    def shown_as(found: tuple[Any, str], word: str = "") -> tuple[Any, str]:
        named = f' data-word="{word}"' if word else ""
        return found[0], f'<p aria-live="polite"{named}>{escape(found[1])}</p>'

    in_place = told(lambda html: (gr.skip(), html))

    @in_place
    def look(result: Result | None, path: bool, event: gr.SelectData) -> Any:
        run, word = (int(number) for number in event.index)
        return shown_as(studio.look(needs(result), run, word, path), f"{run} {word}")

    @in_place
    def saliency(result: Result | None) -> Any:
        return shown_as(studio.saliency(needs(result)))

    @in_place
    def sinks(result: Result | None) -> Any:
        return shown_as(studio.sinks(needs(result)))

    @in_place
    def kept(result: Result | None) -> Any:
        return shown_as(studio.kept(needs(result)))

    def used(methods: list[str]) -> list[Any]:
        names = {name for run in methods for name in run.split("+")}
        return [gr.Accordion(visible=name in names, open=name in names) for name in studio.controls]

    def toggled(methods: list[str], event: gr.SelectData) -> list[str]:
        name = str(event.value)
        if name not in studio.controls:
            return methods
        return [run for run in methods if run != name] if name in methods else [*methods, name]

    def check(path: str | None, scene: float | None, methods: list[str], *values: Any) -> list[Any]:
        """What cannot run as it stands is refused where it was chosen, and the buttons wait."""
        html = ""
        if path is None and scene is None:
            html = '<p class="note">Choose an image first: drop one, paste one, or take an example.</p>'
        else:
            found = changed(methods, values)
            try:
                if not methods:
                    raise ValueError("Choose at least one method.")
                parse_specs(methods, found)
            except USER_ERRORS as error:
                html = markup.refusal(sentence_of(error, "check"), *_culprit(known, found))
        return [html, gr.Button(interactive=not html), gr.Button(interactive=not html)]

    def take(path: str | None) -> list[Any]:
        """A visitor's own image takes the drawn scene's place; a file that is none is refused at once."""
        if path is not None:
            try:
                open_upload(path)
            except USER_ERRORS as error:
                return [None, None, markup.problem(sentence_of(error, "take"))]
        return [gr.skip(), None, ""]

    def show_scene(scene: float | None) -> Any:
        if scene is None or not 0 <= scene < SCENES:
            return [gr.skip(), gr.skip()]
        return [scene_picture(int(scene)).image, ""]

    def show_plain(path: str | None, scene: float | None) -> Any:
        """The image itself, where attention will be drawn over it."""
        with contextlib.suppress(*USER_ERRORS):
            return large(picture_of(path, scene).image), ""
        return None, ""

    def example(event: gr.SelectData) -> int:
        return EXAMPLES[event.index]

    def state_of(
        scene: float | None,
        methods: list[str],
        prompt: str,
        question: str,
        tokens: float,
        steps: float,
        *values: Any,
    ) -> link.State:
        number = None if scene is None else int(scene)
        found = tuple(changed(methods, values))
        return link.State(number, tuple(methods), found, prompt, question, int(tokens), int(steps))

    def reproduce(*parts: Any) -> tuple[str, str, str]:
        state = state_of(*parts)
        used = {name for run in state.methods for name in run.split("+")}
        whole = replace(
            state, params=(*studio.defaults(used), *state.params)
        )  # also what whoever started the demo has set
        model = studio.name, studio.preset
        return link.to_query(state, start), link.to_command(whole, *model), link.to_python(whole, *model)

    @told(lambda html: [html, *[gr.skip()] * (6 + len(known))])
    def restore(query: str) -> list[Any]:
        choices = {control.key for control in known}
        state, wrong = link.from_query(query, SCENES, MAX_TOKENS, MAX_CHARACTERS, start, choices)
        given = {key.strip(): value for key, _, value in (text.partition("=") for text in state.params)}
        fields = [_typed(control, given[control.key]) if control.key in given else gr.skip() for control in known]
        shown = "".join(map(markup.problem, wrong))
        return [
            shown,
            state.scene,
            list(state.methods),
            state.prompt,
            state.question,
            state.tokens,
            state.steps,
            *fields,
        ]

    with gr.Blocks(title="vlm-attn demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.HTML(f"<h1>vlm-attn</h1>{model_line(studio)}", elem_id="head")
        wrong_link = gr.HTML(elem_id="wrong-link")
        result = gr.State(None, time_to_live=3600)
        query = gr.Textbox("", visible=False)
        with gr.Row(elem_id="setup"):
            with gr.Column(scale=3, min_width=280):
                upload = Upload(
                    type="filepath",
                    sources=["upload", "clipboard"],
                    label="Image: drop, paste or choose one",
                    height=270,
                    format="png",
                    buttons=["fullscreen"],
                    elem_id="picture",
                )
                wrong_file = gr.HTML(elem_id="wrong-file")
            with gr.Column(scale=3, min_width=280):
                gallery = gr.Gallery(
                    [(scene_picture(number).image, f"scene {number}") for number in EXAMPLES],
                    label="Examples",
                    columns=3,
                    height=270,
                    object_fit="cover",
                    format="png",
                    allow_preview=False,
                    buttons=[],
                    elem_id="examples",
                )
            with gr.Column(scale=4, min_width=280):
                methods = gr.Dropdown(
                    ["baseline", *studio.controls],
                    value=list(start.methods),
                    multiselect=True,
                    allow_custom_value=True,
                    label="Methods",
                    info="Two or more to compare. baseline is the plain model; write gift+var for two together.",
                    elem_id="methods",
                )
                scene = gr.Number(
                    None,
                    label=f"In place of an image of yours: a drawn scene, 0 to {SCENES - 1}",
                    info="Its objects are known, so wrong words can be marked.",
                    precision=0,
                    minimum=0,
                    maximum=SCENES - 1,
                    elem_id="scene",
                )
        with gr.Accordion("What the methods do", open=False):
            listing = gr.HTML(markup.methods(studio.controls), js_on_load=markup.PICK_JS, elem_id="listing")
        with gr.Accordion("Parameters", open=False, elem_id="parameters"):
            fields, groups = [], []
            for name, controls in studio.controls.items():
                used_first = name in start.methods
                with gr.Accordion(name, open=used_first, visible=used_first) as group:
                    groups.append(group)
                    if not controls:
                        gr.Markdown("No parameters.")
                    fields += [component(control) for control in controls]
        refused = gr.HTML(elem_id="refused")
        with gr.Tab("Describe"):
            with gr.Row():
                prompt = gr.Textbox(start.prompt, label="Prompt", max_length=MAX_CHARACTERS, scale=3, elem_id="prompt")
                label = "Positions to fill in" if studio.denoises else "Tokens at most"
                tokens = gr.Slider(1, MAX_TOKENS, start.tokens, step=1, label=label, min_width=180)
                steps = gr.Slider(
                    int(studio.denoises),
                    MAX_TOKENS,
                    start.steps,
                    step=1,
                    label="Denoising steps",
                    min_width=180,
                    visible=studio.denoises,
                    elem_id="steps",
                )
                with gr.Column(scale=1, min_width=140):
                    go = gr.Button("Describe", variant="primary", elem_id="describe")
                    stop = gr.Button("Stop", visible=False, elem_id="stop")
            with gr.Row(elem_id="results"):
                with gr.Column(scale=2, min_width=280, elem_id="view"):
                    overlay = gr.Image(
                        label="Attention",
                        height=400,
                        format="png",
                        interactive=False,
                        buttons=["fullscreen"],
                        elem_id="overlay",
                    )
                    sentence = gr.HTML(elem_id="sentence")
                with gr.Column(scale=3, min_width=280):
                    shown = gr.HTML(markup.START, js_on_load=markup.JS, elem_id="captions")
                    gr.Markdown(
                        "Choose a word to see where the model looked: click, Tab and Enter, arrow keys, or the slider."
                    )
                    path = gr.Checkbox(
                        True, label="Number the places that the words before it looked at", elem_id="path"
                    )
                    with gr.Row():
                        by_gift = gr.Button("Saliency of the prompt (gift)", size="sm", interactive=False)
                        by_var = gr.Button("Sinks (var)", size="sm", interactive=False)
                        by_kept = gr.Button("Kept tokens", size="sm", interactive=False)
        with gr.Tab("Yes or no"):
            thing = gr.Dropdown(
                sorted(CATEGORIES), value=None, label="Is there ...", info="Fills in POPE's question.", elem_id="thing"
            )
            question = gr.Textbox(start.question, label="Question", max_length=MAX_CHARACTERS, elem_id="question")
            asking = gr.Button("Ask", variant="primary", elem_id="ask")
            said = gr.HTML("", elem_id="answers")
        with gr.Accordion("The same again: link, command, Python", open=False, elem_id="reproduce"):
            with gr.Row():
                address = gr.Textbox(label="Link to this state", interactive=False, buttons=["copy"], elem_id="link")
                command = gr.Textbox(label="Copy as command", interactive=False, buttons=["copy"], elem_id="command")
            code = gr.Textbox(label="Copy as Python", lines=12, interactive=False, buttons=["copy"], elem_id="code")

        sources = [upload, scene, methods]
        limited: dict[str, Any] = {"concurrency_id": "model", "concurrency_limit": AT_ONCE}
        maps = {**limited, "show_progress": "minimal"}
        quiet: dict[str, Any] = {"show_progress": "hidden", "queue": False, "api_visibility": "private"}
        parts = [scene, methods, prompt, question, tokens, steps, *fields]
        upload.input(take, upload, [upload, scene, wrong_file], **quiet)
        scene.change(show_scene, scene, [upload, wrong_file], **quiet)
        gallery.select(example, None, scene, **quiet)
        thing.input(_question, thing, question, **quiet)
        listing.select(toggled, methods, methods, **quiet)
        gr.on(
            [upload.change, scene.change, methods.change, *(field.input for field in fields)],
            check,
            [*sources, *fields],
            [refused, go, asking],
            trigger_mode="always_last",
            **quiet,
        )
        gr.on([upload.change, go.click, prompt.submit], show_plain, [upload, scene], [overlay, sentence], **quiet)
        gr.on([go.click, prompt.submit], None, None, None, js=TO_RESULTS, **quiet)
        writing = gr.on(
            [go.click, prompt.submit],
            describe,
            [*sources, prompt, tokens, steps, *fields],
            [shown, result, go, stop, by_gift, by_var, by_kept],
            api_name="describe",
            trigger_mode="once",
            show_progress_on=shown,  # the place in the queue
            **limited,
        )
        stop.click(
            lambda: on(True, False, False, False),
            None,
            [go, stop, by_gift, by_var, by_kept],
            cancels=[writing],
            **quiet,
        )
        answering = gr.on(
            [asking.click, question.submit],
            ask,
            [*sources, question, *fields],
            said,
            api_name="ask",
            show_progress_on=said,
            **limited,
        )
        for event in (writing, answering):
            again = event.success(reproduce, parts, [query, command, code], **quiet)
            again.then(None, query, address, js=TO_LINK)
        looking = shown.select(
            look, [result, path], [overlay, sentence], trigger_mode="once", api_visibility="private", **maps
        )
        looking.then(None, None, None, js=CATCH_UP, **quiet)
        path.change(None, None, None, js=AGAIN, **quiet)
        by_gift.click(saliency, result, [overlay, sentence], api_name="saliency", **maps)
        by_var.click(sinks, result, [overlay, sentence], api_name="sinks", **maps)
        by_kept.click(kept, result, [overlay, sentence], api_name="kept", **maps)
        methods.change(used, methods, groups, **quiet)
        methods.change(None, methods, None, js=markup.PICKED_JS)
        loading = page.load(
            restore,
            query,
            [wrong_link, *parts],
            js="() => location.search.slice(1)",
            show_progress="hidden",
            api_visibility="private",
        )
        loading.then(None, methods, None, js=markup.PICKED_JS)
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


def _culprit(known: Sequence[Control], found: Sequence[str]) -> tuple[str, str]:
    """The parameter that is refused by itself, and what it takes; nothing where it is none."""
    for text in found:
        key = text.partition("=")[0]
        try:
            parse_specs([key.partition(".")[0]], [text])
        except USER_ERRORS:
            control = next(control for control in known if control.key == key)
            return key, control.limits
    return "", ""


@contextlib.contextmanager
def serving(
    studio: Studio, *, host: str = "127.0.0.1", port: int | None = None, share: bool = False
) -> Iterator[gr.Blocks]:
    """Serve the page for the length of a ``with`` block. What it writes lies in a temporary folder, which goes with it.

    Args:
        studio: what computes.
        host: address to listen on; the default is this machine only.
        port: default: the first free one from 7860 on.
        share: also make a public link through gradio's servers.

    Yields:
        The page; its ``local_url`` is the address.

    Raises:
        OSError: the port is taken.
    """
    before = os.environ.get("GRADIO_TEMP_DIR")
    with tempfile.TemporaryDirectory(prefix="vlm-attn-demo-", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder  # before the page is built: its components read it then
        page = build(studio)
        # The page's thread needs the interpreter often and briefly, those that write captions need it all the time.
        patience = sys.getswitchinterval()
        sys.setswitchinterval(min(patience, SWITCH))
        try:
            page.launch(
                server_name=host,
                server_port=port,
                share=share,
                prevent_thread_lock=True,
                quiet=True,
                max_file_size=MAX_BYTES,
                theme=_theme(),
                css=markup.CSS,
                footer_links=["settings"],
                run_history=False,
                ssr_mode=False,
                enable_monitoring=False,
                state_session_capacity=SESSIONS,
                app_kwargs={"middleware": [Middleware(SameForAll)]},
            )
            with contextlib.suppress(httpx.HTTPError):  # made now, so that the first visitors do not wait for it
                for path in SameForAll.PATHS:
                    httpx.get((page.local_url or "").rstrip("/") + path, timeout=60, trust_env=False)
            yield page
        finally:
            sys.setswitchinterval(patience)
            page.close(verbose=False)
            if before is None:
                del os.environ["GRADIO_TEMP_DIR"]
            else:
                os.environ["GRADIO_TEMP_DIR"] = before


def serve(studio: Studio, **options: Any) -> None:
    """Serve the page until Ctrl-C (or a terminate signal), and say where it is; options as :func:`serving` takes them."""
    with serving(studio, **options) as page:
        print(f"Running on {page.share_url or page.local_url} - Ctrl-C ends it.", flush=True)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # also then the temporary folder goes
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


def _theme() -> Any:
    """Gradio's own, with enough contrast for small and grey text and for its buttons."""
    base = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
    grey, light = "*neutral_600", "*neutral_300"
    return base.set(
        body_text_color_subdued=grey,
        body_text_color_subdued_dark=light,
        block_info_text_color=grey,
        block_info_text_color_dark=light,
        block_label_text_color=grey,
        block_label_text_color_dark=light,
        block_title_text_color="*neutral_700",
        block_title_text_color_dark=light,
        input_placeholder_color=grey,
        input_placeholder_color_dark=light,
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        button_primary_text_color_dark="white",
    )


def _question(thing: str | None) -> Any:
    from vlm_attn.evals.pope import question_text

    return question_text(thing) if thing else gr.skip()


def _typed(control: Control, text: str) -> Any:
    """A parameter of a link as its control takes it."""
    from vlm_attn.evals.specs import parse_value

    return control.shown(parse_value(text))
