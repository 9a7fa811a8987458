# SPDX-License-Identifier: Apache-2.0
"""Which question an answer of a file is to, and whether the two agree.

A pair is only made where nothing that the record says of itself speaks against it: the first contradiction is an error that
shows both sides.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_attn.evals import pope
from vlm_attn.evals.reading import QUESTION_KEYS, Entry, image_number, read_jsonl

#: LLaVA's one file for several lists: the ids of every further list go on from the next multiple of this.
BLOCK = 10_000_000
OLDER = 2910  # questions of the older random list


@dataclass(frozen=True)
class Asked:
    """A question of an official file: which of the files (from 0) and its name, its place there from 1, and its id."""

    question: pope.Question
    list: int
    file: str
    number: int
    id: Any


def questions_of(files: Sequence[str | Path]) -> list[Asked]:
    """The questions of official files, in their order.

    Raises:
        FileNotFoundError, ValueError: see `pope.read_questions`.
    """
    return [
        Asked(question, place, Path(file).name, number, _id(record.get("question_id", number)))
        for place, file in enumerate(files)
        for number, (question, record) in enumerate(
            zip(pope.read_questions(file), read_jsonl(file), strict=True), start=1
        )
    ]


def match(path: str | Path, entries: Sequence[Entry], asked: Sequence[Asked]) -> dict[int, Entry]:
    """The answers by the place of their question in ``asked``.

    Raises:
        ValueError: an answer that does not fit its question, two answers to one, or no way to tell which belongs to which.
    """
    first = entries[0]
    if first.image is not None and said_question(first.record) is not None:
        given = _by_content(path, entries, asked)
    elif "question_id" in first.record:
        given = _by_id(path, entries, asked)
    elif len(entries) != len(asked):
        raise ValueError(
            f"{path}: {len(entries)} answers without question_id or image and question, "
            f"but {len(asked)} questions: cannot tell which belongs to which"
        )
    else:
        given = dict(enumerate(entries))
    for place, entry in given.items():
        if wrong := contradiction(entry, asked[place]):
            raise ValueError(f"{path}, record {entry.number}: {wrong}. Answers to another list, or in another order?")
    return given


def said_question(record: Mapping[str, Any]) -> str | None:
    """The question that a record of an answer holds, None where it holds none."""
    for key in QUESTION_KEYS:
        if isinstance(record.get(key), str):
            return record[key]
    # With an answer under another name "text" is the question, as in the official files.
    answered = any(key in record for key in ("answer", "response", "caption"))
    return record["text"] if answered and isinstance(record.get("text"), str) else None


def plain(text: str) -> str:
    """A question for comparing: lower case, single spaces, and without the slip of one widespread copy."""
    return " ".join(text.lower().replace("imange", "image").split())


def contradiction(entry: Entry, asked: Asked) -> str:
    """What speaks against an answer being to a question, in words that show both; "" for nothing."""
    question, said = asked.question, said_question(entry.record)
    label = str(entry.record.get("label", question.label)).strip().lower()
    image = entry.image is None or entry.image == question.image_id
    if image and (said is None or _same(question.text, said)) and label in (question.label, ""):
        return ""
    own = [f"image {entry.image}"] * (entry.image is not None) + [repr(said)] * (said is not None)
    own += [f"label {label}"] * ("label" in entry.record)
    return (
        f"it says {', '.join(own)}, but the question it is matched with ({asked.file}, record {asked.number}, id {asked.id}) "
        f"is image {question.image_id}, {question.text!r}, label {question.label}"
    )


def _same(question: str, said: str) -> bool:
    """Whether a prompt asks a question: for the same object where both name one, else with the question's words in it."""
    objects = [pope.asked_object(text) for text in (question, said)]
    if objects[0] != question and objects[1] != said:
        return objects[0] == objects[1]
    if objects[0] != question:  # "Does the image show a dog?"
        return f" {objects[0]} " in f" {' '.join(''.join(c if c.isalnum() else ' ' for c in said.lower()).split())} "
    return plain(question) in plain(said)


def _by_content(path: str | Path, entries: Sequence[Entry], asked: Sequence[Asked]) -> dict[int, Entry]:
    """By image and question. A question of several lists is answered in all of them, by each list's own answer where told."""
    places: dict[int, list[int]] = {}
    for place, one in enumerate(asked):
        places.setdefault(one.question.image_id, []).append(place)
    splits = {one.question.split for one in asked}
    given: dict[int, Entry] = {}
    for entry in entries:
        said = said_question(entry.record)
        if entry.image is None or said is None:
            raise ValueError(f"{path}, record {entry.number}: needs the same keys as the first record")
        own = entry.record.get("category", entry.record.get("split"))
        for place in places.get(entry.image, ()):
            one = asked[place]
            if not _same(one.question.text, said) or (own in splits and own != one.question.split):
                continue
            other = given.setdefault(place, entry)
            if other.text != entry.text:
                raise ValueError(
                    f"{path}, record {entry.number}: a second answer to image {entry.image}, {said!r}: {entry.text!r}, and "
                    f"{other.text!r} in record {other.number}. Score the lists one by one"
                )
    return given


def _by_id(path: str | Path, entries: Sequence[Entry], asked: Sequence[Asked]) -> dict[int, Entry]:
    by_id: dict[Any, Entry] = {}
    for entry in entries:
        if "question_id" not in entry.record:
            raise ValueError(f"{path}, record {entry.number}: needs 'question_id', as the first record has")
        key = _id(entry.record["question_id"])
        if key in by_id:
            raise ValueError(f"{path}, record {entry.number}: a second answer to question_id {key}")
        by_id[key] = entry
    lists: dict[int, dict[int, Any]] = {}
    for place, one in enumerate(asked):
        lists.setdefault(one.list, {})[place] = one.id
    blocks = sorted({key // BLOCK for key in by_id if isinstance(key, int)})
    if len(lists) > 1 and len(blocks) < 2:
        raise ValueError(f"{path}: question_id is ambiguous over {len(lists)} question files; score one by one")
    given: dict[int, Entry] = {}
    for ids in lists.values():
        if blocks in ([0], []):
            _check_ids(path, by_id, list(ids.values()))
            given |= {place: by_id[key] for place, key in ids.items() if key in by_id}
        else:
            given |= _block_of(path, by_id, blocks, ids, asked)
    return given


def _block_of(
    path: str | Path, by_id: Mapping[Any, Entry], blocks: Sequence[int], ids: Mapping[int, Any], asked: Sequence[Asked]
) -> dict[int, Entry]:
    """The part of a file for several lists whose answers all fit one list."""
    wrong = ""
    for block in blocks:
        pairs = {
            place: by_id[key + block * BLOCK]
            for place, key in ids.items()
            if isinstance(key, int) and key + block * BLOCK in by_id
        }
        against = next((text for place, entry in pairs.items() if (text := contradiction(entry, asked[place]))), "")
        telling = any(said_question(entry.record) is not None or entry.image is not None for entry in pairs.values())
        if pairs and telling and not against:
            return pairs
        wrong = wrong or against
    raise ValueError(
        f"{path}: question_id goes on in blocks of {BLOCK}, one for each of several lists, but "
        + (
            f"none of them is of {asked[next(iter(ids))].file}: {wrong}"
            if wrong
            else "the records hold no question to tell which list is which: add it, or score the lists one by one"
        )
    )


def _check_ids(path: str | Path, by_id: Mapping[Any, Entry], ids: Sequence[Any]) -> None:
    """Refuse ids that are plainly those of another list."""
    if not all(isinstance(key, int) for key in (*by_id, *ids)):
        return
    low, high, start, end = min(by_id), max(by_id), min(ids), max(ids)
    if low != start and high - low == end - start and len(by_id) == len(ids):
        raise ValueError(
            f"{path}: question_id goes from {low} to {high}, that of the questions from {start} to {end}: "
            "the answers are numbered otherwise, and would be taken for those of their neighbours"
        )
    if len(by_id) == OLDER == high - low + 1 < len(ids):
        raise ValueError(
            f"{path}: {OLDER} answers, as many as the older random list has questions, but {len(ids)} questions: "
            "give the list that was answered with --questions"
        )


def _id(value: Any) -> Any:
    """A question's id: a number also where it is written as text."""
    number = image_number(value) if isinstance(value, int) or str(value).strip().isdecimal() else None
    return str(value) if number is None else number
