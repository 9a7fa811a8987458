# SPDX-License-Identifier: Apache-2.0
"""Attention masks of the prompt: modality-mutual attention (AKI, arXiv 2503.02597) and its relatives.

The mask is in force while the prompt runs; its keys and values stay in the cache, and every generated row sees all of
them. Cached images can therefore not be reused for another question, and later turns do not open earlier images.

These are *trained* methods: their models saw the mask in training. On a model that was trained causally they are an
experiment, which a warning says once per process.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar, Literal

from vlm_attn.call import Call
from vlm_attn.kernels import Edit, Group, masks
from vlm_attn.method import Method, check_choice

# Text before an image is earlier than its rows, so that seeing all text of the prompt is seeing what comes after it.
AS_RELEASED = masks.Mask(
    (masks.causal | masks.pairs([Group.VISUAL], masks.TEXT)).clauses, "modality-mutual of the released span"
)


@cache
def _warn(name: str) -> None:
    warnings.warn(
        f"{name}: this mask belongs to models that were trained with it; on a causally trained model it is an experiment",
        UserWarning,
        stacklevel=2,
    )


@dataclass(frozen=True, kw_only=True)
class _PromptMask(Method):
    edited_rows: ClassVar[Literal["last", "text"]] = "text"  # no row is edited: the prompt need not be split
    visible: ClassVar[masks.Mask]

    @property
    def mask(self) -> masks.Mask:
        """The mask of the prompt."""
        return self.visible

    def start(self, call: Call, processor: Any) -> None:
        """Say once that this is an experiment on a stock model."""
        _warn(self.name)

    def edit(self, call: Call, layer: int) -> Edit | None:
        """Nothing beside the mask."""
        return None


@dataclass(frozen=True, kw_only=True)
class Mma(_PromptMask):
    """Let image tokens see the question behind them.

    Overview:
        in short: image tokens see the question
        what it does: image tokens see the question behind them

    Equation:
        row i sees key j  where  j <= i  or  (i in an image and j in the question)

    Image-image stays causal, the text before the image sees no later token. Trained with the mask, the paper reports
    POPE 82.7 against 79.8 of its causal twin (4B, same data).

    Attributes:
        span: what counts as the question: ``"question"``, the user's words; ``"released"``, all text from the image on with
            the template's tail, since the released span runs from the image's end through the assistant marker.

    Deviations from the released code: batches, padding and several images work.
    """

    name: ClassVar[str] = "mma"
    paper: ClassVar[str] = "AKI, arXiv 2503.02597"
    visible: ClassVar[masks.Mask] = masks.modality_mutual

    span: Literal["question", "released"] = "question"

    def __post_init__(self) -> None:
        check_choice(self, "span", ("question", "released"))

    @property
    def mask(self) -> masks.Mask:
        """The mask of the prompt."""
        return self.visible if self.span == "question" else AS_RELEASED


@dataclass(frozen=True, kw_only=True)
class Bidirectional(_PromptMask):
    """Let every prompt token see every token of the other modality.

    Overview:
        in short: tokens of either modality see all of the other
        what it does: tokens of either modality see all of the other

    Equation:
        row i sees key j  where  j <= i  or  i and j are of two modalities, both in the prompt

    The generalised form of modality-mutual attention for interleaved prompts.
    """

    name: ClassVar[str] = "bidirectional"
    paper: ClassVar[str] = "AKI, arXiv 2503.02597, generalised form"
    visible: ClassVar[masks.Mask] = masks.generalised_modality_mutual


@dataclass(frozen=True, kw_only=True)
class Croc(_PromptMask):
    """Let image tokens see each other in both directions.

    Overview:
        in short: image tokens see each other in both directions
        what it does: image tokens see each other in both directions

    Equation:
        row i sees key j  where  j <= i  or  i and j are both image tokens

    As the paper describes it; its code uses a prefix mask in the first training stage only (see ``prefix_lm``).
    """

    name: ClassVar[str] = "croc"
    paper: ClassVar[str] = "Croc, arXiv 2410.14332"
    visible: ClassVar[masks.Mask] = masks.croc


@dataclass(frozen=True, kw_only=True)
class VisionBlock(_PromptMask):
    """Let the tokens of one image see each other in both directions.

    Overview:
        in short: image tokens of one image see each other in both directions (as in Gemma 3)
        what it does: tokens of one image see each other in both directions

    Equation:
        row i sees key j  where  j <= i  or  i and j are tokens of one image

    As Gemma 3 and others read images; for a model that was not trained so an experiment.
    """

    name: ClassVar[str] = "vision_block"
    paper: ClassVar[str] = "as in Gemma 3, arXiv 2503.19786"
    visible: ClassVar[masks.Mask] = masks.vision_block


@dataclass(frozen=True, kw_only=True)
class PrefixLm(_PromptMask):
    """Let every prompt token see the whole prompt.

    Overview:
        in short: the whole prompt sees itself (as in PaliGemma)
        what it does: the whole prompt sees itself

    Equation:
        row i sees key j  where  j <= i  or  j is in the prompt

    As PaliGemma reads its prompts; for a model that was not trained so an experiment.
    """

    name: ClassVar[str] = "prefix_lm"
    paper: ClassVar[str] = "as in PaliGemma, arXiv 2407.07726"
    visible: ClassVar[masks.Mask] = masks.prefix_lm
