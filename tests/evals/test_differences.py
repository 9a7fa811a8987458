# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from vlm_attn.evals.differences import Change, changes
from vlm_attn.evals.gallery import marked


@pytest.mark.parametrize(
    ("before", "after", "wanted"),
    [
        ("A dog and a cat.", "a dog, and a cat", []),
        ("a dog", "", [Change("removed", 0, 0, "a dog")]),
        ("", "a dog", [Change("added", 0, 5, "")]),
        ("a bear and an elephant", "an elephant", [Change("removed", 0, 0, "a bear and")]),
        ("a dog stands here", "a large dog here", [Change("added", 2, 7, ""), Change("removed", 11, 11, "stands")]),
        ("one red car", "one blue-green car", [Change("changed", 4, 14, "red")]),
    ],
)
def test_changes(before: str, after: str, wanted: list[Change]) -> None:
    assert changes(before, after) == wanted


def test_marked_keeps_the_text_and_escapes_it() -> None:
    text = "a <b>bear</b> stands & waits"
    mentions = [{"start": 5, "end": 9, "text": "bear"}]
    html = marked(text, changes("a dog waits", text), mentions)
    assert '<span class="false" title="not in the image">bear</span>' in html
    assert 'title="in place of: dog"' in html
    assert "<b>" not in html
    assert "&amp; " in html
