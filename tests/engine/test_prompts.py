# SPDX-License-Identifier: Apache-2.0
"""The question, the image's tokens and the answer's opening on prompts of every form, with processors of every kind."""

from __future__ import annotations

import importlib.util
import time
from functools import cache
from typing import Any

import pytest
import torch
import transformers

import vlm_attn
from tests import prompts
from tests.checkpoints import CHECKPOINTS
from tests.prompts import CASES, IMAGE, Case, filled, system, tokenized, user
from vlm_attn.chat import read_template, switches, visual_ids
from vlm_attn.question import UnknownQuestion
from vlm_attn.spelling import is_special

pytestmark = pytest.mark.filterwarnings(
    "ignore:__array__ implementation:DeprecationWarning"
)  # two processors of transformers
WRITTEN = [name for name, checkpoint in CHECKPOINTS.items() if checkpoint.template is not None]
BY_WORDS = "the words that part turns appear twice: one of them is quoted, and which one cannot be told"
MERGED = "a system message and the question share one turn with an empty line between, and nothing tells them apart"
REFUSED: dict[str, dict[str, str]] = {  # what cannot be known: checkpoint -> case -> reason
    "llava-1.5": {"second turn, quoted-user": BY_WORDS},
    "llava-next-vicuna": {"second turn, quoted-user": BY_WORDS},
    "gemma3": {"text of two lines then image": MERGED, "system, text then image": MERGED},
    "pixtral": {
        "second turn, code": MERGED,
        "second turn, inner-newlines": MERGED,
        "text of two lines then image": MERGED,
        "system, second turn": MERGED,
        "system, text then image": MERGED,
    },
}
# The token that images and videos become, where its name says another one.
SOFT = {
    "gemma3": ["<image_soft_token>"],
    "llama4": ["<|patch|>"],
    "aya-vision": ["<|IMG_PATCH|>"],
    "molmo2": ["<im_patch>"],
    "pixtral": ["[IMG]"],
    "mistral3": ["[IMG]"],
    "internvl3": ["<IMG_CONTEXT>"],
    "glm-4v": ["<|image|>"],
}


@cache
def processor(name: str, real: bool = False) -> Any:
    checkpoint = CHECKPOINTS[name]
    template = checkpoint.real() if real else None
    if real and template is None:
        pytest.skip("the checkpoint's own template is not there")
    if name == "smolvlm" and importlib.util.find_spec("num2words") is None:
        pytest.skip("num2words is not installed, which SmolVLM's processor needs")
    return checkpoint.processor(template)


@pytest.fixture(autouse=True)
def quiet() -> Any:
    before = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    yield
    transformers.logging.set_verbosity(before)


def applies(name: str, own: Any, case: Case) -> bool:
    """Whether a case can be written with a checkpoint's template."""
    if name == "glm-4v" and case.options.get("continue_final_message") and "\n" in case.chat[-1]["content"][0]["text"]:
        return (
            False  # the template writes the answer's line end as Python does, and transformers refuses to go on from it
        )
    if case.needs == "thinking":
        return "enable_thinking" in switches(own)
    return case.needs != "video" or CHECKPOINTS[name].video


def packed(text: str) -> str:
    """Without white space: some templates strip it, or put their own between two texts."""
    return "".join(text.split())


def wrong(own: Any, name: str, case: Case, x: dict[str, Any]) -> str | None:
    """What is not as it should be about a prompt's layout."""
    (row,) = vlm_attn.explain(own, x).rows
    ids, decode = x["input_ids"][0].tolist(), own.tokenizer.decode
    question = [part for part in row if part[0] == "QUERY"]
    if len(question) != 1:
        return f"{len(question)} parts are the question"
    _, start, stop, text = question[0]
    if packed(text) not in {packed(case.question), packed(case.joined or case.question)}:
        return f"the question is {text!r}"
    if not case.joined and text.strip() != case.question.strip():
        return f"white space of the question is {text!r}"
    soft = own.tokenizer.convert_tokens_to_ids(
        SOFT.get(name, [own.image_token, getattr(own, "video_token", own.image_token)])
    )
    visual = [place for kind, a, b, _ in row if kind == "VISUAL" for place in range(a, b)]
    if visual != [place for place, token in enumerate(ids) if token in soft]:
        return "VISUAL is not the image's tokens"
    role = [part for part in row if part[0] == "ROLE"]
    begun = case.chat[-1]["content"][-1]["text"] if case.chat[-1]["role"] == "assistant" else ""
    after = "".join(text for *_, text in role)
    if case.options.get("add_generation_prompt", True) and (len(role) != 1 or role[0][2] != len(ids)):
        return "ROLE is not the prompt's end"
    if not packed(after).endswith(packed(begun).rstrip(":")) and not packed(after).endswith(packed(begun)):
        return f"ROLE is {after!r}"
    between = packed(decode(ids[stop : role[0][1]])) if role else ""
    if between and not any(place in visual for place in range(stop, role[0][1])):
        return f"{between!r} stands between the question and ROLE"
    return None


@pytest.mark.parametrize("real", [False, True], ids=["ours", "own"])
@pytest.mark.parametrize("name", WRITTEN)
def test_every_form_of_prompt(name: str, real: bool) -> None:
    own, checkpoint = processor(name, real), CHECKPOINTS[name]
    refused, tried, found = REFUSED.get(name, {}), 0, {}
    for label, case in CASES.items():
        if not applies(name, own, case):
            continue
        x = tokenized(own, [filled(case.chat, checkpoint.system)], **case.options)
        tried += 1
        if label in refused:
            with pytest.raises(UnknownQuestion, match=r"row 0: .*query_span="):
                vlm_attn.explain(own, x)
        elif (problem := wrong(own, name, case, x)) is not None:
            found[label] = problem
    assert not found, "\n".join(f"{label}: {problem}" for label, problem in found.items())
    assert tried >= 70


def test_how_many_are_right() -> None:
    """Of all prompts, these are refused: at most 2 %."""
    assert len(WRITTEN) >= 15
    tried = sum(sum(case.needs in ("", "system") for case in CASES.values()) for _ in WRITTEN)
    assert sum(map(len, REFUSED.values())) <= 0.02 * tried
    assert all(label in CASES for labels in REFUSED.values() for label in labels)


@pytest.mark.parametrize("name", WRITTEN)
def test_left_padded_batch(name: str) -> None:
    """Every row of a padded batch is laid out as it is alone."""
    own, labels = processor(name), ("image then long", "image then chinese", "second turn, plain", "two images")
    chats = [filled(CASES[label].chat) for label in labels]
    if name == "llava-onevision":  # pads images to one number of tiles, so their tokens differ
        chats = chats[:3]
    batch = tokenized(own, chats)
    both = vlm_attn.explain(own, batch)
    for row, chat in enumerate(chats):
        alone = vlm_attn.explain(own, tokenized(own, [chat])).rows[0]
        pad = int((batch["attention_mask"][row] == 0).sum())
        assert [(kind, a + pad, b + pad, text) for kind, a, b, text in alone] == [
            part for part in both.rows[row] if part[0] != "PAD"
        ]


@pytest.mark.parametrize("name", WRITTEN)
def test_text_with_and_without_its_first_token(name: str) -> None:
    """Prompts that were written by the template and tokenised by the processor: some get a second BOS."""
    own = processor(name)
    chat = [user(IMAGE, "What is there?"), prompts.assistant("A dog."), user(prompts.Q)]
    text = own.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    x = dict(own(text=[text], images=[[prompts.image()]], return_tensors="pt"))
    assert [packed(part[3]) for part in vlm_attn.explain(own, x).rows[0] if part[0] == "QUERY"] == [packed(prompts.Q)]


@pytest.mark.parametrize("name", list(CHECKPOINTS))
def test_learning_takes_no_time(name: str) -> None:
    """Once per processor, beside what its template and image processor need the first time they run at all."""
    first, second = (CHECKPOINTS[name].processor() for _ in range(2)) if name != "smolvlm" else (processor(name),) * 2
    read_template(first)
    began = time.process_time()
    found = read_template(second)
    took = time.process_time() - began
    assert took < 3  # a generous bound for a busy machine; about 0.05 to 0.15 s
    assert read_template(second) is found
    assert found is not None
    assert visual_ids(second) == visual_ids(first)


class TestPaliGemma:
    """It has no chat template: its processor puts <bos> after the image and a line end after the text."""

    @pytest.mark.parametrize("question", ["answer en What is it?", "caption en", "图中有几只狗？", "\nWhat?"])
    def test_question(self, question: str) -> None:
        own = processor("paligemma")
        x = dict(own(text=["<image>" + question], images=[[prompts.image()]], return_tensors="pt"))
        rows = vlm_attn.explain(own, x).rows[0]
        assert [text.strip() for kind, *_, text in rows if kind == "QUERY"] == [question.strip()]
        assert [text for kind, *_, text in rows if kind == "ROLE"] in ([], ["\n"])
        assert [text for kind, *_, text in rows if kind == "SYSTEM"][0].startswith("<bos>")

    def test_plain_form(self) -> None:
        own = processor("paligemma")
        x = dict(own(text=["USER: <image>\nWhat is it? ASSISTANT:"], images=[[prompts.image()]], return_tensors="pt"))
        rows = vlm_attn.explain(own, x).rows[0]
        assert [text.strip() for kind, *_, text in rows if kind == "QUERY"] == ["What is it?"]
        assert [text.strip() for kind, *_, text in rows if kind == "ROLE"] == ["ASSISTANT:"]


class TestSpelling:
    @pytest.mark.parametrize("name", ["llava-1.5", "qwen2.5-vl", "gemma3"])
    def test_text_and_special_tokens(self, name: str) -> None:
        own = processor(name)
        template = read_template(own)
        assert template is not None
        words = "Describe it.\n\nWhat is it?"
        ids = own.tokenizer(words, add_special_tokens=False)["input_ids"]
        spelled, starts = template.speller.spell(ids)
        assert spelled.strip() == words
        assert starts == sorted(starts)
        assert len(starts) == len(ids) + 1
        special = own.tokenizer.all_special_ids[:5]
        spelled, _ = template.speller.spell(special)
        assert all(map(is_special, spelled))
        assert len(set(spelled)) == len(special)

    def test_a_part_of_a_character_is_no_text(self) -> None:
        own = processor("qwen2.5-vl")
        template = read_template(own)
        assert template is not None
        ids = own.tokenizer("狗", add_special_tokens=False)["input_ids"]
        spelled, _ = template.speller.spell(ids)
        assert len(spelled) == len(ids) > 1
        assert not any(map(is_special, spelled))


class TestWhatCannotBeKnown:
    def test_a_way_out(self) -> None:
        """The question's columns, given, are taken."""
        own = processor("pixtral")
        case = CASES["second turn, inner-newlines"]
        x = tokenized(own, [filled(case.chat)])
        length = x["input_ids"].shape[1]
        rows = vlm_attn.explain(own, x, query_span=(length - 9, length - 1)).rows[0]
        assert [part[:3] for part in rows if part[0] == "QUERY"] == [("QUERY", length - 9, length - 1)]

    @pytest.mark.parametrize("name", ["qwen2.5-vl", "gemma4", "mistral3"])
    def test_another_template(self, name: str) -> None:
        """A prompt that the processor's template did not write, or with a turn that it does not open so."""
        own = processor(name)
        text = own.apply_chat_template([user(IMAGE, prompts.Q)], add_generation_prompt=True, tokenize=False)
        strange = dict(
            own(
                text=["Question: " + own.image_token + " what? Answer:"],
                images=[[prompts.image()]],
                return_tensors="pt",
            )
        )
        again = text + "blue ### And?" + text.split(prompts.Q)[1]
        twice = dict(own(text=[again], images=[[prompts.image()]], return_tensors="pt"))
        for given in (strange, twice):
            with pytest.raises(UnknownQuestion):
                vlm_attn.explain(own, given)

    def test_system_message_in_a_turn_of_its_own(self) -> None:
        x = tokenized(
            processor("qwen3-vl"), [[system("Be brief.\n\nBe kind."), *filled([user("Look.\n\nWhat is it?", IMAGE)])]]
        )
        rows = vlm_attn.explain(processor("qwen3-vl"), x).rows[0]
        assert [part[3] for part in rows if part[0] == "QUERY"] == ["Look.\n\nWhat is it?"]
        assert torch.is_tensor(x["input_ids"])
