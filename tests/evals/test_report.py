# SPDX-License-Identifier: Apache-2.0
"""Reports: paired differences, tables, plots and the page of worst images."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.evals import chair, effects, page, pope, report, runner, samples, stats
from vlm_attn.evals.coco import CocoDataset, open_image
from vlm_attn.evals.plots import frontier, place_labels
from vlm_attn.evals.specs import parse_specs
from vlm_attn.evals.tasks import chair_task, image_ids_hash

VOCABULARY = chair.coco_vocabulary()
GIFT = [{"name": "gift", "params": {"alpha": 2.0}, "searched": 5}]


def write_run(folder: Path, answers: dict[str, list[str]], **changes: Any) -> Path:
    """A CHAIR run over images of a dog each: label -> captions."""
    methods = {label: [] if label == "baseline" else GIFT for label in answers}
    config = {"model": "m", "weights": "w", "data": "d", "images": 40, "methods": methods, "max_new_tokens": 8}
    speed = {label: {"samples": 10, "tokens": 100, "seconds": 1.0 + place} for place, label in enumerate(answers)}
    results = {
        "eval": "chair", "config": {**config, "variant": "instances", **changes}, "device": "cpu", "seed": 0,
        "prompt": "p", "image_ids_sha256": "0" * 64, "parser": "coco_objects", "environment": {"speed": speed},
        "counts": {"samples": 40},
    }  # fmt: skip
    folder.mkdir(parents=True)
    (folder / "results.json").write_text(json.dumps(results))
    with open(folder / "samples.jsonl", "w") as file:
        for label, captions in answers.items():
            for place, caption in enumerate(captions):
                score = VOCABULARY.score(caption, ["dog"])
                record = {"method": label, "sample": place, "image_id": place, "answer": caption, "score": score}
                file.write(json.dumps(record) + "\n")
    return folder


BASE = ["a dog and a cat" if place < 20 else "a dog" for place in range(40)]
BETTER = ["a dog and a cat" if place < 16 else "a dog" for place in range(40)]  # four of the twenty are mended


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return write_run(tmp_path / "run", {"baseline": BASE, "gift": BETTER})


def test_differences_are_paired(run: Path) -> None:
    found = effects.effects(effects.read_runs(run))
    plain, gift = (found["methods"][label]["figures"]["chair"] for label in ("baseline", "gift"))
    assert list(plain) == ["chair_s", "chair_i", "recall", "precision", "f1", "distinct_1", "length"]
    assert plain["chair_s"]["value"] == 50.0
    assert gift["chair_s"]["value"] == 40.0
    assert plain["chair_i"]["value"] == pytest.approx(100 * 20 / 60)
    assert plain["length"]["value"] == pytest.approx(3.5)
    # "a dog and a cat" has four different words of five
    assert plain["distinct_1"]["value"] == pytest.approx(100 * (20 * 4 + 20 * 2) / (20 * 5 + 20 * 2))
    change = gift["chair_s"]["difference"]
    assert change["value"] == pytest.approx(-10.0)
    # Four of 40 images changed: the standard error is 100 sqrt(.1 .9 / 40) = 4.7; unpaired it would be 11.
    assert change["low"] == pytest.approx(-10 - 1.96 * 4.74, abs=2.0)
    assert change["high"] == pytest.approx(-10 + 1.96 * 4.74, abs=2.5)
    assert gift["recall"]["difference"] == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert "difference" not in plain["chair_s"]
    assert found["methods"]["gift"]["speed"]["chair"]["latency"] == pytest.approx(2.0)
    assert found["methods"]["gift"]["speed"]["chair"]["seconds_per_answer"] == pytest.approx(0.2)
    assert found["methods"]["gift"]["searched"] == 5
    assert found["methods"]["baseline"]["searched"] is None


@pytest.mark.parametrize(
    ("low", "high", "beyond"),
    [
        (-0.3, -5.8e-15, False), (4.3e-16, 0.7, False), (-0.3, 0.0, False), (0.0, 0.7, False), (-0.2, 0.1, False),
        (-0.3, -0.001, True), (0.001, 0.7, True), (None, None, False),
    ],
)  # fmt: skip
def test_an_interval_that_ends_at_0_but_for_rounding_holds_0(low: Any, high: Any, beyond: bool) -> None:
    metric = {"value": 0.2, "low": low, "high": high}
    assert report.clear(metric) is beyond
    assert report._effect_cell({"value": 3.0, "difference": metric}, False)[1].endswith(" *") is beyond


def test_differences_of_nothing_are_exactly_0() -> None:
    """A third and a seventh of hundreds of images: sums that differ in the last digit are no difference."""
    rng = np.random.default_rng(0)
    pairs = [(rng.integers(0, 2, 300) / 3, np.full(300, 1 / 7)) for _ in range(3)]
    other = [(top * 3 / 3 * (1 + 1e-16) + 1e-17, bottom) for top, bottom in pairs]
    assert stats.difference(pairs, other, scale=100.0) == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_published_results_hold_no_rounding() -> None:
    root = Path(report.__file__).parent
    root = root if (root / "results").is_dir() else Path(__file__).parents[2] / "evals"

    def measured(content: Any) -> Iterator[dict[str, Any]]:
        if isinstance(content, dict):
            if {"value", "low", "high"} <= content.keys():
                yield content
            content = list(content.values())
        for part in content if isinstance(content, list) else ():
            yield from measured(part)

    for file in sorted((root / "results").glob("*.json")):
        for metric in measured(json.loads(file.read_text("utf-8"))):
            ends = [metric[name] for name in ("value", "low", "high") if isinstance(metric[name], float)]
            assert not any(0 < abs(end) < stats.ROUNDING for end in ends), file.name


def test_a_report_says_how_many_images_have_reference_captions(tmp_path: Path) -> None:
    facts = {"variant": "instances+captions", "images_described": 6}
    found = effects.effects(effects.read_runs(write_run(tmp_path / "run", {"baseline": BASE}, **facts)))
    assert "reference captions of 6 of 40 images, 15%" in report.effects_markdown(found)
    found = effects.effects(
        effects.read_runs(write_run(tmp_path / "all", {"baseline": BASE}, **{**facts, "images_described": 40}))
    )
    assert "reference captions" not in report.effects_markdown(found)


def test_unfinished_methods_are_compared_over_what_they_have(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", {"baseline": BASE, "gift": BETTER[:24]})
    found = effects.effects(effects.read_runs(folder))
    gift = found["methods"]["gift"]["figures"]["chair"]["chair_s"]
    assert gift["value"] == pytest.approx(100 * 16 / 24)
    assert gift["difference"]["value"] == pytest.approx(100 * (16 - 20) / 24)
    assert "24 of 40" in report.effects_markdown(found)


def test_times_of_separate_runs_are_not_compared(run: Path) -> None:
    write_run(run.parent / "alone", {"vhr": BETTER})
    found = effects.effects(effects.read_runs(run.parent))
    assert "latency" not in found["methods"]["vhr"]["speed"]["chair"]  # the baseline was timed in another run
    (cost,) = [rows for title, _, rows in report.effect_tables(found) if title == "Cost"]
    assert {row[0][0]: row[1][0] for row in cost} == {"baseline": "1.00x", "gift": "2.00x", "vhr": "-"}
    alone = effects.effects(effects.read_runs(run.parent, ["vhr", "baseline"]))
    head = next(head for title, head, _ in report.effect_tables(alone) if title == "Cost")
    assert head == ["", "settings tried"]


def test_runs_of_one_protocol_are_joined_and_others_are_not(run: Path) -> None:
    write_run(run.parent / "more", {"baseline": BASE, "vhr": BETTER})
    write_run(run.parent / "other", {"baseline": BASE}, model="another")
    worlds = effects.worlds(effects.read_runs(run.parent))
    assert [len(world) for world in worlds] == [2, 1]
    assert list(effects.effects(worlds[0])["methods"]) == ["baseline", "vhr", "gift"]
    only = effects.read_runs(run.parent, ["vhr", "baseline"])
    assert list(effects.effects(effects.worlds(only)[0])["methods"]) == ["baseline", "vhr"]
    write_run(run.parent / "longer", {"baseline": BASE}, max_new_tokens=16)
    with pytest.raises(ValueError, match="differ in max_new_tokens: report them one by one"):
        effects.effects(effects.worlds(effects.read_runs(run.parent))[0])
    (run.parent / "longer" / "results.json").unlink()
    changed = json.loads((run.parent / "more" / "results.json").read_text())
    changed["config"]["methods"]["vhr"] = changed["config"]["methods"].pop("baseline")
    write_run(run.parent / "third", {"gift": BETTER}, methods={"gift": [{"name": "gift", "params": {"alpha": 9}}]})
    with pytest.raises(ValueError, match="both have a run 'gift', with different parameters"):
        effects.effects(effects.worlds(effects.read_runs(run.parent))[0])


def test_without_the_baseline_there_are_no_differences(run: Path) -> None:
    found = effects.effects(effects.read_runs(run, ["gift"]))
    assert found["baseline"] is None
    assert "difference" not in found["methods"]["gift"]["figures"]["chair"]["chair_s"]
    assert "latency" in found["methods"]["gift"]["speed"]["chair"]  # both were timed in this run
    report.effects_markdown(found)


def changed(run: Path, change: Any) -> None:
    results = json.loads((run / "results.json").read_text())
    change(results)
    (run / "results.json").write_text(json.dumps(results))


def turned(**changes: Any) -> Any:
    return lambda line: json.dumps({k: v for k, v in {**json.loads(line), **changes}.items() if v is not ...})


#: What is wrong with line 3 of the samples, and what is said of it.
DAMAGE: dict[str, tuple[Any, str]] = {
    "cut": (lambda line: line[:40], "line 3: not valid JSON"),
    "empty": (lambda line: "", "line 3: not valid JSON"),
    "deep": (lambda line: '{"method": ' + "[" * 100_000, "line 3: nested too deeply"),
    "list": (lambda line: "[]", "line 3: expected an object, got list"),
    "no method": (turned(method=...), "line 3: needs 'method'"),
    "method of another type": (turned(method=["gift"]), "line 3: 'method' should be a text"),
    "sample of another type": (turned(sample="2"), "line 3: 'sample' should be a whole number from 0 on, got '2'"),
    "sample that is true": (turned(sample=True), "line 3: 'sample' should be"),
    "sample below 0": (turned(sample=-1), "line 3: 'sample' should be"),
    "sample beyond the run": (turned(sample=40), "line 3: sample 40 of a run with 40 samples"),
    "twice": (turned(sample=1), "line 3: sample 1 of baseline was in line 2 already"),
    "no score": (turned(score=...), "line 3: needs 'score'"),
    "score of another type": (turned(score=1.0), "line 3: 'score' should be an object"),
    "score without words": (turned(score={"length": 1, "mentions": [], "truth": []}), "line 3: score: needs 'words'"),
    "truth of another type": (turned(score={**VOCABULARY.score("a", []), "truth": [1]}), "'truth' should be a list of texts"),
    "mention without a name": (turned(score={**VOCABULARY.score("a", []), "mentions": [{}]}), "mention 1: needs 'text'"),
    "mention outside": (turned(answer="a"), "line 3: mention 1 lies outside the answer"),
    "no answer": (turned(answer=...), "line 3: needs 'answer'"),
    "answer of another type": (turned(answer=None), "line 3: 'answer' should be a text, got 'None'"),
    "image of another type": (turned(image_id="2"), "line 3: 'image_id' should be a whole number"),
    "another image": (turned(image_id=5), "sample 2 is of image 2; in line 3 of image 5"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_record_is_named_and_not_scored(run: Path, damage: str) -> None:
    change, message = DAMAGE[damage]
    file = run / "samples.jsonl"
    lines = file.read_text().splitlines()
    lines[2] = change(lines[2])
    file.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        effects.read_runs(run)
    assert "samples.jsonl" in str(error.value)


def test_damaged_bytes_are_not_taken_for_an_answer(run: Path) -> None:
    file = run / "samples.jsonl"
    file.write_bytes(file.read_bytes().replace(b"a dog and a cat", b"a dog and a \xffat", 1))
    with pytest.raises(ValueError, match=r"samples\.jsonl, line 1: not UTF-8"):
        effects.read_runs(run)


def test_the_images_of_a_run_are_those_of_its_list(run: Path) -> None:
    listed = run / "image_ids.txt"
    listed.write_text("".join(f"{image}\n" for image in range(40)))
    with pytest.raises(ValueError, match=r"image_ids\.txt: these are not the images of results\.json"):
        effects.read_runs(run)
    changed(run, lambda results: results.update(image_ids_sha256=image_ids_hash(range(40))))
    effects.read_runs(run)
    file = run / "samples.jsonl"
    file.write_text(re.sub(r'"image_id": 7\b', '"image_id": 77', file.read_text()))  # under both methods
    with pytest.raises(ValueError, match="line 8: sample 7 is of image 77; the run did not use it"):
        effects.read_runs(run)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({}, None),
        ({"label": "maybe"}, "'label' should be yes or no"),
        ({"splits": "random"}, "'splits' should be a list of texts"),
        ({"question": ...}, "needs 'question'"),
        ({"score": {"prediction": "no", "correct": True, "unparsed": False}}, "'correct' is True, but no was read"),
        ({"score": {"prediction": "si", "correct": False, "unparsed": False}}, "'prediction' should be yes, no or null"),
        ({"score": {"prediction": "yes", "correct": 1, "unparsed": False}}, "'correct' should be true or false"),
    ],
)  # fmt: skip
def test_records_of_questions(changes: dict[str, Any], message: str | None) -> None:
    good = {
        "method": "gift", "sample": 0, "image_id": 1, "question": "q", "label": "yes", "splits": ["random"], "answer": "Yes",
        "score": {"prediction": "yes", "correct": True, "unparsed": False},
    }  # fmt: skip
    for name, facts in (("pope", {}), ("amber", {"id": 3, "kind": "existence"})):
        record = {key: value for key, value in {**good, **facts, **changes}.items() if value is not ...}
        if message is None or (name == "amber" and ("splits" in changes or changes.get("label") == "maybe")):
            if changes.get("label") != "maybe":
                samples.check_record("here", name, record)
            continue
        with pytest.raises(ValueError, match=message):
            samples.check_record("here", name, record)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda run: (run / "results.json").unlink(), r"no results\.json"),
        (lambda run: (run / "results.json").write_text("{}"), "not a results file"),
        (lambda run: (run / "results.json").write_text("[]"), "not a results file"),
        (lambda run: (run / "results.json").write_text("{"), r"results\.json: not valid JSON"),
        (lambda run: (run / "results.json").write_text("[" * 200_000), r"results\.json: nested too deeply"),
        (lambda run: changed(run, lambda r: r["config"].update(methods=["gift"])), "'methods' should be an object"),
        (
            lambda run: changed(run, lambda r: r["config"].update(methods={"gift": "x"})),
            "'gift': expected a list of methods",
        ),
        (lambda run: changed(run, lambda r: r.update(counts=3)), "'counts' should be an object, got '3'"),
        (lambda run: changed(run, lambda r: r["counts"].update(samples="40")), "'samples' should be a whole number"),
        (
            lambda run: changed(run, lambda r: r["environment"].update(speed=[1])),
            r"environment\.speed: expected numbers",
        ),
        (lambda run: changed(run, lambda r: r.pop("seed")), "needs 'seed'"),
        (
            lambda run: (run / "samples.jsonl").write_text('{"method": "x", "sample": 0, "score": {}}\n'),
            "'x' is not of this run",
        ),
    ],
)
def test_folders_that_are_no_runs(run: Path, break_it: Any, message: str) -> None:
    break_it(run)
    with pytest.raises((FileNotFoundError, ValueError), match=message):
        effects.read_runs(run)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        effects.read_runs(run / "nowhere")


def test_what_an_experiment_says_is_read(run: Path) -> None:
    out = run.parent / "effect"
    (out / "test").mkdir(parents=True)
    run.rename(out / "test" / "gift")
    write_run(out / "search" / "gift", {"alpha=1": BASE, "alpha=2": BASE}, max_new_tokens=9)
    facts = {"gift": {"searched": 9, "chosen": {}, "latency": 1.25, "low": 1.2, "high": 1.3}}
    (out / "settings.json").write_text(json.dumps(facts))
    for folder in (out, out / "test"):
        found = effects.effects(effects.read_runs(folder), experiment=effects.read_experiment(folder))
        assert list(found["methods"]) == ["baseline", "gift"]  # settings that were only tried are left out
        assert found["methods"]["gift"]["searched"] == 9
        assert found["methods"]["gift"]["latency"] == {"latency": 1.25, "low": 1.2, "high": 1.3}
        assert "1.25x" in report.effects_markdown(found)
    assert effects.read_experiment(out / "test" / "gift") == {}


def test_names_that_are_not_there(run: Path) -> None:
    with pytest.raises(ValueError, match="unknown method 'gft'; did you mean 'gift'"):
        effects.read_runs(run, ["gft"])
    with pytest.raises(ValueError, match="unknown method 'basline'; did you mean 'baseline'"):
        effects.read_runs(run, baseline="basline")
    alone = write_run(run.parent / "alone", {"gift": BETTER, "var": BASE})
    for folder, kept in ((run, ["baseline", "gift"]), (alone, ["gift"])):  # the plain model may be missing
        assert [list(r.records) for r in effects.read_runs(folder, ["gift"], baseline="baseline")] == [kept]
    runs = effects.read_runs(run)
    assert effects.read_counts(["gift=12"], runs) == {"gift": 12}
    for text, message in (("gift", "METHOD=NUMBER"), ("gift=x", "METHOD=NUMBER"), ("gft=1", "did you mean 'gift'")):
        with pytest.raises(ValueError, match=message):
            effects.read_counts([text], runs)


def test_frontier_keeps_what_nothing_beats() -> None:
    points = {"a": (1, 5), "b": (2, 3), "c": (2, 4), "d": (4, 1), "e": (4, 1), "f": (5, 5)}
    assert frontier(points) == {"a", "b", "d", "e"}


def test_objects_invented_and_missed() -> None:
    rows = [{"score": VOCABULARY.score(text, ["dog", "car"])} for text in ("a dog, a cat, cats", "a boat and a car")]
    assert effects.by_category("chair", rows) == {
        "cat": {"invented": 2, "missed": 0}, "car": {"invented": 0, "missed": 1},
        "boat": {"invented": 1, "missed": 0}, "dog": {"invented": 0, "missed": 1},
    }  # fmt: skip
    questions = [
        ("Is there a dining table in the image?", "no"),
        ("Is there an apple in the imange?", "yes"),
        ("Hm?", "no"),
    ]
    rows = [{"question": q, "label": label, "score": {"correct": False}} for q, label in questions]
    assert effects.by_category("pope", rows) == {
        "dining table": {"invented": 1, "missed": 0}, "apple": {"invented": 0, "missed": 1},
        "Hm?": {"invented": 1, "missed": 0},
    }  # fmt: skip
    assert pope.asked_object("Are there any kites in this picture?") == "kites"


def change(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high}


def test_marks_are_corrected_for_the_number_of_methods() -> None:
    """Holm by hand: of p = .001, .02, .03 only the first is below .05 / 3, the second misses .05 / 2 = .025 or not."""
    z = {0.001: 3.2905, 0.02: 2.3263, 0.03: 2.1701, 0.6: 0.5244}  # quantiles of the normal distribution, two-sided

    def of(p: float) -> dict[str, float]:
        return change(-z[p], -z[p] - 1.96, -z[p] + 1.96)  # standard error 1

    assert report.corrected({"a": of(0.001), "b": of(0.02), "c": of(0.03)}) == {"a", "b", "c"}  # .05/3, .05/2, .05/1
    assert report.corrected({"a": of(0.001), "b": of(0.03), "c": of(0.03)}) == {"a"}
    assert report.corrected({"b": of(0.03)}) == {"b"}
    assert report.corrected({"a": of(0.001), "b": of(0.6), "none": None}) == {"a"}
    assert report.corrected({"flat": change(0.0, 0.0, 0.0), "one": change(1.0, None, None)}) == set()  # type: ignore[arg-type]


def effects_of(**methods: dict[str, dict[str, float]]) -> dict[str, Any]:
    figures = {
        label: {"figures": {"chair": {key: {"value": 1.0, "difference": d} for key, d in changes.items()}}}
        for label, changes in methods.items()
    }
    return {"baseline": "baseline", "methods": {"baseline": {"figures": {"chair": {}}}, **figures}}


@pytest.mark.parametrize(
    ("invented", "recall", "answers"),
    [
        (change(-5, -7, -3), change(-0.2, -0.8, 0.4), ("yes (-5.0)", "yes (-0.2)")),
        (change(5, 3, 7), change(-3, -5, -1), ("no (+5.0)", "no (-3.0)")),
        (change(-1, -3, 1), change(-1, -3, 1), ("not shown (-1.0)", "not shown (-1.0)")),
        (change(0, 0, 0), change(0, 0, 0), ("not shown (no difference)", "yes (no difference)")),
    ],
)
def test_verdicts(invented: Any, recall: Any, answers: tuple[str, str]) -> None:
    found = report.verdicts(effects_of(gift={"chair_i": invented, "recall": recall}))
    assert found == {"gift": dict(zip(("fewer invented objects", "recall kept"), answers, strict=True))}


def test_a_gain_among_many_tries_is_not_a_verdict() -> None:
    """One of twenty at p = .03 is what chance gives."""
    lucky, idle = change(-2.17, -4.13, -0.21), change(0.1, -1.86, 2.06)
    tries = {f"m{n}": {"chair_i": lucky if n == 0 else idle} for n in range(20)}
    assert report.verdicts(effects_of(**tries))["m0"]["fewer invented objects"].startswith("not shown")
    assert report.verdicts(effects_of(m0=tries["m0"]))["m0"]["fewer invented objects"].startswith("yes")


def test_no_difference_is_said_in_one_sign(run: Path) -> None:
    text = report.effects_markdown(effects.effects(effects.read_runs(run)))
    assert "(0.0 to 0.0)" not in text
    assert "+0.0" not in text
    assert re.search(r"\| gift \|.* 100\.0 = \|", text)  # recall
    assert report.signed(change(-0.04, -0.06, 2.0)) == "0.0 (-0.1 to +2.0)"


def test_names_lie_in_the_frame_and_apart() -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axis = figure.subplots()
    points = [(f"method {n}", 1.0 + 0.001 * n, 2.0) for n in range(8)] + [("at the edge of it all", 5.0, 2.0)]
    for _, x, y in points:
        axis.plot(x, y, "o")
    figure.draw_without_rendering()
    place_labels(axis, points)
    frame = axis.get_window_extent()
    boxes = [text.get_window_extent() for text in axis.texts if text.get_text()]
    assert len(boxes) == len(points)
    assert all(frame.x0 <= b.x0 and b.x1 <= frame.x1 and frame.y0 <= b.y0 and b.y1 <= frame.y1 for b in boxes)
    assert not [(a, b) for n, a in enumerate(boxes) for b in boxes[:n] if a.overlaps(b)]


def test_page_marks_words_and_boxes_and_escapes(coco_folder: Path, run: Path) -> None:
    dataset = CocoDataset.from_folder(coco_folder)
    image = dataset.image_ids[0]  # 40 x 30, boxes at the corner
    text = "<b>a cat</b> & a dog"
    record = {"method": "baseline", "sample": 0, "image_id": image, "answer": text}
    record["score"] = VOCABULARY.score(text, ["dog"])
    runs = effects.read_runs(run)
    runs[0].records.update(baseline=[record], gift=[])
    html = page.section(effects.effects(runs), runs, [], dataset=dataset, worst=3)
    assert '&lt;b&gt;a <span class="false" title="not in the image">cat</span>&lt;/b&gt; &amp; a dog' in html
    assert html.count("<article>") == 1
    assert html.count("<rect") == len(dataset.objects(image))
    assert 'viewBox="0 0 40 30"' in html
    assert "<b>" not in html
    missing = CocoDataset(dataset.name, dataset.instances, None, lambda image: open_image(f"/nowhere/{image}"))
    assert "/nowhere/" in page.section(effects.effects(runs), runs, [], dataset=missing, worst=3)


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "120"})


def test_report_of_real_runs(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:
    params = ["--param", "gift.saliency_layers=[1]", "--param", "gift.enhance_layers=[1,2]"]
    shared = ["--data", coco_folder, "--method", "baseline", "--method", "gift", "--batch-size", 2, *params]
    out = tmp_path / "runs"
    done = call("eval", "chair", "pope", "--model", tiny_model_folder, "--device", "cpu", "--out", out, *shared)
    assert done.exit_code == 0, done.output
    done = call("report", out, "--data", coco_folder, "--worst", 3, "--json", tmp_path / "effects.json")
    assert done.exit_code == 0, done.output
    for title in ("CHAIR_S", "distinct-1", "adversarial", "time per token"):
        assert title in done.stdout
    (found,) = json.loads((tmp_path / "effects.json").read_text())
    for name in ("chair", "pope"):
        results = json.loads((out / name / "results.json").read_text())
        for label in ("baseline", "gift"):
            figures = found["methods"][label]["figures"][name]
            assert found["methods"][label]["speed"][name]["latency"] > 0
            for key, cell in figures.items():
                group, _, figure = key.rpartition(".")
                metrics = results["metrics"][label][group or results["config"].get("variant")]
                assert {k: cell[k] for k in ("value", "low", "high")} == metrics[figure], key
                if label == "gift":
                    base = found["methods"]["baseline"]["figures"][name][key]["value"]
                    assert cell["difference"]["value"] == pytest.approx(cell["value"] - base, abs=1e-9)
    folder = out / "report"
    assert {file.name for file in folder.iterdir()} == {"report.html", "report.md", "frontier.png", "categories.png"}
    html = (folder / "report.html").read_text()
    assert html.count("<article>") == 3
    assert html.count("data:image/jpeg") == 3
    assert html.count("data:image/png") == 2
    assert not re.search(r"(src|href)=\"(?!data:)", html)  # nothing is fetched
    assert "| baseline |" in (folder / "report.md").read_text()
    refused = call("report", out, "--data", tmp_path)
    assert refused.exit_code == 2


def test_speeds_stay_when_nothing_is_left_to_run(
    coco_folder: Path, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    task = chair_task(CocoDataset.from_folder(coco_folder), max_new_tokens=4)
    options = {"model_name": "tiny", "batch_size": 3, "out": tmp_path}
    first = runner.run(task, parse_specs(["baseline"]), *tiny_model, **options)["environment"]["speed"]
    assert first["baseline"]["samples"] == len(task.samples) - 3  # all but the batch that warms up
    assert first["baseline"]["tokens"] > 0
    assert runner.run(task, parse_specs(["baseline"]), *tiny_model, **options)["environment"]["speed"] == first


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
def test_report_fits_screens_and_paper(run: Path, width: int) -> None:
    """Opened as a file: nothing is cut, only tables scroll; it has a title and a date, and prints."""
    browsing = pytest.importorskip("tests.demo.browsing")
    if browsing.CHROMIUM is None:
        pytest.skip("no chromium here")
    done = call("report", run, "--worst", 3)
    assert done.exit_code == 0, done.output
    with browsing.sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browsing.CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        tab.goto((run / "report" / "report.html").as_uri())
        assert tab.title() == "m: gift against baseline"
        assert re.search(r"Made on \d{4}-\d{2}-\d{2}", tab.locator("p.facts").first.inner_text())
        assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
        cut = "[...document.querySelectorAll('table')].filter(t => t.scrollWidth > t.parentElement.clientWidth && "
        assert tab.evaluate(cut + "getComputedStyle(t.parentElement).overflowX != 'auto').length") == 0
        assert tab.locator("table.verdict td").all_inner_texts()[0] == "gift"
        assert len(tab.pdf()) > 10_000
        browsing.keep(tab, f"report-{width}.png")
        browser.close()
