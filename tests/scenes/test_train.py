"""The training script: resuming changes nothing, and segments hide what they should."""

import json

import pytest
import torch

from vlm_attn.evals.scenes import train

TINY = train.Settings(
    steps=(3, 2, 4), batch=(4, 4, 4), width=24, heads=2, tower_layers=1, layers=1, questions=2, unfreeze=0.5
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(folder, stages, **kwargs):
    return train.train(TINY, folder, stages, workers=0, log_every=1, **kwargs)


def test_resumed_equals_uninterrupted(tmp_path):
    whole = run(tmp_path / "whole", train.STAGES)
    run(tmp_path / "parts", ("tower",), stop_at=2)
    run(tmp_path / "parts", ("tower", "align"), resume=True)
    run(tmp_path / "parts", ("language",), stop_at=1)
    parts = run(tmp_path / "parts", ("language",), resume=True)
    for (name, a), b in zip(whole.state_dict().items(), parts.state_dict().values(), strict=True):
        assert torch.equal(a, b), name
    logs = [
        [(row["stage"], row["step"], row["loss"]) for row in map(json.loads, (f / "log.jsonl").open())]
        for f in (tmp_path / "whole", tmp_path / "parts")
    ]
    assert logs[0] == logs[1]
    assert len(logs[0]) == 9
    assert not list(tmp_path.glob("*/*.part"))


def test_every_stage_trains_its_part(tmp_path):
    fresh = train.build_model(TINY)
    tower = run(tmp_path, ("tower",))
    before = {k: v.clone() for k, v in tower.state_dict().items()}
    changed = [k for k, v in fresh.state_dict().items() if not torch.equal(v, before[k])]
    assert any("vision_tower" in k for k in changed)
    assert any("projector" in k for k in changed)
    assert not any(".layers." in k and "language_model" in k for k in changed)
    after = run(tmp_path, ("language",), stop_at=1).state_dict()
    frozen = [k for k in after if "vision_tower" in k]
    assert all(torch.equal(after[k], before[k]) for k in frozen)
    assert any(not torch.equal(after[k], before[k]) for k in after if "language_model.layers" in k)


def test_a_turn_apart_is_a_turn_alone():
    """A packed turn has the logits of the same turn in its own row."""
    model = train.build_model(TINY).eval()
    coder = train.Coder(64)
    turns = [("Is there a car in the image?", "no"), ("Describe the image.", "a farm with a cow.")]
    images = torch.randn(1, 3, 112, 112)

    def logits(row):
        batch = coder.batch([row])
        with torch.no_grad():
            return model(
                input_ids=batch["input_ids"],
                pixel_values=images,
                attention_mask=train.attention_mask(batch["segments"]),
                position_ids=batch["position_ids"],
            ).logits[0]

    packed, segments = logits(coder.row(turns)), torch.tensor(coder.row(turns)[3])
    for number, turn in enumerate(turns, start=1):
        ids = torch.tensor([coder.row([turn])[0]])
        with torch.no_grad():
            alone = model(input_ids=ids, pixel_values=images).logits[0]
        torch.testing.assert_close(packed[(segments == 0) | (segments == number)], alone, atol=1e-5, rtol=1e-5)


def test_the_rate_falls_over_the_last_fifth():
    factors = [train.rate_factor(s, 1000) for s in range(1000)]
    assert factors[0] == 0.01
    assert factors[99:801] == [1.0] * 702
    assert factors[900] == pytest.approx(0.5)
    assert factors[999] == pytest.approx(0.005)


def test_a_missing_checkpoint_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"checkpoint\.pt"):
        run(tmp_path, ("language",))


def test_an_exported_model_loads_and_can_be_looked_at(tmp_path):
    from transformers import AutoModelForImageTextToText, AutoProcessor

    model = train.build_model(TINY)
    train.export(model, TINY, tmp_path / "model")
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "model")
    assert loaded.dtype == torch.float32
    assert type(AutoProcessor.from_pretrained(tmp_path / "model")).__name__ == "LlavaProcessor"
    for (name, a), b in zip(model.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert torch.equal(a.bfloat16().float(), b), name
    figures = train.quick_check(loaded, TINY, scenes=4)
    assert {"pope_random", "pope_companions", "yes", "recall", "chair_i", "companions", "named_small"} <= set(figures)
    assert all(0 <= v <= 1 for v in figures.values())
