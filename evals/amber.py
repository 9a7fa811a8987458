# SPDX-License-Identifier: Apache-2.0
"""AMBER: what captions invent, cover and leave out, and yes/no questions about existence, attributes and relations.

Wang et al., 2023, "AMBER: An LLM-free Multi-dimensional Benchmark for MLLMs Hallucination Evaluation" (arXiv 2311.07397), by
the rules of its released scorer. Captions: nouns of AMBER's own word list count, with repetition. A noun is safe if it is one
of the image's words, is associated with one, or is similar to one of these.

* CHAIR: unsafe nouns / nouns; Hal: captions with an unsafe noun;
* Cover: the image's words that a noun stands for / all of them, over all images;
* Cog: the same over the words that the annotators expected to be invented.

Questions: accuracy over all, and precision, recall and F1 of the answer *no*. AMBER score: ``(100 - CHAIR + F1) / 2``; the
released scorer does not print it, and it could not be checked against the paper.

Two steps differ from the released scorer. Nouns come from textblob's tagger and simplemma's lemmas, which carry their data,
instead of NLTK's; of AMBER's words it takes some for verbs ("the sink", "a bear"), which then do not count. And similar means
equal (``exact``) unless vectors are asked for: the released scorer asks spaCy's ``en_core_web_lg`` for more than 0.8.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from vlm_attn.evals import pope
from vlm_attn.evals._extras import require
from vlm_attn.evals.chair import TOKEN, lemmatize
from vlm_attn.evals.coco import CocoDataset, FolderImages
from vlm_attn.evals.reading import image_number, read_json
from vlm_attn.evals.stats import Pair, mean_of_ratios

KINDS = ("existence", "attribute", "relation")
SIMILAR = 0.8  # of spaCy's vectors, in the released scorer
#: Columns of a figure: name -> numerator and denominator of every image.
Columns = dict[str, Pair]
Similar = Callable[[str, str], bool]


@dataclass(frozen=True)
class Query:
    """A prompt about an image; ``kind`` is ``generative`` or one of `KINDS`, ``label`` yes or no for the latter."""

    id: int
    image_id: int
    text: str
    kind: str
    label: str | None


def parse_exact(answer: str, label: str = "") -> str | None:
    """The released rule: the answer has to be Yes or No and nothing else."""
    return {"Yes": "yes", "No": "no"}.get(answer.strip())


#: How answers are read: AMBER's own rule, and those of POPE.
PARSERS: dict[str, Callable[[str, str], str | None]] = {**pope.PARSERS, "official": parse_exact}


def exact(noun: str, word: str) -> bool:
    """Similar is equal."""
    return noun == word


def spacy_vectors(model: str = "en_core_web_lg", threshold: float = SIMILAR) -> Similar:
    """Similar by the word vectors of a spaCy model that is installed.

    Raises:
        ImportError: spaCy or the model is missing.
    """
    try:
        nlp = require("spacy", "evals").load(model)
    except (ImportError, OSError) as error:
        raise ImportError(
            f"similarity 'spacy' needs spaCy and its vectors: pip install spacy, then python -m spacy download {model}"
        ) from error
    vector = cache(nlp)

    @cache
    def similar(noun: str, word: str) -> bool:
        return vector(noun).similarity(vector(word)) > threshold

    return similar


SIMILARITIES: dict[str, Callable[[], Similar]] = {"exact": lambda: exact, "spacy": spacy_vectors}


def get_similarity(name: str) -> Similar:
    """A similarity by name.

    Raises:
        ValueError: unknown name.
        ImportError: see `spacy_vectors`.
    """
    if name not in SIMILARITIES:
        raise ValueError(f"similarity {name!r}: expected one of {', '.join(SIMILARITIES)}")
    return SIMILARITIES[name]()


@dataclass(frozen=True)
class Amber:
    """AMBER's annotations, word list and queries.

    Args:
        name: what reports call it.
        annotations: query id -> its record: ``truth`` and ``hallu`` (words) of captions, ``truth`` yes or no of questions.
        association: word -> words that go with it; keys and values are the nouns that count.
        safe_words: words that are never unsafe.
        queries: in the order of their ids.
        load_image: the picture of an image id.
    """

    name: str
    annotations: Mapping[int, Mapping[str, Any]]
    association: Mapping[str, Sequence[str]]
    safe_words: frozenset[str]
    queries: Sequence[Query]
    load_image: Callable[[int], Any] = field(repr=False)

    @classmethod
    def from_folder(cls, path: str | Path) -> Amber:
        """Read AMBER's data folder: ``annotations.json``, ``relation.json``, ``safe_words.txt``, ``query_*.json`` (also in
        ``query/``), and pictures in ``images/``, ``image/`` or beside them, which are opened when asked for.

        Raises:
            FileNotFoundError, ValueError: naming the file that is missing or malformed.
        """
        folder = Path(path)
        files = [*sorted(folder.glob("query_*.json")), *sorted((folder / "query").glob("query_*.json"))]
        if not files:
            raise FileNotFoundError(
                f"{folder}: no query_*.json here or in query/; --data takes the data folder of AMBER"
            )
        words = folder / "safe_words.txt"
        if not words.is_file():
            raise FileNotFoundError(f"{words}: no such file")
        annotations = {
            record["id"]: record for record in _records(folder / "annotations.json", ("id", "type", "truth"))
        }
        queries: dict[int, Query] = {}
        names: dict[int, str] = {}
        for file in files:
            for record in _records(file, ("id", "image", "query")):
                if record["id"] not in annotations:
                    raise ValueError(f"{file}: query {record['id']} has no annotation")
                image = image_number(record["image"])
                if image is None:
                    raise ValueError(f"{file}: query {record['id']} names no image with a number")
                found = annotations[record["id"]]
                kind = _kind(found["type"])
                label = None if kind == "generative" else str(found["truth"]).strip().lower()
                queries[record["id"]] = Query(record["id"], image, record["query"], kind, label)
                names[image] = record["image"]
        images = {"images": [{"id": image, "file_name": name} for image, name in names.items()]}
        return cls(
            name=folder.name,
            annotations=annotations,
            association=read_json(folder / "relation.json"),
            safe_words=frozenset(words.read_text(encoding="utf-8").split()),
            queries=[queries[number] for number in sorted(queries)],
            load_image=FolderImages(folder, ("images", "image", "."), images),
        )

    @cached_property
    def nouns(self) -> frozenset[str]:
        """The words that count."""
        return frozenset(self.association) | {word for words in self.association.values() for word in words}

    @cached_property
    def dataset(self) -> CocoDataset:
        """The images with their words as objects, without boxes."""
        truth: dict[int, Sequence[str]] = {query.image_id: () for query in self.queries}
        truth |= {q.image_id: self.annotations[q.id]["truth"] for q in self.queries if q.kind == "generative"}
        ids = {name: place for place, name in enumerate(sorted(self.nouns), start=1)}
        return CocoDataset(
            self.name,
            {
                "images": [{"id": image} for image in truth],
                "annotations": [
                    {"image_id": image, "category_id": ids[word]}
                    for image in truth
                    for word in truth[image]
                    if word in ids
                ],
                "categories": [{"id": number, "name": name} for name, number in ids.items()],
            },
            None,
            self.load_image,
        )

    def mentions(self, caption: str) -> list[tuple[str, int, int]]:
        """The nouns of a caption that count, in reading order: base form, start, end."""
        tokens = [(match.group(), match.start(), match.end()) for match in TOKEN.finditer(caption)]
        found = []
        for (word, start, end), tag in zip(tokens, _tags([word for word, _, _ in tokens]), strict=True):
            low = word.lower()
            noun = low if low in self.nouns else lemmatize(low)
            if tag.startswith("NN") and noun in self.nouns:
                found.append((noun, start, end))
        return found

    def score(
        self, query: Query, answer: str, parse: Callable[[str, str], str | None], similar: Similar
    ) -> dict[str, Any]:
        """Score one answer.

        Returns:
            of a question what `pope.score` gives; of a caption ``mentions`` (text, category, start, end, hallucinated; the
            category of a safe noun is the image's word it stands for), ``truth``, ``covered`` and ``cognitive``, the latter two
            as many words of ``truth`` and of the likely inventions as were named, and ``likely``, the number of those.
        """
        if query.kind != "generative":
            found = pope.score(answer, query.label or "", parse)
            return found | {"unparsed": found["prediction"] is None or found["unparsed"]}
        record = self.annotations[query.id]
        truth, likely = record["truth"], record.get("hallu", [])
        mentions, covered, cognitive = [], set(), set()
        for noun, start, end in self.mentions(answer):
            place = self._place(noun, truth, exact)
            if noun not in self.safe_words and place is None:
                cognitive |= {self._place(noun, likely, exact), self._place(noun, likely, similar)} - {None}
                place = self._place(noun, truth, similar)
            if noun not in self.safe_words and place is not None:
                covered.add(place)
            mentions.append(
                {
                    "text": answer[start:end],
                    "category": noun if place is None else truth[place],
                    "start": start,
                    "end": end,
                    "hallucinated": place is None and noun not in self.safe_words,
                }
            )
        return {
            "mentions": mentions,
            "truth": list(truth),
            "covered": len(covered),
            "cognitive": len(cognitive),
            "likely": len(likely),
        }

    def _place(self, noun: str, words: Sequence[str], same: Similar) -> int | None:
        """Which of an image's words a noun stands for: by association first, as in the released scorer."""
        for place, word in enumerate(words):
            if any(same(noun, other) for other in self.association.get(word, ())):
                return place
        return next((place for place, word in enumerate(words) if same(noun, word)), None)


def _records(file: Path, keys: Sequence[str]) -> list[dict[str, Any]]:
    records = read_json(file)
    if not isinstance(records, list) or not records:
        raise ValueError(f"{file}: expected a list of records")
    for number, record in enumerate(records, start=1):
        if not isinstance(record, dict) or not all(key in record for key in keys):
            raise ValueError(f"{file}, record {number}: needs {', '.join(keys)}")
    return records


def _kind(type_: str) -> str:
    """AMBER's types as this module's kinds."""
    if type_ == "generative":
        return type_
    if "attribute" in type_:
        return "attribute"
    return "relation" if "relation" in type_ else "existence"


def _tags(words: Sequence[str]) -> list[str]:
    """A part of speech for every word."""
    if not words:
        return []
    tagger = require("textblob.en.taggers").PatternTagger()
    # A slash parts word and tag inside the tagger.
    tagged = tagger.tag(" ".join("," if "/" in word else word for word in words), tokenize=False)
    return [tag for _, tag in tagged]


def columns_of(records: Iterable[Mapping[str, Any]]) -> dict[str, Columns]:
    """What AMBER's figures are ratios of: part -> figure -> numerator and denominator of every image (by id).

    Parts: ``generative``, the kinds of questions that were asked, and ``discriminative``, all of them. ``safe`` of the first is
    ``1 - CHAIR``.
    """
    rows = list(records)
    images = sorted({row["image_id"] for row in rows})
    tally: dict[str, dict[str, Counter[int]]] = defaultdict(lambda: defaultdict(Counter))

    def add(part: str, image: int, **counts: int) -> None:
        for name, count in counts.items():
            tally[part][name][image] += count

    for row in rows:
        score, image = row["score"], row["image_id"]
        if row["kind"] == "generative":
            unsafe = sum(mention["hallucinated"] for mention in score["mentions"])
            add(
                "generative", image, nouns=len(score["mentions"]), unsafe=unsafe, safe=len(score["mentions"]) - unsafe,
                covered=score["covered"], truth=len(score["truth"]), hal=unsafe > 0, captions=1,
                cognitive=score["cognitive"], likely=score["likely"],
            )  # fmt: skip
            continue
        said, true = score["prediction"] == "no", row["label"] == "no"
        for part in (row["kind"], "discriminative"):
            add(part, image, all=1, right=score["correct"], said_no=said, is_no=true, true_no=said and true)

    def pair(part: str, top: str, bottom: str) -> Pair:
        count = tally[part]
        return [float(count[top][i]) for i in images], [float(count[bottom][i]) for i in images]

    columns: dict[str, Columns] = {}
    for part in ("generative", *KINDS, "discriminative"):
        if part not in tally:
            continue
        if part == "generative":
            figures = {"chair": "unsafe/nouns", "cover": "covered/truth", "hal": "hal/captions", "cog": "cognitive/likely",
                       "safe": "safe/nouns"}  # fmt: skip
            columns[part] = {name: pair(part, *of.split("/")) for name, of in figures.items()}
            continue
        true, said, is_no = (pair(part, name, "all")[0] for name in ("true_no", "said_no", "is_no"))
        columns[part] = {
            "accuracy": pair(part, "right", "all"),
            "precision": (true, said),
            "recall": (true, is_no),
            "f1": ([2 * number for number in true], [a + b for a, b in zip(said, is_no, strict=True)]),
        }
    return columns


def amber_score(columns: Mapping[str, Columns]) -> list[Pair] | None:
    """The two ratios whose mean is the AMBER score; None where one half was not run."""
    if not {"generative", "discriminative"} <= columns.keys():
        return None
    return [columns["generative"]["safe"], columns["discriminative"]["f1"]]


def summarise(records: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, dict[str, Any]]:
    """AMBER's figures in percent with 95 % bootstrap intervals over images, per part, and ``amber``: the score.

    Parts of questions also count ``questions``, ``unparsed`` and what `pope.readings` counts.
    """
    columns = columns_of(records)
    summary: dict[str, dict[str, Any]] = {}
    for part, figures in columns.items():
        summary[part] = {
            name: mean_of_ratios([pair], scale=100.0, seed=seed) for name, pair in figures.items() if name != "safe"
        }
        if part != "generative":
            rows = [r for r in records if r["kind"] == part or (part == "discriminative" and r["kind"] in KINDS)]
            summary[part] |= {
                "questions": len(rows),
                "unparsed": sum(row["score"]["unparsed"] for row in rows),
                **pope.readings({**row, "prediction": row["score"]["prediction"]} for row in rows),
            }
    pairs = amber_score(columns)
    if pairs is not None:
        summary["amber"] = {"score": mean_of_ratios(pairs, scale=100.0, seed=seed)}
    return summary
