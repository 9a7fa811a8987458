"""Masked-diffusion decoding over LLaVA-style Hugging Face models: loop, caches, checkpoint layouts.

answer = vlm_attn.diffusion.generate(model, inputs, steps=16, gen_length=32, block_length=32, cache="prefix")
"""

from vlm_attn.diffusion.decoder import CACHES, Canvas, Output, generate, stream
from vlm_attn.diffusion.sampling import REMASKING, SCHEDULES

__all__ = ["CACHES", "REMASKING", "SCHEDULES", "Canvas", "Output", "generate", "stream"]
