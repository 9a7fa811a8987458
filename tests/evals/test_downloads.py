# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.evals import downloads
from vlm_attn.evals.coco import CocoDataset

from .conftest import SHARED, captions_of, instances_of


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> dict[str, bytes]:
    """A COCO of three images: its archives, as the table expects them."""
    content = {"annotations_trainval2014": b"annotations", "val2014": b"images"}
    for name, data in content.items():
        archive = replace(downloads.ARCHIVES[name], size=len(data), md5=hashlib.md5(data).hexdigest())
        monkeypatch.setitem(downloads.ARCHIVES, name, archive)
    monkeypatch.setitem(downloads.COUNTS, "val2014", (3, 4, 2))
    return content


def unpack(root: Path) -> Path:
    names = tuple(f"thing {number}" for number in range(80))
    instances = instances_of({1: ["thing 1", "thing 2"], 2: ["thing 1"], 3: ["thing 7"]}, names)
    for image in instances["images"]:
        image["file_name"] = f"COCO_val2014_{image['id']:012d}.jpg"
    (root / "annotations").mkdir(parents=True)
    (root / "annotations" / "instances_val2014.json").write_text(json.dumps(instances))
    (root / "annotations" / "captions_val2014.json").write_text(json.dumps(captions_of({1: ["a", "b"]})))
    (root / "val2014").mkdir()
    for image in instances["images"]:
        (root / "val2014" / image["file_name"]).write_bytes(b"\xff\xd8")
    return root


def states(root: Path) -> dict[str, str]:
    return {finding.what: finding.state for finding in downloads.check(root, "val2014")}


def test_whole(small: dict[str, bytes], tmp_path: Path) -> None:
    root = unpack(tmp_path)
    assert set(states(root).values()) == {"ok", "absent"}
    for name, data in small.items():
        (root / f"{name}.zip").write_bytes(data)
    assert set(states(root).values()) == {"ok"}
    assert downloads.complete(downloads.check(root, "val2014"))
    assert CocoDataset.from_folder(root).image_ids == [1, 2, 3]  # the layout that is checked is the one that is read


def test_what_is_wrong_is_named(small: dict[str, bytes], tmp_path: Path) -> None:
    assert set(states(tmp_path / "none").values()) == {"absent", "missing"}
    root = unpack(tmp_path / "coco")
    (root / "val2014.zip").write_bytes(small["val2014"][:3])
    (root / "annotations_trainval2014.zip").write_bytes(b"x" * len(small["annotations_trainval2014"]))
    (root / "val2014" / "COCO_val2014_000000000002.jpg").write_bytes(b"")
    file = root / "annotations" / "captions_val2014.json"
    file.write_text(json.dumps(captions_of({1: ["a"]})))
    found = {finding.what: finding for finding in downloads.check(root, "val2014")}
    assert "3 of 6 bytes: the download broke off" in found["val2014.zip"].detail
    assert "MD5" in found["annotations_trainval2014.zip"].detail
    assert "1 of 3 images are not there or empty, first COCO_val2014_000000000002.jpg" in found["val2014/"].detail
    assert "1 annotations; expected 2" in found["annotations/captions_val2014.json"].detail
    file.write_text("[")
    assert "not valid JSON" in downloads.check(root, "val2014")[3].detail
    assert not downloads.complete(downloads.check(root, "val2014"))


def test_command(small: dict[str, bytes], tmp_path: Path) -> None:
    def call(*arguments: object) -> tuple[int, str]:
        done = CliRunner().invoke(cli.app, ["data", "coco", *map(str, arguments)])
        return done.exit_code, done.output

    code, text = call("--out", tmp_path / "my coco")
    assert code == 1
    for archive in downloads.archives("val2014"):
        for part in (archive.address, archive.md5, f"{archive.size:,} bytes"):
            assert part in text
    assert f"curl -fL -C - -o '{tmp_path}/my coco/val2014.zip' {downloads.SERVER}/zips/val2014.zip" in text
    assert not (tmp_path / "my coco").exists()
    code, text = call("--out", unpack(tmp_path / "coco"))
    assert code == 0
    assert "all 3 images" in text
    assert "curl" not in text
    assert "Next: vlm-attn eval chair --data" in text
    assert call("--out", tmp_path, "--split", "test2014")[0] == 2


def test_counts_are_those_of_the_real_file() -> None:
    file = SHARED / "coco_gt" / "captions_val2017.json"
    if not file.is_file():
        pytest.skip("COCO's reference captions are not on this machine")
    content = json.loads(file.read_text())
    assert (len(content["images"]), len(content["annotations"])) == downloads.COUNTS["val2017"][::2]
