"""What tests that drive the page in a browser share."""

from __future__ import annotations

import os
import shutil
from pathlib import Path
from typing import Any

import pytest

sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
SCREENSHOTS = os.environ.get("VLM_ATTN_SCREENSHOTS")  # a folder to keep pictures of the page in
LONG = 60_000  # ms; only to end a test that hangs
sync_api.expect.set_options(timeout=LONG)


def keep(tab: Any, name: str) -> None:
    if SCREENSHOTS:
        tab.wait_for_timeout(1000)
        tab.screenshot(path=str(Path(SCREENSHOTS) / name), full_page=True)


def word(tab: Any, run: int, text: str) -> Any:
    return tab.locator(f"#captions button.word[data-run='{run}']", has_text=text).first
