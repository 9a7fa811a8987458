# SPDX-License-Identifier: Apache-2.0
"""What a results folder holds, checked: a record that is not what a run writes is refused by file and line, not scored."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from vlm_attn.evals.reading import parse_json

Check = tuple[str, Callable[[Any], bool]]

_NUMBER: Check = ("a whole number from 0 on", lambda value: type(value) is int and value >= 0)
_TEXT: Check = ("a text", lambda value: isinstance(value, str))
_FLAG: Check = ("true or false", lambda value: isinstance(value, bool))
_TEXTS: Check = ("a list of texts", lambda value: isinstance(value, list) and all(isinstance(v, str) for v in value))
_OBJECT: Check = ("an object", lambda value: isinstance(value, dict))
_ANSWER: Check = ("yes or no", lambda value: value in ("yes", "no"))
_READ: Check = ("yes, no or null", lambda value: value in ("yes", "no", None))

_QUESTION_SCORE: dict[str, Check] = {"prediction": _READ, "correct": _FLAG, "unparsed": _FLAG}
_MENTION: dict[str, Check] = {
    "text": _TEXT, "category": _TEXT, "start": _NUMBER, "end": _NUMBER, "hallucinated": _FLAG,
}  # fmt: skip
_MENTIONS: Check = (
    "a list of objects",
    lambda value: isinstance(value, list) and all(isinstance(v, dict) for v in value),
)

#: Per evaluation: facts of a record, and its score.
FACTS: dict[str, dict[str, Check]] = {
    "pope": {"question": _TEXT, "label": _ANSWER, "splits": _TEXTS},
    "chair": {},
    "amber": {"id": _NUMBER, "kind": _TEXT, "question": _TEXT, "label": _READ},
}
SCORES: dict[str, dict[str, Check]] = {
    "pope": _QUESTION_SCORE,
    "chair": {"length": _NUMBER, "words": _NUMBER, "distinct": _NUMBER, "mentions": _MENTIONS, "truth": _TEXTS},
    "amber": _QUESTION_SCORE,
    "generative": {
        "mentions": _MENTIONS, "truth": _TEXTS, "covered": _NUMBER, "cognitive": _NUMBER, "likely": _NUMBER,
    },
}  # fmt: skip


def read_records(path: str | Path) -> list[dict[str, Any]]:
    """The records of a ``samples.jsonl``, but for a last line that a killed run left unfinished; none where there is no file.

    Raises:
        ValueError: a line that is not a record, and not the unfinished last one.
    """
    file = Path(path)
    content = file.read_bytes() if file.exists() else b""
    *lines, rest = content.split(b"\n")
    records = [_record(line, f"{file}, line {number}") for number, line in enumerate(lines, start=1)]
    with contextlib.suppress(ValueError):  # cut short
        records += [_record(rest, str(file))] if rest.strip(b"\0 ") else []
    return records


def _record(line: bytes, where: str) -> dict[str, Any]:
    try:
        record = parse_json(line.decode("utf-8"), where)
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 (byte {error.start}): the file is damaged") from error
    if not isinstance(record, dict):
        raise ValueError(f"{where}: expected an object, got {type(record).__name__}")
    _check(where, record, {"method": _TEXT, "sample": _NUMBER})
    return record


def check_record(where: str, evaluation: str, record: Mapping[str, Any]) -> None:
    """Refuse a record that a run of this evaluation does not write.

    Args:
        where: file and line, for the message.
        evaluation: ``pope``, ``chair`` or ``amber``.
        record: with ``method`` and ``sample`` (`read_records`).

    Raises:
        ValueError: naming the key, what it should be and what it is.
    """
    _check(where, record, {"image_id": _NUMBER})
    if "skipped" in record:
        return _check(where, record, {"skipped": _TEXT})
    _check(where, record, {"answer": _TEXT, "score": _OBJECT, **FACTS[evaluation]})
    score = record["score"]
    shape = "generative" if evaluation == "amber" and record["kind"] == "generative" else evaluation
    _check(f"{where}: score", score, SCORES[shape])
    for number, mention in enumerate(score.get("mentions", ()), start=1):
        _check(f"{where}: mention {number}", mention, _MENTION)
        if not mention["start"] <= mention["end"] <= len(record["answer"]):
            raise ValueError(f"{where}: mention {number} lies outside the answer")
    if "prediction" in score and score["correct"] != (score["prediction"] == record["label"]):
        raise ValueError(
            f"{where}: 'correct' is {score['correct']}, but {score['prediction']} was read where {record['label']} is right"
        )
    return None


def check_results(file: str | Path, content: Any, top_level: Iterable[str]) -> dict[str, Any]:
    """Refuse a ``results.json`` that `runner.run` does not write.

    Args:
        file: for the message.
        content: what was read.
        top_level: keys that have to be there with any value.

    Raises:
        ValueError: naming the key at fault.
    """
    where = f"{file}: not a results file of vlm-attn eval"
    _check(where, content if isinstance(content, dict) else {}, {"eval": _TEXT, "config": _OBJECT, "counts": _OBJECT})
    for key in top_level:
        if key not in content:
            raise ValueError(f"{where}: needs {key!r}")
    _check(where, content["config"], {"model": _TEXT, "data": _TEXT, "methods": _OBJECT})
    _check(where, content["counts"], {"samples": _NUMBER})
    for label, methods in content["config"]["methods"].items():
        if not isinstance(methods, list) or not all(isinstance(m, dict) and "name" in m for m in methods):
            raise ValueError(f"{where}: config.methods, {label!r}: expected a list of methods with their names")
    speed = content.get("environment", {})
    speed = speed.get("speed", {}) if isinstance(speed, dict) else None
    numbers = isinstance(speed, dict) and all(
        isinstance(row, dict) and all(type(value) in (int, float) for value in row.values()) for row in speed.values()
    )
    if not numbers:
        raise ValueError(f"{where}: environment.speed: expected numbers of every method")
    return content


def _check(where: str, record: Mapping[str, Any], shape: Mapping[str, Check]) -> None:
    for key, (what, holds) in shape.items():
        if key not in record:
            raise ValueError(f"{where}: needs {key!r} ({what})")
        if not holds(record[key]):
            raise ValueError(f"{where}: {key!r} should be {what}, got {str(record[key])[:60]!r}")
