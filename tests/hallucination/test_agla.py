# SPDX-License-Identifier: Apache-2.0
"""AGLA: the augmented view from full eager attention, and decoding against full plain forwards of both views."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, alone, close, differ, stock
from tests.oracle import attentions
from tests.processors import encode, processor, user
from vlm_attn.clip import gradient_map, load, natural
from vlm_attn.hallucination import Agla, Gift
from vlm_attn.hallucination.agla import most

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
SINGLE = [[3, "image", 7], [1, "image", 4]]
NEW = 5


@cache
def built(name: str) -> Any:
    return tiny.FAMILIES[name]()


def run(model: Any, x: Inputs, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    with torch.no_grad():
        return model.generate(**x, output_scores=True, return_dict_in_generate=True, **options)


def augmented(model: Any, x: Inputs, keep: float, layer: int) -> Inputs:
    """Row by row: what the words behind the last picture attend to, summed; the lowest tokens' pixels set to zero."""
    attention = attentions(model, x)[layer]
    pixels, picture = x["pixel_values"].clone(), 0
    for row, ids in enumerate(x["input_ids"].tolist()):
        places = [i for i, token in enumerate(ids) if token == tiny.IMAGE]
        looks = attention[row, :, places[-1] + 1 :].sum((0, 1))
        tokens = 9 if "image_grid_thw" not in x else 6
        for start in range(0, len(places), tokens):
            here = looks[places[start : start + tokens]]
            for token in here.argsort()[: tokens - round(keep * tokens)].tolist():
                if "image_grid_thw" in x:
                    pixels[picture * 24 + 4 * token : picture * 24 + 4 * token + 4] = 0
                else:
                    down, right = 4 * (token // 3), 4 * (token % 3)
                    pixels[picture, :, down : down + 4, right : right + 4] = 0
            picture += 1
    assert (pixels == 0).any()
    return {**x, "pixel_values": pixels}


def by_hand(model: Any, x: Inputs, tokens: Tensor, *, alpha: float, beta: float, keep: float, layer: int) -> Tensor:
    said = []
    for view in (x, augmented(model, x, keep, layer)):
        full = {**view, "input_ids": torch.cat([x["input_ids"], tokens], 1)}
        full["attention_mask"] = torch.cat([x["attention_mask"], torch.ones_like(tokens)], 1)
        if "mm_token_type_ids" in x:
            full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
        with torch.no_grad():
            said.append(model(**full).logits[:, -tokens.shape[1] - 1 : -1].double().softmax(-1).numpy())
    value = said[0] * said[1] ** alpha * (said[0] >= beta * said[0].max(-1, keepdims=True))
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(value / value.sum(-1, keepdims=True))).transpose(0, 1)


def near(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isinf(), wanted.isinf()), "another cut"
    close(got.masked_fill(got.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0).to(got), 1e-4)


SETTINGS: dict[str, Any] = {"alpha": 1.5, "beta": 0.05, "keep": 0.6}


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
class TestAgainstPlainForwards:
    def test_greedy_and_rows_alone(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, Agla(**SETTINGS, layers=2)):
            out = run(model, x)
            tokens = out.sequences[:, -NEW:]
            for row in range(2):
                single = run(model, alone(x, row, (1, 2))).sequences[:, -NEW:]
                assert single.tolist() == tokens[row : row + 1].tolist()
        near(torch.stack(out.scores), by_hand(model, x, tokens, **SETTINGS, layer=2))

    def test_beams_and_sampling(self, name: str) -> None:
        model, inputs = built(name)
        x = inputs(SINGLE, seed=3)
        torch.manual_seed(1)
        with vlm_attn.patched(model, Agla(**SETTINGS, layers=2)):
            drawn = run(model, x, do_sample=True, num_return_sequences=2, top_k=0, temperature=1.0)
            beams = run(model, x, num_beams=3, num_return_sequences=2)
        for place in range(2):
            tokens = drawn.sequences[place::2, -NEW:]
            near(torch.stack(drawn.scores)[:, place::2], by_hand(model, x, tokens, **SETTINGS, layer=2))
            tokens = beams.sequences[place::2, -NEW:]
            said = by_hand(model, x, tokens, **SETTINGS, layer=2).transpose(0, 1).gather(2, tokens[..., None])
            close(beams.sequences_scores[place::2], (said.sum((1, 2)) / NEW).float(), 1e-4)

    @pytest.mark.parametrize(
        "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prefill_chunk_size": 7}]
    )
    def test_other_ways(self, name: str, options: dict[str, Any]) -> None:
        model, inputs = built(name)
        x = inputs([[3, "image", 9]], seed=3)
        plain = torch.stack(run(model, x).scores)
        if not torch.allclose(stock(lambda: torch.stack(run(model, x, **options).scores)), plain, atol=1e-3):
            pytest.skip("stock transformers: another answer this way")  # chunks before 5.24
        with vlm_attn.patched(model, Agla(**SETTINGS)):
            near(torch.stack(run(model, x, **options).scores), torch.stack(run(model, x).scores))

    def test_with_gift(self, name: str) -> None:
        """The prompt then runs as body and last token; the question is in the body."""
        model, inputs = built(name)
        x = inputs([[3, "image", 9]], seed=3)
        span = (14, x["input_ids"].shape[1] - 1)
        silent = Gift(**{**ACTIVE["gift"], "alpha": 1e-7})
        with vlm_attn.patched(model, Agla(**SETTINGS), query_span=span):
            wanted = run(model, x).scores
        with vlm_attn.patched(model, [silent, Agla(**SETTINGS)], query_span=span):
            near(torch.stack(run(model, x).scores), torch.stack(wanted))


class TestParts:
    def test_most(self) -> None:
        assert most(torch.tensor([0.1, 0.4, 0.3, 0.2]), 0.5).tolist() == [False, True, True, False]
        assert most(torch.tensor([0.1, 0.4, 0.3]), 0.01).tolist() == [False, True, False]
        assert most(torch.tensor([0.1, 0.4]), 1.0).all()
        assert most(torch.tensor([0.1, 0.4, 0.3]), 0.6).tolist() == [False, True, True]  # 1.8 is nearer to 2

    def test_closed_form(self) -> None:
        main, second = torch.tensor([[4.0, 2.0, 1.0]]).log(), torch.tensor([[1.0, 3.0, 9.0]]).log()
        close(Agla(alpha=2, beta=0.5).combine(main, second).exp(), torch.tensor([[4.0, 18.0, 0.0]]), 1e-6)

    def test_neutral(self) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        plain = torch.stack(run(model, x).scores)
        with vlm_attn.patched(model, "agla", alpha=0.0, beta=0.0):
            assert torch.equal(torch.stack(run(model, x).scores), plain)
        with vlm_attn.patched(model, "agla", alpha=1.0, beta=0.0, keep=1.0):  # the same view twice
            close(torch.stack(run(model, x, max_new_tokens=1).scores), (2 * plain[:1]).log_softmax(-1))

    @pytest.mark.parametrize("change", [{"alpha": 1.0}, {"beta": 0.01}, {"keep": 0.3}, {"layers": (0,)}], ids=str)
    def test_every_constant_matters(self, change: dict[str, Any]) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        scores = []
        for parameters in ({}, change):
            with vlm_attn.patched(model, "agla", **parameters):
                scores.append(run(model, x, max_new_tokens=1).scores[0].exp())
        differ(*scores)

    def test_refused(self) -> None:
        for name in ("llava_next",):
            model, inputs = built(name)
            with vlm_attn.patched(model, "agla"), pytest.raises(NotImplementedError, match="not laid out alike"):
                model.generate(**inputs(SINGLE))
        model, inputs = built("llava")
        with pytest.raises(ValueError, match="names layer 7"):
            vlm_attn.patch(model, "agla", layers=7)
        with pytest.raises(ValueError, match="keep=0"):
            Agla(keep=0)
        with vlm_attn.patched(model, "agla"), pytest.raises(ValueError, match="pass pixel_values"):
            model.generate(input_ids=inputs(SINGLE)["input_ids"])


class TestClip:
    """A CLIP as the second opinion."""

    def test_gradient_map(self, clip: str) -> None:
        """Against finite differences: how the cosine grows with each cell of what enters the last block."""
        model, tokenizer = load(clip)
        pixels = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0)).double()
        tower, change = model.visual, [0, 0.0]
        mean, std = (torch.tensor(v).double()[:, None, None] for v in (tower.image_mean, tower.image_std))

        def grow(module: Any, args: Any) -> Any:
            state = args[0].clone()
            state[:, change[0]] *= 1 + change[1]
            return state, *args[1:]

        def like(cell: int = 0, step: float = 0.0) -> float:
            change[:] = [cell, step]
            picture = model.encode_image(((pixels - mean) / std)[None], normalize=True)
            return float((picture @ words.T).mean())

        model.double()  # the slopes of random weights are small
        try:
            found, cosine = gradient_map(clip, pixels, "Is it a dog? Yes.", (3, 3))
            words = torch.cat([model.encode_text(tokenizer([t]), normalize=True) for t in ("Is it a dog?", "Yes.")])
            hook = tower.transformer.resblocks[-1].register_forward_pre_hook(grow)
            assert cosine == pytest.approx(like())
            wanted = [(like(cell, 1e-4) - like(cell, -1e-4)) / 2e-4 for cell in range(1, 10)]
            hook.remove()
        finally:
            model.float()
        assert found.tolist() == pytest.approx(wanted, rel=1e-4)
        with torch.inference_mode():
            inside = gradient_map(clip, pixels.float(), "Is it a dog? Yes.", (3, 3))[0]
        assert torch.equal(inside, gradient_map(clip, pixels.float(), "Is it a dog? Yes.", (3, 3))[0])

    @pytest.mark.parametrize("keep", [0.6, "similarity"])
    def test_the_second_stream(self, clip: str, keep: Any) -> None:
        """Pictures by the question's map; the scores are the contrast of both streams' plain logits."""
        model, _ = built("llava")
        own = processor()
        x = encode(own, [user("what colour is the dog ?", 1)], [user("how many dogs ? is it big ?", 2)])
        colours = natural(x["pixel_values"], own.image_processor)
        texts = ["what colour is the dog ?"] + ["how many dogs ? is it big ?"] * 2
        view = {**x, "pixel_values": x["pixel_values"].clone()}
        for n, text in enumerate(texts):
            looks, similar = gradient_map(clip, colours[n], text, (3, 3))
            share = 1 - max(0.0, similar) / 2 if keep == "similarity" else keep
            for cell in looks.argsort()[: 9 - max(1, round(share * 9))].tolist():
                down, right = 4 * (cell // 3), 4 * (cell % 3)
                view["pixel_values"][n, :, down : down + 4, right : right + 4] = 0
        with vlm_attn.patched(model, Agla(alpha=2.0, beta=0.0, keep=keep, clip=clip), processor=own):
            scores = run(model, x, max_new_tokens=1).scores[0]
            beams = run(model, x, num_beams=2, max_new_tokens=2)
        with torch.no_grad():
            said = [model(**inputs).logits[:, -1].log_softmax(-1) for inputs in (x, view)]
        close(scores, (said[0] + 2 * said[1]).log_softmax(-1), 1e-4)
        assert beams.sequences.shape[0] == 2

    def test_refused(self, clip: str) -> None:
        model, inputs = built("llava")
        with pytest.raises(ValueError, match="asks a CLIP model"):
            Agla(keep="similarity")
        with pytest.raises(ValueError, match="architecture:weights"):
            Agla(clip="ViT-L-14-336")
        with pytest.raises(ValueError, match="cannot be loaded"):
            vlm_attn.patch(model, "agla", clip="no-such:model")
        with vlm_attn.patched(model, "agla", clip=clip), pytest.raises(ValueError, match="processor="):
            model.generate(**inputs(SINGLE))
