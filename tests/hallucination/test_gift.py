# SPDX-License-Identifier: Apache-2.0
"""GIFT: every step by hand, and the whole against two full prefills with eager attention."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.engine.test_words import tagger
from tests.helpers import ACTIVE, Inputs, close, differ, generate, logits, margins, on, same
from tests.oracle import attentions, oracle
from tests.processors import encode, processor, user
from vlm_attn import host, words
from vlm_attn.hallucination import Gift
from vlm_attn.hallucination.gift import by_pairs, gaze_shift, saliency_map, top_heads
from vlm_attn.kernels import Edit, edited_attention, one_hot_segments
from vlm_attn.patching import engine_of

GIFT = ACTIVE["gift"]


# The method once more, in loops over numpy arrays, for one prompt.


def map_by_hand(
    rows: list[np.ndarray],
    visual: list[int],
    query: list[int],
    informative: list[int],
    heads: float = 0.5,
    sigma: float = 3.0,
) -> np.ndarray:
    """Steps 2-5. ``rows``: per saliency layer ``A [H, T, S]``."""
    kept = []
    for attention in rows:
        count = max(1, int(len(attention) * heads))
        shift = np.zeros((len(attention), len(informative), len(visual)))
        for h in range(len(attention)):
            for n, i in enumerate(informative):
                assert i in query
                for m, j in enumerate(visual):
                    shift[h, n, m] = max(attention[h, i, j] - attention[h, i - 1, j], 0.0)
        order = sorted(range(len(attention)), key=lambda h: -shift[h].sum())
        kept += [shift[h, n] for h in order[:count] for n in range(len(informative))]
    mean = np.mean(kept, axis=0)
    mean = mean.clip(mean.mean() - sigma * mean.std(ddof=1), mean.mean() + sigma * mean.std(ddof=1))
    low, high = mean.min(), mean.max()
    return (mean - low) / (high - low) if high > low else np.zeros_like(mean)


def row_by_hand(
    row: np.ndarray,
    visual: list[int],
    query: list[int],
    saliency: np.ndarray,
    alpha: float,
    beta: float = 1.0,
    heads: float = 0.5,
) -> np.ndarray:
    """Steps 6-8 on one row ``A [H, S]``."""
    row = row.copy()
    count = max(1, int(len(row) * heads))
    multiplier = [math.exp(alpha * s) for s in saliency]
    by_visual = sorted(range(len(row)), key=lambda h: -sum(row[h, j] for j in visual))[:count]
    by_query = sorted(range(len(row)), key=lambda h: -sum(row[h, j] for j in query))[:count]
    above = sum(m * row[h, j] for h in by_visual for m, j in zip(multiplier, visual, strict=True))
    below = sum(row[h, j] for h in by_visual for j in visual)
    ratio = beta * above / below
    for h in by_visual:
        for m, j in zip(multiplier, visual, strict=True):
            row[h, j] *= m
    for h in by_query:
        for j in query:
            row[h, j] *= ratio
    return row / row.sum(1, keepdims=True)


class TestSteps:
    def test_gaze_shift(self) -> None:
        """Step 2, rows for columns 4, 5, 6 of a prompt whose image is at 1..3."""
        rows = torch.tensor([[[[0.1, 0.2, 0.3, 0.0, 0.4], [0.3, 0.1, 0.5, 0.1, 0.0], [0.1, 0.4, 0.0, 0.3, 0.2]]]])
        visual = torch.tensor([[False, True, True, True, False]])
        shift = gaze_shift(rows, torch.tensor([[4, 5, 6]]), visual)
        close(shift, torch.tensor([[[[0, 0, 0.2, 0.1, 0], [0, 0.3, 0, 0.2, 0]]]]), 1e-6)

    def test_gaze_shift_leaves_out_missing_rows(self) -> None:
        rows = torch.rand(1, 2, 3, 4)
        visual = torch.ones(1, 4, dtype=torch.bool)
        shift = gaze_shift(rows, torch.tensor([[4, 5, -1]]), visual)
        assert not shift[:, :, 1].any()
        assert shift[:, :, 0].any()

    def test_map(self) -> None:
        """Steps 3-5: head 0 shifts by 0.9 in all, head 1 by 0.6: head 0 is kept; its sums are .1 .5 .3 -> 0 1 .5."""
        shifts = torch.zeros(1, 2, 2, 5)
        shifts[0, 0, :, 1:4] = torch.tensor([[0.1, 0.2, 0.0], [0.0, 0.3, 0.3]])
        shifts[0, 1, :, 1:4] = torch.tensor([[0.3, 0.0, 0.0], [0.3, 0.0, 0.0]])
        visual = torch.tensor([[False, True, True, True, False]])
        words = torch.ones(1, 2, dtype=torch.bool)
        close(
            saliency_map([shifts], words, visual, heads=0.5, clip_sigma=3.0), torch.tensor([[0, 0, 1, 0.5, 0.0]]), 1e-6
        )
        # Only the first word is informative: head 0 and head 1 tie at .3 no more if head 1 has .4.
        shifts[0, 1, 0, 1] = 0.4
        words = torch.tensor([[True, False]])
        close(saliency_map([shifts], words, visual, heads=0.5, clip_sigma=3.0), torch.tensor([[0, 1.0, 0, 0, 0]]), 1e-6)
        # Both heads: .1+.4, .2, 0
        close(
            saliency_map([shifts], words, visual, heads=1.0, clip_sigma=3.0), torch.tensor([[0, 1.0, 0.4, 0, 0]]), 1e-6
        )

    def test_map_over_layers(self) -> None:
        """Heads are chosen per layer: (.2, 0, .1) from head 1 of one and (0, .4, .1) from head 0 of the other: .2 .4 .2."""
        one, two = torch.zeros(2, 1, 2, 1, 3).unbind(0)
        one[0, 1, 0], one[0, 0, 0] = torch.tensor([0.2, 0, 0.1]), torch.tensor([0.05, 0.05, 0.05])
        two[0, 0, 0], two[0, 1, 0] = torch.tensor([0, 0.4, 0.1]), torch.tensor([0.2, 0, 0])
        words, visual = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 3, dtype=torch.bool)
        close(saliency_map([one, two], words, visual, heads=0.5, clip_sigma=3.0), torch.tensor([[0, 1.0, 0]]), 1e-6)

    def test_clip(self) -> None:
        """Eight zeros, .3 and 1: mean .13, sum of squares .921, so an unbiased deviation of .31989 (biased: .30348). At one
        sigma the largest alone is clipped, to .44989, and .3 is scaled by what it was clipped to; at three none is."""
        shifts = torch.zeros(1, 1, 1, 10)
        shifts[..., 8], shifts[..., 9] = 0.3, 1.0
        words, visual = torch.ones(1, 1, dtype=torch.bool), torch.ones(1, 10, dtype=torch.bool)
        wide = saliency_map([shifts], words, visual, heads=1.0, clip_sigma=3.0)
        close(wide, torch.tensor([[0.0] * 8 + [0.3, 1.0]]), 1e-6)
        narrow = saliency_map([shifts], words, visual, heads=1.0, clip_sigma=1.0)
        close(narrow, torch.tensor([[0.0] * 8 + [0.3 / (0.13 + math.sqrt(0.921 / 9)), 1.0]]), 1e-6)

    @pytest.mark.parametrize("value", [0.0, 0.25])
    def test_constant_map_is_all_zeros(self, value: float) -> None:
        shifts = torch.full((1, 2, 3, 4), value)
        words, visual = torch.ones(1, 3, dtype=torch.bool), torch.ones(1, 4, dtype=torch.bool)
        assert saliency_map([shifts], words, visual, heads=0.5, clip_sigma=3.0).tolist() == [[0.0] * 4]

    def test_by_pairs(self) -> None:
        """As a GPU chooses heads: as topk does, and of equals the first."""
        score = torch.rand(2, 7, 3, generator=torch.Generator().manual_seed(0))
        assert torch.equal(by_pairs(score, 3), top_heads(score, 0.5))
        assert by_pairs(torch.tensor([[1.0, 2.0, 2.0, 0.0]]), 2).tolist() == [[False, True, True, False]]
        assert by_pairs(torch.ones(1, 4), 2).tolist() == [[True, True, False, False]]

    def test_top_heads(self) -> None:
        score = torch.tensor([[3.0, 1.0, 2.0, 5.0, 4.0]])
        assert top_heads(score, 0.5).nonzero()[:, 1].tolist() == [3, 4]
        assert top_heads(score, 0.1).nonzero()[:, 1].tolist() == [3]
        assert top_heads(score, 1.0).all()

    def weighted(self, probability: Tensor, saliency: list[float], alpha: float, **options: Any) -> Tensor:
        """Rows of probabilities over [other, visual 1, visual 2, question] after steps 6-8, ``[H, 4]``."""
        method = Gift(**{**GIFT, "alpha": alpha, **options})
        ids = torch.tensor([[0, 1, 1, 2]])
        weight = torch.tensor([[0.0, *saliency, 0.0]]) * alpha
        edit = Edit(one_hot_segments(ids, 3, twin_of=1, log_weight=weight), method.reweigh)
        heads = len(probability)
        key = probability.log().view(1, heads, 4, 1)
        value = torch.eye(4).expand(1, heads, 4, 4)
        return edited_attention(torch.ones(1, heads, 1, 1), key, value, [edit], scale=1.0)[0, :, 0]

    ROWS = torch.tensor([[0.4, 0.3, 0.1, 0.2], [0.4, 0.06, 0.04, 0.5]])

    def test_enhancement(self) -> None:
        """Steps 6-8. Head 0 looks (.4 against .1), head 1 asks (.5 against .2); e^alpha = 3 on the first visual token, so
        r = (.9 + .1) / (.3 + .1) = 2.5; head 0 sums to 1.6, head 1 (question .5 * 2.5 = 1.25) to 1.75."""
        now = self.weighted(self.ROWS, [1.0, 0.0], math.log(3))
        wanted = torch.tensor([[0.4, 0.9, 0.1, 0.2], [0.4, 0.06, 0.04, 1.25]]) / torch.tensor([[1.6], [1.75]])
        close(now, wanted, 1e-6)

    def test_beta(self) -> None:
        now = self.weighted(self.ROWS, [1.0, 0.0], math.log(3), beta=2.0)
        wanted = torch.tensor([[0.4, 0.9, 0.1, 0.2], [0.4, 0.06, 0.04, 2.5]]) / torch.tensor([[1.6], [3.0]])
        close(now, wanted, 1e-6)

    def test_one_head_may_look_and_ask(self) -> None:
        """Head 0 has the most of both: visual .3, .2 -> r = (.6 + .2) / .5 = 1.6; question .64; sum 1.54."""
        rows = torch.tensor([[0.1, 0.3, 0.2, 0.4], [0.6, 0.1, 0.1, 0.2]])
        now = self.weighted(rows, [1.0, 0.0], math.log(2))
        close(now[0], torch.tensor([0.1, 0.6, 0.2, 0.64]) / 1.54, 1e-6)
        close(now[1], rows[1], 1e-6)

    def test_all_heads(self) -> None:
        """One ratio for all: (.9 + .1 + .18 + .04) / .5 = 2.44."""
        now = self.weighted(self.ROWS, [1.0, 0.0], math.log(3), heads=1.0)
        wanted = torch.tensor([[0.4, 0.9, 0.1, 0.488], [0.4, 0.18, 0.04, 1.22]])
        close(now, wanted / wanted.sum(1, keepdim=True), 1e-6)

    def test_constant_map_changes_nothing(self) -> None:
        close(self.weighted(self.ROWS, [0.0, 0.0], 5.0), self.ROWS, 1e-6)

    def test_no_visual_mass(self) -> None:
        """r = 1 where no head sees the image; never NaN."""
        rows = torch.tensor([[0.7, 0.0, 0.0, 0.3], [0.4, 0.0, 0.0, 0.6]])
        close(self.weighted(rows, [1.0, 0.0], 3.0), rows, 1e-6)

    def test_large_alpha_stays_finite(self) -> None:
        rows = torch.tensor([[1 - 3e-20, 1e-20, 1e-20, 1e-20], [0.4, 0.06, 0.04, 0.5]])
        now = self.weighted(rows, [1.0, 0.5], 20.0)
        assert now.isfinite().all()
        close(now.sum(1), torch.ones(2), 1e-6)

    @pytest.mark.parametrize("seed", range(5))
    def test_bias_form_is_multiply_and_renormalise(self, seed: int) -> None:
        """Against the loops above, and both against softmax(s + bias) written out."""
        random = np.random.default_rng(seed)
        heads, length, alpha, beta = 6, 12, 3.0, 1.5
        visual, query = [2, 3, 4, 5, 6], [8, 9]
        scores = random.normal(size=(heads, length)) * 2
        saliency = random.uniform(size=len(visual))
        plain = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
        wanted = row_by_hand(plain, visual, query, saliency, alpha, beta)

        ids = torch.zeros(1, length, dtype=torch.long)
        ids[0, visual], ids[0, query] = 1, 2
        weight = torch.zeros(1, length)
        weight[0, visual] = alpha * torch.tensor(saliency, dtype=torch.float32)
        method = Gift(**{**GIFT, "alpha": alpha, "beta": beta})
        edit = Edit(one_hot_segments(ids, 3, twin_of=1, log_weight=weight), method.reweigh)
        key = torch.tensor(scores, dtype=torch.float32).view(1, heads, length, 1)
        value = torch.eye(length).expand(1, heads, length, length)
        now = edited_attention(torch.ones(1, heads, 1, 1), key, value, [edit], scale=1.0)[0, :, 0]
        close(now, torch.tensor(wanted, dtype=torch.float32), 1e-5)

        looks = np.argsort(-plain[:, visual].sum(1))[:3]
        asks = np.argsort(-plain[:, query].sum(1))[:3]
        ratio = (plain[looks][:, visual] * np.exp(alpha * saliency)).sum() / plain[looks][:, visual].sum()
        biased = scores.copy()
        for h in looks:
            biased[h, visual] += alpha * saliency
        for h in asks:
            biased[h, query] += math.log(beta * ratio)
        close(torch.tensor(np.exp(biased) / np.exp(biased).sum(1, keepdims=True)), torch.tensor(wanted), 1e-10)


def columns(x: Inputs, tail: int = 2) -> tuple[list[int], list[int]]:
    """Image columns and question columns of one unpadded prompt; the last ``tail`` tokens are the template's."""
    visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    return visual, list(range(visual[-1] + 2, x["input_ids"].shape[1] - tail))


def gift_hand(
    visual: list[int], query: list[int], saliency: np.ndarray, settings: dict[str, Any]
) -> Callable[..., Tensor]:
    """Edits the last row of every forward, as the released code does."""

    def hand(layer: int, probability: Tensor) -> Tensor:
        assert probability.shape[0] == 1
        if layer in settings["enhance_layers"]:
            row = probability[0, :, -1].double().numpy()
            edited = row_by_hand(
                row, visual, query, saliency, settings["alpha"], settings.get("beta", 1.0), settings.get("heads", 0.5)
            )
            probability = probability.clone()
            probability[0, :, -1] = torch.tensor(edited, dtype=probability.dtype)
        return probability

    return hand


class TestTwoPrefills:
    """One prefill plus one token against the published procedure: a full prefill for the map, then a second, edited one."""

    @pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3", "internvl"])
    @pytest.mark.parametrize("changes", [{}, {"alpha": 1.5, "beta": 2.0}, {"heads": 0.75, "saliency_layers": (0, 2)}])
    def test_greedy(self, family: str, changes: dict[str, Any]) -> None:
        model, inputs = tiny.FAMILIES[family]()
        settings = {**GIFT, **changes}
        x = inputs([[3, "image", 11]], seed=5)
        visual, query = columns(x)
        maps = attentions(model, x)
        rows = [maps[layer][0].double().numpy() for layer in settings["saliency_layers"]]
        saliency = map_by_hand(rows, visual, query, query, settings.get("heads", 0.5))
        assert saliency.max() == 1.0
        # An image token among the new ones would stop the host itself where it runs without a cache.
        options: dict[str, Any] = {"new": 10, "suppress_tokens": [tiny.IMAGE]}
        wanted = generate(oracle(model, gift_hand(visual, query, saliency, settings)), x, **options)
        with vlm_attn.patched(model, "gift", query_span=(query[0], query[-1] + 1), **settings), margins() as margin:
            same(generate(model, x, **options), wanted, 1e-4)
            same(generate(model, x, use_cache=False, **options), wanted, 1e-4)
            close(logits(model, x)[:, -1], wanted[1][0], 1e-4)
        margin.check()
        differ(wanted[1][0], generate(model, x)[1][0])

    def test_second_turn_on_its_own_cache(self) -> None:
        """What the first turn wrote into the cache stays; the second question is read and boosted on top of it."""
        model, inputs = tiny.llava()
        first = inputs([[3, "image", 11]], seed=5)
        visual, query = columns(first)
        more = torch.randint(3, tiny.IMAGE, (1, 8), generator=torch.Generator().manual_seed(3))
        seen: dict[int, np.ndarray] = {}

        def look(layer: int, probability: Tensor) -> Tensor:
            seen[layer] = probability[0].double().numpy()
            return probability

        def turn(own: Any, x: Inputs) -> Any:
            with torch.no_grad():
                return own.generate(
                    **x, max_new_tokens=5, do_sample=False, output_logits=True, return_dict_in_generate=True
                )

        def second(out: Any) -> Inputs:
            ids = torch.cat([out.sequences, more], 1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

        rows = attentions(model, first)[1][0].double().numpy()
        by_hand = turn(oracle(model, gift_hand(visual, query, map_by_hand([rows], visual, query, query), GIFT)), first)
        whole = second(by_hand)
        length = whole["input_ids"].shape[1]
        again = list(range(length - 7, length - 2))
        cached = host.cache_of(by_hand).get_seq_length()
        spare = copy.deepcopy(host.cache_of(by_hand))
        with torch.no_grad():
            oracle(model, look)(input_ids=whole["input_ids"][:, cached:], **{host.CACHE: spare})
        full = np.zeros((4, length, length))
        full[:, cached:] = seen[1]
        saliency = map_by_hand([full], visual, again, again)
        hand = gift_hand(visual, again, saliency, GIFT)
        wanted = turn(oracle(model, hand), {**whole, host.CACHE: host.cache_of(by_hand)})

        def span(ids: Tensor, mask: Tensor) -> list[tuple[int, int]]:
            used = query if ids.shape[1] < length else again
            return [(used[0], used[-1] + 1)]

        with vlm_attn.patched(model, "gift", query_span=span, **GIFT), margins() as margin:
            mine = turn(model, first)
            assert torch.equal(mine.sequences, by_hand.sequences)
            got = turn(model, {**second(mine), host.CACHE: host.cache_of(mine)})
        margin.check()
        assert torch.equal(got.sequences, wanted.sequences)
        close(torch.stack(got.logits), torch.stack(wanted.logits), 1e-4)

    def test_last_prompt_token_does_not_count_for_the_map(self) -> None:
        """A question without a template tail: its last token is the edited row, so its gaze is not read; it is boosted."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 11]], seed=5)
        visual, query = columns(x, tail=0)
        rows = attentions(model, x)[1][0].double().numpy()
        saliency = map_by_hand([rows], visual, query, query[:-1])
        wanted = generate(oracle(model, gift_hand(visual, query, saliency, GIFT)), x)
        with vlm_attn.patched(model, "gift", query_span=(query[0], query[-1] + 1), **GIFT), margins() as margin:
            same(generate(model, x), wanted, 1e-4)
        margin.check()


class TestContentWords:
    @pytest.fixture(autouse=True)
    def fresh(self) -> None:
        words._warn_once.cache_clear()

    def tag(self, monkeypatch: pytest.MonkeyPatch, tags: dict[str, str] | None) -> None:
        monkeypatch.setattr(words, "_tagger", lambda: None if tags is None else tagger(tags))

    def run(self, x: Inputs, own: Any, which: str, **changes: Any) -> tuple[Tensor, Tensor, Tensor]:
        model, _ = tiny.llava()
        with on(model, "gift", query_words=which, processor=own, **changes):
            with engine_of(model).running(x) as call, torch.no_grad():
                model(**x)
                saliency = call.memory(engine_of(model).methods[0])["saliency"]
            return saliency, *generate(model, x)

    def test_only_informative_words_count(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """The map by hand from the words at their columns, every occurrence of "dog" among them."""
        own = processor()
        x = encode(own, [user("is the dog big and the small dog red?", 1)])
        self.tag(monkeypatch, {"dog": "NOUN", "big": "ADJ"})
        saliency, *run = self.run(x, own, "content")
        model, _ = tiny.llava()
        visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
        start = visual[-1] + 2
        rows = attentions(model, x)[1][0].double().numpy()
        words = [start + 2, start + 3, start + 7]
        assert own.tokenizer.decode(x["input_ids"][0, words].tolist()) == "dog big dog"
        wanted = map_by_hand([rows], visual, list(range(start, start + 10)), words)
        close(saliency[0, visual], torch.tensor(wanted, dtype=torch.float32), 1e-4)
        differ(self.run(x, own, "all")[2], run[1])
        parity, *_ = self.run(x, own, "content", code_parity=True)  # the first "dog" does not count
        wanted = map_by_hand([rows], visual, list(range(start, start + 10)), words[1:])
        close(parity[0, visual], torch.tensor(wanted, dtype=torch.float32), 1e-4)

    def test_rows_of_a_batch_and_beams(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = processor()
        chats = [[user("is the dog red?", 1)], [user("how many cup is there and what colour is the big cup?", 2)]]
        self.tag(monkeypatch, {"dog": "NOUN", "cup": "NOUN", "many": "ADJ"})
        batch, *run = self.run(encode(own, *chats), own, "content")
        model, _ = tiny.llava()
        for row in range(2):
            x = encode(own, chats[row])
            pad = batch.shape[1] - x["input_ids"].shape[1]
            x["pixel_values"] = encode(own, *chats)["pixel_values"][[slice(0, 1), slice(1, 3)][row]]
            close(self.run(x, own, "content")[0][0], batch[row, pad:], 1e-4)
        with on(model, "gift", query_words="content", processor=own), torch.no_grad():
            x = encode(own, *chats)
            beams = model.generate(**x, num_beams=2, max_new_tokens=3, do_sample=False)
        assert beams.shape == (2, x["input_ids"].shape[1] + 3)

    def test_no_informative_word(self, monkeypatch: pytest.MonkeyPatch) -> None:
        own = processor()
        x = encode(own, [user("is it there?", 1)])
        self.tag(monkeypatch, {})
        with pytest.warns(UserWarning, match="no informative word") as caught:
            saliency, *run = self.run(x, own, "content")
        assert len(caught) == 1
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            everything, *wanted = self.run(x, own, "all")
            self.run(x, own, "content")  # said once
        assert torch.equal(saliency, everything)
        same(tuple(run), tuple(wanted), 0.0)

    def test_without_a_processor(self, monkeypatch: pytest.MonkeyPatch) -> None:
        x = encode(processor(), [user("is the dog red?", 1)])
        self.tag(monkeypatch, {"dog": "NOUN"})
        with pytest.warns(UserWarning, match="processor") as caught:
            _, *run = self.run(x, None, "content")
        assert len(caught) == 1
        same(tuple(run), tuple(self.run(x, None, "all")[1:]), 0.0)

    def test_without_a_tagger(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """As installed: the list of function words gives what a tagger with the same opinion gives, without a warning."""
        own = processor()
        x = encode(own, [user("is the dog red?", 1)])
        self.tag(monkeypatch, {"dog": "NOUN", "red?": "ADJ", "red": "ADJ"})
        wanted = self.run(x, own, "content")
        self.tag(monkeypatch, None)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            saliency, *run = self.run(x, own, "content")
        assert torch.equal(saliency, wanted[0])
        same(tuple(run), tuple(wanted[1:]), 0.0)
        differ(self.run(x, own, "all")[2], run[1])


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Inputs, Tensor]:
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9], [2, "image", 7, "image", 5]], seed=1)
    with on(model, "gift"):
        return model, x, logits(model, x)[:, -1]


class TestSensitivity:
    """Every constant does something; the documented neutral values do not."""

    @pytest.mark.parametrize(
        "change",
        [
            {"alpha": 4.0},
            {"beta": 1.5},
            {"heads": 0.75},
            {"clip_sigma": 0.5},
            {"saliency_layers": (2,)},
            {"saliency_layers": (1, 2)},
            {"enhance_layers": (0, 2)},
            {"enhance_layers": (3,)},
            {"query_span": lambda ids, mask: [(15, 18), (29, 32)]},
        ],
    )
    def test_changes(self, setting: Any, change: dict[str, Any]) -> None:
        model, x, before = setting
        with on(model, "gift", **change):
            differ(logits(model, x)[:, -1], before)

    def test_question_and_image_both_matter(self, setting: Any) -> None:
        model, x, before = setting
        with on(model, "gift", alpha=0.0, beta=2.0):  # no map: only the question's boost
            now = logits(model, x)[:, -1]
        differ(now, before)
        differ(now, logits(model, x)[:, -1])

    @pytest.mark.parametrize("change", [{"clip_sigma": 50.0}, {"enhance_layers": [3, 0, 2]}, {"saliency_layers": 1}])
    def test_same(self, setting: Any, change: dict[str, Any]) -> None:
        model, x, before = setting
        with on(model, "gift", **{"clip_sigma": 3.0, **change}):
            close(logits(model, x)[:, -1], before, 1e-6)

    def test_neutral(self, setting: Any) -> None:
        model, x, _ = setting
        plain = logits(model, x)
        for strength, neutral in ((0.0, True), (1e-3, False)):
            method = Gift(**{**GIFT, "alpha": strength})
            assert method.neutral is neutral
            with vlm_attn.patched(model, method):
                assert torch.equal(logits(model, x), plain) is neutral
        assert not Gift(**{**GIFT, "alpha": 0.0, "beta": 2.0}).neutral
