# SPDX-License-Identifier: Apache-2.0
"""Results as tables: of one run in the terminal, and of many runs beside the plain model."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from vlm_attn.evals.stats import ROUNDING

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
        title += _share(config) if name == "chair" and "captions" in group else ""
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


def _share(config: Mapping[str, Any]) -> str:
    """How many of the images have reference captions, where not all have."""
    described, images = config.get("images_described", config["images"]), config["images"]
    return "" if described == images else f" (captions of {described} of {images} images, {described / images:.0%})"


def remarks(results: Mapping[str, Any]) -> list[str]:
    """What a reader has to know of a run's figures that the table does not show: one sentence each."""
    said = []
    config = results["config"]
    if (
        results["eval"] == "chair"
        and _share(config)
        and any("captions" in group for m in results["metrics"].values() for group in m)
    ):
        said.append(
            f"Only {config['images_described']} of {config['images']} images have reference captions: the ground truth of the "
            "others is that of instances alone, which raises CHAIR."
        )
    for label, metrics in results["metrics"].items():
        row = metrics.get("mean", metrics.get("discriminative", {})) if results["eval"] in ("pope", "amber") else {}
        if not row.get("disagree"):
            continue
        rule = results.get("parser", "official")
        if row["no_read_as_yes"] == row["plain_no"] > 0:
            said.append(
                f"{label}: every no ({row['plain_no']} answers) was read as yes by the rule {rule!r}, so these figures do not "
                "say what the model answered. --parser strict reads the first word."
            )
        said.append(
            f"{label}: {row['disagree']} of {row['questions']} answers begin with another word than the rule {rule!r} reads; "
            f"{row['no_read_as_yes']} of the {row['plain_no']} that begin with no were read as yes."
        )
    return said


def _cell(metric: Mapping[str, float | None]) -> str:
    low, high = metric["low"], metric["high"]
    if low is None or high is None:
        return f"{metric['value']:.1f}"
    # No decimals from 100 on: all columns have to fit into 80 characters.
    ends = "–".join(f"{end:.0f}" if end >= 99.95 else f"{end:.1f}" for end in (low, high))
    return f"{metric['value']:.1f}\n[dim]{ends}[/dim]"


def signed(metric: Mapping[str, float | None]) -> str:
    """A difference and its interval."""
    rounded = (round(metric[key] or 0.0, 1) for key in ("value", "low", "high"))
    value, low, high = (f"{number:+.1f}" if number else "0.0" for number in rounded)
    return value if metric["low"] is None else f"{value} ({low} to {high})"


def clear(metric: Mapping[str, float | None]) -> bool:
    """Whether a difference's interval holds no 0; an end that is 0 but for rounding holds it."""
    low, high = metric["low"], metric["high"]
    return low is not None and high is not None and (low > ROUNDING or high < -ROUNDING)


def same(metric: Mapping[str, float | None]) -> bool:
    """Whether a difference and its interval are 0 to the shown decimal."""
    return not any(round(metric[key] or 0.0, 1) for key in ("value", "low", "high"))


def corrected(differences: Mapping[str, Mapping[str, float | None] | None], level: float = 0.05) -> set[str]:
    """The labels whose difference is `clear` also when all of them are asked at once (Holm's step-down procedure).

    Args:
        differences: label -> a difference with its 95 % interval; None where there is none.
        level: chance of one wrong label or more.

    The probability of a difference comes from its interval's width, as if it were normally distributed.
    """
    asked = {label: m for label, m in differences.items() if m is not None and m["low"] is not None}
    found: set[str] = set()
    for place, (p, label) in enumerate(sorted((_probability(m), label) for label, m in asked.items())):
        if p > level / (len(asked) - place):
            break
        if clear(asked[label]):
            found.add(label)
    return found


def _probability(metric: Mapping[str, float | None]) -> float:
    """Two-sided, of a difference at least that large where there is none."""
    value, low, high = (metric[key] or 0.0 for key in ("value", "low", "high"))
    if high <= low:
        return 1.0 if value == 0 else 0.0
    return math.erfc(abs(value) / ((high - low) / (2 * 1.96)) / math.sqrt(2))


#: Per evaluation of captions: (what is invented, what is found).
INVENTED_AND_FOUND = {"chair": ("chair_i", "recall"), "amber": ("generative.chair", "generative.cover")}
MARGIN = 1.0  # points that recall may lose and still be kept


def verdicts(effects: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """What can be said of every method against the baseline: label -> question -> answer.

    Questions of captions: ``fewer invented objects``, ``recall kept``; of yes/no questions: ``more right answers``. Answers are
    yes, no or not shown, each with its difference.
    """
    found: dict[str, dict[str, str]] = {label: {} for label in effects["methods"] if label != effects["baseline"]}

    def differences(name: str, key: str) -> dict[str, Any]:
        figures = {label: effects["methods"][label]["figures"].get(name, {}) for label in found}
        return {label: of[key]["difference"] for label, of in figures.items() if "difference" in of.get(key, {})}

    def answer(label: str, question: str, metric: Mapping[str, Any], *, yes: bool, no: bool) -> None:
        change = "no difference" if same(metric) else signed(metric).split()[0]
        word = "yes" if yes else "no" if no and clear(metric) else "not shown"
        found[label].setdefault(question, f"{word} ({change})")

    for name, (invented, named) in INVENTED_AND_FOUND.items():
        sure = corrected(changes := differences(name, invented))
        for label, metric in changes.items():
            fewer = label in sure and metric["value"] < 0
            answer(label, "fewer invented objects", metric, yes=fewer, no=metric["value"] > 0)
        for label, metric in differences(name, named).items():
            kept = metric["low"] is not None and metric["low"] > -MARGIN
            answer(label, "recall kept", metric, yes=kept, no=metric["value"] < 0)
    keys = dict.fromkeys(key for entry in effects["methods"].values() for key in entry["figures"].get("pope", {}))
    f1 = [key for key in keys if key.endswith(".f1")]
    for key in [key for key in f1 if key == "mean.f1"] or f1[:1]:
        sure = corrected(changes := differences("pope", key))
        for label, metric in changes.items():
            right = label in sure and metric["value"] > 0
            answer(label, "more right answers", metric, yes=right, no=metric["value"] < 0)
    return {label: answers for label, answers in found.items() if answers}


def verdict_lines(effects: Mapping[str, Any]) -> list[str]:
    """`verdicts` as sentences, and what their words mean."""
    lines = [
        f"{label}: {'; '.join(f'{question}: {word}' for question, word in answers.items())}."
        for label, answers in verdicts(effects).items()
    ]
    return [*lines, VERDICT] if lines else []


VERDICT = (
    "Fewer invented objects: yes where CHAIR_I (AMBER: CHAIR) falls and the difference is marked **; no where it rises and is "
    f"marked * or **. Recall kept: yes where the interval's lower end is above -{MARGIN:g} point; no where recall falls and is "
    "marked. More right answers: the same for POPE's F1. Otherwise not shown: these images do not tell."
)


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

    A value is followed by its difference to the baseline and by the difference's interval, or by = where both are 0. A * says
    that the 95 % interval holds no 0, ** that this stands when all methods of the column are asked at once (`corrected`).
    """
    methods = effects["methods"]
    for name, protocol in effects["evals"].items():
        shown = {label: entry["figures"][name] for label, entry in methods.items() if name in entry["figures"]}
        for title, titles in _titles(name, shown):
            rows = []
            sure = {
                key: corrected({label: f.get(key, {}).get("difference") for label, f in shown.items()})
                for key in titles
            }
            for label, figures in shown.items():
                finished = protocol["finished"][label]
                part = [] if finished == protocol["samples"] else [f"{finished} of {protocol['samples']}"]
                rows.append([[label, *part], *(_effect_cell(figures.get(key), label in sure[key]) for key in titles)])
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
    "images), or = where both are 0.0; * where the interval holds no 0, ** where that stands after Holm's correction for the "
    "number of methods in the column. Time: per generated token, its prompt included, over that of {baseline} in the same "
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


def _effect_cell(figure: Mapping[str, Any] | None, sure: bool) -> list[str]:
    if figure is None:
        return ["-"]
    difference = figure.get("difference")
    if not difference:
        return [f"{figure['value']:.1f}"]
    if same(difference):
        return [f"{figure['value']:.1f}", "="]
    change, _, interval = signed(difference).partition(" ")
    mark = " **" if sure else " *" * clear(difference)
    return [f"{figure['value']:.1f}", change + mark, *([interval] if interval else [])]


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
    told = verdict_lines(effects)
    parts += [*map(Text, told[:-1]), Text("")] if told else []
    return Group(*parts, *(Text(line, style="dim") for line in [*told[-1:], *notes(effects)]))


def effects_markdown(effects: Mapping[str, Any]) -> str:
    """The tables as Markdown."""
    lines = [f"## {effects['model']} on {effects['data']}", ""]
    told = verdict_lines(effects)
    lines += [*(f"- {_plain(line)}" for line in told[:-1]), "", _plain(told[-1]), ""] if told else []
    for title, head, rows in effect_tables(effects):
        lines += [f"### {title}", "", _markdown_row(head), "|" + "---|" * len(head)]
        lines += [_markdown_row([" ".join(cell) for cell in row]) for row in rows]
        lines.append("")
    return "\n".join([*lines, *(f"{_plain(line)}\n" for line in notes(effects))])


def _plain(text: str) -> str:
    """Text whose asterisks are no Markdown."""
    return text.replace("*", "\\*")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(_plain(cell.replace("|", "\\|")) for cell in cells) + " |"


def notes(effects: Mapping[str, Any]) -> list[str]:
    """What a reader has to know beside the tables."""
    lines = [LEGEND.format(baseline=effects["baseline"])] if effects["baseline"] else ["In percent; length in tokens."]
    for name, protocol in effects["evals"].items():
        facts = [f"{protocol['images']} images", f"prompt {protocol['prompt']!r}"]
        facts += [
            f"{key.replace('_', ' ')} {protocol[key]}" for key in ("variant", "parser", "similarity") if key in protocol
        ]
        if "captions" in protocol.get("variant", "") and (share := _share(protocol)):
            facts.append(f"reference {share.strip(' ()')}")
        facts += [f"at most {protocol['max_new_tokens']} tokens", f"ids {protocol['image_ids_sha256'][:12]}"]
        if protocol["skipped"]:
            facts.append(f"{protocol['skipped']} samples skipped, their pictures cannot be read")
        lines.append(f"{NAMES[name]}: {', '.join(facts)}.")
    return lines + ([effects["note"]] if "note" in effects else [])
