# SPDX-License-Identifier: Apache-2.0
"""Pictures of what a method does, and the browser demo (``vlm-attn demo``)."""

from vlm_attn.demo.overlay import overlay, seen_box

__all__ = ["overlay", "seen_box"]
