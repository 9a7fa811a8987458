# SPDX-License-Identifier: Apache-2.0
"""The comparison of masks: one start, resumable, and intervals over seeds."""

import pytest

from vlm_attn.evals.scenes import train, variants


def test_compare_and_go_on(tmp_path, monkeypatch):
    run = {"steps": 2, "scenes": 2, "questions": 1, "images": 4, "workers": 0}
    found = variants.compare(tmp_path, seeds=(2, 3), **run)
    assert set(found["runs"]) == set(found["start"]) == {"causal", "mma"}
    figures = {"pope_random", "pope_popular", "pope_adversarial", "says_yes", "chair_s", "chair_i", "recall"}
    assert set(found["start"]["mma"]) == set(found["differences"]["mma"]) == figures
    assert found["start"]["causal"]["pope_random"] > 75  # it is the bundled model
    gap, runs = found["differences"]["mma"]["chair_i"], found["runs"]
    assert gap["seeds"] == [runs["mma"][s]["chair_i"] - runs["causal"][s]["chair_i"] for s in ("2", "3")]
    # What is finished is not trained again.
    monkeypatch.setattr(train, "train", None)
    assert variants.compare(tmp_path, seeds=(2, 3), **run) == found
    with pytest.raises(ValueError, match="other settings"):
        variants.compare(tmp_path, seeds=(2, 3), **run | {"images": 5})


def test_wrong_comparisons(tmp_path):
    with pytest.raises(ValueError, match="seed 0 is the bundled model's"):
        variants.compare(tmp_path, seeds=(0, 1))
    with pytest.raises(ValueError, match="two or more"):
        variants.compare(tmp_path, ["mma", "mma"])
    with pytest.raises(FileNotFoundError, match="no finished model"):
        variants.compare(tmp_path, start=tmp_path / "none")
    with pytest.raises(SystemExit):
        variants.main(["--out", str(tmp_path), "--masks", "maa"])


def test_differences_have_a_t_interval():
    gap = variants.difference([1.0, 2.0, 3.0], [2.0, 3.5, 3.5])
    assert gap["seeds"] == [1.0, 1.5, 0.5]
    assert gap["mean"] == pytest.approx(1.0)
    assert gap["high"] - gap["mean"] == pytest.approx(4.303 * 0.5 / 3**0.5, abs=1e-3)
    assert gap["mean"] - gap["low"] == pytest.approx(gap["high"] - gap["mean"])
    assert variants.difference([1.0], [2.0])["low"] is None
