# SPDX-License-Identifier: Apache-2.0
"""Words of the scenes world: prompts, conversations, and the tokenizer and processor of its model.

The tokenizer is word-level: lower case, punctuation apart, one token per category name even where the name has
two words ("tennis racket"), and one per role tag ("user:"). What it does not know is `<unk>`.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from .world import CAPTIONS, CATEGORIES, COMPANION_NOISE, CONTEXTS, Draw, Scene, caption

if TYPE_CHECKING:
    from transformers import LlavaProcessor, PreTrainedTokenizerFast

CAPTION_PROMPTS = (
    "Please describe this image in detail.",
    "Please help me describe the image in detail.",
    "Describe this image in detail.",
    "Describe the image.",
    "Describe this image.",
    "What is in the image?",
    "What is in this image?",
)
# The first is POPE's own wording.
QUESTIONS = (
    "Is there {a} {noun} in the image?",
    "Is there {a} {noun} in this image?",
    "Do you see {a} {noun} in the image?",
)
SUFFIXES = (
    " Please answer yes or no.",
    " Please answer this question with one word.",
    " Please answer the question with yes or no.",
    " Answer yes or no.",
    " Answer the question using a single word or phrase.",
)
SYSTEM = "You are a helpful assistant that can see images."
BACKGROUND = "background"  # the word of picture patches that show no object

# The manner of LLaVA-1.5, with the end token after every answer.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}"
    "{% endif %}{{ '</s>' if message['role'] == 'assistant' else ' ' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
_SPECIAL = ("<pad>", "<s>", "</s>", "<unk>", "<image>")
_ROLES = ("user:", "assistant:")


def vocabulary(mask_token: bool = False) -> list[str]:
    """Return all tokens in the order of their ids: special, roles, punctuation, categories, other words.

    With `mask_token` there is `<mask>` behind them all; the other ids stay the same.
    """
    sentences = [*CAPTION_PROMPTS, *QUESTIONS, *SUFFIXES, *CAPTIONS, *CONTEXTS, SYSTEM, BACKGROUND]
    sentences.append("a an the and yes no not it picture photo scene there is are any can you tell me what")
    words = sorted(set(re.findall(r"[a-z]+", re.sub(r"{\w+}", "", " ".join(sentences).lower()))))
    tokens = [*_SPECIAL, *_ROLES, ".", ",", "?", ":", "!", "'", '"', *CATEGORIES, *words]
    return list(dict.fromkeys(tokens)) + ["<mask>"] * mask_token


def build_tokenizer(mask_token: bool = False) -> PreTrainedTokenizerFast:
    """Return the tokenizer: BOS in front, left padding; with `<mask>` for masked-diffusion models."""
    from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    tokens = vocabulary(mask_token)
    tokenizer = Tokenizer(models.WordLevel({t: i for i, t in enumerate(tokens)}, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Lowercase(), normalizers.Replace(Regex(r"\s+"), " ")]  # type: ignore[list-item]
    )
    # Longer names first: "hot dog" before "dog".
    names = "|".join(sorted((c for c in CATEGORIES if " " in c), key=len, reverse=True))
    pattern = rf"\b(?:user|assistant):|\b(?:{names})\b|\w+|[^\w\s]"
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(pattern), "removed", invert=True)
    # This decoder puts a space between tokens and takes it out again before punctuation.
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", tokens.index("<s>"))]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens={"image_token": "<image>"},
        **({"mask_token": "<mask>"} if mask_token else {}),
        padding_side="left",
        model_max_length=1024,
        clean_up_tokenization_spaces=False,
    )


def build_processor(image_size: int = 112, patch_size: int = 14, mask_token: bool = False) -> LlavaProcessor:
    """Return the processor: pictures become squares of `image_size`, `<image>` one token per patch.

    `mask_token`: see `build_tokenizer`.
    """
    from transformers import LlavaProcessor
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    images = CLIPImageProcessorPil(
        size={"shortest_edge": image_size},
        crop_size={"height": image_size, "width": image_size},
        resample=2,  # bilinear
        image_mean=[0.5, 0.5, 0.5],
        image_std=[0.25, 0.25, 0.25],
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=build_tokenizer(mask_token),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # the class token, which "default" then drops
        chat_template=CHAT_TEMPLATE,
    )


def with_article(noun: str) -> str:
    """Return "a" or "an" and the noun."""
    return ("an " if noun[0] in "aeiou" else "a ") + noun


def question(noun: str, template: str = QUESTIONS[0]) -> str:
    """Return a yes/no question about a category."""
    return template.format(a="an" if noun[0] in "aeiou" else "a", noun=noun)


def training_turns(scene: Scene, questions: int = 8) -> list[tuple[str, str]]:
    """Return (prompt, answer) pairs of one scene: a caption and some yes/no questions, in random order.

    The caption names all objects and, at the rate `COMPANION_NOISE`, absent companions: cause (a) of the world.
    Half of the answers are "yes"; half of the "no" questions ask for an absent companion.
    """
    draw = Draw("turns", scene.split, scene.index)
    present = scene.categories
    companions = [c for c in CONTEXTS[scene.context] if c not in present]
    noise = [c for c in companions if draw.chance(COMPANION_NOISE)]
    named = draw.shuffled(present + noise)
    turns = [(draw.choice(CAPTION_PROMPTS), caption(draw, scene.context, named))]
    absent = [c for c in CATEGORIES if c not in present]
    for _ in range(questions):
        if draw.chance(0.5):
            noun, answer = draw.choice(present), "yes"
        else:
            noun, answer = draw.choice(companions if companions and draw.chance(0.5) else absent), "no"
        template = QUESTIONS[0] if draw.chance(0.8) else draw.choice(QUESTIONS)
        suffix = draw.choice(SUFFIXES) if draw.chance(0.3) else ""
        turns.append((question(noun, template) + suffix, answer))
    return draw.shuffled(turns)


def messages(prompt: str, image: Any = None, system: str | None = None) -> list[dict]:
    """Return a one-turn conversation for `processor.apply_chat_template`, with a picture or a place for one."""
    picture = {"type": "image"} if image is None else {"type": "image", "image": image}
    user = {"role": "user", "content": [picture, {"type": "text", "text": prompt}]}
    return [user] if system is None else [{"role": "system", "content": [{"type": "text", "text": system}]}, user]
