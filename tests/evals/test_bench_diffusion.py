# SPDX-License-Identifier: Apache-2.0
"""The denoising benchmark counts operations right and writes what it measures; its figures are not tested."""

import json

import pytest
import torch
import typer
from typer.testing import CliRunner

from vlm_attn.diffusion import Work
from vlm_attn.evals.bench import diffusion
from vlm_attn.evals.bench.flops import denoising_flops, layer_flops, prefill_flops, study_flops
from vlm_attn.evals.bench.overhead import build_model

APP = typer.Typer()
APP.command()(diffusion.denoise)


def test_operations_are_those_of_the_forwards():
    config = build_model(4, 64, "cpu", torch.float32).config
    text = config.text_config
    shape = {
        "hidden": text.hidden_size,
        "intermediate": text.intermediate_size,
        "heads": text.num_attention_heads,
        "kv_heads": text.num_key_value_heads,
        "head_dim": text.hidden_size // text.num_attention_heads,
        "causal": False,
    }
    head = 2 * text.hidden_size * text.vocab_size
    pixels = prefill_flops(config, [], 1) - head
    whole = denoising_flops(config, [Work(100, 100, 8)], 1)
    assert whole == pixels + 8 * head + 4 * layer_flops(100, 100, **shape)
    rows = denoising_flops(config, [Work(8, 100, 8, (0, 0, 40, 40))], 1)
    assert rows == pixels + 8 * head + 2 * layer_flops(8, 100, **shape) + 2 * layer_flops(8, 60, **shape)
    gone = denoising_flops(config, [Work(100, 100, 8, (40,) * 4)], 1)
    assert gone == pixels + 8 * head + 4 * layer_flops(60, 60, **shape)
    assert study_flops(2, 3, 5, [7]) == 2 * (4 * 7 * 9 + 2 * 49 * 3 + 2 * 7 * 3 * 5)


def test_speed_writes_ratios(tmp_path):
    out = tmp_path / "diffusion.json"
    arguments = (
        "--part speed --layers 4 --hidden 64 --steps 4 --gen-length 8 --block-length 4 --repeats 1 --device cpu --json"
    )
    names = ["dual", "delayed", "late_step 0.25 from 0.5", "layer_skip"]
    chosen = [part for name in names for part in ("--variant", name)]
    result = CliRunner().invoke(APP, [*arguments.split(), str(out), *chosen])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["speed"]["ratios_to_none"]
    assert list(found) == ["none", *names]
    assert found["none"]["flops"] == found["none"]["speedup"] == 1
    assert all(0 < found[name]["flops"] < 1 for name in names)


def test_quality_compares_pairs(tmp_path):
    out = tmp_path / "quality.json"
    arguments = ["--part", "quality", "--limit", "2", "--pope-limit", "2", "--json", str(out)]
    result = CliRunner().invoke(APP, [*arguments, "--variant", "prefix", "--variant", "threshold 0.6"])
    assert result.exit_code == 0, result.output
    found = json.loads(out.read_text())["quality"]["variants"]
    assert list(found) == ["none", "one token a step", "prefix", "threshold 0.6"]
    assert found["threshold 0.6"]["against"] == "one token a step"
    assert all(change["value"] == pytest.approx(0, abs=1e-9) for change in found["prefix"]["change"].values())  # exact
    assert 0 < found["prefix"]["flops"] < found["none"]["flops"] == 1
    forwards = {name: row["chair"]["forwards"] for name, row in found.items()}
    assert forwards["none"] == 16
    assert forwards["one token a step"] == 33
    assert forwards["threshold 0.6"] < 33


@pytest.mark.parametrize("arguments", [["--part", "sped"], ["--variant", "tripple"]])
def test_wrong_names(arguments):
    result = CliRunner().invoke(APP, arguments)
    assert isinstance(result.exception, ValueError)
