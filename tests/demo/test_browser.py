"""The page in Debian's chromium."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vlm_attn.demo.link import State

from .browsing import keep, sync_api, word

pytestmark = pytest.mark.browser


def test_main_flow(visit: Any) -> None:
    tab = visit()
    assert tab.locator("#captions").inner_text().startswith("Choose a picture")
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
    sync_api.expect(tab.locator("#link textarea, #link input")).to_have_value(tab.url)
    for part in ("scene=8", "method=gift", "method=gift%2Bvar", "param=gift.alpha%3D3"):
        assert part in tab.url
    other = visit("?" + tab.url.partition("?")[2])
    other.click("#describe")
    word(other, 1, "park").wait_for()
    assert other.locator("#captions p").first.inner_text() == tab.locator("#captions p").first.inner_text()
    wrong = visit("?method=gfit")
    sync_api.expect(wrong.get_by_text("did you mean 'gift'")).to_be_visible()
    evil = visit("?method=%3Cimg%20src%3Dx%20onerror%3D%22document.title%3D'evil'%22%3E")
    sync_api.expect(evil.get_by_text("unknown method '<img")).to_be_visible()
    assert evil.title() == "vlm-attn demo"


@pytest.mark.parametrize("slowly", [0.15], indirect=True)
@pytest.mark.usefixtures("slowly")
def test_stop(visit: Any) -> None:
    """The generations end, what was written so far stays, and the page goes on."""
    tab = visit()
    tab.click("#describe")
    tab.locator("#captions span.word").first.wait_for()
    assert [thread for thread in threading.enumerate() if "_write" in thread.name]
    tab.click("#stop")
    for _ in range(60):
        tab.wait_for_timeout(500)
        if not [thread for thread in threading.enumerate() if "_write" in thread.name]:
            break
    assert tab.locator("#captions button.word").count() == 0
    assert tab.locator("#captions span.word").count() > 0
    assert not [thread for thread in threading.enumerate() if "_write" in thread.name]
    tab.click("#describe")
    word(tab, 0, "safari").wait_for()


def test_errors_are_messages(visit: Any, tmp_path: Path) -> None:
    tab = visit()
    file = tmp_path / "cut.png"
    Image.effect_noise((80, 80), 90).save(file)
    file.write_bytes(file.read_bytes()[:900])
    tab.get_by_role("button", name="Remove Image").click()
    sync_api.expect(tab.locator("#scene input")).to_have_value("")
    tab.set_input_files("#picture input[type=file]", str(file))
    tab.wait_for_selector("#picture img", state="attached")
    tab.click("#describe")
    sync_api.expect(tab.get_by_text("cut off or broken")).to_be_visible()
    assert "Traceback" not in tab.content()
    tab.fill("#scene input", "12")
    tab.locator("#scene input").press("Tab")
    tab.click("#describe")  # and goes on
    word(tab, 0, "laptop").wait_for()


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


def test_two_at_once(visit: Any) -> None:
    one, two = visit("?scene=3"), visit("?scene=12")
    one.click("#describe")
    two.click("#describe")
    word(one, 1, "elephant").wait_for()
    word(two, 1, "laptop").wait_for()
    word(one, 1, "elephant").click()
    word(two, 1, "laptop").click()
    sync_api.expect(one.locator("#sentence")).to_contain_text('"elephant" (gift)')
    sync_api.expect(two.locator("#sentence")).to_contain_text('"laptop" (gift)')


def test_small_and_dark(visit: Any) -> None:
    """On a telephone nothing sticks out to the side, boxes stand below each other; a dark page has light words."""
    tab = visit("?__theme=dark", viewport={"width": 360, "height": 740}, color_scheme="dark")
    tab.click("#describe")
    word(tab, 1, "elephant").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    first, second = (tab.locator("#captions .run").nth(n).bounding_box() for n in (0, 1))
    assert first["x"] == second["x"]
    assert second["y"] > first["y"]
    colours = (
        "e => [getComputedStyle(e).color, getComputedStyle(e).backgroundColor].map(c => c.match(/\\d+/g).map(Number))"
    )
    text, back = tab.locator("#captions .run").first.evaluate(colours)
    assert sum(text[:3]) > sum(back[:3]) + 300
    keep(tab, "demo-dark.png")
