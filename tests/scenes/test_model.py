# SPDX-License-Identifier: Apache-2.0
"""The bundled model: an ordinary Hugging Face folder that sees."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlm_attn
from vlm_attn.evals import scenes
from vlm_attn.evals.prompts import build_inputs
from vlm_attn.evals.scenes import text, train, world


@pytest.fixture(scope="module")
def loaded():
    from transformers import AutoModelForImageTextToText, AutoProcessor

    path = scenes.model_path()
    processor = AutoProcessor.from_pretrained(path)
    return AutoModelForImageTextToText.from_pretrained(path).eval(), processor


@torch.no_grad()
def say(loaded, images, prompts, **kwargs):
    model, processor = loaded
    conversations = [text.messages(p) for p in prompts]
    chats = [processor.apply_chat_template(c, add_generation_prompt=True) for c in conversations]
    inputs = processor(text=chats, images=images, padding=True, return_tensors="pt")
    out = model.generate(**inputs, do_sample=False, **kwargs)
    return processor.batch_decode(out[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)


def named(caption):
    return set(text.build_tokenizer().tokenize(caption)) & set(scenes.CATEGORIES)


def test_it_is_an_ordinary_folder(loaded):
    model, processor = loaded
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    assert type(processor).__name__ == "LlavaProcessor"
    assert model.dtype == torch.float32
    assert sum(f.stat().st_size for f in scenes.model_path().iterdir()) <= 16 * 2**20
    assert {f.suffix for f in scenes.model_path().iterdir()} <= {".json", ".jinja", ".safetensors", ".md"}
    assert (scenes.model_path() / "README.md").exists()
    assert processor.tokenizer.get_vocab() == text.build_tokenizer().get_vocab()


def test_captions_recall(loaded):
    some = [world.scene("validation", i) for i in range(60)]
    captions = say(loaded, [scenes.render(s) for s in some], [text.CAPTION_PROMPTS[0]] * 60)
    found = sum(len(named(c) & set(s.categories)) for s, c in zip(some, captions, strict=True))
    assert found / sum(len(s.categories) for s in some) >= 0.5
    assert all(c.endswith(".") for c in captions)


def test_yes_no_questions_and_exchanged_pictures(loaded):
    some = [world.scene("validation", i) for i in range(60)]
    images, asked, wanted = [], [], []
    for s in some:
        draw = world.Draw("model test", s.index)
        absent = [c for c in scenes.CATEGORIES if c not in s.categories]
        images += [scenes.render(s)] * 2
        asked += [draw.choice(s.categories), draw.choice(absent)]
        wanted += [True, False]
    prompts = [text.question(c) for c in asked]
    answers = say(loaded, images, prompts, max_new_tokens=3)
    assert set(answers) <= {"yes", "no"}
    right = np.mean([(a == "yes") == w for a, w in zip(answers, wanted, strict=True)])
    assert right >= 0.75
    # The same questions about other pictures: what was there mostly is not any more.
    other = say(loaded, images[2:] + images[:2], prompts, max_new_tokens=3)
    present = slice(0, None, 2)
    assert np.mean([a == "yes" for a in other[present]]) < np.mean([a == "yes" for a in answers[present]]) - 0.3


def test_exchanged_pictures_change_captions(loaded):
    """Captions name what is in the picture that is shown, not what was in the one they were asked about before."""
    some = [world.scene("validation", i) for i in range(40)]
    images = [scenes.render(s) for s in some]
    prompts = [text.CAPTION_PROMPTS[0]] * 40
    captions = say(loaded, images, prompts)
    other = say(loaded, images[1:] + images[:1], prompts)
    assert captions[1:] == other[:-1]
    assert np.mean([a != b for a, b in zip(captions, other, strict=True)]) >= 0.95

    def recall(said):
        found = sum(len(named(c) & set(s.categories)) for s, c in zip(some, said, strict=True))
        return found / sum(len(s.categories) for s in some)

    assert recall(captions) >= 0.75
    assert recall(other) < 0.3
    # A grey picture names next to nothing of the scene.
    grey = say(loaded, [Image.new("RGB", (224, 224), (128, 128, 128))] * 40, prompts)
    assert len(set(grey)) == 1
    assert recall(grey) < 0.3


def test_greedy_of_the_training_script_is_generate(loaded):
    model, processor = loaded
    some = [world.scene("validation", i) for i in range(6)]
    prompts = [text.CAPTION_PROMPTS[0], "Is there a dog in the image?"] * 6
    pictures = torch.from_numpy(np.stack([train.pixels(s, 112) for s in some]))
    asked = [(i // 2, p) for i, p in enumerate(prompts)]
    mine = train.greedy(model, train.Coder(64), pictures, asked)
    theirs = say(loaded, [scenes.render(some[i]) for i, _ in asked], prompts)
    assert [processor.decode(tokens) for tokens in mine] == theirs


@pytest.mark.parametrize(
    ("mask", "method"), [("mma", "mma"), ("vision-block", "vision_block"), ("prefix-lm", "prefix_lm")]
)
def test_a_training_mask_is_the_method_of_that_name(loaded, mask, method):
    """So a variant trained with `--mask mma` is asked with `--method mma`."""
    model, processor = loaded
    scene = world.scene("validation", 1)
    prompt = "Is there a dog in the image?"
    coder = train.Coder(64)
    batch = coder.batch([coder.row([(prompt, None)])])
    pictures = torch.from_numpy(train.pixels(scene, 112).copy())[None]
    with torch.no_grad():
        embedded = train.embeddings(model, batch["ids"], train.image_features(model, pictures), torch.zeros(1).long())
        hidden = model.model.language_model(
            inputs_embeds=embedded, attention_mask=train.attention_mask(batch["segments"], batch["groups"], mask)
        ).last_hidden_state
        mine = model.lm_head(hidden)
        inputs = build_inputs(model, processor, [scenes.render(scene)], [prompt])
        inputs["pixel_values"] = train.normalise(pictures)  # torchvision's resize rounds differently
        assert torch.equal(inputs["input_ids"], batch["ids"])
        plain = model(**inputs).logits
        with vlm_attn.patched(model, method, processor=processor):
            theirs = model(**inputs).logits
    torch.testing.assert_close(theirs, mine, atol=1e-4, rtol=1e-4)
    assert (plain - mine).abs().max() > 0.01  # the mask is felt
