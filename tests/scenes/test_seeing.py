# SPDX-License-Identifier: Apache-2.0
"""The seconds-to-train model of `tests/seeing.py` does see: tests that rely on it may assume so."""

import numpy as np
import torch

import vlm_attn
from vlm_attn.evals import prompts

from .. import seeing


def answers(seeing_model, pictures):
    said, _ = prompts.generate(seeing_model.model, seeing_model.processor, pictures, [seeing.PROMPT] * len(pictures), 3)
    return said


def test_it_names_what_is_in_new_pictures(seeing_model):
    pictures, names = zip(*(seeing.picture(i) for i in range(120)), strict=True)
    right = np.mean([a == b for a, b in zip(answers(seeing_model, pictures), names, strict=True)])
    assert right >= 0.6  # chance: 0.25


def test_exchanged_pictures_exchange_the_answers(seeing_model):
    pictures = [seeing.picture(i)[0] for i in range(40)]
    said = answers(seeing_model, pictures)
    assert answers(seeing_model, pictures[::-1]) == said[::-1]
    assert len(set(said)) == len(seeing.CATEGORIES)


def test_it_needs_the_picture(seeing_model):
    """With the image hidden from attention it says one and the same: it does not read the answer off the prompt."""
    model, processor = seeing_model.model, seeing_model.processor
    inputs = prompts.build_inputs(model, processor, [seeing.picture(i)[0] for i in range(20)], [seeing.PROMPT] * 20)
    visual = inputs["input_ids"] == model.config.image_token_id
    with torch.no_grad():
        seen = model(**inputs).logits[:, -1]
        blind = model(**inputs | {"attention_mask": inputs["attention_mask"] * ~visual}).logits[:, -1]
    assert (blind - blind[:1]).abs().max() < 1e-4
    assert (seen - seen[:1]).abs().max() > 1


def test_methods_can_edit_it(seeing_model):
    model, processor = seeing_model.model, seeing_model.processor
    inputs = prompts.build_inputs(model, processor, [seeing.picture(0)[0]], [seeing.PROMPT])
    with torch.no_grad():
        plain = model(**inputs).logits
        with vlm_attn.patched(
            model, "gift", processor=processor, saliency_layers=0, enhance_layers=(0, 1), query_words="all"
        ):
            edited = model(**inputs).logits
        assert torch.equal(model(**inputs).logits, plain)
    assert (edited[:, -1] - plain[:, -1]).abs().max() > 1e-3


def test_a_blind_model_would_fail():
    """The bar of the first test is one that an untrained model does not reach."""
    torch.manual_seed(0)
    blind = seeing.train.build_model(seeing.SETTINGS).eval()
    pictures, names = zip(*(seeing.picture(i) for i in range(40)), strict=True)
    untrained = seeing.Seeing(blind, seeing.text.build_processor(seeing.SETTINGS.image_size), {})
    right = np.mean([a == b for a, b in zip(answers(untrained, pictures), names, strict=True)])
    assert right < 0.5


def test_both_losses_fall(seeing_model):
    for name, losses in seeing_model.losses.items():
        assert np.mean(losses[-10:]) < 0.5 * np.mean(losses[:10]), name
