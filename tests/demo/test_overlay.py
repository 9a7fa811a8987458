# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from vlm_attn.demo import overlay, seen_box


def test_salient_places_stay_bright_and_the_rest_darkens():
    image = Image.new("RGB", (40, 20), (100, 100, 100))
    saliency = np.zeros((2, 4), dtype=np.float32)
    saliency[0, 3] = 1.0
    shown = np.asarray(overlay(image, saliency))
    assert shown.shape == (20, 40, 3)
    assert shown[2, 37].mean() > 95 > 50 > shown[18, 2].mean()
    assert shown[2, 37, 0] > shown[2, 37, 2]  # glows red


def test_strength_zero_without_saliency_is_the_picture():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (9, 7, 3), dtype=np.uint8))
    assert np.array_equal(np.asarray(overlay(image, np.zeros((3, 3)), strength=0)), np.asarray(image))


@pytest.mark.parametrize(("shape", "strength"), [((4,), 0.5), ((2, 2), 1.5)])
def test_wrong_input(shape, strength):
    with pytest.raises(ValueError, match="map and a strength"):
        overlay(Image.new("RGB", (4, 4)), np.zeros(shape), strength=strength)


@pytest.mark.parametrize(
    ("options", "size", "box"),
    [
        (
            {"size": {"shortest_edge": 10}, "crop_size": {"height": 10, "width": 10}, "do_center_crop": True},
            (60, 20),
            (20, 0, 40, 20),
        ),
        (
            {"size": {"shortest_edge": 20}, "crop_size": {"height": 10, "width": 10}, "do_center_crop": True},
            (40, 40),
            (10, 10, 30, 30),
        ),
        (
            {"size": {"shortest_edge": 10}, "crop_size": {"height": 10, "width": 10}, "do_center_crop": False},
            (60, 20),
            (0, 0, 60, 20),
        ),
        ({"size": {"height": 10, "width": 10}}, (60, 20), (0, 0, 60, 20)),
        ({}, (60, 20), (0, 0, 60, 20)),
    ],
)
def test_what_a_model_sees_of_a_picture(options, size, box):
    assert seen_box(SimpleNamespace(image_processor=SimpleNamespace(**options)), size) == box


def test_map_of_a_part():
    """A map of the middle: its left and right neighbours are dark, whatever the map says at its edges."""
    image = Image.new("RGB", (60, 20), (100, 100, 100))
    shown = np.asarray(overlay(image, np.ones((2, 2)), box=(20, 0, 40, 20)))
    assert shown[:, 20:40].mean() > 90 > 50 > max(shown[:, :19].mean(), shown[:, 41:].mean())
