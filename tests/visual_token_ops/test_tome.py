# SPDX-License-Identifier: Apache-2.0
"""Merging inside the vision tower: against a tower of the test's own, exact where tokens are alike, and refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, SiglipVisionConfig

import vlm_attn
from tests import tiny
from tests.helpers import close, differ, generate, logits
from vlm_attn.tower import Merger, descent
from vlm_attn.visual_token_ops import PruMerge, Random, ToMe


def llava_siglip() -> tiny.Built:
    """LLaVA with a tower that has no CLS token."""
    config = LlavaConfig(
        vision_config=SiglipVisionConfig(**tiny.VISION, image_size=12, patch_size=4),
        text_config=LlamaConfig(**tiny.TEXT, num_key_value_heads=2),
        image_token_index=tiny.IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    torch.manual_seed(0)
    return tiny.finish(LlavaForConditionalGeneration(config)), tiny.llava()[1]


BUILT = {
    "llava": tiny.llava,
    "llava_next": tiny.llava_next,
    "paligemma": tiny.paligemma,
    "llava-siglip": llava_siglip,
}


def features(model: Any, x: dict[str, Any]) -> Tensor:
    """What the model puts in the places of the images, ``[tokens, D]``."""
    seen: list[Tensor] = []
    text_model = next(m for n, m in model.named_modules() if n.endswith("language_model"))
    handle = text_model.register_forward_pre_hook(
        lambda m, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    logits(model, x)
    handle.remove()
    return seen[0][x["input_ids"] == tiny.IMAGE]


def by_hand(tower: Any, pixels: Tensor, left: list[int], first: int) -> tuple[Tensor, list[set[int]]]:
    """One picture through a tower with merging, token by token: what stands in every place, and who became one."""
    hidden = tower.embeddings(pixels[None])
    if hasattr(tower, "pre_layrnorm"):
        hidden = tower.pre_layrnorm(hidden)
    states, groups = list(hidden[0]), [{i} for i in range(hidden.shape[1])]
    for layer, count in zip(tower.encoder.layers, left, strict=True):
        x = torch.stack(states)[None]
        normed = layer.layer_norm1(x)
        attention = layer.self_attn
        heads, dim = attention.num_heads, attention.head_dim
        q, k, v = (p(normed)[0].view(-1, heads, dim) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
        score = torch.einsum("qhd,khd->hqk", q, k) * dim**-0.5 + torch.tensor([float(len(g)) for g in groups]).log()
        mixed = torch.einsum("hqk,khd->qhd", score.softmax(-1), v).flatten(1)
        x = x + attention.out_proj(mixed)[None]
        states = list((x + layer.mlp(layer.layer_norm2(x)))[0])
        unit = nn.functional.normalize(k.mean(1), dim=-1)
        best = []
        for a in range(first, len(states), 2):
            cosine, b = max((float(unit[a] @ unit[b]), b) for b in range(first + 1, len(states), 2))
            best.append((cosine, a, b))
        pairs = sorted(best, reverse=True)[: len(states) - first - count]
        weight = [len(g) for g in groups]
        sums = [s * w for s, w in zip(states, weight, strict=True)]
        for _, a, b in pairs:
            sums[b] = sums[b] + sums[a]
            groups[b] = groups[b] | groups[a]
        stay = [i for i in range(len(states)) if i not in {a for _, a, _ in pairs}]
        states, groups = [sums[i] / len(groups[i]) for i in stay], [groups[i] for i in stay]
    out = torch.empty(hidden.shape[1:])
    for state, group in zip(states, groups, strict=True):
        out[list(group)] = state
    return out[first:], [{i - first for i in group} for group in groups if min(group) >= first]


class TestExact:
    @pytest.mark.parametrize("name", BUILT)
    def test_against_a_tower_by_hand(self, name: str) -> None:
        model, inputs = BUILT[name]()
        x = inputs([[3, "image", 7]], seed=4)
        tower = next(m for n, m in model.named_modules() if n.endswith("vision_tower"))
        pixels = x["pixel_values"].flatten(0, -4)
        patches = (tower.config.image_size // tower.config.patch_size) ** 2
        left = descent(patches, round(patches / 2 + 0.1), 2)
        first = int(name in ("llava", "llava_next"))
        plain = features(model, x)
        with torch.no_grad():
            rows, groups = zip(*(by_hand(tower, picture, left, first) for picture in pixels), strict=True)
            values = torch.stack(rows)
            if name == "paligemma":
                values = tower.post_layernorm(values)
            wanted = model.model.multi_modal_projector(values)
            if name == "llava_next":
                (wanted,), _ = model.model.pack_image_features(
                    [wanted], x["image_sizes"], "default", image_newline=model.model.image_newline
                )
            wanted = wanted.reshape(-1, wanted.shape[-1])
        with vlm_attn.patched(model, ToMe(keep=0.5)):
            got = features(model, x)
            (image,) = vlm_attn.kept(model)
        if name == "paligemma":
            scale = got.norm() / wanted.norm()  # the model scales what it puts in
            close(got / scale, wanted)
        else:
            close(got, wanted)
        differ(got, plain)
        if name != "llava_next":
            owners = {frozenset((image.owner == i).nonzero().flatten().tolist()) for i in image.index.tolist()}
            assert owners == {frozenset(group) for group in groups[0]}

    def test_merging_what_is_alike_changes_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """A key with bias ``log n`` is n keys, so without positions pairs of equal patches can become one."""
        model, inputs = tiny.llava()
        nn.init.zeros_(model.model.vision_tower.embeddings.position_embedding.weight)
        x = inputs([[3, "image", 7]], seed=1)
        patches = torch.randn(5, 3, 4, 4, generator=torch.Generator().manual_seed(0))
        order = [0, 0, 0, 0, 1, 1, 2, 2, 3]
        rows = [torch.cat([patches[i] for i in order[a : a + 3]], 2) for a in (0, 3, 6)]
        x["pixel_values"] = torch.cat(rows, 1)[None]
        plain = features(model, x)
        with vlm_attn.patched(model, ToMe(keep=4)):
            close(features(model, x), plain)
            (image,) = vlm_attn.kept(model)
        assert len(image.index) == 4
        for token in image.index.tolist():
            cells = image.covered(token)
            assert cells.shape == (3, 3)
            assert cells.flatten().tolist() == [order[i] == order[token] for i in range(9)]
        monkeypatch.setattr(Merger, "weigh", lambda self, module, args, kwargs: None)
        with vlm_attn.patched(model, ToMe(keep=4)):
            differ(features(model, x), plain)

    @pytest.mark.parametrize("name", BUILT)
    def test_no_merge_is_the_plain_model(self, name: str) -> None:
        model, inputs = BUILT[name]()
        x = inputs([[3, "image", 7], [1, "image", 4, "image", 6]], seed=1)
        plain = logits(model, x)
        total = {"llava_next": 24, "paligemma": 16}.get(name, 9)
        with vlm_attn.patched(model, ToMe(keep=total)):
            assert torch.equal(logits(model, x), plain)
            assert all(image.index.tolist() == list(range(total)) for image in vlm_attn.kept(model))

    def test_layers_that_are_not_projected_merge_nothing(self) -> None:
        model, inputs = tiny.llava()
        model.config.vision_feature_layer = -2
        x = inputs([[3, "image", 7]], seed=1)
        with vlm_attn.patched(model, ToMe(keep=5)):
            logits(model, x)
            assert len(vlm_attn.kept(model)[0].index) == 5
        with vlm_attn.patched(model, ToMe(keep=3)), pytest.raises(ValueError, match=r"1 layers .* at least 5"):
            logits(model, x)

    def test_the_grid_survives(self) -> None:
        model, inputs = tiny.llava_next()
        x = inputs([[3, "image", 7], [1, "image", 4, "image", 6]], seed=1)
        with vlm_attn.patched(model, ToMe(keep=0.5)):
            generate(model, x)
            images = vlm_attn.kept(model)
        assert len(images) == 3
        for image in images:
            assert set(image.owner.tolist()) == set(image.index.tolist())
            assert image.owner[image.index].tolist() == image.index.tolist()
            newlines = [8, 13, 18, 23]
            assert set(newlines) < set(image.index.tolist())
            assert [image.owner.tolist().count(i) for i in newlines] == [1] * 4
            assert len(image.index) == 2 + 8 + 4  # half of the overview, half of four tiles, the newlines


class TestChoice:
    def test_pairs_by_hand(self) -> None:
        """Tokens 0, 2, 4 look among 1, 3, 5; the two best pairs go together, and two may go into one."""
        angle = torch.tensor([0.0, 0.1, 1.0, 2.0, 0.3, 3.0])
        keys = torch.stack([angle.cos(), angle.sin()], 1)[None]
        goes, into = ToMe().pairs(keys, 2)
        assert goes.tolist() == [[0, 4]]
        assert into.tolist() == [[1, 1]]
        goes, into = ToMe().pairs(3 * keys, 3)
        assert goes.tolist() == [[0, 4, 2]]
        assert into.tolist() == [[1, 1, 1]]

    @pytest.mark.parametrize(("tokens", "count", "layers"), [(576, 64, 23), (576, 144, 23), (9, 3, 2), (729, 40, 5)])
    def test_descent(self, tokens: int, count: int, layers: int) -> None:
        left = [tokens, *descent(tokens, count, layers)]
        assert left[-1] == count
        assert len(left) == layers + 1
        assert all(b <= a <= 2 * b for a, b in zip(left, left[1:], strict=False))
        steps = [a - b for a, b in zip(left, left[1:], strict=False)]
        if count > (tokens - count) / layers + 1:  # half is always enough
            assert max(steps) - min(steps) <= 1

    def test_more_than_half_in_every_layer(self) -> None:
        with pytest.raises(ValueError, match=r"2 of 9 .* 2 layers .* at least 3"):
            descent(9, 2, 2)


class TestWrongInput:
    @pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "internvl", "gemma3"])
    def test_other_families(self, family: str) -> None:
        model, _ = tiny.FAMILIES[family]()
        with pytest.raises(
            NotImplementedError, match=rf"tome merges .*'{family}'.*Known: llava, llava_next, paligemma"
        ):
            vlm_attn.patch(model, ToMe())
        assert not vlm_attn.is_patched(model)

    @pytest.mark.parametrize(
        ("field", "value"), [("vision_feature_layer", [-1, -2]), ("vision_feature_select_strategy", "full")]
    )
    def test_other_features(self, field: str, value: Any) -> None:
        model, _ = tiny.llava()
        setattr(model.config, field, value)
        with pytest.raises(NotImplementedError, match="one layer is projected"):
            vlm_attn.patch(model, ToMe())
        assert not vlm_attn.is_patched(model)

    def test_a_tower_without_bias(self) -> None:
        model, _ = tiny.llava()
        model.model.vision_tower.config._attn_implementation = "flex_attention"
        with pytest.raises(NotImplementedError, match=r"flex_attention.*sdpa"):
            vlm_attn.patch(model, ToMe())
        assert not vlm_attn.is_patched(model)

    def test_beside_what_reads_the_patches(self) -> None:
        model, _ = tiny.llava()
        with pytest.raises(ValueError, match="tome merges the patches that prumerge ranks"):
            vlm_attn.patch(model, [ToMe(), PruMerge()])
        vlm_attn.patch(model, [ToMe(), Random()])
        vlm_attn.unpatch(model)

    def test_too_few(self) -> None:
        model, inputs = tiny.llava()
        x = inputs([[3, "image", 7]])
        with vlm_attn.patched(model, ToMe(keep=2)), pytest.raises(ValueError, match="at least 3"):
            generate(model, x)

    def test_a_count_for_images_of_different_sizes(self) -> None:
        model, inputs = tiny.llava_next()
        x = inputs([[3, "image", 4, "image", 5]])
        x["image_sizes"] = torch.tensor([[16, 16], [9, 16]])
        ids = x["input_ids"][0].tolist()
        second = len(ids) - ids[::-1].index(tiny.IMAGE) - 24
        short = [t for i, t in enumerate(ids) if not second <= i < second + 10]
        x["input_ids"], x["attention_mask"] = torch.tensor([short]), torch.ones(1, len(short))
        with vlm_attn.patched(model, ToMe(keep=10)), pytest.raises(ValueError, match=r"\[14, 24\] tokens"):
            logits(model, x)
