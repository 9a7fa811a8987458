# SPDX-License-Identifier: Apache-2.0
"""A small real ``LlavaProcessor`` for the tiny LLaVA: word-level tokenizer, chat templates of two kinds, no download."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Split
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from tests import tiny

WORDS = [
    "USER",
    ":",
    "ASSISTANT",
    "system",
    "user",
    "assistant",
    "<|im_start|>",
    "<|im_end|>",
    "\n",
    ".",
    "?",
    ",",
    "a",
    "chat",
    "between",
    "you",
    "are",
    "helpful",
    "the",
    "and",
    "what",
    "which",
    "where",
    "is",
    "colour",
    "of",
    "dog",
    "cat",
    "cup",
    "red",
    "blue",
    "green",
    "big",
    "small",
    "seven",
    "7",
    "dogs",
    "how",
    "many",
    "two",
    "three",
    "describe",
    "this",
    "image",
    "it",
    "there",
    "sits",
    "runs",
    "quickly",
    "Answer",
]

# The body of both: an image part first becomes "<image>\n", as in the processors of LLaVA.
_PARTS = (
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ '<image>\n' }}"
    "{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
)
VICUNA = (
    "{{ 'a chat between user and assistant . ' }}{% for message in messages %}"
    "{% if message['role'] == 'user' %}{{ 'USER: ' }}" + _PARTS + "{{ ' ' }}"
    "{% else %}{{ 'ASSISTANT: ' }}" + _PARTS + "{{ '</s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATML = (
    "{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\nyou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}" + _PARTS + "{{ '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def tokenizer(image_id: int = tiny.IMAGE, size: int = tiny.VOCAB) -> PreTrainedTokenizerFast:
    vocab = {"<pad>": tiny.PAD, "<s>": tiny.BOS, "</s>": tiny.EOS, "<image>": image_id}
    free = [i for i in range(size) if i not in vocab.values()]
    vocab |= dict(zip([*WORDS, "<unk>"], free, strict=False))
    vocab |= {f"w{i}": i for i in free[len(WORDS) + 1 :]}
    words = Tokenizer(WordLevel(vocab, unk_token="<unk>"))
    pattern = Regex(r"<image>|</s>|<\|[a-z_]+\|>|\n|\w+|[^\w\s]")
    words.pre_tokenizer = Split(pattern, behavior="removed", invert=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>",
        additional_special_tokens=["<image>"], padding_side="left",
    )  # fmt: skip


def processor(template: str | None = VICUNA, **options: Any) -> LlavaProcessor:
    return LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 12}, crop_size={"height": 12, "width": 12}),
        tokenizer(**options),
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def user(text: str, images: int = 0) -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "image"}] * images + [{"type": "text", "text": text}]}


def assistant(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


def picture(shade: int = 0) -> Image.Image:
    pixels = np.random.default_rng(shade).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def encode(own: LlavaProcessor, *chats: list[dict[str, Any]]) -> dict[str, Any]:
    """A left-padded batch of conversations."""
    texts = [own.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    counts = [sum(part["type"] == "image" for turn in chat for part in turn["content"]) for chat in chats]
    images = [[picture(i) for i in range(count)] for count in counts]
    return dict(own(text=texts, images=images if any(counts) else None, padding=True, return_tensors="pt"))
