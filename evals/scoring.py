# SPDX-License-Identifier: Apache-2.0
"""Score answers that exist already: no model, no pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evals import amber, chair, matching, mmhal, pope
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.reading import image_number, read_entries
from vlm_attn.evals.runner import SCHEMA_VERSION, versions
from vlm_attn.evals.tasks import image_ids_hash


def score_chair(
    captions: str | Path,
    data: str | Path,
    *,
    split: str | None = None,
    variant: str | None = None,
    caption_key: str | None = None,
    image_key: str | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """CHAIR of a file of captions.

    Args:
        captions: see `reading.read_entries`.
        data: folder with COCO annotations.
        split: see `CocoDataset.from_folder`.
        variant: ``instances`` or ``instances+captions``; default: `chair.default_variant`.
        caption_key: key of the caption in a record; default: ``caption``, ``answer``, ``response`` or ``text``.
        image_key: key of the image; default: ``image_id``, ``image``, ``file_name`` or ``id``.
        method: whose captions to take of a ``samples.jsonl`` with several methods.

    Returns:
        The fields of a results file, with every caption's score under ``samples``. Captions of images that
        are not in the data are counted in ``counts["skipped"]``, images with reference captions in
        ``config["images_described"]``.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, no caption about an image of the
            data, or a ground truth that `chair.check_truth` refuses.
    """
    for library in ("scipy", "simplemma"):
        require(library)
    dataset = CocoDataset.from_folder(data, split)
    kept, skipped = _captions_of(dataset, captions, text_key=caption_key, image_key=image_key, method=method)
    variant = variant or chair.default_variant(dataset)
    described = chair.check_truth(dataset, [record["image_id"] for record in kept], variant)
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
    facts = {"variant": variant, "images_described": described}
    return _results("chair", captions, dataset.name, samples, metrics, counts, facts, "coco_objects")


def score_pope(
    answers: str | Path,
    questions: Sequence[str | Path],
    *,
    parser: str = "official",
    answer_key: str | None = None,
    image_key: str | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """POPE of a file of answers.

    An answer finds its question by image and question text where its record has both, else by ``question_id`` (also in
    LLaVA's one file for several lists, whose ids go on at 10,000,001 and 20,000,001), else by its place. What a record says
    of itself has to fit the question it is matched with: image, text and label, where it has them.

    Args:
        answers: see `reading.read_entries`.
        questions: official files, one per split.
        parser: one of `pope.PARSERS`.
        answer_key: key of the answer in a record; default: ``caption``, ``answer``, ``response`` or ``text``.
        image_key: key of the image; default: ``image_id``, ``image`` or ``file_name``.
        method: whose answers to take of a ``samples.jsonl`` with several methods.

    Returns:
        The fields of a results file. Questions without an answer and answers without a question are counted in
        ``counts`` (``unanswered``, ``skipped``).

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, an answer that does not fit its question, a
            question answered twice, an unknown parser, or no answer to any question.
    """
    require("scipy")
    parse = pope.get_parser(parser)
    entries, dropped = read_entries(
        answers, text_key=answer_key, image_key=image_key, option="--answer-key", method=method, needs_image=False
    )
    asked = matching.questions_of(questions)
    given = matching.match(answers, entries, asked)
    samples: list[dict[str, Any]] = [
        {
            "image_id": one.question.image_id,
            "question": one.question.text,
            "label": one.question.label,
            "splits": [one.question.split],
            "answer": given[place].text,
            "score": pope.score(given[place].text, one.question.label, parse),
        }
        for place, one in enumerate(asked)
        if place in given
    ]
    if not samples:
        raise ValueError(f"{answers}: none of its {len(entries)} answers is to a question of {_names(questions)}")
    used = {entry.number for entry in given.values()}
    counts = {
        "skipped": sum(entry.number not in used for entry in entries) + dropped,
        "unanswered": len(asked) - len(samples),
    }
    metrics = pope.summarise(pope.by_split(samples))
    return _results("pope", answers, _names(questions), samples, metrics, counts, {}, parser)


def score_amber(
    answers: str | Path,
    data: str | Path,
    *,
    parser: str = "official",
    similarity: str = "exact",
    answer_key: str | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """AMBER of a file of answers.

    Args:
        answers: see `reading.read_entries`; a record has ``id`` (of the query) and ``response``.
        data: AMBER's data folder.
        parser: one of `amber.PARSERS`.
        similarity: one of `amber.SIMILARITIES`.
        answer_key: key of the answer in a record; default: ``caption``, ``answer``, ``response`` or ``text``.
        method: whose answers to take of a ``samples.jsonl`` with several methods.

    Returns:
        The fields of a results file. Answers to no query are counted in ``counts["skipped"]``, captions without a word in
        ``empty``; queries without an answer are not asked for, as a part of AMBER may be scored alone.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, a query answered twice, an answer that does not
            fit its query, an unknown parser or similarity, or no answer to any query.
    """
    for library in ("scipy", "simplemma", "textblob"):
        require(library)
    if parser not in amber.PARSERS:
        raise ValueError(f"parser {parser!r}: expected one of {', '.join(amber.PARSERS)}")
    parse, similar = amber.PARSERS[parser], amber.get_similarity(similarity)
    loaded = amber.Amber.from_folder(data)
    queries = {query.id: query for query in loaded.queries}
    entries, dropped = read_entries(
        answers, text_key=answer_key, option="--answer-key", method=method, needs_image=False
    )
    given: dict[int, str] = {}
    for entry in entries:
        # A map id -> text is read as one of images; of AMBER its keys are queries.
        number = image_number(entry.record.get("id", entry.record.get("image_id")))
        where = f"{answers}, record {entry.number}"
        if number is None:
            raise ValueError(f"{where}: needs 'id' (the query's number)")
        if number in given:
            raise ValueError(f"{where}: a second answer to {number}")
        if number in queries:
            query, said = queries[number], matching.said_question(entry.record)
            wrong = said is not None and matching.plain(query.text) not in matching.plain(said)
            if wrong or (query.label and str(entry.record.get("label", query.label)).strip().lower() != query.label):
                raise ValueError(
                    f"{where}: id {number} is {query.text!r} ({query.label}) in {loaded.name}, and the record says "
                    f"{said!r} ({entry.record.get('label')})"
                )
        given[number] = entry.text
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
        raise ValueError(f"{answers}: none of its {len(entries)} answers is to a query of {loaded.name}")
    counts = {
        "skipped": len(given) - len(samples) + dropped,
        "empty": sum(not str(sample["answer"]).strip() for sample in samples),
    }
    metrics = amber.summarise(samples)
    return _results("amber", answers, loaded.name, samples, metrics, counts, {"similarity": similarity}, parser)


def score_clip(
    captions: str | Path,
    data: str | Path,
    clip: str,
    *,
    split: str | None = None,
    device: str = "cpu",
    caption_key: str | None = None,
    image_key: str | None = None,
    method: str | None = None,
) -> dict[str, Any]:
    """CLIPScore of a file of captions.

    Args:
        captions: see `reading.read_entries`.
        data: COCO folder with the pictures; reference captions are used where there are any.
        clip: a CLIP model of open_clip, ``architecture:weights``.
        split: see `CocoDataset.from_folder`.
        device: where CLIP runs.
        caption_key: see `score_chair`; so are the others.
        image_key: see there.
        method: see there.

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
    kept, skipped = _captions_of(dataset, captions, text_key=caption_key, image_key=image_key, method=method)
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


def _captions_of(dataset: CocoDataset, file: str | Path, **options: str | None) -> tuple[list[dict[str, Any]], int]:
    """The captions of a file about images of the data, and how many are about others.

    Raises:
        FileNotFoundError, ValueError: the file is missing or malformed, or none is about an image of the data.
    """
    records, known = chair.read_captions(file, dataset.image_names, **options), set(dataset.image_ids)
    kept = [record for record in records if record["image_id"] in known]
    if not kept:
        raise ValueError(
            f"{file}: none of its {len(records)} captions is about an image of {dataset.name} "
            f"(first: image {records[0]['image_id']}; there: {', '.join(map(str, dataset.image_ids[:3]))} ...)"
        )
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


def _names(files: Sequence[str | Path]) -> str:
    return ", ".join(Path(file).name for file in files)
