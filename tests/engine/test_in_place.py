# SPDX-License-Identifier: Apache-2.0
"""A patch is a few settings of a model that others may overwrite: it is kept on, or each forward says what happened."""

from __future__ import annotations

import copy
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AttentionInterface, LlavaForConditionalGeneration, LogitsProcessor, LogitsProcessorList

import vlm_attn
from tests import tiny
from tests.engine.test_patching import state
from tests.engine.test_prompts_refused import generate
from tests.helpers import ACTIVE, Inputs, differ, logits, on, same
from tests.pins import SETTINGS
from vlm_attn import host
from vlm_attn.attention import TAG, vlm_attention
from vlm_attn.branch import Decoding
from vlm_attn.patching import engine_of
from vlm_attn.registry import method_class

METHODS = [name for name in SETTINGS if name != "plain"]
PROMPT = [3, "image", 9]


@pytest.fixture
def llava() -> tiny.Built:
    return tiny.llava()


@pytest.fixture(scope="module")
def shared() -> tiny.Built:
    return tiny.llava()


def text_model(model: Any) -> Any:
    return model.model.language_model


OVERWRITE: dict[str, Callable[[Any], None]] = {
    "what it has": lambda model: model.set_attn_implementation(model.config._attn_implementation),
    "eager": lambda model: model.set_attn_implementation("eager"),
    "of the text": lambda model: model.set_attn_implementation({"text_config": "sdpa"}),
    "config": lambda model: setattr(model.config, "_attn_implementation", "sdpa"),
    "text config": lambda model: setattr(model.config.get_text_config(), "_attn_implementation", "eager"),
    "ours": lambda model: model.set_attn_implementation("vlm_attn"),
}


class TestImplementation:
    @pytest.mark.parametrize("how", OVERWRITE)
    @pytest.mark.parametrize("method", ACTIVE)
    def test_the_edit_stays_on(self, llava: tiny.Built, method: str, how: str) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain = logits(model, x)
        with on(model, method):
            wanted, run = logits(model, x), generate(model, x)
            OVERWRITE[how](model)
            if how == "ours":  # what a patch sets: nothing has happened
                assert torch.equal(logits(model, x), wanted)
            else:
                with pytest.warns(UserWarning, match=f"{method} is still applied.*unpatch"):
                    now = logits(model, x)
                eager = how in ("eager", "text config")
                assert (now - wanted).abs().max() <= (1e-4 if eager else 0) * wanted.abs().max()
                same(generate(model, x), run, 3e-5)
            assert vlm_attn.is_patched(model)
        eager = how in ("eager", "text config")
        assert model.config.get_text_config()._attn_implementation == ("eager" if eager else "sdpa")
        if not eager:
            assert torch.equal(logits(model, x), plain)

    def test_set_while_generating(self, llava: tiny.Built) -> None:
        """From the next step on it is put back: no step runs without the edit."""
        model, inputs = llava
        x = inputs([PROMPT])

        class Overwrite(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                if input_ids.shape[1] == 24:
                    model.set_attn_implementation("sdpa")
                return scores

        with on(model, "gift"):
            wanted = generate(model, x)
            with pytest.warns(UserWarning, match="gift is still applied"):
                same(generate(model, x, logits_processor=LogitsProcessorList([Overwrite()])), wanted, 0.0)

    def test_one_that_cannot_be_edited(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"):
            wanted = logits(model, x)
            text_config = model.config.get_text_config()
            text_config._attn_implementation_internal = "flash_attention_2"
            for call in (logits, generate):
                with pytest.raises(
                    NotImplementedError, match="'flash_attention_2' while.*gift.*set_attn_impl.*unpatch"
                ):
                    call(model, x)
            text_config._attn_implementation_internal = "sdpa"
            with pytest.warns(UserWarning, match="still applied"):
                assert torch.equal(logits(model, x), wanted)

    def test_our_function_is_registered_again(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "var"):
            wanted = logits(model, x)
            AttentionInterface.register(host.NAMES["sdpa"], lambda *args, **kwargs: 1 / 0)
            try:
                with pytest.warns(UserWarning, match="still applied"):
                    assert torch.equal(logits(model, x), wanted)
            finally:
                host.register(vlm_attention)


class Wrapped(nn.Module):
    """What FSDP, compiled layers and checkpoint wrappers do: the layer is inside, under its own name."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("layer"), name)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.layer(*args, **kwargs)


def new_layer(model: Any) -> nn.Module:
    layers = text_model(model).layers
    config = text_model(model).config
    plain = copy.deepcopy(layers[1], {id(config): config})
    for module in plain.modules():
        vars(module).pop(TAG, None)
        for kind in ("_forward_pre_hooks", "_forward_hooks"):
            vars(module)[kind].clear()
    return plain


def no_hooks(module: nn.Module) -> None:
    for kind in ("_forward_pre_hooks", "_forward_hooks"):
        vars(module)[kind].clear()


def fused(model: Any) -> None:
    attention = text_model(model).layers[2].self_attn
    project = attention.o_proj
    attention.forward = lambda hidden_states, **kwargs: (project(hidden_states), None)


BREAK: dict[str, tuple[Callable[[Any], None], str]] = {
    "layer": (
        lambda model: text_model(model).layers.__setitem__(1, new_layer(model)),
        r"the module model\.language_model\.layers\.1 was replaced",
    ),
    "attention": (
        lambda model: setattr(text_model(model).layers[1], "self_attn", new_layer(model).self_attn),
        r"the module model\.language_model\.layers\.1\.self_attn was replaced",
    ),
    "one layer more": (
        lambda model: text_model(model).layers.append(new_layer(model)),
        "has 5 decoder layers now, not 4",
    ),
    "tag": (
        lambda model: vars(text_model(model).layers[3].self_attn).pop(TAG),
        r"'_vlm_attn' of .*layers\.3\.self_attn",
    ),
    "config": (
        lambda model: setattr(text_model(model), "config", copy.deepcopy(model.config.get_text_config())),
        r"'config' of model\.language_model was replaced",
    ),
    "hooks of the model": (no_hooks, "a hook was removed"),
    "hooks of the text model": (
        lambda model: no_hooks(text_model(model)),
        r"a hook of model\.language_model was removed",
    ),
    "hooks, all new": (
        lambda model: setattr(text_model(model), "_forward_pre_hooks", type(text_model(model)._forward_pre_hooks)()),
        r"a hook of model\.language_model was removed",
    ),
    "every hook of ours": (
        lambda model: [no_hooks(module) for module in (model, text_model(model), *text_model(model).layers)],
        "a hook was removed",
    ),
    "fused attention": (fused, "layers 2 did not run the attention that .* edits"),
}


class TestParts:
    @pytest.mark.parametrize("how", BREAK)
    @pytest.mark.parametrize("method", ["gift", "var", "duo", "fastv", "vcd"])
    def test_said(self, llava: tiny.Built, method: str, how: str) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        change, says = BREAK[how]
        vlm_attn.patch(model, method, **SETTINGS[method])
        generate(model, x)
        change(model)
        bare = () if issubclass(method_class(method), Decoding) else (logits,)
        for call in (generate, *bare):
            with pytest.raises(RuntimeError, match=says):
                call(model, x)
        assert not engine_of(model)._turns.held
        vlm_attn.unpatch(model)
        assert not any(hasattr(module, TAG) for module in model.modules())
        if how != "one layer more":  # the host reads the number of layers off the config
            generate(model, x)

    def test_patched_again(self, llava: tiny.Built) -> None:
        """``replace=True`` patches the model as it is now."""
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"):
            wanted = logits(model, x)
        before = state(model)
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        text_model(model).layers[1] = new_layer(model)
        with pytest.raises(RuntimeError, match="replaced"):
            logits(model, x)
        vlm_attn.patch(model, "gift", replace=True, **ACTIVE["gift"])
        assert torch.equal(logits(model, x), wanted)
        vlm_attn.unpatch(model)
        assert state(model) == before

    def test_the_old_layer_is_clean(self, llava: tiny.Built) -> None:
        """A layer that was taken out while patched can be put in again afterwards."""
        model, inputs = llava
        x = inputs([PROMPT])
        plain, before = logits(model, x), state(model)
        vlm_attn.patch(model, "fastv", **SETTINGS["fastv"])
        old, text_model(model).layers[1] = text_model(model).layers[1], new_layer(model)
        vlm_attn.unpatch(model)
        text_model(model).layers[1] = old
        assert torch.equal(logits(model, x), plain)
        assert state(model) == before

    @pytest.mark.parametrize("method", ["gift", "fastv", "duo"])
    def test_a_wrapped_layer_keeps_the_edit(self, llava: tiny.Built, method: str) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain = logits(model, x)
        with vlm_attn.patched(model, method, **SETTINGS[method]):
            wanted = logits(model, x)
            layers = text_model(model).layers
            layers[1], layers[2] = Wrapped(layers[1]), Wrapped(layers[2])
            for _ in range(2):
                assert torch.equal(logits(model, x), wanted)
        assert torch.equal(logits(model, x), plain)

    def test_nothing_is_looked_at_while_neutral(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain = logits(model, x)
        with on(model, "gift", alpha=0.0):
            model.set_attn_implementation("sdpa")
            assert torch.equal(logits(model, x), plain)

    def test_a_copy_looks_at_its_own_parts(self, llava: tiny.Built) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"):
            wanted = logits(model, x)
            other = copy.deepcopy(model)
            text_model(model).layers[1] = new_layer(model)
            assert torch.equal(logits(other, x), wanted)
            text_model(other).layers[2] = new_layer(other)
            with pytest.raises(RuntimeError, match=r"layers\.2 was replaced"):
                logits(other, x)

    def test_a_look_is_cheap(self, llava: tiny.Built) -> None:
        """One dictionary lookup for each mark, and not more than eight of these a layer."""
        model, inputs = llava
        with vlm_attn.patched(model, "fastv", **SETTINGS["fastv"]):
            logits(model, inputs([PROMPT]))
            marks = engine_of(model).marks
            assert marks is not None
            assert len(marks.checks) <= 8 * len(text_model(model).layers) + 12
            assert marks.checks is marks.checks


class TestUnpatchUndoesOursOnly:
    def test_another_vocabulary(self, llava: tiny.Built, tmp_path: Path) -> None:
        model, inputs = llava
        config = model.config
        with on(model, "gift"):
            model.resize_token_embeddings(tiny.VOCAB + 16)
            model.config.note = "mine"
            model.config.get_text_config().bos_token_id = 7
            del model.config.image_seq_length
        assert model.config is config
        assert config.get_text_config().vocab_size == tiny.VOCAB + 16
        assert config.note == "mine"
        assert config.get_text_config().bos_token_id == 7
        assert "image_seq_length" not in vars(config)
        config.image_seq_length = 9
        model.save_pretrained(tmp_path)
        again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
        x = inputs([PROMPT])
        assert again.get_input_embeddings().weight.shape[0] == tiny.VOCAB + 16
        assert torch.equal(logits(again, x), logits(model, x))

    def test_another_config(self, llava: tiny.Built) -> None:
        model, _ = llava
        with on(model, "gift"):
            other = model.config = copy.deepcopy(model.config)
            model.config.vision_config = vision = copy.deepcopy(model.config.vision_config)
        assert model.config is other
        assert other.vision_config is vision

    def test_a_sub_config_that_was_exchanged(self, llava: tiny.Built) -> None:
        model, _ = llava
        config = model.config
        with on(model, "gift"):
            vision = model.config.vision_config = copy.deepcopy(model.config.vision_config)
        assert model.config is config
        assert config.vision_config is vision

    def test_seen_by_the_next_patch(self, llava: tiny.Built) -> None:
        model, inputs = llava
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        model.resize_token_embeddings(tiny.VOCAB + 16)
        vlm_attn.patch(model, "var", replace=True, **ACTIVE["var"])
        assert model.config.get_text_config().vocab_size == tiny.VOCAB + 16
        logits(model, inputs([PROMPT]))
        vlm_attn.unpatch(model)
        assert model.config.get_text_config().vocab_size == tiny.VOCAB + 16

    def test_a_wrapper_of_generate(self, llava: tiny.Built) -> None:
        """Set while patched, it stays, and what it wraps is the plain ``generate`` again."""
        model, inputs = llava
        x = inputs([PROMPT])
        plain = generate(model, x)
        vlm_attn.patch(model, "gift", **ACTIVE["gift"])
        inner, calls = model.generate, []
        wanted = generate(model, x)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return inner(*args, **kwargs)

        model.generate = wrapper
        same(generate(model, x), wanted, 0.0)
        vlm_attn.unpatch(model)
        assert model.generate is wrapper
        same(generate(model, x), plain, 0.0)
        assert len(calls) == 2


class Fail:
    """A hook that ends a forward."""

    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, *_: Any) -> None:
        raise self.error


class Stop(LogitsProcessor):
    def __init__(self, error: BaseException) -> None:
        self.error = error

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        raise self.error


def elsewhere(job: Callable[[], Any]) -> Any:
    """What a job gives in another thread, which must not hang."""
    found: list[Any] = []

    def work() -> None:
        torch.set_num_threads(1)
        try:
            found.append(job())
        except BaseException as error:  # noqa: B036
            found.append(error)

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(timeout=20)
    assert not thread.is_alive(), "the other thread hangs"
    return found[0]


class TestInterrupts:
    """Every method, every way to be ended: another thread gets its turn, and what it gets is right."""

    @staticmethod
    @cache
    def wanted(method: str) -> Any:
        model, inputs = tiny.llava()
        with vlm_attn.patched(model, method, **SETTINGS[method]):
            return generate(model, inputs([PROMPT], seed=1), new=3)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, RuntimeError])
    @pytest.mark.parametrize("method", METHODS)
    def test_matrix(self, shared: tiny.Built, method: str, error: type[BaseException]) -> None:
        model, inputs = shared
        x, y = inputs([PROMPT]), inputs([PROMPT], seed=1)
        mlps = [layer.mlp for layer in text_model(model).layers]
        places = [mlps[0], mlps[3], model.model.vision_tower, model.lm_head]
        with vlm_attn.patched(model, method, **SETTINGS[method]):
            bare = () if issubclass(method_class(method), Decoding) else (logits,)
            for place in places:
                for call in (generate, *bare):
                    hook = place.register_forward_hook(Fail(error()))
                    with pytest.raises(error):
                        call(model, x)
                    hook.remove()
                    if call is logits:
                        elsewhere(lambda: logits(model, y))
            if method != "opera":  # a search of its own
                with pytest.raises(error):
                    generate(model, x, logits_processor=LogitsProcessorList([Stop(error())]))
            found = elsewhere(lambda: generate(model, y, new=3))
            assert not isinstance(found, BaseException), found
            same(found, self.wanted(method), 0.0)
            same(generate(model, y, new=3), found, 0.0)
            engine = engine_of(model)
            assert engine.call is engine.tap is engine._aside is engine._pending is None
            assert not engine._turns.held
            assert engine._depth == 0

    def test_a_hook_before_the_forward(self, shared: tiny.Built) -> None:
        """Between our hook and the forward itself."""
        model, inputs = shared
        x = inputs([PROMPT])
        with on(model, "var"):
            wanted = logits(model, x)
            hook = model.register_forward_pre_hook(Fail(KeyboardInterrupt()))
            with pytest.raises(KeyboardInterrupt):
                logits(model, x)
            hook.remove()
            assert torch.equal(elsewhere(lambda: logits(model, x)), wanted)

    def test_a_thread_that_ended(self, shared: tiny.Built) -> None:
        model, inputs = shared
        x = inputs([PROMPT])
        with on(model, "var"):
            wanted = logits(model, x)
            hook = text_model(model).layers[1].register_forward_hook(Fail(SystemExit()))
            assert isinstance(elsewhere(lambda: logits(model, x)), SystemExit)
            hook.remove()
            assert torch.equal(logits(model, x), wanted)

    def test_a_forward_that_still_runs_keeps_its_turn(self, shared: tiny.Built) -> None:
        model, inputs = shared
        x, y = inputs([PROMPT]), inputs([[1, "image", 4]], seed=3)
        order, inside, go = [], threading.Event(), threading.Event()

        def slow(*_: Any) -> None:
            if threading.current_thread().name == "slow":
                inside.set()
                assert go.wait(20)
                order.append("slow")

        with on(model, "var"):
            wanted = [logits(model, x), logits(model, y)]
            hook = text_model(model).layers[1].register_forward_hook(slow)
            got: dict[str, Any] = {}

            def work(name: str, inputs: Inputs) -> None:
                got[name] = logits(model, inputs)
                order.append(name + " is done")

            first = threading.Thread(target=work, args=("slow", x), name="slow", daemon=True)
            first.start()
            assert inside.wait(20)
            second = threading.Thread(target=work, args=("fast", y), daemon=True)
            second.start()
            time.sleep(0.2)  # several looks at whether the first is over
            assert not order
            go.set()
            first.join(20)
            second.join(20)
            hook.remove()
        assert order[0] == "slow"
        assert torch.equal(got["slow"], wanted[0])
        assert torch.equal(got["fast"], wanted[1])

    def test_a_forward_inside_a_forward(self, shared: tiny.Built) -> None:
        """A hook that calls the model again: the outer forward goes on where it was."""
        model, inputs = shared
        x, y = inputs([PROMPT]), inputs([[1, "image", 4]], seed=3)
        inner: list[Tensor] = []

        def ask(*_: Any) -> None:
            if not inner:
                inner.append(torch.empty(0))
                inner.append(logits(model, y))

        with on(model, "var"):
            wanted = [logits(model, x), logits(model, y)]
            hook = text_model(model).layers[1].register_forward_hook(ask)
            assert torch.equal(logits(model, x), wanted[0])
            hook.remove()
        assert torch.equal(inner[1], wanted[1])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
class TestFork:
    def child(self, job: Callable[[], bool]) -> bool:
        """Whether a job is true in a forked process, which must not hang."""
        number = os.fork()
        if not number:
            good = False
            try:
                good = job()
            finally:
                os._exit(0 if good else 1)
        for _ in range(200):
            done, status = os.waitpid(number, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status) == 0
            time.sleep(0.1)
        os.kill(number, signal.SIGKILL)
        os.waitpid(number, 0)
        raise AssertionError("the forked process hangs")

    @pytest.mark.parametrize("method", ["gift", "pyramid_drop", "vhr"])
    def test_while_another_thread_generates(self, shared: tiny.Built, method: str) -> None:
        model, inputs = shared
        x, y = inputs([PROMPT]), inputs([PROMPT], seed=1)
        here, go, got = threading.Event(), threading.Event(), []

        class Wait(LogitsProcessor):
            def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
                here.set()
                assert go.wait(60)
                return scores

        with vlm_attn.patched(model, method, **SETTINGS[method]):
            wanted, run = logits(model, y), generate(model, x, new=3)
            wait = LogitsProcessorList([Wait()])
            thread = threading.Thread(
                target=lambda: got.append(generate(model, x, new=3, logits_processor=wait)), daemon=True
            )
            thread.start()
            assert here.wait(20)
            try:
                assert self.child(lambda: torch.equal(logits(model, y), wanted) and engine_of(model).call is None)
            finally:
                go.set()
                thread.join(20)
            same(got[0], run, 0.0)

    @pytest.mark.parametrize("where", ["forward", "reading ahead"])
    def test_in_the_middle_of_a_forward(self, shared: tiny.Built, where: str) -> None:
        """What a forward has put on modules for its own time is taken away in the child."""
        model, inputs = shared
        x = inputs([PROMPT])
        here, go = threading.Event(), threading.Event()

        def wait(*_: Any) -> None:
            if threading.current_thread().name == "waits":
                here.set()
                assert go.wait(60)

        with vlm_attn.patched(model, "pyramid_drop", **SETTINGS["pyramid_drop"]):
            wanted = logits(model, x)
            layer = text_model(model).layers[1]
            place = layer.mlp if where == "forward" else layer.self_attn.q_proj
            hook = place.register_forward_hook(wait)
            thread = threading.Thread(target=lambda: logits(model, x), name="waits", daemon=True)
            thread.start()
            assert here.wait(20)
            try:
                assert self.child(lambda: torch.equal(logits(model, x), wanted))
            finally:
                go.set()
                thread.join(20)
                hook.remove()

    def test_inside_its_own_call(self, shared: tiny.Built) -> None:
        """The thread that forks comes along, and so does its call."""
        model, inputs = shared
        x, found = inputs([PROMPT]), []

        class Fork(LogitsProcessor):
            def __call__(_, input_ids: Tensor, scores: Tensor) -> Tensor:
                if not found:
                    found.append(self.child(lambda: engine_of(model).call is not None and engine_of(model)._turns.mine))
                return scores

        with on(model, "gift"):
            wanted = generate(model, x)
            same(generate(model, x, logits_processor=LogitsProcessorList([Fork()])), wanted, 0.0)
        assert found == [True]
        differ(wanted[1][0], generate(model, x)[1][0])
