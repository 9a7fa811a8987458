"""A report as one HTML file that needs no other: tables, plots, and the worst images with what was said about them."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.effects import Run, faults
from vlm_attn.evals.report import effect_tables, notes

SIDE = 560  # pixels of a picture's longer side

_STYLE = """
:root { color-scheme: light dark; --line: #8884; }
body { font: 15px/1.5 system-ui, sans-serif; max-width: 75rem; margin: 2rem auto; padding: 0 1rem; }
table { border-collapse: collapse; display: block; overflow-x: auto; margin: 0.5rem 0 1.5rem; }
th, td { padding: 0.25rem 0.6rem; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
th:first-child, td:first-child { text-align: left; }
small { display: block; opacity: 0.75; white-space: nowrap; }
img { max-width: 100%; height: auto; }
.plot { background: white; }
article { border-top: 1px solid var(--line); padding: 1rem 0; display: grid; gap: 1rem;
  grid-template-columns: minmax(16rem, 35rem) 1fr; }
@media (max-width: 50rem) { article { grid-template-columns: 1fr; } }
figure { margin: 0; position: relative; align-self: start; }
figure img, figure svg { display: block; width: 100%; }
figure svg { position: absolute; inset: 0; height: 100%; }
rect { fill: none; stroke: #22d3ee; stroke-width: 2; vector-effect: non-scaling-stroke; }
text { fill: #22d3ee; paint-order: stroke; stroke: black; stroke-width: 3px; }
mark { background: none; color: inherit; font-weight: 600; text-decoration: underline wavy #dc2626 2px;
  text-underline-offset: 3px; }
dt { font-weight: 600; margin-top: 0.5rem; } dd { margin: 0; overflow-wrap: anywhere; }
"""


def page(sections: Sequence[str]) -> str:
    """The whole file, of what `section` gives for every model and data."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>vlm-attn report</title><style>{_STYLE}</style></head><body>{''.join(sections)}</body></html>\n"
    )


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
    parts = [f"<h1>{escape(effects['model'])} on {escape(effects['data'])}</h1>"]
    for name, head, rows in effect_tables(effects):
        cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
        body = "".join("<tr>" + "".join(f"<td>{_lines(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        parts.append(f"<h2>{escape(name)}</h2><table><thead><tr>{cells}</tr></thead><tbody>{body}</tbody></table>")
    parts += [f"<p>{escape(line)}</p>" for line in notes(effects)]
    parts += [
        f'<p><img class="plot" alt="{escape(path.stem)}" src="{_uri(path.read_bytes(), "png")}"></p>' for path in plots
    ]
    return "".join(parts + _worst_images(effects, runs, dataset, worst))


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
    said: dict[int, dict[str, list[str]]] = {image: {} for image in images}
    for run in runs:
        for label, records in run.records.items():
            for record in records:
                if record["image_id"] in said and (text := _said(record)):
                    said[record["image_id"]].setdefault(label, []).append(text)
    if not images:
        return []
    how = "Boxes: what is annotated. " if dataset else "Without pictures: the data was not given (--data). "
    parts = [f"<h2>Worst images</h2><p>{how}Underlined: objects that are not there, and wrong answers.</p>"]
    for image in images:
        answers = "".join(
            f"<dt>{escape(label)}</dt>" + "".join(f"<dd>{text}</dd>" for text in said[image][label])
            for label in effects["methods"]
            if label in said[image]
        )
        truth = dataset.objects(image) if dataset else _truth(runs, image)
        known = f"<p>There: {escape(', '.join(truth))}</p>" if truth else ""
        picture = _picture(dataset, image) if dataset else ""
        parts.append(f"<article>{picture}<div><h3>Image {image}</h3>{known}<dl>{answers}</dl></div></article>")
    return parts


def _said(record: Mapping[str, Any]) -> str:
    """One answer as HTML: invented words marked; of questions only the wrong answers."""
    score = record["score"]
    if "mentions" not in score:
        question = f"{escape(record['question'])} <mark>{escape(record['answer']) or '(nothing)'}</mark>"
        return "" if score["correct"] else question
    shown, last = [], 0
    for mention in score["mentions"]:
        if mention["hallucinated"]:
            word = escape(record["answer"][mention["start"] : mention["end"]])
            shown += [escape(record["answer"][last : mention["start"]]), f'<mark title="not there">{word}</mark>']
            last = mention["end"]
    return "".join(shown) + escape(record["answer"][last:]) or "(nothing)"


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
