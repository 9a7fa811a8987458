# SPDX-License-Identifier: Apache-2.0
"""Patched models on the Triton kernels, under their interpreter where there is no device, against the CPU's own path."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, ClassVar

import pytest
import torch
from transformers import CompileConfig

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, close, differ, generate, logits, same
from tests.kernels.running import DEVICE, why_not
from vlm_attn import Method, engine, host, registry
from vlm_attn.kernels import Edit, dispatch, merged, one_hot_segments, prefer

PROMPTS = [[3, "image", 7], [1, "image", 4]]

if DEVICE != "cpu":
    pytest.skip("on a device the kernels run by themselves: tests/engine/test_gpu.py", allow_module_level=True)
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


@dataclass(frozen=True, kw_only=True)
class Halved(Method):
    """Halves what every text row gives the image, by a bias."""

    name: ClassVar[str] = "halved"
    edited_rows: ClassVar[Any] = "text"

    def edit(self, call: Any, layer: int) -> Edit:
        return Edit(
            one_hot_segments(call.layout.visual.int(), 2), lambda mass: mass.new_tensor([1.0, 0.5]).expand_as(mass)
        )


@cache
def built() -> tuple[Any, dict[str, Any]]:
    model, inputs = tiny.llava()
    return model, inputs(PROMPTS)


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often Triton ran each operation."""
    counts: Counter[str] = Counter()

    def counted(operation: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*args: Any, **kwargs: Any) -> Any:
            counts[operation] += 1
            return run(*args, **kwargs)

        return inner

    for operation, offered in dispatch.BACKENDS.items():
        first, *rest = offered
        assert first.name == "triton"
        monkeypatch.setitem(dispatch.BACKENDS, operation, [first._replace(run=counted(operation, first.run)), *rest])
    monkeypatch.setattr(dispatch, "_chosen", {})
    return counts


@pytest.mark.parametrize(
    ("methods", "operations"),
    [
        (["gift"], {"attention_rows", "edited_attention"}),
        (["pai"], {"edited_attention"}),
    ],
)
def test_methods(methods: list[str], operations: set[str], ran: Counter[str]) -> None:
    model, x = built()
    with vlm_attn.patched(model, [registry.build(name, **ACTIVE[name]) for name in methods]):
        wanted = generate(model, x, 3)
        assert not ran
        with prefer("triton"):
            got = generate(model, x, 3)
    same(got, wanted)
    assert set(ran) == operations, ran


@pytest.mark.filterwarnings("ignore:.*this mask belongs to models:UserWarning")
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("name", ["mma", "vision_block"])
def test_the_kernel_draws_the_mask_of_the_prompt(name: str, base: str, ran: Counter[str]) -> None:
    """Left padding, a static cache, no cache; no matrix of the mask is made."""
    model, x = built()
    model = copy.deepcopy(model)
    model.set_attn_implementation(base)
    kept = x["attention_mask"].bool()
    with vlm_attn.patched(model, name):
        wanted, plain = generate(model, x, 2), logits(model, x)
        assert not ran
        with prefer("triton"):
            close(logits(model, x)[kept], plain[kept])
            assert ran["masked_attention"] == 4, ran  # once a layer
            for options in ({"cache_implementation": "static"}, {"use_cache": False}):
                same(generate(model, x, 2, **options), wanted)


@pytest.mark.filterwarnings("ignore:.*this mask belongs to models:UserWarning")
@pytest.mark.parametrize("name", ["mma", "prefix_lm"])
def test_a_second_turn_behind_a_filled_cache(name: str, ran: Counter[str]) -> None:
    model, inputs = tiny.llava()
    with vlm_attn.patched(model, name):
        out = model.generate(**inputs(PROMPTS[:1]), max_new_tokens=3, do_sample=False, return_dict_in_generate=True)
        ids = torch.cat([out.sequences, torch.tensor([[5, 9, 11, 4]])], 1)
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        wanted = generate(model, x | {host.CACHE: copy.deepcopy(host.cache_of(out))}, 2)
        assert not ran
        with prefer("triton"):
            got = generate(model, x | {host.CACHE: host.cache_of(out)}, 2)
    same(got, wanted)
    assert ran["masked_attention"] == 4, ran  # once a layer


@pytest.mark.filterwarnings("ignore:.*this mask belongs to models:UserWarning")
def test_edits_on_top_of_a_drawn_mask(ran: Counter[str]) -> None:
    """Rows that are read and edited get their own rows of the mask: the question's, all text, and the last one by itself."""
    model, x = built()
    kept = x["attention_mask"].bool()
    with vlm_attn.patched(
        model, ["bidirectional", *(registry.build(name, **ACTIVE[name]) for name in ("gift", "var"))]
    ):
        wanted = logits(model, x)
        with prefer("triton"):
            got = logits(model, x)
    close(got[kept], wanted[kept])
    assert set(ran) == {"masked_attention", "attention_rows", "edited_attention"}


@pytest.mark.filterwarnings("ignore:.*this mask belongs to models:UserWarning")
def test_edits_beside_chosen_keys_under_a_mask() -> None:
    """Where keys are chosen the mask is written, and the edited text rows see what is left of it."""
    model, x = built()
    duo = registry.build("duo", gates=[[0.0, 1.0]] * model.config.text_config.num_hidden_layers, sink=1, recent=2)
    plain = logits(model, x)
    with vlm_attn.patched(model, ["mma", duo, Halved()]):
        wanted = logits(model, x)
        with prefer("triton"):
            got = logits(model, x)
    shown = x["attention_mask"].bool()
    close(got[shown], wanted[shown])
    differ(wanted[shown], plain[shown])


def test_edits_of_prompt_rows_are_one(ran: Counter[str]) -> None:
    """Two methods that edit all text rows: one pass of the kernel for both, where they would be two for PyTorch."""
    model, inputs = tiny.llava()
    x = inputs([[1, "image", 3]])
    methods = [registry.build("var", **ACTIVE["var"]), Halved()]
    with vlm_attn.patched(model, methods[:1]):
        alone = logits(model, x)
    with vlm_attn.patched(model, methods):
        wanted = logits(model, x)
        with prefer("triton"):
            got = logits(model, x)
    close(got, wanted)
    differ(wanted, alone)
    assert ran["edited_attention"] == 4


def test_compiled_decode_on_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a static cache the decode step is one graph that holds the registered operations."""
    from vlm_attn.kernels import triton_segmented

    calls: list[int] = []
    partials = triton_segmented.partials

    def counted(*args: Any, **options: Any) -> Any:
        calls.append(len(args))
        return partials(*args, **options)

    monkeypatch.setattr(triton_segmented, "partials", counted)
    compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
    compiled._compile_all_devices = True
    model, inputs = tiny.llava()
    x = inputs(PROMPTS[1:])
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with vlm_attn.patched(model, registry.build("gift", **ACTIVE["gift"])):
        wanted = generate(model, x, 3)
        with prefer("triton"):
            got = generate(model, x, 3, cache_implementation="static", compile_config=compiled)
    same(got, wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    assert not torch._dynamo.utils.counters["graph_break"]
    assert len(calls) == 9  # the last row of the prompt and two steps, in three layers


@pytest.mark.parametrize("name", ["gift", "var", "ilvad"])
def test_what_is_called_a_partition_is_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The kernel adds these segments' masses up to that of all keys."""
    made: list[Edit] = []
    start = Edit.__init__

    def noted(self: Edit, *args: Any, **options: Any) -> None:
        start(self, *args, **options)
        made.append(self)

    monkeypatch.setattr(Edit, "__init__", noted)
    model, x = built()
    with vlm_attn.patched(model, registry.build(name, **ACTIVE.get(name, {"layers": (1, 2, 3)}))):
        generate(model, x, 3)
    assert made
    for edit in made:
        keys = edit.over(edit.segments.shape[1] + 3)
        assert 0 < edit.partition <= keys.shape[2]
        assert bool((keys[..., : edit.partition].sum(-1) == 1).all())


def test_two_methods_decode_in_one_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """From the end of the prompt on, their edits are one; the answer is that of the edits one after the other."""
    model, x = built()
    made: list[Any] = []
    with vlm_attn.patched(model, [registry.build(name, **ACTIVE[name]) for name in ("gift", "var")]):
        monkeypatch.setattr(engine, "merged", lambda edits: None)
        wanted = generate(model, x, 3)
        monkeypatch.setattr(engine, "merged", lambda edits: made.append(merged(edits)) or made[-1])
        got = generate(model, x, 3)
    same(got, wanted)
    assert any(made)
