# SPDX-License-Identifier: Apache-2.0
"""Real processors of transformers with the special tokens and the form of well-known checkpoints, small and built here.

The vocabularies are small: byte-level BPE, or BPE over characters with byte fallback as in SentencePiece, trained on a few
lines in which line ends merge. Templates are ours, of the same form as the checkpoints'. ``real`` gives a checkpoint's own
template from the folder of shared material, where there is one.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import transformers
from tokenizers import AddedToken, Regex, Tokenizer, decoders, normalizers, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from tests import rows

SHARED = Path(__file__).parents[2] / "shared" / "data" / "templates"
_WORDS = """what is it? which colour has the dog in the image? describe this image in detail. Where is the red cup?
You are a helpful assistant. user assistant system USER: ASSISTANT: User: Assistant: model
How many dogs are there? There are two. He said: hello. Why? A chat between a curious user and an assistant.
It is blue. The answer is no. Yes, there are three cups and a cat on the table."""
_CORPUS = [
    _WORDS,
    _WORDS.lower(),
    _WORDS.replace("\n", "\n\n"),
    _WORDS.replace("\n", "\n\n\n"),
    "\n\n\n\n",
    "a\n\nb\n\n\nc",
    "  a   b",
] * 4
_PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def _byte_level() -> Tokenizer:
    words = Tokenizer(BPE())
    words.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    words.decoder = decoders.ByteLevel()
    words.train_from_iterator(
        _CORPUS, BpeTrainer(vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False)
    )
    return words


def _with_fallback(prefix: bool) -> Tokenizer:
    """Characters with `▁` for a space, bytes for what is not in the vocabulary; a space before the first character, or none."""
    learned = Tokenizer(BPE())
    learned.normalizer = normalizers.Replace(" ", "▁")
    learned.pre_tokenizer = pre_tokenizers.Split(Regex(r"▁*\p{L}+|▁*\p{N}|\n+|▁*[^\p{L}\p{N}▁\n]|▁+"), "isolated")
    learned.train_from_iterator(_CORPUS, BpeTrainer(vocab_size=500, show_progress=False))
    state = json.loads(learned.to_str())["model"]
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
    vocab |= {token: 257 + number for number, token in enumerate(state["vocab"])}
    words = Tokenizer(
        BPE(vocab, [tuple(pair) for pair in state["merges"]], unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    spaces = normalizers.Replace(" ", "▁")
    words.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), spaces]) if prefix else spaces
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    words.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)
    return words


KINDS: dict[str, Callable[[], Tokenizer]] = {
    "bytes": _byte_level,
    "spaces": lambda: _with_fallback(True),
    "pieces": lambda: _with_fallback(False),
}


@functools.cache
def _trained(kind: str) -> str:
    return KINDS[kind]().to_str()


def tokenizer(kind: str, special: Sequence[str], named: Mapping[str, str], **options: Any) -> PreTrainedTokenizerFast:
    """A tokenizer with special tokens, some of which it knows by name (``image_token`` ...)."""
    words = Tokenizer.from_str(_trained(kind))
    every = [
        token
        for token in dict.fromkeys(["<pad>", *special, *named.values(), *options.values()])
        if isinstance(token, str)
    ]
    words.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in every])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, padding_side="left", pad_token="<pad>", extra_special_tokens=dict(named), **options
    )


# Templates. A part of a content: `image`, `video`, or the text.
def _body(image: str, video: str = "", text: str = "part['text']") -> str:
    """One message's content in the order it is given; a plain string as it is."""
    return (
        "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
        f"{{% if part['type'] == 'image' %}}{{{{ '{image}' }}}}"
        f"{{% elif part['type'] == 'video' %}}{{{{ '{video}' }}}}"
        f"{{% else %}}{{{{ {text} }}}}{{% endif %}}{{% endfor %}}{{% endif %}}"
    )


def _images_first(image: str, before: str, after: str) -> str:
    """All images of a message, then its texts."""
    kinds = "message['content'] | selectattr('type', 'equalto', "
    return (
        f"{{% for part in {kinds}'image') %}}{{{{ '{image}' }}}}{{% endfor %}}"
        f"{{% for part in {kinds}'video') %}}{{{{ '<video>' }}}}{{% endfor %}}"
        f"{{% for part in {kinds}'text') %}}{{{{ '{before}' + part['text'] + '{after}' }}}}{{% endfor %}}"
    )


def _chatml(body: str, system: str = "", ask: str = "<|im_start|>assistant\n") -> str:
    default = (
        "{% if loop.first and message['role'] != 'system' %}{{ '<|im_start|>system\n"
        + system
        + "<|im_end|>\n' }}{% endif %}"
    )
    return (
        "{% for message in messages %}"
        + (default if system else "")
        + "{{ '<|im_start|>' + message['role'] + '\n' }}"
        + body
        + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '"
        + ask
        + "' }}{% endif %}"
    )


_VISION = _body("<|vision_start|><|image_pad|><|vision_end|>", "<|vision_start|><|video_pad|><|vision_end|>")
_TRIMMED = _VISION.replace("part['text']", "part['text'] | trim").replace(
    "{{ message['content'] }}", "{{ message['content'] | trim }}"
)


def _thinking(on: bool) -> str:
    """Qwen3.5: thinking is a switch, on or off by default."""
    test = (
        "enable_thinking is defined and enable_thinking is false"
        if on
        else "not (enable_thinking is defined and enable_thinking)"
    )
    ask = (
        "<|im_start|>assistant\n' }}{% if "
        + test
        + " %}{{ '<think>\n\n</think>\n\n' }}{% else %}{{ '<think>\n' }}{% endif %}{{ '"
    )
    return _chatml(_TRIMMED, ask=ask)


VICUNA = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    + _images_first("<image>\n", "", " ")
    + "{% endfor %}{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
ONEVISION = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + ' ' }}"
    + _images_first("<image>", "\n", "")
    + "{{ '<|im_end|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
GEMMA3 = (
    "{{ bos_token }}{% set lead = '' %}{% set rest = messages %}{% if messages[0]['role'] == 'system' %}"
    "{% set first = messages[0]['content'] %}{% set lead = (first if first is string else first[0]['text']) + '\n\n' %}"
    "{% set rest = messages[1:] %}{% endif %}{% for message in rest %}"
    "{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else 'user') + '\n' }}{{ lead if loop.first else '' }}"
    + _body("<start_of_image>", text="part['text'] | trim")
    + "{{ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
GEMMA4 = (
    "{{ bos_token }}{% set think = enable_thinking is defined and enable_thinking %}"
    "{% if think and messages[0]['role'] != 'system' %}{{ '<|turn>system\n<|think|>\n<turn|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|turn>' + ('model' if message['role'] == 'assistant' else message['role']) + '\n' }}"
    "{% if think and message['role'] == 'system' %}{{ '<|think|>\n' }}{% endif %}"
    + _body("<|image|>", "<|video|>", text="part['text'] | trim")
    + "{{ '<turn|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|turn>model\n' }}"
    "{% if not think %}{{ '<|channel>thought\n<channel|>' }}{% endif %}{% endif %}"
)
_IDEFICS = (
    "{% for message in messages %}{{ message['role'].capitalize() }}{% if message['content'][0]['type'] == 'image' %}{{ ':' }}"
    "{% else %}{{ ': ' }}{% endif %}"
    + _body("<image>")
    + "{{ '<end_of_utterance>\n' }}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
PIXTRAL = (
    "{% set rest = messages %}{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] %}"
    "{% set rest = messages[1:] %}{% endif %}{{ bos_token }}{% for message in rest %}"
    "{% if message['role'] == 'user' %}{{ '[INST]' }}"
    "{% if loop.last and system is defined %}{{ system + '\n\n' }}{% endif %}"
    + _body("[IMG]")
    + "{{ '[/INST]' }}{% else %}"
    + _body("[IMG]")
    + "{{ eos_token }}{% endif %}{% endfor %}"
)
MISTRAL3 = (
    "{{ bos_token }}{% for message in messages %}{% if message['role'] == 'system' %}{{ '[SYSTEM_PROMPT]' }}"
    + _body("[IMG]")
    + "{{ '[/SYSTEM_PROMPT]' }}{% elif message['role'] == 'user' %}{{ '[INST]' }}"
    + _body("[IMG]")
    + "{{ '[/INST]' }}{% else %}"
    + _body("[IMG]")
    + "{{ eos_token }}{% endif %}{% endfor %}"
)
NEXT_MISTRAL = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '[INST] ' }}"
    + _images_first("<image>\n", "", " ")
    + "{{ '[/INST]' }}{% elif message['role'] == 'system' %}"
    "{{ '<<SYS>>\n' + message['content'][0]['text'] + '\n<</SYS>>\n\n' }}"
    "{% else %}{% for part in message['content'] %}{{ ' ' + part['text'] + '</s>' }}{% endfor %}{% endif %}{% endfor %}"
)
LLAMA4 = (
    "{{ bos_token }}{% for message in messages %}{{ '<|header_start|>' + message['role'] + '<|header_end|>\n\n' }}"
    + _body("<|image|>", text="part['text'] | trim")
    + "{{ '<|eot|>' }}{% endfor %}{% if add_generation_prompt %}{{ '<|header_start|>assistant<|header_end|>\n\n' }}{% endif %}"
)
GLM4V = (  # a list that is an answer or a system message is written out as Python writes it
    "{{ '[gMASK]<sop>' }}{% for message in messages %}{{ '<|' + message['role'] + '|>\n' }}{% if message['role'] == 'user' %}"
    + _body("<|begin_of_image|><|image|><|end_of_image|>", "<|begin_of_video|><|video|><|end_of_video|>")
    + "{% else %}{{ message['content'] }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
AYA = (
    "{{ bos_token }}{% for message in messages %}{% set who = message['role'] | upper %}"
    "{{ '<|START_OF_TURN_TOKEN|><|' + ('CHATBOT' if who == 'ASSISTANT' else who) + '_TOKEN|>' }}"
    + _body("<image>", text="part['text'] | trim")
    + "{{ '<|END_OF_TURN_TOKEN|>' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}{% endif %}"
)
LFM2 = "{{ bos_token }}" + _chatml(_body("<image>"))
MOLMO2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ '<|im_start|>user\n' }}"
    + _body("<|image|>", "<|video|>")
    + "{{ '<|im_end|>\n' }}{% else %}{{ '<|im_start|>' + message['role'] + '\n' }}"
    + _body("<|image|>")
    + "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint's processor.

    Attributes:
        model_type: of the model.
        kind: its kind of vocabulary.
        template: a chat template of the same form; None = it has none.
        make: ``(tokenizer, template) -> processor``.
        special: special tokens.
        named: those of them that the tokenizer knows by a name.
        options: of the tokenizer.
        shared: name of the real template's file.
        video: whether its processor takes videos.
        config: the model's config that fits, as :func:`tests.rows.build` takes changes; a string is a token whose id is meant.
            None = the stock model cannot be run.
        system: whether its template takes a system message, as a list of parts or as text.
    """

    model_type: str
    kind: str
    template: str | None
    make: Callable[[Any, str | None], Any]
    special: tuple[str, ...] = ()
    named: Mapping[str, str] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    shared: str = ""
    video: bool = False
    system: str = "parts"
    config: Mapping[str, Any] | None = None

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The small tokenizer."""
        return tokenizer(self.kind, self.special, self.named, **self.options)

    def real(self) -> str | None:
        """The checkpoint's own template; None where it is not there."""
        path = SHARED / f"{self.shared}.jinja"
        return path.read_text(encoding="utf-8") if self.shared and path.is_file() else None

    def processor(self, template: str | None = None) -> Any:
        """The processor, with this template instead of ours."""
        return self.make(self.tokenizer(), template or self.template)

    def model(self) -> Any:
        """A tiny model with random weights whose ids and sizes are the processor's."""
        own = self.processor().tokenizer

        def ids(value: Any) -> Any:
            if isinstance(value, Mapping):
                return {key: ids(inner) for key, inner in value.items()}
            return own.convert_tokens_to_ids(value[3:]) if isinstance(value, str) and value.startswith("id:") else value

        text: dict[str, Any] = {"vocab_size": len(own) + 8, "max_position_embeddings": 4096}
        model, _ = rows.build(self.model_type, rows.merged({"text_config": text}, ids(self.config)))
        return model


def _clip(side: int = 28) -> Any:
    return transformers.CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def _llava(own: Any, template: str | None) -> Any:
    return transformers.LlavaProcessor(
        _clip(),
        own,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _next(own: Any, template: str | None) -> Any:
    pinpoints = [[28, 56], [56, 28], [56, 56]]
    images = transformers.LlavaNextImageProcessor(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}, image_grid_pinpoints=pinpoints
    )
    return transformers.LlavaNextProcessor(
        images,
        own,
        patch_size=7,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=template,
    )


def _onevision(own: Any, template: str | None) -> Any:
    size = {"height": 28, "width": 28}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=size, image_grid_pinpoints=[[28, 56], [56, 28], [56, 56]]),
        own,
        transformers.LlavaOnevisionVideoProcessor(size=size),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=template,
    )


def _qwen2(own: Any, template: str | None) -> Any:
    return transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(), own, transformers.Qwen2VLVideoProcessor(), chat_template=template
    )


def _qwen3(own: Any, template: str | None) -> Any:
    return transformers.Qwen3VLProcessor(
        transformers.Qwen2VLImageProcessor(patch_size=16),
        own,
        transformers.Qwen3VLVideoProcessor(),
        chat_template=template,
    )


def _internvl(own: Any, template: str | None) -> Any:
    size = {"height": 28, "width": 28}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, max_patches=6),
        own,
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=4,
        chat_template=template,
    )


def _gemma3(own: Any, template: str | None) -> Any:
    images = transformers.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    return transformers.Gemma3Processor(images, own, image_seq_length=16, chat_template=template)


def _gemma4(own: Any, template: str | None) -> Any:
    return transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(max_soft_tokens=70),
        own,
        transformers.Gemma4VideoProcessor(max_soft_tokens=70),
        image_seq_length=70,
        chat_template=template,
    )


def _idefics3(own: Any, template: str | None) -> Any:
    images = transformers.Idefics3ImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28})
    return transformers.Idefics3Processor(images, own, image_seq_len=4, chat_template=template)


def _smolvlm(own: Any, template: str | None) -> Any:
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(size={"longest_edge": 84}, max_image_size={"longest_edge": 28}),
        own,
        transformers.SmolVLMVideoProcessor(size={"longest_edge": 28}, fps=1, num_frames=4),
        image_seq_len=4,
        chat_template=template,
    )


def _pixtral(own: Any, template: str | None, merge: int = 1) -> Any:
    images = transformers.PixtralImageProcessor(size={"longest_edge": 112}, patch_size={"height": 14, "width": 14})
    return transformers.PixtralProcessor(images, own, patch_size=14, spatial_merge_size=merge, chat_template=template)


def _mistral3(own: Any, template: str | None) -> Any:
    return _pixtral(own, template, merge=2)


def _llama4(own: Any, template: str | None) -> Any:
    images = transformers.Llama4ImageProcessor(size={"height": 56, "width": 56}, max_patches=4)
    return transformers.Llama4Processor(images, own, patch_size=14, pixel_shuffle_ratio=0.5, chat_template=template)


def _glm4v(own: Any, template: str | None) -> Any:
    sizes = {"size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 64}}
    return transformers.Glm4vProcessor(
        transformers.Glm4vImageProcessor(**sizes),
        own,
        transformers.Glm4vVideoProcessor(**sizes),
        chat_template=template,
    )


def _aya(own: Any, template: str | None) -> Any:
    images = transformers.GotOcr2ImageProcessor(size={"height": 56, "width": 56}, crop_to_patches=True, max_patches=6)
    return transformers.AyaVisionProcessor(
        images, own, patch_size=14, img_size=56, downsample_factor=2, chat_template=template
    )


def _paligemma(own: Any, template: str | None) -> Any:
    images = transformers.SiglipImageProcessor(size={"height": 28, "width": 28})
    images.image_seq_length = 16
    return transformers.PaliGemmaProcessor(images, own)


def _lfm2(own: Any, template: str | None) -> Any:
    images = transformers.Lfm2VlImageProcessor(tile_size=64, max_image_tokens=16, min_image_tokens=4, max_tiles=4)
    return transformers.Lfm2VlProcessor(images, own, chat_template=template)


def _molmo2(own: Any, template: str | None) -> Any:
    images = transformers.Molmo2ImageProcessor(size={"height": 56, "width": 56}, max_crops=4, overlap_margins=[1, 1])
    return transformers.Molmo2Processor(
        images, transformers.Molmo2VideoProcessor(size={"height": 56, "width": 56}), own, chat_template=template
    )


_QWEN = ("<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
_TILE = [f"<row_{row}_col_{col}>" for row in range(1, 7) for col in range(1, 7)]
_EOU = ("<image>", "<fake_token_around_image>", "<global-img>", "<end_of_utterance>", *_TILE)
_MISTRAL = ("[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]")
_BOS: Mapping[str, str] = {"bos_token": "<s>", "eos_token": "</s>"}
_GEMMA: Mapping[str, str] = {"bos_token": "<bos>", "eos_token": "<eos>"}

_IMAGE = {"image_token_id": "id:<image>", "image_token_index": "id:<image>"}
_SMALL = {"image_size": 28, "patch_size": 7}
_PINPOINTS = [[28, 56], [56, 28], [56, 56]]
_QWEN_IDS = {"image_token_id": "id:<|image_pad|>", "video_token_id": "id:<|video_pad|>",
             "vision_start_token_id": "id:<|vision_start|>", "vision_end_token_id": "id:<|vision_end|>"}  # fmt: skip
CONFIGS: dict[str, Mapping[str, Any]] = {
    "llava-1.5": _IMAGE | {"vision_config": _SMALL},
    "llava-next-vicuna": _IMAGE | {"vision_config": _SMALL, "image_grid_pinpoints": _PINPOINTS},
    "llava-next-mistral": _IMAGE | {"vision_config": _SMALL, "image_grid_pinpoints": _PINPOINTS},
    "llava-onevision": _IMAGE
    | {"vision_config": _SMALL, "image_grid_pinpoints": _PINPOINTS, "video_token_id": "id:<video>"},
    "qwen2.5-vl": _QWEN_IDS | {"vision_config": {"patch_size": 14, "window_size": 112}},
    "qwen3-vl": _QWEN_IDS | {"vision_config": {"patch_size": 16}},
    "qwen3.5": _QWEN_IDS | {"vision_config": {"patch_size": 16}},
    "qwen3.5-nothink": _QWEN_IDS | {"vision_config": {"patch_size": 16}},
    "internvl3": {
        "image_token_id": "id:<IMG_CONTEXT>",
        "vision_config": {"image_size": [28, 28], "patch_size": [7, 7]},
    },
    "gemma3": {
        "image_token_index": "id:<image_soft_token>",
        "image_token_id": "id:<image_soft_token>",
        "boi_token_index": "id:<start_of_image>",
        "eoi_token_index": "id:<end_of_image>",
        "mm_tokens_per_image": 16,
        "vision_config": {"image_size": 56, "patch_size": 7},
    },
    "gemma4": {
        "image_token_id": "id:<|image|>",
        "video_token_id": "id:<|video|>",
        "vision_config": {"patch_size": 16, "pooling_kernel_size": 3, "position_embedding_size": 256},
    },
    "idefics3": _IMAGE | {"scale_factor": 2, "vision_config": _SMALL},
    "smolvlm": _IMAGE | {"scale_factor": 2, "vision_config": _SMALL},
    "pixtral": {
        "image_token_id": "id:[IMG]",
        "image_token_index": "id:[IMG]",
        "vision_config": {"model_type": "pixtral", "image_size": 112, "patch_size": 14},
        "vision_feature_select_strategy": "full",
    },
    "mistral3": {
        "image_token_id": "id:[IMG]",
        "image_token_index": "id:[IMG]",
        "spatial_merge_size": 2,
        "vision_config": {"image_size": 112, "patch_size": 14},
    },
    "glm-4v": {
        "image_token_id": "id:<|image|>",
        "video_token_id": "id:<|video|>",
        "image_start_token_id": "id:<|begin_of_image|>",
        "image_end_token_id": "id:<|end_of_image|>",
        "video_start_token_id": "id:<|begin_of_video|>",
        "video_end_token_id": "id:<|end_of_video|>",
        "vision_config": {"patch_size": 14},
    },
    "aya-vision": {
        "image_token_id": "id:<|IMG_PATCH|>",
        "image_token_index": "id:<|IMG_PATCH|>",
        "downsample_factor": 2,
        "vision_config": {"image_size": 56, "patch_size": 14},
    },
    "paligemma": _IMAGE | {"vision_config": _SMALL},
}

CHECKPOINTS: dict[str, Checkpoint] = {
    "llava-1.5": Checkpoint("llava", "spaces", VICUNA, _llava, ("<image>",), options=_BOS, shared="llava_vicuna"),
    "llava-next-vicuna": Checkpoint("llava_next", "spaces", VICUNA, _next, ("<image>",), options=_BOS, shared="llava_vicuna"),
    "llava-next-mistral": Checkpoint("llava_next", "spaces", NEXT_MISTRAL, _next, ("<image>",), options=_BOS),
    "llava-onevision": Checkpoint(
        "llava_onevision", "bytes", ONEVISION, _onevision, ("<|im_start|>", "<|im_end|>", "<image>", "<video>"),
        shared="llava_onevision", video=True,
    ),
    "qwen2.5-vl": Checkpoint(
        "qwen2_5_vl", "bytes", _chatml(_VISION, "You are a helpful assistant."), _qwen2, _QWEN,
        shared="trl_qwen2_5_vl", video=True,
    ),
    "qwen3-vl": Checkpoint("qwen3_vl", "bytes", _chatml(_VISION), _qwen3, _QWEN, shared="trl_qwen3_vl", video=True),
    "qwen3.5": Checkpoint("qwen3_5", "bytes", _thinking(True), _qwen3, _QWEN, shared="trl_qwen3_5_think", video=True),
    "qwen3.5-nothink": Checkpoint(
        "qwen3_5", "bytes", _thinking(False), _qwen3, _QWEN, shared="trl_qwen3_5_nothink", video=True
    ),
    "internvl3": Checkpoint(
        "internvl", "bytes", _chatml(_body("<IMG_CONTEXT>\n", "<video>\n")), _internvl,
        ("<|im_start|>", "<|im_end|>"),
        {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>",
         "video_token": "<video>"},
        shared="internvl3", video=True,
    ),
    "gemma3": Checkpoint(
        "gemma3", "pieces", GEMMA3, _gemma3, ("<start_of_turn>", "<end_of_turn>"),
        {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}, _GEMMA, "gemma3",
    ),
    "gemma4": Checkpoint(
        "gemma4", "pieces", GEMMA4, _gemma4, ("<|turn>", "<turn|>", "<|think|>", "<|channel>", "<channel|>", "<|video|>"),
        {"boi_token": "<|image>", "eoi_token": "<image|>", "image_token": "<|image|>", "audio_token": "<|audio|>",
         "boa_token": "<|audio>", "eoa_token": "<audio|>"}, _GEMMA, "gemma4", video=True,
    ),
    "idefics3": Checkpoint(
        "idefics3", "bytes", "{{ '<|begin_of_text|>' }}" + _IDEFICS, _idefics3, ("<|begin_of_text|>", *_EOU),
        options={"bos_token": "<|begin_of_text|>"}, shared="trl_idefics3",
    ),
    "smolvlm": Checkpoint(
        "smolvlm", "bytes", "{{ '<|im_start|>' }}" + _IDEFICS, _smolvlm, ("<|im_start|>", *_EOU),
        {"fake_image_token": "<fake_token_around_image>", "image_token": "<image>",
         "end_of_utterance_token": "<end_of_utterance>", "global_image_token": "<global-img>"},
        {"bos_token": "<|im_start|>"}, "smolvlm",
    ),
    "pixtral": Checkpoint("llava", "bytes", PIXTRAL, _pixtral, _MISTRAL, options=_BOS, shared="pixtral", system="text"),
    "mistral3": Checkpoint("mistral3", "bytes", MISTRAL3, _mistral3, _MISTRAL, options=_BOS),
    "llama4": Checkpoint(
        "llama4", "bytes", LLAMA4, _llama4,
        ("<|header_start|>", "<|header_end|>", "<|eot|>", "<|image|>", "<|patch|>", "<|image_start|>", "<|image_end|>",
         "<|tile_x_separator|>", "<|tile_y_separator|>"), options={"bos_token": "<|begin_of_text|>"},
    ),
    "glm-4v": Checkpoint(
        "glm4v", "bytes", GLM4V, _glm4v,
        ("[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|image|>", "<|video|>", "<|begin_of_image|>",
         "<|end_of_image|>", "<|begin_of_video|>", "<|end_of_video|>"), video=True,
    ),
    "aya-vision": Checkpoint(
        "aya_vision", "bytes", AYA, _aya,
        ("<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>", "<|IMG_PATCH|>", "<|IMG_LINE_BREAK|>", "TILE_GLOBAL", "TILE",
         *(f"TILE_{n}" for n in range(1, 13)), "<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|USER_TOKEN|>",
         "<|CHATBOT_TOKEN|>", "<|SYSTEM_TOKEN|>"), options={"bos_token": "<BOS_TOKEN>"},
    ),
    "lfm2-vl": Checkpoint(
        "lfm2_vl", "bytes", LFM2, _lfm2,
        ("<|im_start|>", "<|im_end|>", *(f"<|img_row_{r}_col_{c}|>" for r in range(1, 5) for c in range(1, 5))),
        {"image_token": "<image>", "image_start_token": "<|image_start|>", "image_end_token": "<|image_end|>",
         "image_thumbnail_token": "<|img_thumbnail|>"}, {"bos_token": "<|startoftext|>"},
    ),
    "molmo2": Checkpoint(
        "molmo2", "bytes", MOLMO2, _molmo2,
        ("<|im_start|>", "<|im_end|>", "<|image|>", "<|video|>", "<im_patch>", "<im_col>", "<im_start>", "<low_res_im_start>",
         "<frame_start>", "<im_end>", "<frame_end>", "<im_low>"), options={"eos_token": "<|endoftext|>"}, video=True,
    ),
    "paligemma": Checkpoint("paligemma", "pieces", None, _paligemma, ("<image>",), options=_GEMMA),
}  # fmt: skip
CHECKPOINTS = {name: dataclasses.replace(one, config=CONFIGS.get(name)) for name, one in CHECKPOINTS.items()}
