# SPDX-License-Identifier: Apache-2.0
"""Attention kernels of vlm_attn and their PyTorch twins, imported as ``vlm_attn.kernels``."""

if __name__ == "kernels":
    # Python started in the repository root finds this folder before Hugging Face's installed ``kernels``, which
    # transformers imports. Hand over to the installed one: look for it everywhere but here.
    import importlib.util as _util
    import sys as _sys
    from importlib.machinery import PathFinder as _PathFinder
    from pathlib import Path as _Path

    _root = _Path(__file__).resolve().parents[1]
    _spec = _PathFinder.find_spec(__name__, [p for p in _sys.path if _Path(p or ".").resolve() != _root])
    if _spec is not None and _spec.loader is not None:
        _module = _util.module_from_spec(_spec)
        _sys.modules[__name__] = _module
        _spec.loader.exec_module(_module)
    # Where none is installed this stays an empty module without a version, which transformers takes for "not there".
else:
    from vlm_attn.kernels import masks
    from vlm_attn.kernels.dispatch import combine, edited_attention, prefer, segmented_attention, triton_first
    from vlm_attn.kernels.edited import Edit, Policy, ScoreEdit, merged, one_hot_segments
    from vlm_attn.kernels.groups import Group
    from vlm_attn.kernels.prefill import Attended, Pattern, Score, masked_attention
    from vlm_attn.kernels.probe import Probe, attention_rows, probe

    __all__ = [
        "Attended",
        "Edit",
        "Group",
        "Pattern",
        "Policy",
        "Probe",
        "Score",
        "ScoreEdit",
        "attention_rows",
        "combine",
        "edited_attention",
        "masked_attention",
        "masks",
        "merged",
        "one_hot_segments",
        "prefer",
        "probe",
        "segmented_attention",
        "triton_first",
    ]
