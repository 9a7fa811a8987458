# SPDX-License-Identifier: Apache-2.0
"""Masked-diffusion decoding over LLaVA-style Hugging Face models: loop, caches, checkpoint layouts.

answer = vlm_attn.diffusion.generate(model, inputs, steps=16, gen_length=32, block_length=32, cache="prefix")
"""

from vlm_attn.diffusion.decoder import CACHES, Canvas, Output, generate, stream
from vlm_attn.diffusion.layouts import LAYOUTS, load
from vlm_attn.diffusion.sampling import REMASKING, SCHEDULES
from vlm_attn.diffusion.streams import Work

__all__ = ["CACHES", "LAYOUTS", "REMASKING", "SCHEDULES", "Canvas", "Output", "Work", "generate", "load", "stream"]
