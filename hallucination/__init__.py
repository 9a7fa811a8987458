"""Methods that re-weight attention or contrast logits, one file each."""

from vlm_attn.hallucination.gift import Gift
from vlm_attn.hallucination.var import Var

__all__ = ["Gift", "Var"]
