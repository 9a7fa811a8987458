# SPDX-License-Identifier: Apache-2.0
"""PAINT: its sets by hand, and the whole against the tower's own maps and an eager attention of our own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, close, differ, generate, logits, on, same
from tests.oracle import oracle
from vlm_attn import host
from vlm_attn.hallucination import Paint
from vlm_attn.hallucination.paint import token_sets
from vlm_attn.method import ModelFacts

SETTINGS = ACTIVE["paint"]


class TestSets:
    def test_by_hand(self) -> None:
        """Quartiles of 1..8 and 20: 3 and 7, so the fence of 1.5 stands at 13. Of two local tokens one is the summary."""
        late = torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 8, 20])
        early = torch.tensor([0.0, 0, 5, 0, 0, 0, 0, 1, 9])
        local, summary = token_sets(early, late, share=0.25, fence=1.5)
        assert summary.tolist() == [False] * 8 + [True]
        assert local.tolist() == [False, False, True] + [False] * 6
        local, summary = token_sets(early, late, share=1 / 3, fence=3.25)  # exactly on the fence
        assert not summary.any()
        assert local.nonzero().flatten().tolist() == [2, 7, 8]
        assert not token_sets(early, late, share=0.0, fence=1.5)[0].any()

    def test_layers(self) -> None:
        facts = ModelFacts(model_type="llava", layers=32, heads=4, hidden=32)
        assert Paint().bind(facts).layers == tuple(range(2, 32))


def sets_by_hand(model: Any, x: Inputs) -> np.ndarray:
    """The weight of every image token of one picture, from the tower's full maps."""
    own = copy.deepcopy(model)
    own.set_attn_implementation("eager")
    with torch.no_grad():
        maps = own.model.vision_tower(x["pixel_values"], output_attentions=True).attentions
    early, late = (maps[layer][0, :, 0, 1:].double().sum(0).numpy() for layer in (0, -1))
    low, high = np.quantile(late, [0.25, 0.75])
    summary = {j for j, value in enumerate(late) if value > high + SETTINGS["fence"] * (high - low)}
    local = set(sorted(range(len(early)), key=lambda j: -early[j])[: int(SETTINGS["share"] * len(early))]) - summary
    assert summary
    assert local
    weights = [
        SETTINGS["beta"] if j in summary else SETTINGS["alpha"] if j in local else 0.0 for j in range(len(early))
    ]
    assert 0.0 in weights
    return np.array(weights)


def by_hand(model: Any, x: Inputs, prompt: int) -> Callable[[int, Tensor], Tensor]:
    """On raw scores: every row from the last of ``prompt`` columns on."""
    visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    weight = torch.tensor(sets_by_hand(model, x)).float()

    def hand(layer: int, scores: Tensor) -> Tensor:
        new = scores.clone()
        rows, keys = scores.shape[2:]
        for r in range(rows):
            if layer in SETTINGS["layers"] and keys - rows + r >= prompt - 1:
                new[:, :, r, visual] += weight * scores[:, :, r, visual].abs()
        return new

    return hand


def test_against_eager() -> None:
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9]], seed=2)
    own = oracle(model, scores=by_hand(model, x, x["input_ids"].shape[1]))
    wanted, wanted_logits = generate(own, x, new=8), logits(own, x)
    with on(model, "paint"):
        close(logits(model, x), wanted_logits)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}):
            same(generate(model, x, new=8, **options), wanted)
    differ(wanted[1][0], generate(model, x)[1][0])


def test_second_turn() -> None:
    """The picture's sets are those of the turn that showed it."""
    model, inputs = tiny.llava()
    first = inputs([[3, "image", 9]], seed=2)
    more = torch.randint(3, tiny.IMAGE, (1, 6), generator=torch.Generator().manual_seed(3))
    ids = torch.cat([first["input_ids"], more], 1)
    rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    with torch.no_grad():
        plain = host.cache_of(model(**first, use_cache=True))
        edited = host.cache_of(
            oracle(model, scores=by_hand(model, first, first["input_ids"].shape[1]))(**first, use_cache=True)
        )
        own = oracle(model, scores=by_hand(model, first, ids.shape[1]))
        wanted = generate(own, {**rest, host.CACHE: edited})
        with on(model, "paint"):
            cache = host.cache_of(model(**first, use_cache=True))
            same(generate(model, {**rest, host.CACHE: cache}), wanted, 1e-4)
            with pytest.raises(ValueError, match="filled without paint"):
                model.generate(**rest, max_new_tokens=1, **{host.CACHE: plain})


def test_a_tower_without_cls() -> None:
    model, _ = tiny.qwen2_vl()
    with pytest.raises(NotImplementedError, match="paint .* CLS token"):
        vlm_attn.patch(model, "paint")
    assert not vlm_attn.is_patched(model)


@pytest.mark.parametrize("wrong", [{"alpha": -1}, {"beta": 11}, {"share": 1.5}, {"fence": -1}, {"layers": "x"}])
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Paint(**wrong)
