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
        kind: ``"ar"``, or ``"diffusion"`` for the one to use with `vlm_attn.diffusion.generate`.

    Raises:
        ValueError: another kind.
        FileNotFoundError: this installation lacks it.
    """
    if kind not in _MODELS:
        raise ValueError(f"no scenes model of kind {kind!r}: there are {', '.join(_MODELS)}")
    path = Path(__file__).parent / _MODELS[kind]
    if not (path / "config.json").exists():
        raise FileNotFoundError(f"the scenes model is not installed ({path} has no config.json)")
    return path
