"""Results as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

COLUMNS = {
    "pope": {
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "yes_ratio": "says yes",
    },
    "chair": {
        "chair_s": "CHAIR_S ↓",
        "chair_i": "CHAIR_I ↓",
        "recall": "recall ↑",
        "precision": "prec. ↑",
        "f1": "F1 ↑",
        "length": "length",
    },
}


def results_table(results: Mapping[str, Any]) -> Group:
    """A table per split (POPE) or ground truth (CHAIR): one row per method, 95 % intervals below the values."""
    config, counts, columns = results["config"], results["counts"], COLUMNS[results["eval"]]
    pope = results["eval"] == "pope"
    groups = list(dict.fromkeys(group for metrics in results["metrics"].values() for group in metrics))
    # Not twice the same: the mean of one split, reference captions that name nothing beyond the annotations.
    if (pope and len(groups) == 2) or (
        not pope and all(len({str(m[group]) for group in groups}) == 1 for m in results["metrics"].values())
    ):
        groups = groups[:1]
    tables: list[Table | Text] = []
    for group in groups:
        name = {"mean": "mean of the splits"}.get(group, f"ground truth: {group}" if not pope else group)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=name, title_justify="left", show_edge=False)
        table.add_column("", style="bold", overflow="fold", min_width=10)
        for title in columns.values():
            table.add_column(title, justify="right", no_wrap=True, min_width=9)
        if pope:
            table.add_column("unparsed", justify="right", no_wrap=True)
        for label, metrics in results["metrics"].items():
            finished, asked = counts["finished"][label], counts["samples"]
            part = "" if finished == asked else f"\n{finished} of {asked} done"
            cells = [_cell(metrics[group][column]) for column in columns]
            if pope:
                cells.append(str(metrics[group]["unparsed"]))
            table.add_row(label + part, *cells)
        tables += [table, Text("")]
    title = f"{results['eval'].upper()} of {config['model']} on {config['data']}, {config['images']} images"
    legend = "In percent, with the 95 % bootstrap interval over images."
    if not pope:
        legend += " Length in tokens. ↓ lower is better."
    return Group(Text(title, style="bold"), *tables, Text(legend, style="dim"))


def _cell(metric: Mapping[str, float | None]) -> str:
    low, high = metric["low"], metric["high"]
    if low is None or high is None:
        return f"{metric['value']:.1f}"
    # No decimals from 100 on: all columns have to fit into 80 characters.
    ends = "–".join(f"{end:.0f}" if end >= 99.95 else f"{end:.1f}" for end in (low, high))
    return f"{metric['value']:.1f}\n[dim]{ends}[/dim]"
