"""Masked attention against its twin in float64; see ``test_triton_segmented.py`` for what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_attn.kernels import Group, Score, masked_attention, masks

from .running import DEVICE, DTYPES, STRIDES, as_good, laid_out, needs_triton, poisoned  # noqa: F401  (a fixture)

NAMES = [*masks.MASKS, "sliding:9"]


def problem(
    *,
    heads: tuple[int, int] = (2, 1),
    batch: int = 2,
    rows: int | None = None,
    length: int = 75,
    dim: int = 16,
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    seed: int = 0,
) -> tuple[list[Tensor], Tensor]:
    """Tensors, and groups like those of a prompt: padding on the left, runs of a few lengths."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((heads[0], rows or length), (heads[1], length), (heads[1], length))
    tensors = [torch.randn(batch, *size, dim, generator=generator) for size in sizes]
    tensors[0] *= 2
    runs = torch.randint(int(Group.PAD), (batch, length // 5 + 1), generator=generator).repeat_interleave(5, 1)
    group = runs[:, :length].clone()
    for sample in range(1, batch):
        group[sample, : int(torch.randint(length, (1,), generator=generator))] = int(Group.PAD)
    return [laid_out(t.to(dtype).to(DEVICE), layout) for t in tensors], group.to(DEVICE)


def check(tensors: list[Tensor], group: Tensor, mask: masks.Mask, dtype: torch.dtype, **options: Any) -> None:
    options = {"scale": tensors[0].shape[3] ** -0.5, **options}
    got, lse = masked_attention(*tensors, mask, group, lse=True, **options, backend="triton")
    wanted, wanted_lse = masked_attention(
        *(t.double() for t in tensors), mask, group, lse=True, **options, backend="reference"
    )
    plain, plain_lse = masked_attention(*tensors, mask, group, lse=True, **options, backend="reference")
    assert got.dtype == dtype
    as_good(got, wanted, plain, dtype)
    as_good(lse, wanted_lse, plain_lse, dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_every_mask(name: str, dtype: torch.dtype) -> None:
    check(*problem(dtype=dtype), masks.named(name), dtype)


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "rows"), [((7, 1), 72, 1), ((2, 2), 80, 33), ((6, 3), 96, 64), ((1, 1), 128, 75)]
)
def test_odd_shapes(heads: tuple[int, int], dim: int, rows: int, dtype: torch.dtype) -> None:
    tensors, group = problem(heads=heads, dim=dim, rows=rows, batch=1, dtype=dtype)
    check(tensors, group, masks.modality_mutual, dtype)
    if rows < 75:
        check(tensors, group, masks.modality_mutual, dtype, first=3)


@needs_triton
@pytest.mark.parametrize("score", [Score(visual_abs=0.5), Score(0.0, 1.15, 0.95), Score(0.3, 1.1, 0.9)])
def test_score_functions(score: Score) -> None:
    tensors, group = problem()
    for score_from in (0, 74, torch.tensor([20, 50], device=DEVICE)):
        check(tensors, group, masks.causal, torch.float32, score=score, score_from=score_from, softcap=4.0)


@needs_triton
def test_cross_attention() -> None:
    """Rows that are no keys: text looks at image tokens, some of them padding."""
    tensors, _ = problem(rows=20, length=33)
    group = torch.full((2, 33), int(Group.VISUAL), device=DEVICE)
    group[1, 10:] = int(Group.PAD)
    text = torch.full((2, 20), int(Group.QUERY), device=DEVICE)
    text[0, :4] = int(Group.SYSTEM)
    check(tensors, group, masks.full, torch.float32, row_group=text)
    blind = masks.pairs([Group.QUERY], [Group.VISUAL])
    check(tensors, group, blind, torch.float32, row_group=text)
    assert not masked_attention(*tensors, blind, group, row_group=text, scale=1.0, backend="triton")[0, :, :4].any()


@needs_triton
@settings(
    max_examples=300,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    length = data.draw(st.integers(1, 140))
    rows = data.draw(st.integers(1, length))
    tensors, group = problem(
        heads=data.draw(st.sampled_from([(1, 1), (2, 1), (2, 2)])),
        batch=data.draw(st.integers(1, 2)),
        rows=rows,
        length=length,
        dim=data.draw(st.sampled_from([1, 8, 20])),
        layout=data.draw(st.sampled_from(STRIDES)),
        dtype=dtype,
        seed=data.draw(st.integers(0, 2**31 - 1)),
    )
    mask = masks.named(data.draw(st.sampled_from(NAMES)))
    if data.draw(st.booleans()):
        mask = data.draw(st.sampled_from([masks.or_, masks.and_]))(mask, masks.named(data.draw(st.sampled_from(NAMES))))
    prompt = data.draw(st.integers(1, length))
    softcap = data.draw(st.sampled_from([None, 3.0]))
    check(tensors, group[:, :prompt], mask, dtype, first=data.draw(st.integers(0, length - rows)), softcap=softcap)


@needs_triton
@pytest.mark.parametrize("name", NAMES)
def test_tiles_hold_what_the_matrix_holds(name: str) -> None:
    from vlm_attn.kernels import triton_prefill

    _, group = problem(length=100)
    mask = masks.named(name)
    image = masks.image_index(group)
    group8 = group.to(torch.uint8)
    block = {"BLOCK_R": 16, "BLOCK_S": 32}
    clauses = [int(number) for clause in mask.clauses for number in clause]
    tokens = [group8[:, 10:].contiguous(), group8, image[:, 10:].contiguous(), image]
    order, full, some = triton_prefill.tiles(clauses, tokens, 10, block)
    matrix = masks.materialise(mask, group, rows=range(10, 100))[:, 0]
    if name in ("causal", "modality-mutual", "sliding:9"):
        assert int(full.sum() + some.sum()) < order.numel()
    for b in range(2):
        for i in range(order.shape[1]):
            found = [matrix[b, 16 * i : 16 * i + 16, 32 * j : 32 * j + 32] for j in order[b, i].tolist()]
            kinds = [2 if bool(tile.all()) and tile.shape[1] == 32 else 1 if bool(tile.any()) else 0 for tile in found]
            assert kinds == [2] * int(full[b, i]) + [1] * int(some[b, i]) + [0] * kinds.count(0)


@needs_triton
def test_hidden_tiles_are_not_read() -> None:
    """Keys of tiles that no row sees may hold anything: they cost nothing because they are never loaded."""
    tensors, group = problem(batch=1, length=300, rows=40)
    wanted = masked_attention(*tensors, masks.named("sliding:9"), group, scale=0.25, backend="triton")
    for tensor in tensors[1:]:
        tensor[:, :, :128] = float("nan")
    got = masked_attention(*tensors, masks.named("sliding:9"), group, scale=0.25, backend="triton")
    assert torch.equal(got, wanted)


@pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=needs_triton)])
def test_one_causal_prompt_is_plain_attention(backend: str) -> None:
    tensors, _ = problem(batch=1)
    group = torch.zeros(1, 75, dtype=torch.uint8, device=DEVICE)
    got = masked_attention(*tensors, masks.causal, group, scale=0.25, backend=backend)
    wanted = scaled_dot_product_attention(*tensors, is_causal=True, scale=0.25, enable_gqa=True)
    assert torch.allclose(got, wanted, atol=3e-6)


@pytest.mark.parametrize("name", NAMES)
def test_sdpa_agrees(name: str) -> None:
    tensors, group = problem()
    got = masked_attention(*tensors, masks.named(name), group, scale=0.25, backend="sdpa")
    wanted = masked_attention(*tensors, masks.named(name), group, scale=0.25, backend="reference")
    assert torch.allclose(got, wanted, atol=3e-6)


@needs_triton
def test_compiles_without_a_graph_break() -> None:
    tensors, group = problem(length=40)

    def run(*tensors: Tensor) -> Tensor:
        return masked_attention(*tensors, masks.modality_mutual, group, scale=0.25, backend="triton")

    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors), atol=1e-6)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": torch.zeros(2, 5).byte()}, r"group \[2, 5\] must be \[1, up to 5\]"),
        ({"group": torch.zeros(1, 6).byte()}, r"group \[1, 6\] must be \[1, up to 5\]"),
        ({"group": torch.zeros(1, 5)}, "group must be .* of integers"),
        ({"first": 3}, "first=3: 3 rows must lie within the 5 columns"),
        ({"row_group": torch.zeros(1, 4).byte()}, r"row_group \[1, 4\] must be \[1, 3\]"),
        ({"score_from": torch.zeros(2).long()}, r"score_from \[2\] must be an integer or \[1\]"),
    ],
)
def test_wrong_input(change: dict[str, Any], words: str) -> None:
    options = {"group": torch.zeros(1, 5).byte(), "scale": 1.0, **change}
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8)
    with pytest.raises(ValueError, match=words):
        masked_attention(query, key, key, masks.causal, **options)


def test_what_a_backend_refuses() -> None:
    query, key = torch.randn(1, 2, 3, 8), torch.randn(1, 1, 5, 8)
    group = torch.zeros(1, 5).byte()
    with pytest.raises(RuntimeError, match="'sdpa' cannot run this masked_attention: score is asked for"):
        masked_attention(query, key, key, masks.causal, group, scale=1.0, score=Score(), backend="sdpa")
    many = masks.or_(*(masks.and_(masks.causal, masks.sliding(n)) for n in range(1, 6)))
    with pytest.raises(RuntimeError, match="the mask has 5 clauses, allowed are 4"):
        masked_attention(query, key, key, many, group, scale=1.0, backend="triton")
