# SPDX-License-Identifier: Apache-2.0
"""Images in chunks: rows of the picture, tiles, or regions, for the methods that choose among them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import isqrt

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.layout import ImageSpan
from vlm_attn.method import Method
from vlm_attn.reduction import Keep, kept_count


@dataclass
class Chunks:
    """The chunks of every row's images, in order.

    Attributes:
        of: ``[B, P + 1]`` chunk of every column of the prompt, -1 = none; the last entry stands for every later column.
        columns: ``[B, C, M]`` the columns of every chunk.
        there: ``[B, C, M]`` bool, which of these there are: rows have different numbers of chunks, chunks of columns.
    """

    of: Tensor
    columns: Tensor
    there: Tensor

    def member(self, columns: Tensor) -> Tensor:
        """``[B, n]`` chunk of columns ``[B or 1, n]``, -1 = none."""
        index = columns.clamp_max(self.of.shape[1] - 1).expand(len(self.of), -1)
        return self.of.gather(1, index)

    def counts(self, keep: Keep) -> Tensor:
        """``[B]`` how many of a row's chunks a ``keep`` means."""
        total = self.there.any(2).sum(1).tolist()
        return torch.tensor([kept_count(keep, n) if n else 0 for n in total], device=self.of.device)

    def places(self, columns: Tensor) -> tuple[Tensor, Tensor]:
        """Where the chunks' columns stand among ``columns [B or 1, n]``, ascending: ``(place, there)``, each ``[B, C, M]``."""
        columns = columns.expand(len(self.of), -1).contiguous()
        wanted = self.columns.flatten(1)
        place = torch.searchsorted(columns, wanted).clamp_max(columns.shape[1] - 1)
        there = (columns.gather(1, place) == wanted).view_as(self.there) & self.there
        return place.view_as(self.columns), there


def chunks_of(
    call: Call, method: Method, cell: Callable[[ImageSpan], Tensor], device: torch.device | None = None
) -> Chunks:
    """The chunks of the prompt's images, made once per call. Tokens that are on no grid (an overview, newline tokens) are in
    none.

    Args:
        call: the call.
        method: whose memory keeps them.
        cell: for an image ``[h w]`` the number of the chunk of every grid token, 0 ... n - 1.
        device: where they are wanted.
    """

    def build() -> Chunks:
        device = call.prompt.group.device
        of = torch.full((call.prompt.batch, call.prompt.length + 1), -1, dtype=torch.long)
        count = [0] * call.prompt.batch
        for image in call.prompt.images:
            chunk = cell(image)
            of[image.row, image.cell_columns] = chunk + count[image.row]
            count[image.row] += int(chunk.max()) + 1
        most = int(torch.stack([(of == c).sum(1).max() for c in range(max(count))]).max()) if any(count) else 1
        columns = torch.zeros(len(of), max(1, *count), most, dtype=torch.long)
        there = torch.zeros_like(columns, dtype=torch.bool)
        for row, chunks in enumerate(count):
            for number in range(chunks):
                own = (of[row] == number).nonzero().flatten()
                columns[row, number, : len(own)], there[row, number, : len(own)] = own, True
        times = call.batch // call.prompt.batch
        return Chunks(*(x.repeat_interleave(times, 0).to(device) for x in (of, columns, there)))

    chunks = call.once(method, build)
    return chunks if device is None else Chunks(*(x.to(device) for x in (chunks.of, chunks.columns, chunks.there)))


def tiles(image: ImageSpan, size: int) -> Tensor:
    """``[h w]`` tile of every token: ``size`` x ``size`` tokens; 0 = one row of the picture. A family without a grid has runs,
    of ``size²`` tokens, or of the root of their number."""
    h, w = image.grid
    if h == 1:
        return torch.arange(w) // (size * size or max(1, isqrt(w)))
    high, wide = (size, size) if size else (1, w)
    across = -(-w // wide)
    return (torch.arange(h)[:, None] // high * across + torch.arange(w) // wide).flatten()


def regions(image: ImageSpan, side: int) -> Tensor:
    """``[h w]`` region of every token: the picture in ``side`` x ``side`` parts, as even as they can be."""
    h, w = image.grid
    if h == 1:
        return torch.arange(w) * min(side * side, w) // w
    high, wide = min(side, h), min(side, w)
    return ((torch.arange(h) * high // h)[:, None] * wide + torch.arange(w) * wide // w).flatten()


def best(score: Tensor, count: Tensor) -> Tensor:
    """The ``count [B]`` highest of every row's scores ``[B, H, Q, C]``, bool of that shape; of equal ones the earlier, and none
    that is ``-inf``."""
    order = score.argsort(dim=-1, descending=True, stable=True)
    chosen = torch.zeros_like(score, dtype=torch.bool)
    rank = torch.arange(score.shape[-1], device=score.device) < count[:, None, None, None]
    return chosen.scatter(-1, order, rank.expand_as(score)) & (score > float("-inf"))


def of_keys(chosen: Tensor, member: Tensor) -> Tensor:
    """Chosen chunks ``[B, H, Q, C]`` as keys ``[B, H, Q, S]``: those of chosen chunks, and those in none (-1 in ``member``)."""
    index = member.clamp_min(0)[:, None, None].expand(-1, *chosen.shape[1:3], -1)
    return chosen.gather(3, index) | (member < 0)[:, None, None]


def gathered(x: Tensor, place: Tensor) -> Tensor:
    """``[B, G, n, D]`` at places ``[B, C, M]``: ``[B, G, C, M, D]`` float32."""
    index = place.flatten(1)[:, None, :, None].expand(-1, x.shape[1], -1, x.shape[3])
    return x.gather(2, index).view(len(x), x.shape[1], *place.shape[1:], x.shape[3]).float()


def mean_of(x: Tensor, place: Tensor, there: Tensor) -> Tensor:
    """``[B, G, n, D]`` averaged over every chunk: ``[B, G, C, D]`` float32; zeros for a chunk of which nothing is there."""
    there = there[:, None, ..., None]
    return (gathered(x, place) * there).sum(3) / there.sum(3).clamp_min(1)


def scores(query: Tensor, key: Tensor, there: Tensor, scale: float) -> Tensor:
    """Rows ``[B, H, Q, D]`` against one key per chunk ``[B, G or H, C, D]``: ``[B, H, Q, C]``, ``-inf`` where ``there [B, C]``
    says that a chunk is not there."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    return (query.float() @ key.transpose(2, 3) * scale).masked_fill(~there[:, None, None], float("-inf"))


__all__ = ["Chunks", "best", "chunks_of", "gathered", "mean_of", "of_keys", "regions", "scores", "tiles"]
