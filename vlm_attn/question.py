# SPDX-License-Identifier: Apache-2.0
"""Where the user's question stands in a prompt: the last user turn's text after its last image, else its text before it."""

from __future__ import annotations

import re
from collections.abc import Sequence

from torch import Tensor

from vlm_attn.chat import ChatTemplate
from vlm_attn.layout import Span
from vlm_attn.spelling import VISUAL, is_special, is_text

WAY_OUT = (
    "Build the prompt with processor.apply_chat_template, or say where the question stands: query_span=(start, stop), columns "
    "of the unpadded prompt"
)

NOT_AS_IT_ENDS = "the prompt does not end as this processor's chat template ends. " + WAY_OUT


class UnknownQuestion(ValueError):
    """The question cannot be told from the prompt."""


def find_questions(
    ids: Tensor | None, visual: Tensor, first: Sequence[int], template: ChatTemplate | None
) -> tuple[list[Span], list[int]]:
    """Columns of the question in every row of a batch.

    Args:
        ids: ``[B, P]`` token ids; None = not known (``inputs_embeds``).
        visual: ``[B, P]`` bool: image tokens.
        first: number of padding columns before each row's prompt.
        template: see :func:`find_question`.

    Returns:
        One absolute span per row, and the number of columns from the answer's opening on.

    Raises:
        UnknownQuestion: names the row.
    """
    query, role = [], []
    for row, pad in enumerate(first):
        flags = visual[row, pad:].tolist()
        try:
            if ids is None:
                (start, stop), tail = find_question([-1] * len(flags), flags, None)
            else:
                (start, stop), tail = find_question(ids[row, pad:].tolist(), flags, template)
        except UnknownQuestion as error:
            raise UnknownQuestion(f"row {row}: {error}") from None
        query.append((start + pad, stop + pad))
        role.append(tail)
    return query, role


def find_question(ids: Sequence[int], visual: Sequence[bool], template: ChatTemplate | None) -> tuple[Span, int]:
    """Columns of the question in one unpadded prompt.

    Args:
        ids: token ids of the unpadded prompt.
        visual: which of them are image tokens.
        template: from :func:`vlm_attn.chat.read_template`; None = the prompt's form is not known, and the question is all
            that follows the last image.

    Returns:
        The half-open span of the question (``start == stop`` if there is none) and the number of tokens from the answer's
        opening on.

    Raises:
        UnknownQuestion: the prompt is not one of the template's, or may be read in two ways.
    """
    if template is None:
        return (max((i for i, flag in enumerate(visual) if flag), default=-1) + 1, len(ids)), 0
    text, starts = template.speller.spell(ids, visual)
    start, stop, end = _Reader(text, template).question()
    inside = [place for place in range(len(ids)) if _belongs(text, starts[place], starts[place + 1], start, stop)]
    first = inside[0] if inside else next((place for place in range(len(ids)) if starts[place] >= start), len(ids))
    span = (first, inside[-1] + 1 if inside else first)
    role = next((place for place in range(len(ids)) if starts[place + 1] > end), len(ids))
    return span, len(ids) - max(role, span[1]) if span[1] and role < span[1] else len(ids) - role


def _belongs(text: str, first: int, last: int, start: int, stop: int) -> bool:
    """Whether a token is the question's. One that stands across its border is, unless only white space of it lies inside."""
    inside = text[max(first, start) : min(last, stop)]
    return bool(inside) and (start <= first and last <= stop or not inside.isspace())


class _Reader:
    """Reads one spelled prompt."""

    def __init__(self, text: str, template: ChatTemplate) -> None:
        self.text, self.template = text, template
        self.image = text.rfind(VISUAL) + 1  # where the last image ends
        self.distinct = any(map(is_special, template.answer))

    def question(self) -> tuple[int, int, int]:
        """Where the question begins and ends, and where the answer's opening begins."""
        if not self.template.written:
            return self._plain()
        start, end = self._last_turn()
        turn = self._segments(start, end)
        asked = [part for part in turn if is_text(self.text[slice(*part)])]
        begin, stop = asked[-1] if asked else turn[-1]
        if self.template.merged and self._unsure(begin, stop, start):
            raise UnknownQuestion(
                "this template puts a system message into the question's turn with only white space between, so it cannot be "
                "told whether the text before it is the system's. " + WAY_OUT
            )
        return begin, stop, end

    def _plain(self) -> tuple[int, int, int]:
        """A prompt of a processor without a chat template: the plain form, or all text after the image."""
        ends = [tail for tail in (*self.template.tails, *self.template.closings) if self.text.endswith(tail)]
        begin = self._after_image(self.image)
        end = len(self.text) - len(max(ends, key=len, default=""))
        return begin, max(begin, end), max(begin, end)

    # Turns

    def _last_turn(self) -> tuple[int, int]:
        """Where the last user turn's content begins and where it ends."""
        tail = next((tail for tail in self.template.tails if self.text.endswith(tail)), None)
        return self._by_marks(tail) if self.distinct else self._by_words(tail)

    def _by_marks(self, tail: str | None) -> tuple[int, int]:
        """Turns that special tokens part: nothing in a text looks like them."""
        start = self._opened(len(self.text))
        answer = self.text.find(self.template.answer, max(start, self.image))
        if answer < 0:
            return start, len(self.text) - len(self._closing())
        begun = self.text[answer + len(self.template.answer) :]
        known = any(self.text[answer:].startswith(part) for part in self.template.tails)
        if tail is not None and answer != len(self.text) - len(tail):
            raise UnknownQuestion("a turn of the prompt is not as this processor's chat template opens one. " + WAY_OUT)
        if tail is None and (not known and not begun or self.template.answer in begun):
            raise UnknownQuestion(NOT_AS_IT_ENDS)
        return start, answer

    def _closing(self) -> str:
        """What the template puts after a question where no answer is asked for."""
        found = next((part for part in self.template.closings if self.text.endswith(part)), None)
        if found is None:
            raise UnknownQuestion(NOT_AS_IT_ENDS)
        return found

    def _opened(self, end: int) -> int:
        """Where the content of the last turn that a user opened before ``end`` begins."""
        parts = (*self.template.headers, *self.template.systems)
        headers = [part for part in parts if any(map(is_special, part)) or is_text(part)]
        found = [at + len(part) for part in headers if (at := self.text.rfind(part, 0, end)) >= 0]
        return max(found) if found else self._begin()

    def _begin(self) -> int:
        """Where the first text begins: after the template's opening."""
        skipped = next((i for i, char in enumerate(self.text) if not is_special(char)), 0)
        for opening in self.template.openings:
            for at in range(skipped + 1):
                if self.text.startswith(opening, at):
                    return at + len(opening)
        if not self.distinct:  # after a system message
            found = [at + len(part) for part in self.template.systems if (at := self.text.find(part)) >= 0]
            if found:
                return min(found)
        raise UnknownQuestion("the prompt does not begin as this processor's chat template begins. " + WAY_OUT)

    def _by_words(self, tail: str | None) -> tuple[int, int]:
        """Turns that only words part, which a text may hold as well."""
        template = self.template
        begin = self._begin()
        first = self._after_image(self.image) if self.image else begin
        limit = len(self.text) - len(tail or "")
        answers = self._places(template.answer, first, limit)
        opened: list[tuple[int, int]] = []
        parts = (*template.headers, *template.systems)
        for at, end in sorted((at, at + len(part)) for part in parts for at in self._places(part, first, limit)):
            if opened and at < opened[-1][1]:  # the same words, found in two forms
                opened[-1] = opened[-1][0], max(end, opened[-1][1])
            else:
                opened.append((at, end))
        start = None if self.image else begin
        for place in reversed(range(len(answers))):
            until = answers[place + 1] if place + 1 < len(answers) else limit
            here = [end for at, end in opened if answers[place] < at and end <= until]
            if len(here) > 1:
                raise UnknownQuestion(
                    "this template parts turns by words alone, and they stand twice after the last answer's opening: one "
                    "of them is quoted, and which one cannot be told. " + WAY_OUT
                )
            if here:
                start, first = here[0], here[0]
                break
        if tail is not None:
            return self._turn_of_image() if start is None else start, limit
        after = [at for at in answers if at >= first] or [len(self.text) - len(self._closing())]
        if len(after) > 1:
            raise UnknownQuestion(NOT_AS_IT_ENDS)
        return self._turn_of_image() if start is None else start, after[0]

    def _turn_of_image(self) -> int:
        """Where the turn begins that the last image stands in."""
        template = self.template
        found = [
            at + len(part)
            for part in (*template.headers, *template.systems)
            if (at := self.text.rfind(part, 0, self.image)) >= 0
        ]
        return max(found) if found else self._begin()

    def _places(self, part: str, first: int, limit: int) -> list[int]:
        if not part:
            return []
        return [
            found.start()
            for found in re.finditer(re.escape(part), self.text)
            if first <= found.start() and found.end() <= limit
        ]

    # Texts of a turn

    def _after_image(self, image: int) -> int:
        """Where text begins after an image that ends at ``image``: what the template and the processor put there is skipped."""
        found = [match.end() for gap in self.template.gaps if (match := re.compile(gap).match(self.text, image))]
        if found:
            return max(found)
        end = image
        while image and end < len(self.text) and is_special(self.text[end]) and self.text[end] != VISUAL:
            end += 1
        return end

    def _segments(self, start: int, stop: int) -> list[tuple[int, int]]:
        """The parts of a turn between its images, without what stands around these."""
        parts, at = [], start
        for run in re.finditer(f"{VISUAL}+", self.text[:stop]):
            if run.end() <= start:
                continue
            parts.append((at, max(at, run.start()), True))
            at = run.end()
        parts.append((at, max(at, stop), False))
        found = []
        for first, last, led in parts:
            begin = min(self._after_image(first), last) if first and self.text[first - 1] == VISUAL else first
            inside = self.text[first:last]
            if led and any(re.fullmatch(pattern, inside) for pattern in self.template.inner):
                continue
            if led:
                leads = [re.search(f"(?:{lead})$", self.text[begin:last]) for lead in self.template.leads]
                last = min((begin + match.start() for match in leads if match), default=last)
                while last > begin and is_special(self.text[last - 1]):
                    last -= 1
            found.append((begin, last))
        return found

    def _unsure(self, begin: int, stop: int, turn: int) -> bool:
        """Whether a system message may stand in front of a question, in the same turn."""
        if begin != turn:  # an image stands between
            return False
        first = not any(self.text.rfind(header, 0, turn) >= 0 for header in self.template.headers)
        if "last" in self.template.merged or (first and "first" in self.template.merged):
            return any(self.text.find(part, begin, stop) > begin for part in self.template.systems)
        return False
