# SPDX-License-Identifier: Apache-2.0
"""Tiny models with random weights, built from config: hosts for tests of the engine. No download, milliseconds a forward.

``FAMILIES`` maps a family to a function that builds ``(model, make_inputs)``; ``make_inputs(prompts)`` turns prompts into
a left-padded batch. A prompt is a list of parts: ``"image"`` or an int, the number of text tokens to draw.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import (
    CLIPVisionConfig,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
    GemmaConfig,
    InternVLConfig,
    InternVLForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
)

VOCAB, IMAGE, PAD, BOS, EOS = 128, 120, 0, 1, 2
START, END = 121, 122  # markers around an image, for families that have them
TEXT = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "initializer_range": 0.3,  # attention that is far from uniform
}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
Inputs = dict[str, Any]
Prompt = Sequence[int | str]
Built = tuple[Any, Callable[..., Inputs]]


def padded(
    prompts: Sequence[Prompt], image: Sequence[int], pixels: Callable[[int, torch.Generator], Inputs], seed: int
) -> Inputs:
    generator = torch.Generator().manual_seed(seed)
    rows, images = [], 0
    for prompt in prompts:
        row = [BOS]
        for part in prompt:
            if part == "image":
                row += list(image)
                images += 1
            else:
                row += torch.randint(3, IMAGE, (int(part),), generator=generator).tolist()
        rows.append(row)
    length = max(map(len, rows))
    ids = torch.tensor([[PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **pixels(images, generator)}


def finish(model: Any) -> Any:
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = PAD
    return model.eval()


def llava(kv_heads: int = 2) -> Built:
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=12, patch_size=4),
        text_config=LlamaConfig(**TEXT, num_key_value_heads=kv_heads),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
    )
    torch.manual_seed(0)
    model = finish(LlavaForConditionalGeneration(config))

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        return padded(prompts, [IMAGE] * 9, lambda n, g: {"pixel_values": torch.randn(n, 3, 12, 12, generator=g)}, seed)

    return model, inputs


def llava_next() -> Built:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION, image_size=8, patch_size=4),
        text_config=LlamaConfig(**TEXT, num_key_value_heads=2),
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        image_grid_pinpoints=[[16, 16]],
    )
    torch.manual_seed(0)
    model = finish(LlavaNextForConditionalGeneration(config))

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        def pixels(n: int, g: torch.Generator) -> Inputs:
            return {
                "pixel_values": torch.randn(n, 5, 3, 8, 8, generator=g),
                "image_sizes": torch.tensor([[16, 16]] * n),
            }

        return padded(prompts, [IMAGE] * 24, pixels, seed)  # 2x2 overview, 4 rows of 4 and a newline token each

    return model, inputs


def _qwen(config_class: Any, model_class: Any, vision: dict[str, Any]) -> Built:
    config = config_class(
        text_config=dict(
            **TEXT,
            num_key_value_heads=2,
            rope_parameters={"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0},
        ),
        vision_config=vision,
        image_token_id=IMAGE,
        vision_start_token_id=START,
        vision_end_token_id=END,
        video_token_id=123,
    )
    torch.manual_seed(0)
    model = finish(model_class(config))

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        def pixels(n: int, g: torch.Generator) -> Inputs:
            return {
                "pixel_values": torch.randn(n * 24, 3 * 2 * 4 * 4, generator=g),
                "image_grid_thw": torch.tensor([[1, 4, 6]] * n),
            }

        batch = padded(prompts, [START, *[IMAGE] * 6, END], pixels, seed)  # 4 x 6 patches, merged 2 x 2
        return {**batch, "mm_token_type_ids": (batch["input_ids"] == IMAGE).int()}

    return model, inputs


def qwen2_vl() -> Built:
    vision = {
        "depth": 2,
        "embed_dim": 32,
        "hidden_size": 32,
        "num_heads": 4,
        "mlp_ratio": 2,
        "patch_size": 4,
        "spatial_merge_size": 2,
    }
    return _qwen(Qwen2VLConfig, Qwen2VLForConditionalGeneration, vision)


def qwen2_5_vl() -> Built:
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "out_hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "spatial_merge_size": 2,
        "window_size": 16,
        "fullatt_block_indexes": [1],
    }
    return _qwen(Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, vision)


def internvl() -> Built:
    config = InternVLConfig(
        vision_config=dict(**VISION, image_size=[16, 16], patch_size=[4, 4]),
        text_config=Qwen2Config(**TEXT, num_key_value_heads=2),
        image_token_id=IMAGE,
        downsample_ratio=0.5,
    )
    torch.manual_seed(0)
    model = finish(InternVLForConditionalGeneration(config))

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        image = [START, *[IMAGE] * 4, END]
        return padded(prompts, image, lambda n, g: {"pixel_values": torch.randn(n, 3, 16, 16, generator=g)}, seed)

    return model, inputs


def gemma3(sliding_window: int = 256, sliding: Sequence[bool] = (True, False, True, False)) -> Built:
    kinds = ["sliding_attention" if local else "full_attention" for local in sliding]
    text = dict(TEXT, head_dim=8, sliding_window=sliding_window, layer_types=kinds, query_pre_attn_scalar=8)
    config = Gemma3Config(
        text_config=Gemma3TextConfig(**text, num_key_value_heads=2),
        vision_config=SiglipVisionConfig(**VISION, image_size=16, patch_size=4),
        mm_tokens_per_image=4,
        image_token_index=IMAGE,
        boi_token_index=START,
        eoi_token_index=END,
    )
    torch.manual_seed(0)
    model = finish(Gemma3ForConditionalGeneration(config))
    torch.nn.init.normal_(
        model.model.multi_modal_projector.mm_input_projection_weight, std=0.3
    )  # the host leaves zeros

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        image = [START, *[IMAGE] * 4, END]
        batch = padded(prompts, image, lambda n, g: {"pixel_values": torch.randn(n, 3, 16, 16, generator=g)}, seed)
        return {**batch, "token_type_ids": (batch["input_ids"] == IMAGE).int()}

    return model, inputs


def paligemma() -> Built:
    config = PaliGemmaConfig(
        text_config=GemmaConfig(**TEXT, num_key_value_heads=2, head_dim=8),
        vision_config=SiglipVisionConfig(**VISION, image_size=16, patch_size=4, projection_dim=32),
        image_token_index=IMAGE,
        projection_dim=32,
        hidden_size=32,
    )
    torch.manual_seed(0)
    model = finish(PaliGemmaForConditionalGeneration(config))

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        batch = padded(
            prompts, [IMAGE] * 16, lambda n, g: {"pixel_values": torch.randn(n, 3, 16, 16, generator=g)}, seed
        )
        return {**batch, "token_type_ids": torch.zeros_like(batch["input_ids"])}

    return model, inputs


FAMILIES: dict[str, Callable[[], Built]] = {
    "llava": llava,
    "llava_next": llava_next,
    "qwen2_vl": qwen2_vl,
    "qwen2_5_vl": qwen2_5_vl,
    "internvl": internvl,
    "gemma3": gemma3,
    "paligemma": paligemma,
}
