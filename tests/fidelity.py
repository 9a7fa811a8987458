"""The page of what every method was compared with, made of ``docs/fidelity.toml``: ``python -m tests.fidelity`` writes it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from vlm_attn import registry

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA, PAGE = DOCS / "fidelity.toml", DOCS / "fidelity.md"
FIELDS = ("code", "by", "difference", "switches", "bugs")

HEAD = """# Fidelity

Every method beside the code its authors released: what was compared, and how far the two are apart. The page is written by
`python -m tests.fidelity` from `docs/fidelity.toml`. Nothing is copied from those repositories: several have no licence, or a
non-commercial one. "Compared" means that both ran on the same tensors or tiny models, in float32 on a CPU; "read" means that
somebody read the code. A test named here needs files with the released code's outputs, which are not part of this
repository, and skips without them.

| method | compared with | by | largest difference | released behaviour | known bugs of the released code |
|---|---|---|---|---|---|
"""
NONE = """
No released code:

| method | why |
|---|---|
"""


def data() -> dict[str, Any]:
    """The data file."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def page() -> str:
    """docs/fidelity.md."""
    found = data()
    rows = {row["name"]: [row[field] or "–" for field in FIELDS] for row in found["method"]}
    lines = [f"| {' | '.join([f'`{name}`', *rows[name]])} |" for name in sorted(rows)]
    none = [f"| `{name}` | {why} |" for name, why in sorted(found["none"].items())]
    return HEAD + "\n".join(lines) + "\n" + NONE + "\n".join(none) + "\n"


def missing() -> set[str]:
    """Methods of the registry that the data file says nothing of, and names it has that are none."""
    found = data()
    return {row["name"] for row in found["method"]} ^ set(found["none"]) ^ set(registry.METHODS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
