# SPDX-License-Identifier: Apache-2.0
"""Which words of a question count for query_words="content"."""

from __future__ import annotations

from typing import Any

import pytest

from tests.checkpoints import CHECKPOINTS
from tests.processors import processor
from vlm_attn import words
from vlm_attn.words import by_list, content_tokens, is_informative


class Word:
    def __init__(self, text: str, idx: int, pos: str) -> None:
        self.text, self.idx, self.pos_ = text, idx, pos


def tagger(tags: dict[str, str]) -> Any:
    """Stands for a spaCy pipeline: words split on spaces, tagged from a table."""

    def tag(text: str) -> list[Word]:
        found, at = [], 0
        for word in text.split(" "):
            found.append(Word(word, at, tags.get(word, "X")))
            at += len(word) + 1
        return found

    return tag


def chosen(own: Any, question: str, **options: Any) -> list[str]:
    """Texts of the tokens that count."""
    ids = own.tokenizer(question, add_special_tokens=False)["input_ids"]
    flags = content_tokens(own, ids, **options).tolist()
    return [own.tokenizer.decode([token]) for token, flag in zip(ids, flags, strict=True) if flag]


class TestTagger:
    @pytest.fixture(autouse=True)
    def tags(self, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
        tags = {"dog": "NOUN", "big": "ADJ", "sits": "VERB", "?": "PUNCT"}
        monkeypatch.setattr(words, "_tagger", lambda: tagger(tags))
        return tags

    def test_words_and_all_their_occurrences(self) -> None:
        question = "the big dog and the small dog sits ?"
        assert chosen(processor(), question) == ["big", "dog", "dog", "sits"]
        assert chosen(processor(), question, last=True) == ["big", "dog", "sits"]
        assert words.rule_in_use() == "spaCy en_core_web_sm"

    @pytest.mark.parametrize("pos", ["NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"])
    def test_informative_tags(self, pos: str, tags: dict[str, str]) -> None:
        tags["dog"] = pos
        assert chosen(processor(), "the dog") == ["dog"]


class TestWordList:
    @pytest.fixture(autouse=True)
    def as_installed(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(words, "_tagger", lambda: None)

    @pytest.mark.parametrize(
        ("question", "informative"),
        [
            ("What colour is the dog, and where's the red cup?", "colour dog red cup"),
            ("Is there a snowboard in the image?", "snowboard image"),
            ("How many dogs aren't asleep?", "many dogs asleep"),
            ("Describe this image in detail.", "Describe image detail"),
            ("WHAT IS IT?", ""),
            ("the dog's owner can\u2019t see 2 cats", "dog's owner see 2 cats"),
            ("\u56fe\u4e2d\u6709\u51e0\u53ea\u72d7\uff1f", "\u56fe\u4e2d\u6709\u51e0\u53ea\u72d7"),
            ("O\u00f9 est la cl\u00e9 ?", "O\u00f9 est la cl\u00e9"),
        ],
    )
    def test_words(self, question: str, informative: str) -> None:
        assert [word for word, _ in by_list(question)] == informative.split()
        assert all(question[slice(*span)] == word for word, span in by_list(question))
        assert words.rule_in_use() == "function-word list"

    def test_no_word_is_in_two_classes_of_which_one_counts(self) -> None:
        assert not any(is_informative(word) for listed in words.FUNCTION_WORDS.values() for word in listed.split())

    def test_tokens(self) -> None:
        assert chosen(processor(), "is the big dog there and the dog runs quickly ?") == [
            "big",
            "dog",
            "dog",
            "runs",
            "quickly",
        ]
        assert chosen(processor(), "the dog and the dog", last=True) == ["dog"]

    @pytest.mark.parametrize("name", ["llava-1.5", "qwen3-vl", "gemma3"])
    def test_pieces_of_words_and_of_characters(self, name: str) -> None:
        """Words of several tokens, and characters of several tokens, count as a whole."""
        own = CHECKPOINTS[name].processor()
        assert "".join(chosen(own, "is the zebra there?")).replace(" ", "") == "zebra"
        ids = own.tokenizer("is \u72d7 in it?", add_special_tokens=False)["input_ids"]
        flags = content_tokens(own, ids).tolist()
        assert own.tokenizer.decode([i for i, flag in zip(ids, flags, strict=True) if flag]).strip() == "\u72d7"
