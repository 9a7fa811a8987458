# SPDX-License-Identifier: Apache-2.0
"""Files as people have them: one reader for captions, answers and image ids."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from vlm_attn.evals import chair, reading, runner
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.scoring import score_chair, score_pope
from vlm_attn.evals.tasks import read_image_ids

from .conftest import shared_file, write_folder

CAPTIONS = {415672: 'a dog, "two" cats\nand a car', 7: "", 11: "ein Hündchen"}
Write = Callable[[Path, dict[int, str]], Path]


def lines(key: str = "caption", image: str = "image_id", name: Callable[[int], Any] = int, start: str = "") -> Write:
    def write(folder: Path, captions: dict[int, str]) -> Path:
        file = folder / "mine.jsonl"
        records = [{image: name(number), key: text} for number, text in captions.items()]
        file.write_text(start + "\n".join(json.dumps(record, ensure_ascii=False) for record in records), "utf-8")
        return file

    return write


def whole(make: Callable[[dict[int, str]], Any], name: str = "mine.json", **options: Any) -> Write:
    def write(folder: Path, captions: dict[int, str]) -> Path:
        (folder / name).write_text(json.dumps(make(captions), **options))
        return folder / name

    return write


def table(name: str, delimiter: str, encoding: str = "utf-8") -> Write:
    def write(folder: Path, captions: dict[int, str]) -> Path:
        with open(folder / name, "w", encoding=encoding, newline="") as file:
            rows = csv.writer(file, delimiter=delimiter)
            rows.writerows([["id", "caption"], *captions.items()])
        return folder / name

    return write


def coco_name(number: int) -> str:
    return f"COCO_val2014_{number:012d}.jpg"


FORMS: dict[str, Write] = {
    "lines": lines(),
    "ids as text": lines(name=str),
    "padded ids": lines(name=lambda number: f"{number:012d}"),
    "ids of a table": lines(name=float),
    "file names": lines(name=coco_name),
    "paths": lines(image="image", name=lambda number: f"/data/coco/val2014/{coco_name(number)}"),
    "file_name": lines(image="file_name", name=coco_name),
    "id": lines(image="id"),
    "text": lines("text", "image"),
    "answer": lines("answer"),
    "response": lines("response", "id", str),
    "byte-order mark": lines(start="\ufeff"),
    "array": whole(lambda captions: [{"image_id": i, "caption": text} for i, text in captions.items()]),
    "indented array": whole(lambda captions: [{"image_id": i, "caption": t} for i, t in captions.items()], indent=1),
    "map": whole(dict),
    "indented map of names": whole(lambda captions: {coco_name(i): t for i, t in captions.items()}, indent=2),
    "map of lists": whole(lambda captions: {i: [text] for i, text in captions.items()}),
    "coco": whole(lambda c: {"images": [], "annotations": [{"image_id": i, "caption": t, "id": i + 1} for i, t in c.items()]}),
    "csv": table("mine.csv", ","),
    "csv of a spreadsheet": table("mine.csv", ";", "utf-8-sig"),
    "tsv": table("mine.tsv", "\t"),
    "samples.jsonl": whole(
        lambda captions: [
            {"method": "gift", "sample": n, "image_id": i, "answer": text, "score": {}}
            for n, (i, text) in enumerate(captions.items())
        ]
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_captions_in_every_form(form: str, tmp_path: Path) -> None:
    file = FORMS[form](tmp_path, CAPTIONS)
    assert {record["image_id"]: record["caption"] for record in chair.read_captions(file)} == CAPTIONS
    assert read_image_ids(file) == list(CAPTIONS)  # the same files as --ids


def test_keys_that_are_named(tmp_path: Path) -> None:
    file = lines("said", "img")(tmp_path, CAPTIONS)
    with pytest.raises(
        ValueError, match=r"mine\.jsonl, record 1: needs 'caption'.*--caption-key; it has 'img', 'said'"
    ):
        chair.read_captions(file)
    with pytest.raises(ValueError, match=r"record 1: needs 'image_id'.*--image-key"):
        chair.read_captions(file, text_key="said")
    with pytest.raises(ValueError, match=r"has no 'imgs' \(--image-key\)"):
        chair.read_captions(file, text_key="said", image_key="imgs")
    assert len(chair.read_captions(file, text_key="said", image_key="img")) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"image_id": 1, "caption": null}', "record 1: needs 'caption' (a text), got None"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": 2}', "record 2: needs 'caption' (a text), got none"),
        ('{"image_id": true, "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": 1.5, "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": "1.50", "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": -4, "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": "-4", "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": NaN, "caption": "a"}', "record 1: needs 'image_id'"),
        ('{"image_id": 1, "image": "000000000002.jpg", "caption": "a"}', "are two images"),
        ('{"image_id": 1, "caption": "a", "answer": "b"}', "has 'caption' and 'answer': say which with --caption-key"),
        ('{"image_id": "1", "text": "a"}\n{"image_id": "01.jpg", "text": "b"}', "image_id 1 occurs twice (first in record 1)"),
        ('{"1": "a", "1": "b"}', "'1' occurs twice"),
        ('{"1": ["a", "b"]}', "record 1: image 1 has 2 texts"),
        ('{"1": "a", "2": null}', "record 2: needs 'caption'"),
        ("[" * 200_000, "nested too deeply"),
        ('{"image_id": 1, "caption": "a"}\n{"image_id": ' + "[" * 200_000, "line 2: nested too deeply"),
        ("[1, 2]", "record 1: expected an object, got int"),
        ('{"image_id": 1, "caption": "a"', "line 1: not valid JSON"),
        ("", "holds no captions"),
    ],
)  # fmt: skip
def test_records_that_cannot_be_understood(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "mine.jsonl"
    file.write_text(text)
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        chair.read_captions(file)
    assert "mine.jsonl" in str(error.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"image_id,caption\n1,a dog, a cat\n", "record 1: has 3 fields, the header has 2"),
        (b'image_id,caption\n1,"a dog\n', "not valid CSV"),
        (b"number,words\n1,a dog\n", "record 1: needs 'caption'"),
        (b"image_id,caption\n", "holds no captions"),
        ("image_id,caption\n1,a dog".encode("utf-16"), "not a UTF-8 text file (line 1, byte 0) (it looks like UTF-16"),
        (b"image_id,caption\n1,a\xff\n", "line 2"),
    ],
)
def test_tables_that_cannot_be_understood(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "mine.csv").write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        chair.read_captions(tmp_path / "mine.csv")


def test_half_an_emoji_is_read_and_can_be_written(tmp_path: Path) -> None:
    """A caption that was cut within a pair of surrogates, as programs that count in UTF-16 do."""
    file = tmp_path / "mine.jsonl"
    file.write_text('{"image_id": 1, "caption": "a dog \\ud83d"}\n{"image_id": 2, "caption": "\\ud83d\\ude00 a cat"}')
    folder = write_folder(tmp_path / "data", {1: ["dog"], 2: ["cat"]})
    results = score_chair(file, folder)
    assert [sample["answer"] for sample in results["samples"]] == ["a dog \ufffd", "\U0001f600 a cat"]
    runner.write_json(
        tmp_path / "out.json", {**results, "prompt": "\udcff"}
    )  # also of what did not come through the reader
    assert json.loads((tmp_path / "out.json").read_text("utf-8"))["prompt"] == "\udcff"


def test_what_a_tokenizer_leaves_is_no_part_of_an_answer() -> None:
    for text in ("No\n", " No", "No</s>", "<s> No</s><pad><pad>", "No<|im_end|>\n", "No<end_of_turn>", "<bos>No<eos>"):
        assert reading.bare_answer(text) == "No", text
    assert reading.bare_answer("a <b>dog</b> | a cat < 2") == "a <b>dog</b> | a cat < 2"


def test_methods_of_a_samples_file(tmp_path: Path) -> None:
    file = tmp_path / "samples.jsonl"
    records = [
        {"method": method, "sample": n, "image_id": n, "answer": f"a {method}", "score": {}}
        for method in ("dog", "cat")
        for n in (1, 2)
    ]
    records[3] = {"method": "cat", "sample": 2, "image_id": 2, "skipped": "cannot be read"}
    file.write_text("\n".join(map(json.dumps, records)))
    with pytest.raises(ValueError, match="holds answers of dog, cat: say which with --method"):
        chair.read_captions(file)
    with pytest.raises(ValueError, match="--method bat: .* holds answers of dog, cat"):
        chair.read_captions(file, method="bat")
    assert [record["caption"] for record in chair.read_captions(file, method="dog")] == ["a dog", "a dog"]
    assert chair.read_captions(file, method="cat") == [{"image_id": 1, "caption": "a cat"}]
    with pytest.raises(ValueError, match="not a samples.jsonl"):
        chair.read_captions(lines()(tmp_path, CAPTIONS), method="dog")


@pytest.mark.parametrize(
    ("text", "ids"),
    [
        ("5\n7\n", [5, 7]), ("\ufeff5\r\n7\r\n", [5, 7]), ("5, 7", [5, 7]), ('["5", 7]', [5, 7]),
        (f"{coco_name(5)}\n{coco_name(7)}", [5, 7]), (f'["{coco_name(5)}"]', [5]),
        ('{"image": "COCO_val2014_000000000005.jpg", "text": "a"}\n' * 2 + '{"image": "7.jpg", "text": "b"}', [5, 7]),
    ],
)  # fmt: skip
def test_image_ids(text: str, ids: list[int], tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(text, "utf-8")
    assert read_image_ids(file) == ids


def test_names_of_a_dataset_come_before_the_numbers_in_them(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", {1: ["dog"], 2: ["cat"]})
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["images"] = [{"id": 1, "file_name": "kitchen_2.jpg"}, {"id": 2, "file_name": "b/garden_1.jpg"}]
    file.write_text(json.dumps(content))
    mine = tmp_path / "mine.json"
    mine.write_text(json.dumps({"kitchen_2.jpg": "a dog", "garden_1.jpg": "a cat"}))
    assert score_chair(mine, folder)["metrics"]["mine"]["instances"]["chair_s"]["value"] == 0.0
    names = CocoDataset.from_folder(folder).image_names
    assert read_image_ids(mine, names) == [1, 2]


def test_real_captions_in_every_form_score_the_same(tmp_path: Path) -> None:
    source = shared_file("chair/captions/llava-1.5__greedy.jsonl")
    captions = {
        record["image_id"]: record["caption"] for record in map(json.loads, source.read_text().splitlines()[:40])
    }
    folder = write_folder(tmp_path / "data", {image: ["person", "car"] for image in captions})
    expected = None
    for form in ("lines", "file names", "csv of a spreadsheet", "indented map of names", "samples.jsonl"):
        results = score_chair(FORMS[form](tmp_path, captions), folder)
        expected = expected or results["metrics"]["mine"]
        assert results["metrics"]["mine"] == expected, form


def test_answers_are_read_as_captions_are(tmp_path: Path) -> None:
    questions = tmp_path / "pope_random.json"
    asked = [{"question_id": n, "image": coco_name(5), "text": f"Is there a {t} in the image?", "label": label}
             for n, (t, label) in enumerate((("dog", "yes"), ("cat", "no")), start=1)]  # fmt: skip
    questions.write_text(json.dumps(asked))
    for name, content in (
        ("a.csv", "question_id,answer\n2,No\n1,Yes\n"),
        ("b.json", json.dumps([{"image": "5", "question": q["text"], "response": q["label"]} for q in asked])),
        ("c.jsonl", "\ufeff" + "\n".join(json.dumps({**q, "text": q["label"], "prompt": q["text"]}) for q in asked)),
        ("d.jsonl", "\n".join(json.dumps({**q, "answer": q["label"] + "</s>"}) for q in asked)),  # text is the question
    ):
        (tmp_path / name).write_text(content, "utf-8")
        accuracy = score_pope(tmp_path / name, [questions])["metrics"][name[0]]["random"]["accuracy"]["value"]
        assert accuracy == 100.0, name
    (tmp_path / "e.jsonl").write_text("\n".join(json.dumps({"said": q["label"], "answer": "x"}) for q in asked))
    assert (
        score_pope(tmp_path / "e.jsonl", [questions], answer_key="said")["metrics"]["e"]["random"]["f1"]["value"] == 100
    )
