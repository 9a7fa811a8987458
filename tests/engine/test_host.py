# SPDX-License-Identifier: Apache-2.0
"""Contracts of ``host.py``: what the engine takes for granted about transformers, function by function.

When a new release breaks one of these, it says which.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import warnings
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, StaticCache
from transformers.masking_utils import eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests import rows as families
from tests import tiny
from tests.families import MAPPING
from vlm_attn import attention, host
from vlm_attn.turns import running_forward


@pytest.fixture(scope="module")
def gemma3() -> tiny.Built:
    return tiny.gemma3(sliding_window=8)


def text_config(built: tiny.Built) -> Any:
    return built[0].config.get_text_config()


def fill(cache: Any, config: Any, rows: int, start: int = 0) -> list[Tensor]:
    """Put rows whose keys hold their absolute column into every layer; the keys each layer returns."""
    columns = torch.arange(start, start + rows, dtype=torch.float32)
    states = columns.view(1, 1, rows, 1).expand(1, config.num_key_value_heads, rows, config.head_dim).contiguous()
    return [cache.update(states, states, layer)[0] for layer in range(config.num_hidden_layers)]


class TestRegistration:
    def test_names(self) -> None:
        for base, mask in (("sdpa", sdpa_mask), ("eager", eager_mask)):
            name = host.NAMES[base]
            assert ALL_ATTENTION_FUNCTIONS[name] is attention.vlm_attention
            assert AttentionInterface()[name] is attention.vlm_attention
            assert AttentionMaskInterface()[name] is mask
            # Parts of names that the host gives a meaning of their own.
            assert not any(word in name for word in ("flash", "sdpa", "flex"))

    def test_the_hosts_own_are_untouched(self) -> None:
        assert ALL_ATTENTION_FUNCTIONS["sdpa"].__module__.startswith("transformers.")
        assert AttentionMaskInterface()["sdpa"] is sdpa_mask
        assert AttentionMaskInterface()["eager"] is eager_mask

    def test_warn_if_untested(self, monkeypatch: pytest.MonkeyPatch) -> None:
        assert tuple(map(int, transformers.__version__.split(".")[:2])) <= tuple(map(int, host.TESTED[1].split(".")))
        for version, warns in (
            ("5.17.0", False),
            (f"{host.TESTED[1]}.9", False),
            ("5.99.1", True),
            ("6.0.0.dev0", True),
        ):
            monkeypatch.setattr(host.transformers, "__version__", version)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                host.warn_if_untested()
            assert [version in str(w.message) for w in caught] == [True] * warns


class TestCheckEditable:
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_base(self, name: str) -> None:
        model, _ = tiny.FAMILIES[name]()
        assert host.check_editable(model, model.config.get_text_config()) == "sdpa"
        model.set_attn_implementation("eager")
        assert host.check_editable(model, model.config.get_text_config()) == "eager"

    def test_architecture(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model, _ = tiny.llava()
        monkeypatch.setattr(
            type(model.model.language_model), "_can_set_attn_implementation", classmethod(lambda cls: False)
        )
        with pytest.raises(NotImplementedError, match="LlamaModel.*AttentionInterface"):
            host.check_editable(model, model.config.get_text_config())

    def test_base_attention(self) -> None:
        model, _ = tiny.llava()
        module = model.model.language_model.layers[0].self_attn
        assert host.base_attention(module, "sdpa") is ALL_ATTENTION_FUNCTIONS["sdpa"]
        eager = host.base_attention(module, "eager")
        assert eager.__module__ == type(module).__module__
        torch.manual_seed(0)
        query, key, value = torch.randn(1, 4, 3, 8), torch.randn(1, 2, 3, 8), torch.randn(1, 2, 3, 8)
        out, weights = eager(module, query, key, value, None, scaling=8**-0.5)
        assert out.shape == (1, 3, 4, 8)
        assert weights.shape == (1, 4, 3, 3)


class TestConfigs:
    @pytest.mark.parametrize("name", tiny.FAMILIES)
    def test_own_configs(self, name: str) -> None:
        model, _ = tiny.FAMILIES[name]()
        top, text = model.config, model.config.get_text_config()
        before = [(id(m), vars(m).get("config")) for m in model.modules()]
        own_ones = host.own_configs(model, text, "sdpa")
        assert model.config is not top
        own = model.config.get_text_config()
        assert own is not text
        assert own._attn_implementation == host.NAMES["sdpa"]
        assert text._attn_implementation == "sdpa"
        assert top.get_text_config() is text
        assert model.config.vision_config is top.vision_config
        decoder = model.model.language_model
        assert decoder.config is own
        assert all(layer.self_attn.config is own for layer in decoder.layers)
        assert not any(value is text or value is top for m in model.modules() for value in vars(m).values())
        assert model.config.to_dict() == top.to_dict()
        host.restore(model.modules(), own_ones)
        assert [(id(m), vars(m).get("config")) for m in model.modules()] == before

    @pytest.mark.parametrize("name", ["sdpa", "eager"])
    def test_in_place(self, name: str) -> None:
        """What set_attn_implementation() and a config's attribute overwrite is what is looked at."""
        model, _ = tiny.llava()
        text = model.config.get_text_config()
        assert not host.in_place(text, name)
        host.put_in_place(text, name)
        assert host.in_place(text, name)
        assert text._attn_implementation == host.NAMES[name]
        for overwrite in (
            lambda: model.set_attn_implementation("sdpa"),
            lambda: setattr(model.config, "_attn_implementation", "eager"),
            lambda: setattr(text, "_attn_implementation", "sdpa"),
        ):
            overwrite()
            assert not host.in_place(text, name)
            host.put_in_place(text, name)
        assert [host.base_of(n) for n in ("sdpa", host.NAMES["eager"], "flash_attention_2")] == ["sdpa", "eager", None]

    def test_write_back(self) -> None:
        model, _ = tiny.llava()
        top, text = model.config, model.config.get_text_config()
        before, implementation = dict(vars(text)), text._attn_implementation
        own = host.own_configs(model, text, "sdpa")
        model.config.get_text_config().vocab_size = 7
        model.config.note = "mine"
        host.restore(model.modules(), own)
        assert vars(text) == {**before, "vocab_size": 7}
        assert text._attn_implementation == implementation
        assert top.note == "mine"
        assert top.get_text_config() is text


class TestFrames:
    def test_a_hook_runs_inside_its_forward(self) -> None:
        """Before, after, and after an exception: the same frame of the same forward."""
        frames: list[Any] = []
        module = torch.nn.Linear(2, 2)
        hooks = [
            module.register_forward_pre_hook(lambda *_: frames.append(running_forward())),
            module.register_forward_hook(lambda *_: frames.append(running_forward()), always_call=True),
        ]
        for x in (torch.zeros(1, 2), torch.zeros(1, 3)):
            with contextlib.suppress(RuntimeError):
                module(x)
        assert len(hooks) == 2
        assert frames[0] is frames[1] is not None
        assert frames[2] is frames[3] is not None
        assert frames[0] is not frames[2]


class TestCaches:
    def test_rows_with_a_state(self) -> None:
        """LFM2's convolutions have no method that repeats rows; a state cannot be rewound."""
        model, inputs = families.build("lfm2_vl")
        x = inputs([[3, "image", 7], [1, "image", 7]])
        with torch.no_grad():
            cache = host.cache_of(model(**x, use_cache=True))
        assert not host.can_rewind(cache)
        assert host.can_rewind(DynamicCache())
        state = next(layer.conv_states[0] for layer in cache.layers if hasattr(layer, "conv_states")).clone()
        keys = next(layer.keys for layer in cache.layers if not hasattr(layer, "conv_states")).clone()
        host.repeat_rows(cache, 1)
        host.repeat_rows(cache, 3)
        rows = [0, 0, 0, 1, 1, 1]
        assert any(
            torch.equal(layer.conv_states[0], state[rows]) for layer in cache.layers if hasattr(layer, "conv_states")
        )
        assert any(torch.equal(layer.keys, keys[rows]) for layer in cache.layers if not hasattr(layer, "conv_states"))

    def test_cached_length(self, gemma3: tiny.Built) -> None:
        assert host.cached_length(None) == 0
        config = text_config(gemma3)
        for cache in (DynamicCache(config=config), StaticCache(config=config, max_cache_len=32)):
            assert host.cached_length(cache) == 0
            fill(cache, config, 5)
            assert host.cached_length(cache) == 5
            assert type(host.cached_length(cache)) is int
            fill(cache, config, 6, start=5)
            assert host.cached_length(cache) == 11

    def test_new_cache(self, gemma3: tiny.Built) -> None:
        config = text_config(gemma3)
        cache = host.new_cache(config)
        assert isinstance(cache, DynamicCache)
        assert len(cache.layers) == config.num_hidden_layers
        sliding = [getattr(layer, "is_sliding", False) for layer in cache.layers]
        assert sliding == [kind == "sliding_attention" for kind in config.layer_types]
        assert host.cached_length(cache) == 0

    @pytest.mark.parametrize("static", [False, True])
    def test_rewind(self, static: bool) -> None:
        config = text_config(tiny.llava())
        config.head_dim = 8
        cache = StaticCache(config=config, max_cache_len=16) if static else DynamicCache(config=config)
        fill(cache, config, 6)
        host.rewind(cache, 2)
        assert host.cached_length(cache) == 4
        for keys in fill(cache, config, 1, start=70):
            assert keys[0, 0, :5, 0].tolist() == [0, 1, 2, 3, 70]
        assert host.cached_length(cache) == 5

    def test_rewind_of_sliding_layers(self, gemma3: tiny.Built) -> None:
        config = text_config(gemma3)
        static = StaticCache(config=config, max_cache_len=16)
        fill(static, config, 6)
        length = host.cached_length(static)
        with pytest.raises(NotImplementedError, match="use a dynamic cache"):
            host.rewind(static, 1)
        assert host.cached_length(static) == length
        within = DynamicCache(config=config)
        fill(within, config, 6)
        host.rewind(within, 2)
        assert host.cached_length(within) == 4
        beyond = DynamicCache(config=config)
        fill(beyond, config, 12)
        with pytest.raises(Exception, match="crop"):
            host.rewind(beyond, 1)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("steps", [(5, 1, 1, 1, 1, 1, 1), (20, 1), (4, 9, 1), (9, 3), (7, 1, 2)])
    def test_key_window(self, gemma3: tiny.Built, static: bool, steps: tuple[int, ...]) -> None:
        """Length and first column are those of the keys that the layer then returns."""
        config = text_config(gemma3)
        cache = StaticCache(config=config, max_cache_len=32) if static else DynamicCache(config=config)
        past = 0
        for rows in steps:
            windows = [host.key_window(cache, rows, layer) for layer in range(config.num_hidden_layers)]
            for (length, first), keys in zip(windows, fill(cache, config, rows, start=past), strict=True):
                assert type(length) is type(first) is int
                assert keys.shape[2] == length
                filled = min(length, past + rows - first)
                assert keys[0, 0, :filled, 0].tolist() == list(range(first, first + filled))
            past += rows

    def test_layer_of_type(self, gemma3: tiny.Built) -> None:
        config = text_config(gemma3)
        kinds = config.layer_types
        assert len(set(kinds)) == 2
        for kind in set(kinds):
            assert kinds[host.layer_of_type(config, kind)] == kind
        assert host.layer_of_type(config, "something") == 0
        assert host.layer_of_type(text_config(tiny.llava()), "full_attention") == 0


class TestCanvas:
    def test_who_reads_the_prompt(self) -> None:
        """A model is its own reader; DiffusionGemma's canvas decoder stands beside the encoder that writes the cache."""
        model, _ = tiny.llava()
        assert host.canvas_decoder(model) is None
        assert host.prompt_reader(model) is model
        if "diffusion_gemma" not in MAPPING:
            pytest.skip("this transformers has no DiffusionGemma")
        model, _ = families.build("diffusion_gemma")
        assert host.canvas_decoder(model) is model.model.decoder
        assert host.prompt_reader(model) is model.model.encoder
        for part in (model.model.decoder, model.model.encoder.language_model):
            assert all(hasattr(layer, "self_attn") for layer in part.layers)
        assert "decoder_input_ids" in inspect.signature(model.model.decoder.forward).parameters


class TestArguments:
    def test_cache_name(self) -> None:
        """One name in outputs and arguments; the older one is understood where somebody still passes it."""
        text = tiny.llava()[0].model.language_model
        assert host.CACHE in inspect.signature(text.forward).parameters
        out = text(input_ids=torch.zeros(1, 3, dtype=torch.long), use_cache=True)
        cache = getattr(out, host.CACHE)
        assert host.cached_length(cache) == 3
        assert host.cache_of(out) is cache
        without = host.without_cache(out)
        assert getattr(without, host.CACHE) is None
        assert "last_hidden_state" in without
        assert host.CACHE not in without
        for name in host.CACHE_NAMES:
            assert host.cache_of({name: cache, "use_cache": True}) is cache
            assert host.with_cache({name: cache, "use_cache": True}, None) == {name: None, "use_cache": True}
        assert host.cache_of({}) is None
        assert host.with_cache({}, cache) == {host.CACHE: cache}

    def test_slice_arguments(self) -> None:
        row = torch.arange(6)
        given = {
            "inputs_embeds": row.view(1, 6, 1).float(),
            "input_ids": row[None],
            "position_ids": row.view(1, 1, 6).expand(4, 1, 6),
            "cache_position": row,
            "attention_mask": "as it is",
            "use_cache": True,
            "past_key_values": None,
        }
        part = host.slice_arguments(given, 2, 5)
        assert part["inputs_embeds"].flatten().tolist() == [2, 3, 4]
        assert part["input_ids"].tolist() == [[2, 3, 4]]
        assert part["position_ids"].tolist() == [[[2, 3, 4]]] * 4
        assert part["cache_position"].tolist() == [2, 3, 4]
        for name in ("attention_mask", "use_cache", "past_key_values"):
            assert part[name] is given[name]
        assert given["input_ids"].shape == (1, 6)

    def test_deepstack(self) -> None:
        """Visual features that are added in later layers go with their rows."""
        masks = torch.tensor([[False, True, True, False, True, False]])
        features = [torch.arange(3.0)[:, None] + 10 * layer for layer in range(2)]
        given = {"visual_pos_masks": masks, "deepstack_visual_embeds": features}
        for start, stop, wanted in ((0, 2, [0]), (2, 5, [1, 2]), (1, 6, [0, 1, 2])):
            part = host.slice_arguments(given, start, stop)
            assert part["visual_pos_masks"].tolist() == masks[:, start:stop].tolist()
            assert [f.flatten().tolist() for f in part["deepstack_visual_embeds"]] == [
                [float(i) + 10 * layer for i in wanted] for layer in range(2)
            ]
        part = host.slice_arguments(given, 5, 6)
        assert part["visual_pos_masks"] is None
        assert part["deepstack_visual_embeds"] is None

    def slice(self, mask: Any, start: int, stop: int, first: int, windows: Any) -> Any:
        return host.slice_mask(mask, start=start, stop=stop, first=first, windows=windows, like=torch.zeros(1))

    def test_masks_the_text_model_builds_itself(self) -> None:
        assert self.slice(None, 1, 3, 0, {None: (3, 0, 0)}) is None
        flat = torch.tensor([[0, 1, 1, 1, 1]])
        assert self.slice(flat, 0, 3, 0, {None: (3, 0, 0)}).tolist() == [[0, 1, 1]]
        assert self.slice(flat, 1, 2, 2, {None: (4, 0, 0)}).tolist() == [[0, 1, 1, 1]]

    def test_four_dimensions(self) -> None:
        causal = torch.ones(6, 6).tril().bool()[None, None]
        assert torch.equal(self.slice(causal, 0, 5, 0, {None: (5, 0, 0)}), causal[..., :5, :5])
        assert torch.equal(self.slice(causal, 5, 6, 0, {None: (6, 0, 0)}), causal[..., 5:, :])

    @pytest.mark.parametrize("dtype", [torch.bool, torch.float32, torch.float16])
    def test_unfilled_columns_are_hidden(self, dtype: torch.dtype) -> None:
        """A static cache returns more keys than the mask of the whole forward has columns."""
        causal = torch.ones(4, 4).tril().bool()[None, None]
        hidden = False if dtype == torch.bool else torch.finfo(dtype).min
        mask = causal if dtype == torch.bool else torch.zeros(1, 1, 4, 4, dtype=dtype).masked_fill(~causal, hidden)
        part = self.slice(mask, 3, 4, 0, {None: (7, 0, 0)})
        assert part.dtype == dtype
        assert (part[0, 0, 0] != hidden).tolist() == [True] * 4 + [False] * 3

    def test_window(self) -> None:
        """The lone row of a sliding layer: its keys begin later than the mask's columns."""
        banded = torch.ones(6, 6).tril().triu(-2).bool()[None, None]
        part = self.slice(banded, 5, 6, 0, {None: (3, 3, 0)})
        assert part.tolist() == [[[[True, True, True]]]]
        part = self.slice(banded, 5, 6, 0, {None: (4, 2, 0)})
        assert part.tolist() == [[[[False, True, True, True]]]]

    def test_dict(self) -> None:
        full = torch.ones(4, 4).tril().bool()[None, None]
        windows = {"full": (6, 0, 0), "sliding": (2, 2, 0)}
        part = self.slice({"full": None, "sliding": full}, 3, 4, 0, windows)
        assert part["full"].tolist() == [[[[True, True, True, True, False, False]]]]  # "causal" for a lone row
        assert part["sliding"].tolist() == [[[[True, True]]]]
        part = self.slice({"full": None, "sliding": full}, 1, 3, 10, {"full": (13, 0, 0), "sliding": (3, 0, 0)})
        assert part["full"][0, 0].sum(-1).tolist() == [12, 13]

    def test_text_models_get_what_is_sliced(self) -> None:
        """Along the sequence, text models are given nothing the table does not know."""
        for name, build in tiny.FAMILIES.items():
            model, inputs = build()
            x, seen = inputs([[3, "image", 9]]), []
            length = x["input_ids"].shape[1]
            model.model.language_model.register_forward_pre_hook(
                lambda m, args, kwargs, seen=seen: seen.append((args, copy.copy(kwargs))), with_kwargs=True
            )
            with torch.no_grad():
                model(**x)
            ((args, kwargs),) = seen
            assert not args, name
            for key, value in kwargs.items():
                if isinstance(value, Tensor) and length in value.shape and key not in host.SEQUENCE_ARGUMENTS:
                    assert key in ("attention_mask", "token_type_ids", "mm_token_type_ids"), (name, key)
