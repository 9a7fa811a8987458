"""Methods that keep fewer visual tokens, one file each."""

from vlm_attn.visual_token_ops.divprune import DivPrune
from vlm_attn.visual_token_ops.downsample import Downsample
from vlm_attn.visual_token_ops.fastv import FastV
from vlm_attn.visual_token_ops.random import Random
from vlm_attn.visual_token_ops.vtw import VTW

__all__ = ["VTW", "DivPrune", "Downsample", "FastV", "Random"]
