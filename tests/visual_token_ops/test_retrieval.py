# SPDX-License-Identifier: Apache-2.0
"""Looking at heads: on maps made by hand, and on models."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import vlm_attn
from tests import tiny
from tests.helpers import close
from tests.oracle import attentions
from vlm_attn.visual_token_ops.retrieval import (
    answer_maps,
    copied,
    fai,
    head_spans,
    in_box,
    local_and_global,
    retrieval_heads,
    visual_retrieval_heads,
    waad,
)


def looking(*columns: int, size: int = 6) -> torch.Tensor:
    """``[T, S]`` rows that look at one column each."""
    return torch.nn.functional.one_hot(torch.tensor(columns), size).float()


def test_copied() -> None:
    """The needle is columns 2 to 4, tokens 7 8 7; the answer writes 7 8 9."""
    tokens = torch.tensor([5, 6, 7, 8, 7, 9])
    maps = torch.stack(
        [
            looking(2, 3, 4),  # copies 7 and 8; at 4 stands a 7, not the 9 that is written
            looking(4, 4, 5),  # one 7, then the wrong word; the 9 stands outside the needle
            looking(2, 2, 2),
            looking(0, 1, 5),
        ]
    )[None]
    close(copied(maps, tokens, [7, 8, 9], (2, 5)), torch.tensor([[2 / 3, 1 / 3, 1 / 3, 0.0]]))
    for needle in ((3, 3), (-1, 2), (2, 7)):
        with pytest.raises(ValueError, match="outside"):
            copied(maps, tokens, [7, 8, 9], needle)


def test_in_box() -> None:
    """The middles of a 2 x 4 grid stand at x = 1/8, 3/8 ... and y = 1/4, 3/4."""
    inside = in_box(torch.arange(8), (2, 4), (0.3, 0.0, 0.7, 0.5))
    assert inside.tolist() == [False, True, True, False, False, False, False, False]


class TestSpans:
    def maps(self) -> torch.Tensor:
        """Three heads over four columns: themselves, the one before, the first."""
        own, first = torch.eye(4), looking(0, 0, 0, 0, size=4)
        return torch.stack([first, own, looking(0, 0, 1, 2, size=4)])

    def test_spans(self) -> None:
        close(head_spans(self.maps()), torch.tensor([1.5, 0.0, 0.75]))
        close(head_spans(self.maps(), torch.tensor([3])), torch.tensor([3.0, 0.0, 1.0]))

    def test_local_and_global(self) -> None:
        first, own, before = self.maps()
        near, far = local_and_global(self.maps())
        assert torch.equal(near, own)
        assert torch.equal(far, first)
        near, far = local_and_global(self.maps()[None], 0.7)
        close(near, (own + before) / 2)
        close(far, (first + before) / 2)
        with pytest.raises(ValueError, match="share"):
            local_and_global(self.maps(), 0.0)

    def test_waad(self) -> None:
        first, own, before = self.maps()
        close(waad(first, 2), torch.tensor([0.0, 1.0, 2.0, 2.0]))
        close(waad((own + before) / 2), torch.tensor([0.0, 0.5, 0.5, 0.5]))

    def test_fai(self) -> None:
        """Column 0: rows 1 and 2 count under (1, 2); column 3 has none behind it."""
        far = torch.tensor([[1.0, 0, 0, 0], [0.4, 0.6, 0, 0], [0.2, 0.3, 0.5, 0], [0.9, 0.1, 0.0, 0.0]])
        close(fai(far, 1, 2), torch.tensor([0.3, 0.2, 0.0, 0.0]))
        close(fai(far, 3, 50, columns=torch.tensor([0, 1])), torch.tensor([0.9, 0.0]))
        close(fai(far, 1, 2, rows=torch.tensor([2, 3])), torch.tensor([0.2, 0.2, 0.0, 0.0]))
        with pytest.raises(ValueError, match="low"):
            fai(far, 3, 2)


def prompt() -> tuple[Any, dict[str, Any], list[int]]:
    model, inputs = tiny.llava()
    return model, inputs([[3, "image", 9]], seed=1), [10, 11, 12, 13]


def test_answer_maps_are_those_of_full_attention() -> None:
    model, x, answer = prompt()
    whole = {**x, "input_ids": torch.cat([x["input_ids"], torch.tensor([answer])], 1)}
    whole["attention_mask"] = torch.ones_like(whole["input_ids"])
    maps, images = answer_maps(model, x, answer)
    close(maps, torch.cat(attentions(model, whole))[:, :, -5:-1])
    assert [(image.start, image.stop) for image in images] == [(4, 13)]
    assert not vlm_attn.is_patched(model)
    with pytest.raises(ValueError, match="one prompt"):
        answer_maps(model, x, [])


def test_retrieval_heads_of_a_model() -> None:
    """The needle is everything and every token: what is left is whether the most attended column holds the word written."""
    model, x, answer = prompt()
    maps, _ = answer_maps(model, x, answer)
    ids = x["input_ids"][0]
    top = maps.argmax(-1)[0, 0].tolist()
    written = [int(ids[column]) if column < len(ids) else 5 for column in top]
    score = retrieval_heads(model, x, (0, len(ids)), answer)
    again = copied(maps, torch.cat([ids, torch.tensor(answer)]), answer, (0, len(ids)))
    close(score + 1, again + 1)
    forced = copied(maps, torch.cat([ids, torch.tensor(answer)]), written, (0, len(ids)))
    assert forced[0, 0] == pytest.approx(len({c for c in top if c < len(ids)}) / len(ids))


def test_visual_retrieval_heads_of_a_model() -> None:
    model, x, answer = prompt()
    maps, _ = answer_maps(model, x, answer)
    everywhere, nowhere = (0.0, 0.0, 1.0, 1.0), (0.0, 0.0, 0.01, 0.01)
    score, mass = visual_retrieval_heads(model, x, answer, [(1, everywhere), (3, nowhere)])
    assert (score == 0.5).all()
    close(mass, maps[:, :, [1, 3], 4:13].sum(-1).mean(-1))
    left = (0.0, 0.0, 0.4, 1.0)
    score, _ = visual_retrieval_heads(model, x, answer, [(2, left)])
    close(score, (maps[:, :, 2, 4:13].argmax(-1) % 3 == 0).float())
    for wrong in ([], [(4, left)]):
        with pytest.raises(ValueError, match="mentions"):
            visual_retrieval_heads(model, x, answer, wrong)
    with pytest.raises(ValueError, match="image=1"):
        visual_retrieval_heads(model, x, answer, [(0, left)], image=1)
