# SPDX-License-Identifier: Apache-2.0
"""Tiny checkpoints written in the layouts of LLaDA-V, LaViDa and MMaDA load as stock models with the same numbers."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

from vlm_attn import diffusion

TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "initializer_range": 0.3,
    "tie_word_embeddings": False,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 12,
    "patch_size": 4,
}
# What LLaDA calls the parts of a layer; the host's name, then its own.
BLOCK = {
    "self_attn.q_proj": "q_proj",
    "self_attn.k_proj": "k_proj",
    "self_attn.v_proj": "v_proj",
    "self_attn.o_proj": "attn_out",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ff_norm",
    "mlp.gate_proj": "ff_proj",
    "mlp.up_proj": "up_proj",
    "mlp.down_proj": "ff_out",
}
LLADA_CONFIG = {"d_model": 32, "mlp_hidden_size": 48, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2}


def original(name):
    torch.manual_seed(0)
    if name == "mmada":
        return LlamaForCausalLM(LlamaConfig(**TEXT)).eval()
    text = (Qwen2Config if name == "lavida-dream" else LlamaConfig)(**TEXT)
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**VISION, vision_use_head=False),
        text_config=text,
        image_token_index=63,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config).eval()


def foreign(key, blocks):
    """The name a project gives to one of the host's weights, None for what it does not have."""
    if "post_layernorm" in key:
        return None
    key = re.sub(r"^model\.vision_tower\.(vision_model\.)?", "model.vision_tower.vision_tower.vision_model.", key)
    key = key.replace("model.multi_modal_projector.linear_1.", "model.mm_projector.0.")
    key = key.replace("model.multi_modal_projector.linear_2.", "model.mm_projector.2.")
    key = key.replace("model.language_model.", "model.")
    if blocks and not key.startswith(("model.vision", "model.mm")):
        key = key.replace("model.embed_tokens", "model.transformer.wte").replace("lm_head", "model.transformer.ff_out")
        key = re.sub(r"^model\.norm", "model.transformer.ln_f", key)
        for ours, theirs in BLOCK.items():
            key = re.sub(rf"^model\.layers\.(\d+)\.{re.escape(ours)}\.", rf"model.transformer.blocks.\1.{theirs}.", key)
    return key


def write(model, name, folder):
    blocks = name in ("lavida-llada", "mmada")
    weights = {new: t.clone() for key, t in model.state_dict().items() if (new := foreign(key, blocks))}
    if name != "mmada":
        weights["model.image_newline"] = torch.zeros(32)
    save_file(weights, folder / "model.safetensors")
    sizes = LLADA_CONFIG if blocks else {k: v for k, v in TEXT.items() if k not in ("vocab_size", "initializer_range")}
    ids = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "mask_token_id": 62}
    (folder / "config.json").write_text(json.dumps({**sizes, **ids, "rope_theta": 10000.0}))
    return weights


@pytest.mark.parametrize("name", diffusion.LAYOUTS)
def test_loads_with_the_same_numbers(name, tmp_path):
    model = original(name)
    write(model, name, tmp_path)
    loaded = diffusion.load(tmp_path, vision=VISION)
    layout = diffusion.LAYOUTS[name]
    ids = torch.tensor([[1, *([63] * 9 if layout.vision else [40, 41, 42]), 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if layout.vision:
        inputs["pixel_values"] = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs).logits, model(**inputs).logits)
    own = diffusion.generate(loaded, inputs, steps=4, gen_length=4)
    given = {"mask_id": 62, "attention": layout.attention, "logit_shift": layout.shift}
    assert own.tokens.tolist() == diffusion.generate(model, inputs, steps=4, gen_length=4, **given).tokens.tolist()
    if layout.attention == "prefix-diffusion":
        cached = diffusion.generate(loaded, inputs, steps=4, gen_length=4, cache="prefix")
        assert cached.tokens.tolist() == own.tokens.tolist()


def test_wrong_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"config\.json"):
        diffusion.load(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    save_file({"bert.weight": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="no weights of llada-v, lavida-llada"):
        diffusion.load(tmp_path)
    weights = write(original("llada-v"), "llada-v", tmp_path)
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file({**weights, "model.strange": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"read as llada-v: missing \['model.*up_proj.*left over \['model.strange"):
        diffusion.load(tmp_path, vision=VISION)
