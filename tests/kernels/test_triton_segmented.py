# SPDX-License-Identifier: Apache-2.0
"""The segmented kernels against their twins in float64: on the device where there is one, else under Triton's interpreter.

A kernel may be off by twice what plain PyTorch in the same dtype is off, plus four roundings. Every buffer a kernel fills
holds NaN before.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_attn.kernels import Edit, combine, edited_attention, one_hot_segments, segmented_attention
from vlm_attn.kernels.edited import attention_rows, log_members

from .running import DEVICE, DTYPES, STRIDES, as_good, laid_out, poisoned, why_not  # noqa: F401  (a fixture)

if reason := why_not():
    pytest.skip(reason, allow_module_level=True)
from vlm_attn.kernels import triton_segmented


def problem(
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    rows: int = 1,
    length: int = 37,
    dim: int = 16,
    count: int = 3,
    used: int | None = None,
    twin: int | None = None,
    kind: str = "none",
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    softcap: float | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Inputs of a call, with a hidden row where there is a mask."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    ids = torch.randint(used or count, (batch, length), generator=generator)
    twin_weight = normal(batch, length) if twin is not None else None
    segments = one_hot_segments(ids, count, twin_of=twin, log_weight=twin_weight)
    mask = None
    if kind != "none":
        mask = torch.rand(batch, 1, rows, length + 3, generator=generator) > 0.3
        mask[0, 0, 0] = False
        if kind == "additive":
            hidden, low = ~mask, torch.finfo(dtype).min
            mask = (0.5 * normal(*hidden.shape)).to(dtype).masked_fill(hidden, low)
        mask = mask.to(DEVICE)
    tensors = (
        normal(batch, heads[0], rows, dim) * 2,
        normal(batch, heads[1], length, dim),
        normal(batch, heads[1], length, dim),
    )
    query, key, value = (laid_out(t.to(dtype).to(DEVICE), layout) for t in tensors)
    return {
        "query": query,
        "key": key,
        "value": value,
        "segments": segments.to(DEVICE),
        "options": {"mask": mask, "scale": dim**-0.5, "softcap": softcap},
        "weight": normal(batch, heads[0], rows, segments.shape[2]).to(DEVICE),
    }


def policy_of(weight: Tensor) -> Callable[[Tensor], Tensor]:
    """Weights that depend on the masses, so that wrong masses show, and that do not magnify their rounding."""
    return lambda mass: weight.to(mass).abs() + 0.5 + mass


def in_double(case: dict[str, Any]) -> tuple[list[Tensor], dict[str, Any]]:
    options = dict(case["options"])
    if options["mask"] is not None and options["mask"].dtype != torch.bool:
        mask = options["mask"]
        hidden = mask <= torch.finfo(mask.dtype).min / 2
        options["mask"] = mask.double().masked_fill(hidden, torch.finfo(torch.float64).min)
    return [case[name].double() for name in ("query", "key", "value")], options


def check(case: dict[str, Any], dtype: torch.dtype) -> None:
    """Segments and edited output of a case against float64."""
    query, key, value, segments = (case[name] for name in ("query", "key", "value", "segments"))
    exact, exact_options = in_double(case)
    given_ = (query, key, value, segments)
    lse, out = segmented_attention(*given_, **case["options"], backend="triton")
    wanted = segmented_attention(*exact, segments.double(), **exact_options, backend="reference")
    plain = segmented_attention(*given_, **case["options"], backend="reference")
    as_good(lse, wanted[0], plain[0], dtype)
    as_good(out, wanted[1], plain[1], dtype, value)
    edits = [Edit(segments, policy_of(case["weight"]))]
    got = edited_attention(query, key, value, edits, **case["options"], backend="triton")
    assert got.dtype == dtype
    # The policy works in float32, and so do both paths.
    exact_edits = [Edit(segments.double(), lambda mass: policy_of(case["weight"].double())(mass))]
    wanted_out = edited_attention(*exact, exact_edits, **exact_options, backend="reference")
    plain_out = edited_attention(query, key, value, edits, **case["options"], backend="grouped")
    as_good(got, wanted_out, plain_out, dtype, value)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("layout", STRIDES)
def test_layouts_and_masks(dtype: torch.dtype, kind: str, layout: str) -> None:
    check(problem(heads=(2, 1), rows=2, kind=kind, dtype=dtype, layout=layout, twin=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [72, 80, 96, 1, 8, 128, 256])
def test_head_dims(dtype: torch.dtype, dim: int) -> None:
    check(problem(heads=(2, 1), dim=dim, batch=1, length=70, kind="bool", dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "rows"), [((28, 4), 1), ((7, 1), 5), ((5, 5), 2), ((71, 1), 1), ((2, 1), 16), ((3, 1), 25)]
)
def test_head_ratios(dtype: torch.dtype, heads: tuple[int, int], rows: int) -> None:
    check(problem(heads=heads, rows=rows, batch=1, kind="bool", dtype=dtype, twin=1), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("count", "used", "twin"), [(1, 1, None), (4, 4, 1), (4, 2, 3), (2, 1, None), (5, 5, None)])
def test_segments_some_empty(dtype: torch.dtype, count: int, used: int, twin: int | None) -> None:
    check(problem(count=count, used=used, twin=twin, batch=1, length=150, dtype=dtype), dtype)


@pytest.mark.parametrize("softcap", [0.5, 5.0, 50.0])
def test_softcap(softcap: float) -> None:
    check(problem(softcap=softcap, rows=2, kind="bool"), torch.float32)


@settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 4))
    dtype = data.draw(st.sampled_from(DTYPES))
    case = problem(
        heads=data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (3, 1)])),
        batch=data.draw(st.integers(1, 2)),
        rows=data.draw(st.integers(1, 3)),
        length=data.draw(st.integers(1, 80)),
        dim=data.draw(st.sampled_from([1, 5, 16, 24])),
        count=count,
        used=data.draw(st.integers(1, count)),
        twin=data.draw(st.sampled_from([None, 0, count - 1])),
        kind=data.draw(st.sampled_from(["none", "bool", "additive"])),
        layout=data.draw(st.sampled_from(STRIDES)),
        softcap=data.draw(st.sampled_from([None, 3.0])),
        dtype=dtype,
        seed=data.draw(st.integers(0, 2**31 - 1)),
    )
    check(case, dtype)


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("parts", [1, 2, 3, 64])
def test_any_split_of_the_keys_combines_to_the_same(parts: int, whole: bool) -> None:
    case = problem(length=300, rows=2, kind="bool", twin=1)
    arguments = [case[name] for name in ("query", "key", "value", "segments")]
    options = case["options"]
    logs = log_members(case["segments"], torch.float32)
    lse, out = triton_segmented.partials(
        *arguments[:3], logs, 4, whole, options["mask"], options["scale"], None, parts=parts
    )
    got = triton_segmented.gathered(lse, out, 2, 4)
    wanted = segmented_attention(*arguments, **options, backend="reference")
    for one, other in zip(got, wanted, strict=True):
        assert torch.allclose(one, other, atol=2e-6)
    mass = triton_segmented.masses(lse, 4, partition=3).view(2, 4, 2, 4)
    plain = attention_rows(*arguments[:2], mask=options["mask"], scale=options["scale"])
    assert torch.allclose(mass, plain @ case["segments"][:, None], atol=2e-6)


def test_hidden_rows_and_unwritten_pieces_are_zeros() -> None:
    case = problem(length=300, rows=2, kind="bool", used=1)
    case["options"]["mask"][:] = False
    case["options"]["mask"][0, :, 1, 290:] = True
    check(case, torch.float32)
    got = edited_attention(
        case["query"],
        case["key"],
        case["value"],
        [Edit(case["segments"], torch.ones_like)],
        **case["options"],
        backend="triton",
    )
    assert not got[0, :, 0].any()
    assert not got[1].any()
    assert got[0, :, 1].all()


def test_groups_far_apart_in_float16() -> None:
    """A sink 20 above everything else leaves the other group's output as exact as before."""
    case = problem(dtype=torch.float16, count=2, batch=1, heads=(1, 1))
    case["segments"] = one_hot_segments((torch.arange(37) > 0)[None].int(), 2).to(DEVICE)
    case["key"][:, :, 0] = case["query"][:, :, 0] * (80 / case["query"].float().square().sum()).half()
    check(case, torch.float16)
    lse, out = segmented_attention(
        case["query"], case["key"], case["value"], case["segments"], **case["options"], backend="triton"
    )
    assert float(lse[..., 0] - lse[..., 1]) > 14
    assert out[..., 1, :].abs().max() > 0.01


def test_one_group_of_weight_one_is_plain_attention() -> None:
    case = problem(rows=2)
    query, key, value = (case[name] for name in ("query", "key", "value"))
    got = edited_attention(
        query, key, value, [Edit(torch.ones(2, 37, 1, device=DEVICE), torch.ones_like)], scale=0.25, backend="triton"
    )
    wanted = scaled_dot_product_attention(query, key, value, scale=0.25, enable_gqa=True)
    assert torch.allclose(got, wanted, atol=2e-6)


def test_log_n_is_n_copies() -> None:
    case = problem(batch=1, length=6)
    query, key, value = (case[name] for name in ("query", "key", "value"))
    members = torch.tensor([[[1.0], [1.0], [4.0], [1.0], [1.0], [1.0]]], device=DEVICE)
    index = [0, 1, 2, 2, 2, 2, 3, 4, 5]
    lse, out = segmented_attention(query, key, value, members, scale=0.4, backend="triton")
    wanted = segmented_attention(
        query, key[:, :, index], value[:, :, index], torch.ones(1, 9, 1, device=DEVICE), scale=0.4, backend="triton"
    )
    assert torch.allclose(lse, wanted[0], atol=1e-5)
    assert torch.allclose(out, wanted[1], atol=1e-5)


def test_mass_moved_within_a_row_is_conserved() -> None:
    """The weights of VAR: a share of one group goes to another in proportion, and the row's total stays."""
    case = problem(rows=2, count=3)
    query, key, value, segments = (case[name] for name in ("query", "key", "value", "segments"))
    totals = []

    def move(mass: Tensor) -> Tensor:
        rest, gaining, losing = mass.unbind(-1)
        weight = torch.stack([torch.ones_like(rest), 1 + 0.6 * losing / gaining, torch.full_like(rest, 0.4)], -1)
        totals.append((weight * mass).sum(-1))
        return weight

    got = edited_attention(query, key, value, [Edit(segments, move, conserves=True)], scale=0.25, backend="triton")
    assert torch.allclose(totals[0], torch.ones_like(totals[0]), atol=1e-5)
    wanted = edited_attention(query, key, value, [Edit(segments, move, conserves=True)], scale=0.25, backend="grouped")
    assert torch.allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("backend", ["triton", "grouped", "sdpa", "reference"])
def test_head_scale(backend: str) -> None:
    case = problem(rows=2, kind="bool")
    arguments = [case[name] for name in ("query", "key", "value")]
    edits = [Edit(case["segments"], policy_of(case["weight"]))]
    factor = torch.tensor([1.0, 2.0, 0.0, -0.5], device=DEVICE)
    plain = edited_attention(*arguments, edits, **case["options"], backend="grouped")
    got = edited_attention(*arguments, edits, **case["options"], head_scale=factor, backend=backend)
    assert torch.allclose(got, plain * factor[:, None, None], atol=3e-6)


def test_combine_with_log_weights() -> None:
    torch.manual_seed(0)
    lse, out = torch.randn(2, 3, 2, 4, device=DEVICE), torch.randn(2, 3, 2, 4, 24, device=DEVICE)
    lse[0, 0, 0] = -float("inf")
    lse[0, 0, 1, 2] = -float("inf")
    weight = torch.randn(2, 3, 2, 4, device=DEVICE) * 60  # e^60 would overflow where weights were linear
    weight[1, 1, 1, 0] = -float("inf")
    factor = torch.tensor([1.0, 2.0, 3.0], device=DEVICE)
    got = combine(lse, out, weight, factor, backend="triton")
    wanted = combine(lse.double(), out.double(), weight.double(), factor.double(), backend="reference")
    assert torch.allclose(got.double(), wanted, atol=2e-5)
    assert not got[0, 0, 0].any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "length"), [((28, 4), 4100), ((32, 32), 1500), ((8, 1), 33000)])
def test_device_sizes(dtype: torch.dtype, heads: tuple[int, int], length: int) -> None:
    for kind in ("none", "bool", "additive"):
        check(problem(heads=heads, length=length, dim=128, count=4, twin=1, dtype=dtype, kind=kind), dtype)
