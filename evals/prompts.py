# SPDX-License-Identifier: Apache-2.0
"""From pictures and texts to model inputs and back."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from vlm_attn.chat import PLAIN_TEMPLATE, has_template

#: Prompts of processors without a chat template, as the checkpoints' model cards write them. Others get `PLAIN_TEMPLATE`.
CARD_TEMPLATES = {
    "PaliGemmaProcessor": "{image}{text}"
}  # the text is a task, such as "answer en Is there a dog?" or "caption en"


def chat_prompt(processor: Any, text: str) -> str:
    """The prompt string of one image and one user text, up to where the answer begins."""
    if has_template(processor):
        return processor.apply_chat_template([_asked(text)], add_generation_prompt=True, tokenize=False)
    kind = type(processor).__name__
    if kind not in CARD_TEMPLATES:
        _say_once(
            f"{kind} has no chat template: prompts have the form {PLAIN_TEMPLATE!r}, which this checkpoint may not know"
        )
    return CARD_TEMPLATES.get(kind, PLAIN_TEMPLATE).format(
        image=getattr(processor, "image_token", "<image>"), text=text
    )


@functools.cache
def _say_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def _asked(text: str, **image: Any) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image", **image}, {"type": "text", "text": text}]}


def tokenized(processor: Any, chats: Sequence[Sequence[Mapping[str, Any]]]) -> Any:
    """A padded batch of conversations with their images, written and tokenised by the processor's chat template."""
    return processor.apply_chat_template(
        [list(chat) for chat in chats],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        processor_kwargs={"padding": True},
    )


def build_inputs(model: Any, processor: Any, images: Sequence[Image.Image], texts: Sequence[str]) -> Any:
    """Inputs of ``model.generate`` for a batch of (image, text) pairs, with the model's device and dtype.

    Args:
        model: gives device and dtype.
        processor: the model's; padding comes on the side its tokenizer says.
        images: one picture per row.
        texts: one user text per row.

    Raises:
        ValueError: not as many texts as images.
    """
    if len(images) != len(texts):
        raise ValueError(f"{len(images)} images but {len(texts)} texts: one of each per row is needed")
    if has_template(processor):
        inputs = tokenized(processor, [[_asked(text, image=image)] for image, text in zip(images, texts, strict=True)])
    else:
        inputs = processor(
            images=[[image] for image in images],
            text=[chat_prompt(processor, text) for text in texts],
            padding=True,
            return_tensors="pt",
        )
    return inputs.to(model.device, model.dtype)


def denoising(model: Any, given: Mapping[str, Any]) -> dict[str, Any] | None:
    """How a masked-diffusion model is to write; None for a model that writes token after token.

    Args:
        model: the model.
        given: options of `vlm_attn.diffusion.generate` that are not None. Others: 32 positions in one block, half as
            many steps, and the prefix cache.

    Raises:
        ValueError: options for a model that has no denoising steps, or that :func:`vlm_attn.diffusion.generate` refuses.
    """
    options = {name: value for name, value in given.items() if value is not None}
    if getattr(model.config, "mask_token_id", None) is None:
        if options:
            names = ", ".join("--" + name.replace("_", "-") for name in options)
            raise ValueError(f"{names}: this model writes token after token; try --model scenes-diffusion")
        return None
    from vlm_attn.diffusion.decoder import Settings, resolve

    length = options.setdefault("gen_length", 32)
    if "threshold" not in options:
        options.setdefault("steps", max(1, length // 2))
    options = {"block_length": length, "cache": "prefix", **options}
    resolve(model, None, Settings(**options))
    return options


def generate(
    model: Any,
    processor: Any,
    images: Sequence[Image.Image],
    texts: Sequence[str],
    max_new_tokens: int,
    denoise: Mapping[str, Any] | None = None,
) -> tuple[list[str], int]:
    """Greedy answers to a batch of (image, text) pairs.

    Args:
        model: the model, patched or not.
        processor: the model's.
        images: one picture per row.
        texts: one user text per row.
        max_new_tokens: length limit of a model that writes token after token.
        denoise: options of `vlm_attn.diffusion.generate` for a model that does not; from :func:`denoising`.

    Returns:
        the answers, stripped of special tokens and outer white space, and how many tokens were generated
        (padding after a finished row not counted).
    """
    import torch

    inputs = build_inputs(model, processor, images, texts)
    tokenizer = processor.tokenizer
    if denoise is None:
        denoise = denoising(model, {})
    if denoise is not None:
        from vlm_attn import diffusion

        written = diffusion.generate(model, inputs, **denoise).answers
        answers = processor.batch_decode(written, skip_special_tokens=True)
        return [answer.strip() for answer in answers], sum(map(len, written))
    with torch.inference_mode():
        output = model.generate(
            **inputs,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            # Sampling settings that a checkpoint brings along would only cause warnings here.
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=tokenizer.pad_token_id,
        )
    new = output[:, inputs["input_ids"].shape[1] :]
    answers = processor.batch_decode(new, skip_special_tokens=True)
    return [answer.strip() for answer in answers], int((new != tokenizer.pad_token_id).sum())
