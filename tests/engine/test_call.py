# SPDX-License-Identifier: Apache-2.0
"""What a call hands to methods, on numbers written by hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch

from vlm_attn.call import Call
from vlm_attn.hallucination import Pai
from vlm_attn.layout import ImageSpan, build_layout


class TestVision:
    """Which part of what was read of the vision tower belongs to which image."""

    def call(self, tiles: Sequence[int], shown: Sequence[float], first: int = 0) -> Call:
        """One image per row of ``tiles`` tiles at columns 1..2; ``shown``: one number per tile that the tower ran on, in
        order, over two runs of it."""
        visual = torch.zeros(len(tiles), 5, dtype=torch.bool)
        visual[:, 1:3] = True
        images = [ImageSpan(row, 1, 3, (1, 2), tiles=count) for row, count in enumerate(tiles)]
        call = Call(build_layout(visual, None, [(3, 5)] * len(tiles), [0] * len(tiles), images), first=first)
        numbers = torch.tensor(shown)[:, None]
        half = len(shown) // 2
        call.seen[4] = [(part, 10 * part[..., None]) for part in (numbers[:half], numbers[half:])]
        return call

    def read(self, call: Call, image: int) -> list[float]:
        cls, keys = call.vision(image, 4)
        assert keys.flatten().tolist() == (10 * cls).flatten().tolist()
        return cls.flatten().tolist()

    def test_one_run_for_each_image(self) -> None:
        call = self.call([1, 1], [1.0, 2.0])
        assert [self.read(call, image) for image in range(2)] == [[1.0], [2.0]]

    def test_one_run_for_each_beam(self) -> None:
        """The copies of an image stand side by side."""
        call = self.call([1, 1], [1.0, 1.0, 2.0, 2.0])
        assert [self.read(call, image) for image in range(2)] == [[1.0], [2.0]]

    def test_beams_of_tiles(self) -> None:
        call = self.call([2, 1, 1], [1.0, 1.5, 1.0, 1.5, 2.0, 2.0, 3.0, 3.0])
        assert [self.read(call, image) for image in range(3)] == [[1.0, 1.5], [2.0], [3.0]]

    @pytest.mark.parametrize(
        ("shown", "wanted"),
        [
            ([6.0, 7.0], {1: [6.0], 2: [7.0]}),
            ([6.0, 6.0, 7.0, 7.0], {1: [6.0], 2: [7.0]}),  # two beams
            ([5.0, 6.0, 7.0], {0: [5.0], 1: [6.0], 2: [7.0]}),  # all of them once more
        ],
    )
    def test_a_later_turn(self, shown: list[float], wanted: dict[int, list[float]]) -> None:
        """The image of an earlier turn was not shown again; or it was, which the number of tiles says."""
        call = self.call([1], shown, first=3)
        later = [ImageSpan(0, 3, 4, (1, 1)), ImageSpan(0, 4, 5, (1, 1))]
        call.prompt = replace(call.prompt, images=(*call.prompt.images, *later))
        assert {image: self.read(call, image) for image in wanted} == wanted

    def test_nothing_was_read(self) -> None:
        with pytest.raises(ValueError, match="did not run in this call"):
            self.call([1], [1.0, 1.0]).vision(0, 7)


def test_once_is_once_per_number_of_rows() -> None:
    """What is the same in every layer is made once; beams make it anew."""
    prompt = build_layout(torch.tensor([[False, True, False]]), None, [(2, 3)], [0], [ImageSpan(0, 1, 2, (1, 1))])
    call, method, made = Call(prompt, batch=1), Pai(), []
    for batch in (1, 1, 3, 3, 1):
        call.batch = batch
        assert call.once(method, lambda: made.append(call.batch) or call.batch) == batch  # type: ignore[func-returns-value]
    assert made == [1, 3]
