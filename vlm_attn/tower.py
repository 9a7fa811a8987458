# SPDX-License-Identifier: Apache-2.0
"""What is read of the vision tower (where its CLS token looks, its keys), and merging tokens inside it.

Merged tokens are put back on all their patches behind the tower, so that the host finds as many features as the prompt has
places; before the language model one of them stays, as with any other reducer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlm_attn.families import family_of
from vlm_attn.layout import ImageSpan
from vlm_attn.method import Wide
from vlm_attn.reduction import FEATURES, MERGED, Reducer, kept_count

if TYPE_CHECKING:
    from vlm_attn.engine import Engine


@dataclass
class VisionHook:
    """Pre-forward hook of one attention module of the vision tower: what the CLS token looks at, and the keys."""

    engine: Engine
    layer: int | Wide

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep one attention row and the keys of every image."""
        call = self.engine.call
        if call is None or call.done:
            return
        hidden = args[0] if args else kwargs["hidden_states"]
        call.seen.setdefault(self.layer, []).append(cls_attention(module, hidden, wide=isinstance(self.layer, Wide)))


class FeatureHook:
    """Hooks of the projector, and of the tower's layer it gets its features from: these features, and the CLS token's."""

    def __init__(self, engine: Engine, projector: nn.Module, layer: nn.Module | None) -> None:
        self.engine = engine
        self.cls: Tensor | None = None  # [N, 1, d] of the tower's latest run
        self.handles = [projector.register_forward_pre_hook(self.read, with_kwargs=True)]
        if layer is not None:
            self.handles.append(layer.register_forward_hook(self.read_cls))

    def read_cls(self, module: nn.Module, args: Any, output: Any) -> None:
        """Behind the layer whose output is projected."""
        self.cls = (output[0] if isinstance(output, tuple) else output)[:, :1]

    def read(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Before the projector."""
        call, cls, self.cls = self.engine.call, self.cls, None
        if call is None or call.done:
            return
        features = args[0] if args else next(iter(kwargs.values()))
        cls = features.new_zeros(len(features), 0, features.shape[2]) if cls is None else cls
        call.seen.setdefault(FEATURES, []).append((cls, features))


def on_tokens(config: Any, image: ImageSpan, cls: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
    """What was read of an image's patches, ``[tiles, T]`` and ``[tiles, T, d]``, for its tokens: ``[n]`` and ``[n, d]``.

    Raises:
        ValueError: the tower's patches are not the image's tokens.
    """
    place = family_of(config).place
    one, other = place(config, cls[..., None], image.size)[:, 0], place(config, keys, image.size)
    if len(one) != image.total:
        raise ValueError(
            f"the vision tower's patches make {len(one)} tokens, the image at columns {image.start}..{image.stop - 1} of row "
            f"{image.row} has {image.total}: pass image_sizes as the processor returns them"
        )
    return one, other


def features_on_tokens(config: Any, image: ImageSpan, features: Tensor) -> Tensor:
    """What the projector was given of an image, ``[tiles, T, d]``, for its tokens: ``[n, d]``; zeros for a newline."""
    if features.shape[0] * features.shape[1] == image.total:
        return features.flatten(0, 1)
    return family_of(config).place(config, features, image.size)


def cls_attention(module: Any, hidden: Tensor, *, wide: bool = False) -> tuple[Tensor, Tensor]:
    """What the CLS token of an attention module of CLIP's shape looks at.

    Args:
        module: with ``q_proj``, ``k_proj``, ``num_heads``, ``head_dim`` and ``scale``, and norms of both where it has them.
        hidden: ``[N, 1 + T, D]`` its input, CLS first.
        wide: one softmax over the full width, as if there were one head.

    Returns:
        ``[N, T]`` attention of CLS to the patches, mean of the heads, and ``[N, T, d]`` keys, mean of the heads (``wide``:
        ``[N, T, D]``, all of them).
    """
    split = (len(hidden), -1, module.num_heads, module.head_dim)
    query, key = module.q_proj(hidden[:, :1]), module.k_proj(hidden)
    if hasattr(module, "q_norm"):
        query, key = module.q_norm(query), module.k_norm(key)
    if wide:
        logits = (query.float() @ key.float().transpose(1, 2)) * key.shape[2] ** -0.5
        return torch.softmax(logits, -1)[:, 0, 1:], key[:, 1:].float()
    query, key = query.view(split).transpose(1, 2), key.view(split).transpose(1, 2)
    attention = torch.softmax((query @ key.transpose(2, 3)).float() * module.scale, -1)
    return attention[:, :, 0, 1:].mean(1), key[:, :, 1:].float().mean(1)


def descent(tokens: int, count: int, layers: int) -> list[int]:
    """Tokens left behind every layer on the way from ``tokens`` to ``count``: the same number goes in each, at most half.

    Raises:
        ValueError: so many cannot go in so few layers.
    """
    if count * 2**layers < tokens:
        least = -(-tokens // 2**layers)
        raise ValueError(
            f"{count} of {tokens} tokens cannot be left: each of the vision tower's {layers} layers merges at most half. "
            f"Keep at least {least} ({least / tokens:.3g})"
        )
    return [
        min(round(tokens - (tokens - count) * (layer + 1) / layers), count * 2 ** (layers - 1 - layer))
        for layer in range(layers)
    ]


class Merger:
    """Hooks of a vision tower that merge its tokens layer by layer. One run at a time: calls of an engine take turns.

    Every token knows how many it stands for, and attention to it gets the bias ``log size``. What is merged becomes the mean
    of the tokens it stands for.
    """

    def __init__(self, engine: Engine, tower: nn.Module, layers: Sequence[Any], first: bool) -> None:
        self.engine = engine
        self.first = int(first)
        self.layers = len(layers)
        self.method: Reducer | None = None  # that merges in the run that goes on
        self.left: list[int] = []  # tokens behind every layer, the CLS token aside
        self.keys: Tensor | None = None  # [N, T, H d] of the layer that runs
        self.size: Tensor | None = None  # [N, T] how many each token stands for; None = 1
        self.seat: Tensor | None = None  # [N, T] place that each token had
        self.owner: Tensor | None = None  # [N, T0] which of the tokens that are there stands for a place
        self.handles = [
            tower.register_forward_pre_hook(self.begin, with_kwargs=True),
            tower.register_forward_hook(self.end, with_kwargs=True),
        ]
        for index, layer in enumerate(layers):
            self.handles += [
                layer.self_attn.register_forward_pre_hook(self.weigh, with_kwargs=True),
                layer.self_attn.k_proj.register_forward_hook(self.read_keys),
                # before the host notes its output
                layer.register_forward_hook(partial(self.merge, index), prepend=True),
            ]

    def begin(self, module: Any, args: Any, kwargs: Any) -> None:
        """Before the tower: how many tokens every layer leaves."""
        call = self.engine.call
        self.method = self.size = self.seat = self.owner = None
        methods = call.methods if call is not None else ()  # without a cache some hosts run the tower at every step
        method = next((m for m in methods if isinstance(m, Reducer) and m.merges), None)
        if call is None or method is None or not call.prompt.images:
            return
        patches = (module.config.image_size // module.config.patch_size) ** 2
        total = max(image.total for image in call.prompt.images)
        share = method.keep / total if isinstance(method.keep, int) else method.keep
        self.left = descent(patches, kept_count(share, patches), self.layers)
        self.method = method

    def weigh(self, module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]] | None:
        """Before a layer's attention: the bias ``log size`` of its keys."""
        if self.size is None or self.method is None:
            return None
        dtype = (args[0] if args else kwargs["hidden_states"]).dtype
        return args, {**kwargs, "attention_mask": self.size.log()[:, None, None].to(dtype)}

    def read_keys(self, module: Any, args: Any, output: Tensor) -> None:
        """Behind a layer's key projection."""
        self.keys = output if self.method is not None else None

    def merge(self, index: int, module: Any, args: Any, output: Tensor) -> Tensor | None:
        """Behind a layer: merge what is most alike."""
        if self.method is None:
            return None
        count = output.shape[1] - self.first - self.left[index]
        if count <= 0:
            return None
        assert self.keys is not None
        keys = self.keys.unflatten(2, (module.self_attn.num_heads, -1)).float().mean(2)
        goes, into = (i + self.first for i in self.method.pairs(keys[:, self.first :], count))
        batch, length = output.shape[:2]
        if self.size is None:
            self.size = output.new_ones(batch, length, dtype=torch.float32)
            self.seat = self.owner = torch.arange(length, device=output.device).expand(batch, -1)
        assert self.seat is not None
        assert self.owner is not None
        total = self.size.scatter_add(1, into, self.size.gather(1, goes))
        sums = output.float() * self.size[..., None]
        wide = goes[..., None].expand(-1, -1, output.shape[2])
        sums = sums.scatter_add(1, into[..., None].expand_as(wide), sums.gather(1, wide))
        stays = torch.ones_like(total, dtype=torch.bool).scatter(1, goes, False)
        kept = stays.nonzero()[:, 1].view(batch, -1)
        place = stays.cumsum(1) - 1  # among those that stay
        place = place.scatter(1, goes, place.gather(1, into))
        self.owner = place.gather(1, self.owner)
        self.seat, self.size = self.seat.gather(1, kept), total.gather(1, kept)
        merged = sums.gather(1, kept[..., None].expand(-1, -1, output.shape[2])) / self.size[..., None]
        untouched = self.size == 1  # stay as they are, to the bit
        return torch.where(
            untouched[..., None], output.gather(1, kept[..., None].expand_as(merged)), merged.to(output.dtype)
        )

    def end(self, module: Any, args: Any, kwargs: Any, output: Any) -> None:
        """Behind the tower: every patch gets what stands for it, and the call is told which that is."""
        call, method, owner, seat, first = self.engine.call, self.method, self.owner, self.seat, self.first
        self.method = self.keys = self.size = self.seat = self.owner = None
        if method is None or call is None:
            return
        batch = len(output.last_hidden_state)
        patches = self.left[0] if owner is None else owner.shape[1] - first
        number = torch.arange(batch * patches, device=output.last_hidden_state.device).view(batch, patches) + 1
        into = number
        if owner is not None and seat is not None:
            into = number.gather(1, seat.gather(1, owner)[:, first:] - first)
            here = seat.shape[1]

            def spread(values: Tensor | None) -> Tensor | None:
                if values is None or values.shape[1] != here:
                    return values
                return values.gather(1, owner[..., None].expand(-1, -1, values.shape[2]))

            output.last_hidden_state = spread(output.last_hidden_state)
            if getattr(output, "hidden_states", None) is not None:
                output.hidden_states = tuple(spread(hidden) for hidden in output.hidden_states)
        if not call.done:
            call.seen.setdefault(MERGED, []).append((number.float(), into.float()[..., None]))
