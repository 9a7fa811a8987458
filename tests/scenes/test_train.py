# SPDX-License-Identifier: Apache-2.0
"""The training script: resuming changes nothing, and segments hide what they should."""

import dataclasses
import json

import pytest
import torch

from vlm_attn.evals.scenes import text, train, world
from vlm_attn.kernels import Group

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
                input_ids=batch["ids"],
                pixel_values=images,
                attention_mask=train.attention_mask(batch["segments"], batch["groups"]),
                position_ids=batch["positions"],
            ).logits[0]

    packed, segments = logits(coder.row(turns)), torch.tensor(coder.row(turns).segments)
    for number, turn in enumerate(turns, start=1):
        ids = torch.tensor([coder.row([turn]).ids])
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


def test_masks_open_what_they_say():
    coder = train.Coder(4)
    row = coder.row([("Describe the image.", "a farm.")])
    batch = coder.batch([row, coder.row([("Describe.", "a")])])
    groups = batch["groups"][0]
    visual, question, answer = groups == Group.VISUAL, groups == Group.QUERY, groups == Group.GENERATED
    tags = coder.tokenizer.convert_ids_to_tokens(row.ids)
    assert [t for t, q in zip(tags, question, strict=True) if q] == ["describe", "the", "image", "."]
    assert tags[int((groups == Group.ROLE).nonzero())] == "assistant:"

    def opened(mask, objective="ar"):
        seen = train.attention_mask(batch["segments"], batch["groups"], mask, objective)
        causal = torch.ones_like(seen[0, 0]).tril()
        assert (seen[0, 0] | ~causal).all()  # a mask only ever opens
        assert not (seen[1, 0] & (batch["groups"][1] == Group.PAD)).sum(1)[: len(row.ids) // 2].any()
        return seen[0, 0] & ~causal

    later = ~torch.ones(len(row.ids), len(row.ids), dtype=torch.bool).tril()
    assert not opened("causal").any()
    assert torch.equal(opened("mma"), visual[:, None] & question[None])
    assert torch.equal(opened("vision-block"), visual[:, None] & visual[None] & later)
    assert torch.equal(opened("prefix-lm"), ~answer[None] & later)
    every = torch.ones_like(later) & ~torch.ones_like(later).tril()
    assert torch.equal(opened("full", "masked-diffusion"), every)
    assert torch.equal(opened("prefix-lm", "masked-diffusion"), (answer[:, None] | ~answer[None]) & later)
    assert torch.equal(opened("causal", "masked-diffusion"), answer[:, None] & answer[None] & later)


def test_the_picture_sees_no_question_of_another_turn():
    settings = dataclasses.replace(TINY, mask="mma")
    assert settings.one_turn
    assert not TINY.one_turn
    batch = train.Batches("language", settings)[0]
    turns = [t for i in range(4) for t in text.training_turns(world.scene("train", 80_000_000 + i), 2)]
    assert len(batch["ids"]) == len(turns) == 12
    assert batch["pictures"].tolist() == [i for i in range(4) for _ in range(3)]
    assert (batch["segments"] <= 0).all()
    assert ((batch["labels"] != -100) & (batch["labels"].roll(1, 1) == -100)).sum(1).tolist() == [1] * 12
    # Turns of one conversation: later questions are text like any other.
    row = train.Coder(4).row([("Describe.", "a"), ("Describe.", "a")], apart=False)
    assert row.groups.count(int(Group.QUERY)) == 2


@pytest.mark.parametrize(
    ("mask", "objective"), [(m, o) for m in train.MASKS for o in train.OBJECTIVES if (m, o) != ("full", "ar")]
)
def test_every_variant_trains_and_resumes(tmp_path, mask, objective):
    run(tmp_path, ("tower",), stop_at=1)
    settings = dataclasses.replace(TINY, mask=mask, objective=objective)
    if objective != "ar":  # another vocabulary: begins with a finished model
        train.export(train.build_model(TINY), TINY, tmp_path / "model")
        begin = {"start": tmp_path / "model"}
    else:
        begin = {}
    train.train(settings, tmp_path, ("language",), workers=0, log_every=1, stop_at=2, **begin)
    model = train.train(settings, tmp_path, ("language",), workers=0, log_every=1, resume=True)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "log.jsonl").open()]
    assert len(losses) == 5
    assert all(0 < loss < 20 for loss in losses)
    train.export(model, settings, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("trained_mask", "causal") == mask
    assert config.get("trained_objective", "ar") == objective
    from transformers import AutoProcessor

    tokenizer = AutoProcessor.from_pretrained(tmp_path / "out").tokenizer
    assert (tokenizer.mask_token_id == len(text.vocabulary())) is (objective != "ar")
    if objective == "ar":
        assert "pope_random" in train.quick_check(model, settings, scenes=2)
    other = dataclasses.replace(settings, seed=7)
    with pytest.raises(ValueError, match="seed=7, but the checkpoint to resume was made with 0"):
        train.train(other, tmp_path, ("language",), workers=0, resume=True)


def test_every_masked_answer_counts_one_per_token():
    coder = train.Coder(4, mask_token=True)
    turns = [("Describe.", "a farm with a cow."), ("Is there a cow?", "yes")]
    row = coder.row(turns, lengths=[8, 2])
    assert coder.tokenizer.decode(row.ids[-2:]) == "yes </s>"
    total, masked = torch.zeros(len(row.ids)), torch.zeros(len(row.ids))
    draws = 4000
    for i in range(draws):
        ids, weights = train.hide(row, coder.tokenizer.mask_token_id, world.Draw("hide", i))
        for before, after, weight, label in zip(row.ids, ids, weights, row.labels, strict=True):
            assert (after == before) is (weight == 0)
            assert weight == 0 or label == before
        total += torch.tensor(weights)
        masked += torch.tensor(weights) > 0
    answers = torch.tensor(row.labels) != -100
    assert answers.sum() == 10
    torch.testing.assert_close(masked[answers] / draws, torch.full((10,), 0.5), atol=0.03, rtol=0)
    # 1 / t has a long tail: the mean over few thousand draws is near 1 / length, not at it.
    sums = total[answers] / draws
    assert sums[:8].sum() == pytest.approx(1, abs=0.15)
    assert sums[8:].sum() == pytest.approx(1, abs=0.15)


def test_masked_diffusion_learns_a_batch():
    settings = dataclasses.replace(TINY, objective="masked-diffusion", canvas=16)
    torch.manual_seed(0)
    model = train.build_model(settings)
    batch = train.Batches("language", settings)[0]
    assert {"weights", "pictures"} <= set(batch)
    assert batch["labels"].shape == batch["weights"].shape
    yes_no = torch.tensor([1, 2])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(40):
        loss, _ = train.language_loss(model, batch, yes_no, settings)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 3


def test_wrong_settings_and_starts(tmp_path):
    with pytest.raises(ValueError, match="mask='maa': there are causal, mma"):
        train.Settings(mask="maa")
    with pytest.raises(ValueError, match="mask='full' shows the next tokens"):
        train.Settings(mask="full")
    with pytest.raises(ValueError, match="objective='bert'"):
        train.Settings(objective="bert")
    with pytest.raises(FileNotFoundError, match="no finished model"):
        run(tmp_path, ("language",), start=tmp_path / "none")
    wider = dataclasses.replace(TINY, width=48)
    train.export(train.build_model(wider), wider, tmp_path / "wider")
    with pytest.raises(ValueError, match="does not fit"):
        run(tmp_path, ("language",), start=tmp_path / "wider")
    with pytest.raises(ValueError, match="exclude each other"):
        run(tmp_path, ("language",), start=tmp_path / "wider", resume=True)
