# SPDX-License-Identifier: Apache-2.0
"""A smaller image: the baseline that many reducers do not beat (VTC-Bench, arXiv 2510.07143)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from vlm_attn.call import Call
from vlm_attn.reduction import Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class Downsample(Reducer):
    """Average the grid of visual tokens down to a smaller one.

    Overview:
        in short: baseline: the averaged, smaller grid
        keeps: averages of a smaller grid
        where: before the language model
        needs: an image that is one grid

    Equation:
        x'_c = mean of the x_j in cell c of a grid of at most keep n cells

    The averages stand where the tokens nearest the centres of their cells stood. The image itself is not resized (the
    tower of most families takes one size only): its features are. The smaller grid has the image's aspect ratio and at
    most the asked number of tokens. Needs an image whose tokens form one grid.
    """

    name: ClassVar[str] = "downsample"
    paper: ClassVar[str] = "baseline of VTC-Bench, arXiv 2510.07143"

    def start(self, call: Call, processor: Any) -> None:
        """Refuse images without a grid, or with one that another method has made holes in."""
        super().start(call, processor)
        before = [m for m in call.methods[: call.methods.index(self)] if isinstance(m, Reducer)]
        sizes = {image.total for image in call.prompt.images}
        taken = [
            m.name
            for m in before
            if any(at == 0 and m.left(n, size) < size for n, at in enumerate(m.stages) for size in sizes)
        ]
        if taken:
            raise ValueError(
                f"downsample averages a whole grid of tokens, and {'+'.join(taken)} takes some away before it: put downsample "
                "first, or choose one of them"
            )
        for number, image in enumerate(call.prompt.images):
            (h, w), tokens = image.grid, image.total
            if h * w != tokens or min(h, w) == 1:
                raise ValueError(
                    f"downsample: the {tokens} tokens of image {number} (row {image.row}) form no grid that could be averaged "
                    f"(its grid is {h} x {w}): choose a method that needs none, such as random or divprune"
                )

    def choose(self, picture: Picture) -> Tensor:
        """The tokens at the centres of the cells."""
        h, w = smaller(picture.grid, picture.count)
        return (
            (centres(picture.grid[0], h)[:, None] * picture.grid[1] + centres(picture.grid[1], w))
            .flatten()
            .to(picture.places.device)
        )

    def owners(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The token at the nearest centre of a cell."""
        down, across = (
            (torch.arange(size)[:, None] - centres(size, cells)).abs().argmin(1)
            for size, cells in zip(picture.grid, smaller(picture.grid, picture.count), strict=True)
        )
        cells = down[:, None] * smaller(picture.grid, picture.count)[1] + across
        return chosen[cells.flatten().to(chosen.device)]

    def merge(self, picture: Picture, chosen: Tensor) -> Tensor:
        """The mean of every cell."""
        grid = picture.tokens.T.reshape(1, -1, *picture.grid).float()
        return nn.functional.adaptive_avg_pool2d(grid, smaller(picture.grid, picture.count))[0].flatten(1).T


def smaller(grid: tuple[int, int], count: int) -> tuple[int, int]:
    """A grid of the same aspect with at most ``count`` cells."""
    h = min(max(1, round(math.sqrt(count * grid[0] / grid[1]))), count, grid[0])
    return h, min(max(1, count // h), grid[1])


def centres(size: int, cells: int) -> Tensor:
    """Index nearest the middle of each of ``cells`` equal parts of ``size``."""
    return ((torch.arange(cells) + 0.5) * size / cells).long()
