# SPDX-License-Identifier: Apache-2.0
"""Reducers beside what their authors' released code gives for the same tensors, where these files are at hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from tests.helpers import close
from vlm_attn.reduction import Picture
from vlm_attn.visual_token_ops import CDPruner, DivPrune, FastV, PruMerge, SparseVLM, Trim, VisionZip
from vlm_attn.visual_token_ops.sparsevlm import PUBLISHED, raters

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


@pytest.mark.parametrize("count", [192, 121, 64])
def test_trim(count: int) -> None:
    found = oracle("trim")
    shown = picture(count, tokens=found["tokens"], memory={"similarity": found["dot"]})  # type: ignore[arg-type]
    assert Trim(summary=False).choose(shown).tolist() == sorted(found[f"kept_{count}"].tolist())
    chosen = Trim().choose(shown)
    merged = Trim().merge(shown, chosen)
    seat = [i for i in chosen.tolist() if i not in found[f"kept_{count}"].tolist()]
    assert len(seat) == 1
    close(merged[chosen.tolist().index(seat[0])], found[f"mean_{count}"], 1e-3)
    order = Trim().order(shown, chosen)
    assert chosen[order].tolist() == [*sorted(found[f"kept_{count}"].tolist()), *seat]


@pytest.mark.parametrize("count", [192, 128, 64])
def test_visionzip(count: int) -> None:
    """The CLS token is one of the dominant ones, and sits where the first token that goes stood."""
    found = oracle("visionzip")
    whole = torch.arange(64.0)
    shown = picture(count, tokens=found["tokens"], cls=found["cls"], keys=found["keys"].float(), cls_feature=whole)
    shown.features, shown.project = shown.tokens, lambda x: x
    method = VisionZip(keep=count)
    dominant, contextual, seat = method.split(shown)
    assert dominant.tolist() == sorted(found[f"dominant_{count}"].tolist())
    assert contextual.tolist() == found[f"contextual_{count}"].tolist()
    chosen = method.choose(shown)
    assert len(chosen) == count
    merged = method.merge(shown, chosen)
    ordered = merged[method.order(shown, chosen)]
    close(ordered[0], whole)
    close(ordered[1 : 1 + len(dominant)], found["tokens"][dominant].float())
    close(ordered[1 + len(dominant) :], found[f"contextual_features_{count}"])


@pytest.mark.parametrize("count", [144, 36])
def test_prumerge(count: int) -> None:
    found = oracle("prumerge")
    shown = picture(count, tokens=found["tokens"], cls=found["cls"], keys=found["keys"].float())
    method = PruMerge(keep=count)
    chosen = method.choose(shown)
    assert len(chosen) == count + 1
    order = method.order(shown, chosen)
    assert chosen[order][:-1].tolist() == found[f"kept_{count}"].tolist()
    close(method.merge(shown, chosen)[order], found[f"features_{count}"].float(), 1e-3)


@pytest.mark.parametrize("mean", [192, 128, 96, 64])
def test_sparsevlm(mean: int) -> None:
    """The first stage: who rates, what stays, what is recycled, and the means of its clusters."""
    found = oracle("sparsevlm")
    assert raters(found["image"], found["text"]).tolist() == found["raters"].tolist()
    counts = tuple(found[f"counts_{mean}"].tolist())
    assert counts == PUBLISHED[1][mean]
    shown = picture(
        counts[0], tokens=found["tokens"], rows=found["score"][None, None], memory={"raters": torch.tensor([0])}
    )  # type: ignore[arg-type]
    shown.stage = 1
    method = SparseVLM(counts=counts)
    chosen = method.choose(shown)
    kept, recycled = found[f"kept_{mean}"].tolist(), found[f"recycled_{mean}"].tolist()
    assert sorted(shown.memory["recycled"].tolist()) == sorted(recycled)
    centres = shown.memory["centres"]
    merged = method.merge(shown, chosen)
    ordered = chosen[method.order(shown, chosen)].tolist()
    assert ordered == [*sorted(kept), *centres.tolist()]
    means = merged[torch.searchsorted(chosen, centres)]
    nearest = torch.cdist(means, found[f"means_{mean}"]).argmin(1)  # its random noise swaps two clusters once
    assert sorted(nearest.tolist()) == list(range(len(means)))
    close(means, found[f"means_{mean}"][nearest])
