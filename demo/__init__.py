"""Pictures of what a method does."""

from vlm_attn.demo.overlay import overlay

__all__ = ["overlay"]
