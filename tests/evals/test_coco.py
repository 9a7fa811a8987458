from __future__ import annotations

import json
from pathlib import Path

import pytest

from vlm_attn.evals.coco import CocoDataset, open_image, read_jsonl

from .conftest import OBJECTS, instances_of, shared_file, write_folder


def test_objects_in_annotation_order_each_once() -> None:
    instances = instances_of({4: ["dog", "person", "dog", "car"], 1: []})
    instances["annotations"][1]["iscrowd"] = 1
    instances["annotations"].append({"image_id": 99, "category_id": 1})  # of an image that is not listed
    dataset = CocoDataset("made", instances, None, lambda image: None)
    assert dataset.image_ids == [4, 1]
    assert dataset.objects(4) == ["dog", "person", "car"]
    assert dataset.objects(1) == []
    assert dataset.reference_captions(4) == []
    with pytest.raises(KeyError, match="99"):
        dataset.objects(99)


@pytest.mark.parametrize(
    ("suffix", "images", "name"),
    [
        ("_val2014", "val2014", "data:val2014"),
        ("_val2014", "images", "data:val2014"),
        ("_val2017", "val2017", "data:val2017"),
        ("", "images", "data"),
    ],
)
def test_folder_layouts(tmp_path: Path, suffix: str, images: str, name: str) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS, {7: ["two", "lines"]}, suffix, images)
    dataset = CocoDataset.from_folder(folder)
    assert dataset.name == name
    assert dataset.image_ids == list(OBJECTS)
    assert dataset.objects(7) == OBJECTS[7]
    assert dataset.reference_captions(7) == ["two", "lines"]
    assert dataset.load_image(7).size == (40, 30)
    assert dataset.load_image(7).mode == "RGB"


def test_folder_prefers_and_selects_a_split(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS, suffix="_val2017")
    (folder / "annotations" / "instances_val2014.json").write_text(json.dumps(instances_of({1: ["cat"]})))
    assert CocoDataset.from_folder(folder).image_ids == [1]
    assert CocoDataset.from_folder(folder, "val2017").image_ids == list(OBJECTS)
    assert CocoDataset.from_folder(folder, "val2017").captions is None
    with pytest.raises(FileNotFoundError, match="instances_train2014.json"):
        CocoDataset.from_folder(folder, "train2014")
    with pytest.raises(ValueError, match="val2014, val2017"):
        CocoDataset.from_folder(folder, "val2015")


def test_real_photos_load() -> None:
    dataset = CocoDataset.from_folder(shared_file("coco_photos"))
    assert len(dataset.image_ids) == 128
    first = dataset.image_ids[0]
    assert dataset.objects(first) == ["person", "skis"]
    assert len(dataset.reference_captions(first)) == 5
    assert min(dataset.load_image(first).size) > 200


def test_folder_errors_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        CocoDataset.from_folder(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"instances_val2014\.json.*instances\.json"):
        CocoDataset.from_folder(tmp_path)
    folder = write_folder(tmp_path / "data", OBJECTS)
    file = folder / "annotations" / "instances.json"
    good = json.loads(file.read_text())
    for text, message in (
        (json.dumps(good)[:300], r"instances\.json: not valid JSON"),
        ("[1, 2]", r"instances\.json: not COCO's format"),
        (json.dumps({"images": []}), r"instances\.json: .*no list 'annotations'"),
        (json.dumps({**good, "categories": []}), r"instances\.json: .*no categories"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=message):
            CocoDataset.from_folder(folder)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"instances\.json: not a UTF-8"):
        CocoDataset.from_folder(folder)


def test_pictures_that_cannot_be_read(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS)
    dataset = CocoDataset.from_folder(folder)
    file = folder / "images" / f"{7:012d}.png"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="000000000007.png: cannot be read"):
        dataset.load_image(7)
    file.write_text("no picture")
    with pytest.raises(ValueError, match="000000000007.png: not a picture"):
        dataset.load_image(7)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"000000000007.png .*images"):
        dataset.load_image(7)
    with pytest.raises(FileNotFoundError, match="no such image"):
        open_image(file)


def test_jsonl_takes_lines_or_an_array_and_names_the_line(tmp_path: Path) -> None:
    file = tmp_path / "records.jsonl"
    # A line separator inside a string is no end of line in JSON.
    records = [{"a": 1}, {"a": "x\u2028y"}]
    file.write_text("\n".join(json.dumps(record, ensure_ascii=False) for record in records) + "\n\n")
    assert read_jsonl(file) == records
    file.write_text(json.dumps(records))
    assert read_jsonl(file) == records
    file.write_text('{"a": 1}\n{"a": \n')
    with pytest.raises(ValueError, match="line 2: not valid JSON"):
        read_jsonl(file)
    file.write_text('{"a": 1}\n7\n')
    with pytest.raises(ValueError, match="expected an object, got int"):
        read_jsonl(file)
