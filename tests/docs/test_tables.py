"""Tables of the pages are those that their files give: ``python docs/tables.py`` writes them."""

from __future__ import annotations

import importlib.util
import re
from functools import cache
from typing import Any

import pytest

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


@pytest.mark.parametrize("page", ["docs/results.md"])
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
