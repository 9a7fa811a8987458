# SPDX-License-Identifier: Apache-2.0
"""Saliency maps per family, and the presets' look-up."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import LlavaConfig, LlavaForConditionalGeneration

import vlm_attn
from tests import tiny
from tests.hallucination.test_gift import columns, map_by_hand
from tests.helpers import ACTIVE, close, generate, logits, on, same
from tests.oracle import attentions
from vlm_attn import presets
from vlm_attn.hallucination import Gift
from vlm_attn.method import ModelFacts
from vlm_attn.patching import engine_of
from vlm_attn.registry import method_class

GRIDS = {
    "llava": (3, 3),
    "llava_next": (2, 2),
    "qwen2_vl": (2, 3),
    "qwen2_5_vl": (2, 3),
    "internvl": (2, 2),
    "gemma3": (2, 2),
    "paligemma": (4, 4),
}
GIFT = ACTIVE["gift"]


class TestSaliency:
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_one_map_per_image(self, name: str) -> None:
        model, inputs = tiny.FAMILIES[name]()
        x = inputs([[3, "image", 9], [1, "image", 4, "image", 6]])
        plain = logits(model, x)
        maps = vlm_attn.saliency(model, x, **GIFT)
        assert len(maps) == 3
        for found in maps:
            assert found.shape == GRIDS[name]
            assert found.dtype == torch.float32
            assert found.device.type == "cpu"
            assert 0 <= float(found.min()) <= float(found.max()) <= 1
        assert max(float(found.max()) for found in maps) > 0
        assert not vlm_attn.is_patched(model)
        assert torch.equal(logits(model, x), plain)

    def test_layers_of_the_map_are_enough(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        (wanted,) = vlm_attn.saliency(model, x, **GIFT)
        (found,) = vlm_attn.saliency(model, {**x, "use_cache": False}, saliency_layers=1, query_words="all")
        close(found, wanted, 1e-6)

    def test_images_side_by_side(self) -> None:
        """Two images without a token between them are two maps."""
        model, inputs = tiny.llava()
        maps = vlm_attn.saliency(model, inputs([[3, "image", "image", 9]]), **GIFT)
        assert [found.shape for found in maps] == [(3, 3), (3, 3)]

    def test_by_hand(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 11]], seed=5)
        visual, query = columns(x)
        rows = attentions(model, x)[1][0].double().numpy()
        wanted = torch.tensor(map_by_hand([rows], visual, query, query), dtype=torch.float32).view(3, 3)
        (found,) = vlm_attn.saliency(model, x, query_span=(query[0], query[-1] + 1), **GIFT)
        close(found, wanted, 1e-4)
        assert found.max() == 1
        assert found.min() == 0

    def test_several_images_share_one_scale(self) -> None:
        """Scaled over all visual tokens of a row, as the boost is."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 4, "image", 9]], seed=3)
        visual, query = columns(x)
        rows = attentions(model, x)[1][0].double().numpy()
        wanted = torch.tensor(map_by_hand([rows], visual, query, query), dtype=torch.float32).view(2, 3, 3)
        found = vlm_attn.saliency(model, x, query_span=(query[0], query[-1] + 1), **GIFT)
        close(torch.stack(found), wanted, 1e-4)

    def test_of_a_patched_model(self) -> None:
        """Uses the method it is patched with, also a neutral one, and leaves it as it was."""
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        (wanted,) = vlm_attn.saliency(model, x, **GIFT)
        plain = logits(model, x)
        for alpha in (3.0, 0.0):
            with on(model, "gift", alpha=alpha):
                before = generate(model, x)
                (found,) = vlm_attn.saliency(model, x)
                close(found, wanted, 1e-6)
                assert engine_of(model).force is False
                assert engine_of(model).call is None
                same(generate(model, x), before, 0.0)
                with pytest.raises(ValueError, match="patched already"):
                    vlm_attn.saliency(model, x, **GIFT)
        with vlm_attn.patched(model, [Gift(**GIFT), "var"][:1]):
            close(vlm_attn.saliency(model, x)[0], wanted, 1e-6)
        assert torch.equal(logits(model, x), plain)

    def test_of_a_model_patched_with_something_else(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        with on(model, "var"):
            before = logits(model, x)
            with pytest.raises(ValueError, match="'var'.*no saliency map.*'gift'"):
                vlm_attn.saliency(model, x)
            assert engine_of(model).force is False
            assert torch.equal(logits(model, x), before)

    def test_without_an_image(self) -> None:
        model, _ = tiny.llava()
        with pytest.raises(ValueError, match="no image token"):
            vlm_attn.saliency(model, {"input_ids": torch.tensor([[1, 5, 6]])}, **GIFT)
        assert not vlm_attn.is_patched(model)

    def test_the_question_matters(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        one, two = (vlm_attn.saliency(model, x, query_span=span, **GIFT)[0] for span in ((13, 17), (17, 21)))
        assert (one - two).abs().max() > 0.05


def shaped(layers: int, hidden: int, heads: int) -> Any:
    """A LLaVA of a given shape without any memory behind it."""
    config = LlavaConfig(
        text_config={"model_type": "llama", "num_hidden_layers": layers, "hidden_size": hidden, "num_attention_heads": heads,
                     "intermediate_size": 64, "vocab_size": 32064},
        image_token_index=32000,
    )  # fmt: skip
    with torch.device("meta"):
        return LlavaForConditionalGeneration(config)


class TestPresets:
    def test_bundled_are_complete(self) -> None:
        assert {"llava-1.5-7b", "llava-1.5-13b", "qwen2-vl-7b"} <= set(presets.bundled())
        for name, preset in presets.bundled().items():
            assert preset["model"]["model_type"], name
            assert set(preset["provenance"]) == set(preset["methods"]), name
            layers = preset["model"]["text_config.num_hidden_layers"]
            hidden = preset["model"]["text_config.hidden_size"]
            for method, parameters in preset["methods"].items():
                built = method_class(method)(
                    **{k: tuple(v) if isinstance(v, list) else v for k, v in parameters.items()}
                )
                facts = ModelFacts(model_type="any", layers=layers, heads=32, hidden=hidden)
                built.bind(facts)  # layers and dimensions that the model has

    @pytest.mark.parametrize(
        ("shape", "saliency", "enhance", "alpha", "dims"),
        [
            ((32, 4096, 32), (11,), tuple(range(12, 23)), 5.0, (1415, 2533)),
            ((40, 5120, 40), (10,), tuple(range(14, 21)), 5.0, (2100, 4743)),
        ],
    )
    def test_found_by_the_models_shape(self, shape: Any, saliency: Any, enhance: Any, alpha: float, dims: Any) -> None:
        """The published constants, without a name being given."""
        model = shaped(*shape)
        with vlm_attn.patched(model, ["gift", "var"]):
            gift, var = engine_of(model).methods
        assert (gift.saliency_layers, gift.enhance_layers, gift.alpha) == (saliency, enhance, alpha)
        assert (gift.beta, gift.heads, gift.clip_sigma, gift.query_words) == (1.0, 0.5, 3.0, "content")
        assert var.sink_dims == dims
        assert (var.tau, var.rho, var.p, var.visual_floor) == (20.0, 0.5, 0.6, 0.2)
        assert var.layers == tuple(range(shape[0] - 1))
        with vlm_attn.patched(model, "gift", alpha=1.0):
            assert engine_of(model).methods[0].alpha == 1.0
        with vlm_attn.patched(model, Gift(enhance_layers=(3,))):
            (own,) = engine_of(model).methods
            assert (own.saliency_layers, own.enhance_layers) == (saliency, (3,))

    def test_another_shape_has_none(self) -> None:
        model = shaped(32, 2048, 16)
        with pytest.raises(ValueError, match="gift needs saliency_layers, enhance_layers"):
            vlm_attn.patch(model, "gift")
        with pytest.raises(ValueError, match="text_config.hidden_size is 2048"):
            vlm_attn.patch(model, "gift", preset="llava-1.5-7b")
        assert not vlm_attn.is_patched(model)

    def test_qwen2_vl(self) -> None:
        model, _ = tiny.qwen2_vl()
        config = model.config
        config.text_config.num_hidden_layers, config.text_config.hidden_size = 28, 3584
        found = presets.constants("gift", config, None)
        assert found["saliency_layers"] == (14,)
        assert found["enhance_layers"] == tuple(range(5, 19))
        assert found["alpha"] == 4.0
        assert presets.constants("var", config, None)["sink_dims"] == (458, 2570)
        assert presets.constants("gift", config, "qwen2-vl-7b") == found
