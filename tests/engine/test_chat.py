# SPDX-License-Identifier: Apache-2.0
"""Where the question stands: read off chat templates, with real processors."""

from __future__ import annotations

import re
from typing import Any

import pytest
from transformers import AutoProcessor

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE
from tests.processors import CHATML, VICUNA, assistant, encode, picture, processor, user
from vlm_attn.chat import read_template
from vlm_attn.patching import engine_of
from vlm_attn.question import UnknownQuestion, find_question

TAILS = {VICUNA: "ASSISTANT :", CHATML: "<|im_end|> \n <|im_start|> assistant \n"}


@pytest.fixture(params=[VICUNA, CHATML], ids=["vicuna", "chatml"])
def template(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture
def own(template: str) -> Any:
    return processor(template)


def parts(explanation: Any, row: int, *names: str) -> list[str]:
    """Texts of the groups of a row, in order."""
    return [text for name, _, _, text in explanation.rows[row] if name in names]


def whole(own: Any, inputs: dict[str, Any], explanation: Any) -> None:
    """Every column is in exactly one part, and the texts are the columns'."""
    for row, found in enumerate(explanation.rows):
        columns = [i for _, start, stop, _ in found for i in range(start, stop)]
        assert columns == list(range(inputs["input_ids"].shape[1]))
        for _, start, stop, text in found:
            assert own.tokenizer.decode(inputs["input_ids"][row, start:stop].tolist()) == text


class TestExplain:
    @pytest.mark.parametrize(
        "question",
        ["what colour is the dog?", "cat", "7 dogs?", "7", "red", "user", "describe this image.\nAnswer: what\n?"],
    )
    def test_single_turn(self, own: Any, template: str, question: str) -> None:
        x = encode(own, [user(question, 1)])
        found = vlm_attn.explain(own, x)
        whole(own, x, found)
        asked = own.tokenizer.decode(own.tokenizer(question, add_special_tokens=False)["input_ids"])
        assert parts(found, 0, "QUERY") == [asked]
        assert parts(found, 0, "ROLE") == [TAILS[template]]
        assert parts(found, 0, "VISUAL") == [" ".join(["<image>"] * 9)]
        assert [name for name, *_ in found.rows[0]] == ["SYSTEM", "VISUAL", "SYSTEM", "QUERY", "ROLE"]
        assert parts(found, 0, "SYSTEM")[1] == "\n"

    def test_system_prompt(self, own: Any, template: str) -> None:
        if template == VICUNA:
            pytest.skip("this template has no system turn")
        chat = [{"role": "system", "content": [{"type": "text", "text": "describe the dogs."}]}, user("what is it?", 1)]
        found = vlm_attn.explain(own, encode(own, chat))
        assert parts(found, 0, "QUERY") == ["what is it ?"]
        assert "describe the dogs ." in parts(found, 0, "SYSTEM")[0]

    def test_later_turn_without_image(self, own: Any, template: str) -> None:
        chat = [user("describe this image.", 1), assistant("a dog sits."), user("how many dogs?"), assistant("two.")]
        for turns, asked in ((1, "describe this image ."), (3, "how many dogs ?"), (5, "what colour is it ?")):
            found = vlm_attn.explain(own, encode(own, [*chat, user("what colour is it?")][:turns]))
            assert parts(found, 0, "QUERY") == [asked]
            assert parts(found, 0, "ROLE") == [TAILS[template]]

    def test_later_turn_with_image(self, own: Any) -> None:
        chat = [user("describe this image.", 1), assistant("a dog sits."), user("how many cups?", 1)]
        found = vlm_attn.explain(own, encode(own, chat))
        assert parts(found, 0, "QUERY") == ["how many cups ?".replace("cups", "<unk>")]
        assert len(parts(found, 0, "VISUAL")) == 2

    def test_several_images(self, own: Any) -> None:
        x = encode(own, [user("which dog is big?", 3)])
        found = vlm_attn.explain(own, x)
        whole(own, x, found)
        assert len(parts(found, 0, "VISUAL")) == 3
        assert parts(found, 0, "QUERY") == ["which dog is big ?"]

    def test_padding(self, own: Any, template: str) -> None:
        chats = [[user("what is it?", 1)], [user("describe this image.", 2), assistant("a cup."), user("two dogs?")]]
        x = encode(own, *chats)
        found = vlm_attn.explain(own, x)
        whole(own, x, found)
        alone = [vlm_attn.explain(own, encode(own, chat)) for chat in chats]
        for row in range(2):
            pad = int((x["attention_mask"][row] == 0).sum())
            shifted = [(name, start + pad, stop + pad, text) for name, start, stop, text in alone[row].rows[0]]
            assert [part for part in found.rows[row] if part[0] != "PAD"] == shifted
        assert found.rows[0][0][:3] == ("PAD", 0, int((x["attention_mask"][0] == 0).sum()))
        assert "PAD" in str(found)
        assert "row 1" in repr(found)

    def test_right_padding_is_refused(self, own: Any) -> None:
        own.tokenizer.padding_side = "right"
        x = encode(own, [user("what is it?", 1)], [user("what colour is the dog?", 1)])
        with pytest.raises(ValueError, match="padding_side"):
            vlm_attn.explain(own, x)

    def test_query_span(self, own: Any) -> None:
        x = encode(own, [user("what colour is the dog?", 1)])
        length = x["input_ids"].shape[1]
        found = vlm_attn.explain(own, x, query_span=(length - 4, length - 2))
        assert [(n, a, b) for n, a, b, _ in found.rows[0]][-2:] == [
            ("QUERY", length - 4, length - 2),
            ("ROLE", length - 2, length),
        ]
        with pytest.raises(ValueError, match="outside"):
            vlm_attn.explain(own, x, query_span=(5, length + 1))

    def test_without_a_template(self) -> None:
        """The plain form is known; of another prompt the question is all text after the last image."""
        bare = processor(None)
        found = vlm_attn.explain(bare, encode_text(bare, "USER: <image>\nwhat is it? ASSISTANT:"))
        assert parts(found, 0, "QUERY") == ["what is it ?"]
        assert parts(found, 0, "ROLE") == ["ASSISTANT :"]
        found = vlm_attn.explain(bare, encode_text(bare, "the <image> what is it? Answer:"))
        assert parts(found, 0, "QUERY") == ["what is it ? Answer :"]
        assert parts(found, 0, "ROLE") == []

    @pytest.mark.parametrize(
        "text", ["<image> what is it?", "<image> what is it? Answer:", "USER <image> what is it? ASSISTANT"]
    )
    def test_prompt_of_another_shape(self, own: Any, text: str) -> None:
        """A prompt that was not made with the template: what is the question and what a form of words is not known."""
        x = encode_text(own, text)
        with pytest.raises(UnknownQuestion, match=r"row 0: the prompt does not .*query_span="):
            vlm_attn.explain(own, x)
        model, _ = tiny.llava()
        with vlm_attn.patched(model, "gift", processor=own, **ACTIVE["gift"]):
            with pytest.raises(UnknownQuestion, match="query_span="):
                model.generate(**x, max_new_tokens=1)
            length = x["input_ids"].shape[1]
            with vlm_attn.spans(model, query=[(length - 3, length)]):
                model.generate(**x, max_new_tokens=1)

    def test_question_before_the_image(self, own: Any, template: str) -> None:
        chat = [{"role": "user", "content": [{"type": "text", "text": "what is it?"}, {"type": "image"}]}]
        x = encode(own, chat)
        assert parts(vlm_attn.explain(own, x), 0, "QUERY") == ["what is it ?"]
        model, _ = tiny.llava()
        with (
            vlm_attn.patched(model, "gift", processor=own, **ACTIVE["gift"]),
            pytest.raises(ValueError, match="no question after its image"),
        ):
            model.generate(**x, max_new_tokens=1)

    def test_not_a_vision_processor(self, own: Any) -> None:
        with pytest.raises(ValueError, match="names no image token"):
            vlm_attn.explain(own.tokenizer, encode(own, [user("what is it?", 1)]))


def encode_text(own: Any, text: str) -> dict[str, Any]:
    return dict(own(text=[text], images=[[picture()]], return_tensors="pt"))


class TestFindQuestion:
    def test_template_parts(self, own: Any, template: str) -> None:
        found = read_template(own)
        assert found is not None
        assert found.written
        assert [re.sub(r"[\\\\ ]", "", gap) for gap in found.gaps] == ["\n"] * len(found.gaps)
        assert [tail.strip() for tail in found.tails] == [TAILS[template].strip()]
        assert found.answer == found.tails[0]
        assert {
            header.strip().endswith("USER :" if template == VICUNA else "<|im_start|> user") for header in found.headers
        } == {True}

    def test_learned_once(self, own: Any) -> None:
        assert read_template(own) is read_template(own)
        before = read_template(own)
        own.chat_template = own.chat_template + "{{ ' .' }}"
        assert read_template(own) is not before

    def test_a_broken_template_tells_nothing(self) -> None:
        assert read_template(processor("{{ raise_exception('no') }}")) is None

    def test_no_image(self, own: Any) -> None:
        ids = encode(own, [user("what is it?")])["input_ids"][0].tolist()
        (start, stop), tail = find_question(ids, [False] * len(ids), read_template(own))
        assert own.tokenizer.decode(ids[start:stop]) == "what is it ?"
        assert stop + tail == len(ids)

    def test_nothing_but_the_tail(self, own: Any, template: str) -> None:
        ids = encode(own, [user("", 1)])["input_ids"][0].tolist()
        (start, stop), tail = find_question(ids, [i == tiny.IMAGE for i in ids], read_template(own))
        assert start == stop == len(ids) - tail
        assert own.tokenizer.decode(ids[stop:]) == TAILS[template]


class TestInTheEngine:
    def test_the_layout_is_what_explain_says(self, own: Any) -> None:
        model, _ = tiny.llava()
        x = encode(
            own, [user("what is it?", 1)], [user("describe this image.", 2), assistant("cup"), user("two dogs?")]
        )
        found = vlm_attn.explain(own, x)
        with vlm_attn.patched(model, "gift", processor=own, **ACTIVE["gift"]):
            with engine_of(model).running(x) as call:
                group = call.prompt.group
            model.generate(**x, max_new_tokens=2)
        for row, said in enumerate(found.rows):
            for name, start, stop, _ in said:
                assert (group[row, start:stop] == int(vlm_attn.Group[name])).all()

    def test_a_first_turn_and_a_longer_prompt(self, own: Any) -> None:
        """Without the processor the question is all that follows the image, so the two differ by gap and tail."""
        model, _ = tiny.llava()
        x = encode(own, [user("what colour is the dog?", 1)])
        spans = []
        for given in (own, None):
            with (
                vlm_attn.patched(model, "gift", processor=given, **ACTIVE["gift"]),
                engine_of(model).running(x) as call,
            ):
                spans.append(call.prompt.query[0])
        tail = len(own.tokenizer(TAILS[own.chat_template], add_special_tokens=False)["input_ids"])
        assert spans[0] == (spans[1][0] + 1, spans[1][1] - tail)


class TestScenesProcessor:
    """The processor that comes with the bundled model."""

    @pytest.fixture
    def own(self) -> Any:
        from vlm_attn.evals import scenes

        try:
            path = scenes.model_path()
        except FileNotFoundError as error:
            pytest.skip(f"not trained yet: {error}")
        return AutoProcessor.from_pretrained(path)

    def test_question(self, own: Any) -> None:
        from PIL import Image

        for question in ("Is there a dog in the image?", "Describe this image."):
            text = own.apply_chat_template([user(question, 1)], add_generation_prompt=True, tokenize=False)
            x = dict(own(text=[text], images=[[Image.new("RGB", (96, 96))]], return_tensors="pt"))
            found = vlm_attn.explain(own, x)
            whole(own, x, found)
            asked = own.tokenizer(question, add_special_tokens=False)["input_ids"]
            (start, stop), *_ = [(a, b) for name, a, b, _ in found.rows[0] if name == "QUERY"]
            assert x["input_ids"][0, start:stop].tolist() == asked
            assert len(parts(found, 0, "QUERY")) == 1
