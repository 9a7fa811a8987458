# SPDX-License-Identifier: Apache-2.0
"""ICD: instruction contrastive decoding (arXiv 2403.18715, Findings of ACL 2024)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from vlm_attn.branch import Contrastive, Run, with_tokens
from vlm_attn.call import Call
from vlm_attn.chat import tokenizer_of


@dataclass(frozen=True, kw_only=True)
class Icd(Contrastive):
    """Contrast with what the model says when its instruction is disturbed.

    The second stream sees the same picture and the same prompt, with a prefix before the question that tells the model to be
    someone who sees badly.

    Overview:
        in short: contrasts with what it says under a disturbed instruction
        contrasts the next token with: what it says when a prefix before the question disturbs it
        formula: `(1 + alpha) l - alpha l'`
        needs: a processor, or the prefix as token ids

    Equation:
        l -> (1 + alpha) l - alpha l(disturbed)                   only tokens with p >= beta max p

    Attributes:
        alpha: strength of the contrast. Range 0..20.
        beta: a token must be at least this share of the likeliest one's probability. Range 0..1; 0 = no cut.
        prefix: what is put before the question: text, which needs ``patch(processor=)``, or token ids.

    Formula, ``alpha`` and ``beta`` are those of the released scripts. These try five prefixes; the default here is one of them,
    shortened. Deviations: for LLaVA they put it in the place of the system prompt, here it stands before the question, which
    every template has; for InstructBLIP they give it to the query transformer, here the language model reads it.
    Cost: a second prompt (its picture is encoded once) and further rows in the forward of every token.
    """

    name: ClassVar[str] = "icd"
    paper: ClassVar[str] = "ICD, arXiv 2403.18715"
    same_image: ClassVar[bool] = True

    prefix: str | tuple[int, ...] = "You are a confused object detector."

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.prefix, list):
            object.__setattr__(self, "prefix", tuple(self.prefix))
        numbers = isinstance(self.prefix, tuple) and all(type(i) is int and i >= 0 for i in self.prefix)
        if not self.prefix or not (numbers or isinstance(self.prefix, str)):
            raise ValueError(f"icd: prefix={self.prefix!r} must be text or token ids, and not empty")

    def start(self, call: Call, processor: Any) -> None:
        """Tokenise the prefix."""
        tokens: Any = self.prefix
        if isinstance(tokens, str):
            if processor is None:
                raise ValueError("icd: a prefix in words needs the tokenizer: patch(model, 'icd', processor=processor)")
            tokens = tokenizer_of(processor)(tokens + " ", add_special_tokens=False)["input_ids"]
        call.memory(self)["prefix"] = torch.tensor(tokens)

    def second(self, run: Run) -> dict[str, Tensor]:
        """The same prompt with the prefix before its question."""
        return with_tokens(run, run.call.memory(self)["prefix"], [start for start, _ in run.call.prompt.query])
