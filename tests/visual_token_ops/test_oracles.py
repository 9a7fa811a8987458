"""Reducers beside what their authors' released code gives for the same tensors, where these files are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from vlm_attn.reduction import Picture
from vlm_attn.visual_token_ops import CDPruner, DivPrune, FastV

FOLDER = Path(__file__).resolve().parents[3] / "shared" / "oracles"


def oracle(name: str) -> dict[str, Tensor]:
    path = FOLDER / f"{name}.npz"
    if not path.exists():
        pytest.skip(f"the released code's outputs are not at hand ({path})")
    with np.load(path) as file:
        return {key: torch.from_numpy(file[key]) for key in file.files if file[key].dtype.kind in "fi"}


def picture(count: int, **given: Tensor) -> Picture:
    tokens = given.pop("tokens", torch.zeros(576, 1)).float()
    return Picture(tokens=tokens, places=torch.arange(576), total=576, count=count, grid=(24, 24), **given)


@pytest.mark.parametrize("count", [192, 128, 64])
def test_fastv(count: int) -> None:
    found = oracle("fastv")
    assert FastV().choose(picture(count, rows=found["rows"])).tolist() == sorted(found[f"kept_{count}"].tolist())


@pytest.mark.parametrize("count", [192, 128, 64, 56])
def test_divprune(count: int) -> None:
    found = oracle("divprune")
    assert DivPrune().choose(picture(count, tokens=found["tokens"])).tolist() == sorted(found[f"kept_{count}"].tolist())


@pytest.mark.parametrize("count", [64, 48, 32])
def test_cdpruner(count: int) -> None:
    found = oracle("cdpruner")
    shown = picture(count, tokens=found["tokens"], memory={"similarity": found["similarity"]})  # type: ignore[arg-type]
    assert CDPruner().choose(shown).tolist() == sorted(found[f"kept_{count}"].tolist())
