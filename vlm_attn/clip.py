# SPDX-License-Identifier: Apache-2.0
"""A CLIP model of open_clip as a second opinion: which parts of a picture have to do with a text."""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn.call import Call
from vlm_attn.chat import tokenizer_of
from vlm_attn.layout import ImageSpan

# What LLaVA's evaluation prompts append to a question to ask for a form of answer.
FORMS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
    "When the provided information is insufficient, respond with 'Unanswerable'.",
)
SENTENCE = re.compile(r"(?<=[.?!])\s+")


def check_clip(method: str, clip: Any) -> None:
    """Refuse what is no name of a CLIP model.

    Raises:
        ValueError: not ``architecture:weights``.
    """
    if not isinstance(clip, str) or not all(clip.partition(":")):
        raise ValueError(f'{method}: clip={clip!r} must be "architecture:weights", such as "ViT-L-14-336:openai"')


def shown(method: str, call: Call, processor: Any) -> list[tuple[int, ImageSpan, Tensor, str]]:
    """What CLIP is shown of a call: of every new picture its number, its span, its colours ``[3, H, W]``, and the question.

    Args:
        method: who asks, for the messages.
        call: the call, while methods check the prompt.
        processor: what was given to ``patch``, or None.

    Raises:
        ValueError: no processor, no ids or no pixels to read.
        NotImplementedError: tiles or flattened patches.
    """
    new = [(n, image) for n, image in enumerate(call.prompt.images) if image.start >= call.first]
    if not new:
        return []
    if processor is None or not hasattr(processor, "image_processor"):
        raise ValueError(f"{method} reads the question and the picture: patch with processor=, the model's processor")
    if call.pixels is None or call.input_ids is None:
        raise ValueError(f"{method} reads the question and the picture: pass input_ids and pixel_values")
    whole = all(i.grid[0] > 1 and i.grid[0] * i.grid[1] == i.stop - i.start for _, i in new)
    if call.pixels.ndim != 4 or len(call.pixels) != len(new) or not whole:
        raise NotImplementedError(
            f"{method} needs pictures that are one block of pixels and one grid of tokens each, got pixel_values "
            f"{list(call.pixels.shape)} for {len(new)} pictures: tiles and flattened patches cannot be shown to CLIP. "
            "Use LLaVA-1.5, Gemma 3 or PaliGemma, or a method without CLIP"
        )
    pixels = natural(call.pixels, processor.image_processor)
    texts = [
        tokenizer_of(processor).decode(call.input_ids[row, start:stop].tolist(), skip_special_tokens=True)
        for row, (start, stop) in enumerate(call.prompt.query)
    ]
    return [(n, image, pixels[place], texts[image.row]) for place, (n, image) in enumerate(new)]


def without_form(text: str) -> str:
    """A question without the note on the form of its answer, if one of :data:`FORMS` ends it; alone, it stays."""
    for form in FORMS:
        text = text.strip().removesuffix(form).strip() or text.strip()
    return text


def natural(pixels: Tensor, image_processor: Any) -> Tensor:
    """Pixel values ``[N, 3, H, W]`` as colours in [0, 1], float32."""
    if not getattr(image_processor, "do_normalize", True):
        return pixels.float()
    mean, std = (pixels.new_tensor(v, dtype=torch.float32)[:, None, None] for v in
                 (image_processor.image_mean, image_processor.image_std))  # fmt: skip
    return (pixels.float() * std + mean).clamp(0, 1)


@lru_cache(maxsize=1)
def load(name: str) -> tuple[Any, Any]:
    """A CLIP model of open_clip in float32, and its tokenizer.

    Raises:
        ImportError: open_clip is not installed.
        ValueError: open_clip cannot make that model.
        NotImplementedError: its image tower has no projection that patches could go through.
    """
    try:
        import open_clip
    except ImportError as error:
        raise ImportError('open_clip is not installed, and CLIP needs it: pip install "vlm-attn[clip]"') from error
    architecture, _, weights = name.partition(":")
    try:
        model = open_clip.create_model(architecture, pretrained=weights).eval().requires_grad_(False)
        tokenizer = open_clip.get_tokenizer(architecture)
    except Exception as error:  # what it raises depends on what is wrong
        raise ValueError(f"clip={name!r} cannot be loaded by open_clip: {error}") from error
    if not isinstance(getattr(model.visual, "proj", None), Tensor):
        raise NotImplementedError(
            f"clip={name!r}: its image tower projects no single patches: choose one of OpenAI's shape, such as ViT-L-14-336"
        )
    return model, tokenizer


@torch.no_grad()
def similarity(name: str, pixels: Tensor, text: str, grid: tuple[int, int], *, cosine: bool = True) -> Tensor:
    """How much every cell of a picture has in common with a text.

    Args:
        name: see :func:`load`.
        pixels: ``[3, H, W]`` colours in [0, 1]; stretched to CLIP's own size.
        text: the text, as one; cut at CLIP's length.
        grid: ``(h, w)`` cells wanted. Where CLIP has another grid, its map is resized (bilinear).
        cosine: the cosine of the two; else the product of the two embeddings as they are.

    Returns:
        ``[h * w]`` float32. A cell is what leaves the block before last of the image tower (the only one, if there is one),
        through the tower's last norm and projection.
    """
    tower, picture, (words,) = _towers(name, pixels, [text], normalize=cosine)
    block = max(0, len(tower.transformer.resblocks) - 2)
    seen = tower.forward_intermediates(picture, indices=[block], normalize_intermediates=True, intermediates_only=True)
    patches = seen["image_intermediates"][0][0].permute(1, 2, 0) @ tower.proj
    return _on_grid((nn.functional.normalize(patches, dim=-1) if cosine else patches) @ words, grid)


def gradient_map(name: str, pixels: Tensor, text: str, grid: tuple[int, int]) -> tuple[Tensor, float]:
    """Which cells of a picture make it like a text: Grad-CAM of the cosine of the two, as a whole.

    The gradient goes to what enters the last block of CLIP's image tower; a cell has the sum over channels of gradient times
    value (not cut at 0: it ranks).

    Args:
        name: see :func:`load`.
        pixels: as in :func:`similarity`.
        text: the text; the cosine is the mean over its sentences.
        grid: as in :func:`similarity`.

    Returns:
        ``[h * w]`` float32, and the cosine.
    """
    inputs: list[Tensor] = []

    def keep(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        inputs.append(args[0].detach().requires_grad_())
        return inputs[0], *args[1:]

    with torch.inference_mode(False), torch.enable_grad():
        tower, picture, words = _towers(name, pixels.clone(), SENTENCE.split(text.strip()))
        hook = tower.transformer.resblocks[-1].register_forward_pre_hook(keep)
        try:
            cosine = (nn.functional.normalize(tower(picture), dim=-1) @ words.T).mean()
        finally:
            hook.remove()
        (slope,) = torch.autograd.grad(cosine, inputs[0])
    cells = (inputs[0].detach() * slope).sum(-1).flatten()[1:]  # without CLS
    return _on_grid(cells.view(tower.grid_size), grid), cosine.item()


def _towers(name: str, pixels: Tensor, texts: list[str], *, normalize: bool = True) -> tuple[Any, Tensor, Tensor]:
    """The image tower, what it is shown ``[1, 3, h, w]``, and the texts ``[n, d]``, of unit length if asked."""
    model, tokenizer = load(name)
    model.to(pixels.device)
    tower: Any = model.visual
    size = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (tower.image_mean, tower.image_std))
    picture = pixels[None]
    if pixels.shape[1:] != size:
        picture = nn.functional.interpolate(picture, size, mode="bicubic", antialias=True)
    words = model.encode_text(tokenizer(texts).to(pixels.device), normalize=normalize)
    return tower, (picture - mean) / std, words


def _on_grid(cells: Tensor, grid: tuple[int, int]) -> Tensor:
    return nn.functional.interpolate(cells[None, None], grid, mode="bilinear", align_corners=False).flatten()
