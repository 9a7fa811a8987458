# SPDX-License-Identifier: Apache-2.0
"""Prompts that are something else than they look like: packed rows, labels, backward passes, text without an image."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import rows, tiny
from tests.helpers import ACTIVE, Inputs, alone, close, differ, logits, same
from tests.pins import SETTINGS
from vlm_attn import host
from vlm_attn.branch import Decoding
from vlm_attn.patching import engine_of
from vlm_attn.registry import method_class

PROMPT = [3, "image", 9]
METHODS = [name for name in SETTINGS if name != "plain"]
BARE = [name for name in METHODS if not issubclass(method_class(name), Decoding)]
MASKS = ("mma", "bidirectional", "croc", "vision_block", "prefix_lm")


@pytest.fixture(scope="module")
def llava() -> tiny.Built:
    return tiny.llava()


def on(model: Any, method: str, **changes: Any) -> Any:
    return vlm_attn.patched(model, method, **{**SETTINGS[method], **changes})


def generate(model: Any, x: Inputs, new: int = 6, **more: Any) -> tuple[Tensor, Tensor]:
    """New tokens and their logits; zeros for a search of its own, which has none."""
    options = {"output_logits": True, "return_dict_in_generate": True, "suppress_tokens": [tiny.IMAGE], **more}
    with torch.no_grad():
        out = model.generate(**x, do_sample=False, max_new_tokens=new, **options)
    tokens = out.sequences[:, x["input_ids"].shape[1] :]
    return tokens, torch.stack(out.logits) if getattr(out, "logits", None) else torch.ones(1, *tokens.shape)


def text(length: int, seed: int = 0) -> Inputs:
    ids = torch.randint(3, tiny.IMAGE, (1, length), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def labels_of(x: Inputs, answer: int = 4) -> Tensor:
    labels = x["input_ids"].clone()
    labels[:, :-answer] = -100
    return labels


class TestPacked:
    """Two samples in a row: the second would be read with the image of the first."""

    @staticmethod
    @cache
    def row() -> Inputs:
        one, other = (tiny.llava()[1]([PROMPT], seed=seed) for seed in (1, 2))
        return {name: torch.cat([one[name], other[name]], int(name != "pixel_values")) for name in one}

    @pytest.mark.parametrize("method", ["vision_block", "mma", "gift", "fastv", "duo", "vhr"])
    @pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens_q", "attention_mask"])
    def test_refused(self, llava: tiny.Built, method: str, how: str) -> None:
        model, _ = llava
        x = dict(self.row())
        length = x["input_ids"].shape[1] // 2
        sample = torch.arange(2 * length) // length
        x |= {
            "position_ids": {"position_ids": torch.arange(length).repeat(2)[None]},
            "cu_seq_lens_q": {"cu_seq_lens_q": torch.tensor([0, length, 2 * length])},
            "attention_mask": {
                "attention_mask": (sample[:, None] == sample)[None, None] & torch.ones(44, 44).tril().bool()
            },
        }[how]
        with on(model, method), pytest.raises(ValueError, match=f"{how}: a row holds several samples.*row of its own"):
            logits(model, x)

    def test_what_is_not_packed(self, llava: tiny.Built) -> None:
        """Left padding, positions from anywhere, and M-RoPE, whose heights and widths begin again with every image."""
        model, inputs = llava
        x = inputs([PROMPT, [1, "image", 4]])
        positions = (x["attention_mask"].cumsum(1) - 1).masked_fill(x["attention_mask"] == 0, 1)
        with on(model, "gift"):
            close(logits(model, {**x, "position_ids": positions}), logits(model, x))
            logits(model, {**x, "position_ids": positions + 5})
        model, inputs = tiny.qwen2_vl()
        x = inputs([PROMPT, [1, "image", 4, "image", 2]])
        with on(model, "gift"):
            logits(model, {**x, "position_ids": host.prompt_positions(model, x)[-3:]})


class TestLabels:
    @pytest.mark.parametrize("method", BARE)
    def test_said_once(self, llava: tiny.Built, method: str) -> None:
        """With labels, the logits are those without, and it is said which rows are edited."""
        model, inputs = llava
        x = inputs([PROMPT])
        labels = labels_of(x)
        with on(model, method), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*experiment.*")
            wanted = logits(model, x)
            if method in ("mma", "bidirectional", "prefix_lm"):
                with pytest.raises(ValueError, match=f"{method}, rows of the prompt see later ones.*on its cache"):
                    model(**x, labels=labels)
                return
            with pytest.warns(UserWarning, match=f"labels.*Rows that are edited.*{method}: ") as caught:
                out = model(**x, labels=labels)
            assert len([w for w in caught if "labels" in str(w.message)]) == 1
            with warnings.catch_warnings():
                warnings.simplefilter("error")
                again = model(**x, labels=labels)
            assert torch.equal(out.logits, wanted)
            assert torch.equal(again.loss, out.loss)
            shown = out.logits[0, -5:-1].log_softmax(-1).gather(1, x["input_ids"][0, -4:, None])
            close(out.loss, -shown.mean())

    @pytest.mark.parametrize(
        ("method", "says"), [("gift", "the last one alone"), ("var", "text behind"), ("vhr", "all")]
    )
    def test_which_rows(self, llava: tiny.Built, method: str, says: str) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        plain = model(**x, labels=labels_of(x))
        with on(model, method), pytest.warns(UserWarning, match=says):
            edited = model(**x, labels=labels_of(x))
        if method == "gift":  # the last row predicts no token of the answer
            close(edited.loss, plain.loss)
        else:
            differ(edited.loss, plain.loss)

    @pytest.mark.parametrize("method", ["fastv", "random"])
    def test_rows_that_are_taken_away(self, llava: tiny.Built, method: str) -> None:
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, method), pytest.raises(ValueError, match="labels: .* takes image tokens away"):
            model(**x, labels=x["input_ids"].clone())

    def test_an_answer_on_the_cache_is_edited(self, llava: tiny.Built) -> None:
        """The way out that the message names gives what generate() gives."""
        model, inputs = llava
        x = inputs([PROMPT])
        with on(model, "gift"), torch.no_grad():
            tokens, steps = generate(model, x, new=4)
            out = model(**x)
            rest = model(input_ids=tokens[:, :3], **{host.CACHE: host.cache_of(out)}).logits
            close(torch.cat([out.logits[0, -1:], rest[0]]), steps[:, 0])


class TestBackward:
    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("method", ["var", "vaf", "duo", "gift", "vhr", "vision_block", "fastv"])
    def test_checkpointing_is_refused(self, method: str, reentrant: bool) -> None:
        model, inputs = tiny.llava()
        x = inputs([PROMPT])
        name = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"  # since 5.24
        getattr(model, f"{name}_checkpointing_enable")({"use_reentrant": reentrant})
        model.train()
        with on(model, method), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*experiment.*")
            with pytest.raises(NotImplementedError, match=f"gradient checkpointing.*{method}.*checkpointing_disable"):
                model(**x)
            assert not engine_of(model)._turns.held
            logits(model, x)  # without gradients nothing runs again
            getattr(model, f"{name}_checkpointing_disable")()
            model(**x).logits.sum().backward()

    @pytest.mark.parametrize("method", ["var", "vaf", "duo"])
    def test_a_layer_that_runs_again(self, method: str) -> None:
        """Whoever checkpoints layers by himself is told in the backward pass, and gets no gradient of the plain model."""
        from torch.utils.checkpoint import checkpoint

        model, inputs = tiny.llava()
        x = inputs([PROMPT])
        layer = model.model.language_model.layers[1]
        stock = layer.forward
        layer.forward = lambda hidden, **kwargs: checkpoint(lambda h: stock(h, **kwargs), hidden, use_reentrant=True)
        with on(model, method):
            loss = model(**x).logits.sum()
            with pytest.raises(RuntimeError, match="outside a call.*checkpointing"):
                loss.backward()

    @pytest.mark.parametrize("method", ["var", "vaf", "duo", "gift"])
    def test_the_whole_model_again(self, method: str) -> None:
        """A checkpoint around the model is right: the call begins anew."""
        from torch.utils.checkpoint import checkpoint

        model, inputs = tiny.llava()
        x = inputs([PROMPT])
        embeds = model.get_input_embeddings().weight
        with on(model, method):
            (wanted,) = torch.autograd.grad(model(**x).logits.square().mean(), embeds)
            found = checkpoint(lambda: model(**x).logits.square().mean(), use_reentrant=False)
            (got,) = torch.autograd.grad(found, embeds)
        close(got, wanted)


class TestTextOnly:
    """One rule: a prompt without an image is left as the plain model has it, and that is said once."""

    @pytest.mark.parametrize("method", METHODS)
    def test_a_chat_with_and_without_images(self, llava: tiny.Built, method: str) -> None:
        model, inputs = llava
        x, y = inputs([PROMPT]), text(12)
        acts = method in ("duo", "razor", "landmark", "longheads", "routed", "recycled", "dola")  # on text, too
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            plain = generate(model, y, new=3)
            with on(model, method):
                wanted = generate(model, x, new=3)
        with on(model, method):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                first = generate(model, y, new=3)
                generate(model, y, new=3)
                if method in BARE:
                    found = logits(model, y)
            said = [str(w.message) for w in caught if "no image" in str(w.message)]
            assert len(said) == (0 if acts else 1), said
            if not acts:
                assert f"{method} leaves them as the plain model has them" in said[0]
                same(first, plain, 0.0)
                if method in BARE:
                    close(found[:, -1], plain[1][0])
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                same(generate(model, x, new=3), wanted, 0.0)

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("method", [*ACTIVE, *MASKS, "ilvad", "vcd", "icd", "guidance", "fastv", "tome"])
    def test_a_row_without_an_image(self, llava: tiny.Built, method: str) -> None:
        """In a batch, such a row gives what the plain model gives, the other what it gives alone."""
        model, inputs = llava
        x = inputs([PROMPT, [12]], seed=3)
        acts = method in ("duo", "razor", "landmark", "longheads", "routed")
        plain = generate(model, x, new=3)
        images = (1, 0)
        one = alone(x, 0, images)
        with on(model, method):
            got = generate(model, x, new=3)
            single = generate(model, one, new=3)
        close(got[1][:, :1], single[1])
        assert got[0][0].tolist() == single[0][0].tolist()
        if not acts:
            close(got[1][:, 1:], plain[1][:, 1:])
            assert got[0][1].tolist() == plain[0][1].tolist()

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("by", ["plain", "patched"])
    @pytest.mark.parametrize("method", METHODS)
    def test_text_in_the_cache(self, llava: tiny.Built, method: str, by: str) -> None:
        """A cache of text: what the whole prompt gives, or the reason why it cannot be known. A patched model's own first turn
        without an image is always gone on with."""
        model, inputs = llava
        x = inputs([[9, "image", 9]], seed=2)
        prefix = {name: x[name][:, :6] for name in ("input_ids", "attention_mask")}

        def cache() -> Any:
            with torch.no_grad():
                out = model.generate(**prefix, max_new_tokens=1, return_dict_in_generate=True, do_sample=False)
            return host.cache_of(out)

        unknown = {
            "duo": "what its rows would hold is unknown",
            "routed": "what its rows would hold is unknown",
            "vhr": "its heads are unknown",
            "bidirectional": "the mask lets them see what comes later",
            "prefix_lm": "the mask lets them see what comes later",
        }
        filled = cache() if by == "plain" else None
        with on(model, method):
            filled = cache() if filled is None else filled
            wanted = generate(model, x, new=3)
            if method in unknown and by == "plain":
                with pytest.raises((ValueError, NotImplementedError), match=unknown[method]):
                    generate(model, {**x, host.CACHE: filled}, new=3)
            else:
                got = generate(model, {**x, host.CACHE: filled}, new=3)
                if (
                    method not in unknown or method == "duo"
                ):  # the others would have looked further in a first turn, as always
                    same(got, wanted)

    def test_looking_needs_an_image(self, llava: tiny.Built) -> None:
        model, _ = llava
        with on(model, "gift"):
            for look in (lambda: vlm_attn.saliency(model, text(12)), lambda: vlm_attn.gaze(model, text(12), [5, 6])):
                with pytest.raises(ValueError, match=r"no image token in the prompt of row \[0\]"):
                    look()


class TestLayersWithAState:
    """LFM2-VL: a convolution's state can be repeated and reordered, but forgets nothing."""

    @staticmethod
    @cache
    def built() -> tuple[Any, Callable[..., Inputs]]:
        return rows.build("lfm2_vl")

    @pytest.mark.filterwarnings("ignore::UserWarning")
    @pytest.mark.parametrize("method", ["guidance", "vcd", "icd", "opera", "ilvad"])
    @pytest.mark.parametrize("options", [{}, {"num_beams": 2}], ids=str)
    def test_second_streams(self, method: str, options: dict[str, Any]) -> None:
        model, inputs = self.built()
        prompts = [[3, "image", 7], [1, "image", 4]]
        x = inputs(prompts)
        parameters = (
            {"beams": 2, "candidates": 2, "threshold": 1, "warmup": 0, "factor": 1.0} if method == "opera" else {}
        )
        with on(model, method, **parameters), torch.no_grad():
            got = model.generate(**x, max_new_tokens=6, do_sample=False, **options)
            for row in range(2):
                one = alone(x, row, (1, 1))
                length = one["input_ids"].shape[1]
                single = model.generate(**one, max_new_tokens=6, do_sample=False, **options)
                assert got[row, -6:].tolist() == single[0, length:].tolist()
