"""Image datasets with COCO annotations: the one data type that every evaluation reads.

A dataset is COCO's own dictionaries plus a function that gives the picture of an image id, so a folder of
photos and a renderer that draws scenes on demand look the same to CHAIR, POPE and the runner.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image, UnidentifiedImageError

# Order of preference when a folder holds several: (instances file, captions file, image folders).
LAYOUTS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "val2014": ("instances_val2014.json", "captions_val2014.json", ("val2014", "images", ".")),
    "val2017": ("instances_val2017.json", "captions_val2017.json", ("val2017", "images", ".")),
    "train2014": ("instances_train2014.json", "captions_train2014.json", ("train2014", "images", ".")),
    "train2017": ("instances_train2017.json", "captions_train2017.json", ("train2017", "images", ".")),
    "": ("instances.json", "captions.json", ("images", ".")),
}


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError, ValueError: naming the file (missing, not UTF-8, or not JSON: with the line).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not valid JSON (line {error.lineno}, column {error.colno}: {error.msg})") from error


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read records from JSON lines, or from a file that holds one JSON array of records.

    Raises:
        FileNotFoundError, ValueError: naming the file and the line.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not a UTF-8 text file (byte {error.start})") from error
    if text.lstrip().startswith("["):
        records = list(enumerate(read_json(path), start=1))
    else:
        records = []
        for number, line in enumerate(text.split("\n"), start=1):
            if not line.strip():
                continue
            try:
                records.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number}: not valid JSON ({error.msg})") from error
    for number, record in records:
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: expected an object, got {type(record).__name__}")
    return [record for _, record in records]


def open_image(path: str | Path) -> Image.Image:
    """Open a picture as RGB, read to its last byte.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is no picture, or is cut off.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such image")
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except UnidentifiedImageError as error:
        raise ValueError(f"{path}: not a picture (no image format that Pillow knows)") from error
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"{path}: cannot be read as an image ({error})") from error


@dataclass
class CocoDataset:
    """Images with the objects that are in them and, optionally, reference captions.

    Args:
        name: what reports call it, for example ``"scenes:validation"``.
        instances: a COCO instances dictionary (``images``, ``annotations``, ``categories``).
        captions: a COCO captions dictionary (``annotations`` with ``image_id`` and ``caption``), or None.
        load_image: the picture of an image id.

    Raises:
        ValueError: a list is missing from ``instances``, or an annotation points to no category.
    """

    name: str
    instances: dict[str, Any]
    captions: dict[str, Any] | None
    load_image: Callable[[int], Image.Image] = field(repr=False)

    def __post_init__(self) -> None:
        for key in ("images", "annotations", "categories"):
            if not isinstance(self.instances.get(key), list):
                raise ValueError(f"{self.name}: the instances file has no list {key!r}")
        if not self.instances["categories"]:
            raise ValueError(f"{self.name}: the instances file names no categories")
        if self.captions is not None and not isinstance(self.captions.get("annotations"), list):
            raise ValueError(f"{self.name}: the captions file has no list 'annotations'")

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
                raise ValueError(f"{self.name}: an annotation has unknown category {annotation['category_id']}")
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
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder (it needs annotations/instances*.json)")
        splits = list(LAYOUTS) if split is None else [split]
        if split is not None and split not in LAYOUTS:
            raise ValueError(f"split {split!r}: expected one of {', '.join(filter(None, LAYOUTS))}")
        for key in splits:
            instances_name, captions_name, image_folders = LAYOUTS[key]
            instances_file = folder / "annotations" / instances_name
            if instances_file.is_file():
                break
        else:
            looked_for = ", ".join(LAYOUTS[key][0] for key in splits)
            raise FileNotFoundError(
                f"{folder}: no COCO annotations in {folder / 'annotations'} (looked for {looked_for}). "
                "Unpack COCO's annotations_trainval2014.zip there, or name your file instances.json"
            )
        instances = read_json(instances_file)
        captions_file = folder / "annotations" / captions_name
        captions = read_json(captions_file) if captions_file.is_file() else None
        for file, content in ((instances_file, instances), (captions_file, captions)):
            if content is not None and not isinstance(content, dict):
                raise ValueError(f"{file}: not COCO's format: expected an object, got {type(content).__name__}")
        try:
            return cls(
                name=f"{folder.name}:{key}" if key else folder.name,
                instances=instances,
                captions=captions,
                load_image=FolderImages(folder, image_folders, instances),
            )
        except ValueError as error:
            raise ValueError(f"{instances_file}: {error}") from error

    @classmethod
    def of_pictures(cls, path: str | Path, names: Mapping[int, str]) -> CocoDataset:
        """A folder of pictures about which nothing is annotated, for questions that bring their answers.

        Args:
            path: the folder; the pictures lie in it, or in ``images/``.
            names: image id -> file name.

        Raises:
            FileNotFoundError: no such folder.
        """
        folder = Path(path)
        if not folder.is_dir():
            raise FileNotFoundError(f"{folder}: no such folder")
        images = [{"id": image, "file_name": name} for image, name in names.items()]
        instances = {"images": images, "annotations": [], "categories": [{"id": 0, "name": "unknown"}]}
        return cls(folder.name, instances, None, FolderImages(folder, ("images", "."), instances))


class FolderImages:
    """Opens the picture of an image id from the first folder that holds it."""

    def __init__(self, root: Path, folders: Sequence[str], instances: dict[str, Any]) -> None:
        self.root, self.folders = root, folders
        self.names = {
            image["id"]: image.get("file_name") or f"{image['id']:012d}.jpg" for image in instances.get("images") or []
        }

    def __call__(self, image_id: int) -> Image.Image:
        """The picture, as RGB.

        Raises:
            KeyError: no image of that id is annotated.
            FileNotFoundError, ValueError: see `open_image`.
        """
        if image_id not in self.names:
            raise KeyError(f"{self.root} has no image {image_id}")
        candidates = [self.root / folder / self.names[image_id] for folder in self.folders]
        for file in candidates:
            if file.is_file():
                return open_image(file)
        raise FileNotFoundError(
            f"{self.names[image_id]} (image {image_id}): not in "
            + ", ".join(str(file.parent) for file in candidates)
            + "; put the pictures into one of these"
        )
