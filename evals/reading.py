# SPDX-License-Identifier: Apache-2.0
"""Read files that people and other programs wrote: captions, answers and lists of image ids.

One reader for all of them. It takes JSON lines, a JSON array, a JSON map from id to text, CSV and TSV, with or without a
byte-order mark, and the ``samples.jsonl`` of this package. An image is named by its number, as a number, as text, or as the
name of a COCO file. What cannot be understood is refused with the file and the record.
"""

from __future__ import annotations

import contextlib
import csv
import io
import json
import numbers
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

#: Names under which files keep the image, the text of an answer, and the question; the first that a record has counts.
IMAGE_KEYS = ("image_id", "image", "file_name", "id")
ANSWER_KEYS = ("caption", "answer", "response", "text")
QUESTION_KEYS = ("question", "prompt", "query")
#: What tokenizers put around an answer when special tokens are not skipped.
SPECIAL = re.compile(
    r"</?s>|<pad>|<[be]os>|<unk>|<\|[\w ]{1,40}\|>|<(?:start|end)_of_(?:turn|text|utterance|sentence)>|<end_of_utterance>"
)


def read_text(path: str | Path) -> str:
    """A file's text, without a byte-order mark.

    Raises:
        FileNotFoundError, ValueError: naming the file (missing, a folder, or not UTF-8: with the line).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path}: no such file")
    content = path.read_bytes()
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        hint = " (it looks like UTF-16: save it as UTF-8)" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else ""
        raise ValueError(f"{path}: not a UTF-8 text file (line {line}, byte {error.start}){hint}") from error


def parse_json(text: str, where: str, **options: Any) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, or nested deeper than can be read; ``where`` names the place.
    """
    try:
        return json.loads(text, **options)
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}: " if "\n" in text.strip() else ""
        raise ValueError(f"{where}: not valid JSON ({place}{error.msg})") from error
    except RecursionError as error:
        raise ValueError(f"{where}: nested too deeply to be read") from error


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError, ValueError: naming the file (missing, not UTF-8, or not JSON: with the line).
    """
    return parse_json(read_text(path), str(path))


def read_jsonl(path: str | Path) -> list[dict[str, Any]]:
    """Read records from JSON lines, or from a file that holds one JSON array of records.

    Raises:
        FileNotFoundError, ValueError: naming the file and the line.
    """
    text = read_text(path)
    if text.lstrip().startswith("["):
        values = parse_json(text, str(path))
    else:
        # Not splitlines(): a line separator inside a string is no end of line in JSON.
        lines = enumerate(text.split("\n"), start=1)
        values = [parse_json(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    for number, record in enumerate(values, start=1):
        if not isinstance(record, dict):
            raise ValueError(f"{path}, record {number}: expected an object, got {type(record).__name__}")
    return values


def whole_text(text: str) -> str:
    """The text with halves of characters (lone surrogates, such as half an emoji) replaced: they cannot be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def bare_answer(text: str) -> str:
    """An answer without what is not of it: outer white space, special tokens, halves of characters."""
    return SPECIAL.sub("", whole_text(text)).strip()


def image_number(name: Any) -> int | None:
    """The number of an image: 310196, "310196", 310196.0, ``COCO_val2014_000000310196.jpg``; None where there is none."""
    if isinstance(name, bool):
        return None
    if isinstance(name, float):  # a column of numbers that has a gap, as pandas writes it
        name = int(name) if name.is_integer() else None
    if isinstance(name, numbers.Integral):
        return int(name) if int(name) >= 0 else None
    text = name.strip() if isinstance(name, str) else ""
    found = re.search(r"(?<![\d.])(\d{1,18})(?:\.0+|\.[A-Za-z]\w*)?$", text)
    return int(found[1]) if found and text[: found.start(1)] != "-" else None


@dataclass(frozen=True)
class Entry:
    """One answer or caption.

    Attributes:
        number: place in the file, from 1.
        text: the answer.
        image: its image, None where the record names none.
        record: the record as it was.
    """

    number: int
    text: str
    image: int | None
    record: Mapping[str, Any]


def read_entries(
    path: str | Path,
    *,
    text_key: str | None = None,
    image_key: str | None = None,
    option: str = "--caption-key",
    method: str | None = None,
    names: Mapping[str, int] | None = None,
    needs_image: bool = True,
) -> tuple[list[Entry], int]:
    """Read captions or answers.

    Args:
        path: JSON lines, a JSON array, a JSON map id -> text, CSV or TSV with a header, or a ``samples.jsonl``.
        text_key: key of the text; default: the one of `ANSWER_KEYS` that the first record has.
        image_key: key of the image; default: the first of `IMAGE_KEYS` that the first record has.
        option: what the command line calls ``text_key``.
        method: whose answers to take of a ``samples.jsonl`` with several methods.
        names: file name -> image id of a dataset whose names do not end in the image's number.
        needs_image: whether every record has to name its image.

    Returns:
        the entries, and how many records of a ``samples.jsonl`` were skipped in the run and have no answer.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record at fault.
    """
    records = list(_records(path))
    if not records:
        raise ValueError(f"{path}: holds no {'captions' if needs_image else 'answers'}")
    records, skipped = _of_method(path, records, method)
    first = records[0]
    text_key = _text_key(path, *first, text_key, option)
    image_key = _image_key(path, *first, image_key, needs_image)
    entries = []
    for number, record in records:
        where = f"{path}, record {number}"
        if not isinstance(record.get(text_key), str):
            raise ValueError(f"{where}: needs {text_key!r} (a text), got {_shown(record, text_key)}")
        image = None
        if image_key is not None:
            image = image_of(record.get(image_key), names)
            if image is None:
                raise ValueError(
                    f"{where}: needs {image_key!r} (an image's number, or a file name that ends in it), "
                    f"got {_shown(record, image_key)}"
                )
            _agree(where, record, image_key, image, names)
        entries.append(Entry(number, bare_answer(record[text_key]), image, record))
    return entries, skipped


def image_of(value: Any, names: Mapping[str, int] | None) -> int | None:
    """The id of an image by its file name in a dataset, else by its number."""
    known = (names or {}).get(re.split(r"[/\\]", value)[-1]) if isinstance(value, str) else None
    return image_number(value) if known is None else known


def read_ids(path: str | Path, names: Mapping[str, int] | None = None) -> list[int]:
    """Image ids: one per line or with commas, a JSON list, or any file that `read_entries` reads the images of.

    Args:
        path: the file.
        names: see `read_entries`.

    Raises:
        FileNotFoundError, ValueError: naming the file; an entry that names no image, an id that a plain list has twice.
    """
    text = read_text(path)
    structured = Path(path).suffix.lower() in (".csv", ".tsv") or text.lstrip().startswith(("{", "["))
    values: list[tuple[str, Any]]
    if structured and (records := _listed(path, text)) is not None:
        key = (_image_key(path, *records[0], None, True) if records else None) or ""
        values = [(f"record {number}", record.get(key)) for number, record in records]
        repeats = True
    else:
        plain = parse_json(text, str(path)) if text.lstrip().startswith("[") else None
        words = plain if plain is not None else [word.strip("\"'") for word in re.split(r"[\s,;]+", text) if word]
        values = [(f"entry {number}", word) for number, word in enumerate(words, start=1)]
        repeats = False
    ids: dict[int, str] = {}
    for where, value in values:
        image = image_of(value, names)
        if image is None:
            raise ValueError(f"{path}, {where}: expected image ids, one per line; found {str(value)[:60]}")
        if image in ids and not repeats:
            raise ValueError(f"{path}: image {image} occurs twice ({ids[image]} and {where})")
        ids.setdefault(image, where)
    if not ids:
        raise ValueError(f"{path}: expected image ids, one per line; found nothing")
    return list(ids)


def _listed(path: str | Path, text: str) -> list[tuple[int, dict[str, Any]]] | None:
    """The records of a file of records; None for a JSON list of plain values."""
    if text.lstrip().startswith("["):
        values = parse_json(text, str(path))
        if not any(isinstance(value, (dict, list)) for value in values):
            return None
    return list(_records(path))


def _records(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Number and record of everything in a file."""
    if Path(path).suffix.lower() in (".csv", ".tsv"):
        yield from _rows(path)
        return
    text, whole = read_text(path), None
    if text.lstrip().startswith("{"):
        # JSON lines, or broken: said below, with the line.
        with contextlib.suppress(json.JSONDecodeError, RecursionError):
            whole = json.loads(text, object_pairs_hook=lambda pairs: _unique(path, pairs))
    if whole is None:
        yield from enumerate(read_jsonl(path), start=1)
    elif isinstance(whole.get("annotations"), list):  # COCO's own caption files
        for number, record in enumerate(whole["annotations"], start=1):
            if not isinstance(record, dict):
                raise ValueError(f"{path}, annotation {number}: expected an object, got {type(record).__name__}")
            yield number, record
    elif whole and all(image_number(key) is not None for key in whole):  # a map from image to text
        for number, (image, value) in enumerate(whole.items(), start=1):
            if isinstance(value, list) and len(value) != 1:
                raise ValueError(f"{path}, record {number}: image {image} has {len(value)} texts, expected one")
            yield number, {"image_id": image, "caption": value[0] if isinstance(value, list) else value}
    else:
        yield 1, whole


def _unique(path: str | Path, pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise ValueError(f"{path}: {key!r} occurs twice in one object")
        found[key] = value
    return found


def _rows(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    text = read_text(path)
    header = text.partition("\n")[0]
    delimiter = max("\t,;", key=header.count) if header else ","
    rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        columns = [name.strip() for name in next(rows, [])]
        for number, row in enumerate((row for row in rows if row), start=1):
            if len(row) != len(columns):
                raise ValueError(
                    f"{path}, record {number}: has {len(row)} fields, the header has {len(columns)} "
                    f"({', '.join(columns)})"
                )
            yield number, dict(zip(columns, row, strict=True))
    except csv.Error as error:
        raise ValueError(f"{path}, line {rows.line_num}: not valid CSV ({error})") from error


def _of_method(
    path: str | Path, records: list[tuple[int, dict[str, Any]]], method: str | None
) -> tuple[list[tuple[int, dict[str, Any]]], int]:
    """Of a ``samples.jsonl`` the answers of one method, and how many of its samples have none; all records of other files."""
    if not all({"method", "sample", "image_id"} <= record.keys() for _, record in records):
        if method is not None:
            raise ValueError(f"--method {method}: {path} is not a samples.jsonl, which names methods")
        return records, 0
    labels = list(dict.fromkeys(str(record["method"]) for _, record in records))
    if method is None and len(labels) > 1:
        raise ValueError(f"{path}: holds answers of {', '.join(labels)}: say which with --method")
    if method is not None and method not in labels:
        raise ValueError(f"--method {method}: {path} holds answers of {', '.join(labels)}")
    chosen = [(number, record) for number, record in records if method in (None, record["method"])]
    answered = [(number, record) for number, record in chosen if "skipped" not in record]
    if not answered:
        raise ValueError(f"{path}: all {len(chosen)} samples were skipped in the run, so there are no answers")
    return answered, len(chosen) - len(answered)


def _text_key(path: str | Path, number: int, record: Mapping[str, Any], given: str | None, option: str) -> str:
    if given is not None:
        _has(path, number, record, given, option)
        return given
    found = [key for key in ANSWER_KEYS if key in record]
    if "text" in found and len(found) > 1:
        found.remove("text")  # with an answer it is the question
    where = f"{path}, record {number}"
    if not found:
        raise ValueError(f"{where}: needs {_one_of(ANSWER_KEYS)}, or {option}; it has {_keys(record)}")
    if len({str(record[key]) for key in found}) > 1:
        raise ValueError(f"{where}: has {' and '.join(map(repr, found))}: say which with {option}")
    return found[0]


def _image_key(path: str | Path, number: int, record: Mapping[str, Any], given: str | None, needed: bool) -> str | None:
    if given is not None:
        _has(path, number, record, given, "--image-key")
        return given
    keys = IMAGE_KEYS if needed else [key for key in IMAGE_KEYS if key != "id"]  # of an answer it is the question's
    found = next((key for key in keys if key in record), None)
    if found is None and needed:
        where = f"{path}, record {number}"
        raise ValueError(f"{where}: needs {_one_of(IMAGE_KEYS)}, or --image-key; it has {_keys(record)}")
    return found


def _has(path: str | Path, number: int, record: Mapping[str, Any], key: str, option: str) -> None:
    if key not in record:
        raise ValueError(f"{path}, record {number}: has no {key!r} ({option}); it has {_keys(record)}")


def _agree(where: str, record: Mapping[str, Any], chosen: str, image: int, names: Mapping[str, int] | None) -> None:
    """Refuse a record whose keys name two images. ``id`` may be anything's."""
    for key in IMAGE_KEYS:
        other = image_of(record.get(key), names) if key not in (chosen, "id") else None
        if other is not None and other != image:
            raise ValueError(f"{where}: {chosen} {record[chosen]!r} and {key} {record[key]!r} are two images")


def _one_of(keys: Sequence[str]) -> str:
    return f"{', '.join(map(repr, keys[:-1]))} or {keys[-1]!r}"


def _keys(record: Mapping[str, Any]) -> str:
    return ", ".join(map(repr, list(record)[:8])) or "nothing"


def _shown(record: Mapping[str, Any], key: str) -> str:
    return repr(record[key])[:60] if key in record else f"none (it has {_keys(record)})"
