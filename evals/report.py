"""Results as tables: of one run in the terminal, and of many runs beside the plain model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
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
    "amber": {
        "chair": "CHAIR ↓",
        "cover": "Cover ↑",
        "hal": "Hal ↓",
        "cog": "Cog ↓",
        "accuracy": "accuracy",
        "precision": "precision",
        "recall": "recall",
        "f1": "F1",
        "score": "AMBER ↑",
    },
    "clipscore": {"clip_score": "CLIP-S ↑", "ref_clip_score": "RefCLIP-S ↑"},
    "mmhal": {"score": "score ↑", "hallucination_rate": "hallucinates ↓"},
}


def results_table(results: Mapping[str, Any]) -> Group:
    """A table per split (POPE), ground truth (CHAIR) or part (AMBER): a row per method, 95 % intervals below the values."""
    config, counts, name = results["config"], results["counts"], results["eval"]
    groups = list(dict.fromkeys(group for metrics in results["metrics"].values() for group in metrics))
    # Not twice the same: the mean of one split, reference captions that name nothing beyond the annotations.
    if (name == "pope" and len(groups) == 2) or (
        name == "chair" and all(len({str(m[group]) for group in groups}) == 1 for m in results["metrics"].values())
    ):
        groups = groups[:1]
    tables: list[Table | Text] = []
    for group in groups:
        rows = {label: metrics[group] for label, metrics in results["metrics"].items() if group in metrics}
        columns = {key: title for key, title in COLUMNS[name].items() if all(key in row for row in rows.values())}
        unparsed = name != "chair" and all("unparsed" in row for row in rows.values())
        title = {"mean": "mean of the splits"}.get(group, f"ground truth: {group}" if name == "chair" else group)
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", show_edge=False)
        table.add_column("", style="bold", overflow="fold", min_width=10)
        for title in columns.values():
            table.add_column(title, justify="right", no_wrap=True, min_width=9)
        if unparsed:
            table.add_column("unparsed", justify="right", no_wrap=True)
        for label, row in rows.items():
            finished, asked = counts["finished"][label], counts["samples"]
            part = "" if finished == asked else f"\n{finished} of {asked} done"
            cells = [_cell(row[column]) for column in columns]
            table.add_row(label + part, *cells, *([str(row["unparsed"])] if unparsed else []))
        tables += [table, Text("")]
    title = f"{name.upper()} of {config['model']} on {config['data']}, {config['images']} images"
    legend = "In percent, with the 95 % bootstrap interval over images."
    legend += {
        "chair": " Length in tokens. ↓ lower is better.",
        "amber": " Precision, recall and F1 of the answer no. ↓ lower is better.",
        "mmhal": " The score goes from 0 to 6.",
    }.get(name, "")
    return Group(Text(title, style="bold"), *tables, Text(legend, style="dim"))


def _cell(metric: Mapping[str, float | None]) -> str:
    low, high = metric["low"], metric["high"]
    if low is None or high is None:
        return f"{metric['value']:.1f}"
    # No decimals from 100 on: all columns have to fit into 80 characters.
    ends = "–".join(f"{end:.0f}" if end >= 99.95 else f"{end:.1f}" for end in (low, high))
    return f"{metric['value']:.1f}\n[dim]{ends}[/dim]"


def signed(metric: Mapping[str, float | None]) -> str:
    """A difference and its interval."""
    value, low, high = (round(metric[key] or 0.0, 1) + 0.0 for key in ("value", "low", "high"))
    if metric["low"] is None:
        return f"{value:+.1f}"
    return f"{value:+.1f} ({low:+.1f} to {high:+.1f})"


def clear(metric: Mapping[str, float | None]) -> bool:
    """Whether a difference's interval holds no 0."""
    low, high = metric["low"], metric["high"]
    return low is not None and high is not None and (low > 0 or high < 0)


# Per evaluation: figure -> title. An arrow says where better is.
EFFECTS: dict[str, dict[str, str]] = {
    "chair": {
        "chair_s": "CHAIR_S ↓",
        "chair_i": "CHAIR_I ↓",
        "recall": "recall ↑",
        "f1": "F1 ↑",
        "length": "length",
        "distinct_1": "distinct-1 ↑",
    },
    "amber": {
        "generative.chair": "CHAIR ↓",
        "generative.cover": "Cover ↑",
        "generative.hal": "Hal ↓",
        "generative.cog": "Cog ↓",
        "discriminative.accuracy": "accuracy ↑",
        "discriminative.f1": "F1 of no ↑",
        "amber.score": "AMBER ↑",
    },
}
POPE_FIGURES = {"accuracy": "accuracy ↑", "f1": "F1 ↑", "yes_ratio": "says yes"}


def effect_tables(effects: Mapping[str, Any]) -> Iterator[tuple[str, list[str], list[list[list[str]]]]]:
    """The tables of one model and data (`effects.effects`): title, head, rows of cells of lines.

    A value is followed by its difference to the baseline, with a * where the 95 % interval holds no 0, and by the interval.
    """
    methods = effects["methods"]
    for name, protocol in effects["evals"].items():
        shown = {label: entry["figures"][name] for label, entry in methods.items() if name in entry["figures"]}
        for title, titles in _titles(name, shown):
            rows = []
            for label, figures in shown.items():
                finished = protocol["finished"][label]
                part = [] if finished == protocol["samples"] else [f"{finished} of {protocol['samples']}"]
                rows.append([[label, *part], *(_effect_cell(figures.get(key)) for key in titles)])
            yield title, ["", *titles.values()], rows
    columns = {
        f"time per token, {NAMES[name]}": [_times(entry["speed"].get(name)) for entry in methods.values()]
        for name in effects["evals"]
    }
    columns["time of a batch"] = [_times(entry["latency"]) for entry in methods.values()]
    columns["settings tried"] = [
        "-" if entry["searched"] is None else str(entry["searched"]) for entry in methods.values()
    ]
    others = [label != effects["baseline"] for label in methods]
    columns = {
        title: cells
        for title, cells in columns.items()
        if any(cell != "-" and other for cell, other in zip(cells, others, strict=True))
    }
    if columns:
        yield "Cost", ["", *columns], [[[cell] for cell in row] for row in zip(methods, *columns.values(), strict=True)]


NAMES = {"chair": "CHAIR", "pope": "POPE", "amber": "AMBER"}
LEGEND = (
    "In percent; length in tokens. Signed: the difference to {baseline}, with its 95 % interval (paired bootstrap over "
    "images); * where that holds no 0. Time: per generated token, its prompt included, over that of {baseline} in the same "
    "run; of a batch of captions, in alternation with {baseline}."
)


def _titles(name: str, shown: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, dict[str, str]]]:
    """The tables of an evaluation: title, and figure -> title of its column."""
    present = list(dict.fromkeys(key for figures in shown.values() for key in figures))
    if name != "pope":
        return [(NAMES[name], {key: title for key, title in EFFECTS[name].items() if key in present})]
    splits = list(dict.fromkeys(key.rpartition(".")[0] for key in present))
    return [
        (f"POPE: {title}", {f"{split}.{figure}": split for split in splits}) for figure, title in POPE_FIGURES.items()
    ]


def _effect_cell(figure: Mapping[str, Any] | None) -> list[str]:
    if figure is None:
        return ["-"]
    difference = figure.get("difference")
    if not difference:
        return [f"{figure['value']:.1f}"]
    change, _, interval = signed(difference).partition(" ")
    return [f"{figure['value']:.1f}", change + " *" * clear(difference), *([interval] if interval else [])]


def _times(speed: Mapping[str, float] | None) -> str:
    return f"{speed['latency']:.2f}x" if speed and "latency" in speed else "-"


def effects_group(effects: Mapping[str, Any]) -> Group:
    """The tables for the terminal."""
    parts: list[Table | Text] = [Text(f"{effects['model']} on {effects['data']}", style="bold")]
    for title, head, rows in effect_tables(effects):
        table = Table(box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title=title, title_justify="left", show_edge=False)
        for place, column in enumerate(head):
            table.add_column(column, justify="right" if place else "left", overflow="fold", no_wrap=not place)
        for row in rows:
            table.add_row(*("\n".join([cell[0], *(f"[dim]{line}[/dim]" for line in cell[1:])]) for cell in row))
        parts += [table, Text("")]
    return Group(*parts, *(Text(line, style="dim") for line in notes(effects)))


def effects_markdown(effects: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"## {effects['model']} on {effects['data']}", ""]
    for title, head, rows in effect_tables(effects):
        lines += [f"### {title}", "", _markdown_row(head), "|" + "---|" * len(head)]
        lines += [_markdown_row([" ".join(cell) for cell in row]) for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"{line}\n" for line in notes(effects))])


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def notes(effects: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the tables."""
    lines = [LEGEND.format(baseline=effects["baseline"])] if effects["baseline"] else ["In percent; length in tokens."]
    for name, protocol in effects["evals"].items():
        facts = [f"{protocol['images']} images", f"prompt {protocol['prompt']!r}"]
        facts += [
            f"{key.replace('_', ' ')} {protocol[key]}" for key in ("variant", "parser", "similarity") if key in protocol
        ]
        facts += [f"at most {protocol['max_new_tokens']} tokens", f"ids {protocol['image_ids_sha256'][:12]}"]
        if protocol["skipped"]:
            facts.append(f"{protocol['skipped']} samples skipped, their pictures cannot be read")
        lines.append(f"{NAMES[name]}: {', '.join(facts)}.")
    return lines + ([effects["note"]] if "note" in effects else [])
