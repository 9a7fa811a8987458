# SPDX-License-Identifier: Apache-2.0
"""The second stream: on the model's own inputs it must say what the model says, in every way of decoding, on every family."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, close, differ, generate, same, stock
from vlm_attn.branch import Branch, Run, Stream, plausible, without_image
from vlm_attn.hallucination import Gift, Vcd
from vlm_attn.patching import engine_of

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
SINGLE = [[3, "image", 7], [1, "image", 4]]  # transformers 5.17 mixes up several pictures of a row that it repeats


@dataclass(frozen=True, kw_only=True)
class Second(Branch):
    """Say what the second stream says, on the same inputs."""

    name: ClassVar[str] = "second"
    same_image: ClassVar[bool] = True
    gain: float = 1.0

    def second(self, run: Run) -> dict[str, Tensor]:
        return run.inputs

    def combine(self, main: Tensor, second: Tensor) -> Tensor:
        assert main.dtype == second.dtype == torch.float32
        return self.gain * second


@cache
def built(name: str) -> tuple[Any, Callable[..., Inputs]]:
    return tiny.FAMILIES[name]()


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> tuple[Any, Callable[..., Inputs]]:
    return built(request.param)


def scored(model: Any, x: Inputs, new: int = 6, **options: Any) -> tuple[Tensor, Tensor]:
    """New tokens and the log probabilities they were chosen from ``[new, B, V]``."""
    options = {"do_sample": False, **options}
    with torch.no_grad():
        out = model.generate(**x, max_new_tokens=new, output_scores=True, return_dict_in_generate=True, **options)
    return out.sequences[:, -len(out.scores) :], torch.stack(out.scores).log_softmax(-1)


class TestSecondStream:
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prefill_chunk_size": 5},
            {"do_sample": True, "num_return_sequences": 3, "top_k": 0, "temperature": 1.0},
        ],
        ids=str,
    )
    def test_says_what_the_model_says(self, family: Any, options: dict[str, Any]) -> None:
        model, inputs = family
        x = inputs(
            [[3, "image", 9]] if "prefill_chunk_size" in options else SINGLE if "do_sample" in options else PROMPTS
        )

        def run() -> tuple[Tensor, Tensor]:
            torch.manual_seed(5)
            return scored(model, x, **options)

        plain = stock(run)
        if "do_sample" not in options:
            plain = scored(
                model, x
            )  # this stream has a cache and reads the prompt in one piece, whatever the host does
        with vlm_attn.patched(model, Second()):
            now = run()
            if "num_return_sequences" in options:
                assert len({tuple(row) for row in now[0].tolist()}) > 2
        same(now, plain)

    def test_beams(self, family: Any) -> None:
        model, inputs = family
        x = inputs(SINGLE)

        def run() -> Any:
            with torch.no_grad():
                return model.generate(
                    **x, num_beams=4, num_return_sequences=3, do_sample=False, max_new_tokens=7,
                    output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip

        plain = run()
        assert (plain.beam_indices.diff(dim=1) != 0).any(), "no beam ever went on from another"
        with vlm_attn.patched(model, Second()):
            now = run()
        assert now.sequences.tolist() == plain.sequences.tolist()
        close(now.sequences_scores, plain.sequences_scores)

    def test_prompt_lookup(self, family: Any) -> None:
        """Guesses are read and taken back."""
        model, inputs = family
        x = inputs([[3, "image", 9]], seed=2)
        plain = scored(model, x, new=10)
        options = {"prompt_lookup_num_tokens": 3}
        if stock(lambda: scored(model, x, new=10, **options))[0].tolist() != plain[0].tolist():
            pytest.skip("stock transformers: speculative and greedy decoding give different tokens for this family")
        with vlm_attn.patched(model, Second()):
            same(scored(model, x, new=10, **options), plain)

    def test_the_picture_is_encoded_once(self, family: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model, inputs = family
        x, runs = inputs(PROMPTS), []
        owner = model.base_model
        tower = type(owner).get_image_features

        @wraps(tower)
        def counted(*args: Any, **kwargs: Any) -> Any:
            runs.append(1)
            return tower(*args, **kwargs)

        monkeypatch.setattr(type(owner), "get_image_features", counted)
        generate(model, x, new=2)
        alone = len(runs)
        with vlm_attn.patched(model, Second()):
            generate(model, x, new=2)
        assert len(runs) == 2 * alone
        monkeypatch.setattr(Second, "same_image", False)
        with vlm_attn.patched(model, Second()):
            generate(model, x, new=2)
        assert len(runs) == 4 * alone
        assert "get_image_features" not in vars(owner)

    @pytest.mark.parametrize(
        ("method", "settings", "encodings", "most"),
        [
            ("guidance", {}, 1, 2.05),
            ("icd", {"prefix": (7, 8)}, 1, 2.05),
            ("vcd", {}, 2, 2.05),
            ("agla", {"layers": (1,)}, 2, 2.05),
            ("dola", {}, 1, 1.25),
            ("vhr", {}, 2, 3.0),  # the prompt twice more, before it runs
            ("gift", ACTIVE["gift"], 1, 1.2),  # reads 41 of 90 rows in a model that does little else
        ],
    )
    def test_what_methods_cost(self, method: str, settings: Any, encodings: int, most: float) -> None:
        """Runs of the vision tower, and operations of matrix products beside the plain model's."""
        model, inputs = tiny.llava()
        x = inputs([[40, "image", 40]])
        runs: list[int] = []
        model.model.vision_tower.register_forward_hook(lambda *_: runs.append(1))

        def operations() -> int:
            runs.clear()
            with FlopCounterMode(display=False) as counted:
                generate(model, x, new=16)
            return counted.get_total_flops()

        plain = operations()
        assert len(runs) == 1
        with vlm_attn.patched(model, method, **settings):
            ratio = operations() / plain
        assert len(runs) == encodings
        assert 1 < ratio <= most, ratio

    def test_positions_of_the_streams_do_not_mix(self) -> None:
        """Qwen-VL keeps the offset of its positions on the model: without the image it is another."""

        @dataclass(frozen=True, kw_only=True)
        class Blind(Second):
            same_image: ClassVar[bool] = False

            def second(self, run: Run) -> dict[str, Tensor]:
                return without_image(run)

            def combine(self, main: Tensor, second: Tensor) -> Tensor:
                return main

        model, inputs = built("qwen2_vl")
        x = inputs(PROMPTS)
        plain = scored(model, x)
        deltas = model.model.rope_deltas
        with vlm_attn.patched(model, Blind()):
            same(scored(model, x), plain, 1e-6)
        assert torch.equal(model.model.rope_deltas, deltas)

    def test_the_main_stream_is_edited_the_second_is_not(self, family: Any) -> None:
        model, inputs = family
        x = inputs(PROMPTS)
        plain = scored(model, x)
        gift = Gift(**ACTIVE["gift"])
        with vlm_attn.patched(model, gift):
            edited = generate(model, x)
        with vlm_attn.patched(model, [gift, Second()]):
            tokens, scores = scored(model, x)
            assert tokens.tolist() == plain[0].tolist()
            close(scores, plain[1])
            first = generate(model, x, new=1)  # its raw logits are the edited model's
        close(first[1], edited[1][:1])
        differ(edited[1][0], generate(model, x, new=1)[1][0])

    def test_with_fewer_visual_tokens(self) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        plain = scored(model, x)
        from vlm_attn.visual_token_ops import FastV

        with vlm_attn.patched(model, [FastV(keep=3), Second()]):
            same(scored(model, x), plain)

    def test_bfloat16(self) -> None:
        model, inputs = tiny.llava()
        model = model.to(torch.bfloat16)
        x = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in inputs(PROMPTS).items()}
        plain = scored(model, x, new=1)
        with vlm_attn.patched(model, Second()):
            close(scored(model, x, new=1)[1], plain[1], 1e-2)

    def test_processors_given_come_first_and_streamers_work(self) -> None:
        from transformers import LogitsProcessorList, TextStreamer

        from tests.helpers import Force
        from tests.processors import tokenizer

        model, inputs = built("llava")
        x = inputs([[3, "image", 9]])
        tokens = torch.tensor([[5, 6, 7]])
        force = LogitsProcessorList([Force(tokens, x["input_ids"].shape[1])])

        @dataclass(frozen=True, kw_only=True)
        class Main(Second):
            def combine(self, main: Tensor, second: Tensor) -> Tensor:
                return 2 * main - second

        with vlm_attn.patched(model, Main()):
            out = model.generate(
                **x, max_new_tokens=3, do_sample=False, logits_processor=force, streamer=TextStreamer(tokenizer())
            )
            assert len(force) == 1
        assert out[0, -3:].tolist() == tokens[0].tolist()


class TestFollowing:
    """The cache of the second stream against a new stream that reads the same tokens at once."""

    def test_rows_permuted_repeated_and_cut(self) -> None:
        model, inputs = built("qwen2_vl")
        x = inputs(PROMPTS)
        prompt = x["input_ids"].repeat_interleave(3, 0)
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(3, 100, (6, 8), generator=generator)
        shuffled = tokens[[1, 1, 0, 5, 3, 3]]
        steps = [
            tokens[:, :0], tokens[:, :1], tokens[:, :4], tokens[:, :5], shuffled[:, :6], shuffled[:, :7],
            torch.cat([shuffled[:, :3], tokens[:, :2]], 1), shuffled[:, :1], shuffled[:, :1], shuffled[:, :0], tokens[:, :2],
        ]  # fmt: skip
        with vlm_attn.patched(model, Second()):
            engine = engine_of(model)
            stream = Stream(engine, model, x)
            for step in steps:
                ids = torch.cat([prompt, step], 1)
                new = Stream(engine, model, x)
                new.logits(prompt)
                close(stream.logits(ids), new.logits(ids))

    def test_rows_of_another_sample_are_not_taken(self) -> None:
        """Same decoded tokens, other prompts."""
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, Second()):
            stream = Stream(engine_of(model), model, x)
            same_tokens = torch.tensor([[5, 6, 7]] * 2)
            for n in range(4):
                said = stream.logits(torch.cat([x["input_ids"], same_tokens[:, :n]], 1))
        differ(said[0], said[1])

    def test_another_number_of_rows(self) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, Second()):
            stream = Stream(engine_of(model), model, x)
            stream.logits(x["input_ids"])
            with pytest.raises(RuntimeError, match="decodes 1 rows, its second stream began with 2"):
                stream.logits(x["input_ids"][:1])


class TestParts:
    def test_plausible(self) -> None:
        """Of 0.6, 0.3, 0.06, 0.04 the last is less than a tenth of the first only just not: 0.1 keeps >= 0.06."""
        main = torch.tensor([[0.6, 0.3, 0.061, 0.039]]).log()
        logits = torch.tensor([[1.0, 2.0, 3.0, 4.0]])
        inf = torch.inf
        assert plausible(logits, main, 0.1).tolist() == [[1.0, 2.0, 3.0, -inf]]
        assert plausible(logits, main + 5, 0.6).tolist() == [[1.0, -inf, -inf, -inf]]
        assert plausible(logits, main, 1.0).tolist() == [[1.0, -inf, -inf, -inf]]
        assert plausible(logits, main, 0.0).tolist() == logits.tolist()

    @pytest.mark.parametrize("name", ["llava", "qwen2_vl", "gemma3"])
    def test_without_image(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, Second()), engine_of(model).running(x) as call:
            bare = without_image(Run(engine_of(model), model, call, x))
        assert "pixel_values" not in bare
        for row in range(2):
            wanted = [i for i in x["input_ids"][row].tolist() if i not in (tiny.IMAGE, tiny.START, tiny.END, tiny.PAD)]
            kept = bare["attention_mask"][row].bool()
            assert bare["input_ids"][row][kept].tolist() == wanted
            assert kept.tolist() == sorted(kept.tolist()), "padded on the left"
        assert bare["attention_mask"].sum(1).max() == bare["input_ids"].shape[1]


class TestRefused:
    @pytest.fixture
    def model(self) -> Any:
        return built("llava")[0]

    @pytest.fixture
    def x(self) -> Inputs:
        return built("llava")[1]([[3, "image", 9]])

    def test_two_of_them(self, model: Any) -> None:
        with pytest.raises(ValueError, match=r"vcd\+second: .* choose one"):
            vlm_attn.patch(model, ["vcd", Second()])
        assert not vlm_attn.is_patched(model)

    def test_a_forward_alone(self, model: Any, x: Inputs) -> None:
        with vlm_attn.patched(model, [Gift(**ACTIVE["gift"]), Second()]):
            with pytest.raises(NotImplementedError, match="second acts on what is decoded"):
                model(**x)
            generate(model, x, new=1)
        with vlm_attn.patched(model, Vcd(alpha=0, beta=0)):
            model(**x)

    def test_before_anything_runs(self, model: Any, x: Inputs, monkeypatch: pytest.MonkeyPatch) -> None:
        embeds = model.get_input_embeddings()(x["input_ids"])
        with torch.no_grad():
            cache = model(**x, use_cache=True)
        cache = getattr(cache, "cache", None) or cache.past_key_values
        monkeypatch.setattr(type(model.model), "forward", lambda *a, **k: pytest.fail("something ran"))
        with vlm_attn.patched(model, Second()):
            with pytest.raises(NotImplementedError, match="assistant model: leave out assistant_model="):
                model.generate(**x, assistant_model=copy.copy(model))
            with pytest.raises(NotImplementedError, match="custom strategy"):
                model.generate(**x, custom_generate=lambda *a, **k: None)
            cache.crop(13 - cache.get_seq_length())
            with pytest.raises(ValueError, match="holds 13 columns"):
                model.generate(**x, past_key_values=cache)
            with (
                vlm_attn.spans(model, visual=[(4, 13)], query=[(13, 22)]),
                pytest.raises(ValueError, match="input_ids"),
            ):
                model.generate(inputs_embeds=embeds)
        with vlm_attn.patched(model, "vcd"), pytest.raises(ValueError, match="pass pixel_values"):
            model.generate(input_ids=x["input_ids"])

    def test_gaze_follows_the_main_stream(self, model: Any, x: Inputs) -> None:
        wanted = vlm_attn.gaze(model, x, [5, 6])
        with vlm_attn.patched(model, Second()):
            close(vlm_attn.gaze(model, x, [5, 6])[0], wanted[0])
