"""The comparison of masks: one start, resumable, and intervals over seeds."""

import pytest
import torch

from vlm_attn.evals.scenes import train, variants

SMALL = train.Settings(steps=(1, 1, 2), batch=(2, 2, 2), layers=1, seed=1)


def test_compare_and_go_on(tmp_path, monkeypatch):
    torch.set_num_threads(1)
    run = {"steps": 2, "scenes": 2, "questions": 1, "images": 4, "start": SMALL, "workers": 0}
    found = variants.compare(tmp_path, seeds=(2, 3), **run)
    assert set(found["runs"]) == {"causal", "mma"}
    figures = {"pope_random", "pope_popular", "pope_adversarial", "says_yes", "chair_s", "chair_i", "recall"}
    assert set(found["start"]) == set(found["differences"]["mma"]) == figures
    gap = found["differences"]["mma"]["pope_random"]
    runs = found["runs"]
    assert gap["seeds"] == [runs["mma"][s]["pope_random"] - runs["causal"][s]["pope_random"] for s in ("2", "3")]
    # The start is the same file for all, and what is finished is not trained again.
    monkeypatch.setattr(train, "train", None)
    assert variants.compare(tmp_path, seeds=(2, 3), **run) == found
    with pytest.raises(ValueError, match="other settings"):
        variants.compare(tmp_path, seeds=(2, 3), **run | {"images": 5})
    with pytest.raises(ValueError, match="seed 1 is the start's"):
        variants.compare(tmp_path, seeds=(1, 2), **run)
    with pytest.raises(ValueError, match="two or more"):
        variants.compare(tmp_path, ["mma"], seeds=(2, 3), **run)


def test_the_start_has_the_bundled_tower(tmp_path):
    from vlm_attn.evals import scenes

    path = variants.make_start(tmp_path, SMALL, workers=0)
    load = train.LlavaForConditionalGeneration.from_pretrained
    bundled, start = load(scenes.model_path()), load(path)
    assert len(start.model.language_model.layers) == 1
    gaps = [
        (a - b).abs().max()
        for a, b in zip(start.model.vision_tower.parameters(), bundled.model.vision_tower.parameters(), strict=True)
    ]
    assert max(gaps) < 0.05  # one alignment step at the warm-up's rate


def test_differences_have_a_t_interval():
    gap = variants.difference([1.0, 2.0, 3.0], [2.0, 3.5, 3.5])
    assert gap["seeds"] == [1.0, 1.5, 0.5]
    assert gap["mean"] == pytest.approx(1.0)
    assert gap["high"] - gap["mean"] == pytest.approx(4.303 * 0.5 / 3**0.5, abs=1e-3)
    assert gap["mean"] - gap["low"] == pytest.approx(gap["high"] - gap["mean"])
    assert variants.difference([1.0], [2.0])["low"] is None
