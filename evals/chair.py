# SPDX-License-Identifier: Apache-2.0
"""CHAIR: which objects does a caption name that are not in the image?

Rohrbach et al., 2018, "Object Hallucination in Image Captioning" (arXiv 1809.02156). The protocol is that
of the scripts in common use: words of a list are mapped to the 80 COCO categories, double words are merged
first, and mentions count with repetition.

* ``CHAIR_S``: share of captions with at least one hallucinated object;
* ``CHAIR_I``: share of all object mentions that are hallucinated;
* recall, precision, F1: over the distinct categories of each image;
* length: tokens per caption after merging double words, punctuation included, as the common scripts count;
* distinct-1: different words per word of a caption (Li et al., 2016, arXiv 1510.03055); a caption that repeats itself
  has few.

Two things decide whether two CHAIR figures can be compared. The ground truth is named in every result:
``instances+captions`` is the official one; ``instances`` alone gives higher, that is worse, figures. The
other is how words are reduced to their base form: here nouns and participles are ("seated" becomes "seat",
as in the common port with NLTK's tagger and WordNet), gerunds are not ("skiing" stays). On published captions
of three models all three figures stay within 0.5 points of that port (CHAIR_S is the same); the rules were
chosen to reach that, so on other captions the two may differ by a little more.
"""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.reading import read_entries
from vlm_attn.evals.stats import Metric, Pair, ratio

VARIANTS = ("instances", "instances+captions")
PROMPT = "Please describe this image in detail."
SCALES = {"length": 1.0}  # all other figures are in percent

# A word with inner hyphens, a clitic ('s, 're), or one sign of punctuation: NLTK's word_tokenize in short.
TOKEN = re.compile(r"[^\W_]+(?:-[^\W_]+)*|'[^\W_]+|[^\w\s]|_")


@dataclass(frozen=True)
class Mention:
    """An object named in a caption: the text at ``[start, end)`` and the category it stands for."""

    text: str
    category: str
    start: int
    end: int


@dataclass(frozen=True)
class Vocabulary:
    """The words that stand for objects, and how two words become one.

    Args:
        categories: category -> the words that name it.
        double_words: two words -> what they count as.
        exceptions: words whose base form the lemmatiser gets wrong -> base form.
    """

    categories: Mapping[str, Sequence[str]]
    double_words: Mapping[str, str]
    exceptions: Mapping[str, str]

    @classmethod
    def load(cls, path: str | Path | None = None) -> Vocabulary:
        """Read a vocabulary file; default: the 80 COCO categories."""
        table = json.loads(Path(path or Path(__file__).parent / "data" / "coco_objects.json").read_text("utf-8"))
        double_words = dict(table["double_words"])
        for animal in table["young_or_adult"]:
            double_words |= {f"baby {animal}": animal, f"adult {animal}": animal}
        double_words |= {f"passenger {vehicle}": vehicle for vehicle in table["passenger"]}
        return cls(table["categories"], double_words, table["lemma_exceptions"])

    @cached_property
    def category_of(self) -> dict[str, str]:
        """Surface form -> category."""
        return {word: category for category, words in self.categories.items() for word in words}

    @cached_property
    def _known(self) -> set[str]:
        forms = [*self.category_of, *self.double_words]
        return {word for form in forms for word in form.split()}

    def category(self, name: str) -> str:
        """The category that a data set's name for it stands for, "Dining_Table" -> "dining table"; another name stays."""
        plain = " ".join(name.replace("_", " ").lower().split())
        return self.category_of.get(plain, plain)

    def lemma(self, word: str) -> str:
        """Base form of a lower-case word; words of the vocabulary ("skis", "potted") stay as they are."""
        if word in self.exceptions:
            return self.exceptions[word]
        if word in self._known or word.endswith("ing"):
            return word
        return lemmatize(word)

    def tokens(self, caption: str) -> list[tuple[str, int, int]]:
        """Base forms with their character positions, double words merged from left to right."""
        words = [(self.lemma(match.group().lower()), match.start(), match.end()) for match in TOKEN.finditer(caption)]
        merged: list[tuple[str, int, int]] = []
        position = 0
        while position < len(words):
            pair = " ".join(word for word, _, _ in words[position : position + 2])
            if pair in self.double_words and position + 1 < len(words):
                merged.append((self.double_words[pair], words[position][1], words[position + 1][2]))
                position += 2
            else:
                merged.append(words[position])
                position += 1
        present = {word for word, _, _ in merged}
        if {"toilet", "seat"} <= present:  # "the seat of the toilet" is no chair
            merged = [token for token in merged if token[0] != "seat"]
        return merged

    def mentions(self, caption: str) -> list[Mention]:
        """Objects that a caption names, in reading order, repetitions included."""
        return self._mentions(caption, self.tokens(caption))

    def _mentions(self, caption: str, tokens: Iterable[tuple[str, int, int]]) -> list[Mention]:
        return [
            Mention(caption[start:end], self.category_of[word], start, end)
            for word, start, end in tokens
            if word in self.category_of
        ]

    def score(self, caption: str, truth: Iterable[str]) -> dict[str, Any]:
        """Score one caption against the categories that are in its image.

        Returns:
            ``length``, ``words`` and ``distinct`` (words as written but for case, and how many different ones), ``mentions``
            (each with text, category, start, end, hallucinated) and ``truth``.
        """
        tokens = self.tokens(caption)
        words = [word for word in TOKEN.findall(caption.lower()) if word[0].isalnum()]
        present = sorted({self.category(name) for name in truth})
        return {
            "length": len(tokens),
            "words": len(words),
            "distinct": len(set(words)),
            "mentions": [
                {**asdict(mention), "hallucinated": mention.category not in present}
                for mention in self._mentions(caption, tokens)
            ],
            "truth": present,
        }

    def truth(self, dataset: CocoDataset, image_id: int, variant: str) -> set[str]:
        """Categories in an image: the annotated ones; with ``instances+captions`` also those of its captions.

        Raises:
            ValueError: unknown variant.
        """
        if variant not in VARIANTS:
            raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
        found = {self.category(name) for name in dataset.objects(image_id)}
        if variant == "instances+captions":
            for caption in dataset.reference_captions(image_id):
                found |= {mention.category for mention in self.mentions(caption)}
        return found


@lru_cache(maxsize=65536)
def lemmatize(word: str) -> str:
    """Base form of a lower-case English word."""
    return require("simplemma").lemmatize(word, lang="en")


@lru_cache(maxsize=1)
def coco_vocabulary() -> Vocabulary:
    """The vocabulary of the 80 COCO categories."""
    return Vocabulary.load()


def summarise(scores: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Metric]:
    """CHAIR of many captions: each metric with a 95 % bootstrap interval over images.

    Args:
        scores: what `Vocabulary.score` gave for each caption.
        seed: of the bootstrap.

    Returns:
        ``chair_s, chair_i, recall, precision, f1, distinct_1`` in percent and ``length`` in tokens.
    """
    columns = columns_of(scores)
    return {name: ratio(*pair, scale=SCALES.get(name, 100.0), seed=seed) for name, pair in columns.items()}


def columns_of(scores: Sequence[Mapping[str, Any]]) -> dict[str, Pair]:
    """What the figures of CHAIR are ratios of: per figure, numerator and denominator of every caption."""
    mentions = [len(score["mentions"]) for score in scores]
    hallucinated = [sum(mention["hallucinated"] for mention in score["mentions"]) for score in scores]
    named = [{mention["category"] for mention in score["mentions"]} for score in scores]
    correct = [len(words & set(score["truth"])) for words, score in zip(named, scores, strict=True)]
    generated = [len(words) for words in named]
    truth = [len(score["truth"]) for score in scores]
    ones = [1] * len(scores)
    return {
        "chair_s": ([count > 0 for count in hallucinated], ones),
        "chair_i": (hallucinated, mentions),
        "recall": (correct, truth),
        "precision": (correct, generated),
        # 2PR / (P + R) with P = correct / generated and R = correct / truth
        "f1": ([2 * count for count in correct], [a + b for a, b in zip(generated, truth, strict=True)]),
        "distinct_1": ([score["distinct"] for score in scores], [score["words"] for score in scores]),
        "length": ([score["length"] for score in scores], ones),
    }


def default_variant(dataset: CocoDataset) -> str:
    """``instances+captions`` (official) where reference captions exist, else ``instances``.

    The scenes world draws every object it annotates and no other, so ``instances`` is exact there.
    """
    has_captions = bool(dataset.captions and dataset.captions["annotations"])
    return "instances+captions" if has_captions and not dataset.name.startswith("scenes:") else "instances"


def check_truth(dataset: CocoDataset, image_ids: Sequence[int], variant: str) -> int:
    """Look whether the ground truth can be what a variant says, before anything is scored by it.

    Args:
        dataset: gives objects and captions.
        image_ids: the images that are scored.
        variant: of `VARIANTS`.

    Returns:
        how many of the images have reference captions.

    Raises:
        ValueError: an unknown variant; none of the images has reference captions, and ``variant`` asks for them; no annotation
            is about an image of the data, or none of its categories is one that captions are searched for.
    """
    if variant not in VARIANTS:
        raise ValueError(f"variant {variant!r}: expected one of {', '.join(VARIANTS)}")
    described = dataset.described(image_ids)
    if "captions" in variant and not described:
        raise ValueError(
            f"{dataset.name}: none of the {len(image_ids)} images has reference captions: use the variant 'instances' "
            "(--variant instances)"
        )
    if not dataset.annotated:
        raise ValueError(
            f"{dataset.name}: no annotation is about an image of the data ({len(dataset.instances['annotations'])} "
            "annotations): every object that a caption names would count as invented"
        )
    known = coco_vocabulary()
    strange = [name for name in dataset.categories if known.category(name) not in known.categories]
    first = ", ".join(map(repr, strange[:4]))
    if len(strange) == len(dataset.categories):
        raise ValueError(f"{dataset.name}: none of its categories is one of COCO's 80, which CHAIR is about ({first})")
    if strange:
        warnings.warn(
            f"{dataset.name}: {len(strange)} of {len(dataset.categories)} categories are none of COCO's 80 ({first}): no "
            "caption is found to name them, and they count as missed",
            stacklevel=2,
        )
    if not any(dataset.objects(image) for image in image_ids):
        warnings.warn(
            f"{dataset.name}: none of the {len(image_ids)} images has an annotated object: every object that a caption "
            "names counts as invented",
            stacklevel=2,
        )
    return described


def read_captions(
    path: str | Path, names: Mapping[str, int] | None = None, **options: str | None
) -> list[dict[str, Any]]:
    """Read captions to score.

    Args:
        path: see `reading.read_entries`.
        names: see there.
        **options: ``text_key``, ``image_key`` and ``method`` of it.

    Returns:
        records of ``image_id`` and ``caption``.

    Raises:
        FileNotFoundError, ValueError: naming the file and the record at fault; an image id that occurs twice.
    """
    entries, _ = read_entries(path, names=names, **options)  # type: ignore[arg-type]
    seen: dict[int | None, int] = {}
    for entry in entries:
        if entry.image in seen:
            raise ValueError(
                f"{path}, record {entry.number}: image_id {entry.image} occurs twice (first in record {seen[entry.image]})"
            )
        seen[entry.image] = entry.number
    return [{"image_id": entry.image, "caption": entry.text} for entry in entries]
