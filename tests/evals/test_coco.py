# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from vlm_attn.evals.coco import CocoDataset, open_image
from vlm_attn.evals.reading import read_jsonl

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


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("instances", lambda c: c["annotations"][2].pop("category_id"), "annotations, record 3: needs 'category_id'"),
        ("instances", lambda c: c["annotations"][1].pop("image_id"), "record 2: needs 'image_id' (a number), got none"),
        ("instances", lambda c: c["annotations"][1].update(image_id="x"), "record 2: needs 'image_id' (a number), got 'x'"),
        ("instances", lambda c: c["annotations"][1].update(image_id=None), "record 2: needs 'image_id' (a number), got None"),
        ("instances", lambda c: c["images"][0].pop("id"), "images, record 1: needs 'id'"),
        ("instances", lambda c: c["images"][0].update(file_name=7), "images, record 1: 'file_name' is not a text"),
        ("instances", lambda c: c["categories"][4].pop("name"), "categories, record 5: needs 'name' (a text)"),
        ("instances", lambda c: c["categories"][4].update(id=[1]), "categories, record 5: needs 'id'"),
        ("instances", lambda c: c["annotations"].insert(0, 5), "annotations, record 1: expected an object, got int"),
        ("instances", lambda c: c["annotations"][0].update(category_id=99), "an annotation has unknown category 99"),
        ("captions", lambda c: c["annotations"][0].pop("caption"), "record 1: needs 'caption' (a text), got none"),
        ("captions", lambda c: c["annotations"][0].update(caption=None), "record 1: needs 'caption' (a text), got None"),
        ("captions", lambda c: c.update(annotations={}), "no list 'annotations'"),
    ],
)  # fmt: skip
def test_records_without_what_they_need_name_file_and_record(
    tmp_path: Path, name: str, change: Callable[[Any], Any], message: str
) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS, {7: ["a dog"]}, suffix="_val2014")
    file = folder / "annotations" / f"{name}_val2014.json"
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        CocoDataset.from_folder(folder).objects(7)
    assert f"{name}_val2014.json" in str(error.value)


def test_annotations_nested_too_deeply(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS)
    (folder / "annotations" / "instances.json").write_text('{"images": ' + "[" * 200_000)
    with pytest.raises(ValueError, match="instances.json: nested too deeply"):
        CocoDataset.from_folder(folder)


@pytest.mark.parametrize("name", ["../secret.png", "a/../../secret.png", "SECRET", "..", "x\0.png"])
def test_annotations_and_questions_name_nothing_outside_the_data(tmp_path: Path, name: str) -> None:
    folder = write_folder(tmp_path / "data", OBJECTS)
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    name = name.replace("SECRET", str(tmp_path / "secret.png"))
    file = folder / "annotations" / "instances.json"
    content = json.loads(file.read_text())
    content["images"][0]["file_name"] = name
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"instances\.json: image 11 .* leads out of the data folder"):
        CocoDataset.from_folder(folder)
    with pytest.raises(ValueError, match="leads out of the data folder"):
        CocoDataset.of_pictures(folder, {11: name})
    # Inside it any way of writing is as good as another.
    inside = folder / "images" / f"{11:012d}.png"
    for good in (str(inside.absolute()), f"x/../{inside.name}"):
        content["images"][0]["file_name"] = good
        file.write_text(json.dumps(content))
        assert CocoDataset.from_folder(folder).load_image(11).size == (40, 30)


def test_cocos_folders_work_without_annotations(tmp_path: Path) -> None:
    for place, part in enumerate(("val2014", "train2017", "images", ".")):
        (tmp_path / part).mkdir(exist_ok=True)
        Image.new("RGB", (10 + place, 8)).save(tmp_path / part / f"COCO_{place:012d}.jpg")
    names = {place: f"COCO_{place:012d}.jpg" for place in range(4)}
    dataset = CocoDataset.of_pictures(tmp_path, names)
    assert [dataset.load_image(image).width for image in range(4)] == [10, 11, 12, 13]
    part = CocoDataset.of_pictures(tmp_path, names, "val2014")
    assert part.load_image(0).width == 10
    with pytest.raises(FileNotFoundError, match="not in .*val2014"):
        part.load_image(1)
    with pytest.raises(ValueError, match="val2014, val2017"):
        CocoDataset.of_pictures(tmp_path, names, "val2015")


def test_photos_that_a_camera_marks_as_turned_stand_upright(tmp_path: Path) -> None:
    photo = open_image(next(iter(sorted((shared_file("coco_photos") / "images").iterdir())))).resize((64, 48))
    from transformers.image_utils import load_image

    for turn in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = turn
        photo.save(tmp_path / "turned.jpg", exif=exif, quality=95)
        upright = open_image(tmp_path / "turned.jpg")
        assert upright.size == ((64, 48) if turn < 5 else (48, 64))
        # transformers' own loader shows a model the same.
        assert np.array_equal(np.asarray(upright), np.asarray(load_image(str(tmp_path / "turned.jpg"))))


def test_grey_of_16_bits_is_scaled_and_unknown_ranges_are_refused(tmp_path: Path) -> None:
    ramp = np.linspace(0, 65535, 256).round().astype(np.uint16).reshape(16, 16)
    expected = np.repeat(np.arange(256, dtype=np.uint8).reshape(16, 16, 1), 3, axis=2)
    for name in ("grey.png", "grey.tif"):
        Image.fromarray(ramp).save(tmp_path / name)
        assert np.array_equal(np.asarray(open_image(tmp_path / name)), expected), name
    for kind, dtype in (("float", np.float32), ("32-bit", np.int32)):
        Image.fromarray((ramp / 65535).astype(dtype)).save(tmp_path / "wide.tif")
        with pytest.raises(ValueError, match=rf"wide\.tif: has {kind} pixels.*save it with 8 bits"):
            open_image(tmp_path / "wide.tif")


def test_transparent_parts_are_said(tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    colours = Image.new("RGBA", (8, 8), (200, 30, 30, 255))
    colours.save(tmp_path / "solid.png")
    assert open_image(tmp_path / "solid.png").getpixel((0, 0)) == (200, 30, 30)
    assert not recwarn.list
    colours.putpixel((3, 3), (10, 20, 30, 0))
    colours.save(tmp_path / "hole.png")
    palette = Image.new("P", (8, 8))
    palette.info["transparency"] = 0
    palette.save(tmp_path / "hole.gif", transparency=0)
    for name in ("hole.png", "hole.gif"):
        with pytest.warns(UserWarning, match=f"{name}: has transparent parts"):
            open_image(tmp_path / name)
    with pytest.warns(UserWarning, match="hole"):
        assert open_image(tmp_path / "hole.png").getpixel((3, 3)) == (10, 20, 30)
