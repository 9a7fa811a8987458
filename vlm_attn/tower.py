"""What is read of the vision tower: where its CLS token looks, and its keys, as numbers of the image's tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn.families import family_of
from vlm_attn.layout import ImageSpan

if TYPE_CHECKING:
    from vlm_attn.engine import Engine


@dataclass
class VisionHook:
    """Pre-forward hook of one attention module of the vision tower: what the CLS token looks at, and the keys."""

    engine: Engine
    layer: int

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep one attention row and the keys of every image."""
        call = self.engine.call
        if call is None or call.done:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        call.seen.setdefault(self.layer, []).append(cls_attention(module, hidden))


def on_tokens(config: Any, image: ImageSpan, cls: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What was read of an image's patches, ``[tiles, T]`` and ``[tiles, T, d]``, for its tokens: ``[n]`` and ``[n, d]``.

    Raises:
        ValueError: the tower's patches are not the image's tokens.
    """
    place = family_of(config).place
    one, other = place(config, cls[..., None], image.size)[:, 0], place(config, keys, image.size)
    if len(one) != image.stop - image.start:
        raise ValueError(
            f"the vision tower's patches make {len(one)} tokens, the image at columns {image.start}..{image.stop - 1} of row "
            f"{image.row} has {image.stop - image.start}: pass image_sizes as the processor returns them"
        )
    return one, other


def cls_attention(module: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What the CLS token of an attention module of CLIP's shape looks at.

    Args:
        module: with ``q_proj``, ``k_proj``, ``num_heads``, ``head_dim`` and ``scale``, and norms of both where it has them.
        hidden: ``[N, 1 + T, D]`` its input, CLS first.

    Returns:
        ``[N, T]`` attention of CLS to the patches, mean of the heads, and ``[N, T, d]`` keys, mean of the heads.
    """
    split = (len(hidden), -1, module.num_heads, module.head_dim)
    query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    query, key = query.view(split).transpose(1, 2), key.view(split).transpose(1, 2)
    attention = torch.softmax((query @ key.transpose(2, 3)).float() * module.scale, -1)
    return attention[:, :, 0, 1:].mean(1), key[:, :, 1:].float().mean(1)
