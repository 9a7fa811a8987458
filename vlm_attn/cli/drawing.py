# SPDX-License-Identifier: Apache-2.0
"""An attention mask as an image: axes, a coloured strip and a name per group, a legend."""

from __future__ import annotations

from itertools import groupby
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from vlm_attn.kernels import masks

#: Colours of the groups' strips, by the letters of a layout.
GROUPS = {
    "s": "#7a869a",
    "v": "#2e7d32",
    "q": "#b26a00",
    "r": "#8e5aa8",
    "a": "#1565c0",
    "p": "#b0b0b0",
}
SEES, HIDDEN, LINE, INK, PAPER = "#26364f", "#e8ebf0", "#ffffff", "#1c1c1c", "#ffffff"
SIDE = 560  # pixels that the cells take at most
STRIP = 12  # width of a group's strip


def image(mask: Any, group: Any, visible: Any) -> Image.Image:
    """Draw a mask.

    Args:
        mask: a `vlm_attn.kernels.masks.Mask`, for its name.
        group: ``[1, S]`` groups of the columns.
        visible: ``[S, S]`` bool, rows by keys, from `vlm_attn.kernels.masks.materialise`.
    """
    left, top, cell = where(group)
    size = len(visible)
    letter = {int(value): name for name, value in masks.LETTERS.items()}
    runs = [(name, len(list(part))) for name, part in groupby(letter[int(value)] for value in group[0])]
    font, big = ImageFont.load_default(14), ImageFont.load_default(18)
    names = {name: masks.WORDS[name] for name, _ in runs}
    side = size * cell
    title = "query: the token that looks"
    height = max(side, round(font.getlength(title)) + 8)  # the title beside few cells is longer than they are high
    rows = [list(names)[start : start + 3] for start in range(0, len(names), 3)]
    drawn = Image.new("RGB", (max(left + side + 24, 460), top + height + 48 + 24 * (1 + len(rows))), PAPER)
    pen = ImageDraw.Draw(drawn)
    pen.text((left, 10), mask.name, INK, big)
    pen.text((left, 36), "key: the token that is looked at", INK, font)
    _upright(drawn, title, (8, top), height, font)
    for i in range(size):
        for j in range(size):
            box = (left + j * cell, top + i * cell, left + (j + 1) * cell - 1, top + (i + 1) * cell - 1)
            pen.rectangle(box, SEES if visible[i][j] else HIDDEN, LINE if cell >= 6 else None)
    at = 0
    for name, count in runs:
        start, stop = at * cell, (at + count) * cell - 1
        pen.rectangle((left + start, top - STRIP - 4, left + stop, top - 4), GROUPS[name])
        pen.rectangle((left - STRIP - 4, top + start, left - 4, top + stop), GROUPS[name])
        middle = (start + stop) / 2
        word = names[name] if font.getlength(names[name]) <= stop - start else name
        pen.text((left + middle, top - STRIP - 8), word, INK, font, anchor="ms")
        pen.text((left - STRIP - 10, top + middle), names[name], INK, font, anchor="rm")
        if at:  # where a group begins
            pen.line((left + start, top, left + start, top + side - 1), INK)
            pen.line((left, top + start, left + side - 1, top + start), INK)
        at += count
    below = top + height + 20
    entries = [
        [(SEES, "sees"), (HIDDEN, "does not see")],
        *([(GROUPS[n], f"{n} {names[n]}") for n in row] for row in rows),
    ]
    for number, row in enumerate(entries):
        x = 24
        for colour, word in row:
            y = below + 24 * number
            pen.rectangle((x, y, x + 13, y + 13), colour, INK)
            pen.text((x + 20, y + 7), word, INK, font, anchor="lm")
            x += 20 + round(font.getlength(word)) + 28
    return drawn


def where(group: Any) -> tuple[int, int, int]:
    """Left and upper edge of the cells, and the width of one, in pixels."""
    letter = {int(value): name for name, value in masks.LETTERS.items()}
    words = {masks.WORDS[letter[int(value)]] for value in group[0]}
    longest = max(ImageFont.load_default(14).getlength(word) for word in words)
    return round(longest) + STRIP + 44, 104, max(1, min(28, SIDE // group.shape[1]))


def _upright(drawn: Image.Image, text: str, corner: tuple[int, int], height: int, font: Any) -> None:
    """Write a text from bottom to top, in the middle of a height."""
    width = round(font.getlength(text)) + 2
    strip = Image.new("RGB", (width, 20), PAPER)
    ImageDraw.Draw(strip).text((0, 2), text, INK, font)
    drawn.paste(strip.rotate(90, expand=True), (corner[0], corner[1] + max(0, (height - width) // 2)))
