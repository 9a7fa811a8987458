# SPDX-License-Identifier: Apache-2.0
"""Profiles of heads: the probe against full maps, gates that learn which head matters, presets that methods read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import vlm_attn
from tests.oracle import attentions
from vlm_attn.evals import heads
from vlm_attn.evals.calibrate import calibrate, write
from vlm_attn.evals.models import load_model


@pytest.fixture(scope="module")
def scenes() -> tuple[Any, Any, Any]:
    world = pytest.importorskip("vlm_attn.evals.scenes")
    if not (world.model_path() / "model.safetensors").is_file():
        pytest.skip("the bundled model is not in this checkout")
    return *load_model("scenes"), world.dataset("validation", limit=6)


def test_copy_scores_are_those_of_full_maps(scenes: Any) -> None:
    model, processor, _ = scenes
    length = 7
    found = heads.copy_scores(model, processor, length=length)
    vocabulary = heads.words(model, processor)
    ids = vocabulary[torch.randint(len(vocabulary), (length,), generator=torch.Generator().manual_seed(0))].repeat(4)
    maps = torch.cat(attentions(model, {"input_ids": ids[None]}))  # [L, H, T, T]
    for name, shift in (("echo", 0), ("induction", 1)):
        wanted = sum(
            maps[:, :, t, t - m * length + shift] for t in range(length, 28) for m in range(1, t // length + 1)
        )
        assert torch.tensor(found[name]) == pytest.approx(wanted / 21, abs=1e-4)
    assert found["length"] == length
    assert not vlm_attn.is_patched(model)


def test_passkeys_come_twice() -> None:
    vocabulary = torch.arange(100, 200)
    ids, labels = heads.passkeys(vocabulary, 130, torch.Generator().manual_seed(0))
    assert (len(ids), labels) == (130, 40)
    text = ids[:-labels]
    places = [
        next(i for i in range(len(text)) if text[i : i + 4] == ids[start : start + 4]) for start in range(90, 130, 4)
    ]
    assert places == sorted(places)
    with pytest.raises(ValueError, match="no room"):
        heads.passkeys(vocabulary, 119, torch.Generator())


def test_gates_learn_and_leave_the_model_alone(scenes: Any) -> None:
    """A head whose output is thrown away is worth nothing: its gate falls with the price alone, faster than any other."""
    model, processor, dataset = scenes
    weight = model.model.language_model.layers[2].self_attn.o_proj.weight
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    kept = weight.detach().clone()
    with torch.no_grad():
        weight[:, 32:64] = 0  # head 1 of six, of size 32
    try:
        found = heads.train_gates(model, processor, dataset, steps=12, length=128)
    finally:
        with torch.no_grad():
            weight.copy_(kept)
    gates = torch.tensor(found["gates"])
    assert gates.shape == (6, 6)
    assert gates[2, 1] == gates.min()
    assert gates[2, 1] == pytest.approx(1 - 12 * heads.RATE, abs=0.02)
    assert gates.max() > gates.min() + 0.05
    assert all(torch.equal(p, before[name]) and p.requires_grad for name, p in model.named_parameters())
    assert (found["sink"], found["recent"]) == (8, 16)
    assert not vlm_attn.is_patched(model)


def test_open_gates_are_full_attention_and_shut_ones_stream(scenes: Any) -> None:
    model, processor, _ = scenes
    ids = heads.words(model, processor)[torch.arange(40) % 50][None]
    shared = {"gates": [[0.0] * 6] * 6, "sink": 2, "recent": 5, "mode": "mask"}
    with torch.no_grad():
        plain = model(input_ids=ids).logits
        for value in (1.0, 0.0):
            with vlm_attn.patched(model, heads._Gated(**shared, trained=[torch.full((6, 6), value)])):
                got = model(input_ids=ids).logits
            with vlm_attn.patched(model, heads.Duo(**shared, sparsity=1.0 - value)):
                wanted = model(input_ids=ids).logits
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
            assert torch.allclose(got, plain, atol=1e-3) == (value == 1.0)


def test_calibrate_writes_what_duo_and_razor_read(scenes: Any, tmp_path: Path) -> None:
    model, processor, dataset = scenes
    preset, found = calibrate(
        model, processor, dataset, ["duo", "razor"], model_name="scenes", prompt="Look.", limit=2, steps=1
    )
    write(preset, found, tmp_path / "preset.json")
    written = json.loads((tmp_path / "preset.json").read_text())
    assert set(written["methods"]) == {"duo", "razor"}
    assert "trained for 1 steps" in written["provenance"]["duo"]
    for name in ("duo", "razor"):
        with vlm_attn.patched(model, name, preset=str(tmp_path / "preset.json")):
            method = vlm_attn.patching.engine_of(model).methods[0]
            assert len(getattr(method, {"duo": "gates", "razor": "echo"}[name])) == 6


def test_visual_profile(scenes: Any) -> None:
    """Some head of the bundled model finds what it names far more often than chance."""
    model, processor, dataset = scenes
    found = heads.visual_profile(model, processor, dataset, limit=6, prompt="Please describe this image in detail.")
    score = torch.tensor(found["score"])
    assert score.shape == (6, 6)
    assert found["mentions"] > 6
    assert 0 < found["chance"] < 0.5
    assert score.max() > 2 * found["chance"]
    assert torch.tensor(found["mass"]).min() >= 0
