# SPDX-License-Identifier: Apache-2.0
"""Which words of a question say what it is about: all but function words."""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_attn.chat import probe

if TYPE_CHECKING:
    from vlm_attn.call import Call

#: The closed word classes of English (Universal Dependencies' tags, universaldependencies.org/u/pos).
FUNCTION_WORDS: dict[str, str] = {
    "ADP": "about above across after against along amid among amongst around as at before behind below beneath beside "
    "besides between beyond by despite down during except for from in inside into like near of off on onto "
    "opposite out outside over past per since through throughout till to toward towards under underneath until "
    "up upon via with within without",
    "AUX": "am is are was were be been being do does did have has had having can could may might must shall should "
    "will would ought",
    "CCONJ": "and but nor or yet plus either neither both",
    "DET": "a an the this that these those each every some any no all another such what which whatever whichever",
    "INTJ": "please yes no hello hi hey oh ok okay thanks",
    "PART": "not to",
    "PRON": "i me my mine myself we us our ours ourselves you your yours yourself yourselves he him his himself she "
    "her hers herself it its itself they them their theirs themselves who whom whose whoever there someone "
    "somebody something anyone anybody anything everyone everybody everything nobody nothing none",
    "SCONJ": "if whether because although though unless while whereas when where why how that than so",
}
_FUNCTION = frozenset(" ".join(FUNCTION_WORDS.values()).split())
_SHORT = frozenset(["s", "t", "d", "m", "re", "ve", "ll"])  # after an apostrophe
_BEFORE_NOT = frozenset(["wo", "ca", "sha", "ai"])  # won't, can't, shan't, ain't
# Letters and numbers, and tokens that are part of one (see vlm_attn.spelling).
_WORD = re.compile("(?:[^\\W_]|[\U00100000-\U0010ffff])+(?:['’][^\\W_]+)*")
_INFORMATIVE = {"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"}

# A text -> its informative words and where they stand in it.
Finder = Callable[[str], Sequence[tuple[str, tuple[int, int]]]]


def is_informative(word: str) -> bool:
    """Whether a word is none of :data:`FUNCTION_WORDS`, in short forms such as "isn't" too. Other languages' words all are."""
    word = word.lower().replace("’", "'")
    if word.endswith("n't"):
        return word[:-3] not in _FUNCTION | _BEFORE_NOT
    first, *rest = word.split("'")
    return first not in _FUNCTION or any(part not in _SHORT for part in rest)


def by_list(text: str) -> list[tuple[str, tuple[int, int]]]:
    """Informative words by the word list."""
    return [(found.group(), found.span()) for found in _WORD.finditer(text) if is_informative(found.group())]


def by_tagger(text: str) -> list[tuple[str, tuple[int, int]]]:
    """Informative words (noun, name, verb, adjective, adverb, number) by spaCy's tags, as GIFT's released code takes them."""
    tagger = _tagger()
    assert tagger is not None
    return [(w.text, (w.idx, w.idx + len(w.text))) for w in tagger(text) if w.pos_ in _INFORMATIVE]


@functools.cache
def _tagger() -> Any | None:
    """spaCy's small English pipeline, or None where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return None


def finder() -> Finder:
    """The rule in use: spaCy's tags where ``en_core_web_sm`` is installed, else the word list."""
    return by_list if _tagger() is None else by_tagger


def rule_in_use() -> str:
    """The rule in use, in words."""
    return "function-word list" if _tagger() is None else "spaCy en_core_web_sm"


def content_tokens(processor: Any, ids: Sequence[int], find: Finder | None = None, *, last: bool = False) -> Tensor:
    """Which tokens of a question belong to an informative word.

    Args:
        processor: processor or tokenizer, to turn ids back into text.
        ids: M token ids of the question.
        find: finds the words; None = the rule in use.
        last: whether of a repeated word only the last occurrence counts; else all do.

    Returns:
        ``[M]`` bool.
    """
    text, starts = probe(processor).speller.spell(ids)
    found = (find or finder())(text)
    words = list(dict(found).values()) if last else [span for _, span in found]
    flags = [
        any(a < stop and start < b and text[max(a, start) : min(b, stop)].strip() for start, stop in words)
        for a, b in zip(starts, starts[1:], strict=False)
    ]
    return torch.tensor(flags, dtype=torch.bool)


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def informative_tokens(call: Call, processor: Any, *, last: bool = False) -> Tensor | None:
    """Informative words of every question of a call.

    Needs the processor and token ids; without one of them all words count, which is said once.

    Args:
        call: the call.
        processor: what was given to ``patch``, or None.
        last: see :func:`content_tokens`.

    Returns:
        ``[B0, M]`` bool over the questions' tokens (padded on the right), or None: all of them count.
    """
    if processor is None or call.input_ids is None:
        _warn_once(
            'query_words="content" needs patch(..., processor=) and token ids; every word of the question counts instead'
        )
        return None
    spans = call.prompt.query
    chosen = torch.zeros(len(spans), max(stop - start for start, stop in spans), dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        flags = content_tokens(processor, call.input_ids[row, start:stop].tolist(), last=last)
        if not flags.any():
            _warn_once("a question has no informative word; all of its words count instead")
            flags = torch.ones_like(flags)
        chosen[row, : stop - start] = flags
    return chosen
