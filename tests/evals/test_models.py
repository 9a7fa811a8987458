# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from vlm_attn.evals.models import load_model
from vlm_attn.evals.prompts import generate

from .conftest import coco_folder, tiny_model_folder  # noqa: F401  (fixtures)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"device_map": "everywhere"}, "device map 'everywhere': expected one of auto, balanced"),
        ({"device_map": "auto", "device": "cpu"}, "both say where the model goes"),
        ({"bits": 3}, "expected 4 or 8"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_model("none/such", **options)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the model is looked for."""
    find = importlib.util.find_spec
    gone = {"bitsandbytes", "accelerate"}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in gone else find(name, *a))
    for options, name in (
        ({"bits": 4}, "bitsandbytes"),
        ({"bits": 8}, "bitsandbytes"),
        ({"device_map": "auto"}, "accelerate"),
    ):
        with pytest.raises(ImportError, match=f"{name} is not installed, and .* needs it: pip install {name}"):
            load_model("none/such", **options)


def test_device_map(tiny_model_folder: Path) -> None:  # noqa: F811
    pytest.importorskip("accelerate")
    plain, _ = load_model(str(tiny_model_folder), "cpu")
    spread, _ = load_model(str(tiny_model_folder), device_map="auto")
    assert all(torch.equal(a, b.cpu()) for a, b in zip(plain.parameters(), spread.parameters(), strict=True))


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised(tiny_model_folder: Path, bits: int) -> None:  # noqa: F811
    """Loaded as the options say, and it still writes."""
    pytest.importorskip("bitsandbytes")
    from PIL import Image

    model, processor = load_model(str(tiny_model_folder), "cpu", bits=bits)
    kinds = {type(module).__name__ for module in model.modules()}
    assert {4: "Linear4bit", 8: "Linear8bitLt"}[bits] in kinds
    assert model.device.type == "cpu"
    if bits == 8:
        answers, count = generate(model, processor, [Image.new("RGB", (40, 30))], ["What is this?"], 3)
        assert count
        assert len(answers) == 1


def test_no_bar_over_the_weights(tiny_model_folder: Path, capfd: pytest.CaptureFixture[str]) -> None:  # noqa: F811
    from transformers.utils import logging

    logging.enable_progress_bar()  # another test's command may have turned it off for its process
    load_model(str(tiny_model_folder), "cpu")
    assert "Loading weights" not in capfd.readouterr().err
    assert logging.is_progress_bar_enabled()  # as it was
