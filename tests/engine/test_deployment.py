# SPDX-License-Identifier: Apache-2.0
"""Forms that a model is deployed in: each works or is refused by name (docs/deployment.md lists them)."""

from __future__ import annotations

import copy
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig, LlavaForConditionalGeneration

import vlm_attn
from tests import tiny
from tests.engine import spread
from tests.engine.test_patching import in_threads, state
from tests.helpers import ACTIVE, Inputs, close, differ, generate, logits, margins, on, same
from vlm_attn.kernels import Edit, one_hot_segments
from vlm_attn.registry import build
from vlm_attn.sharding import Heads, check_sharding

TWO = ("gift", "var")  # reads attention and edits the last row; reads hidden states and edits the prompt too


@pytest.fixture(scope="module")
def llava() -> tiny.Built:
    return tiny.llava()


@pytest.fixture
def x(llava: tiny.Built) -> Inputs:
    return llava[1]([[3, "image", 9], [1, "image", 6]], seed=1)


@pytest.fixture(scope="module")
def saved(llava: tiny.Built, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    llava[0].save_pretrained(folder)
    return folder


def works(model: Any, x: Inputs, method: str, cached: bool = True) -> None:
    """A method changes a model, cached as uncached, and leaves it as it was."""
    plain, before = generate(model, x), state(model)
    with on(model, method), margins() as margin:
        now, run = logits(model, x), generate(model, x)
        if cached:
            same(generate(model, x, use_cache=False), run)
    margin.check()
    close(run[1][0], now[:, -1])
    differ(run[1][0], plain[1][0])
    same(generate(model, x), plain, 0.0)
    assert state(model) == before


class TestQuantised:
    @pytest.mark.parametrize("method", TWO)
    def test_bitsandbytes_four_bits(self, llava: tiny.Built, x: Inputs, method: str, tmp_path: Path) -> None:
        pytest.importorskip("bitsandbytes")
        config = copy.deepcopy(llava[0].config)  # its blocks are 64 wide
        config.text_config.update({"hidden_size": 64, "intermediate_size": 64, "head_dim": 16})
        config.vision_config.update({"hidden_size": 64, "intermediate_size": 64})
        torch.manual_seed(0)
        LlavaForConditionalGeneration(config).save_pretrained(tmp_path)
        quantised = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
        model = tiny.finish(LlavaForConditionalGeneration.from_pretrained(tmp_path, quantization_config=quantised))
        assert {"Linear4bit"} <= {type(module).__name__ for module in model.modules()}
        works(model, x, method)

    def test_bitsandbytes_eight_bits(self, saved: Path, x: Inputs) -> None:
        """Which columns it keeps in full depends on the rows of a call, so cached and uncached differ by themselves."""
        pytest.importorskip("bitsandbytes")
        quantised = BitsAndBytesConfig(load_in_8bit=True)
        model = tiny.finish(LlavaForConditionalGeneration.from_pretrained(saved, quantization_config=quantised))
        assert {"Linear8bitLt"} <= {type(module).__name__ for module in model.modules()}
        works(model, x, "var", cached=False)

    @pytest.mark.parametrize("method", TWO)
    def test_torchao(self, llava: tiny.Built, x: Inputs, method: str) -> None:
        quantization = pytest.importorskip("torchao.quantization")
        model = copy.deepcopy(llava[0])
        before = generate(model, x)
        quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
        differ(generate(model, x)[1][0], before[1][0])
        works(model, x, method)


@pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing`:FutureWarning", "ignore:`past_key_values`:FutureWarning"
)
class TestPeft:
    @pytest.fixture
    def lora(self, llava: tiny.Built) -> Any:
        return self.wrap(copy.deepcopy(llava[0]))

    def wrap(self, model: Any) -> Any:
        peft = pytest.importorskip("peft")
        torch.manual_seed(0)
        settings = peft.LoraConfig(
            target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False, task_type="CAUSAL_LM"
        )
        return peft.get_peft_model(model, settings)

    @pytest.mark.parametrize("method", TWO)
    def test_wrapped_and_then_patched(self, lora: Any, x: Inputs, method: str) -> None:
        works(lora, x, method)

    def test_what_it_says_is_what_the_merged_model_says(self, lora: Any, x: Inputs) -> None:
        merged = copy.deepcopy(lora).merge_and_unload()
        for method in TWO:
            with on(merged, method):
                wanted = generate(merged, x), logits(merged, x)
            with on(lora, method):
                same(generate(lora, x), wanted[0])
                close(logits(lora, x), wanted[1])

    @pytest.mark.parametrize(
        ("method", "settings"), [("vcd", {}), ("dola", {}), ("opera", {"beams": 2}), ("fastv", {"keep": 4})]
    )
    def test_other_kinds(self, lora: Any, x: Inputs, method: str, settings: dict[str, Any]) -> None:
        merged = copy.deepcopy(lora).merge_and_unload()
        runs = []
        for model in (lora, merged):
            with vlm_attn.patched(model, method, **settings):
                runs.append(model.generate(**x, max_new_tokens=5, do_sample=False).tolist())
        assert runs[0] == runs[1]

    def test_patched_and_then_wrapped(self, llava: tiny.Built, x: Inputs) -> None:
        model = vlm_attn.patch(copy.deepcopy(llava[0]), "var", **ACTIVE["var"])
        lora = self.wrap(model)
        assert vlm_attn.is_patched(lora)
        run = generate(lora, x)
        close(run[1][0], logits(lora, x)[:, -1])
        with pytest.raises(ValueError, match="already patched"):
            vlm_attn.patch(lora, "gift", **ACTIVE["gift"])
        vlm_attn.patch(lora, "var", replace=True, **ACTIVE["var"])
        same(generate(lora, x), run)
        vlm_attn.unpatch(lora)
        assert not vlm_attn.is_patched(model)

    @pytest.mark.parametrize("kind", ["PrefixTuningConfig", "PromptTuningConfig"])
    def test_virtual_tokens_are_refused(self, llava: tiny.Built, x: Inputs, kind: str) -> None:
        peft = pytest.importorskip("peft")
        size = {"num_layers": 4, "num_attention_heads": 2, "token_dim": 16 if kind[1] == "r" and kind[2] == "e" else 32}
        settings = getattr(peft, kind)(task_type="CAUSAL_LM", num_virtual_tokens=3, **size)
        model = peft.get_peft_model(copy.deepcopy(llava[0]), settings)
        before = state(model)
        with pytest.raises(NotImplementedError, match=f"{kind} puts virtual tokens"):
            vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        assert state(model) == before
        late = peft.get_peft_model(vlm_attn.patch(copy.deepcopy(llava[0]), "gift", **ACTIVE["gift"]), settings)
        with pytest.raises(NotImplementedError, match="virtual tokens"):
            generate(late, x)


class TestDevices:
    """``device_map``: parts of the model that lie on disk or in another memory until they run."""

    @pytest.mark.parametrize("method", TWO)
    def test_spilled_to_disk(self, llava: tiny.Built, saved: Path, x: Inputs, method: str, tmp_path: Path) -> None:
        pytest.importorskip("accelerate")
        room = {"cpu": 60_000}  # bytes: what does not fit goes to disk
        spilled = LlavaForConditionalGeneration.from_pretrained(
            saved, device_map="auto", max_memory=room, offload_folder=tmp_path
        )
        assert set(spilled.hf_device_map.values()) == {"cpu", "disk"}
        with on(llava[0], method):
            wanted = generate(llava[0], x)
        works(tiny.finish(spilled), x, method)
        with on(spilled, method):
            same(generate(spilled, x), wanted)

    def test_fewer_tokens_across_accelerators_are_refused(self, llava: tiny.Built) -> None:
        model = copy.deepcopy(llava[0])
        model.hf_device_map = {
            "model.language_model.layers.0": 0,
            "model.language_model.layers.1": "cuda:1",
            "lm_head": "cpu",
        }
        before = state(model)
        with pytest.raises(NotImplementedError, match=r"fastv takes visual tokens .* \(0, cuda:1\)"):
            vlm_attn.patch(model, "fastv", keep=4)
        assert state(model) == before
        vlm_attn.unpatch(vlm_attn.patch(model, "gift", **ACTIVE["gift"]))

    def test_an_edit_moves(self) -> None:
        edit = Edit(one_hot_segments(torch.tensor([[0, 1]]), 2), lambda mass: mass)
        assert edit.to(torch.device("cpu")) is edit
        there = edit.to(torch.device("meta"))
        assert there.over(5).device.type == "meta"
        assert edit.over(5).device.type == "cpu"


class TestCompiled:
    """``torch.compile`` around the model; ``generate`` compiling its decode step is in the conformance matrix."""

    @pytest.fixture(autouse=True)
    def fresh(self) -> Iterator[None]:
        torch._dynamo.reset()
        yield
        torch._dynamo.reset()

    @pytest.mark.slow
    @pytest.mark.filterwarnings("ignore:Dynamo does not know:UserWarning")
    def test_wrapper(self, llava: tiny.Built, x: Inputs) -> None:
        model = copy.deepcopy(llava[0])
        compiled = torch.compile(model, backend="eager")
        plain = logits(compiled, x)
        with on(model, "pai"):
            wanted, run = logits(model, x), generate(model, x)
        with on(compiled, "pai"):
            assert vlm_attn.is_patched(compiled)
            close(logits(compiled, x), wanted)
            same(generate(compiled, x), run)
        assert not vlm_attn.is_patched(model)
        close(logits(compiled, x), plain)


def test_looking_inside_a_wrapper(llava: tiny.Built, x: Inputs) -> None:
    """Where the model looks, and which tokens are sinks, is the same from outside."""
    model = copy.deepcopy(llava[0])
    wrapped = torch.compile(model, backend="eager")
    one = {name: value[:1] for name, value in x.items()}

    def looks(model: Any) -> list[Any]:
        sinks = vlm_attn.find_sinks(model, one, by="direction", cosine=0.5)
        return [sinks, vlm_attn.gaze(model, one, [5, 6])[0].tolist(), vlm_attn.saliency(model, one)[0].tolist()]

    with vlm_attn.patched(model, [build(name, **ACTIVE[name]) for name in ("gift", "vhr")]):
        assert looks(wrapped) == looks(model)
    assert vlm_attn.find_sinks(wrapped, one, by="direction") == vlm_attn.find_sinks(model, one, by="direction")


class TestThreads:
    @pytest.mark.parametrize(
        "settings", [("vcd", {}), ("fastv", {"keep": 4}), ("opera", {"beams": 2}), ("vhr", ACTIVE["vhr"])]
    )
    def test_kinds_that_keep_more_state(self, llava: tiny.Built, settings: Any) -> None:
        """Methods that edit attention: ``test_patching.TestThreads``."""
        model, inputs = llava
        prompts = [inputs([[3, "image", 9]], seed=1), inputs([[1, "image", 4], [2, "image", 3]], seed=5)]

        def run(x: Inputs) -> list[list[int]]:
            return model.generate(**x, max_new_tokens=5, do_sample=False).tolist()

        with vlm_attn.patched(model, settings[0], **settings[1]):
            wanted = [run(x) for x in prompts]
            for _ in range(2):
                assert in_threads(*(lambda x=x: run(x) for x in prompts)) == wanted


class TestSpread:
    """Two processes on the CPU: data parallelism, and one model whose heads are spread over both (tensor parallelism)."""

    @pytest.fixture(scope="class")
    @classmethod
    def results(cls, saved: Path) -> list[dict[str, str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with pytest.MonkeyPatch.context() as patch:
            patch.syspath_prepend(Path(__file__).parents[2])  # where the processes find this package of tests
            torch.multiprocessing.spawn(spread.work, args=(port, saved), nprocs=2)
        return [json.loads((saved / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(2)]

    @pytest.mark.parametrize("name", ["ddp", "plain", "saliency", *spread.METHODS])
    def test_same_as_the_whole_model(self, results: list[dict[str, str]], name: str) -> None:
        assert [result[name] for result in results] == ["same", "same"]

    def test_refused(self) -> None:
        with pytest.raises(NotImplementedError, match="spread over 4 processes, but its attention weights"):
            check_sharding(8, {0: Heads()}, [], 4)
        check_sharding(8, {0: Heads()}, [Heads()], 1)
