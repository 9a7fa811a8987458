# SPDX-License-Identifier: Apache-2.0
"""What methods change: every figure of finished runs, with its paired difference against the plain model.

Everything is computed from the lines of ``samples.jsonl``: the images are drawn again for a method and the baseline together,
so the interval is that of their difference over the same images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from vlm_attn.evals import amber, chair, pope
from vlm_attn.evals.reading import read_ids, read_json
from vlm_attn.evals.runner import TOP_LEVEL
from vlm_attn.evals.samples import check_record, check_results, read_records
from vlm_attn.evals.specs import BASELINE, unknown
from vlm_attn.evals.stats import Pair, difference, mean_of_ratios
from vlm_attn.evals.tasks import image_ids_hash

Record = Mapping[str, Any]
# What two runs of one evaluation may differ in and still stand in one table.
FREE = ("methods", "batch_size", "device", "seed")
# How the parts of a report are told apart.
WORLD = ("model", "weights", "data")


@dataclass(frozen=True)
class Run:
    """A results folder: what ``vlm-attn eval --out`` wrote, complete or not."""

    folder: Path
    results: dict[str, Any]
    records: dict[str, list[dict[str, Any]]]

    @property
    def eval(self) -> str:
        """The evaluation's name."""
        return self.results["eval"]

    @property
    def config(self) -> dict[str, Any]:
        """What decides about the figures."""
        return {**self.results["config"], **{key: self.results[key] for key in TOP_LEVEL}}


@dataclass(frozen=True)
class Figure:
    """A figure of one method: the mean over ``pairs`` of ``scale * sum(numerator) / sum(denominator)``."""

    pairs: Sequence[Pair]
    scale: float = 100.0


def _chair(records: Sequence[Record]) -> dict[str, Figure]:
    vocabulary = chair.coco_vocabulary()
    columns = chair.columns_of([vocabulary.score(r["answer"], r["score"]["truth"]) for r in records])
    return {name: Figure([pair], chair.SCALES.get(name, 100.0)) for name, pair in columns.items()}


def _pope(records: Sequence[Record]) -> dict[str, Figure]:
    columns = pope.columns_of(pope.by_split(records))
    figures = {f"{split}.{name}": Figure([pair]) for split, of in columns.items() for name, pair in of.items()}
    if len(columns) > 1:
        figures |= {f"mean.{name}": Figure([of[name] for of in columns.values()]) for name in pope.METRICS}
    return figures


def _amber(records: Sequence[Record]) -> dict[str, Figure]:
    columns = amber.columns_of(records)
    figures = {
        f"{part}.{name}": Figure([pair]) for part, of in columns.items() for name, pair in of.items() if name != "safe"
    }
    pairs = amber.amber_score(columns)
    return figures | ({} if pairs is None else {"amber.score": Figure(pairs)})


#: Per evaluation: records of one method -> its figures.
FIGURES: dict[str, Callable[[Sequence[Record]], dict[str, Figure]]] = {"chair": _chair, "pope": _pope, "amber": _amber}


def read_runs(folder: str | Path, methods: Sequence[str] | None = None, *, baseline: str | None = None) -> list[Run]:
    """The results folders in a folder, itself included, in the order of their names.

    Args:
        folder: any folder.
        methods: labels to keep; None: all.
        baseline: what the others are compared with: kept as well, and only the plain model may be missing.

    Raises:
        FileNotFoundError: there is none.
        ValueError: a ``results.json`` that is not of this package, a damaged record, a label that no run has.
    """
    root = Path(folder)
    searched = root / "search"  # of an experiment: settings that were tried, no results of it
    files = sorted(file for file in root.rglob("results.json") if searched not in file.parents) if root.is_dir() else []
    if not files:
        raise FileNotFoundError(f"{root}: no results.json in this folder or below; give the --out of `vlm-attn eval`")
    runs = []
    for file in files:
        results = check_results(file, read_json(file), TOP_LEVEL)
        if results["eval"] not in FIGURES:
            raise unknown("evaluation", f"{results['eval']} ({file})", list(FIGURES))
        records = _records_of(file.parent, results)
        runs.append(Run(file.parent, results, records))
    labels = list(dict.fromkeys(label for run in runs for label in run.records))
    for label in (*(methods or ()), *([baseline] if baseline not in (None, BASELINE) else [])):
        if label not in labels:
            raise unknown("method", label, labels)
    if methods is not None:
        wanted = {*methods, baseline}
        runs = [replace(r, records={k: v for k, v in r.records.items() if k in wanted}) for r in runs]
    return runs


def _records_of(folder: Path, results: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """The answered records of every method, checked one by one and against each other.

    Raises:
        ValueError: naming the line: not of this run, written twice, about another image, or not as a run writes it.
    """
    samples, listed = folder / "samples.jsonl", folder / "image_ids.txt"
    images = set(read_ids(listed)) if listed.is_file() else None
    if images is not None and image_ids_hash(read_ids(listed)) != results["image_ids_sha256"]:
        raise ValueError(f"{listed}: these are not the images of results.json (their hash differs)")
    records: dict[str, list[dict[str, Any]]] = {label: [] for label in results["config"]["methods"]}
    seen: dict[tuple[str, int], int] = {}
    image_of: dict[int, tuple[int, int]] = {}
    for number, record in enumerate(read_records(samples), start=1):
        where = f"{samples}, line {number}"
        label, sample = record["method"], record["sample"]
        if label not in records:
            raise ValueError(f"{where}: method {label!r} is not of this run")
        check_record(where, results["eval"], record)
        if (label, sample) in seen:
            raise ValueError(f"{where}: sample {sample} of {label} was in line {seen[label, sample]} already")
        if sample >= results["counts"]["samples"]:
            raise ValueError(f"{where}: sample {sample} of a run with {results['counts']['samples']} samples")
        image, first = image_of.setdefault(sample, (record["image_id"], number))
        if image != record["image_id"] or (images is not None and image not in images):
            known = f"in line {first} of image {image}" if image != record["image_id"] else "the run did not use it"
            raise ValueError(f"{where}: sample {sample} is of image {record['image_id']}; {known}")
        seen[label, sample] = number
        if "skipped" not in record:
            records[label].append(record)
    return records


def read_experiment(folder: str | Path) -> dict[str, dict[str, Any]]:
    """What ``vlm-attn experiment`` wrote about its runs beside or above this folder: label -> ``searched``, ``latency`` ...

    Empty where there is no experiment. Its latency is measured in alternation with the plain model.
    """
    for place in (Path(folder), Path(folder).absolute().parent):
        if (place / "settings.json").is_file() and (place / "test").is_dir():
            return read_json(place / "settings.json")
    return {}


def read_counts(texts: Sequence[str], runs: Sequence[Run]) -> dict[str, int]:
    """``["gift=12"]`` as numbers by label.

    Raises:
        ValueError: not a label of the runs with a number from 0 on.
    """
    labels = list(dict.fromkeys(label for run in runs for label in run.records))
    counts = {}
    for text in texts:
        label, _, count = text.rpartition("=")
        if not (label and count.isdecimal()):
            raise ValueError(f"--searched {text!r}: expected METHOD=NUMBER, for example gift=12")
        if label not in labels:
            raise unknown("method", label, labels)
        counts[label] = int(count)
    return counts


def worlds(runs: Sequence[Run]) -> list[list[Run]]:
    """The runs of every model and data."""
    found: dict[tuple[Any, ...], list[Run]] = {}
    for run in runs:
        found.setdefault(tuple(run.config.get(key) for key in WORLD), []).append(run)
    return list(found.values())


def effects(
    runs: Sequence[Run], *, baseline: str = BASELINE, experiment: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """Figures and differences of one model on one data set.

    Args:
        runs: of one model and data (`worlds`).
        baseline: the method that others are compared with.
        experiment: from `read_experiment`.

    Returns:
        ``model``, ``data``, ``weights``; ``baseline`` (None where it was not run); ``evals``, the protocol of each evaluation;
        ``methods``: label -> ``methods`` (names and parameters), ``searched`` (None where it is not recorded), ``latency`` (of
        `read_experiment`, or None), ``figures`` and ``speed`` per evaluation. A figure is ``value``, ``low``, ``high`` and
        ``difference``, the same of the difference to the baseline. A speed is ``tokens_per_second``, ``seconds_per_answer``
        and ``latency``: time per generated token, the prompt's included, over the baseline's of the same results folder.

    Raises:
        ValueError: runs that cannot stand in one table.
    """
    evals: dict[str, list[Run]] = {}
    for run in runs:
        evals.setdefault(run.eval, []).append(run)
    labels = dict.fromkeys(label for run in runs for label, records in run.records.items() if records)
    labels = dict.fromkeys([*[label for label in labels if label == baseline], *labels])
    methods: dict[str, dict[str, Any]] = {
        label: {"methods": None, "searched": None, "latency": None, "figures": {}, "speed": {}} for label in labels
    }
    for label, facts in (experiment or {}).items():
        if label in methods:
            methods[label]["searched"] = facts.get("searched")
            methods[label]["latency"] = (
                {k: facts[k] for k in ("latency", "low", "high")} if "latency" in facts else None
            )
    protocols = {}
    for name, members in evals.items():
        _check_protocol(members)
        owner = _owners(members)
        config = {key: value for key, value in members[0].config.items() if key not in FREE}
        protocols[name] = {
            **config,
            "folders": [str(run.folder) for run in members],
            "samples": members[0].results["counts"]["samples"],
            "finished": {label: len(run.records[label]) for label, run in owner.items()},
            "skipped": members[0].results["counts"].get("skipped", 0),
        }
        base = owner[baseline].records[baseline] if baseline in owner else None
        for label, run in owner.items():
            described = run.results["config"]["methods"][label]
            methods[label]["methods"] = described
            if methods[label]["searched"] is None:
                methods[label]["searched"] = next((m["searched"] for m in described if "searched" in m), None)
            methods[label]["figures"][name] = _compared(name, run.records[label], base if label != baseline else None)
            speed = _speed(run, label, baseline)
            if speed:
                methods[label]["speed"][name] = speed
    first = runs[0].config
    return {
        **{key: first.get(key) for key in WORLD},
        "baseline": baseline if baseline in labels else None,
        "evals": protocols,
        "methods": methods,
        **({"note": runs[0].results["note"]} if "note" in runs[0].results else {}),
    }


def _check_protocol(runs: Sequence[Run]) -> None:
    """Refuse runs of one evaluation whose figures do not compare."""
    first = runs[0]
    for run in runs[1:]:
        keys = dict.fromkeys([*first.config, *run.config])
        changed = [key for key in keys if key not in FREE and first.config.get(key) != run.config.get(key)]
        if changed:
            raise ValueError(
                f"{first.folder} and {run.folder} are both {run.eval} of {run.config['model']} but differ in "
                f"{', '.join(changed)}: report them one by one"
            )


def _owners(runs: Sequence[Run]) -> dict[str, Run]:
    """Which run a method's figures come from: the one that finished most of it."""
    owner: dict[str, Run] = {}
    for run in runs:
        for label, records in run.records.items():
            if not records:
                continue
            if label in owner:
                known, other = (r.results["config"]["methods"][label] for r in (owner[label], run))
                if known != other:
                    raise ValueError(
                        f"{owner[label].folder} and {run.folder} both have a run {label!r}, with different parameters: "
                        "report them one by one"
                    )
            if label not in owner or len(records) > len(owner[label].records[label]):
                owner[label] = run
    return owner


def _compared(name: str, records: Sequence[Record], base: Sequence[Record] | None) -> dict[str, Any]:
    """Every figure with its interval, and with its difference over the samples that both sides have."""
    cells: dict[str, Any] = {
        key: mean_of_ratios(figure.pairs, scale=figure.scale) for key, figure in FIGURES[name](records).items()
    }
    if base is None:
        return cells
    common = {r["sample"] for r in records} & {r["sample"] for r in base}
    ours, theirs = (FIGURES[name]([r for r in side if r["sample"] in common]) for side in (records, base))
    for key, cell in cells.items():
        if key in ours and key in theirs:
            cell["difference"] = difference(ours[key].pairs, theirs[key].pairs, scale=ours[key].scale)
    return cells


def _speed(run: Run, label: str, baseline: str) -> dict[str, float] | None:
    speeds = run.results.get("environment", {}).get("speed", {})
    if not speeds.get(label, {}).get("seconds") or "tokens" not in speeds[label]:
        return None
    own, base = (speeds.get(name) or {"tokens": 0} for name in (label, baseline))
    found = {"tokens_per_second": own["tokens"] / own["seconds"], "seconds_per_answer": own["seconds"] / own["samples"]}
    if own["tokens"] and base["tokens"] and base["seconds"]:
        found["latency"] = own["seconds"] / own["tokens"] / (base["seconds"] / base["tokens"])
    return found


def by_category(name: str, records: Sequence[Record]) -> dict[str, dict[str, int]]:
    """How often every object is invented and missed.

    Args:
        name: of the evaluation.
        records: of one method.

    Returns:
        category -> ``invented`` and ``missed``. Captions (CHAIR, AMBER): mentions of what is not there, and images with the
        object whose caption does not name it. POPE: answers yes to what is not there, and other answers than yes to what is.
    """
    counts: dict[str, dict[str, int]] = {}

    def add(category: str, kind: str) -> None:
        counts.setdefault(category, {"invented": 0, "missed": 0})[kind] += 1

    for record in records:
        if name == "pope":
            if not record["score"]["correct"]:
                add(pope.asked_object(record["question"]), "invented" if record["label"] == "no" else "missed")
            continue
        mentions = record["score"].get("mentions", ())  # AMBER's questions are about more than objects: captions only
        named = {mention["category"] for mention in mentions}
        for mention in mentions:
            if mention["hallucinated"]:
                add(mention["category"], "invented")
        for category in dict.fromkeys(record["score"].get("truth", ())):
            if category not in named:
                add(category, "missed")
    return counts


def faults(record: Record) -> int:
    """How many things one answer gets wrong: objects it invents, or the answer itself."""
    score = record["score"]
    if "mentions" in score:
        return sum(mention["hallucinated"] for mention in score["mentions"])
    return int(not score["correct"])
