# SPDX-License-Identifier: Apache-2.0
"""Methods that keep fewer visual tokens, or fewer keys per head, one file each."""

from vlm_attn.visual_token_ops.cdpruner import CDPruner
from vlm_attn.visual_token_ops.divprune import DivPrune
from vlm_attn.visual_token_ops.downsample import Downsample
from vlm_attn.visual_token_ops.duo import Duo
from vlm_attn.visual_token_ops.fastv import FastV
from vlm_attn.visual_token_ops.holov import HoloV
from vlm_attn.visual_token_ops.landmark import Landmark
from vlm_attn.visual_token_ops.layer_skip import LayerSkip
from vlm_attn.visual_token_ops.longheads import LongHeads
from vlm_attn.visual_token_ops.prumerge import PruMerge
from vlm_attn.visual_token_ops.pyramid_drop import PyramidDrop
from vlm_attn.visual_token_ops.random import Random
from vlm_attn.visual_token_ops.razor import Razor
from vlm_attn.visual_token_ops.recycled import Recycled
from vlm_attn.visual_token_ops.routed import Routed
from vlm_attn.visual_token_ops.sparsevlm import SparseVLM
from vlm_attn.visual_token_ops.steps import LateStep, Progressive
from vlm_attn.visual_token_ops.tome import ToMe
from vlm_attn.visual_token_ops.trim import Trim
from vlm_attn.visual_token_ops.visionzip import VisionZip
from vlm_attn.visual_token_ops.vscan import VScan
from vlm_attn.visual_token_ops.vtw import VTW

__all__ = [
    "VTW",
    "CDPruner",
    "DivPrune",
    "Downsample",
    "Duo",
    "FastV",
    "HoloV",
    "Landmark",
    "LateStep",
    "LayerSkip",
    "LongHeads",
    "Progressive",
    "PruMerge",
    "PyramidDrop",
    "Random",
    "Razor",
    "Recycled",
    "Routed",
    "SparseVLM",
    "ToMe",
    "Trim",
    "VScan",
    "VisionZip",
]
