# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of LLaDA-V, LaViDa and MMaDA as stock Hugging Face models: their keys renamed, none of their code run.

What is read: ``config.json`` and safetensors. What is built: a ``LlavaForConditionalGeneration`` (SigLIP tower, two-layer
projector) over a Llama or Qwen2 text model, or a plain text model for MMaDA, whose pictures are tokens of the prompt.

Not reproduced: how these repositories cut a picture into tiles, pool its tokens and put ``image_newline`` between rows. A
picture is one tile here, so prompts are not those of the papers; nor are their tokenizers and processors loaded.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

_VISION = (
    (r"model\.vision_tower\.vision_tower\.vision_model\.", "model.vision_tower."),
    (r"model\.mm_projector\.0\.", "model.multi_modal_projector.linear_1."),
    (r"model\.mm_projector\.2\.", "model.multi_modal_projector.linear_2."),
)
_LAYERS = ((r"model\.(embed_tokens|layers|norm)\.", r"TEXT.\1."),)
_BLOCKS = (
    (r"model\.transformer\.wte\.", "TEXT.embed_tokens."),
    (r"model\.transformer\.ln_f\.", "TEXT.norm."),
    (r"model\.transformer\.ff_out\.", "lm_head."),
    (r"model\.transformer\.blocks\.(\d+)\.([qkv]_proj)\.", r"TEXT.layers.\1.self_attn.\2."),
    (r"model\.transformer\.blocks\.(\d+)\.attn_out\.", r"TEXT.layers.\1.self_attn.o_proj."),
    (r"model\.transformer\.blocks\.(\d+)\.attn_norm\.", r"TEXT.layers.\1.input_layernorm."),
    (r"model\.transformer\.blocks\.(\d+)\.ff_norm\.", r"TEXT.layers.\1.post_attention_layernorm."),
    (r"model\.transformer\.blocks\.(\d+)\.ff_proj\.", r"TEXT.layers.\1.mlp.gate_proj."),
    (r"model\.transformer\.blocks\.(\d+)\.up_proj\.", r"TEXT.layers.\1.mlp.up_proj."),
    (r"model\.transformer\.blocks\.(\d+)\.ff_out\.", r"TEXT.layers.\1.mlp.down_proj."),
)
_UNUSED = r"model\.image_newline|.*rotary_emb\.inv_freq|model\.vision_tower\..*\.head\..*"


@dataclass(frozen=True)
class Layout:
    """How one project's checkpoints look.

    Attributes:
        keys: (pattern, replacement) at the start of a key; ``TEXT`` is the place of the text model.
        vision: whether there is a vision tower.
        bias: whether queries, keys and values have a bias (Qwen2).
        mask_token_id: where the config names none.
        attention: who saw whom in training.
        shift: whether logits stand one position to the left.
    """

    keys: tuple[tuple[str, str], ...]
    vision: bool
    bias: bool
    mask_token_id: int
    attention: str
    shift: bool = False


LAYOUTS = {
    "llada-v": Layout((*_VISION, *_LAYERS), True, False, 126336, "full"),
    "lavida-llada": Layout((*_VISION, *_BLOCKS), True, False, 126336, "prefix-diffusion"),
    "lavida-dream": Layout((*_VISION, *_LAYERS), True, True, 151666, "prefix-diffusion", shift=True),
    "mmada": Layout(_BLOCKS, False, False, 126336, "full"),
}

# A text config's field, and what else these configs call it.
_FIELDS = {
    "hidden_size": ("d_model",),
    "intermediate_size": ("mlp_hidden_size",),
    "num_hidden_layers": ("n_layers",),
    "num_attention_heads": ("n_heads",),
    "num_key_value_heads": ("n_kv_heads",),
    "max_position_embeddings": ("max_sequence_length",),
    "rms_norm_eps": (),
    "rope_theta": (),
    "pad_token_id": (),
    "bos_token_id": (),
    "eos_token_id": (),
}
#: The tower of SigLIP so400m at 384 pixels without its last layer, as these projects use it.
SIGLIP = {
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_hidden_layers": 26,
    "num_attention_heads": 16,
    "image_size": 384,
    "patch_size": 14,
}


def layout_of(names: list[str]) -> str:
    """The layout that a checkpoint's keys have.

    Raises:
        ValueError: none of them.
    """
    vision = any(name.startswith("model.vision_tower.") for name in names)
    blocks = any(name.startswith("model.transformer.blocks.") for name in names)
    bias = any(re.fullmatch(r"model\.layers\.0\.self_attn\.q_proj\.bias", name) for name in names)
    if blocks:
        return "lavida-llada" if vision else "mmada"
    if vision and any(name.startswith("model.layers.") for name in names):
        return "lavida-dream" if bias else "llada-v"
    raise ValueError(
        f"these are no weights of {', '.join(LAYOUTS)}: the first key is {min(names, default='missing')!r}"
    )


def load(
    folder: str | Path,
    *,
    vision: dict[str, Any] | None = None,
    image_token_id: int | None = None,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """Load a checkpoint of LLaDA-V, LaViDa or MMaDA as a stock model that :func:`generate` knows how to run.

    Args:
        folder: with ``config.json`` and ``*.safetensors``.
        vision: fields of the SigLIP tower's config; default: :data:`SIGLIP`.
        image_token_id: id that stands for an image token in prompts (these projects have none); default: the last row of
            the embedding, which pads it to a round size.
        dtype: of the model.

    Returns:
        The model, in evaluation mode; its config says mask token, mask and shift.

    Raises:
        ValueError: not one of the layouts; keys left over or missing; a file that is broken.
        FileNotFoundError: no such files.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file
    from transformers import (
        LlamaConfig,
        LlamaForCausalLM,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Qwen2Config,
        SiglipVisionConfig,
    )

    folder = Path(folder)
    files = sorted(folder.glob("*.safetensors"))
    if not files or not (folder / "config.json").exists():
        raise FileNotFoundError(f"{folder}: a checkpoint has config.json and *.safetensors")
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{folder / 'config.json'}: not valid JSON ({error})") from error
    weights: dict[str, torch.Tensor] = {}
    for file in files:
        try:
            weights |= load_file(file)
        except SafetensorError as error:
            raise ValueError(f"{file}: cut off or broken ({error})") from error
    name = layout_of(list(weights))
    layout = LAYOUTS[name]
    fields = {
        own: raw[other] for own, others in _FIELDS.items() for other in (*others, own) if raw.get(other) is not None
    }
    if "rope_theta" in fields:
        fields["rope_parameters"] = {"rope_type": "default", "rope_theta": fields.pop("rope_theta")}
    renamed = rename(weights, layout)
    rows = renamed[next(key for key in renamed if key.endswith("embed_tokens.weight"))].shape[0]
    text = (Qwen2Config if layout.bias else LlamaConfig)(vocab_size=rows, tie_word_embeddings=False, **fields)
    told = {
        "mask_token_id": raw.get("mask_token_id", layout.mask_token_id),
        "trained_objective": "masked-diffusion",
        "trained_mask": layout.attention,
        "logit_shift": layout.shift,
    }
    if layout.vision:
        config = LlavaConfig(
            vision_config=SiglipVisionConfig(**(vision or SIGLIP), vision_use_head=False),
            text_config=text,
            image_token_index=rows - 1 if image_token_id is None else image_token_id,
            vision_feature_layer=-1,
            vision_feature_select_strategy="full",
            tie_word_embeddings=False,
            **told,
        )
        model: Any = LlavaForConditionalGeneration(config)
    else:
        text.update(told)
        model = LlamaForCausalLM(text)  # type: ignore[arg-type]
    wanted = model.state_dict()
    inner = "model.vision_tower.vision_model."  # older releases of the host have one module more
    if any(key.startswith(inner) for key in wanted):
        renamed = {re.sub(r"^model\.vision_tower\.", inner, key): tensor for key, tensor in renamed.items()}
    missing = sorted(set(wanted) - set(renamed))
    # The tower's last norm is not read: features are taken before it.
    missing = [key for key in missing if not re.search(r"vision_tower\..*(post_layernorm|head)\.", key)]
    extra = sorted(set(renamed) - set(wanted))
    if missing or extra:
        raise ValueError(f"{folder}, read as {name}: missing {missing[:3]}, left over {extra[:3]}")
    wrong = [key for key, tensor in renamed.items() if tensor.shape != wanted[key].shape]
    if wrong:
        shape = list(wanted[wrong[0]].shape)
        raise ValueError(
            f"{folder}, read as {name}: {wrong[0]} is {list(renamed[wrong[0]].shape)}, its config says {shape}"
        )
    model.load_state_dict(renamed, strict=False)
    return model.to(dtype).eval()


def rename(weights: dict[str, Any], layout: Layout) -> dict[str, Any]:
    """Weights under the host's names; a key without a rule keeps its name."""
    text = "model.language_model" if layout.vision else "model"
    out = {}
    for key, tensor in weights.items():
        if re.fullmatch(_UNUSED, key):
            continue
        for pattern, new in layout.keys:
            key, found = re.subn(f"^{pattern}", new.replace("TEXT", text), key)
            if found:
                break
        out[key] = tensor
    return out
