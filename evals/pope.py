# SPDX-License-Identifier: Apache-2.0
"""POPE: does the model say yes to objects that are not there?

Li et al., 2023, "Evaluating Object Hallucination in Large Vision-Language Models" (arXiv 2305.10355). For
each image three objects that are in it are asked for, and three that are not; a *split* is a way to choose
the latter:

* ``random``: any category;
* ``popular``: the categories that are in most images;
* ``adversarial``: those that most often stand beside the object just asked for.

The positive class of precision, recall and F1 is "yes".
"""

from __future__ import annotations

import random
import re
import warnings
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.reading import image_number, read_jsonl
from vlm_attn.evals.stats import Metric, Pair, mean_of_ratios

SPLITS = ("random", "popular", "adversarial")
METRICS = ("accuracy", "precision", "recall", "f1", "yes_ratio")
COUNTS = ("questions", "unparsed", "disagree", "plain_no", "no_read_as_yes")


@dataclass(frozen=True)
class Question:
    """A yes/no question about an image; ``split`` says which list of questions it belongs to."""

    image_id: int
    text: str
    label: str
    split: str


def question_text(name: str) -> str:
    """The official wording, with its article: "Is there an apple in the image?"."""
    return f"Is there {'an' if name[0].lower() in 'aeiou' else 'a'} {name} in the image?"


def asked_object(text: str) -> str:
    """The object a question asks for: "Is there a dining table in the image?" -> "dining table"; else the question itself."""
    found = re.search(r"\b(?:is|are) there (?:an? |any )?(.+?) in th(?:e|is) \w+", text, re.IGNORECASE)
    return " ".join(found.group(1).lower().split()) if found else text


def build_questions(
    dataset: CocoDataset,
    *,
    splits: Sequence[str] = SPLITS,
    images: int | None = 500,
    per_image: int = 3,
    seed: int = 0,
    image_ids: Sequence[int] | None = None,
) -> list[Question]:
    """Draw questions by the official rules; all splits ask about the same images.

    An image needs ``per_image`` objects; the first ones annotated are asked for. A negative is in the image
    never, and asked about it once; popular and adversarial fall back to random when their list is used up.

    Args:
        dataset: the images; category frequency and co-occurrence are counted over all of it.
        splits: which of random, popular, adversarial.
        images: how many images to draw; None: all that have enough objects.
        per_image: positive questions per image, and as many negative ones.
        seed: of the drawing.
        image_ids: ask about these, in this order, in place of drawing; those with too few objects are left out.

    Raises:
        ValueError: an unknown split, no image with enough objects, or too few categories for the negatives.
    """
    for split in splits:
        if split not in SPLITS:
            raise ValueError(f"POPE split {split!r}: expected one of {', '.join(SPLITS)}")
    for name, number in (("images", images), ("per_image", per_image)):
        if number is not None and number < 1:
            raise ValueError(f"{name}={number}: expected at least 1")
    objects = {image_id: dataset.objects(image_id) for image_id in dataset.image_ids}
    frequency = Counter(name for names in objects.values() for name in names)
    beside: dict[str, Counter[str]] = defaultdict(Counter)
    for names in objects.values():
        for name in names:
            beside[name].update(other for other in names if other != name)
    # Ties are broken by name, so that the questions do not depend on the order of the file.
    popular = sorted(frequency, key=lambda name: (-frequency[name], name))
    neighbours = {name: sorted(count, key=lambda other: (-count[other], other)) for name, count in beside.items()}

    candidates = objects if image_ids is None else image_ids
    suitable = [image_id for image_id in candidates if len(objects[image_id]) >= per_image]
    if not suitable:
        raise ValueError(f"{dataset.name}: no image has {per_image} objects, so POPE cannot ask about any")
    crowded = max(len(objects[image_id]) for image_id in suitable)
    if len(popular) < crowded + per_image:
        raise ValueError(
            f"{dataset.name}: only {len(popular)} categories occur, too few for {per_image} absent objects"
        )
    if image_ids is not None:
        drawn = suitable[:images]
    else:
        drawn = random.Random(seed).sample(suitable, min(images or len(suitable), len(suitable)))

    questions = []
    for split in splits:
        # One generator per split: which splits are asked for does not change the questions of another.
        generator = random.Random(f"{seed} {split}")
        for image_id in drawn:
            asked = set(objects[image_id])
            for present in objects[image_id][:per_image]:
                ranking = {"random": [], "popular": popular, "adversarial": neighbours.get(present, [])}[split]
                absent = next((name for name in ranking if name not in asked), None)
                if absent is None:
                    absent = generator.choice([name for name in popular if name not in asked])
                asked.add(absent)
                questions.append(Question(image_id, question_text(present), "yes", split))
                questions.append(Question(image_id, question_text(absent), "no", split))
    return questions


def read_questions(path: str | Path, split: str | None = None) -> list[Question]:
    """Read an official question file: JSON lines (or one JSON array) of ``image``, ``text``, ``label``.

    Args:
        path: the file, for example ``coco_pope_popular.json``.
        split: name of the split; default: the one in the file's name, else the file's name.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record at fault.
    """
    path = Path(path)
    split = split or next((name for name in SPLITS if name in path.stem), path.stem)
    questions = []
    for number, record in enumerate(read_jsonl(path), start=1):
        image = image_number(record.get("image", ""))
        label = str(record.get("label", "")).strip().lower()
        if image is None or not record.get("text") or label not in ("yes", "no"):
            raise ValueError(
                f"{path}, record {number}: needs 'image' (ending in the image's number), 'text', "
                f"and 'label' yes or no; got {str(record)[:80]}"
            )
        questions.append(Question(image, str(record["text"]), label, split))
    if not questions:
        raise ValueError(f"{path}: holds no questions")
    yes = sum(question.label == "yes" for question in questions)
    if 2 * yes != len(questions):
        older = ": the older random list, with 90 questions missing" if len(questions) == 2910 else ""
        warnings.warn(
            f"{path}: {yes} of {len(questions)} answers are yes; official lists are half and half{older}", stacklevel=2
        )
    return questions


def picture_names(paths: Sequence[str | Path]) -> dict[int, str]:
    """Image id -> file name, of the records of question files (`read_questions`).

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, or two names that end in one number.
    """
    names: dict[int, str] = {}
    for path in paths:
        for record in read_jsonl(path):
            name, number = str(record.get("image", "")), image_number(record.get("image", ""))
            if number is not None and names.setdefault(number, name) != name:
                raise ValueError(
                    f"{path}: {names[number]} and {name} end in the same number, which is what tells images apart"
                )
    return names


#: What stands before an answer without being part of it.
LEAD = r"^[\W_]*(?:assistant|a|(?:(?:the|my) )?(?:(?:final|short|correct) )?answer)\b(?: is|[\W_]*:)+"


# Parsers: (answer, gold label) -> "yes", "no", or None where the answer is neither.


def parse_official(answer: str, label: str = "") -> str | None:
    """The official rule: No, not or no among the words of the first sentence is no, all else is yes."""
    words = answer.split(".")[0].replace(",", "").split(" ")
    return "no" if {"No", "not", "no"} & set(words) else "yes"


def parse_opera(answer: str, label: str = "") -> str | None:
    """As OPERA and PAI: the whole answer counts; NO and words that end in n't are no as well."""
    words = answer.replace(".", "").replace(",", "").split(" ")
    negative = any(word in {"No", "not", "no", "NO"} or word.endswith("n't") for word in words)
    return "no" if negative else "yes"


def parse_vcd(answer: str, label: str = "") -> str | None:
    """As VCD: right if the gold label is a part of the answer, so it has to know the label.

    An answer with neither is wrong for both labels, and "know" contains "no".
    """
    if label == "yes":
        return "yes" if "yes" in answer.lower() else "no"
    return "no" if "no" in answer.lower() else "yes"


def parse_strict(answer: str, label: str = "") -> str | None:
    """The first word has to be yes or no (any case); everything else is unparsed, and wrong."""
    word = re.match(r"[\W_]*(yes|no)(?![^\W_])", answer, re.IGNORECASE)
    return word.group(1).lower() if word else None


def parse_plain(answer: str) -> str | None:
    """What a person reads an answer's first word as, markup and a lead such as "Answer:" put aside; None where it is neither.

    No rule of anybody's: it is compared with the rule that was used, so that a rule that does not fit a file shows.
    """
    text = re.sub(r"<[^<>]{0,80}>", " ", answer)
    return parse_strict(re.sub(LEAD, "", text, count=1, flags=re.IGNORECASE))


PARSERS: dict[str, Callable[[str, str], str | None]] = {
    "official": parse_official,
    "opera": parse_opera,
    "vcd": parse_vcd,
    "strict": parse_strict,
}


def get_parser(name: str) -> Callable[[str, str], str | None]:
    """A parser by name.

    Raises:
        ValueError: unknown name.
    """
    if name not in PARSERS:
        raise ValueError(f"parser {name!r}: expected one of {', '.join(PARSERS)}")
    return PARSERS[name]


def score(answer: str, label: str, parse: Callable[[str, str], str | None]) -> dict[str, Any]:
    """One answer: what it says, whether that is right, and whether it says anything."""
    prediction = parse(answer, label)
    return {"prediction": prediction, "correct": prediction == label, "unparsed": is_unparsed(answer)}


def by_split(records: Iterable[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A run's records, each once for every split it belongs to, as `columns_of` and `summarise` read them."""
    return [
        {**record, "split": split, "prediction": record["score"]["prediction"]}
        for record in records
        for split in record["splits"]
    ]


def is_unparsed(answer: str) -> bool:
    """Whether an answer has neither the word yes nor the word no in it: its prediction is a guess."""
    return re.search(r"(?<![^\W_])(yes|no)(?![^\W_])", answer, re.IGNORECASE) is None


def readings(answers: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """How far a rule and a plain reading of the first word (`parse_plain`) are apart.

    Args:
        answers: records with ``prediction`` and ``answer``.

    Returns:
        ``disagree``: answers whose first word says otherwise than the rule; ``plain_no``: answers that begin with no;
        ``no_read_as_yes``: those of them that the rule took for yes.
    """
    count = Counter[str]()
    for answer in answers:
        plain = parse_plain(answer["answer"])
        count["disagree"] += plain is not None and plain != answer["prediction"]
        count["plain_no"] += plain == "no"
        count["no_read_as_yes"] += plain == "no" and answer["prediction"] == "yes"
    return {name: count[name] for name in ("disagree", "plain_no", "no_read_as_yes")}


def summarise(answers: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """POPE metrics per split and their mean over splits, in percent with 95 % bootstrap intervals.

    Args:
        answers: records with ``image_id``, ``split``, ``label``, ``prediction`` and ``answer``.
        seed: of the bootstrap, which draws images again.

    Returns:
        split -> accuracy, precision, recall, f1, yes_ratio, each ``{"value", "low", "high"}``, and the counts
        ``questions``, ``unparsed`` and those of `readings`; ``"mean"`` is the mean of the splits, with the counts added up.
    """
    columns = columns_of(answers)
    summary: dict[str, dict[str, Any]] = {}
    for split in columns:
        rows = [answer for answer in answers if answer["split"] == split]
        summary[split] = _metrics([columns[split]], seed) | {
            "questions": len(rows),
            "unparsed": sum(is_unparsed(row["answer"]) for row in rows),
            **readings(rows),
        }
    summary["mean"] = _metrics(list(columns.values()), seed) | {
        count: sum(summary[split][count] for split in columns) for count in COUNTS
    }
    return summary


def columns_of(answers: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Pair]]:
    """What the figures of POPE are ratios of: split -> figure -> numerator and denominator of every image (by id)."""
    images = sorted({answer["image_id"] for answer in answers})
    columns: dict[str, dict[str, Pair]] = {}
    for split in dict.fromkeys(answer["split"] for answer in answers):
        rows = [answer for answer in answers if answer["split"] == split]
        tally: dict[str, Counter[int]] = defaultdict(Counter)
        for row in rows:
            said_yes, is_yes = row["prediction"] == "yes", row["label"] == "yes"
            for name, true in (
                ("all", True),
                ("right", row["prediction"] == row["label"]),
                ("said_yes", said_yes),
                ("is_yes", is_yes),
                ("true_yes", said_yes and is_yes),
            ):
                tally[name][row["image_id"]] += true
        count = {
            name: [float(tally[name][image]) for image in images]
            for name in ("all", "right", "said_yes", "is_yes", "true_yes")
        }
        columns[split] = {
            "accuracy": (count["right"], count["all"]),
            "precision": (count["true_yes"], count["said_yes"]),
            "recall": (count["true_yes"], count["is_yes"]),
            "f1": (
                [2 * number for number in count["true_yes"]],
                [said + true for said, true in zip(count["said_yes"], count["is_yes"], strict=True)],
            ),
            "yes_ratio": (count["said_yes"], count["all"]),
        }
    return columns


def _metrics(splits: Sequence[Mapping[str, Pair]], seed: int) -> dict[str, Metric | int]:
    return {name: mean_of_ratios([split[name] for split in splits], scale=100.0, seed=seed) for name in METRICS}
