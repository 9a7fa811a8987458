# SPDX-License-Identifier: Apache-2.0
"""Ten habits of prose that make a text hard to read, counted in pages, docstrings, errors and help.

``python -m tests.docs.prose`` writes the counts anew to ``prose.json``. A file's count may fall, not rise: see `docs/style.md`.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BASELINE = Path(__file__).with_name("prose.json")
FOLDERS = ("vlm_attn", "kernels", "hallucination", "visual_token_ops", "evals", "demo")

#: What is counted -> what to write instead.
HABITS = {
    r"\bbehind\b": "after (in time or order); behind is for space",
    r"\bbeside\b": "with, next to, in addition to",
    r"\b(?:is|are) no (?!longer\b|more\b|less\b|other\b)\w+": "is not a, has no, there is no",
    r"\bthe host(?:'s)?\b": "transformers",
    r"\bpictures?\b": "image",
    r"\bwhat (?:the|it|its|a)\b": "a noun: the tokens that ..., the layer's output",
    r"\bstands?\b": "is, appears",
    r"\bgo(?:es)? on\b": "continue",
    r"\blook(?:s|ed|ing)? at\b": "attend to (a model), read, see (a person)",
    r"\|\s*the same\b": "repeat it, or name what is the same",
}


def files() -> list[Path]:
    """Pages and source files, as paths from the root."""
    pages = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("evals/scenes/model*/README.md")]
    source = [file for folder in FOLDERS for file in (ROOT / folder).rglob("*.py")]
    return sorted(file.relative_to(ROOT) for file in pages + source if file.name not in ("style.md",))


def lines(path: Path) -> Iterator[tuple[int, str]]:
    """Number and text of every line that somebody reads as prose: no code of a page, and of a program what it says."""
    text = (ROOT / path).read_text(encoding="utf-8")
    if path.suffix == ".md":
        text = re.sub(r"^```.*?^```$", lambda m: "\n" * m[0].count("\n"), text, flags=re.M | re.S)
        text = re.sub(r"`[^`\n]*`", "``", text)
        yield from enumerate(text.splitlines(), 1)
        return
    for node in ast.walk(ast.parse(text)):
        said: list[ast.AST] = []
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) and ast.get_docstring(
            node
        ):
            said = [node.body[0]]
        elif isinstance(node, ast.Raise) and node.exc is not None:
            said = [node.exc]
        elif isinstance(node, ast.keyword) and node.arg == "help":
            said = [node.value]
        for part in said:
            for constant in ast.walk(part):
                if isinstance(constant, ast.Constant) and isinstance(constant.value, str):
                    yield from enumerate(constant.value.splitlines(), constant.lineno)


def found(path: Path) -> dict[str, list[str]]:
    """Habit -> where it is in a file, as ``line: words``."""
    places: dict[str, list[str]] = {}
    for number, line in lines(path):
        for habit in HABITS:
            places.setdefault(habit, []).extend(f"{number}: {m[0]}" for m in re.finditer(habit, line, re.I))
    return {habit: where for habit, where in places.items() if where}


def counts() -> dict[str, dict[str, int]]:
    """File -> habit -> how often."""
    told = {path.as_posix(): {habit: len(where) for habit, where in found(path).items()} for path in files()}
    return {path: dict(sorted(of.items())) for path, of in told.items() if of}


if __name__ == "__main__":
    before = json.loads(BASELINE.read_text(encoding="utf-8")) if BASELINE.exists() else {}
    now = counts()
    BASELINE.write_text(json.dumps(now, indent=1) + "\n", encoding="utf-8")
    old, new = (sum(sum(of.values()) for of in told.values()) for told in (before, now))
    print(f"{new} places in {len(now)} files, before {old}")
    for path, of in now.items():
        if before and sum(of.values()) > sum(before.get(path, {}).values()):
            print(f"more in {path}: {sum(before.get(path, {}).values())} -> {sum(of.values())}")
