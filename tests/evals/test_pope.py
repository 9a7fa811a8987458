# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import itertools
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_attn.evals import pope
from vlm_attn.evals.coco import CocoDataset

from .conftest import NAMES, OBJECTS, instances_of, shared_file


def made(objects: dict[int, list[str]], names: tuple[str, ...] = NAMES) -> CocoDataset:
    return CocoDataset("made", instances_of(objects, names), None, lambda image: None)


def asked(question: pope.Question) -> str:
    return question.text.removeprefix("Is there a").removeprefix("n ").strip().removesuffix(" in the image?")


def real_dataset() -> CocoDataset:
    return CocoDataset.from_folder(shared_file("coco_photos"))


def test_questions_follow_the_rules_on_real_annotations() -> None:
    dataset = real_dataset()
    questions = pope.build_questions(dataset, images=50, seed=3)
    assert len(questions) == 3 * 50 * 6
    for split in pope.SPLITS:
        ours = [q for q in questions if q.split == split]
        assert Counter(q.label for q in ours) == {"yes": 150, "no": 150}
        for _, group in itertools.groupby(ours, key=lambda q: q.image_id):
            rows = list(group)
            present = dataset.objects(rows[0].image_id)
            assert [q.label for q in rows] == ["yes", "no"] * 3
            assert [asked(q) for q in rows if q.label == "yes"] == present[:3]
            negatives = [asked(q) for q in rows if q.label == "no"]
            assert len(set(negatives)) == 3
            assert not set(negatives) & set(present)
    by_split = {split: [q.image_id for q in questions if q.split == split] for split in pope.SPLITS}
    assert by_split["random"] == by_split["popular"] == by_split["adversarial"]
    assert len(set(by_split["random"])) == 50


def test_questions_are_seeded() -> None:
    dataset = real_dataset()
    once = pope.build_questions(dataset, images=20, seed=1)
    assert once == pope.build_questions(dataset, images=20, seed=1)
    assert once != pope.build_questions(dataset, images=20, seed=2)
    # A split has the same questions, whichever others are asked for.
    alone = pope.build_questions(dataset, splits=["random"], images=20, seed=1)
    assert alone == [q for q in once if q.split == "random"]


def test_popular_and_adversarial_take_the_best_placed_absent_object() -> None:
    objects = {
        1: ["person", "car", "dog"],
        2: ["person", "car", "dog", "kite"],
        3: ["person", "car", "apple"],
        4: ["kite", "dog", "cup"],
        5: ["kite", "book", "apple"],
    }
    # How many images: person 3, car 3, dog 3, kite 3, apple 2, book 1, cup 1; ties in order of the alphabet.
    questions = pope.build_questions(made(objects), splits=["popular", "adversarial"], images=None)
    negatives = {
        (split, image): [asked(q) for q in questions if (q.split, q.image_id, q.label) == (split, image, "no")]
        for split in ("popular", "adversarial")
        for image in objects
    }
    assert negatives["popular", 1] == ["kite", "apple", "book"]
    assert negatives["popular", 5] == ["car", "dog", "person"]
    # Beside person: car 3, dog 2, then apple and kite 1. Beside car the same. Beside dog: car, kite, person 2, cup 1.
    assert negatives["adversarial", 1] == ["apple", "kite", "cup"]
    # Beside kite: dog 2, then apple, book, car, cup, person 1. Beside book: apple, kite. Beside apple: car, person.
    assert negatives["adversarial", 5][0] == "dog"
    assert negatives["adversarial", 5][1] not in objects[5]  # book has no neighbour left: drawn at random
    assert negatives["adversarial", 5][2] == "car" or negatives["adversarial", 5][1] == "car"


def test_wording() -> None:
    assert pope.question_text("apple") == "Is there an apple in the image?"
    assert pope.question_text("dining table") == "Is there a dining table in the image?"


def test_impossible_requests_are_refused() -> None:
    with pytest.raises(ValueError, match="no image has 3 objects"):
        pope.build_questions(made({1: ["cat"], 2: ["dog", "car"]}))
    with pytest.raises(ValueError, match="only 4 categories"):
        pope.build_questions(made({1: ["cat", "dog", "car"], 2: ["kite", "dog", "car"]}))
    with pytest.raises(ValueError, match="random, popular, adversarial"):
        pope.build_questions(made(OBJECTS), splits=["hard"])
    with pytest.raises(ValueError, match="images=0"):
        pope.build_questions(made(OBJECTS), images=0)


@pytest.mark.parametrize("kind", ["coco", "aokvqa"])
def test_official_files_read(kind: str) -> None:
    images = []
    for split in pope.SPLITS:
        questions = pope.read_questions(shared_file(f"pope/{kind}/{kind}_pope_{split}.json"))
        assert len(questions) == 3000
        assert Counter(q.label for q in questions) == {"yes": 1500, "no": 1500}
        assert {q.split for q in questions} == {split}
        images.append({q.image_id for q in questions})
    assert len(images[0]) == 500
    assert images[0] == images[1] == images[2]


def test_official_files_have_the_structure_that_is_built() -> None:
    objects = {}
    for line in shared_file("coco_gt/pope500_gt.jsonl").read_text().splitlines():
        record = json.loads(line)
        objects[record["image_id"]] = set(record["objects"])
    questions = pope.read_questions(shared_file("pope/coco/coco_pope_adversarial.json"))
    assert [q.label for q in questions[:6]] == ["yes", "no"] * 3
    # The files say "a" and "an" as question_text does.
    assert all(q.text == pope.question_text(asked(q)) for q in questions)
    # Labels agree with annotations: 5 % do not, as these are of 2017 and without crowds.
    wrong = [q for q in questions if (asked(q) in objects[q.image_id]) != (q.label == "yes")]
    assert len(wrong) < 160


def test_files_with_errors_name_the_record(tmp_path: Path) -> None:
    file = tmp_path / "my_pope_popular.json"
    good = {"image": "COCO_val2014_000000310196.jpg", "text": "Is there a car in the image?", "label": "No "}
    file.write_text(json.dumps([good, {**good, "image": "no number.jpg"}]))
    with pytest.raises(ValueError, match=r"my_pope_popular\.json, record 2"):
        pope.read_questions(file)
    file.write_text(json.dumps([good, {**good, "label": "maybe"}]))
    with pytest.raises(ValueError, match="record 2"):
        pope.read_questions(file)
    file.write_text("\n")
    with pytest.raises(ValueError, match="no questions"):
        pope.read_questions(file)
    file.write_text(json.dumps(good))
    assert pope.read_questions(file) == [pope.Question(310196, good["text"], "no", "popular")]
    other = tmp_path / "odd.json"
    other.write_text(json.dumps(good))
    assert pope.read_questions(other)[0].split == "odd"


# answer -> what official, opera, strict read, and whether VCD finds it right for a gold yes and a gold no
PARSED = [
    ("Yes", "yes", "yes", "yes", True, False),
    ("No.", "no", "no", "no", False, True),
    ("no, there is not", "no", "no", "no", False, True),
    ("NO", "yes", "no", "no", False, True),
    ("Yes. No doubt about it", "yes", "no", "yes", True, True),
    ("There isn't one", "yes", "no", None, False, False),
    ("I do not see it", "no", "no", None, False, True),
    ("I know it is", "yes", "yes", None, False, True),
    ("A photo of a street", "yes", "yes", None, False, False),
    ("", "yes", "yes", None, False, False),
    ("yes , there is a car", "yes", "yes", "yes", True, False),
    ("'No', I think", "yes", "yes", "no", False, True),
    ("Nothing", "yes", "yes", None, False, True),
]


@pytest.mark.parametrize(("answer", "official", "opera", "strict", "vcd_yes", "vcd_no"), PARSED)
def test_parsers(answer: str, official: str, opera: str, strict: str, vcd_yes: bool, vcd_no: bool) -> None:
    assert pope.get_parser("official")(answer, "yes") == official
    assert pope.get_parser("opera")(answer, "yes") == opera
    assert pope.get_parser("strict")(answer, "no") == strict
    assert (pope.get_parser("vcd")(answer, "yes") == "yes") is vcd_yes
    assert (pope.get_parser("vcd")(answer, "no") == "no") is vcd_no


def test_unknown_parser() -> None:
    with pytest.raises(ValueError, match="official, opera, vcd, strict"):
        pope.get_parser("offical")


def test_unparsed() -> None:
    assert [pope.is_unparsed(text) for text in ("Yes!", "NO", "not here", "I know", "")] == [
        False, False, True, True, True,
    ]  # fmt: skip


def records(split: str, table: list[tuple[int, str, str | None]]) -> list[dict[str, Any]]:
    return [
        {"image_id": image, "split": split, "label": label, "prediction": said, "answer": said or "hm"}
        for image, label, said in table
    ]


def test_metrics_of_a_hand_made_case() -> None:
    # 3 true yes, 1 missed, 2 false yes, 1 true no, 1 unparsed on a gold no: 8 questions on 2 images.
    table: list[tuple[int, str, str | None]] = [
        (1, "yes", "yes"), (1, "yes", "yes"), (1, "no", "yes"), (1, "no", None),
        (2, "yes", "yes"), (2, "yes", "no"), (2, "no", "yes"), (2, "no", "no"),
    ]  # fmt: skip
    summary = pope.summarise(records("random", table))
    values = {name: summary["random"][name]["value"] for name in pope.METRICS}
    assert values == pytest.approx(
        {"accuracy": 50.0, "precision": 60.0, "recall": 75.0, "f1": 200 * 0.6 * 0.75 / 1.35, "yes_ratio": 62.5}
    )
    assert summary["random"]["questions"] == 8
    assert summary["random"]["unparsed"] == 1
    assert summary["mean"]["f1"] == summary["random"]["f1"]


def test_every_figure_where_all_counts_differ() -> None:
    """7 true yes, 4 false yes, 2 missed, 6 true no: no two of the counts that the figures are made of are equal."""
    table: list[tuple[int, str, str | None]] = [
        *[(1, "yes", "yes")] * 7, *[(2, "no", "yes")] * 4, *[(1, "yes", "no")] * 2, *[(2, "no", "no")] * 5, (2, "no", "no"),
    ]  # fmt: skip
    asked, right, said_yes, is_yes, both = 19, 13, 11, 9, 7
    assert len({asked, right, said_yes, is_yes, both}) == 5
    summary = pope.summarise(records("popular", table))["popular"]
    assert {name: summary[name]["value"] for name in pope.METRICS} == pytest.approx(
        {
            "accuracy": 100 * right / asked, "precision": 100 * both / said_yes, "recall": 100 * both / is_yes,
            "f1": 200 * both / (said_yes + is_yes), "yes_ratio": 100 * said_yes / asked,
        }
    )  # fmt: skip
    assert (summary["questions"], summary["plain_no"], summary["disagree"], summary["unparsed"]) == (19, 8, 0, 0)


def test_mean_is_over_splits_and_intervals_hold_the_value() -> None:
    right = [(image, label, label) for image in range(40) for label in ("yes", "no")]
    yes = [(image, label, "yes" if image % 4 else label) for image in range(40) for label in ("yes", "no")]
    summary = pope.summarise(records("random", right) + records("popular", yes))
    assert summary["random"]["accuracy"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    popular = summary["popular"]["accuracy"]
    assert popular["value"] == pytest.approx(62.5)
    # Half of an image's questions are wrong in 30 of 40 images: the standard error is 50 sqrt(.75 .25 / 40) = 3.4.
    assert popular["low"] == pytest.approx(62.5 - 1.96 * 3.42, abs=1.5)
    assert popular["high"] == pytest.approx(62.5 + 1.96 * 3.42, abs=1.5)
    assert summary["mean"]["accuracy"]["value"] == pytest.approx(81.25)
    assert summary["mean"]["questions"] == 160
    assert summary == pope.summarise(records("random", right) + records("popular", yes))  # seeded


def test_never_yes_has_no_precision_but_no_error() -> None:
    summary = pope.summarise(records("random", [(1, "yes", "no"), (2, "no", "no")]))
    assert summary["random"]["precision"]["value"] == 0.0
    assert summary["random"]["f1"]["value"] == 0.0
    assert summary["random"]["accuracy"]["value"] == 50.0


def test_the_older_list_of_2910_is_named(tmp_path: Path) -> None:
    lines = shared_file("pope/coco/coco_pope_random.json").read_text().splitlines()
    no = [line for line in lines if json.loads(line)["label"] == "no"]
    file = tmp_path / "coco_pope_random.json"
    file.write_text("\n".join(line for line in lines if line not in no[:90]))
    with pytest.warns(UserWarning, match="1500 of 2910 answers are yes; .*90 questions missing"):
        assert len(pope.read_questions(file)) == 2910


def test_pictures_of_a_question_file(tmp_path: Path) -> None:
    """GQA's and A-OKVQA's lists bring answers, so that pictures alone are enough."""
    file = tmp_path / "gqa_pope_popular.json"
    names = ["2354786.jpg", "n161313.jpg", "2354786.jpg"]
    file.write_text(
        "\n".join(json.dumps({"image": name, "text": "Is there a cup in the imange?", "label": "no"}) for name in names)
    )
    assert pope.picture_names([file]) == {2354786: "2354786.jpg", 161313: "n161313.jpg"}
    Image.new("RGB", (20, 10)).save(tmp_path / "n161313.jpg")
    dataset = CocoDataset.of_pictures(tmp_path, pope.picture_names([file]))
    assert dataset.image_ids == [2354786, 161313]
    assert dataset.load_image(161313).size == (20, 10)
    assert dataset.objects(161313) == []
    with pytest.raises(FileNotFoundError, match=r"2354786\.jpg"):
        dataset.load_image(2354786)
    file.write_text(
        file.read_text() + "\n" + json.dumps({"image": "161313.jpg", "text": "Is there a cup?", "label": "no"})
    )
    with pytest.raises(ValueError, match=r"n161313\.jpg and 161313\.jpg end in the same number"):
        pope.picture_names([file])
