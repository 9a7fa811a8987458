# SPDX-License-Identifier: Apache-2.0
"""Several edits as one, and score edits in the segmented kernel, against the reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_attn.hallucination import Gift, Var
from vlm_attn.kernels import Edit, ScoreEdit, edited_attention, merged, one_hot_segments

from .running import DEVICE, DTYPES, as_good, needs_triton, poisoned  # noqa: F401  (a fixture)


def normal(generator: torch.Generator, *size: int) -> Tensor:
    return torch.randn(*size, generator=generator)


def policy(seed: int, count: int) -> Any:
    """Weights of a segment that depend on every mass the policy sees."""
    factor = torch.rand(count, count, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    return lambda mass: 0.5 + mass @ factor.to(mass)


def edits_of(generator: torch.Generator, batch: int, length: int, counts: list[tuple[int, bool]]) -> list[Edit]:
    """An edit for every number of segments, with a twin or without; the last ones cover fewer columns."""
    found = []
    for n, (count, twin) in enumerate(counts):
        columns = max(1, length - n)
        ids = torch.randint(count, (batch, columns), generator=generator)
        weight = normal(generator, batch, columns) if twin else None
        segments = one_hot_segments(ids, count, twin_of=count - 1 if twin else None, log_weight=weight)
        found.append(Edit(segments.to(DEVICE), policy(n, segments.shape[2])))
    return found


def inputs(
    generator: torch.Generator, heads: tuple[int, int], batch: int, rows: int, length: int, dtype: torch.dtype
) -> tuple[list[Tensor], Tensor]:
    sizes = ((heads[0], rows), (heads[1], length), (heads[1], length))
    tensors = [normal(generator, batch, *size, 8).to(dtype).to(DEVICE) for size in sizes]
    mask = torch.rand(batch, 1, rows, length, generator=generator) > 0.3
    return tensors, mask.to(DEVICE)


def check(tensors: list[Tensor], edits: list[Any], options: dict[str, Any], one: list[Any] | None = None) -> None:
    """Triton runs ``one`` (default: the edits as they are) and must come close to the edits in float64."""
    dtype = tensors[0].dtype
    got = edited_attention(*tensors, edits if one is None else one, **options, backend="triton")
    exact = edited_attention(*(t.double() for t in tensors), edits, **options, backend="reference")
    plain = edited_attention(*tensors, edits, **options, backend="grouped")
    assert got.dtype == dtype
    as_good(got, exact, plain, dtype)


def test_product_of_gift_and_var() -> None:
    """Both methods' own policies: eight products where they can all occur, every one in one pass."""
    generator = torch.Generator().manual_seed(0)
    tensors, mask = inputs(generator, (4, 2), 1, 2, 40, torch.float32)
    visual, sink = torch.arange(36)[None] % 40 < 20, torch.arange(36)[None] % 5 == 0
    question = torch.arange(36)[None] >= 30
    saliency = torch.rand(1, 36, generator=generator)
    gift = one_hot_segments(visual + 2 * question, 3, twin_of=1, log_weight=5 * saliency)
    var = one_hot_segments((visual & ~sink) + 2 * (~visual & sink) + 3 * (visual & sink), 4)
    edits = [
        Edit(gift.to(DEVICE), Gift().reweigh),
        Edit(var.to(DEVICE), Var(rho=0.1, visual_floor=0.0).reweigh, conserves=True),
    ]
    one = merged(edits)
    assert one is not None
    assert one.segments.shape[2] == 8
    for backend in ("grouped", "sdpa", "reference"):
        options = {"mask": mask, "scale": 0.5, "backend": backend}
        wanted = edited_attention(*tensors, edits, **options)
        assert torch.allclose(edited_attention(*tensors, [one], **options), wanted, atol=2e-6)
        assert not torch.allclose(edited_attention(*tensors, edits[:1], **options), wanted, atol=1e-3)


def test_what_cannot_be_merged() -> None:
    ids = torch.arange(60)[None]
    three = Edit(one_hot_segments(ids % 3, 3), torch.ones_like)
    assert merged([three, Edit(one_hot_segments(ids % 2, 2), torch.ones_like)]).segments.shape[2] == 6
    assert merged([three, Edit(one_hot_segments(ids % 5, 5), torch.ones_like)]) is None  # 15 products
    overlapping = Edit(torch.ones(1, 60, 3), torch.ones_like)
    assert merged([three, overlapping]) is None
    assert merged([three, three]).segments.shape[2] == 3  # of nine, six hold no key


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_merged_is_all_of_them(data: st.DataObject) -> None:
    """On the CPU's path too: what is merged is what the edits are one after the other."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    batch, length = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 40))
    counts = data.draw(st.lists(st.tuples(st.integers(1, 3), st.booleans()), min_size=2, max_size=3))
    edits = edits_of(generator, batch, length, counts)
    tensors, mask = inputs(generator, (2, 1), batch, 2, length + 2, torch.float64)
    one = merged(edits, most=64)
    assert one is not None
    wanted = edited_attention(*tensors, edits, mask=mask, scale=0.4, offset=1, backend="reference")
    got = edited_attention(*tensors, [one], mask=mask, scale=0.4, offset=1, backend="reference")
    assert torch.allclose(got, wanted, atol=1e-5)  # masses are float32


@needs_triton
@settings(
    max_examples=100,
    deadline=None,
    phases=[Phase.generate],
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.data())
def test_one_pass_of_triton(data: st.DataObject) -> None:
    """Merged edits, a score edit or both."""
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31 - 1)))
    dtype = data.draw(st.sampled_from(DTYPES))
    batch, length, rows = data.draw(st.integers(1, 2)), data.draw(st.integers(1, 80)), data.draw(st.integers(1, 3))
    tensors, mask = inputs(generator, data.draw(st.sampled_from([(1, 1), (3, 1), (2, 2)])), batch, rows, length, dtype)
    counts = data.draw(st.sampled_from([[], [(2, True), (2, False)], [(1, True), (2, True)], [(2, False)] * 3]))
    weighed: list[Any] = edits_of(generator, batch, length, counts)
    scores: list[Any] = []
    if not weighed or data.draw(st.booleans()):
        weight = normal(generator, batch, data.draw(st.integers(1, length))).to(DEVICE)
        start = data.draw(st.sampled_from([None, 0, 11]))
        scores = [ScoreEdit(weight, data.draw(st.sampled_from(["magnitude", "logit", "head_mean"])), from_row=start)]
    one = [merged(weighed)] if weighed else []
    assert None not in one
    options = {
        "mask": data.draw(st.sampled_from([None, mask])),
        "scale": 0.4,
        "softcap": data.draw(st.sampled_from([None, 3.0])),
        "offset": data.draw(st.sampled_from([0, 2, torch.tensor(2, device=DEVICE)])),
        "row": data.draw(st.sampled_from([10, torch.tensor(10, device=DEVICE)])),
    }
    check(tensors, [*scores, *weighed], options, [*scores, *one])


@needs_triton
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("of", ["magnitude", "logit", "head_mean"])
def test_score_edit_in_double(of: Any, dtype: torch.dtype) -> None:
    """Written out: ``softmax(s + w |s|)``, ``softmax(s + w s)`` or ``softmax(s + w mean_h |s|)`` from a row on."""
    generator = torch.Generator().manual_seed(0)
    tensors, mask = inputs(generator, (6, 2), 2, 3, 50, dtype)
    weight = normal(generator, 2, 44).to(DEVICE)
    edit = ScoreEdit(weight, of, from_row=48)
    got = edited_attention(*tensors, [edit], mask=mask, scale=0.5, row=47, backend="triton")
    query, key, value = (t.double() for t in tensors)
    logits = query @ key.repeat_interleave(3, 1).mT * 0.5
    w = torch.nn.functional.pad(weight.double(), (0, 6))[:, None, None].repeat(1, 1, 3, 1)
    w[:, :, 0] = 0
    size = {"magnitude": logits.abs(), "logit": logits, "head_mean": logits.abs().mean(1, keepdim=True)}[of]
    logits = (logits + w * size).masked_fill(~mask, -torch.inf)
    wanted = logits.softmax(-1).nan_to_num(0.0) @ value.repeat_interleave(3, 1)
    plain = edited_attention(*tensors, [edit], mask=mask, scale=0.5, row=47, backend="grouped")
    as_good(got, wanted, plain, dtype)


def test_two_score_edits_say_so() -> None:
    tensors, _ = inputs(torch.Generator().manual_seed(0), (2, 1), 1, 1, 5, torch.float32)
    kinds: tuple[Any, ...] = ("logit", "magnitude")
    edits = [ScoreEdit(torch.ones(1, 5, device=DEVICE), of) for of in kinds]
    with pytest.raises(RuntimeError, match="score edits of logit,magnitude: allowed is one"):
        edited_attention(*tensors, edits, scale=1.0, backend="triton")


@needs_triton
def test_compiles_without_a_graph_break() -> None:
    generator = torch.Generator().manual_seed(0)
    tensors, _ = inputs(generator, (4, 2), 1, 1, 30, torch.float32)
    one = merged(edits_of(generator, 1, 30, [(2, True), (2, False)]))
    score = ScoreEdit(torch.ones(1, 30, device=DEVICE), from_row=7)

    def run(*tensors: Tensor) -> Tensor:
        return edited_attention(*tensors, [score, one], scale=0.5, row=9, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.allclose(compiled(*tensors), run(*tensors), atol=1e-6)


@needs_triton
def test_registered() -> None:
    from vlm_attn.kernels import ops

    tensors, mask = inputs(torch.Generator().manual_seed(0), (4, 2), 2, 2, 30, torch.float32)
    for score in (torch.ones(1, 1, 30), torch.ones(2, 2, 30)):
        logs = torch.zeros(1, 30, 16, device=DEVICE)
        arguments = (*tensors, logs, 1, True, mask, 0.5, None, score.to(DEVICE), "logit")
        torch.library.opcheck(ops.partials, arguments, test_utils=("test_schema", "test_faketensor"))
