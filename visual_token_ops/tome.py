# SPDX-License-Identifier: Apache-2.0
"""ToMe: tokens that are alike become one inside the vision tower (arXiv 2210.09461, ICLR 2023)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.call import Call
from vlm_attn.reduction import Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class ToMe(Reducer):
    """Merge the most similar tokens in every layer of the vision tower: faster there, and fewer tokens go on.

    Overview:
        in short: tokens that are alike become one, in every layer of the vision tower (LLaVA, LLaVA-NeXT, PaliGemma)
        keeps: the means of patches whose keys are alike, merged pair by pair in every layer
        where: in the vision tower
        needs: a tower of CLIP or SigLIP that hands on its patches one by one: LLaVA, LLaVA-NeXT, PaliGemma

    Equation:
        pairs = the r largest max_b cos(mean_h k_a, mean_h k_b)      a every second token, b the others
        x_b = (n_a x_a + n_b x_b) / (n_a + n_b),  n_b = n_a + n_b
        A = softmax(q k^T / sqrt(d) + log n)

    Attributes:
        keep: what is left behind the layer that is projected. The same number goes in every layer, as in the paper, but for the
            last ones where half would not be enough.

    Bipartite soft matching: of the tokens in order, every second one looks for the most similar of the others (cosine of the
    keys, mean of the heads), and the most similar pairs become the mean of all patches they stand for. A token that stands
    for n patches is attended to like n: its logits get ``log n`` (proportional attention), inside the tower. The CLS token
    takes no part. In the language model a token stands where the patch stood that the others were merged into.

    For the towers of CLIP and SigLIP whose patches are the image's tokens one by one. Tiles of LLaVA-NeXT are merged one by
    one to the share ``keep``; newline tokens all stay, and padding goes, so that the number there is near ``keep``, not exact.
    Deviations: pairs become one behind a layer's MLP, not between its attention and its MLP; patches are counted without the
    CLS token, which the released code counts first, and stay in raster order, so which are "every second" differs from it.
    """

    name: ClassVar[str] = "tome"
    paper: ClassVar[str] = "ToMe, arXiv 2210.09461"
    merges: ClassVar[bool] = True

    def start(self, call: Call, processor: Any) -> None:
        """Check that a count means one share: the tower runs all pictures at once."""
        super().start(call, processor)
        totals = sorted({i.total for i in call.prompt.images if i.start >= call.first})
        if isinstance(self.keep, int) and len(totals) > 1:
            raise ValueError(
                f"tome: keep={self.keep} is a count, but the images have {totals} tokens and go through the tower together: "
                "give a ratio in (0, 1]"
            )

    def pairs(self, keys: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The ``count`` most similar of every second token with the best of the others."""
        unit = nn.functional.normalize(keys, dim=-1)
        best = (unit[:, ::2] @ unit[:, 1::2].transpose(1, 2)).max(2)
        goes = best.values.argsort(dim=1, descending=True, stable=True)[:, :count]
        return 2 * goes, 2 * best.indices.gather(1, goes) + 1

    def choose(self, picture: Picture) -> Tensor:
        """Of the patches that became one, the one that the others were merged into; the first where that one is padding."""
        assert picture.patch is not None
        assert picture.into is not None
        stays = picture.patch == picture.into  # so do newline tokens: 0
        for group in picture.into[~torch.isin(picture.into, picture.into[stays])].unique():
            stays[(picture.into == group).nonzero()[0]] = True
        return stays.nonzero().flatten()

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """What the patches became one with."""
        assert picture.into is not None
        owners = (picture.into[:, None] == picture.into[chosen]).int().argmax(1)
        return chosen[owners].index_copy(0, chosen, chosen)
