# SPDX-License-Identifier: Apache-2.0
"""Sinks by both detectors: their rules on small arrays, and what they find in a model with planted sinks, by hand."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, alone, close, differ, generate, logits, margins, on, same
from tests.oracle import attentions
from vlm_attn.detectors import ByDimension, ByDirection, band, massive
from vlm_attn.hallucination import Gift, Var, Vhr
from vlm_attn.patching import engine_of

WORD = 50  # a word that is made to look like the first token from layer 1 on
MASSIVE = 5  # in this dimension


class TestRules:
    def test_massive(self) -> None:
        """(0, 6, 8, 0) has RMS 5."""
        x = torch.tensor([[[0.0, 6.0, 8.0, 0.0]]])
        close(massive(x, (1,)), torch.tensor([[1.2]]))
        found = ByDimension((1, 2), tau=1.6)
        states = found.read(x, torch.tensor([0]))[None]
        close(states, torch.tensor([[[[1.6]]]]))
        assert (
            not ByDimension((1,), tau=1.3)
            .find(ByDimension((1,)).read(x, torch.tensor([0]))[None], torch.tensor([0]))
            .any()
        )

    @pytest.mark.parametrize(
        ("norms", "wanted"),
        [
            ((1.0, 1.0, 9.0, 9.5, 8.0, 1.0), (2, 5)),
            ((1.0, 9.0, 9.5, 8.0, 9.0), (1, 3)),
            ((1.0, 2.0, 9.0), (2, 3)),
            ((5.0, 5.0), (1, 2)),
            ((5.0,), (0, 1)),
        ],
    )
    def test_band(self, norms: tuple[float, ...], wanted: tuple[int, int]) -> None:
        assert band(torch.tensor(norms)) == wanted

    def test_direction(self) -> None:
        """The second candidate has the larger norm; a token against it counts too; what stands before it does not."""
        first = torch.tensor([1])
        small, big = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 9.0])
        layer = torch.stack([torch.tensor([0.0, 5.0]), small, big, -0.1 * big, torch.tensor([1.0, 1.0])])
        calm = torch.stack([small, small, small, small, torch.tensor([0.0, 1.0])])
        find = ByDirection(cosine=0.9, candidates=2)
        states = torch.stack([find.read(x[None], first) for x in (layer, calm, layer, layer, calm)])
        assert states.shape == (5, 1, 5, 3)
        found = find.find(states, first)[:, 0]
        inside = [False, False, True, True, False]
        assert found.tolist() == [[False] * 5, [False] * 5, inside, inside, [False] * 5]


@pytest.fixture(scope="module")
def planted() -> tuple[Any, Any]:
    """The first token and the word 50 get a massive dimension behind layer 0; it goes again behind layer 2."""
    model, inputs = tiny.llava()
    ids: list[Tensor] = []

    def note(module: Any, args: Any) -> None:
        ids[:] = [args[0]]

    def change(factor: float) -> Any:
        def hook(module: Any, args: Any, output: Any) -> Any:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.shape[1] != ids[0].shape[1]:
                return output
            chosen = (ids[0] == tiny.BOS) | ((ids[0] == WORD) & (factor > 0))
            hidden = hidden.clone()
            hidden[..., MASSIVE] += factor * chosen
            return (hidden, *output[1:]) if isinstance(output, tuple) else hidden

        return hook

    model.get_input_embeddings().register_forward_pre_hook(note)
    layers = model.model.language_model.layers
    layers[0].register_forward_hook(change(200.0))
    layers[2].register_forward_hook(change(-200.0))
    return model, inputs


def prompt(inputs: Any) -> Inputs:
    x = inputs([[3, "image", 9], [2, "image", 6]], seed=1)
    x["input_ids"][x["input_ids"] == WORD] = WORD + 1
    for row, column in ((0, 18), (1, 19)):
        x["input_ids"][row, column] = WORD
    return x


def states_by_hand(model: Any, x: Inputs) -> list[np.ndarray]:
    with torch.no_grad():
        return [h.double().numpy() for h in model(**x, output_hidden_states=True).hidden_states]


class TestFind:
    @pytest.mark.parametrize("options", [{"by": "dimension", "sink_dims": (MASSIVE,), "tau": 5.0}, {"by": "direction"}])
    def test_planted(self, planted: Any, options: dict[str, Any]) -> None:
        model, inputs = planted
        x = prompt(inputs)
        plain = logits(model, x)
        found = vlm_attn.find_sinks(model, x, **options)
        assert torch.equal(logits(model, x), plain)
        assert not vlm_attn.is_patched(model)
        maps = attentions(model, x)
        for row, (column, start) in enumerate(((18, 0), (19, int(x["attention_mask"][1].argmax())))):
            one, two = found[row].sinks
            assert (one.column, two.column) == (start, column)
            assert (one.kind, one.group, two.group) == ("primary", "SYSTEM", "QUERY")
            assert one.layers == (1, 2)
            assert two.creation == 1
            assert two.lifetime == len(two.layers) >= 2
            assert found[row].band == (1, max(two.layers) + 1)
            assert found[row].at(1) == (start, column)
            assert found[row].at(0) == ()
            length = x["input_ids"].shape[1]
            for sink in (one, two):
                score = np.mean([
                    np.mean([float(maps[layer][row, :, t, sink.column].mean()) for t in range(sink.column + 1, length)])
                    for layer in sink.layers
                ])  # fmt: skip
                assert sink.score == pytest.approx(score, rel=1e-4)

    def test_kinds(self, planted: Any) -> None:
        """The first token is primary however short it lives; another is what its lifetime says."""
        model, inputs = planted
        x = prompt(inputs)
        for shares, kind in (
            ({}, "primary"),
            ({"primary": 1.1}, "secondary"),
            ({"primary": 1.1, "brief": 0.5}, "brief"),
        ):
            found = vlm_attn.find_sinks(model, x, "direction", **shares)
            assert [sink.kind for sink in found[0].sinks] == ["primary", kind]

    def test_both_against_plain_arrays(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]], seed=6)
        hidden = [h[0] for h in states_by_hand(model, x)]
        found = vlm_attn.find_sinks(model, x, sink_dims=(3, 7), tau=1.6)[0]
        for layer in range(4):
            value = [max(abs(h[3]), abs(h[7])) / math.sqrt((h * h).mean()) for h in hidden[layer]]
            assert found.at(layer) == tuple(j for j, v in enumerate(value) if v >= 1.6)
        assert found.sinks

    def test_of_a_patched_model(self) -> None:
        """The plain model's, whatever it is patched with, which stays."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]], seed=6)
        wanted = vlm_attn.find_sinks(model, x, "direction")
        with on(model, "vaf"):
            before = logits(model, x)
            assert vlm_attn.find_sinks(model, x, "direction") == wanted
            assert torch.equal(logits(model, x), before)
            with pytest.raises(ValueError, match="patched already"):
                vlm_attn.find_sinks(model, x, "direction", processor=None)

    def test_wrong(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        with pytest.raises(ValueError, match='neither "dimension" nor "direction"'):
            vlm_attn.find_sinks(model, x, "norm")  # type: ignore[arg-type]
        for dims in (None, (32,)):
            with pytest.raises(ValueError, match=r"of 0\.\.31.*by='direction'"):
                vlm_attn.find_sinks(model, x, sink_dims=dims)
        assert not vlm_attn.is_patched(model)


class TestVarByDirection:
    SETTINGS: dict[str, Any] = {
        "detector": "direction",
        "cosine": 0.5,
        "rho": 0.1,
        "visual_floor": 0.02,
        "layers": (1, 2, 3),
    }

    def test_its_sinks_are_those_found(self) -> None:
        """The same result as with the flags put in by hand."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9], [1, "image", 4, "image", 6]], seed=3)
        found = vlm_attn.find_sinks(model, x, "direction", cosine=0.5)
        with vlm_attn.patched(model, "var", **self.SETTINGS):
            with engine_of(model).running(x) as call, torch.no_grad():
                engine_of(model).rehearse(vlm_attn.branch.Run(engine_of(model), model, call, x))
                flags = call.memory(engine_of(model).methods[0])["sinks"]
            first, edited = logits(model, x), generate(model, x)
            close(edited[1][0], first[:, -1])
            same(generate(model, x, use_cache=False), edited)
        for row in range(2):
            for layer in range(4):
                assert found[row].at(layer) == tuple(flags[layer, row].nonzero().flatten().tolist())
        assert flags[1:].any()
        differ(edited[1][0], generate(model, x)[1][0])

    def test_batch_is_rows_alone_and_beams(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9], [1, "image", 4, "image", 6]], seed=3)
        with vlm_attn.patched(model, "var", **self.SETTINGS), margins() as margin:
            tokens, scores = generate(model, x)
            for row in range(2):
                same(generate(model, alone(x, row, (1, 2))), (tokens[row : row + 1], scores[:, row : row + 1]))
            assert model.generate(**x, num_beams=2, max_new_tokens=2).shape[0] == 2
            maps = vlm_attn.sinks(model, x)
        assert len(maps) == 3
        margin.check()

    def test_values(self) -> None:
        for wrong in ({"detector": "norm"}, {"detector": "direction", "cosine": 1.5}):
            with pytest.raises(ValueError, match=list(wrong)[-1]):
                Var(**wrong)
        assert Var(detector="direction", p=0.0).neutral


def test_saliency_beside_a_method_that_rehearses() -> None:
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9]])
    with vlm_attn.patched(model, [Vhr(layers=(3,)), Gift(**ACTIVE["gift"])]):
        (found,) = vlm_attn.saliency(model, x)
    (wanted,) = vlm_attn.saliency(model, x, **ACTIVE["gift"])
    close(found, wanted)
