# SPDX-License-Identifier: Apache-2.0
"""ILVAD: its map and its weights by hand, the whole against full attention maps, and every way of decoding.

It is not in the conformance matrix of all families: its heads are ranked by a ratio that is a tie where the evidence is all
that a head, or a window, sees of the image, which happens with random weights. Here prompts are looked for where it does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import vlm_attn
from tests import tiny
from tests.helpers import MARGIN, Force, Inputs, alone, close, differ, generate, logits, margins, same
from tests.oracle import attentions, oracle
from vlm_attn import host
from vlm_attn.hallucination import Ilvad
from vlm_attn.hallucination.ilvad import evidence_map
from vlm_attn.kernels import edited_attention
from vlm_attn.method import ModelFacts
from vlm_attn.patching import engine_of

SETTINGS: dict[str, Any] = {"alpha": 2.0, "beta": 0.5, "tau": 0.6, "tokens": 5, "layers": (0, 2, 3)}
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]


@cache
def built(name: str) -> Any:
    return tiny.FAMILIES[name]()


def scaled(values: list[float], sigma: float = 3.0) -> list[float]:
    """Clipped at so many deviations, then from 0 to 1."""
    mean, deviation = np.mean(values), np.std(values, ddof=1)
    clipped = np.clip(values, mean - sigma * deviation, mean + sigma * deviation)
    spread = clipped.max() - clipped.min()
    return list((clipped - clipped.min()) / spread) if spread > 0 else [0.0] * len(values)


def top(scores: list[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda h: -scores[h])[: len(scores) // 2]


def found_by_hand(model: Any, x: Inputs) -> tuple[list[int], list[float], dict[int, float], float]:
    """Image columns with their saliency, the weight of each text column, and that of generated text, for one prompt."""
    prompt, ids = x["input_ids"].shape[1], x["input_ids"][0].tolist()
    visual = [i for i, token in enumerate(ids) if token == tiny.IMAGE]
    words = generate(model, x, new=SETTINGS["tokens"])[0]
    full = {**x, "input_ids": torch.cat([x["input_ids"], words], 1)}
    full["attention_mask"] = torch.ones_like(full["input_ids"])
    if "mm_token_type_ids" in x:
        full["mm_token_type_ids"] = (full["input_ids"] == tiny.IMAGE).int()
    maps = [attention[0].double().numpy() for attention in attentions(model, full)]
    rows = range(prompt, prompt + words.shape[1] - 1)
    looks = []
    for attention in maps:
        steps = []
        for r in rows:
            heads = top([attention[h, r, visual].sum() for h in range(len(attention))])
            steps.append(np.mean([attention[h, r, visual] for h in heads], 0))
        looks.append(np.mean(steps, 0))
    view = [look > SETTINGS["tau"] * look.mean() for look in looks]
    often = np.mean(looks, 0) > np.mean(looks)
    count = [
        sum(b[j] and not a[j] for a, b in zip(view, view[1:], strict=False)) * often[j] for j in range(len(visual))
    ]
    saliency = scaled(count)
    text = [i for i in range(visual[0], prompt) if i not in visual] + list(rows)
    total = []
    for i in text:
        score = 0.0
        for attention in maps:
            evidence = [float(attention[h, i, visual] @ saliency) for h in range(len(attention))]
            heads = top([e / attention[h, i, visual].sum() for h, e in enumerate(evidence)])
            score += np.mean([evidence[h] for h in heads])
        total.append(score)
    weight = dict(zip(text, (w + SETTINGS["beta"] for w in scaled(total)), strict=True))
    later = float(np.mean([weight.pop(i) for i in rows]))
    return visual, saliency, weight, later


def row_by_hand(
    row: np.ndarray, found: tuple[list[int], list[float], dict[int, float], float], prompt: int
) -> np.ndarray:
    """One row ``A [H, S]``; ``prompt``: where text begins that was not weighed by itself."""
    visual, saliency, weight, later = found
    row, before = row.copy(), row
    behind = list(range(prompt, row.shape[1]))
    looks = top([float(r[visual] @ saliency) / r[visual].sum() for r in before])
    asks = top([sum(r[i] for i in weight) + r[behind].sum() for r in before])
    for h in looks:
        for j, s in zip(visual, saliency, strict=True):
            row[h, j] *= math.exp(SETTINGS["alpha"] * s)
    for h in asks:
        for i, w in weight.items():
            row[h, i] *= w
        row[h, behind] *= later
    return row / row.sum(1, keepdims=True)


def by_hand(found: Any, prompt: int, edited: int | None = None) -> Callable[[int, Tensor], Tensor]:
    """``edited``: the first column whose row is edited, where that is not the prompt's last."""
    edited = prompt - 1 if edited is None else edited

    def hand(layer: int, probability: Tensor) -> Tensor:
        new = probability.clone()
        rows, keys = probability.shape[2:]
        for r in range(rows):
            if layer in SETTINGS["layers"] and keys - rows + r >= edited:
                until = keys - rows + r + 1
                row = row_by_hand(probability[0, :, r, :until].double().numpy(), found, prompt)
                new[0, :, r, :until] = torch.tensor(row, dtype=new.dtype)
        return new

    return hand


class TestParts:
    def test_map(self) -> None:
        """Four layers of mean .2, two rows of which one counts. In view above 1.4 times the mean: token 0; 1 and 3; 0; 1. They
        come into view once, twice, never, once; but on the whole (.29 .25 .11 .15) 3 is looked at less than the mean."""
        rows = torch.tensor([[0.5, 0.1, 0.1, 0.1], [0.05, 0.4, 0.05, 0.3], [0.5, 0.1, 0.1, 0.1], [0.1, 0.4, 0.2, 0.1]])
        seen = torch.stack([rows, torch.ones(4, 4)], 1)[:, None]
        seen = torch.nn.functional.pad(seen, (1, 0), value=9.0)  # a column that is no image
        visual = torch.tensor([[False, True, True, True, True]])
        there = torch.tensor([[True, False]])
        now = evidence_map(seen * visual, there, visual, tau=1.4, clip_sigma=3.0)
        close(now, torch.tensor([[0.0, 0.5, 1.0, 0.0, 0.0]]))
        assert not evidence_map(seen * visual, there & False, visual, tau=1.4, clip_sigma=3.0).any()

    def test_row(self) -> None:
        """Of two heads one is boosted on the image, the one whose image mass is evidence, and one on the text."""
        method = Ilvad(alpha=math.log(3), beta=0.5, layers=(0,))
        rows = torch.tensor(
            [[0.1, 0.3, 0.1, 0.2, 0.3], [0.1, 0.1, 0.1, 0.5, 0.2]]
        )  # system, image, image, text, generated
        segments = torch.tensor(
            [[0, 1, 0, 0, 0, 0, 0], [0, 0, 1, 0, 3, 0, 1], [0, 0, 1, 0, 1, 0, 0], [0, 0, 0, 1, 0, 1.5, 0]]
        )
        segments = torch.cat([segments, torch.tensor([[1.0, 0, 0, 0, 0, 0, 0]])])[None]
        from functools import partial

        from vlm_attn.kernels import Edit

        edit = Edit(segments, partial(method.reweigh, torch.full((1, 1, 1), 0.7)))
        now = edited_attention(
            torch.ones(1, 2, 1, 1), rows.log().view(1, 2, 5, 1), torch.eye(5).expand(1, 2, 5, 5), [edit], scale=1.0
        )[0, :, 0]
        wanted = torch.tensor([[0.1, 0.9, 0.1, 0.2, 0.3], [0.1, 0.1, 0.1, 0.75, 0.14]])
        close(now, wanted / wanted.sum(1, keepdim=True), 1e-6)

    def test_layers_and_values(self) -> None:
        facts = ModelFacts(model_type="llava", layers=32, heads=4, hidden=32)
        assert Ilvad().bind(facts).layers == tuple(range(5, 26))
        for wrong in ({"alpha": 21}, {"beta": 0}, {"tau": -1}, {"tokens": 1}, {"clip_sigma": 0}, {"layers": "x"}):
            with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
                Ilvad(**wrong)


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "internvl"])
class TestOnAModel:
    def test_against_full_maps(self, name: str) -> None:
        model, inputs = built(name)
        for seed in range(8):
            x = inputs([[3, "image", 9]], seed=seed)
            with vlm_attn.patched(model, "ilvad", **SETTINGS), margins() as margin:
                got, got_logits = generate(model, x, new=8, suppress_tokens=[tiny.IMAGE]), logits(model, x)
            found = found_by_hand(model, x)
            if min(margin.values) > MARGIN and any(found[1]):
                break
        else:
            pytest.fail("no prompt with evidence and without a tie")
        own = oracle(model, by_hand(found, x["input_ids"].shape[1]))
        same(got, generate(own, x, new=8, suppress_tokens=[tiny.IMAGE]), 1e-4)
        close(got_logits[:, -1], got[1][0])
        differ(got[1][0], generate(model, x)[1][0])

    def test_every_way(self, name: str) -> None:
        """Neutral is off, forced or not; without a cache, static, beams; a batch is its rows; nothing is left behind."""
        model, inputs = built(name)
        for seed in range(8):
            x = inputs(PROMPTS, seed=seed)
            plain = generate(model, x)
            with vlm_attn.patched(model, "ilvad", **SETTINGS), margins() as margin:
                found = generate(model, x)
                singles = [generate(model, alone(x, row, (1, 2))) for row in range(2)]
                others = [generate(model, x, **o) for o in ({"use_cache": False}, {"cache_implementation": "static"})]
                beams, forced = self.beams(model, x)
            if min(margin.values) > MARGIN:
                break
        else:
            pytest.fail("no prompt without a tie")
        for row, single in enumerate(singles):
            same(single, (found[0][row : row + 1], found[1][:, row : row + 1]))
        for other in others:
            same(other, found)
        assert any(beams.sequences[0::2].flatten() != beams.sequences[1::2].flatten())
        close(beams.sequences_scores, forced)
        differ(found[1][0], plain[1][0])
        with vlm_attn.patched(model, "ilvad", alpha=0.0, beta=1.0, tokens=2):
            assert torch.equal(generate(model, x)[1], plain[1])
            engine_of(model).force = True
            same(generate(model, x), plain)
        assert torch.equal(generate(model, x)[1], plain[1])

    def beams(self, model: Any, x: Inputs) -> tuple[Any, Tensor]:
        """Two beams of each prompt, and what is said of each when its tokens are forced one by one."""
        with torch.no_grad():
            out = model.generate(
                **x, num_beams=2, num_return_sequences=2, max_new_tokens=4, do_sample=False,
                output_scores=True, return_dict_in_generate=True,
            )  # fmt: skip
        width, forced = x["input_ids"].shape[1], torch.empty(len(out.sequences))
        for place in range(2):
            new = out.sequences[place::2, width:]
            said = generate(model, x, new=4, logits_processor=LogitsProcessorList([Force(new, width)]))[1]
            forced[place::2] = said.log_softmax(-1).transpose(0, 1).gather(2, new[..., None]).sum((1, 2)) / 4
        return out, forced


def test_words_end_at_an_end_token() -> None:
    """What stands behind an end token does not count, in a batch as alone."""
    model, inputs = built("llava")
    x = inputs([[3, "image", 9]], seed=2)
    words = generate(model, x, new=5)[0][0].tolist()
    ended = []
    for end, tokens in ((words[2], 5), (None, 3)):
        with vlm_attn.patched(model, "ilvad", **{**SETTINGS, "tokens": tokens}):
            ended.append(generate(model, x, new=1, eos_token_id=end, pad_token_id=tiny.PAD)[1])
    close(ended[0], ended[1])
    with vlm_attn.patched(model, "ilvad", **SETTINGS):
        at_once = generate(model, x, new=1, eos_token_id=words[0], pad_token_id=tiny.PAD)[1]
        assert at_once.isfinite().all()


def test_second_turn() -> None:
    """The first turn's map and weights; its answer and the second question weigh what generated text weighs."""
    model, inputs = built("llava")
    more = torch.randint(3, tiny.IMAGE, (1, 6), generator=torch.Generator().manual_seed(3))

    def turn(own: Any, x: Inputs, new: int) -> Any:
        with torch.no_grad():
            return own.generate(
                **x, max_new_tokens=new, do_sample=False, output_logits=True, return_dict_in_generate=True
            )

    def second(out: Any) -> Inputs:
        ids = torch.cat([out.sequences, more], 1)
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: host.cache_of(out)}

    for seed in range(8):
        x = inputs([[3, "image", 9]], seed=seed)
        with vlm_attn.patched(model, "ilvad", **SETTINGS), margins() as margin:
            first = turn(model, x, 4)
            got = turn(model, second(first), 3)
        found, prompt = found_by_hand(model, x), x["input_ids"].shape[1]
        weights = [*found[2].values(), found[3]]
        if min(margin.values) > MARGIN and any(found[1]) and max(weights) - min(weights) > 0.2:
            break
    else:
        pytest.fail("no prompt with evidence and without a tie")
    wanted = turn(oracle(model, by_hand(found, prompt)), x, 4)
    assert first.sequences.tolist() == wanted.sequences.tolist()
    rest = second(wanted)
    assert host.cache_of(wanted).get_seq_length() > prompt
    own = oracle(model, by_hand(found, prompt, edited=rest["input_ids"].shape[1] - 1))
    wanted = turn(own, rest, 3)
    assert got.sequences.tolist() == wanted.sequences.tolist()
    close(torch.stack(got.logits), torch.stack(wanted.logits), 1e-4)
    plain = turn(model, second(turn(model, x, 4)), 1)
    with vlm_attn.patched(model, "ilvad", **SETTINGS), pytest.raises(ValueError, match="filled without ilvad"):
        model.generate(**second(plain), max_new_tokens=1)


def test_weights_as_released() -> None:
    """Text at columns 1..3 of a prompt of four, one generated word read behind it; two layers, of which the first is edited.

    The last prompt token counts 0. Layer 0: sums 3, 1, 0; from 0 to 3. Clipped at mean 4/3 + 1 deviation 1.528: 2.861.
    Layer 1 adds to what the clip left: 2.861 + 1, 1 + 3, 0. The word has what the last prompt token looked at: 2, then 2.
    """
    looked = torch.tensor([[[9.0, 3.0, 1.0, 2.0, 7.0]], [[9.0, 1.0, 3.0, 2.0, 7.0]]])
    text = torch.tensor([[False, True, True, True, True]])
    method = Ilvad(layers=(0,), clip_sigma=1.0, code_parity=True)
    now = method.as_released(looked, text, 4)
    edge = 4 / 3 + math.sqrt(7 / 3)
    assert edge == pytest.approx(2.861, abs=1e-3)
    low = max(0.0, 4 / 3 - math.sqrt(7 / 3))
    assert low == 0.0
    close(now[0], torch.tensor([[0.0, edge / 3, 1 / 3, 0.0, 2 / 3]]))
    close(now[1], torch.tensor([[0.0, (edge + 1) / 4, 1.0, 0.0, 4 / 4]]))
