# SPDX-License-Identifier: Apache-2.0
"""Taking visual tokens away: dropping equals masking equals an oracle of the tests' own, in every way of decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CompileConfig, DynamicCache

import vlm_attn
from tests import rows, tiny
from tests.engine.test_patching import state
from tests.helpers import ACTIVE, Inputs, alone, close, differ, generate, logits, same, stock, stock_needs_cache
from vlm_attn import host
from vlm_attn.engine import CACHE_NOTE
from vlm_attn.families import cells
from vlm_attn.hallucination import Gift, Var
from vlm_attn.kernels import attention_rows
from vlm_attn.layout import ImageSpan
from vlm_attn.patching import engine_of
from vlm_attn.reduction import Reducer
from vlm_attn.visual_token_ops import (
    VTW,
    DivPrune,
    Downsample,
    FastV,
    HoloV,
    LayerSkip,
    PruMerge,
    PyramidDrop,
    Random,
    SparseVLM,
    ToMe,
    VisionZip,
    VScan,
)

SEED = 1
CLS = ("llava", "llava_next", "internvl")
PATCHES = ("llava", "llava_next", "paligemma")
IMAGES = (1, 2, 3)
IMAGE_TOKENS = 9  # of the tiny LLaVA
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6], [2, "image", 3, "image", 2, "image", 9]]
REDUCERS: dict[str, Callable[..., Reducer]] = {
    "random": Random,
    "downsample": Downsample,
    "divprune": lambda **o: DivPrune(**{"keep": 0.5, **o}),
    "fastv": lambda **o: FastV(**{"layer": 2, **o}),
    "pyramid_drop": lambda **o: PyramidDrop(**{"layers": (1, 2, 3), "keep": 0.3, **o}),
    "sparsevlm": lambda **o: SparseVLM(**{"layers": (0, 1), "keep": 0.4, "recycle": 0.5, **o}),
    "visionzip": lambda **o: VisionZip(**{"keep": 0.5, "contextual": 0.3, **o}),
    "prumerge": lambda **o: PruMerge(**{"keep": 0.4, **o}),
    "holov": lambda **o: HoloV(**{"keep": 0.5, "chunks": 3, **o}),
    "vscan": lambda **o: VScan(**{"keep": 0.3, "first": 2.0, "window": 2, "layer": 2, **o}),
    "vtw": lambda **o: VTW(**{"layer": 2, **o}),
    "tome": lambda **o: ToMe(**{"keep": 0.5, **o}),
    "compensated": lambda **o: FastV(**{"layer": 2, "compensate": True, **o}),
}


@cache
def built(name: str) -> tiny.Built:
    return tiny.FAMILIES[name]()


@cache
def deepstack() -> tiny.Built:
    return rows.build("qwen3_vl", {"vision_config": {"deepstack_visual_indexes": [0, 1]}})


@pytest.fixture(params=tiny.FAMILIES)
def family(request: pytest.FixtureRequest) -> Iterator[tiny.Built]:
    yield built(request.param)
    assert not vlm_attn.is_patched(built(request.param)[0])


@pytest.fixture(params=REDUCERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


# Everything about deciding is shared, so a family is tried with every reducer once, and in every way of decoding with three.
PAIRS = [("llava", name) for name in REDUCERS]
PAIRS += [
    (family, name) for family in tiny.FAMILIES if family != "llava" for name in ("downsample", "fastv", "sparsevlm")
]
PAIRS += [(family, name) for family in CLS[1:] for name in ("visionzip", "vscan")]
PAIRS += [(family, "tome") for family in PATCHES[1:]]
PAIRS += [(family, "compensated") for family in ("qwen2_vl", "gemma3", "paligemma")]
some = pytest.mark.parametrize(("family", "name"), PAIRS, indirect=True, ids=map("-".join, PAIRS))


def reducer(name: str, family: tiny.Built | None = None, **options: Any) -> Reducer:
    if name == "downsample" and family is not None and family[0].config.model_type == "llava_next":
        pytest.skip("tiles and newline tokens form no single grid")
    method = REDUCERS[name](**options)
    if method.cls_layers and family is not None and family[0].config.model_type not in CLS:
        pytest.skip("no CLS token to read")
    if method.merges and family is not None and family[0].config.model_type not in PATCHES:
        pytest.skip("patches are not tokens")
    return method


def run(family: tiny.Built, methods: Any, x: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    with vlm_attn.patched(family[0], methods):
        return generate(
            family[0], x, **{"suppress_tokens": [tiny.IMAGE], **options}
        )  # uncached, the host would look for it


class TestExact:
    def test_keeping_everything_is_the_plain_model(self, family: tiny.Built, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        plain, plain_run = logits(model, x), generate(model, x)
        with vlm_attn.patched(model, reducer(name, family, keep=1.0)):
            assert torch.equal(logits(model, x), plain)
            got = generate(model, x)
        assert torch.equal(got[0], plain_run[0])
        assert torch.equal(got[1], plain_run[1])

    def test_dropping_is_masking(self, family: tiny.Built, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        plain = generate(model, x)
        kept = []
        found = []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, reducer(name, family, mode=mode)):
                last = logits(model, x)[:, -1]
                found.append((last, generate(model, x)))
                kept.append(vlm_attn.kept(model))
        close(found[0][0], found[1][0])
        same(found[0][1], found[1][1])
        close(found[0][1][1][0], found[0][0])
        differ(found[0][1][1], plain[1])
        for one, other in zip(*kept, strict=True):
            assert [(layer, index.tolist()) for layer, index in one.stages] == [
                (layer, index.tolist()) for layer, index in other.stages
            ]

    @pytest.mark.parametrize("layer", [0, 2])
    def test_oracle(self, family: tiny.Built, layer: int) -> None:
        """A stock model whose rows from a layer on do not see the columns that were dropped, by hooks of this test's own."""
        model, inputs = family
        x = inputs([PROMPTS[1], PROMPTS[2]], seed=SEED)
        method = Random(keep=0.4) if layer == 0 else FastV(layer=layer, keep=0.4)
        with vlm_attn.patched(model, method):
            got = logits(model, x)
            kept = vlm_attn.kept(model)
        gone = torch.zeros_like(x["input_ids"], dtype=torch.bool)
        number = 0
        for row in range(len(gone)):
            columns = (x["input_ids"][row] == tiny.IMAGE).nonzero().flatten()
            for _ in range(IMAGES[row + 1]):
                image = kept[number]
                own, columns = columns[: image.total], columns[image.total :]
                gone[row, own] = True
                gone[row, own[image.index]] = False
                number += 1
        assert number == len(kept)

        def blind(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"]
            length = gone.shape[1]
            if mask is None:
                mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            return args, {
                **kwargs,
                "attention_mask": mask & (~gone[:, None, None] | torch.eye(length, dtype=torch.bool)),
            }

        layers = next(m for n, m in model.named_modules() if n.endswith("language_model")).layers
        handles = [part.register_forward_pre_hook(blind, with_kwargs=True) for part in layers[layer:]]
        try:
            wanted = logits(model, x)
        finally:
            for handle in handles:
                handle.remove()
        there = x["attention_mask"].bool() & ~gone
        close(got[there], wanted[there])
        differ(wanted[:, -1], logits(model, x)[:, -1])

    def test_dropped_rows_are_empty(self) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 9]], seed=SEED)
        with vlm_attn.patched(model, Random(keep=4)), torch.no_grad():
            out = model(**x, output_hidden_states=False)
            index = vlm_attn.kept(model)[0].index
        empty = (out.logits[0] == 0).all(1).nonzero().flatten().tolist()
        assert empty == [4 + i for i in range(9) if i not in index.tolist()]

    def test_reading_ahead_is_what_the_layer_then_pays(
        self, family: tiny.Built, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        found: dict[str, list[Tensor]] = {"fastv": [], "pyramid_drop": []}
        for cls in (FastV, PyramidDrop):
            score = cls.score

            def kept(self: Any, picture: Any, score: Any = score) -> Tensor:
                found[self.name].append(score(self, picture))
                return found[self.name][-1]

            monkeypatch.setattr(cls, "score", kept)
        for method in (FastV(layer=3), PyramidDrop(layers=(2,))):
            with vlm_attn.patched(model, method):
                logits(model, x)
        for behind, ahead in zip(*found.values(), strict=True):
            close(ahead, behind)
        assert len(found["fastv"]) == sum(IMAGES)

    def test_reading_ahead_projects_keys_only(self) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 9]], seed=SEED)
        attention = model.model.language_model.layers[2].self_attn
        rows: dict[str, list[int]] = {name: [] for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
        handles = [
            getattr(attention, name).register_forward_hook(
                lambda m, args, out, name=name: rows[name].append(args[0].shape[1]), prepend=True
            )
            for name in rows
        ]
        with vlm_attn.patched(model, PyramidDrop(layers=(2,), keep=3)):
            logits(model, x)
        for handle in handles:
            handle.remove()
        assert rows == {"q_proj": [1, 16], "k_proj": [22, 16], "v_proj": [1, 16], "o_proj": [1, 16]}
        assert not any(m._forward_pre_hooks for m in attention.modules())

    @pytest.mark.parametrize("beside", [[], [Gift(**ACTIVE["gift"])]])
    def test_hidden_states_keep_their_length(self, beside: list[Any]) -> None:
        model, inputs = built("llava")
        x = inputs(PROMPTS, seed=SEED)
        found = []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, [FastV(layer=2, keep=3, mode=mode), *beside]), torch.no_grad():
                found.append(model(**x, output_hidden_states=True).hidden_states)
        assert len(found[0]) == len(found[1]) == 5
        for dropped, masked in zip(*found, strict=True):
            there = dropped.ne(0).any(-1) & x["attention_mask"].bool()
            close(dropped[there], masked[there])
            assert there[:, -1].all()
        assert there.sum() == x["attention_mask"].sum() - 6 * 6

    def test_the_cache_shrinks(self) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 9]], seed=SEED)
        with vlm_attn.patched(model, FastV(layer=2, keep=3)), torch.no_grad():
            cache = host.cache_of(model(**x))
        assert [layer.keys.shape[2] for layer in cache.layers] == [22, 22, 16, 16]
        assert cache.get_seq_length() == 22
        assert [cache.get_mask_sizes(1, i) for i in range(4)] == [(23, 0)] * 4


class TestCompensation:
    """What is taken away comes back as one token that counts for all of it."""

    def test_a_key_with_the_bias_is_n_keys(self) -> None:
        generator = torch.Generator().manual_seed(0)
        query, key, value = (torch.randn(1, 2, n, 8, generator=generator) for n in (3, 4, 4))
        times = torch.tensor([1, 3, 1, 5])
        many = [x.repeat_interleave(times, 2) for x in (key, value)]
        shown = torch.ones(3, 4, dtype=torch.bool).tril(1)
        wanted = torch.nn.functional.scaled_dot_product_attention(
            query, *many, attn_mask=shown.repeat_interleave(times, 1)
        )
        mask = host.biased(shown[None, None], times.log())
        close(torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask), wanted)
        close(attention_rows(query, key, mask=mask, scale=8**-0.5) @ value, wanted)

    def test_oracle(self, family: tiny.Built) -> None:
        """A stock model in which hooks of this test's own put the mean in, hide what went and add the bias."""
        model, inputs = family
        x = inputs([PROMPTS[1], PROMPTS[2]], seed=SEED)
        with vlm_attn.patched(model, FastV(layer=2, keep=0.3, compensate=True)):
            got = logits(model, x)
            kept = vlm_attn.kept(model)
        length = x["input_ids"].shape[1]
        gone = torch.zeros_like(x["input_ids"], dtype=torch.bool)
        size, number, sums = torch.ones_like(gone, dtype=torch.float32), 0, []
        for row in range(2):
            columns = (x["input_ids"][row] == tiny.IMAGE).nonzero().flatten()
            for _ in range(IMAGES[row + 1]):
                image = kept[number]
                own, columns = columns[: image.total], columns[image.total :]
                gone[row, own] = True
                gone[row, own[image.index]] = False
                counts = image.owner.bincount(minlength=image.total)
                seat = int(counts.argmax())
                assert counts.sum() == image.total
                assert seat in image.index
                assert len(image.index) == max(1, int(0.3 * image.total + 0.5)) + 1
                size[row, own[seat]] = counts[seat]
                sums.append((row, own[seat], own[image.owner == seat]))
                number += 1

        def blind(module: Any, args: Any, kwargs: Any) -> Any:
            mask = kwargs["attention_mask"]
            if mask is None:
                mask = torch.ones(1, 1, length, length, dtype=torch.bool).tril()
            mask = mask & (~gone[:, None, None] | torch.eye(length, dtype=torch.bool))
            bias = size.log()[:, None, None].masked_fill(~mask, -torch.inf)
            return args, {**kwargs, "attention_mask": bias}

        def put_in(module: Any, args: Any, kwargs: Any) -> Any:
            hidden = (args[0] if args else kwargs["hidden_states"]).clone()
            for row, seat, own in sums:
                hidden[row, seat] = hidden[row, own].mean(0)
            return ((hidden, *args[1:]), kwargs) if args else ((), {**kwargs, "hidden_states": hidden})

        layers = next(m for n, m in model.named_modules() if n.endswith("language_model")).layers
        handles = [layers[2].register_forward_pre_hook(put_in, with_kwargs=True)]
        handles += [part.register_forward_pre_hook(blind, with_kwargs=True) for part in layers[2:]]
        try:
            wanted = logits(model, x)
        finally:
            for handle in handles:
                handle.remove()
        there = x["attention_mask"].bool() & ~gone
        close(got[there], wanted[there])

    @pytest.mark.parametrize("mode", ["drop", "mask"])
    def test_later_stages_take_it_with_its_size(self, mode: str) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 9]], seed=SEED)
        with (
            vlm_attn.patched(model, PyramidDrop(layers=(1, 2, 3), keep=1, compensate=True, mode=mode)),
            torch.no_grad(),
        ):
            cache = host.cache_of(model(**x))
            (image,) = vlm_attn.kept(model)
        assert [len(index) for _, index in image.stages] == [5, 3, 2]
        state = getattr(cache, CACHE_NOTE).reduction
        visual = x["input_ids"] == tiny.IMAGE
        for layer in (1, 2, 3):
            kept = state.layers[layer]
            assert kept.size[visual & kept.visible].sum() == 9
        assert sorted(image.owner.bincount()[image.index].tolist()) == [1, 8]

    def test_nothing_is_left_of_a_picture_but_its_mean(self) -> None:
        model, inputs = built("llava")
        x = inputs([PROMPTS[0]], seed=SEED)
        with vlm_attn.patched(model, VTW(layer=2, compensate=True)):
            summed = generate(model, x)
            assert vlm_attn.kept(model)[0].owner.tolist() == [4] * 9
        with vlm_attn.patched(model, VTW(layer=2)):
            differ(generate(model, x)[1], summed[1])
            assert vlm_attn.kept(model)[0].owner.tolist() == [-1] * 9

    @pytest.mark.parametrize("name", ["downsample", "visionzip", "prumerge", "vscan", "sparsevlm", "tome"])
    def test_methods_that_sum_up_by_themselves(self, name: str) -> None:
        with pytest.raises(ValueError, match="compensate=True would hand back"):
            reducer(name, compensate=True)

    def test_no_truth_value(self) -> None:
        with pytest.raises(TypeError, match="compensate must be True or False"):
            Random(compensate=1)  # type: ignore[arg-type]


class TestDecoding:
    @some
    def test_batch_is_rows_alone(self, family: tiny.Built, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        if name == "random":
            pytest.skip("drawn by the image's number in the call")
        with vlm_attn.patched(model, reducer(name, family)):
            tokens, scores = generate(model, x)
            for row in range(len(PROMPTS)):
                same(generate(model, alone(x, row, IMAGES)), (tokens[row : row + 1], scores[:, row : row + 1]))

    @some
    def test_without_cache(self, family: tiny.Built, name: str) -> None:
        x = family[1](PROMPTS, seed=SEED)
        method = reducer(name, family)
        stock_needs_cache(family[0], x, generate(family[0], x))
        same(run(family, method, x, use_cache=False), run(family, method, x))

    @some
    @pytest.mark.filterwarnings("ignore:StaticCache")
    def test_static_cache(self, family: tiny.Built, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        method = reducer(name, family)
        close(stock(lambda: generate(model, x, cache_implementation="static"))[1], generate(model, x)[1])
        same(run(family, method, x, cache_implementation="static"), run(family, method, x))
        one = inputs([PROMPTS[0]], seed=SEED)
        same(run(family, method, one, cache_implementation="static"), run(family, method, one))

    @some
    def test_beams(self, family: tiny.Built, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS[:2], seed=SEED)

        def beams(mode: str) -> Any:
            with vlm_attn.patched(model, reducer(name, family, mode=mode)), torch.no_grad():
                return model.generate(
                    **x, num_beams=3, num_return_sequences=2, do_sample=False, max_new_tokens=5,
                    output_scores=True, return_dict_in_generate=True,
                )  # fmt: skip

        one, other = beams("drop"), beams("mask")
        assert one.sequences.tolist() == other.sequences.tolist()
        close(one.sequences_scores, other.sequences_scores)
        assert len({tuple(row) for row in one.sequences.tolist()}) > 2

    @some
    @pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 3}, {"assistant_model": None}])
    def test_guesses(self, family: tiny.Built, name: str, options: dict[str, Any]) -> None:
        model, inputs = family
        x = inputs([PROMPTS[0]], seed=2)
        if "assistant_model" in options:
            options = {"assistant_model": copy.deepcopy(model)}
        plain = generate(model, x, new=10)
        if stock(lambda: generate(model, x, new=10, **options))[0].tolist() != plain[0].tolist():
            pytest.skip("stock transformers: speculative and greedy decoding give different tokens for this family")
        method = reducer(name, family)
        same(run(family, method, x, new=10, **options), run(family, method, x, new=10))

    @some
    def test_loop_by_hand_and_second_turn(self, family: tiny.Built, name: str) -> None:
        """Two turns on one cache are one prompt, as far as the tokens of the first turn were kept by the same choice."""
        model, inputs = family
        x = inputs([[3, "image", 9]], seed=SEED)
        more = torch.randint(3, tiny.IMAGE, (1, 5), generator=torch.Generator().manual_seed(3))

        def turns() -> tuple[Tensor, Tensor]:
            cache = DynamicCache(config=model.config.get_text_config())
            first = model.generate(**x, **{host.CACHE: cache}, do_sample=False, max_new_tokens=3)
            ids = torch.cat([first, more], 1)
            second = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
            for key in ("token_type_ids", "mm_token_type_ids"):
                if key in x:
                    second[key] = (ids == tiny.IMAGE).int() * int(x[key].max())
            assert cache.get_seq_length() == first.shape[1] - 1
            return generate(model, {**second, **{k: v for k, v in x.items() if "grid" in k}}, **{host.CACHE: cache})

        stock(turns)
        found = []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, reducer(name, family, mode=mode)), torch.no_grad():
                found.append(turns())
        same(*found)

    @pytest.mark.parametrize("name", [name for name in REDUCERS if name != "downsample"])
    def test_new_image_in_second_turn(self, name: str) -> None:
        model, inputs = built("llava")
        x = inputs([[3, "image", 5, "image", 6]], seed=SEED)
        cut = 4 + 9 + 5
        found = []
        for mode in ("drop", "mask"):
            method = reducer(name, mode=mode)
            with vlm_attn.patched(model, method), torch.no_grad():
                first = {"input_ids": x["input_ids"][:, :cut], "pixel_values": x["pixel_values"][:1]}
                cache = host.cache_of(model(**first))
                second = {"input_ids": x["input_ids"], "attention_mask": x["attention_mask"]}
                both = {**second, "pixel_values": x["pixel_values"][1:], host.CACHE: cache}
                found.append(generate(model, both))
                assert [len(image.stages) for image in vlm_attn.kept(model)] == [0, len(vlm_attn.kept(model)[1].stages)]
                assert vlm_attn.kept(model)[1].stages
        same(*found)

    @some
    def test_sampling_repeats(self, family: tiny.Built, name: str) -> None:
        x = family[1](PROMPTS[:2], seed=SEED)
        method = reducer(name, family)
        found = []
        for _ in range(2):
            torch.manual_seed(6)
            found.append(run(family, method, x, do_sample=True, temperature=5.0, top_k=0, num_return_sequences=3))
        assert torch.equal(found[0][0], found[1][0])
        assert len({tuple(row) for row in found[0][0].tolist()}) > 2

    @some
    def test_bfloat16(self, family: tiny.Built, name: str) -> None:
        model = copy.deepcopy(family[0]).to(torch.bfloat16)
        x = {k: v.to(torch.bfloat16) if v.is_floating_point() else v for k, v in family[1](PROMPTS, seed=SEED).items()}
        stock(lambda: generate(model, x))
        with vlm_attn.patched(model, reducer(name, family)):
            assert generate(model, x)[1].isfinite().all()

    @some
    def test_eager(self, family: tiny.Built, name: str) -> None:
        model = copy.deepcopy(family[0])
        x = family[1](PROMPTS, seed=SEED)
        wanted = run(family, reducer(name, family), x)
        model.set_attn_implementation("eager")
        for mode in ("drop", "mask"):
            same(run((model, family[1]), reducer(name, family, mode=mode), x), wanted)

    @pytest.mark.parametrize("window", [5, 8, 20])
    def test_short_sliding_windows(self, name: str, window: int) -> None:
        family = tiny.gemma3(sliding_window=window)
        reducer(name, family)
        x = family[1](PROMPTS, seed=SEED)
        wanted = run(family, reducer(name, mode="mask"), x, new=12)
        same(run(family, reducer(name), x, new=12), wanted)
        same(run(family, reducer(name), x, new=12, use_cache=False), wanted)

    def test_chunked_prefill_is_refused(self, name: str) -> None:
        family = built("llava")
        x = family[1]([PROMPTS[0]], seed=SEED)
        with pytest.raises(NotImplementedError, match="prefill_chunk_size"):
            run(family, reducer(name), x, prefill_chunk_size=7)

    @pytest.mark.filterwarnings("ignore:StaticCache")
    def test_compiled(self, name: str) -> None:
        family = tiny.llava()
        x = family[1]([PROMPTS[0]], seed=SEED)
        compiled = CompileConfig(backend="aot_eager", fullgraph=True, mode=None)
        compiled._compile_all_devices = True
        torch._dynamo.reset()
        wanted = run(family, reducer(name), x)
        same(run(family, reducer(name), x, cache_implementation="static", compile_config=compiled), wanted)
        torch._dynamo.reset()


class TestBesideOthers:
    @some
    @pytest.mark.parametrize("other", ["gift", "var", "gift+var"])
    def test_edits(self, family: tiny.Built, name: str, other: str) -> None:
        """Edited rows see the kept columns only: dropped equals masked, cached equals uncached, in either order."""
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        methods = {  # no choice between heads and no gate, so that none can tip over
            "gift": Gift(**{**ACTIVE["gift"], "heads": 1.0}),
            "var": Var(**{**ACTIVE["var"], "rho": 0.0, "visual_floor": 0.0}),
        }
        others = [methods[part] for part in other.split("+")]
        bare = run(family, reducer(name, family), x)
        masked = run(family, [reducer(name, family, mode="mask"), *others], x)
        same(run(family, [reducer(name, family), *others], x), masked)
        same(run(family, [*others, reducer(name, family)], x), masked)
        same(run(family, [reducer(name, family), *others], x, use_cache=False), masked)
        differ(masked[1], bare[1])

    @pytest.mark.filterwarnings("ignore:.*experiment")
    @pytest.mark.parametrize("name", ["random", "fastv", "pyramid_drop", "sparsevlm"])
    @pytest.mark.parametrize("other", ["mma", "vision_block"])
    def test_prompt_masks(self, other: str, name: str) -> None:
        family = built("llava")
        x = family[1](PROMPTS, seed=SEED)
        masked = run(family, [other, reducer(name, mode="mask")], x)
        same(run(family, [other, reducer(name)], x), masked)
        same(run(family, [reducer(name), other], x, use_cache=False), masked)
        differ(masked[1], run(family, reducer(name), x)[1])

    def test_two_reducers(self, family: tiny.Built) -> None:
        model, inputs = family
        x = inputs(PROMPTS, seed=SEED)
        found = []
        for mode in ("drop", "mask"):
            pair = [Random(keep=0.75, mode=mode), FastV(layer=2, keep=0.25, mode=mode)]
            with vlm_attn.patched(model, pair):
                found.append(generate(model, x))
                for image in vlm_attn.kept(model):
                    (first, some), (then, few) = image.stages
                    assert (first, then) == (0, 2)
                    assert set(few.tolist()) < set(some.tolist())
        same(*found)


class Maps(TorchDispatchMode):
    """Counts the attention maps that are made: numbers for every row and every key, head by head."""

    def __init__(self, heads: int) -> None:
        super().__init__()
        self.heads, self.found = heads, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for part in out if isinstance(out, tuple | list) else [out]:
            if isinstance(part, Tensor) and part.is_floating_point() and part.ndim >= 3:
                rows, keys = part.shape[-2:]
                heads = part.numel() // (rows * keys)
                self.found += (
                    heads >= self.heads and rows >= 2 * IMAGE_TOKENS and keys >= rows and "empty" not in str(func)
                )
        return out


class TestNoMaps:
    def test_eager_attention_makes_one_per_layer(self) -> None:
        """The counter counts."""
        model = copy.deepcopy(built("llava")[0])
        model.set_attn_implementation({"text_config": "eager"})
        with Maps(4) as maps:
            logits(model, built("llava")[1](PROMPTS[2:]))
        assert maps.found >= 4

    def test_scores_cost_rows_not_maps(self, name: str) -> None:
        """No reducer makes one, and the fused attention stays on: once per layer, in the tower as well."""
        model, inputs = built("llava")
        x = inputs(PROMPTS[2:], seed=SEED)
        fused: list[int] = []
        attend = torch.nn.functional.scaled_dot_product_attention

        def counted(query: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            fused.append(query.shape[2])
            return attend(query, *args, **kwargs)

        with pytest.MonkeyPatch.context() as patch, vlm_attn.patched(model, reducer(name)), Maps(4) as maps:
            patch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
            logits(model, x)
        assert maps.found == 0
        assert len(fused) == 2 + 4


class TestDeepstack:
    """Qwen3-VL adds features of the tower to the visual rows of its first layers: behind those tokens may go."""

    @pytest.mark.parametrize("method", [FastV(layer=2, keep=3), PyramidDrop(layers=(2, 3), keep=0.4), VTW(layer=3)])
    def test_dropping_is_masking(self, method: Reducer) -> None:
        family = deepstack()
        x = family[1](PROMPTS, seed=SEED)
        plain = generate(family[0], x)
        found = [run(family, replace(method, mode=mode), x) for mode in ("drop", "mask")]
        same(*found)
        differ(found[0][1], plain[1])
        same(run(family, method, x, use_cache=False), found[0])
        mixed = [Gift(**{**ACTIVE["gift"], "heads": 1.0})]
        same(run(family, [method, *mixed], x), run(family, [replace(method, mode="mask"), *mixed], x))

    def test_masking_from_the_first_layer(self) -> None:
        """Whoever comes later does not see them; the layers add to all rows as ever."""
        family = deepstack()
        x = family[1](PROMPTS[:1], seed=SEED)
        masked = run(family, Random(keep=3, mode="mask"), x)
        same(run(family, Random(keep=3, mode="mask"), x, use_cache=False), masked)
        differ(masked[1], generate(family[0], x)[1])


class TestKept:
    def test_cells(self) -> None:
        model, inputs = built("qwen2_vl")
        x = inputs([[2, "image", 3, "image", 4]], seed=SEED)
        with vlm_attn.patched(model, Random(keep=2)):
            generate(model, x)
            images = vlm_attn.kept(model)
        assert [(image.row, image.grid, image.total) for image in images] == [(0, (2, 3), 6)] * 2
        for image in images:
            assert len(image.index) == 2
            assert image.cells.tolist() == [[i // 3, i % 3] for i in image.index.tolist()]
            assert image.mask.nonzero().tolist() == image.cells.tolist()

    def test_tokens_beside_the_grid(self) -> None:
        model, inputs = built("llava_next")
        x = inputs([[2, "image", 3]], seed=SEED)
        with vlm_attn.patched(model, Random(keep=12)):
            generate(model, x)
            (image,) = vlm_attn.kept(model)
        tiles = [[row // 2, column // 2] if column < 4 else [-1, -1] for row in range(4) for column in range(5)]
        every = [[0, 0], [0, 1], [1, 0], [1, 1], *tiles]
        assert image.all_cells.tolist() == every
        assert image.cells.tolist() == [every[place] for place in image.index.tolist()]
        assert image.mask.flatten().tolist() == [place in image.index for place in range(4)]

    @pytest.mark.parametrize(("size", "shape"), [((9, 16), (2, 4)), ((16, 5), (4, 2)), (None, (0, 0))])
    def test_cells_of_tiles_without_padding(self, size: Any, shape: tuple[int, int]) -> None:
        """Rows and columns count within the picture, not within the padded tiles."""
        model, _ = built("llava_next")
        rows, columns = shape
        tokens = 4 + max(1, rows * (columns + 1))
        image = ImageSpan(0, 0, tokens, (2, 2), 0, 5 if size else 1, size)
        found = cells(model.config, image)
        assert len(found) == tokens
        wanted = [
            [r * 2 // rows, c * 2 // columns] if c < columns else [-1, -1]
            for r in range(rows)
            for c in range(columns + 1)
        ]
        assert found[4:].tolist() == (wanted or [[-1, -1]])
        assert cells(model.config, replace(image, stop=tokens + 1))[4:].eq(-1).all()  # not what the rule expects

    def test_nothing_to_show(self) -> None:
        model, inputs = built("llava")
        with pytest.raises(ValueError, match="not patched"):
            vlm_attn.kept(model)
        with vlm_attn.patched(model, Random()), pytest.raises(ValueError, match="no prompt"):
            vlm_attn.kept(model)
        with vlm_attn.patched(model, "gift", **ACTIVE["gift"]):
            generate(model, inputs([PROMPTS[0]]))
            with pytest.raises(ValueError, match="gift"):
                vlm_attn.kept(model)


class TestUndone:
    def test_unpatch(self, name: str) -> None:
        model, inputs = tiny.llava()
        x = inputs(PROMPTS, seed=SEED)
        plain = generate(model, x)
        before = state(model)
        run((model, inputs), reducer(name), x)
        assert state(model) == before
        assert torch.equal(generate(model, x)[1], plain[1])

    def test_copies_share_nothing(self, name: str) -> None:
        model, inputs = tiny.llava()
        x = inputs(PROMPTS, seed=SEED)
        with vlm_attn.patched(model, reducer(name)):
            wanted = generate(model, x)
            twin = copy.deepcopy(model)
            same(generate(twin, x), wanted)
        assert vlm_attn.is_patched(twin)
        same(generate(twin, x), wanted)

    def test_after_an_exception(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([PROMPTS[0]], seed=SEED)
        with vlm_attn.patched(model, Random()):
            wanted = generate(model, x)
            vlm_attn.patch(model, Random(keep=99), replace=True)
            with pytest.raises(ValueError, match="keep=99"):
                generate(model, x)
            vlm_attn.patch(model, Random(), replace=True)
            same(generate(model, x), wanted)


class TestWrongInput:
    @pytest.mark.parametrize("keep", [0.0, -0.5, 1.5, 0, -3, float("nan")])
    def test_keep_outside(self, keep: Any) -> None:
        with pytest.raises(ValueError, match="keep="):
            Random(keep=keep)

    @pytest.mark.parametrize("keep", [True, None])
    def test_keep_is_no_number(self, keep: Any) -> None:
        with pytest.raises(TypeError, match="keep"):
            Random(keep=keep)

    def test_mode(self) -> None:
        with pytest.raises(ValueError, match='"drop"'):
            Random(mode="cut")  # type: ignore[arg-type]

    def test_more_than_the_image_has(self, name: str) -> None:
        if name == "vtw":
            pytest.skip("takes no count")
        family = built("llava")
        with pytest.raises(ValueError, match=r"keep=10 .* 9 tokens of image 0"):
            run(family, reducer(name, keep=10), family[1]([PROMPTS[0]]))
        assert engine_is_idle(family[0])

    @pytest.mark.parametrize(
        "method",
        [
            FastV(layer=4),
            VTW(layer=9),
            PyramidDrop(layers=(1, 4)),
            SparseVLM(layers=(3,)),
            VScan(layer=4),
            LayerSkip(layers=(4,)),
        ],
        ids=lambda method: method.name,
    )
    def test_layer_beyond_the_model(self, method: Reducer) -> None:
        model, _ = built("llava")
        with pytest.raises(ValueError, match=r"layer .* allowed are 0\.\.3"):
            vlm_attn.patch(model, method)
        assert not vlm_attn.is_patched(model)

    def test_layer_zero(self) -> None:
        with pytest.raises(ValueError, match="layer=0"):
            FastV(layer=0)

    def test_unknown_family(self, monkeypatch: pytest.MonkeyPatch) -> None:
        from vlm_attn.families import FAMILIES

        model, _ = built("llava")
        monkeypatch.delitem(FAMILIES, "llava")
        with pytest.raises(NotImplementedError, match=r"'llava'.*Known: llava_next"):
            vlm_attn.patch(model, Random())
        assert not vlm_attn.is_patched(model)

    @pytest.mark.parametrize("family", ["blip-2", "instructblip"])
    def test_query_tokens(self, family: str) -> None:
        model, _ = rows.build(family)
        with pytest.raises(NotImplementedError, match=rf"'{family}'.*Q-Former.*Known: llava"):
            vlm_attn.patch(model, Random())
        assert not vlm_attn.is_patched(model)

    @pytest.mark.parametrize(("name", "layer"), [("random", 0), ("sparsevlm", 1), ("vtw", 1), ("layer_skip", 1)])
    def test_deepstack_is_cut_through(self, name: str, layer: int) -> None:
        model, _ = deepstack()
        settings = {"sparsevlm": {"layers": (0, 2)}, "vtw": {"layer": 1}, "layer_skip": {"layers": (1, 3)}}.get(
            name, {}
        )
        with pytest.raises(
            NotImplementedError, match=rf"{name} .*layer {layer}, .*layers 0\.\.1 \(deepstack\).*layer 2 on"
        ):
            vlm_attn.patch(model, name, **settings)
        assert not vlm_attn.is_patched(model)
        vlm_attn.unpatch(vlm_attn.patch(model, name, mode="mask", **settings))

    def test_no_image_is_a_no_op(self) -> None:
        model, inputs = built("llava")
        x = {k: v for k, v in inputs([[12]]).items() if k != "pixel_values"}
        plain = generate(model, x)
        with vlm_attn.patched(model, Random()):
            with pytest.warns(UserWarning, match="cannot hold fewer columns"):  # one warning does not stand for another
                generate(model, inputs(PROMPTS), cache_implementation="static")
            with pytest.warns(UserWarning, match="no image"):
                same(generate(model, x), plain)
            import warnings

            with warnings.catch_warnings():
                warnings.simplefilter("error")
                same(generate(model, x), plain)

    def test_image_last(self, name: str) -> None:
        family = built("llava")
        with pytest.raises(ValueError, match="ends in an image token"):
            run(family, reducer(name), family[1]([[5, "image"]]))

    def test_no_grid(self) -> None:
        family = built("llava_next")
        with pytest.raises(ValueError, match="form no grid"):
            run(family, Downsample(), family[1]([PROMPTS[0]]))

    def test_vtw_between(self) -> None:
        with pytest.raises(ValueError, match="keep=0.5"):
            VTW(keep=0.5)

    def test_short_cache_without_reducer(self) -> None:
        model, inputs = built("llava")
        x = inputs([PROMPTS[0]], seed=SEED)
        with vlm_attn.patched(model, Random()), torch.no_grad():
            cache = host.cache_of(model(**x))
        with (
            vlm_attn.patched(model, "gift", **ACTIVE["gift"]),
            pytest.raises(ValueError, match="filled by other methods"),
        ):
            model(**x, **{host.CACHE: cache})


def engine_is_idle(model: Any) -> bool:
    return not vlm_attn.is_patched(model) or engine_of(model).call is None


def test_positions_are_gathered_once_per_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer gets the same ones; the rows that are left change where tokens are dropped, and only there."""
    gathered: list[Tensor] = []
    gather = host.gather_arguments

    def counted(arguments: Any, rows: Tensor) -> Any:
        gathered.append(rows)
        return gather(arguments, rows)

    monkeypatch.setattr(host, "gather_arguments", counted)
    model, inputs = tiny.llava()
    with vlm_attn.patched(model, "random", keep=0.5):
        generate(model, inputs([[3, "image", 7]]), new=3)
    assert len(gathered) == 1
