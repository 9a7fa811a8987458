# SPDX-License-Identifier: Apache-2.0
"""Captions of one's own images, side by side, as one HTML file that needs no other."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vlm_attn.evals.differences import changes

SIDE = 640  # pixels of an image's longer side

_STYLE = """
:root { color-scheme: light dark; --line: #8886; --added: #1a7f37; --changed: #8a5a00; --false: #c62828; }
@media (prefers-color-scheme: dark) { :root { --added: #6fdd8b; --changed: #f0c060; --false: #ff8a80; } }
body { font: 16px/1.55 system-ui, sans-serif; max-width: 90rem; margin: 2rem auto; padding: 0 1rem; }
article { border-top: 1px solid var(--line); padding: 1.25rem 0; display: grid; gap: 1.25rem;
  grid-template-columns: minmax(14rem, 26rem) 1fr; break-inside: avoid; }
@media (max-width: 50rem) { article { grid-template-columns: 1fr; } }
article h2 { margin: 0 0 0.5rem; font-size: 1rem; overflow-wrap: anywhere; }
img { max-width: 100%; height: auto; display: block; border-radius: 6px; }
.runs { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); align-items: start;
  align-content: start; }
.runs h3 { margin: 0; font-size: 1rem; }
.runs p { margin: 0.3rem 0; overflow-wrap: break-word; }
ins { text-decoration: none; border-bottom: 2px solid var(--added); }
ins.changed { border-bottom: 2px dashed var(--changed); }
del { opacity: 0.75; }
.false { text-decoration: underline wavy var(--false) 2px; text-underline-offset: 5px; font-weight: 600; }
.facts { opacity: 0.8; font-size: 0.9rem; }
"""


def page(
    title: str,
    images: Sequence[tuple[str, Any, Sequence[str] | None]],
    captions: Sequence[Mapping[str, Any]],
    facts: str,
) -> str:
    """The whole file.

    Args:
        title: its heading.
        images: name, PIL image, and the objects in it where they are known.
        captions: ``image`` (a name), ``method``, ``caption``, and ``hallucinated`` where the objects are known. The first
            method of an image is what the others are compared with.
        facts: one line about how they were made.
    """
    articles = []
    for name, image, objects in images:
        rows = [row for row in captions if row["image"] == name]
        if not rows:
            continue
        boxes = "".join(_run(row, rows[0]) for row in rows)
        known = f'<p class="facts">In the image: {escape(", ".join(objects))}.</p>' if objects is not None else ""
        articles.append(
            f'<article><div><h2>{escape(name)}</h2><img alt="{escape(name)}" src="{_uri(image)}">{known}</div>'
            f'<div class="runs">{boxes}</div></article>'
        )
    key = (
        f'<p class="facts">{escape(facts)} Against the first caption: <ins>added</ins>, <ins class="changed">changed</ins>, '
        "<del>removed</del> words."
    )
    if any(objects is not None for _, _, objects in images):
        key += ' <span class="false">Not in the image</span>, where its objects are known.'
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>{key}</p>"
        f"{''.join(articles)}</body></html>\n"
    )


def _run(row: Mapping[str, Any], first: Mapping[str, Any]) -> str:
    body = "(nothing)"
    same = row is not first and row["caption"] == first["caption"]
    if row["caption"]:
        body = marked(
            row["caption"],
            [] if row is first else changes(first["caption"], row["caption"]),
            row.get("hallucinated", []),
        )
    wrong = ", ".join(mention["text"] for mention in row.get("hallucinated", []))
    note = f'<p class="facts">Not in the image: {escape(wrong)}</p>' if wrong else ""
    note += f'<p class="facts">The same as {escape(first["method"])}.</p>' if same else ""
    return f"<section><h3>{escape(row['method'])}</h3><p>{body}</p>{note}</section>"


def marked(text: str, found: Sequence[Any], mentions: Sequence[Mapping[str, Any]]) -> str:
    """A caption as HTML with its changes (`differences.changes`) and invented objects (``start``, ``end``) marked."""
    edges = sorted(
        {0, len(text)}
        | {edge for change in found for edge in (change.start, change.end)}
        | {edge for mention in mentions for edge in (mention["start"], mention["end"])}
    )
    removed = {change.start: change.before for change in found if change.kind == "removed"}
    parts = []
    for start, end in zip(edges, [*edges[1:], len(text)], strict=True):
        if start in removed:
            parts.append(f" <del>{escape(removed[start])}</del> ")
        piece = escape(text[start:end])
        if any(mention["start"] <= start < mention["end"] for mention in mentions):
            piece = f'<span class="false" title="not in the image">{piece}</span>'
        for change in found:
            if change.start <= start < change.end:
                title = f' title="in place of: {escape(change.before)}"' if change.before else ""
                piece = f'<ins class="{change.kind}"{title}>{piece}</ins>'
        parts.append(piece)
    return "".join(parts)


def _uri(image: Any) -> str:
    image = image.convert("RGB")
    image.thumbnail((SIDE, SIDE))
    stream = io.BytesIO()
    image.save(stream, format="JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(stream.getvalue()).decode()}"
