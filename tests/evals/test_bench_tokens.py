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
    arguments = (
        "--layers 4 --hidden 64 --repeats 1 --tokens 3 --device cpu --method fastv --method random --keep 0.25 --json"
    )
    done = CliRunner().invoke(app, [*arguments.split(), str(out)])
    assert done.exit_code == 0, done.output
    result = json.loads(out.read_text())
    assert set(result["ratios_to_plain"]) == {"fastv 0.25", "random 0.25"}
    fastv, drawn = result["ratios_to_plain"].values()
    assert fastv["columns"] == [606, 174, 174, 174]
    assert drawn["columns"] == [174] * 4
    assert drawn["cache"] == pytest.approx((174 + 2) / (606 + 2))
    assert drawn["flops"] < fastv["flops"] < 1
    done = CliRunner().invoke(app, ["--method", "gift"])
    assert done.exit_code != 0
    assert "no reducer" in done.output
