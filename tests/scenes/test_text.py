# SPDX-License-Identifier: Apache-2.0
"""Tokenizer, processor and training text."""

import pytest
import torch

from vlm_attn.evals import scenes
from vlm_attn.evals.scenes import text, train


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    from transformers import AutoProcessor

    folder = tmp_path_factory.mktemp("processor")
    text.build_processor().save_pretrained(folder)
    return AutoProcessor.from_pretrained(folder)


@pytest.mark.parametrize("name", scenes.CATEGORIES)
def test_a_category_is_one_token(processor, name):
    ids = processor.tokenizer(name.title(), add_special_tokens=False).input_ids
    assert len(ids) == 1
    assert processor.tokenizer.decode(ids) == name


def test_sentences_come_back(processor):
    sentence = "this street scene shows a car, a hot dog, a tennis racket and a person. is it a dog?"
    ids = processor.tokenizer(sentence).input_ids
    assert processor.tokenizer.decode(ids, skip_special_tokens=True) == sentence
    assert ids[0] == processor.tokenizer.bos_token_id
    assert processor.tokenizer("scarf", add_special_tokens=False).input_ids == [processor.tokenizer.unk_token_id]


def test_every_training_sentence_is_known(processor):
    unknown = processor.tokenizer.unk_token_id
    for index in range(300):
        s = scenes.scene("train", index)
        pieces = [p for turn in text.training_turns(s) for p in turn] + scenes.world.captions(s) + [text.SYSTEM]
        for piece in pieces:
            assert unknown not in processor.tokenizer(piece).input_ids, piece


def test_chat_template_and_image_tokens(processor):
    image = scenes.render(scenes.scene("validation", 0)).resize((320, 240))
    turns = text.messages("Is there a car in the image?", image, system=text.SYSTEM)
    turns += [
        {"role": "assistant", "content": [{"type": "text", "text": "yes"}]},
        {"role": "user", "content": [{"type": "text", "text": "Is there a bus in the image?"}]},
    ]
    prompt = processor.apply_chat_template(turns, add_generation_prompt=True)
    assert prompt == (
        f"{text.SYSTEM} USER: <image>\nIs there a car in the image? ASSISTANT: yes</s>"
        "USER: Is there a bus in the image? ASSISTANT:"
    )
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    assert (inputs.input_ids == processor.image_token_id).sum() == 64
    assert inputs.pixel_values.shape == (1, 3, 112, 112)
    both = processor.apply_chat_template(
        turns, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    assert torch.equal(both.input_ids, inputs.input_ids)


def test_training_rows_are_what_the_template_gives(processor):
    """So the model meets at test time exactly what it was trained on."""
    s = scenes.scene("train", 5)
    image = scenes.render(s)
    turns = text.training_turns(s)
    coder = train.Coder(64)
    row = coder.row(turns, apart=True, system=text.SYSTEM)
    apart, positions, segments = row.ids, row.positions, row.segments
    for number, (prompt, answer) in enumerate(turns, start=1):
        conversation = text.messages(prompt, image, system=text.SYSTEM)
        conversation.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        wanted = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
        seen = [i for i, k in enumerate(segments) if k in (0, number)]
        assert [apart[i] for i in seen] == wanted
        assert [positions[i] for i in seen] == list(range(len(wanted)))
    conversation = []
    for number, (prompt, answer) in enumerate(turns):
        user = text.messages(prompt, image)[0]
        user["content"] = user["content"][number > 0 :]
        conversation += [user, {"role": "assistant", "content": [{"type": "text", "text": answer}]}]
    wanted = processor.apply_chat_template(conversation, tokenize=True, return_dict=True)["input_ids"][0]
    assert coder.row(turns, apart=False).ids == wanted


def test_training_pixels_are_the_processors(processor):
    s = scenes.scene("train", 9)
    wanted = processor.image_processor(scenes.render(s), return_tensors="pt").pixel_values
    mine = train.normalise(torch.from_numpy(train.pixels(s, 112).copy())[None])
    assert (mine - wanted).abs().mean() < 0.005  # torchvision's resize rounds differently from Pillow's
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    kwargs = {k: v for k, v in processor.image_processor.to_dict().items() if k != "image_processor_type"}
    exact = CLIPImageProcessorPil(**kwargs)(scenes.render(s), return_tensors="pt").pixel_values
    torch.testing.assert_close(mine, exact, atol=1e-5, rtol=0)


def test_training_turns_are_balanced():
    answers, noise, objects = [], 0, 0
    tokenizer = text.build_tokenizer()
    for index in range(400):
        s = scenes.scene("train", index)
        for prompt, answer in text.training_turns(s):
            named = set(tokenizer.tokenize(answer)) & set(scenes.CATEGORIES)
            if answer in ("yes", "no"):
                asked = (set(tokenizer.tokenize(prompt)) & set(scenes.CATEGORIES)).pop()
                assert (asked in s.categories) == (answer == "yes")
                answers.append(answer)
            else:
                assert named >= set(s.categories)
                assert named - set(s.categories) <= set(scenes.CONTEXTS[s.context])
                noise, objects = noise + len(named - set(s.categories)), objects + len(named)
    assert answers.count("yes") / len(answers) == pytest.approx(0.5, abs=0.03)
    assert 0.04 < noise / objects < 0.16
