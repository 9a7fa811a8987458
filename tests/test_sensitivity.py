# SPDX-License-Identifier: Apache-2.0
"""Every constant of every method does something, and the documented neutral values do nothing: one table for all of them."""

from __future__ import annotations

from dataclasses import fields
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.engine.test_words import tagger
from tests.processors import encode, processor, user
from vlm_attn import registry, words
from vlm_attn.patching import engine_of

ELSEWHERE = {  # what acts on something that this file does not do
    "late_step": "tests/test_diffusion.py",
    "progressive": "tests/test_diffusion.py",
    "mvp": "tests/hallucination/test_mvp.py",
}
SAME = {"mode": "mask"}  # documented to give the same logits
NAMES = {("cdpruner", "clip"), ("trim", "clip")}  # which model is asked
BESIDE = {
    ("sparsevlm", "neighbours"),  # too few tokens here: tests/visual_token_ops/test_closed_forms.py
    ("sparsevlm", "heads"),  # acts in version 2 only: tests/visual_token_ops/test_closed_forms.py
    ("prumerge", "last_layer"),  # the tiny tower's last layer is projected: tests/visual_token_ops/test_methods.py
}
SCORES = tuple(tuple((7 * layer + 5 * head) % 16 / 16 for head in range(4)) for layer in range(4))
OTHERS = tuple(tuple(float(head == layer) for head in range(4)) for layer in range(4))
EDGES = {"sink_dims": (3, 7), "tau": 1.5, "rho": 0.1, "visual_floor": 0.02}
ILVAD = {"alpha": 2.0, "beta": 0.5, "tau": 0.6, "tokens": 5, "layers": (0, 2, 3)}

# method -> (parameters it is tried with, a changed value of every field, parameters that make it a no-op)
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any] | None]] = {
    "agla": (
        {"alpha": 1.0, "beta": 0.0},
        {"alpha": 3.0, "beta": 0.5, "keep": 0.3, "layers": (0,), "clip": "CLIP"},
        {"alpha": 0.0, "beta": 0.0},
    ),
    "dola": ({"beta": 0.0, "layers": (0, 1, 2, 3)}, {"layers": "high", "beta": 0.5, "code_parity": True}, None),
    "duo": (
        {"gates": ((0.9, 0.1), (0.2, 0.8), (0.7, 0.3), (0.4, 0.6)), "sink": 1, "recent": 4},
        {"gates": ((0.1, 0.9), (0.8, 0.2), (0.3, 0.7), (0.6, 0.4)), "sparsity": 0.75, "sink": 6, "recent": 12},
        {"sparsity": 0.0},
    ),
    "gift": (
        {"saliency_layers": (1,), "enhance_layers": (0, 2, 3), "alpha": 3.0},
        {
            "saliency_layers": (2,), "enhance_layers": (3,), "alpha": 2.0, "beta": 1.5, "query_words": "all", "heads": 0.75,
            "clip_sigma": 0.5, "code_parity": True,
        },
        {"alpha": 0.0},
    ),
    "guidance": ({"beta": 0.0}, {"gamma": 2.0, "beta": 0.5}, {"gamma": 1.0, "beta": 0.0}),
    "head_guided": ({"layers": (1, 2)}, {"alpha": 1.0, "layers": (3,)}, {"alpha": 0.0}),
    "icd": (
        {"beta": 0.0, "prefix": (7, 8)},
        {"alpha": 0.5, "beta": 0.5, "prefix": (9,)},
        {"alpha": 0.0, "beta": 0.0},
    ),
    "ilvad": (
        ILVAD,
        {"alpha": 1.0, "beta": 1.0, "tau": 1.2, "tokens": 3, "layers": (1,), "clip_sigma": 0.5, "code_parity": True},
        {"alpha": 0.0, "beta": 1.0},
    ),
    "landmark": ({"keep": 1}, {"keep": 2, "tile": 1, "summaries": False}, {"keep": 1.0}),
    "longheads": ({"keep": 1}, {"keep": 2, "tile": 1}, {"keep": 1.0}),
    "opera": (
        {"beams": 3, "candidates": 4, "warmup": 1, "factor": 1e-2, "threshold": 100},
        {"beams": 2, "candidates": 2, "scale": 5.0, "weight": 9.0, "factor": 1.0, "warmup": 9, "threshold": 1},
        None,
    ),
    "pai": ({"alpha": 0.5}, {"alpha": 0.9, "layers": (3,), "skip_first": True}, {"alpha": 0.0}),
    "paint": (
        {"alpha": 0.9, "beta": 0.5, "share": 0.5, "fence": 0.2},
        {"alpha": 0.5, "beta": 0.9, "layers": (3,), "share": 0.2, "fence": 3.0, "skip_first": True},
        {"alpha": 0.0, "beta": 0.0},
    ),
    "razor": (
        {
            "echo": SCORES, "induction": SCORES[::-1], "echo_share": 0.25, "induction_share": 0.25, "sink": 1, "local": 4,
            "fraction": 0.0,
        },
        {
            "echo": OTHERS, "induction": OTHERS, "echo_share": 0.5, "induction_share": 0.6, "sink": 6, "local": 10,
            "fraction": 0.6, "compensate": False,
        },
        {"echo_share": 1.0},
    ),
    "recycled": ({"keep": 0.3, "stride": 2}, {"keep": 0.6, "stride": 50}, {"stride": 1}),
    "routed": ({"side": 3, "keep": 2}, {"side": 2, "keep": 4}, {"keep": 1.0}),
    "vaf": ({}, {"visual": 1.5, "system": 0.6, "layers": (3,)}, {"visual": 1.0, "system": 1.0}),
    "var": (
        EDGES,
        {
            "sink_dims": (5, 9), "tau": 2.0, "rho": 0.8, "p": 0.2, "visual_floor": 0.5, "code_parity": True, "layers": (1,),
            "detector": "direction",
        },
        {"p": 0.0},
    ),
    "vcd": (
        {"beta": 0.0},
        {"alpha": 0.5, "beta": 0.5, "noise_step": 900, "seed": 1},
        {"alpha": 0.0, "beta": 0.0},
    ),
    "vhr": ({"layers": (1, 2, 3)}, {"alpha": 1.5, "layers": (1,), "drop_outliers": False, "rows": "last"}, {"alpha": 1.0}),
    "mma": ({}, {"span": "released"}, None),
    **{name: ({}, {}, None) for name in ("bidirectional", "croc", "vision_block", "prefix_lm")},
}  # fmt: skip
# The same for reducers; all of them have ``keep`` and ``mode``.
REDUCERS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "cdpruner": ({}, {}),
    "divprune": ({}, {}),
    "downsample": ({}, {}),
    "fastv": ({}, {"layer": 1}),
    "holov": (
        {"chunks": 3, "attention_weight": 1.0},
        {"chunks": 2, "attention_weight": 0.0, "variance_weight": 50.0, "code_parity": True},
    ),
    "layer_skip": ({"keep": 0.0}, {"layers": (1,)}),
    "prumerge": ({}, {"plus": True, "neighbours": 1}),
    "pyramid_drop": ({}, {"layers": (2,), "counts": (0.9, 0.8, 0.7)}),
    "random": ({}, {"seed": 1}),
    "sparsevlm": (
        {"keep": 0.3, "recycle": 1.0, "clusters": 0.3},
        {"layers": (1,), "counts": (0.9, 0.5), "recycle": 0.2, "clusters": 0.8, "version": 2},
    ),
    "tome": ({}, {}),
    "trim": ({}, {"summary": False}),
    "visionzip": ({}, {"contextual": 0.4, "cls_token": False}),
    "vscan": ({"keep": 0.3, "first": 2.0}, {"first": 1.0, "window": 1, "layer": 3, "counts": (5, 2)}),
    "vtw": ({"keep": 0.0, "layer": 2}, {"layer": 1}),
}


@pytest.fixture(autouse=True)
def tagged_words(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = {"dog": "NOUN", "big": "ADJ", "small": "ADJ"}
    monkeypatch.setattr(words, "_tagger", lambda: tagger(tags))


@cache
def built() -> tuple[Any, Any]:
    return tiny.llava()[0], processor()


@cache
def prompt(seed: int) -> dict[str, Any]:
    x = encode(built()[1], [user("is the dog big and the small dog red ?", 1)])
    x["pixel_values"] = torch.randn(x["pixel_values"].shape, generator=torch.Generator().manual_seed(seed))
    return x


def said(seed: int) -> Tensor:
    """Probabilities of three tokens, or the score of a beam search that has none."""
    model, _ = built()
    searches = vlm_attn.is_patched(model) and any(method.name == "opera" for method in engine_of(model).methods)
    beams = {"num_return_sequences": 2} if searches else {}
    with torch.no_grad():
        out = model.generate(
            **prompt(seed), do_sample=False, max_new_tokens=10 if beams else 3, suppress_tokens=[tiny.IMAGE],
            output_scores=True, return_dict_in_generate=True, **beams,
        )  # fmt: skip
    return torch.stack(out.scores).softmax(-1) if getattr(out, "scores", None) else out.sequences_scores


BEFORE: dict[tuple[str, int], Tensor] = {}


def run(name: str, seed: int, parameters: dict[str, Any]) -> Tensor:
    model, own = built()
    with vlm_attn.patched(model, name, processor=own, **parameters):
        return said(seed)


def changes(name: str) -> dict[str, Any]:
    return (METHODS.get(name) or REDUCERS[name])[1]


def cases() -> list[tuple[str, str]]:
    return [(name, field) for name in [*METHODS, *REDUCERS] for field in changes(name)]


def test_every_field_of_every_method_is_here() -> None:
    assert {*METHODS, *REDUCERS, *ELSEWHERE} == set(registry.METHODS), "a new method needs its row above"
    for name in [*METHODS, *REDUCERS]:
        known = {field.name for field in fields(registry.method_class(name))}
        common = {"keep", "mode", "compensate", "positions"} if name in REDUCERS else {"mode"} & known
        spare = {field for method, field in NAMES | BESIDE if method == name}
        if name == "var":
            common = {"cosine"}  # of the other detector: tests/engine/test_sinks.py
        assert known == {*changes(name), *common, *spare}, name


@pytest.mark.parametrize(("name", "field"), cases())
def test_every_constant_matters(name: str, field: str, request: pytest.FixtureRequest) -> None:
    """On one of a few prompts, since a choice may be the same on some."""
    base = dict(METHODS[name][0]) if name in METHODS else {"keep": 0.5, **REDUCERS[name][0]}
    value = changes(name)[field]
    if (name, "clip") in NAMES:
        base["clip"] = request.getfixturevalue("clip")
    if value == "CLIP":
        value = request.getfixturevalue("clip")
    for seed in range(6):
        key = (name, seed)
        if key not in BEFORE:
            BEFORE[key] = run(name, seed, base)
        if not torch.allclose(run(name, seed, {**base, field: value}), BEFORE[key], atol=1e-4):
            return
    pytest.fail(f"{name}.{field}={value!r} changes nothing")


@pytest.mark.parametrize("name", [name for name, (_, _, neutral) in METHODS.items() if neutral is not None])
def test_neutral_values_do_nothing(name: str) -> None:
    base, _, neutral = METHODS[name]
    assert torch.equal(run(name, 0, {**base, **(neutral or {})}), said(0))


@pytest.mark.parametrize("name", REDUCERS)
def test_reducers(name: str, request: pytest.FixtureRequest) -> None:
    """Keeping all is neutral, keeping less is not; masked is what dropped is."""
    given = {"keep": 0.3, **REDUCERS[name][0]}
    if (name, "clip") in NAMES:
        given["clip"] = request.getfixturevalue("clip")
    plain, few = said(0), run(name, 0, given)
    assert torch.equal(run(name, 0, {**given, "keep": 1.0}), plain)
    assert not torch.allclose(few, plain, atol=1e-4)
    assert torch.allclose(run(name, 0, {**given, **SAME}), few, atol=1e-4)
