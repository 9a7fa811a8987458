# SPDX-License-Identifier: Apache-2.0
"""Tiny models of the families of transformers' image-text-to-text mapping, as data: what to change in a config of sizes
that are small already, and what one image looks like.

``ROWS`` holds one row per model type; :func:`build` makes a model and its inputs of it, in the form of ``tests.tiny``.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForImageTextToText

from tests import tiny
from tests.tiny import END, IMAGE, START, VOCAB, Built, Inputs, Prompt

VIDEO = 123
FLAT = "flat"  # the patches of all images one behind the other

# Sizes of every config that has the attribute, of text and vision models apart.
TEXT = {
    **tiny.TEXT,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "init_std": 0.3,
    # mixtures of experts
    "n_routed_experts": 4,
    "num_local_experts": 4,
    "num_experts": 4,
    "moe_num_experts": 4,
    "n_group": 1,
    "topk_group": 1,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "first_k_dense_replace": 1,
    # latent attention
    "kv_lora_rank": 16,
    "q_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 4,
    "v_head_dim": 8,
    # linear attention
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "sliding_window": 256,
}
VISION = {
    **tiny.VISION,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "depth": 2,
    "num_heads": 4,
    "embed_dim": 32,
    "out_hidden_size": 32,
    "projection_dim": 32,
    "image_size": 16,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "initializer_range": 0.1,
}
TOP = {
    "image_token_id": IMAGE,
    "image_token_index": IMAGE,
    "video_token_id": VIDEO,
    "video_token_index": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
    "boi_token_id": START,
    "eoi_token_id": END,
    "boi_token_index": START,
    "eoi_token_index": END,
    "projection_dim": 32,
    "initializer_range": 0.3,
}


@dataclass(frozen=True)
class Row:
    """One family.

    Attributes:
        image: number of image tokens, or the ids an image stands for in a prompt.
        pixels: the inputs that come with the images: a shape is drawn for every image, a list is repeated.
        config: what differs from the small sizes, nested like the config.
        several: whether a prompt may hold several images.
    """

    image: int | Sequence[int] = 4
    pixels: Mapping[str, Any] = field(default_factory=lambda: {"pixel_values": (3, 16, 16)})
    config: Mapping[str, Any] = field(default_factory=dict)
    several: bool = True


def merged(small: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """``small`` with ``changes``, sub-configs within."""
    out = dict(small)
    for key, value in changes.items():
        inner = out.get(key)
        out[key] = merged(inner, value) if isinstance(inner, dict) and isinstance(value, Mapping) else value
    return out


def small(config: Any, sizes: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments for a config of the same class with small sizes."""
    known = config.to_dict()
    out: dict[str, Any] = {name: value for name, value in sizes.items() if known.get(name) is not None}
    for name in ("layer_types", "mlp_layer_types", "layers_block_type"):
        if isinstance(known.get(name), list):
            out[name] = kinds(known[name], out.get("num_hidden_layers", 4))
    for name in config.sub_configs:
        part = getattr(config, name, None)
        if part is not None:
            sizes_of_part = VISION if "vision" in name else TEXT
            out[name] = {**small(part, sizes_of_part), "model_type": part.model_type}
    return out


def kinds(given: list[str], count: int) -> list[str]:
    """The first ``count`` kinds of layers, with the last made to be one that would be missing otherwise."""
    first = given[:count]
    missing = [kind for kind in dict.fromkeys(given) if kind not in first]
    return [*first[:-1], missing[0]] if missing else first


def build(name: str, changes: Mapping[str, Any] | None = None) -> Built:
    """A tiny model of a family, with changes to its config, and the function that makes its inputs."""
    row = ROWS.get(name, Row())
    config_class = CONFIG_MAPPING[name]
    default = config_class()
    flat = not any("text" in part or part in ("encoder", "decoder") for part in default.sub_configs)
    sizes = {**TOP, **TEXT} if flat else {**TOP, "hidden_size": 32, "num_key_value_heads": 2, "vocab_size": VOCAB}
    given = merged(copy.deepcopy(row.config), changes or {})  # a copy: hosts write into the dicts
    config = config_class(**merged(small(default, sizes), given))
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for part in model.parameters():
            if part.ndim > 1 and part.is_floating_point() and not part.any():
                part.normal_(std=0.3)  # the host leaves some at zero, for a checkpoint to fill
    model = tiny.finish(model)
    image = [START, *[IMAGE] * row.image, END] if isinstance(row.image, int) else list(row.image)

    def inputs(prompts: Sequence[Prompt], seed: int = 0) -> Inputs:
        def pixels(n: int, g: torch.Generator) -> Inputs:
            return {
                name: torch.tensor(shape * n)
                if isinstance(shape, list)
                else torch.randn(n * shape[1], *shape[2:], generator=g)
                if shape[0] == FLAT
                else torch.randn(n, *shape, generator=g)
                for name, shape in row.pixels.items()
            }

        batch = tiny.padded(prompts, image, pixels, seed)
        kinds_of_token = (batch["input_ids"] == IMAGE).int()
        for name in ("mm_token_type_ids", "token_type_ids"):
            if name in inspect.signature(model.forward).parameters:
                batch[name] = kinds_of_token
        return batch

    return model, inputs


def patches(width: int, **more: Any) -> dict[str, Any]:
    """4 x 6 patches of one frame, as the Qwen-VL line takes them."""
    return {"pixel_values": (FLAT, 24, width), "image_grid_thw": [[1, 4, 6]], **more}


MROPE = {"rope_parameters": {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}}
QWEN = {"text_config": MROPE}
DEEPSTACK = {**QWEN, "vision_config": {"deepstack_visual_indexes": [0]}}
TILES = {"pixel_values": (1, 3, 16, 16)}
SIZED = {"pixel_values": (3, 16, 16), "image_sizes": [[16, 16]]}
ANYRES = {"pixel_values": (5, 3, 8, 8), "image_sizes": [[16, 16]]}
OMNI = {"vision_start_token_id": START, "vision_end_token_id": END, "audio_config": {"d_model": 32, "encoder_layers": 1,
        "encoder_attention_heads": 4, "encoder_ffn_dim": 48, "output_dim": 32, "downsample_hidden_size": 8}}  # fmt: skip
OPT = {"ffn_dim": 48, "word_embed_proj_dim": 32, "dropout": 0.0}
POSITIONS = [[[x, y] for y in range(4) for x in range(4)]]
GEMMA4 = {"per_layer_config": {}, "hidden_size_per_layer_input": 0}
QUERIES = {"num_hidden_layers": 2, "encoder_hidden_size": 32, "intermediate_size": 48, "hidden_dropout_prob": 0.0}
VQ = {"embed_dim": 8, "num_embeddings": 32, "latent_channels": 8, "base_channels": 32, "channel_multiplier": [1, 1],
      "resolution": 16, "num_res_blocks": 1}  # fmt: skip

# Model type -> what differs. A family whose config has the usual names needs no more than its image.
ROWS: dict[str, Row] = {
    "aria": Row(4, config={"projector_patch_to_query_dict": {16: 4}}),
    "aya_vision": Row(4),
    "blip-2": Row(
        [IMAGE] * 4,
        config={"num_query_tokens": 4, "image_token_index": IMAGE, "qformer_config": QUERIES, "text_config": OPT},
    ),
    "chameleon": Row(
        [IMAGE] * 16,
        config={
            "vq_config": {**VQ, "channel_multiplier": [1, 1, 2]},
            "vocabulary_map": {
                "<image>": IMAGE,
                **{"IMGIMG" + "".join("ABCDEFGHIJ"[int(d)] for d in str(i)) + "Z": 80 + i for i in range(32)},
            },
        },
    ),
    "cohere2_vision": Row(4, config={"alignment_intermediate_size": 64}),
    "cohere_compass": Row(
        6,
        patches(96),
        {
            **DEEPSTACK,
            "text_config": {
                "rope_parameters": {"full_attention": MROPE["rope_parameters"]},
                "layer_types": ["full_attention"] * 4,
            },
        },
    ),
    "cosmos3_edge": Row(6, patches(48), {**QWEN, "projector_hidden_size": 64}),
    "cosmos3_omni": Row(6, patches(96), DEEPSTACK),
    "deepseek_vl": Row(16, config={"vision_config": {"num_hidden_layers": 2}}),
    "deepseek_vl_hybrid": Row(
        16,
        {"pixel_values": (3, 16, 16), "high_res_pixel_values": (3, 64, 64)},
        {
            "high_res_vision_config": {
                "image_size": 64,
                "patch_size": 4,
                "output_channels": 16,
                "mlp_dim": 32,
                "global_attn_indexes": [1],
                "window_size": 4,
            }
        },
    ),
    "ernie4_5_vl_moe": Row(
        6,
        patches(48),
        {
            "text_config": {
                "rope_parameters": {**MROPE["rope_parameters"], "mrope_section": [1, 1, 2]},
                "moe_intermediate_size": [16, 16],
                "moe_k": 2,
            }
        },
    ),
    "exaone4_5": Row(6, patches(96)),
    "fuyu": Row([IMAGE] * 16, {"image_patches": (16, 48)}, {"patch_size": 4, "image_size": 16}),
    "gemma3": Row(4, config={"mm_tokens_per_image": 4}),
    "shieldgemma2": Row(4, config={"mm_tokens_per_image": 4}),
    "glm46v": Row(6, patches(96), QWEN),
    "glm4v": Row(6, patches(96), QWEN),
    "glmga": Row(6, patches(96), QWEN),
    "glm4v_moe": Row(6, patches(96), {"text_config": {**MROPE, "head_dim": 16}}),
    "glm_ocr": Row(6, patches(96), QWEN),
    "got_ocr2": Row(4, {"pixel_values": (3, 32, 32)}, {"vision_config": {"image_size": 32}}),
    "pp_chart2table": Row(4, {"pixel_values": (3, 32, 32)}, {"vision_config": {"image_size": 32}}),
    "hyperclovax_vision_v2": Row(6, patches(96), {"vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}}),
    "idefics2": Row(
        4,
        TILES,
        {
            "perceiver_config": {
                "resampler_n_latents": 4,
                "resampler_depth": 1,
                "resampler_n_heads": 2,
                "resampler_head_dim": 8,
            }
        },
    ),
    "idefics3": Row(4, TILES),
    "smolvlm": Row(4, TILES),
    "granite_docling": Row(
        4, {"pixel_values": (1, 3, 32, 32), "pixel_attention_mask": [[True]]}, {"vision_config": {"image_size": 32}}
    ),
    "internvl": Row(4),
    "qianfan_ocr": Row(4),
    "janus": Row(
        16,
        config={
            "vision_config": {"num_image_tokens": 16},
            "vq_config": {**VQ, "num_patches": 4, "projection_dim": 32, "image_token_embed_dim": 32},
        },
    ),
    "lfm2_vl": Row(
        4,
        {"pixel_values": (16, 48), "spatial_shapes": [[4, 4]], "pixel_attention_mask": [[1] * 16]},
        {"text_config": {"layer_types": ["conv", "full_attention", "conv", "full_attention"]}},
    ),
    "lfm3_vl": Row(6, patches(96)),
    "lighton_ocr": Row(4, SIZED),
    "llava": Row(16, config={"vision_feature_layer": -1}),
    "vipllava": Row(16, config={"vision_feature_layer": [-1, -2]}),
    "llava_next": Row(
        24, ANYRES, {"vision_config": {"image_size": 8}, "image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1}
    ),
    "llava_next_video": Row(
        24, ANYRES, {"vision_config": {"image_size": 8}, "image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1}
    ),
    "llava_onevision": Row(
        24, ANYRES, {"vision_config": {"image_size": 8}, "image_grid_pinpoints": [[16, 16]], "vision_feature_layer": -1}
    ),
    "minimax_m3_vl": Row(6, patches(96)),
    "mistral3": Row(4, SIZED),
    "mistral_large4": Row(4, SIZED, {"text_config": {"num_key_value_heads": 4}}),
    "muse_glimmer": Row(6, patches(96), {"out_hidden_size": 128, "projector_hidden_size": 32}),
    "ovis2": Row(16),
    "paddleocr_vl": Row(6, {**patches(48), "pixel_values": (FLAT, 24, 3, 4, 4)}, QWEN),
    "paligemma": Row(16),
    "qwen2_5_omni_thinker": Row(
        6, patches(96), {**QWEN, **OMNI, "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}}
    ),
    "qwen2_5_vl": Row(6, patches(96), {**QWEN, "vision_config": {"window_size": 16, "fullatt_block_indexes": [1]}}),
    "qwen2_vl": Row(6, patches(96), QWEN),
    "qwen3_5": Row(6, patches(96), QWEN),
    "qwen3_5_moe": Row(6, patches(96), QWEN),
    "qwen3_omni_moe_thinker": Row(6, patches(96), {**DEEPSTACK, **OMNI}),
    "qwen3_vl": Row(6, patches(96), DEEPSTACK),
    "qwen3_vl_moe": Row(6, patches(96), DEEPSTACK),
    "step3p7": Row(
        4, {"pixel_values": (3, 32, 32)}, {"text_config": {"sliding_window": 256}, "vision_config": {"image_size": 32}}
    ),
    "video_llama_3": Row(24, patches(48, image_merge_sizes=[1])),
    "video_llava": Row(16, {"pixel_values_images": (3, 16, 16)}, {"vision_feature_layer": -1}),
    "instructblip": Row(
        [IMAGE] * 4,
        {"pixel_values": (3, 16, 16), "qformer_input_ids": [[3, 4, 5]], "qformer_attention_mask": [[1, 1, 1]]},
        {"num_query_tokens": 4, "image_token_index": IMAGE, "qformer_config": QUERIES, "text_config": OPT},
    ),
    "gemma4": Row(
        4,
        {"pixel_values": (16, 48), "image_position_ids": POSITIONS},
        {
            "text_config": GEMMA4,
            "vision_config": {
                "model_type": "gemma4_vision",
                **VISION,
                "position_embedding_size": 16,
                "pooling_kernel_size": 2,
            },
        },
    ),
    "diffusion_gemma": Row(
        4,
        {"pixel_values": (16, 48), "image_position_ids": POSITIONS},
        {
            "canvas_length": 6,
            "text_config": {
                **{"per_layer_config": {}, "global_head_dim": 8, "top_k_experts": 2, "moe_intermediate_size": 16},
                "num_experts": 4,
            },
            "vision_config": {"position_embedding_size": 16, "pooling_kernel_size": 2, **VISION},
        },
    ),
    "mllama": Row(
        [IMAGE],
        {"pixel_values": (1, 1, 3, 16, 16), "aspect_ratio_ids": [[1]], "aspect_ratio_mask": [[[1]]]},
        {"text_config": {"cross_attention_layers": [1, 3]}},
        several=False,
    ),
    "git": Row(4),
    "blip": Row(4),
    "kosmos-2": Row(4),
    "instructblipvideo": Row(4),
    "kosmos-2.5": Row(4),
    "idefics": Row(4),
    "mistral4": Row(4),
    "pix2struct": Row(4),
    "udop": Row(4),
    "vision-encoder-decoder": Row(4),
    "pp_formulanet": Row(
        4,
        config={
            "text_config": {
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "decoder_ffn_dim": 48,
                "decoder_attention_heads": 4,
                "encoder_attention_heads": 4,
            }
        },
    ),
    "t5gemma2": Row(4, config={"encoder": {"mm_tokens_per_image": 4}}),
    "florence2": Row(
        4,
        config={
            "vision_config": {
                "patch_size": [7, 3, 3, 3],
                "embed_dim": [8, 8, 8, 8],
                "num_heads": [2] * 4,
                "num_groups": [2] * 4,
                "depths": [1] * 4,
            },
            "text_config": {
                "d_model": 32,
                "encoder_layers": 2,
                "decoder_layers": 2,
                "encoder_ffn_dim": 48,
                "decoder_ffn_dim": 48,
                "decoder_attention_heads": 4,
                "encoder_attention_heads": 4,
            },
        },
    ),
}

# Model type -> why it is not built.
TIMM = "its vision tower is a timm model of full size"
MISSING: dict[str, str] = {
    "evolla": "it takes proteins, not images, and the mapping cannot build it",
    "fast_vlm": TIMM,
    "gemma3n": TIMM,
    "llama4": "stock transformers fails on a forward with an image (AttributeError: image_outputs; seen with 5.24)",
    "perception_lm": TIMM,
    "pi0": "a robot policy: it generates actions, no text",
}
