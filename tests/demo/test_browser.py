# SPDX-License-Identifier: Apache-2.0
"""The page in Debian's chromium."""

from __future__ import annotations

import re
import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_attn.demo.link import State

from .browsing import AUDIT, keep, sync_api, word

pytestmark = pytest.mark.browser


def test_main_flow(visit: Any) -> None:
    tab = visit()
    assert tab.locator("#captions").inner_text().startswith("Choose an image")
    assert "scenes" in tab.locator("#model").inner_text()
    assert "preset scenes" in tab.locator("#model").inner_text()
    for button in ("Saliency", "Sinks", "Kept tokens"):
        sync_api.expect(tab.get_by_role("button", name=button)).to_be_disabled()
    tab.click("#describe")
    word(tab, 1, "elephant").wait_for()
    boxes = tab.locator("#captions .run")
    assert boxes.count() == 2
    assert "bear" in boxes.nth(0).locator(".false").all_inner_texts()
    assert "64 visual tokens" in boxes.nth(1).inner_text()
    word(tab, 0, "giraffe").click()
    tab.wait_for_selector("#overlay img")
    sync_api.expect(tab.locator("#sentence")).to_contain_text('"giraffe" (baseline)')
    assert word(tab, 0, "giraffe").get_attribute("aria-pressed") == "true"
    keep(tab, "demo.png")
    walk = tab.locator("#captions .run").nth(1).locator("input.walk")  # the slider over the words of the other caption
    walk.focus()
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    sync_api.expect(tab.locator("#sentence")).to_contain_text('Word 3 of 16, "scene" (gift)')
    assert word(tab, 1, "scene").get_attribute("aria-pressed") == "true"
    sync_api.expect(tab.get_by_role("button", name="Kept tokens")).to_be_disabled()  # no run keeps fewer
    for button, text in (("Saliency", "Saliency of"), ("Sinks", "sink")):
        tab.get_by_role("button", name=button).click()
        sync_api.expect(tab.locator("#sentence")).to_contain_text(text)


def test_keyboard(visit: Any) -> None:
    """No mouse: describe, walk over the words, look."""
    tab = visit()
    tab.focus("#prompt textarea, #prompt input")
    tab.keyboard.press("Enter")
    word(tab, 0, "scene").wait_for()
    word(tab, 0, "safari").focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.textContent") == "scene"
    tab.keyboard.press("Enter")
    sync_api.expect(tab.locator("#sentence")).to_contain_text('"scene" (baseline)')


def test_link(visit: Any) -> None:
    """A link brings picture, methods and parameters to somebody else, and what it cannot bring is said."""
    tab = visit("?scene=8&method=gift&method=gift%2Bvar&param=gift.alpha%3D3")
    tab.click("#describe")
    word(tab, 1, "park").wait_for()
    assert tab.locator("#captions h3").all_inner_texts() == ["gift", "gift+var"]
    tab.get_by_role("button", name="The same again").click()
    sync_api.expect(tab.locator("#link textarea, #link input")).to_have_value(tab.url)
    for part in ("scene=8", "method=gift", "method=gift%2Bvar", "param=gift.alpha%3D3"):
        assert part in tab.url
    command = "vlm-attn caption scenes:validation/8 --model scenes --method gift --method gift+var --param gift.alpha=3"
    assert tab.locator("#command textarea, #command input").input_value().startswith(command)
    other = visit("?" + tab.url.partition("?")[2])
    other.click("#describe")
    word(other, 1, "park").wait_for()
    assert other.locator("#captions p").first.inner_text() == tab.locator("#captions p").first.inner_text()
    wrong = visit("?method=gfit")
    sync_api.expect(wrong.locator("#wrong-link").get_by_text("did you mean 'gift'")).to_be_visible()  # and it stays
    evil = visit("?method=%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'evil'%22%3E")
    sync_api.expect(evil.get_by_text("unknown method '<img")).to_be_visible()
    assert evil.title() == "vlm-attn demo"


@pytest.mark.parametrize("slowly", [0.6], indirect=True)
@pytest.mark.usefixtures("slowly")
def test_stop(visit: Any) -> None:
    """The generations end, what was written so far stays, and the page goes on."""
    tab = visit()
    assert not tab.locator("#stop").is_visible()  # nothing runs
    tab.click("#describe")
    tab.locator("#captions span.word").first.wait_for()
    sync_api.expect(tab.locator("#describe")).to_be_disabled()
    assert [thread for thread in threading.enumerate() if "_write" in thread.name]
    tab.click("#stop")
    for _ in range(60):
        tab.wait_for_timeout(500)
        if not [thread for thread in threading.enumerate() if "_write" in thread.name]:
            break
    assert tab.locator("#captions button.word").count() == 0
    assert tab.locator("#captions span.word").count() > 0
    assert not [thread for thread in threading.enumerate() if "_write" in thread.name]
    sync_api.expect(tab.locator("#stop")).to_be_hidden()
    tab.click("#describe")
    word(tab, 0, "safari").wait_for()


def test_errors_stand_in_their_place(visit: Any, tmp_path: Path) -> None:
    tab = visit()
    file = tmp_path / "cut.png"
    Image.effect_noise((80, 80), 90).save(file)
    file.write_bytes(file.read_bytes()[:900])
    tab.get_by_role("button", name="Remove Image").click()
    sync_api.expect(tab.locator("#scene input")).to_have_value("")
    sync_api.expect(tab.locator("#describe")).to_be_disabled()  # without an image
    sync_api.expect(tab.locator("#refused")).to_contain_text("Choose an image first")
    tab.set_input_files("#picture input[type=file]", str(file))  # refused at once, not when it is described
    sync_api.expect(tab.locator("#wrong-file [role=alert]")).to_contain_text("cut off or broken")
    assert tab.locator("#picture img").count() == 0
    tab.fill("#scene input", "12")
    tab.locator("#scene input").press("Tab")
    sync_api.expect(tab.locator("#describe")).to_be_enabled()
    sync_api.expect(tab.locator("#wrong-file [role=alert]")).to_have_count(0)

    tab.get_by_role("button", name="Parameters").click()
    alpha = tab.locator("#gift-alpha input[type=number]")
    alpha.fill("99")  # refused before anything is pressed, at the field
    sync_api.expect(tab.locator("#refused [role=alert]")).to_have_text("gift: alpha=99 is outside [0, 20]")
    sync_api.expect(tab.locator("#describe")).to_be_disabled()
    assert "from 0 to 20" in tab.locator("#gift-alpha").evaluate("e => getComputedStyle(e, '::after').content")
    alpha.fill("3")
    sync_api.expect(tab.locator("#refused [role=alert]")).to_have_count(0)
    layers = tab.locator("#gift-enhance_layers textarea, #gift-enhance_layers input")
    layers.fill("77")  # only the model knows that this is too many
    tab.click("#describe")
    sync_api.expect(tab.locator("#captions [role=alert]")).to_contain_text("layer 77")
    assert tab.get_by_text("layer 77").count() == 1  # one message
    assert "Traceback" not in tab.content()
    layers.fill("3, 4")
    tab.click("#describe")  # and goes on
    word(tab, 0, "laptop").wait_for()
    sync_api.expect(tab.locator("#captions [role=alert]")).to_have_count(0)


def test_methods_by_kind(visit: Any) -> None:
    """One line each; a click puts one among the runs. OPERA's caption comes whole, MVP is sent to the questions."""
    tab = visit()
    tab.get_by_role("button", name="What the methods do").click()
    heads = tab.locator("#listing h3").all_inner_texts()
    assert heads[0] == "Attention is edited"
    assert len(heads) > 4
    sync_api.expect(tab.locator("#listing button[aria-pressed=true]")).to_have_text(["gift"])
    tab.locator("#listing button[data-method=gift]").click()  # out
    sync_api.expect(tab.locator("#listing button[data-method=gift]")).to_have_attribute("aria-pressed", "false")
    tab.locator("#listing button[data-method=opera]").click()
    sync_api.expect(tab.locator("#listing button[data-method=opera]")).to_have_attribute("aria-pressed", "true")
    tab.click("#describe")
    word(tab, 1, "elephant").wait_for()
    assert tab.locator("#captions h3").all_inner_texts() == ["baseline", "opera"]
    other = tab.locator("#captions .run").nth(1)
    assert other.locator("ins, del").count() > 0
    assert "Against baseline: " in other.inner_text()
    tab.locator("#listing button[data-method=mvp]").click()
    sync_api.expect(tab.locator("#listing button[data-method=mvp]")).to_have_attribute("aria-pressed", "true")
    tab.click("#describe")
    sync_api.expect(tab.locator("#captions [role=alert]")).to_contain_text("Yes or no")


def test_paste(visit: Any, page: Any) -> None:
    """A picture from the clipboard takes the drawn scene's place."""
    tab = visit(permissions=["clipboard-read", "clipboard-write"])
    tab.evaluate("""async () => {
      const canvas = Object.assign(document.createElement('canvas'), {width: 90, height: 60});
      canvas.getContext('2d').fillRect(0, 0, 40, 40);
      const blob = await new Promise(done => canvas.toBlob(done, 'image/png'));
      await navigator.clipboard.write([new ClipboardItem({'image/png': blob})]);
    }""")
    tab.get_by_role("button", name="Remove Image").click()
    tab.get_by_role("button", name="Paste from clipboard").click()
    tab.wait_for_function("document.querySelector('#picture img')?.naturalWidth === 90")
    sync_api.expect(tab.locator("#scene input")).to_have_value("")
    tab.click("#describe")
    sync_api.expect(tab.locator("#captions")).to_contain_text("not known here")


def test_yes_or_no(visit: Any) -> None:
    tab = visit()
    tab.get_by_role("tab", name="Yes or no").click()
    question = tab.locator("#question textarea, #question input")
    sync_api.expect(question).to_have_value(State().question)  # the tab is there; what it starts with comes no more
    question.fill("Is there an elephant in the image?")
    question.press("Tab")
    tab.click("#ask")
    sync_api.expect(tab.locator("#answers .run").first).to_contain_text("right (the truth: yes)")


def test_more_than_are_served_at_once(visit: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two are served, the third is told its place; everybody gets what they asked for."""
    from vlm_attn.demo import studio

    put, go_on = studio._Tokens.put, threading.Event()

    def wait(self: Any, value: Any) -> None:
        put(self, value)
        go_on.wait(300)

    monkeypatch.setattr(studio._Tokens, "put", wait)
    tabs = {word: visit(f"?scene={scene}") for word, scene in (("elephant", 3), ("laptop", 12), ("kite", 8))}
    try:
        for name in ("elephant", "laptop"):
            tabs[name].click("#describe")
            tabs[name].locator("#stop").wait_for()
        tabs["kite"].click("#describe")
        place = tabs["kite"].locator("#captions [data-testid=status-tracker]")
        sync_api.expect(place).to_contain_text(re.compile(r"queue: \d+/\d+"))
    finally:
        go_on.set()
    for name, tab in tabs.items():
        word(tab, 1, name).click()
        sync_api.expect(tab.locator("#sentence")).to_contain_text(f'"{name}" (gift)')


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_looks(visit: Any, width: int, theme: str, tmp_path: Path) -> None:
    """On a phone and a desk, light and dark: the image is in sight with the word, nothing sticks out, all can be read."""
    query = f"?__theme={theme}&scene=2&method=baseline&method=gift&param=gift.alpha%3D20"
    tab = visit(query, viewport={"width": width, "height": 850}, color_scheme=theme)
    tab.click("#describe")
    chosen = tab.locator("#captions button.word[data-run='1'][data-word='4']")
    chosen.click()
    sync_api.expect(tab.locator("#sentence")).to_contain_text("of the attention is on the image")
    tab.wait_for_timeout(500)  # colours fade in
    image, text, last = (
        tab.locator(name).first.bounding_box()
        for name in ("#overlay img", "#captions button.word[aria-pressed=true]", "#captions")
    )
    for box in (image, text):
        assert box["y"] >= 0
        assert box["y"] + box["height"] <= 850
    if width == 390:
        assert image["y"] + image["height"] <= text["y"]  # above
        tab.locator("#captions .run").nth(1).locator("input.walk").scroll_into_view_if_needed()
        tab.mouse.move(200, 600)
        tab.mouse.wheel(0, 200)
        tab.wait_for_timeout(300)
        assert tab.locator("#overlay img").first.bounding_box()["y"] >= 0  # and stays
    else:
        assert image["x"] + image["width"] <= last["x"]  # beside
        left, right = tab.locator("#view").bounding_box(), tab.locator("#captions").bounding_box()
        assert left["height"] < 2.5 * right["height"]
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    # No word is parted from the punctuation at it: both stand in a stretch that does not break.
    assert tab.locator("#captions .chunk").last.evaluate("e => [e.textContent.slice(-1), getComputedStyle(e).whiteSpace]") == [
        ".", "nowrap",
    ]  # fmt: skip
    assert tab.locator("#captions ins").count() > 0
    for name in ("What the methods do", "Parameters", "The same again"):
        tab.get_by_role("button", name=name).click()
    tab.wait_for_timeout(300)
    assert tab.evaluate(AUDIT) == []
    file = tmp_path / "page.png"
    tab.screenshot(path=str(file), full_page=True)
    keep(tab, f"demo-{width}-{theme}.png")
    with Image.open(file) as shot:
        light = sum(shot.convert("L").resize((40, 40)).getdata()) / 1600
    assert light > 170 if theme == "light" else light < 90
