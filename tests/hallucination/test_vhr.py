# SPDX-License-Identifier: Apache-2.0
"""VHR: divergences, the outlier rule and the choice of heads by hand, and the whole against an eager attention of our own."""

from __future__ import annotations

import statistics
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, Weigh, close, differ, generate, logits, margins, on, same
from tests.oracle import oracle
from vlm_attn.hallucination import Vhr
from vlm_attn.hallucination.vhr import head_divergence, outliers, token_divergence, token_score, upper_half
from vlm_attn.method import ModelFacts


class TestSteps:
    def test_divergence(self) -> None:
        """(3, 4) against (0, 0): 5 and 0. (1, 1) against (1, 3): 2 and 10."""
        vhd, ta = head_divergence(torch.tensor([[3.0, 4.0], [1.0, 1.0]]), torch.tensor([[0.0, 0.0], [1.0, 3.0]]))
        close(vhd, torch.tensor([5.0, 2.0]))
        close(ta, torch.tensor([0.0, 10.0]))

    def test_outliers(self) -> None:
        """Mean 3 and deviation 4 of (1, 1, 1, 9): 9 is out where the activation says so too."""
        vhd = torch.tensor([[1.0, 1.0, 1.0, 9.0]]).repeat(3, 1)
        ta = torch.tensor([[2.0, 2.0, 2.0, 50.0], [50.0, 2.0, 2.0, 2.0], [2.0, 2.0, 2.0, 2.0]])
        assert outliers(vhd, ta).tolist() == [[False, False, False, True], [False] * 4, [False] * 4]

    @pytest.mark.parametrize(
        ("vhd", "wanted"),
        [
            ((4.0, 1.0, 3.0, 2.0), [True, False, True, False]),
            ((5.0, 1.0, 3.0), [True, False, False]),
            ((7.0,), [False]),
            ((2.0, 2.0, 2.0, 2.0), [False] * 4),
        ],
    )
    def test_upper_half(self, vhd: tuple[float, ...], wanted: list[bool]) -> None:
        assert upper_half(torch.tensor(vhd)).tolist() == wanted

    def test_an_outlier_makes_room(self) -> None:
        vhd, ta = torch.tensor([[3.0, 1.0, 2.0, 90.0]]), torch.tensor([[1.0, 1.0, 1.0, 90.0]])
        assert Vhr().choose(vhd, ta).tolist() == [[True, False, True, False]]
        assert Vhr(drop_outliers=False).choose(vhd, ta).tolist() == [[True, False, False, True]]

    def test_factor(self) -> None:
        assert Vhr(alpha=3.0).factor(torch.tensor([[True, False]])).tolist() == [[3.0, 1.0]]

    def test_token_score(self) -> None:
        """Two layers: 5 + 3 and 4 + 2."""
        vhd = torch.tensor([[[5.0, 1.0, 3.0], [0.0, 2.0, 4.0]]])
        close(token_score(vhd, 2), torch.tensor([14.0]))
        close(token_score(vhd, 1), torch.tensor([9.0]))
        for k in (0, 4):
            with pytest.raises(ValueError, match=r"outside 1\.\.3"):
                token_score(vhd, k)

    def test_layers(self) -> None:
        """The second and the last 14 of 32."""
        for count, wanted in ((32, (1, *range(18, 32))), (4, (1, 2, 3)), (1, (0,))):
            assert Vhr().bind(ModelFacts(model_type="llava", layers=count, heads=4, hidden=32)).layers == wanted


def streams(model: Any, x: Inputs) -> tuple[Inputs, Inputs]:
    """The prompt with its picture, and without."""
    ids = x["input_ids"][0]
    blind = ids[(ids != tiny.IMAGE) & (ids != tiny.START) & (ids != tiny.END)][None]
    return x, {"input_ids": blind, "attention_mask": torch.ones_like(blind)}


def scaled(out: Tensor, factor: Tensor, first: int) -> Tensor:
    """``[B, H, Q, D]`` with the rows from ``first`` on times ``[H]``."""
    rows = torch.arange(out.shape[2]) >= first % out.shape[2]
    return torch.where(rows[:, None], out * factor[None, :, None, None], out)


def head_outputs(model: Any, inputs: Inputs, factors: dict[int, Tensor], first: int = 0) -> list[Tensor]:
    """Last row ``[H, D]`` of every layer's heads in one plain forward, some layers' heads scaled in rows from ``first`` on."""
    found: list[Tensor] = []

    def hand(layer: int, out: Tensor) -> Tensor:
        found.append(out[0, :, -1])
        return scaled(out, factors[layer], first) if layer in factors else out

    logits(oracle(model, output=hand), inputs)
    return found


def heads_by_hand(model: Any, x: Inputs, settings: dict[str, Any]) -> dict[int, Tensor]:
    """Layer by layer, a new forward of both streams for each: factors ``[H]``."""
    factors: dict[int, Tensor] = {}
    first = -1 if settings.get("rows") == "last" else 0
    for layer in settings["layers"]:
        seen, blind = (head_outputs(model, s, factors, first)[layer].double() for s in streams(model, x))
        vhd = [float((a - b).square().sum().sqrt()) for a, b in zip(seen, blind, strict=True)]
        ta = [float(b.square().sum()) for b in blind]
        if settings.get("drop_outliers", True):
            edge = [statistics.mean(v) + statistics.stdev(v) for v in (vhd, ta)]
            vhd = [0.0 if v > edge[0] and t > edge[1] else v for v, t in zip(vhd, ta, strict=True)]
        chosen = sorted(range(len(vhd)), key=lambda h: -vhd[h])[: len(vhd) // 2]
        factors[layer] = torch.tensor([settings.get("alpha", 2.0) if h in chosen else 1.0 for h in range(len(vhd))])
    return factors


@pytest.mark.parametrize("family", ["llava", "qwen2_vl", "gemma3"])
@pytest.mark.parametrize(
    "changes", [{}, {"alpha": 1.5, "layers": (0, 2), "drop_outliers": False}, {"alpha": 3.0, "rows": "last"}]
)
def test_against_eager(family: str, changes: dict[str, Any]) -> None:
    """Every row scaled, in the prompt and later; or those from the last prompt token on."""
    model, inputs = tiny.FAMILIES[family]()
    x = inputs([[3, "image", 9]], seed=4)
    settings = {**ACTIVE["vhr"], **changes}
    factors = heads_by_hand(model, x, settings)
    prompt = x["input_ids"].shape[1]
    first = prompt - 1 if changes.get("rows") == "last" else 0

    def output(layer: int, out: Tensor) -> Tensor:
        return scaled(out, factors[layer], first if out.shape[2] > 1 else 0) if layer in factors else out

    own = oracle(model, output=output)
    wanted, wanted_logits = generate(own, x, new=8), logits(own, x)
    with vlm_attn.patched(model, "vhr", **settings), margins() as margin:
        close(logits(model, x), wanted_logits)
        for options in ({}, {"use_cache": False}, {"cache_implementation": "static"}):
            same(generate(model, x, new=8, **options), wanted)
    margin.check()
    differ(wanted[1][0], generate(model, x)[1][0])


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Inputs, Tensor]:
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9], [2, "image", 7, "image", 5]], seed=1)
    with on(model, "vhr"):
        return model, x, logits(model, x)[:, -1]


@pytest.mark.parametrize(
    "change", [{"alpha": 1.5}, {"alpha": 0.5}, {"layers": (1, 2)}, {"layers": 1}, {"rows": "last"}]
)
def test_changes(setting: Any, change: dict[str, Any]) -> None:
    model, x, before = setting
    with on(model, "vhr", **change):
        differ(logits(model, x)[:, -1], before)


def test_outlier_switch_changes(setting: Any) -> None:
    """On a prompt where a head is far above the others, with the picture and without."""
    model, inputs = tiny.llava()
    changed = []
    for seed in range(8):
        runs = []
        for drop in (True, False):
            with on(model, "vhr", drop_outliers=drop):
                runs.append(logits(model, inputs([[3, "image", 9]], seed=seed))[:, -1])
        changed.append(float((runs[0] - runs[1]).abs().max()))
    assert max(changed) > 1e-2
    assert min(changed) == 0


def test_neutral(setting: Any) -> None:
    model, x, _ = setting
    plain = logits(model, x)
    assert Vhr(alpha=1).neutral
    with on(model, "vhr", alpha=1):
        assert torch.equal(logits(model, x), plain)


def test_later_turn_without_its_own_first(setting: Any) -> None:
    model, _, _ = setting
    x = tiny.llava()[1]([[3, "image", 9]])
    from vlm_attn import host

    with torch.no_grad():
        cache = host.cache_of(model(**x, use_cache=True))
    more = torch.cat([x["input_ids"], torch.full((1, 4), 7)], 1)
    with on(model, "vhr"), pytest.raises(ValueError, match="filled without vhr"):
        model.generate(input_ids=more, attention_mask=torch.ones_like(more), max_new_tokens=1, **{host.CACHE: cache})


def test_with_gift(setting: Any) -> None:
    model, x, before = setting
    with vlm_attn.patched(model, [Vhr(), vlm_attn.registry.build("gift", **ACTIVE["gift"])]), margins() as margin:
        both = generate(model, x)
        same(generate(model, x, use_cache=False), both)
    margin.check()
    differ(both[1][0], before)
    with on(model, "gift"):
        differ(both[1][0], logits(model, x)[:, -1])


def test_louder_beside_an_edit(setting: Any) -> None:
    """Rows that are edited are reinforced as well: an edit that changes nothing leaves vhr what it is."""
    model, x, _ = setting
    with on(model, "vhr"):
        alone = generate(model, x)
    with vlm_attn.patched(model, [Vhr(**ACTIVE["vhr"]), Weigh(image=1.0)]):
        same(generate(model, x), alone)


def test_token_divergence() -> None:
    """Each token's row in plain forwards of both streams; a model that is not changed afterwards."""
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 6]], seed=2)
    answer = generate(model, x, new=4)[0][0].tolist()
    found = token_divergence(model, x, answer)
    assert found.shape == (4, 4, 4)
    for t in range(4):
        so_far = torch.tensor([answer[:t]], dtype=torch.long)
        rows = []
        for stream in streams(model, x):
            ids = torch.cat([stream["input_ids"], so_far], 1)
            rows.append(head_outputs(model, {**stream, "input_ids": ids, "attention_mask": torch.ones_like(ids)}, {}))
        for layer in range(4):
            close(found[t, layer], (rows[0][layer] - rows[1][layer]).norm(dim=-1))
    assert not vlm_attn.is_patched(model)
    with pytest.raises(ValueError, match="0 tokens"):
        token_divergence(model, x, [])


@pytest.mark.parametrize("wrong", [{"alpha": 0.0}, {"layers": "x"}, {"drop_outliers": 1}, {"rows": "first"}])
def test_wrong_values(wrong: dict[str, Any]) -> None:
    with pytest.raises((TypeError, ValueError), match=next(iter(wrong))):
        Vhr(**wrong)
