# SPDX-License-Identifier: Apache-2.0
"""The licence in one line at the top of every source file. ``python -m tests.headers`` adds the lines that are missing."""

from __future__ import annotations

import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LINE = "SPDX-License-Identifier: Apache-2.0"
#: Kinds of source files, with how a comment is written there.
KINDS = {".py": "# {}", "": "# {}", ".css": "/* {} */"}


def sources() -> list[Path]:
    """Source files that git knows or would add: Python, style sheets, and programs without an ending."""
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    files = [ROOT / name for name in dict.fromkeys(names.split("\0")) if name]
    return [file for file in files if file.is_file() and (file.suffix in (".py", ".css") or file.parent.name == ".ci")]


def missing() -> list[Path]:
    """Files without the line among their first two."""
    return [file for file in sources() if LINE not in "".join(file.read_text(encoding="utf-8").splitlines(True)[:2])]


def add(file: Path) -> None:
    """Write the line into a file: first, or behind the line that names its interpreter."""
    lines = file.read_text(encoding="utf-8").splitlines(True)
    lines.insert(1 if lines and lines[0].startswith("#!") else 0, KINDS[file.suffix].format(LINE) + "\n")
    file.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    for found in missing():
        add(found)
        print(found.relative_to(ROOT))
