# SPDX-License-Identifier: Apache-2.0
"""Attention edits for Hugging Face vision-language models: one ``patch()``, native ``generate()``, exactly undone.

model = vlm_attn.patch(model, method="gift", processor=processor)
model.generate(**inputs)
vlm_attn.unpatch(model)
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vlm_attn.analysis import (
        Explanation,
        RowSinks,
        Sink,
        canvas_gaze,
        explain,
        find_sinks,
        gaze,
        saliency,
        sinks,
    )
    from vlm_attn.kernels import Group
    from vlm_attn.method import Method
    from vlm_attn.patching import is_patched, kept, patch, patched, spans, unpatch
    from vlm_attn.reduction import KeptImage, Reducer
    from vlm_attn.registry import MethodInfo, methods

__version__ = "0.1.0"

# Resolved on first use, so that `vlm-attn --help` does not import torch.
_EXPORTS = {
    "Explanation": "vlm_attn.analysis",
    "Group": "vlm_attn.kernels",
    "KeptImage": "vlm_attn.reduction",
    "Method": "vlm_attn.method",
    "MethodInfo": "vlm_attn.registry",
    "Reducer": "vlm_attn.reduction",
    "RowSinks": "vlm_attn.analysis",
    "Sink": "vlm_attn.analysis",
    "canvas_gaze": "vlm_attn.analysis",
    "explain": "vlm_attn.analysis",
    "find_sinks": "vlm_attn.analysis",
    "gaze": "vlm_attn.analysis",
    "is_patched": "vlm_attn.patching",
    "kept": "vlm_attn.patching",
    "methods": "vlm_attn.registry",
    "patch": "vlm_attn.patching",
    "patched": "vlm_attn.patching",
    "saliency": "vlm_attn.analysis",
    "sinks": "vlm_attn.analysis",
    "spans": "vlm_attn.patching",
    "unpatch": "vlm_attn.patching",
}

__all__ = [
    "Explanation",
    "Group",
    "KeptImage",
    "Method",
    "MethodInfo",
    "Reducer",
    "RowSinks",
    "Sink",
    "canvas_gaze",
    "explain",
    "find_sinks",
    "gaze",
    "is_patched",
    "kept",
    "methods",
    "patch",
    "patched",
    "saliency",
    "sinks",
    "spans",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'vlm_attn' has no attribute {name!r}")
    value = getattr(import_module(_EXPORTS[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_EXPORTS])
