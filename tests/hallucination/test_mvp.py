# SPDX-License-Identifier: Apache-2.0
"""MVP: certainty by hand, and whole answers against plain forwards."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, differ
from tests.processors import encode, processor, user
from vlm_attn.hallucination import Gift, Mvp
from vlm_attn.hallucination.mvp import VIEWS, certainty
from vlm_attn.patching import engine_of

SETTINGS: dict[str, Any] = {
    "answers": ("red", "blue"),
    "paths": 6,
    "max_tokens": 5,
    "caption_tokens": 7,
    "temperature": 1.5,
}


@cache
def built() -> tuple[Any, Any]:
    model, _ = tiny.llava()
    model.generation_config.eos_token_id = tiny.EOS
    own = processor()
    with torch.no_grad():  # less sure of everything, and fond of the answers
        model.lm_head.weight *= 0.3
        model.lm_head.weight[own.tokenizer.convert_tokens_to_ids(["red", "blue", "dog"])] *= 2.5
        model.lm_head.weight[tiny.IMAGE] *= 0.1
    return model, own


def asked(*questions: str) -> Inputs:
    return encode(built()[1], *[[user(question, images=1)] for question in questions])


def scores_of(x: Inputs, **changes: Any) -> tuple[Tensor, Tensor]:
    model, own = built()
    kept: list[Tensor] = []
    end = Mvp.refuse

    def look(self: Mvp, run: Any) -> None:
        kept.append(run.call.memory(self))
        end(self, run)

    with pytest.MonkeyPatch.context() as patch, vlm_attn.patched(model, Mvp(**{**SETTINGS, **changes}), processor=own):
        patch.setattr(Mvp, "refuse", look)
        out = model.generate(**x, do_sample=False, max_new_tokens=4)
    return kept[0]["scores"], out[:, x["input_ids"].shape[1] :]  # type: ignore[call-overload]


def by_hand(
    x: Inputs,
    weights: tuple[float, ...] = (0.4, 0.4, 0.2),
    paths: int = 6,
    least: float = 0.001,
    top_p: float = 0.95,
    caption_tokens: int = 7,
) -> dict[str, float]:
    """One prompt, in plain forwards without a cache. Captions come from the host's sampling."""
    model, own = built()
    ids = x["input_ids"][0].tolist()
    start = len(ids) - ids[::-1].index(tiny.IMAGE) + 1  # behind the image, a newline
    tail = own.tokenizer("ASSISTANT:", add_special_tokens=False)["input_ids"]
    question = own.tokenizer.decode(ids[start : -len(tail)]).lower()

    def prompt(text: str) -> list[int]:
        return ids[:start] + own.tokenizer(text, add_special_tokens=False)["input_ids"] + tail

    def probabilities(tokens: list[int]) -> list[float]:
        with torch.no_grad():
            out = model(input_ids=torch.tensor([tokens]), pixel_values=x["pixel_values"])
        return out.logits[0, -1].softmax(-1).tolist()

    names = {own.tokenizer.convert_tokens_to_ids(word): word for word in ("red", "blue")}
    score = {"red": 0.0, "blue": 0.0}
    torch.manual_seed(0)
    for view, weight in zip(VIEWS, weights, strict=True):
        tokens = torch.tensor([prompt(view)])
        drawn = model.generate(
            input_ids=tokens, attention_mask=torch.ones_like(tokens), pixel_values=x["pixel_values"],
            do_sample=True, temperature=1.5, top_k=0, top_p=top_p, max_new_tokens=caption_tokens,
        )  # fmt: skip
        caption = own.tokenizer.decode(drawn[0, tokens.shape[1] :], skip_special_tokens=True)
        begin = prompt(f"Here is the caption of the image: {caption} Question: {question}")
        p = probabilities(begin)
        for token in sorted(range(len(p)), key=lambda i: -p[i])[:paths]:
            path, sure = [token], 1.0
            while path[-1] not in names and path[-1] != tiny.EOS and len(path) < 5 and p[token] >= least:
                q = probabilities(begin + path)
                path.append(max(range(len(q)), key=lambda i: q[i]))
                sure = q[path[-1]] - sorted(q)[-2]
            if path[-1] in names:
                score[names[path[-1]]] += weight * p[token] * sure
    return score


QUESTION = "what colour is the cup ?"


class TestAgainstPlainForwards:
    @pytest.mark.parametrize(
        "changes",
        [
            {},
            {"weights": (0.0, 1.0, 0.5)},
            {"paths": 40, "top_p": 0.3},
            {"paths": 40, "least": 0.01, "caption_tokens": 2},
        ],
        ids=str,
    )
    def test_scores(self, changes: dict[str, Any]) -> None:
        x = asked(QUESTION)
        wanted = by_hand(x, **changes)
        scores, tokens = scores_of(x, **changes)
        assert scores[0].tolist() == pytest.approx([wanted["red"], wanted["blue"]], abs=1e-5)
        if sum(wanted.values()):
            best = max(wanted, key=lambda name: wanted[name])
            assert tokens[0].tolist() == [built()[1].tokenizer.convert_tokens_to_ids(best), tiny.EOS]

    def test_something_was_found(self) -> None:
        """A path that is an answer at once, and one that comes to it."""
        assert all(value > 0 for value in by_hand(asked(QUESTION), paths=40).values())

    def test_batch_is_rows_alone(self) -> None:
        questions = (QUESTION, "which dog is big , the red and the blue ?")
        scores, tokens = scores_of(asked(*questions), paths=40)
        for row, question in enumerate(questions):
            alone = asked(question)
            alone["pixel_values"] = asked(*questions)["pixel_values"][row : row + 1]
            single, said = scores_of(alone, paths=40)
            assert scores[row].tolist() == pytest.approx(single[0].tolist(), abs=1e-5)
            assert tokens[row].tolist() == said[0].tolist()


class TestParts:
    def test_certainty(self) -> None:
        assert certainty(torch.tensor([0.2, 0.5, 0.3]).log()) == pytest.approx(0.2)

    @pytest.mark.parametrize(
        "change",
        [
            {"paths": 3}, {"least": 0.9}, {"weights": (1, 0, 0)}, {"temperature": 0.2}, {"max_tokens": 1}, {"seed": 4},
            {"answers": ("dog", "blue")}, {"top_p": 0.3}, {"caption_tokens": 2},
        ],
        ids=str,
    )  # fmt: skip
    def test_every_constant_matters(self, change: dict[str, Any]) -> None:
        x = asked(QUESTION)
        differ(scores_of(x, **{"paths": 40, **change})[0], scores_of(x, paths=40)[0])

    def test_sampling_draws_by_score_and_the_rest_stays_seeded(self) -> None:
        model, own = built()
        x = asked(QUESTION)
        scores, _ = scores_of(x, paths=40)
        with vlm_attn.patched(model, Mvp(**{**SETTINGS, "paths": 40}), processor=own):
            torch.manual_seed(0)
            before = torch.get_rng_state()
            out = model.generate(
                **x,
                do_sample=True,
                top_k=0,
                num_return_sequences=3,
                max_new_tokens=2,
                output_scores=True,
                return_dict_in_generate=True,
            )
            assert not torch.equal(torch.get_rng_state(), before)
        p = out.scores[0].softmax(-1)[:, [own.tokenizer.convert_tokens_to_ids(word) for word in ("red", "blue")]]
        assert p[2].tolist() == pytest.approx((scores[0] / scores[0].sum()).tolist(), abs=1e-5)
        assert (out.sequences[:, -1] == tiny.EOS).all()

    def test_longer_answers(self) -> None:
        model, own = built()
        with vlm_attn.patched(model, Mvp(**{**SETTINGS, "answers": ("big red cup", "small dog")}), processor=own):
            out = model.generate(**asked(QUESTION, "is it a dog ?"), do_sample=False, max_new_tokens=8)
        for row in own.tokenizer.batch_decode(
            out[:, asked(QUESTION, "is it a dog ?")["input_ids"].shape[1] :], skip_special_tokens=True
        ):
            assert row in ("big red cup", "small dog")

    def test_other_methods_act_on_the_paths(self) -> None:
        model, own = built()
        x = asked(QUESTION)
        plain, _ = scores_of(x, paths=40)
        kept = []
        end = Mvp.scores
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Mvp, "scores", lambda self, run, row: kept.append(end(self, run, row)) or kept[-1])
            gift = Gift(**ACTIVE["gift"])
            with vlm_attn.patched(model, [gift, Mvp(**{**SETTINGS, "paths": 40})], processor=own):
                model.generate(**x, do_sample=False, max_new_tokens=2)
                assert engine_of(model).methods[0].name == "gift"
        differ(kept[0], plain[0])

    def test_refused(self) -> None:
        model, own = built()
        x = asked(QUESTION)
        for wrong, words in (
            ({"answers": ("Yes",)}, "answers"),
            ({"weights": (1, 1)}, "weights"),
            ({"paths": 0}, "paths=0"),
            ({"top_p": 0.0}, "top_p=0"),
            ({"caption_tokens": 0}, "caption_tokens=0"),
        ):
            with pytest.raises(ValueError, match=words):
                Mvp(**wrong)
        with vlm_attn.patched(model, "mvp"), pytest.raises(ValueError, match="processor=processor"):
            model.generate(**x)
        with (
            vlm_attn.patched(model, Mvp(answers=("red dog", "red cup")), processor=own),
            pytest.raises(ValueError, match="told apart"),
        ):
            model.generate(**x)
        with vlm_attn.patched(model, Mvp(**SETTINGS), processor=own):
            with pytest.raises(NotImplementedError, match="num_beams"):
                model.generate(**x, num_beams=2)
            before, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
            try:
                with pytest.raises(ValueError, match="eos_token_id="):
                    model.generate(**x)
            finally:
                model.generation_config.eos_token_id = before
