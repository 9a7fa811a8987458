# SPDX-License-Identifier: Apache-2.0
"""AMBER by hand-made records, by its own files, and through the command line."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.evals import amber, effects
from vlm_attn.evals.scoring import score_amber

from .conftest import shared_file

ANNOTATIONS = [
    {"id": 1, "type": "generative", "truth": ["sky", "person", "forest"], "hallu": ["cloud", "dog"]},
    {"id": 2, "type": "generative", "truth": ["cup"], "hallu": ["spoon"]},
    {"id": 3, "type": "discriminative-hallucination", "truth": "no"},
    {"id": 4, "type": "discriminative-hallucination", "truth": "yes"},
    {"id": 5, "type": "discriminative-attribute-state", "truth": "no"},
    {"id": 6, "type": "relation", "truth": "yes"},
]
QUERIES = [
    {"id": number, "image": f"AMBER_{image}.jpg", "query": text}
    for number, image, text in (
        (1, 1, "Describe this image."), (2, 2, "Describe this image."), (3, 1, "Is there a dog in this image?"),
        (4, 2, "Is there a cup in this image?"), (5, 1, "Is the sky red in this image?"),
        (6, 2, "Is there direct contact between the cup and the table?"),
    )
]  # fmt: skip
RELATION = {
    "sky": [], "person": ["people", "man"], "man": [], "forest": ["tree"], "tree": ["forest"], "cloud": [], "dog": ["puppy"],
    "cup": ["mug"], "spoon": [], "light": [], "can": [], "watch": [],
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "amber"
    (root / "query").mkdir(parents=True)
    (root / "images").mkdir()
    (root / "annotations.json").write_text(json.dumps(ANNOTATIONS))
    (root / "relation.json").write_text(json.dumps(RELATION))
    (root / "safe_words.txt").write_text("light\n")
    (root / "query" / "query_generative.json").write_text(json.dumps(QUERIES[:2]))
    (root / "query" / "query_all.json").write_text(json.dumps(QUERIES))
    for image in (1, 2):
        pixels = np.random.default_rng(image).integers(0, 255, (30, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(root / "images" / f"AMBER_{image}.jpg")
    return root


def score(data: amber.Amber, number: int, answer: str, similar: amber.Similar = amber.exact) -> dict[str, Any]:
    query = next(query for query in data.queries if query.id == number)
    return data.score(query, answer, amber.parse_exact, similar)


def test_nouns_of_its_list_in_their_base_form_count(folder: Path) -> None:
    data = amber.Amber.from_folder(folder)
    text = "Two men can watch dogs and a table / the trees under clouds; a Watch."
    found = data.mentions(text)
    assert [noun for noun, _, _ in found] == [
        "man",
        "dog",
        "tree",
        "cloud",
        "watch",
    ]  # "can" and "watch" as verbs do not
    assert [text[start:end] for _, start, end in found] == ["men", "dogs", "trees", "clouds", "Watch"]
    assert data.mentions("") == []


def test_captions_by_hand(folder: Path) -> None:
    data = amber.Amber.from_folder(folder)
    found = score(data, 1, "A man and a dog, a dog and a puppy in a light forest of trees")
    assert [(m["text"], m["category"], m["hallucinated"]) for m in found["mentions"]] == [
        ("man", "person", False),  # associated with person
        ("dog", "dog", True), ("dog", "dog", True), ("puppy", "puppy", True),
        ("light", "light", False),  # a safe word
        ("forest", "forest", False), ("trees", "forest", False),
    ]  # fmt: skip
    assert (found["covered"], found["cognitive"], found["likely"]) == (2, 1, 2)  # person, forest; dog of cloud, dog
    # A puppy is as good as a person to this similarity: it is safe, and covers the first word it is like.
    similar = score(data, 1, "a puppy", lambda noun, word: {noun, word} == {"puppy", "person"} or noun == word)
    assert [m["hallucinated"] for m in similar["mentions"]] == [False]
    assert similar["covered"] == 1
    # The scorer asks for equals and then for likes, so one noun may stand for two likely inventions.
    both = score(data, 1, "a dog", lambda noun, word: noun == word or {noun, word} == {"dog", "cloud"})
    assert both["cognitive"] == 2


def test_figures_by_hand(folder: Path, tmp_path: Path) -> None:
    answers = {
        1: "a man, a dog and a cloud",
        2: "a cup and a mug",
        3: "No",
        4: "No",
        5: "Yes",
        6: "yes, it is",
        77: "No",
    }
    file = tmp_path / "mine.json"
    file.write_text(json.dumps([{"id": number, "response": text} for number, text in answers.items()]))
    results = score_amber(file, folder)
    values = {
        part: {key: cell["value"] if isinstance(cell, dict) else cell for key, cell in row.items()}
        for part, row in results["metrics"]["mine"].items()
    }
    # Nouns: man, dog, cloud; cup, mug. Unsafe: dog, cloud. Covered: person of 3 and cup of 1. Named of the likely: 2 of 3.
    assert values["generative"] == pytest.approx({"chair": 40.0, "cover": 50.0, "hal": 50.0, "cog": 200 / 3})
    # No is right once of two; two were no, of which one was found.
    assert values["discriminative"] == pytest.approx(
        {
            "accuracy": 25.0, "precision": 50.0, "recall": 50.0, "f1": 50.0, "questions": 4, "unparsed": 1,
            "disagree": 1, "plain_no": 2, "no_read_as_yes": 0,  # "yes, it is" is neither to AMBER's rule
        }
    )  # fmt: skip
    assert values["existence"]["accuracy"] == 50.0
    assert values["relation"]["unparsed"] == 1
    assert values["amber"]["score"] == pytest.approx((100 - 40 + 50) / 2)
    assert results["counts"] == {"samples": 6, "finished": {"mine": 6}, "skipped": 1, "empty": 0}
    lenient = score_amber(file, folder, parser="strict")["metrics"]["mine"]
    assert lenient["relation"]["accuracy"]["value"] == 100.0


def test_safe_words_are_neither_unsafe_nor_covered(folder: Path) -> None:
    """A safe word of the image's own, as AMBER's files have them: it is a noun, and covers nothing."""
    annotations = [{**ANNOTATIONS[0], "truth": ["sky", "light", "person"], "hallu": ["cloud"]}, *ANNOTATIONS[1:]]
    (folder / "annotations.json").write_text(json.dumps(annotations))
    found = score(amber.Amber.from_folder(folder), 1, "a light, a light and a man")
    assert [(m["category"], m["hallucinated"]) for m in found["mentions"]] == [
        ("light", False), ("light", False), ("person", False),
    ]  # fmt: skip
    assert (found["covered"], found["cognitive"]) == (1, 0)


def test_every_figure_where_all_counts_differ() -> None:
    """Counted by hand over two images, so that no two of the counts can change places unnoticed."""

    def caption(image: int, unsafe: int, safe: int, covered: int, truth: int, cognitive: int, likely: int) -> Any:
        mentions = [{"hallucinated": True}] * unsafe + [{"hallucinated": False}] * safe
        score = {
            "mentions": mentions,
            "truth": ["x"] * truth,
            "covered": covered,
            "cognitive": cognitive,
            "likely": likely,
        }
        return {"kind": "generative", "image_id": image, "answer": "", "score": score}

    def asked(kind: str, label: str, said: str | None) -> Any:
        score = {"prediction": said, "correct": said == label, "unparsed": said is None}
        return {"kind": kind, "image_id": 1, "label": label, "answer": str(said), "score": score}

    captions = [
        caption(1, 2, 7, 5, 9, 1, 9), caption(2, 1, 4, 1, 5, 4, 7), caption(1, 0, 3, 2, 3, 1, 2), caption(2, 0, 0, 0, 2, 0, 0),
    ]  # fmt: skip
    nouns, unsafe, covered, truth, cognitive, likely, hal, count = 17, 3, 8, 19, 6, 18, 2, 4
    assert len({nouns, unsafe, covered, truth, cognitive, likely, hal, count}) == 8
    questions = [
        *[asked("existence", "no", "no")] * 5, *[asked("existence", "no", "yes")] * 2, *[asked("existence", "yes", "no")] * 4,
        *[asked("existence", "yes", "yes")] * 1, asked("existence", "no", None),
        *[asked("attribute", "yes", "yes")] * 4, *[asked("attribute", "no", "no")] * 1, *[asked("relation", "no", "yes")] * 2,
    ]  # fmt: skip
    summary = amber.summarise([*captions, *questions])
    values = {part: {k: v["value"] for k, v in row.items() if isinstance(v, dict)} for part, row in summary.items()}
    assert values["generative"] == pytest.approx(
        {
            "chair": 100 * unsafe / nouns, "cover": 100 * covered / truth, "hal": 100 * hal / count,
            "cog": 100 * cognitive / likely,
        }
    )  # fmt: skip
    # existence: 13 asked, 6 right; no was right 8 times and said 9 times, of which 5 together
    assert values["existence"] == pytest.approx(
        {"accuracy": 100 * 6 / 13, "precision": 100 * 5 / 9, "recall": 100 * 5 / 8, "f1": 100 * 10 / 17}
    )
    # all: 20 asked, 11 right; no was right 11 times (8 + 1 + 2), said 10 times, 6 together
    assert values["discriminative"] == pytest.approx(
        {"accuracy": 100 * 11 / 20, "precision": 100 * 6 / 10, "recall": 100 * 6 / 11, "f1": 100 * 12 / 21}
    )
    assert values["attribute"]["accuracy"] == 100.0
    assert values["relation"] == {"accuracy": 0.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert values["amber"]["score"] == pytest.approx((100 - 100 * unsafe / nouns + 100 * 12 / 21) / 2)
    assert [summary[part]["questions"] for part in ("existence", "attribute", "relation", "discriminative")] == [
        13,
        5,
        2,
        20,
    ]
    assert summary["discriminative"]["unparsed"] == summary["existence"]["unparsed"] == 1


def test_its_own_files() -> None:
    data = amber.Amber.from_folder(shared_file("amber"))
    kinds = {kind: [q for q in data.queries if q.kind == kind] for kind in ("generative", "existence")}
    assert {kind: len(found) for kind, found in kinds.items()} == {"generative": 1004, "existence": 4924}
    assert all(query.label == "no" for query in kinds["existence"])
    assert len(data.nouns) == 418
    # A caption made of an image's own words is safe and covers them; one made of the likely inventions is not.
    for query in kinds["generative"][:40]:
        record = data.annotations[query.id]
        found = score(data, query.id, ", ".join(f"the {word}" for word in record["truth"]))
        assert not any(mention["hallucinated"] for mention in found["mentions"])
        assert found["covered"] >= len(set(record["truth"])) / 2  # by association two words may cover one
        invented = score(data, query.id, ", ".join(f"the {word}" for word in record["hallu"]))
        assert invented["cognitive"] <= len(record["hallu"])
        assert invented["covered"] <= 1
    dataset = data.dataset
    assert len(dataset.image_ids) == 1004
    assert dataset.objects(1) == data.annotations[1]["truth"]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("annotations.json", None, r"annotations\.json: no such file"),
        ("annotations.json", "[]", r"annotations\.json: expected a list"),
        ("annotations.json", '[{"id": 1}]', r"annotations\.json, record 1: needs id, type, truth"),
        ("safe_words.txt", None, r"safe_words\.txt: no such file"),
        ("relation.json", "{", r"relation\.json: not valid JSON"),
        ("query/query_all.json", '[{"id": 9, "image": "AMBER_1.jpg", "query": "x"}]', "query 9 has no annotation"),
        ("query/query_all.json", '[{"id": 1, "image": "x.jpg", "query": "x"}]', "query 1 names no image"),
    ],
)
def test_wrong_folders(folder: Path, name: str, text: str | None, message: str) -> None:
    (folder / name).unlink() if text is None else (folder / name).write_text(text)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        amber.Amber.from_folder(folder)


@pytest.mark.parametrize(
    ("records", "message"),
    [
        ([{"id": 1, "response": "a"}] * 2, "record 2: a second answer to 1"),
        ([{"id": "first", "response": "a"}], "record 1: needs 'id'"),
        ([{"id": 1, "response": None}], "record 1: needs 'response' .a text., got None"),
        (
            [{"id": 3, "query": "Is the sky red in this image?", "response": "No"}],
            "id 3 is 'Is there a dog in this image.'",
        ),
        ([{"id": 99, "response": "a"}], "none of its 1 answers"),
    ],
)
def test_wrong_answers(folder: Path, records: list[dict[str, Any]], message: str, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(records))
    with pytest.raises(ValueError, match=message):
        score_amber(file, folder)
    with pytest.raises(ValueError, match="exact, spacy"):
        score_amber(file, folder, similarity="vectors")
    with pytest.raises(FileNotFoundError, match=r"no query_\*\.json"):
        score_amber(file, tmp_path)


def test_vectors_of_spacy(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(name: str) -> Any:
        if name != "en_core_web_lg":
            raise OSError("no such model")
        close = {("kitten", "cat"): 0.9, ("dog", "cat"): 0.8}
        return lambda word: types.SimpleNamespace(
            word=word, similarity=lambda other: close.get((word, other.word), 0.0)
        )

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    similar = amber.get_similarity("spacy")
    assert similar("kitten", "cat")
    assert not similar("dog", "cat")  # more than 0.8
    with pytest.raises(ImportError, match="spacy download other"):
        amber.spacy_vectors("other")
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ImportError, match="pip install spacy"):
        amber.get_similarity("spacy")


def test_command_line(folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    def call(*args: object) -> Any:
        return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "120"})

    params = ["--param", "gift.saliency_layers=[1]", "--param", "gift.enhance_layers=[1,2]"]
    shared = ["--model", tiny_model_folder, "--device", "cpu", "--method", "baseline", "--method", "gift", *params]
    out = tmp_path / "runs" / "amber"
    done = call("eval", "amber", "--data", folder, "--out", out, "--max-new-tokens", 5, *shared)
    assert done.exit_code == 0, done.output
    assert "Cover" in done.stdout
    results = json.loads((out / "results.json").read_text())
    assert results["counts"]["finished"] == {"baseline": 6, "gift": 6}
    assert results["config"]["similarity"] == "exact"
    runs = effects.read_runs(tmp_path / "runs")
    figures = effects.effects(runs)["methods"]["gift"]["figures"]["amber"]
    for part, row in results["metrics"]["gift"].items():
        for key, cell in row.items():
            if isinstance(cell, dict):
                assert figures[f"{part}.{key}"]["value"] == cell["value"]
    assert call("report", tmp_path / "runs", "--data", folder).exit_code == 0
    html = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert "AMBER" in html
    refused = call("eval", "amber", "chair", "--data", folder, *shared)
    assert refused.exit_code == 2
    assert "by itself" in refused.stderr
    answers = tmp_path / "answers.jsonl"
    answers.write_text(json.dumps({"id": 3, "response": "No"}))
    done = call("score", "amber", "--answers", answers, "--data", folder)
    assert done.exit_code == 0, done.output
    assert "existence" in done.stdout
