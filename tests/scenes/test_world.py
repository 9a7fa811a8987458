# SPDX-License-Identifier: Apache-2.0
"""The world: frozen, deterministic, disjoint splits, truthful annotations."""

import collections
import contextlib
import dataclasses
import hashlib
import io
import json
import subprocess
import sys

import numpy as np
import pytest

from vlm_attn.evals import scenes
from vlm_attn.evals.scenes import text, world


def specification(split: str, count: int) -> str:
    rows = [dataclasses.asdict(scenes.scene(split, i)) for i in range(count)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]


def test_the_specification_is_frozen():
    """Changes with the world, not with Pillow. A failure here means every published figure is void."""
    assert scenes.WORLD_VERSION == 1
    assert specification("validation", 500) == "41137016c6df80b7"
    assert specification("test", 500) == "915809683bff1ba3"
    assert specification("train", 200) == "7b34cdf000cb8442"


def test_the_same_scene_in_another_process():
    code = "from vlm_attn.evals.scenes import scene; print(repr(scene('train', 123456)))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert out.strip() == repr(scenes.scene("train", 123456))


def test_splits_are_disjoint():
    seen = {
        (s.context, s.objects)
        for split in ("validation", "test", "train")
        for s in (scenes.scene(split, i) for i in range(500))
        if len(s.objects) > 1
    }
    total = sum(
        len(scenes.scene(split, i).objects) > 1 for split in ("validation", "test", "train") for i in range(500)
    )
    assert len(seen) == total
    ids = {scenes.scene(split, i).image_id for split in ("validation", "test", "train") for i in (0, 499)}
    assert len(ids) == 6
    assert scenes.scene_of(scenes.scene("test", 499).image_id) == scenes.scene("test", 499)


@pytest.mark.parametrize(
    ("split", "index", "error"), [("val", 0, ValueError), ("test", 500, IndexError), ("train", -1, IndexError)]
)
def test_wrong_scenes_are_refused(split, index, error):
    with pytest.raises(error):
        scenes.scene(split, index)


def test_the_world_is_as_described():
    assert len(scenes.CATEGORIES) >= 56
    assert len(scenes.CONTEXTS) >= 10
    assert {c for names in scenes.CONTEXTS.values() for c in names} <= set(scenes.CATEGORIES)
    sample = [scenes.scene("train", i) for i in range(3000)]
    sizes = collections.Counter(len(s.objects) for s in sample)
    assert set(sizes) == set(range(1, 8))
    kinds = collections.Counter(o.evidence for s in sample for o in s.objects)
    share = {k: n / sum(kinds.values()) for k, n in kinds.items()}
    assert share["small"] == pytest.approx(1 / 5, abs=0.02)
    assert share["faint"] == pytest.approx(1 / 8, abs=0.02)
    assert share["covered"] == pytest.approx(1 / 12, abs=0.02)
    assert {c for s in sample for c in s.categories} == set(scenes.CATEGORIES)


def test_pictures_repeat_and_differ():
    a, b = scenes.scene("validation", 3), scenes.scene("validation", 4)
    first = np.asarray(scenes.render(a))
    assert first.shape == (224, 224, 3)
    assert first.dtype == np.uint8
    assert np.array_equal(first, np.asarray(scenes.render(a)))
    assert not np.array_equal(first, np.asarray(scenes.render(b)))


@pytest.mark.parametrize("split", ["validation", "test"])
def test_every_object_is_visible_inside_its_box(split):
    for index in range(500):
        s = scenes.scene(split, index)
        owner = world.owners(s)
        for i, (x, y, w, h) in enumerate(s.boxes):
            assert x >= 0
            assert y >= 0
            assert x + w <= 224
            assert y + h <= 224
            seen = owner == i + 1
            assert seen.sum() >= 15, (split, index, s.objects[i])
            assert seen[y : y + h, x : x + w].sum() == seen.sum()
            assert seen[y].any()
            assert seen[:, x + w - 1].any()


def test_boxes_match_drawn_pixels():
    """Taking an object out of the picture changes pixels in its box and nowhere else."""
    for index in range(40):
        s = scenes.scene("validation", index)
        without = dataclasses.replace(s, objects=s.objects[:-1])
        change = np.abs(np.asarray(scenes.render(s), int) - np.asarray(scenes.render(without), int)).sum(-1) > 0
        x, y, w, h = s.boxes[-1]
        assert change[y : y + h, x : x + w].mean() > 0.15
        change[max(y - 4, 0) : y + h + 4, max(x - 4, 0) : x + w + 4] = False  # half-transparent rims
        assert change.mean() < 0.003


def test_reference_captions_are_true_and_complete():
    tokenizer = text.build_tokenizer()
    for index in range(200):
        s = scenes.scene("validation", index)
        captions = world.captions(s)
        assert len(captions) == 5
        named = [set(tokenizer.tokenize(c)) & set(scenes.CATEGORIES) for c in captions]
        assert all(n and n <= set(s.categories) for n in named)
        assert named[0] == set(s.categories)
        assert all(s.context in c for c in captions)


def test_coco_dicts_load_in_pycocotools(tmp_path):
    coco = pytest.importorskip("pycocotools.coco")
    instances, captions = world.coco_annotations("validation", range(20))
    for name, content in (("instances.json", instances), ("captions.json", captions)):
        (tmp_path / name).write_text(json.dumps(content))
    with contextlib.redirect_stdout(io.StringIO()):
        loaded, texts = coco.COCO(str(tmp_path / "instances.json")), coco.COCO(str(tmp_path / "captions.json"))
    s = scenes.scene("validation", 7)
    found = loaded.loadAnns(loaded.getAnnIds([s.image_id]))
    names = {c["id"]: c["name"] for c in loaded.loadCats(loaded.getCatIds())}
    assert [names[a["category_id"]] for a in found] == [o.category for o in s.objects]
    assert [a["bbox"] for a in found] == s.boxes
    assert loaded.annToMask(found[0]).shape == (224, 224)
    assert len(texts.getAnnIds([s.image_id])) == 5
    assert names[90] == "toothbrush"


def test_dataset():
    data = scenes.dataset("validation", limit=12)
    assert len(data.image_ids) == 12
    s = scenes.scene_of(data.image_ids[5])
    assert set(data.objects(data.image_ids[5])) == set(s.categories)
    assert np.array_equal(np.asarray(data.load_image(s.image_id)), np.asarray(scenes.render(s)))
    with pytest.raises(ValueError, match="endless"):
        scenes.dataset("train")
    with pytest.raises(ValueError, match="no_such"):
        scenes.dataset("no_such", limit=3)


def test_importing_the_world_does_not_import_torch():
    code = "import sys, vlm_attn.evals.scenes.world; sys.exit('torch' in sys.modules)"
    parent = "import sys, vlm_attn.evals; sys.exit('torch' in sys.modules)"
    if subprocess.run([sys.executable, "-c", parent]).returncode:
        pytest.skip("the parent package imports torch")
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_atlas_can_be_drawn_again():
    from pathlib import Path

    from vlm_attn.evals.scenes import draw_atlas

    font = Path("/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf")
    if not font.exists():
        pytest.skip("Noto Color Emoji is not installed")
    _, index = draw_atlas.draw(str(font))
    assert [c["name"] for c in index["categories"]] == list(scenes.CATEGORIES)
