# SPDX-License-Identifier: Apache-2.0
"""The examples of public docstrings run, with the bundled models under the names ``model``, ``processor`` and ``inputs``."""

from __future__ import annotations

import doctest
import importlib
import inspect
from functools import cache
from typing import Any

import pytest
import torch

import vlm_attn

#: Modules whose public names have their examples run.
MODULES = ("vlm_attn", "vlm_attn.diffusion", "vlm_attn.evals.scenes", "vlm_attn.kernels", "vlm_attn.kernels.masks")


@cache
def examples() -> dict[str, doctest.DocTest]:
    """Every docstring with an example, by its name."""
    finder = doctest.DocTestFinder(recurse=False)
    found = {}
    for module in map(importlib.import_module, MODULES):
        for name in getattr(module, "__all__", None) or vars(module):
            value = getattr(module, name)
            if not inspect.ismodule(value) and getattr(value, "__module__", "").startswith("vlm_attn"):
                for test in finder.find(value, name=name, module=False, globs={}):
                    if test.examples:
                        found[f"{value.__module__}.{name}"] = test
    return found


@pytest.fixture(scope="module")
def names() -> dict[str, Any]:
    """What an example may use without saying where it comes from, as in the quick start."""
    from vlm_attn.evals import prompts, scenes
    from vlm_attn.evals.models import load_model

    model, processor = load_model("scenes", "cpu")
    denoiser, _ = load_model("scenes-diffusion", "cpu")
    image = scenes.render(scenes.scene("validation", 3))
    inputs = prompts.build_inputs(model, processor, [image], ["Please describe this image in detail."])
    given = {"model": model, "processor": processor, "denoiser": denoiser, "inputs": inputs, "image": image}
    return {"vlm_attn": vlm_attn, "torch": torch, **given}


@pytest.mark.parametrize("name", examples())
def test_example_runs(name: str, names: dict[str, Any]) -> None:
    test = examples()[name]
    test.globs = dict(names)
    said: list[str] = []
    done = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(test, out=said.append, clear_globs=False)
    assert not done.failed, "".join(said)
    assert not vlm_attn.is_patched(names["model"]), "an example leaves the model patched"


def test_every_public_function_has_one() -> None:
    functions = [name for name in vlm_attn.__all__ if inspect.isfunction(getattr(vlm_attn, name))]
    functions += [name for name in vlm_attn.diffusion.__all__ if name in ("generate", "stream")]
    have = {name.rpartition(".")[2] for name in examples()}
    assert set(functions) <= have
