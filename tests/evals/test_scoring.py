# SPDX-License-Identifier: Apache-2.0
"""Answers that exist already, scored without a model."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from vlm_attn.evals import pope
from vlm_attn.evals.report import remarks
from vlm_attn.evals.scoring import score_amber, score_pope

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
        ([{"question_id": 1, "answer": "yes"}] * 2, "record 2: a second answer to question_id 1"),
        ([{"answer": "yes"}], "1 answers without question_id .* 4 questions"),
        ([{"question_id": 77, "answer": "yes"}], "none of its 1 answers"),
        ([{"question_id": 1}], "record 1: needs 'caption', 'answer', 'response' or 'text'"),
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


# What a file may hold where the model said no; what reads as no under the official rule once the reader has cleaned it.
SAID = {
    "No\n": True, "No</s>": True, " no.": True, "No, there is not.": True, "No<|im_end|>": True,
    "**No**": False, "No!": False, "Answer:No": False, "**Answer:**No\n": False, "NO": False, "No\nThere is none": False,
    "_No_": False, "<b>No</b>": False, "The answer is No;": False,
}  # fmt: skip


@pytest.mark.parametrize("said", SAID)
def test_a_rule_that_does_not_fit_the_file_shows(said: str, questions: Path, tmp_path: Path) -> None:
    """Every answer is right. Where the published rule reads every no as yes, that is said."""
    answers = [
        {"answer": said if q["label"] == "no" else said.replace("No", "Yes").replace("no", "yes")} for q in QUESTIONS
    ]
    answers = [
        {"answer": re.sub("NO", "Yes", a["answer"]) if q["label"] == "yes" else a["answer"]}
        for a, q in zip(answers, QUESTIONS, strict=True)
    ]
    results = score_pope(lines(tmp_path / "mine.jsonl", answers), [questions])
    row = results["metrics"]["mine"]["mean"]
    assert row["unparsed"] == 0
    assert row["plain_no"] == 2
    if SAID[said]:
        assert row["accuracy"]["value"] == 100.0
        assert (row["disagree"], row["no_read_as_yes"]) == (0, 0)
        assert remarks(results) == []
    else:
        assert row["accuracy"]["value"] == 50.0  # the published rule stays what it is
        assert (row["disagree"], row["no_read_as_yes"]) == (2, 2)
        assert "every no (2 answers) was read as yes by the rule 'official'" in remarks(results)[0]
        assert "2 of 4 answers begin with another word" in remarks(results)[1]


def test_some_readings_that_differ_are_counted(questions: Path, tmp_path: Path) -> None:
    answers = [{"answer": text} for text in ("Yes, without doubt there is no cat", "No!", "No", "Maybe")]
    results = score_pope(lines(tmp_path / "mine.jsonl", answers), [questions])
    row = results["metrics"]["mine"]["popular"]
    assert (row["disagree"], row["plain_no"], row["no_read_as_yes"], row["unparsed"]) == (2, 2, 1, 1)
    (said,) = remarks(results)
    assert "2 of 4 answers" in said
    assert "1 of the 2 that begin with no" in said


def pope_lists(splits: tuple[str, ...]) -> list[Path]:
    return [shared_file(f"pope/coco/coco_pope_{split}.json") for split in splits]


def as_llava(files: list[Path], *, start: int = 1, said: bool = True) -> list[dict[str, Any]]:
    """All lists in one file, as LLaVA's script writes them: right answers, ids that go on in blocks of ten million."""
    records = []
    for block, file in enumerate(files):
        for place, line in enumerate(file.read_text().splitlines()):
            question = json.loads(line)
            record = {"question_id": block * 10_000_000 + place + start, "text": question["label"].capitalize()}
            if said:
                record["prompt"] = question["text"] + "\nAnswer the question using a single word or phrase."
            records.append(record)
    return records


LLAVA = ("adversarial", "popular", "random")


def test_one_file_for_all_lists(tmp_path: Path) -> None:
    files = pope_lists(LLAVA)
    records = as_llava(files)
    random.Random(0).shuffle(records)
    answers = lines(tmp_path / "llava.jsonl", records)
    for split, file in zip(LLAVA, files, strict=True):
        results = score_pope(answers, [file])
        assert results["metrics"]["llava"][split]["accuracy"]["value"] == 100.0, split
        assert results["counts"]["skipped"] == 6000
        assert results["counts"]["unanswered"] == 0
    together = score_pope(answers, list(reversed(files)))
    assert together["metrics"]["llava"]["mean"]["accuracy"]["value"] == 100.0
    assert together["counts"]["skipped"] == 0
    with pytest.raises(ValueError, match="hold no question to tell which list is which"):
        score_pope(lines(tmp_path / "bare.jsonl", as_llava(files, said=False)), [files[1]])


def test_answers_to_another_list_or_order_are_refused_with_both_sides(tmp_path: Path) -> None:
    adversarial, popular, _ = files = pope_lists(LLAVA)
    both = (
        r"record 2: it says '.*Is there a \w[\w ]* in the image.*', "
        r"but the question .*coco_pope_popular.json, record 2.*is image \d+"
    )
    for name, records in (
        ("other list", as_llava([adversarial])),
        ("other list, in order", [{"question": r["prompt"], "answer": r["text"]} for r in as_llava([adversarial])]),
    ):
        with pytest.raises(ValueError, match=both):
            score_pope(lines(tmp_path / "a.jsonl", records), [popular])
        assert name
    # Ids from 0: every answer would be taken for its neighbour's.
    with pytest.raises(ValueError, match="question_id goes from 0 to 2999, that of the questions from 1 to 3000"):
        score_pope(lines(tmp_path / "a.jsonl", as_llava([popular], start=0, said=False)), [popular])
    with pytest.raises(ValueError, match="(?s)goes from 0|it says"):
        score_pope(lines(tmp_path / "a.jsonl", as_llava([popular], start=0)), [popular])
    # A shuffled file without ids, which would be taken in order.
    shuffled = [{"question": r["prompt"], "answer": r["text"]} for r in as_llava([popular])]
    random.Random(1).shuffle(shuffled)
    with pytest.raises(ValueError, match="in another order"):
        score_pope(lines(tmp_path / "a.jsonl", shuffled), [popular])
    # The images alone can tell, too, and so can labels.
    images = [json.loads(line) for line in popular.read_text().splitlines()]
    for keep in ("image", "label"):
        turned = [{keep: r[keep], "answer": r["label"]} for r in images[6:] + images[:5] + images[5:6]]
        if keep == "label":
            turned = turned[1:] + turned[:1]
        with pytest.raises(ValueError, match=keep):
            score_pope(lines(tmp_path / "a.jsonl", turned), [popular])
    # With image and text they find their questions in any order.
    found = [
        {"image": r["image"], "question": r["text"].upper() + " Answer yes or no.", "answer": r["label"]}
        for r in images
    ]
    random.Random(2).shuffle(found)
    results = score_pope(lines(tmp_path / "a.jsonl", found), [popular])
    assert results["metrics"]["a"]["popular"]["accuracy"]["value"] == 100.0
    assert results["counts"]["unanswered"] == 0
    assert files


def test_the_older_list_is_not_scored_as_the_new_one(tmp_path: Path) -> None:
    (file,) = pope_lists(("random",))
    questions = [json.loads(line) for line in file.read_text().splitlines()]
    no = [q["question_id"] for q in questions if q["label"] == "no"][::16][:90]
    older = [q for q in questions if q["question_id"] not in no]
    assert len(older) == 2910
    for keys in ((), ("prompt",)):
        records = [
            {"question_id": place, "answer": q["label"], "prompt": q["text"]} for place, q in enumerate(older, start=1)
        ]
        records = [{k: v for k, v in r.items() if k != "prompt" or k in keys} for r in records]
        with pytest.raises(ValueError, match="2910 answers, as many as the older random list"):
            score_pope(lines(tmp_path / "a.jsonl", records), [file])


def test_hot_dogs_are_no_dogs_and_prompts_may_be_worded_otherwise(questions: Path, tmp_path: Path) -> None:
    prompts = [
        "Does this picture show a dog? Yes or no?",
        "Is there a cat in this image?",
        "<image> Is there a cup in the imange?",
        "car, or no car?",
    ]
    records = [{"question_id": n, "prompt": p, "answer": "yes"} for n, p in enumerate(prompts, start=1)]
    assert score_pope(lines(tmp_path / "a.jsonl", records), [questions])["counts"]["unanswered"] == 0
    records[0]["prompt"] = "Is there a hot dog in the image?"
    with pytest.raises(ValueError, match="record 1: it says 'Is there a hot dog"):
        score_pope(lines(tmp_path / "a.jsonl", records), [questions])


def test_answers_of_several_lists_by_image_and_text(tmp_path: Path) -> None:
    """A question that three lists share is answered once or three times; answers that differ need their list."""
    files = pope_lists(LLAVA)
    asked = [
        (split, json.loads(line))
        for split, file in zip(LLAVA, files, strict=True)
        for line in file.read_text().splitlines()
    ]
    every = [{"image_id": q["image"], "question": q["text"], "answer": q["label"], "category": s} for s, q in asked]
    once = list({(r["image_id"], r["question"]): r for r in every}.values())
    assert len(once) < len(every)
    for name, records in (("every", every), ("once", [{k: v for k, v in r.items() if k != "category"} for r in once])):
        results = score_pope(lines(tmp_path / f"{name}.jsonl", records), files)
        assert results["metrics"][name]["mean"]["accuracy"]["value"] == 100.0
        assert results["counts"] == {"samples": 9000, "finished": {name: 9000}, "skipped": 0, "unanswered": 0}
    wrong = [{**r, "answer": "no"} if r["category"] == "popular" else r for r in every]
    metrics = score_pope(lines(tmp_path / "wrong.jsonl", wrong), files)["metrics"]["wrong"]
    assert [metrics[split]["accuracy"]["value"] for split in LLAVA] == [100.0, 50.0, 100.0]
    untold = [{k: v for k, v in r.items() if k != "category"} for r in wrong]
    with pytest.raises(ValueError, match="a second answer to image .*Score the lists one by one"):
        score_pope(lines(tmp_path / "untold.jsonl", untold), files)


def test_our_own_samples_are_scored_again(tmp_path: Path, questions: Path) -> None:
    facts = [
        {"image_id": int(q["image"][-16:-4]), "question": q["text"], "label": q["label"], "splits": ["popular"]}
        for q in QUESTIONS
    ]
    records = [
        {"method": method, "sample": n, **fact, "answer": answer, "score": {}}
        for method, answer in (("baseline", "Yes"), ("gift", "No"))
        for n, fact in enumerate(facts)
    ]
    file = lines(tmp_path / "samples.jsonl", records)
    with pytest.raises(ValueError, match="baseline, gift: say which with --method"):
        score_pope(file, [questions])
    assert score_pope(file, [questions], method="gift")["metrics"]["samples"]["popular"]["yes_ratio"]["value"] == 0.0


def test_amber_answers_have_to_fit_their_query(tmp_path: Path) -> None:
    data = shared_file("amber")
    queries = json.loads((data / "query_discriminative-existence.json").read_text())[:6]
    records = [{"id": str(q["id"]), "question": q["query"], "answer": "No"} for q in queries]
    results = score_amber(lines(tmp_path / "a.jsonl", records), data)
    assert results["metrics"]["a"]["existence"]["accuracy"]["value"] == 100.0
    records[3]["question"] = queries[4]["query"]
    with pytest.raises(ValueError, match=f"record 4: id {queries[3]['id']} is .*{re.escape(queries[3]['query'])}"):
        score_amber(lines(tmp_path / "a.jsonl", records), data)
    spoken = lines(tmp_path / "b.jsonl", [{"id": q["id"], "response": "No, there is not."} for q in queries])
    (said,) = [text for text in remarks(score_amber(spoken, data)) if "begin with another word" in text]
    assert "6 of 6" in said
