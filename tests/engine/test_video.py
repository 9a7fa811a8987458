# SPDX-License-Identifier: Apache-2.0
"""Videos: their tokens are VISUAL, every frame is a picture with a grid of its own, and methods act on them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import wraps
from typing import Any

import pytest
import torch

import vlm_attn
from tests import rows, tiny
from tests.helpers import Inputs, close, differ, generate, logits, margins, on, same
from tests.rows import VIDEO
from vlm_attn.families import split_videos
from vlm_attn.kernels import Group
from vlm_attn.layout import ImageSpan
from vlm_attn.patching import engine_of

FRAMES = 3
GRIDS = {"qwen2_vl": (2, 3), "qwen2_5_vl": (2, 3), "qwen3_vl": (2, 3), "llava_onevision": (2, 2)}
Clip = tuple[Any, Callable[..., Inputs]]


def build(name: str) -> Clip:
    """A tiny model, and its inputs: 3 words, a video of three frames (once more an image before it), words."""
    h, w = GRIDS[name]
    with pytest.MonkeyPatch.context() as patch:
        if name == "llava_onevision":  # frames of 2 x 2 tokens, one newline behind the last
            row = rows.ROWS[name]
            big = {**row.config, "vision_config": {"image_size": 16}, "image_grid_pinpoints": [[32, 32]]}
            patch.setitem(rows.ROWS, name, replace(row, config=big))
        model, images = tiny.FAMILIES[name]() if name in tiny.FAMILIES else rows.build(name)

    def inputs(text: int, seed: int = 0) -> Inputs:
        generator = torch.Generator().manual_seed(seed)
        x = images([[3, text]], seed=seed)
        frame = [VIDEO] * (h * w)
        if name == "qwen3_vl":  # the frame's time stands before it
            video = [token for n in range(FRAMES) for token in (30 + n, tiny.START, *frame, tiny.END)]
        elif name == "llava_onevision":
            video = [*frame * FRAMES, VIDEO]
        else:
            video = [tiny.START, *frame * FRAMES, tiny.END]
        ids = torch.cat([x["input_ids"][:, :4], torch.tensor([video]), x["input_ids"][:, 4:]], 1)
        made: Inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        if name == "llava_onevision":
            made["pixel_values_videos"] = torch.randn(1, FRAMES, 3, 16, 16, generator=generator)
        else:
            width = 2 * 3 * 4 * 4
            made["pixel_values_videos"] = torch.randn(FRAMES * 4 * h * w, width, generator=generator)
            made["video_grid_thw"] = torch.tensor([[FRAMES, 2 * h, 2 * w]])
            made["mm_token_type_ids"] = 2 * (ids == VIDEO).int()
        return made

    return model, inputs


@pytest.fixture(params=GRIDS)
def clip(request: pytest.FixtureRequest) -> tuple[str, Any, Callable[..., Inputs]]:
    return request.param, *build(request.param)


def padded(one: Inputs, other: Inputs) -> Inputs:
    """Two prompts as one batch, padded on the left."""
    length = max(one["input_ids"].shape[1], other["input_ids"].shape[1])
    out = {}
    for name in one:
        pair = [one[name], other[name]]
        if name in ("input_ids", "attention_mask", "mm_token_type_ids"):
            pair = [torch.nn.functional.pad(value, (length - value.shape[1], 0)) for value in pair]
        out[name] = torch.cat(pair)
    return out


class TestLayout:
    def test_frames(self, clip: Any) -> None:
        name, model, inputs = clip
        x = padded(inputs(6), inputs(9, seed=1))
        with on(model, "pai"), engine_of(model).running(x) as call:
            visual = call.prompt.group == int(Group.VISUAL)
            assert torch.equal(visual, x["input_ids"] == VIDEO)
            spans = call.prompt.images
        assert [(s.row, s.video, s.frame, s.grid) for s in spans] == [
            (row, row, frame, GRIDS[name]) for row in range(2) for frame in range(FRAMES)
        ]
        covered = torch.zeros_like(visual)
        for span in spans:
            covered[span.row, span.start : span.stop] = True
        assert torch.equal(covered, visual)

    def test_one_map_per_frame(self, clip: Any) -> None:
        name, model, inputs = clip
        x = inputs(9)
        with on(model, "gift"):
            maps = vlm_attn.saliency(model, x)
        assert [tuple(values.shape) for values in maps] == [GRIDS[name]] * FRAMES
        highest = max(float(values.max()) for values in maps)
        assert 0 < highest <= 1 if name == "llava_onevision" else highest == 1  # its newline token counts too

    def test_what_the_inputs_do_not_say(self) -> None:
        """A run whose length is another than the grid's, or whose grid is not given, is one frame without a grid."""
        config = build("qwen2_vl")[0].config
        grid = {"video_grid_thw": torch.tensor([[2, 4, 6]])}
        assert split_videos(config, [[(3, 15)]], grid) == (
            ImageSpan(0, 3, 9, (2, 3), video=0, frame=0),
            ImageSpan(0, 9, 15, (2, 3), video=0, frame=1),
        )
        for given, spans in (({}, [[(3, 15)]]), (grid, [[(3, 18)]]), (grid, [[(3, 7)]])):
            (start, stop) = spans[0][0]
            assert split_videos(config, spans, given) == (
                ImageSpan(0, start, stop, (1, stop - start), video=0, frame=0),
            )


class TestMethods:
    @pytest.mark.parametrize("method", ["gift", "var", "pai", "vhr"])
    def test_methods(self, clip: Any, method: str) -> None:
        name, model, inputs = clip
        one, other = inputs(6), inputs(9, seed=1)
        x = padded(one, other)
        plain = generate(model, x)
        with on(model, method), margins() as margin:
            run = generate(model, x)
            same(generate(model, x, use_cache=False), run)
            for row, single in enumerate((one, other)):
                same(generate(model, single), (run[0][row : row + 1], run[1][:, row : row + 1]))
            close(run[1][0], logits(model, x)[:, -1])
        margin.check()
        differ(run[1][0], plain[1][0])

    @pytest.mark.parametrize("method", ["fastv", "divprune"])
    @pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
    def test_fewer_tokens_of_every_frame(self, name: str, method: str) -> None:
        model, inputs = build(name)
        x = inputs(9)
        plain = generate(model, x)
        more = {"layer": 2} if method == "fastv" else {}
        with vlm_attn.patched(model, method, keep=2, **more):
            run = generate(model, x)
            left = vlm_attn.kept(model)
        assert [(len(image.index), image.grid) for image in left] == [(2, GRIDS[name])] * FRAMES
        with vlm_attn.patched(model, method, keep=2, mode="mask", **more):
            same(generate(model, x), run)
        differ(run[1][-1], plain[1][-1])

    def test_second_streams(self, clip: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        """Noise on the video's pixels; the video encoded once where both streams see it; no part of it hidden."""
        name, model, inputs = clip
        x = inputs(9)
        plain = model.generate(**x, max_new_tokens=3, do_sample=False, output_scores=True, return_dict_in_generate=True)
        owner = model.model
        calls: list[int] = []
        stock = type(owner).get_video_features

        @wraps(stock)  # the host looks at its parameters
        def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append(1)
            return stock(self, *args, **kwargs)

        monkeypatch.setattr(type(owner), "get_video_features", counted)
        for method, encodings in (("vcd", 2), ("guidance", 1)):
            calls.clear()
            with vlm_attn.patched(model, method):
                run = model.generate(
                    **x, max_new_tokens=3, do_sample=False, output_scores=True, return_dict_in_generate=True
                )
            shown = run.scores[0].isfinite()
            differ(run.scores[0][shown], plain.scores[0].log_softmax(-1)[shown])
            assert len(calls) == encodings, method
        with pytest.raises(ValueError, match="no videos"), vlm_attn.patched(model, "agla", layers=(1,)):
            generate(model, x)
