# SPDX-License-Identifier: Apache-2.0
"""VScan: scan the image globally and window by window, then prune once more inside (arXiv 2505.22654)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.method import PROJECTED, Method, ModelFacts, Wide, check_range
from vlm_attn.reduction import Keep, Picture, Staged, highest, kept_count, others, scaled
from vlm_attn.visual_token_ops.holov import quota


@dataclass(frozen=True, kw_only=True)
class VScan(Staged):
    """Keep the best of every window and of the whole image, merge the rest; inside, keep what the last token attends to.

    Overview:
        in short: the best of every window and of the whole image, the rest merged; then what the last token attends to
        keeps: half by window and half globally, by CLS attention, the rest averaged in; a third of them again by the
            last token's attention
        where: before the language model, and before layer 16 of 32, scaled
        needs: as `visionzip`

    Equation:
        half: largest a5_j in every window                        a5: CLS attention of the tower's layer 5
        half: largest a_j of the rest                             a: of the layer that is projected
        x'_c = mean of x_c and the x_i with c = argmax cos(x_i, x)
        then: largest mean_h softmax(q_last k)[h, j]              before layer K

    Attributes:
        keep: what is left behind the second stage; default 32 of 576, as a share.
        counts: tokens left after each stage, in place of ``keep`` and ``first``: both shares or both numbers. Empty = by these.
        first: how many times as much the first stage leaves: the paper's 96 to 32. At least 1.
        window: side of the windows. 1..64.
        layer: the layer before which the second stage is; 0 = the paper's 16 of 32, scaled to the model's depth.

    First stage: half of the tokens are the best of every window, by the CLS attention of layer 5 of the tower (of 24); the
    other half are the best of the rest, by that of the layer that is projected. Every other token is averaged into the kept
    one that is most like it (cosine of the projected features). Second stage: as PyramidDrop. An image without a grid is one
    window. Deviation: merging happens behind the projector. Rows ``paper-192``, ``-128`` and ``-64`` are means over the layers:
    one and a half times that in the lower half, half of it in the upper.
    """

    name: ClassVar[str] = "vscan"
    paper: ClassVar[str] = "VScan, arXiv 2505.22654"
    cls_layers: ClassVar[tuple[int | Wide, ...]] = (PROJECTED, 5)
    reads_ahead: ClassVar[bool] = True
    published: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        f"paper-{mean}": {"counts": (mean * 3 / 2 / 576, mean / 2 / 576)} for mean in (192, 128, 64)
    }

    keep: Keep = 1 / 18
    first: float = 3.0
    window: int = 6
    layer: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_range(self, "first", 1, 1000)
        check_range(self, "window", 1, 64)
        check_range(self, "layer", 0, 10_000)

    def bind(self, facts: ModelFacts) -> Method:
        """The paper's layer, unless another is given."""
        return Staged.bind(replace(self, layer=self.layer or scaled((16,), facts.layers)[0]), facts)

    @property
    def stages(self) -> tuple[int, ...]:
        """Before the language model, and inside."""
        return (0, self.layer)

    @property
    def read_layers(self) -> tuple[int, ...]:
        """The layer of the second stage."""
        return (self.layer,)

    def left_of_keep(self, at: int, total: int) -> int:
        """More first, then what is asked for."""
        last = kept_count(self.keep, total)
        return last if at else min(total, int(last * self.first + 0.5))

    def choose(self, picture: Picture) -> Tensor:
        """Windows and the whole; or the last row's attention."""
        if picture.stage:
            assert picture.rows is not None
            return highest(picture.rows.mean((0, 1)), picture.count)
        assert picture.cls is not None
        assert picture.local is not None
        parts = self.windows(picture)
        even = quota(torch.ones(len(parts)), [len(part) for part in parts], picture.count // 2)
        local = torch.cat([part[highest(picture.local[part], n)] for part, n in zip(parts, even, strict=True)])
        rest = others(len(picture.tokens), local)
        return torch.cat([local, rest[highest(picture.cls[rest], picture.count - len(local))]]).sort().values

    def windows(self, picture: Picture) -> list[Tensor]:
        """Indices of the tokens of every window."""
        (h, w), n = picture.grid, len(picture.tokens)
        index = torch.arange(n, device=picture.tokens.device)
        if h * w != n:
            return [index]
        rows = index.view(h, w).split(self.window, 0)
        return [part.flatten() for row in rows for part in row.split(self.window, 1)]

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """First the kept token that is most similar; then nobody."""
        if picture.stage:
            return super().owners(picture, chosen)
        unit = nn.functional.normalize(picture.tokens.float(), dim=-1)
        return chosen[(unit @ unit[chosen].T).argmax(1)].index_copy(0, chosen, chosen)

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor | None:
        """The mean of a kept token and those that go to it."""
        if picture.stage:
            return None
        goes = torch.searchsorted(chosen, self.owners(picture, chosen))
        share = nn.functional.one_hot(goes, len(chosen)).float()
        return share.T @ picture.tokens.float() / share.sum(0)[:, None]
