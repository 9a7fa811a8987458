# SPDX-License-Identifier: Apache-2.0
"""CDPruner: a set of tokens that differ, given the question (arXiv 2506.10967)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.reduction import Keep, Picture
from vlm_attn.visual_token_ops.clip import ClipReducer
from vlm_attn.visual_token_ops.divprune import cosine_distance


@dataclass(frozen=True, kw_only=True)
class CDPruner(ClipReducer):
    """Keep the likeliest set of a determinantal point process: relevant to the question, and different from each other.

    Overview:
        in short: tokens that differ, given the question, by a CLIP model of open_clip (extra `clip`)
        keeps: the likeliest set of a determinantal point process, `r_i cos_ij r_j` with r the negated CLIP cosine of
            patch and question; greedy
        where: before the language model
        needs: a processor, `vlm-attn[clip]`, pictures of one grid (LLaVA-1.5, Gemma 3, PaliGemma)

    Equation:
        L[i, j] = r_i cos(x_i, x_j) r_j                           r = -cos(patch, question), scaled to [0, 1]
        kept    = argmax det L[kept, kept], greedily

    Attributes:
        keep: default 64 of 576, as a share.
        clip: see :class:`~vlm_attn.visual_token_ops.clip.ClipReducer`.

    x are the projected features. The cosine of patch and question is *negated*, as the released code has it. The set is found
    greedily (MAP), in float64. Deviation: a question longer than CLIP reads is cut; the released code reads on in pieces and
    takes their mean.
    """

    name: ClassVar[str] = "cdpruner"
    paper: ClassVar[str] = "CDPruner, arXiv 2506.10967"

    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"paper-{count}": {"keep": count / 576} for count in (128, 64, 32)
    }

    keep: Keep = 1 / 9

    def choose(self, picture: Picture) -> Tensor:
        """The greedy set."""
        relevance = scaled_to_one(-self.similarity(picture))
        kernel = relevance[:, None] * (1 - cosine_distance(picture.tokens)) * relevance
        return likeliest(kernel, picture.count)


def scaled_to_one(values: Tensor) -> Tensor:
    """``(v - min) / (max - min)``; what has no spread is 1. The least stays a little above 0, so that it can be chosen."""
    low, high = values.min(), values.max()
    return torch.where(high > low, (values - low + 1e-6) / (high - low).clamp_min(1e-6), 1.0)


def likeliest(kernel: Tensor, count: int) -> Tensor:
    """Greedy MAP of a determinantal point process: always the item that makes the determinant largest.

    Args:
        kernel: ``[n, n]`` positive semidefinite.
        count: how many, at most n.

    Returns:
        ``[count]`` indices, ascending. Incremental Cholesky (arXiv 1709.05135), O(n count^2), float64.
    """
    kernel = kernel.double()
    gain = kernel.diagonal().clone()  # how much each would multiply the determinant
    rows = kernel.new_zeros(count, len(kernel))
    chosen = []
    for step in range(count):
        best = gain.argmax()
        chosen.append(best)
        rows[step] = (kernel[best] - rows[:step, best] @ rows[:step]) / gain[best].clamp_min(1e-12).sqrt()
        gain = (gain - rows[step].square()).index_fill(0, torch.stack(chosen), -torch.inf)
    return torch.stack(chosen).sort().values
