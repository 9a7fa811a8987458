# SPDX-License-Identifier: Apache-2.0
"""Constants per checkpoint, as data files with their provenance."""

from __future__ import annotations

import json
import logging
from dataclasses import fields, replace
from functools import cache
from pathlib import Path
from typing import Any

from vlm_attn.method import Method, ModelFacts
from vlm_attn.registry import suggest

LOGGER = logging.getLogger("vlm_attn")
CALIBRATED = (
    "gift",
    "var",
    "duo",
    "razor",
)  # methods that cannot do without constants which evals/calibrate.py measures
FOLDER = Path(__file__).parent / "presets"


@cache
def bundled() -> dict[str, dict[str, Any]]:
    """The presets that come with the package, by name."""
    return {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))}


def load(preset: str) -> dict[str, Any]:
    """A preset by name or path.

    Raises:
        ValueError: neither a bundled name nor a readable JSON file with a ``methods`` table.
    """
    if preset in bundled():
        return bundled()[preset]
    path = Path(preset)
    if not path.is_file():
        raise ValueError(f"no preset named {preset!r} and no such file: {suggest(preset, bundled())}")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"preset {path}: not readable as JSON ({error})") from error
    methods, model = (data.get("methods"), data.get("model", {})) if isinstance(data, dict) else (None, None)
    tables = [*methods.values(), model] if isinstance(methods, dict) else [None]
    if not all(isinstance(table, dict) for table in tables):
        raise ValueError(
            f"preset {path}: needs an object with a 'methods' table of tables (and perhaps a 'model' table)"
        )
    return data


def fact(config: Any, dotted: str) -> Any:
    """A fact of a ``model`` table, as a config has it (``"text_config.hidden_size"``); None if it has none."""
    for part in dotted.split("."):
        config = getattr(config, part, None)
    return config


def mismatch(preset: dict[str, Any], config: Any) -> str | None:
    """The first fact of the preset's ``model`` table that the config does not meet, as text; None if it fits."""
    for key, wanted in preset.get("model", {}).items():
        found = fact(config, key)
        if found != wanted:
            return f"{key} is {found!r}, the preset is for {wanted!r}"
    return None


def fitting(preset: str, config: Any) -> dict[str, Any]:
    """A preset by name or path, for a model.

    Raises:
        ValueError: see :func:`load`, or it is for another model.
    """
    data = load(preset)
    reason = mismatch(data, config)
    if reason:
        raise ValueError(f"preset {preset!r} does not fit this model: {reason}")
    return data


def constants(name: str, config: Any, preset: str | None) -> dict[str, Any]:
    """A method's constants for a model.

    Args:
        name: the method.
        config: the model's config.
        preset: name or path; None = the bundled one whose ``model`` table fits the config.

    Returns:
        Parameters by name, empty if no preset fits and none was asked for.

    Raises:
        ValueError: the preset asked for is for another model, or has nothing for this method.
    """
    found = _with(name, config, preset)["methods"][name]
    return {key: tuple(value) if isinstance(value, list) else value for key, value in found.items()}


def searched(name: str, config: Any, preset: str | None) -> int | None:
    """How many settings were compared before a method's constants were chosen; None where the preset does not say.

    Args and errors: see :func:`constants`.
    """
    return _with(name, config, preset).get("searched", {}).get(name)


def _with(name: str, config: Any, preset: str | None) -> dict[str, Any]:
    """The preset that has a method's constants for a model; an empty one if none fits and none was asked for."""
    if preset is None:
        own = (p for p in bundled().values() if name in p["methods"] and mismatch(p, config) is None)
        return next(own, {"methods": {name: {}}})
    data = fitting(preset, config)
    if name not in data["methods"]:
        raise ValueError(f"preset {preset!r} has nothing for {name!r}, only for: {', '.join(data['methods'])}")
    return data


def complete(method: Method, config: Any, facts: ModelFacts, preset: str | None) -> Method:
    """Fill the fields of a method that are still None.

    Raises:
        ValueError: a field stays None; the message says what to pass.
    """
    missing = [f.name for f in fields(method) if getattr(method, f.name) is None]
    if not missing:
        return method
    known = constants(method.name, config, preset)
    lacking = [name for name in missing if name not in known]
    if lacking:
        raise ValueError(
            f"{method.name} needs {', '.join(lacking)} for this model ({facts.model_type}, {facts.layers} layers, "
            f"hidden size {facts.hidden}) and no preset has it: pass {', '.join(f'{m}=...' for m in lacking)}, "
            f"or preset= a preset's name or file (`vlm-attn calibrate` measures one for {', '.join(CALIBRATED)}). "
            f"Bundled presets: {', '.join(bundled())}"
        )
    found = {name: known[name] for name in missing}
    LOGGER.info(
        "%s: %s from %s", method.name, found, f"preset {preset!r}" if preset else "the preset that fits the model"
    )
    return replace(method, **found)
