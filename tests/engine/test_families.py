# SPDX-License-Identifier: Apache-2.0
"""Every family of the image-text-to-text mapping that can be built small: it works, or is refused with the reason."""

from __future__ import annotations

import pytest
import transformers

import vlm_attn
from tests import rows
from tests.families import MAPPING, METHODS, PAGE, Result, check, line

WRITTEN = PAGE.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", sorted(set(MAPPING) | set(rows.ROWS)))
def test_family(name: str) -> None:
    result = check(name)
    if result.missing:
        pytest.skip(result.missing)
    assert not result.failed
    assert set(result.works) | set(result.refused) == set(METHODS)
    if f"transformers {transformers.__version__}:" in WRITTEN:
        assert line(name, result) in WRITTEN, "docs/families.md says something else: run python -m tests.families"


def test_enough_families_work() -> None:
    lines = [line for line in WRITTEN.splitlines() if line.startswith("| `")]
    assert sum("| yes |" in line for line in lines) >= 45
    if f"transformers {transformers.__version__}:" in WRITTEN:
        assert [line.split("`")[1] for line in lines] == list(MAPPING)


def test_layers_without_attention_are_named() -> None:
    """Edits there are a warning; reading attention there is an error before anything is changed."""
    model, _ = rows.build("qwen3_5")
    settings = {"enhance_layers": 3, "query_words": "all"}
    with pytest.warns(UserWarning, match="layers 0, 1, 2 of qwen3_5"):
        vlm_attn.unpatch(vlm_attn.patch(model, "gift", saliency_layers=3, **settings))
    with pytest.raises(ValueError, match="gift reads the attention of layers .1,., but layers 0, 1, 2"):
        vlm_attn.patch(model, "gift", saliency_layers=1, **settings)
    assert not vlm_attn.is_patched(model)


def test_a_failure_is_not_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    """What does not do what it should fails the matrix; it does not turn into a line that says "refused"."""
    monkeypatch.setattr("vlm_attn.attention.edited_attention", lambda query, key, value, edits, **_: query)
    broken = check("llava")
    assert {"gift", "var"} <= set(broken.failed)
    assert not set(broken.failed) & set(broken.works)
    assert isinstance(broken, Result)
