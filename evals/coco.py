# SPDX-License-Identifier: Apache-2.0
"""Image datasets with COCO annotations: the one data type that every evaluation reads.

A dataset is COCO's own dictionaries plus a function that gives the picture of an image id, so a folder of
photos and a renderer that draws scenes on demand look the same to CHAIR, POPE and the runner.
"""

from __future__ import annotations

import numbers
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from vlm_attn.evals.reading import image_number, read_json

# Order of preference when a folder holds several: (instances file, captions file, image folders).
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "val2014": ("instances_val2014.json", "captions_val2014.json", ("val2014", "images", ".")),
    "val2017": ("instances_val2017.json", "captions_val2017.json", ("val2017", "images", ".")),
    "train2014": ("instances_train2014.json", "captions_train2014.json", ("train2014", "images", ".")),
    "train2017": ("instances_train2017.json", "captions_train2017.json", ("train2017", "images", ".")),
    "": ("instances.json", "captions.json", ("images", ".")),
}


def open_image(path: str | Path) -> Image.Image:
    """Open an image as RGB, upright, read to its last byte.

    An image that a camera marks as turned is turned (EXIF). 16-bit grey is scaled to 8 bits. Of an image with transparent
    parts the colours below are taken, as transformers does, with a warning.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is not an image, is cut off, or has pixels whose range is not known (32-bit, float).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with Image.open(path) as image:
            if is_transparent(image):
                warnings.warn(
                    f"{path}: has transparent parts; the model is shown the colours below them. Flatten the image where "
                    "that is not what a viewer shows",
                    stacklevel=2,
                )
            return as_rgb(image)
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture (no image format that Pillow knows)") from error
    except UnknownRange as error:
        raise ValueError(f"{path}: {error}") from error
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


class UnknownRange(ValueError):
    """Pixels that are not of 8 or 16 bits, so that nobody knows which value is white."""


def as_rgb(image: Image.Image) -> Image.Image:
    """An opened image as 8-bit RGB, upright by its EXIF mark; 16-bit grey is scaled by its whole range.

    Raises:
        UnknownRange: 32-bit or float pixels.
    """
    upright = ImageOps.exif_transpose(image)
    wide = upright.mode.startswith("I;16") or (upright.mode == "I" and image.format == "PNG")
    if wide:  # PNG has no more than 16 bits; older versions of Pillow open it as "I"
        grey = np.asarray(upright).astype(np.float32) / 65535 * 255
        return Image.fromarray(np.rint(grey).astype(np.uint8)).convert("RGB")
    if upright.mode in ("I", "F"):
        kind = {"I": "32-bit", "F": "float"}[upright.mode]
        raise UnknownRange(f"has {kind} pixels, of which nobody knows which is white: save it with 8 bits per colour")
    return upright.convert("RGB")


def is_transparent(image: Image.Image) -> bool:
    """Whether any part of an opened image is transparent."""
    if not image.has_transparency_data:
        return False
    return np.asarray(image.convert("RGBA").getchannel("A")).min() < 255


# What is read of COCO's records: list -> key -> type. Ids of images are numbers, also where they are written as text.
INSTANCES: dict[str, dict[str, Any]] = {
    "images": {"id": int},
    "annotations": {"image_id": int, "category_id": object},
    "categories": {"id": object, "name": str},
}
CAPTIONS: dict[str, dict[str, Any]] = {"annotations": {"image_id": int, "caption": str}}
_KINDS = {int: "a number", str: "a text"}


def checked(where: str, content: Any, expected: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """COCO's dictionary, with its image ids as numbers.

    Args:
        where: what errors call it.
        content: what was read.
        expected: `INSTANCES` or `CAPTIONS`.

    Raises:
        ValueError: naming the record and what it lacks.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{where}: not COCO's format: expected an object, got {type(content).__name__}")
    content = dict(content)
    for part, keys in expected.items():
        if not isinstance(content.get(part), list):
            raise ValueError(f"{where}: not COCO's format: no list {part!r}")
        renumbered = False
        for number, record in enumerate(content[part], start=1):
            if not isinstance(record, dict):
                raise ValueError(f"{where}: {part}, record {number}: expected an object, got {type(record).__name__}")
            for key, kind in keys.items():
                value = record.get(key)
                if type(value) is kind or (kind is object and isinstance(value, (numbers.Integral, str))):
                    continue
                written = isinstance(value, float) or str(value).strip().isdecimal()
                if kind is int and written and image_number(value) is not None:
                    renumbered = True
                    continue
                got = repr(value)[:60] if key in record else f"none, of {', '.join(map(repr, list(record)[:8]))}"
                kinds = _KINDS.get(kind, "a number")
                raise ValueError(f"{where}: {part}, record {number}: needs {key!r} ({kinds}), got {got}")
            if not isinstance(record.get("file_name") or "", str):
                raise ValueError(f"{where}: {part}, record {number}: 'file_name' is not a text")
        if renumbered:
            ids = [key for key, kind in keys.items() if kind is int]
            content[part] = [{**record, **{key: image_number(record[key]) for key in ids}} for record in content[part]]
    return content


@dataclass
class CocoDataset:
    """Images with the objects that are in them and, optionally, reference captions.

    Args:
        name: what reports call it, for example ``"scenes:validation"``.
        instances: a COCO instances dictionary (``images``, ``annotations``, ``categories``).
        captions: a COCO captions dictionary (``annotations`` with ``image_id`` and ``caption``), or None.
        load_image: the picture of an image id.
        files: what errors call the two dictionaries; default: by the dataset's name.

    Image ids that are written as text become numbers.

    Raises:
        ValueError: a list or a key of a record is missing or has the wrong type, or an annotation points to no category.
    """

    name: str
    instances: dict[str, Any]
    captions: dict[str, Any] | None
    load_image: Callable[[int], Image.Image] = field(repr=False)
    files: tuple[str, str] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        first, second = self.files or (f"{self.name}: the instances", f"{self.name}: the captions")
        self.instances = checked(first, self.instances, INSTANCES)
        if not self.instances["categories"]:
            raise ValueError(f"{first}: names no categories")
        if self.captions is not None:
            self.captions = checked(second, self.captions, CAPTIONS)

    @property
    def image_ids(self) -> list[int]:
        """Ids of all images, in the order of the instances file."""
        return list(self._objects)

    @property
    def categories(self) -> list[str]:
        """Names of all categories, in the order of the instances file."""
        return [category["name"] for category in self.instances["categories"]]

    @cached_property
    def _objects(self) -> dict[int, list[str]]:
        names = {category["id"]: category["name"] for category in self.instances["categories"]}
        objects: dict[int, dict[str, None]] = {image["id"]: {} for image in self.instances["images"]}
        for annotation in self.instances["annotations"]:
            if annotation["category_id"] not in names:
                where = (self.files or (self.name,))[0]
                raise ValueError(f"{where}: an annotation has unknown category {annotation['category_id']}")
            if annotation["image_id"] in objects:
                objects[annotation["image_id"]][names[annotation["category_id"]]] = None
        return {image_id: list(found) for image_id, found in objects.items()}

    @cached_property
    def _boxes(self) -> dict[int, list[tuple[str, tuple[float, float, float, float]]]]:
        names = {category["id"]: category["name"] for category in self.instances["categories"]}
        boxes: dict[int, list[tuple[str, tuple[float, float, float, float]]]] = {}
        for annotation in self.instances["annotations"]:
            if len(annotation.get("bbox") or ()) == 4:
                boxes.setdefault(annotation["image_id"], []).append(
                    (names[annotation["category_id"]], tuple(annotation["bbox"]))
                )
        return boxes

    @cached_property
    def _captions(self) -> dict[int, list[str]]:
        captions: dict[int, list[str]] = {}
        for annotation in (self.captions or {"annotations": []})["annotations"]:
            captions.setdefault(annotation["image_id"], []).append(annotation["caption"])
        return captions

    def subset(self, image_ids: Sequence[int]) -> CocoDataset:
        """The dataset with only these images, in this order.

        Raises:
            ValueError: one of them is not in the dataset.
        """
        known = {image["id"]: image for image in self.instances["images"]}
        missing = [image_id for image_id in image_ids if image_id not in known]
        if missing:
            raise ValueError(f"{self.name} has no image {missing[0]}")
        wanted = set(image_ids)

        def kept(part: dict[str, Any]) -> list[Any]:
            return [note for note in part["annotations"] if note["image_id"] in wanted]

        instances = {
            **self.instances,
            "images": [known[image_id] for image_id in image_ids],
            "annotations": kept(self.instances),
        }
        captions = self.captions and {**self.captions, "annotations": kept(self.captions)}
        return replace(self, instances=instances, captions=captions)

    def objects(self, image_id: int) -> list[str]:
        """Category names in the image, in annotation order, each once, crowds included.

        Raises:
            KeyError: the dataset has no such image.
        """
        if image_id not in self._objects:
            raise KeyError(f"{self.name} has no image {image_id}")
        return list(self._objects[image_id])

    def boxes(self, image_id: int) -> list[tuple[str, tuple[float, float, float, float]]]:
        """(category, (x, y, width, height) in pixels of the picture) of every annotation that has a box."""
        return list(self._boxes.get(image_id, []))

    def reference_captions(self, image_id: int) -> list[str]:
        """Human captions of the image; an empty list where there are none."""
        return list(self._captions.get(image_id, []))

    @cached_property
    def image_names(self) -> dict[str, int]:
        """Image id by file name, of the images whose name is known."""
        named = ((image.get("file_name"), image["id"]) for image in self.instances["images"])
        return {name.replace("\\", "/").rpartition("/")[2]: image for name, image in named if name}

    def described(self, image_ids: Sequence[int]) -> int:
        """How many of the images have reference captions."""
        return sum(image in self._captions for image in image_ids)

    @property
    def annotated(self) -> bool:
        """Whether any image has an object."""
        return any(self._objects.values())

    @classmethod
    def from_folder(cls, path: str | Path, split: str | None = None) -> CocoDataset:
        """Read a folder with COCO's own names or the short ones.

        COCO's: ``annotations/instances_val2014.json``, ``annotations/captions_val2014.json`` and pictures in
        ``val2014/`` or ``images/`` (also 2017, and train); short: ``annotations/instances.json``,
        ``annotations/captions.json``, ``images/``. Captions are optional; pictures are opened when asked for.

        Args:
            path: the folder.
            split: ``"val2014"`` and so on; default: the first of val2014, val2017, train2014, train2017 and
                the short names that is there.

        Raises:
            FileNotFoundError: no such folder, or no annotations in it (says which files were looked for).
            ValueError: unreadable or malformed JSON, naming the file.
        """
        key, instances_file = find_annotations(path, split)
        folder, (_, captions_name, image_folders) = Path(path), LAYOUTS[key]
        instances = read_json(instances_file)
        captions_file = folder / "annotations" / captions_name
        captions = read_json(captions_file) if captions_file.is_file() else None
        instances = checked(str(instances_file), instances, INSTANCES)
        return cls(
            name=f"{folder.name}:{key}" if key else folder.name,
            instances=instances,
            captions=captions,
            load_image=FolderImages(folder, image_folders, instances, str(instances_file)),
            files=(str(instances_file), str(captions_file)),
        )

    @classmethod
    def of_pictures(cls, path: str | Path, names: Mapping[int, str], split: str | None = None) -> CocoDataset:
        """A folder of pictures about which nothing is annotated, for questions that bring their answers.

        Args:
            path: the folder; the pictures lie in it, in ``images/``, or as in COCO in ``val2014/``, ``train2014/`` and so on.
            names: image id -> file name.
            split: only this one of COCO's folders.

        Raises:
            FileNotFoundError: no such folder.
            ValueError: an unknown split, or a name that leads out of the folder.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        if split is not None and split not in LAYOUTS:
            raise ValueError(f"split {split!r}: expected one of {', '.join(filter(None, LAYOUTS))}")
        parts = [name for key in LAYOUTS for name in LAYOUTS[key][2] if split in (None, key)]
        folders = tuple(dict.fromkeys(sorted(parts, key=("images", ".").__contains__)))
        images = [{"id": image, "file_name": name} for image, name in names.items()]
        instances = {"images": images, "annotations": [], "categories": [{"id": 0, "name": "unknown"}]}
        return cls(folder.name, instances, None, FolderImages(folder, folders, instances, "the questions"))


def find_annotations(path: str | Path, split: str | None = None) -> tuple[str, Path]:
    """Which of `LAYOUTS` a folder has, and its instances file; nothing is read.

    Raises:
        FileNotFoundError, ValueError: see `CocoDataset.from_folder`.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder (it needs annotations/instances*.json)")
    if split is not None and split not in LAYOUTS:
        raise ValueError(f"split {split!r}: expected one of {', '.join(filter(None, LAYOUTS))}")
    keys = list(LAYOUTS) if split is None else [split]
    for key in keys:
        file = folder / "annotations" / LAYOUTS[key][0]
        if file.is_file():
            return key, file
    raise FileNotFoundError(
        f"{folder}: no COCO annotations in {folder / 'annotations'} (looked for "
        f"{', '.join(LAYOUTS[key][0] for key in keys)}). Unpack COCO's annotations_trainval2014.zip there, or name your "
        "file instances.json"
    )


def is_annotated(path: str | Path, split: str | None = None) -> bool:
    """Whether a folder holds COCO's annotations (of a split)."""
    names = [LAYOUTS[key][0] for key in LAYOUTS if split in (None, key)]
    return any((Path(path) / "annotations" / name).is_file() for name in names)


class FolderImages:
    """Opens the picture of an image id from the first folder that holds it."""

    def __init__(self, root: Path, folders: Sequence[str], instances: dict[str, Any], source: str = "") -> None:
        self.root, self.folders = root, folders
        self.names = {
            image["id"]: image.get("file_name") or f"{image['id']:012d}.jpg" for image in instances.get("images") or []
        }
        inside = os.path.abspath(root)
        for image, name in self.names.items():
            # By name alone: a link that lies in the folder is its owner's, a name in an annotation is anybody's.
            if not (os.path.isabs(name) or ".." in name or "\0" in name):
                continue
            lead = (os.path.abspath(os.path.join(root, folder, name)) for folder in folders)
            if "\0" in name or any(os.path.commonpath([inside, path]) != inside for path in lead):
                raise ValueError(
                    f"{source or root}: image {image} is named {name[:80]!r}, which leads out of the data folder {root}"
                )

    def __call__(self, image_id: int) -> Image.Image:
        """The picture, as RGB.

        Raises:
            KeyError: no image of that id is annotated.
            FileNotFoundError, ValueError: see `open_image`.
        """
        if image_id not in self.names:
            raise KeyError(f"{self.root} has no image {image_id}")
        name = self.names[image_id]
        candidates = [Path(os.path.normpath(self.root / folder / name)) for folder in self.folders]
        for file in candidates:
            if file.is_file():
                return open_image(file)
        raise FileNotFoundError(
            f"{name} (image {image_id}): not in "
            + ", ".join(dict.fromkeys(str(file.parent) for file in candidates))
            + "; put the pictures into one of these"
        )
