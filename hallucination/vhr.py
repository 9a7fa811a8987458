# SPDX-License-Identifier: Apache-2.0
"""VHR: vision-aware head reinforcement ("Cracking the code of hallucination in LVLMs", arXiv 2412.13949, ACL 2025).

A head whose output at the end of the prompt changes when the picture is taken away is one that looks: such heads are made
louder, the same ones for the whole answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.branch import Run, images_out, look, with_answer
from vlm_attn.call import Call
from vlm_attn.kernels import Group
from vlm_attn.method import (
    Method,
    ModelFacts,
    check_choice,
    check_flag,
    check_layers,
    check_range,
    layer_tuple,
    unknown_turn,
)
from vlm_attn.patching import engine_of, patched


@dataclass(frozen=True, kw_only=True)
class Vhr(Method):
    """Reinforce the heads whose output depends on the picture.

    Overview:
        in short: makes heads louder whose output depends on the picture
        what it does: doubles the output of heads that depend on the picture
        edits: all rows, the second and the last 14 of 32 layers

    Equation:
        VHD[h] = |o_h - o_h(without the picture)|                 o_h the head's output in the last prompt row
        o_h'   = alpha o_h                                        where VHD[h] is above the layer's median, in every row

    Attributes:
        alpha: factor on the output of the upper half of a layer's heads, by visual divergence. Range (0, 10].
        layers: layers to reinforce; empty = the second and the last 14 of 32, at the same depth of other models.
        drop_outliers: take heads out whose divergence and whose output without the picture are both one standard deviation
            above the layer's mean.
        rows: ``"all"`` reinforces every row, the prompt's too; ``"last"`` the last prompt token and all later ones.

    Before the prompt runs, it runs once beside itself without the image's tokens and markers, two rows per prompt. Layer by
    layer in that pass (algorithm 1) the heads are chosen from the last row. Three things are our reading, as no code could be
    checked: layers below are already reinforced in both rows; "the second" layer is layer 1; and all rows are reinforced by
    default, so that keys and values fit each other, for which the paper asks without naming rows. A later turn keeps the heads
    of the first. On a canvas
    (``vlm_attn.diffusion``) the pass sees the prompt as the denoising steps do, and the heads stay for all steps. Cost: one
    prompt of two rows.
    """

    name: ClassVar[str] = "vhr"
    paper: ClassVar[str] = "VHR, arXiv 2412.13949"
    edited_rows: ClassVar[Literal["last", "text", "none"]] = "none"

    alpha: float = 2.0
    layers: tuple[int, ...] = ()
    drop_outliers: bool = True
    rows: Literal["all", "last"] = "all"

    def __post_init__(self) -> None:
        check_range(self, "alpha", 0, 10, open_low=True)
        layer_tuple(self, "layers", empty=True)
        check_flag(self, "drop_outliers")
        check_choice(self, "rows", ("all", "last"))
        if self.rows == "last":  # the prompt then runs as body and last token
            object.__setattr__(self, "edited_rows", "last")

    @property
    def neutral(self) -> bool:
        """Heads as loud as they are."""
        return self.alpha == 1

    def bind(self, facts: ModelFacts) -> Vhr:
        """Check the layers; without any, the paper's."""
        check_layers(self, "layers", self.layers, facts)
        last = range(facts.layers - round(14 / 32 * facts.layers), facts.layers)
        return replace(self, layers=self.layers or tuple(sorted({min(1, facts.layers - 1), *last})))

    def start(self, call: Call, processor: Any) -> None:
        """A later turn needs the heads of the call that filled its cache."""
        if not call.first:
            return
        known = call.earlier.memory(self) if call.earlier is not None else {}
        if "heads" in known:
            call.memory(self)["heads"] = known["heads"]
        elif call.image_in_cache or (self.rows == "all" and (call.earlier is None or self not in call.earlier.patched)):
            raise unknown_turn(self, "its heads are")

    def rehearse(self, run: Run) -> None:
        """Choose the heads of every layer: ``[B, H]`` bool."""
        heads = run.call.memory(self).setdefault("heads", {})
        if heads:
            return

        def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
            if layer not in self.layers:
                return out
            seen, blind = out[:, -1].float().chunk(2)
            heads[layer] = self.choose(*head_divergence(seen, blind))
            louder = out * self.factor(heads[layer]).repeat(2, 1)[:, None, :, None].to(out.dtype)
            return louder if self.rows == "all" else torch.cat([out[:, :-1], louder[:, -1:]], 1)

        forward_twice(run, tap)

    def choose(self, divergence: Tensor, activation: Tensor) -> Tensor:
        """The heads ``[B, H]`` bool to reinforce."""
        if self.drop_outliers:
            divergence = divergence.masked_fill(outliers(divergence, activation), 0.0)
        return upper_half(divergence)

    def factor(self, heads: Tensor) -> Tensor:
        """``alpha`` on chosen heads, 1 on the others."""
        return 1 + (self.alpha - 1) * heads.float()

    def edit(self, call: Call, layer: int) -> None:
        """Attention is left alone."""

    def head_scale(self, call: Call, layer: int) -> Tensor | None:
        """The heads chosen before the prompt ran."""
        if self.rows == "last" and not call.done and call.mode != "edited":
            return None
        heads = call.memory(self)["heads"].get(layer)
        return None if heads is None else self.factor(heads).repeat_interleave(call.batch // len(heads), 0)


def head_divergence(seen: Tensor, blind: Tensor) -> tuple[Tensor, Tensor]:
    """Visual divergence of heads and the size of what they say without the picture.

    Args:
        seen: ``[..., H, D]`` the heads' outputs with the picture.
        blind: the same without it.

    Returns:
        ``VHD [..., H]``, the L2 distance, and ``TA [..., H]``, the squared norm of ``blind``.
    """
    return (seen - blind).norm(dim=-1), blind.square().sum(-1)


def outliers(divergence: Tensor, activation: Tensor) -> Tensor:
    """``[..., H]`` heads that are more than a standard deviation above their layer's mean in both."""
    high = [x > x.mean(-1, keepdim=True) + x.std(-1, keepdim=True) for x in (divergence, activation)]
    return high[0] & high[1]


def upper_half(divergence: Tensor) -> Tensor:
    """``[..., H]`` heads above the median."""
    return divergence > divergence.median(-1, keepdim=True).values


def token_score(divergence: Tensor, k: int) -> Tensor:
    """T-VHD: the sum over layers of the k largest divergences.

    Args:
        divergence: ``[..., L, H]``.
        k: heads per layer, 1..H.

    Returns:
        ``[...]``; a low score says that a token owes the picture little, and is more likely to be invented.

    Raises:
        ValueError: k is out of range.
    """
    if not 1 <= k <= divergence.shape[-1]:
        raise ValueError(f"k={k!r} is outside 1..{divergence.shape[-1]}, the number of heads")
    return divergence.topk(k, dim=-1).values.sum((-1, -2))


def token_divergence(model: Any, inputs: Mapping[str, Any], answer: Sequence[int]) -> Tensor:
    """How much every head's output for each token of an answer depends on the picture; :func:`token_score` sums it up.

    Args:
        model: a model that is not patched.
        inputs: what the processor returned for one prompt.
        answer: the answer's T token ids.

    Returns:
        ``[T, L, H]`` float32 on the CPU, of the rows that the tokens were read from. Both streams are shown the answer.

    Raises:
        ValueError: more than one prompt, no image, no answer, the model is patched.
    """
    whole = with_answer(inputs, answer)
    found: list[Tensor] = []

    def tap(layer: int, out: Tensor, attend: Callable[..., Tensor]) -> Tensor:
        seen, blind = out[:, -len(answer) - 1 : -1].float().chunk(2)
        found.append(head_divergence(seen, blind)[0][0].cpu())
        return out

    with patched(model, Vhr()):
        engine = engine_of(model)
        with engine.running(whole) as call:
            if not call.prompt.images:
                raise ValueError("the prompt has no image, so no head's output depends on one")
            forward_twice(Run(engine, model, call, whole), tap)
    return torch.stack(found, 1)


def forward_twice(run: Run, tap: Any) -> None:
    """One plain forward of ``2 B`` rows: the prompt, and below it the prompt without its images, padded on the left."""
    inputs = run.inputs
    order, there = images_out(run)
    pad = {"input_ids": inputs["input_ids"][:, -1:]} if "input_ids" in inputs else {}  # any word: it is not attended to
    twice: dict[str, Any] = dict(inputs)
    for name, value in inputs.items():
        if value.shape[:2] != order.shape:
            continue
        more = there.reshape(*there.shape, *[1] * (value.ndim - 2))
        index = order.reshape(more.shape).expand_as(value)
        twice[name] = torch.cat([value, torch.where(more, value.gather(1, index), pad.get(name, value.new_zeros(())))])
    group = run.call.prompt.group
    both = torch.cat([group, group.gather(1, order).masked_fill(~there, int(Group.PAD))])
    look(run, twice, tap, group=both)


__all__ = ["Vhr", "head_divergence", "outliers", "token_divergence", "token_score", "upper_half"]
