# SPDX-License-Identifier: Apache-2.0
"""DiffusionGemma: the encoder's prompt and every row of the canvas are edited, in the host's own ``generate``."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import rows
from tests.canvas import denoise, logits, step
from tests.families import MAPPING
from tests.helpers import ACTIVE, CHOOSERS, NEUTRAL, Weigh, alone, close, differ
from tests.tiny import IMAGE
from vlm_attn import diffusion
from vlm_attn.host import CACHE

pytestmark = pytest.mark.skipif("diffusion_gemma" not in MAPPING, reason="this transformers has no DiffusionGemma")
PROMPTS, IMAGES = [[3, "image", 7], [1, "image", 4, "image", 6]], (1, 2)


@pytest.fixture(scope="module")
def host() -> Any:
    return rows.build("diffusion_gemma")


@pytest.fixture
def model(host: Any) -> Iterator[Any]:
    yield host[0]
    if vlm_attn.is_patched(host[0]):
        vlm_attn.unpatch(host[0])


@contextmanager
def image_hidden(model: Any, prompt: Tensor) -> Iterator[None]:
    """The plain model whose rows from the prompt's last token on, and whose canvas, are masked from the image's columns."""
    last = prompt.shape[1] - 1

    def hook(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        mask, canvas = kwargs["attention_mask"], "Decoder" in type(module).__name__
        first = int(kwargs["position_ids"][0, 0])
        count, keys = mask.shape[-2:]
        columns = torch.arange(keys) + first + count - keys  # a sliding layer has let old columns go
        visual = torch.nn.functional.pad(prompt == IMAGE, (0, 100))[:, columns.clamp_min(0)]
        edited = (torch.arange(count) + first >= last) | canvas
        return args, {**kwargs, "attention_mask": mask & ~(visual[:, None, None] & edited[:, None])}

    layers = [*model.model.encoder.language_model.layers, *model.model.decoder.layers]
    handles = [layer.register_forward_pre_hook(hook, with_kwargs=True) for layer in layers]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def narrow(window: int) -> Any:
    """The same weights with sliding windows shorter than the prompt."""
    row = rows.ROWS["diffusion_gemma"]
    with pytest.MonkeyPatch.context() as patch:
        changed = copy.deepcopy(row.config)
        changed["text_config"]["sliding_window"] = window
        patch.setitem(rows.ROWS, "diffusion_gemma", rows.Row(row.image, row.pixels, changed))
        return rows.build("diffusion_gemma")


@pytest.mark.parametrize("window", [256, 8])
def test_canvas_and_last_row_do_what_a_mask_does(window: int) -> None:
    """Several steps of two canvases: the first canvas is encoded and edited as written text, the image stays hidden."""
    model, make = narrow(window)
    inputs = make(PROMPTS)
    plain = denoise(model, inputs)
    with image_hidden(model, inputs["input_ids"]):
        wanted = denoise(model, inputs)
    differ(wanted[1][0], plain[1][0])
    with vlm_attn.patched(model, Weigh(image=0.0)):
        got = denoise(model, inputs)
    assert got[0].tolist() == wanted[0].tolist()
    close(got[1][0], wanted[1][0])
    close(got[1], wanted[1], 3e-4)  # every step is fed the logits of the one before, and their rounding with them


@pytest.mark.parametrize("method", ["gift", "var", "vhr"])
def test_static_cache(host: Any, model: Any, method: str) -> None:
    """Equal to the dynamic cache (with windows as long as the sequence: shorter ones differ in stock transformers)."""
    inputs = host[1](PROMPTS)
    vlm_attn.patch(model, method, **ACTIVE[method])
    wanted = denoise(model, inputs)
    got = denoise(model, inputs, cache_implementation="static", disable_compile=True)
    assert got[0].tolist() == wanted[0].tolist()
    close(got[1], wanted[1], 3e-4)


@pytest.mark.parametrize("method", sorted(set(ACTIVE) - {"paint", *CHOOSERS}))  # paint needs a CLS token
def test_methods(host: Any, model: Any, method: str) -> None:
    inputs = host[1](PROMPTS)
    config, plain, written = model.config, logits(model, inputs), denoise(model, inputs)
    with vlm_attn.patched(model, method, **NEUTRAL[method]):
        assert logits(model, inputs).equal(plain)
        assert denoise(model, inputs)[1].equal(written[1])
    with vlm_attn.patched(model, method, **ACTIVE[method]):
        now = logits(model, inputs)
        differ(now, plain)
        differ(denoise(model, inputs)[1], written[1])
        for row in range(2):
            close(logits(model, alone(inputs, row, IMAGES)), now[row : row + 1])
        close(logits(model, inputs, use_cache=False), now)
    assert logits(model, inputs).equal(plain)
    assert model.config is config
    assert not hasattr(model.model.decoder.layers[0].self_attn, "_vlm_attn")


def test_a_step_goes_on_with_the_cache_it_is_given(host: Any, model: Any) -> None:
    """Bare forwards: the prompt once, then canvases on its cache, each as if the prompt had run with it."""
    inputs = host[1](PROMPTS)
    mask = inputs["attention_mask"]
    vlm_attn.patch(model, "gift", **ACTIVE["gift"])
    first = step(model, inputs, mask)
    assert first.encoder_last_hidden_state.shape[:2] == mask.shape
    again = step(model, {CACHE: first[CACHE]}, mask)
    close(again.logits, first.logits)
    assert first[CACHE].get_seq_length() == mask.shape[1]


def test_state_belongs_to_modules(model: Any) -> None:
    """Layer numbers repeat in encoder and decoder: the tags do not."""
    vlm_attn.patch(model, "gift", **ACTIVE["gift"])
    encoder = [layer.self_attn for layer in model.model.encoder.language_model.layers]
    decoder = [layer.self_attn for layer in model.model.decoder.layers]
    assert [m.layer_idx for m in encoder] == [m.layer_idx for m in decoder]
    assert not any(m._vlm_attn.canvas for m in encoder)
    assert all(m._vlm_attn.canvas for m in decoder)


def test_saliency_reads_the_prompt_alone(host: Any, model: Any) -> None:
    inputs = host[1](PROMPTS)
    parameters = {k: v for k, v in ACTIVE["gift"].items() if k != "alpha"}
    calls: list[int] = []
    handle = model.model.decoder.register_forward_hook(lambda *_: calls.append(1))
    maps = vlm_attn.saliency(model, inputs, **parameters)
    handle.remove()
    assert [m.shape for m in maps] == [(2, 2)] * 3
    assert not calls


@pytest.mark.parametrize("method", ["vcd", "dola", "opera", "ilvad", "landmark"])
def test_contrasts_of_next_tokens_are_refused(model: Any, method: str) -> None:
    with pytest.raises(NotImplementedError, match=f"{method} acts on one token after the other"):
        vlm_attn.patch(model, method)
    assert not vlm_attn.is_patched(model)


def test_what_is_refused(host: Any, model: Any) -> None:
    inputs = host[1](PROMPTS[:1])
    with pytest.raises(NotImplementedError, match="divprune takes visual tokens out"):
        vlm_attn.patch(model, "divprune")
    with pytest.raises(NotImplementedError, match="no plain decoder"):
        diffusion.generate(model, inputs, mask_id=119)
    with pytest.raises(NotImplementedError, match="writes all tokens of a canvas at once"):
        vlm_attn.gaze(model, inputs, [5, 6])
    vlm_attn.patch(model, "gift", **ACTIVE["gift"])
    with pytest.raises(RuntimeError, match="canvas decoder of a patched model was called on its own"):
        model.model.decoder(inputs["input_ids"][:, :6], None)
