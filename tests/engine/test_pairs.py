# SPDX-License-Identifier: Apache-2.0
"""Every ordered pair of built-in methods: both work together, or it is said why they do not."""

from __future__ import annotations

import warnings
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import close
from tests.pins import SETTINGS
from tests.processors import encode, processor, user
from vlm_attn.reduction import Reducer
from vlm_attn.registry import METHODS, build, method_class

# Names, so that what goes without its own row here is tried with the defaults.
PARAMETERS: dict[str, dict[str, Any]] = {
    **{name: settings for name, settings in SETTINGS.items() if name != "plain"},
    "mvp": {"max_tokens": 1, "paths": 1},
    "opera": {"beams": 2, "candidates": 2},
    "ilvad": {"tokens": 2},
}
CLIP = ("cdpruner", "trim")  # they need a CLIP; otherwise they are reducers before the language model, as divprune
NAMES = [name for name in METHODS if name not in CLIP]
REDUCERS = [name for name in NAMES if issubclass(method_class(name), Reducer)]
# Reducers that choose at the same layers as others, and what they do when nothing is said.
CLOSE: dict[str, dict[str, Any]] = {**PARAMETERS, **{name: {} for name in REDUCERS}}


@cache
def built() -> tuple[Any, Any, dict[str, Any]]:
    own = processor()
    x = encode(own, [user("is the dog big and the small dog red ?", 1)])
    x["pixel_values"] = torch.randn(x["pixel_values"].shape, generator=torch.Generator().manual_seed(0))
    return tiny.llava()[0], own, x


def said(methods: list[Any]) -> Tensor:
    """Logits of two tokens. Zeros for a search, which has none."""
    model, own, x = built()
    words = {"processor": own} if any(m.name == "mvp" for m in methods) else {}  # reading a template takes its time
    with vlm_attn.patched(model, methods, **words), torch.no_grad():
        out = model.generate(
            **x, do_sample=False, max_new_tokens=2, suppress_tokens=[tiny.IMAGE], eos_token_id=tiny.EOS,
            output_logits=True, return_dict_in_generate=True,
        )  # fmt: skip
    return torch.stack(out.logits) if getattr(out, "logits", None) else torch.zeros(1)


def outcome(first: str, second: str, table: dict[str, dict[str, Any]], **common: Any) -> Tensor | str:
    """What a pair gives, or why it gives nothing."""
    both = [build(name, **{**table.get(name, {}), **common}) for name in (first, second)]
    try:
        return said(both)
    except (ValueError, NotImplementedError) as error:
        assert not vlm_attn.is_patched(built()[0])
        words = str(error)
        assert first in words or second in words, f"{first}+{second}: names neither: {words}"
        assert len(words) > 40, words
        return words


@pytest.fixture(autouse=True)
def quiet() -> Any:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", category=UserWarning)
        yield


@pytest.mark.parametrize("first", NAMES)
def test_every_ordered_pair(first: str) -> None:
    for second in NAMES:
        if second != first:
            found = outcome(first, second, PARAMETERS)
            assert isinstance(found, str) or found.isfinite().all(), f"{first}+{second} gives nothing finite"


@pytest.mark.parametrize("table", [PARAMETERS, CLOSE], ids=["settings", "defaults"])
@pytest.mark.parametrize("first", REDUCERS)
def test_reducers_drop_what_they_mask(first: str, table: dict[str, dict[str, Any]]) -> None:
    """Two that keep fewer tokens: taken out or hidden, the logits are the same."""
    for second in REDUCERS:
        if second == first:
            continue
        dropped, masked = (outcome(first, second, table, mode=mode) for mode in ("drop", "mask"))
        assert isinstance(dropped, str) == isinstance(masked, str), f"{first}+{second}: {dropped} / {masked}"
        if isinstance(dropped, Tensor) and isinstance(masked, Tensor):
            close(dropped, masked)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        *((name, "downsample") for name in ("random", "tome", "visionzip", "holov")),
        *((name, "pyramid_drop") for name in ("sparsevlm", "vscan", "vtw", "fastv")),
        ("vtw", "vscan"),
    ],
)
def test_pairs_that_failed(first: str, second: str) -> None:
    """One of a whole grid of tokens says that it must come first; what reads ahead sees what is left."""
    for table in (PARAMETERS, CLOSE):
        found = outcome(first, second, table)
        if second == "downsample":
            assert isinstance(found, str)
            assert "put downsample first" in found
            other = outcome(second, first, table)
            assert isinstance(other, Tensor) or (first == "visionzip" and "has merged them before" in other)
        else:
            assert isinstance(found, Tensor)
