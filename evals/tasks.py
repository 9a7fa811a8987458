# SPDX-License-Identifier: Apache-2.0
"""What an evaluation asks and how it scores the answers: a list of samples and two functions."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vlm_attn.evals import amber, chair, pope
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.reading import read_ids

DEFAULT_IMAGES = 500  # of both protocols


@dataclass(frozen=True)
class Sample:
    """One question about one image; ``facts`` go into the sample's record as they are."""

    image_id: int
    prompt: str
    facts: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Task:
    """An evaluation.

    Args:
        name: ``"pope"``, ``"chair"`` or ``"amber"``.
        dataset: where the pictures come from.
        samples: the full ordered list; batches are cut from it.
        max_new_tokens: length limit of an answer.
        config: what a reader needs to know to repeat it.
        score: (sample, answer) -> the answer's score.
        summarise: records of one method (facts, ``image_id``, ``answer``, ``score``) -> metrics.
    """

    name: str
    dataset: CocoDataset
    samples: Sequence[Sample]
    max_new_tokens: int
    config: Mapping[str, Any]
    score: Callable[[Sample, str], dict[str, Any]]
    summarise: Callable[[Sequence[Mapping[str, Any]]], dict[str, Any]]

    @property
    def image_ids(self) -> list[int]:
        """The images asked about, each once, in order."""
        return list(dict.fromkeys(sample.image_id for sample in self.samples))


def image_ids_hash(image_ids: Sequence[int]) -> str:
    """SHA-256 over a list of image ids: two results with the same hash used the same images in one order."""
    return hashlib.sha256(",".join(map(str, image_ids)).encode()).hexdigest()


def read_image_ids(path: str | Path, names: Mapping[str, int] | None = None) -> list[int]:
    """Image ids from a file; ``image_ids.txt`` of a results folder is one. See `reading.read_ids`."""
    return read_ids(path, names)


def chosen_ids(dataset: CocoDataset, image_ids: Sequence[int] | None, limit: int | None) -> list[int] | None:
    """The given ids, cut to the limit; None where none are given.

    Raises:
        ValueError: an id that the dataset does not have.
    """
    if image_ids is None:
        return None
    known = set(dataset.image_ids)
    unknown = [image for image in image_ids if image not in known]
    if unknown:
        raise ValueError(
            f"{len(unknown)} of {len(image_ids)} image ids are not in {dataset.name} (first: {unknown[0]})"
        )
    return list(image_ids[:limit])


def pope_task(
    dataset: CocoDataset,
    *,
    questions: Sequence[pope.Question] | None = None,
    limit: int | None = None,
    seed: int = 0,
    parser: str = "official",
    prompt: str = "{question}",
    max_new_tokens: int = 10,
    image_ids: Sequence[int] | None = None,
) -> Task:
    """POPE on a dataset.

    A question that several splits share is asked once and counts in each of them.

    Args:
        dataset: the images.
        questions: from official files; default: built from the dataset (`pope.build_questions`).
        limit: number of images (default 500).
        seed: of the drawing of images and negatives.
        parser: one of `pope.PARSERS`.
        prompt: what the model is asked, with ``{question}`` in it.
        max_new_tokens: length limit of an answer.
        image_ids: ask about these in place of drawing; those with fewer than three objects are left out and
            counted (``images_skipped``).

    Raises:
        ValueError: an id that the dataset does not have, an unknown parser, a prompt without ``{question}``, or
            no question about an image of the dataset.
    """
    require("scipy")  # now, not after hours of generating
    parse = pope.get_parser(parser)
    if "{question}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: a POPE prompt needs {{question}} in it")
    skipped = 0
    source = "built"
    extra: dict[str, Any] = {}
    if questions is None:
        wanted = chosen_ids(dataset, image_ids, limit)
        questions = pope.build_questions(
            dataset, images=None if wanted else limit or DEFAULT_IMAGES, seed=seed, image_ids=wanted
        )
    else:
        source = "official file"
        known = set(chosen_ids(dataset, image_ids, None) or dataset.image_ids)
        inside = [question for question in questions if question.image_id in known]
        if not inside:
            raise ValueError(
                f"none of the {len(questions)} POPE questions is about an image of {dataset.name} "
                f"(first: image {questions[0].image_id})"
            )
        skipped, questions = len(questions) - len(inside), inside
        images = list(dict.fromkeys(question.image_id for question in questions))[:limit]
        questions = [question for question in questions if question.image_id in set(images)]

    splits: dict[tuple[int, str, str], list[str]] = {}
    for question in questions:
        splits.setdefault((question.image_id, question.text, question.label), []).append(question.split)
    if source == "built" and wanted:
        extra["images_skipped"] = len(wanted) - len({question.image_id for question in questions})
    order = {image: place for place, image in enumerate(dict.fromkeys(q.image_id for q in questions))}
    samples = [
        Sample(image, prompt.replace("{question}", text), {"question": text, "label": label, "splits": names})
        for (image, text, label), names in sorted(splits.items(), key=lambda item: order[item[0][0]])
    ]

    def score(sample: Sample, answer: str) -> dict[str, Any]:
        return pope.score(answer, sample.facts["label"], parse)

    def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return pope.summarise(pope.by_split(records))

    config = {
        "prompt": prompt,
        "parser": parser,
        "questions": source,
        "questions_asked": len(questions),
        "questions_skipped": skipped,
        "splits": list(dict.fromkeys(question.split for question in questions)),
        **extra,
    }
    return Task("pope", dataset, samples, max_new_tokens, config, score, summarise)


def chair_task(
    dataset: CocoDataset,
    *,
    limit: int | None = None,
    seed: int = 0,
    prompt: str = chair.PROMPT,
    variant: str | None = None,
    max_new_tokens: int = 512,
    image_ids: Sequence[int] | None = None,
) -> Task:
    """CHAIR on a dataset.

    Args:
        dataset: the images.
        limit: number of images, drawn by the seed (default 500).
        seed: of the drawing.
        prompt: what the model is asked.
        variant: ground truth of the headline figures: ``instances`` or ``instances+captions``; default:
            `chair.default_variant`. The other variant is reported as well where captions exist.
        max_new_tokens: length limit of a caption.
        image_ids: describe these, in this order, in place of drawing.

    Raises:
        ValueError: an id that the dataset does not have, or a ground truth that `chair.check_truth` refuses.
    """
    for library in ("scipy", "simplemma"):
        require(library)  # now, not after hours of generating
    variant = variant or chair.default_variant(dataset)
    ids = dataset.image_ids
    if not ids:
        raise ValueError(f"{dataset.name}: holds no images")
    drawn = chosen_ids(dataset, image_ids, limit)
    if drawn is None:
        drawn = random.Random(seed).sample(ids, min(limit or DEFAULT_IMAGES, len(ids)))
    described = chair.check_truth(dataset, drawn, variant)
    vocabulary = chair.coco_vocabulary()
    variants = chair.VARIANTS if described else ("instances",)

    def score(sample: Sample, answer: str) -> dict[str, Any]:
        return vocabulary.score(answer, vocabulary.truth(dataset, sample.image_id, variant))

    def summarise(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {
            name: chair.summarise(
                [vocabulary.score(r["answer"], vocabulary.truth(dataset, r["image_id"], name)) for r in records]
            )
            for name in sorted(variants, key=lambda name: name != variant)
        }

    samples = [Sample(image, prompt) for image in drawn]
    config = {"prompt": prompt, "parser": "coco_objects", "variant": variant, "images_described": described}
    return Task("chair", dataset, samples, max_new_tokens, config, score, summarise)


def amber_task(
    data: amber.Amber,
    *,
    limit: int | None = None,
    seed: int = 0,
    parser: str = "official",
    prompt: str = "{question}",
    similarity: str = "exact",
    max_new_tokens: int = 512,
    image_ids: Sequence[int] | None = None,
) -> Task:
    """AMBER, captions and questions in the order of their ids.

    Args:
        data: AMBER's folder.
        limit: number of images, drawn by the seed (default all).
        seed: of the drawing.
        parser: of the answers to questions, one of `amber.PARSERS`.
        prompt: what the model is asked, with ``{question}`` for AMBER's text in it.
        similarity: one of `amber.SIMILARITIES`.
        max_new_tokens: length limit of a caption or answer.
        image_ids: ask about these in place of drawing.

    Raises:
        ValueError: an id that the data do not have, an unknown parser or similarity, a prompt without ``{question}``.
        ImportError: a library is missing.
    """
    for library in ("scipy", "simplemma", "textblob"):
        require(library)  # now, not after hours of generating
    if parser not in amber.PARSERS:
        raise ValueError(f"parser {parser!r}: expected one of {', '.join(amber.PARSERS)}")
    if "{question}" not in prompt:
        raise ValueError(f"prompt {prompt!r}: an AMBER prompt needs {{question}} in it")
    parse, similar = amber.PARSERS[parser], amber.get_similarity(similarity)
    ids = chosen_ids(data.dataset, image_ids, limit)
    if ids is None:
        ids = data.dataset.image_ids
        ids = ids if limit is None else random.Random(seed).sample(ids, min(limit, len(ids)))
    wanted, queries = set(ids), {query.id: query for query in data.queries}
    samples = [
        Sample(
            query.image_id,
            prompt.replace("{question}", query.text),
            {"id": query.id, "kind": query.kind, "question": query.text, "label": query.label},
        )
        for query in data.queries
        if query.image_id in wanted
    ]

    def score(sample: Sample, answer: str) -> dict[str, Any]:
        return data.score(queries[sample.facts["id"]], answer, parse, similar)

    config = {"prompt": prompt, "parser": parser, "similarity": similarity}
    return Task("amber", data.dataset, samples, max_new_tokens, config, score, amber.summarise)
