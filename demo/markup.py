# SPDX-License-Identifier: Apache-2.0
"""Captions, answers and the list of methods as HTML. Everything that came from a model or a visitor is escaped."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape

from vlm_attn import registry
from vlm_attn.demo.controls import CLOSED, KINDS, kind, plain
from vlm_attn.demo.studio import Answer, Result, Run
from vlm_attn.evals.differences import Change, changes

#: Follows the page's light and dark colours; columns become rows where the screen is narrow.
CSS = """
:root { --word: #c2410c; --tab: #9a3412; --wrong: #b91c1c; --added: #15803d; --changed: #92400e; }
.dark { --word: #c2410c; --tab: #fb923c; --wrong: #fca5a5; --added: #86efac; --changed: #fcd34d; }
footer { display: none !important; }
.gradio-container { overflow: clip !important; } /* hidden would keep the image from staying in sight */
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0.75rem; }
.run { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.75rem 1rem;
       background: var(--background-fill-secondary); color: var(--body-text-color); }
.run h3 { margin: 0 0 0.4rem; font-size: 1rem; }
.run p { margin: 0.3rem 0; line-height: 1.9; overflow-wrap: anywhere; }
.run .facts { color: var(--body-text-color-subdued); font-size: 0.875rem; line-height: 1.4; }
.run .chunk { white-space: nowrap; }
.run button.word { all: unset; cursor: pointer; border-radius: 4px; padding: 0 0.1em; }
.run button.word:hover { background: var(--border-color-accent); }
.run button.word:focus-visible { outline: 3px solid var(--word); outline-offset: 1px; }
.run button.word[aria-pressed="true"] { background: var(--word); color: white; }
.run ins { text-decoration: none; border-bottom: 2px solid var(--added); }
.run ins.changed { border-bottom: 2px dashed var(--changed); }
.run del { color: var(--body-text-color-subdued); }
.run .false, .run button.word.false {
  text-decoration: underline wavy var(--wrong) 2px; text-underline-offset: 4px; font-weight: 600; }
.run .canvas { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0.5rem 0 0; padding: 0; list-style: none; }
.run .canvas li { border-radius: 4px; padding: 0 0.3rem; line-height: 1.7; border: 1px solid var(--border-color-primary);
  background: color-mix(in srgb, var(--color-accent) calc(var(--early) * 45%), transparent); }
.run .canvas small { margin-left: 0.25rem; }
.run .canvas li.open { color: transparent; background: repeating-linear-gradient(45deg, transparent 0 4px,
  var(--border-color-primary) 4px 6px); }
.run .step { display: flex; align-items: center; gap: 0.5rem; margin-top: 0.5rem; font-size: 0.875rem; }
.run .step input { flex: 1; min-width: 4rem; accent-color: var(--word); }
.note { color: var(--body-text-color-subdued); margin-top: 0.5rem; }
[data-testid="status-tracker"]:has(.error) { display: none !important; } /* the error itself stands in its place */
.problem { border-style: solid !important; border-width: 1px 1px 1px 6px !important; border-color: var(--wrong) !important;
  border-radius: 6px; padding: 0.6rem 0.9rem;
  color: var(--body-text-color); background: var(--background-fill-secondary); overflow-wrap: anywhere; }
.listing h3 { margin: 0.9rem 0 0.3rem; font-size: 0.95rem; }
.listing ul { margin: 0; padding: 0; list-style: none; }
.listing li { display: grid; grid-template-columns: 9rem 1fr; gap: 0.6rem; align-items: baseline; padding: 0.15rem 0; }
.listing button { all: unset; cursor: pointer; border: 1px solid var(--border-color-primary); border-radius: 6px;
  padding: 0.05rem 0.5rem; color: var(--body-text-color); }
.listing button:hover { border-color: var(--word); }
.listing button:focus-visible { outline: 3px solid var(--word); outline-offset: 1px; }
.listing button[aria-pressed="true"] { background: var(--word); border-color: var(--word); color: white; }
#parameters .form { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(18rem, 100%), 1fr)); background: none; }
.listing { columns: 2 24rem; column-gap: 2rem; }
.listing section { break-inside: avoid; }
button[role="tab"].selected { color: var(--tab) !important; }
#results { align-items: flex-start; }
#view { position: sticky; top: 0.5rem; z-index: 5; background: var(--body-background-fill); }
#refused:not(:has(.problem)):not(:has(.note)), #wrong-link:not(:has(.problem)),
#wrong-file:not(:has(.problem)) { display: none; }
#head h1 { font-size: 1.4rem; margin: 0; }
#model { margin: 0.2rem 0 0; }
#examples .caption-label { font-size: 0.7rem; padding: 0 0.3rem; }
@media (max-width: 700px) {
  #view { top: 0; padding-bottom: 0.4rem; }
  #overlay { height: auto !important; min-height: 0 !important; }
  #overlay img { max-height: 36vh; }
  .listing li { grid-template-columns: 1fr; gap: 0.1rem; }
}
"""

#: A canvas goes back to the step that its slider says. A word that is clicked, entered with the keyboard or reached with the
#: slider of its caption becomes a ``select`` event; arrow keys go from word to word. One word of a caption can be reached
#: with Tab, the one that was chosen last.
JS = """
const words = () => [...element.querySelectorAll('button.word')];
const reach = word => words().filter(other => other.dataset.run === word.dataset.run)
  .forEach(other => other.tabIndex = other === word ? 0 : -1);
const choose = word => {
  words().forEach(other => other.setAttribute('aria-pressed', other === word));
  reach(word);
  const slider = word.closest('.run').querySelector('input.walk');
  if (slider) {
    slider.value = Number(word.dataset.word) + 1;
    slider.setAttribute('aria-valuetext', slider.value + ', ' + word.textContent);
    slider.nextElementSibling.textContent = slider.value + ' of ' + slider.max;
  }
  trigger('select', {index: [Number(word.dataset.run), Number(word.dataset.word)], value: word.textContent});
};
// Gradio's images have no text: say what is seen.
const view = document.querySelector('#view'), name = () => view.querySelectorAll('#overlay button').forEach(button => {
  if (!button.ariaLabel && !button.textContent.trim()) button.ariaLabel = 'The image, with what the model looked at';
});
new MutationObserver(name).observe(view, {childList: true, subtree: true});
name();
// Nor have its fields with a button to copy, which are made when their section is opened.
const again = document.querySelector('#reproduce'), label = () => again.querySelectorAll('textarea, input').forEach(field => {
  field.ariaLabel = field.closest('.block[id]').id + ', the state to copy';
});
new MutationObserver(label).observe(again, {childList: true, subtree: true});
label();
element.addEventListener('click', event => {
  const word = event.target.closest('button.word');
  if (word) choose(word);
});
element.addEventListener('input', event => {
  const slider = event.target, box = slider.closest('.run');
  if (slider.classList.contains('walk')) {
    choose(box.querySelector(`button.word[data-word='${slider.value - 1}']`));
    return;
  }
  slider.nextElementSibling.textContent = slider.value + ' of ' + slider.max;
  box.querySelectorAll('.canvas li').forEach(
    cell => cell.classList.toggle('open', Number(cell.dataset.step) > Number(slider.value)));
});
element.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const all = words(), place = all.indexOf(document.activeElement);
  if (!step || place < 0) return;
  event.preventDefault();
  const next = all[place + step];
  if (next) { reach(next); next.focus(); }
});
"""

#: A method of the list that is clicked becomes a ``select`` event.
PICK_JS = """
element.addEventListener('click', event => {
  const button = event.target.closest('button[data-method]');
  if (button) trigger('select', {index: 0, value: button.dataset.method});
});
window.showPicked = () => element.querySelectorAll('button[data-method]').forEach(
  button => button.setAttribute('aria-pressed', Boolean(window.picked?.has(button.dataset.method))));
window.showPicked();
"""

#: Shows on the list which methods are chosen, now or when the list is opened.
PICKED_JS = """chosen => {
  window.picked = new Set(chosen.flatMap(run => run.split('+')));
  window.showPicked?.();
}"""

START = '<p class="note">Choose an image and press <b>Describe</b>.</p>'
CHUNK = 40  # longest stretch without white space that is kept on one line


def problem(text: str) -> str:
    """What went wrong, in the place where the result would be."""
    return f'<div class="problem" role="alert">{escape(text)}</div>'


def refusal(text: str, key: str = "", limits: str = "") -> str:
    """What is wrong with what was chosen, and where: the parameter's field is outlined, and says what it takes.

    Args:
        text: the sentence.
        key: of the parameter, ``"gift.alpha"``; nothing where it is no parameter.
        limits: what the field takes.
    """
    if not key:
        return problem(text)
    field = "#" + key.replace(".", "-")
    said = re.sub(r"[^\w ,.%()\[\]-]", " ", limits)  # it stands in a style sheet
    style = (
        f"<style>{field} {{ outline: 2px solid var(--wrong); border-radius: 6px; }} "
        f'{field}::after {{ content: "{said}"; color: var(--wrong); padding: 0 0.75rem 0.5rem; }}</style>'
    )
    return problem(text) + style


def methods(known: Iterable[str]) -> str:
    """The methods by kind, each with one line; a button puts it among the runs, or takes it out."""
    entries = [(name, registry.method_class(name)) for name in known]
    parts = []
    for title in KINDS:
        rows = []
        for name, cls in entries:
            if kind(cls) != title:
                continue
            line = plain((cls.__doc__ or "").strip().splitlines()[0])
            if name in CLOSED:
                line += " Yes or no only."
            elif getattr(cls, "beam_search", False):
                line += " Shown when it is finished."
            button = f'<button type="button" data-method="{escape(name)}" aria-pressed="false">{escape(name)}</button>'
            rows.append(f"<li><span>{button}</span><span>{escape(line)}</span></li>")
        if rows:
            parts.append(f"<section><h3>{escape(title)}</h3><ul>{''.join(rows)}</ul></section>")
    return f'<div class="listing">{"".join(parts)}</div>'


def captions(result: Result) -> str:
    """One box per run: its name, its words, what it invents, how it differs from the first run, and its speed.

    Words can be chosen once all runs are done.
    """
    done = all(run.done for run in result.runs)
    first = result.runs[0] if result.runs else None
    boxes = "".join(_box(run, number, done, first) for number, run in enumerate(result.runs))
    objects = result.picture.objects
    if objects is None:
        note = "What is in this image is not known here, so no word is marked as wrong."
    else:
        marked = any(run.mentions is not None for run in result.runs)
        how = (
            "Objects that are not in it are underlined in red."
            if marked
            else "Wrong words are marked where simplemma is installed."
        )
        note = f"In the image: {escape(', '.join(objects))}. {how}"
    if len(result.runs) > 1 and first is not None:
        note += f" Against {escape(first.spec.label)}: added words are underlined, changed ones dashed, removed ones struck."
    return f'<div class="runs" aria-busy="{str(not done).lower()}">{boxes}</div><p class="note">{note}</p>'


def _box(run: Run, number: int, done: bool, first: Run | None) -> str:
    compared = done and first is not None and run is not first and not run.error and not first.error
    found = changes(first.text, run.text) if compared and first is not None else []
    waiting = "searching, shown when it is finished ..." if run.whole and not run.done else "..."
    parts = [f"<h3>{escape(run.spec.label)}</h3>", f"<p>{_words(run, number, done, found) or waiting}</p>"]
    if run.canvas:
        parts.append(_canvas(run))
    if done and len(run.words) > 1:
        label = escape(f"Word of {run.spec.label}")
        slider = f'<input class="walk" type="range" min="1" max="{len(run.words)}" value="1" aria-label="{label}">'
        parts.append(f'<label class="step">Word {slider}<output>of {len(run.words)}</output></label>')
    if run.error:
        parts.append(problem(run.error))
    if run.hallucinated:  # also readable without colour
        parts.append(f'<p class="facts">Not in the image: {escape(", ".join(run.hallucinated))}</p>')
    if compared and first is not None:
        parts.append(f'<p class="facts">{escape(_differs(found, run.text, first.spec.label))}</p>')
    if run.done and run.ids:
        speed = len(run.ids) / max(run.seconds, 1e-9)
        left = f" ({len(run.kept.index)} kept)" if run.kept is not None else ""
        steps = f" in {run.steps} steps" if run.steps else ""
        facts = f"{len(run.ids)} tokens{steps}, {speed:.0f} tokens/s, {run.visual} visual tokens{left}"
        parts.append(f'<p class="facts">{facts}</p>')
    return f'<section class="run" aria-label="{escape(run.spec.label)}">{"".join(parts)}</section>'


def _differs(found: Sequence[Change], text: str, label: str) -> str:
    """The differences as a sentence, for those who do not see marks."""
    if not found:
        return f"The same as {label}."
    told = {
        "added": lambda change: f'"{text[change.start : change.end]}" added',
        "removed": lambda change: f'"{change.before}" removed',
        "changed": lambda change: f'"{text[change.start : change.end]}" for "{change.before}"',
    }
    return f"Against {label}: {'; '.join(told[change.kind](change) for change in found)}."


def _canvas(run: Run) -> str:
    """The positions of a masked-diffusion model's answer, each with its step; the earlier, the stronger its colour."""
    last = max(run.steps, 1)
    cells = []
    for text, step in run.canvas:
        if step:
            early = 1 - (step - 1) / last
            shown = f"{escape(text) or '&middot;'}<small>{step}</small>"
            cells.append(f'<li data-step="{step}" style="--early: {early:.2f}" title="step {step}">{shown}</li>')
        elif run.done:
            cells.append('<li data-step="0" style="--early: 0" title="after the end, never written">&middot;</li>')
        else:
            cells.append('<li class="open" data-step="0" style="--early: 0" title="still masked">&middot;</li>')
    canvas = f'<ol class="canvas" aria-label="Canvas: words with the step that wrote them">{"".join(cells)}</ol>'
    if not run.done:
        return canvas
    label = escape(f"Denoising step of {run.spec.label}")
    slider = f'<input class="back" type="range" min="0" max="{last}" value="{last}" aria-label="{label}">'
    return f'{canvas}<label class="step">Step {slider}<output>{last} of {last}</output></label>'


def _words(run: Run, number: int, done: bool, found: Sequence[Change]) -> str:
    """The caption with its words as buttons, or as plain text while it is written; marks for what is wrong and what differs."""
    false = [(m["start"], m["end"]) for m in run.mentions or () if m["hallucinated"]]
    words = {span[0]: (index, span[1]) for index, span in enumerate(run.words)}
    gone = [change for change in found if change.kind == "removed"]
    shown = [f"<del>{escape(change.before)}</del> " for change in gone if change.start == 0]
    for chunk in re.finditer(r"\s+|\S+", run.text):
        place, parts = chunk.start(), []
        while place < chunk.end():
            if place in words:
                index, end = words[place]
                parts.append(_word(run, (number, index), (place, end), done, false, found))
            else:
                end = min(start for start in (*words, chunk.end()) if start > place)
                parts.append(escape(run.text[place:end]))
            place = end
        # A word is not parted from the punctuation at it; what was removed stands after both.
        whole = len(parts) > 1 and chunk.end() - chunk.start() <= CHUNK
        shown.append(f'<span class="chunk">{"".join(parts)}</span>' if whole else "".join(parts))
        shown += [f" <del>{escape(c.before)}</del>" for c in gone if chunk.start() < c.start <= chunk.end()]
    return "".join(shown)


def _word(
    run: Run,
    name: tuple[int, int],
    span: tuple[int, int],
    done: bool,
    false: Sequence[tuple[int, int]],
    found: Sequence[Change],
) -> str:
    start, end = span
    wrong = any(a < end and start < b for a, b in false)
    word, kind = escape(run.text[start:end]), " false" if wrong else ""
    title = ' title="not in the image"' if wrong else ""
    if not done:
        return f'<span class="word{kind}">{word}</span>'
    reached = 0 if name[1] == 0 else -1
    where = f'data-run="{name[0]}" data-word="{name[1]}" aria-pressed="false" tabindex="{reached}"'
    html = f'<button type="button" class="word{kind}" {where}{title}>{word}</button>'
    for change in found:
        if change.start <= start < change.end:
            before = f' title="for: {escape(change.before)}"' if change.before else ""
            html = f'<ins class="{change.kind}"{before}>{html}</ins>'
    return html


def answers(found: Sequence[Answer]) -> str:
    """One box per run: what it says, and whether that is right where the truth is known."""
    boxes = []
    for answer in found:
        right = ""
        if answer.truth:
            right = f"{'right' if answer.says == answer.truth else 'wrong'} (the truth: {answer.truth})"
        boxes.append(
            f'<section class="run" aria-label="{escape(answer.label)}"><h3>{escape(answer.label)}</h3>'
            f'<p><b>{answer.says}</b></p><p class="facts">It said: {escape(answer.text) or "nothing"}</p>'
            + (f'<p class="facts">{right}</p>' if right else "")
            + "</section>"
        )
    return f'<div class="runs">{"".join(boxes)}</div>'


def model(name: str, facts: Mapping[str, str], note: str) -> str:
    """The model that the page runs, in one line."""
    told = ", ".join(f"{key} {escape(value)}" for key, value in facts.items())
    return f'<p id="model">Model <b>{escape(name)}</b>: {told}. {escape(note)}</p>'
