# SPDX-License-Identifier: Apache-2.0
"""Positions of what is left: ``positions="packed"`` is the plain model on the shorter prompt, as most released code runs it."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, close, differ, generate, logits, same
from vlm_attn.hallucination import Gift
from vlm_attn.reduction import Picture, Reducer
from vlm_attn.visual_token_ops import (
    FastV,
    HoloV,
    LayerSkip,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    VisionZip,
)

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
PACKED: dict[str, Any] = {"positions": "packed"}
BEFORE = {
    "random": Random(keep=0.5, **PACKED),
    "holov": HoloV(keep=5, chunks=3, **PACKED),
    "visionzip": VisionZip(keep=5, contextual=0.4, **PACKED),
    "prumerge": PruMerge(keep=3, neighbours=4, **PACKED),
}


@cache
def built(name: str) -> tiny.Built:
    return tiny.FAMILIES[name]()


def embeddings(model: Any, x: Inputs) -> Tensor:
    """What the stock model hands to its text model."""
    seen: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, x)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("name", BEFORE)
def test_before_the_model_is_a_shorter_prompt(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The stock model on embeddings put together here, in the released order, greedily."""
    model, inputs = built("llava")
    x = inputs([[3, "image", 7]], seed=1)
    method, made = BEFORE[name], []
    cls = type(method)
    choose = cls.choose

    def looked(self: Any, picture: Picture) -> Tensor:
        chosen = choose(self, picture)
        order = self.order(picture, chosen)
        values = self.merge(picture, chosen)
        values = picture.tokens[chosen] if values is None else values
        made.append(values if order is None else values[order])
        return chosen

    monkeypatch.setattr(cls, "choose", looked)
    with vlm_attn.patched(model, method):
        found = generate(model, x, suppress_tokens=[tiny.IMAGE])
        uncached = generate(model, x, suppress_tokens=[tiny.IMAGE], use_cache=False)
    same(uncached, found)
    embeds = embeddings(model, x)
    image = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    short = torch.cat([embeds[0, : image[0]], made[0].to(embeds.dtype), embeds[0, image[-1] + 1 :]])[None]
    given = {"inputs_embeds": short, "attention_mask": torch.ones(1, short.shape[1], dtype=torch.long)}
    same(generate(model, given, suppress_tokens=[tiny.IMAGE]), found)
    with vlm_attn.patched(model, replace(method, positions="original")):
        differ(generate(model, x, suppress_tokens=[tiny.IMAGE])[1], found[1])


@pytest.mark.parametrize("family", ["llava_next", "internvl", "gemma3", "paligemma"])
def test_other_families(family: str) -> None:
    model, inputs = built(family)
    x = inputs([[3, "image", 7]], seed=1)
    with vlm_attn.patched(model, Random(keep=0.5, **PACKED)):
        found = logits(model, x)[:, -1]
        index = vlm_attn.kept(model)[0].index
    image = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    keep = torch.ones(x["input_ids"].shape[1], dtype=torch.bool).index_fill(0, image, False)
    keep[image[index]] = True
    text = model.model.language_model
    seen: dict[str, Any] = {}
    handle = text.register_forward_pre_hook(lambda m, args, kwargs: seen.update(kwargs), with_kwargs=True)
    logits(model, x)
    handle.remove()
    mask = seen["attention_mask"]
    places = keep.nonzero().flatten()

    def part(value: Any) -> Any:
        return value[..., places, :][..., places] if isinstance(value, Tensor) and value.ndim == 4 else None

    mask = {kind: part(one) for kind, one in mask.items()} if isinstance(mask, dict) else part(mask)
    positions = seen["position_ids"][:, : len(places)] if seen.get("position_ids") is not None else None
    with torch.no_grad():
        out = text(inputs_embeds=seen["inputs_embeds"][:, places], attention_mask=mask, position_ids=positions)
        wanted = model.lm_head(out.last_hidden_state[:, -1])
    close(found, wanted)


def test_inside_the_model_layer_by_layer() -> None:
    """FastV by hand: layers 0 and 1 as they are, from layer 2 on the rows that are left, with positions 0 to n - 1."""
    model, inputs = built("llava")
    x = inputs([[3, "image", 7]], seed=1)
    with vlm_attn.patched(model, FastV(layer=2, keep=4, **PACKED)):
        found = logits(model, x)[:, -1]
        index = vlm_attn.kept(model)[0].index
    embeds = embeddings(model, x)
    image = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten()
    keep = torch.ones(embeds.shape[1], dtype=torch.bool).index_fill(0, image, False)
    keep[image[index]] = True
    text, hidden = model.model.language_model, embeds
    with torch.no_grad():
        for number, layer in enumerate(text.layers):
            if number == 2:
                hidden = hidden[:, keep]
            length = hidden.shape[1]
            shown = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            turned = text.rotary_emb(hidden, torch.arange(length)[None])
            hidden = layer(hidden, attention_mask=shown, position_embeddings=turned)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden
        close(found, model.lm_head(text.norm(hidden))[:, -1])


INSIDE: list[Reducer] = [
    FastV(layer=2, keep=0.4, **PACKED),
    PyramidDrop(layers=(1, 2, 3), keep=0.3, **PACKED),
    SparseVLM(layers=(0, 1), keep=0.4, recycle=0.5, **PACKED),
    VisionZip(keep=5, **PACKED),
    Random(keep=0.4, compensate=True, **PACKED),
]


@pytest.mark.parametrize("method", INSIDE, ids=lambda m: m.name)
@pytest.mark.filterwarnings("ignore:StaticCache")
def test_ways_of_decoding(method: Reducer) -> None:
    """Dropped is masked, a batch its rows alone; without a cache, with a static one, beside an edit: all the same."""
    model, inputs = built("llava")
    x = inputs(PROMPTS, seed=1)
    options = {"suppress_tokens": [tiny.IMAGE]}
    gift = Gift(**{**ACTIVE["gift"], "heads": 1.0})
    with vlm_attn.patched(model, method):
        found = generate(model, x, **options)
        same(generate(model, x, use_cache=False, **options), found)
        same(generate(model, x, cache_implementation="static", **options), found)
        if method.name != "random":
            one = {"input_ids": x["input_ids"][:1], "attention_mask": x["attention_mask"][:1]}
            tokens, scores = generate(model, {**one, "pixel_values": x["pixel_values"][:1]}, **options)
            same((tokens, scores), (found[0][:1], found[1][:, :1]))
    with vlm_attn.patched(model, replace(method, mode="mask")):
        same(generate(model, x, **options), found)
    with vlm_attn.patched(model, replace(method, positions="original")):
        differ(generate(model, x, **options)[1], found[1])
    with vlm_attn.patched(model, [method, gift]):
        beside = generate(model, x, **options)
        differ(beside[1], found[1])
        same(generate(model, x, use_cache=False, **options), beside)
    with vlm_attn.patched(model, [replace(method, mode="mask"), gift]):
        same(generate(model, x, **options), beside)


def test_a_reordered_choice_is_reported_by_token() -> None:
    """HoloV's order is by attention; a second reducer and the report still speak of the tokens themselves."""
    model, inputs = built("llava")
    x = inputs([[3, "image", 7]], seed=1)
    with vlm_attn.patched(model, HoloV(keep=6, chunks=2)):
        logits(model, x)
        wanted = vlm_attn.kept(model)[0].stages[0][1].tolist()
    with vlm_attn.patched(model, [HoloV(keep=6, chunks=2, **PACKED), PruMerge(keep=2, neighbours=0)]):
        logits(model, x)
        (image,) = vlm_attn.kept(model)
    assert image.stages[0][1].tolist() == wanted
    assert set(image.stages[1][1].tolist()) <= set(wanted)
    with vlm_attn.patched(model, PruMerge(keep=9, neighbours=0)):
        logits(model, x)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_positions_of_three_numbers_are_refused(family: str) -> None:
    model, _ = built(family)
    with pytest.raises(NotImplementedError, match=r"random: positions=\"packed\".*three numbers"):
        vlm_attn.patch(model, Random(**PACKED))
    assert not vlm_attn.is_patched(model)


def test_what_comes_back_cannot_be_packed() -> None:
    with pytest.raises(ValueError, match="still to come back"):
        LayerSkip(**PACKED)


def test_what_the_rotation_alone_makes_of_a_logit(monkeypatch: pytest.MonkeyPatch) -> None:
    """SparseVLM+ divides by it: 2 / sqrt(d) times the sum of cos(distance theta_i), for two vectors of ones."""
    model, inputs = built("llava")
    x = inputs([[1, "image", 4]], seed=1)
    seen: list[Picture] = []
    score = SparseVLM.score
    monkeypatch.setattr(SparseVLM, "score", lambda self, p: (seen.append(p), score(self, p))[1])
    with vlm_attn.patched(model, SparseVLM(layers=(0,), keep=4, version=2)):
        logits(model, x)
    width, rows, columns = 8, np.arange(11, 15), np.arange(2, 11)
    theta = 10000.0 ** (-np.arange(0, width, 2) / width)
    apart = (rows[:, None] - columns)[..., None] * theta
    wanted = 2 / width**0.5 * np.cos(apart).sum(-1)
    assert seen[0].turns is not None
    close(seen[0].turns, torch.tensor(wanted))
