# SPDX-License-Identifier: Apache-2.0
"""The model card's figures: right on hand-made cases, and one command that writes them."""

import json

import numpy as np
import pytest
import torch

from vlm_attn.evals import scenes
from vlm_attn.evals.models import load_model
from vlm_attn.evals.scenes import card, text, train, world


@pytest.fixture(scope="module")
def loaded():
    return load_model("scenes", "cpu")


@pytest.fixture(scope="module")
def small(loaded):
    return card.measure(*loaded, "validation", limit=12)


def test_patches_that_boxes_touch():
    def places(*boxes):
        return np.flatnonzero(card.touched(boxes, 8)).tolist()

    assert places((0, 0, 28, 28)) == [0]
    assert places((27, 0, 2, 1)) == [0, 1]
    assert places((0, 27, 1, 30)) == [0, 8, 16]
    assert places((196, 196, 28, 28), (0, 0, 1, 1)) == [0, 63]
    assert places((5, 5, 0, 0)) == []


def test_caption_errors_by_hand():
    some = [world.scene("validation", i) for i in range(2)]
    right = {s.image_id: set(s.categories) for s in some}
    found = card.caption_errors(right)
    assert found["false_objects"]["count"] == 0
    assert all(v["share"] == 1 for v in found["named"].values() if v["objects"])
    assert found["false_objects"]["in_captions_that_miss_none"] == [0, 2]
    first = some[0]
    companion = next(c for c in world.CONTEXTS[first.context] if c not in first.categories)
    stranger = next(c for c in world.CATEGORIES if c not in [*world.CONTEXTS[first.context], *first.categories])
    wrong = right | {first.image_id: {companion, stranger}}
    found = card.caption_errors(wrong)["false_objects"]
    assert (found["count"], found["companions"]) == (2, 0.5)
    assert found["in_captions_that_miss_an_object"] == [1, 1]
    assert found["in_captions_that_miss_none"] == [0, 1]


def test_heads_of_a_planted_attention(loaded, monkeypatch):
    """A model whose head 1.2 always looks at the object it will name, and whose other heads look at the first patch."""
    model, processor = loaded
    real = type(model).forward
    coder = train.Coder(64)
    some = [world.scene("validation", i) for i in range(4)]

    def forward(self, *args, **kwargs):
        out = real(self, *args, **kwargs)
        first = 2  # BOS, "user:"
        planted = []
        for layer, attention in enumerate(out.attentions):
            fake = torch.zeros_like(attention)
            fake[..., 0] = 0.25
            fake[..., first] = 0.75
            if layer == 1:
                for i, s in enumerate(some):
                    tokens = coder.tokenizer.convert_ids_to_tokens(kwargs["input_ids"][i].tolist())
                    for name in s.categories:
                        row = len(tokens) - 1 - tokens[::-1].index(name) - 1
                        boxes = [b for o, b in zip(s.objects, s.boxes, strict=True) if o.category == name]
                        seen = np.flatnonzero(card.touched(boxes, 8))
                        if seen.size:
                            fake[i, 2, row] = 0
                            fake[i, 2, row, 0], fake[i, 2, row, first + seen[0]] = 0.1, 0.9
            planted.append(fake)
        out.attentions = tuple(planted)
        return out

    monkeypatch.setattr(type(model), "forward", forward)
    found = card.attention(model, processor, "validation", limit=4)
    assert (found["top"][0]["layer"], found["top"][0]["head"]) == (1, 2)
    assert found["top"][0]["hits"]["value"] == 1 == found["top"][0]["remaining"]["value"]
    assert found["heads"][1][2] == 1
    boxes = [
        card.touched([b for o, b in zip(s.objects, s.boxes, strict=True) if o.category == c], 8)
        for s in some
        for c in s.categories
    ]
    boxes = [b for b in boxes if b.any()]
    assert found["objects_named"] == len(boxes)
    assert found["chance"] == pytest.approx(np.mean([b.mean() for b in boxes]))
    assert found["heads"][0][0] == pytest.approx(np.mean([b[0] for b in boxes]))
    assert found["layers"][0]["bos_naming"] == pytest.approx(0.25)
    assert found["layers"][0]["visual_text"] == pytest.approx(0.75)
    assert found["layers"][1]["bos_naming"] == pytest.approx((5 * 0.25 + 0.1) / 6)
    assert model.config.text_config._attn_implementation == "sdpa"


def test_both_sink_detectors_see_a_sink():
    states = card._States(2)
    states.seen = torch.tensor([[True, True, True, False]])
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 4, 900, generator=generator)
    x[0, 1, 7] = 500.0  # a massive dimension: 500 / RMS is near 28
    x[0, 3, 9] = 500.0  # in padding: not counted
    y = torch.randn(1, 4, 900, generator=generator)
    y[0, 2] = -3 * y[0, 0]  # the direction of BOS
    states.hook(0)(None, (x,), y)
    states.hook(1)(None, (y,), 2 * y)
    first, second = states.layer(0), states.layer(1)
    assert (first["massive_tokens"], first["massive_dims"]) == (1, [7])
    assert second["massive_tokens"] == 0
    assert first["aligned_tokens"] == 1
    assert first["largest_cosine"] == pytest.approx(1)
    assert second["bos_norm"] == pytest.approx(2 * first["bos_norm"])
    assert states.summary()["tokens"] == 3


def test_heads_look_where_they_name(small):
    """The bundled model's best heads hit far above chance, and far above the same attention on another scene's boxes."""
    found = small["attention"]
    assert len(found["top"]) == 10
    best = found["top"][0]
    assert best["hits"]["low"] > 1.5 * found["chance"]
    assert best["hits"]["low"] > best["exchanged"]
    assert best["remaining"]["value"] >= best["hits"]["value"]
    shares = [head["hits"]["value"] for head in found["top"]]
    assert shares == sorted(shares, reverse=True)
    for layer in found["layers"]:
        assert 0 < layer["bos_text"] < layer["bos_text"] + layer["visual_text"] < 1


def test_rows_are_read_as_the_trainer_writes_them(loaded):
    _, processor = loaded
    coder = train.Coder(64)
    for index in range(40):
        scene = world.scene("validation", index)
        row = card._row(processor, scene, text.CAPTION_PROMPTS[0], 64)
        assert row.ids == coder.row([(text.CAPTION_PROMPTS[0], world.captions(scene)[0])]).ids
        tokens = processor.tokenizer.convert_ids_to_tokens(row.ids)
        assert {name: tokens[column] for name, column in row.columns.items()} == {c: c for c in scene.categories}


def test_false_objects_by_sentence():
    def mention(caption, word, wrong):
        return {"start": caption.index(word), "hallucinated": wrong}

    one, two = "A farm. A cat is here. A dog is there and a cow.", "A dog. A cat."
    records = [
        {
            "answer": one,
            "score": {"mentions": [mention(one, "cat", 0), mention(one, "dog", 1), mention(one, "cow", 0)]},
        },
        {"answer": two, "score": {"mentions": [mention(two, "dog", 0), mention(two, "cat", 1)]}},
    ]
    found = card.by_sentence(records)
    assert [(m["sentence"], m["mentions"], m["chair_i"]["value"]) for m in found] == [
        (1, 1, 0),
        (2, 2, 0.5),
        (3, 2, 0.5),
    ]


def test_a_model_with_two_styles_is_measured_at_both(loaded, monkeypatch):
    model, processor = loaded
    styles = {"detailed": text.CAPTION_PROMPTS[0], "short": "What is in the image?"}  # in the order of a saved config
    monkeypatch.setattr(model.config, "caption_prompts", styles, raising=False)
    found = card.measure(model, processor, "validation", limit=3)
    assert found["quality"]["prompt"] == styles["short"]
    assert found["quality"]["detailed"]["captions"] == 3
    shown = card.markdown(found)
    assert "| short |" in shown
    assert "| detailed |" in shown
    assert "Detailed captions by sentence" in shown


def test_quality_is_what_eval_says(small, loaded):
    from vlm_attn.evals import runner, specs, tasks

    task = tasks.chair_task(scenes.dataset("validation"), limit=12, max_new_tokens=64)
    other = runner.run(task, specs.parse_specs(["baseline"], [], None), *loaded, model_name="scenes")
    assert small["quality"]["chair"] == next(iter(other["metrics"]["baseline"].values()))
    exchanged = small["quality"]["exchanged"]
    assert exchanged["yes_own"] > exchanged["yes_other"] + 0.5
    assert exchanged["recall_own"] > exchanged["recall_other"] + 0.5


def test_the_card_is_written_between_its_marks(small, tmp_path):
    file = tmp_path / "README.md"
    file.write_text("# A\n\n<!-- figures: validation -->\n\nOBSOLETE\n\n<!-- end -->\n\nrest <!-- end -->\n")
    card.write_readme(file, small)
    once = file.read_text()
    assert once.startswith("# A\n")
    assert once.endswith("rest <!-- end -->\n")
    assert "OBSOLETE" not in once
    assert card.markdown(small) in once
    card.write_readme(file, small)
    assert file.read_text() == once
    with pytest.raises(ValueError, match="no marks <!-- figures: test -->"):
        card.write_readme(file, small | {"split": "test"})
    with pytest.raises(FileNotFoundError, match="no such file"):
        card.check_readme(tmp_path / "none.md", "validation")


def test_the_bundled_card_is_of_the_bundled_weights(loaded):
    """What the card and the JSON files say was measured on these very weights and this world."""
    from vlm_attn.evals import runner

    content = (scenes.model_path() / "README.md").read_text()
    results = scenes.model_path().parents[1] / "results"
    for split in ("validation", "test"):
        file = results / f"scenes-card-{split}.json"
        if not file.exists():
            pytest.skip(f"no {file.name} in this installation")
        found = json.loads(file.read_text())
        assert found["weights"] == runner.weights_hash(loaded[0])
        assert found["world"] == world.WORLD_VERSION
        assert found["split"] == split
        assert found["quality"]["captions"] == 500
        assert card.markdown(found) in content


def test_a_variant_has_no_card(loaded, monkeypatch):
    model, processor = loaded
    monkeypatch.setattr(model.config, "trained_mask", "mma", raising=False)
    with pytest.raises(ValueError, match="trained_mask 'mma'"):
        card.measure(model, processor, "validation", limit=1)


def test_the_prompt_of_the_attention_report_is_the_protocols():
    from vlm_attn.evals import chair

    assert text.CAPTION_PROMPTS[0] == chair.PROMPT
