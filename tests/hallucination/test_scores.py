# SPDX-License-Identifier: Apache-2.0
"""PAI, VAF and heads-guided attention: their equations on arrays, and each of them against an eager attention of our own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LogitsProcessorList

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Force, Inputs, close, differ, generate, logits, on, same
from tests.oracle import oracle
from vlm_attn.hallucination import Guidance, HeadGuided, Pai, Vaf
from vlm_attn.kernels import ScoreEdit
from vlm_attn.method import ModelFacts
from vlm_attn.patching import engine_of

FACTS = ModelFacts(model_type="llava", layers=32, heads=4, hidden=32)
# Two heads, one row, four keys; the first two weighed 1 and 0.5.
LOGITS = torch.tensor([[[[2.0, -4.0, 1.0, -1.0]], [[-6.0, 2.0, 1.0, -1.0]]]])
WEIGHT = torch.tensor([[1.0, 0.5, 0.0, 0.0]])


class TestEquations:
    def test_magnitude(self) -> None:
        """s + w |s|: a negative logit is raised as well."""
        now = ScoreEdit(WEIGHT, "magnitude")(LOGITS)
        close(now, torch.tensor([[[[4.0, -2.0, 1.0, -1.0]], [[0.0, 3.0, 1.0, -1.0]]]]))

    def test_head_mean(self) -> None:
        """s + w mean_h |s|: 4 and 3 on the first two keys."""
        now = ScoreEdit(WEIGHT, "head_mean")(LOGITS)
        close(now, torch.tensor([[[[6.0, -2.5, 1.0, -1.0]], [[-2.0, 3.5, 1.0, -1.0]]]]))

    def test_logit(self) -> None:
        """s + w s: a negative logit is lowered."""
        now = ScoreEdit(WEIGHT, "logit")(LOGITS)
        close(now, torch.tensor([[[[4.0, -6.0, 1.0, -1.0]], [[-12.0, 3.0, 1.0, -1.0]]]]))

    def test_keys_beyond_the_prompt_and_offset(self) -> None:
        now = ScoreEdit(WEIGHT[:, :2], "logit")(LOGITS, offset=1)
        close(now[0, 0, 0], torch.tensor([3.0, -4.0, 1.0, -1.0]))

    @pytest.mark.parametrize("row", [3, torch.tensor(3)])
    def test_from_row(self, row: Any) -> None:
        """Rows 3, 4, 5; from 4 on."""
        three = LOGITS.expand(1, 2, 3, 4)
        now = ScoreEdit(WEIGHT, "logit", from_row=4)(three, row=row)
        close(now[:, :, 0], LOGITS[:, :, 0])
        close(now[:, :, 1:], ScoreEdit(WEIGHT, "logit")(three)[:, :, 1:])

    def test_default_layers(self) -> None:
        """Those of the papers' 32 layers; the same depth of other models."""
        assert Pai().bind(FACTS).layers == tuple(range(2, 32))
        assert Vaf().bind(FACTS).layers == tuple(range(9, 15))
        assert HeadGuided().bind(FACTS).layers == tuple(range(5, 19))
        shallow = ModelFacts(model_type="llava", layers=4, heads=4, hidden=32)
        assert Pai().bind(shallow).layers == (0, 1, 2, 3)
        assert Vaf().bind(shallow).layers == (1,)
        assert HeadGuided().bind(shallow).layers == (1,)
        one = ModelFacts(model_type="llava", layers=1, heads=4, hidden=32)
        assert Vaf().bind(one).layers == (0,)


# The methods once more, on raw scores [B, H, Q, S] of a model without padding: which rows, which keys, what.


def by_hand(method: str, x: Inputs, settings: dict[str, Any]) -> Callable[[int, Tensor], Tensor]:
    visual = (x["input_ids"][0] == tiny.IMAGE).nonzero().flatten().tolist()
    prompt = x["input_ids"].shape[1]

    def hand(layer: int, scores: Tensor) -> Tensor:
        if layer not in settings["layers"]:
            return scores
        new = scores.clone()
        rows, keys = scores.shape[2:]
        for r in range(rows):
            column = keys - rows + r
            if method == "vaf":
                if column <= visual[0] or column in visual:
                    continue
                new[:, :, r, visual] = settings["visual"] * scores[:, :, r, visual]
                new[:, :, r, : visual[0]] = settings["system"] * scores[:, :, r, : visual[0]]
            elif column >= prompt - 1 + settings.get("skip_first", False):
                size = scores[:, :, r, visual].abs()
                if method == "head_guided":
                    size = size.mean(1, keepdim=True)
                new[:, :, r, visual] += settings["alpha"] * size
        return new

    return hand


CASES = [
    ("pai", {}),
    ("pai", {"skip_first": True}),
    ("vaf", {}),
    ("vaf", {"visual": 0.5, "system": 1.0}),
    ("head_guided", {}),
]


@pytest.mark.parametrize(("method", "changes"), CASES)
def test_against_eager(method: str, changes: dict[str, Any]) -> None:
    """Prompt, decoding with and without a cache, a static cache and candidates checked several at a time."""
    model, inputs = tiny.llava()
    x = inputs([[3, "image", 9]], seed=2)
    settings = {**ACTIVE[method], **changes}
    own = oracle(model, scores=by_hand(method, x, settings))
    wanted, wanted_logits = generate(own, x, new=8), logits(own, x)
    with vlm_attn.patched(model, method, **settings):
        close(logits(model, x), wanted_logits)
        for options in (
            {},
            {"use_cache": False},
            {"cache_implementation": "static"},
            {"prompt_lookup_num_tokens": 2},
        ):
            same(generate(model, x, new=8, **options), wanted)
    plain = generate(model, x, new=8)[1]
    first = 1 if settings.get("skip_first") else 0
    if first:
        close(wanted[1][0], plain[0])
    differ(wanted[1][first], plain[first])


@pytest.fixture(scope="module")
def setting() -> tuple[Any, Inputs]:
    model, inputs = tiny.llava()
    return model, inputs([[3, "image", 9], [2, "image", 7, "image", 5]], seed=1)


def last(model: Any, x: Inputs, method: str, **changes: Any) -> Tensor:
    """Logits of the second step, which every switch reaches."""
    with on(model, method, **changes):
        return generate(model, x, new=2, suppress_tokens=[tiny.IMAGE])[1][1]


class TestSensitivity:
    @pytest.mark.parametrize(
        ("method", "change"),
        [
            ("pai", {"alpha": 0.3}),
            ("pai", {"layers": (1, 2)}),
            ("pai", {"skip_first": True}),
            ("vaf", {"visual": 1.3}),
            ("vaf", {"system": 0.9}),
            ("vaf", {"layers": 1}),
            ("head_guided", {"alpha": 0.4}),
            ("head_guided", {"layers": range(1, 4)}),
        ],
    )
    def test_changes(self, setting: Any, method: str, change: dict[str, Any]) -> None:
        differ(last(*setting, method, **change), last(*setting, method))

    @pytest.mark.parametrize(
        ("method", "change"),
        [("pai", {"alpha": 0}), ("vaf", {"visual": 1.0, "system": 1}), ("head_guided", {"alpha": 0.0})],
    )
    def test_neutral(self, setting: Any, method: str, change: dict[str, Any]) -> None:
        model, x = setting
        plain = logits(model, x)
        with on(model, method, **change):
            assert engine_of(model).methods[0].neutral
            assert torch.equal(logits(model, x), plain)

    @pytest.mark.parametrize("change", [{"visual": 1.0}, {"system": 1.0}])
    def test_one_factor_alone_is_not_neutral(self, change: dict[str, Any]) -> None:
        assert not Vaf(**change).neutral

    def test_text_before_the_image_is_untouched(self, setting: Any) -> None:
        model, _ = setting
        x = tiny.llava()[1]([[5, "image", 4]])
        plain = logits(model, x)
        with on(model, "vaf"):
            now = logits(model, x)
        close(now[:, :15], plain[:, :15])  # the image itself is no text row
        differ(now[:, 15:], plain[:, 15:])


class TestTogether:
    def test_in_list_order(self, setting: Any) -> None:
        """The other takes |s| of what the one left. (Vaf would commute: a factor goes through.)"""
        model, x = setting
        first, second = Pai(alpha=0.9, layers=(1,)), HeadGuided(alpha=0.9, layers=(1,))
        with vlm_attn.patched(model, [first, second]):
            one = logits(model, x)[:, -1]
        with vlm_attn.patched(model, [second, first]):
            other = logits(model, x)[:, -1]
        differ(one, other)

    def test_with_gift(self, setting: Any) -> None:
        """GIFT's masses are those of the changed logits, and both leave their mark."""
        model, x = setting
        with vlm_attn.patched(model, [Pai(alpha=0.5), vlm_attn.registry.build("gift", **ACTIVE["gift"])]):
            both, cached = logits(model, x)[:, -1], generate(model, x)
            same(generate(model, x, use_cache=False), cached)
        for method in ("pai", "gift"):
            with on(model, method):
                differ(logits(model, x)[:, -1], both)

    @pytest.mark.parametrize("skip", [False, True])
    def test_with_guidance(self, setting: Any, skip: bool) -> None:
        """PAI as a whole: the stream with the image is edited, the one without it is the plain model's."""
        model, _ = setting
        x = tiny.llava()[1]([[3, "image", 9]], seed=2)
        pai = Pai(alpha=0.5, skip_first=skip)
        with vlm_attn.patched(model, [pai, Guidance(gamma=2.0, beta=0.0)]), torch.no_grad():
            out = model.generate(
                **x, max_new_tokens=5, do_sample=False, output_scores=True, return_dict_in_generate=True
            )  # fmt: skip
        new = out.sequences[:, -5:]
        force = LogitsProcessorList([Force(new, x["input_ids"].shape[1])])
        with vlm_attn.patched(model, pai):
            seen = generate(model, x, new=5, logits_processor=force)[1].log_softmax(-1)
        ids = torch.cat([x["input_ids"][x["input_ids"] != tiny.IMAGE][None], new], 1)
        blind = logits(model, {"input_ids": ids})[:, -6:-1].log_softmax(-1).transpose(0, 1)
        close(torch.stack(out.scores), (2 * (seen - blind) + blind).log_softmax(-1))

    def test_with_fewer_tokens(self, setting: Any) -> None:
        """Dropped tokens take their weight with them: dropping is masking."""
        model, x = setting
        runs = []
        for mode in ("drop", "mask"):
            reducer = vlm_attn.registry.build("fastv", keep=0.5, layer=2, mode=mode)
            with vlm_attn.patched(model, [reducer, Pai(alpha=0.5)]):
                runs.append(generate(model, x))
        same(*runs)


@pytest.mark.parametrize(
    ("method", "wrong", "error"),
    [
        (Pai, {"alpha": -1.0}, "alpha"),
        (Pai, {"skip_first": 1}, "skip_first"),
        (Pai, {"layers": "all"}, "layers"),
        (Vaf, {"visual": 0.0}, "visual"),
        (Vaf, {"system": 11.0}, "system"),
        (HeadGuided, {"alpha": "much"}, "alpha"),
    ],
)
def test_wrong_values(method: Any, wrong: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError), match=error):
        method(**wrong)


def test_layers_beyond_the_model(setting: Any) -> None:
    with pytest.raises(ValueError, match="names layer 7"):
        vlm_attn.patch(setting[0], "pai", layers=(1, 7))
