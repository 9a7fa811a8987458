# SPDX-License-Identifier: Apache-2.0
"""Draw the sprite atlas once: `python draw_atlas.py FONT [--out data]` writes `atlas.png` and `atlas.json`.

The font is Noto Color Emoji (SIL OFL 1.1), any version with bitmaps of 109 pixels. The atlas is part of the
frozen world: another version of the font would change every picture, so the package never draws it itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

# COCO category id, name, supercategory, emoji. Left out: categories with no emoji, and those whose emoji shows
# another category as well (a snowboarder, a surfer, fork and knife).
SPRITES = [
    (1, "person", "person", "🧍"),
    (2, "bicycle", "vehicle", "🚲"),
    (3, "car", "vehicle", "🚗"),
    (4, "motorcycle", "vehicle", "🏍"),
    (5, "airplane", "vehicle", "✈"),
    (6, "bus", "vehicle", "🚌"),
    (7, "train", "vehicle", "🚆"),
    (8, "truck", "vehicle", "🚚"),
    (9, "boat", "vehicle", "⛵"),
    (10, "traffic light", "outdoor", "🚦"),
    (13, "stop sign", "outdoor", "🛑"),
    (16, "bird", "animal", "🐦"),
    (17, "cat", "animal", "🐈"),
    (18, "dog", "animal", "🐕"),
    (19, "horse", "animal", "🐎"),
    (20, "sheep", "animal", "🐑"),
    (21, "cow", "animal", "🐄"),
    (22, "elephant", "animal", "🐘"),
    (23, "bear", "animal", "🐻"),
    (24, "zebra", "animal", "🦓"),
    (25, "giraffe", "animal", "🦒"),
    (27, "backpack", "accessory", "🎒"),
    (28, "umbrella", "accessory", "☂"),
    (31, "handbag", "accessory", "👜"),
    (32, "tie", "accessory", "👔"),
    (33, "suitcase", "accessory", "🧳"),
    (34, "frisbee", "sports", "🥏"),
    (35, "skis", "sports", "🎿"),
    (37, "sports ball", "sports", "⚽"),
    (38, "kite", "sports", "🪁"),
    (41, "skateboard", "sports", "🛹"),
    (43, "tennis racket", "sports", "🎾"),
    (44, "bottle", "kitchen", "🍾"),
    (46, "wine glass", "kitchen", "🍷"),
    (47, "cup", "kitchen", "☕"),
    (49, "knife", "kitchen", "🔪"),
    (50, "spoon", "kitchen", "🥄"),
    (51, "bowl", "kitchen", "🥣"),
    (52, "banana", "food", "🍌"),
    (53, "apple", "food", "🍎"),
    (54, "sandwich", "food", "🥪"),
    (55, "orange", "food", "🍊"),
    (56, "broccoli", "food", "🥦"),
    (57, "carrot", "food", "🥕"),
    (58, "hot dog", "food", "🌭"),
    (59, "pizza", "food", "🍕"),
    (60, "donut", "food", "🍩"),
    (61, "cake", "food", "🍰"),
    (62, "chair", "furniture", "🪑"),
    (63, "couch", "furniture", "🛋"),
    (64, "potted plant", "furniture", "🪴"),
    (65, "bed", "furniture", "🛏"),
    (70, "toilet", "furniture", "🚽"),
    (72, "tv", "electronic", "📺"),
    (73, "laptop", "electronic", "💻"),
    (74, "mouse", "electronic", "🖱"),
    (76, "keyboard", "electronic", "⌨"),
    (77, "cell phone", "electronic", "📱"),
    (84, "book", "indoor", "📕"),
    (85, "clock", "indoor", "🕰"),
    (86, "vase", "indoor", "🏺"),
    (87, "scissors", "indoor", "✂"),
    (88, "teddy bear", "indoor", "🧸"),
    (90, "toothbrush", "indoor", "🪥"),
]
SIDE = 104  # longer side of every sprite, pixels
COLUMNS = 8


def draw(font_path: str) -> tuple[Image.Image, dict]:
    """Return the RGBA atlas and its index: `{"categories": [{id, name, supercategory, box: [x, y, w, h]}]}`.

    Raises `ValueError` when the font lacks a glyph.
    """
    font = ImageFont.truetype(font_path, 109)
    atlas = Image.new("RGBA", (COLUMNS * SIDE, -(-len(SPRITES) // COLUMNS) * SIDE), (0, 0, 0, 0))
    categories = []
    for i, (category_id, name, supercategory, emoji) in enumerate(SPRITES):
        cell = Image.new("RGBA", (160, 160), (0, 0, 0, 0))
        ImageDraw.Draw(cell).text((10, 10), emoji, font=font, embedded_color=True)
        bounds = cell.getbbox()
        if bounds is None:
            raise ValueError(f"{font_path} has no glyph for {name!r} ({emoji})")
        sprite = cell.crop(bounds)
        scale = SIDE / max(sprite.size)
        sprite = sprite.resize((round(sprite.width * scale), round(sprite.height * scale)), Image.Resampling.LANCZOS)
        x, y = i % COLUMNS * SIDE, i // COLUMNS * SIDE
        atlas.paste(sprite, (x, y))
        box = [x, y, sprite.width, sprite.height]
        categories.append({"id": category_id, "name": name, "supercategory": supercategory, "box": box})
    return atlas, {"side": SIDE, "font": "Noto Color Emoji, SIL OFL 1.1", "categories": categories}


def main() -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("font", help="path of NotoColorEmoji.ttf")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "data")
    arguments = parser.parse_args()
    atlas, index = draw(arguments.font)
    arguments.out.mkdir(parents=True, exist_ok=True)
    atlas.save(arguments.out / "atlas.png", optimize=True)
    (arguments.out / "atlas.json").write_text(json.dumps(index, indent=1) + "\n")


if __name__ == "__main__":
    main()
