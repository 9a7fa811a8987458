# SPDX-License-Identifier: Apache-2.0
"""A COCO folder of drawn pictures and a tiny random LLaVA: everything an evaluation needs, in a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"
NAMES = ("person", "car", "dog", "cup", "apple", "kite", "train", "chair", "book", "cat")


def shared_file(name: str) -> Path:
    """A file of the reference data that tests use where it is; skips where it is not."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"reference data {name} is not on this machine")
    return path


def instances_of(objects: dict[int, list[str]], names: tuple[str, ...] = NAMES) -> dict[str, Any]:
    ids = {name: place for place, name in enumerate(names, start=1)}
    pairs = [(image, name) for image, found in objects.items() for name in found]
    return {
        "images": [{"id": image, "file_name": f"{image:012d}.png"} for image in objects],
        "annotations": [
            {"id": place, "image_id": image, "category_id": ids[name], "iscrowd": 0, "bbox": [0, 0, 1, 1]}
            for place, (image, name) in enumerate(pairs, start=1)
        ],
        "categories": [{"id": place, "name": name} for name, place in ids.items()],
    }


def captions_of(captions: dict[int, list[str]]) -> dict[str, Any]:
    return {"annotations": [{"image_id": i, "caption": text} for i, texts in captions.items() for text in texts]}


def write_folder(
    root: Path,
    objects: dict[int, list[str]],
    captions: dict[int, list[str]] | None = None,
    suffix: str = "",
    images: str = "images",
) -> Path:
    (root / "annotations").mkdir(parents=True)
    (root / images).mkdir()
    (root / "annotations" / f"instances{suffix}.json").write_text(json.dumps(instances_of(objects)))
    if captions is not None:
        (root / "annotations" / f"captions{suffix}.json").write_text(json.dumps(captions_of(captions)))
    noise = np.random.default_rng(0)
    for image in objects:
        pixels = noise.integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / images / f"{image:012d}.png")
    return root


OBJECTS = {
    11: ["person", "car", "dog"],
    7: ["person", "dog", "kite", "car"],
    5: ["cup", "apple", "book"],
    3: ["chair", "cup", "book", "person"],
    2: ["cat"],
    9: ["person", "car", "train"],
    13: ["person", "chair", "cup"],
}


@pytest.fixture(scope="session")
def coco_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    captions = {image: [f"a photo of a {name}" for name in names] for image, names in OBJECTS.items()}
    return write_folder(tmp_path_factory.mktemp("coco") / "data", OBJECTS, captions)


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA with the words of the scenes world, saved as an ordinary Hugging Face folder."""
    import torch
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    from vlm_attn.evals.scenes.text import build_processor

    processor = build_processor(image_size=28, patch_size=14)
    tokenizer = processor.tokenizer
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=28,
            patch_size=14, projection_dim=16,
        ).to_dict(),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=3,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
            pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
        ).to_dict(),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    for parameter in model.parameters():  # larger weights: answers then depend on the picture
        parameter.data.mul_(3)
    folder = tmp_path_factory.mktemp("model") / "tiny"
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_model(tiny_model_folder: Path) -> tuple[Any, Any]:
    from vlm_attn.evals.models import load_model

    return load_model(str(tiny_model_folder), device="cpu")
