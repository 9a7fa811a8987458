# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def studio() -> Any:
    """The demo over the bundled model."""
    from vlm_attn.demo.studio import Studio
    from vlm_attn.evals.models import load_model

    return Studio(*load_model("scenes", device="cpu"), "scenes")


@pytest.fixture(scope="session")
def canvas_studio() -> Any:
    """The demo over the bundled masked-diffusion model."""
    from vlm_attn.demo.studio import Studio
    from vlm_attn.evals.models import load_model

    return Studio(*load_model("scenes-diffusion", device="cpu"), "scenes-diffusion")


@pytest.fixture(scope="module")
def page(studio: Any) -> Iterator[Any]:
    """The page, served on this machine."""
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    from vlm_attn.demo.app import serving

    with serving(studio) as served:
        yield served


@pytest.fixture
def slowly(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 20 ms a token (or the parameter), so that something is seen of a stream on any machine."""
    from vlm_attn.demo import studio

    put = studio._Tokens.put

    def wait(self: Any, value: Any) -> None:
        time.sleep(getattr(request, "param", 0.02))
        put(self, value)

    monkeypatch.setattr(studio._Tokens, "put", wait)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from .browsing import CHROMIUM, sync_api  # skips where playwright is not installed

    if CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with sync_api.sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture
def visit(browser: Any, page: Any) -> Iterator[Any]:
    """Opens the page as a new visitor; none may have seen a script fail, or have asked another server for anything."""
    from .browsing import LONG

    contexts, errors, elsewhere = [], [], []

    def start(query: str = "", **options: Any) -> Any:
        context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        contexts.append(context)
        tab = context.new_page()
        tab.set_default_timeout(LONG)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("request", lambda request: elsewhere.append(request.url) if page.local_url not in request.url else None)
        tab.goto(page.local_url + query)
        tab.wait_for_selector("#describe")
        tab.wait_for_selector("#picture img")  # the state of the link is there
        return tab

    yield start
    for context in contexts:
        context.close()
    assert errors == []
    assert [url for url in elsewhere if not url.startswith(("data:", "blob:"))] == []
