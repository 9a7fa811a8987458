# SPDX-License-Identifier: Apache-2.0
"""Pictures with boxes, and counts."""

import numpy as np
import pytest

from vlm_attn.evals import scenes
from vlm_attn.evals.scenes import look, world


def test_boxes_are_where_the_objects_are():
    scene = scenes.scene("validation", 3)
    plain = np.asarray(scenes.render(scene)).repeat(2, 0).repeat(2, 1)
    drawn = np.asarray(look.with_boxes(scene, scale=2))
    assert drawn.shape == plain.shape == (448, 448, 3)
    changed = (drawn != plain).any(-1)
    for thing, (x, y, w, h) in zip(scene.objects, scene.boxes, strict=True):
        corner = drawn[2 * (y + h) - 1 : 2 * (y + h) + 1, 2 * (x + w) - 1 : 2 * (x + w) + 1]
        assert (corner == look.COLOURS[thing.evidence]).all(-1).any(), thing
    assert 0 < changed.mean() < 0.5


def test_scene_names():
    assert look.parse_scenes("validation/3") == [scenes.scene("validation", 3)]
    assert [s.index for s in look.parse_scenes("train/7-9")] == [7, 8, 9]
    for name, message in (
        ("validation", "expected SPLIT/NUMBER"),
        ("validation/x", "expected SPLIT/NUMBER"),
        ("validation/5-3", "below the first"),
        ("validation/499-500", "outside the validation split"),
        ("nowhere/1", "unknown split"),
    ):
        with pytest.raises(ValueError, match=message):
            look.parse_scenes(name)


def test_statistics_count():
    found = look.statistics("validation", 40)
    some = [scenes.scene("validation", i) for i in range(40)]
    assert found["scenes"] == 40 == sum(found["contexts"].values()) == sum(found["objects_per_scene"].values())
    assert found["objects"] == sum(len(s.objects) for s in some) == sum(found["evidence"].values())
    with_person = [s for s in some if "person" in s.categories]
    assert found["categories"]["person"] == len(with_person)
    assert found["together"]["person"].get("car", 0) == sum("car" in s.categories for s in with_person)
    assert found["together"]["car"].get("person", 0) == found["together"]["person"].get("car", 0)
    assert 0.6 < found["companions"] < 1
    assert look.statistics("train")["scenes"] == 500 == look.statistics("validation", 900)["scenes"]
    with pytest.raises(ValueError, match="limit=0"):
        look.statistics("validation", 0)
    with pytest.raises(ValueError, match="unknown split"):
        look.statistics("nowhere")
    with pytest.raises(ValueError, match="no category 'unicorn'"):
        look.statistics_tables(found, of=["unicorn"])
    assert set(found["categories"]) <= set(world.CATEGORIES)
