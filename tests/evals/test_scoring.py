"""Answers that exist already, scored without a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vlm_attn.evals import pope
from vlm_attn.evals.scoring import score_pope

from .conftest import shared_file

QUESTIONS = [
    {
        "question_id": 1,
        "image": "COCO_val2014_000000000007.jpg",
        "text": "Is there a dog in the image?",
        "label": "yes",
    },
    {"question_id": 2, "image": "COCO_val2014_000000000007.jpg", "text": "Is there a cat in the image?", "label": "no"},
    {
        "question_id": 3,
        "image": "COCO_val2014_000000000009.jpg",
        "text": "Is there a cup in the image?",
        "label": "yes",
    },
    {
        "question_id": 4,
        "image": "COCO_val2014_000000000009.jpg",
        "text": "Is there a car in the imange?",
        "label": "no",
    },
]
ANSWERS = ["Yes.", "Yes, there is.", "No.", "I do not know"]


def lines(path: Path, records: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    return lines(tmp_path / "my_pope_popular.json", QUESTIONS)


FORMS = {
    "question_id": lambda q, a: {"question_id": q["question_id"], "text": a},
    "image and question": lambda q, a: {"image": q["image"], "question": q["text"].upper(), "answer": a},
    "image_id and question": lambda q, a: {"image_id": int(q["image"][-16:-4]), "question": q["text"], "answer": a},
    "order": lambda q, a: {"answer": a},
}


@pytest.mark.parametrize("form", FORMS)
def test_answers_find_their_questions(form: str, questions: Path, tmp_path: Path) -> None:
    records = [FORMS[form](q, a) for q, a in zip(QUESTIONS, ANSWERS, strict=True)]
    if form != "order":
        records.reverse()
    results = score_pope(lines(tmp_path / "mine.jsonl", records), [questions])
    metrics = results["metrics"]["mine"]["popular"]
    assert metrics["accuracy"]["value"] == 50.0  # right: the first and the last ("not" is no)
    assert metrics["yes_ratio"]["value"] == 50.0
    assert metrics["precision"]["value"] == 50.0
    assert metrics["unparsed"] == 1
    assert results["counts"] == {"samples": 4, "finished": {"mine": 4}, "skipped": 0, "unanswered": 0}
    strict = score_pope(tmp_path / "mine.jsonl", [questions], parser="strict")["metrics"]["mine"]["popular"]
    assert strict["accuracy"]["value"] == 25.0


def test_unknown_ids_are_counted(questions: Path, tmp_path: Path) -> None:
    records = [{"question_id": i, "answer": "yes"} for i in (1, 2, 99)]
    assert score_pope(lines(tmp_path / "a.jsonl", records), [questions])["counts"] == {
        "samples": 2, "finished": {"a": 2}, "skipped": 1, "unanswered": 2,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"question_id": 1, "answer": "yes"}] * 2, "record 2: a second answer to 1"),
        ([{"answer": "yes"}], "1 answers without question_id .* 4 questions"),
        ([{"question_id": 77, "answer": "yes"}], "none of its 1 answers"),
        ([{"question_id": 1}], "record 1: needs 'answer'"),
        ([], "holds no answers"),
    ],
)
def test_wrong_answer_files(records: list[dict[str, Any]], message: str, questions: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        score_pope(lines(tmp_path / "a.jsonl", records), [questions])


def test_question_id_over_several_files_is_ambiguous(questions: Path, tmp_path: Path) -> None:
    answers = lines(tmp_path / "a.jsonl", [{"question_id": 1, "answer": "yes"}])
    with pytest.raises(ValueError, match="ambiguous over 2"):
        score_pope(answers, [questions, questions])


def test_a_list_out_of_balance_is_warned_about(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="1 of 3 answers are yes"):
        pope.read_questions(lines(tmp_path / "random.json", QUESTIONS[1:]))


@pytest.mark.parametrize("kind", ["coco", "aokvqa"])
def test_gold_answers_to_official_questions_are_all_right(kind: str, tmp_path: Path) -> None:
    files = [shared_file(f"pope/{kind}/{kind}_pope_{split}.json") for split in pope.SPLITS]
    asked = [question for file in files for question in pope.read_questions(file)]
    answers = lines(tmp_path / "gold.jsonl", [{"answer": question.label.capitalize() + "."} for question in asked])
    results = score_pope(answers, files)
    assert results["counts"]["samples"] == 9000
    assert results["config"]["images"] == 500
    for split in (*pope.SPLITS, "mean"):
        assert results["metrics"]["gold"][split]["f1"] == {"value": 100.0, "low": 100.0, "high": 100.0}
        assert results["metrics"]["gold"][split]["yes_ratio"]["value"] == 50.0
