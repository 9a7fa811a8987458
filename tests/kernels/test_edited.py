# SPDX-License-Identifier: Apache-2.0
"""Edited attention against its segmented twin, and both against what they must mean."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from vlm_attn.kernels import (
    Edit,
    ScoreEdit,
    attention_rows,
    combine,
    edited_attention,
    one_hot_segments,
    segmented_attention,
)


def close(got: Tensor, wanted: Tensor, tolerance: float = 2e-6) -> None:
    assert got.shape == wanted.shape
    assert got.isfinite().all()
    assert (got.double() - wanted.double()).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@st.composite
def problems(draw: st.DrawFn) -> dict:
    """Shapes, a partition with empty groups, masks of both kinds with fully hidden rows, log weights, perhaps a twin."""
    kv_heads, ratio = draw(st.sampled_from([(1, 1), (2, 1), (2, 2), (1, 7), (2, 7), (3, 4)]))
    batch, rows = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    length, dim = draw(st.integers(1, 40)), draw(st.sampled_from([1, 3, 8, 16]))
    count = draw(st.integers(1, 4))
    seed = draw(st.integers(0, 2**31 - 1))
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    used = draw(st.integers(1, count))  # groups from here on stay empty
    ids = torch.randint(used, (batch, length), generator=generator)
    twin = draw(st.sampled_from([None, 0, count - 1]))
    log_weight = normal(batch, length) if twin is not None else None
    visible = torch.rand(draw(st.sampled_from([batch, 1])), 1, rows, length, generator=generator) > 0.3
    if draw(st.booleans()):
        visible[0, 0, draw(st.integers(0, rows - 1))] = False
    return {
        "query": normal(batch, kv_heads * ratio, rows, dim) * 2,
        "key": normal(batch, kv_heads, length, dim),
        "value": normal(batch, kv_heads, length, dim),
        "segments": one_hot_segments(ids, count, twin_of=twin, log_weight=log_weight),
        "visible": visible,
        "kind": draw(st.sampled_from(["none", "bool", "additive"])),
        "weight": normal(batch, kv_heads * ratio, rows, count + (twin is not None)),
        "scale": dim**-0.5,
    }


@settings(max_examples=150, deadline=None)
@given(problems())
def test_matches_the_twin_in_double(problem: dict) -> None:
    query, key, value, segments = (problem[name] for name in ("query", "key", "value", "segments"))
    visible = None if problem["kind"] == "none" else problem["visible"]
    mask = visible
    if problem["kind"] == "additive":
        mask = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(torch.float32).min)
    weight = problem["weight"]
    got = edited_attention(
        query, key, value, [Edit(segments, lambda _: weight.exp())], mask=mask, scale=problem["scale"]
    )
    double = [t.double() for t in (query, key, value)]
    lse, out = segmented_attention(*double, segments.double(), mask=visible, scale=problem["scale"])
    wanted = combine(lse, out, weight.double())
    close(got, wanted, 2e-5)
    if visible is not None:
        hidden = ~visible.any(-1).expand(len(query), query.shape[1], -1)
        assert not got[hidden].any()
    # The masses the policy sees are those of the twin.
    seen: list[Tensor] = []
    edited_attention(
        query, key, value, [Edit(segments, lambda m: seen.append(m) or torch.ones_like(m))], mask=mask,
        scale=problem["scale"],
    )  # fmt: skip
    total = torch.logsumexp(
        segmented_attention(
            *double, torch.ones(len(query), key.shape[2], 1).double(), mask=visible, scale=problem["scale"]
        )[0],
        -1,
        keepdim=True,
    )
    close(seen[0], (lse - total).exp().nan_to_num(0.0), 2e-5)


@pytest.mark.parametrize("heads", [(4, 4), (4, 2), (14, 2), (28, 4)])
@pytest.mark.parametrize("rows", [1, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weight_one_is_plain_attention(heads: tuple[int, int], rows: int, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    query = torch.randn(2, heads[0], rows, 8).to(dtype)
    key, value = torch.randn(2, 2, heads[1], 11, 8).to(dtype)
    edit = Edit(torch.ones(2, 11, 1), torch.ones_like)
    got = edited_attention(query, key, value, [edit], scale=8**-0.5)
    assert got.dtype == dtype
    plain = [t.double() for t in (query, key, value)]
    wanted = scaled_dot_product_attention(*plain, enable_gqa=True)
    close(got, wanted, 2e-6 if dtype == torch.float32 else 2e-2)
    lse, out = segmented_attention(*plain, torch.ones(2, 11, 1).double(), scale=8**-0.5)
    close(combine(lse, out, torch.zeros(())), wanted, 1e-12)


@pytest.mark.parametrize("copies", [2, 7])
def test_log_n_is_n_copies(copies: int) -> None:
    """A key with bias log n counts as n keys (as token merging and compensation tokens need it)."""
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 14, 3, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    ids = torch.tensor([[0, 0, 1, 0, 0, 0]])
    policy = lambda mass: torch.tensor([1.0, copies]).expand_as(mass)  # noqa: E731
    got = edited_attention(query, key, value, [Edit(one_hot_segments(ids, 2), policy)], scale=0.4)
    index = torch.tensor([0, 1, *[2] * copies, 3, 4, 5])
    wanted = scaled_dot_product_attention(query, key[:, :, index], value[:, :, index], scale=0.4, enable_gqa=True)
    close(got, wanted)
    # The same through a membership of n.
    members = torch.tensor([[[1.0], [1.0], [copies], [1.0], [1.0], [1.0]]])
    close(edited_attention(query, key, value, [Edit(members, torch.ones_like)], scale=0.4), wanted)


def test_weight_zero_removes_keys() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 4, 2, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    ids = torch.tensor([[0, 1, 1, 0, 0, 1]])
    policy = lambda mass: torch.tensor([1.0, 0.0]).expand_as(mass)  # noqa: E731
    got = edited_attention(query, key, value, [Edit(one_hot_segments(ids, 2), policy)], scale=0.4)
    kept = [0, 3, 4]
    close(got, scaled_dot_product_attention(query, key[:, :, kept], value[:, :, kept], scale=0.4, enable_gqa=True))


def test_multiply_and_renormalise_is_a_bias() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 6, 3, 8), torch.randn(2, 3, 9, 8), torch.randn(2, 3, 9, 8)
    ids = torch.randint(3, (2, 9))
    weight = torch.randn(2, 6, 3, 3)
    got = edited_attention(query, key, value, [Edit(one_hot_segments(ids, 3), lambda _: weight.exp())], scale=0.5)
    bias = weight.gather(3, ids[:, None, None].expand(-1, 6, 3, -1))
    wanted = scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=0.5, enable_gqa=True)
    close(got, wanted)


def test_two_edits_multiply_and_both_see_the_plain_masses() -> None:
    torch.manual_seed(0)
    query, key, value = torch.randn(1, 2, 1, 8), torch.randn(1, 2, 6, 8), torch.randn(1, 2, 6, 8)
    first, second = torch.tensor([[0, 1, 1, 0, 0, 0]]), torch.tensor([[0, 0, 1, 1, 1, 0]])
    seen = []

    def policy(weight: float):
        def weigh(mass: Tensor) -> Tensor:
            seen.append(mass)
            return torch.tensor([1.0, math.exp(weight)]).expand_as(mass)

        return weigh

    edits = [Edit(one_hot_segments(first, 2), policy(1.0)), Edit(one_hot_segments(second, 2), policy(-2.0))]
    got = edited_attention(query, key, value, edits, scale=0.5)
    bias = first * 1.0 + second * -2.0
    close(got, scaled_dot_product_attention(query, key, value, attn_mask=bias[:, None, None], scale=0.5))
    plain = attention_rows(query, key, scale=0.5)
    close(seen[1], plain @ one_hot_segments(second, 2)[:, None])


@pytest.mark.parametrize("edited", [False, True])
@pytest.mark.parametrize("of", ["magnitude", "head_mean", "logit"])
@pytest.mark.parametrize("backend", ["grouped", "sdpa", "reference"])
def test_score_edits(backend: str, of: str, edited: bool) -> None:
    """After the softcap, before mask and bias, one after the other; on every backend what the equations say."""
    torch.manual_seed(0)
    query, key, value = torch.randn(2, 4, 3, 8) * 3, torch.randn(2, 2, 9, 8), torch.randn(2, 2, 9, 8)
    softcap = None if backend == "sdpa" else 5.0
    mask = torch.rand(2, 1, 3, 9) > 0.3
    weight, other = torch.randn(2, 7), torch.rand(2, 7)
    logits = query.double() @ key.double().repeat_interleave(2, 1).transpose(2, 3) * 0.3
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    for w, how in ((weight, of), (other, "magnitude")):
        w = torch.nn.functional.pad(w, (0, 2)).double()[:, None, None]
        size = logits if how == "logit" else logits.abs()
        logits = logits + w * (size.mean(1, keepdim=True) if how == "head_mean" else size)
    logits = logits.masked_fill(~mask, -math.inf)
    edits: list = [ScoreEdit(weight, of), ScoreEdit(other)]
    if edited:
        ids = torch.randint(2, (2, 9))
        edits.insert(
            1, Edit(one_hot_segments(ids, 2), lambda mass: torch.stack([1 + mass[..., 1], 2 - mass[..., 1]], -1))
        )
        inside = (logits.softmax(-1) * ids[:, None, None]).sum(-1, keepdim=True)
        logits = logits + torch.where(ids[:, None, None] == 1, 2 - inside, 1 + inside).log()
    wanted = logits.softmax(-1) @ value.double().repeat_interleave(2, 1)
    got = edited_attention(query, key, value, edits, mask=mask, scale=0.3, softcap=softcap, backend=backend)
    close(got, wanted, 1e-5)


def test_softcap() -> None:
    torch.manual_seed(0)
    query, key = torch.randn(1, 2, 3, 8) * 4, torch.randn(1, 1, 5, 8)
    scores = (query.double() @ key.double().transpose(2, 3)) * 0.5
    wanted = (2.0 * torch.tanh(scores / 2.0)).softmax(-1)
    close(attention_rows(query, key, scale=0.5, softcap=2.0), wanted)
    assert (attention_rows(query, key, scale=0.5) - wanted).abs().max() > 0.1


@pytest.mark.parametrize("kind", ["bool", "additive", "half"])
def test_hidden_rows_are_zeros(kind: str) -> None:
    query, key, value = torch.randn(1, 2, 2, 8), torch.randn(1, 2, 4, 8), torch.randn(1, 2, 4, 8)
    visible = torch.tensor([[True, True, False, False], [False] * 4])[None, None]
    dtype = torch.float16 if kind == "half" else torch.float32
    mask = (
        visible
        if kind == "bool"
        else torch.zeros(visible.shape, dtype=dtype).masked_fill(~visible, torch.finfo(dtype).min)
    )
    rows = attention_rows(query, key, mask=mask, scale=0.5)
    assert not rows[:, :, 1].any()
    assert not rows[:, :, 0, 2:].any()
    got = edited_attention(query, key, value, [Edit(torch.ones(1, 4, 1), torch.ones_like)], mask=mask, scale=0.5)
    assert not got[:, :, 1].any()
    close(got[:, :, :1], scaled_dot_product_attention(query[:, :, :1], key[:, :, :2], value[:, :, :2], scale=0.5))


def test_mask_longer_than_the_keys() -> None:
    query, key = torch.randn(1, 1, 1, 4), torch.randn(1, 1, 3, 4)
    mask = torch.tensor([[[[True, False, True, True, True]]]])
    assert attention_rows(query, key, mask=mask, scale=1.0).shape == (1, 1, 1, 3)


def test_head_ratio_is_checked() -> None:
    query, key = torch.randn(1, 5, 1, 4), torch.randn(1, 2, 3, 4)
    with pytest.raises(ValueError, match="5 heads.*2 heads"):
        edited_attention(query, key, key, [], scale=1.0)


class TestColumns:
    """Where keys stand relative to the prompt."""

    edit = Edit(one_hot_segments(torch.tensor([[1, 2, 1, 2]]), 3), torch.ones_like)

    def ids(self, length: int, offset: int | Tensor) -> list[int]:
        own = Edit(self.edit.segments.clone(), torch.ones_like)
        found = own.over(length, offset)
        assert found.sum(-1).eq(1).all()
        return found[0].argmax(-1).tolist()

    @pytest.mark.parametrize("as_tensor", [False, True])
    @pytest.mark.parametrize(
        ("length", "offset", "wanted"),
        [
            (2, 0, [1, 2]),
            (4, 0, [1, 2, 1, 2]),
            (7, 0, [1, 2, 1, 2, 0, 0, 0]),
            (3, 2, [1, 2, 0]),
            (3, 4, [0, 0, 0]),
            (2, 300, [0, 0]),
        ],
    )
    def test_over(self, length: int, offset: int, wanted: list[int], as_tensor: bool) -> None:
        assert self.ids(length, torch.tensor(offset) if as_tensor else offset) == wanted

    def test_growing(self) -> None:
        own = Edit(self.edit.segments.clone(), torch.ones_like)
        for length in range(4, 200):
            found = own.over(length)
            assert found.shape == (1, length, 3)
            assert found[0].argmax(-1).tolist() == [1, 2, 1, 2] + [0] * (length - 4)

    def test_twin(self) -> None:
        weight = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
        found = one_hot_segments(torch.tensor([[1, 0, 1, 0]]), 2, twin_of=1, log_weight=weight)
        wanted = [[0, 1, 1], [1, 0, 0], [0, 1, math.exp(2)], [1, 0, 0]]
        close(found[0], torch.tensor(wanted))


@pytest.mark.parametrize("partition", [-1, 4])
def test_a_partition_of_segments_that_are_not_there(partition: int) -> None:
    with pytest.raises(ValueError, match=f"partition={partition}: allowed are 0 .* to 3"):
        Edit(torch.ones(1, 5, 3), torch.ones_like, partition=partition)
