# SPDX-License-Identifier: Apache-2.0
"""Region routing after BiFormer (arXiv 2303.08810, CVPR 2023), without training: a region looks at the regions that fit."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor, nn

from vlm_attn.call import Call
from vlm_attn.heads import HeadMethod, Seen, View
from vlm_attn.method import check_range
from vlm_attn.reduction import check_keep
from vlm_attn.visual_token_ops.chunks import Chunks, best, chunks_of, mean_of, of_keys, regions, scores


@dataclass(frozen=True, kw_only=True)
class Routed(HeadMethod):
    """Rows see the text, and of the images the regions that their block of rows is routed to.

    Overview:
        in short: the text, and the image regions that its block of rows is routed to
        which keys a head sees: all text, and the share `keep` of `side` x `side` image regions with the largest product
            of mean query and mean key
        rows: all
        needs: the prompt in one piece

    Equation:
        A^r  = Q^r (K^r)^T                      means of the queries of a block, and of the keys of a region
        seen = the keep regions of the largest A^r in the block's row, and all text

    Attributes:
        side: an image is cut into ``side`` x ``side`` regions (S; the paper has 7 x 7). Range 1..64.
        keep: share of a row's regions that a block is routed to, in (0, 1], or their number (k). ``1.0`` is neutral.

    ``A = Q^r (K^r)^T`` over the means of a region's queries and keys, the k largest of every row, per head. Blocks are the
    image regions, and the prompt's text behind the first image, taken together; a generated row is a block of its own. A
    region is always routed to itself, and never to one that lies behind it. Deviations: a causal model that was not
    trained for it; no depth-wise convolution; regions of all images of a prompt compete.
    """

    name: ClassVar[str] = "routed"
    paper: ClassVar[str] = "after BiFormer, arXiv 2303.08810"
    edited_rows: ClassVar[Literal["last", "text"]] = "text"
    whole_prompt: ClassVar[bool] = True

    side: int = 4
    keep: float | int = 0.25

    def __post_init__(self) -> None:
        check_range(self, "side", 1, 64)
        check_keep(self, "keep", self.keep)

    @property
    def neutral(self) -> bool:
        """Routed everywhere."""
        return isinstance(self.keep, float) and self.keep == 1

    def sees(self, call: Call, view: View) -> Seen | None:
        """The regions every row is routed to."""
        chunks = chunks_of(call, self, partial(regions, side=self.side), view.key.device)
        memory = call.memory(self)
        if call.mode == "prompt" or view.layer not in memory:
            memory[view.layer] = self.route(call, view, chunks)
        key, there, count, text = memory[view.layer]
        chosen = best(scores(view.query, key, there, view.scale), count)  # [B, H, Q, C]
        prompt = view.rows < call.prompt.length
        chosen = chosen.where(~prompt[:, None, :, None], text)
        if call.mode == "prompt":
            own = chunks.member(view.rows)  # [B, Q]
            blocks = self.blocks(view, chunks, key, there, count)
            index = own.clamp_min(0)[:, None, :, None].expand_as(chosen)
            chosen = torch.where((own >= 0)[:, None, :, None], blocks.gather(2, index), chosen)
            chosen = chosen | ~self.behind(call, view)[:, None, :, None]
        return Seen(of_keys(chosen, chunks.member(view.columns)))

    def route(self, call: Call, view: View, chunks: Chunks) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``[B, G, C, D]`` mean keys, ``[B, C]`` which regions there are, ``[B]`` how many a block is routed to, and where the
        prompt's text is routed: ``[B, H, 1, C]`` bool."""
        place, there = chunks.places(view.columns)
        key, found, count = mean_of(view.key, place, there), there.any(2), chunks.counts(self.keep)
        text = self.text(call, view)[:, None, :, None]
        query = (view.query.float() * text).sum(2, keepdim=True) / text.sum(2, keepdim=True).clamp_min(1)
        return key, found, count, best(scores(query, key, found, view.scale), count)

    def blocks(self, view: View, chunks: Chunks, key: Tensor, there: Tensor, count: Tensor) -> Tensor:
        """``[B, H, C, C]`` bool: the regions that every region is routed to."""
        place, asks = chunks.places(view.rows)
        score = scores(mean_of(view.query, place, asks), key, there, view.scale)
        first = chunks.columns.masked_fill(~chunks.there, chunks.of.shape[1]).amin(2)
        last = chunks.columns.masked_fill(~chunks.there, -1).amax(2)
        later = first[:, None, :] > last[:, :, None]  # [B, C, C]
        own = torch.eye(first.shape[1], dtype=torch.bool, device=first.device)
        score = score.masked_fill(later[:, None], float("-inf")).masked_fill(own, float("inf"))
        return best(score, count)

    def text(self, call: Call, view: View) -> Tensor:
        """``[B, Q]`` bool: the rows of the prompt's text behind the first image."""
        text = nn.functional.pad(call.layout.text_after_image, (0, 1)).to(view.rows.device)
        return text.gather(1, view.rows.clamp_max(call.prompt.length).expand(call.batch, -1))

    def behind(self, call: Call, view: View) -> Tensor:
        """``[B, Q]`` bool: the rows that are routed at all: image tokens on a grid, text behind them, and generated rows."""
        chunks = chunks_of(call, self, partial(regions, side=self.side), view.key.device)
        routed = self.text(call, view) | (chunks.member(view.rows) >= 0)
        return routed | (view.rows >= call.prompt.length)
