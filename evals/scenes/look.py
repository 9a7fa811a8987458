# SPDX-License-Identifier: Apache-2.0
"""Look at the scenes world: pictures with their boxes, and what stands together with what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any

from PIL import Image, ImageDraw

from . import world

# Colours of boxes by kind of evidence.
COLOURS = {"clear": (40, 160, 60), "small": (30, 90, 220), "faint": (200, 40, 200), "covered": (220, 80, 20)}


def parse_scenes(name: str) -> list[world.Scene]:
    """Return the scenes of `validation/3` or, first and last included, `validation/0-15`.

    Raises `ValueError` for anything else, and for scenes outside the split.
    """
    found = re.fullmatch(r"([a-z]+)/(\d+)(?:-(\d+))?", name)
    if found is None:
        raise ValueError(f"scene {name!r}: expected SPLIT/NUMBER or SPLIT/FIRST-LAST, such as validation/0-15")
    first, last = int(found[2]), int(found[3] or found[2])
    if last < first:
        raise ValueError(f"scene {name!r}: the last number is below the first")
    try:
        return [world.scene(found[1], index) for index in range(first, last + 1)]
    except (ValueError, IndexError) as error:
        raise ValueError(f"scene {name!r}: {error}") from error


def with_boxes(scene: world.Scene, scale: int = 2) -> Image.Image:
    """Return the picture of a scene, enlarged, with the box and name of every object in the colour of its evidence.

    Args:
        scene: the scene.
        scale: enlargement, so that small objects and names can be read.
    """
    side = world.SIZE * scale
    picture = world.render(scene).resize((side, side), Image.Resampling.NEAREST)
    pen = ImageDraw.Draw(picture)
    for thing, (x, y, w, h) in zip(scene.objects, scene.boxes, strict=True):
        if not w:
            continue  # wholly covered
        colour = COLOURS[thing.evidence]
        pen.rectangle([v * scale for v in (x, y, x + w, y + h)], outline=colour, width=2)
        name = thing.category if thing.evidence == "clear" else f"{thing.category} ({thing.evidence})"
        left, top, right, bottom = pen.textbbox((0, 0), name)
        # Above the box, but inside the picture.
        at = (min(x * scale, side - right - 4), max(y * scale - bottom - 4, 0))
        pen.rectangle((at[0], at[1], at[0] + right + 4, at[1] + bottom + 3), fill=colour)
        pen.text((at[0] + 2, at[1] + 1), name, fill=(255, 255, 255))
    return picture


def statistics(split: str, limit: int | None = None) -> dict[str, Any]:
    """Count what is in the first `limit` scenes of a split (default 500).

    Returns:
        `scenes`, `contexts`, `objects_per_scene`, `evidence` (objects by kind), `categories` (scenes that hold it),
        `together` (for every category the scenes it shares with others, the most first), and
        `companions`: share of objects that are usual companions of their scene's context.

    Raises:
        ValueError: an unknown split, or a limit below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit={limit}: expected 1 or more")
    if split not in world.SPLITS:
        raise ValueError(f"unknown split {split!r}; there are {', '.join(world.SPLITS)}")
    size = world.SPLITS[split]
    count = min(limit or 500, size or limit or 500)
    scenes = [world.scene(split, index) for index in range(count)]
    objects = [(s, o) for s in scenes for o in s.objects]
    pairs = Counter(pair for s in scenes for pair in combinations(sorted(s.categories), 2))
    together: dict[str, Counter[str]] = {c: Counter() for c in world.CATEGORIES}
    for (a, b), n in pairs.items():
        together[a][b] = together[b][a] = n
    per_scene = Counter(len(s.objects) for s in scenes)
    return {
        "world": world.WORLD_VERSION,
        "split": split,
        "scenes": count,
        "contexts": dict(Counter(s.context for s in scenes).most_common()),
        "objects_per_scene": {n: per_scene[n] for n in sorted(per_scene)},
        "objects": len(objects),
        "evidence": dict(Counter(o.evidence for _, o in objects).most_common()),
        "companions": sum(o.category in world.CONTEXTS[s.context] for s, o in objects) / len(objects),
        "categories": dict(Counter(c for s in scenes for c in s.categories).most_common()),
        "together": {c: dict(counts.most_common()) for c, counts in together.items()},
    }


def statistics_tables(found: dict[str, Any], of: Sequence[str] = (), most: int = 6) -> Any:
    """Return `statistics` as a rich renderable: a summary, and who stands with whom.

    Args:
        found: what `statistics` returned.
        of: only these categories, with all their companions; default: all that occur, each with its `most` usual ones.
        most: see `of`.

    Raises:
        ValueError: no category of that name.
    """
    from rich import box
    from rich.console import Group
    from rich.table import Table

    for name in of:
        if name not in world.CATEGORIES:
            raise ValueError(f"no category {name!r} in the scenes world; there are {', '.join(world.CATEGORIES)}")

    def listed(counts: dict[Any, int]) -> str:
        return ", ".join(f"{key} {n}" for key, n in counts.items())

    summary = Table(box=None, show_header=False)
    summary.add_row("scenes", f"{found['scenes']} of the {found['split']} split, world {found['world']}")
    summary.add_row("contexts", listed(found["contexts"]))
    summary.add_row("objects", f"{found['objects']}; usual companions of their context: {found['companions']:.0%}")
    summary.add_row("objects: scenes", ", ".join(f"{k}: {n}" for k, n in found["objects_per_scene"].items()))
    summary.add_row("evidence", listed(found["evidence"]))
    table = Table("category", "scenes", "stands with (share of its scenes)", box=box.SIMPLE_HEAD)
    for name in of or found["categories"]:
        scenes = found["categories"].get(name, 0)
        others = list(found["together"][name].items())[: None if of else most]
        table.add_row(name, str(scenes), ", ".join(f"{other} {n / scenes:.0%}" for other, n in others))
    return Group(summary, table)
