# SPDX-License-Identifier: Apache-2.0
"""CLIPScore with a CLIP of random weights, and MMHal's judge."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.evals import mmhal
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.scoring import score_mmhal


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "120"})


def test_clip_score_is_the_papers(clip: str, coco_folder: Path, tmp_path: Path) -> None:
    import open_clip

    from vlm_attn.evals.clipscore import clip_scores

    dataset = CocoDataset.from_folder(coco_folder)
    ids = dataset.image_ids[:3]
    captions = ["a dog", "a cup on a table", " ".join(["very"] * 40)]
    records = [{"image_id": image, "caption": text} for image, text in zip(ids, captions, strict=True)]
    found = clip_scores(clip, dataset, records, batch_size=2)
    architecture, _, weights = clip.partition(":")
    model, _, prepare = open_clip.create_model_and_transforms(architecture, pretrained=weights)
    tokenizer = open_clip.get_tokenizer(architecture)
    with torch.no_grad():
        for record, score in zip(records, found, strict=True):
            image = model.encode_image(prepare(dataset.load_image(record["image_id"]))[None])[0]
            lines = [record["caption"], *dataset.reference_captions(record["image_id"])]
            words = model.encode_text(tokenizer([f"A photo depicts {line}" for line in lines]))
            fits = 2.5 * max(0.0, float(torch.cosine_similarity(image, words[0], dim=0)))
            likest = max(0.0, *(float(torch.cosine_similarity(words[0], other, dim=0)) for other in words[1:]))
            assert score["clip_score"] == pytest.approx(fits, abs=1e-5)
            assert score["ref_clip_score"] == pytest.approx(2 * fits * likest / (fits + likest + 1e-12), abs=1e-5)
    assert [score["cut"] for score in found] == [False, False, True]
    assert len({score["clip_score"] for score in found}) > 1

    file = tmp_path / "captions.jsonl"
    file.write_text("".join(json.dumps(record) + "\n" for record in [*records, {"image_id": 999, "caption": "x"}]))
    done = call(
        "score", "clip", "--captions", file, "--data", coco_folder, "--clip", clip, "--json", tmp_path / "o.json"
    )
    assert done.exit_code == 0, done.output
    results = json.loads((tmp_path / "o.json").read_text())
    mean = 100 * sum(score["clip_score"] for score in found) / 3
    assert results["metrics"]["captions"]["all"]["clip_score"]["value"] == pytest.approx(mean)
    assert results["counts"] == {"samples": 3, "finished": {"captions": 3}, "skipped": 1, "cut": 1}
    assert "RefCLIP-S" in done.stdout
    assert "1 captions are longer than CLIP reads" in done.stdout
    wrong = call("score", "clip", "--captions", file, "--data", coco_folder, "--clip", "no-such")
    assert wrong.exit_code == 2
    assert "architecture:weights" in wrong.stderr


ANSWERS = [
    {
        "question_type": kind, "image_content": ["dog", "ball"], "question": f"What is {{question}} {place}?",
        "gt_answer": "a ball", "model_answer": f"answer {place}",
    }
    for place, kind in enumerate(["attribute", "counting", "attribute", "counting"])
]  # fmt: skip


def test_judge_rates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    replies = iter(["It is fine.\nRating: 6", "**Rating:** 2", "rating: 3. Not rating: 4", "Rating: 7"])

    def ask(prompt: str) -> str:
        asked.append(prompt)
        return next(replies)

    monkeypatch.setitem(sys.modules, "my_judge", types.SimpleNamespace(ask=ask, number=3))
    file = tmp_path / "mine.json"
    file.write_text(json.dumps(ANSWERS))
    results = score_mmhal(file, "my_judge:ask")
    for record, prompt in zip(ANSWERS, asked, strict=True):
        for text in ("dog, ball", record["question"], "a ball", record["model_answer"]):  # braces of an answer stay
            assert text in prompt
    found = results["metrics"]["mine"]
    # 6, 2, two ratings that differ, and one out of range: the latter two count 0.
    assert found["all"]["score"]["value"] == pytest.approx((6 + 2) / 4)
    assert found["all"]["hallucination_rate"]["value"] == pytest.approx(75.0)
    assert found["all"]["unparsed"] == results["counts"]["unparsed"] == 2
    assert found["attribute"]["score"]["value"] == pytest.approx(3.0)
    assert found["counting"]["questions"] == 2
    assert [sample["reply"] for sample in results["samples"]][1] == "**Rating:** 2"
    for judge in ("my_judge:nothing", "my_judge:number", "my_judge", "no_such_judge:ask"):
        with pytest.raises(ValueError, match="judge"):
            score_mmhal(file, judge)
    with pytest.raises(ValueError, match=r"needs \{gt_answer\} in it"):
        mmhal.prompts(ANSWERS, "{image_content} {question} {model_answer}")
    file.write_text(json.dumps([{"question": "x"}]))
    with pytest.raises(ValueError, match="record 1: needs image_content, gt_answer, model_answer"):
        score_mmhal(file, "my_judge:ask")


def test_mmhal_on_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "my_judge", types.SimpleNamespace(ask=lambda prompt: "Rating: 4"))
    (tmp_path / "mine.json").write_text(json.dumps(ANSWERS))
    done = call("score", "mmhal", "--answers", tmp_path / "mine.json", "--judge", "my_judge:ask")
    assert done.exit_code == 0, done.output
    assert "attribute" in done.stdout
