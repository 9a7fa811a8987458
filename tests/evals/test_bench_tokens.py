# SPDX-License-Identifier: Apache-2.0
"""The token benchmark counts operations right and measures what it says; its figures are not tested."""

import json

import pytest
import typer
from transformers import LlamaConfig, LlamaForCausalLM
from typer.testing import CliRunner

from vlm_attn.evals.bench import tokens
from vlm_attn.evals.bench.flops import layer_flops, prefill_flops
from vlm_attn.evals.bench.overhead import build_model
from vlm_attn.method import ModelFacts
from vlm_attn.visual_token_ops import ToMe


def test_flops_are_those_of_the_matrices():
    """Two operations per weight and row, as torch counts them; the attention of a row to all keys beside."""
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    layer = LlamaForCausalLM(config).model.layers[0]
    weights = sum(p.numel() for p in layer.parameters() if p.ndim == 2)
    shape = {"hidden": 64, "intermediate": 96, "heads": 4, "kv_heads": 2, "head_dim": 16}
    assert layer_flops(10, 10, **shape, causal=False) == 2 * 10 * weights + 4 * 100 * 64
    assert layer_flops(10, 10, **shape) == 2 * 10 * weights + 4 * 55 * 64
    assert layer_flops(1, 10, **shape) == 2 * weights + 4 * 10 * 64
    ungated = layer_flops(10, 10, **shape, gated=False)
    assert layer_flops(10, 10, **shape) - ungated == 2 * 10 * 64 * 96


def test_prefill_falls_with_the_columns():
    import torch

    config = build_model(4, 64, "cpu", torch.float32).config
    full = prefill_flops(config, [600] * 4, 1)
    assert prefill_flops(config, [600, 600, 300, 300], 1) < full
    assert prefill_flops(config, [600] * 4, 2) > full
    tower = full - prefill_flops(config, [600] * 4, 0)
    assert prefill_flops(config, [600] * 4, 1, [576, 576]) == full
    assert full - tower < prefill_flops(config, [600] * 4, 1, [576, 288]) < full


def test_a_tower_that_merges_runs_on_fewer_patches():
    import torch

    config = build_model(4, 64, "cpu", torch.float32, tower=tokens.TOWER, projected=-2).config
    assert tokens.patches_per_layer(config, None) is None
    assert tokens.patches_per_layer(config, tokens.reducer("divprune", 0.25, 4)) is None
    assert tokens.patches_per_layer(config, ToMe(keep=72)) == [576, 504, 432, 360, 288, 216, 144, 72]


def test_the_shape_for_gpus_is_that_of_llava_7b():
    """7.06 B parameters; the operations of a prompt are two per weight and row of the language model, and some for the rest."""
    import torch

    model = build_model(device="meta", dtype=torch.bfloat16, **tokens.SEVEN_B)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(7.06e9, rel=1e-3)
    weights = sum(p.numel() for p in model.model.language_model.layers.parameters())
    assert 1 < prefill_flops(model.config, [606] * 32, 1) / (2 * 606 * weights) < 1.08
    merging = tokens.patches_per_layer(model.config, ToMe(keep=64))
    assert (len(merging), merging[0], merging[-1]) == (24, 576, 64)


def test_peak_memory_sees_what_was_there_and_is_gone():
    import torch

    before, _ = tokens.peak_memory(restart=True)
    if not before:
        pytest.skip("this system does not tell")
    block = torch.ones(16_000_000)
    del block
    _, most = tokens.peak_memory()
    assert 60e6 < most - before < 120e6
    assert tokens.peak_memory(restart=True)[1] - before < 30e6


@pytest.mark.parametrize("name", [*tokens.REDUCERS, "vtw"])
def test_every_reducer_scales_to_any_depth(name):
    for layers in (4, 12, 32):
        facts = ModelFacts(model_type="llava", layers=layers, heads=1, hidden=64)
        method = tokens.reducer(name, 0.25 if name != "vtw" else 0.0, layers).bind(facts)
        assert method.name == name
        assert max(method.stages) < layers


def test_tokens_writes_paired_ratios(tmp_path):
    app = typer.Typer()
    app.command()(tokens.tokens)
    out = tmp_path / "tokens.json"
    arguments = "--layers 4 --hidden 64 --repeats 1 --tokens 3 --device cpu --keep 0.25 "
    arguments += "--method fastv --method random --method tome --json"
    done = CliRunner().invoke(app, [*arguments.split(), str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert set(result["ratios_to_plain"]) == {"fastv 0.25", "random 0.25", "tome 0.25"}
    assert set(result["absolute"]) == {"plain", *result["ratios_to_plain"]}
    assert all(value > 0 for found in result["absolute"].values() for key, value in found.items() if key != "peak_mb")
    fastv, drawn, merged = result["ratios_to_plain"].values()
    assert fastv["columns"] == [606, 174, 174, 174]
    assert drawn["columns"] == [174] * 4
    assert drawn["cache"] == pytest.approx((174 + 2) / (606 + 2))
    assert drawn["flops"] < fastv["flops"] < 1
    assert merged["flops"] == drawn["flops"]
    assert merged["first_flops"] < drawn["first_flops"]
    assert merged["select"]["median"] > 0
    done = CliRunner().invoke(app, ["--method", "gift"])
    assert done.exit_code != 0
    assert "no reducer" in done.output


def test_keys_that_no_head_keeps_leave_the_cache(tmp_path):
    """A quarter of four layers keeps all of 606 + 2 columns; the others a sink, a window, and what waits to go."""
    app = typer.Typer()
    app.command()(tokens.tokens)
    out = tmp_path / "tokens.json"
    names = " ".join(f"--method {name}" for name in tokens.HEADS)
    arguments = f"--layers 4 --hidden 64 --repeats 1 --tokens 3 --device cpu --keep 0.25 {names} --json"
    done = CliRunner().invoke(app, [*arguments.split(), str(out)])
    assert done.exit_code == 0, done.output
    found = json.loads(out.read_text())["ratios_to_plain"]
    assert found["duo 0.25"]["cache"] == pytest.approx((608 + 3 * (64 + 255 + 2)) / (4 * 608), abs=2e-3)
    assert found["razor 0.25"]["cache"] == pytest.approx((608 + 3 * (4 + 1 + 255 + 2)) / (4 * 608), abs=2e-3)
    for name in tokens.HEADS[2:]:
        assert found[f"{name} 0.25"]["cache"] == 1
        assert found[f"{name} 0.25"]["flops"] == 1
