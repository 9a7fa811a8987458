# SPDX-License-Identifier: Apache-2.0
"""The probe kernels against their twin in float64; see ``test_triton_segmented.py`` for what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_attn.kernels import attention_rows, edited, one_hot_segments, probe

from .running import DEVICE, DTYPES, STRIDES, as_good, laid_out, needs_triton, poisoned  # noqa: F401  (a fixture)


def problem(
    *,
    heads: tuple[int, int] = (4, 2),
    batch: int = 2,
    rows: int = 5,
    length: int = 37,
    dim: int = 16,
    kind: str = "none",
    causal: bool = True,
    padding: bool = True,
    softcap: float | None = None,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[Tensor, Tensor, dict[str, Any]]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(batch, heads[0], rows, dim, generator=generator) * 2
    key = torch.randn(batch, heads[1], length, dim, generator=generator)
    mask = None
    if kind != "none":
        mask = torch.rand(batch, 1, rows, length, generator=generator) > 0.3
        if kind == "additive":
            mask = torch.zeros(mask.shape, dtype=dtype).masked_fill(~mask, torch.finfo(dtype).min)
        mask = mask.to(DEVICE)
    last = torch.randint(-1, length, (batch, rows), generator=generator) if causal else None
    keys = torch.arange(length) >= torch.randint(0, length, (batch, 1), generator=generator) if padding else None
    segments = one_hot_segments(torch.randint(3, (batch, length), generator=generator), 3)
    options = {
        "segments": segments.to(DEVICE),
        "mask": mask,
        "last": None if last is None else last.to(DEVICE),
        "keys": None if keys is None else keys.to(DEVICE),
        "scale": dim**-0.5,
        "softcap": softcap,
    }
    return laid_out(query.to(dtype).to(DEVICE), layout), laid_out(key.to(dtype).to(DEVICE), layout), options


def check(query: Tensor, key: Tensor, options: dict[str, Any], dtype: torch.dtype, maps: bool = True) -> None:
    exact = dict(options)
    if options["mask"] is not None and options["mask"].dtype != torch.bool:
        exact["mask"] = options["mask"].double().masked_fill(options["mask"] < 0, torch.finfo(torch.float64).min)
    got = probe(query, key, **options, maps=maps, backend="triton")
    wanted = probe(query.double(), key.double(), **exact, maps=maps, backend="eager")
    plain = probe(query, key, **options, maps=maps, backend="eager")
    for name in ("attention", "mass", "column_sum", "entropy"):
        if getattr(wanted, name) is None:
            assert getattr(got, name) is None
        else:
            # Every result is float32, whatever the inputs: twice PyTorch's error plus four roundings of float32.
            as_good(getattr(got, name), getattr(wanted, name), getattr(plain, name), torch.float32)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
@pytest.mark.parametrize("layout", STRIDES)
def test_masks_and_layouts(kind: str, layout: str, dtype: torch.dtype) -> None:
    check(*problem(kind=kind, layout=layout, dtype=dtype, batch=1), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "rows", "dim"), [((7, 1), 1, 72), ((2, 2), 64, 80), ((6, 3), 17, 96)])
def test_odd_shapes(heads: tuple[int, int], rows: int, dim: int, dtype: torch.dtype) -> None:
    check(*problem(heads=heads, rows=rows, dim=dim, batch=1, length=70, dtype=dtype), dtype)


@needs_triton
def test_column_sums_of_a_whole_causal_prompt() -> None:
    query, key, options = problem(heads=(2, 1), rows=150, length=150)
    options |= {"last": torch.arange(150, device=DEVICE)[None], "keys": torch.arange(150, device=DEVICE)[None] >= 7}
    check(query, key, options, torch.float32, maps=False)


@needs_triton
@pytest.mark.parametrize("kind", ["none", "bool", "additive"])
def test_rows_alone(kind: str) -> None:
    """More rows than a probe keeps, and no other result; on the CPU the twin runs unless Triton is asked for."""
    query, key, options = problem(rows=70, kind=kind, softcap=3.0)
    given_ = {name: options[name] for name in ("mask", "scale", "softcap")}
    wanted = edited.attention_rows(query, key, **given_)
    assert torch.allclose(attention_rows(query, key, **given_, backend="triton"), wanted, atol=2e-6)
    assert torch.equal(attention_rows(query, key, **given_, backend="eager"), wanted)


@needs_triton
@pytest.mark.parametrize("maps", [False, True])
@pytest.mark.parametrize("full", [False, True])
def test_registered(full: bool, maps: bool) -> None:
    """Schema and fake implementation say what the operation does."""
    from vlm_attn.kernels import ops

    query, key, options = problem(kind="bool" if full else "none", batch=1)
    given_ = [options[name] if full else None for name in ("segments", "mask", "last", "keys")]
    arguments = (query, key, *given_, 0.25, 3.0 if full else None, maps)
    torch.library.opcheck(ops.probe, arguments, test_utils=("test_schema", "test_faketensor"))


@needs_triton
def test_compiles_without_a_graph_break() -> None:
    query, key, options = problem(kind="bool")

    def run(query: Tensor, key: Tensor) -> tuple[Any, ...]:
        rows = attention_rows(query, key, mask=options["mask"], scale=0.25, backend="triton")
        return (*probe(query, key, **options, maps=True, backend="triton"), rows)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for got, wanted in zip(compiled(query, key), run(query, key), strict=True):
        assert torch.allclose(got, wanted, atol=1e-6)


@needs_triton
@settings(
    max_examples=300,
    derandomize=True,  # the bound is twice a rounding error: once in thousands of draws PyTorch's own is next to nothing
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    case = problem(
        heads=data.draw(st.sampled_from([(1, 1), (2, 1), (3, 1), (2, 2)])),
        batch=data.draw(st.integers(1, 2)),
        rows=data.draw(st.integers(1, 20)),
        length=data.draw(st.integers(1, 80)),
        dim=data.draw(st.sampled_from([1, 8, 20])),
        kind=data.draw(st.sampled_from(["none", "bool", "additive"])),
        causal=data.draw(st.booleans()),
        padding=data.draw(st.booleans()),
        softcap=data.draw(st.sampled_from([None, 3.0])),
        layout=data.draw(st.sampled_from(STRIDES)),
        dtype=dtype,
        seed=data.draw(st.integers(0, 2**31 - 1)),
    )
    check(*case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("heads", [(28, 4), (8, 8)])
def test_device_sizes(heads: tuple[int, int], dtype: torch.dtype) -> None:
    check(*problem(heads=heads, rows=64, length=4100, dim=128, dtype=dtype), dtype)
    check(*problem(heads=heads, rows=900, length=900, dim=128, dtype=dtype), dtype, maps=False)


def test_what_the_results_mean() -> None:
    query, key, options = problem(batch=1, rows=4)
    found = probe(query, key, **options, maps=True, backend="eager")
    assert torch.allclose(found.column_sum, found.attention.sum(2))
    assert torch.allclose(found.mass, found.attention @ options["segments"][:, None])
    uniform = probe(torch.zeros_like(query), key, scale=1.0, backend="eager")
    assert torch.allclose(uniform.entropy, torch.tensor(37.0).log())
    assert uniform.attention is None
    assert uniform.mass is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"query": torch.randn(1, 2, 65, 8), "maps": True}, "maps=True with 65 rows: .* at most 64"),
        ({"segments": torch.ones(1, 5, 17)}, "segments has 17 columns: allowed are 16"),
        ({"segments": torch.ones(1, 4, 2)}, r"segments \[1, 4, 2\]"),
        ({"last": torch.ones(1, 2).int()}, r"last \[1, 2\] must be \[1 or 1, 3\]"),
        ({"last": torch.ones(1, 3)}, "last is torch.float32: must be integers"),
        ({"keys": torch.ones(1, 5)}, r"keys \[1, 5\] torch.float32 must be \[1 or 1, 5\] of bool"),
        ({"key": torch.randn(1, 3, 5, 8)}, "2 heads, which is no multiple of the 3 heads"),
    ],
)
def test_wrong_input(change: dict[str, Any], words: str) -> None:
    given_ = {"query": torch.randn(1, 2, 3, 8), "key": torch.randn(1, 1, 5, 8), "scale": 1.0, **change}
    with pytest.raises(ValueError, match=words):
        probe(given_.pop("query"), given_.pop("key"), **given_)
