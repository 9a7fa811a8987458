# SPDX-License-Identifier: Apache-2.0
"""``patch`` and what undoes it: nothing left behind, nothing shared, nothing half done."""

from __future__ import annotations

import copy
import io
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration, LogitsProcessor, LogitsProcessorList

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, NEUTRAL, Inputs, close, differ, generate, logits, on, refused, same, stock
from vlm_attn import host
from vlm_attn.attention import TAG
from vlm_attn.hallucination import Gift, Var
from vlm_attn.patching import engine_of

PROMPT = [3, "image", 9]
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs")


@pytest.fixture(params=ACTIVE)
def method(request: pytest.FixtureRequest) -> str:
    if "built" in request.fixturenames:
        refused(request.getfixturevalue("built")[0], request.param)
    return request.param


@pytest.fixture(params=["llava", "qwen2_vl", "gemma3"])
def built(request: pytest.FixtureRequest) -> tiny.Built:
    return tiny.FAMILIES[request.param]()


@pytest.fixture
def llava() -> tiny.Built:
    return tiny.llava()


def state(model: Any) -> dict[str, Any]:
    """Everything about a model that a patch could leave behind."""
    return {
        "hooks": [[list(vars(m)[h].values()) for h in HOOKS] for m in model.modules()],
        "attributes": [sorted(vars(m)) for m in model.modules()],
        "configs": [id(vars(m).get("config")) for m in model.modules()],
        "implementation": [getattr(vars(m).get("config"), "_attn_implementation", None) for m in model.modules()],
        "config": model.config.to_dict(),
    }


class TestUndo:
    def test_everything_is_put_back(self, built: tiny.Built, method: str) -> None:
        model, inputs = built
        x = inputs([PROMPT, [1, "image", 6]])
        plain, plain_run = logits(model, x), generate(model, x)
        before = state(model)  # after a first run: the host leaves hooks of its own
        config, text_config = model.config, model.config.get_text_config()
        assert vlm_attn.patch(model, method, **ACTIVE[method]) is model
        assert vlm_attn.is_patched(model)
        assert state(model) != before
        differ(logits(model, x)[:, -1], plain[:, -1])
        differ(generate(model, x)[1], plain_run[1])
        assert vlm_attn.unpatch(model) is model
        assert not vlm_attn.is_patched(model)
        assert state(model) == before
        assert model.config is config
        assert model.config.get_text_config() is text_config
        assert torch.equal(logits(model, x), plain)
        assert torch.equal(generate(model, x)[1], plain_run[1])
        assert not any(isinstance(getattr(m, TAG, None), object) and hasattr(m, TAG) for m in model.modules())

    def test_many_times(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain, first = logits(model, x), None
        before = state(model)
        for _ in range(3):
            with on(model, "gift"):
                now = logits(model, x)
            first = now if first is None else first
            assert torch.equal(now, first)
        assert torch.equal(logits(model, x), plain)
        assert state(model) == before

    def test_nothing_is_in_the_config_while_patched(self, built: tiny.Built, method: str) -> None:
        model, _ = built
        original = model.config
        before, text = original.to_dict(), json.loads(original.to_json_string(use_diff=False))
        with on(model, method):
            assert original.to_dict() == before
            assert original.get_text_config()._attn_implementation == "sdpa"
            assert model.config.to_dict() == before
            assert "vlm_attn" not in json.dumps(json.loads(model.config.to_json_string(use_diff=False)))
        assert json.loads(original.to_json_string(use_diff=False)) == text

    def test_saved_bytes(self, built: tiny.Built, method: str, tmp_path: Path) -> None:
        model, inputs = built
        model.save_pretrained(tmp_path / "before")
        with on(model, method):
            generate(model, inputs([PROMPT]))
            model.save_pretrained(tmp_path / "while")
        model.save_pretrained(tmp_path / "after")
        names = sorted(path.name for path in (tmp_path / "before").iterdir())
        assert "model.safetensors" in names
        assert "config.json" in names
        for other in ("while", "after"):
            assert sorted(path.name for path in (tmp_path / other).iterdir()) == names
            for name in names:
                assert (tmp_path / other / name).read_bytes() == (tmp_path / "before" / name).read_bytes(), name

    def test_model_saved_while_patched_loads_plain(self, llava: tiny.Built, tmp_path: Path) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain = logits(model, x)
        with on(model, "gift"):
            model.save_pretrained(tmp_path)
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
        assert not vlm_attn.is_patched(again)
        assert torch.equal(logits(again, x), plain)

    def test_a_generate_bound_by_others(self, llava: tiny.Built) -> None:
        """Somebody else's wrapper is called, and is there again afterwards."""
        model, inputs = llava
        x, calls = inputs([PROMPT]), []

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return type(model).generate(model, *args, **kwargs)

        with on(model, "gift"):
            wanted = generate(model, x)
        model.generate = wrapper
        with on(model, "gift"):
            same(generate(model, x), wanted, 0.0)
            assert calls == [1]
        assert model.generate is wrapper
        del model.generate


class TestPatched:
    def test_undone_on_leaving(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x, plain = inputs([PROMPT]), logits(llava[0], llava[1]([PROMPT]))
        with vlm_attn.patched(model, "var", **ACTIVE["var"]) as inside:
            assert inside is model
            differ(logits(model, x), plain)
        assert torch.equal(logits(model, x), plain)

    def test_undone_on_an_exception(self, llava: tiny.Built) -> None:
        model, before = llava[0], state(llava[0])
        with pytest.raises(KeyError, match="mine"), on(model, "gift"):
            raise KeyError("mine")
        assert state(model) == before

    def test_nested_is_refused_and_the_outer_stays(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"):
            outer = logits(model, x)
            with pytest.raises(ValueError, match="already patched with 'gift'"), on(model, "var"):
                pass
            assert torch.equal(logits(model, x), outer)
            assert [m.name for m in engine_of(model).methods] == ["gift"]
        assert not vlm_attn.is_patched(model)

    def test_unpatched_inside(self, llava: tiny.Built) -> None:
        model, _ = llava
        with on(model, "gift"):
            vlm_attn.unpatch(model)
        assert not vlm_attn.is_patched(model)

    def test_replace(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "var"):
            wanted = generate(model, x)
        before = state(model)
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        gift = generate(model, x)
        vlm_attn.patch(model, "var", replace=True, **ACTIVE["var"])
        same(generate(model, x), wanted, 0.0)
        vlm_attn.patch(model, "gift", replace=True, **ACTIVE["gift"])
        same(generate(model, x), gift, 0.0)
        vlm_attn.unpatch(model)
        assert state(model) == before

    def test_replace_on_a_plain_model(self, llava: tiny.Built) -> None:
        model, _ = llava
        vlm_attn.patch(model, "gift", replace=True, **ACTIVE["gift"])
        assert (
            vlm_attn.is_patched(vlm_attn.unpatch(vlm_attn.patch(model, "var", replace=True, **ACTIVE["var"]))) is False
        )

    def test_list_of_methods(self, llava: tiny.Built) -> None:
        """Both edit: neither result is the other's, and a neutral partner changes nothing."""
        model, inputs = llava
        x = inputs([PROMPT])
        runs = {}
        for names in (("gift",), ("var",), ("gift", "var")):
            methods = [Gift(**ACTIVE["gift"]) if n == "gift" else Var(**ACTIVE["var"]) for n in names]
            with vlm_attn.patched(model, methods):
                runs["+".join(names)] = generate(model, x)
                same(generate(model, x, use_cache=False), runs["+".join(names)])
        differ(runs["gift+var"][1][0], runs["gift"][1][0])
        differ(runs["gift+var"][1][0], runs["var"][1][0])
        with vlm_attn.patched(model, [Gift(**ACTIVE["gift"]), Var(**NEUTRAL["var"])]):
            same(generate(model, x), runs["gift"], 0.0)


class TestIndependence:
    def copies(self) -> dict[str, Callable[[Any], Any]]:
        def saved(model: Any) -> Any:
            buffer = io.BytesIO()
            torch.save(model, buffer)
            buffer.seek(0)
            return torch.load(buffer, weights_only=False)

        return {"deepcopy": copy.deepcopy, "torch.save": saved}

    @pytest.mark.parametrize("how", ["deepcopy", "torch.save"])
    def test_copies(self, built: tiny.Built, method: str, how: str) -> None:
        model, inputs = built
        x = inputs([PROMPT])
        plain, before = generate(model, x), state(model)
        stock(lambda: self.copies()[how](model))
        with on(model, method):
            wanted = generate(model, x)
            other = self.copies()[how](model)
            assert vlm_attn.is_patched(other)
            engine, mine = engine_of(other), engine_of(model)
            assert engine is not mine
            assert engine.text_model is other.model.language_model
            assert engine.text_config is other.config.get_text_config()
            same(generate(other, x), wanted, 0.0)
            assert mine.call is None
            assert other.generate is not model.generate
            # The copy's undoing is the copy's alone, and complete.
            vlm_attn.unpatch(other)
            same(generate(other, x), plain, 0.0)
            assert state(other)["hooks"] == before["hooks"]
            assert state(other)["attributes"] == before["attributes"]
            assert state(other)["implementation"] == before["implementation"]
            assert vlm_attn.is_patched(model)
            same(generate(model, x), wanted, 0.0)
            vlm_attn.patch(other, method, **ACTIVE[method])
        # The original is plain again, the copy stays patched.
        same(generate(model, x), plain, 0.0)
        same(generate(other, x), wanted, 0.0)

    def test_a_copy_outlives_the_original(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        wanted, other = generate(model, x), copy.deepcopy(model)
        vlm_attn.unpatch(model)
        del model
        same(generate(other, x), wanted, 0.0)

    def test_two_models_of_one_config(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        torch.manual_seed(3)
        other = LlavaForConditionalGeneration(model.config).eval()
        other.generation_config = copy.deepcopy(model.generation_config)
        assert other.config.get_text_config() is model.config.get_text_config()
        plain, plain_other = generate(model, x), generate(other, x)
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        same(generate(other, x), plain_other, 0.0)
        gift = generate(model, x)
        vlm_attn.patch(other, "var", **ACTIVE["var"])
        var = generate(other, x)
        same(generate(model, x), gift, 0.0)
        vlm_attn.unpatch(model)
        same(generate(other, x), var, 0.0)
        same(generate(model, x), plain, 0.0)
        vlm_attn.unpatch(other)
        same(generate(other, x), plain_other, 0.0)
        assert other.config is model.config

    def test_two_patched_models_step_by_step(self, llava: tiny.Built) -> None:
        """Two decode loops whose steps alternate, with different methods."""
        models = [llava[0], copy.deepcopy(llava[0])]
        x = llava[1]([PROMPT])
        wanted = []
        for model, method in zip(models, ("gift", "var"), strict=True):
            vlm_attn.patch(model, method, **ACTIVE[method])
            wanted.append(generate(model, x))
        outs, scores = [m(**x) for m in models], ([], [])
        for _ in range(6):
            for i, model in enumerate(models):
                scores[i].append(outs[i].logits[:, -1].detach())
                with torch.no_grad():
                    outs[i] = model(input_ids=scores[i][-1].argmax(-1)[:, None], **{host.CACHE: host.cache_of(outs[i])})
        for i in range(2):
            close(torch.stack(scores[i]), wanted[i][1])

    def test_two_loops_on_one_model(self, llava: tiny.Built) -> None:
        """A cache remembers its own call: loops over different prompts may take turns on one model."""
        model, inputs = llava
        prompts = [inputs([PROMPT]), inputs([[1, "image", 4, "image", 5]], seed=4)]
        with on(model, "gift"), torch.no_grad():
            wanted = [generate(model, x) for x in prompts]
            outs, scores = [model(**x) for x in prompts], ([], [])
            for _ in range(6):
                for i in range(2):
                    scores[i].append(outs[i].logits[:, -1])
                    ids = scores[i][-1].argmax(-1)[:, None]
                    outs[i] = model(input_ids=ids, **{host.CACHE: host.cache_of(outs[i])})
            for i in range(2):
                close(torch.stack(scores[i]), wanted[i][1])

    def test_a_copied_cache_goes_on_alone(self, llava: tiny.Built) -> None:
        model, inputs = llava
        with on(model, "gift"), torch.no_grad():
            out = model(**inputs([PROMPT]))
            spare = copy.deepcopy(host.cache_of(out))
            step = {"input_ids": torch.tensor([[40]])}
            first = model(**step, **{host.CACHE: host.cache_of(out)}).logits
            assert torch.equal(model(**step, **{host.CACHE: spare}).logits, first)

    def test_a_cache_of_other_methods_is_not_gone_on_with(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x, step = inputs([PROMPT]), {"input_ids": torch.tensor([[40]])}
        with on(model, "var"), torch.no_grad():
            cache = host.cache_of(model(**x))
        with on(model, "gift"), torch.no_grad(), pytest.raises(ValueError, match="filled by other methods"):
            model(**step, **{host.CACHE: cache})


class Raise(LogitsProcessor):
    def __init__(self, error: BaseException, step: int, prompt: int) -> None:
        self.error, self.at = error, prompt + step

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if input_ids.shape[1] == self.at:
            raise self.error
        return scores


class TestInterruption:
    @pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
    @pytest.mark.parametrize("step", [0, 3])
    def test_generate(self, built: tiny.Built, method: str, error: BaseException, step: int) -> None:
        model, inputs = built
        x, y = inputs([PROMPT]), inputs([[1, "image", 5], [2, "image", 8]], seed=2)
        with on(model, method):
            wanted = generate(model, y)
            raising = LogitsProcessorList([Raise(error, step, x["input_ids"].shape[1])])
            with pytest.raises(type(error)):
                generate(model, x, logits_processor=raising)
            engine = engine_of(model)
            assert engine.call is None
            same(generate(model, y), wanted, 0.0)
            self.free(model)

    @pytest.mark.parametrize("error", [RuntimeError("mine"), KeyboardInterrupt()])
    @pytest.mark.parametrize("layer", [0, 2])
    def test_bare_forward(self, built: tiny.Built, method: str, error: BaseException, layer: int) -> None:
        model, inputs = built
        x, y = inputs([PROMPT]), inputs([[1, "image", 5], [2, "image", 8]], seed=2)

        def fail(*_: Any) -> None:
            raise error

        with on(model, method):
            wanted, run = logits(model, y), generate(model, y)
            hook = model.model.language_model.layers[layer].mlp.register_forward_hook(fail)
            with pytest.raises(type(error)):
                logits(model, x)
            hook.remove()
            assert torch.equal(logits(model, y), wanted)
            same(generate(model, y), run, 0.0)
            assert engine_of(model).call is None
            self.free(model)

    def test_refused_forward(self, llava: tiny.Built) -> None:
        model, inputs = llava
        with on(model, "gift"):
            with pytest.raises(ValueError, match="ends in an image token"):
                logits(model, inputs([[9, "image"]]))
            assert engine_of(model).call is None
            self.free(model)
            logits(model, inputs([PROMPT]))

    def test_nested_generate(self, llava: tiny.Built) -> None:
        """A logits processor may generate with the same model; the outer call goes on where it was."""
        model, inputs = llava
        x, y = inputs([PROMPT]), inputs([[1, "image", 5]], seed=2)
        inner = []

        class Ask(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                if len(inner) < 2:
                    inner.append(generate(model, y))
                return scores

        with on(model, "gift"):
            wanted, wanted_inner = generate(model, x), generate(model, y)
            same(generate(model, x, logits_processor=LogitsProcessorList([Ask()])), wanted, 0.0)
        assert len(inner) == 2
        for run in inner:
            same(run, wanted_inner, 0.0)

    def free(self, model: Any) -> None:
        """No turn is held: another thread can call the model."""
        turns, got = engine_of(model)._turns, []

        def take() -> None:
            turns.take()
            turns.give()
            got.append(True)

        thread = threading.Thread(target=take, daemon=True)
        thread.start()
        thread.join(timeout=5)
        assert got == [True]


def in_threads(*jobs: Callable[[], Any]) -> list[Any]:
    """Run jobs at once; what they return or raise."""
    results: list[Any] = [None] * len(jobs)
    start = threading.Barrier(len(jobs))

    def work(i: int) -> None:
        torch.set_num_threads(1)
        start.wait()
        try:
            results[i] = jobs[i]()
        except Exception as error:
            results[i] = error

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
        assert not thread.is_alive(), "a thread hangs"
    return results


class TestThreads:
    def prompts(self, inputs: Callable[..., Inputs]) -> list[Inputs]:
        return [inputs([[3, "image", 9]]), inputs([[1, "image", 4, "image", 6], [2, "image", 3]], seed=5)]

    def test_generate_and_generate(self, llava: tiny.Built, method: str) -> None:
        model, inputs = llava
        x, y = self.prompts(inputs)
        with on(model, method):
            wanted = [generate(model, x, new=8), generate(model, y, new=8)]
            for _ in range(3):
                got = in_threads(lambda: generate(model, x, new=8), lambda: generate(model, y, new=8))
                for a, b in zip(got, wanted, strict=True):
                    assert not isinstance(a, Exception), a
                    same(a, b, 0.0)

    def test_generate_and_forward(self, llava: tiny.Built, method: str) -> None:
        """A bare forward in one thread while another generates: it waits for its turn and is its own call."""
        model, inputs = llava
        x, y = self.prompts(inputs)
        with on(model, method):
            wanted = [generate(model, x, new=8), logits(model, y)]

            def forwards() -> list[Tensor]:
                return [logits(model, y) for _ in range(10)]

            for _ in range(3):
                run, many = in_threads(lambda: generate(model, x, new=8), forwards)
                assert not isinstance(run, Exception), run
                assert not isinstance(many, Exception), many
                same(run, wanted[0], 0.0)
                assert all(torch.equal(one, wanted[1]) for one in many)

    def test_forward_and_refused_forward(self, llava: tiny.Built, method: str) -> None:
        """A wrong call in one thread does not end the other's."""
        model, inputs = llava
        x, _ = self.prompts(inputs)
        bad = {**x, "output_attentions": True}

        def wrong() -> int:
            for _ in range(300):
                with pytest.raises(ValueError, match="output_attentions=True cannot be used"):
                    logits(model, bad)
            return 300

        with on(model, method):
            wanted = logits(model, x)
            good, refused = in_threads(lambda: [logits(model, x) for _ in range(30)], wrong)
        assert refused == 300, refused
        assert not isinstance(good, Exception), good
        assert all(torch.equal(one, wanted) for one in good)

    def test_two_models(self, llava: tiny.Built) -> None:
        models = [llava[0], copy.deepcopy(llava[0])]
        x = llava[1]([PROMPT])
        for model, name in zip(models, ("gift", "var"), strict=True):
            vlm_attn.patch(model, name, **ACTIVE[name])
        wanted = [generate(model, x) for model in models]
        got = in_threads(*[lambda m=m: generate(m, x) for m in models])
        for a, b in zip(got, wanted, strict=True):
            same(a, b, 0.0)


class TestSpans:
    """PROMPT on tiny LLaVA is BOS, 3 words, 9 image tokens, 9 words: 22 columns; without a processor the question is 13..22."""

    def question(self, model: Any, x: Inputs) -> list[list[int]]:
        with engine_of(model).running(x) as call:
            return (call.prompt.group == int(vlm_attn.Group.QUERY)).int().tolist()

    def columns(self, *spans: tuple[int, int], length: int = 22) -> list[list[int]]:
        return [[int(a <= i < b) for i in range(length)] for a, b in spans]

    def test_default(self, llava: tiny.Built) -> None:
        model, inputs = llava
        with on(model, "gift"):
            assert self.question(model, inputs([PROMPT])) == self.columns((13, 22))

    def test_tuple(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT, [3, "image", 6]])
        with on(model, "gift"):
            everything = generate(model, x)
        with on(model, "gift", query_span=(14, 18)):
            assert self.question(model, x) == self.columns(
                (14, 18), (17, 21)
            )  # the second row has 3 columns of padding
            differ(generate(model, x)[1][0], everything[1][0])

    def test_callable(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x, seen = inputs([PROMPT, [3, "image", 6]]), []

        def find(ids: Tensor, mask: Tensor) -> list[tuple[int, int]]:
            seen.append((ids, mask))
            return [(14, 18), (13, 15)]

        with on(model, "gift", query_span=find):
            assert self.question(model, x) == self.columns((14, 18), (16, 18))
            assert torch.equal(seen[0][0], x["input_ids"])
            assert torch.equal(seen[0][1], x["attention_mask"])

    def test_spans_override_and_end(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift", query_span=(14, 18)):
            before = generate(model, x)
            with vlm_attn.spans(model, query=[(15, 21)]):
                assert self.question(model, x) == self.columns((15, 21))
                differ(generate(model, x)[1][0], before[1][0])
                with vlm_attn.spans(model, query=(16, 17)):
                    assert self.question(model, x) == self.columns((16, 17))
                assert self.question(model, x) == self.columns((15, 21))
            same(generate(model, x), before, 0.0)
            with pytest.raises(KeyError), vlm_attn.spans(model, query=[(15, 21)]):
                raise KeyError
            same(generate(model, x), before, 0.0)

    def test_visual(self, llava: tiny.Built) -> None:
        """Only half of the image counts."""
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"):
            whole = generate(model, x)
            with vlm_attn.spans(model, visual=[(4, 13)]):
                same(generate(model, x), whole, 0.0)
            with vlm_attn.spans(model, visual=[[(4, 7), (9, 11)]]), engine_of(model).running(x) as call:
                assert call.prompt.visual[0].nonzero().flatten().tolist() == [4, 5, 6, 9, 10]
            with vlm_attn.spans(model, visual=[(4, 8)], query=[(13, 22)]):
                differ(generate(model, x)[1][0], whole[1][0])


class TestAccelerate:
    """Modules whose forward is wrapped to move weights: a ``device_map`` that keeps part of the model on disk."""

    def test_offloaded(self, built: tiny.Built, method: str, tmp_path: Path) -> None:
        accelerate = pytest.importorskip("accelerate")
        model, inputs = built
        x = inputs([PROMPT, [1, "image", 6]])
        with on(model, method):
            wanted = generate(model, x)
        plain = generate(model, x)
        stored = accelerate.disk_offload(copy.deepcopy(model), tmp_path, execution_device=torch.device("cpu"))
        close(stock(lambda: generate(stored, x))[1], plain[1])
        with on(stored, method):
            same(generate(stored, x), wanted)
        close(generate(stored, x)[1], plain[1])

    def test_wrappers_are_refused(self, llava: tiny.Built) -> None:
        with pytest.raises(TypeError, match="DataParallel"):
            vlm_attn.patch(torch.nn.DataParallel(llava[0]), "gift", **ACTIVE["gift"])


def test_one_logger_tells_what_is_patched(llava: tiny.Built, caplog: pytest.LogCaptureFixture) -> None:
    """At level INFO; nothing is printed by default."""
    model = llava[0]
    with caplog.at_level("INFO", logger="vlm_attn"), vlm_attn.patched(model, "pai", alpha=0.3):
        pass
    told = [(record.name, record.levelname, record.getMessage()) for record in caplog.records]
    assert {name for name, _, _ in told} == {"vlm_attn"}
    assert "alpha=0.3" in told[0][2]
    assert told[-1][2] == f"unpatched {type(model).__name__}"
    caplog.clear()
    with vlm_attn.patched(model, "pai"):
        pass
    assert not caplog.records
