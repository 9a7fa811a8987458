# SPDX-License-Identifier: Apache-2.0
"""Methods that edit attention, set the prompt's mask, or act on the next token, one file each."""

from vlm_attn.hallucination.agla import Agla
from vlm_attn.hallucination.dola import Dola
from vlm_attn.hallucination.gift import Gift
from vlm_attn.hallucination.guidance import Guidance
from vlm_attn.hallucination.head_guided import HeadGuided
from vlm_attn.hallucination.icd import Icd
from vlm_attn.hallucination.ilvad import Ilvad
from vlm_attn.hallucination.masks import Bidirectional, Croc, Mma, PrefixLm, VisionBlock
from vlm_attn.hallucination.mvp import Mvp
from vlm_attn.hallucination.opera import Opera
from vlm_attn.hallucination.pai import Pai
from vlm_attn.hallucination.paint import Paint
from vlm_attn.hallucination.vaf import Vaf
from vlm_attn.hallucination.var import Var
from vlm_attn.hallucination.vcd import Vcd
from vlm_attn.hallucination.vhr import Vhr, token_divergence, token_score

__all__ = [
    "Agla",
    "Bidirectional",
    "Croc",
    "Dola",
    "Gift",
    "Guidance",
    "HeadGuided",
    "Icd",
    "Ilvad",
    "Mma",
    "Mvp",
    "Opera",
    "Pai",
    "Paint",
    "PrefixLm",
    "Vaf",
    "Var",
    "Vcd",
    "Vhr",
    "VisionBlock",
    "token_divergence",
    "token_score",
]
