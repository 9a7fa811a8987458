# SPDX-License-Identifier: Apache-2.0
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


#: What a screen reader and weak eyes need: every field and button has a name, every image a text (or says that it needs none),
#: text has the contrast that WCAG 2.1 AA asks for. Returns sentences about what has not.
AUDIT = r"""() => {
  const seen = e => e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && e.getClientRects().length;
  const say = e => `${e.tagName.toLowerCase()}${e.id ? '#' + e.id : ''}.${e.className} in ${e.closest('[id]')?.id}`;
  const wrong = [];
  for (const e of document.querySelectorAll('button, input, textarea, select, [role=button], [role=listbox], [role=slider]')) {
    if (!seen(e)) continue;
    const by = (e.getAttribute('aria-labelledby') || '').split(' ').map(id => document.getElementById(id)?.textContent || '');
    const texts = [e.getAttribute('aria-label'), e.title, e.placeholder, ...by];
    texts.push(...[...(e.labels || [])].map(label => label.textContent));
    if (!e.matches('input, textarea, select')) texts.push(e.textContent, ...[...e.querySelectorAll('img')].map(i => i.alt));
    if (!texts.some(text => text && text.trim())) wrong.push('no name: ' + say(e));
  }
  for (const e of document.querySelectorAll('img')) if (seen(e) && !e.hasAttribute('alt')) wrong.push('no text: ' + say(e));
  const paint = document.createElement('canvas').getContext('2d', {willReadFrequently: true});
  const rgba = colour => {
    paint.clearRect(0, 0, 1, 1); paint.fillStyle = colour; paint.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = paint.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const over = (top, under) => [...[0, 1, 2].map(i => top[i] * top[3] + under[i] * (1 - top[3])), 1];
  const back = e => {
    const stack = [];
    for (let p = e; p; p = p.parentElement) stack.push(rgba(getComputedStyle(p).backgroundColor));
    return stack.reverse().reduce((under, top) => over(top, under), [255, 255, 255, 1]);
  };
  const light = c => [0.2126, 0.7152, 0.0722].reduce((sum, w, i) => {
    const v = c[i] / 255;
    return sum + w * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
  }, 0);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  const done = new Set();
  while (walker.nextNode()) {
    const e = walker.currentNode.parentElement;
    if (!walker.currentNode.textContent.trim() || done.has(e) || !seen(e)) continue;
    done.add(e);
    if (e.closest('[disabled], [aria-disabled=true], option, style, script, footer, .open')) continue;
    const style = getComputedStyle(e), under = back(e), text = over(rgba(style.color), under);
    const [a, b] = [light(text), light(under)].sort((x, y) => y - x), ratio = (a + 0.05) / (b + 0.05);
    const size = parseFloat(style.fontSize), large = size >= 24 || (size >= 18.6 && style.fontWeight >= 700);
    if (ratio < (large ? 3 : 4.5)) wrong.push(`contrast ${ratio.toFixed(1)}: "${e.textContent.slice(0, 30)}" ${say(e)}`);
  }
  return wrong;
}"""
