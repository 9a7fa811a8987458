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


def model_path() -> Path:
    """Return the folder of the bundled model; `FileNotFoundError` when this installation lacks it."""
    path = Path(__file__).parent / "model"
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"the scenes model is not installed ({path} has no config.json)")
    return path
