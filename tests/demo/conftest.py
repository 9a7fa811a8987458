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


@pytest.fixture(scope="module")
def page(studio: Any) -> Iterator[Any]:
    """The page, served on this machine."""
    pytest.importorskip("gradio", reason="the demo extra is not installed")
    from vlm_attn.demo.app import serving

    with serving(studio) as served:
        yield served


@pytest.fixture
def slowly(monkeypatch: pytest.MonkeyPatch) -> None:
    """At least 20 ms a token, so that something is seen of a stream on any machine."""
    from vlm_attn.demo import studio

    put = studio._Tokens.put

    def wait(self: Any, value: Any) -> None:
        time.sleep(0.02)
        put(self, value)

    monkeypatch.setattr(studio._Tokens, "put", wait)
