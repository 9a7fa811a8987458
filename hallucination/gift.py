# SPDX-License-Identifier: Apache-2.0
"""GIFT: gaze-shift guided cross-modal fusion enhancement (arXiv 2510.22067).

Where does the attention of the question's words *move* to on the image, word by word? Those places are boosted for
every later row, and the question is boosted by the same ratio, so that the balance between the two stays.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.kernels import Edit, Group, one_hot_segments
from vlm_attn.method import Method, ModelFacts, check_choice, check_flag, check_layers, check_range, layer_tuple
from vlm_attn.words import informative_tokens

OTHER, VISUAL, QUERY, BOOSTED = range(4)  # segments; BOOSTED is VISUAL weighted with exp(alpha * saliency)


@dataclass(frozen=True, kw_only=True)
class Gift(Method):
    """Boost what the question looks at.

    Overview:
        in short: boosts what the question's words look at, and the question with it
        what it does: finds where the question's words move attention to on the image, boosts these places and, by the
            same ratio, the question
        edits: last prompt row and generated rows, a band of layers
        needs: a question behind the image

    Equation:
        dA[h, i, j] = max(A[h, i, j] - A[h, i - 1, j], 0)         i in the question, j in the image, saliency layers
        S[j]        = dA[h, i, j] summed over informative words i and the heads with most of it,
                      clipped to mean +- clip_sigma std, scaled to [0, 1] over the image
        m[j]        = exp(alpha S[j])
        r           = sum_h,j m[j] A[h, j] / sum_h,j A[h, j]      heads Hv, image tokens j; one r per row and layer
        A'[h, j]    ~ m[j] A[h, j]                                j in the image, h in Hv: most attention on the image
        A'[h, j]    ~ beta r A[h, j]                              j in the question, h in Hq: most attention on the question

        ~: every row is divided by its sum again.

    Attributes:
        saliency_layers: layers whose attention gives the saliency map (paper: one); None = from the preset.
        enhance_layers: layers whose attention is edited; None = from the preset.
        alpha: strength; the most salient token is weighted ``exp(alpha)``. Range 0..20.
        beta: factor on the question's share of the boost. Range (0, 100].
        query_words: which words of the question count for the map: ``"content"``, all but function words (see
            :mod:`vlm_attn.words`), or ``"all"``.
        heads: share of heads that are used, for the map and for each of the two boosts. Range (0, 1].
        clip_sigma: the map is clipped to its mean +- this many standard deviations before it is scaled to [0, 1].
        code_parity: do what the released code does with a repeated content word: only its last occurrence counts.

    Deviations from the released code: batched; the last prompt token is run once, edited, on top of one plain prefill
    instead of two prefills (exact for causal models); every occurrence of a repeated word counts (unless
    ``code_parity``); a question token that is also the last token of the prompt (no template tail) does not count for the map.
    """

    name: ClassVar[str] = "gift"
    paper: ClassVar[str] = "GIFT, arXiv 2510.22067"

    saliency_layers: tuple[int, ...] | None = None
    enhance_layers: tuple[int, ...] | None = None
    alpha: float = 5.0
    beta: float = 1.0
    query_words: Literal["content", "all"] = "content"
    heads: float = 0.5
    clip_sigma: float = 3.0
    code_parity: bool = False

    def __post_init__(self) -> None:
        layer_tuple(self, "saliency_layers")
        layer_tuple(self, "enhance_layers")
        check_range(self, "alpha", 0, 20)
        check_range(self, "beta", 0, 100, open_low=True)
        check_range(self, "heads", 0, 1, open_low=True)
        check_range(self, "clip_sigma", 0, 100, open_low=True)
        check_flag(self, "code_parity")
        check_choice(self, "query_words", ("content", "all"))

    @property
    def neutral(self) -> bool:
        """``alpha=0`` makes every multiplier 1 and the ratio r = 1; ``beta=1`` leaves the question alone."""
        return self.alpha == 0 and self.beta == 1

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The saliency layers."""
        return self.saliency_layers or ()

    def bind(self, facts: ModelFacts) -> Gift:
        """Check the layers against the model."""
        check_layers(self, "saliency_layers", self.saliency_layers or (), facts)
        check_layers(self, "enhance_layers", self.enhance_layers or (), facts)
        return self

    def start(self, call: Call, processor: Any) -> None:
        """Step 3. A question must follow its image: before it, there is nothing to look at."""
        last = [0] * call.prompt.batch
        for image in call.prompt.images:
            last[image.row] = max(last[image.row], image.stop)
        for row, (start, stop) in enumerate(call.prompt.query):
            if start >= stop or start < last[row]:
                raise ValueError(
                    f"gift: row {row} has no question after its image (question columns {start}..{stop}, image ends at "
                    f"{last[row]}). Put the image before the text, or give the question's columns with query_span="
                )
            if start - 1 < call.first:
                raise ValueError(
                    f"gift: the question of row {row} begins at column {start}, but the cache passed in already holds "
                    f"{call.first} columns: pass a cache that ends before the question"
                )
        call.memory(self)["informative"] = (
            informative_tokens(call, processor, last=self.code_parity) if self.query_words == "content" else None
        )

    def read_rows(self, call: Call) -> Tensor:
        """The question's columns and the one before: ``[B, M + 1]``, padded on the right with -1."""
        spans = call.layout.query
        width = max(stop - start for start, stop in spans) + 1
        rows = torch.full((len(spans), width), -1, device=call.layout.group.device)
        for i, (start, stop) in enumerate(spans):
            rows[i, : stop - start + 1] = torch.arange(start - 1, stop, device=rows.device)
        return rows

    def prompt_read(self, call: Call, rows: dict[int, Tensor]) -> None:
        """Steps 2-5: gaze shifts, informative words, heads, the map."""
        columns = self.read_rows(call)
        visual = call.layout.visual
        memory = call.memory(self)
        informative = columns[:, 1:] >= 0
        if memory["informative"] is not None:
            chosen = memory["informative"].to(columns.device)
            informative = informative & chosen.repeat_interleave(len(columns) // len(chosen), 0)
        shifts = [gaze_shift(rows[layer], columns, visual) for layer in self.read_layers]
        saliency = saliency_map(shifts, informative, visual, heads=self.heads, clip_sigma=self.clip_sigma)
        ids = VISUAL * visual + QUERY * (call.layout.group == Group.QUERY)
        memory["saliency"] = saliency
        segments = one_hot_segments(ids, 3, twin_of=VISUAL, log_weight=self.alpha * saliency)
        memory["edit"] = Edit(segments, self.reweigh, partition=3)

    def edit(self, call: Call, layer: int) -> Edit | None:
        """The same edit at every enhanced layer."""
        return call.memory(self)["edit"] if layer in (self.enhance_layers or ()) else None

    def reweigh(self, mass: Tensor) -> Tensor:
        """Steps 6-8: ``[B, H, Q, 4]`` masses to weights.

        ``Hv`` and ``Hq`` are the heads with the most visual and question mass, chosen per row; r is one ratio per row
        and layer.
        """
        looks, asks = top_heads(mass[..., VISUAL:BOOSTED], self.heads).unbind(-1)
        _, before, _, after = (mass * looks[..., None]).sum(1, keepdim=True).unbind(-1)
        r = (after / before).nan_to_num(1.0)  # no visual mass at all: r = 1
        return torch.stack([torch.ones_like(looks), ~looks, torch.where(asks, self.beta * r, 1.0), looks], -1)


def top_heads(score: Tensor, share: float) -> Tensor:
    """``[B, H, ...]`` scores to a mask of the ``max(1, floor(share * H))`` largest along dim 1."""
    count = max(1, int(score.shape[1] * share))
    if score.is_cuda:
        return by_pairs(score, count)
    return torch.zeros_like(score, dtype=torch.bool).scatter_(1, score.topk(count, dim=1).indices, True)


def by_pairs(score: Tensor, count: int) -> Tensor:
    """The ``count`` largest along dim 1, of equals the first, by comparing all pairs: a compiler makes one kernel of this, and
    none of ``topk``."""
    heads = torch.arange(score.shape[1], device=score.device).view(-1, *[1] * (score.dim() - 2))
    one, other = score.unsqueeze(2), score.unsqueeze(1)
    ahead = (other > one) | ((other == one) & (heads < heads.unsqueeze(1)))
    return ahead.sum(2) < count


def gaze_shift(attention: Tensor, columns: Tensor, visual: Tensor) -> Tensor:
    """Step 2: ``max(A_i - A_{i-1}, 0)`` on the image.

    Args:
        attention: ``[B, H, M + 1, P]`` rows of the question and the one before.
        columns: ``[B, M + 1]`` their columns, -1 = none.
        visual: ``[B, P]`` bool.

    Returns:
        ``[B, H, M, P]``, zero outside the image and for rows that are not there.
    """
    shift = (attention[:, :, 1:] - attention[:, :, :-1]).clamp_min(0)
    return shift * visual[:, None, None] * (columns[:, None, 1:, None] >= 0)


def saliency_map(
    shifts: list[Tensor], informative: Tensor, visual: Tensor, *, heads: float, clip_sigma: float
) -> Tensor:
    """Steps 3-5: mean shift over layers, chosen heads and informative words; clipped; scaled to [0, 1] over the image.

    Args:
        shifts: per saliency layer ``[B, H, M, P]``.
        informative: ``[B, M]`` bool.
        visual: ``[B, P]`` bool.
        heads: share of heads kept per layer, those with the largest total shift.
        clip_sigma: clip at mean +- this many (unbiased) standard deviations over the visual tokens.

    Returns:
        ``[B, P]`` float32; a constant map becomes all zeros, which is a no-op.
    """
    total = torch.zeros_like(visual, dtype=torch.float32)
    for shift in shifts:
        per_head = (shift * informative[:, None, :, None]).sum(2)  # [B, H, P]
        kept = top_heads(per_head.sum(2), heads)
        total = total + (per_head * kept[..., None]).sum(1)
    # Scale-free: the mean's divisors (heads, words, layers) cancel.
    return normalised(total, visual, clip_sigma)


def normalised(values: Tensor, where: Tensor, clip_sigma: float) -> Tensor:
    """``[B, N]`` values clipped at mean +- ``clip_sigma`` (unbiased) standard deviations, then scaled to [0, 1].

    Args:
        values: ``[B, N]`` float32.
        where: ``[B, N]`` bool: which of them count; the others become 0.
        clip_sigma: see above.

    Returns:
        ``[B, N]`` float32; constant values become all zeros.
    """
    count = where.sum(1, keepdim=True).clamp_min(1)
    mean = (values * where).sum(1, keepdim=True) / count
    std = (((values - mean) * where).square().sum(1, keepdim=True) / (count - 1).clamp_min(1)).sqrt()
    clipped = values.clamp(mean - clip_sigma * std, mean + clip_sigma * std)
    low = clipped.masked_fill(~where, math.inf).amin(1, keepdim=True)
    high = clipped.masked_fill(~where, -math.inf).amax(1, keepdim=True)
    span = high - low
    return torch.where(where & (span > 0), (clipped - low) / span.clamp_min(torch.finfo(torch.float32).tiny), 0.0)
