# SPDX-License-Identifier: Apache-2.0
"""Prompt masks: against a mask written out by hand and given to the plain model, in every way of decoding."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

import vlm_attn
from tests import tiny
from tests.helpers import alone, close, differ, generate, logits, same
from vlm_attn import host
from vlm_attn.hallucination import Gift, Mma, Var, masks
from vlm_attn.kernels import Group
from vlm_attn.kernels.masks import materialise
from vlm_attn.patching import engine_of
from vlm_attn.visual_token_ops import FastV

CAUSAL = ("llava", "llava_next", "qwen2_vl", "qwen2_5_vl", "internvl")
NAMES = ("mma", "bidirectional", "croc", "vision_block", "prefix_lm")
PROMPTS = [[3, "image", 7], [1, "image", 4, "image", 6]]
GIFT = {"saliency_layers": 1, "enhance_layers": (2, 3), "query_words": "all"}

pytestmark = pytest.mark.filterwarnings("ignore:.*this mask belongs to models:UserWarning")


@cache
def built(family: str) -> tuple[Any, Callable[..., dict[str, Any]]]:
    return tiny.FAMILIES[family]()


@pytest.fixture(params=CAUSAL)
def family(request: pytest.FixtureRequest) -> Iterator[tuple[Any, Callable[..., dict[str, Any]]]]:
    yield built(request.param)
    assert not vlm_attn.is_patched(built(request.param)[0])


def sees(name: str, i: int, j: int, kind: list[str], image: list[int]) -> bool:
    """The masks as sentences, one pair at a time."""
    if j <= i:
        return True
    other = {"text": "image", "question": "image", "image": "text"}[kind[i]]
    return {
        "mma": kind[i] == "image" and kind[j] == "question",
        "bidirectional": (kind[j] == "image") == (other == "image"),
        "croc": kind[i] == kind[j] == "image",
        "vision_block": kind[i] == kind[j] == "image" and image[i] == image[j],
        "prefix_lm": True,
    }[name]


def by_hand(name: str, x: dict[str, Any], role: int = 0) -> Tensor:
    """``[B, 1, P, P]``: without a processor the question is all text after the last image."""
    ids, kept = x["input_ids"], x["attention_mask"].bool()
    out = torch.zeros(len(ids), 1, ids.shape[1], ids.shape[1], dtype=torch.bool)
    for row in range(len(ids)):
        visual = (ids[row] == tiny.IMAGE).tolist()
        last = max(c for c, v in enumerate(visual) if v)
        kind = ["image" if v else "question" if c > last else "text" for c, v in enumerate(visual)]
        image, count = [], 0
        for c, v in enumerate(visual):
            count += v and (c == 0 or not visual[c - 1])
            image.append(count)
        for i in range(ids.shape[1]):
            for j in range(ids.shape[1]):
                out[row, 0, i, j] = not kept[row, i] or bool(kept[row, j] and sees(name, i, j, kind, image))
    return out


@pytest.mark.parametrize("name", NAMES)
class TestMasks:
    def test_is_the_mask_by_hand(self, family: Any, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS)
        kept = x["attention_mask"].bool()
        text = model.model.language_model
        seen: list[Any] = []
        hook = text.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
        plain = logits(model, x)
        hook.remove()
        with torch.no_grad():
            hidden = text(**{**seen[0], "attention_mask": by_hand(name, x)}).last_hidden_state
            wanted = model.lm_head(hidden)
        with vlm_attn.patched(model, name):
            now = logits(model, x)
        close(now[kept], wanted[kept])
        differ(now[kept], plain[kept])
        assert torch.equal(logits(model, x), plain)

    def test_every_way_of_decoding(self, family: Any, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, name):
            run = generate(model, x)
            same(generate(model, x, use_cache=False), run)
            same(generate(model, x, cache_implementation="static"), run)
            for row in range(len(PROMPTS)):
                same(generate(model, alone(x, row, (1, 2))), (run[0][row : row + 1], run[1][:, row : row + 1]))

    def test_eager_base(self, family: Any, name: str) -> None:
        model, inputs = family
        x = inputs(PROMPTS)
        eager = copy.deepcopy(model)
        eager.set_attn_implementation("eager")
        with vlm_attn.patched(model, name), vlm_attn.patched(eager, name):
            same(generate(eager, x), generate(model, x))

    def test_with_methods_that_split_the_prompt(self, name: str) -> None:
        """Neutral gift through its edit path: the body runs with the last token, which then runs again."""
        model, inputs = built("llava")
        x = inputs(PROMPTS)
        with vlm_attn.patched(model, name):
            run = generate(model, x)
        with vlm_attn.patched(model, [name, Gift(**GIFT, alpha=0.0)]):
            engine_of(model).force = True
            same(generate(model, x), run)
        with vlm_attn.patched(model, [Gift(**GIFT), name, Var(sink_dims=(3,), tau=1.5)]):
            edited = generate(model, x)
            same(generate(model, x, use_cache=False), edited)
        differ(edited[1][0], run[1][0])


def test_beams_and_prompt_lookup() -> None:
    model, inputs = built("llava")
    x, one = inputs(PROMPTS), inputs(PROMPTS[:1])
    with vlm_attn.patched(model, "mma"):
        beams = model.generate(**x, num_beams=3, max_new_tokens=5, do_sample=False)
        slow = model.generate(**x, num_beams=3, max_new_tokens=5, do_sample=False, use_cache=False)
        assert beams.tolist() == slow.tolist()
        same(generate(model, one, prompt_lookup_num_tokens=2), generate(model, one))


def test_the_question_given_by_span() -> None:
    """A shorter question is another mask; one that names all text after the image is the same."""
    model, inputs = built("llava")
    x = inputs(PROMPTS[:1])
    length = x["input_ids"].shape[1]
    with vlm_attn.patched(model, "mma"):
        whole = logits(model, x)
        with vlm_attn.spans(model, query=[(length - 7, length)]):
            close(logits(model, x), whole)
        with vlm_attn.spans(model, query=[(length - 7, length - 3)]):
            differ(logits(model, x), whole)


def test_the_released_span() -> None:
    """All text from the image on, with what stands between image and question and the template's tail; nothing else differs."""
    model, inputs = built("llava")
    x = inputs(PROMPTS[:1])
    length = x["input_ids"].shape[1]

    def seen(start: int, stop: int, **settings: Any) -> Tensor:
        with vlm_attn.patched(model, "mma", **settings), vlm_attn.spans(model, query=[(length - start, length - stop)]):
            return logits(model, x)

    everything = seen(7, 0)
    differ(seen(5, 2), everything)
    close(seen(5, 2, span="released"), everything)
    with pytest.raises(ValueError, match='span=.answer. is neither "question" nor "released"'):
        Mma(span="answer")  # type: ignore[arg-type]


# Padding, system, an image of two tokens, text, an image of one, two words, the tail, an answer: who sees what later.
LETTERS = "PSVVSVQQRG"
LATER = {
    ("mma", "question"): {(i, j) for i in (2, 3, 5) for j in (6, 7)},
    ("mma", "released"): {(i, j) for i in (2, 3) for j in (4, 6, 7, 8)} | {(5, j) for j in (6, 7, 8)},
    ("bidirectional", ""): {(i, j) for i in (2, 3) for j in (4, 6, 7, 8)}
    | {(5, j) for j in (6, 7, 8)}
    | {(1, 2), (1, 3), (1, 5), (4, 5)},
    ("croc", ""): {(2, 3), (2, 5), (3, 5)},
    ("vision_block", ""): {(2, 3)},
    ("prefix_lm", ""): {(i, j) for i in range(1, 9) for j in range(i + 1, 9)},
}


@pytest.mark.parametrize(("name", "span"), LATER)
def test_every_pair(name: str, span: str) -> None:
    kinds = {
        "P": Group.PAD,
        "S": Group.SYSTEM,
        "V": Group.VISUAL,
        "Q": Group.QUERY,
        "R": Group.ROLE,
        "G": Group.GENERATED,
    }
    group = torch.tensor([[int(kinds[letter]) for letter in LETTERS]])
    method = vlm_attn.registry.build(name, **({"span": span} if span else {}))
    assert method.mask is not None
    seen = materialise(method.mask, group).reshape(len(LETTERS), len(LETTERS))
    pairs = {(i, j) for i in range(1, len(LETTERS)) for j in range(len(LETTERS)) if bool(seen[i, j])}
    assert pairs == {(i, j) for i in range(1, len(LETTERS)) for j in range(1, i + 1)} | LATER[name, span]


def test_chunks_are_refused() -> None:
    model, inputs = built("llava")
    with vlm_attn.patched(model, "mma"), pytest.raises(ValueError, match="modality-mutual.*one piece"):
        generate(model, inputs(PROMPTS[:1]), prefill_chunk_size=8)


def test_second_turn_keeps_the_first_mask() -> None:
    """Keys of the first turn stay what they were; the new rows are causal."""
    model, inputs = built("llava")
    x = inputs([[3, "image", 5]])
    longer = {**x, "input_ids": torch.cat([x["input_ids"], torch.tensor([[7, 8, 9]])], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    with vlm_attn.patched(model, "mma"), torch.no_grad():
        first = model(**x, use_cache=True)
        assert host.cache_of(first).get_seq_length() == x["input_ids"].shape[1]
        turn = model(
            input_ids=longer["input_ids"][:, -3:], attention_mask=longer["attention_mask"],
            **{host.CACHE: host.cache_of(first)},
        ).logits  # fmt: skip
    with torch.no_grad():
        hidden = by_hand("mma", x)
        size = longer["input_ids"].shape[1]
        mask = torch.ones(1, 1, size, size, dtype=torch.bool).tril()
        mask[..., : hidden.shape[2], : hidden.shape[3]] = hidden
        seen: list[Any] = []
        text = model.model.language_model
        hook = text.register_forward_pre_hook(lambda _, __, kw: seen.append(kw), with_kwargs=True)
        model(**longer)
        hook.remove()
        wanted = model.lm_head(text(**{**seen[0], "attention_mask": mask}).last_hidden_state)[:, -3:]
    close(turn, wanted)


def test_refusals() -> None:
    model, inputs = built("llava")
    with pytest.raises(ValueError, match="mma\\+croc.*choose one"):
        vlm_attn.patch(model, ["mma", "croc"])
    assert not vlm_attn.is_patched(model)
    for other in ("gemma3", "paligemma"):
        with pytest.raises(NotImplementedError, match=f"mma: {other} is no plain causal decoder"):
            vlm_attn.patch(built(other)[0], "mma")
        assert not vlm_attn.is_patched(built(other)[0])


@pytest.mark.filterwarnings("default::UserWarning")
def test_the_caveat_is_said_once() -> None:
    model, inputs = built("llava")
    masks._warn.cache_clear()
    with vlm_attn.patched(model, "mma"):
        with pytest.warns(UserWarning, match="mma: this mask belongs to models that were trained with it"):
            logits(model, inputs(PROMPTS))
        import warnings

        with warnings.catch_warnings():
            warnings.simplefilter("error")
            logits(model, inputs(PROMPTS))


@pytest.mark.parametrize("name", NAMES)
def test_with_fewer_visual_tokens(name: str) -> None:
    """Dropping under a mask of the prompt is masking under it."""
    model, inputs = built("llava")
    x = inputs(PROMPTS)
    runs = []
    for mode in ("drop", "mask"):
        with vlm_attn.patched(model, [name, FastV(layer=2, keep=0.5, mode=mode)]):
            runs.append(generate(model, x))
    same(*runs)
    with vlm_attn.patched(model, name):
        differ(runs[0][1][0], generate(model, x)[1][0])
