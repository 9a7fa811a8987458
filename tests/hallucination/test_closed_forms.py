# SPDX-License-Identifier: Apache-2.0
"""What each edit of attention computes, on a few numbers, against the papers' equations in plain loops over NumPy arrays.

The prompts are written as letters, one per column: P padding, S system or template text, V image, Q question, R the
template's tail. Two samples of two beams each have three rows: the last prompt token and two generated ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch

from vlm_attn.call import Call
from vlm_attn.hallucination import Agla, Gift, HeadGuided, Ilvad, Pai, Paint, Vaf, Var, Vhr
from vlm_attn.hallucination.agla import most
from vlm_attn.hallucination.vhr import head_divergence
from vlm_attn.kernels import Edit, ScoreEdit, edited_attention
from vlm_attn.layout import ImageSpan, TokenLayout, build_layout, runs

PROMPTS = ("SVVSVVSQQR", "PSVVVVQQQR")
LENGTH, ROWS = len(PROMPTS[0]), (9, 10, 11)  # columns of the prompt; the rows' own columns
KEYS, HEADS, TIMES = 12, 4, 2
SAMPLES = [0, 0, 1, 1]  # of the batch's rows
LOGITS = np.random.default_rng(7).normal(size=(4, HEADS, len(ROWS), KEYS)).round(1) * 1.5


def layout_of(prompts: Sequence[str]) -> TokenLayout:
    letters = np.array([list(prompt) for prompt in prompts])
    visual = torch.tensor(letters == "V")
    query = [(prompt.index("Q"), prompt.rindex("Q") + 1) for prompt in prompts]
    images = [
        ImageSpan(row, start, stop, (1, stop - start))
        for row in range(len(prompts))
        for start, stop in runs(visual[row])
    ]
    role = [prompt.count("R") for prompt in prompts]
    return build_layout(visual, torch.tensor(letters != "P").long(), query, role, images)


def call_of(prompts: Sequence[str] = PROMPTS) -> Call:
    return Call(layout_of(prompts), batch=TIMES * len(prompts), mode="edited", done=True)


def at(row: int, letters: str) -> list[int]:
    """Columns of a batch row's prompt that hold one of these letters."""
    return [column for column, letter in enumerate(PROMPTS[SAMPLES[row]]) if letter in letters]


def visible(row: int, r: int) -> list[int]:
    return [j for j in range(KEYS) if j <= ROWS[r] and j not in at(row, "P")]


def softmax(scores: np.ndarray, keys: list[int]) -> np.ndarray:
    out = np.zeros(len(scores))
    out[keys] = np.exp(scores[keys] - scores[keys].max())
    return out / out.sum()


def top(values: Sequence[float]) -> list[int]:
    """The half of the heads with the largest."""
    return sorted(range(len(values)), key=lambda h: -values[h])[: len(values) // 2]


def run(edit: Edit | ScoreEdit | None) -> np.ndarray:
    """Probabilities ``[4, H, 3, KEYS]`` that the edit gives."""
    assert edit is not None
    mask = torch.zeros(4, 1, len(ROWS), KEYS, dtype=torch.bool)
    for row in range(4):
        for r in range(len(ROWS)):
            mask[row, 0, r, visible(row, r)] = True
    eye = torch.eye(KEYS).expand(4, HEADS, KEYS, KEYS)
    query = torch.tensor(LOGITS, dtype=torch.float32)
    return edited_attention(query, eye, eye, [edit], mask=mask, scale=1.0, row=ROWS[0]).double().numpy()


def plain() -> np.ndarray:
    return from_scores(lambda row, h, r: LOGITS[row, h, r])


def from_scores(change: Any) -> np.ndarray:
    """Softmax of what ``change(row, head, r)`` makes of the logits."""
    out = np.zeros_like(LOGITS)
    for row, h, r in np.ndindex(4, HEADS, len(ROWS)):
        out[row, h, r] = softmax(change(row, h, r), visible(row, r))
    return out


def near(got: np.ndarray, wanted: np.ndarray) -> None:
    assert np.abs(got - wanted).max() < 1e-5
    assert np.abs(wanted - plain()).max() > 0.05, "the example changes nothing"


@pytest.mark.parametrize("skip", [False, True])
def test_pai(skip: bool) -> None:
    """s + alpha |s| on the image, the prompt's last row among them unless it is skipped."""

    def change(row: int, h: int, r: int) -> np.ndarray:
        s = LOGITS[row, h, r].copy()
        if not (skip and ROWS[r] < LENGTH):
            for j in at(row, "V"):
                s[j] += 0.7 * abs(s[j])
        return s

    method, call = Pai(alpha=0.7, layers=(1,), skip_first=skip), call_of()
    near(run(method.edit(call, 1)), from_scores(change))
    assert method.edit(call, 0) is None


def test_vaf() -> None:
    """1.4 s on the images, 0.6 s on what stands before the first; nothing else, such as text between or after the images."""

    def change(row: int, h: int, r: int) -> np.ndarray:
        s = LOGITS[row, h, r].copy()
        for j in range(LENGTH):
            s[j] *= 1.4 if j in at(row, "V") else 0.6 if j < at(row, "V")[0] else 1.0
        return s

    method, call = Vaf(visual=1.4, system=0.6, layers=(1,)), call_of()
    near(run(method.edit(call, 1)), from_scores(change))
    assert method.edit(call, 2) is None
    assert LOGITS[0, :, :, 3].any()
    assert LOGITS[0, :, :, 6].any()


def test_head_guided() -> None:
    """s + alpha mean_h |s| on the image."""

    def change(row: int, h: int, r: int) -> np.ndarray:
        s = LOGITS[row, h, r].copy()
        for j in at(row, "V"):
            s[j] += 0.9 * sum(abs(LOGITS[row, other, r, j]) for other in range(HEADS)) / HEADS
        return s

    method, call = HeadGuided(alpha=0.9, layers=(1,)), call_of()
    near(run(method.edit(call, 1)), from_scores(change))
    assert method.edit(call, 2) is None


@pytest.mark.parametrize("skip", [False, True])
def test_paint(skip: bool) -> None:
    """Summary tokens: above Q3 + fence (Q3 - Q1) of the late layer; local ones: the best of the early layer that are none."""
    share, fence, alpha, beta = 0.5, 0.8, 0.9, 0.4
    early = [[0.3, 0.7], [0.2, 0.1], [0.6, 0.1, 0.7, 0.8]]
    late = [[0.1, 0.9], [0.5, 0.4], [0.2, 0.2, 0.3, 0.9]]
    weight = np.zeros((2, LENGTH))
    for (row, columns), first, last in zip([(0, [1, 2]), (0, [4, 5]), (1, [2, 3, 4, 5])], early, late, strict=True):
        low, high = np.quantile(last, 0.25), np.quantile(last, 0.75)
        summary = [n for n, value in enumerate(last) if value > high + fence * (high - low)]
        best = sorted(range(len(first)), key=lambda n: -first[n])[: int(share * len(first))]
        for n, column in enumerate(columns):
            weight[row, column] = beta if n in summary else alpha if n in best else 0.0
    assert weight[0].tolist() == [0, 0, alpha, 0, alpha, 0, 0, 0, 0, 0]
    assert weight[1].tolist() == [0, 0, 0, 0, alpha, beta, 0, 0, 0, 0]

    def change(row: int, h: int, r: int) -> np.ndarray:
        s = LOGITS[row, h, r].copy()
        if not (skip and ROWS[r] < LENGTH):
            s[:LENGTH] += weight[SAMPLES[row]] * abs(s[:LENGTH])
        return s

    method, call = Paint(alpha=alpha, beta=beta, share=share, fence=fence, layers=(1,), skip_first=skip), call_of()
    call.pixels = torch.zeros(3, 1)
    method.start(call, None)
    for number in range(3):
        method.tower_read(call, number, [torch.tensor(early[number]), torch.tensor(late[number])])
    near(run(method.edit(call, 1)), from_scores(change))
    assert method.edit(call, 2) is None


def test_paint_sets() -> None:
    """A summary token that is also among the best of the early layer is a summary token, weighed with beta."""
    late, early = [1.0, 2, 3, 4, 5, 6, 7, 30], [0.1, 0.2, 0.9, 0.3, 0.3, 0.3, 0.3, 0.8]
    low, high = np.quantile(late, [0.25, 0.75])
    assert (low, high) == (2.75, 6.25)
    prompt = ("SVVVVVVVVQR",)
    method, call = Paint(alpha=0.9, beta=0.4, share=0.25, fence=6.0, layers=(1,)), call_of(prompt)
    call.pixels = torch.zeros(1, 1)
    method.start(call, None)
    method.tower_read(call, 0, [torch.tensor(early), torch.tensor(late)])  # the fence stands at 6.25 + 6 * 3.5 = 27.25
    weight = call.memory(method)["weight"][0].tolist()
    assert weight == pytest.approx([0, 0, 0, 0.9, 0, 0, 0, 0, 0.4, 0, 0])


GIFT = {"alpha": 1.2, "beta": 1.5, "clip_sigma": 0.9}
INFORMATIVE = [[1], [0, 2]]  # of each prompt's question


def gift_map(rows: dict[int, np.ndarray], row: int) -> np.ndarray:
    """Saliency of a batch row's image tokens; ``rows``: attention ``[4, H, 1 + words, P]`` per saliency layer."""
    kept = []
    for attention in rows.values():
        shift = np.zeros((HEADS, len(INFORMATIVE[SAMPLES[row]]), len(at(row, "V"))))
        for h, (n, word), (m, j) in (
            (h, word, place)
            for h in range(HEADS)
            for word in enumerate(INFORMATIVE[SAMPLES[row]])
            for place in enumerate(at(row, "V"))
        ):
            shift[h, n, m] = max(attention[row, h, word + 1, j] - attention[row, h, word, j], 0.0)
        kept += [shift[h, n] for h in top(shift.sum((1, 2)).tolist()) for n in range(shift.shape[1])]
    mean = np.mean(kept, axis=0)
    reach = GIFT["clip_sigma"] * math.sqrt(((mean - mean.mean()) ** 2).sum() / (len(mean) - 1))
    clipped = mean.clip(mean.mean() - reach, mean.mean() + reach)
    assert (clipped != mean).any(), "the clip must matter"
    return (clipped - clipped.min()) / (clipped.max() - clipped.min())


def test_gift() -> None:
    """Gaze shift of the informative words over two layers, heads of each by their shift, the clip, both boosts and r."""
    random = np.random.default_rng(3)
    rows = {layer: random.dirichlet([0.4] * LENGTH, size=(4, HEADS, 4)) for layer in (0, 3)}
    maps = [gift_map(rows, row) for row in range(4)]
    before, wanted = plain(), plain()
    for row, r in np.ndindex(4, len(ROWS)):
        visual, question, a = at(row, "V"), at(row, "Q"), before[row, :, r]
        m = np.exp(GIFT["alpha"] * maps[row])
        looks, asks = top(a[:, visual].sum(1).tolist()), top(a[:, question].sum(1).tolist())
        ratio = sum((m * a[h, visual]).sum() for h in looks) / sum(a[h, visual].sum() for h in looks)
        for h in looks:
            wanted[row, h, r, visual] *= m
        for h in asks:
            wanted[row, h, r, question] *= GIFT["beta"] * ratio
    wanted /= wanted.sum(-1, keepdims=True)

    method, call = Gift(saliency_layers=(0, 3), enhance_layers=(2,), **GIFT), call_of()
    assert method.read_rows(call).tolist() == [[6, 7, 8, -1]] * 2 + [[5, 6, 7, 8]] * 2
    chosen = torch.zeros(2, 3, dtype=torch.bool)
    for sample, words in enumerate(INFORMATIVE):
        chosen[sample, words] = True
    call.memory(method)["informative"] = chosen
    method.prompt_read(call, {layer: torch.tensor(value).float() for layer, value in rows.items()})
    for row in range(4):
        found = call.memory(method)["saliency"][row]
        assert found[at(row, "V")].tolist() == pytest.approx(maps[row].tolist(), abs=1e-5)
        assert not found[at(row, "PSQR")].any()
    near(run(method.edit(call, 2)), wanted)
    assert method.edit(call, 0) is None


def test_ilvad() -> None:
    """exp(alpha S) on the image in heads whose image mass is evidence most, text weights in heads with most text mass."""
    saliency = np.zeros((2, LENGTH))
    saliency[0, [1, 2, 4, 5]], saliency[1, [2, 3, 4, 5]] = [0.0, 1.0, 0.3, 0.1], [1.0, 0.2, 0.0, 0.6]
    weight = np.random.default_rng(5).uniform(0.2, 2.5, size=(2, LENGTH))
    later = [0.4, 3.0]
    before, wanted = plain(), plain()
    for row, r in np.ndindex(4, len(ROWS)):
        sample, visual, a = SAMPLES[row], at(row, "V"), before[row, :, r]
        text = [j for j in range(visual[0], LENGTH) if j not in visual]
        looks = top([(saliency[sample, visual] * a[h, visual]).sum() / a[h, visual].sum() for h in range(HEADS)])
        asks = top([a[h, text].sum() + a[h, LENGTH:].sum() for h in range(HEADS)])
        for h in looks:
            wanted[row, h, r, visual] *= np.exp(0.8 * saliency[sample, visual])
        for h in asks:
            wanted[row, h, r, text] *= weight[sample, text]
            wanted[row, h, r, LENGTH:] *= later[sample]
    wanted /= wanted.sum(-1, keepdims=True)
    for parity, layer in ((False, 1), (True, 2)):
        method, call = Ilvad(alpha=0.8, layers=(1, 2), code_parity=parity), call_of()
        weights = [np.full_like(weight, 9.0)] * layer * parity + [weight]
        call.memory(method).update(
            saliency=torch.tensor(saliency).float(),
            weight=torch.tensor(np.array(weights)).float(),
            later=torch.tensor([[7.0, 7.0]] * layer * parity + [later]),
        )
        near(run(method.edit(call, layer)), wanted)
        assert method.edit(call, 0) is None


def test_agla() -> None:
    """What the question's words give each image token, summed over words, heads and layers, per sample; the best cells stay."""
    random = np.random.default_rng(9)
    rows = {layer: random.uniform(size=(4, HEADS, 3, LENGTH)) for layer in (0, 2)}
    method, call = Agla(layers=(0, 2), keep=0.5), call_of()
    assert method.read_rows(call).tolist() == [[7, 8, -1]] * 2 + [[6, 7, 8]] * 2
    method.prompt_read(call, {layer: torch.tensor(value).float() for layer, value in rows.items()})
    for number, (row, columns) in enumerate([(0, [1, 2]), (0, [4, 5]), (2, [2, 3, 4, 5])]):
        words = 3 if row else 2
        wanted = [sum(rows[layer][row, :, :words, j].sum() for layer in (0, 2)) for j in columns]
        looks, _ = call.memory(method)[number]
        assert looks.tolist() == pytest.approx(wanted, rel=1e-5)
        best = sorted(range(len(columns)), key=lambda n: -wanted[n])[: len(columns) // 2]
        assert most(looks, 0.5).nonzero().flatten().tolist() == sorted(best)


@pytest.mark.parametrize("parity", [False, True])
def test_var(parity: bool) -> None:
    """Sinks of text and image give up their share in open heads; the image without its sinks gets it in proportion."""
    p, rho, floor = 0.3, 0.55, 0.25
    sinks = [[0, 2], [1, 4]]
    before, wanted, cases = plain(), plain(), set()
    for row, h, r in np.ndindex(4, HEADS, len(ROWS)):
        a, out = before[row, h, r], wanted[row, h, r]
        image, sink = at(row, "V"), sinks[SAMPLES[row]]
        rest = [j for j in image if j not in sink]
        seen, kept = a[image].sum(), a[rest].sum()
        enough = (seen - kept) <= rho * seen if parity else kept >= rho * seen
        cases.add((bool(seen >= floor), bool(enough)))
        if seen >= floor and enough:
            moved = (1 - p if parity else p) * a[sink]
            out[sink] -= moved
            out[rest] += moved.sum() * a[rest] / kept
    assert cases >= {(True, True), (True, False), (False, True)}, "either bound must close a head by itself"
    method = Var(sink_dims=(0,), p=p, rho=rho, visual_floor=floor, layers=(1,), code_parity=parity)
    flags = torch.zeros(4, LENGTH, dtype=torch.bool)
    for row in range(4):
        flags[row, sinks[SAMPLES[row]]] = True
    call = call_of()
    call._tokens[("var", 1)] = flags
    call._tokens[("var", 2)] = flags
    near(run(method.edit(call, 1)), wanted)
    assert method.edit(call, 2) is None
    assert method.edit(call, 0) is None


def test_vhr() -> None:
    """VHD = |o - o'|, out where it and |o'|^2 are a deviation above the mean; alpha above the median of what is left."""
    random = np.random.default_rng(1)
    seen, blind = random.normal(size=(2, 6, 3)).round(1), random.normal(size=(2, 6, 3)).round(1)
    blind[0, 2], seen[0, 2] = [4.0, -4.0, 3.0], [-4.0, 4.0, -3.0]  # far apart and loud
    seen[1, 4], blind[1, 4] = [6.0, 6.0, 6.0], [0.1, 0.1, 0.1]  # far apart, not loud
    wanted = np.ones((2, 6))
    for sample in range(2):
        vhd = [math.dist(a, b) for a, b in zip(seen[sample], blind[sample], strict=True)]
        loud = [float((b**2).sum()) for b in blind[sample]]
        edges = [np.mean(v) + np.std(v, ddof=1) for v in (vhd, loud)]
        out = [h for h in range(6) if vhd[h] > edges[0] and loud[h] > edges[1]]
        assert out == ([2] if sample == 0 else [])
        left = [0.0 if h in out else vhd[h] for h in range(6)]
        for h in sorted(range(6), key=lambda h: -left[h])[:3]:
            wanted[sample, h] = 2.5
    assert wanted[1, 4] == 2.5
    method, call = Vhr(alpha=2.5, layers=(1,)), call_of()
    heads = method.choose(*head_divergence(torch.tensor(seen), torch.tensor(blind)))
    call.memory(method)["heads"] = {1: heads}
    found = method.head_scale(call, 1)
    assert found is not None
    assert found.tolist() == wanted[SAMPLES].tolist()
    assert method.head_scale(call, 2) is None
    last = Vhr(alpha=2.5, layers=(1,), rows="last")
    call.memory(last)["heads"] = {1: heads}
    assert last.head_scale(call, 1) is not None
    call.mode, call.done = "prompt", False
    assert last.head_scale(call, 1) is None
    assert method.head_scale(call, 1) is not None
