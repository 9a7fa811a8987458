# SPDX-License-Identifier: Apache-2.0
"""Wrong calls: which error, does it name field, value and what is allowed, and is the model left as it was."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    BlipConfig,
    BlipForConditionalGeneration,
    Gemma2Config,
    GotOcr2Config,
    GotOcr2ForConditionalGeneration,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

import vlm_attn
from tests import tiny
from tests.engine.test_patching import state
from tests.helpers import ACTIVE, NEUTRAL, Inputs, differ, generate, logits, on
from tests.processors import processor
from vlm_attn import host
from vlm_attn.hallucination import Gift, Var
from vlm_attn.patching import engine_of

GIFT, VAR = ACTIVE["gift"], ACTIVE["var"]


@pytest.fixture(scope="module")
def llava() -> tiny.Built:
    return tiny.llava()


@pytest.fixture(scope="module")
def x(llava: tiny.Built) -> Inputs:
    return llava[1]([[3, "image", 9]])


@pytest.fixture(autouse=True)
def clean(llava: tiny.Built) -> Iterator[None]:
    yield
    if vlm_attn.is_patched(llava[0]):  # a test has failed: do not take the others with it
        vlm_attn.unpatch(llava[0])


@contextmanager
def refused(model: Any, x: Inputs, error: type[Exception], *says: str) -> Iterator[None]:
    """The block raises ``error``, whose message holds every one of ``says``; the model is the same before and after."""
    plain = logits(model, x)
    before = state(model)
    with pytest.raises(error) as caught:
        yield
    for text in says:
        assert text in str(caught.value), f"{text!r} is not in: {caught.value}"
    assert state(model) == before
    assert not vlm_attn.is_patched(model)
    assert torch.equal(logits(model, x), plain)


class TestPatchArguments:
    @pytest.mark.parametrize(
        ("method", "parameters", "error", "says"),
        [
            ("gitf", {}, ValueError, ["unknown method 'gitf'", "did you mean 'gift'?"]),
            ("something", {}, ValueError, ["unknown method 'something'", "gift", "var"]),
            ("gift", {**GIFT, "alfa": 2.0}, TypeError, ["no parameter 'alfa'", "did you mean 'alpha'?"]),
            ("gift", {**GIFT, "zzz": 2.0}, TypeError, ["no parameter 'zzz'", "clip_sigma"]),
            ("var", {**VAR, "tua": 2.0}, TypeError, ["no parameter 'tua'", "did you mean 'tau'?"]),
            ([], {}, ValueError, ["no method given", "'gift'"]),
            (["gift", "gift"], {}, ValueError, ["gift"]),
            (["gift", "var"], {"alpha": 2.0}, TypeError, ["alpha", "single name", "list"]),
            (Gift(**GIFT), {"alpha": 2.0}, TypeError, ["alpha", "single name"]),
            ([Gift(**GIFT), Gift(**GIFT)], {}, ValueError, ["once", "gift+gift"]),
            (Gift, {}, TypeError, ["Gift", "name"]),
            (5, {}, TypeError, ["5", "name"]),
            ([5], {}, TypeError, ["5", "name"]),
            (None, {}, (TypeError, ValueError), ["name"]),
        ],
    )
    def test_method(self, llava, x, method, parameters, error, says) -> None:
        with refused(llava[0], x, error, *says):
            vlm_attn.patch(llava[0], method, **parameters)

    @pytest.mark.parametrize(
        ("method", "field", "value", "error", "allowed"),
        [
            ("gift", "alpha", -0.1, ValueError, "[0, 20]"),
            ("gift", "alpha", 20.5, ValueError, "[0, 20]"),
            ("gift", "alpha", float("nan"), ValueError, "[0, 20]"),
            ("gift", "alpha", "5", TypeError, "number"),
            ("gift", "alpha", True, TypeError, "number"),
            ("gift", "beta", 0, ValueError, "(0, 100]"),
            ("gift", "beta", 101.0, ValueError, "(0, 100]"),
            ("gift", "heads", 0.0, ValueError, "(0, 1]"),
            ("gift", "heads", 1.5, ValueError, "(0, 1]"),
            ("gift", "clip_sigma", 0.0, ValueError, "(0, 100]"),
            ("gift", "clip_sigma", 1000, ValueError, "(0, 100]"),
            ("gift", "query_words", "nouns", ValueError, '"content"'),
            ("gift", "saliency_layers", "1", TypeError, "integers"),
            ("gift", "saliency_layers", (), TypeError, "integers"),
            ("gift", "enhance_layers", (1.5,), TypeError, "integers"),
            ("gift", "saliency_layers", (4,), ValueError, "0..3"),
            ("gift", "enhance_layers", (1, 9), ValueError, "0..3"),
            ("gift", "enhance_layers", -1, ValueError, "0..3"),
            ("var", "sink_dims", (32,), ValueError, "32"),
            ("var", "sink_dims", (-1,), ValueError, "32"),
            ("var", "sink_dims", "3", TypeError, "integers"),
            ("var", "tau", 0, ValueError, "(0, 1000]"),
            ("var", "tau", float("inf"), ValueError, "(0, 1000]"),
            ("var", "rho", 1.01, ValueError, "[0, 1]"),
            ("var", "p", -0.01, ValueError, "[0, 1]"),
            ("var", "visual_floor", 2, ValueError, "[0, 1]"),
            ("var", "layers", (7,), ValueError, "0..3"),
            ("var", "layers", ("a",), TypeError, "integers"),
            ("var", "code_parity", "no", TypeError, "True or False"),
        ],
    )
    def test_values(self, llava, x, method, field, value, error, allowed) -> None:
        shown = repr(value[-1] if isinstance(value, tuple) and value else value).strip("'")
        with refused(llava[0], x, error, method, field, shown, allowed):
            vlm_attn.patch(llava[0], method, **{**ACTIVE[method], field: value})

    @pytest.mark.parametrize(
        ("value", "says"),
        [
            ("abc", "query_span"),
            ((3, 1), "query_span"),
            ((-2, 5), "query_span"),
            ((1, 2, 3), "query_span"),
            (7, "query_span"),
        ],
    )
    def test_query_span(self, llava, x, value, says) -> None:
        with refused(llava[0], x, (TypeError, ValueError), says, str(value)):
            vlm_attn.patch(llava[0], "gift", query_span=value, **GIFT)

    def test_not_a_model(self) -> None:
        for wrong in ("llava", None, torch.nn.Linear(2, 2)):
            with pytest.raises(TypeError, match=type(wrong).__name__):
                vlm_attn.patch(wrong, "gift")  # type: ignore[type-var]

    def test_twice(self, llava, x) -> None:
        model, _ = llava
        with on(model, "gift"):
            now, engine = logits(model, x), engine_of(model)
            with pytest.raises(ValueError, match="already patched with 'gift'.*unpatch.*replace=True"):
                vlm_attn.patch(model, "var", **VAR)
            assert engine_of(model) is engine
            assert torch.equal(logits(model, x), now)

    def test_a_wrong_replacement_leaves_the_old_one(self, llava, x) -> None:
        model, _ = llava
        with on(model, "gift"):
            now, engine = logits(model, x), engine_of(model)
            with pytest.raises(ValueError, match="tau"):
                vlm_attn.patch(model, "var", replace=True, **{**VAR, "tau": -1})
            with pytest.raises(ValueError, match=r"0\.\.3"):
                vlm_attn.patch(model, "gift", replace=True, **{**GIFT, "enhance_layers": 4})
            assert engine_of(model) is engine
            assert torch.equal(logits(model, x), now)

    def test_patched_cannot_replace(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "replace"), vlm_attn.patched(llava[0], "gift", replace=True, **GIFT):
            pass

    def test_unpatch_what_is_not_patched(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "not patched", "vlm_attn.patch"):
            vlm_attn.unpatch(llava[0])
        with refused(llava[0], x, ValueError, "not patched"), vlm_attn.spans(llava[0], query=[(1, 2)]):
            pass
        assert not vlm_attn.is_patched("something else")


class TestPresets:
    def file(self, folder: Path, text: str | bytes) -> str:
        path = folder / "my.json"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    def test_missing_constants(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "gift needs saliency_layers, enhance_layers", "llava-1.5-7b", "preset="):
            vlm_attn.patch(llava[0], "gift")
        with refused(llava[0], x, ValueError, "gift needs enhance_layers", "enhance_layers=..."):
            vlm_attn.patch(llava[0], Gift(saliency_layers=1))
        with refused(llava[0], x, ValueError, "var needs sink_dims", "hidden size 32"):
            vlm_attn.patch(llava[0], ["var", Gift(**GIFT)])

    def test_of_another_architecture(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "'llava-1.5-7b' does not fit", "32", "4"):
            vlm_attn.patch(llava[0], "gift", preset="llava-1.5-7b")
        with refused(llava[0], x, ValueError, "'qwen2-vl-7b' does not fit", "model_type", "'qwen2_vl'"):
            vlm_attn.patch(llava[0], Gift(**GIFT), preset="qwen2-vl-7b")

    def test_unknown_name(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "'llava-1.5-7'", "did you mean 'llava-1.5-7b'?"):
            vlm_attn.patch(llava[0], "gift", preset="llava-1.5-7")
        with refused(llava[0], x, ValueError, "'llava-1.5-7'", "did you mean"):
            vlm_attn.patch(llava[0], Gift(**GIFT), preset="llava-1.5-7")

    @pytest.mark.parametrize(
        "text",
        [
            "{",
            "[1]",
            "{}",
            '{"methods": 3}',
            '{"methods": {"gift": [1]}}',
            '{"model": 3, "methods": {"gift": {}}}',
            b"\xff\xfe\x00",
        ],
    )
    def test_unreadable(self, llava, x, tmp_path, text) -> None:
        path = self.file(tmp_path, text)
        with refused(llava[0], x, ValueError, path):
            vlm_attn.patch(llava[0], "gift", preset=path)

    def test_nothing_for_this_method(self, llava, x, tmp_path) -> None:
        path = self.file(tmp_path, json.dumps({"methods": {"var": {"sink_dims": [3]}}}))
        with refused(llava[0], x, ValueError, path, "nothing for 'gift'", "var"):
            vlm_attn.patch(llava[0], "gift", preset=path)

    def test_wrong_parameter_inside(self, llava, x, tmp_path) -> None:
        path = self.file(tmp_path, json.dumps({"methods": {"gift": {**GIFT, "alfa": 3}}}))
        with refused(llava[0], x, TypeError, "alfa", "did you mean 'alpha'?"):
            vlm_attn.patch(llava[0], "gift", preset=path)

    def test_a_file_works(self, llava, x, tmp_path) -> None:
        path = self.file(tmp_path, json.dumps({"model": {"model_type": "llava"}, "methods": {"gift": GIFT}}))
        with on(llava[0], "gift", alpha=2.0):
            wanted = logits(llava[0], x)
        with vlm_attn.patched(llava[0], "gift", preset=path, alpha=2.0):
            assert torch.equal(logits(llava[0], x), wanted)


class TestPrompts:
    """Refused when the call begins, before anything runs; the model stays patched and works."""

    @contextmanager
    def refused(self, built: tiny.Built, method: str, *says: str, error: type[Exception] = ValueError, **options: Any):
        model, inputs = built
        good = inputs([[3, "image", 9]])
        forwards: list[int] = []
        options = {**ACTIVE[method], **options}
        with vlm_attn.patched(model, method, **{**options, "query_span": None}):
            wanted = logits(model, good)
        with vlm_attn.patched(model, method, **options):
            hook = model.model.language_model.layers[0].register_forward_pre_hook(lambda *_: forwards.append(1))
            with pytest.raises(error) as caught:
                yield model
            hook.remove()
            for text in says:
                assert text in str(caught.value), f"{text!r} is not in: {caught.value}"
            assert not forwards, "something ran"
            assert engine_of(model).call is None
        with vlm_attn.patched(model, method, **{**options, "query_span": None}):
            assert torch.equal(logits(model, good), wanted)

    @pytest.mark.parametrize("call", [logits, generate])
    def test_ends_in_an_image(self, llava, call) -> None:
        with self.refused(llava, "gift", "ends in an image token") as model:
            call(model, llava[1]([[9, "image"]]))

    def test_question_before_the_image(self, llava, x) -> None:
        with self.refused(
            llava, "gift", "row 0", "no question after its image", "query_span=", query_span=(1, 3)
        ) as model:
            generate(model, x)

    def test_span_on_the_image(self, llava, x) -> None:
        with self.refused(llava, "gift", "no question after its image", query_span=(8, 16)) as model:
            generate(model, x)

    @pytest.mark.parametrize("span", [(14, 23), (30, 40)])
    def test_span_outside(self, llava, x, span) -> None:
        with self.refused(
            llava, "gift", str(span), "row 0", "22 tokens", "0 <= start < stop", query_span=span
        ) as model:
            generate(model, x)

    def test_span_outside_the_shorter_row(self, llava) -> None:
        x = llava[1]([[3, "image", 9], [1, "image", 4]])
        with self.refused(llava, "gift", "(16, 20)", "row 1", "15 tokens", query_span=(16, 20)) as model:
            generate(model, x)

    @pytest.mark.parametrize("spans", [[(14, 18)] * 3, [(14, 18)]])
    def test_number_of_spans(self, llava, spans) -> None:
        x = llava[1]([[3, "image", 9], [1, "image", 9]])
        with (
            self.refused(llava, "gift", f"{len(spans)} query spans for 2 rows") as model,
            vlm_attn.spans(model, query=spans),
        ):
            generate(model, x)

    @pytest.mark.parametrize("spans", [[(4, 13)] * 3, [(4, 13)]])
    def test_number_of_visual_spans(self, llava, spans) -> None:
        x = llava[1]([[3, "image", 9], [1, "image", 9]])
        with (
            self.refused(llava, "gift", f"{len(spans)} visual spans for 2 rows") as model,
            vlm_attn.spans(model, visual=spans, query=(13, 20)),
        ):
            generate(model, x)

    def test_visual_span_outside(self, llava, x) -> None:
        with (
            self.refused(llava, "gift", "visual span (4, 33)", "22 tokens") as model,
            vlm_attn.spans(model, visual=[(4, 33)]),
        ):
            generate(model, x)

    @pytest.mark.parametrize("value", [[], ["a"], [(1,)], 5])
    def test_spans_of_a_wrong_kind(self, llava, x, value) -> None:
        with (
            self.refused(llava, "gift", "query span", error=(TypeError, ValueError)) as model,
            vlm_attn.spans(model, query=value),
        ):
            generate(model, x)

    def test_embeds_without_spans(self, llava, x) -> None:
        embeds = llava[0].get_input_embeddings()(x["input_ids"]).detach()
        with self.refused(llava, "gift", "inputs_embeds", "vlm_attn.spans", "visual=") as model:
            generate(model, {"inputs_embeds": embeds})

    @pytest.mark.parametrize("call", [logits, generate])
    def test_right_padding(self, llava, call) -> None:
        x = llava[1]([[3, "image", 9], [1, "image", 4]])
        first = int(x["attention_mask"][1].argmax())
        for name in ("input_ids", "attention_mask"):
            x[name][1] = x[name][1].roll(-first)
        with self.refused(llava, "gift", "left", "padding_side") as model:
            call(model, x)

    @pytest.mark.parametrize("call", [logits, generate])
    @pytest.mark.parametrize("method", ACTIVE)
    def test_output_attentions(self, llava, x, method, call) -> None:
        with self.refused(llava, method, "output_attentions=True") as model:
            call(model, x, output_attentions=True)

    def test_output_attentions_in_the_generation_config(self, llava, x) -> None:
        from transformers import GenerationConfig

        config = GenerationConfig(max_new_tokens=2, output_attentions=True, return_dict_in_generate=True)
        with self.refused(llava, "gift", "output_attentions=True") as model:
            model.generate(**x, generation_config=config)

    def test_nothing_to_generate_from(self, llava) -> None:
        with self.refused(llava, "gift", "input_ids or inputs_embeds") as model:
            model.generate(max_new_tokens=2)

    def test_text_model_alone(self, llava, x) -> None:
        with self.refused(llava, "gift", "text model", "patch()", error=RuntimeError) as model:
            model.model.language_model(input_ids=x["input_ids"])
        with self.refused(llava, "gift", "text model", error=RuntimeError) as model:
            model.model(**x)

    def test_continuous_batching(self, llava, x) -> None:
        names = [n for n in ("generate_batch", "init_continuous_batching") if hasattr(type(llava[0]), n)]
        assert names
        for name in names:
            with self.refused(
                llava, "gift", "continuous batching", "model.generate", error=NotImplementedError
            ) as model:
                getattr(model, name)(inputs=[x["input_ids"][0].tolist()])
            assert name not in vars(llava[0])

    def test_paged_cache(self, llava, x) -> None:
        from vlm_attn.attention import vlm_attention

        model, _ = llava
        q = torch.zeros(1, 4, 1, 8)
        with on(model, "gift"), engine_of(model).running(x):
            module = model.model.language_model.layers[0].self_attn
            with pytest.raises(NotImplementedError, match="paged cache"):
                vlm_attention(module, q, q[:, :2], q[:, :2], None, cache=object())
            with pytest.raises(NotImplementedError, match="eval"):
                vlm_attention(module, q, q[:, :2], q[:, :2], None, dropout=0.1)

    def test_var_on_a_cache_filled_by_others(self, llava, x) -> None:
        model, _ = llava
        more = torch.tensor([[40, 41, 42, 43]])

        def second(cache: Any) -> Inputs:
            ids = torch.cat([x["input_ids"], more], 1)
            return {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: cache}

        def cache() -> Any:
            with torch.no_grad():
                return host.cache_of(model(**x))

        plain = cache()
        with on(model, "gift"):
            gift = cache()
        with on(model, "var", sink_dims=(1, 2)):
            other = cache()
        for filled in (plain, gift, other):
            with self.refused(llava, "var", "filled without var", "same patched model"):
                generate(model, second(filled))
        with on(model, "var"):
            generate(model, second(cache()))

    def test_gift_question_in_the_cache(self, llava, x) -> None:
        model, _ = llava
        with torch.no_grad():
            cache = host.cache_of(model(**x))
        ids = torch.cat([x["input_ids"], torch.tensor([[40, 41, 42, 43]])], 1)
        second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), host.CACHE: cache}
        with self.refused(llava, "gift", "row 0", "column 13", "22 columns"):
            generate(model, second)


class TestModels:
    def test_processor_of_another_model(self, llava, x) -> None:
        with refused(llava[0], x, ValueError, "another model", "<image>", "119", "120"):
            vlm_attn.patch(llava[0], "gift", processor=processor(image_id=119), **GIFT)
        with refused(llava[0], x, ValueError, "another model", "200 tokens", "128"):
            vlm_attn.patch(llava[0], "gift", processor=processor(size=200), **GIFT)

    def test_blip(self) -> None:
        small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
        text = {
            **small,
            "vocab_size": 128,
            "encoder_hidden_size": 32,
            "bos_token_id": 1,
            "sep_token_id": 2,
            "pad_token_id": 0,
        }
        config = BlipConfig(
            text_config=text, vision_config={**small, "image_size": 16, "patch_size": 4}, projection_dim=16
        )
        self.refuses(BlipForConditionalGeneration(config), "Blip")

    def test_got_ocr2(self) -> None:
        """Its vision tower cannot switch its attention, its decoder can, and only the decoder is edited."""
        vision = {"hidden_size": 32, "output_channels": 256, "num_hidden_layers": 2, "num_attention_heads": 4,
                  "image_size": 256, "mlp_dim": 48, "window_size": 2, "global_attn_indexes": [1]}  # fmt: skip
        text = {**tiny.TEXT, "num_key_value_heads": 2, "model_type": "qwen2"}
        torch.manual_seed(0)
        config = GotOcr2Config(vision_config=vision, text_config=text, image_token_id=tiny.IMAGE)
        model = GotOcr2ForConditionalGeneration(config).eval()
        ids = torch.tensor([[1, 5, *[tiny.IMAGE] * 16, 7, 8, 9, 10]])
        x = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(1, 3, 256, 256)}
        plain = logits(model, x)
        with on(model, "gift"):
            differ(logits(model, x)[:, -1], plain[:, -1])
        assert torch.equal(logits(model, x), plain)

    def refuses(self, model: Any, *says: str) -> None:
        before = state(model)
        with pytest.raises(NotImplementedError) as caught:
            vlm_attn.patch(model, "gift", **{**GIFT, "saliency_layers": 0, "enhance_layers": 1})
        for text in says:
            assert text in str(caught.value), str(caught.value)
        assert state(model) == before
        assert not vlm_attn.is_patched(model)

    def test_text_only_model(self) -> None:
        from transformers import LlamaConfig, LlamaForCausalLM

        self.refuses(LlamaForCausalLM(LlamaConfig(**tiny.TEXT)), "llama", "image_token_id")

    @pytest.mark.parametrize("name", ["flash_attention_2", "flex_attention", "paged|sdpa", "something"])
    def test_base_attention(self, name: str) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 9]])
        plain = logits(model, x)
        model.config.get_text_config()._attn_implementation_internal = name
        with pytest.raises(NotImplementedError) as caught:
            vlm_attn.patch(model, "gift", **GIFT)
        assert name in str(caught.value)
        assert 'attn_implementation="sdpa"' in str(caught.value)
        assert not vlm_attn.is_patched(model)
        model.config.get_text_config()._attn_implementation_internal = "sdpa"
        assert torch.equal(logits(model, x), plain)

    def softcapped(self) -> tuple[Any, Any]:
        built, inputs = tiny.llava()
        text = {
            **tiny.TEXT,
            "num_key_value_heads": 2,
            "head_dim": 8,
            "query_pre_attn_scalar": 8,
            "attn_logit_softcapping": 2.0,
        }
        config = LlavaConfig(
            vision_config=built.config.vision_config, text_config=Gemma2Config(**text), image_token_index=tiny.IMAGE,
            vision_feature_layer=-1,
        )  # fmt: skip
        torch.manual_seed(0)
        model = LlavaForConditionalGeneration(config).eval()
        model.generation_config.eos_token_id = None
        model.generation_config.pad_token_id = tiny.PAD
        return model, inputs

    def test_softcap_on_sdpa(self) -> None:
        """SDPA has no softcap, stock included: said when patching, not in the first forward."""
        model, _ = self.softcapped()
        model.set_attn_implementation("eager")
        model.config.get_text_config()._attn_implementation_internal = "sdpa"
        self.refuses(model, "softcap", '"eager"')

    @pytest.mark.parametrize("method", ACTIVE)
    def test_softcap_on_eager(self, method: str) -> None:
        """The edit path applies the cap: neutral weights through it change nothing."""
        model, inputs = self.softcapped()
        model.set_attn_implementation("eager")
        x = inputs([[3, "image", 9]])
        plain = generate(model, x)
        with vlm_attn.patched(model, method, **NEUTRAL[method]):
            engine_of(model).force = True
            forced = generate(model, x)
        assert (forced[1] - plain[1]).abs().max() < 1e-5 * plain[1].abs().max()
        with on(model, method):
            differ(generate(model, x)[1][0], plain[1][0])


def test_methods_are_listed() -> None:
    found = vlm_attn.methods()
    assert {"gift", "var"} <= set(found)
    assert found["gift"].cls is Gift
    assert found["var"].cls is Var
    for name, info in found.items():
        assert info.name == name == info.cls.name
        assert info.summary.endswith(".")
        assert "\n" not in info.summary
        assert "arXiv" in info.paper
