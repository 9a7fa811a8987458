# SPDX-License-Identifier: Apache-2.0
"""What a processor writes around a user's text, learned by asking it: it reads short conversations with known texts.

transformers tells neither where the question stands nor which tokens an image becomes. Two conversations that differ in one
text show what stands before and after that text; a blank image shows what the processor puts around it.
"""

from __future__ import annotations

import os
import re
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

from PIL import Image

from vlm_attn.spelling import VISUAL, Speller, is_special, is_text

#: The prompt of LLaVA-1.5, for processors that have no chat template.
PLAIN_TEMPLATE = "USER: {image}\n{text} ASSISTANT:"

# Pairs without a common first or last character.
QUESTIONS, FIRST, ANSWERS, SYSTEM = ("cat", "7 dogs?"), ("red", "two 5"), ("blue", "is it 3."), ("big", "a 7 cup?")
_SIDE = 64  # of the blank image, in pixels

Message = Mapping[str, Any]


@dataclass(frozen=True)
class ChatTemplate:
    """What stands around texts and images, as :class:`~vlm_attn.spelling.Speller` spells it.

    Attributes:
        speller: spells token ids.
        written: whether the processor has a chat template; else only the plain form is known.
        openings: what may stand before a prompt's first text.
        headers: what may stand between an answer and the next question.
        systems: what may stand between a system message and the question.
        merged: whether only white space does, in the ``"first"`` user turn or the ``"last"``.
        tails: what stands between the question and the answer that is to come, one for every switch of the template.
        closings: what stands after the question where no answer is asked for.
        answer: what all of these begin with, and what stands before an earlier or a begun answer.
        gaps: patterns of what stands between an image and the text after it.
        leads: patterns of what stands between a text and the image after it.
        inner: patterns of what stands between parts of one image or video.
    """

    speller: Speller
    written: bool = True
    openings: tuple[str, ...] = ()
    headers: tuple[str, ...] = ()
    systems: tuple[str, ...] = ()
    merged: frozenset[str] = frozenset()
    tails: tuple[str, ...] = ()
    closings: tuple[str, ...] = ()
    answer: str = ""
    gaps: tuple[str, ...] = ()
    leads: tuple[str, ...] = ()
    inner: tuple[str, ...] = ()


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a bare tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def has_template(processor: Any) -> bool:
    """Whether a processor has a chat template."""
    return bool(getattr(processor, "chat_template", None))


def switches(processor: Any) -> tuple[str, ...]:
    """Names in the chat template that may be switches of thinking. A name that is none changes nothing."""
    return tuple(sorted(set(re.findall(r"\b(?!strip)\w*thinking\w*", str(processor.chat_template)))))


_cache: weakref.WeakKeyDictionary[Any, tuple[Any, _Probe]] = weakref.WeakKeyDictionary()


def probe(processor: Any) -> _Probe:
    """What is learned of a processor, once for as long as its template stays the same."""
    key = (str(getattr(processor, "chat_template", None)), len(tokenizer_of(processor)))
    try:
        found = _cache.get(processor)
    except TypeError:  # cannot be hashed
        return _Probe(processor)
    if found is None or found[0] != key:
        found = _cache[processor] = (key, _Probe(processor))
    return found[1]


def read_template(processor: Any) -> ChatTemplate | None:
    """What a processor writes around texts and images.

    Args:
        processor: a processor of transformers.

    Returns:
        None if its template cannot be rendered.
    """
    return probe(processor).template


def visual_ids(processor: Any) -> tuple[int, ...]:
    """Ids of the tokens that an image or a video becomes.

    Args:
        processor: a processor of transformers.

    Raises:
        ValueError: it names no image token.
    """
    found = probe(processor).visual
    if not found:
        raise ValueError(
            f"{type(processor).__name__} names no image token: the processor of a vision-language model is needed"
        )
    return found


class _Probe:
    """Asks one processor."""

    def __init__(self, processor: Any) -> None:
        with _quiet():
            self._ask(processor)

    def _ask(self, processor: Any) -> None:
        self.processor, self.tokenizer = processor, tokenizer_of(processor)
        self.media = list(self._media()) if self.tokenizer is not processor else []
        self.named = self._named()
        self.visual = self._visual()
        self.speller = Speller(self.tokenizer, self.visual)
        self.template = self._written() if has_template(processor) else self._plain()

    # Images

    def _media(self) -> Iterator[tuple[str, list[int]]]:
        """Ids of prompts with a blank image or video before the text, and after it."""
        image = Image.new("RGB", (_SIDE, _SIDE))
        for place in ("before", "after"):
            if (ids := self._with({"type": "image", "image": image}, place, images=[[image]])) is not None:
                yield place, ids
        if getattr(self.processor, "video_processor", None) is not None and has_template(self.processor):
            frames = [image] * 4
            told = {
                "video_metadata": [{"fps": 2.0, "total_num_frames": 4, "duration": 2.0, "frames_indices": [0, 1, 2, 3]}]
            }
            for place in ("before", "after"):
                part = {"type": "video"}
                if (ids := self._with(part, place, videos=[frames], do_sample_frames=False, **told)) is not None:
                    yield place, ids

    def _with(self, part: dict[str, Any], place: str, **media: Any) -> list[int] | None:
        text = {"type": "text", "text": QUESTIONS[0]}
        content = [part, text] if place == "before" else [text, part]
        if has_template(self.processor):
            prompt = self._render([{"role": "user", "content": content}])
        else:
            prompt = getattr(self.processor, "image_token", "<image>") + QUESTIONS[0] if place == "before" else None
        if prompt is None:
            return None
        try:
            return [int(i) for i in self.processor(text=[prompt], **media)["input_ids"][0]]
        except (
            Exception
        ):  # processors are foreign programs, and some take no such image: what is not shown is not known
            return None

    def _named(self) -> list[int]:
        """Ids that processor and tokenizer name in connection with images: the placeholder in a text, or what it becomes."""
        named: list[int] = []
        for owner in (self.processor, self.tokenizer):
            for name in ("image_token_id", "image_token_ids", "video_token_id", "video_token_ids", "image_patch_id"):
                with suppress(AttributeError, TypeError):
                    value = getattr(owner, name)
                    named += [i for i in (value if isinstance(value, Sequence) else [value]) if isinstance(i, int)]
        if self.tokenizer is not self.processor and isinstance(
            token := getattr(self.processor, "image_token", None), str
        ):
            named.append(self.tokenizer.convert_tokens_to_ids(token))
        return named

    def _visual(self) -> tuple[int, ...]:
        """Of these ids, or else of all special ones, those that a blank image and a blank video become."""
        named = self.named
        special = {*self.tokenizer.all_special_ids, *getattr(self.tokenizer, "added_tokens_decoder", {}), *named}
        found = []
        for _, ids in self.media:
            counts = Counter(i for i in ids if i in special)
            most = max(counts.values(), default=0)
            token = next((i for i in named if counts[i] == most), next((i for i in counts if counts[i] == most), None))
            if token is not None and most > 1:
                found.append(token)
        if not found:  # it could not be asked
            found = named[:1]
        video = getattr(self.processor, "video_token_id", None)
        found += (
            [video] if found and isinstance(video, int) else []
        )  # a model may have a video's token and no processor for it
        return tuple(dict.fromkeys(found))

    # Text

    def _render(self, messages: Sequence[Message], **options: Any) -> str | None:
        options.setdefault("add_generation_prompt", not options.get("continue_final_message", False))
        try:
            return self.processor.apply_chat_template(list(messages), tokenize=False, **options)
        except Exception:  # templates are foreign programs: any failure means "this template cannot tell"
            return None

    def _spell(self, text: str | None) -> str | None:
        if text is None:
            return None
        return self.speller.spell(self.tokenizer(text, add_special_tokens=False)["input_ids"])[0]

    def _around(
        self, turns: Callable[[str, str], str | None], before: Sequence[str], texts: Sequence[str]
    ) -> str | None:
        """What stands before a text, up to the earlier text: both are varied."""
        parts = []
        for earlier in before:
            a, b = (turns(earlier, text) for text in texts)
            if a is None or b is None or a == b:  # a template that does not show this form of content
                return None
            parts.append(_prefix(a, b))
        return _suffix(*parts)

    def _written(self) -> ChatTemplate | None:
        """What the chat template writes; None where it cannot be rendered."""
        found: dict[str, list[str]] = {
            name: [] for name in ("openings", "headers", "systems", "tails", "closings", "answers")
        }
        merged = set()
        thinking = [{name: on} for name in switches(self.processor) for on in (True, False)]

        def note(name: str, part: str | None) -> None:
            if part and part not in found[name]:
                found[name].append(part)

        for style in (_parts, _string):

            def shown(*turns: tuple[str, str], style: Callable[[str], Any] = style, **options: Any) -> str | None:
                messages = [{"role": role, "content": style(text)} for role, text in turns]
                if options.pop("image", False):
                    messages[-1]["content"] = [{"type": "image"}, *_parts(turns[-1][1])]
                return self._spell(self._render(messages, **options))

            def u(text: str) -> tuple[str, str]:
                return "user", text

            def a(text: str) -> tuple[str, str]:
                return "assistant", text

            def s(text: str) -> tuple[str, str]:
                return "system", text

            if style is _parts:  # some templates write something else before an image
                both = ("", "image")
                note("openings", _prefix(*(shown(u(QUESTIONS[0]), image=bool(i)) or "" for i in both)))
                note(
                    "headers",
                    self._around(lambda t, i: shown(u(FIRST[0]), a(t), u(QUESTIONS[0]), image=bool(i)), ANSWERS, both),
                )
                note("systems", self._around(lambda t, i: shown(s(t), u(QUESTIONS[0]), image=bool(i)), SYSTEM, both))
            spoken: tuple[dict[str, Any], ...] = ({}, *thinking)
            for options in spoken:
                first, second = (shown(u(text), **options) for text in QUESTIONS)
                if first is not None and second is not None and first != second:
                    note("openings", _prefix(first, second))
                    note("tails", _suffix(first, second))
            first, second = (shown(u(text), add_generation_prompt=False) for text in QUESTIONS)
            if first is not None and second is not None and first != second:
                found["closings"].append(_suffix(first, second))
            header = self._around(lambda answer, q: shown(u(FIRST[0]), a(answer), u(q)), ANSWERS, QUESTIONS)
            note("headers", header)
            note("answers", self._around(lambda q, answer: shown(u(q), a(answer), u(QUESTIONS[0])), FIRST, ANSWERS))
            begun = self._around(
                lambda q, answer: shown(u(q), a(answer), continue_final_message=True),
                FIRST,
                ANSWERS,
            )
            note("answers", begun)
            system = self._around(lambda text, q: shown(s(text), u(q)), SYSTEM, QUESTIONS)
            note("systems", system)
            if system and not is_text(system) and not any(map(is_special, system)):
                merged.add("first")
            if header:  # some templates put the system message into the last turn
                moved = self._around(
                    lambda text, q: shown(s(text), u(FIRST[0]), a(ANSWERS[0]), u(q)),
                    SYSTEM,
                    QUESTIONS,
                )
                if moved is not None and not moved.endswith(header):
                    merged.add("last")
        tails = found["tails"]
        if not tails:
            return None
        answer = os.path.commonprefix([*tails, *found["answers"]])
        gaps, leads, inner = self._images(found["openings"], tails)
        return ChatTemplate(
            self.speller,
            openings=_longest_first(found["openings"]),
            headers=_longest_first(found["headers"]),
            systems=_longest_first(found["systems"]),
            merged=frozenset(merged),
            tails=_longest_first(tails),
            closings=_longest_first(found["closings"]),
            answer=answer,
            gaps=gaps,
            leads=leads,
            inner=inner,
        )

    def _plain(self) -> ChatTemplate:
        """What a processor without a chat template puts around an image and a text."""
        before = next((ids for place, ids in self.media if place == "before"), None)
        if before is None:
            return ChatTemplate(self.speller, written=False)
        text = self._shown(before)
        tail = text[text.rindex(VISUAL) + 1 :]
        asked = self._spell(QUESTIONS[0]) or ""
        gap, _, closing = tail.rpartition(asked.strip())
        begun = self._spell("a") or ""  # some tokenizers put a space before the first character
        opening, plain = (
            (self._spell("a" + part) or "")[len(begun) :]
            for part in (
                PLAIN_TEMPLATE.partition("{text}")[0].partition("{image}")[2],
                PLAIN_TEMPLATE.partition("{text}")[2],
            )
        )
        gaps = (re.escape(gap) + re.escape(opening), re.escape(gap))
        return ChatTemplate(
            self.speller, written=False, tails=(plain + closing,), closings=(closing,) if closing else (), gaps=gaps
        )

    def _shown(self, ids: Sequence[int]) -> str:
        return self.speller.spell(ids, [i in self.visual for i in ids])[0]

    def _images(
        self, openings: Sequence[str], tails: Sequence[str]
    ) -> tuple[tuple[str, ...], tuple[str, ...], tuple[str, ...]]:
        """Patterns of what stands after an image, before one, and inside it. Numbers in them stand for any number."""
        gaps, leads, inner = [], [], []
        asked = self._spell(self._render([{"role": "user", "content": _parts(QUESTIONS[0])}])) or ""
        other = self._spell(self._render([{"role": "user", "content": _parts(QUESTIONS[1])}])) or ""
        opening, tail = _prefix(asked, other), _suffix(asked, other)
        question = asked[len(opening) : len(asked) - len(tail)]
        for place, ids in self.media:
            text = self._shown(ids)
            if VISUAL not in text:
                continue
            first, last = text.index(VISUAL), text.rindex(VISUAL) + 1
            inner += [part for part in re.findall(f"(?<={VISUAL})[^{VISUAL}]+(?={VISUAL})", text) if is_text(part)]
            after, before = text[last:], text[:first]
            if question in after and after.endswith(question + tail):  # also where the template puts images first
                gaps.append(after[: len(after) - len(question + tail)])
            elif question in before and place == "after":
                leads.append(before[before.rindex(question) + len(question) :])
                if after.endswith(tail):
                    gaps.append(after[: len(after) - len(tail)])
        return _patterns(gaps), _patterns(leads), _patterns(inner)


def _parts(text: str) -> list[dict[str, str]]:
    return [{"type": "text", "text": text}]


def _string(text: str) -> str:
    return text


def _prefix(a: str, b: str) -> str:
    return os.path.commonprefix([a, b])


def _suffix(a: str, b: str) -> str:
    return os.path.commonprefix([a[::-1], b[::-1]])[::-1]


def _longest_first(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(sorted(dict.fromkeys(parts), key=len, reverse=True))


def _patterns(parts: Sequence[str]) -> tuple[str, ...]:
    return tuple(re.sub(r"\d+", r"\\d+", re.escape(part)) for part in _longest_first(parts))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what processors say about prompts that are only tried."""
    from transformers.utils import logging  # heavy, and not needed by who only reads answers

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(before)
