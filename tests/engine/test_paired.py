# SPDX-License-Identifier: Apache-2.0
"""A second stream that shares the forwards of the first gives what it gives in forwards of its own."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer

import vlm_attn
from tests import rows, tiny
from tests.helpers import ACTIVE, Inputs, close, generate, same
from vlm_attn.branch import Branch
from vlm_attn.host import CACHE
from vlm_attn.patching import engine_of
from vlm_attn.registry import build

NEW = 6
PROMPTS = [[3, "image", 7], [1, "image", 13]]  # padded, and of two lengths
GIFT = ("gift", ACTIVE["gift"])
VHR = ("vhr", ACTIVE["vhr"])
# The second prompt is as long as the first, longer, and shorter; alone, and with methods that edit the first stream.
STREAMS: dict[str, list[tuple[str, dict[str, Any]]]] = {
    "vcd": [("vcd", {})],
    "vcd+gift": [("vcd", {}), GIFT],
    "icd+gift": [("icd", {"prefix": (5, 6, 7)}), GIFT],
    "guidance+vhr": [("guidance", {"gamma": 2.0}), VHR],
}
WAYS: dict[str, dict[str, Any]] = {
    "greedy": {},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "sampling": {"do_sample": True, "temperature": 3.0, "num_return_sequences": 2},
}


@cache
def built(family: str) -> tiny.Built:
    return tiny.FAMILIES[family]() if family in tiny.FAMILIES else rows.build(family)


def methods(stream: str) -> list[Any]:
    return [build(name, **parameters) for name, parameters in STREAMS[stream]]


@contextmanager
def forwards(model: Any) -> Iterator[list[int]]:
    """Rows of every forward of the decoder's first layer."""
    seen: list[int] = []
    layer = engine_of(model).text_model.layers[0] if vlm_attn.is_patched(model) else None
    assert layer is not None
    handle = layer.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append((args[0] if args else kwargs["hidden_states"]).shape[0]),
        with_kwargs=True,
    )
    yield seen
    handle.remove()


def run(model: Any, x: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    torch.manual_seed(3)
    return generate(model, x, new=NEW, **options)


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that runs with the second stream in forwards of its own."""

    def call(function: Any) -> Any:
        with monkeypatch.context() as patch:
            patch.setattr(Branch, "paired", False)
            return function()

    return call


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("stream", STREAMS)
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl", "gemma3", "paligemma"])
def test_equals_a_forward_of_its_own(family: str, stream: str, way: str, apart: Any) -> None:
    model, inputs = built(family)
    x = inputs(PROMPTS, seed=1)
    with vlm_attn.patched(model, methods(stream)):
        wanted = apart(lambda: run(model, x, **WAYS[way]))
        with forwards(model) as seen:
            same(run(model, x, **WAYS[way]), wanted)
    beams = {"greedy": 1, "beams": 3, "sampling": 2}[way] * len(PROMPTS)
    longer = family == "gemma3" and stream.startswith("icd")  # windows, and a second prompt that is the longer one
    # All of the last forwards hold both streams: as many as tokens, less the one that the prompt's logits give.
    assert seen[1 - NEW :] == [beams if longer else 2 * beams] * (NEW - 1)


def test_one_prompt_without_padding(apart: Any) -> None:
    model, inputs = built("llava")
    x = inputs(PROMPTS[:1], seed=1)
    with vlm_attn.patched(model, methods("vcd+gift")):
        wanted = apart(lambda: run(model, x))
        with forwards(model) as seen:
            same(run(model, x), wanted)
    assert seen[-1] == 2


@pytest.mark.parametrize(("family", "stream"), [("llava", "icd+gift"), ("gemma3", "vcd"), ("llava", "guidance+vhr")])
def test_the_cache_is_the_first_streams(family: str, stream: str, apart: Any) -> None:
    """``generate`` returns a cache of ordinary layers, as if there had been no second stream."""
    model, inputs = built(family)
    x = inputs(PROMPTS, seed=1)

    def cached() -> Any:
        with torch.no_grad():
            out = model.generate(**x, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True)
        return getattr(out, CACHE)

    with vlm_attn.patched(model, methods(stream)):
        wanted, got = apart(cached), cached()
        assert engine_of(model).pairing is None
    for one, other in zip(got.layers, wanted.layers, strict=True):
        assert type(one) is type(other)
        assert type(one) in (DynamicLayer, DynamicSlidingWindowLayer)
        assert one.get_seq_length() == other.get_seq_length()
        close(one.keys, other.keys)
        close(one.values, other.values)


def test_an_error_leaves_nothing() -> None:
    model, inputs = built("llava")
    x = inputs(PROMPTS, seed=1)
    steps = []

    def fails(ids: Tensor, scores: Tensor, **kwargs: Any) -> Tensor:
        steps.append(len(ids))
        if len(steps) == 3:
            raise RuntimeError("stop here")
        return torch.zeros(len(ids), dtype=torch.bool)

    with vlm_attn.patched(model, methods("vcd+gift")):
        wanted = run(model, x)
        with pytest.raises(RuntimeError, match="stop here"):
            run(model, x, stopping_criteria=[fails])
        assert engine_of(model).pairing is None
        same(run(model, x), wanted)
    assert steps == [2, 2, 2]  # criteria see the first stream only


@pytest.mark.parametrize("options", [{"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 3}])
def test_runs_apart_where_it_must(options: dict[str, Any], caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = built("llava")
    x = inputs(PROMPTS[:1], seed=1)
    with vlm_attn.patched(model, methods("vcd+gift")), caplog.at_level(logging.INFO, logger="vlm_attn"):
        wanted = run(model, x)
        with forwards(model) as seen:
            same(run(model, x, **options), wanted)
    assert set(seen) == {1}
    if "cache_implementation" in options:
        assert "in a forward of its own" in caplog.text


def test_with_fewer_visual_tokens(apart: Any) -> None:
    """A cache that holds fewer columns than it counts is not joined."""
    model, inputs = built("llava")
    x = inputs(PROMPTS, seed=1)
    with vlm_attn.patched(model, [build("vcd"), build("fastv", layer=2)]):
        wanted = apart(lambda: run(model, x))
        with forwards(model) as seen:
            same(run(model, x), wanted)
    assert set(seen) == {2}
