"""What both methods must do on every family: nothing when neutral, something when active, and the same in every way of decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, NEUTRAL, Force, Inputs, alone, close, differ, generate, logits, margins, on, same, stock
from vlm_attn.attention import edited_attention
from vlm_attn.patching import engine_of

IMAGES = (1, 2, 3)
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6], [2, "image", 3, "image", 2, "image", 9]]


@dataclass
class Family:
    name: str
    model: Any
    inputs: Callable[..., Inputs]

    def one(self, seed: int = 0) -> Inputs:
        return self.inputs([[3, "image", 9]], seed=seed)

    def batch(self, seed: int = 0) -> Inputs:
        return self.inputs(PROMPTS, seed=seed)


@cache
def family_of(name: str) -> Family:
    return Family(name, *tiny.FAMILIES[name]())


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[Family]:
    found = family_of(request.param)
    yield found
    assert not vlm_attn.is_patched(found.model)


@pytest.fixture(params=ACTIVE)
def method(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def edits(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of every edited attention call."""
    calls: list[int] = []

    def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        calls.append(query.shape[2])
        return edited_attention(query, *args, **kwargs)

    monkeypatch.setattr("vlm_attn.attention.edited_attention", counted)
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
        if method == "gift":
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
        x = family.inputs(PROMPTS[:2])
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
        x = family.inputs(PROMPTS[:2])

        def run() -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
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

    def test_assistant(self, family: Family, method: str) -> None:
        assistant = copy.deepcopy(family.model)  # unpatched: its guesses are partly right, partly wrong
        self.speculate(family, method, assistant_model=assistant)

    def test_language_model_as_assistant(self, family: Family, method: str) -> None:
        torch.manual_seed(1)
        assistant = LlamaForCausalLM(LlamaConfig(**tiny.TEXT)).eval()
        assistant.generation_config.eos_token_id = None
        self.speculate(family, method, assistant_model=assistant)

    def test_prompt_lookup(self, family: Family, method: str) -> None:
        self.speculate(family, method, prompt_lookup_num_tokens=3)

    def speculate(self, family: Family, method: str, **options: Any) -> None:
        x = family.one(seed=1)
        plain = generate(family.model, x, new=10)
        assert stock(lambda: generate(family.model, x, new=10, **options))[0].tolist() == plain[0].tolist()
        with on(family.model, method), margins() as margin:
            greedy = generate(family.model, x, new=10)
            same(generate(family.model, x, new=10, **options), greedy)
        margin.check()

    def test_chunked_prefill(self, family: Family, method: str) -> None:
        x = family.one()
        stock(lambda: generate(family.model, x, prefill_chunk_size=5))
        close(generate(family.model, x, prefill_chunk_size=5)[1], generate(family.model, x)[1])
        with on(family.model, method), margins() as margin:
            whole = generate(family.model, x)
            for size in (1, 5, 7, x["input_ids"].shape[1] - 1):
                same(generate(family.model, x, prefill_chunk_size=size), whole)
        margin.check()

    def test_inputs_embeds(self, family: Family, method: str) -> None:
        x = family.inputs(PROMPTS[:2])
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
            mask = x["attention_mask"]
            with torch.no_grad():
                out = family.model(**x)
                for _ in range(6):
                    scores.append(out.logits[:, -1])
                    tokens.append(scores[-1].argmax(-1))
                    mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                    out = family.model(
                        input_ids=tokens[-1][:, None], attention_mask=mask, past_key_values=out.past_key_values
                    )
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


def logits_of_tuple(model: Any, x: Inputs) -> Tensor:
    with torch.no_grad():
        return next(part for part in model(**x, return_dict=False) if isinstance(part, Tensor) and part.shape[-1] == 128)


def text_model(model: Any) -> Any:
    return model.model.language_model
