# SPDX-License-Identifier: Apache-2.0
"""Masked attention against its twin in float64; see ``test_triton_segmented.py`` for what is allowed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_attn.kernels import Group, Score, masked_attention, masks, one_hot_segments

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
    got = masked_attention(*tensors, mask, group, lse=True, **options, backend="triton")
    exact = (t.double() for t in tensors)
    wanted = masked_attention(*exact, mask, group, lse=True, **options, backend="reference")
    plain = masked_attention(*tensors, mask, group, lse=True, **options, backend="reference")
    assert got.out.dtype == dtype
    for one, two, three in zip(got, wanted, plain, strict=True):
        assert (one is None) == (two is None)
        if one is not None:
            as_good(one, two, three, dtype)


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


@pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=needs_triton)])
@pytest.mark.parametrize("ordered", [True, False], ids=["causal", "non-causal"])
@pytest.mark.parametrize("cross", [False, True], ids=["self", "cross"])
def test_four_patterns(cross: bool, ordered: bool, backend: str) -> None:
    """Self and cross attention, each with and without causal order, against the softmax written out; GQA, padded keys.

    In causal cross attention the rows stand beside the keys, here from column 4 on, and see those that came before.
    """
    tensors, _ = problem(heads=(6, 2), rows=20, length=33)
    group = torch.full((2, 33), int(Group.VISUAL), device=DEVICE)
    group[1, :7] = int(Group.PAD)
    where: dict[str, Any] = {"first": 13}
    if cross:
        where = {"first": 4, "row_group": torch.full((2, 20), int(Group.QUERY), device=DEVICE)}
    mask = masks.causal if ordered else masks.full
    got = masked_attention(*tensors, mask, group, scale=0.25, backend=backend, **where)
    query, key, value = (t.double() for t in tensors)
    seen = (group != int(Group.PAD))[:, None, None].expand(2, 1, 20, 33)
    if ordered:
        columns = where["first"] + torch.arange(20, device=DEVICE)
        seen = seen & (torch.arange(33, device=DEVICE) <= columns[:, None])
    logits = query @ key.repeat_interleave(3, 1).mT * 0.25
    wanted = logits.masked_fill(~seen, -torch.inf).softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(3, 1)
    assert torch.allclose(got.double(), wanted, atol=3e-6)
    assert wanted[1, :, 0].any() == (not (cross and ordered))  # row 0 sees padding only


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_packed_prompts(name: str, dtype: torch.dtype) -> None:
    """Three prompts in a row, one of them empty, and each of them alone."""
    starts = torch.tensor([0, 31, 31, 75], device=DEVICE)
    tensors, group = problem(dtype=dtype, batch=1)
    document, mask = masks.documents(starts), masks.named(name)
    check(tensors, group, mask, dtype, document=document)
    check([tensors[0][:, :, :20], *tensors[1:]], group, mask, dtype, document=document, first=21)
    packed = masked_attention(*tensors, mask, group, document=document, scale=0.25, backend="triton")
    image = masks.image_index(group)
    for first, last in ((0, 31), (31, 75)):
        one = [t[:, :, first:last] for t in tensors]
        where = {"image": image[:, first:last], "scale": 0.25, "backend": "triton"}
        alone = masked_attention(*one, mask, group[:, first:last], **where)
        assert torch.allclose(packed[:, :, first:last], alone, atol=5 * torch.finfo(dtype).eps)


@needs_triton
def test_packed_cross_attention() -> None:
    """Rows of three texts, of which the second has no image, look at the pictures of their own."""
    tensors, _ = problem(rows=20, length=33)
    group = torch.full((2, 33), int(Group.VISUAL), device=DEVICE)
    text = torch.full((2, 20), int(Group.QUERY), device=DEVICE)
    pictures = masks.documents(torch.tensor([0, 10, 10, 33], device=DEVICE)).expand(2, -1)
    rows = masks.documents(torch.tensor([0, 5, 12, 20], device=DEVICE)).expand(2, -1)
    where = {"row_group": text, "row_document": rows, "document": pictures}
    check(tensors, group, masks.full, torch.float32, **where)
    out = masked_attention(*tensors, masks.full, group, scale=1.0, backend="triton", **where)
    assert not out[:, :, 5:12].any()
    assert out[:, :, :5].all()


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["causal", "modality-mutual", "full"])
def test_masses_sums_and_bias_in_one_call(name: str, dtype: torch.dtype) -> None:
    """With everything before them: a score function, documents, log weights that hide keys."""
    tensors, group = problem(dtype=dtype, length=100, rows=70, batch=2)
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(2, 100, generator=generator)
    weight[:, ::7] = -torch.inf
    ids = torch.randint(3, (2, 100), generator=generator)
    options = {
        "log_weight": weight.to(DEVICE),
        "segments": one_hot_segments(ids, 3, twin_of=1, log_weight=weight.abs().clamp_max(2)).to(DEVICE),
        "summed": (torch.rand(2, 70, generator=generator) > 0.7).to(DEVICE),
        "score": Score(0.3, 1.1, 0.9),
        "score_from": 50,
        "softcap": 4.0,
    }
    check(tensors, group, masks.named(name), dtype, **options)
    packed = masks.documents(torch.tensor([0, 40, 100], device=DEVICE)).expand(2, -1)
    check(tensors, group, masks.named(name), dtype, **options, document=packed)


@needs_triton
@pytest.mark.filterwarnings("ignore:All-NaN slice")
def test_sums_are_of_their_rows_only() -> None:
    """Rows that are not summed may hold anything: where a whole tile has none, it is not read again."""
    tensors, group = problem(batch=1, length=200, rows=200)
    summed = torch.zeros(1, 200, dtype=torch.bool, device=DEVICE)
    summed[:, 150:170] = True
    options: dict[str, Any] = {"scale": 0.25, "summed": summed}
    wanted = masked_attention(*tensors, masks.causal, group, **options, backend="reference").column_sum
    tensors[0][:, :, :128] = float("nan")
    got = masked_attention(*tensors, masks.causal, group, **options, backend="triton").column_sum
    assert torch.allclose(got, wanted, atol=1e-5)
    assert not got[..., 170:].any()


@pytest.mark.parametrize("backend", ["sdpa", "reference", pytest.param("triton", marks=needs_triton)])
def test_log_n_is_n_copies(backend: str) -> None:
    tensors, _ = problem(batch=1, length=6, rows=2)
    group = torch.zeros(1, 6, dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([0, 0, 0, 1, 2, 4, 5], device=DEVICE)
    weight = torch.tensor([[3.0, 1.0, 1.0, 0.0, 1.0, 1.0]], device=DEVICE).log()
    got = masked_attention(*tensors, masks.full, group, scale=0.4, log_weight=weight, backend=backend)
    copies = [tensors[0], *(t[:, :, index] for t in tensors[1:])]
    wanted = scaled_dot_product_attention(*copies, scale=0.4, enable_gqa=True)
    assert torch.allclose(got, wanted, atol=2e-6)


@pytest.mark.parametrize("backend", ["sdpa", "reference"])
def test_gradients(backend: str) -> None:
    tensors, group = problem(heads=(2, 1), length=9, dim=4, dtype=torch.float64)
    weight = torch.randn(2, 9, dtype=torch.float64, device=DEVICE)
    group[1, :5] = int(Group.PAD)  # rows that see nothing

    def run(*tensors: Tensor) -> Tensor:
        *qkv, weight = tensors
        return masked_attention(*qkv, masks.modality_mutual, group, scale=0.5, log_weight=weight, backend=backend)

    leaves = [t.requires_grad_() for t in (*tensors, weight)]
    assert torch.autograd.gradcheck(run, leaves)
    assert run(*leaves).abs().sum() > 1


@needs_triton
@settings(
    max_examples=300,
    derandomize=True,  # as in test_probe.py
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_any_shape(data: st.DataObject) -> None:
    dtype = data.draw(st.sampled_from(DTYPES))
    length = data.draw(st.integers(1, 100))
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
    generator = torch.Generator().manual_seed(length)
    options: dict[str, Any] = {
        "first": data.draw(st.integers(0, length - rows)),
        "softcap": data.draw(st.sampled_from([None, 3.0])),
    }
    if data.draw(st.booleans()):
        cut = data.draw(st.integers(0, prompt))
        document = masks.documents(torch.tensor([0, cut, prompt])).expand(len(group), -1)
        options["document"] = document.to(DEVICE)
    if data.draw(st.booleans()):
        ids = torch.randint(3, (len(group), length), generator=generator)
        options["segments"] = one_hot_segments(ids, 3).to(DEVICE)
        options["summed"] = (torch.rand(1, rows, generator=generator) > 0.5).to(DEVICE)
    if data.draw(st.booleans()):
        options["log_weight"] = torch.randn(1, length, generator=generator).to(DEVICE)
    check(tensors, group[:, :prompt], mask, dtype, **options)


@needs_triton
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_tiles_hold_what_the_matrix_holds(name: str, packed: bool) -> None:
    from vlm_attn.kernels import triton_prefill

    _, group = problem(length=100)
    mask = masks.named(name)
    image = masks.image_index(group)
    group8 = group.to(torch.uint8)
    block = {"BLOCK_R": 16, "BLOCK_S": 32}
    clauses = [int(number) for clause in mask.clauses for number in clause]
    tokens = [group8[:, 10:].contiguous(), group8, image[:, 10:].contiguous(), image]
    if packed:
        document = masks.documents(torch.tensor([0, 21, 60, 100], device=DEVICE)).expand(2, -1).contiguous()
        tokens += [document[:, 10:].contiguous(), document]
    order, full, some, state = triton_prefill.tiles(clauses, tokens, 10, block)
    matrix = masks.materialise(mask, group, document=tokens[5] if packed else None, rows=range(10, 100))[:, 0]
    assert torch.equal(state.gather(2, order.long()), state.sort(-1, descending=True).values)
    if packed or name in ("causal", "modality-mutual", "sliding:9"):
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


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("heads", "length"), [((28, 4), 1100), ((8, 8), 700)])
def test_device_sizes(heads: tuple[int, int], length: int, dtype: torch.dtype) -> None:
    tensors, group = problem(heads=heads, length=length, dim=128, dtype=dtype)
    ids = torch.randint(3, (2, length), device=DEVICE)
    options: dict[str, Any] = {
        "segments": one_hot_segments(ids, 3),
        "summed": ids == 1,
        "document": masks.documents(torch.tensor([0, length // 3, length], device=DEVICE)).expand(2, -1),
    }
    for name in ("causal", "modality-mutual", "vision-block"):
        check(tensors, group, masks.named(name), dtype)
        check(tensors, group, masks.named(name), dtype, **options)


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
        found = masked_attention(*tensors, masks.modality_mutual, group, scale=0.25, **options, backend="triton")
        return found.out + found.lse[..., None] + found.mass.sum(-1, keepdim=True) + found.column_sum[..., None]

    options: dict[str, Any] = {
        "lse": True,
        "segments": torch.ones(1, 40, 2, device=DEVICE),
        "summed": torch.ones(1, 40, dtype=torch.bool, device=DEVICE),
        "log_weight": torch.ones(1, 40, device=DEVICE),
        "document": torch.zeros(2, 40, dtype=torch.int32, device=DEVICE),
    }
    assert torch.allclose(torch.compile(run, fullgraph=True, backend="aot_eager")(*tensors), run(*tensors), atol=1e-5)


@needs_triton
@pytest.mark.parametrize("full", [False, True])
def test_registered(full: bool) -> None:
    """Schema and fake implementation say what the operation does."""
    from vlm_attn.kernels import ops

    tensors, group = problem(length=40)
    group, image = group.to(torch.uint8), masks.image_index(group)
    tokens = [group, group.clone(), image, image.clone()]
    clauses = [int(number) for clause in masks.croc.clauses for number in clause]
    rest: list[Any] = [None] * 6
    if full:
        tokens += [torch.zeros_like(image), torch.zeros_like(image)]
        ones = torch.ones(2, 40, device=DEVICE)
        rest = [3.0, [0.1, 1.0, 1.0], torch.zeros(2).long().to(DEVICE), ones, ones[..., None], ones > 0]
    arguments = (*tensors, clauses, tokens, 0, 0.25, *rest)
    torch.library.opcheck(ops.masked_attention, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"group": torch.zeros(2, 5).byte()}, r"group \[2, 5\] must be \[1, up to 5\]"),
        ({"group": torch.zeros(1, 6).byte()}, r"group \[1, 6\] must be \[1, up to 5\]"),
        ({"group": torch.zeros(1, 5)}, "group must be .* of integers"),
        ({"first": 3}, "first=3: 3 rows must lie within the 5 columns"),
        ({"row_group": torch.zeros(1, 4).byte()}, r"row_group \[1, 4\] must be \[1, 3\]"),
        ({"document": torch.zeros(1, 4).int()}, r"document must be integers of group's shape \[1, 5\], got \[1, 4\]"),
        ({"row_document": torch.zeros(1, 3).int()}, "row_document is for rows that are no keys"),
        ({"row_group": torch.zeros(1, 3).byte(), "document": torch.zeros(1, 5).int()}, "both or neither"),
        ({"log_weight": torch.zeros(5)}, r"log_weight \[5\] torch.float32 must be \[1 or 1, 5\]"),
        ({"log_weight": torch.zeros(1, 5).int()}, "log_weight .* of floating point"),
        ({"segments": torch.ones(1, 5, 9)}, "segments has 9 columns: allowed are 8"),
        ({"segments": torch.ones(1, 4, 2)}, r"segments \[1, 4, 2\] must be \[1 or 1, 5, N\]"),
        ({"summed": torch.ones(1, 5) > 0}, r"summed \[1, 5\] torch.bool must be \[1 or 1, 3\] of bool"),
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
    rows = torch.ones(1, 3, dtype=torch.bool)
    with pytest.raises(RuntimeError, match="'sdpa' cannot run this masked_attention: lse, summed is asked for"):
        masked_attention(query, key, key, masks.causal, group, scale=1.0, lse=True, summed=rows, backend="sdpa")
    many = masks.or_(*(masks.and_(masks.causal, masks.sliding(n)) for n in range(1, 6)))
    with pytest.raises(RuntimeError, match="the mask has 5 clauses, allowed are 4"):
        masked_attention(query, key, key, many, group, scale=1.0, backend="triton")
