"""Where the user's question stands in a prompt, read off the processor's chat template.

transformers offers nothing for this. Rendering the template with two different questions shows which tokens belong to
the template: what the two renderings share at the end is the tail (` ASSISTANT:`), what stands between the image and
the question is the gap, and what stands between two turns is the header of a later turn.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlm_attn.layout import Span

if TYPE_CHECKING:
    from vlm_attn.call import Call

# Different first and last characters, so that no tokenizer merges a shared piece into the template.
_PROBES = ("cat", "7 dogs?")


@dataclass(frozen=True)
class ChatTemplate:
    """Token ids of the template around a question.

    Attributes:
        gap: ids between the last image token and the question.
        tail: ids behind the question, up to the answer.
        header: ids that open a later user turn without an image.
    """

    gap: tuple[int, ...]
    tail: tuple[int, ...]
    header: tuple[int, ...]


def tokenizer_of(processor: Any) -> Any:
    """The tokenizer inside a processor; a bare tokenizer is returned as it is."""
    return getattr(processor, "tokenizer", processor)


def _shared(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _render(processor: Any, turns: Sequence[str]) -> str | None:
    """The template's text for an image and alternating user and assistant turns; None if it cannot be rendered."""
    plain = [{"role": "user" if i % 2 == 0 else "assistant", "content": text} for i, text in enumerate(turns)]
    parts: list[dict[str, Any]] = [
        {"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in plain
    ]
    parts[0]["content"].insert(0, {"type": "image"})
    try:
        return processor.apply_chat_template(parts, add_generation_prompt=True, tokenize=False)
    except Exception:  # templates are foreign programs: any failure means "this template cannot tell"
        return None


def read_template(processor: Any, image_token_ids: Sequence[int]) -> ChatTemplate | None:
    """Read a processor's chat template.

    Args:
        processor: a Hugging Face processor with a chat template.
        image_token_ids: ids that stand for image tokens.

    Returns:
        The template's parts, or None if the processor has no usable template.
    """
    if not getattr(processor, "chat_template", None):
        return None
    rendered = [_render(processor, (text,)) for text in _PROBES]
    if any(text is None for text in rendered):
        return None
    tokenizer = tokenizer_of(processor)

    def encode(text: str) -> list[int]:
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    first, second = (encode(text) for text in rendered if text is not None)
    tail = _shared(first[::-1], second[::-1])
    head = first[: _shared(first, second)]
    image = max((i for i, token in enumerate(head) if token in image_token_ids), default=None)
    gap = tuple(head[image + 1 :]) if image is not None else ()

    header: tuple[int, ...] = ()
    later = [_render(processor, ("red", "blue", text)) for text in _PROBES]
    if all(text is not None for text in later):
        a, b = (encode(text) for text in later if text is not None)
        shared = a[: _shared(a, b)]
        answer = encode("blue")[-1]
        where = max((i for i, token in enumerate(shared) if token == answer), default=None)
        if where is None:  # the answer's last piece may differ in context: keep what both turns' openings share
            where = len(shared) - 1 - _shared(shared[::-1], head[::-1])
        header = tuple(shared[where + 1 :])
    return ChatTemplate(gap=gap, tail=tuple(first[len(first) - tail :]) if tail else (), header=header)


def find_question(ids: Sequence[int], visual: Sequence[bool], template: ChatTemplate | None) -> tuple[Span, int]:
    """Columns of the question in one unpadded prompt.

    With a template whose tail ends the prompt, the question is the text of the last user turn that follows its image;
    without one it is everything after the last image.

    Args:
        ids: token ids of the unpadded prompt.
        visual: which of them are image tokens.
        template: from :func:`read_template`, or None.

    Returns:
        The half-open span of the question (``start == stop`` when nothing follows the image) and the length of the
        tail.
    """
    ids = list(ids)
    last_image = max((i for i, flag in enumerate(visual) if flag), default=-1)
    start, stop, tail = last_image + 1, len(ids), 0
    if template is not None and template.tail and tuple(ids[-len(template.tail) :]) == template.tail:
        tail = len(template.tail)
        stop -= tail
    if template is not None and last_image >= 0:
        gap = template.gap
        while gap and tuple(ids[start : start + len(gap)]) != gap:
            gap = gap[:-1]  # processors wrap images in markers of their own: keep the part that matches
        start += len(gap)
        header = template.header
        if header:
            later = [i for i in range(start, stop - len(header) + 1) if tuple(ids[i : i + len(header)]) == header]
            if later:
                start = later[-1] + len(header)
    return (start, max(start, stop)), min(tail, len(ids) - start)


def content_tokens(processor: Any, ids: Tensor, tagger: Any, *, last: bool = False) -> Tensor:
    """Which tokens of a question belong to an informative word (noun, name, verb, adjective, adverb, number).

    Args:
        processor: processor or tokenizer, to turn ids back into text.
        ids: ``[M]`` token ids of the question.
        tagger: a spaCy pipeline.
        last: whether of a repeated word only the last occurrence counts; else all do.

    Returns:
        ``[M]`` bool.
    """
    tokenizer = tokenizer_of(processor)
    ends = [len(tokenizer.decode(ids[:i].tolist())) for i in range(len(ids) + 1)]
    text = tokenizer.decode(ids.tolist())
    informative = {"NOUN", "PROPN", "VERB", "ADJ", "ADV", "NUM"}
    found = [(w.text, (w.idx, w.idx + len(w.text))) for w in tagger(text) if w.pos_ in informative]
    words = list(dict(found).values()) if last else [span for _, span in found]
    flags = [
        any(a < stop and start < b and text[max(a, start) : min(b, stop)].strip() for start, stop in words)
        for a, b in zip(ends, ends[1:], strict=False)
    ]
    return torch.tensor(flags, dtype=torch.bool)


@functools.cache
def _tagger() -> Any | None:
    """spaCy's small English pipeline, or None where it is not installed."""
    try:
        import spacy

        return spacy.load("en_core_web_sm", disable=["parser", "ner", "lemmatizer"])
    except (ImportError, OSError):
        return None


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, UserWarning, stacklevel=3)


def informative_tokens(call: Call, processor: Any, *, last: bool = False) -> Tensor | None:
    """Informative words of every question of a call.

    Needs spaCy with ``en_core_web_sm``, the processor and token ids; without one of them all words count, which is
    said once.

    Args:
        call: the call.
        processor: what was given to ``patch``, or None.
        last: see :func:`content_tokens`.

    Returns:
        ``[B0, M]`` bool over the questions' tokens (padded on the right), or None: all of them count.
    """
    tagger = _tagger()
    if tagger is None or processor is None or call.input_ids is None:
        lacks = "spaCy with en_core_web_sm" if tagger is None else "patch(..., processor=) and token ids"
        _warn_once(f'query_words="content" needs {lacks}; every word of the question counts instead')
        return None
    spans = call.prompt.query
    chosen = torch.zeros(len(spans), max(stop - start for start, stop in spans), dtype=torch.bool)
    for row, (start, stop) in enumerate(spans):
        flags = content_tokens(processor, call.input_ids[row, start:stop], tagger, last=last)
        if not flags.any():
            _warn_once("a question has no informative word; all of its words count instead")
            flags = torch.ones_like(flags)
        chosen[row, : stop - start] = flags
    return chosen
