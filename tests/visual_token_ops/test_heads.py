# SPDX-License-Identifier: Apache-2.0
"""Which keys every head sees: against masks of the tests' own, dropped against masked, on every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache
from transformers.masking_utils import eager_mask

import vlm_attn
from tests import tiny
from tests.helpers import (
    ACTIVE,
    CHOOSERS,
    NEUTRAL,
    Inputs,
    alone,
    close,
    differ,
    generate,
    logits,
    margins,
    on,
    same,
    stock_needs_cache,
)
from tests.oracle import oracle
from vlm_attn import host
from vlm_attn.hallucination import Gift, Vhr
from vlm_attn.heads import HeadMethod
from vlm_attn.layout import ImageSpan
from vlm_attn.patching import engine_of
from vlm_attn.registry import build, method_class
from vlm_attn.visual_token_ops import Duo, FastV, Landmark, LongHeads, Razor, Recycled, Routed
from vlm_attn.visual_token_ops.chunks import best, regions, tiles

SEED = 1
IMAGES = (1, 2, 3)
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6], [2, "image", 3, "image", 2, "image", 9]]
TEXT = {"suppress_tokens": [tiny.IMAGE]}
RECYCLED = {"keep": 0.3, "stride": 3}
METHODS: dict[str, Callable[..., HeadMethod]] = {
    **{name: lambda name=name, **o: build(name, **{**ACTIVE[name], **o}) for name in CHOOSERS},  # type: ignore[misc]
    "recycled": lambda **o: Recycled(**{**RECYCLED, **o}),
}


@cache
def built(name: str) -> tiny.Built:
    return tiny.FAMILIES[name]()


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class TestChunks:
    def test_tiles(self) -> None:
        image = ImageSpan(0, 5, 5 + 12, (3, 4))
        assert tiles(image, 0).tolist() == [0] * 4 + [1] * 4 + [2] * 4
        assert tiles(image, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
        assert tiles(ImageSpan(0, 0, 10, (1, 10)), 0).tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2, 3]
        assert regions(image, 2).tolist() == [0, 0, 1, 1, 0, 0, 1, 1, 2, 2, 3, 3]
        assert regions(image, 9).tolist() == list(range(12))
        assert regions(ImageSpan(0, 0, 10, (1, 10)), 2).tolist() == [0, 0, 0, 1, 1, 2, 2, 2, 3, 3]

    def test_best(self) -> None:
        score = torch.tensor([[[[1.0, 3.0, 3.0, -torch.inf]]], [[[0.0, -torch.inf, 2.0, 1.0]]]])
        chosen = best(score, torch.tensor([1, 9]))
        assert chosen.flatten(1).tolist() == [[False, True, False, False], [True, False, True, True]]


class TestHeads:
    def test_duo_streams_the_smallest_gates(self) -> None:
        method = Duo(gates=[[0.9, 0.2], [0.1, 0.8]], sparsity=0.5)
        assert method.streaming() == [[False, True], [True, False]]
        assert Duo(gates=[[0.5, 0.5], [0.5, 0.5]], sparsity=0.75).streaming() == [[True, True], [True, False]]
        assert sum(map(sum, Duo(gates=[[1.0] * 4] * 5, sparsity=1.0).streaming())) == 20
        for sparsity, heads in ((0.4, 2), (0.6, 2), (0.9, 4)):  # 1.6, 2.4 and 3.6 of 4: the nearest whole number
            assert sum(map(sum, Duo(gates=[[0.1, 0.2], [0.3, 0.4]], sparsity=sparsity).streaming())) == heads

    def test_razor_keeps_the_best_of_either_score(self) -> None:
        """Four KV heads of two query heads each: a group goes by its largest."""
        echo = [[0.0, 0.9, 0.1, 0.1], [0.2, 0.2, 0.3, 0.0]]
        induction = [[0.0, 0.1, 0.2, 0.1], [0.2, 0.2, 0.3, 0.8]]
        method = Razor(echo=echo, induction=induction, echo_share=0.25, induction_share=0.5)
        assert method.retrieving(2).tolist() == [[True, True], [False, True]]
        method = Razor(echo=echo, induction=induction, echo_share=0.0, induction_share=0.01)
        assert method.retrieving(2).tolist() == [[False, False], [False, True]]


def duo_by_hand(ids: Tensor, mask: Tensor, full: list[list[bool]], sink: int, recent: int) -> list[Tensor]:
    """``[B, H, L, L]`` of every layer, column by column."""
    batch, length = ids.shape
    made = []
    for layer in full:
        seen = torch.zeros(batch, 4, length, length, dtype=torch.bool)
        for row in range(batch):
            first = int(mask[row].argmax())
            for h in range(4):
                for i in range(first, length):
                    for j in range(first, i + 1):
                        seen[row, h, i, j] = layer[h // 2] or j < first + sink or i - j < recent
        made.append(seen)
    return made


def test_duo_is_its_mask() -> None:
    """A model of the test's own, with a mask per head in every layer."""
    model, inputs = built("llava")
    x = inputs(PROMPTS[:2], seed=SEED)
    full = [[True, False], [False, False], [False, True], [True, True]]
    gates = [[float(head) for head in layer] for layer in full]
    seen = duo_by_hand(x["input_ids"], x["attention_mask"], full, 2, 4)
    wanted = logits(
        oracle(model, scores=lambda layer, s: s.masked_fill(~seen[layer], -1e9)), x
    )  # padded rows see nothing
    with vlm_attn.patched(model, Duo(gates=gates, sparsity=0.5, sink=2, recent=4)):
        got = logits(model, x)
    there = x["attention_mask"].bool()
    close(got[there], wanted[there])
    differ(got[:, -1], logits(model, x)[:, -1])


def last_row(model: Any, x: Inputs, attend: Callable[..., Tensor]) -> Tensor:
    """Last row's logits of a copy whose last row has outputs of the test's own, head by head.

    Args:
        model: a model.
        x: one prompt.
        attend: ``(layer, head, query [L, D], key [L, D], value [L, D])`` -> ``[D]``; queries are scaled.
    """

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
    ) -> tuple[Tensor, None]:
        key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
        query = query * scaling
        out = (query @ key.transpose(2, 3) + mask).softmax(-1) @ value
        for h in range(query.shape[1]):
            out[0, h, -1] = attend(module.layer_idx, h, query[0, h], key[0, h], value[0, h])
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("test_last_row", attention)
    AttentionMaskInterface.register("test_last_row", eager_mask)
    own = copy.deepcopy(model)
    own.set_attn_implementation({"text_config": "test_last_row"})
    return logits(own, x)[:, -1]


def over(query: Tensor, key: Tensor, value: Tensor, bias: Tensor | None = None) -> Tensor:
    """Attention of one row."""
    score = key @ query if bias is None else key @ query + bias
    return score.softmax(-1) @ value


class TestEquations:
    """The last row of a prompt, worked out from queries, keys and values of a model without the engine."""

    @pytest.fixture
    def setting(self) -> tuple[Any, Inputs, Tensor]:
        model, inputs = built("llava")
        x = inputs([[3, "image", 7]], seed=SEED)
        chunk = torch.full_like(x["input_ids"][0], -1)
        chunk[x["input_ids"][0] == tiny.IMAGE] = torch.arange(9) // 3  # rows of the picture
        return model, x, chunk

    def check(self, setting: tuple[Any, Inputs, Tensor], method: Any, attend: Callable[..., Tensor]) -> None:
        model, x, _ = setting
        wanted = last_row(model, x, attend)
        with vlm_attn.patched(model, method):
            close(logits(model, x)[:, -1], wanted)
        differ(wanted, logits(model, x)[:, -1])

    @pytest.mark.parametrize("compensate", [True, False])
    def test_razor(self, setting: Any, compensate: bool) -> None:
        method = Razor(**ACTIVE["razor"], sink=3, compensate=compensate)
        full = method.retrieving(2).repeat_interleave(2, 1)
        assert full.any()
        assert not full.any(1).all()
        near = torch.zeros(len(setting[2]), dtype=torch.bool)
        near[:3] = near[-5:] = True
        bias = torch.zeros(9)
        bias[-1] = float((~near).sum().log())

        def attend(layer: int, h: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            if full[layer, h]:
                return over(query[-1], key, value)
            if not compensate:
                return over(query[-1], key[near], value[near])
            return over(query[-1], *(torch.cat([t[near], t[~near].mean(0, True)]) for t in (key, value)), bias)

        self.check(setting, method, attend)

    @pytest.mark.parametrize("summaries", [True, False])
    def test_landmark(self, setting: Any, summaries: bool) -> None:
        chunk = setting[2]

        def attend(layer: int, h: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            means = [torch.stack([t[chunk == c].mean(0) for c in range(3)]) for t in (key, value)]
            opened = int((means[0] @ query[-1]).argmax())
            seen = (chunk == -1) | (chunk == opened)
            shut = torch.arange(3) != opened
            keys, values = (torch.cat([t[seen], mean[shut]]) for t, mean in zip((key, value), means, strict=True))
            bias = torch.cat([torch.zeros(int(seen.sum())), torch.full((2,), 3.0).log()])
            return over(query[-1], keys, values, bias) if summaries else over(query[-1], key[seen], value[seen])

        self.check(setting, Landmark(keep=1, summaries=summaries), attend)

    def test_longheads(self, setting: Any) -> None:
        chunk = setting[2]

        def attend(layer: int, h: int, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
            pooled = []
            for c in range(3):
                own = chunk == c
                pooled.append((query[own] @ key[own].T).softmax(-1).mean(0) @ key[own])
            order = torch.stack([query[-1] @ k for k in pooled]).argsort(descending=True)
            seen = (chunk == -1) | (chunk == order[0]) | (chunk == order[1])
            return over(query[-1], key[seen], value[seen])

        self.check(setting, LongHeads(keep=2), attend)

    def test_routed(self, setting: Any) -> None:
        """Rows of the image and of the question alike: whose route is what every block's mean query says."""
        model, x, _ = setting
        region = torch.full_like(x["input_ids"][0], -1)
        region[x["input_ids"][0] == tiny.IMAGE] = torch.tensor([0, 0, 1, 0, 0, 1, 2, 2, 3])
        first_text = int((region >= 0).nonzero().max()) + 1

        def attention(
            module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, scaling: float, **_: Any
        ) -> tuple[Tensor, None]:
            key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
            score = query @ key.transpose(2, 3) * scaling + mask
            for h in range(query.shape[1]):
                means = torch.stack([key[0, h, region == c].mean(0) for c in range(4)])
                for block in range(5):
                    rows = region == block
                    if block == 4:
                        rows = torch.arange(len(region)) >= first_text
                    affinity = means @ query[0, h, rows].mean(0)
                    last = int(rows.nonzero().max())
                    for c in range(4):
                        if int((region == c).nonzero().min()) > last:
                            affinity[c] = -torch.inf
                    if block < 4:
                        affinity[block] = torch.inf
                    hidden = torch.ones(len(region), dtype=torch.bool)
                    for c in affinity.topk(2).indices.tolist():
                        if affinity[c] > -torch.inf:
                            hidden &= region != c
                    score[0, h, rows[:, None] & (hidden & (region >= 0))] = -torch.inf
            return (score.softmax(-1) @ value).transpose(1, 2).contiguous(), None

        AttentionInterface.register("test_last_row", attention)
        AttentionMaskInterface.register("test_last_row", eager_mask)
        own = copy.deepcopy(model)
        own.set_attn_implementation({"text_config": "test_last_row"})
        wanted = logits(own, x)
        with vlm_attn.patched(model, Routed(side=2, keep=2)):
            close(logits(model, x), wanted)
        differ(wanted, logits(model, x))

    def test_recycled(self) -> None:
        """The second row behind a full one sees what the full one looked at most, and what came since."""
        model, inputs = built("llava")
        x = inputs([[3, "image", 7]], seed=SEED)
        length = x["input_ids"].shape[1]
        with vlm_attn.patched(model, Recycled(keep=5, stride=3)):
            tokens, got = generate(model, x, new=3)
        whole = {**x, "input_ids": torch.cat([x["input_ids"], tokens[:, :2]], 1)}
        whole["attention_mask"] = torch.ones_like(whole["input_ids"])
        picked: dict[tuple[int, int], Tensor] = {}

        def kept(layer: int, score: Tensor) -> Tensor:
            full = score[0, :, length - 1, :length].softmax(-1).view(2, 2, -1).mean(1)  # [G, S]
            seen = torch.zeros(2, length + 2, dtype=torch.bool).scatter(1, full.topk(5).indices, True)
            seen[:, length:] = True
            hidden = ~seen.repeat_interleave(2, 0)[:, None].expand(-1, 2, -1)
            score = score.clone()
            score[0, :, length:] = score[0, :, length:].masked_fill(hidden, -torch.inf)
            picked[layer, 0] = seen
            return score

        wanted = logits(oracle(model, scores=kept), whole)[:, length - 1 :]
        close(got[:, 0], wanted[0])
        differ(got[1:, 0], logits(model, whole)[0, length:])
        assert len(picked) == 4


class TestFamilies:
    @pytest.mark.parametrize("family", [name for name in tiny.FAMILIES if name != "llava"])
    def test_cached_is_uncached_and_rows_alone(self, family: str, name: str) -> None:
        model, inputs = built(family)
        x = inputs(PROMPTS, seed=SEED)
        plain = generate(model, x, new=4, **TEXT)
        stock_needs_cache(model, x, plain, new=4, **TEXT)
        with vlm_attn.patched(model, METHODS[name]()), margins() as margin:
            tokens, scores = generate(model, x, new=4, **TEXT)
            same(generate(model, x, new=4, use_cache=False, **TEXT), (tokens, scores))
            row = alone(x, 1, IMAGES)
            same(generate(model, row, new=4, **TEXT), (tokens[1:2], scores[:, 1:2]))
        margin.check(1e-6)
        differ(scores[-1], plain[1][-1])

    def test_neutral(self, name: str) -> None:
        model, inputs = built("qwen2_vl")
        x = inputs(PROMPTS, seed=SEED)
        plain = generate(model, x)
        neutral = {**NEUTRAL, "recycled": {"stride": 1}}[name]
        with vlm_attn.patched(model, build(name, **neutral)):
            got = generate(model, x)
            assert torch.equal(got[1], plain[1])
            engine_of(model).force = True
            same(generate(model, x), plain)

    def test_every_layer_slides(self, name: str) -> None:
        model, _ = tiny.gemma3(16, (True, True, True, True))
        with pytest.raises(NotImplementedError, match="sliding window"):
            vlm_attn.patch(model, METHODS[name]())
        assert not vlm_attn.is_patched(model)


LONG = [[3, "image", 7], [1, "image", 30, "image", 6]]


@pytest.mark.parametrize("beside", ["pai", "gift", "var"])
def test_edits_follow_what_is_let_go(beside: str) -> None:
    """While columns go one after the other, an edit keeps meaning the columns it meant: as where they are only hidden."""
    model, inputs = built("llava")
    x = inputs(LONG[1:], seed=SEED)
    shown = {"sparsity": 1.0, "sink": 14, "recent": 40}  # the first image, and for a while the second
    other = {"gift": {"heads": 1.0}, "var": {"rho": 0.0, "visual_floor": 0.0}}.get(beside, {})
    found = []
    for mode in ("drop", "mask"):
        methods = [METHODS["duo"](mode=mode, **shown), build(beside, **{**ACTIVE[beside], **other})]
        with vlm_attn.patched(model, methods), torch.no_grad():
            found.append(generate(model, x, new=45, **TEXT))
    same(*found)
    with vlm_attn.patched(model, METHODS["duo"](**shown)):
        differ(generate(model, x, new=45, **TEXT)[1], found[0][1])


@pytest.mark.parametrize("name", ["duo", "razor"])
class TestDropping:
    def test_dropping_is_masking(self, name: str) -> None:
        model, inputs = built("llava")
        x = inputs(LONG, seed=SEED)
        plain = generate(model, x, new=50, **TEXT)
        found, held = [], []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, METHODS[name](mode=mode)), torch.no_grad():
                found.append(generate(model, x, new=50, **TEXT))
                out = model.generate(**x, max_new_tokens=50, do_sample=False, return_dict_in_generate=True, **TEXT)
                held.append([layer.keys.shape[2] for layer in host.cache_of(out).layers])
                assert host.cache_of(out).get_seq_length() == x["input_ids"].shape[1] + 49
        same(*found)
        differ(found[0][1], plain[1])
        whole = x["input_ids"].shape[1] + 49
        short = {"duo": (1,), "razor": (0, 1, 2, 3)}[name]
        if name == "razor":
            full = METHODS[name]().retrieving(2)  # type: ignore[attr-defined]
            short = tuple(layer for layer in range(4) if not full[layer].any())
        assert short
        assert len(short) < 4
        assert held[1] == [whole] * 4
        for layer, length in enumerate(held[0]):
            assert (length < 50) if layer in short else (length == whole), (layer, length)

    def test_beams(self, name: str) -> None:
        model, inputs = built("llava")
        x = inputs(LONG, seed=SEED)

        def beams(mode: str) -> Any:
            with vlm_attn.patched(model, METHODS[name](mode=mode)), torch.no_grad():
                return model.generate(
                    **x, num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=45,
                    output_scores=True, return_dict_in_generate=True, **TEXT,
                )  # fmt: skip

        one, other = beams("drop"), beams("mask")
        assert one.sequences.tolist() == other.sequences.tolist()
        close(one.sequences_scores, other.sequences_scores)

    def test_guesses_are_taken_back(self, name: str) -> None:
        model, inputs = built("llava")
        x, assistant = inputs([LONG[1]], seed=SEED), copy.deepcopy(model)
        with vlm_attn.patched(model, METHODS[name]()):
            wanted = generate(model, x, new=50, **TEXT)
            same(generate(model, x, new=50, assistant_model=assistant, **TEXT), wanted)

    def test_second_turn(self, name: str) -> None:
        model, inputs = built("llava")
        x = inputs([LONG[1]], seed=SEED)
        more = torch.randint(3, tiny.IMAGE, (1, 5), generator=torch.Generator().manual_seed(3))
        found = []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, METHODS[name](mode=mode)), torch.no_grad():
                cache = DynamicCache(config=model.config.get_text_config())
                first = model.generate(**x, **{host.CACHE: cache}, do_sample=False, max_new_tokens=40, **TEXT)
                assert host.is_short(cache) == (mode == "drop")
                ids = torch.cat([first, more], 1)
                rest = {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: cache}
                if name == "razor" and mode == "drop":
                    with pytest.raises(ValueError, match="has let columns go"):
                        generate(model, rest)
                    return
                found.append(generate(model, rest, new=40, **TEXT))
            if mode == "drop":
                with on(model, "pai"), pytest.raises(ValueError, match="holds fewer columns"):
                    generate(model, rest)
        same(*found)


def run(model: Any, x: Inputs, methods: Any) -> tuple[Tensor, Tensor]:
    with vlm_attn.patched(model, methods):
        return generate(model, x, new=12, **TEXT)


class TestTogether:
    @pytest.mark.parametrize("name", ["duo", "longheads", "routed", "recycled"])
    @pytest.mark.parametrize("beside", ["gift", "fastv", "vhr"])
    def test_with_edits_and_reducers(self, name: str, beside: str) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS, seed=SEED)
        other = FastV(layer=2) if beside == "fastv" else build(beside, **ACTIVE[beside])
        both = [METHODS[name](), other]
        wanted = run(model, x, both)
        with vlm_attn.patched(model, both):
            same(generate(model, x, new=12, use_cache=False, **TEXT), wanted)
        for alone_ in both:
            differ(wanted[1], run(model, x, alone_)[1])

    def test_vhr_scales_the_rows_that_another_method_edits(self) -> None:
        """Gift edits every layer here, with a strength that does nothing: what is left is vhr."""
        model, inputs = built("llava")
        x = inputs(PROMPTS[:1], seed=SEED)
        gift = Gift(**{**ACTIVE["gift"], "enhance_layers": (0, 1, 2, 3), "alpha": 1e-9, "beta": 1.0})
        same(run(model, x, [Vhr(**ACTIVE["vhr"]), gift]), run(model, x, Vhr(**ACTIVE["vhr"])), 1e-4)

    def test_refused(self) -> None:
        model, _ = built("llava")
        for methods, words in (
            ([METHODS["duo"](), METHODS["routed"]()], "duo[+]routed"),
            ([METHODS["razor"](), Gift(**ACTIVE["gift"])], "razor adds keys.*gift"),
            ([FastV(), METHODS["landmark"]()], "landmark adds keys.*fastv"),
        ):
            with pytest.raises(ValueError, match=words):
                vlm_attn.patch(model, methods)
            assert not vlm_attn.is_patched(model)


class TestWrong:
    @pytest.mark.parametrize(
        ("name", "wrong"),
        [
            ("duo", {"gates": [[1.0]]}),
            ("duo", {"gates": [[1.0, 2.0], [1.0]]}),
            ("duo", {"gates": 3}),
            ("duo", {"sparsity": 1.5}),
            ("duo", {"recent": 0}),
            ("duo", {"mode": "both"}),
            ("razor", {"echo": [[1.0, 2.0]] * 4}),
            ("razor", {"compensate": 1}),
            ("razor", {"fraction": -0.1}),
            ("landmark", {"keep": 0.0}),
            ("landmark", {"tile": -1}),
            ("landmark", {"summaries": None}),
            ("longheads", {"keep": 1.5}),
            ("routed", {"side": 0}),
            ("recycled", {"stride": 0}),
            ("recycled", {"keep": 0}),
        ],
    )
    def test_values(self, name: str, wrong: dict[str, Any]) -> None:
        model, _ = built("llava")
        with pytest.raises((ValueError, TypeError), match=next(iter(wrong))):
            vlm_attn.patch(model, METHODS[name](**wrong))
        assert not vlm_attn.is_patched(model)

    def test_recycled_refuses_beams_and_static_caches(self) -> None:
        model, inputs = built("llava")
        x = inputs([PROMPTS[0]], seed=SEED)
        with vlm_attn.patched(model, Recycled(**RECYCLED)):
            with pytest.raises(NotImplementedError, match="num_beams"):
                generate(model, x, num_beams=2)
            with pytest.raises(NotImplementedError, match="cache_implementation"):
                generate(model, x, cache_implementation="static")

    def test_longheads_needs_its_own_first_turn(self) -> None:
        model, inputs = built("llava")
        x = inputs([PROMPTS[0]], seed=SEED)
        with torch.no_grad():
            cache = host.cache_of(model(**x))
        ids = torch.cat([x["input_ids"], x["input_ids"][:, -3:]], 1)
        with on(model, "longheads"), pytest.raises(ValueError, match="filled without longheads"):
            generate(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: cache})

    def test_no_profile_says_how_to_measure_one(self) -> None:
        model, _ = built("llava")
        for name in ("duo", "razor"):
            with pytest.raises(ValueError, match="calibrate"):
                vlm_attn.patch(model, name)


def test_every_method_is_tried_here() -> None:
    assert set(METHODS) == {n for n in vlm_attn.methods() if issubclass(method_class(n), HeadMethod)}


def test_letting_columns_go_keeps_no_tokens_of_an_image() -> None:
    """Heads that stream let columns leave the cache, in a later turn from its beginning on: nothing `kept` could tell of."""
    model, inputs = built("llava")
    x = inputs([PROMPTS[0]], seed=SEED)
    duo = Duo(gates=[[0.5, 0.5]] * 4, sparsity=1.0, sink=2, recent=4)
    with vlm_attn.patched(model, duo), torch.no_grad():
        out = model.generate(**x, max_new_tokens=40, do_sample=False, return_dict_in_generate=True, **TEXT)
        cache = host.cache_of(out)
        held = cache.layers[0].keys.shape[2]
        assert held < out.sequences.shape[1] - 10, "nothing has left the cache"
        ids = torch.cat([out.sequences, torch.full((1, 3), 7)], 1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: cache}
        for turn in (lambda: None, lambda: model.generate(**second, max_new_tokens=2, do_sample=False, **TEXT)):
            turn()
            with pytest.raises(ValueError, match="no such method is active"):
                vlm_attn.kept(model)
