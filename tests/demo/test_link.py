# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from dataclasses import replace

import pytest

from vlm_attn.demo.link import State, from_query, to_command, to_python, to_query

LIMITS = {"scenes": 500, "longest": 256, "characters": 100}


@pytest.mark.parametrize(
    "state",
    [
        State(),
        State(scene=0, methods=("gift", "var+gift"), params=("gift.alpha=4", "gift.enhance_layers=1, 2"), tokens=9),
        State(prompt="What is in it?\n& how = many? ünïcode + 100 %", question="Is there a cat?"),
    ],
)
def test_there_and_back(state: State) -> None:
    assert from_query(to_query(state), **LIMITS) == (state, [])


def test_nothing_is_the_start() -> None:
    assert from_query("", **LIMITS) == (State(), [])
    assert to_query(State()) == "scene=3&method=baseline&method=gift"


def test_another_start() -> None:
    """A masked-diffusion model's page has other defaults, which a link need not repeat."""
    start = State(methods=("baseline", "late_step"), tokens=32, steps=16)
    assert to_query(start, start) == "scene=3&method=baseline&method=late_step"
    state = State(methods=("baseline",), tokens=32, steps=8)
    assert to_query(state, start) == "scene=3&method=baseline&steps=8"
    for wanted in (start, state):
        assert from_query(to_query(wanted, start), **LIMITS, start=start) == (wanted, [])


@pytest.mark.parametrize("model", ["scenes", "scenes-diffusion"])
def test_command_and_python_make_the_same_captions(
    model: str, request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]
) -> None:
    """Those of the page."""
    import json
    import shlex

    from typer.testing import CliRunner

    from vlm_attn import cli
    from vlm_attn.demo.studio import scene_picture

    state = State(
        scene=8, methods=("baseline", "divprune"), params=("divprune.keep=4",), prompt="What is it?", tokens=16
    )
    if model == "scenes-diffusion":
        state = replace(state, steps=4)
    studio = request.getfixturevalue("canvas_studio" if state.steps else "studio")
    specs = studio.specs(state.methods, state.params)
    *_, result = studio.describe(scene_picture(8), state.prompt, specs, state.tokens, state.steps or None)
    wanted = [run.text for run in result.runs]
    exec(to_python(state, model), {})
    assert capsys.readouterr().out.splitlines() == [
        f"{run.spec.label}: {text}" for run, text in zip(result.runs, wanted, strict=True)
    ]
    command = shlex.split(to_command(state, model))
    assert command.pop(0) == "vlm-attn"
    done = CliRunner().invoke(cli.app, [*command, "--json", "-"])
    assert done.exit_code == 0, done.output
    assert [row["caption"] for row in json.loads(done.stdout)["captions"]] == wanted
    assert "YOUR_IMAGE" in to_command(replace(state, scene=None), model)


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ("scene=500", "scene='500' in the link is not a number from 0 to 499"),
        ("scene=-1", "scene='-1'"),
        ("scene=" + "9" * 5000, "not a number"),
        ("tokens=many", "tokens='many'"),
        ("steps=0", "steps='0'"),
        ("method=gfit", "did you mean 'gift'"),
        ("method=gift&param=gift.alpha=99", "alpha=99 is outside"),
        ("method=gift&param=gift.alpha=[1", "must be a number"),
        ("method=gift&param=nonsense", "METHOD.PARAMETER=VALUE"),
        ("prompt=" + "a" * 101, "longer than 100"),
        ("&".join(["method=gift"] * 101), "more than 100 fields"),
        ("scene=" + "0" * 9 + "9" * 5000, "not a number"),  # its first digits alone would do
        ("scene=000000000700", "not a number"),
    ],
)
def test_what_is_wrong_is_said_and_left_out(query: str, message: str) -> None:
    state, wrong = from_query(query, **LIMITS)
    assert state == State()
    assert len(wrong) == 1
    assert message in wrong[0]


def test_a_value_may_hold_an_equals_sign() -> None:
    state = State(methods=("icd",), params=("icd.prefix=a=b, c = d=",))
    assert from_query(to_query(state), **LIMITS) == (state, [])
    assert from_query(to_query(state), **LIMITS, known={"icd.prefix"}) == (state, [])


def test_only_what_is_on_the_page_is_taken() -> None:
    query = "method=gift&param=gift.alpha=4&param=trim.clip=ViT-B-32:/etc/passwd"
    state, wrong = from_query(query, **LIMITS, known={"gift.alpha"})
    assert state.params == ("gift.alpha=4",)
    assert wrong == ["trim.clip in the link is no setting of this page, and is left out."]
