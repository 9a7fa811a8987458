"""Score answers that exist already: no model, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evals import amber, chair, mmhal, pope
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset, read_jsonl
from vlm_attn.evals.runner import SCHEMA_VERSION, versions
from vlm_attn.evals.tasks import image_ids_hash


def score_chair(
    captions: str | Path, data: str | Path, *, split: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """CHAIR of a file of captions.

    Args:
        captions: JSON lines with ``image_id`` and ``caption``.
        data: folder with COCO annotations.
        split: see `CocoDataset.from_folder`.
        variant: ``instances`` or ``instances+captions``; default: `chair.default_variant`.

    Returns:
        The fields of a results file, with every caption's score under ``samples``. Captions of images that
        are not in the data are counted in ``counts["skipped"]``.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, no caption about an image of the
            data, or ``instances+captions`` without reference captions.
    """
    for library in ("scipy", "simplemma"):
        require(library)
    dataset = CocoDataset.from_folder(data, split)
    kept, skipped = _captions_of(dataset, captions)
    variant = variant or chair.default_variant(dataset)
    if variant == "instances+captions" and not dataset.captions:
        raise ValueError(f"{data}: has no reference captions; use --variant instances")
    vocabulary = chair.coco_vocabulary()
    samples = [
        {
            "image_id": record["image_id"],
            "answer": record["caption"],
            "score": vocabulary.score(record["caption"], vocabulary.truth(dataset, record["image_id"], variant)),
        }
        for record in kept
    ]
    counts = {"skipped": skipped, "empty": sum(not record["caption"].strip() for record in kept)}
    metrics = {variant: chair.summarise([sample["score"] for sample in samples])}
    return _results("chair", captions, dataset.name, samples, metrics, counts, {"variant": variant}, "coco_objects")


def score_pope(answers: str | Path, questions: Sequence[str | Path], *, parser: str = "official") -> dict[str, Any]:
    """POPE of a file of answers.

    Args:
        answers: JSON lines with ``answer`` (or ``text``) and either ``question_id``, where there is one file of
            questions, or ``image`` (or ``image_id``) and ``question``; without any of them, answers are taken in
            the order of the questions, of which there must be as many.
        questions: official files, one per split.
        parser: one of `pope.PARSERS`.

    Returns:
        The fields of a results file. Questions without an answer and answers without a question are counted in
        ``counts`` (``unanswered``, ``skipped``).

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, a question answered twice, an unknown
            parser, or no answer to any question.
    """
    require("scipy")
    parse = pope.get_parser(parser)
    asked = [question for file in questions for question in pope.read_questions(file)]
    records = read_jsonl(answers)
    if not records:
        raise ValueError(f"{answers}: holds no answers")
    given: dict[Any, str] = {}
    keyed = _answer_key(records[0], 0)[0]
    if keyed == "question_id" and len(questions) > 1:
        raise ValueError(f"{answers}: question_id is ambiguous over {len(questions)} question files; score one by one")
    if keyed == "place" and len(records) != len(asked):
        raise ValueError(
            f"{answers}: {len(records)} answers without question_id or image and question, "
            f"but {len(asked)} questions: cannot tell which belongs to which"
        )
    for number, record in enumerate(records):
        key = _answer_key(record, number)
        text = record.get("answer", record.get("text"))
        if not isinstance(text, str) or key[0] != keyed:
            raise ValueError(f"{answers}, record {number + 1}: needs 'answer' (a text) and the same keys as the first")
        if key in given:
            raise ValueError(f"{answers}, record {number + 1}: a second answer to {' '.join(map(str, key[1:]))}")
        given[key] = text
    ids = _question_ids(questions[0]) if keyed == "question_id" else []
    samples: list[dict[str, Any]] = []
    used = set()
    for place, question in enumerate(asked):
        key = {
            "question_id": lambda place=place: ("question_id", ids[place]),
            "question": lambda question=question: ("question", question.image_id, _plain(question.text)),
            "place": lambda place=place: ("place", place),
        }[keyed]()
        if key in given:
            used.add(key)
            samples.append(
                {
                    "image_id": question.image_id,
                    "question": question.text,
                    "label": question.label,
                    "splits": [question.split],
                    "answer": given[key],
                    "score": pope.score(given[key], question.label, parse),
                }
            )
    if not samples:
        raise ValueError(f"{answers}: none of its {len(records)} answers is to a question of {_names(questions)}")
    counts = {"skipped": len(given) - len(used), "unanswered": len(asked) - len(samples)}
    metrics = pope.summarise(pope.by_split(samples))
    return _results("pope", answers, _names(questions), samples, metrics, counts, {}, parser)


def score_amber(
    answers: str | Path, data: str | Path, *, parser: str = "official", similarity: str = "exact"
) -> dict[str, Any]:
    """AMBER of a file of answers.

    Args:
        answers: JSON array or lines with ``id`` (of the query) and ``response``.
        data: AMBER's data folder.
        parser: one of `amber.PARSERS`.
        similarity: one of `amber.SIMILARITIES`.

    Returns:
        The fields of a results file. Answers to no query are counted in ``counts["skipped"]``, captions without a word in
        ``empty``; queries without an answer are not asked for, as a part of AMBER may be scored alone.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, a query answered twice, an unknown parser or
            similarity, or no answer to any query.
    """
    for library in ("scipy", "simplemma", "textblob"):
        require(library)
    if parser not in amber.PARSERS:
        raise ValueError(f"parser {parser!r}: expected one of {', '.join(amber.PARSERS)}")
    parse, similar = amber.PARSERS[parser], amber.get_similarity(similarity)
    loaded = amber.Amber.from_folder(data)
    queries = {query.id: query for query in loaded.queries}
    records, given = read_jsonl(answers), dict[int, str]()
    for number, record in enumerate(records, start=1):
        if not isinstance(record.get("response"), str) or not isinstance(record.get("id"), int):
            raise ValueError(f"{answers}, record {number}: needs 'id' (a number) and 'response' (a text)")
        if record["id"] in given:
            raise ValueError(f"{answers}, record {number}: a second answer to {record['id']}")
        given[record["id"]] = record["response"]
    samples = [
        {
            "image_id": query.image_id,
            "id": query.id,
            "kind": query.kind,
            "question": query.text,
            "label": query.label,
            "answer": given[query.id],
            "score": loaded.score(query, given[query.id], parse, similar),
        }
        for query in queries.values()
        if query.id in given
    ]
    if not samples:
        raise ValueError(f"{answers}: none of its {len(records)} answers is to a query of {loaded.name}")
    counts = {
        "skipped": len(given) - len(samples),
        "empty": sum(not str(sample["answer"]).strip() for sample in samples),
    }
    metrics = amber.summarise(samples)
    return _results("amber", answers, loaded.name, samples, metrics, counts, {"similarity": similarity}, parser)


def score_clip(
    captions: str | Path, data: str | Path, clip: str, *, split: str | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """CLIPScore of a file of captions.

    Args:
        captions: JSON lines with ``image_id`` and ``caption``.
        data: COCO folder with the pictures; reference captions are used where there are any.
        clip: a CLIP model of open_clip, ``architecture:weights``.
        split: see `CocoDataset.from_folder`.
        device: where CLIP runs.

    Returns:
        The fields of a results file. Captions of images that are not in the data are counted in ``counts["skipped"]``, those
        that CLIP read only the beginning of in ``cut``.

    Raises:
        FileNotFoundError, ValueError, ImportError: a file that is missing or malformed, no caption about an image of the
            data, a picture that cannot be read, or a CLIP model that cannot be loaded.
    """
    from vlm_attn.evals import clipscore

    require("scipy")
    dataset = CocoDataset.from_folder(data, split)
    kept, skipped = _captions_of(dataset, captions)
    scores = clipscore.clip_scores(clip, dataset, kept, device=device)
    samples = [
        {"image_id": r["image_id"], "answer": r["caption"], "score": s} for r, s in zip(kept, scores, strict=True)
    ]
    counts = {"skipped": skipped, "cut": sum(score["cut"] for score in scores)}
    metrics = {"all": clipscore.summarise(scores)}
    return _results("clipscore", captions, dataset.name, samples, metrics, counts, {"clip": clip})


def score_mmhal(answers: str | Path, judge: str, *, template: str | Path | None = None) -> dict[str, Any]:
    """MMHal-Bench of a file of answers, by a judge.

    Args:
        answers: see `mmhal.read_answers`.
        judge: ``package.module:function``, from prompt to reply.
        template: file with the judge's prompt; default: `mmhal.TEMPLATE`.

    Returns:
        The fields of a results file; replies without a rating are counted.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, or no such judge.
    """
    require("scipy")
    records = mmhal.read_answers(answers)
    text = mmhal.TEMPLATE if template is None else Path(template).read_text(encoding="utf-8")
    rated = mmhal.rate(records, mmhal.load_judge(judge), text)
    counts = {"unparsed": sum(record["unparsed"] for record in rated)}
    facts = {"judge": judge, "template": "own" if template is None else Path(template).name}
    samples = [{"image_id": place, **record} for place, record in enumerate(rated)]
    return _results("mmhal", answers, "MMHal-Bench", samples, mmhal.summarise(rated), counts, facts)


def _captions_of(dataset: CocoDataset, file: str | Path) -> tuple[list[dict[str, Any]], int]:
    """The captions of a file about images of the data, and how many are about others.

    Raises:
        FileNotFoundError, ValueError: the file is missing or malformed, or none is about an image of the data.
    """
    records, known = chair.read_captions(file), set(dataset.image_ids)
    kept = [record for record in records if record["image_id"] in known]
    if not kept:
        raise ValueError(f"{file}: none of its {len(records)} captions is about an image of {dataset.name}")
    return kept, len(records) - len(kept)


def _results(
    name: str,
    file: str | Path,
    data: str,
    samples: Sequence[dict[str, Any]],
    metrics: dict[str, Any],
    counts: dict[str, int],
    config: dict[str, Any],
    parser: str | None = None,
) -> dict[str, Any]:
    """The fields of a results file, for answers of one file."""
    label = Path(file).stem
    images = list(dict.fromkeys(sample["image_id"] for sample in samples))
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "eval": name,
        "config": {"model": label, "data": data, **config, "images": len(images)},
        "versions": versions(),
        "image_ids_sha256": image_ids_hash(images),
        **({} if parser is None else {"parser": parser}),
        "counts": {"samples": len(samples), "finished": {label: len(samples)}, **counts},
        "metrics": {label: metrics},
        "samples": samples,
    }


def _answer_key(record: dict[str, Any], number: int) -> tuple[Any, ...]:
    """How an answer names its question."""
    image = record.get("image_id", record.get("image"))
    if isinstance(record.get("question"), str) and image is not None:
        return ("question", pope.image_number(image), _plain(record["question"]))
    if "question_id" in record:
        return ("question_id", record["question_id"])
    return ("place", number)


def _plain(text: str) -> str:
    return " ".join(text.lower().split())


def _question_ids(file: str | Path) -> list[Any]:
    return [record.get("question_id", place) for place, record in enumerate(read_jsonl(file), start=1)]


def _names(files: Sequence[str | Path]) -> str:
    return ", ".join(Path(file).name for file in files)
