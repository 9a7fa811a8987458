# SPDX-License-Identifier: Apache-2.0
"""Every reducer beside its paper's equation, worked out in NumPy here, on a few numbers of which each one matters."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from tests.helpers import close
from vlm_attn.dropping import Reduction, _gather, _summed_up
from vlm_attn.method import ModelFacts
from vlm_attn.reduction import Picture, Reducer, outliers
from vlm_attn.tower import cls_attention
from vlm_attn.visual_token_ops import (
    CDPruner,
    DivPrune,
    FastV,
    HoloV,
    PruMerge,
    PyramidDrop,
    SparseVLM,
    Trim,
    VisionZip,
    VScan,
)
from vlm_attn.visual_token_ops.sparsevlm import density_peaks, raters

Array = NDArray[np.float64]
LLAVA = ModelFacts(model_type="llava", layers=32, heads=32, hidden=4096)


def drawn(*shape: int, seed: int = 0) -> Array:
    return np.random.default_rng(seed).standard_normal(shape)


def tensor(values: Any) -> torch.Tensor:
    return torch.tensor(np.asarray(values), dtype=torch.float32)


def picture(count: int, tokens: Any, **given: Any) -> Picture:
    tokens = np.asarray(tokens, dtype=float)
    given = {k: tensor(v) if isinstance(v, np.ndarray | list) else v for k, v in given.items()}
    grid = given.pop("grid", (1, len(tokens)))
    return Picture(
        tokens=tensor(tokens), places=torch.arange(len(tokens)), total=len(tokens), count=count, grid=grid, **given
    )


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def unit(x: Array) -> Array:
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def largest(score: Array, count: int) -> list[int]:
    return sorted(np.argsort(-score, kind="stable")[:count].tolist())


class TestFastV:
    def test_mean_of_heads(self) -> None:
        """The maximum over heads would keep 0 and 3, the first head 0 and 1, the mean keeps 1 and 2."""
        rows = np.array([[[0.9, 0.6, 0.5, 0.0, 0.0]], [[0.0, 0.5, 0.5, 0.8, 0.1]], [[0.0, 0.4, 0.5, 0.0, 0.3]]])
        assert FastV().choose(picture(2, np.zeros((5, 1)), rows=rows)).tolist() == [1, 2]
        assert rows.mean((0, 1)).argsort()[-2:].tolist() == [1, 2] or rows.mean((0, 1)).argsort()[-2:].tolist() == [
            2,
            1,
        ]

    def test_ties_and_halves(self) -> None:
        rows = np.array([[[0.1, 0.3, 0.3, 0.3, 0.2]]])
        assert FastV().choose(picture(2, np.zeros((5, 1)), rows=rows)).tolist() == [1, 2]
        assert [FastV(keep=0.5).left(0, n) for n in (5, 7, 9, 576)] == [2, 4, 4, 288]  # Python's round(), half to even


class TestPyramidDrop:
    def test_counts_are_cut_off(self) -> None:
        """50, 25 and 12.5 % of 575 are 287.5, 143.75 and 71.875."""
        method = PyramidDrop().bind(LLAVA)
        assert [method.left(stage, 575) for stage in range(3)] == [287, 143, 71]
        assert [method.left(stage, 576) for stage in range(3)] == [288, 144, 72]

    def test_mean_of_heads(self) -> None:
        rows = np.array([[[0.9, 0.2, 0.4]], [[0.0, 0.3, 0.45]]])  # means 0.45, 0.25, 0.425
        assert PyramidDrop().choose(picture(2, np.zeros((3, 1)), rows=rows)).tolist() == [0, 2]
        assert PyramidDrop().choose(picture(1, np.zeros((3, 1)), rows=rows)).tolist() == [0]


class TestDivPrune:
    def test_greedy_on_norms_that_differ(self) -> None:
        """Only directions count: angles of 0 to 100 degrees, lengths of 0.1 to 7; the short one has the smallest products."""
        angles, lengths = np.radians([0.0, 20, 45, 90, 100]), np.array([5.0, 0.1, 5, 5, 7])
        tokens = lengths[:, None] * np.stack([np.cos(angles), np.sin(angles)], 1)
        distance = 1 - np.cos(angles[:, None] - angles)
        nearest = [min(distance[i, j] for j in range(5) if j != i) for i in range(5)]
        chosen = [int(np.argmax(nearest))]
        assert chosen == [2]
        while len(chosen) < 3:
            chosen.append(
                max((i for i in range(5) if i not in chosen), key=lambda i: min(distance[i, j] for j in chosen))
            )
        assert DivPrune().choose(picture(3, tokens)).tolist() == sorted(chosen)

    def test_halves(self) -> None:
        assert [DivPrune(keep=0.5).left(0, n) for n in (5, 7, 9)] == [2, 4, 4]
        assert DivPrune().left(0, 576) == 56

    def test_half_precision_is_chosen_in_float32(self) -> None:
        tokens = 1 + 0.1 * drawn(40, 16)  # all much alike: rounding decides in half precision
        shown = picture(12, tokens)
        shown.tokens = shown.tokens.to(torch.bfloat16)
        wide = picture(12, shown.tokens.double().numpy())
        assert DivPrune().choose(shown).tolist() == DivPrune().choose(wide).tolist()


class TestCDPruner:
    def test_determinants(self) -> None:
        """The likeliest next token by the determinants of r_i cos_ij r_j, every step of them."""
        tokens, similar = (
            drawn(7, 4, seed=3) * np.arange(1, 8)[:, None],
            np.array([0.3, 0.1, 0.25, -0.1, 0.2, 0.05, 0.28]),
        )
        relevance = (-similar - (-similar).min() + 1e-6) / (similar.max() - similar.min())
        kernel = relevance[:, None] * (unit(tokens) @ unit(tokens).T) * relevance
        chosen: list[int] = []
        for _ in range(3):
            rest = [i for i in range(7) if i not in chosen]
            chosen.append(max(rest, key=lambda i: np.linalg.det(kernel[np.ix_([*chosen, i], [*chosen, i])])))
        shown = picture(3, tokens, memory={"similarity": tensor(similar)})
        assert CDPruner().choose(shown).tolist() == sorted(chosen)
        assert 3 in chosen  # least like the text
        assert 0 not in chosen


class TestTrim:
    def test_least_product_and_the_mean_of_the_rest(self) -> None:
        product, features = np.array([2.0, -1.0, 0.5, 3.0, -0.5, 1.0]), drawn(6, 3)
        weight = drawn(3, 2, seed=1)
        shown = picture(2, features @ weight, memory={"similarity": tensor(product)}, features=features)
        shown.project = lambda x: (x @ tensor(weight)) ** 2  # what is not linear tells where the mean is taken
        method = Trim(keep=2)
        chosen = method.choose(shown).tolist()
        assert chosen == [1, 3, 4]  # the two least products, and the middle one of 0, 2, 3, 5
        merged = method.merge(shown, torch.tensor(chosen))
        mean = features[[0, 2, 3, 5]].mean(0)
        close(merged, tensor(np.stack([features[1] @ weight, (mean @ weight) ** 2, features[4] @ weight])))
        assert method.owners(shown, torch.tensor(chosen)).tolist() == [3, 1, 3, 3, 4, 3]
        assert Trim(keep=2, summary=False).choose(shown).tolist() == [1, 4]

    def test_adaptive(self) -> None:
        """Shares softmax(-product): the two that lie above Q3 + 1.5 (Q3 - Q1) stay."""
        product = np.array([5.0, 4.9, 5.1, -1.0, 5.05, 4.95, -1.5, 5.0, 5.2])
        share = softmax(-product)
        low, high = np.percentile(share, [25, 75])
        wanted = np.flatnonzero(share > high + 1.5 * (high - low)).tolist()
        assert wanted == [3, 6]
        shown = picture(9, drawn(9, 2), memory={"similarity": tensor(product)})
        assert Trim(keep="adaptive", summary=False).choose(shown).tolist() == wanted

    def test_shares_are_cut_off(self) -> None:
        assert [Trim(keep=keep).left(0, 576) for keep in (0.21, 0.25, 121 / 576)] == [120, 144, 121]


class TestVisionZip:
    CLS = np.array([0.1, 0.5, 0.0, 0.05, 0.9, 0.02, 0.03, 0.04])
    KEYS = np.array([[1.0, 0], [0, 1], [0, 2], [3, 0.1], [1, 1], [0.1, 1], [5, 0], [0, 4]])

    def expected(self, features: Array, count: int, spaced: int, counted: int) -> tuple[list[int], list[int], Array]:
        dominant = largest(self.CLS, count - spaced - counted)
        rest = [i for i in range(len(features)) if i not in dominant]
        targets = [rest[i * (len(rest) // spaced)] for i in range(spaced)]
        merge = [i for i in rest if i not in targets]
        cosine = unit(self.KEYS[merge]) @ unit(self.KEYS[targets]).T
        goes = cosine.argmax(1)
        new = features[targets].copy()
        for place in range(spaced):
            mine = [i for i, to in zip(merge, goes, strict=True) if to == place]
            if mine:
                new[place] += features[mine].mean(0)  # the mean, not the sum
        return dominant, targets, new

    @pytest.mark.parametrize("cls_token", [True, False])
    def test_equation(self, cls_token: bool) -> None:
        features, weight, whole = drawn(8, 3), drawn(3, 3, seed=1), drawn(3, seed=2)
        dominant, targets, new = self.expected(features, 5, 2, int(cls_token))
        assert dominant == ([1, 4] if cls_token else [0, 1, 4])
        assert targets == ([0, 5] if cls_token else [2, 5])
        shown = picture(
            5, np.tanh(features @ weight), cls=self.CLS, keys=self.KEYS, features=features, cls_feature=whole
        )
        shown.project = lambda x: torch.tanh(x @ tensor(weight))
        method = VisionZip(keep=5, contextual=0.4, cls_token=cls_token)
        chosen = method.choose(shown)
        seat = [2] if cls_token else []
        assert chosen.tolist() == sorted([*dominant, *targets, *seat])
        merged = method.merge(shown, chosen)[method.order(shown, chosen)]
        rows = [*([whole] if cls_token else []), *features[dominant], *new]
        close(merged, tensor(np.tanh(np.stack(rows) @ weight)))

    def test_two_go_to_one(self) -> None:
        """Of 0, 2, 3, 5, 6, 7 the contextual ones are 0 and 5; 3 and 6 lie along 0's key, 2 and 7 along 5's."""
        features = np.diag(np.arange(1.0, 9))
        _, targets, new = self.expected(features, 5, 2, 1)
        assert new[0].tolist() == [1, 0, 0, 2, 0, 0, 3.5, 0]
        shown = picture(5, features, cls=self.CLS, keys=self.KEYS)
        method = VisionZip(keep=5, contextual=0.4)
        merged = method.merge(shown, torch.tensor(targets))
        close(merged, tensor(new))
        owners = method.owners(shown, method.choose(shown))
        assert owners.tolist() == [0, 1, 5, 0, 4, 5, 0, 5]


class TestPruMerge:
    def test_attention_is_one_softmax_over_all_heads(self) -> None:
        class Tower(torch.nn.Module):
            num_heads, head_dim, scale = 2, 2, 2**-0.5

            def __init__(self) -> None:
                super().__init__()
                self.q_proj, self.k_proj = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        torch.manual_seed(0)
        tower, hidden = Tower(), drawn(1, 5, 4)
        with torch.no_grad():
            found, keys = cls_attention(tower, tensor(hidden), wide=True)
        q, k = (
            hidden[0] @ m.weight.detach().double().numpy().T + m.bias.detach().double().numpy()
            for m in (tower.q_proj, tower.k_proj)
        )
        close(found[0], tensor(softmax(q[:1] @ k.T / 4**0.5)[0, 1:]))
        close(keys[0], tensor(k[1:]))

    @pytest.mark.parametrize("neighbours", [3, 32])
    def test_equation(self, neighbours: int) -> None:
        cls, keys, features = softmax(drawn(7)), drawn(7, 3, seed=1), drawn(7, 2, seed=2)
        weight = drawn(2, 2, seed=3)
        kept = np.argsort(-cls, kind="stable")[:3]
        cosine = unit(keys) @ unit(keys).T
        rows = []
        for c in kept:
            near = sorted((j for j in range(7) if j != c), key=lambda j: -cosine[c, j])[:neighbours]
            rows.append(
                features[c] + sum(cls[j] * features[j] for j in near)
            )  # other kept ones as well, not normalised
        gone = [j for j in range(7) if j not in kept]
        rows.append(sum(cls[j] * features[j] for j in gone))
        shown = picture(3, np.tanh(features @ weight), cls=cls, keys=keys, features=features)
        shown.project = lambda x: torch.tanh(x @ tensor(weight))
        method = PruMerge(keep=3, neighbours=neighbours)
        chosen = method.choose(shown)
        assert chosen.tolist() == sorted([*kept.tolist(), gone[2]])
        order = method.order(shown, chosen)
        assert chosen[order].tolist() == [*kept.tolist(), gone[2]]
        close(method.merge(shown, chosen)[order], tensor(np.tanh(np.stack(rows) @ weight)))
        owners = method.owners(shown, chosen).tolist()
        assert [owners[j] for j in gone] == [gone[2]] * 4

    def test_adaptive(self) -> None:
        cls = np.array([0.02, 0.03, 0.9, 0.01, 0.02, 0.03, 0.5, 0.02, 0.01])
        low, high = np.percentile(cls, [25, 75])
        assert (cls > high + 1.5 * (high - low)).sum() == outliers(tensor(cls)) == 2
        shown = picture(9, drawn(9, 2), cls=cls, keys=drawn(9, 2))
        method = PruMerge(keep="adaptive")
        assert method.choose(shown).tolist() == [2, 4, 6]  # two outliers, and the one more in the middle of the rest

    def test_plus_adaptive(self) -> None:
        """2 outliers of 24: on average one in 12, so every 4th of the first 23 beside them."""
        cls = np.full(24, 0.01) + np.arange(24) * 1e-4
        cls[[5, 8]] = 0.4
        shown = picture(24, drawn(24, 2), cls=cls, keys=drawn(24, 2))
        method = PruMerge(keep="adaptive", plus=True)
        assert method.ranked(shown).tolist() == [5, 8, 0, 4, 12, 16, 20]

    def test_plus_with_a_ratio(self) -> None:
        """A quarter of 24 is 3 by attention and 3 spaced: every 8th from the 4th on, and what is both counts once."""
        cls = np.full(24, 0.01)
        cls[[4, 9, 23]] = [0.1, 0.3, 0.2]
        shown = picture(6, drawn(24, 2), cls=cls, keys=drawn(24, 2))
        assert PruMerge(keep=0.25, plus=True).ranked(shown).tolist() == [9, 23, 4, 12, 20]


class TestHoloV:
    def test_quota_and_choice(self) -> None:
        """Four chunks of three; means of 1000 a + 0.09 v decide, leftovers go to the largest, one each."""
        cls = np.array([0.01, 0.02, 0.03, 0.2, 0.1, 0.15, 0.05, 0.01, 0.02, 0.001, 0.002, 0.003])
        tokens = drawn(12, 4)
        cosines = [unit(part) @ unit(part).T for part in np.split(tokens, 4)]
        varied = np.concatenate([c.var(1) for c in cosines])
        score = 1000 * cls + 0.09 * varied / varied.max()
        mean = score.reshape(4, 3).mean(1)
        share = mean / mean.sum() * 6
        quota = np.floor(share).astype(int)
        for c in np.argsort(-mean)[: 6 - quota.sum()]:
            quota[c] += 1
        assert quota.tolist() == [0, 5, 1, 0]  # more than the second chunk holds
        quota = np.array([1, 3, 2, 0])  # the two that do not fit go to the largest that have room
        wanted = [3 * c + i for c in range(4) for i in largest(cls[3 * c : 3 * c + 3], quota[c])]
        shown = picture(6, tokens, cls=cls)
        assert HoloV(chunks=4).choose(shown).tolist() == sorted(wanted)

    def test_released_score(self) -> None:
        cls, tokens = np.array([0.3, 0.1, 0.2, 0.05, 0.25, 0.1]), drawn(6, 3, seed=4)
        wanted = []
        for a, part in zip(np.split(1000 * cls, 2), np.split(tokens, 2), strict=True):
            cosine = unit(part) @ unit(part).T * (1 - np.eye(3))
            mean = cosine.sum(1) / 2
            variance = ((cosine - mean[:, None]) ** 2).sum(1) / 2
            wanted.append(a + 0.09 * variance * a.mean() / (variance.mean() + 1e-6))
        shown = picture(3, tokens, cls=cls)
        close(HoloV(chunks=2, code_parity=True).score(shown), tensor(np.concatenate(wanted)))

    def test_released_order(self) -> None:
        """Chunk by chunk, by attention; a chunk that stays whole as it stands."""
        cls = np.array([0.1, 0.3, 0.2, 0.1, 0.05, 0.07])
        shown = picture(5, drawn(6, 3), cls=cls)
        method = HoloV(chunks=2, variance_weight=0.0)
        chosen = method.choose(shown)
        assert chosen.tolist() == [0, 1, 2, 3, 5]
        assert chosen[method.order(shown, chosen)].tolist() == [0, 1, 2, 3, 5]
        shown.count = 4
        chosen = method.choose(shown)
        assert chosen[method.order(shown, chosen)].tolist() == [0, 1, 2, 3]
        shown.cls = tensor([0.1, 0.3, 0.2, 0.25, 0.05, 0.3])
        assert torch.cat(method.best(shown)).tolist() == [1, 2, 5, 3]


class TestSparseVLM:
    def test_raters(self) -> None:
        """A softmax over the text for every image token, its mean over the image, above the average of these."""
        image, text = drawn(4, 3), drawn(6, 3, seed=1)
        share = softmax(image @ text.T).mean(0)
        wanted = np.flatnonzero(share > share.mean()).tolist()
        assert 0 < len(wanted) < 5
        assert raters(tensor(image), tensor(text)).tolist() == wanted

    def test_score_is_the_mean_over_heads_and_raters(self) -> None:
        rows = np.random.default_rng(2).random((3, 4, 6))
        wanted = rows[:, [0, 3]].mean((0, 1))
        shown = picture(2, drawn(6, 2), rows=rows, memory={"raters": torch.tensor([0, 3])}, stage=1)
        close(SparseVLM().score(shown), tensor(wanted))
        assert SparseVLM(recycle=0.0).choose(shown).tolist() == largest(wanted, 2)

    def test_version_2(self) -> None:
        """Attention over what the rotation makes of it; the two heads that then give the image most."""
        rows = np.random.default_rng(3).random((4, 3, 5))
        turns = np.random.default_rng(4).random((3, 5)) + 0.2
        picked = [0, 2]
        corrected = rows[:, picked] / turns[picked]
        heads = np.argsort(-corrected.sum((1, 2)))[:2]
        assert set(heads) != set(np.argsort(-rows[:, picked].sum((1, 2)))[:2])
        wanted = corrected[heads].mean((0, 1))
        assert largest(wanted, 2) != largest(corrected.mean((0, 1)), 2)  # so the choice of heads matters
        shown = picture(2, drawn(5, 2), rows=rows, turns=turns, memory={"raters": torch.tensor(picked)}, stage=1)
        method = SparseVLM(version=2, heads=2)
        close(method.score(shown), tensor(wanted))
        assert method.choose(shown).tolist() == largest(wanted, 2)  # nothing is recycled
        assert method.merge(shown, method.choose(shown)) is None

    @pytest.mark.parametrize("neighbours", [1, 2, 3])
    def test_density_peaks(self, neighbours: int) -> None:
        """Distances over the root of the width: with it these centres, without it others."""
        tokens = np.array([[0.0, 0], [3, 0], [0, 4], [9, 9], [10, 9], [9, 11], [30, 0], [4, 3.0]])

        def peaks(width: float) -> tuple[list[int], list[int]]:
            distance = np.linalg.norm(tokens[:, None] - tokens, axis=-1) / width**0.5
            density = np.exp(-(np.sort(distance, 1)[:, :neighbours] ** 2).mean(1)) - np.arange(8) * 1e-6
            apart = [
                min((distance[i, j] for j in range(8) if density[j] > density[i]), default=distance.max())
                for i in range(8)
            ]
            centres = np.argsort(-np.array(apart) * density, kind="stable")[:3]
            goes = distance[:, centres].argmin(1)
            goes[centres] = range(3)
            return centres.tolist(), goes.tolist()

        centre, goes = density_peaks(tensor(tokens), 3, neighbours)
        assert (centre.tolist(), goes.tolist()) == peaks(2)

    def test_density_hangs_on_the_width(self) -> None:
        """exp(-d²) with d over sqrt(D), 16 here: without the root the second centre is another one."""
        tokens = np.zeros((6, 16))
        tokens[:, 0] = [4.0, 2, 5, 10, 3, 1]

        def centres(scale: float) -> list[int]:
            distance = np.abs(tokens[:, None, 0] - tokens[:, 0]) / scale
            density = np.exp(-(np.sort(distance, 1)[:, :2] ** 2).mean(1)) - np.arange(6) * 1e-6
            apart = [
                min((distance[i, j] for j in range(6) if density[j] > density[i]), default=distance.max())
                for i in range(6)
            ]
            return sorted(np.argsort(-np.array(apart) * density, kind="stable")[:2].tolist())

        assert (centres(4.0), centres(1.0)) == ([0, 3], [0, 1])
        assert sorted(density_peaks(tensor(tokens), 2, 2)[0].tolist()) == centres(4.0)

    def test_recycling(self) -> None:
        """int(0.3 * 20) + 1 of the dropped are recycled, in int(7 / 10) + 1 cluster: their mean."""
        tokens, score = drawn(24, 3), np.random.default_rng(8).random(24)
        shown = picture(4, tokens, rows=score[None, None], memory={"raters": torch.tensor([0])}, stage=1)
        kept = largest(score, 4)
        rest = [i for i in range(24) if i not in kept]
        recycled = sorted(sorted(rest, key=lambda i: -score[i])[: int(0.3 * 20) + 1])
        assert len(recycled) == 7
        method = SparseVLM()
        chosen = method.choose(shown)
        (centre,) = set(chosen.tolist()) - set(kept)
        assert centre in recycled
        close(method.merge(shown, chosen)[chosen.tolist().index(centre)], tensor(tokens[recycled].mean(0)))
        owners = method.owners(shown, chosen).tolist()
        assert [i for i, to in enumerate(owners) if to == centre] == recycled
        assert {owners[i] for i in rest if i not in recycled} == {-1}

    @pytest.mark.parametrize(
        ("version", "mean", "lists"),
        [(1, 192, [300, 200, 110]), (2, 192, [300, 200, 118]), (2, 128, [238, 108, 60]), (2, 96, [246, 54, 28]),
         (2, 64, [66, 34, 20])],
    )  # fmt: skip
    def test_lists(self, version: int, mean: int, lists: list[int]) -> None:
        method = SparseVLM(keep=mean, version=version).bind(LLAVA)
        assert [method.left(stage, 576) for stage in range(4)] == [576, *lists]


class TestVScan:
    def test_both_halves_and_the_means(self) -> None:
        """4 x 4 tokens in windows of 2 x 2: one of each by the early layer, four more by the late one, the rest averaged in."""
        local, late, tokens = drawn(16), drawn(16, seed=1), drawn(16, 3, seed=2)
        windows = [[r * 4 + c + i * 4 + j for i in (0, 1) for j in (0, 1)] for r in (0, 2) for c in (0, 2)]
        first = [max(w, key=lambda i: local[i]) for w in windows]
        late[first] += 9  # those are taken already
        rest = sorted((i for i in range(16) if i not in first), key=lambda i: -late[i])[:4]
        kept = sorted([*first, *rest])
        shown = picture(8, tokens, cls=late, local=local, grid=(4, 4))
        method = VScan(window=2)
        chosen = method.choose(shown)
        assert chosen.tolist() == kept
        goes = (unit(tokens) @ unit(tokens[kept]).T).argmax(1)
        wanted = [
            tokens[[k, *(i for i in range(16) if i not in kept and goes[i] == place)]].mean(0)
            for place, k in enumerate(kept)
        ]
        close(method.merge(shown, chosen), tensor(np.stack(wanted)))


class TestCompensation:
    def test_three_stages(self) -> None:
        """What a stage hands back counts for all it stands for, at the next one too: 6 tokens, then 4 of them, then 3."""
        values = drawn(6, 2)
        state = Reduction(True, 8, torch.ones(1, 8, dtype=torch.bool))
        tokens, size = values.copy(), np.ones(6)
        there = [0, 1, 2, 3, 4, 5]
        for going in ([1, 2, 4], [2, 3]):  # 2 is what the first stage handed back: it counts three
            mean = (size[going][:, None] * tokens[going]).sum(0) / size[going].sum()
            seat = going[len(going) // 2]
            local = {token: place for place, token in enumerate(there)}
            owners = torch.tensor([-1 if token in going else local[token] for token in there])
            changed, merged, _ = _summed_up(state, slice(0, 1), torch.tensor(there) + 1, tensor(tokens[there]), owners)
            assert there[int(changed)] == seat
            close(merged[0], tensor(mean))
            tokens[seat], size[seat] = mean, size[going].sum()
            there = [token for token in there if token not in going or token == seat]
        assert state.size is not None
        assert state.size[0, 1 + seat] == 4
        close(merged[0], tensor(values[[1, 2, 4, 3]].mean(0)))  # the plain mean of all four


def test_what_is_gone_cannot_fill_up_a_row() -> None:
    """Two stages of a batch of two: rows that keep fewer are filled up with what is still there, not with what went before."""
    call: Any = SimpleNamespace(first=0, length=6)
    visible = torch.tensor([[1, 0, 0, 1, 1, 1], [0, 0, 1, 1, 1, 1]]).bool()
    state = Reduction(True, 6, visible)
    hidden = torch.arange(12.0).view(2, 6, 1)
    once = _gather(call, state, hidden)
    assert state.rows is not None
    assert state.rows.tolist() == [[0, 3, 4, 5], [2, 3, 4, 5]]
    assert once[..., 0].tolist() == [[0, 3, 4, 5], [8, 9, 10, 11]]
    state.visible = torch.tensor([[1, 0, 0, 0, 0, 1], [0, 0, 1, 0, 1, 1]]).bool()
    twice = _gather(call, state, once)
    assert state.rows.tolist() == [
        [0, 3, 5],
        [2, 4, 5],
    ]  # 3 fills the first row up: 1 and 2 are gone since the first stage
    assert twice[..., 0].tolist() == [[0, 3, 5], [8, 10, 11]]


class TestRows:
    """What a published row means, for 576 tokens and 32 layers."""

    def left(self, method: Reducer) -> list[int]:
        bound: Any = method.bind(LLAVA)
        here, per_layer = 576, []
        for layer in range(32):
            for stage, at in enumerate(bound.stages):
                if at == layer:
                    here = bound.left(stage, 576)
            per_layer.append(here)
        return per_layer

    @pytest.mark.parametrize(
        ("cls", "row", "mean"),
        [(FastV, "paper-192", 192), (FastV, "paper-128", 128), (FastV, "paper-64", 64), (VScan, "paper-192", 192),
         (VScan, "paper-128", 128), (VScan, "paper-64", 64), (VisionZip, "paper-192", 192), (HoloV, "paper-64", 64),
         (PyramidDrop, "paper", 270)],
    )  # fmt: skip
    def test_mean_over_layers(self, cls: Any, row: str, mean: int) -> None:
        assert abs(np.mean(self.left(cls(keep=row))) - mean) < 0.5

    def test_sparsevlm_counts_what_it_keeps(self) -> None:
        """2 layers of 576, 4 of 300, 9 of 200 and 17 of 110 are 192 and a little; the means it recycles come on top."""
        left = self.left(SparseVLM(keep="paper-192"))
        assert [left.count(n) for n in (576, 300, 200, 110)] == [3, 4, 9, 16]

    def test_a_row_sets_its_parameters(self) -> None:
        assert FastV(keep="paper-k2-r50") == FastV(layer=2, keep=0.5)
        assert SparseVLM(keep="paper-plus-64") == SparseVLM(keep=64 / 576, version=2)
        with pytest.raises(ValueError, match=r"means layer=2, and layer=5 was given"):
            FastV(keep="paper-192", layer=5)
        with pytest.raises(ValueError, match=r"no published row.*\"paper-192\""):
            FastV(keep="192")
        with pytest.raises(ValueError, match="no published row"):
            DivPrune(keep="adaptive")
