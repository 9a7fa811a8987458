# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import dataclasses
import math
import re
import typing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from vlm_attn import registry
from vlm_attn.demo.controls import KINDS, Control, all_controls, controls, kept_back, kind, params
from vlm_attn.method import Method, check_range
from vlm_attn.reduction import Reducer

ALL = [control for found in all_controls().values() for control in found]


@dataclass(frozen=True, kw_only=True)
class Example(Method):
    """One of each.

    Attributes:
        share: how much. Range (0, 1].
        count: how many,
            in two lines. Range 1..9.
        sort: which kind.
        on: whether.
        layers: where; None = from the preset.
        either: a number or not.

    More: not a parameter.
    """

    name: ClassVar[str] = "example"

    share: float = 0.5
    count: int = 3
    sort: Literal["a", "b"] = "a"
    on: bool = False
    layers: tuple[int, ...] | None = (2, 3)
    either: float | int = 1

    def __post_init__(self) -> None:
        check_range(self, "share", 0, 1, open_low=True)


#: Texts that a visitor may write: somebody has looked that none names a file or a model.
HARMLESS = {"icd.prefix", "late_step.reducer", "progressive.reducer", "mvp.answers"}


def test_every_text_is_known_to_name_no_file() -> None:
    """A new method's text parameter has to be put on one of the two lists."""
    for name, info in registry.methods().items():
        back = kept_back(info.cls)
        named = {"keep"} if issubclass(info.cls, Reducer) else set()  # a row of a published table, by its name
        for field, hint in typing.get_type_hints(info.cls).items():
            plain = str(hint).replace("typing.", "")
            if field in {f.name for f in dataclasses.fields(info.cls)} and "str" in plain.replace("Literal", ""):
                assert field in back or field in named or f"{name}.{field}" in HARMLESS, f"{name}.{field}"
        assert not {c.name for c in controls(info.cls)} & set(back)
    assert {"cdpruner.clip", "trim.clip", "agla.clip"} == {
        f"{name}.{field}" for name, info in registry.methods().items() for field in kept_back(info.cls)
    }


def test_of_other_packages_no_text_is_offered() -> None:
    assert Example.__module__.partition(".")[0] != "vlm_attn"

    @dataclass(frozen=True, kw_only=True)
    class Foreign(Example):
        """Of another package.

        Attributes:
            file: what to read.
            either_way: a path or nothing.
        """

        file: str = "a"
        either_way: Path | None = None

    assert kept_back(Foreign) == ["file", "either_way"]
    assert {control.name for control in controls(Foreign)} == {control.name for control in controls(Example)}


def test_methods_that_ask_a_model_come_with_it() -> None:
    assert not {"cdpruner", "trim"} & set(all_controls())
    given = {"trim": {"clip": "ViT-B-32:x"}, "gift": {"alpha": 7.0}}
    assert "trim" in all_controls(None, given)
    assert "cdpruner" not in all_controls(None, given)
    assert next(c for c in all_controls(None, given)["gift"] if c.name == "alpha").default == 7.0


def test_every_kind() -> None:
    found = {control.name: control for control in controls(Example)}
    assert {name: control.kind for name, control in found.items()} == {
        "share": "number", "count": "whole", "sort": "choice", "on": "switch", "layers": "text", "either": "text",
    }  # fmt: skip
    assert (found["share"].low, found["share"].high, found["share"].open_low) == (0, 1, True)
    assert (found["count"].low, found["count"].high, found["count"].open_low) == (1, 9, False)
    assert found["count"].help == "how many, in two lines. Range 1..9."
    assert found["sort"].choices == ("a", "b")
    assert found["layers"].shown((2, 3)) == "2, 3"
    assert found["layers"].shown(None) == ""


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("how ``much``. Range (0, 10].", "how much. More than 0, at most 10."),
        (
            "see :class:`~vlm_attn.visual_token_ops.clip.ClipReducer`. Range 0..1; 0 = none.",
            "see ClipReducer. From 0 to 1; 0 = none.",
        ),
        ("of them. Range [0, 1).", "of them. From 0 to less than 1."),
    ],
)
def test_help_is_text(text: str, plain: str) -> None:
    assert Control("a", "b", "number", 0, text).text == plain


def test_no_markup_is_left() -> None:
    for control in ALL:
        assert not re.search(r"``|:\w+:`|\d\.\.\d", control.text), control.key


def test_kinds() -> None:
    """Methods stand by kind, then by name."""
    classes = {name: registry.method_class(name) for name in all_controls()}
    assert {kind(cls) for cls in classes.values()} == set(KINDS) - {"Fewer visual tokens while denoising"}
    order = [(KINDS.index(kind(cls)), name) for name, cls in classes.items()]
    assert order == sorted(order)
    names = ("gift", "opera", "mma", "fastv", "duo")
    assert [KINDS.index(kind(classes[name])) for name in names] == [0, 1, 2, 3, 5]


@pytest.mark.parametrize("control", ALL, ids=lambda control: control.key)
def test_registered_methods(control: Any) -> None:
    """Every parameter has help; the range that its docstring names is the one that is enforced."""
    assert control.help
    if control.low is None or control.high is None:
        return
    assert control.low < control.high

    def accepts(value: float) -> bool:
        try:
            registry.build(control.method, **{control.name: value})
        except ValueError:
            return False
        return True

    assert accepts(control.high) is not control.open_high
    assert not accepts(math.nextafter(control.high, math.inf))
    assert accepts(control.low) is not control.open_low
    assert not accepts(math.nextafter(control.low, -math.inf))


def test_defaults_of_the_preset(studio: Any) -> None:
    """What the page shows is what runs when nothing is touched."""
    for spec in studio.specs(["gift", "var"]):
        (method,) = spec.describe(studio.shell(), studio.processor)
        shown = {control.name: control.default for control in studio.controls[spec.label]}
        for name, value in method["params"].items():
            if name != "layers":  # var fills it in when it is bound
                assert shown[name] == (tuple(value) if isinstance(value, list) else value)


def test_only_what_differs_becomes_a_parameter(studio: Any) -> None:
    known = studio.controls
    untouched = {control.key: control.shown(control.default) for found in known.values() for control in found}
    assert params(known, ["baseline", "gift", "var"], untouched) == []
    assert params(known, ["var+gift"], {}) == []
    changed = {**untouched, "gift.alpha": 4, "gift.enhance_layers": "1, 2", "var.code_parity": True, "var.layers": ""}
    assert params(known, ["baseline"], changed) == []
    assert params(known, ["gift"], changed) == ["gift.enhance_layers=1, 2", "gift.alpha=4"]
    assert params(known, ["var+gift"], changed)[-1] == "var.code_parity=true"
    (spec,) = studio.specs(["var+gift"], params(known, ["var+gift"], changed))
    assert spec.params == {"gift": {"enhance_layers": (1, 2), "alpha": 4}, "var": {"code_parity": True}}
