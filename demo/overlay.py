"""A saliency map drawn over its picture."""

from __future__ import annotations

import numpy as np
from PIL import Image


def overlay(image: Image.Image, saliency: object, *, strength: float = 0.65) -> Image.Image:
    """Draw where a question looks: salient places keep their colour, the rest is darkened, the strongest glow red.

    Args:
        image: the picture.
        saliency: ``[h, w]`` in [0, 1], as :func:`vlm_attn.saliency` returns it.
        strength: 0 = the plain picture, 1 = unsalient places black.

    Returns:
        An RGB image of the picture's size.

    Raises:
        ValueError: the map is not two-dimensional, or strength is outside [0, 1].
    """
    values = np.asarray(saliency, dtype=np.float32)
    if values.ndim != 2 or not 0 <= strength <= 1:
        raise ValueError(f"need an [h, w] map and a strength in [0, 1], got shape {values.shape} and {strength!r}")
    small = Image.fromarray((255 * values.clip(0, 1)).astype(np.uint8))
    weight = np.asarray(small.resize(image.size, Image.Resampling.BICUBIC), dtype=np.float32)[..., None] / 255
    picture = np.asarray(image.convert("RGB"), dtype=np.float32)
    glow = np.array([255.0, 60.0, 30.0], dtype=np.float32)
    shown = picture * (1 - strength * (1 - weight))
    shown = shown * (1 - 0.35 * weight**2) + glow * 0.35 * weight**2
    return Image.fromarray(shown.clip(0, 255).astype(np.uint8))
