# SPDX-License-Identifier: Apache-2.0
"""RazorAttention: heads that copy keep every key, the others a mean of what they drop (arXiv 2407.15891, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.heads import (
    HeadMethod,
    Held,
    Scores,
    Seen,
    View,
    check_scores,
    first_columns,
    masked_where_needed,
    score_table,
    streams,
)
from vlm_attn.method import ModelFacts, check_choice, check_flag, check_range


@dataclass(frozen=True, kw_only=True)
class Razor(HeadMethod):
    """Behind the prompt, heads that do not retrieve see sinks, a local window, and one compensation token.

    Overview:
        in short: everything if it copies; else the first, the latest, and a mean of the rest
        which keys a head sees: the best 1 % by echo and 14 % by induction score all; the others a sink, a window, and
            one token that stands for the rest: mean key and value, `+ log n`
        rows: from the last prompt token on
        needs: two scores per head

    Equation:
        A  = softmax([s_near, q K' + log n])    K', V' = mean of the n keys and values that are neither sink nor local
        o  = A [V_near, V']                     heads that do not retrieve; the others see everything

    Attributes:
        echo: ``[layers][heads]`` mean attention of a token to its earlier copies; None = from the preset that ``vlm-attn
            calibrate MODEL --method razor`` writes.
        induction: the same to the successors of the copies.
        echo_share: share of the KV heads that keep everything for their echo score. Range 0..1; 1 is neutral.
        induction_share: the same for the induction score.
        sink: first columns that every head sees. Range 0..10000.
        local: latest columns, at least. Range 1..1000000.
        fraction: ... or this share of the prompt, if that is more. Range 0..1.
        compensate: whether the dropped keys and values live on as their mean, counted as often as there are dropped ones:
            a key whose logit is raised by ``log n``.
        mode: see `vlm_attn.visual_token_ops.Duo`.

    A group of query heads goes by its largest score. The prompt runs in full; rows from its last token on are edited. Shares
    and scores are those of a port to MindSpore; the compensation token's formula, a mean that counts n times, could not be
    checked against the paper. The mean of rotated keys mixes positions. Where the paper takes the window over the prompt once,
    here it moves on with every row, and what leaves it joins the mean.
    """

    name: ClassVar[str] = "razor"
    paper: ClassVar[str] = "RazorAttention, arXiv 2407.15891"
    adds_keys: ClassVar[bool] = True

    echo: Scores | None = None
    induction: Scores | None = None
    echo_share: float = 0.01
    induction_share: float = 0.14
    sink: int = 4
    local: int = 4000
    fraction: float = 0.2
    compensate: bool = True
    mode: Literal["drop", "mask"] = "drop"

    def __post_init__(self) -> None:
        for name in ("echo", "induction"):
            score_table(self, name)
        for name in ("echo_share", "induction_share", "fraction"):
            check_range(self, name, 0, 1)
        check_range(self, "sink", 0, 10_000)
        check_range(self, "local", 1, 1_000_000)
        check_flag(self, "compensate")
        check_choice(self, "mode", ("drop", "mask"))

    @property
    def neutral(self) -> bool:
        """Every head keeps everything."""
        return 1 in (self.echo_share, self.induction_share)

    def bind(self, facts: ModelFacts) -> Razor:
        """Check the tables against the model."""
        for name in ("echo", "induction"):
            check_scores(self, name, facts, facts.heads)
        return masked_where_needed(super().bind(facts), facts)

    def retrieving(self, kv_heads: int) -> Tensor:
        """``[layers, KV heads]`` bool: the heads that keep everything."""
        chosen = []
        for scores, share in ((self.echo, self.echo_share), (self.induction, self.induction_share)):
            table = torch.tensor(scores)
            table = table.view(len(table), kv_heads, -1).amax(-1)
            best = table.flatten().argsort(descending=True, stable=True)[: ceil(share * table.numel() - 1e-9)]
            chosen.append(torch.zeros(table.numel(), dtype=torch.bool).index_fill(0, best, True).view_as(table))
        return chosen[0] | chosen[1]

    def start(self, call: Call, processor: Any) -> None:
        """A later turn would read the prompt in full, which is no longer there."""
        super().start(call, processor)
        if call.first and call.earlier is not None and call.earlier.reduction is not None:
            raise ValueError(
                "razor: the cache passed in has let columns go, and a prompt is read in full: pass no cache, or patch with "
                'mode="mask"'
            )

    def window(self, call: Call) -> Tensor:
        """``[B, 1]`` latest columns that a row sees: ``max(local, fraction N)`` after a prompt of N tokens."""
        tokens = call.prompt.length - first_columns(call, self)
        return (tokens * self.fraction).long().clamp_min(self.local)

    def full(self, call: Call, view: View) -> Tensor | None:
        """``[KV heads]`` those of the layer that keep everything; None = all of them."""
        memory = call.memory(self)
        if "full" not in memory:
            assert self.echo is not None
            rows = self.retrieving(len(self.echo[0]) // view.group)
            memory["full"] = [None if row.all() else row for row in rows]
            memory["held"] = [not row.any() for row in rows]
            memory["window"] = tuple(self.window(call)[:, 0].tolist())
        return memory["full"][view.layer]

    def sees(self, call: Call, view: View) -> Seen | None:
        """A sink, a window, and the mean of what is in neither."""
        full = self.full(call, view)
        if full is None:
            return None
        device = view.key.device
        full = view.heads.own(full.to(device), 0).repeat_interleave(view.group)[:, None, None]
        near = streams(view, first_columns(call, self, device), self.sink, self.window(call).to(device))
        if not self.compensate:
            return Seen(near | full)
        gone = (view.allowed[:, :1] & ~near)[:, 0].float()  # [B, Q, S]
        if view.counts is not None:
            gone = gone * view.counts[:, None]
        count = gone.sum(-1)  # [B, Q]
        share = (gone / count[..., None].clamp_min(1))[:, None]
        key, value = (share @ x.float() for x in (view.key, view.value))  # [B, G, Q, D], one for every row
        own = torch.eye(gone.shape[1], dtype=torch.bool, device=gone.device)
        bias = count.log()[:, None, :, None].masked_fill(~own | full, float("-inf"))
        return Seen(near | full, key, value, bias)

    def held(self, call: Call, layer: int) -> Held | None:
        """Where no head retrieves, what they see, and a mean of the others."""
        memory = call.memory(self)
        if self.mode == "mask" or not memory.get("held", {layer: False})[layer]:
            return None
        return Held(self.sink, max(memory["window"]), memory["window"], summed=self.compensate)
