# SPDX-License-Identifier: Apache-2.0
"""DuoAttention: few heads need the whole context, the others the first and the latest tokens (arXiv 2410.10819, ICLR 2025)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch

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
from vlm_attn.method import ModelFacts, check_choice, check_range


@dataclass(frozen=True, kw_only=True)
class Duo(HeadMethod):
    """Streaming heads see a row's first ``sink`` and latest ``recent`` columns, full heads everything.

    Overview:
        in short: everything, or the first and the latest tokens, by a trained gate
        which keys a head sees: full heads all, streaming heads the first `sink` and latest `recent` columns; the
            `sparsity` share of KV heads with the smallest gates streams
        rows: all
        needs: gates, trained

    Equation:
        seen(i, j) = j <= i                                    full heads
        seen(i, j) = j <= i and (j < sink or i - j < recent)   streaming heads: the sparsity share of smallest gates

    Attributes:
        gates: ``[layers][KV heads]`` how much each head needs the whole context, 0..1; None = from the preset that
            ``vlm-attn calibrate MODEL --method duo`` writes (the paper trains the gates; the mask needs no training).
        sparsity: share of the KV heads that stream, those with the smallest gates. Range 0..1; 0 is neutral.
        sink: first columns of a row that every head sees. Range 0..10000.
        recent: latest columns, the row's own counted. Range 1..1000000.
        mode: ``"drop"`` takes columns out of the cache that no head of a layer will see again; ``"mask"`` keeps them.
            Static and quantised caches and decoders with sliding windows are masked.

    The mask holds in every row, the prompt's too, image tokens counted as any others. Memory is freed in layers whose KV heads
    all stream; where a layer has both kinds the keys stay (the paper keeps a cache per head, with heads reordered).
    """

    name: ClassVar[str] = "duo"
    paper: ClassVar[str] = "DuoAttention, arXiv 2410.10819"
    edited_rows: ClassVar[Literal["last", "text"]] = "text"

    gates: Scores | None = None
    sparsity: float = 0.5
    sink: int = 64
    recent: int = 256
    mode: Literal["drop", "mask"] = "drop"

    def __post_init__(self) -> None:
        score_table(self, "gates")
        check_range(self, "sparsity", 0, 1)
        check_range(self, "sink", 0, 10_000)
        check_range(self, "recent", 1, 1_000_000)
        check_choice(self, "mode", ("drop", "mask"))

    @property
    def neutral(self) -> bool:
        """No head streams."""
        return self.sparsity == 0

    def bind(self, facts: ModelFacts) -> Duo:
        """Check the table against the model."""
        check_scores(self, "gates", facts, facts.kv_heads or facts.heads)
        return masked_where_needed(super().bind(facts), facts)

    def streaming(self) -> list[list[bool]]:
        """``[layers][KV heads]`` the ``sparsity`` share with the smallest gates; of equal ones the earlier."""
        assert self.gates is not None
        flat = torch.tensor(self.gates)
        order = flat.flatten().argsort(stable=True)
        chosen = torch.zeros(flat.numel(), dtype=torch.bool)
        chosen[order[: round(self.sparsity * flat.numel())]] = True
        return chosen.view_as(flat).tolist()

    def start(self, call: Call, processor: Any) -> None:
        """Decide which heads stream, once per call."""
        super().start(call, processor)
        device, rows = call.prompt.group.device, self.streaming()
        call.memory(self)["full"] = [None if not any(row) else ~torch.tensor(row, device=device) for row in rows]
        call.memory(self)["held"] = [all(row) for row in rows]

    def sees(self, call: Call, view: View) -> Seen | None:
        """A sink, what is recent, and for full heads everything."""
        full = call.memory(self)["full"][view.layer]
        if full is None:
            return None
        visible = streams(view, first_columns(call, self, view.key.device), self.sink, self.recent)
        full = view.heads.own(full.to(view.key.device), 0)
        return Seen(visible | full.repeat_interleave(view.group)[:, None, None])

    def held(self, call: Call, layer: int) -> Held | None:
        """Where every head streams, what they see."""
        if self.mode == "mask" or not call.memory(self)["held"][layer]:
            return None
        return Held(self.sink, self.recent)
