"""Patched models on the Triton kernels, under their interpreter where there is no device, against the CPU's own path."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, generate, same
from tests.kernels.running import DEVICE, why_not
from vlm_attn import engine, registry
from vlm_attn.kernels import dispatch, merged, prefer

PROMPTS = [[3, "image", 7], [1, "image", 4]]

if DEVICE != "cpu":
    pytest.skip("on a device the kernels run by themselves: tests/engine/test_gpu.py", allow_module_level=True)
if reason := why_not():
    pytest.skip(reason, allow_module_level=True)


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
