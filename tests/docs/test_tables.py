# SPDX-License-Identifier: Apache-2.0
"""Tables of the pages are those that their files give: ``python docs/tables.py`` writes them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

import pytest

from vlm_attn import registry

from .test_pages import DOCS, ROOT


@cache
def tables() -> Any:
    """``docs/tables.py``."""
    spec = importlib.util.spec_from_file_location("docs_tables", DOCS / "tables.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", ["docs/results.md", "docs/methods.md", "README.md"])
def test_pages_say_what_the_files_say(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    assert tables().PAGES[ROOT / page](text) == text, "run: python docs/tables.py"


def test_every_table_is_on_the_page() -> None:
    named = re.findall(r"^<!-- table: ([\w-]+) -->$", (DOCS / "results.md").read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(tables().TABLES)


def test_a_wrong_figure_is_put_right() -> None:
    text = (DOCS / "results.md").read_text(encoding="utf-8")
    wrong = text.replace("| 45.6 | 14.1 | 88.1 |", "| 45.5 | 14.1 | 88.1 |", 1)
    assert wrong != text
    assert tables().filled(wrong) == text
    assert tables().filled("<!-- table: bundled -->\n\nend\n").count("\n| ") == 4  # the head and three rows


def test_a_method_brings_its_rows() -> None:
    """What is registered and has no row gets one, at the end of its table, from its docstring alone."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    (row,) = re.findall(r"^\| `vcd` \|.*\n", text, re.M)
    made = tables().PAGES[ROOT / "README.md"](text.replace(row, ""))
    assert row in made
    assert sorted(made.splitlines()) == sorted(text.splitlines())
    wrong = text.replace("| `vcd` | ", "| `vcd` | not ")
    assert tables().PAGES[ROOT / "README.md"](wrong) == text


@pytest.mark.parametrize("name", registry.METHODS)
def test_overviews_are_whole(name: str) -> None:
    """A docstring fills every column of its table but those that say what is needed."""
    import vlm_attn

    cls = vlm_attn.methods()[name].cls
    said = tables().overview(cls)
    page = (DOCS / "methods.md").read_text(encoding="utf-8")
    (head,) = re.findall(rf"^<!-- methods: {tables().kind(cls)} -->\n\|(.*)\|$", page, re.M)
    columns = {title.strip() for title in head.split("|")} - {"name", "paper", "needs"}
    assert columns | {"in short"} <= set(said) | {"needs"}
    assert set(said) <= columns | {"in short", "needs"}
    assert not any(re.match(r"the same\b(?! share)", text) for text in said.values())
