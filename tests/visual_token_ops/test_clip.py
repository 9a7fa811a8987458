# SPDX-License-Identifier: Apache-2.0
"""Reducers that ask CLIP: a real open_clip model of two layers with random weights, saved to a file and loaded by name."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, Inputs, close, differ, generate, logits, same
from tests.processors import encode, processor, user
from tests.visual_token_ops.test_methods import picture
from vlm_attn.clip import load, natural, similarity, without_form
from vlm_attn.hallucination import Gift
from vlm_attn.reduction import highest
from vlm_attn.visual_token_ops import CDPruner, Trim
from vlm_attn.visual_token_ops.cdpruner import likeliest, scaled_to_one

pytest.importorskip("open_clip")


@pytest.fixture(scope="module")
def built() -> tuple[Any, Any, Inputs]:
    model, _ = tiny.llava()
    own = processor()
    chats = ([user("what colour is the dog ?", 1)], [user("how many cups ? is it big ?", 2)])
    return model, own, encode(own, *chats)


class TestByHand:
    def test_likeliest_makes_the_determinant_large(self) -> None:
        """Against trying every next item, determinant by determinant."""
        rows = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
        kernel = rows @ rows.T
        wanted: list[int] = []
        for _ in range(4):
            rest = [i for i in range(7) if i not in wanted]
            wanted.append(
                max(rest, key=lambda i: float(torch.linalg.det(kernel[[*wanted, i]][:, [*wanted, i]].double())))
            )
        assert likeliest(kernel, 4).tolist() == sorted(wanted)

    def test_likeliest_of_two_is_the_best_pair(self) -> None:
        """Two pairs of twins: a relevant one of each, and never both twins."""
        tokens = nn.functional.normalize(torch.tensor([[1.0, 0.1], [1, 0], [0, 1], [0.1, 1]]), dim=-1)
        for relevance, wanted in (([1.0, 0.5, 0.5, 0.9], [0, 3]), ([0.5, 1.0, 0.9, 0.5], [1, 2])):
            r = torch.tensor(relevance)
            kernel = r[:, None] * (tokens @ tokens.T) * r
            dets = {
                pair: float(torch.linalg.det(kernel[list(pair)][:, list(pair)]))
                for pair in itertools.combinations(range(4), 2)
            }
            assert list(max(dets, key=dets.__getitem__)) == wanted
            assert likeliest(kernel, 2).tolist() == wanted

    def test_likeliest_beyond_the_rank(self) -> None:
        assert likeliest(torch.ones(5, 5), 5).tolist() == list(range(5))

    def test_scaled_to_one(self) -> None:
        close(scaled_to_one(torch.tensor([-1.0, 0.0, 1.0])), torch.tensor([0.0, 0.5, 1.0]))
        assert scaled_to_one(torch.tensor([0.3, 0.3])).tolist() == [1.0, 1.0]
        assert scaled_to_one(torch.tensor([-1.0, 1.0]))[0] > 0

    def test_cdpruner_likes_what_is_unlike_the_text(self) -> None:
        similar = torch.tensor([0.9, -0.9, 0.8, 0.7])
        p = picture(n=4, count=1, tokens=torch.eye(4), memory={"similarity": similar})
        assert CDPruner().choose(p).tolist() == [1]
        p.count = 2
        assert CDPruner().choose(p).tolist() == [1, 3]
        p.tokens = torch.tensor([[1.0, 0, 0], [0, 1, 0], [0, 0, 1], [0, 1, 0.01]])  # 3 says what 1 says
        assert CDPruner().choose(p).tolist() == [1, 2]

    def test_after_another_reducer(self) -> None:
        """The similarity is found by the token's place, not by its rank among those that are left."""
        similar = torch.arange(9.0)
        p = picture(n=4, count=2, places=torch.tensor([0, 8, 2, 5]), total=9, memory={"similarity": similar})
        assert Trim(summary=False).choose(p).tolist() == [0, 2]


class TestSimilarity:
    def test_is_open_clips_own(self, clip: str) -> None:
        """The tower's own forward, stopped before its last block: every patch through the norm and the projection of the pooled
        token. The question is one text, not several sentences."""
        model, tokenizer = load(clip)
        pixels = torch.rand(3, 12, 12, generator=torch.Generator().manual_seed(0))
        seen: list[Tensor] = []
        blocks = model.visual.transformer.resblocks
        handle = blocks[-1].register_forward_pre_hook(lambda m, args: seen.append(args[0]))
        mean, std = (torch.tensor(v)[:, None, None] for v in (model.visual.image_mean, model.visual.image_std))
        with torch.no_grad():
            model.encode_image(((pixels - mean) / std)[None])
            handle.remove()
            features = model.visual.ln_post(seen[0]) @ model.visual.proj
            text = model.encode_text(tokenizer(["Is it a dog? Yes."]))[0]
        wanted = nn.functional.cosine_similarity(features[0, 1:], text, dim=-1)
        close(similarity(clip, pixels, "Is it a dog? Yes.", (3, 3)), wanted)
        close(similarity(clip, pixels, "Is it a dog? Yes.", (3, 3), cosine=False), features[0, 1:] @ text)
        differ(wanted, similarity(clip, pixels, "Is it a dog?", (3, 3)))

    def test_a_note_on_the_form_is_not_shown(self) -> None:
        note = "Answer the question using a single word or phrase."
        assert without_form(f"What is it?\n{note}") == "What is it?"
        unsure = "When the provided information is insufficient, respond with 'Unanswerable'."
        assert without_form(f"What is it?\n{unsure}\n{note}") == "What is it?"
        assert without_form(note) == note
        assert without_form("Is it red?") == "Is it red?"

    def test_another_grid_and_size(self, clip: str) -> None:
        pixels = torch.rand(3, 20, 30, generator=torch.Generator().manual_seed(0))
        found = similarity(clip, pixels, "dog", (4, 6))
        assert found.shape == (24,)
        assert found.abs().max() <= 1

    def test_colours_come_back(self, built: Any) -> None:
        from tests.processors import picture as drawn

        _, own, x = built
        colours = torch.tensor(list(drawn(0).get_flattened_data())).view(12, 12, 3).permute(2, 0, 1) / 255
        close(natural(x["pixel_values"], own.image_processor)[0], colours)


@pytest.mark.parametrize("cls", [CDPruner, Trim])
class TestOnAModel:
    def test_dropping_is_masking(self, cls: Any, clip: str, built: Any) -> None:
        model, own, x = built
        plain = generate(model, x)
        found, kept = [], []
        for options in ({"mode": "drop"}, {"mode": "mask"}):
            with vlm_attn.patched(model, cls(keep=4, clip=clip, **options), processor=own):
                found.append(generate(model, x, suppress_tokens=[tiny.IMAGE]))
                same(generate(model, x, suppress_tokens=[tiny.IMAGE], use_cache=False), found[-1])
                kept.append([image.index.tolist() for image in vlm_attn.kept(model)])
        same(*found)
        assert kept[0] == kept[1]
        assert [len(index) for index in kept[0]] == [4 + (cls is Trim)] * 3
        differ(found[0][1], plain[1])

    def test_chooses_by_the_similarity(self, cls: Any, clip: str, built: Any) -> None:
        model, own, x = built
        pixels = natural(x["pixel_values"], own.image_processor)
        with vlm_attn.patched(model, cls(keep=4, clip=clip), processor=own):
            generate(model, x)
            kept = [image.index.tolist() for image in vlm_attn.kept(model)]
        texts = ["what colour is the dog ?"] + ["how many ? is it big ?"] * 2
        if cls is Trim:
            for found, p, t in zip(kept, pixels, texts, strict=True):
                least = highest(-similarity(clip, p, t, (3, 3), cosine=False), 4).tolist()
                gone = [i for i in range(9) if i not in least]
                assert found == sorted(
                    [*least, gone[2]]
                )  # and the mean of the other five, in the place of the middle one
        questions = ("describe the red cup", "7", "which ? where ? how ?", "it runs quickly , two small dogs")
        chosen = set()
        with vlm_attn.patched(model, cls(keep=4, clip=clip), processor=own):
            for question in questions:
                generate(model, encode(own, [user(question, 1)]))
                chosen.add(tuple(vlm_attn.kept(model)[0].index.tolist()))
        assert len(chosen) > 1  # another question, another choice

    def test_beside_gift(self, cls: Any, clip: str, built: Any) -> None:
        model, own, x = built
        gift = Gift(**{**ACTIVE["gift"], "heads": 1.0})
        found = []
        for mode in ("drop", "mask"):
            with vlm_attn.patched(model, [cls(keep=4, clip=clip, mode=mode), gift], processor=own):
                found.append(generate(model, x))
        same(*found)
        with vlm_attn.patched(model, cls(keep=4, clip=clip), processor=own):
            differ(generate(model, x)[1], found[0][1])

    def test_keeping_everything_is_the_plain_model(self, cls: Any, built: Any) -> None:
        model, _, x = built
        plain = logits(model, x)
        with vlm_attn.patched(model, cls(keep=1.0)):  # nothing is loaded for it
            assert torch.equal(logits(model, x), plain)

    def test_second_turn(self, cls: Any, clip: str, built: Any) -> None:
        """A new picture on a cache: only that one is shown to CLIP, with this turn's question."""
        model, own, x = built
        one = encode(own, [user("what colour is the dog ?", 1)])
        with vlm_attn.patched(model, cls(keep=4, clip=clip), processor=own), torch.no_grad():
            from vlm_attn import host

            cache = host.cache_of(model(**one))
            ids = torch.cat([one["input_ids"], one["input_ids"]], 1)
            second = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": one["pixel_values"]}
            generate(model, {**second, host.CACHE: cache})
            assert [len(image.stages) for image in vlm_attn.kept(model)] == [0, 1]


class TestWrongInput:
    @pytest.mark.parametrize("name", ["", "ViT-B-32", ":openai", "ViT-B-32:", 3])
    def test_name(self, name: Any) -> None:
        with pytest.raises(ValueError, match="architecture:weights"):
            Trim(clip=name)

    def test_unknown_model(self, built: Any) -> None:
        with pytest.raises(ValueError, match="clip='no-such:thing' cannot be loaded"):
            vlm_attn.patch(built[0], Trim(clip="no-such:thing"))
        assert not vlm_attn.is_patched(built[0])

    def test_weights_of_another_model(self, clip: str, built: Any, tmp_path: Path) -> None:
        torch.save({"a": torch.ones(1)}, tmp_path / "other.pt")
        with pytest.raises(ValueError, match="cannot be loaded"):
            vlm_attn.patch(built[0], CDPruner(clip=f"tiny-test:{tmp_path / 'other.pt'}"))

    def test_not_installed(self, built: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        import sys

        load.cache_clear()
        monkeypatch.setitem(sys.modules, "open_clip", None)
        with pytest.raises(ImportError, match=r"vlm-attn\[clip\]"):
            vlm_attn.patch(built[0], CDPruner())
        assert not vlm_attn.is_patched(built[0])

    def test_summary(self) -> None:
        with pytest.raises(TypeError, match="summary"):
            Trim(summary="yes")  # type: ignore[arg-type]

    def test_no_processor(self, clip: str, built: Any) -> None:
        with vlm_attn.patched(built[0], Trim(clip=clip)), pytest.raises(ValueError, match="processor="):
            generate(built[0], built[2])

    @pytest.mark.parametrize("family", ["llava_next", "qwen2_vl", "internvl"])
    def test_tiles_and_flat_patches(self, clip: str, family: str) -> None:
        model, inputs = tiny.FAMILIES[family]()
        x = inputs([[3, "image", 4, "image", 4]])
        if family == "internvl":
            x["pixel_values"] = x["pixel_values"].repeat(2, 1, 1, 1)  # two tiles to a picture
        with vlm_attn.patched(model, Trim(clip=clip)):
            vlm_attn.patching.engine_of(model).processor = processor()
            with pytest.raises(NotImplementedError, match="one block of pixels"):
                model(**x)

    def test_no_pixels(self, clip: str, built: Any) -> None:
        model, own, x = built
        with vlm_attn.patched(model, Trim(clip=clip), processor=own), pytest.raises(ValueError, match="pixel_values"):
            generate(model, {k: v for k, v in x.items() if k != "pixel_values"})
