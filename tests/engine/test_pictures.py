# SPDX-License-Identifier: Apache-2.0
"""One image is one map of the right shape, whatever a processor makes of it: a painted corner moves the map's corner."""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor
from transformers import CONFIG_MAPPING

import vlm_attn
from tests.checkpoints import CHECKPOINTS
from tests.prompts import FIRST, IMAGE, Q, filled, text, tokenized, user
from vlm_attn.chat import visual_ids
from vlm_attn.families import split_images
from vlm_attn.layout import ImageSpan, runs, visual_columns
from vlm_attn.patching import engine_of, find_decoder

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # two processors of transformers
RUN = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.config is not None]
WIDE, TALL = (112, 56), (56, 112)
GRIDS = {  # of an image of 112 x 56 pixels; its turned one has the turned grid
    "llava-1.5": (4, 4),
    "llava-next-vicuna": (4, 4),
    "llava-next-mistral": (4, 4),
    "llava-onevision": (4, 4),
    "qwen2.5-vl": (2, 4),
    "qwen3-vl": (2, 4),
    "qwen3.5": (2, 4),
    "qwen3.5-nothink": (2, 4),
    "internvl3": (2, 2),
    "gemma3": (4, 4),
    "gemma4": (5, 11),
    "idefics3": (4, 6),
    "smolvlm": (4, 6),
    "pixtral": (4, 8),
    "mistral3": (2, 4),
    "glm-4v": (2, 4),
    "aya-vision": (2, 4),
    "paligemma": (4, 4),
}
OVERVIEWS = {"idefics3": (24, (2, 2)), "smolvlm": (24, (2, 2)), "aya-vision": (8, (2, 2))}


@cache
def processor(name: str) -> Any:
    if name == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("num2words is not installed, which SmolVLM's processor needs")
    return CHECKPOINTS[name].processor()


@cache
def built(name: str) -> tuple[Any, dict[str, Any]]:
    """The model, and gift's settings on layers that have attention."""
    own, model = processor(name), CHECKPOINTS[name].model()
    layers = [index for index, _ in find_decoder(model, model.config.get_text_config(decoder=True))[2]]
    return model, {"processor": own, "saliency_layers": layers[:1], "enhance_layers": layers[-2:]}


def asked(name: str, picture: Image.Image) -> dict[str, Any]:
    own = processor(name)
    if CHECKPOINTS[name].template is None:
        x = dict(own(text=["<image>" + Q], images=[[picture]], return_tensors="pt"))
        x.pop("labels", None)
        return x
    return tokenized(own, [[{"role": "user", "content": [{"type": "image", "image": picture}, text(Q)]}]])


def picture(
    size: tuple[int, int], corner: tuple[int, int] | None = None, *, quarter: bool = False, colour: str = "red"
) -> Image.Image:
    """A smooth one, with a spot in a corner (right, bottom)."""
    w, h = size
    ramp = torch.linspace(60, 190, w)[None, :, None] * 0.5 + torch.linspace(60, 190, h)[:, None, None] * 0.5
    drawn = Image.fromarray(ramp.expand(h, w, 3).to(torch.uint8).numpy())
    if corner is not None:
        wide, high = (w // 2, h // 2) if quarter else (14, 14)
        x, y = corner[0] * (w - wide), corner[1] * (h - high)
        drawn.paste(colour, (x, y, x + wide, y + high))
    return drawn


def embedded(model: Any, x: dict[str, Any]) -> Tensor:
    """``[P, D]`` what the text model is given."""
    got: list[Tensor] = []
    text_model = find_decoder(model, model.config.get_text_config(decoder=True))[0]
    handle = text_model.register_forward_pre_hook(
        lambda m, a, k: got.append(k["inputs_embeds"].clone()), with_kwargs=True
    )
    with torch.no_grad():
        model(**x)
    handle.remove()
    return got[0][0]


def images(name: str, x: dict[str, Any]) -> tuple[ImageSpan, ...]:
    model, settings = built(name)
    with vlm_attn.patched(model, "gift", **settings), engine_of(model).running(x) as call:
        return call.prompt.images


@pytest.mark.parametrize("name", RUN)
def test_one_map_whose_corners_are_the_pictures(name: str) -> None:
    model, settings = built(name)
    for size in (WIDE, TALL):
        x = asked(name, picture(size))
        grid = GRIDS[name] if size == WIDE else GRIDS[name][::-1]
        (image,) = images(name, x)
        assert image.grid == grid
        assert image.overview == OVERVIEWS.get(name)
        soft = visual_columns(x["input_ids"], visual_ids(processor(name)))[0]
        assert image.columns.tolist() == soft.nonzero().flatten().tolist()
        (saliency,) = vlm_attn.saliency(model, x, **settings)
        assert saliency.shape == grid
        plain = embedded(model, x)
        if name == "llava-1.5":  # cuts the middle out
            size = (56, 56)
            x = asked(name, picture(size))
            plain = embedded(model, x)
        for corner in ((0, 0), (1, 0), (0, 1), (1, 1)):
            colours = (
                ("red", "white", "black", "blue") if name == "aya-vision" else ("red",)
            )  # its tower spreads a change
            spots = [embedded(model, asked(name, picture(size, corner, colour=colour))) for colour in colours]
            moved = sum((spot - plain).norm(dim=-1) for spot in spots)
            cell = int(moved[image.cell_columns].argmax())
            h, w = grid
            assert (cell // w, cell % w) == (corner[1] * (h - 1), corner[0] * (w - 1))
            if image.overview is not None and name != "aya-vision":
                first, (h, w) = image.overview
                moved = (embedded(model, asked(name, picture(size, corner, quarter=True))) - plain).norm(dim=-1)
                cell = int(moved[image.columns[first : first + h * w]].argmax())
                assert (cell // w, cell % w) == (corner[1] * (h - 1), corner[0] * (w - 1))


@pytest.mark.parametrize("name", RUN)
def test_generates_while_patched(name: str) -> None:
    model, settings = built(name)
    x = asked(name, picture(WIDE))
    with vlm_attn.patched(model, "gift", **settings):
        out = model.generate(**x, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert out.shape[1] == x["input_ids"].shape[1] + 5


@pytest.mark.parametrize("name", [name for name in RUN if CHECKPOINTS[name].template is not None])
def test_two_images_stay_two(name: str) -> None:
    """Side by side in one turn, and in two turns; every image's tokens are its own."""
    own = processor(name)
    for chat in ([user(IMAGE, IMAGE, Q)], [*FIRST, user(IMAGE, Q)]):
        x = tokenized(own, [filled(chat, size=WIDE)])
        found = images(name, x)
        assert len(found) == 2
        columns = torch.cat([image.columns for image in found])
        soft = visual_columns(x["input_ids"], visual_ids(own))[0]
        assert columns.tolist() == soft.nonzero().flatten().tolist()
        assert {image.grid for image in found} == {GRIDS[name]}
        assert len(vlm_attn.saliency(built(name)[0], x, **built(name)[1])) == 2


@pytest.mark.parametrize("size", [WIDE, TALL])
def test_llama4(size: tuple[int, int]) -> None:
    """Its tiles lie as its separators say (the stock model cannot be run)."""
    own = CHECKPOINTS["llama4"].processor()
    ids = tokenized(own, [[{"role": "user", "content": [{"type": "image", "image": picture(size)}] * 2 + [text(Q)]}]])[
        "input_ids"
    ]
    visual = visual_columns(ids, visual_ids(own))
    found = split_images(CONFIG_MAPPING["llama4"](), [runs(visual[0])], {}, ids)
    h, w = (2, 4) if size == WIDE else (4, 2)
    assert [(image.grid, image.total, image.overview) for image in found] == [((h, w), 12, (8, (2, 2)))] * 2
    order = [0, 1, 4, 5, 2, 3, 6, 7] if size == WIDE else list(range(8))
    assert found[0].cells.tolist() == order


def test_tiles_that_do_not_form_a_rectangle() -> None:
    """Tokens that do not fit are one run without a grid."""
    config = CONFIG_MAPPING["idefics3"]()
    ids = torch.tensor([[7, 8, 1, 1, 1, 7, 9, 1, 1, 1, 1, 7, 6, 1, 1, 1, 1, 7, 3]])
    (image,) = split_images(config, [[(2, 5), (7, 11), (13, 17)]], {}, ids)
    assert (image.start, image.stop, image.grid, image.order) == (2, 17, (1, 11), None)
    assert image.breaks == (5, 6, 11, 12)
