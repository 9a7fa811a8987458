# SPDX-License-Identifier: Apache-2.0
"""COCO on disk: what to download, and whether what is there is whole."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_attn.evals.coco import LAYOUTS, read_json

SERVER = "http://images.cocodataset.org"


@dataclass(frozen=True)
class Archive:
    """A file of the COCO download page.

    Attributes:
        name: of the file.
        address: where it is.
        size: bytes.
        md5: of its content.
    """

    name: str
    address: str
    size: int
    md5: str


#: Sizes as the server gives them, MD5 as dataset loaders that check them carry them.
ARCHIVES = {
    name: Archive(f"{name}.zip", f"{SERVER}/{folder}/{name}.zip", size, md5)
    for name, folder, size, md5 in (
        ("annotations_trainval2014", "annotations", 252_872_794, "0a379cfc70b0e71301e0f377548639bd"),
        ("annotations_trainval2017", "annotations", 252_907_541, "f4bbac642086de4f52a3fdda2de5fa2c"),
        ("val2014", "zips", 6_645_013_297, "a3d79f5ed8d289b7a7554ce06a5782b3"),
        ("val2017", "zips", 815_585_330, "442b8da7639aecaf257c1dceb8ba8c80"),
        ("train2014", "zips", 13_510_573_713, "0da8c0bd3d6becc4dcb32757491aca88"),
        ("train2017", "zips", 19_336_861_798, "cced6f7f71b7629ddf16f17bbcfab6b2"),
    )
}
#: Of every split: images, outlined objects, reference captions.
COUNTS = {
    "val2014": (40_504, 291_875, 202_654),
    "val2017": (5_000, 36_781, 25_014),
    "train2014": (82_783, 604_907, 414_113),
    "train2017": (118_287, 860_001, 591_753),
}


@dataclass(frozen=True)
class Finding:
    """What was found of one thing.

    Attributes:
        what: its path inside the folder.
        state: ``"ok"``, ``"missing"``, ``"wrong"`` or ``"absent"`` (not there, and not needed).
        detail: a sentence.
    """

    what: str
    state: str
    detail: str


def archives(split: str) -> list[Archive]:
    """What to download for a split: its annotations and its images.

    Raises:
        ValueError: no split of COCO.
    """
    if split not in COUNTS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(COUNTS)}")
    return [ARCHIVES[f"annotations_trainval{split[-4:]}"], ARCHIVES[split]]


def commands(split: str, folder: str | Path) -> list[str]:
    """Shell lines that download a split into a folder, go on with a download that broke off, and unpack it.

    Raises:
        ValueError: no split of COCO.
    """
    import shlex

    where = shlex.quote(str(folder))
    lines = [f"mkdir -p {where}"]
    for archive in archives(split):
        file = shlex.quote(str(Path(folder) / archive.name))
        lines += [f"curl -fL -C - -o {file} {archive.address}", f"unzip -qn {file} -d {where}"]
    return lines


def check(folder: str | Path, split: str) -> list[Finding]:
    """Look at a COCO folder: the archives by size and MD5, the annotations by their counts, the images by name.

    An image counts as there when a file of its name that is not empty is in one of the folders that `CocoDataset` looks into;
    images are not opened.

    Args:
        folder: the folder; it need not exist.
        split: ``"val2014"``, ``"val2017"``, ``"train2014"`` or ``"train2017"``.

    Raises:
        ValueError: no split of COCO.
    """
    root = Path(folder)
    images, objects, captions = COUNTS.get(split, (0, 0, 0))
    instances_name, captions_name, places = LAYOUTS.get(split, ("", "", ()))
    found = [_archive(root, archive) for archive in archives(split)]
    instances, finding = _annotations(
        root, instances_name, {"images": images, "annotations": objects, "categories": 80}
    )
    found.append(finding)
    _, finding = _annotations(root, captions_name, {"annotations": captions})
    found.append(finding)
    found.append(_images(root, places, instances, images))
    return found


def complete(found: list[Finding]) -> bool:
    """Whether all that an evaluation reads is there and whole."""
    return all(finding.state in ("ok", "absent") for finding in found)


def _archive(root: Path, archive: Archive) -> Finding:
    file = root / archive.name
    if not file.is_file():
        return Finding(archive.name, "absent", "not here (not needed once it is unpacked), so its MD5 was not checked")
    size = file.stat().st_size
    if size != archive.size:
        return Finding(
            archive.name,
            "wrong",
            f"{size:,} of {archive.size:,} bytes: the download broke off; run the curl line again",
        )
    with open(file, "rb") as content:
        md5 = hashlib.file_digest(content, "md5").hexdigest()
    if md5 != archive.md5:
        return Finding(archive.name, "wrong", f"MD5 {md5}, expected {archive.md5}: delete it and download it again")
    return Finding(archive.name, "ok", f"{size:,} bytes, MD5 {md5}")


def _annotations(root: Path, name: str, wanted: dict[str, int]) -> tuple[dict[str, Any], Finding]:
    what = f"annotations/{name}"
    try:
        content = read_json(root / what)
    except FileNotFoundError:
        return {}, Finding(what, "missing", "unpack the annotations' archive here")
    except ValueError as error:
        return {}, Finding(what, "wrong", f"{error}; unpack the annotations' archive again")
    lists = content if isinstance(content, dict) else {}
    counts = {key: len(lists[key]) if isinstance(lists.get(key), list) else 0 for key in wanted}
    told = ", ".join(f"{count:,} {key}" for key, count in counts.items())
    if counts != wanted:
        expected = ", ".join(f"{count:,} {key}" for key, count in wanted.items())
        return lists, Finding(what, "wrong", f"{told}; expected {expected}")
    return lists, Finding(what, "ok", told)


def _images(root: Path, places: tuple[str, ...], instances: dict[str, Any], expected: int) -> Finding:
    named = {image.get("file_name", "") for image in instances.get("images") or [] if isinstance(image, dict)}
    there: set[str] = set()
    used: list[str] = []
    for place in places:
        folder = root / place
        if not folder.is_dir():
            continue
        with os.scandir(folder) as entries:
            names = {entry.name for entry in entries if entry.name.endswith(".jpg") and entry.stat().st_size}
        if names:
            used.append(place)
        there |= names
    what = "/".join([*used, ""]) if len(used) == 1 else f"{places[0]}/"
    if not there:
        looked = ", ".join(f"{place}/" for place in places if place != ".")
        return Finding(what, "missing", f"no images (looked in {looked}): unpack the images' archive here")
    absent = sorted(named - there)
    if absent:
        return Finding(
            what, "missing", f"{len(absent):,} of {len(named):,} images are not there or empty, first {absent[0]}"
        )
    if not named and len(there) < expected:
        return Finding(what, "missing", f"{len(there):,} of {expected:,} images")
    return Finding(what, "ok", f"all {len(named or there):,} images, by name; not opened")
