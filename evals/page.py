# SPDX-License-Identifier: Apache-2.0
"""A report as one HTML file that needs no other: tables, plots, and the worst images with what was said about them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.differences import changes
from vlm_attn.evals.effects import Run, faults
from vlm_attn.evals.gallery import marked
from vlm_attn.evals.report import VERDICT, effect_tables, notes, verdicts

SIDE = 560  # pixels of a picture's longer side

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --good: #1a7f37; --bad: #c62828;
  --added: #1a7f37; --changed: #8a5a00; }
@media (prefers-color-scheme: dark) {
  :root { --good: #6fdd8b; --bad: #ff8a80; --added: #6fdd8b; --changed: #f0c060; }
}
body { font: 16px/1.55 system-ui, sans-serif; max-width: 80rem; margin: 2rem auto; padding: 0 1rem; }
h1 { line-height: 1.2; margin-bottom: 0.25rem; } h2 { margin-top: 2.5rem; } h3 { margin: 1.5rem 0 0.25rem; }
.facts { opacity: 0.8; margin: 0.25rem 0; font-size: 0.95rem; overflow-wrap: anywhere; }
.scroll { overflow-x: auto; margin: 0.5rem 0 1rem; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: 0.3rem 0.7rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
thead th { vertical-align: bottom; border-bottom-width: 2px; }
th:first-child, td:first-child { text-align: left; position: sticky; left: 0; background: Canvas; font-weight: 600; }
.verdict th, .verdict td { text-align: left; }
.yes { color: var(--good); font-weight: 600; } .no { color: var(--bad); font-weight: 600; }
small { display: block; opacity: 0.8; white-space: nowrap; font-weight: 400; }
img { max-width: 100%; height: auto; }
.plot { background: white; border-radius: 6px; }
article { border-top: 1px solid var(--line); padding: 1rem 0; display: grid; gap: 1.25rem; break-inside: avoid;
  grid-template-columns: minmax(14rem, 28rem) 1fr; }
@media (max-width: 50rem) { article { grid-template-columns: 1fr; } body { margin: 1rem auto; } }
article h3 { margin-top: 0; }
figure { margin: 0; position: relative; align-self: start; }
figure img, figure svg { display: block; width: 100%; }
figure svg { position: absolute; inset: 0; height: 100%; }
rect { fill: none; stroke: #22d3ee; stroke-width: 2; vector-effect: non-scaling-stroke; }
text { fill: #22d3ee; paint-order: stroke; stroke: black; stroke-width: 3px; }
mark, .false { background: none; color: inherit; font-weight: 600; text-decoration: underline wavy var(--bad) 2px;
  text-underline-offset: 4px; }
ins { text-decoration: none; border-bottom: 2px solid var(--added); }
ins.changed { border-bottom: 2px dashed var(--changed); }
del { opacity: 0.75; }
dt { font-weight: 600; margin-top: 0.6rem; } dd { margin: 0; overflow-wrap: anywhere; }
@media print {
  :root { color-scheme: light; } body { max-width: none; margin: 0; font-size: 9pt; }
  .scroll { overflow: visible; } th, td { padding: 0.15rem 0.35rem; } th:first-child, td:first-child { position: static; }
  h2, h3 { break-after: avoid; } table, img { break-inside: avoid; } small { white-space: normal; }
  article { grid-template-columns: 12rem 1fr; }
}
"""


def page(sections: Sequence[str], title: str = "Report", made: str = "") -> str:
    """The whole file.

    Args:
        sections: what `section` gives for every model and data.
        title: its heading.
        made: a line below it: when, and with which version.
    """
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>"
        f'<p class="facts">{escape(made)}</p>{"".join(sections)}</body></html>\n'
    )


def title_of(found: Sequence[Mapping[str, Any]]) -> str:
    """A report's heading: what was measured of which model.

    Args:
        found: from `effects.effects`, one per model and data.
    """
    models = ", ".join(dict.fromkeys(facts["model"] for facts in found))
    methods = [label for facts in found for label in facts["methods"] if label != facts["baseline"]]
    names = list(dict.fromkeys(methods))
    shown = ", ".join(names[:3]) + (f" and {len(names) - 3} others" if len(names) > 3 else "")
    baseline = next((facts["baseline"] for facts in found if facts["baseline"]), None)
    return f"{models}: {shown or baseline}" + (f" against {baseline}" if shown and baseline else "")


def section(
    effects: Mapping[str, Any],
    runs: Sequence[Run],
    plots: Sequence[Path],
    *,
    dataset: CocoDataset | None,
    worst: int,
) -> str:
    """The part of a page about one model and data.

    Args:
        effects: from `effects.effects`.
        runs: the runs behind it.
        plots: PNG files to show.
        dataset: gives the pictures and boxes; None: the worst images are listed without.
        worst: how many images.
    """
    parts = [f"<h2>{escape(effects['model'])} on {escape(effects['data'])}</h2>", _facts(runs), _verdicts(effects)]
    for name, head, rows in effect_tables(effects):
        parts.append(f"<h3>{escape(name)}</h3>{_table(head, [[_lines(cell) for cell in row] for row in rows])}")
    parts += [f'<p class="facts">{escape(line)}</p>' for line in notes(effects)]
    parts += [
        f'<p><img class="plot" alt="{escape(path.stem)}" src="{_uri(path.read_bytes(), "png")}"></p>' for path in plots
    ]
    return "".join(parts + _worst_images(effects, runs, dataset, worst))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]], kind: str = "") -> str:
    """A table that scrolls by itself, also by keyboard; its cells are HTML already."""
    titles = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    body = "".join("<tr>" + "".join(f"<td>{cell}</td>" for cell in row) + "</tr>" for row in rows)
    return (
        f'<div class="scroll" tabindex="0"><table class="{kind}"><thead><tr>{titles}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def _facts(runs: Sequence[Run]) -> str:
    """When and with what it was run."""
    days = sorted({run.results.get("environment", {}).get("started", "")[:10] for run in runs} - {""})
    versions = runs[0].results.get("versions", {})
    facts = [f"Run on {' to '.join(dict.fromkeys((days[0], days[-1])))}"] if days else []
    facts += [f"{name} {versions[name]}" for name in ("vlm_attn", "transformers", "torch") if versions.get(name)]
    facts += [str(device)] if (device := runs[0].results.get("environment", {}).get("device")) else []
    return f'<p class="facts">{escape(", ".join(facts))}.</p>' if facts else ""


def _verdicts(effects: Mapping[str, Any]) -> str:
    """A row per method: yes, no or not shown."""
    found = verdicts(effects)
    if not found:
        return ""
    head = list(dict.fromkeys(question for answers in found.values() for question in answers))
    rows = []
    for label, answers in found.items():
        words = [answers.get(question, "-") for question in head]
        cells = [f'<span class="{word.partition(" ")[0]}">{escape(word)}</span>' for word in words]
        rows.append([escape(label), *cells])
    table = _table(["", *(f"{question}?" for question in head)], rows, "verdict")
    return f'<h3>Verdict</h3>{table}<p class="facts">{escape(VERDICT)}</p>'


def _lines(cell: Sequence[str]) -> str:
    return escape(cell[0]) + "".join(f"<small>{escape(line)}</small>" for line in cell[1:])


def _uri(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def worst_images(runs: Sequence[Run], count: int) -> list[int]:
    """The images about which most is wrong, summed over methods and evaluations; none that nothing is wrong about."""
    total: dict[int, int] = {}
    for run in runs:
        for records in run.records.values():
            for record in records:
                total[record["image_id"]] = total.get(record["image_id"], 0) + faults(record)
    order = sorted((image for image in total if total[image]), key=lambda image: (-total[image], image))
    return order[:count]


def _worst_images(
    effects: Mapping[str, Any], runs: Sequence[Run], dataset: CocoDataset | None, count: int
) -> list[str]:
    images = worst_images(runs, count)
    if not images:
        return []
    baseline = effects["baseline"]
    plain = {(run.eval, record["sample"]): record["answer"] for run in runs for record in run.records.get(baseline, ())}
    said: dict[int, dict[str, list[str]]] = {image: {} for image in images}
    for run in runs:
        for label, records in run.records.items():
            for record in records:
                before = plain.get((run.eval, record["sample"])) if label != baseline else None
                if record["image_id"] in said and (text := _said(record, before)):
                    said[record["image_id"]].setdefault(label, []).append(text)
    how = "Boxes: what is annotated. " if dataset else "Without pictures: the data was not given (--data). "
    how += 'Underlined: <span class="false">objects that are not there</span>, and wrong answers. '
    if baseline:
        how += f'Against {escape(baseline)}: <ins>added</ins>, <ins class="changed">changed</ins> and <del>removed</del> words.'
    parts = [f"<h2>Worst images</h2><p>{how}</p>"]
    for image in images:
        answers = "".join(
            f"<dt>{escape(label)}</dt>" + "".join(f"<dd>{text}</dd>" for text in said[image][label])
            for label in effects["methods"]
            if label in said[image]
        )
        truth = dataset.objects(image) if dataset else _truth(runs, image)
        known = f'<p class="facts">There: {escape(", ".join(truth))}</p>' if truth else ""
        picture = _picture(dataset, image) if dataset else ""
        parts.append(f"<article>{picture}<div><h3>Image {image}</h3>{known}<dl>{answers}</dl></div></article>")
    return parts


def _said(record: Mapping[str, Any], before: str | None) -> str:
    """One answer as HTML: invented words and differences to the baseline's marked; of questions only the wrong answers."""
    score = record["score"]
    if "mentions" not in score:
        question = f"{escape(record['question'])} <mark>{escape(record['answer']) or '(nothing)'}</mark>"
        return "" if score["correct"] else question
    answer = record["answer"]
    if before == answer:
        return '<span class="facts">the same</span>' if answer else "(nothing)"
    wrong = [mention for mention in score["mentions"] if mention["hallucinated"]]
    return marked(answer, [] if before is None else changes(before, answer), wrong) or "(nothing)"


def _truth(runs: Sequence[Run], image: int) -> list[str]:
    scores = (r["score"] for run in runs for rows in run.records.values() for r in rows if r["image_id"] == image)
    return next((list(score["truth"]) for score in scores if score.get("truth")), [])


def _picture(dataset: CocoDataset, image: int) -> str:
    """The picture with its annotated boxes; a line of text where it cannot be read."""
    try:
        picture = dataset.load_image(image)
    except (OSError, ValueError, KeyError) as error:
        return f"<p>{escape(str(error))}</p>"
    width, height = picture.size
    picture.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    picture.convert("RGB").save(stream, format="JPEG", quality=80)
    size = max(width, height) / 40
    boxes = "".join(
        f'<rect x="{x:g}" y="{y:g}" width="{w:g}" height="{h:g}"/>'
        f'<text x="{x + size / 4:g}" y="{y + size:g}" font-size="{size:g}">{escape(name)}</text>'
        for name, (x, y, w, h) in dataset.boxes(image)
    )
    return (
        f'<figure><img alt="image {image}" src="{_uri(stream.getvalue(), "jpeg")}">'
        f'<svg viewBox="0 0 {width} {height}" preserveAspectRatio="none" aria-hidden="true">{boxes}</svg></figure>'
    )
