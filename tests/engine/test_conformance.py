# SPDX-License-Identifier: Apache-2.0
"""What every method must do on every family: nothing when neutral, something when active, the same in every way of decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CompileConfig, LlamaConfig, LlamaForCausalLM, LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import vlm_attn
from tests import tiny
from tests.helpers import (
    ACTIVE,
    CHOOSERS,
    MARGIN,
    NEUTRAL,
    Force,
    Inputs,
    alone,
    close,
    differ,
    generate,
    logits,
    margins,
    on,
    refused,
    same,
    stock,
)
from vlm_attn import host
from vlm_attn.attention import choose_keys, edited_attention, scale_heads, vlm_attention
from vlm_attn.engine import CACHE_NOTE
from vlm_attn.patching import engine_of
from vlm_attn.registry import method_class

SEED = 1  # chosen so that no choice is near its edge and no image token is generated
IMAGES = (1, 2, 3)
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6], [2, "image", 3, "image", 2, "image", 9]]


@dataclass
class Family:
    name: str
    model: Any
    inputs: Callable[..., Inputs]

    def one(self, seed: int = SEED) -> Inputs:
        return self.inputs([[3, "image", 9]], seed=seed)

    def batch(self, seed: int = SEED) -> Inputs:
        return self.inputs(PROMPTS, seed=seed)


@cache
def family_of(name: str) -> Family:
    return Family(name, *tiny.FAMILIES[name]())


PAIRS = [(family, method) for family in tiny.FAMILIES for method in ACTIVE if method not in CHOOSERS]
PAIRS += [("llava", method) for method in CHOOSERS]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Every method on every family and every way, but for those that choose keys."""
    few = {"test_second_call_compiles_nothing": ("duo", "landmark"), "test_many_new_tokens": ("duo", "razor")}
    if metafunc.cls in (TestSlidingWindow, TestCompiled, TestLong) and "method" in metafunc.fixturenames:
        chosen = few.get(metafunc.function.__name__, ())
        metafunc.parametrize(
            "method", [method for method in ACTIVE if method not in CHOOSERS or method in chosen], indirect=True
        )
    elif {"family", "method"} <= set(metafunc.fixturenames):
        metafunc.parametrize(("family", "method"), PAIRS, indirect=True, ids=map("-".join, PAIRS))
    elif "family" in metafunc.fixturenames:
        metafunc.parametrize("family", tiny.FAMILIES, indirect=True)
    elif "method" in metafunc.fixturenames:
        metafunc.parametrize("method", ACTIVE, indirect=True)


@pytest.fixture
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    found = family_of(request.param)
    yield found
    assert not vlm_attn.is_patched(found.model)


@pytest.fixture
def method(request: pytest.FixtureRequest) -> str:
    if "family" in request.fixturenames:
        refused(request.getfixturevalue("family").model, request.param)
    return request.param


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every edited attention call, of every one whose heads are scaled, and of those whose keys are chosen."""
    calls: list[int] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[2])
        return edited_attention(query, *args, **kwargs)

    def scaled(out: Tensor, factor: Tensor) -> Tensor:
        calls.append(out.shape[1])
        return scale_heads(out, factor)

    def chosen(method: Any, call: Any, view: Any, *args: Any) -> Any:
        if call.mode == "edited":
            calls.append(view.query.shape[2])
        return choose_keys(method, call, view, *args)

    monkeypatch.setattr("vlm_attn.attention.choose_keys", chosen)
    monkeypatch.setattr("vlm_attn.attention.edited_attention", counted)
    monkeypatch.setattr("vlm_attn.attention.scale_heads", scaled)
    return calls


class TestConformance:
    def test_neutral_is_off(self, family: Family, method: str, edits: list[int]) -> None:
        x = family.batch()
        plain, plain_run = logits(family.model, x), generate(family.model, x)
        with vlm_attn.patched(family.model, method, **NEUTRAL[method]):
            assert torch.equal(logits(family.model, x), plain)
            run = generate(family.model, x)
        assert torch.equal(run[0], plain_run[0])
        assert torch.equal(run[1], plain_run[1])
        assert not edits

    def test_neutral_weights_through_the_edit_path(self, family: Family, method: str, edits: list[int]) -> None:
        x = family.batch()
        plain, plain_run = logits(family.model, x), generate(family.model, x)
        with vlm_attn.patched(family.model, method, **NEUTRAL[method]):
            engine_of(family.model).force = True
            close(logits(family.model, x), plain)
            same(generate(family.model, x), plain_run)
        assert edits

    def test_active_is_on(self, family: Family, method: str) -> None:
        x = family.batch()
        plain, plain_run = logits(family.model, x), generate(family.model, x)
        with on(family.model, method):
            now, run = logits(family.model, x), generate(family.model, x)
        for row in range(len(PROMPTS)):
            differ(now[row, -1], plain[row, -1])
            differ(run[1][0, row], plain_run[1][0, row])
        close(run[1][0], now[:, -1])
        if method_class(method).edited_rows == "last":
            kept = x["attention_mask"].bool().clone()
            kept[:, -1] = False
            close(now[kept], plain[kept])
        else:
            differ(now[:, -3], plain[:, -3])

    def test_cached_is_uncached(self, family: Family, method: str) -> None:
        x = family.batch()
        with on(family.model, method), margins() as margin:
            cached = generate(family.model, x, new=8)
            same(generate(family.model, x, new=8, use_cache=False), cached)
        margin.check()

    def test_batch_is_rows_alone(self, family: Family, method: str) -> None:
        x = family.batch()
        with on(family.model, method), margins() as margin:
            tokens, scores = generate(family.model, x)
            for row in range(len(PROMPTS)):
                same(generate(family.model, alone(x, row, IMAGES)), (tokens[row : row + 1], scores[:, row : row + 1]))
        margin.check()

    def test_beams(self, family: Family, method: str) -> None:
        x = family.inputs(PROMPTS[:2], seed=SEED)
        width = x["input_ids"].shape[1]

        def run() -> Any:
            with torch.no_grad():
                return family.model.generate(
                    **x, num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=5,
                    output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip

        plain = run()
        with vlm_attn.patched(family.model, method, **NEUTRAL[method]):
            assert torch.equal(run().sequences, plain.sequences)
            engine_of(family.model).force = True
            forced = run()
            assert forced.sequences.tolist() == plain.sequences.tolist()
            close(forced.sequences_scores, plain.sequences_scores)
        with on(family.model, method), margins() as margin:
            beams = run()
            assert torch.equal(run().sequences, beams.sequences)
            # Every beam's score is what the same method says of its tokens when they are forced one by one.
            for place in range(2):
                new = beams.sequences[place::2, width:]
                force = LogitsProcessorList([Force(new, width)])
                _, scores = generate(family.model, x, new=5, logits_processor=force)
                log_p = scores.log_softmax(-1).transpose(0, 1).gather(2, new[..., None]).sum((1, 2)) / 5
                close(log_p, beams.sequences_scores[place::2])
        margin.check()
        differ(beams.sequences_scores, plain.sequences_scores)

    def test_return_sequences(self, family: Family, method: str) -> None:
        x = family.inputs(PROMPTS[:2], seed=SEED)

        def run() -> tuple[Tensor, Tensor]:
            torch.manual_seed(6)
            return generate(family.model, x, new=5, do_sample=True, temperature=5.0, top_k=0, num_return_sequences=3)

        plain = run()
        with vlm_attn.patched(family.model, method, **NEUTRAL[method]):
            neutral = run()
            assert torch.equal(neutral[0], plain[0])
            assert torch.equal(neutral[1], plain[1])
        with on(family.model, method), margins() as margin:
            tokens, scores = run()
            assert len({tuple(row) for row in tokens.tolist()}) > 2
            for place in range(3):
                force = LogitsProcessorList([Force(tokens[place::3], x["input_ids"].shape[1])])
                same(
                    generate(family.model, x, new=5, logits_processor=force),
                    (tokens[place::3], scores[:, place::3]),
                )
        margin.check()

    def test_static_cache(self, family: Family, method: str) -> None:
        x = family.batch()
        plain = generate(family.model, x)
        close(stock(lambda: generate(family.model, x, cache_implementation="static"))[1], plain[1])
        with on(family.model, method), margins() as margin:
            same(generate(family.model, x, cache_implementation="static"), generate(family.model, x))
        margin.check()

    def test_static_cache_without_padding(self, family: Family, method: str) -> None:
        x = family.one()
        close(stock(lambda: generate(family.model, x, cache_implementation="static"))[1], generate(family.model, x)[1])
        with on(family.model, method), margins() as margin:
            same(generate(family.model, x, cache_implementation="static"), generate(family.model, x))
        margin.check()

    def test_assistant(self, family: Family, method: str, edits: list[int]) -> None:
        assistant = copy.deepcopy(family.model)  # unpatched: its guesses are partly right, partly wrong
        self.speculate(family, method, edits, assistant_model=assistant)

    def test_language_model_as_assistant(self, family: Family, method: str, edits: list[int]) -> None:
        torch.manual_seed(1)
        assistant = LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).eval()
        assistant.generation_config.eos_token_id = None
        self.speculate(family, method, edits, assistant_model=assistant)

    def test_prompt_lookup(self, family: Family, method: str, edits: list[int]) -> None:
        self.speculate(family, method, edits, prompt_lookup_num_tokens=3)

    def speculate(self, family: Family, method: str, edits: list[int], **options: Any) -> None:
        x = family.one(seed=SEED + 1)
        new = 24 if method in CHOOSERS else 10  # long enough for a guess
        plain = generate(family.model, x, new=new)
        if stock(lambda: generate(family.model, x, new=new, **options))[0].tolist() != plain[0].tolist():
            pytest.skip("stock transformers: speculative and greedy decoding give different tokens for this family")
        with on(family.model, method), margins() as margin:
            greedy = generate(family.model, x, new=new)
            edits.clear()
            same(generate(family.model, x, new=new, **options), greedy)
        margin.check()
        assert max(edits) > 1, "no candidate was ever checked"

    def test_chunked_prefill(self, family: Family, method: str) -> None:
        x = family.one()
        plain = generate(family.model, x)
        sizes = (3, 5, 7, 11, x["input_ids"].shape[1] - 1)
        # A chunk that cuts an image apart takes the view of its own tokens from families where it looks both ways.
        sizes = [
            size for size in sizes if equal(stock(partial(generate, family.model, x, prefill_chunk_size=size)), plain)
        ]
        if not sizes:
            pytest.skip("stock transformers: chunked and whole prefill give different logits for this family")
        if getattr(method_class(method), "whole_prompt", False):
            with on(family.model, method), pytest.raises(NotImplementedError, match="in one piece"):
                generate(family.model, x, prefill_chunk_size=sizes[0])
            return
        with on(family.model, method), margins() as margin:
            whole = generate(family.model, x)
            for size in sizes:
                same(generate(family.model, x, prefill_chunk_size=size), whole)
        margin.check()

    def test_inputs_embeds(self, family: Family, method: str) -> None:
        x = family.inputs(PROMPTS[:2], seed=SEED)
        taken = []
        hook = text_model(family.model).register_forward_pre_hook(
            lambda module, args, kwargs: taken.append(kwargs["inputs_embeds"]), with_kwargs=True
        )
        plain = generate(family.model, x)
        hook.remove()
        beside = {k: v for k, v in x.items() if k in ("attention_mask", "token_type_ids", "mm_token_type_ids")}
        x_embeds = {"inputs_embeds": taken[0], **beside}
        if stock(lambda: generate(family.model, x_embeds))[0].tolist() != plain[0].tolist():
            pytest.skip("stock transformers: inputs_embeds and input_ids give different tokens for this family")
        columns = x["input_ids"] == tiny.IMAGE
        visual, query = [], []
        for row in range(2):
            first = int(x["attention_mask"][row].argmax())
            where = (columns[row].nonzero().flatten() - first).tolist()
            visual.append([(i, i + 1) for i in where])
            query.append((where[-1] + 1, x["input_ids"].shape[1] - first))
        with on(family.model, method), margins() as margin:
            wanted = generate(family.model, x)
            with pytest.raises(ValueError, match="vlm_attn.spans"):
                generate(family.model, x_embeds)
            with vlm_attn.spans(family.model, visual=visual, query=query):
                if method_class(method).cls_layers:
                    with pytest.raises(ValueError, match="pass pixel_values, not inputs_embeds"):
                        generate(family.model, x_embeds)
                else:
                    same(generate(family.model, x_embeds), wanted)
        margin.check()

    def test_bfloat16(self, family: Family, method: str) -> None:
        model = copy.deepcopy(family.model).to(torch.bfloat16)
        x = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in family.batch().items()}
        plain = stock(lambda: generate(model, x))
        with on(model, method):
            tokens, scores = generate(model, x)
        assert scores.isfinite().all()
        differ(scores[0], plain[1][0], 1e-2)

    def test_loop_by_hand(self, family: Family, method: str) -> None:
        x = family.one()

        def loop() -> tuple[Tensor, Tensor]:
            tokens, scores = [], []
            with torch.no_grad():
                out = family.model(**x)
                for _ in range(6):
                    scores.append(out.logits[:, -1])
                    tokens.append(scores[-1].argmax(-1))
                    out = family.model(input_ids=tokens[-1][:, None], **{host.CACHE: host.cache_of(out)})
            return torch.stack(tokens, 1), torch.stack(scores)

        plain = loop()
        with on(family.model, method), margins() as margin:
            mine, wanted = loop(), generate(family.model, x)
            same(mine, wanted)
            assert engine_of(family.model).call is None
        margin.check()
        differ(mine[1][0], plain[1][0])

    def test_streamer(self, family: Family, method: str) -> None:
        class Kept(BaseStreamer):
            def __init__(self) -> None:
                self.tokens: list[int] = []

            def put(self, value: Tensor) -> None:
                self.tokens += value.flatten().tolist()

            def end(self) -> None:
                self.tokens.append(-1)

        x, streamer = family.one(), Kept()
        with on(family.model, method):
            tokens, _ = generate(family.model, x, streamer=streamer)
        assert streamer.tokens == [*x["input_ids"][0].tolist(), *tokens[0].tolist(), -1]

    def test_classifier_free_guidance(self, family: Family, method: str) -> None:
        """The stream without the image, on its own cache, is the plain model's; the one with the image is edited as ever."""
        x = family.one(seed=3)
        width = x["input_ids"].shape[1]

        def run() -> Any:
            with torch.no_grad():
                return family.model.generate(
                    **x, guidance_scale=1.5, do_sample=False, max_new_tokens=5,
                    output_logits=True, output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip

        stock(run)
        with on(family.model, method), margins() as margin:
            guided = run()
            new = guided.sequences[:, width:]
            force = LogitsProcessorList([Force(new, width)])
            same((new, torch.stack(guided.logits)), generate(family.model, x, new=5, logits_processor=force))
        margin.check()
        cache = None
        for step in range(5):
            with torch.no_grad():
                ids = guided.sequences[:, width - 1 + step : width + step]
                out = family.model(input_ids=ids, **{host.CACHE: cache}, use_cache=True)
            cache, without = host.cache_of(out), out.logits[:, -1].log_softmax(-1)
            seen = guided.logits[step].log_softmax(-1)
            close(guided.scores[step], 1.5 * (seen - without) + without)

    def test_hidden_states(self, family: Family, method: str) -> None:
        x = family.one()
        with torch.no_grad():
            plain = family.model(**x, output_hidden_states=True).hidden_states
            with on(family.model, method):
                now = family.model(**x, output_hidden_states=True).hidden_states
        assert [h.shape for h in now] == [h.shape for h in plain]
        close(now[0], plain[0])
        differ(now[-1][:, -1], plain[-1][:, -1])
        if method == "gift":
            for a, b in zip(now, plain, strict=True):
                close(a[:, :-1], b[:, :-1])

    def test_tuple_output(self, family: Family, method: str) -> None:
        x = family.one()
        stock(lambda: logits_of_tuple(family.model, x))
        with on(family.model, method):
            assert torch.equal(logits_of_tuple(family.model, x), logits(family.model, x))

    def test_generated_image_token_is_text(self, family: Family, method: str) -> None:
        """The word 50 gets the embedding of the image token: it must not matter which of the two is generated."""
        model = copy.deepcopy(family.model)
        with torch.no_grad():
            weight = model.get_input_embeddings().weight
            weight[50] = weight[tiny.IMAGE]
        x = family.one()
        width = x["input_ids"].shape[1]
        with on(model, method), margins() as margin:
            runs = []
            for word in (50, tiny.IMAGE):
                tokens = torch.tensor([[20, word, 21, word, 22]])
                runs.append(
                    [
                        generate(model, x, new=5, logits_processor=LogitsProcessorList([Force(tokens, width)]), **o)[1]
                        for o in ({}, {"cache_implementation": "static"})
                    ]
                )
        margin.check()
        close(runs[1][0], runs[0][0])
        close(runs[1][1], runs[0][0])

    def test_eager_base(self, family: Family, method: str) -> None:
        x = family.batch()
        model = copy.deepcopy(family.model)
        model.set_attn_implementation("eager")
        plain = generate(model, x)
        close(plain[1], generate(family.model, x)[1])
        with on(family.model, method), on(model, method), margins() as margin:
            same(generate(model, x), generate(family.model, x))
            same(generate(model, x, use_cache=False), generate(family.model, x))
        margin.check()
        assert torch.equal(generate(model, x)[1], plain[1])


def equal(got: tuple[Tensor, Tensor], wanted: tuple[Tensor, Tensor]) -> bool:
    return got[0].tolist() == wanted[0].tolist() and bool((got[1] - wanted[1]).abs().max() < 1e-3)


def logits_of_tuple(model: Any, x: Inputs) -> Tensor:
    with torch.no_grad():
        return next(
            part for part in model(**x, return_dict=False) if isinstance(part, Tensor) and part.shape[-1] == 128
        )


def text_model(model: Any) -> Any:
    return model.model.language_model


class TestSecondTurn:
    """The first turn's cache goes on; the ids of both turns are passed."""

    def turns(self, family: Family, first: dict[str, Any]) -> tuple[Inputs, Inputs, Any, tuple[int, int]]:
        """Second-turn inputs with and without what the cache already holds, the cache, the second question."""
        with torch.no_grad():
            out = family.model.generate(**first, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
        question = torch.randint(3, tiny.IMAGE, (1, 8), generator=torch.Generator().manual_seed(3))
        ids = torch.cat([out.sequences, question], 1)
        whole = {**first, "input_ids": ids, "attention_mask": torch.ones_like(ids)}
        for name in ("token_type_ids", "mm_token_type_ids"):
            if name in first:
                more = ids.shape[1] - first[name].shape[1]
                whole[name] = torch.nn.functional.pad(first[name], (0, more))
        rest = {k: v for k, v in whole.items() if k not in ("pixel_values", "image_sizes")}
        return whole, rest, host.cache_of(out), (ids.shape[1] - 7, ids.shape[1] - 1)

    def test_gift_after_a_plain_turn(self, family: Family) -> None:
        whole, rest, cache, question = self.turns(family, family.one())
        spare = copy.deepcopy(cache)
        reused = stock(lambda: generate(family.model, {**rest, host.CACHE: spare}))
        if not equal(reused, generate(family.model, whole)):
            pytest.skip("stock transformers: a reused cache gives other logits for this family")
        with on(family.model, "gift", query_span=question), margins() as margin:
            scratch = generate(family.model, whole)
            same(generate(family.model, {**rest, host.CACHE: cache}), scratch)
        margin.check()
        differ(scratch[1][0], reused[1][0])

    def test_a_cache_keeps_little(self, family: Family, method: str) -> None:
        """Neither attention rows nor the calls of earlier turns."""
        _, rest, cache, _ = self.turns(family, family.one())
        stock(lambda: generate(family.model, {**rest, host.CACHE: cache}))
        with on(
            family.model,
            method,
            **({"query_span": lambda ids, mask: [(ids.shape[1] - 5, ids.shape[1] - 1)]} if method == "gift" else {}),
        ):
            _, rest, cache, _ = self.turns(family, family.one())
            first = getattr(cache, CACHE_NOTE)
            generate(family.model, {**rest, host.CACHE: cache})
        second = getattr(cache, CACHE_NOTE)
        assert second is not first
        for call in (first, second):
            assert call.done
            assert call.earlier is None
            assert not call._rows

    def test_var_after_its_own_turn(self, family: Family) -> None:
        """Sinks are looked for in prompts, so the turns agree where no generated token is one: such a prompt is looked for."""
        _, rest, cache, _ = self.turns(family, family.one())
        stock(lambda: generate(family.model, {**rest, host.CACHE: cache}))
        for seed in range(12):
            first = family.one(seed)
            start = first["input_ids"].shape[1]
            flags = []

            class Look(LogitsProcessor):
                def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                    flags.append(torch.stack(list(engine_of(family.model).call._tokens.values())))  # noqa: B023
                    return scores

            with on(family.model, "var", tau=2.3, visual_floor=0.0), margins() as margin:
                whole, rest, cache, _ = self.turns(family, first)
                spare = copy.deepcopy(cache)
                reused = generate(family.model, {**rest, host.CACHE: cache})
                scratch = generate(family.model, whole, logits_processor=LogitsProcessorList([Look()]))
            if flags[0].any() and not flags[0][..., start : start + 5].any() and min(margin.values) > MARGIN:
                break
        else:
            pytest.fail("no prompt fits")
        plain = generate(family.model, {**rest, host.CACHE: copy.deepcopy(spare)})
        differ(reused[1][0], plain[1][0])
        with torch.no_grad():
            rest[host.CACHE] = host.cache_of(family.model(**first, use_cache=True))
        if not equal(generate(family.model, rest), generate(family.model, whole)):
            pytest.skip("stock transformers: a reused cache gives other logits for this family")
        same(reused, scratch)


@pytest.mark.parametrize(
    ("window", "sliding"),
    [(12, (True, False, True, False)), (16, (True, False, True, False)), (14, (False, True, True, False))],
)
class TestSlidingWindow:
    """Gemma3 whose local layers see fewer tokens than the prompt has; parts of the image leave the window."""

    @pytest.fixture
    def family(self, window: int, sliding: tuple[bool, ...]) -> Family:
        return Family("gemma3", *tiny.gemma3(window, sliding))

    def test_cached_is_uncached(self, family: Family, method: str, edits: list[int]) -> None:
        x = family.batch()
        assert x["input_ids"].shape[1] > 16
        plain = generate(family.model, x, new=8)
        same(generate(family.model, x, new=8, use_cache=False), plain)
        with on(family.model, method), margins() as margin:
            cached = generate(family.model, x, new=8)
            same(generate(family.model, x, new=8, use_cache=False), cached)
        margin.check()
        differ(cached[1][0], plain[1][0])

    def test_static(self, family: Family, method: str) -> None:
        x = family.batch()
        static = stock(lambda: generate(family.model, x, new=8, cache_implementation="static"))
        assert equal(static, generate(family.model, x, new=8))
        with on(family.model, method), margins() as margin:
            wanted = generate(family.model, x, new=8)
            same(generate(family.model, x, new=8, cache_implementation="static"), wanted)
        margin.check()

    def test_assistant(self, family: Family, method: str) -> None:
        x = family.one()
        assistant = copy.deepcopy(family.model)
        plain = stock(lambda: generate(family.model, x, new=8, assistant_model=assistant))
        assert equal(plain, generate(family.model, x, new=8))
        with on(family.model, method), margins() as margin:
            wanted = generate(family.model, x, new=8)
            same(generate(family.model, x, new=8, assistant_model=assistant), wanted)
        margin.check()

    def test_batch_is_rows_alone(self, family: Family, method: str) -> None:
        x = family.batch()
        with on(family.model, method), margins() as margin:
            tokens, scores = generate(family.model, x)
            for row in range(len(PROMPTS)):
                same(generate(family.model, alone(x, row, IMAGES)), (tokens[row : row + 1], scores[:, row : row + 1]))
        margin.check()


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_map_of_a_sliding_layer_in_chunks(layer: int) -> None:
    """The rows that are read stand in later chunks, whose keys no longer begin at column 0."""
    family = Family("gemma3", *tiny.gemma3(12))
    x = family.inputs([[2, "image", 12]], seed=SEED)
    plain = generate(family.model, x)
    sizes = [size for size in (4, 9, 11, 13) if equal(generate(family.model, x, prefill_chunk_size=size), plain)]
    assert sizes
    with on(family.model, "gift", saliency_layers=layer, query_span=(9, 18)), margins() as margin:
        whole = generate(family.model, x)
        for size in sizes:
            same(generate(family.model, x, prefill_chunk_size=size), whole)
    margin.check()


class TestCompiled:
    """The decode step as one graph, compiled once, as ``generate`` does it on a GPU with a static cache."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        yield
        torch._dynamo.reset()

    @pytest.mark.parametrize("name", ["llava", pytest.param("qwen2_vl", marks=pytest.mark.slow)])
    def test_decode(self, name: str, method: str) -> None:
        family = Family(name, *tiny.FAMILIES[name]())
        x = family.one()
        compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        compiled._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compiled}
        plain = generate(family.model, x)
        same(stock(lambda: generate(family.model, x, **options)), plain)
        with on(family.model, method), margins() as margin:
            wanted = generate(family.model, x)
        margin.check()
        torch._dynamo.utils.counters.clear()
        with on(family.model, method):
            same(generate(family.model, x, **options), wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
        same(generate(family.model, x, **options), plain)

    def test_second_call_compiles_nothing(self, method: str) -> None:
        """Another prompt of the same length: nothing in the graph belongs to a single call."""
        family = Family("llava", *tiny.llava())
        compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        compiled._compile_all_devices = True
        options = {"cache_implementation": "static", "compile_config": compiled, "new": 4}
        with on(family.model, method):
            for seed in (1, 2, 3):
                wanted = generate(family.model, family.one(seed), new=4)
                same(generate(family.model, family.one(seed), **options), wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


class TestLong:
    def test_many_new_tokens(self, method: str) -> None:
        """More than the engine's buffers start with."""
        family = family_of("llava")
        x = family.batch()
        options: dict[str, Any] = {"new": 90, "suppress_tokens": [tiny.IMAGE]}
        with on(family.model, method), margins() as margin:
            cached = generate(family.model, x, **options)
            static = generate(family.model, x, cache_implementation="static", **options)
            uncached = generate(family.model, x, use_cache=False, **options)
        margin.check(1e-6)
        same(static, cached)
        same(uncached, cached)

    @pytest.mark.parametrize("rows", [1, 4, 7])
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_prompt_rows_are_edited_in_parts(self, name: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
        """How many rows are edited at once is a matter of memory, not of the result."""
        family = family_of(name)
        x = family.batch()
        with on(family.model, "var"):
            wanted = logits(family.model, x)
            monkeypatch.setattr("vlm_attn.attention.ROWS_AT_ONCE", rows)
            kept = x["attention_mask"].bool()
            close(logits(family.model, x)[kept], wanted[kept])


def test_no_mask_means_causal_for_edited_rows() -> None:
    """Several edited rows at once and no mask from the host: every row sees what stands before it, and no more."""
    family = family_of("llava")
    x = family.one()
    length = x["input_ids"].shape[1]
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, length + 2, 8), torch.randn(1, 2, length + 2, 8)
    module = family.model.model.language_model.layers[0].self_attn
    with on(family.model, "gift"), engine_of(family.model).running(x) as call, torch.no_grad():
        family.model(**x)
        call.mode, call.past, call.length = "edited", length - 1, 3
        mask = torch.ones(1, 1, 3, length + 2, dtype=torch.bool).tril(length - 1)
        bare, _ = vlm_attention(module, query, key, value, None)
        masked, _ = vlm_attention(module, query, key, value, mask)
        assert torch.equal(bare, masked)
        everything, _ = vlm_attention(module, query, key, value, torch.ones_like(mask))
        differ(everything[:, 0], masked[:, 0])
        close(everything[:, 2], masked[:, 2])
