# SPDX-License-Identifier: Apache-2.0
"""A saliency map drawn over its picture."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
from PIL import Image, ImageDraw, ImageFont

Box = tuple[float, float, float, float]


def seen_box(processor: Any, size: tuple[int, int]) -> Box:
    """What a model sees of a picture: ``(left, top, right, bottom)``, all of it unless its processor crops the centre.

    Args:
        processor: the model's processor.
        size: width and height of the picture.
    """
    width, height = size
    images = getattr(processor, "image_processor", None)
    edge = (getattr(images, "size", None) or {}).get("shortest_edge")
    crop = getattr(images, "crop_size", None) or {}
    if not (getattr(images, "do_center_crop", False) and edge and crop.get("height") and crop.get("width")):
        return 0, 0, width, height
    scale = min(size) / edge
    w, h = min(crop["width"] * scale, width), min(crop["height"] * scale, height)
    return (width - w) / 2, (height - h) / 2, (width + w) / 2, (height + h) / 2


def draw_path(image: Image.Image, places: Sequence[tuple[float, float]], newest: int) -> None:
    """Draw a numbered gaze path over an image, in place: a line from place to place, the last one filled.

    Args:
        image: an RGB image.
        places: ``(x, y)`` in its pixels, one per word; the first has number 1. Places next to each other share a disc, with
            the numbers of all its words.
        newest: how many of the last words are drawn.
    """
    first = max(0, len(places) - newest)
    size = max(11, round(min(image.size) / 26))
    font, draw = ImageFont.load_default(size), ImageDraw.Draw(image)
    shown = places[first:]
    for ends in itertools.pairwise(shown):
        for width, colour in ((5, (0, 0, 0)), (2, (255, 255, 255))):
            draw.line([*ends[0], *ends[1]], fill=colour, width=width)
    numbers: dict[tuple[int, int], list[int]] = {}
    for number, (x, y) in enumerate(shown, start=first + 1):
        near = (key for key in numbers if abs(key[0] - x) < 1.5 * size and abs(key[1] - y) < 1.5 * size)
        numbers.setdefault(next(near, (round(x), round(y))), []).append(number)
    for (x, y), found in numbers.items():
        text = ", ".join(map(str, found if len(found) < 5 else [*found[:2], f"… {found[-1]}"]))
        last = found[-1] == len(places)
        half = max(size, draw.textlength(text, font=font) / 2 + size * 0.5)
        x = min(max(x, half + 2), image.width - half - 2)  # whole numbers also at the edges
        y = min(max(y, size + 2), image.height - size - 2)
        back, front = ((194, 65, 12), (255, 255, 255)) if last else ((255, 255, 255), (20, 20, 20))
        draw.rounded_rectangle(
            (x - half, y - size * 0.85, x + half, y + size * 0.85),
            radius=size * 0.85,
            fill=back,
            outline=(20, 20, 20),
            width=2,
        )
        draw.text((x, y), text, fill=front, font=font, anchor="mm")


def overlay(image: Image.Image, saliency: object, *, strength: float = 0.65, box: Box | None = None) -> Image.Image:
    """Draw where a question looks: salient places keep their colour, the rest is darkened, the strongest glow red.

    Args:
        image: the picture.
        saliency: ``[h, w]`` in [0, 1], as :func:`vlm_attn.saliency` returns it.
        strength: 0 = the plain picture, 1 = unsalient places black.
        box: the part of the picture that the map covers (see :func:`seen_box`), default all of it; outside is dark.

    Returns:
        An RGB image of the picture's size.

    Raises:
        ValueError: the map is not two-dimensional, or strength is outside [0, 1].
    """
    values = np.asarray(saliency, dtype=np.float32)
    if values.ndim != 2 or not 0 <= strength <= 1:
        raise ValueError(f"need an [h, w] map and a strength in [0, 1], got shape {values.shape} and {strength!r}")
    small = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
    left, top, right, bottom = (round(edge) for edge in box or (0, 0, *image.size))
    placed = Image.new("L", image.size)
    placed.paste(small.resize((max(1, right - left), max(1, bottom - top)), Image.Resampling.BICUBIC), (left, top))
    weight = np.asarray(placed, dtype=np.float32)[..., None] / 255
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    glow = np.array([255.0, 60.0, 30.0], dtype=np.float32)
    shown = picture * (1 - strength * (1 - weight))
    shown = shown * (1 - 0.35 * weight**2) + glow * 0.35 * weight**2
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
