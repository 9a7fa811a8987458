# SPDX-License-Identifier: Apache-2.0
"""The scenes world: COCO-style pictures drawn on the fly, and a small LLaVA trained on them."""

from pathlib import Path

from .world import CATEGORIES, CONTEXTS, WORLD_VERSION, Scene, SceneObject, dataset, render, scene, scene_of

__all__ = [
    "CATEGORIES",
    "CONTEXTS",
    "WORLD_VERSION",
    "Scene",
    "SceneObject",
    "dataset",
    "model_path",
    "render",
    "scene",
    "scene_of",
]


#: Folders of the bundled models: the one that writes token after token, and its masked-diffusion sibling.
_MODELS = {"ar": "model", "diffusion": "model_diffusion"}


def model_path(kind: str = "ar") -> Path:
    """Return the folder of a bundled model.

    Args:
        kind: ``"ar"``; ``"diffusion"`` for the one to use with `vlm_attn.diffusion.generate`; ``"smol"`` for the one on
            a pretrained language model, which is put together on first use (`vlm_attn.evals.scenes.smol`).

    Raises:
        ValueError: another kind.
        FileNotFoundError: this installation lacks it.
        ImportError, OSError: ``"smol"``: its language model is not installed, or the cache cannot be written.
    """
    if kind == "smol":
        from vlm_attn.evals.scenes import smol

        return smol.smol_path()
    if kind not in _MODELS:
        raise ValueError(f"no scenes model of kind {kind!r}: there are {', '.join((*_MODELS, 'smol'))}")
    path = Path(__file__).parent / _MODELS[kind]
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"the scenes model is not installed ({path} has no config.json)")
    return path
