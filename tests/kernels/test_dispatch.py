# SPDX-License-Identifier: Apache-2.0
"""Which backend runs a call, what is refused and with which words."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from vlm_attn.kernels import (
    Edit,
    ScoreEdit,
    attention_rows,
    combine,
    dispatch,
    edited_attention,
    masked_attention,
    masks,
    one_hot_segments,
    segmented_attention,
)
from vlm_attn.kernels.dispatch import Facts, choose
from vlm_attn.kernels.edited import log_members
from vlm_attn.sharding import Heads

from .running import DEVICE, why_not

EDIT = Edit(one_hot_segments(torch.tensor([[0, 1, 1, 0, 1]]), 2), lambda mass: 1 + mass)


def qkv(
    heads: int = 4, kv_heads: int = 2, dim: int = 8, rows: int = 1, **options: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        torch.randn(1, heads, rows, dim, **options),
        torch.randn(1, kv_heads, 5, dim, **options),
        torch.randn(1, kv_heads, 5, dim, **options),
    )


def facts(**changes: Any) -> Facts:
    return Facts(**{"device": "cuda", "dtype": torch.float16, "dim": 128, "rows": 1, "grad": False, **changes})


def test_a_mean_over_the_heads_of_several_processes_is_not_left_to_a_kernel() -> None:
    """The kernel would take the mean of the heads it has."""
    edit = ScoreEdit(torch.ones(1, 5), "head_mean")
    assert edit.kind == "head_mean"
    spread = Heads(group=object()).edit(edit)
    with pytest.raises(RuntimeError, match="score edits of head_mean over processes.*all heads in one process"):
        edited_attention(*qkv(), [spread], scale=1.0, backend="triton")
    assert choose("edited_attention", facts(score=spread.kind)).name == "grouped"


def test_first_that_fits() -> None:
    pytest.importorskip("triton")
    assert choose("edited_attention", facts()).name == "triton"
    assert choose("edited_attention", facts(device="cpu")).name == "grouped"
    assert choose("edited_attention", facts(grad=True)).name == "grouped"
    assert choose("edited_attention", facts(edits=2)).name == "grouped"
    assert choose("edited_attention", facts(device="mps")).name == "grouped"
    assert choose("segmented_attention", facts(dtype=torch.float64)).name == "reference"


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"device": "cpu"}, "device is cpu, Triton needs cuda"),
        ({"dtype": torch.float64}, "dtype is torch.float64, allowed are float16, bfloat16 and float32"),
        ({"dim": 320}, "head dimension is 320, allowed are 1 to 256"),
        ({"segments": 9}, "9 segments, allowed are 8"),
        ({"edits": 2}, "2 edits in one layer, allowed is 1"),
        ({"rows": 300}, "300 query rows, allowed are 256"),
        ({"grad": True}, "gradients are asked for"),
    ],
)
def test_asking_for_triton_says_why_not(changes: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    with pytest.raises(RuntimeError, match=words):
        choose("edited_attention", facts(**changes), "triton")


def test_without_triton(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "TRITON", False)
    monkeypatch.setattr(dispatch, "_chosen", {})
    assert choose("edited_attention", facts()).name == "grouped"
    with pytest.raises(RuntimeError, match="triton is not installed"):
        choose("edited_attention", facts(), "triton")


def test_unknown_backend() -> None:
    with pytest.raises(ValueError, match="backend='cuda': edited_attention has triton, grouped, sdpa, reference"):
        edited_attention(*qkv(), [EDIT], scale=1.0, backend="cuda")
    with pytest.raises(RuntimeError, match="'sdpa' cannot run this edited_attention: softcap is asked for"):
        edited_attention(*qkv(), [EDIT], scale=1.0, softcap=2.0, backend="sdpa")


def test_prefer() -> None:
    with dispatch.prefer("reference"):
        assert choose("edited_attention", facts(device="cpu")).name == "reference"
        with dispatch.prefer("eager"):  # which only the probe has
            assert choose("edited_attention", facts(device="cpu")).name == "grouped"
            assert choose("probe", facts(device="cpu")).name == "eager"
        assert choose("combine", facts(device="cpu")).name == "reference"
    assert choose("edited_attention", facts(device="cpu")).name == "grouped"
    with pytest.raises(ValueError, match="backend 'fast': there are eager, grouped, reference, sdpa, triton"):
        dispatch.prefer("fast").__enter__()


def test_a_decision_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatch, "_chosen", {})
    choose("edited_attention", facts(device="cpu"))
    monkeypatch.setattr(dispatch, "BACKENDS", {})
    assert choose("edited_attention", facts(device="cpu")).name == "grouped"


@pytest.mark.parametrize("backend", ["grouped", "sdpa", "reference"])
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_backends_agree(backend: str, kind: str) -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 3, 8), torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    other = Edit(one_hot_segments(torch.randint(3, (2, 9)), 3), lambda mass: 0.5 + mass)
    edits = [Edit(one_hot_segments(torch.randint(2, (2, 9)), 2), lambda mass: 1 + 2 * mass), other]
    mask = None
    if kind != "none":
        mask = torch.rand(2, 1, 3, 11) > 0.3
        mask[0, 0, 1] = False
        if kind == "additive":
            mask = torch.randn(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    for count in (1, 2):
        wanted = edited_attention(query, key, value, edits[:count], mask=mask, scale=0.3, backend="reference")
        got = edited_attention(query, key, value, edits[:count], mask=mask, scale=0.3, backend=backend)
        assert torch.allclose(got, wanted, atol=2e-6)
        if kind != "none":
            assert not got[0, :, 1].any()


@pytest.mark.parametrize("backend", ["grouped", "sdpa", "reference"])
def test_gradients(backend: str) -> None:
    torch.manual_seed(0)
    leaves = [t.requires_grad_() for t in qkv()]

    def run(*tensors: Tensor) -> Tensor:
        return edited_attention(*tensors, [EDIT], scale=0.5, backend=backend)

    wanted = torch.autograd.grad(edited_attention(*leaves, [EDIT], scale=0.5, backend="reference").sum(), leaves)
    got = torch.autograd.grad(run(*leaves).sum(), leaves)
    for one, two in zip(got, wanted, strict=True):
        assert torch.allclose(one, two, atol=1e-5)
        assert one.abs().max() > 1e-3


OPERATIONS: dict[str, Callable[..., Any]] = {
    "edited_attention": lambda q, k, v, mask: edited_attention(
        q, k, v, [ScoreEdit(torch.rand(1, 5).double()), EDIT], mask=mask, scale=0.5, softcap=3.0, backend="reference"
    ),
    "segmented_attention": lambda q, k, v, mask: segmented_attention(
        q, k, v, one_hot_segments(torch.tensor([[0, 2, 2, 0, 2]], device=q.device), 3).double(), mask=mask, scale=0.5
    )[1],
    "combine": lambda q, k, v, mask: combine(
        q[..., :3], torch.stack([v[:, :, :2], k[:, :, :2], v[:, :, 2:4]], 3).repeat(1, 2, 1, 1, 1), k[:, :1, :2, :3]
    ),
    "masked_attention": lambda q, k, v, mask: masked_attention(
        q, k, v, masks.full, torch.tensor([[0, 1, 1, 1, 5]], device=q.device), first=0, scale=0.5, lse=True
    )[:2],
    "attention_rows": lambda q, k, v, mask: attention_rows(q, k, mask=mask, scale=0.5),
}


@pytest.mark.parametrize("operation", [name for name in OPERATIONS if name != "attention_rows"])
def test_gradients_in_double(operation: str) -> None:
    """The twins, with a row that sees nothing, a segment without keys and a policy that follows the masses."""
    torch.manual_seed(0)
    query, key, value = (t.double() for t in qkv(rows=2))
    mask = torch.tensor([[True, True, False, True, True], [False] * 5])[None, None]

    def run(*tensors: Tensor) -> Any:
        torch.manual_seed(1)
        return OPERATIONS[operation](*tensors, mask)

    assert torch.autograd.gradcheck(run, [t.requires_grad_() for t in (query, key, value)])


@pytest.mark.parametrize("operation", OPERATIONS)
def test_triton_asked_for_gradients_says_so(operation: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if reason := why_not():
        pytest.skip(reason)
    run = OPERATIONS[operation]
    monkeypatch.setattr(dispatch, "_preferred", "triton")
    tensors = [t.to(DEVICE).requires_grad_() for t in qkv(rows=2)]
    with pytest.raises(RuntimeError, match=f"'triton' cannot run this {operation}: gradients are asked for"):
        dispatch.choose(operation, facts(device=DEVICE, grad=True))
    if operation != "edited_attention":  # there the test asks for the twin by name
        with pytest.raises(RuntimeError, match=f"'triton' cannot run this {operation}: gradients are asked for"):
            run(*tensors, None)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.randn(1, 5, 1, 8)}, "5 heads, which is no multiple of the 2 heads"),
        ({"query": torch.randn(4, 1, 8)}, r"query must have 4 dimensions .* got \[4, 1, 8\]"),
        ({"key": torch.randn(1, 2, 5, 9)}, r"key \[1, 2, 5, 9\] does not fit query"),
        ({"value": torch.randn(1, 2, 6, 8)}, r"value \[1, 2, 6, 8\] must have key's shape"),
        ({"key": torch.randn(1, 2, 5, 8).half()}, "key is torch.float16 on cpu, query torch.float32"),
        ({"segments": torch.ones(1, 4, 2)}, r"segments \[1, 4, 2\] must be \[1 or 1, 5, N\]"),
        ({"segments": torch.ones(1, 5, 2).int()}, "segments are torch.int32"),
        ({"mask": torch.ones(1, 1, 5) > 0}, r"mask \[1, 1, 5\] must be"),
        ({"mask": torch.ones(1, 1, 1, 4) > 0}, r"mask \[1, 1, 1, 4\] must be \[1 or 1, 4 or 1, 1 or 1, 5 or more\]"),
        ({"mask": torch.ones(1, 1, 1, 5).int()}, "mask is torch.int32: allowed are bool"),
    ],
)
def test_wrong_tensors(change: dict[str, Any], words: str) -> None:
    query, key, value = qkv()
    given = {"query": query, "key": key, "value": value, "segments": torch.ones(1, 5, 2), "mask": None, **change}
    with pytest.raises(ValueError, match=words):
        segmented_attention(**given, scale=1.0)


def test_wrong_tensors_to_combine() -> None:
    lse, out = torch.zeros(1, 2, 1, 3), torch.zeros(1, 2, 1, 3, 8)
    with pytest.raises(ValueError, match=r"log_weight \[4\] must broadcast"):
        combine(lse, out, torch.zeros(4))
    with pytest.raises(ValueError, match=r"head_scale \[3\] must have one entry for each of 2 heads"):
        combine(lse, out, lse, torch.ones(3))


def test_compiles_without_a_graph_break() -> None:
    query, key, value = qkv()
    compiled = torch.compile(
        lambda *tensors: edited_attention(*tensors, [EDIT], scale=0.5), fullgraph=True, backend="aot_eager"
    )
    with torch.no_grad():
        assert torch.allclose(compiled(query, key, value), edited_attention(query, key, value, [EDIT], scale=0.5))


def test_triton_operations_compile_without_a_graph_break() -> None:
    if reason := why_not():
        pytest.skip(reason)

    query, key, value = (t.to(DEVICE) for t in qkv())
    edit = Edit(EDIT.segments.to(DEVICE), EDIT.policy)
    compiled = torch.compile(
        lambda *tensors: edited_attention(*tensors, [edit], scale=0.5, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
    )
    with torch.no_grad():
        wanted = edited_attention(query, key, value, [edit], scale=0.5, backend="grouped")
        assert torch.allclose(compiled(query, key, value), wanted, atol=2e-6)


def test_compiled_for_rows_and_keys_that_change() -> None:
    if reason := why_not():
        pytest.skip(reason)
    edit = Edit(one_hot_segments(torch.arange(20, device=DEVICE)[None] % 3, 3), lambda mass: 1 + mass, partition=3)
    compiled = torch.compile(
        lambda *tensors: edited_attention(*tensors, [edit], scale=0.3, backend="triton"),
        fullgraph=True,
        backend="aot_eager",
        dynamic=True,
    )
    with torch.no_grad():
        for rows, length in ((2, 20), (3, 25), (5, 31)):
            query = torch.randn(1, 4, rows, 16, device=DEVICE)
            key, value = torch.randn(2, 1, 2, length, 16, device=DEVICE).unbind(0)
            wanted = edited_attention(query, key, value, [edit], scale=0.3, backend="grouped")
            assert torch.allclose(compiled(query, key, value), wanted, atol=4e-6)


def test_registered_operations() -> None:
    """Schemas and fake implementations say what the operations do."""
    if reason := why_not():
        pytest.skip(reason)
    from vlm_attn.kernels import ops

    query, key, value = (t.to(DEVICE) for t in qkv())
    logs = log_members(EDIT.segments.to(DEVICE), query.dtype)
    checks = ("test_schema", "test_faketensor")
    torch.library.opcheck(ops.partials, (query, key, value, logs, 2, True, None, 0.5, None), test_utils=checks)
    lse, out = ops.partials(query, key, value, logs, 2, False, None, 0.5, None)
    torch.library.opcheck(ops.masses, (lse, 2, 2), test_utils=checks)
    arguments = (lse, out, torch.ones(4, 2, device=DEVICE), None, 1, 4, torch.float32)
    torch.library.opcheck(ops.combine, arguments, test_utils=checks)
