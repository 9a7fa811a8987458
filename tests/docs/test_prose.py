# SPDX-License-Identifier: Apache-2.0
"""The ten worst habits of prose do not spread: `docs/style.md` names them, `prose.json` holds how often each is still there."""

from __future__ import annotations

import json
import re
from pathlib import Path

from . import prose


def test_no_file_gets_worse() -> None:
    baseline = json.loads(prose.BASELINE.read_text(encoding="utf-8"))
    worse = []
    for path in prose.files():
        allowed = baseline.get(path.as_posix(), {})
        for habit, where in prose.found(path).items():
            if len(where) > allowed.get(habit, 0):
                worse.append(f"{path} {', '.join(where)}: {allowed.get(habit, 0)} allowed; write {prose.HABITS[habit]}")
    assert not worse, "\n".join(worse)


def test_the_style_page_names_every_habit() -> None:
    page = (prose.ROOT / "docs" / "style.md").read_text(encoding="utf-8")
    avoid = re.findall(r"^\| ([^|]+) \| [^|]+ \|$", page.partition("## Words")[2].partition("\n## ")[0], re.M)
    for habit in prose.HABITS:
        assert any(re.search(habit, re.sub(r"[*`]", "", cell).replace("&#124;", "|"), re.I) for cell in avoid), habit


def test_prose_is_what_somebody_reads(tmp_path: Path, monkeypatch) -> None:
    """Docstrings, errors and help count; code, comments and names do not."""
    (tmp_path / "page.md").write_text("A picture.\n\n```python\npicture = 1\n```\n\nBehind `picture`.\n")
    (tmp_path / "code.py").write_text(
        '"""A picture."""\npicture = "picture"  # picture\n\ndef f(help="x"):\n    raise ValueError(f"no picture {picture}")\n'
    )
    monkeypatch.setattr(prose, "ROOT", tmp_path)
    pictures = r"\bpictures?\b"
    assert prose.found(Path("page.md")) == {pictures: ["1: picture"], r"\bbehind\b": ["7: Behind"]}
    assert prose.found(Path("code.py")) == {pictures: ["1: picture", "5: picture"]}
