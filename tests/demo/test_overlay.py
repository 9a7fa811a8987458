import numpy as np
import pytest
from PIL import Image

from vlm_attn.demo import overlay


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
