# SPDX-License-Identifier: Apache-2.0
"""The state of the page as a URL's query, in the words of the command line: ``?scene=3&method=baseline&param=gift.alpha=4``."""

from __future__ import annotations

import shlex
from collections.abc import Container, Iterable
from dataclasses import dataclass
from urllib.parse import parse_qsl, urlencode

from vlm_attn.evals import chair, specs

METHODS = ("baseline", "gift")
MAX_FIELDS = 100


@dataclass(frozen=True)
class State:
    """What a link carries. A picture of one's own is not among it: it stays on the server that was given it.

    Attributes:
        scene: number of a drawn scene, None for a picture of one's own.
        methods: the runs.
        params: what differs from the defaults, ``"gift.alpha=4"``.
        prompt: what to ask for.
        question: the yes/no question.
        tokens: longest answer.
        steps: denoising steps; 0 for a model that has none.
    """

    scene: int | None = 3
    methods: tuple[str, ...] = METHODS
    params: tuple[str, ...] = ()
    prompt: str = chair.PROMPT
    question: str = "Is there a dog in the image?"
    tokens: int = 64
    steps: int = 0


START = State()


def to_query(state: State, start: State = START) -> str:
    """The query, without its question mark; of what is as at the start, only picture and methods are in it."""
    pairs: list[tuple[str, object]] = []
    if state.scene is not None:
        pairs.append(("scene", state.scene))
    pairs += [("method", method) for method in state.methods]
    pairs += [("param", param) for param in state.params]
    for name in ("prompt", "question", "tokens", "steps"):
        if getattr(state, name) != getattr(start, name):
            pairs.append((name, getattr(state, name)))
    return urlencode(pairs)


def to_command(state: State, model: str, preset: str | None = None) -> str:
    """The shell command that makes the same captions; an image of one's own is ``YOUR_IMAGE``.

    Args:
        state: the state of the page.
        model: its ``--model``.
        preset: its ``--preset``.
    """
    words = [
        "vlm-attn",
        "caption",
        "YOUR_IMAGE" if state.scene is None else f"scenes:validation/{state.scene}",
        "--model",
        model,
    ]
    words += [word for method in state.methods for word in ("--method", method)]
    words += [word for param in state.params for word in ("--param", param)]
    words += ["--preset", preset] if preset else []
    words += ["--prompt", state.prompt] if state.prompt != State.prompt else []
    length = ["--gen-length", str(state.tokens), "--steps", str(state.steps)] if state.steps else None
    return shlex.join(words + (length or ["--max-new-tokens", str(state.tokens)]))


def to_python(state: State, model: str, preset: str | None = None) -> str:
    """The Python that makes the same captions; see :func:`to_command`."""
    if state.scene is None:
        importing, image = "from vlm_attn.evals import coco, prompts", 'coco.open_image("YOUR_IMAGE")'
    else:
        importing = "from vlm_attn.evals import prompts, scenes"
        image = f'scenes.render(scenes.scene("validation", {state.scene}))'
    denoise = (
        f', prompts.denoising(model, {{"gen_length": {state.tokens}, "steps": {state.steps}}})' if state.steps else ""
    )
    given = "".join(f", {text!r}" for text in (preset,) if text)
    return f"""{importing}
from vlm_attn.evals.models import load_model
from vlm_attn.evals.specs import parse_specs

model, processor = load_model({model!r})
image = {image}
prompt = {state.prompt!r}
for run in parse_specs({list(state.methods)!r}, {list(state.params)!r}{given}):
    with run.applied(model, processor):  # patched here, put back after
        (answer,), _ = prompts.generate(model, processor, [image], [prompt], {state.tokens}{denoise})
    print(f"{{run.label}}: {{answer}}")
"""


def from_query(
    query: str,
    scenes: int,
    longest: int,
    characters: int,
    start: State = START,
    known: Container[str] | None = None,
) -> tuple[State, list[str]]:
    """The state a query stands for. What cannot be used is left at its default and reported.

    Args:
        query: without its question mark.
        scenes: number of scenes there are.
        longest: largest ``tokens``.
        characters: length at which texts are refused.
        start: the defaults.
        known: parameters that a visitor may choose (``"gift.alpha"``); None: all.

    Returns:
        The state, and one sentence for each thing that was wrong.
    """
    try:
        pairs = parse_qsl(query, keep_blank_values=True, max_num_fields=MAX_FIELDS)
    except ValueError:
        return start, [f"The link has more than {MAX_FIELDS} fields, so nothing is taken from it."]
    wrong = []

    def whole(name: str, low: int, high: int, default: int | None) -> int | None:
        text = next((value for key, value in pairs if key == name), None)
        if text is None:
            return default
        if text.isdecimal() and len(text) <= 9 and low <= int(text) <= high:
            return int(text)
        wrong.append(f"{name}={text[:40]!r} in the link is not a number from {low} to {high}.")
        return default

    def words(name: str, default: str) -> str:
        text = next((value for key, value in pairs if key == name), default)
        if len(text) > characters:
            wrong.append(f"{name} in the link is longer than {characters} characters.")
            return default
        return text

    methods = _unique(value for key, value in pairs if key == "method") or start.methods
    params = _unique(value for key, value in pairs if key == "param")
    closed = [] if known is None else [text for text in params if text.partition("=")[0].strip() not in known]
    for text in closed:
        wrong.append(f"{text.partition('=')[0][:40]} in the link is no setting of this page, and is left out.")
    params = tuple(text for text in params if text not in closed)
    try:
        specs.parse_specs(methods, params)
    except (ValueError, TypeError) as error:
        wrong.append(f"The link's methods cannot be used: {error}.")
        methods, params = start.methods, ()
    state = State(
        scene=whole("scene", 0, scenes - 1, start.scene),
        methods=methods,
        params=params,
        prompt=words("prompt", start.prompt),
        question=words("question", start.question),
        tokens=whole("tokens", 1, longest, start.tokens) or start.tokens,
        steps=whole("steps", 1, longest, start.steps) or start.steps,
    )
    return state, wrong


def _unique(values: Iterable[str]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(values))
