"""Methods that re-weight attention or contrast logits, one file each."""

from vlm_attn.hallucination.gift import Gift
from vlm_attn.hallucination.masks import Bidirectional, Croc, Mma, PrefixLm, VisionBlock
from vlm_attn.hallucination.var import Var

__all__ = ["Bidirectional", "Croc", "Gift", "Mma", "PrefixLm", "Var", "VisionBlock"]
