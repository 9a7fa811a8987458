# SPDX-License-Identifier: Apache-2.0
"""The helpers that decide whether a test skips must not hide a fault of ours."""

from __future__ import annotations

from typing import Any, NoReturn

import pytest

import vlm_attn
from tests import tiny
from tests.helpers import ACTIVE, generate, stock
from vlm_attn import call


class TestStock:
    def test_the_plain_models_error_is_a_skip(self) -> None:
        model, inputs = tiny.llava()
        with pytest.raises(pytest.skip.Exception, match="stock transformers: ValueError"):
            stock(lambda: generate(model, inputs([[3, "image", 4]]), cache_implementation="no such cache"))

    def test_an_error_of_ours_is_none(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def planted(*args: Any) -> NoReturn:
            raise RuntimeError("planted")

        model, inputs = tiny.llava()
        monkeypatch.setattr(call.Call, "once", planted)
        with vlm_attn.patched(model, "pai", **ACTIVE["pai"]), pytest.raises(RuntimeError, match="planted"):
            stock(lambda: generate(model, inputs([[3, "image", 4]])))
