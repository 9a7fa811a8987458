"""How much every visual token has to do with the question, by CLIP's two towers: for methods whose model has no text side."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from vlm_attn.call import Call
from vlm_attn.chat import tokenizer_of
from vlm_attn.method import Method, ModelFacts
from vlm_attn.reduction import Picture, Reducer

SENTENCE = re.compile(r"(?<=[.?!])\s+")


@dataclass(frozen=True, kw_only=True)
class ClipReducer(Reducer):
    """Base of the methods that ask CLIP what the question is about.

    Attributes:
        clip: ``architecture:weights`` of open_clip; the weights are one of its tags or a file. The default is the CLIP that
            LLaVA-1.5's own tower comes from. It is loaded once per process when a model is patched, on the device of the
            pictures when a prompt runs.

    The picture is taken back from the model's pixel values, so it needs families whose pictures are single blocks of pixels
    and single grids of tokens (LLaVA-1.5, Gemma 3, PaliGemma), and a processor: it tells how pixels were normalised and
    what the question says.
    """

    clip: str = "ViT-L-14-336:openai"

    def check(self) -> None:
        """Check the name as well.

        Raises:
            ValueError: not ``architecture:weights``.
        """
        super().check()
        if not isinstance(self.clip, str) or not all(self.clip.partition(":")):
            raise ValueError(
                f'{self.name}: clip={self.clip!r} must be "architecture:weights", such as "ViT-L-14-336:openai"'
            )

    def bind(self, facts: ModelFacts) -> Method:
        """Load CLIP, so that a wrong name is told when the model is patched."""
        if not self.neutral:
            load(self.clip)
        return super().bind(facts)

    def start(self, call: Call, processor: Any) -> None:
        """Compare the call's pictures with its questions.

        Raises:
            ValueError: no processor, no ids or no pixels to read.
            NotImplementedError: tiles or flattened patches.
        """
        super().start(call, processor)
        new = [(n, image) for n, image in enumerate(call.prompt.images) if image.start >= call.first]
        if not new:
            return
        if processor is None or not hasattr(processor, "image_processor"):
            raise ValueError(
                f"{self.name} reads the question and the picture: patch with processor=, the model's processor"
            )
        if call.pixels is None or call.input_ids is None:
            raise ValueError(f"{self.name} reads the question and the picture: pass input_ids and pixel_values")
        whole = all(i.grid[0] > 1 and i.grid[0] * i.grid[1] == i.stop - i.start for _, i in new)
        if call.pixels.ndim != 4 or len(call.pixels) != len(new) or not whole:
            raise NotImplementedError(
                f"{self.name} needs pictures that are one block of pixels and one grid of tokens each, got pixel_values "
                f"{list(call.pixels.shape)} for {len(new)} pictures: tiles and flattened patches cannot be shown to CLIP. "
                "Use LLaVA-1.5, Gemma 3 or PaliGemma, or a method without CLIP such as divprune"
            )
        pixels = natural(call.pixels, processor.image_processor)
        for place, (number, image) in enumerate(new):
            ids = call.input_ids[image.row, slice(*call.prompt.query[image.row])]
            text = tokenizer_of(processor).decode(ids.tolist(), skip_special_tokens=True)
            similar = similarity(self.clip, pixels[place], text, image.grid)
            call.memory(self).setdefault(number, {})["similarity"] = similar

    def similarity(self, picture: Picture) -> Tensor:
        """``[n]`` cosine of every token's place with the question, in [-1, 1]."""
        return picture.memory["similarity"][picture.places]


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
def similarity(name: str, pixels: Tensor, text: str, grid: tuple[int, int]) -> Tensor:
    """Cosine of every cell of a picture with a text, mean over its sentences.

    Args:
        name: see :func:`load`.
        pixels: ``[3, H, W]`` colours in [0, 1]; stretched to CLIP's own size.
        text: the text; a sentence is cut at CLIP's length.
        grid: ``(h, w)`` cells wanted. Where CLIP has another grid, its map is resized (bilinear).

    Returns:
        ``[h * w]`` float32.
    """
    model, tokenizer = load(name)
    model.to(pixels.device)
    tower: Any = model.visual
    size = tower.image_size if isinstance(tower.image_size, tuple) else (tower.image_size,) * 2
    mean, std = (pixels.new_tensor(v)[:, None, None] for v in (tower.image_mean, tower.image_std))
    shown = (
        nn.functional.interpolate(pixels[None], size, mode="bicubic", antialias=True)
        if pixels.shape[1:] != size
        else pixels[None]
    )
    last = tower.forward_intermediates(
        (shown - mean) / std, indices=1, normalize_intermediates=True, intermediates_only=True
    )
    patches = nn.functional.normalize(last["image_intermediates"][0][0].permute(1, 2, 0) @ tower.proj, dim=-1)
    words = model.encode_text(tokenizer(SENTENCE.split(text.strip())).to(pixels.device), normalize=True)
    cosine = (patches @ words.T).mean(-1)
    return nn.functional.interpolate(cosine[None, None], grid, mode="bilinear", align_corners=False).flatten()
