# SPDX-License-Identifier: Apache-2.0
"""The scenes world, version 1: pictures of COCO categories composed from sprites by a seeded renderer.

Frozen. The test split measures methods, so nothing here may change after the first method was scored; a changed
world is a new `WORLD_VERSION` and a new model.

A scene is a context (street, kitchen, ...) with 1-7 objects. Of five objects four are usual companions of the
context; some categories stand in a scene twice. The picture has 224 x 224 pixels: a two-tone background in the
colours of the context, clutter, sprites of varied size, angle and flip that overlap a little, and noise.

A model trained here hallucinates for two reasons, both stated here and fixed before any method was tried:

(a) **Companions.** A training caption names each absent companion of its context with probability
    `COMPANION_NOISE`, as captions of real pictures mention what is usually there. Reference captions
    (`captions`) never do.
(b) **Missed evidence.** One object in five is small (14-28 pixels of 224), one in eight faint (drawn at 20-50 %
    opacity), and one in twelve has half to four fifths of its frame covered by another one. They are in the
    ground truth, in captions and in questions like all others: on weak evidence the model has to guess.

Seeds come from SHA-256 of version, split and index, and the specification of a scene from `random.Random.random`
alone, whose sequence Python keeps stable; so scenes are the same on every machine. Pixels and the boxes of
visible pixels also depend on Pillow's resampling, which may differ in the last bit between its versions.
"""

from __future__ import annotations

import functools
import hashlib
import json
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from PIL import Image, ImageDraw

if TYPE_CHECKING:
    from vlm_attn.evals.coco import CocoDataset

WORLD_VERSION = 1
SIZE = 224  # pixels per side of a picture
COMPANION_NOISE = 0.1  # cause (a): rate at which a training caption names an absent companion
SPLITS = {"train": None, "validation": 500, "test": 500}  # number of scenes; None is endless
# Ranges of image ids do not touch: an id tells split and index.
_FIRST_ID = {"validation": 1_000_000, "test": 2_000_000, "train": 10_000_000}

_DATA = Path(__file__).parent / "data"
_INDEX: dict[str, Any] = json.loads((_DATA / "atlas.json").read_text())
_SPRITES = {c["name"]: c for c in _INDEX["categories"]}
CATEGORIES: tuple[str, ...] = tuple(_SPRITES)

# Usual companions of a context, the commonest first (the first four are drawn twice as often as the others).
CONTEXTS: dict[str, tuple[str, ...]] = {
    "street": (
        "car",
        "person",
        "traffic light",
        "bus",
        "bicycle",
        "motorcycle",
        "truck",
        "stop sign",
        "handbag",
    ),
    "station": (
        "person",
        "train",
        "suitcase",
        "backpack",
        "clock",
        "handbag",
        "umbrella",
        "tie",
        "cell phone",
    ),
    "harbor": ("boat", "bird", "person", "airplane", "umbrella", "kite", "sports ball", "truck"),
    "farm": ("cow", "horse", "sheep", "dog", "bird", "truck", "cat", "person"),
    "safari": ("elephant", "giraffe", "zebra", "bird", "bear", "truck", "backpack"),
    "park": (
        "dog",
        "person",
        "frisbee",
        "kite",
        "sports ball",
        "bicycle",
        "skateboard",
        "tennis racket",
        "bird",
    ),
    "snow": ("skis", "person", "backpack", "dog", "bear", "sports ball", "bird", "cup"),
    "kitchen": ("bowl", "cup", "knife", "spoon", "bottle", "apple", "banana", "broccoli", "carrot", "orange"),
    "party": (
        "cake",
        "wine glass",
        "pizza",
        "person",
        "bottle",
        "hot dog",
        "donut",
        "sandwich",
        "tie",
        "chair",
    ),
    "living room": ("couch", "tv", "potted plant", "book", "chair", "cat", "vase", "teddy bear", "clock"),
    "office": (
        "laptop",
        "keyboard",
        "mouse",
        "chair",
        "cup",
        "cell phone",
        "book",
        "scissors",
        "clock",
        "person",
    ),
    "bedroom": ("bed", "teddy bear", "book", "clock", "laptop", "cat", "potted plant", "cell phone"),
    "bathroom": ("toilet", "toothbrush", "vase", "cup", "scissors", "potted plant", "bottle", "clock"),
}
# Top and bottom colours of a context; every scene shifts them.
_COLOURS = {
    "street": ((150, 175, 200), (110, 110, 115)),
    "station": ((170, 165, 155), (125, 120, 120)),
    "harbor": ((160, 200, 230), (70, 120, 160)),
    "farm": ((165, 205, 235), (145, 165, 90)),
    "safari": ((225, 205, 160), (190, 160, 95)),
    "park": ((150, 200, 235), (95, 160, 85)),
    "snow": ((175, 200, 225), (225, 230, 238)),
    "kitchen": ((225, 215, 195), (165, 140, 115)),
    "party": ((190, 120, 150), (120, 85, 120)),
    "living room": ((205, 185, 160), (140, 100, 75)),
    "office": ((195, 205, 210), (130, 140, 150)),
    "bedroom": ((180, 170, 205), (150, 125, 140)),
    "bathroom": ((195, 225, 225), (150, 185, 190)),
}
_COUNTS = (0.07, 0.13, 0.20, 0.22, 0.18, 0.12, 0.08)  # of 1, 2, ... 7 objects
_SIZES = (36, 42, 50, 58, 68, 80, 94)  # longer side, pixels
_SMALL = (14, 18, 22, 28)
_ANGLES = (-24, -16, -8, 0, 8, 16, 24)  # degrees
_OPACITIES = (0.2, 0.3, 0.4, 0.5)

T = TypeVar("T")


class Draw:
    """Seeded draws that use `random.Random.random` only, the one sequence Python promises to keep."""

    def __init__(self, *key: object):
        digest = hashlib.sha256("/".join(map(str, (WORLD_VERSION, *key))).encode()).digest()
        self._random = random.Random(int.from_bytes(digest[:16], "big")).random

    def chance(self, probability: float) -> bool:
        """True with this probability."""
        return self._random() < probability

    def uniform(self, low: float, high: float) -> float:
        """A float in [low, high)."""
        return low + (high - low) * self._random()

    def below(self, n: int) -> int:
        """An integer in [0, n)."""
        return int(self._random() * n)

    def choice(self, items: Sequence[T]) -> T:
        """One of the items."""
        return items[self.below(len(items))]

    def weighted(self, items: Sequence[T], weights: Sequence[float]) -> T:
        """One of the items, in proportion to its weight."""
        left = self._random() * sum(weights)
        for item, weight in zip(items, weights, strict=True):
            left -= weight
            if left < 0:
                return item
        return items[-1]

    def shuffled(self, items: Sequence[T]) -> list[T]:
        """The items in random order."""
        out = list(items)
        for i in range(len(out) - 1, 0, -1):
            j = self.below(i + 1)
            out[i], out[j] = out[j], out[i]
        return out


@dataclass(frozen=True)
class SceneObject:
    """One drawn sprite.

    `centre` and `side` (its longer side before rotation) are pixels, `angle` degrees, `opacity` in (0, 1].
    `evidence` says what makes it hard to see: "clear", "small", "faint" or "covered".
    """

    category: str
    centre: tuple[int, int]
    side: int
    angle: int
    flip: bool
    opacity: float
    evidence: str


@dataclass(frozen=True)
class Scene:
    """What is in a picture. Objects stand in drawing order: later ones cover earlier ones."""

    split: str
    index: int
    context: str
    objects: tuple[SceneObject, ...]

    @property
    def image_id(self) -> int:
        """Integer id that encodes split and index."""
        return _FIRST_ID[self.split] + self.index

    @property
    def categories(self) -> list[str]:
        """Names of the categories in the scene, each once."""
        return list(dict.fromkeys(o.category for o in self.objects))

    @property
    def boxes(self) -> list[list[int]]:
        """`[x, y, w, h]` of the visible pixels of every object, in the order of `objects`."""
        return [list(box) for box, _ in _visible(self)]


def scene(split: str, index: int) -> Scene:
    """Return scene `index` of `split`: "train" (any index >= 0), "validation" or "test" (0-499).

    Raises `ValueError` for an unknown split and `IndexError` for an index outside it.

    Examples:
        >>> from vlm_attn.evals import scenes
        >>> sorted({o.category for o in scenes.scene("validation", 3).objects})
        ['backpack', 'bird', 'broccoli', 'elephant', 'giraffe']
    """
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(SPLITS)}")
    size = SPLITS[split]
    if index < 0 or (size is not None and index >= size):
        raise IndexError(f"scene {index} is outside the {split} split of {size or 'endless'} scenes")
    draw = Draw("scene", split, index)
    context = draw.choice(list(CONTEXTS))
    objects: list[SceneObject] = []
    for category in _pick_categories(draw, context):
        placed = _place(draw, category, objects)
        if placed is not None:
            objects.append(placed)
    return Scene(split, index, context, tuple(objects))


def scene_of(image_id: int) -> Scene:
    """Return the scene with this image id; `ValueError` if there is none."""
    for split, first in sorted(_FIRST_ID.items(), key=lambda item: -item[1]):
        if image_id >= first:
            return scene(split, image_id - first)
    raise ValueError(f"no scene has the image id {image_id}")


def _pick_categories(draw: Draw, context: str) -> list[str]:
    companions = CONTEXTS[context]
    count = draw.weighted(range(1, 8), _COUNTS)
    chosen: list[str] = []
    while len(chosen) < count:
        if chosen and draw.chance(0.08):
            chosen.append(draw.choice(chosen))  # a second one of the same category
            continue
        pool = companions if draw.chance(0.82) else CATEGORIES
        left = [c for c in pool if c not in chosen]
        weights = [2.0 if c in companions[:4] else 1.0 for c in left]
        chosen.append(draw.weighted(left, weights) if pool is companions else draw.choice(left))
    return chosen


def _frame(category: str, side: int, centre: tuple[int, int]) -> tuple[float, float, float, float]:
    _, _, w, h = _SPRITES[category]["box"]
    scale = side / max(w, h) / 2
    x, y = centre
    return x - w * scale, y - h * scale, x + w * scale, y + h * scale


def _covered(frame: tuple, by: tuple) -> float:
    """Share of a frame that another one covers."""
    w = min(frame[2], by[2]) - max(frame[0], by[0])
    h = min(frame[3], by[3]) - max(frame[1], by[1])
    return max(w, 0) * max(h, 0) / ((frame[2] - frame[0]) * (frame[3] - frame[1]))


def _place(draw: Draw, category: str, placed: list[SceneObject]) -> SceneObject | None:
    """Find a place that leaves earlier objects visible, or None when the picture is full."""
    evidence, side, opacity = "clear", draw.choice(_SIZES), 1.0
    kind = draw.uniform(0, 1)
    if kind < 0.2:
        evidence, side = "small", draw.choice(_SMALL)
    elif kind < 0.33:
        evidence, side, opacity = "faint", draw.choice(_SIZES[2:]), draw.choice(_OPACITIES)
    angle, flip = draw.choice(_ANGLES), draw.chance(0.5)
    # Now and then this one stands in front of an earlier clear one.
    clear = [i for i, o in enumerate(placed) if o.evidence == "clear"]
    victim = draw.choice(clear) if evidence == "clear" and clear and draw.chance(0.35) else None
    frames = [_frame(o.category, o.side, o.centre) for o in placed]
    for attempt in range(24):
        if attempt == 12:
            victim = None
        margin = side // 2 + 2
        if victim is None:
            centre = (draw.below(SIZE - 2 * margin) + margin, draw.below(SIZE - 2 * margin) + margin)
        else:
            ox, oy = placed[victim].centre
            reach = (side + placed[victim].side) / 2
            centre = (int(ox + draw.uniform(-reach, reach)), int(oy + draw.uniform(-reach, reach)))
            centre = tuple(min(max(c, margin), SIZE - margin) for c in centre)  # type: ignore[assignment]
        frame = _frame(category, side, centre)
        free = all(_covered(f, frame) < 0.15 for i, f in enumerate(frames) if i != victim)
        if free and (victim is None or 0.45 < _covered(frames[victim], frame) < 0.8):
            if victim is not None:
                old = placed[victim]
                placed[victim] = SceneObject(
                    old.category, old.centre, old.side, old.angle, old.flip, old.opacity, "covered"
                )
            return SceneObject(category, centre, side, angle, flip, opacity, evidence)
    return None


# --- pictures


@functools.cache
def _atlas() -> Image.Image:
    return Image.open(_DATA / "atlas.png").convert("RGBA")


# Sizes and angles come from short lists, so that drawing is mostly pasting.
@functools.lru_cache(maxsize=10_000)
def _sprite(category: str, side: int, angle: int, flip: bool) -> Image.Image:
    x, y, w, h = _SPRITES[category]["box"]
    image = _atlas().crop((x, y, x + w, y + h))
    scale = side / max(w, h)
    image = image.resize((max(1, round(w * scale)), max(1, round(h * scale))), Image.Resampling.BILINEAR)
    if flip:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return image.rotate(angle, expand=True, resample=Image.Resampling.BILINEAR)


def _corner(o: SceneObject, sprite: Image.Image) -> tuple[int, int]:
    x = min(max(o.centre[0] - sprite.width // 2, 0), SIZE - sprite.width)
    y = min(max(o.centre[1] - sprite.height // 2, 0), SIZE - sprite.height)
    return x, y


def owners(scene: Scene) -> np.ndarray:
    """Return uint8 `[224, 224]`: 0 for background, else 1 + position in `scene.objects` of what shows there."""
    out = np.zeros((SIZE, SIZE), np.uint8)
    for i, o in enumerate(scene.objects):
        sprite = _sprite(o.category, o.side, o.angle, o.flip)
        x, y = _corner(o, sprite)
        mask = np.asarray(sprite.getchannel("A")) >= 128
        out[y : y + sprite.height, x : x + sprite.width][mask] = i + 1
    return out


@functools.lru_cache(maxsize=4096)
def _visible(scene: Scene) -> tuple[tuple[tuple[int, int, int, int], int], ...]:
    """Box and number of the visible pixels of every object."""
    owner, out = owners(scene), []
    for i in range(len(scene.objects)):
        rows, columns = np.nonzero(owner == i + 1)
        if not rows.size:
            out.append(((0, 0, 0, 0), 0))
            continue
        x, y = int(columns.min()), int(rows.min())
        out.append(((x, y, int(columns.max()) - x + 1, int(rows.max()) - y + 1), int(rows.size)))
    return tuple(out)


def render(scene: Scene) -> Image.Image:
    """Draw the picture of a scene: RGB, 224 x 224, the same pixels at every call.

    Examples:
        >>> from vlm_attn.evals import scenes
        >>> scenes.render(scenes.scene("validation", 3)).size
        (224, 224)
    """
    draw = Draw("pixels", scene.split, scene.index)
    noise = np.random.Generator(np.random.PCG64(draw.below(2**32)))
    picture = _background(draw, noise, scene.context)
    for o in scene.objects:
        sprite = _sprite(o.category, o.side, o.angle, o.flip)
        mask = sprite.getchannel("A")
        if o.opacity < 1:
            mask = mask.point([round(a * o.opacity) for a in range(256)])
        picture.paste(sprite, _corner(o, sprite), mask)
    # Sensor noise of two-pixel grains: it survives halving the picture.
    grain = noise.integers(-16, 17, (SIZE // 2, 1, SIZE // 2, 1, 3), np.int16)
    pixels = np.asarray(picture).reshape(SIZE // 2, 2, SIZE // 2, 2, 3) + grain
    return Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8).reshape(SIZE, SIZE, 3))


def _background(draw: Draw, noise: np.random.Generator, context: str) -> Image.Image:
    """Two shifted tones with a horizon, blotches, and clutter of plain shapes."""
    light = draw.uniform(-35, 25)
    top, bottom = (
        np.array([c + light + draw.uniform(-22, 22) for c in tone], np.float32) for tone in _COLOURS[context]
    )
    n = SIZE // 4
    horizon = int(n * draw.uniform(0.25, 0.7))
    small = np.empty((n, n, 3), np.float32)
    small[:horizon], small[horizon:] = top, bottom
    small += noise.standard_normal((n, n, 3), np.float32) * draw.uniform(5, 16)
    picture = Image.fromarray(np.clip(small, 0, 255).astype(np.uint8)).resize((SIZE, SIZE), Image.Resampling.BILINEAR)
    pen = ImageDraw.Draw(picture)
    for _ in range(draw.below(9)):
        tone = top if draw.chance(0.5) else bottom
        colour = tuple(int(min(max(c + draw.uniform(-45, 45), 0), 255)) for c in tone)
        x, y, w, h = draw.below(SIZE), draw.below(SIZE), 4 + draw.below(40), 4 + draw.below(40)
        kind = draw.below(4)
        if kind == 0:
            pen.ellipse((x, y, x + w, y + h), fill=colour)
        elif kind == 1:
            pen.rectangle((x, y, x + w, y + h), fill=colour)
        elif kind == 2:
            pen.line((x, y, x + 2 * w - 40, y + 2 * h - 40), fill=colour, width=2 + draw.below(4))
        else:
            pen.polygon([(x, y), (x + w, y + draw.below(h)), (x + draw.below(w), y + h)], fill=colour)
    return picture


# --- words and annotations


def article(noun: str) -> str:
    """Return the noun with its article: "a car", "an apple", "skis"."""
    if noun in ("skis", "scissors", "broccoli"):
        return noun
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def listing(nouns: Sequence[str]) -> str:
    """Join nouns with their articles: "a car, a bus and a person"."""
    named = [article(n) for n in nouns]
    return named[0] if len(named) == 1 else ", ".join(named[:-1]) + " and " + named[-1]


# With one object, "shows a car" reads as well as with five.
CAPTIONS = (
    "this {context} scene shows {objects}.",
    "the image shows a {context} with {objects}.",
    "a {context} scene with {objects}.",
    "in this {context} we can see {objects}.",
    "a photo of a {context} with {objects}.",
)


def caption(draw: Draw, context: str, nouns: Sequence[str]) -> str:
    """Return a one-sentence caption of a `context` that names the nouns in this order."""
    text = draw.choice(CAPTIONS).format(context=context, objects=listing(nouns))
    return text.replace("a office", "an office")


def captions(scene: Scene) -> list[str]:
    """Return five reference captions: all true, the first names every category, the others one or more."""
    draw = Draw("captions", scene.split, scene.index)
    names = scene.categories
    out = [caption(draw, scene.context, draw.shuffled(names))]
    for _ in range(4):
        some = draw.shuffled(names)[: max(1, round(len(names) * draw.uniform(0.4, 1.0)))]
        out.append(caption(draw, scene.context, some))
    return out


def coco_annotations(split: str, indices: Sequence[int]) -> tuple[dict, dict]:
    """Return COCO `instances` and `captions` dicts of some scenes of a split; segmentations are the boxes."""
    categories = [{k: c[k] for k in ("id", "name", "supercategory")} for c in _INDEX["categories"]]
    images: list[dict] = []
    instances: list[dict] = []
    texts: list[dict] = []
    for index in indices:
        s = scene(split, index)
        name = f"scenes_{split}_{index:06d}.png"
        images.append({"id": s.image_id, "file_name": name, "width": SIZE, "height": SIZE})
        for o, ((x, y, w, h), area) in zip(s.objects, _visible(s), strict=True):
            outline = [float(v) for v in (x, y, x + w, y, x + w, y + h, x, y + h)]
            instances.append(
                {
                    "id": len(instances) + 1,
                    "image_id": s.image_id,
                    "category_id": _SPRITES[o.category]["id"],
                    "bbox": [float(x), float(y), float(w), float(h)],
                    "area": float(area),
                    "iscrowd": 0,
                    "segmentation": [outline],
                }
            )
        for text in captions(s):
            texts.append({"id": len(texts) + 1, "image_id": s.image_id, "caption": text})
    info = {"description": f"scenes world, {split} split", "version": str(WORLD_VERSION)}
    return (
        {"info": info, "images": images, "annotations": instances, "categories": categories},
        {"info": info, "images": images, "annotations": texts},
    )


def dataset(split: str = "validation", limit: int | None = None) -> CocoDataset:
    """Return the first `limit` scenes of a split (all by default) as a COCO data set that draws its pictures.

    "train" is endless and needs a limit: `ValueError` without one.
    """
    from vlm_attn.evals.coco import CocoDataset

    size = SPLITS.get(split)
    if size is None and limit is None and split in SPLITS:
        raise ValueError(f"the {split} split is endless: give a limit")
    count = limit if size is None else size if limit is None else min(limit, size)
    instances, texts = coco_annotations(split, range(count or 0))
    return CocoDataset(f"scenes:{split}", instances, texts, lambda image_id: render(scene_of(image_id)))
