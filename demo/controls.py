# SPDX-License-Identifier: Apache-2.0
"""What a page can offer for a method: its kind, and its parameters with type, default, range and help, read from the class."""

from __future__ import annotations

import inspect
import re
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal

from vlm_attn import presets, registry
from vlm_attn.branch import Decoding
from vlm_attn.heads import HeadMethod
from vlm_attn.method import Method
from vlm_attn.reduction import Reducer

Kind = Literal["number", "whole", "switch", "choice", "text"]
_RANGE = re.compile(r"Range ([(\[]?)(-?\d+(?:\.\d+)?)(?:\.\.|, )(-?\d+(?:\.\d+)?)(\)?)")


@dataclass(frozen=True)
class Control:
    """One parameter of one method.

    Attributes:
        method: the method's name.
        name: the parameter's name.
        kind: what it holds; ``"text"`` is anything that is written out, such as layers (``3, 4``).
        default: its value on this model when nothing is chosen (a preset's, else the dataclass's); None: no preset has it.
        help: its line of the docstring.
        low: smallest allowed value, None where the docstring gives no range.
        high: largest allowed value.
        open_low: ``low`` itself is not allowed.
        open_high: ``high`` itself is not allowed.
        choices: the values of a ``"choice"``.
    """

    method: str
    name: str
    kind: Kind
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False
    choices: tuple[str, ...] = ()

    @property
    def key(self) -> str:
        """As the command line writes it: ``gift.alpha``."""
        return f"{self.method}.{self.name}"

    def shown(self, value: Any) -> Any:
        """A value as a page shows it: numbers of a tuple with commas, None as nothing."""
        if self.kind != "text":
            return value
        if value is None:
            return ""
        return ", ".join(map(str, value)) if isinstance(value, tuple) else str(value)

    @property
    def text(self) -> str:
        """``help`` for a reader who knows neither Python nor markup, with the range in words."""
        limits = _RANGE.search(self.help)
        if limits is None:
            return plain(self.help)
        end = limits.end() + self.help[limits.end() :].startswith("]")
        return plain(self.help[: limits.start()] + _in_words(limits) + self.help[end:])

    @property
    def limits(self) -> str:
        """What it takes, in a few words."""
        limits = _RANGE.search(self.help)
        if self.kind == "choice":
            return " or ".join(self.choices)
        if limits is None:
            return {"number": "a number", "whole": "a whole number", "switch": "on or off"}.get(
                self.kind, "see its text"
            )
        return _in_words(limits).lower()

    def param(self, value: Any) -> str | None:
        """A chosen value as ``--param`` takes it, ``gift.alpha=4``; None where it is the default or nothing."""
        if value is None or value == "" or value == self.shown(self.default):
            return None
        if self.kind == "whole" and isinstance(value, float) and value.is_integer():
            value = int(value)
        if self.kind == "switch":
            value = str(bool(value)).lower()
        return f"{self.key}={value}"


def _in_words(limits: re.Match[str]) -> str:
    """A range as :data:`_RANGE` finds it, in words."""
    low, high = limits[2], limits[3]
    if limits[1] == "(":
        return f"More than {low}, at most {high}"
    return f"From {low} to {'less than ' if limits[1] and limits[4] else ''}{high}"


def plain(text: str) -> str:
    """A docstring's sentence without its markup."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"\1", text)
    text = re.sub(r"`+([^`]*)`+", r"\1", text)
    text = re.sub(r"(?<!\w)\*(\w[^*]*)\*", r"\1", text)
    text = re.sub(r"(\d)\.\.(\d)", r"\1 to \2", text)
    return text.replace("+-", "±")


#: Kinds of methods, in the order of the page.
KINDS = (
    "Attention is edited",
    "The next token is chosen otherwise",
    "Who sees whom in the prompt",
    "Fewer visual tokens",
    "Fewer visual tokens while denoising",
    "Fewer keys per head",
)


def kind(cls: type[Method]) -> str:
    """Which of `KINDS` a method is."""
    if issubclass(cls, Decoding):
        return KINDS[1]
    if issubclass(cls, Reducer):
        return KINDS[4 if getattr(cls, "timed", False) else 3]
    if issubclass(cls, HeadMethod):
        return KINDS[5]
    return KINDS[2 if hasattr(cls, "visible") else 0]


def parameter_help(cls: type) -> dict[str, str]:
    """The lines under ``Attributes:`` of a class's docstring and its bases' by name, each as one paragraph."""
    found: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        _, _, block = inspect.cleandoc(base.__dict__.get("__doc__") or "").partition("Attributes:\n")
        name = ""
        for line in block.splitlines():
            if line and not line.startswith(" "):
                break
            entry = re.match(r" {4}(\w+): (.*)", line)
            if entry:
                name, found[entry[1]] = entry[1], entry[2].strip()
            elif name and line.strip():
                found[name] += " " + line.strip()
    return found


def kept_back(cls: type[Method]) -> list[str]:
    """Parameters that a visitor may not choose, as they name a file or a model on the server.

    Those that the method says it loads; of methods of other packages also every text, as nobody has looked what it names.
    """
    hints = typing.get_type_hints(cls)
    foreign = cls.__module__.partition(".")[0] != __name__.partition(".")[0]
    return [
        field.name
        for field in fields(cls)
        if field.name in cls.loads or (foreign and {str, Path, Any} & set(_alternatives(hints[field.name])))
    ]


def controls(
    cls: type[Method], config: Any = None, given: Mapping[str, Any] | None = None, preset: str | None = None
) -> list[Control]:
    """The parameters of a method that a visitor may choose, in the order of its fields.

    Args:
        cls: the method's class.
        config: the model's config; the preset that fits it gives defaults.
        given: defaults of whoever starts the demo.
        preset: the name or file of another preset, which has this method's constants.
    """
    constants = dict(presets.constants(cls.name, config, preset)) if config is not None else {}
    constants |= given or {}
    hints, texts = typing.get_type_hints(cls), parameter_help(cls)
    found = []
    for field in fields(cls):
        if field.name in kept_back(cls):
            continue
        hint, text = hints[field.name], texts.get(field.name, "")
        options = [kind for kind in _alternatives(hint) if kind is not type(None)]
        kind, choices = _kind(options)
        limits = _RANGE.search(text) if kind in ("number", "whole") else None
        found.append(
            Control(
                method=cls.name,
                name=field.name,
                kind=kind,
                default=constants.get(field.name, field.default),
                help=text,
                low=float(limits[2]) if limits else None,
                high=float(limits[3]) if limits else None,
                open_low=bool(limits and limits[1] == "("),
                open_high=bool(limits and limits[1] and limits[4]),
                choices=choices,
            )
        )
    return found


#: Methods that answer yes/no questions only, with the reason.
CLOSED = {"mvp": "mvp weighs the answers to a closed question, so it cannot describe: ask it on the tab Yes or no."}


def needs_model(cls: type[Method], given: Mapping[str, Any]) -> list[str]:
    """Parameters that name a model the method cannot do without, and that whoever starts the demo has not given."""
    defaults = {field.name: field.default for field in fields(cls)}
    return [name for name in cls.loads if name not in given and defaults[name]]


def all_controls(
    config: Any = None, given: Mapping[str, Mapping[str, Any]] | None = None, preset: str | None = None
) -> dict[str, list[Control]]:
    """The parameters of the methods that the demo has for a model, by name, sorted by kind and name.

    Not among them: methods for denoising steps where there are none, those that choose the next token where there are such
    steps, and those that load another model unless it is given.

    Args:
        config: the model's config; the preset that fits it gives defaults.
        given: method -> parameters that whoever starts the demo has set.
        preset: the name or file of a preset; methods it has nothing for keep the defaults of the one that fits.
    """
    given = given or {}
    denoises = getattr(config, "mask_token_id", None) is not None
    known = {
        name: info.cls
        for name, info in sorted(registry.methods().items(), key=lambda item: (KINDS.index(kind(item[1].cls)), item[0]))
        if not (issubclass(info.cls, Decoding) if denoises else getattr(info.cls, "timed", False))
        and not needs_model(info.cls, given.get(name, {}))
    }
    has = presets.load(preset)["methods"] if preset is not None else {}
    return {
        name: controls(cls, config, given.get(name), preset if name in has else None) for name, cls in known.items()
    }


def params(known: Mapping[str, Sequence[Control]], methods: Sequence[str], values: Mapping[str, Any]) -> list[str]:
    """What was changed from the defaults, as ``--param`` takes it.

    Args:
        known: what :func:`all_controls` found.
        methods: the runs, ``"gift"`` or ``"var+gift"``; parameters of other methods do not count.
        values: chosen values by key (``"gift.alpha"``); a missing key is the default.
    """
    used = {name for run in methods for name in run.split("+")}
    texts = [c.param(values.get(c.key)) for name in sorted(used & set(known)) for c in known[name]]
    return [text for text in texts if text is not None]


def _alternatives(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)


def _kind(options: Sequence[Any]) -> tuple[Kind, tuple[str, ...]]:
    """The control of a type; a type that has none of its own is written out."""
    if len(options) == 1:
        (hint,) = options
        if typing.get_origin(hint) is Literal and all(isinstance(value, str) for value in typing.get_args(hint)):
            return "choice", typing.get_args(hint)
        plain: dict[Any, Kind] = {bool: "switch", int: "whole", float: "number"}
        if hint in plain:
            return plain[hint], ()
    return "text", ()
