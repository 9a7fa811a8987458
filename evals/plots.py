# SPDX-License-Identifier: Apache-2.0
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

    figure = Figure(figsize=(12, 5.5 * len(names)), layout="constrained")
    axes = figure.subplots(len(names), 2, squeeze=False)
    named: list[tuple[Any, list[tuple[str, float, float]]]] = []
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
        labels: tuple[list[Any], list[Any]] = ([], [])
        for place, label in enumerate(entries):
            cells = entries[label]["figures"][name]
            style: dict[str, Any] = {
                "color": f"C{place % 10}",
                "marker": "o" if label != effects["baseline"] else "s",
                "capsize": 2,
            }
            style |= {
                "fillstyle": "full" if label in best else "none",
                "linestyle": "none",
                "elinewidth": 0.7,
                "alpha": 0.85,
            }
            row[0].errorbar(cells[good]["value"], cells[bad]["value"], _arms(cells[bad]), _arms(cells[good]), **style)
            labels[0].append((label, cells[good]["value"], cells[bad]["value"]))
            if latency[label] is not None:
                row[1].errorbar(latency[label], cells[bad]["value"], _arms(cells[bad]), **style)
                labels[1].append((label, latency[label], cells[bad]["value"]))
        row[0].set(xlabel=good_title, ylabel=bad_title)
        row[1].set(xlabel=f"time, times that of {effects['baseline']}", ylabel=bad_title)
        times = [value for value in latency.values() if value is not None]
        if not times:
            row[1].set_axis_off()
        elif max(times) > 4 * min(times):
            row[1].set_xscale("log", base=2)
            row[1].xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        named += zip(row, labels, strict=True)
    figure.suptitle("Full marks: no other method is better in one and as good in the others")
    for axis, _ in named:
        axis.margins(0.12)
    figure.draw_without_rendering()  # now it is known where everything stands, and it stays there
    figure.set_layout_engine("none")
    for axis, items in named:
        place_labels(axis, items)
    figure.savefig(path, dpi=130)
    return path


def place_labels(axis: Any, items: Sequence[tuple[str, float, float]]) -> None:
    """Write a name to every point, inside the frame and off the other points and names; with a thin line where it is far.

    Args:
        axis: of a figure that has been laid out.
        items: name, x, y of every point.
    """
    from matplotlib.patheffects import withStroke

    frame = axis.get_window_extent()
    spots = [axis.transData.transform((x, y)) for _, x, y in items]
    taken = [(x - 5, y - 5, x + 5, y + 5) for x, y in spots]
    scale = axis.figure.dpi / 72
    for (label, x, y), (px, py) in zip(items, spots, strict=True):
        note = axis.annotate(label, (x, y), (0, 0), textcoords="offset points", fontsize="small", zorder=9)
        note.set_path_effects([withStroke(linewidth=2, foreground="white")])  # readable over error bars
        size = note.get_window_extent()
        best = min(
            _spots(px, py, size.width, size.height),
            key=lambda box: (
                sum(_overlap(box, other) for other in taken) + 10 * _outside(box, frame.extents),
                abs(box[0] + box[2] - 2 * px) + abs(box[1] + box[3] - 2 * py),
            ),
        )
        note.set_position(((best[0] - px) / scale, (best[1] - py) / scale))
        if max(px - best[2], best[0] - px, py - best[3], best[1] - py) > 12:
            axis.annotate(
                "",
                (x, y),
                (((best[0] + best[2]) / 2 - px) / scale, ((best[1] + best[3]) / 2 - py) / scale),
                textcoords="offset points",
                arrowprops={"arrowstyle": "-", "lw": 0.5, "color": "0.5", "shrinkA": 8},
            )
        taken.append(best)


Box = tuple[float, float, float, float]


def _spots(x: float, y: float, width: float, height: float) -> list[Box]:
    """Boxes around a point, near ones first."""
    found = []
    for ring in (6, 14, 24, 38, 56, 80):
        for dx, dy in ((1, 0), (1, 1), (1, -1), (-1, 0), (-1, 1), (-1, -1), (0, 1), (0, -1)):
            left = x + dx * ring - (width if dx < 0 else width / 2 if dx == 0 else 0)
            low = y + dy * ring - (height if dy < 0 else height / 2 if dy == 0 else 0)
            found.append((left, low, left + width, low + height))
    return found


def _overlap(a: Box, b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def _outside(box: Box, frame: Sequence[float]) -> float:
    """The part of a box beyond a frame."""
    return (box[2] - box[0]) * (box[3] - box[1]) - _overlap(box, frame)


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
    figure = Figure(figsize=(12, 7 * len(drawn)), layout="constrained")
    axes = figure.subplots(len(drawn), 2, squeeze=False)
    named: dict[str, Any] = {}
    for row, (run, counts) in zip(axes, drawn, strict=True):
        for axis, kind in zip(row, ("invented", "missed"), strict=True):
            total = {c: sum(f.get(c, {}).get(kind, 0) for f in counts.values()) for f in counts.values() for c in f}
            top = sorted((c for c in total if total[c]), key=lambda c: (-total[c], c))[:CATEGORIES]
            height = 0.8 / len(counts)
            for place, (label, found) in enumerate(counts.items()):
                images = max(1, len({record["image_id"] for record in run.records[label]}))
                values = [100 * found.get(category, {}).get(kind, 0) / images for category in top]
                bars = axis.barh(
                    [i + place * height for i in range(len(top))], values, height, color=f"C{methods.index(label)}"
                )
                named.setdefault(label, bars)
            axis.set_yticks([i + 0.4 - height / 2 for i in range(len(top))], top)
            axis.set(title=f"{run.eval}: {kind}", xlabel="per 100 images")
            axis.invert_yaxis()
    figure.legend(named.values(), named.keys(), loc="outside upper center", ncols=METHODS)  # not over the bars
    figure.savefig(path, dpi=130)
    return path
