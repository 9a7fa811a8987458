# SPDX-License-Identifier: Apache-2.0
"""The page of a masked-diffusion model, over HTTP and in chromium. A page of its own: there is one in a process at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

pytest.importorskip("gradio", reason="the demo extra is not installed")
from gradio_client import Client
from gradio_client.exceptions import AppError

from vlm_attn.demo.app import serving


@pytest.fixture(scope="module")
def page(canvas_studio: Any) -> Iterator[Any]:
    with serving(canvas_studio) as served:
        yield served


def test_describe(page: Any) -> None:
    client = Client(page.local_url, verbose=False, analytics_enabled=False)
    html = client.predict(path=None, scene=3, api_name="/describe")
    assert 'aria-label="late_step"' in html
    assert html.count('class="canvas"') == 2
    assert "in 16 steps" in html
    with pytest.raises(AppError, match="8 positions can be written in 1 to 8 steps, not 16"):
        client.predict(path=None, scene=3, tokens=8, api_name="/describe")


@pytest.mark.browser
def test_canvas(visit: Any) -> None:
    """Which step wrote which word; back with the keyboard; where a word looked when it was written."""
    from .browsing import keep, sync_api, word

    tab = visit()
    tab.click("#describe")
    word(tab, 1, "giraffe").wait_for()
    cells = tab.locator("#captions .run").first.locator(".canvas li")
    assert cells.count() == 32
    steps = [int(step) for step in cells.locator("small").all_inner_texts()]
    assert set(steps) == set(range(1, 17))
    slider = tab.locator("#captions .run").first.locator("input.back")
    slider.focus()
    for _ in range(12):
        tab.keyboard.press("ArrowLeft")
    sync_api.expect(tab.locator("#captions .run").first.locator("input.back + output")).to_have_text("4 of 16")
    hidden = tab.locator("#captions .run").first.locator(".canvas li.open")
    assert hidden.count() == sum(step > 4 for step in steps)
    assert tab.locator("#captions .run").nth(1).locator(".canvas li.open").count() == 0
    word(tab, 0, "elephant").click()
    sync_api.expect(tab.locator("#sentence")).to_contain_text('"elephant" (baseline)')
    assert hidden.count() == sum(step > 4 for step in steps)
    keep(tab, "demo-canvas.png")
