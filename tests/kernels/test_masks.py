# SPDX-License-Identifier: Apache-2.0
"""Masks against small matrices written by hand, and the algebra they must obey."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from vlm_attn.kernels import Group, masks

LAYOUT = "p1 s1 v2 q2 a1"
WANTED = {
    # columns: p s v v q q a
    "causal": [".......", ".#.....", ".##....", ".###...", ".####..", ".#####.", ".######"],
    "modality-mutual": [".......", ".#.....", ".##.##.", ".#####.", ".####..", ".#####.", ".######"],
    "generalised-modality-mutual": [".......", ".###...", ".##.##.", ".#####.", ".####..", ".#####.", ".######"],
    "croc": [".......", ".#.....", ".###...", ".###...", ".####..", ".#####.", ".######"],
    "vision-block": [".......", ".#.....", ".###...", ".###...", ".####..", ".#####.", ".######"],
    "prefix-lm": [".#####."] * 6 + [".######"],
    "prefix-diffusion": [".#####."] * 6 + [".######"],
    "full": [".######"] * 7,
    "sliding:2": [".......", ".#.....", ".##....", "..##...", "...##..", "....##.", ".....##"],
}


def lines(visible: Tensor) -> list[str]:
    return ["".join("#" if seen else "." for seen in row) for row in visible]


def test_every_mask_is_written_by_hand() -> None:
    assert set(WANTED) == {*masks.MASKS, "sliding:2"}


def test_two_windows_meet_in_the_smaller() -> None:
    """Row i sees keys i - 1 and i, whichever window is named first."""
    group = torch.full((1, 5), int(Group.SYSTEM))
    for one, other in ((2, 4), (4, 2)):
        mask = masks.and_(masks.causal, masks.sliding(one), masks.sliding(other))
        assert lines(masks.materialise(mask, group)[0, 0]) == ["#....", "##...", ".##..", "..##.", "...##"]


@pytest.mark.parametrize("name", WANTED)
def test_matrix(name: str) -> None:
    group, image = masks.parse_layout(LAYOUT)
    got = masks.materialise(masks.named(name), group, image=image)
    assert got.shape == (1, 1, 7, 7)
    assert got.dtype == torch.bool
    assert lines(got[0, 0]) == WANTED[name]
    assert masks.drawing(masks.named(name), group, image).splitlines()[1:] == [
        f"{letter} {line}" for letter, line in zip("psvvqqa", WANTED[name], strict=True)
    ]


def test_two_images_are_one_modality_but_two_blocks() -> None:
    group, image = masks.parse_layout("v1 v1 s1 v2")
    croc = masks.materialise(masks.croc, group, image=image)[0, 0]
    block = masks.materialise(masks.vision_block, group, image=image)[0, 0]
    assert lines(croc) == ["##.##", "##.##", "###..", "#####", "#####"]
    assert lines(block) == ["#....", "##...", "###..", "#####", "#####"]
    runs = masks.materialise(masks.vision_block, group)[0, 0]  # without image=, neighbours count as one image
    assert lines(runs) == ["##...", "##...", "###..", "#####", "#####"]


def test_answer_rows_after_the_prompt_see_everything_but_padding() -> None:
    group, _ = masks.parse_layout("p2 v2 q1")
    for name in ("causal", "modality-mutual", "prefix-lm", "prefix-diffusion"):
        got = masks.materialise(masks.named(name), group, rows=range(6, 7), length=7)
        assert lines(got[0, 0]) == ["..#####"], name


def test_prefix_diffusion_answers_see_later_answers() -> None:
    group, _ = masks.parse_layout("q1 a2")
    assert lines(masks.materialise(masks.prefix_diffusion, group)[0, 0]) == ["#..", "###", "###"]


def test_batched_padding_is_each_row_alone() -> None:
    long, short = masks.parse_layout("s1 v3 q2")[0], masks.parse_layout("s1 v2 q1")[0]
    batch = torch.cat([long, torch.cat([torch.full((1, 2), int(Group.PAD), dtype=torch.uint8), short], 1)])
    for name in WANTED:
        got = masks.materialise(masks.named(name), batch)
        assert torch.equal(got[:1], masks.materialise(masks.named(name), long)), name
        assert torch.equal(got[1:, :, 2:, 2:], masks.materialise(masks.named(name), short)), name
        assert not got[1, :, :, :2].any(), name


def test_packed_prompts_are_each_alone() -> None:
    one, other = masks.parse_layout("s1 v3 q2")[0], masks.parse_layout("v2 q1 a1")[0]
    row = torch.cat([one, other], 1)
    document = masks.documents(torch.tensor([0, 6, 6, 10]))
    assert document.tolist() == [[0] * 6 + [2] * 4]
    assert torch.equal(masks.documents(torch.tensor([0, 4])), torch.zeros(1, 4, dtype=torch.int32))
    for name in WANTED:
        got = masks.materialise(masks.named(name), row, document=document)[0, 0]
        assert torch.equal(got[:6, :6], masks.materialise(masks.named(name), one)[0, 0]), name
        assert torch.equal(got[6:, 6:], masks.materialise(masks.named(name), other)[0, 0]), name
        assert not got[:6, 6:].any(), name
        assert not got[6:, :6].any(), name
    # An image that ends one prompt and one that begins the next are neighbours, and still two.
    touching = masks.parse_layout("q1 v1 v1 q1")[0]
    block = masks.materialise(masks.vision_block, touching, document=torch.tensor([[0, 0, 1, 1]]))[0, 0]
    assert lines(block) == ["#...", "##..", "..#.", "..##"]
    # Columns behind the prompt go on with its last document.
    last = masks.materialise(masks.causal, touching, document=torch.tensor([[0, 0, 1, 1]]), length=5)[0, 0, 4]
    assert lines(last[None]) == ["..###"]


@settings(max_examples=1000, deadline=None)
@given(
    st.lists(st.sampled_from("svqrap"), min_size=1, max_size=12),
    st.sampled_from(sorted(WANTED)),
    st.sampled_from(sorted(WANTED)),
    st.data(),
)
def test_algebra(parts: list[str], first: str, second: str, data: st.DataObject) -> None:
    group, image = masks.parse_layout(" ".join(f"{part}1" for part in parts))
    one, other = masks.named(first), masks.named(second)

    def matrix(mask: masks.Mask, **options: object) -> Tensor:
        return masks.materialise(mask, group, image=image, **options)

    assert torch.equal(matrix(one | other), matrix(one) | matrix(other))
    assert torch.equal(matrix(masks.and_(one, other)), matrix(one) & matrix(other))
    assert torch.equal(matrix(masks.or_(masks.full, one)), matrix(masks.full))
    assert torch.equal(matrix(one & masks.full), matrix(one))
    rows = data.draw(st.lists(st.integers(0, len(parts) - 1), min_size=1, max_size=4))
    assert torch.equal(matrix(one, rows=torch.tensor(rows)), matrix(one)[:, :, rows])


def test_wrong_input() -> None:
    group, image = masks.parse_layout("s2 v2")
    with pytest.raises(ValueError, match="no mask 'mna'.*modality-mutual.*sliding:N"):
        masks.named("mna")
    assert masks.named("mma") == masks.named("modality-mutual")
    with pytest.raises(ValueError, match="window=0"):
        masks.sliding(0)
    with pytest.raises(ValueError, match="layout part 'x3'"):
        masks.parse_layout("s1 x3")
    with pytest.raises(ValueError, match="empty"):
        masks.parse_layout(" ")
    with pytest.raises(ValueError, match=r"group must be \[B, S\] of integers, got \[4\]"):
        masks.materialise(masks.causal, group[0])
    with pytest.raises(ValueError, match=r"image must be integers of group's shape \[1, 4\], got \[1, 3\]"):
        masks.materialise(masks.causal, group, image=image[:, :3])
    with pytest.raises(ValueError, match=r"document must be integers of group's shape \[1, 4\], got \[4\]"):
        masks.materialise(masks.causal, group, document=torch.zeros(4).int())
    for starts in ([1, 4], [0, 3, 2]):
        with pytest.raises(ValueError, match="cu_seqlens must begin with 0 and never fall"):
            masks.documents(torch.tensor(starts))
    with pytest.raises(ValueError, match=r"cu_seqlens must be \[N \+ 1\] integers, got \[1\]"):
        masks.documents(torch.tensor([0]))
    with pytest.raises(ValueError, match="rows 3 to 4 lie outside the 4 columns"):
        masks.materialise(masks.causal, group, rows=range(3, 5))
