# SPDX-License-Identifier: Apache-2.0
"""How much every visual token has to do with the question, by CLIP's two towers: for methods whose model has no text side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from vlm_attn.call import Call
from vlm_attn.clip import check_clip, load, shown, similarity, without_form
from vlm_attn.method import Method, ModelFacts
from vlm_attn.reduction import Picture, Reducer


@dataclass(frozen=True, kw_only=True)
class ClipReducer(Reducer):
    """Base of the methods that ask CLIP what the question is about.

    Attributes:
        clip: ``architecture:weights`` of open_clip; the weights are one of its tags or a file. The default is the CLIP that
            LLaVA-1.5's own tower comes from. It is loaded once per process when a model is patched, on the device of the
            pictures when a prompt runs.

    CLIP is shown the picture once, and the question as one text without a note on the form of the answer (``"Answer the
    question using a single word or phrase."`` and the like, of LLaVA's evaluation prompts). A patch is what leaves the
    block before last of CLIP's tower, through its last norm and its projection, as the released codes of TRIM and CDPruner
    have it. The picture is taken back from the model's pixel values, so it needs families whose pictures are single blocks
    of pixels and single grids of tokens (LLaVA-1.5, Gemma 3, PaliGemma), and a processor: it tells how pixels were
    normalised and what the question says.
    """

    loads: ClassVar[tuple[str, ...]] = ("clip",)
    cosine: ClassVar[bool] = True  # the cosine of patch and question; else their product

    clip: str = "ViT-L-14-336:openai"

    def check(self) -> None:
        """Check the name as well.

        Raises:
            ValueError: not ``architecture:weights``.
        """
        super().check()
        check_clip(self.name, self.clip)

    def bind(self, facts: ModelFacts) -> Method:
        """Load CLIP, so that a wrong name is told when the model is patched."""
        if not self.neutral:
            load(self.clip)
        return super().bind(facts)

    def start(self, call: Call, processor: Any) -> None:
        """Compare the call's pictures with its questions.

        Raises:
            ValueError: no processor, no ids or no pixels to read.
            NotImplementedError: tiles or flattened patches.
        """
        super().start(call, processor)
        for number, image, pixels, text in shown(self.name, call, processor):
            similar = similarity(self.clip, pixels, without_form(text), image.grid, cosine=self.cosine)
            call.memory(self).setdefault(number, {})["similarity"] = similar

    def similarity(self, picture: Picture) -> Tensor:
        """``[n]`` cosine of every token's place with the question, in [-1, 1], or their product."""
        return picture.memory["similarity"][picture.places]
