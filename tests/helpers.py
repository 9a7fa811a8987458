# SPDX-License-Identifier: Apache-2.0
"""Shared by the tests of the engine and of the methods: settings for the tiny models, runs, comparisons, margins."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from traceback import walk_tb
from typing import Any, ClassVar, TypeVar

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessor

import vlm_attn
from vlm_attn import attention as attention_file
from vlm_attn.call import Call
from vlm_attn.families import family_of
from vlm_attn.hallucination import gift as gift_file
from vlm_attn.hallucination import ilvad as ilvad_file
from vlm_attn.hallucination import vhr as vhr_file
from vlm_attn.hallucination.var import Var
from vlm_attn.kernels import Edit, ScoreEdit
from vlm_attn.kernels.edited import one_hot_segments
from vlm_attn.method import Method
from vlm_attn.registry import method_class
from vlm_attn.visual_token_ops import landmark, longheads, routed

Inputs = dict[str, Any]
T = TypeVar("T")

# Of four layers with four heads: layer 1 has no head that retrieves, by either of the two.
SCORES = ((0.9, 0.1, 0.2, 0.3), (0.0, 0.1, 0.1, 0.0), (0.1, 0.2, 0.0, 0.1), (0.3, 0.1, 0.5, 0.8))
# Every tiny model has four layers. Layer 0 lies below the layer the map is read from, as in the preset of Qwen2-VL.
ACTIVE: dict[str, dict[str, Any]] = {
    "gift": {"saliency_layers": (1,), "enhance_layers": (0, 2, 3), "alpha": 3.0, "query_words": "all"},
    "var": {"sink_dims": (3, 7), "tau": 1.5, "rho": 0.1, "visual_floor": 0.02},
    "pai": {"alpha": 0.5, "layers": (1, 2, 3)},
    "paint": {"alpha": 1.1, "beta": 0.5, "share": 0.5, "fence": 0.2, "layers": (1, 2, 3)},
    "vaf": {"visual": 1.5, "system": 0.7, "layers": (0, 1, 2)},
    "head_guided": {"alpha": 1.2, "layers": (1, 2)},
    "vhr": {"layers": (1, 2, 3)},
    "duo": {"gates": ((0.9, 0.2), (0.1, 0.0), (0.3, 0.8), (0.6, 0.7)), "sink": 2, "recent": 6},
    "razor": {"echo": SCORES, "induction": SCORES[::-1], "local": 5, "fraction": 0.1},
    "landmark": {"keep": 0.4},
    "longheads": {"keep": 0.4},
    "routed": {"side": 2, "keep": 0.3},
}
# Methods that choose keys: they share one way into the attention, so one family tries them in every way of decoding.
CHOOSERS = ("duo", "razor", "landmark", "longheads", "routed")
NEUTRAL = {
    "gift": {**ACTIVE["gift"], "alpha": 0.0},
    "var": {**ACTIVE["var"], "p": 0.0},
    "pai": {"alpha": 0.0},
    "paint": {"alpha": 0.0, "beta": 0.0},
    "vaf": {"visual": 1.0, "system": 1.0},
    "head_guided": {"alpha": 0.0},
    "vhr": {"alpha": 1.0},
    "duo": {**ACTIVE["duo"], "sparsity": 0.0},
    "razor": {**ACTIVE["razor"], "echo_share": 1.0},
    "landmark": {"keep": 1.0},
    "longheads": {"keep": 1.0},
    "routed": {"keep": 1.0},
}
# Logits of two float32 routes, relative to their scale: rounding gives 1e-6 to 1e-5, depending on the machine's matrix library;
# what a method does is above 1e-3.
TOLERANCE = 3e-5
# How far a choice between heads (mass) or a gate (mass) must be from tipping over, against rounding of about 1e-6.
MARGIN = 1e-5


def logits(model: Any, inputs: Inputs, **options: Any) -> Tensor:
    with torch.no_grad():
        return model(**inputs, **options).logits


def generate(model: Any, inputs: Inputs, new: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens ``[B, new]`` and their logits ``[new, B, V]``, greedy unless told otherwise."""
    options = {"do_sample": False, **options}
    with torch.no_grad():
        out = model.generate(**inputs, max_new_tokens=new, output_logits=True, return_dict_in_generate=True, **options)
    return out.sequences[:, -len(out.logits) :], torch.stack(out.logits)


def stock_needs_cache(model: Any, x: Inputs, plain: tuple[Tensor, Tensor], **options: Any) -> None:
    """Skip where the unpatched model itself writes other tokens without a cache (PaliGemma on transformers before 5.24)."""
    if generate(model, x, use_cache=False, **options)[0].tolist() != plain[0].tolist():
        pytest.skip("stock transformers writes other tokens without a cache than with one")


def same(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor], tolerance: float = TOLERANCE) -> None:
    """Equal tokens, logits equal relative to their scale."""
    assert got[0].tolist() == wanted[0].tolist()
    close(got[1], wanted[1], tolerance)


def close(got: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> None:
    assert got.shape == wanted.shape
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error <= tolerance, f"relative error {error:.2e} > {tolerance:.0e}"


def differ(got: Tensor, wanted: Tensor, least: float = 1e-3) -> None:
    """The opposite of :func:`close`."""
    error = (got.double() - wanted.double()).abs().max() / wanted.double().abs().max()
    assert error >= least, f"relative difference {error:.2e} < {least:.0e}"


def stock(run: Callable[[], T]) -> T:
    """What the plain model does; skips with its words where it fails by itself.

    Only for a model that is not patched: an error that came through our own code is never a skip, but the test's failure.
    """
    try:
        return run()
    except Exception as error:
        if any(frame.f_globals.get("__name__", "").startswith("vlm_attn") for frame, _ in walk_tb(error.__traceback__)):
            raise
        pytest.skip(f"stock transformers: {type(error).__name__}: {str(error)[:200]}")


def alone(inputs: Inputs, row: int, images: Sequence[int]) -> Inputs:
    """One row of a left-padded batch, as a batch of its own.

    Args:
        inputs: the batch.
        row: the row.
        images: number of images of every row.
    """
    first = int(inputs["attention_mask"][row].argmax())
    before, count = sum(images[:row]), images[row]
    single = {}
    for name, value in inputs.items():
        if value.shape[:2] == inputs["input_ids"].shape:
            single[name] = value[row : row + 1, first:]
        else:
            each = len(value) // sum(images)
            single[name] = value[before * each : (before + count) * each]
    return single


class Margins:
    """How close the discrete choices of a run came to tipping over."""

    def __init__(self) -> None:
        self.values: list[float] = []
        self.smooth = False  # whether a method that chooses nothing has edited

    def add(self, value: Tensor) -> None:
        value = value[value.isfinite()]
        if value.numel():
            self.values.append(float(value.abs().min()))

    def check(self, least: float = MARGIN) -> None:
        assert self.values or self.smooth, "nothing was recorded"
        assert min(self.values, default=1.0) > least, (
            f"a choice is {min(self.values, default=1.0):.1e} from tipping over: choose another fixture"
        )


@contextmanager
def margins() -> Iterator[Margins]:
    """Record the margins of the methods: heads at the edge of the chosen half, gates and sinks at their thresholds."""
    found = Margins()
    top_heads, reweigh, read = gift_file.top_heads, Var.reweigh, Var.read_tokens

    def recorded_heads(score: Tensor, share: float) -> Tensor:
        count = max(1, int(score.shape[1] * share))
        ordered = score.sort(dim=1, descending=True).values
        if count < score.shape[1]:
            last, next_one = ordered[:, count - 1], ordered[:, count]
            found.add((last - next_one)[(last != 0) | (next_one != 0)])  # two heads without any shift: either will do
        return top_heads(score, share)

    def recorded_gate(self: Var, mass: Tensor) -> Tensor:
        _, visual, _, visual_sink = mass.unbind(-1)
        seen = visual + visual_sink
        found.add(seen - self.visual_floor)
        found.add((visual - self.rho * seen)[seen > self.visual_floor])
        return reweigh(self, mass)

    def recorded_sinks(self: Var, hidden: Tensor) -> Tensor:
        value = hidden[..., list(self.sink_dims or ())].abs().amax(-1) / hidden.square().mean(-1).sqrt()
        found.add(value - self.tau)
        return read(self, hidden)

    in_view = ilvad_file.in_view

    def recorded_view(looks: Tensor, visual: Tensor, times: float) -> Tensor:
        mean = (looks * visual).sum(-1, keepdim=True) / visual.sum(-1, keepdim=True)
        found.add((looks - times * mean)[visual.expand_as(looks)])
        return in_view(looks, visual, times)

    score = ScoreEdit.__call__
    outliers, upper_half = vhr_file.outliers, vhr_file.upper_half

    def recorded_outliers(*sizes: Tensor) -> Tensor:
        """A head tips over where the lesser of its two excesses changes sign."""
        excess = [(x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True) - 1 for x in sizes]
        found.add(torch.minimum(*excess))
        return outliers(*sizes)

    def recorded_half(divergence: Tensor) -> Tensor:
        ordered = divergence.sort(-1).values
        middle = (ordered.shape[-1] - 1) // 2
        found.add((ordered[..., middle + 1] - ordered[..., middle]) / ordered[..., -1])
        return upper_half(divergence)

    def recorded_score(self: ScoreEdit, *args: Any, **kwargs: Any) -> Tensor:
        found.smooth = True
        return score(self, *args, **kwargs)

    choose, best = attention_file.choose_keys, landmark.best

    def recorded_keys(*args: Any) -> Any:
        found.smooth = True
        return choose(*args)

    def recorded_chunks(score: Tensor, count: Tensor) -> Tensor:
        ordered = score.sort(-1, descending=True).values
        index = count[:, None, None, None].expand(*score.shape[:3], 1)
        last, next_one = (ordered.gather(3, i.clamp(0, score.shape[3] - 1)) for i in (index - 1, index))
        found.add((last - next_one)[(index < score.shape[3]) & ((last != 0) | (next_one != 0))])  # a query of zeros
        return best(score, count)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_file, "choose_keys", recorded_keys)
        for file in (landmark, longheads, routed):
            patch.setattr(file, "best", recorded_chunks)
        patch.setattr(vhr_file, "outliers", recorded_outliers)
        patch.setattr(vhr_file, "upper_half", recorded_half)
        patch.setattr(ScoreEdit, "__call__", recorded_score)
        patch.setattr(gift_file, "top_heads", recorded_heads)
        patch.setattr(ilvad_file, "top_heads", recorded_heads)
        patch.setattr(ilvad_file, "in_view", recorded_view)
        patch.setattr(Var, "reweigh", recorded_gate)
        patch.setattr(Var, "read_tokens", recorded_sinks)
        yield found


@dataclass(frozen=True, kw_only=True)
class Weigh(Method):
    """Edited rows give the image's keys this weight: with 0 the same as a mask, with 1 nothing, through the edit path."""

    name: ClassVar[str] = "weigh"

    image: float = 0.0

    def edit(self, call: Call, layer: int) -> Edit:
        return call.once(self, lambda: Edit(one_hot_segments(call.layout.visual.long(), 2), self.weights))

    def weights(self, mass: Tensor) -> Tensor:
        return torch.tensor([1.0, self.image]).expand(mass.shape)


class Force(LogitsProcessor):
    """Make a generation follow given tokens ``[B, new]``; the logits before it are what the model said."""

    def __init__(self, tokens: Tensor, prompt: int) -> None:
        self.tokens, self.prompt = tokens, prompt

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt
        forced = torch.full_like(scores, -float("inf"))
        return forced.scatter(1, self.tokens[:, step : step + 1], 0.0)


def refused(model: Any, method: str) -> None:
    """Skips a method that a family cannot have, once that has been seen."""
    if method_class(method).cls_layers and family_of(model.config).cls is None:
        with pytest.raises(NotImplementedError, match="CLS token"):
            vlm_attn.patch(model, method, **ACTIVE[method])
        pytest.skip(f"{method} needs a vision tower with a CLS token")


def on(model: Any, method: str, **changes: Any) -> Any:
    """``vlm_attn.patched`` with the settings above."""
    refused(model, method)
    return vlm_attn.patched(model, method, **{**ACTIVE[method], **changes})
