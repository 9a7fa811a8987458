# SPDX-License-Identifier: Apache-2.0
"""DoLa: the divergence and the contrast by hand, and decoding against the hidden states of full plain forwards."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, alone, close, differ, generate
from vlm_attn.hallucination import Dola, Gift
from vlm_attn.hallucination.dola import divergence

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
SINGLE = [[3, "image", 7], [1, "image", 4]]
NEW = 6


@cache
def built(name: str) -> Any:
    return tiny.FAMILIES[name]()


def run(model: Any, x: Inputs, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    with torch.no_grad():
        return model.generate(**x, output_scores=True, return_dict_in_generate=True, **options)


def by_hand(model: Any, x: Inputs, tokens: Tensor, layers: tuple[int, ...], beta: float) -> tuple[Tensor, set[int]]:
    """Log probabilities ``[new, B, V]`` along given answers, and which layers were chosen."""
    full = {**x, "input_ids": torch.cat([x["input_ids"], tokens], 1)}
    full["attention_mask"] = torch.cat([x["attention_mask"], torch.ones_like(tokens)], 1)
    if "mm_token_type_ids" in x:
        full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
    with torch.no_grad():
        out = model(**full, output_hidden_states=True)
        early = [model.lm_head(out.hidden_states[layer]) for layer in layers]
    chosen, said = set(), np.zeros((tokens.shape[1], len(tokens), tiny.VOCAB))
    for step in range(tokens.shape[1]):
        for row in range(len(tokens)):
            at = step - tokens.shape[1] - 1
            p = out.logits[row, at].double().softmax(-1).numpy()
            others = [logits[row, at].double().softmax(-1).numpy() for logits in early]
            far = max(range(len(layers)), key=lambda j: jensenshannon(p, others[j]))
            chosen.add(layers[far])
            value = np.where(p >= beta * p.max(), p / others[far], 0.0)
            with np.errstate(divide="ignore"):
                said[step, row] = np.log(value / value.sum())
    return torch.tensor(said), chosen


def near(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isinf(), wanted.isinf()), "another cut"
    close(got.masked_fill(got.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0).to(got), 1e-4)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
class TestAgainstPlainForwards:
    LAYERS = (1, 2, 3)

    def test_greedy(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, Dola(layers=self.LAYERS, beta=0.05)):
            out = run(model, x)
        tokens = out.sequences[:, -NEW:]
        wanted, chosen = by_hand(model, x, tokens, self.LAYERS, 0.05)
        assert len(chosen) > 1
        near(torch.stack(out.scores), wanted)
        assert tokens.tolist() == wanted.argmax(-1).T.tolist()

    def test_sampling_and_beams(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(SINGLE, seed=3)
        torch.manual_seed(2)
        with vlm_attn.patched(model, Dola(layers=self.LAYERS, beta=0.05)):
            out = run(model, x, do_sample=True, num_return_sequences=2, top_k=0, temperature=1.0)
            beams = run(model, x, num_beams=3, num_return_sequences=2)
        for place in range(2):
            tokens = out.sequences[place::2, -NEW:]
            near(torch.stack(out.scores)[:, place::2], by_hand(model, x, tokens, self.LAYERS, 0.05)[0])
            tokens = beams.sequences[place::2, -NEW:]
            said, _ = by_hand(model, x, tokens, self.LAYERS, 0.05)
            total = said.transpose(0, 1).gather(2, tokens[..., None]).sum((1, 2))
            close(beams.sequences_scores[place::2], (total / NEW).float(), 1e-4)

    def test_batch_cache_and_chunks(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, Dola(layers=self.LAYERS)):
            tokens = run(model, x).sequences[:, -NEW:].tolist()
            assert run(model, x, use_cache=False).sequences[:, -NEW:].tolist() == tokens
            assert run(model, x, cache_implementation="static").sequences[:, -NEW:].tolist() == tokens
            for row in range(2):
                assert run(model, alone(x, row, (1, 2))).sequences[:, -NEW:].tolist() == tokens[row : row + 1]


class TestParts:
    def test_divergence(self) -> None:
        p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[[0.5, 0.5, 0.0]], [[0.0, 0.0, 1.0]], [[0.9, 0.1, 0.0]]])
        got = divergence(p.log(), q.log())[:, 0].tolist()
        assert got[:2] == pytest.approx([0.0, np.log(2)], abs=1e-6)
        assert got[2] == pytest.approx(jensenshannon([0.5, 0.5, 0], [0.9, 0.1, 0]) ** 2, abs=1e-6)

    def test_the_farthest_is_chosen_row_by_row(self) -> None:
        main = torch.tensor([[0.5, 0.4, 0.1], [0.5, 0.4, 0.1]]).log()
        near_, far = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.1, 0.1, 0.8]).log()
        early = torch.stack([torch.stack([near_, far]), torch.stack([far, near_])])
        got = Dola(beta=0.3).combine(main, early)
        assert got[0].tolist() == got[1].tolist()
        assert got[0, :2].exp().tolist() == pytest.approx([5.0, 4.0])
        assert got[0, 2] == -torch.inf

    def test_as_released(self) -> None:
        """KL(m, p) + KL(m, q) in place of KL(p, m) + KL(q, m), on two layers that the rules rank differently."""
        p = np.array([0.6, 0.2, 0.1, 0.1])
        early = np.array([[0.2, 0.49, 0.17, 0.14], [0.69, 0.01, 0.22, 0.08]])

        def kl(a: np.ndarray, b: np.ndarray) -> float:
            return float(sum(x * np.log(x / y) for x, y in zip(a, b, strict=True)))

        paper = [(kl(p, (p + q) / 2) + kl(q, (p + q) / 2)) / 2 for q in early]
        released = [(kl((p + q) / 2, p) + kl((p + q) / 2, q)) / 2 for q in early]
        assert paper[0] > paper[1]
        assert released[0] < released[1]
        main, layers = torch.tensor(p).log()[None], torch.tensor(early).log()[:, None]
        assert divergence(main, layers)[:, 0].tolist() == pytest.approx(paper)
        assert divergence(main, layers, reverse=True)[:, 0].tolist() == pytest.approx(released)
        for parity, chosen in ((False, 0), (True, 1)):
            got = Dola(beta=0.0, code_parity=parity).combine(main, layers)[0]
            assert got.tolist() == pytest.approx(np.log(p / early[chosen]).tolist())
        with pytest.raises(TypeError, match="code_parity"):
            Dola(code_parity=1)  # type: ignore[arg-type]

    @pytest.mark.parametrize(("layers", "wanted"), [("low", [0]), ("high", [2]), ((3, 1), [3, 1])])
    def test_candidates(self, layers: Any, wanted: list[int]) -> None:
        from vlm_attn.branch import Run
        from vlm_attn.patching import engine_of

        model, inputs = built("llava")
        x = inputs(SINGLE)
        with vlm_attn.patched(model, Dola(layers=layers)), engine_of(model).running(x) as call:
            assert engine_of(model).methods[0].candidates(Run(engine_of(model), model, call, x)) == wanted

    @pytest.mark.parametrize("change", [{"layers": "high"}, {"layers": (1,)}, {"beta": 0.6}], ids=str)
    def test_every_constant_matters(self, change: dict[str, Any]) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        scores = []
        for parameters in ({}, change):
            with vlm_attn.patched(model, "dola", **parameters):
                scores.append(run(model, x, max_new_tokens=1).scores[0].exp())
        differ(*scores)

    def test_with_an_edit_and_without_an_image(self) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, Dola(layers=(1,), beta=0.0)):
            plain = run(model, x, max_new_tokens=1).scores[0]
            text = inputs([[9], [5]])
            text.pop("pixel_values")
            assert run(model, text).scores[0].isfinite().all()
        gift = Gift(**{**ACTIVE["gift"], "enhance_layers": (2, 3)})  # above the early layer
        with vlm_attn.patched(model, gift):
            edited = generate(model, x, new=1)[1][0]
        with vlm_attn.patched(model, [gift, Dola(layers=(1,), beta=0.0)]):
            both = run(model, x, max_new_tokens=1).scores[0]
        early = generate(model, x, new=1)[1][0].log_softmax(-1) - plain
        close(both, (edited.log_softmax(-1) - early).log_softmax(-1), 1e-4)

    def test_nothing_is_left_behind(self) -> None:
        model, inputs = built("llava")
        x = inputs(SINGLE)
        before = generate(model, x)[1]
        layers = model.model.language_model.layers
        vlm_attn.patch(model, "dola")
        count = [len(layer._forward_pre_hooks) for layer in layers]
        run(model, x)
        assert [len(layer._forward_pre_hooks) for layer in layers] == count
        vlm_attn.unpatch(model)
        assert torch.equal(generate(model, x)[1], before)

    def test_refused(self) -> None:
        model, inputs = built("llava")
        with pytest.raises(ValueError, match="neither"):
            Dola(layers="middle")  # type: ignore[arg-type]
        with pytest.raises(ValueError, match="names layer 9"):
            vlm_attn.patch(model, "dola", layers=(1, 9))
        with vlm_attn.patched(model, "dola"), pytest.raises(NotImplementedError, match="prompt_lookup_num_tokens"):
            model.generate(**inputs([[3, "image", 9]]), prompt_lookup_num_tokens=2)
