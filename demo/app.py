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
    open_upload,
    scene_picture,
)
from vlm_attn.evals.coco import is_transparent  # noqa: E402
from vlm_attn.evals.models import caption_tokens  # noqa: E402
from vlm_attn.evals.scenes import CATEGORIES  # noqa: E402

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
Upload: Any = ABCMeta.__new__(
    type(gr.Image),
    "Upload",
    (gr.Image,),
    {"preprocess": _path, "async_move_resource_to_block_cache": _sent, "is_template": True},
)


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors into messages on the page, also those that nobody expected (these are logged as well)."""

    def message(error: Exception) -> gr.Error:
        text = " ".join(str(error.args[0] if error.args else error).split()) or type(error).__name__
        if not isinstance(error, USER_ERRORS):
            log.exception("demo: %s", function.__name__)
            text = f"Something went wrong ({type(error).__name__}). The details are in the server's log."
        return gr.Error(escape(text, quote=False), print_exception=False)  # messages are rendered as HTML

    @functools.wraps(function)
    def plain(*args: Any) -> Any:
        try:
            return function(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise message(error) from error

    @functools.wraps(function)
    def stream(*args: Any) -> Iterator[Any]:
        try:
            yield from function(*args)
        except gr.Error:
            raise
        except Exception as error:
            raise message(error) from error

    return stream if inspect.isgeneratorfunction(function) else plain


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
    label, value, info = control.name, control.shown(control.default), control.help or None
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
        return gr.Slider(low, high, value=value, step=step, **common)
    return gr.Number(value=value, precision=0 if control.kind == "whole" else None, **common)


def build(studio: Studio) -> gr.Blocks:
    """The page over a studio."""
    known = [control for controls in studio.controls.values() for control in controls]
    start = link.START
    if studio.denoises:
        start = link.State(methods=("baseline", "late_step"), tokens=CANVAS, steps=CANVAS // 2)
    elif studio.name == "scenes-smol":  # its captions are longer, and gift's constants are not known for it
        start = link.State(methods=("baseline", "pai"), tokens=caption_tokens(studio.name) or start.tokens)
    scene_model = studio.name.startswith("scenes")

    def picture_of(path: str | None, scene: float | None) -> Picture:
        if scene is not None:
            return scene_picture(int(scene))
        if path is None:
            raise ValueError("Choose a picture first: drop one, paste one, or take an example.")
        picture = Picture(open_upload(path))
        with Image.open(path) as image:
            if is_transparent(image):
                gr.Warning("The picture has transparent parts: the model is shown the colours below them.")
        return picture

    def changed(methods: Sequence[str], values: Sequence[Any]) -> list[str]:
        return params(studio.controls, methods, {c.key: value for c, value in zip(known, values, strict=True)})

    @told
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
        last = None
        for last in studio.describe(picture, prompt, specs, int(tokens), int(steps) if studio.denoises else None):
            yield markup.captions(last), last
        for run in last.runs if last is not None else ():
            if run.error:
                gr.Warning(escape(f"{run.spec.label}: {run.error}", quote=False))

    @told
    def ask(path: str | None, scene: float | None, methods: list[str], question: str, *values: Any) -> str:
        specs = studio.specs(methods, changed(methods, values))
        return markup.answers(studio.ask(picture_of(path, scene), question, specs))

    def needs(result: Result | None) -> Result:
        if result is None or not result.runs:
            raise ValueError("Describe the picture first.")
        return result

    def shown_as(found: tuple[Any, str]) -> tuple[Any, str]:
        return found[0], escape(found[1])

    @told
    def look(result: Result | None, event: gr.SelectData) -> Any:
        run, word = (int(number) for number in event.index)
        return shown_as(studio.look(needs(result), run, word))

    @told
    def saliency(result: Result | None) -> Any:
        return shown_as(studio.saliency(needs(result)))

    @told
    def sinks(result: Result | None) -> Any:
        return shown_as(studio.sinks(needs(result)))

    @told
    def kept(result: Result | None) -> Any:
        return shown_as(studio.kept(needs(result)))

    def used(methods: list[str]) -> list[Any]:
        names = {name for run in methods for name in run.split("+")}
        return [gr.Accordion(visible=name in names) for name in studio.controls]

    def show_scene(scene: float | None) -> Any:
        return gr.skip() if scene is None or not 0 <= scene < SCENES else scene_picture(int(scene)).image

    def example(event: gr.SelectData) -> int:
        return EXAMPLES[event.index]

    def to_query(
        scene: float | None,
        methods: list[str],
        prompt: str,
        question: str,
        tokens: float,
        steps: float,
        *values: Any,
    ) -> str:
        number = None if scene is None else int(scene)
        found = tuple(changed(methods, values))
        state = link.State(number, tuple(methods), found, prompt, question, int(tokens), int(steps))
        return link.to_query(state, start)

    @told
    def restore(query: str) -> list[Any]:
        choices = {control.key for control in known}
        state, wrong = link.from_query(query, SCENES, MAX_TOKENS, MAX_CHARACTERS, start, choices)
        for sentence in wrong:
            gr.Warning(escape(sentence, quote=False))
        given = {key.strip(): value for key, _, value in (text.partition("=") for text in state.params)}
        fields = [_typed(control, given[control.key]) if control.key in given else gr.skip() for control in known]
        return [state.scene, list(state.methods), state.prompt, state.question, state.tokens, state.steps, *fields]

    with gr.Blocks(title="vlm-attn demo", analytics_enabled=False, delete_cache=(600, 3600)) as page:
        gr.Markdown(
            f"# vlm-attn\nThe same model, `{studio.name}`, with and without edits of its attention."
            + (
                " It is small, and knows nothing but drawn scenes: what it says of photographs means nothing."
                * scene_model
            )
        )
        result = gr.State(None, time_to_live=3600)
        query = gr.Textbox("", visible=False)
        with gr.Row():
            with gr.Column(scale=2, min_width=300):
                upload = Upload(
                    type="filepath",
                    sources=["upload", "clipboard"],
                    label="Picture: drop, paste or choose one",
                    height=300,
                    format="png",
                    buttons=["fullscreen"],
                    elem_id="picture",
                )
                scene = gr.Number(
                    None,
                    label=f"or a drawn scene, 0 to {SCENES - 1}",
                    info="Its objects are known, so wrong words can be marked.",
                    precision=0,
                    minimum=0,
                    maximum=SCENES - 1,
                    elem_id="scene",
                )
                gallery = gr.Gallery(
                    [(scene_picture(number).image, f"scene {number}") for number in EXAMPLES],
                    label="Examples",
                    columns=3,
                    height=320,
                    format="png",
                    allow_preview=False,
                    buttons=[],
                    elem_id="examples",
                )
            with gr.Column(scale=3, min_width=300):
                methods = gr.Dropdown(
                    ["baseline", *studio.controls],
                    value=list(start.methods),
                    multiselect=True,
                    allow_custom_value=True,
                    label="Methods",
                    info="Two or more to compare. baseline is the plain model; write gift+var for two together.",
                    elem_id="methods",
                )
                with gr.Accordion("Parameters", open=False, elem_id="parameters"):
                    fields, groups = [], []
                    for name, controls in studio.controls.items():
                        with gr.Accordion(name, open=False, visible=name in start.methods) as group:
                            groups.append(group)
                            if not controls:
                                gr.Markdown("No parameters.")
                            fields += [component(control) for control in controls]
                with gr.Tab("Describe"):
                    with gr.Row():
                        prompt = gr.Textbox(
                            start.prompt, label="Prompt", max_length=MAX_CHARACTERS, scale=3, elem_id="prompt"
                        )
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
                    with gr.Row():
                        go = gr.Button("Describe", variant="primary", elem_id="describe")
                        stop = gr.Button("Stop", elem_id="stop")
                    shown = gr.HTML(markup.START, js_on_load=markup.JS, elem_id="captions")
                    gr.Markdown(
                        "### Where it looks\nChoose a word of a caption (click, or Tab and Enter; arrow keys go on)."
                    )
                    with gr.Row():
                        by_gift = gr.Button("Saliency of the prompt (gift)", size="sm")
                        by_var = gr.Button("Sinks (var)", size="sm")
                        by_kept = gr.Button("Kept tokens", size="sm")
                    overlay = gr.Image(
                        label="Attention", height=380, format="png", buttons=["fullscreen"], elem_id="overlay"
                    )
                    sentence = gr.HTML(elem_id="sentence")
                with gr.Tab("Yes or no"):
                    thing = gr.Dropdown(
                        sorted(CATEGORIES), value=None, label="Is there ...", info="Fills in POPE's question."
                    )
                    question = gr.Textbox(
                        start.question, label="Question", max_length=MAX_CHARACTERS, elem_id="question"
                    )
                    asking = gr.Button("Ask", variant="primary", elem_id="ask")
                    said = gr.HTML("", elem_id="answers")
        address = gr.Textbox(label="Link to this state", interactive=False, buttons=["copy"], elem_id="link")

        sources = [upload, scene, methods]
        limited: dict[str, Any] = {"show_progress": "minimal", "concurrency_id": "model", "concurrency_limit": AT_ONCE}
        parts = [scene, methods, prompt, question, tokens, steps, *fields]
        upload.input(lambda: None, None, scene, show_progress="hidden", queue=False, api_visibility="private")
        scene.change(show_scene, scene, upload, show_progress="hidden", queue=False, api_visibility="private")
        gallery.select(example, None, scene, show_progress="hidden", queue=False, api_visibility="private")
        thing.input(_question, thing, question, show_progress="hidden", queue=False, api_visibility="private")
        writing = gr.on(
            [go.click, prompt.submit],
            describe,
            [*sources, prompt, tokens, steps, *fields],
            [shown, result],
            api_name="describe",
            trigger_mode="once",
            **limited,
        )
        stop.click(None, cancels=[writing], queue=False)
        answering = gr.on(
            [asking.click, question.submit], ask, [*sources, question, *fields], said, api_name="ask", **limited
        )
        for event in (writing, answering):
            linking = event.success(
                to_query, parts, query, show_progress="hidden", queue=False, api_visibility="private"
            )
            linking.then(None, query, address, js=TO_LINK)
        shown.select(look, result, [overlay, sentence], api_visibility="private", **limited)
        by_gift.click(saliency, result, [overlay, sentence], api_name="saliency", **limited)
        by_var.click(sinks, result, [overlay, sentence], api_name="sinks", **limited)
        by_kept.click(kept, result, [overlay, sentence], api_name="kept", **limited)
        methods.change(used, methods, groups, show_progress="hidden", queue=False, api_visibility="private")
        page.load(
            restore, query, parts, js="() => location.search.slice(1)", show_progress="hidden", api_visibility="private"
        )
    return page.queue(max_size=WAITING, default_concurrency_limit=AT_ONCE)


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
                theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
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
                    httpx.get(page.local_url.rstrip("/") + path, timeout=60, trust_env=False)
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


def _question(thing: str | None) -> Any:
    from vlm_attn.evals.pope import question_text

    return question_text(thing) if thing else gr.skip()


def _typed(control: Control, text: str) -> Any:
    """A parameter of a link as its control takes it."""
    from vlm_attn.evals.specs import parse_value

    return control.shown(parse_value(text))
