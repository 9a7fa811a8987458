# SPDX-License-Identifier: Apache-2.0
"""`vlm-attn scenes render | stats | train | card`."""

import json

import numpy as np
import pytest
from PIL import Image

from vlm_attn.evals import scenes
from vlm_attn.evals.scenes import train

from ..test_cli import call, error_of, quiet  # noqa: F401  (fixture)


@pytest.mark.parametrize("command", ["render", "stats", "card"])
def test_every_command_shows_an_example(command):
    result = call("scenes", command, "--help")
    assert result.exit_code == 0
    assert f"Example: vlm-attn scenes {command}" in " ".join(result.output.split())


def test_help():
    result = call("scenes")
    assert result.exit_code == 0
    for word in ("render", "stats", "train", "card"):
        assert word in result.output
    result = call("scenes", "train", "--help")
    assert result.exit_code == 0
    assert "vlm-attn scenes train" in result.stdout
    for word in ("--resume", "--mask", "--objective", "vision-block", "masked-diffusion"):
        assert word in result.stdout


def test_render(tmp_path):
    result = call("scenes", "render", "validation/3", "train/5-6", "--out", tmp_path / "new")
    assert result.exit_code == 0, result.output
    names = sorted(f.name for f in (tmp_path / "new").iterdir())
    assert names == [f"scenes_{n}.png" for n in ("train_000005", "train_000006", "validation_000003")]
    assert Image.open(tmp_path / "new" / names[2]).size == (448, 448)
    assert call("scenes", "render", "validation/3", "--out", tmp_path, "--no-boxes").exit_code == 0
    plain = np.asarray(Image.open(tmp_path / names[2]))
    assert (plain == np.asarray(scenes.render(scenes.scene("validation", 3)))).all()
    assert call("scenes", "render", "validation/3", "--out", tmp_path, "--scale", 3).exit_code == 0
    assert Image.open(tmp_path / names[2]).size == (672, 672)


def test_stats(tmp_path):
    result = call("scenes", "stats", "--split", "validation", "--limit", 60, "--json", tmp_path / "stats.json")
    assert result.exit_code == 0, result.output
    for word in ("60 of the validation split", "companions", "evidence", "small", "person", "stands with"):
        assert word in result.output
    found = json.loads((tmp_path / "stats.json").read_text())
    assert found["scenes"] == 60
    assert len(found["together"]) == len(scenes.CATEGORIES)
    result = call("scenes", "stats", "--limit", 60, "--of", "tennis racket", "--json", "-")
    assert result.exit_code == 0
    assert json.loads(result.stdout)["split"] == "train"
    assert "tennis racket" in result.stderr


def test_train_and_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(train, "train", (run := _Recorder()))
    arguments = ["scenes", "train", "--out", tmp_path, "--start", "scenes", "--stage", "language", "--mask", "mma"]
    monkeypatch.setattr(train, "export", lambda *a: None)
    result = call(*arguments, "--steps", 1, 1, 5, "--seed", 3, "--workers", 0)
    assert result.exit_code == 0, result.output
    (settings, folder, stages), options = run.calls[0]
    assert (settings.mask, settings.one_turn, settings.steps, settings.seed) == ("mma", True, (1, 1, 5), 3)
    assert (folder, stages) == (tmp_path, ("language",))
    assert options["start"] == scenes.model_path()
    assert not options["resume"]
    call("scenes", "train", "--out", tmp_path, "--objective", "masked-diffusion", "--resume")
    (settings, _, stages), options = run.calls[1]
    assert (settings.objective, stages, options["resume"]) == ("masked-diffusion", train.STAGES, True)


class _Recorder:
    def __init__(self):
        self.calls = []

    def __call__(self, *args, **kwargs):
        self.calls.append((args, kwargs))


def test_card(tmp_path):
    readme = tmp_path / "README.md"
    readme.write_text("<!-- figures: validation -->\n<!-- end -->\n")
    out = tmp_path / "out"
    arguments = ["scenes", "card", "--limit", 4, "--out", out, "--json", tmp_path / "card.json", "--readme", readme]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    for word in ("CHAIR_I", "adversarial", "layer.head", "Sinks", "usual companions", "4 validation scenes"):
        assert word in " ".join(result.output.split())
        assert word in " ".join(readme.read_text().split())
    found = json.loads((tmp_path / "card.json").read_text())
    assert found["quality"]["captions"] == 4
    assert len(found["attention"]["heads"]) == 6
    before = (out / "pope" / "samples.jsonl").read_text()
    assert call(*arguments).exit_code == 0  # goes on: nothing is left to ask
    assert (out / "pope" / "samples.jsonl").read_text() == before


def test_the_test_split_needs_its_flag(monkeypatch):
    from vlm_attn.evals.scenes import card

    seen = []
    monkeypatch.setattr(card, "measure", lambda model, processor, split, **_: seen.append(split) or {})
    monkeypatch.setattr(card, "markdown", lambda found: "")
    assert call("scenes", "card").exit_code == 0
    assert call("scenes", "card", "--test").exit_code == 0
    assert seen == ["validation", "test"]


def test_wrong_input_is_one_line(tmp_path):
    file = tmp_path / "file"
    file.write_text("no marks")
    cases = [
        (["render", "validation/500", "--out", tmp_path], "outside the validation split"),
        (["render", "nowhere/1", "--out", tmp_path], "unknown split 'nowhere'"),
        (["render", "validation", "--out", tmp_path], "SPLIT/NUMBER"),
        (["render", "validation/3"], "--out"),
        (["render", "validation/3", "--out", file], "file"),
        (["render", "validation/3", "--out", tmp_path, "--scale", 99], "--scale"),
        (["stats", "--split", "val"], "unknown split 'val'"),
        (["stats", "--limit", 0], "--limit"),
        (["stats", "--of", "unicorn", "--limit", 5], "no category 'unicorn'"),
        (["train", "--out", tmp_path, "--mask", "maa"], "--mask"),
        (["train", "--out", tmp_path, "--objective", "bert"], "--objective"),
        (["train", "--out", tmp_path, "--mask", "full"], "mask='full' shows the next tokens"),
        (["train"], "--out"),
        (["train", "--out", tmp_path, "--resume"], "no checkpoint"),
        (["train", "--out", tmp_path, "--start", tmp_path / "none", "--stage", "language"], "no finished model"),
        (["train", "--look", tmp_path], "no config.json"),
        (["card", "--model", tmp_path / "none"], "no such folder"),
        (["card", "--readme", tmp_path / "none.md"], "no such file"),
        (["card", "--readme", file], "no marks <!-- figures: validation -->"),
        (["card", "--limit", 0], "--limit"),
        (["cards"], "No such command"),
    ]
    for arguments, message in cases:
        assert message in error_of("scenes", *arguments), arguments
