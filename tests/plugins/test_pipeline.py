# SPDX-License-Identifier: Apache-2.0
"""A patched model in a pipeline of transformers says what it says in generate()."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import pipeline

import vlm_attn
from vlm_attn.evals import prompts, scenes
from vlm_attn.evals.models import load_model

ASKED = "Please describe this image in detail."


@pytest.fixture(scope="module")
def bundled() -> Any:
    return load_model("scenes", "cpu")


def chat(number: int) -> list[dict[str, Any]]:
    picture = scenes.render(scenes.scene("validation", number))
    return [{"role": "user", "content": [{"type": "image", "image": picture}, {"type": "text", "text": ASKED}]}]


def direct(model: Any, processor: Any, number: int) -> str:
    return prompts.generate(model, processor, [scenes.render(scenes.scene("validation", number))], [ASKED], 40)[0][0]


@pytest.mark.parametrize("method", [{"method": "gift", "alpha": 12.0}, {"method": "divprune", "keep": 0.1}])
def test_image_text_to_text(bundled: Any, method: dict[str, Any]) -> None:
    model, processor = bundled
    options: dict[str, Any] = {
        "max_new_tokens": 40,
        "return_full_text": False,
        "generate_kwargs": {"do_sample": False},
    }
    pipe = pipeline("image-text-to-text", model=model, processor=processor)
    plain = pipe(text=chat(3), **options)[0]["generated_text"].strip()
    assert plain == direct(model, processor, 3)
    with vlm_attn.patched(model, processor=processor, **method):
        edited = pipe(text=chat(3), **options)[0]["generated_text"].strip()
        assert edited != plain
        assert edited == direct(model, processor, 3)
        batch = pipe(text=[chat(3), chat(8)], batch_size=2, **options)
        assert [row[0]["generated_text"].strip() for row in batch] == [edited, direct(model, processor, 8)]
    assert pipe(text=chat(3), **options)[0]["generated_text"].strip() == plain
