# SPDX-License-Identifier: Apache-2.0
"""OPERA: the penalty on a given matrix, and the search against one in plain Python over full forwards with attention maps."""

from __future__ import annotations

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import Inputs, alone, close
from vlm_attn.hallucination import Opera, Vcd
from vlm_attn.hallucination.opera import column_products

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
NEW = 8


@cache
def built(name: str) -> Any:
    model, inputs = tiny.FAMILIES[name]()
    with torch.no_grad():
        model.lm_head.weight *= 0.2  # less sure, so that penalties decide
    return model, inputs


def run(model: Any, x: Inputs, **options: Any) -> Any:
    options = {"max_new_tokens": NEW, "num_beams": 3, **options}
    with torch.no_grad():
        return model.generate(**x, output_scores=True, return_dict_in_generate=True, do_sample=False, **options)


def by_hand(
    model: Any, x: Inputs, *, beams: int = 3, candidates: int = 4, new: int = NEW, scale: float = 50.0, weight: float = 1.0,
    factor: float = 1e-7, warmup: int = 10, threshold: int = 15, end: int | None = None,
) -> tuple[list[tuple[float, list[int]]], int]:  # fmt: skip
    """One prompt: full forwards of the host's own eager attention, lists and floats. Answers, and how often it went back."""
    eager = copy.deepcopy(model)
    eager.set_attn_implementation("eager")
    prompt = x["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(prompt) if token == tiny.IMAGE]

    @cache
    def read(answer: tuple[int, ...]) -> tuple[list[float], list[float]]:
        full = {**x, "input_ids": torch.tensor([prompt + list(answer)])}
        full["attention_mask"] = torch.ones_like(full["input_ids"])
        if "mm_token_type_ids" in x:
            full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
        with torch.no_grad():
            out = eager(**full, output_attentions=True)
        row = out.attentions[-1][0, :, -1].amax(0)
        return out.logits[0, -1].double().log_softmax(-1).tolist(), (row / row.sum()).double().tolist()

    def penalty(answer: tuple[int, ...]) -> tuple[float, int]:
        rows = [read(answer[: t + 1])[1][len(prompt) :] for t in range(len(answer))]
        products = [math.prod(scale * rows[t][c] for t in range(c, len(answer))) for c in range(len(answer))]
        if len(answer) <= warmup:
            return -sum(rows_image[i] for rows_image in [read(answer)[1]] for i in visual), -1
        return factor * max(products), products.index(max(products))

    running: list[tuple[float, tuple[int, ...], tuple[int, ...]]] = [(0.0, (), ())]
    ended: list[tuple[float, list[int]]] = []
    history, given_up, times, back = [], {}, {}, 0
    while True:
        n = len(running[0][1])
        history[n:] = [(running, list(ended))]
        options = []
        for score, answer, columns in running:
            log_p = read(answer)[0]
            likely = sorted((t for t in range(len(log_p)) if t not in given_up.get(n, [])), key=lambda t: -log_p[t])[
                :candidates
            ]
            found = [penalty((*answer, token)) for token in likely]
            value = [log_p[token] - weight * cost for token, (cost, _) in zip(likely, found, strict=True)]
            total = math.log(sum(math.exp(v) for v in value))
            options += [
                (score + v - total, (*answer, token), (*columns, column))
                for v, token, (_, column) in zip(value, likely, found, strict=True)
            ]
        options = sorted(options, key=lambda option: -option[0])[: 2 * beams]
        ended += [(s / (n + 1), list(a)) for s, a, _ in options[:beams] if a[-1] == end or n + 1 == new]
        ended = sorted(ended, key=lambda item: -item[0])[:beams]
        running = [option for option in options if option[1][-1] != end][:beams]
        if n + 1 == new or (len(ended) == beams and running[0][0] / (n + 1) <= ended[-1][0]):
            return ended, back
        newest = [column for column in running[0][2] if column >= 0]
        most = max(newest, key=newest.count, default=-1)
        if newest.count(most) > threshold and most >= warmup and times.get(most + 1, 0) < candidates:
            place, back = most + 1, back + 1
            times[place] = times.get(place, 0) + 1
            given_up = {at: tokens for at, tokens in given_up.items() if at <= place}
            given_up.setdefault(place, []).append(running[0][1][place])
            running, ended = history[place]


SETTINGS: list[tuple[dict[str, Any], int]] = [
    ({}, 0),
    ({"warmup": 2, "factor": 1e-3}, 0),
    ({"warmup": 0, "factor": 0.0, "threshold": 2}, 1),
    ({"warmup": 1, "factor": 0.0, "threshold": 2}, 0),  # leans on the first token, which the warm-up covers
    ({"warmup": 0, "factor": 1e-2, "threshold": 1, "scale": 30.0}, 1),
]


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
class TestAgainstPlainForwards:
    @pytest.mark.parametrize(("settings", "goes_back"), SETTINGS, ids=str)
    def test_search(self, name: str, settings: dict[str, Any], goes_back: int) -> None:
        model, inputs = built(name)
        x = inputs([[3, "image", 7]], seed=3)
        wanted, back = by_hand(model, x, **settings)
        assert (back > 0) == bool(goes_back)
        with vlm_attn.patched(model, Opera(candidates=4, **settings)):
            out = run(model, x, num_return_sequences=3)
        assert out.sequences[:, -NEW:].tolist() == [answer for _, answer in wanted]
        close(out.sequences_scores, torch.tensor([score for score, _ in wanted]), 1e-4)

    def test_scores_and_logits(self, name: str) -> None:
        """Along every answer: the model's logits, and of the candidates' log probabilities the answer's score is the mean."""
        model, inputs = built(name)
        x = inputs([[3, "image", 7]], seed=3)
        settings = {"warmup": 0, "factor": 1e-2, "threshold": 1, "scale": 30.0}
        plain = by_hand(model, x, **settings)[0][0][1]
        end = next(
            end
            for end in plain[1:7]
            if len({len(answer) for _, answer in by_hand(model, x, end=end, **settings)[0]}) > 1
        )
        with vlm_attn.patched(model, Opera(candidates=4, **settings)):
            out = run(model, x, num_return_sequences=3, output_logits=True, eos_token_id=end, pad_token_id=tiny.PAD)
        new = out.sequences[:, x["input_ids"].shape[1] :]
        lengths = (new != tiny.PAD).sum(1)
        assert len(out.scores) == len(out.logits) == new.shape[1] == int(lengths.max())
        scores, said = torch.stack(out.scores, 1), torch.stack(out.logits, 1)
        close(scores.gather(2, new[..., None]).sum((1, 2)) / lengths, out.sequences_scores, 1e-4)
        for row, tokens in enumerate(new):
            count = int(lengths[row])
            assert (scores[row, :count].isfinite().sum(-1) == 4).all()
            full = {**x, "input_ids": torch.cat([x["input_ids"], tokens[None, :count]], 1)}
            full["attention_mask"] = torch.ones_like(full["input_ids"])
            if "mm_token_type_ids" in x:
                full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
            with torch.no_grad():
                close(said[row, :count], model(**full).logits[0, -count - 1 : -1], 1e-4)
            assert (scores[row, count:].argmax(-1) == tiny.PAD).all()
        assert len(set(lengths.tolist())) > 1

    def test_end_token(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs([[3, "image", 7]], seed=3)
        plain, _ = by_hand(model, x)
        answers = {end: by_hand(model, x, end=end)[0] for end in plain[0][1][1:5]}
        end = next(end for end, found in answers.items() if any(len(answer) < NEW for _, answer in found))
        wanted = answers[end]
        with vlm_attn.patched(model, Opera(candidates=4)):
            out = run(model, x, num_return_sequences=3, eos_token_id=end, pad_token_id=tiny.PAD)
        got = [[t for t in row if t != tiny.PAD] for row in out.sequences[:, x["input_ids"].shape[1] :].tolist()]
        assert got == [answer for _, answer in wanted]
        close(out.sequences_scores, torch.tensor([score for score, _ in wanted]), 1e-4)

    def test_batch_is_rows_alone(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, Opera(candidates=3, warmup=2)):
            tokens = run(model, x, max_new_tokens=5).sequences[:, -5:]
            for row in range(2):
                single = run(model, alone(x, row, (1, 2)), max_new_tokens=5).sequences[:, -5:]
                assert single.tolist() == tokens[row : row + 1].tolist()
            assert torch.equal(model.generate(**x, max_new_tokens=5, num_beams=3)[:, -5:], tokens)


class TestParts:
    def test_column_products(self) -> None:
        """Three rows. Column 0: 2 * 1.5 * .5, column 1: 1 * 4, column 2: 3."""
        rows = [[0.2], [0.15, 0.1], [0.05, 0.4, 0.3]]
        product = torch.empty(1, 0)
        for row in rows:
            product = column_products(product, torch.tensor([row]), 10.0)
        assert product.exp()[0].tolist() == pytest.approx([1.5, 4.0, 3.0])

    def test_penalty(self) -> None:
        method, trust, image = Opera(weight=2.0, factor=0.1, warmup=3), torch.tensor([4.0]).log(), torch.tensor([0.7])
        assert method.penalty(trust, image, 3).item() == pytest.approx(-1.4)
        assert method.penalty(trust, image, 4).item() == pytest.approx(0.8)
        assert method.penalty(torch.tensor([1e5]), image, 4).isfinite().all()

    def test_going_back(self) -> None:
        method = Opera(threshold=2, warmup=2)
        assert method.place_behind([-1, -1, 3, 3]) is None
        assert method.place_behind([-1, 3, 2, 3, 3]) == 4
        assert method.place_behind([-1, -1, -1]) is None
        assert method.place_behind([1] * 3 + [2] * 512) == 3
        assert method.place_behind([-1, -1, 1, 1, 1, 3]) is None  # never into the warm-up

    @pytest.mark.parametrize(
        "change",
        [
            {"candidates": 2}, {"weight": 30.0}, {"warmup": 9}, {"warmup": 0, "threshold": 1}, {"warmup": 1, "factor": 1.0},
            {"warmup": 1, "factor": 1.0, "scale": 5.0},
        ],
        ids=str,
    )  # fmt: skip
    def test_every_constant_matters(self, change: dict[str, Any]) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 7]], seed=3)
        base = {"candidates": 4, "warmup": 1, "factor": 1e-2, "threshold": 100}
        if "factor" in change and "scale" in change:
            base = {**base, "factor": 1.0}
        if "threshold" in change:
            base = {**base, "warmup": 0}
        scores: list[Tensor] = []
        for settings in (base, {**base, **change}):
            with vlm_attn.patched(model, Opera(**settings)):
                scores.append(run(model, x).sequences_scores)
        assert abs(float(scores[0] - scores[1])) > 1e-4

    def test_beams(self) -> None:
        """Five unless told."""
        model, inputs = built("llava")
        x = inputs([[3, "image", 7]], seed=3)
        with vlm_attn.patched(model, "opera"):
            default = model.generate(**x, max_new_tokens=5, num_return_sequences=5)
            assert torch.equal(model.generate(**x, max_new_tokens=5, num_beams=5, num_return_sequences=5), default)
            assert len(model.generate(**x, max_new_tokens=5, num_beams=2, num_return_sequences=2)) == 2

    def test_refused(self) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 7]])
        with pytest.raises(ValueError, match=r"opera\+vcd: .* choose one"):
            vlm_attn.patch(model, ["opera", Vcd()])
        with pytest.raises(ValueError, match="plain model, which pai changes"):
            vlm_attn.patch(model, ["pai", "opera"])
        with vlm_attn.patched(model, "opera"):
            with pytest.raises(NotImplementedError, match="leave out do_sample="):
                model.generate(**x, do_sample=True)
            with pytest.raises(NotImplementedError, match="leave out output_hidden_states="):
                model.generate(**x, output_hidden_states=True, return_dict_in_generate=True)
            with pytest.raises(NotImplementedError, match="call model.generate"):
                model(**x)
        for wrong in ({"beams": 1}, {"candidates": 1}, {"threshold": 0}, {"scale": 0}):
            with pytest.raises(ValueError, match=next(iter(wrong))):
                Opera(**wrong)
