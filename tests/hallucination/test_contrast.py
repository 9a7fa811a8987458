# SPDX-License-Identifier: Apache-2.0
"""VCD, ICD and PAI's guidance: the equations by hand, and every way of decoding against full plain forwards of both prompts."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, alone, close, differ, generate
from vlm_attn.hallucination import Gift, Guidance, Icd, Pai, Var, Vcd
from vlm_attn.hallucination.vcd import signal_kept

PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
SINGLE = [[3, "image", 7], [1, "image", 4]]  # transformers 5.17 mixes up several pictures of a row that it repeats
IMAGES = (1, 2)
NEW = 6
PREFIX = (33, 44, 55)


@cache
def built(name: str) -> tuple[Any, Callable[..., Inputs]]:
    return tiny.FAMILIES[name]()


# What the second stream sees, once more, row by row over lists.


def noisy(x: Inputs, step: int = 500, seed: int = 0) -> Inputs:
    betas = [1e-5 + (5e-3 - 1e-5) / (1 + math.exp(-(-6 + 12 * t / 999))) for t in range(1000)]
    kept = math.prod(1 - beta for beta in betas[: step + 1])
    count = len(x["image_grid_thw"]) if "image_grid_thw" in x else len(x["pixel_values"])
    pictures = (
        x["pixel_values"].reshape(count, -1, *x["pixel_values"].shape[1:])
        if "image_grid_thw" in x
        else x["pixel_values"]
    )
    noise = torch.randn(pictures[0].shape, generator=torch.Generator().manual_seed(seed))
    changed = torch.stack([math.sqrt(kept) * picture + math.sqrt(1 - kept) * noise for picture in pictures])
    return {**x, "pixel_values": changed.reshape(x["pixel_values"].shape)}


def rewritten(x: Inputs, change: Callable[[list[int]], list[int]], **keep: Any) -> Inputs:
    """The prompts without padding, changed, padded again."""
    rows = [change(row[mask.bool()].tolist()) for row, mask in zip(x["input_ids"], x["attention_mask"], strict=True)]
    length = max(map(len, rows))
    ids = torch.tensor([[tiny.PAD] * (length - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask, **keep}


def disturbed(x: Inputs, prefix: tuple[int, ...] = PREFIX) -> Inputs:
    def change(row: list[int]) -> list[int]:
        after = max(i for i, token in enumerate(row) if token == tiny.IMAGE) + 1
        return [*row[:after], *prefix, *row[after:]]

    other = rewritten(x, change, **{k: v for k, v in x.items() if v.shape != x["input_ids"].shape})
    if "mm_token_type_ids" in x:
        other["mm_token_type_ids"] = (other["input_ids"] == tiny.IMAGE).int()
    return other


def blind(x: Inputs) -> Inputs:
    return rewritten(x, lambda row: [t for t in row if t not in (tiny.IMAGE, tiny.START, tiny.END)])


METHODS: dict[str, tuple[Any, Callable[[Inputs], Inputs], Callable[[Tensor, Tensor], Tensor]]] = {
    "vcd": (Vcd(alpha=1.5, beta=0.05), noisy, lambda p, q: p**2.5 / q**1.5 * (p >= 0.05 * p.max())),
    "icd": (Icd(alpha=0.7, beta=0.02, prefix=PREFIX), disturbed, lambda p, q: p**1.7 / q**0.7 * (p >= 0.02 * p.max())),
    "guidance": (Guidance(gamma=2.0, beta=0.01), blind, lambda p, q: p**2 / q * (p >= 0.01 * p.max())),
}


def by_hand(model: Any, x: Inputs, method: str, tokens: Tensor) -> Tensor:
    """Log probabilities ``[new, B, V]`` of the contrast at every step of given answers: both prompts in full plain forwards.

    The formulas are those of the papers on probabilities, in float64.
    """
    _, other, contrast = METHODS[method]
    streams = []
    for prompt in (x, other(x)):
        new = tokens.shape[1]
        full = {**prompt, "input_ids": torch.cat([prompt["input_ids"], tokens], 1)}
        full["attention_mask"] = torch.cat([prompt["attention_mask"], torch.ones_like(tokens)], 1)
        if "mm_token_type_ids" in prompt:
            full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
        with torch.no_grad():
            said = model(**full).logits[:, -new - 1 : -1].double()
        streams.append(said.softmax(-1).numpy())
    rows = [[contrast(p, q) for p, q in zip(*row, strict=True)] for row in zip(*streams, strict=True)]
    values = np.array(rows)
    with np.errstate(divide="ignore"):
        return torch.tensor(np.log(values / values.sum(-1, keepdims=True))).transpose(0, 1)


def near(got: Tensor, wanted: Tensor) -> None:
    assert torch.equal(got.isinf(), wanted.isinf()), "another cut"
    close(got.masked_fill(got.isinf(), 0), wanted.masked_fill(wanted.isinf(), 0).to(got), 1e-4)


def run(model: Any, x: Inputs, **options: Any) -> Any:
    options = {"do_sample": False, "max_new_tokens": NEW, **options}
    with torch.no_grad():
        return model.generate(**x, output_scores=True, return_dict_in_generate=True, **options)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
class TestAgainstPlainForwards:
    def test_greedy(self, name: str, method: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, METHODS[method][0]):
            out = run(model, x)
        tokens = out.sequences[:, -NEW:]
        wanted = by_hand(model, x, method, tokens)
        near(torch.stack(out.scores), wanted)
        assert tokens.tolist() == wanted.argmax(-1).T.tolist()
        assert tokens.tolist() != run(model, x).sequences[:, -NEW:].tolist()

    def test_sampling(self, name: str, method: str) -> None:
        model, inputs = built(name)
        x = inputs(SINGLE, seed=3)
        torch.manual_seed(1)  # draws no image token
        with vlm_attn.patched(model, METHODS[method][0]):
            out = run(model, x, do_sample=True, num_return_sequences=3, top_k=0, temperature=1.0)
        tokens = out.sequences[:, -NEW:]
        assert len({tuple(row) for row in tokens.tolist()}) > 2
        for place in range(3):
            near(torch.stack(out.scores)[:, place::3], by_hand(model, x, method, tokens[place::3]))

    def test_beams(self, name: str, method: str) -> None:
        model, inputs = built(name)
        x = inputs(SINGLE, seed=3)
        with vlm_attn.patched(model, METHODS[method][0]):
            out = run(model, x, num_beams=4, num_return_sequences=3)
        for place in range(3):
            tokens = out.sequences[place::3, -NEW:]
            said = by_hand(model, x, method, tokens)
            total = said.transpose(0, 1).gather(2, tokens[..., None]).sum((1, 2))
            close(out.sequences_scores[place::3], (total / NEW).float(), 1e-4)

    def test_batch_is_rows_alone(self, name: str, method: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        with vlm_attn.patched(model, METHODS[method][0]):
            tokens = run(model, x).sequences[:, -NEW:]
            for row in range(2):
                single = alone(x, row, IMAGES)
                assert run(model, single).sequences[:, -NEW:].tolist() == tokens[row : row + 1].tolist()

    @pytest.mark.parametrize(
        "options", [{"use_cache": False}, {"cache_implementation": "static"}, {"prompt_lookup_num_tokens": 2}], ids=str
    )
    def test_other_ways(self, name: str, method: str, options: dict[str, Any]) -> None:
        model, inputs = built(name)
        x = inputs([[3, "image", 9]], seed=3)
        with vlm_attn.patched(model, METHODS[method][0]):
            plain, other = run(model, x), run(model, x, **options)
        assert other.sequences.tolist() == plain.sequences.tolist()
        near(torch.stack(other.scores), torch.stack(plain.scores))

    def test_neutral_is_plain(self, name: str, method: str) -> None:
        model, inputs = built(name)
        x = inputs(PROMPTS, seed=3)
        changes = {"gamma": 1.0, "beta": 0.0} if method == "guidance" else {"alpha": 0.0, "beta": 0.0}
        plain = torch.stack(run(model, x).scores)
        neutral = type(METHODS[method][0])(**changes)
        assert neutral.neutral
        with vlm_attn.patched(model, neutral):
            assert torch.equal(torch.stack(run(model, x).scores), plain)


SENSITIVE: list[tuple[Any, dict[str, Any]]] = [
    (Vcd, {"alpha": 0.5}), (Vcd, {"beta": 0.5}), (Vcd, {"noise_step": 900}), (Vcd, {"seed": 1}),
    (Icd, {"alpha": 0.5}), (Icd, {"beta": 0.5}), (Icd, {"prefix": (7, 8)}),
    (Guidance, {"gamma": 3.0}), (Guidance, {"beta": 0.5}),
]  # fmt: skip


class TestParameters:
    @pytest.mark.parametrize(("cls", "change"), SENSITIVE, ids=str)
    def test_every_constant_matters(self, cls: Any, change: dict[str, Any]) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        given = {"prefix": PREFIX} if cls is Icd else {}
        scores = []
        for parameters in ({}, change):
            with vlm_attn.patched(model, cls(**{**given, **parameters})):
                scores.append(run(model, x, max_new_tokens=1).scores[0].exp())
        differ(*scores)

    def test_noise(self) -> None:
        """Nothing of the picture is lost at step 0, nearly all at the end; the schedule is the paper's sigmoid."""
        kept = signal_kept()
        assert len(kept) == 1000
        assert float(kept[0]) == pytest.approx(1 - (1e-5 + (5e-3 - 1e-5) / (1 + math.exp(6))), abs=1e-7)
        assert (kept.diff() < 0).all()
        picture = torch.full((1, 3, 40, 40), 2.0)
        method = Vcd()
        changed = method.noisy(picture)
        assert float(changed.mean()) == pytest.approx(2 * math.sqrt(float(kept[500])), abs=0.05)
        assert float(changed.std()) == pytest.approx(math.sqrt(1 - float(kept[500])), abs=0.05)
        assert torch.equal(method.noisy(picture), changed)
        assert not torch.equal(Vcd(seed=1).noisy(picture), changed)
        assert method.noisy(picture.half()).dtype == torch.float16

    def test_closed_forms(self) -> None:
        """1.5 (ln 4, ln 2, 0) - .5 (ln 9, 0, ln 4): 8/3, 2^1.5 and 1/2 to one. The cut is by the first stream: at .3 it takes
        the last token, though the second is the largest of the contrast."""
        main, second = torch.tensor([[4.0, 2.0, 1.0]]).log(), torch.tensor([[9.0, 1.0, 4.0]]).log()
        wanted = torch.tensor([[8 / 3, 2**1.5, 0.5]])
        for method in (Vcd, Icd):
            close(method(alpha=0.5, beta=0.0).combine(main, second).exp(), wanted, 1e-6)
            close(
                method(alpha=0.5, beta=0.3).combine(main, second).exp(), wanted * torch.tensor([[1.0, 1.0, 0.0]]), 1e-6
            )
            assert method(alpha=0.5, beta=0.2).combine(main, second).isfinite().all()
            assert method(alpha=0.5, beta=0.6).combine(main, second).isfinite().tolist() == [[True, False, False]]
        main, second = torch.tensor([[4.0, 2.0, 1.0]]).log(), torch.tensor([[2.0, 2.0, 2.0]]).log()
        # log-softmax: 4/7 and 1/3. gamma 2: (4/7)^2 * 3 ...
        wanted = torch.tensor([[(p / 7) ** 2 * 3 for p in (4, 2, 1)]])
        close(Guidance(gamma=2.0, beta=0.0).combine(main, second).exp(), wanted, 1e-6)
        close(Guidance(gamma=1.0, beta=0.0).combine(main, second).exp(), torch.tensor([[4 / 7, 2 / 7, 1 / 7]]), 1e-6)

    @pytest.mark.parametrize(
        ("make", "words"),
        [
            (lambda: Vcd(alpha=-1), "alpha=-1"), (lambda: Vcd(beta=1.5), "beta=1.5"), (lambda: Icd(alpha=21), "alpha=21"),
            (lambda: Vcd(noise_step=1000), r"noise_step=1000 .*\[0, 999\]"), (lambda: Vcd(noise_step=1.5), "noise_step"),
            (lambda: Vcd(seed=-1), "seed=-1"), (lambda: Icd(prefix=""), "prefix=''"), (lambda: Icd(prefix=(1, -2)), "prefix="),
            (lambda: Guidance(gamma=0.5), "gamma=0.5"),
        ],
    )  # fmt: skip
    def test_wrong_values(self, make: Callable[[], Any], words: str) -> None:
        with pytest.raises(ValueError, match=words):
            make()


class TestPrompts:
    def test_prefix_in_words(self) -> None:
        from tests.processors import encode, processor, user

        model, _ = built("llava")
        own = processor()
        x = encode(own, [user("what colour is the dog ?", images=1)])
        with vlm_attn.patched(model, "icd"), pytest.raises(ValueError, match="processor=processor"):
            model.generate(**x)
        ids = own.tokenizer("you are a big cup .", add_special_tokens=False)["input_ids"]
        with vlm_attn.patched(model, "icd", prefix="you are a big cup .", processor=own):
            words = run(model, x)
        with vlm_attn.patched(model, "icd", prefix=tuple(ids), processor=own):
            assert torch.equal(torch.stack(run(model, x).scores), torch.stack(words.scores))

    def test_the_whole_of_pai(self) -> None:
        """Amplified with the picture, and without it there is nothing to amplify."""
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        plain = generate(model, blind(x), new=1)[1][0].log_softmax(-1)
        with vlm_attn.patched(model, Pai(alpha=0.5)):
            raised = generate(model, x, new=1)[1][0].log_softmax(-1)
        differ(raised, generate(model, x, new=1)[1][0].log_softmax(-1))
        with vlm_attn.patched(model, [Pai(alpha=0.5), Guidance(gamma=2.0, beta=0.0)]):
            close(run(model, x, max_new_tokens=1).scores[0], (2 * raised - plain).log_softmax(-1), 1e-4)

    @pytest.mark.parametrize("edit", [Gift(**ACTIVE["gift"]), Var(**ACTIVE["var"])], ids=lambda m: m.name)
    def test_with_an_edit(self, edit: Any) -> None:
        """The main stream is the edited model's, the second the plain model's."""
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, edit):
            edited = generate(model, x, new=1)[1][0]
        plain = generate(model, noisy(x), new=1)[1][0]
        with vlm_attn.patched(model, [edit, Vcd(alpha=2.0, beta=0.0)]):
            out = run(model, x, max_new_tokens=1)
        close(out.scores[0], (3 * edited - 2 * plain).log_softmax(-1), 1e-4)

    def test_bundled_model(self) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        from vlm_attn.evals import scenes

        path = str(scenes.model_path())
        model, own = AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path)
        chat = [
            {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "is there a dog in the image ?"}]}
        ]
        prompt = own.apply_chat_template(chat, add_generation_prompt=True)
        x = dict(own(text=[prompt], images=[[scenes.render(scenes.scene("validation", 0))]], return_tensors="pt"))

        def said() -> Tensor:
            return run(model, x, max_new_tokens=1).scores[0].log_softmax(-1)

        plain = said()
        for name in ("vcd", "icd"):
            with vlm_attn.patched(model, name, processor=own):
                assert (said().exp() - plain.exp()).abs().max() > 1e-4
        assert torch.equal(said(), plain)
