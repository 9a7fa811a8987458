# SPDX-License-Identifier: Apache-2.0
"""The choice of every reducer on small hand-made arrays; every constant, when changed, changes something."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests import tiny
from tests.helpers import Inputs, close, differ
from vlm_attn.families import FAMILIES, cls_attention_module
from vlm_attn.layout import ImageSpan
from vlm_attn.method import ModelFacts
from vlm_attn.reduction import Picture, highest, kept_count, scaled
from vlm_attn.tower import cls_attention, on_tokens
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
    VisionZip,
    VScan,
)
from vlm_attn.visual_token_ops.divprune import cosine_distance, farthest
from vlm_attn.visual_token_ops.downsample import centres, smaller
from vlm_attn.visual_token_ops.holov import quota
from vlm_attn.visual_token_ops.sparsevlm import density_peaks, raters

FACTS = ModelFacts(model_type="llava", layers=32, heads=32, hidden=4096)


def picture(n: int = 16, count: int = 4, seed: int = 0, **given: Any) -> Picture:
    generator = torch.Generator().manual_seed(seed)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    side = int(n**0.5)
    defaults: dict[str, Any] = {
        "tokens": draw(n, 8),
        "places": torch.arange(n),
        "total": n,
        "count": count,
        "grid": (side, side) if side * side == n else (1, n),
        "text": draw(5, 8),
        "rows": draw(2, 5, n).softmax(-1),
        "cls": draw(n).softmax(-1),
        "keys": draw(n, 4),
    }
    return Picture(**{**defaults, **given})


class TestCounts:
    @pytest.mark.parametrize(
        ("keep", "total", "count"),
        [
            (0.5, 576, 288),
            (0.11, 576, 63),
            (1 / 3, 576, 192),
            (1.0, 9, 9),
            (0.001, 9, 1),
            (4, 9, 4),
            (0.0, 9, 0),
            (0.5, 5, 3),
        ],
    )
    def test_kept_count(self, keep: float, total: int, count: int) -> None:
        assert kept_count(keep, total) == count

    def test_highest_takes_the_earlier_of_equals(self) -> None:
        assert highest(torch.tensor([1.0, 3.0, 3.0, 3.0, 2.0]), 2).tolist() == [1, 2]

    @pytest.mark.parametrize(("keep", "left"), [(0.125, [288, 144, 72]), (72, [288, 144, 72]), (1 / 27, [192, 64, 21])])
    def test_pyramid(self, keep: float, left: list[int]) -> None:
        method = PyramidDrop(keep=keep).bind(FACTS)
        assert isinstance(method, PyramidDrop)
        assert [method.left(stage, 576) for stage in range(3)] == left
        assert method.stages == (8, 16, 24)

    @pytest.mark.parametrize(
        ("keep", "left"),
        [(192, [300, 200, 110]), (128, [303, 110, 36]), (96, [238, 48, 26]), (64, [66, 30, 17]), (32, [33, 15, 9])],
    )
    def test_sparsevlm(self, keep: int, left: list[int]) -> None:
        method = SparseVLM(keep=keep).bind(FACTS)
        assert isinstance(method, SparseVLM)
        assert method.left(0, 576) == 576
        assert [method.left(stage, 576) for stage in (1, 2, 3)] == left
        assert method.stages == (0, 3, 7, 16)
        assert method.read_layers == (2, 6, 15)

    @pytest.mark.parametrize(
        ("counts", "left"),
        [
            ((300, 144, 7), [300, 144, 7]),
            ((0.5, 0.25, 0.125), [288, 144, 72]),
            ([1.0, 1.0, 0.5], [576, 576, 288]),
        ],
    )
    def test_sparsevlm_by_counts(self, counts: Any, left: list[int]) -> None:
        method = SparseVLM(counts=counts, keep=1.0).bind(FACTS)
        assert isinstance(method, SparseVLM)
        assert [method.left(stage, 576) for stage in range(4)] == [576, *left]
        assert not method.neutral
        assert SparseVLM(counts=(1.0, 1.0, 1.0)).neutral

    @pytest.mark.parametrize("counts", [(3, 4, 5), (0.5, 3, 2), (0.5, 0.0, 0.0), (9, 3)])
    def test_sparsevlm_refuses_counts(self, counts: Any) -> None:
        with pytest.raises(ValueError, match="counts"):
            SparseVLM(counts=counts).bind(FACTS)


class TestBeforeTheModel:
    def test_random(self) -> None:
        first = Random().choose(picture())
        assert first.tolist() == Random().choose(picture(seed=1)).tolist()
        assert first.tolist() != Random(seed=1).choose(picture()).tolist()
        assert first.tolist() != Random().choose(picture(number=1)).tolist()
        counts = torch.zeros(16)
        for seed in range(400):
            counts[Random(seed=seed).choose(picture())] += 1
        assert (counts / 400 - 0.25).abs().max() < 0.1

    def test_downsample_is_the_mean_of_every_cell(self) -> None:
        p = picture(count=4)
        p.tokens = torch.arange(16.0)[:, None].expand(-1, 8)
        method = Downsample()
        chosen = method.choose(p)
        assert chosen.tolist() == [5, 7, 13, 15]
        merged = method.merge(p, chosen)
        assert merged[:, 0].tolist() == [2.5, 4.5, 10.5, 12.5]

    def test_downsample_with_all(self) -> None:
        p = picture(count=16)
        chosen = Downsample().choose(p)
        assert chosen.tolist() == list(range(16))
        assert torch.equal(Downsample().merge(p, chosen), p.tokens)

    @pytest.mark.parametrize(
        ("grid", "count", "found"),
        [
            ((24, 24), 144, (12, 12)),
            ((24, 24), 64, (8, 8)),
            ((10, 20), 50, (5, 10)),
            ((2, 3), 3, (1, 3)),
            ((3, 2), 1, (1, 1)),
        ],
    )
    def test_smaller_grid(self, grid: tuple[int, int], count: int, found: tuple[int, int]) -> None:
        assert smaller(grid, count) == found
        for size, cells in zip(grid, found, strict=True):
            assert len(set(centres(size, cells).tolist())) == cells

    def test_divprune_by_hand(self) -> None:
        """Points on a line: the one farthest from its neighbour comes first, then the far end, then the middle."""
        at = torch.tensor([0.0, 1.0, 2.0, 3.0, 10.0, 4.5])
        distance = (at[:, None] - at).abs()
        assert farthest(distance, 1).tolist() == [4]
        assert farthest(distance, 2).tolist() == [0, 4]
        assert farthest(distance, 3).tolist() == [0, 4, 5]
        assert farthest(distance, 6).tolist() == list(range(6))

    def test_divprune_is_greedy_max_min(self) -> None:
        p = picture(n=9, count=4)
        distance = cosine_distance(p.tokens)
        chosen = [max(range(9), key=lambda i: min(float(distance[i, j]) for j in range(9) if j != i))]
        while len(chosen) < 4:
            rest = [i for i in range(9) if i not in chosen]
            chosen.append(max(rest, key=lambda i: min(float(distance[i, j]) for j in chosen)))
        assert DivPrune().choose(p).tolist() == sorted(chosen)
        assert kept_count(DivPrune().keep, 576) == 56

    def test_divprune_never_repeats(self) -> None:
        same = picture(tokens=torch.ones(16, 8))
        assert len(set(DivPrune().choose(same).tolist())) == 4

    def test_visionzip_default_is_54_and_10(self) -> None:
        p = picture(n=576, count=kept_count(VisionZip().keep, 576))
        dominant, targets, seat = VisionZip().split(p)
        assert (len(dominant), len(targets), len(seat)) == (53, 10, 0)  # the CLS token is the 54th
        p.cls_feature = torch.zeros(8)
        assert len(VisionZip().choose(p)) == 64
        dominant, targets, seat = VisionZip(cls_token=False).split(p)
        assert (len(dominant), len(targets), len(seat)) == (54, 10, 0)
        every = VisionZip(contextual=0.0, cls_token=False)
        assert every.choose(p).tolist() == highest(p.cls, 64).tolist()  # type: ignore[arg-type]

    @pytest.mark.parametrize("count", [1, 2, 15, 16])
    def test_visionzip_of_few_and_of_nearly_all(self, count: int) -> None:
        p = picture(count=count, cls_feature=torch.zeros(8))
        chosen = VisionZip().choose(p)
        assert len(set(chosen.tolist())) == len(chosen) == count
        merged = VisionZip().merge(p, chosen)
        assert merged.shape == (count, 8)
        if count == 16:
            assert torch.equal(merged, p.tokens)

    def test_holov_quota(self) -> None:
        assert quota(torch.tensor([3.0, 1.0]), [10, 10], 8) == [6, 2]
        assert quota(torch.tensor([3.0, 1.0]), [4, 10], 8) == [4, 4]  # what does not fit goes on
        assert quota(torch.tensor([5.0, 3.0, 2.0]), [9, 9, 9], 9) == [
            5,
            3,
            1,
        ]  # 4.5, 2.7, 1.8: the largest, not the remainders
        assert quota(torch.tensor([1.0, 1.0, 1.0]), [9, 9, 9], 2) == [1, 1, 0]
        assert quota(torch.tensor([0.0, 0.0]), [3, 3], 6) == [3, 3]
        assert sum(quota(torch.rand(16), [36] * 16, 64)) == 64

    def test_holov_chunks_and_weights(self) -> None:
        p = picture(count=8)
        wanted = [highest(p.cls[a : a + 4], 2) + a for a in range(0, 16, 4)]  # type: ignore[index]
        even = HoloV(chunks=4, attention_weight=0.0, variance_weight=0.0)
        assert even.choose(p).tolist() == torch.cat(wanted).tolist()
        assert HoloV(chunks=1).choose(p).tolist() == highest(p.cls, 8).tolist()  # type: ignore[arg-type]
        unit = torch.nn.functional.normalize(p.tokens, dim=-1)
        varied = torch.cat([(part @ part.T).var(1, correction=0) for part in unit.split(4)])
        close(HoloV(chunks=4).score(p), 1000 * p.cls + 0.09 * varied / varied.max())
        found = {
            tuple(HoloV(chunks=4, **changes).choose(p).tolist())
            for changes in ({}, {"attention_weight": 0.0}, {"attention_weight": 0.0, "variance_weight": 0.0})
        }
        assert len(found) > 1

    def test_vscan_by_hand(self) -> None:
        local = torch.zeros(16)
        local[[0, 3, 12, 15, 14]] = torch.tensor([1.0, 1, 1, 1, 0.9])  # one in every 2 x 2 window, and a second best
        cls = torch.zeros(16)
        cls[[0, 5, 6, 9, 10]] = torch.tensor([5.0, 1, 2, 3, 4])
        p = picture(count=8, cls=cls, local=local)
        method = VScan(window=2)
        assert [part.tolist() for part in method.windows(p)][:2] == [[0, 1, 4, 5], [2, 3, 6, 7]]
        chosen = method.choose(p)
        assert chosen.tolist() == [0, 3, 5, 6, 9, 10, 12, 15]
        p.local = local.index_fill(0, torch.tensor(1), 2.0)  # two good ones in the first window
        assert {0, 1, 3, 12} < set(VScan(window=4).choose(p).tolist())
        assert {1, 3, 12, 15} < set(VScan(window=2).choose(p).tolist())
        p.local = local
        unit = torch.nn.functional.normalize(p.tokens, dim=-1)
        merged = method.merge(p, chosen)
        assert merged is not None
        for place, token in enumerate(chosen.tolist()):
            takes = [token]
            takes += [i for i in range(16) if i not in chosen and int((unit[i] @ unit[chosen].T).argmax()) == place]
            close(merged[place], p.tokens[takes].mean(0))
        p.stage = 1
        assert method.choose(p).tolist() == highest(p.rows.mean((0, 1)), 8).tolist()  # type: ignore[union-attr]
        assert method.merge(p, chosen) is None

    def test_vscan_counts(self) -> None:
        method = VScan().bind(FACTS)
        assert isinstance(method, VScan)
        assert [method.left(stage, 576) for stage in (0, 1)] == [96, 32]
        assert method.stages == (0, 16)
        assert VScan(first=1.0).left(0, 576) == 32
        assert VScan(keep=9).left(0, 9) == 9

    def test_cls_attention_is_the_towers_own(self) -> None:
        model, inputs = tiny.llava()
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        pixels = inputs([[1, "image", 2]])["pixel_values"]
        seen = []
        module = tower.encoder.layers[0].self_attn
        handle = module.register_forward_pre_hook(
            lambda m, args, kwargs: seen.append(cls_attention(m, args[0] if args else kwargs["hidden_states"])),
            with_kwargs=True,
        )
        maps = []
        other = module.register_forward_hook(lambda m, args, out: maps.append(out[1]))
        with torch.no_grad():
            tower(pixels)
        handle.remove()
        other.remove()
        close(seen[0][0], maps[0][:, :, 0, 1:].mean(1))
        assert seen[0][1].shape == (1, 9, 8)


@pytest.fixture(scope="module")
def before_last() -> tuple[Any, Inputs, Any]:
    """A LLaVA that projects the layer before last, its inputs, and what its tower says of the picture."""
    from transformers import LlavaForConditionalGeneration

    small, inputs = tiny.llava()
    config = copy.deepcopy(small.config)
    config.vision_feature_layer = -2
    torch.manual_seed(3)
    model = tiny.finish(LlavaForConditionalGeneration(config))
    x = inputs([[3, "image", 7]], seed=1)
    with torch.no_grad():
        return model, x, model.model.vision_tower(x["pixel_values"], output_hidden_states=True).hidden_states


class TestBeforeTheProjector:
    """What is merged on a model, beside the tower's own states: it is the features that go into the projector."""

    def seen(self, model: Any, x: Inputs, method: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Picture, Tensor]:
        import vlm_attn

        pictures: list[tuple[Picture, Tensor]] = []
        merge = type(method).merge

        def looked(self: Any, p: Picture, chosen: Tensor) -> Tensor:
            pictures.append((p, merge(self, p, chosen)[self.order(p, chosen)]))
            return merge(self, p, chosen)

        monkeypatch.setattr(type(method), "merge", looked)
        with vlm_attn.patched(model, method), torch.no_grad():
            model(**x)
        return pictures[0]

    def test_visionzip(self, before_last: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        model, x, states = before_last
        p, merged = self.seen(model, x, VisionZip(keep=5, contextual=0.4), monkeypatch)
        close(p.features, states[-2][0, 1:])
        close(p.cls_feature, states[-2][0, 0])
        with torch.no_grad():
            close(merged[0], model.model.multi_modal_projector(states[-2][:, 0])[0])
            plain = model.model.multi_modal_projector(states[-2])[0, 1:]
        close(p.tokens, plain)
        dominant, targets, _ = VisionZip(keep=5, contextual=0.4).split(p)
        close(merged[1:3], plain[dominant])
        differ(merged[3:], plain[targets])

    @pytest.mark.parametrize("last_layer", [False, True])
    def test_prumerge(self, before_last: Any, last_layer: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        """By default the attention of the layer that the features come from, with ``last_layer`` of the one behind it."""
        model, x, states = before_last
        p, merged = self.seen(model, x, PruMerge(keep=3, neighbours=2, last_layer=last_layer), monkeypatch)
        layer = model.model.vision_tower.encoder.layers[1 if last_layer else 0]
        with torch.no_grad():
            hidden = layer.layer_norm1(states[1 if last_layer else 0])
            query, key = layer.self_attn.q_proj(hidden), layer.self_attn.k_proj(hidden)
            attention = (query @ key.transpose(1, 2) / 32**0.5).softmax(-1)[0, 0, 1:]
            close(p.cls, attention)
            close(p.keys, key[0, 1:])
            kept = attention.argsort(descending=True)[:3]
            gone = [i for i in range(9) if i not in kept.tolist()]
            features = states[-2][0, 1:]
            more = (attention[gone, None] * features[gone]).sum(0)
            close(merged[-1], model.model.multi_modal_projector(more[None])[0])


class TestTiles:
    """What the tower says of patches, where patches are not the image's tokens."""

    @pytest.mark.parametrize("size", [(16, 16), (9, 16), (16, 5)])
    def test_llava_next_packs_as_the_model_does(self, size: tuple[int, int]) -> None:
        model, _ = tiny.llava_next()
        keys = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(0))
        sizes = torch.tensor([size])
        (wanted,), _ = model.model.pack_image_features([keys], sizes, "default", image_newline=torch.zeros(3))
        image = ImageSpan(0, 2, 2 + len(wanted), (2, 2), 0, 5, size)
        cls, placed = on_tokens(model.config, image, keys[..., 0], keys)
        assert torch.equal(placed, wanted)
        assert torch.equal(cls, wanted[:, 0])
        with pytest.raises(ValueError, match=f"make {len(wanted)} tokens"):
            on_tokens(model.config, ImageSpan(0, 2, 9, (2, 2), 0, 5, size), keys[..., 0], keys)

    def test_llava_next_without_tiles(self) -> None:
        model, _ = tiny.llava_next()
        cls = torch.rand(1, 4)
        found, _ = on_tokens(model.config, ImageSpan(0, 0, 5, (2, 2)), cls, cls[..., None])
        assert found.tolist() == [*cls[0].tolist(), 0.0]

    def test_internvl_averages_what_the_model_puts_together(self) -> None:
        model, _ = tiny.internvl()
        cls = torch.rand(3, 16, generator=torch.Generator().manual_seed(0))
        wanted = model.model.pixel_shuffle(cls.view(3, 4, 4, 1), scale_factor=0.5).mean(-1).flatten()
        found, keys = on_tokens(model.config, ImageSpan(0, 0, 12, (2, 2), 8, 3), cls, cls[..., None].expand(-1, -1, 2))
        close(found, wanted)
        close(keys, wanted[:, None].expand(-1, 2))
        assert FAMILIES["internvl"].tiles(model.config, 12, None) == 3

    @pytest.mark.parametrize("family", ["llava_next", "internvl"])
    def test_every_image_its_own(self, family: str, monkeypatch: pytest.MonkeyPatch) -> None:
        """The tower of every picture alone, against a batch of them."""
        import vlm_attn

        model, inputs = tiny.FAMILIES[family]()
        x = inputs([[3, "image", 4], [2, "image", 5, "image", 6]], seed=1)
        if family == "internvl":  # two tiles to each picture
            ids = x["input_ids"]
            there = [[t for i in row for t in ([i, i] if i == tiny.IMAGE else [i])] for row in ids.tolist()]
            wide = max(map(len, there))
            there = [[tiny.PAD] * (wide - len(row)) + row for row in there]
            ids = torch.tensor(there)
            pixels = torch.randn(6, *x["pixel_values"].shape[1:], generator=torch.Generator().manual_seed(5))
            x = {"input_ids": ids, "attention_mask": (ids != tiny.PAD).long(), "pixel_values": pixels}
        seen: list[Tensor] = []
        choose = PruMerge.choose
        monkeypatch.setattr(PruMerge, "choose", lambda self, p: (seen.append(p.cls), choose(self, p))[1])
        with vlm_attn.patched(model, PruMerge(keep=0.5)), torch.no_grad():
            model(**x)
            batch, number = list(seen), 0
            tiles = 2 if family == "internvl" else 1  # entries of pixel_values to a picture
            for image in range(3):
                seen.clear()
                one = inputs([[3, "image", 4]])
                one = {**one, "pixel_values": x["pixel_values"][image * tiles : (image + 1) * tiles]}
                if family == "internvl":
                    row = [t for i in one["input_ids"][0].tolist() for t in ([i, i] if i == tiny.IMAGE else [i])]
                    one["input_ids"], one["attention_mask"] = torch.tensor([row]), torch.ones(1, len(row))
                model(**one)
                close(batch[image], seen[0])
                number += 1
        assert number == len(batch)
        differ(batch[0], batch[1])

    def test_internvl_attention_is_the_towers_own(self) -> None:
        model, inputs = tiny.internvl()
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        found = []
        module = cls_attention_module(model, model.config, 0, "visionzip")
        module.register_forward_hook(lambda m, args, out: found.extend([cls_attention(m, args[0])[0], out[1]]))
        with torch.no_grad():
            tower(inputs([[1, "image", 2]])["pixel_values"])
        close(found[0], found[1][:, :, 0, 1:].mean(1))


class TestInside:
    def test_layers(self) -> None:
        assert (FastV().stages, FastV().read_layers) == ((3,), (2,))
        vtw = VTW().bind(FACTS)
        assert isinstance(vtw, VTW)
        assert (vtw.stages, vtw.left(0, 576)) == ((15,), 0)

    @pytest.mark.parametrize(("layers", "found"), [(32, (2, 6, 15)), (28, (2, 5, 13)), (6, (1, 3)), (80, (5, 15, 38))])
    def test_depth(self, layers: int, found: tuple[int, ...]) -> None:
        assert scaled((2, 6, 15), layers) == found

    def test_raters(self) -> None:
        image = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        text = torch.tensor([[0.0, 1.0], [5.0, 0.0], [0.0, -1.0]])
        assert raters(image, text).tolist() == [1]
        assert raters(image, torch.ones(3, 2)).tolist() == [0, 1, 2]

    def test_sparsevlm_reads_the_raters_only(self) -> None:
        p = picture(rows=torch.zeros(2, 5, 16), memory={"raters": torch.tensor([1, 3])}, stage=1)
        p.rows[:, 3, [2, 5, 7, 11]] = 1  # type: ignore[index]
        p.rows[:, 0, [0, 1]] = 9  # type: ignore[index]
        assert SparseVLM(recycle=0.0).choose(p).tolist() == [2, 5, 7, 11]

    def test_sparsevlm_recycles(self) -> None:
        """Two tight clusters among what is dropped: two tokens, the means, in the centres' places."""
        tokens = torch.zeros(12, 2)
        tokens[2:7] = torch.tensor([10.0, 0]) + torch.tensor([[0.0, 0], [0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]])
        tokens[7:12] = torch.tensor([-10.0, 0]) + torch.tensor([[0.0, 0], [0.1, 0], [-0.1, 0], [0, 0.1], [0, -0.1]])
        rows = torch.zeros(1, 1, 12)
        rows[..., :2] = 1
        p = picture(n=12, count=2, tokens=tokens, rows=rows, memory={"raters": torch.tensor([0])}, stage=1)
        method = SparseVLM(recycle=1.0, clusters=0.1)
        chosen = method.choose(p)
        assert chosen.tolist() == [0, 1, 2, 7]
        close(method.merge(p, chosen), torch.tensor([[0.0, 0], [0, 0], [10, 0], [-10, 0]]))
        assert method.merge(p, chosen) is None  # nothing is left over for the next stage
        assert method.owners(p, chosen).tolist() == [0, 1, *[2] * 5, *[7] * 5]

    def test_density_peaks_of_one(self) -> None:
        centre, goes = density_peaks(torch.randn(3, 4), 1, 1)
        assert len(centre) == 1
        assert goes.tolist() == [0, 0, 0]


class TestWrongInput:
    @pytest.mark.parametrize(
        ("cls", "parameters", "says"),
        [
            (PyramidDrop, {"layers": (16, 8)}, "ascending"),
            (PyramidDrop, {"layers": (0, 8)}, "begin at 1"),
            (SparseVLM, {"layers": (2, 2)}, "ascending"),
            (SparseVLM, {"recycle": 1.5}, "recycle=1.5"),
            (SparseVLM, {"clusters": -0.1}, "clusters=-0.1"),
            (SparseVLM, {"version": 3}, "neither 1 nor 2"),
            (PyramidDrop, {"counts": (3, 4)}, "none above"),
            (PruMerge, {"neighbours": -1}, "neighbours=-1"),
            (FastV, {"positions": "new"}, '"packed"'),
            (LayerSkip, {"keep": 0.0, "positions": "packed"}, "still to come back"),
            (VisionZip, {"contextual": 1.0}, "contextual=1"),
            (VisionZip, {"contextual": -0.1}, "contextual=-0.1"),
            (HoloV, {"chunks": 0}, "chunks=0"),
            (VScan, {"first": 0.5}, "first=0.5"),
            (VScan, {"window": 0}, "window=0"),
            (VScan, {"layer": -1}, "layer=-1"),
            (HoloV, {"attention_weight": -1}, "attention_weight=-1"),
            (HoloV, {"variance_weight": -1}, "variance_weight=-1"),
        ],
    )
    def test_parameters(self, cls: Any, parameters: dict[str, Any], says: str) -> None:
        with pytest.raises(ValueError, match=says):
            cls(**parameters)

    @pytest.mark.parametrize("method", [VisionZip(), PruMerge(), HoloV(), VScan()])
    @pytest.mark.parametrize("family", ["qwen2_vl", "gemma3", "paligemma"])
    def test_no_cls_token(self, method: Any, family: str) -> None:
        import vlm_attn

        model, _ = tiny.FAMILIES[family]()
        with pytest.raises(NotImplementedError, match=rf"{method.name}.*CLS.*'{family}'"):
            vlm_attn.patch(model, method)
        assert not vlm_attn.is_patched(model)

    def test_embeddings_without_the_tower(self) -> None:
        import vlm_attn

        model, inputs = tiny.llava()
        x: Inputs = inputs([[3, "image", 4]])
        embeds = model.get_input_embeddings()(x["input_ids"])
        spans = vlm_attn.spans
        says = pytest.raises(ValueError, match="vision tower did not run")
        with vlm_attn.patched(model, VisionZip()), spans(model, visual=[(4, 13)], query=[(13, 17)]), says:
            model(inputs_embeds=embeds)
