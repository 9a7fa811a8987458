# SPDX-License-Identifier: Apache-2.0
"""Where two texts differ, word by word."""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass
from typing import Literal

WORD = re.compile(r"\w+(?:[-'’]\w+)*")


@dataclass(frozen=True)
class Change:
    """One place where a text differs from another.

    Attributes:
        kind: ``"added"``: only here; ``"removed"``: only there; ``"changed"``: something else stands there.
        start: where in the text, in characters.
        end: where it ends; the same as ``start`` for what was removed.
        before: what the other text has in its place; nothing for what was added.
    """

    kind: Literal["added", "removed", "changed"]
    start: int
    end: int
    before: str


def changes(before: str, after: str) -> list[Change]:
    """How ``after`` differs from ``before``, in the order of ``after``.

    Words are compared, in any case; punctuation and white space are not.
    """
    old, new = list(WORD.finditer(before)), list(WORD.finditer(after))
    first, second = ([word[0].lower() for word in words] for words in (old, new))
    matcher = difflib.SequenceMatcher(None, first, second, autojunk=False)
    found = []
    for kind, a, b, c, d in matcher.get_opcodes():
        if kind == "equal":
            continue
        gone = before[old[a].start() : old[b - 1].end()] if b > a else ""
        if d > c:
            found.append(Change("changed" if gone else "added", new[c].start(), new[d - 1].end(), gone))
        else:
            place = new[c - 1].end() if c else 0
            found.append(Change("removed", place, place, gone))
    return found
