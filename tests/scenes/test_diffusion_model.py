# SPDX-License-Identifier: Apache-2.0
"""The bundled masked-diffusion model sees: it answers and describes, on the command line too."""

import json

import pytest
from typer.testing import CliRunner

from vlm_attn import diffusion
from vlm_attn.cli import app
from vlm_attn.evals import prompts, scenes
from vlm_attn.evals.models import load_model
from vlm_attn.evals.scenes import text


@pytest.fixture(scope="module")
def loaded():
    return load_model("scenes-diffusion", device="cpu")


def test_it_answers_and_describes(loaded):
    model, processor = loaded
    picked = [scenes.scene("validation", index) for index in range(12)]
    pictures = [scenes.render(scene) for scene in picked]
    right = 0
    for wanted in ("yes", "no"):
        absent = [[c for c in scenes.CATEGORIES if c not in s.categories] for s in picked]
        nouns = [
            s.categories[0] if wanted == "yes" else a[i] for i, (s, a) in enumerate(zip(picked, absent, strict=True))
        ]
        answers, _ = prompts.generate(model, processor, pictures, [text.question(n) for n in nouns], 10)
        right += sum(answer == wanted for answer in answers)
    assert right >= 18
    captions, _ = prompts.generate(model, processor, pictures, [text.CAPTION_PROMPTS[0]] * 12, 64)
    found = sum(c in said for said, s in zip(captions, picked, strict=True) for c in s.categories)
    assert found >= 0.4 * sum(len(s.categories) for s in picked)


def test_caches_on_it(loaded):
    model, processor = loaded
    inputs = prompts.build_inputs(
        model, processor, [scenes.render(scenes.scene("validation", 3))], [text.CAPTION_PROMPTS[0]]
    )
    options = {"steps": 8, "gen_length": 32}
    wanted = diffusion.generate(model, inputs, **options).tokens.tolist()
    for cache in ("prefix", "block", "dual"):
        assert diffusion.generate(model, inputs, cache=cache, **options).tokens.tolist() == wanted


def test_on_the_command_line(tmp_path):
    out = tmp_path / "captions.json"
    run = CliRunner().invoke(
        app,
        f"caption scenes:validation/3 --model scenes-diffusion --device cpu --steps 8 --prune divprune --json {out}".split(),
    )
    assert run.exit_code == 0, run.output
    assert json.loads(out.read_text())["captions"][0]["method"] == "divprune"
    for wrong, message in (
        ("--steps 5 --block-length 8 --model scenes-diffusion", "no multiple"),
        ("--max-new-tokens 5 --model scenes-diffusion", "--gen-length says how many"),
        ("--method vcd --model scenes-diffusion", "vcd acts on one token after the other"),
        ("--cache fast --model scenes-diffusion", "there are none, prefix, block, dual, delayed"),
        ("--cache dual", "this model writes token after token"),
        ("--prune late_step", "late_step acts on denoising steps"),
    ):
        run = CliRunner().invoke(app, f"caption scenes:validation/3 --device cpu {wrong}".split())
        assert run.exit_code == 2
        assert message in " ".join(run.output.split())


def test_evaluations(tmp_path):
    """Options and pruning reach the model and the results; what cannot go together leaves no folder behind."""
    start = f"eval chair --model scenes-diffusion --limit 2 --device cpu --out {tmp_path}".split()
    options = (
        "/good --steps 8 --gen-length 16 --block-length 8 --cache dual --prune divprune --param divprune.keep=0.25"
    )
    run = CliRunner().invoke(app, [*start[:-1], start[-1] + options.split()[0], *options.split()[1:]])
    assert run.exit_code == 0, run.output
    written = json.loads((tmp_path / "good" / "results.json").read_text())
    denoised = written["config"]["decoding"]["masked diffusion"]
    assert denoised == {"steps": 8, "gen_length": 16, "block_length": 8, "cache": "dual"}
    assert list(written["metrics"]) == ["divprune"]
    run = CliRunner().invoke(app, [*start[:-1], start[-1] + "/bad", "--method", "vcd"])
    assert run.exit_code == 2
    assert not (tmp_path / "bad").exists()
