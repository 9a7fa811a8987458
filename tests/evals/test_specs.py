# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import vlm_attn
from vlm_attn.evals.specs import MethodSpec, parse_specs, parse_value

LAYERS = ["gift.saliency_layers=[1]", "gift.enhance_layers=[1, 2]"]


@pytest.mark.parametrize(
    ("text", "value"),
    [("4", 4), ("0.5", 0.5), ("[2, 3]", (2, 3)), ("true", True), ("null", None), ("all", "all"), ('"4"', "4")],
)
def test_values(text: str, value: Any) -> None:
    assert parse_value(text) == value
    assert type(parse_value(text)) is type(value)


def test_runs_and_their_parameters() -> None:
    specs = parse_specs(
        ["baseline", "gift", "var+gift", "gift"], ["gift.alpha=4", "gift.query_words=all", "var.p=0.5", *LAYERS]
    )
    assert [spec.label for spec in specs] == ["baseline", "gift", "var+gift"]
    assert [spec.names for spec in specs] == [(), ("gift",), ("var", "gift")]
    gift = {"alpha": 4, "query_words": "all", "saliency_layers": (1,), "enhance_layers": (1, 2)}
    assert [spec.params for spec in specs] == [{}, {"gift": gift}, {"gift": gift, "var": {"p": 0.5}}]
    var, composed = specs[2].build()
    assert (var.name, var.p, composed.name, composed.alpha) == ("var", 0.5, "gift", 4)


def test_a_value_may_hold_an_equals_sign_and_a_point() -> None:
    for value in ("a=b", "x.y=1.5, z=2", "=", "icd.prefix=odd"):
        (spec,) = parse_specs(["icd"], [f"icd.prefix={value}", "icd.alpha=0.5"])
        assert spec.params == {"icd": {"prefix": value, "alpha": 0.5}}


@pytest.mark.parametrize(
    ("methods", "params", "message"),
    [
        (["gfit"], [], "unknown method 'gfit'; did you mean 'gift'"),
        (["var+gfit"], [], "did you mean 'gift'"),
        (["baseline+gift"], [], "baseline is the plain model"),
        (["gift"], ["gift.alpah=4"], "did you mean 'alpha'"),
        (["gift"], ["gitf.alpha=4"], "did you mean 'gift'"),
        (["gift"], ["alpha=4"], "METHOD.PARAMETER=VALUE"),
        (["gift"], ["gift.alpha"], "METHOD.PARAMETER=VALUE"),
        (["gift"], ["gift.alpha=-1"], "alpha"),
        (["gift"], ["gift.alpha=much"], "alpha"),
        (["baseline"], ["gift.alpha=4"], "no run uses gift"),
        ([""], [], "unknown method ''"),
    ],
)
def test_wrong_specs_are_refused_before_a_model_is_loaded(methods: list[str], params: list[str], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        parse_specs(methods, params)


def test_spec_patches_inside_its_block_only(tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    (spec,) = parse_specs(["gift"], LAYERS)
    with spec.applied(model, processor) as patched:
        assert patched is model
        assert vlm_attn.is_patched(model)
    assert not vlm_attn.is_patched(model)
    with MethodSpec("baseline").applied(model, processor):
        assert not vlm_attn.is_patched(model)


def test_description_holds_every_parameter_as_it_runs(tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    (spec,) = parse_specs(["gift"], ["gift.alpha=3", *LAYERS])
    (described,) = spec.describe(model, processor)
    assert described["name"] == "gift"
    assert described["params"]["alpha"] == 3
    assert described["params"]["enhance_layers"] == [1, 2]
    assert described["params"]["beta"] == 1.0  # a default
    assert MethodSpec("baseline").describe(model, processor) == []
    with pytest.raises(ValueError, match="saliency_layers"):  # no preset for this model
        MethodSpec("gift", ("gift",)).describe(model, processor)


def test_preset_of_the_model_fills_in(tiny_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from vlm_attn import presets

    known = {"saliency_layers": (0,), "enhance_layers": (1,), "alpha": 2.0}
    monkeypatch.setattr(presets, "constants", lambda name, config, preset: dict(known))
    model, processor = tiny_model
    (described,) = parse_specs(["gift"], [])[0].describe(model, processor)
    assert described["params"]["alpha"] == 2.0  # the preset's, not the class's default
    (described,) = parse_specs(["gift"], ["gift.alpha=3"])[0].describe(model, processor)
    assert described["params"]["alpha"] == 3
    assert described["params"]["enhance_layers"] == [1]


def test_preset_by_file(tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    model, processor = tiny_model
    file = tmp_path / "tiny.json"
    file.write_text('{"methods": {"gift": {"saliency_layers": [1], "enhance_layers": [2], "alpha": 1.5}}}')
    (described,) = parse_specs(["gift"], [], str(file))[0].describe(model, processor)
    assert (described["params"]["alpha"], described["params"]["enhance_layers"]) == (1.5, [2])
    with pytest.raises(ValueError, match="llava-1.5-7b"):
        parse_specs(["gift"], [], "llava-1.5-7b")[0].describe(model, processor)
