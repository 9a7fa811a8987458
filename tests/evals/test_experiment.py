# SPDX-License-Identifier: Apache-2.0
"""The experiment behind the effect table: searched on one split, scored once on another, resumed where it stopped."""

from __future__ import annotations

import json

import pytest

from vlm_attn.evals import experiment, scenes
from vlm_attn.evals.calibrate import choose
from vlm_attn.evals.models import load_model
from vlm_attn.evals.specs import parse_specs
from vlm_attn.patching import is_patched

OPTIONS = {"model_name": "scenes", "search_images": 6, "limit": 3, "max_new_tokens": 24}


@pytest.fixture(scope="module")
def bundled():
    return load_model("scenes")


def splits():
    return {"searched_on": scenes.dataset("validation"), "tested_on": scenes.dataset("test")}


def test_every_grid_is_of_runs_and_parameters_that_exist():
    for label in experiment.GRIDS:
        for spec in experiment.settings(label):
            assert spec.build() is not None
            assert set(spec.params) <= set(spec.names)
    with pytest.raises(ValueError, match="unknown run 'gfit'; did you mean 'gift'"):
        experiment.settings("gfit")


def test_searches_on_one_split_and_tests_once_on_the_other(bundled, tmp_path):
    found = experiment.experiment(*bundled, ["vcd", "mma", "mvp"], out=tmp_path, **OPTIONS, **splits())

    searched = json.loads((tmp_path / "search/vcd/results.json").read_text())
    tested = json.loads((tmp_path / "test/vcd/chair/results.json").read_text())
    assert (searched["config"]["data"], tested["config"]["data"]) == ("scenes:validation", "scenes:test")
    assert len(searched["metrics"]) == found["vcd"]["searched"] == 6
    # What is tested is what the rule chose among the settings, by their figures on the search split.
    rows = {label: {k: {"value": v} for k, v in row.items()} for label, row in found["vcd"]["settings"].items()}
    best = choose(rows, [label for label in rows if label != "baseline"])
    chosen = dict(pair.removeprefix("vcd.").split("=") for pair in best.split(", "))
    params = tested["config"]["methods"]["vcd"][0]["params"]
    assert {key: params[key] for key in chosen} == {key: json.loads(value) for key, value in chosen.items()}
    assert found["vcd"]["low"] <= found["vcd"]["latency"] <= found["vcd"]["high"]

    assert (found["mma"]["searched"], (tmp_path / "search/mma").exists()) == (1, False)
    assert not (tmp_path / "test/mvp/chair").exists()  # it answers closed questions only
    assert (tmp_path / "test/mvp/pope/results.json").exists()
    assert (tmp_path / "test/baseline/chair/results.json").exists()


def test_goes_on_where_it_stopped_and_refuses_another_choice(bundled, tmp_path):
    first = experiment.experiment(*bundled, ["dola"], out=tmp_path, **OPTIONS, **splits())
    lines = (tmp_path / "test/dola/chair/samples.jsonl").read_bytes()
    seen = []
    again = experiment.experiment(
        *bundled, ["dola", "vision_block"], out=tmp_path, done=lambda *what: seen.append(what), **OPTIONS, **splits()
    )
    assert again["dola"] == first["dola"]  # its latency was not measured anew either
    assert (tmp_path / "test/dola/chair/samples.jsonl").read_bytes() == lines
    assert any(what == "test/vision_block/chair" for what, _, _ in seen)

    settings = json.loads((tmp_path / "settings.json").read_text())
    settings["dola"]["chosen"] = {"dola": {"layers": "other"}}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="dola was tested with"):
        experiment.experiment(*bundled, ["dola"], out=tmp_path, **OPTIONS, **splits())
    with pytest.raises(ValueError, match="same images"):
        experiment.experiment(
            *bundled, ["dola"], out=tmp_path / "x", **OPTIONS, **{**splits(), "tested_on": scenes.dataset("validation")}
        )


def test_latency_alternates_with_the_plain_model(bundled, monkeypatch):
    task = experiment.chair_task(scenes.dataset("validation"), limit=2, max_new_tokens=4)
    runs = []
    plain = experiment.generate
    monkeypatch.setattr(experiment, "generate", lambda m, *rest: runs.append(is_patched(m)) or plain(m, *rest))
    found = experiment.latency(*bundled, parse_specs(["mma"])[0], task, pairs=2)
    assert runs == [True, False] * 3  # one pair warms up
    assert 0 < found["low"] <= found["latency"] <= found["high"]
