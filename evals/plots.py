"""Pictures of a report: what a method buys with what, and which objects are invented."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evals._extras import require
from vlm_attn.evals.effects import Run, by_category

#: Per evaluation: (what is invented, low is good; what is found, high is good), with their titles.
FRONTIERS = {
    "chair": (("chair_i", "CHAIR_I, lower is better"), ("recall", "recall, higher is better")),
    "amber": (("generative.chair", "AMBER's CHAIR, lower is better"), ("generative.cover", "Cover, higher is better")),
}
CATEGORIES = 20  # of the bars
METHODS = 6  # of the bars


def frontier(points: Mapping[str, Sequence[float]]) -> set[str]:
    """The labels that no other one beats: at least as good in everything and better in something.

    Args:
        points: label -> numbers, low is good in each.
    """
    return {
        label
        for label, own in points.items()
        if not any(
            all(a <= b for a, b in zip(other, own, strict=True)) and tuple(other) != tuple(own)
            for other in points.values()
        )
    }


def plot_frontier(effects: Mapping[str, Any], path: Path) -> Path | None:
    """Draw hallucination against recall and against time; full marks are on the frontier of the three.

    Args:
        effects: of one model and data, from `effects.effects`.
        path: the PNG to write.

    Returns:
        the path, or None where no evaluation has both figures.
    """
    names = [name for name in FRONTIERS if name in effects["evals"]]
    if not names:
        return None
    require("matplotlib")
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.6 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    for row, name in zip(axes, names, strict=True):
        (bad, bad_title), (good, good_title) = FRONTIERS[name]
        entries = {label: e for label, e in effects["methods"].items() if name in e["figures"]}
        latency = {label: (e["latency"] or e["speed"].get(name, {})).get("latency") for label, e in entries.items()}
        if any(e["latency"] for e in entries.values()):  # measured in alternation with it
            latency[effects["baseline"]] = 1.0
        timed = all(value is not None for value in latency.values())
        points = {
            label: (
                e["figures"][name][bad]["value"],
                -e["figures"][name][good]["value"],
                latency[label] if timed else 0.0,
            )
            for label, e in entries.items()
        }
        best = frontier(points)
        for place, label in enumerate(entries):
            cells = entries[label]["figures"][name]
            style = {"color": f"C{place % 10}", "marker": "o" if label != effects["baseline"] else "s", "capsize": 2}
            style |= {"fillstyle": "full" if label in best else "none", "linestyle": "none"}
            row[0].errorbar(cells[good]["value"], cells[bad]["value"], _arms(cells[bad]), _arms(cells[good]), **style)
            row[0].annotate(label, (cells[good]["value"], cells[bad]["value"]), (4, 4), textcoords="offset points")
            if latency[label] is not None:
                row[1].errorbar(latency[label], cells[bad]["value"], _arms(cells[bad]), **style)
                row[1].annotate(label, (latency[label], cells[bad]["value"]), (4, 4), textcoords="offset points")
        row[0].set(xlabel=good_title, ylabel=bad_title)
        row[1].set(xlabel=f"time, times that of {effects['baseline']}", ylabel=bad_title)
        if not any(value is not None for value in latency.values()):
            row[1].set_axis_off()
    figure.suptitle("Full marks: no other method is better in one and as good in the others")
    figure.savefig(path, dpi=110)
    return path


def _arms(cell: Mapping[str, Any]) -> list[list[float]] | None:
    """Lengths of an error bar: [[below], [above]]."""
    if cell["low"] is None:
        return None
    return [[max(0.0, cell["value"] - cell["low"])], [max(0.0, cell["high"] - cell["value"])]]


def plot_categories(runs: Sequence[Run], methods: Sequence[str], path: Path) -> Path | None:
    """Draw bars: the objects that the methods invent and miss most, per 100 images.

    Args:
        runs: of one model and data.
        methods: labels; the first six are drawn.
        path: the PNG to write.

    Returns:
        the path, or None where nothing was invented and nothing missed.
    """
    require("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    for run in runs:
        counts = {label: by_category(run.eval, run.records.get(label, ())) for label in methods[:METHODS]}
        counts = {label: found for label, found in counts.items() if found}
        if counts:
            drawn.append((run, counts))
    if not drawn:
        return None
    figure = Figure(figsize=(12, 6 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 2, squeeze=False)
    for row, (run, counts) in zip(axes, drawn, strict=True):
        for axis, kind in zip(row, ("invented", "missed"), strict=True):
            total = {c: sum(f.get(c, {}).get(kind, 0) for f in counts.values()) for f in counts.values() for c in f}
            top = sorted((c for c in total if total[c]), key=lambda c: (-total[c], c))[:CATEGORIES]
            height = 0.8 / len(counts)
            for place, (label, found) in enumerate(counts.items()):
                images = max(1, len({record["image_id"] for record in run.records[label]}))
                values = [100 * found.get(category, {}).get(kind, 0) / images for category in top]
                axis.barh([i + place * height for i in range(len(top))], values, height, label=label)
            axis.set_yticks([i + 0.4 - height / 2 for i in range(len(top))], top)
            axis.set(title=f"{run.eval}: {kind}", xlabel="per 100 images")
            axis.invert_yaxis()
        row[0].legend(fontsize="small")
    figure.savefig(path, dpi=110)
    return path
