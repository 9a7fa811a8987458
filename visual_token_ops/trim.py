"""A method in the style of TRIM (arXiv 2409.10994): keep what CLIP finds like the question, sum up the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlm_attn.method import check_flag
from vlm_attn.reduction import Keep, Picture
from vlm_attn.visual_token_ops.clip import ClipReducer
from vlm_attn.visual_token_ops.visionzip import others


@dataclass(frozen=True, kw_only=True)
class Trim(ClipReducer):
    """Keep the tokens whose patch is most like the question, and the mean of all others as one more.

    Equation:
        kept: largest cos(patch_j, question)                      the least of them becomes the mean of itself and all that go

    Attributes:
        keep: default 0.21, about the paper's share.
        summary: whether one of the kept tokens is the mean of all that go; it stands where the best of these stood.
        clip: see :class:`~vlm_attn.visual_token_ops.clip.ClipReducer`.

    In the paper's style, not its letter: the number of tokens is asked for instead of found by an outlier rule, and the mean
    is taken behind the projector.
    """

    name: ClassVar[str] = "trim"
    paper: ClassVar[str] = "after TRIM, arXiv 2409.10994"

    keep: Keep = 0.21
    summary: bool = True

    def check(self) -> None:
        """Check ``summary`` as well."""
        super().check()
        check_flag(self, "summary")

    def score(self, picture: Picture) -> Tensor:
        """Cosine with the question."""
        return self.similarity(picture)

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The mean stands for all that go."""
        if not self.summary:
            return super().owners(picture, chosen)
        last = chosen[self.score(picture)[chosen].argmin()]
        return last.expand(len(picture.tokens)).index_copy(0, chosen, chosen)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """The least of the chosen ones becomes the mean of itself and of all that go."""
        if not self.summary:
            return None
        tokens = picture.tokens.float().clone()
        last = chosen[self.score(picture)[chosen].argmin()]
        tokens[last] = tokens[torch.cat([last[None], others(len(tokens), chosen)])].mean(0)
        return tokens[chosen]
