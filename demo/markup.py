"""Captions and answers as HTML. Everything that came from a model or a visitor is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from vlm_attn.demo.studio import Answer, Result, Run

#: Follows the page's light and dark colours; columns become rows where the screen is narrow.
CSS = """
.runs { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr)); gap: 0.75rem; }
.run { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 0.75rem 1rem;
       background: var(--background-fill-secondary); color: var(--body-text-color); }
.run h3 { margin: 0 0 0.4rem; font-size: 1rem; }
.run p { margin: 0.3rem 0; line-height: 1.9; overflow-wrap: anywhere; }
.run .facts { opacity: 0.75; font-size: 0.85rem; line-height: 1.4; }
.run .error { color: var(--error-text-color, #b91c1c); }
.run button.word { all: unset; cursor: pointer; border-radius: 4px; padding: 0 0.1em; }
.run button.word:hover { background: var(--border-color-accent); }
.run button.word:focus-visible { outline: 3px solid var(--color-accent); outline-offset: 1px; }
.run button.word[aria-pressed="true"] { background: var(--color-accent); color: white; }
.run .false, .run button.word.false {
  text-decoration: underline wavy #dc2626 2px; text-underline-offset: 4px; font-weight: 600; }
.run .canvas { display: flex; flex-wrap: wrap; gap: 0.25rem; margin: 0.5rem 0 0; padding: 0; list-style: none; }
.run .canvas li { border-radius: 4px; padding: 0 0.3rem; line-height: 1.7; border: 1px solid var(--border-color-primary);
  background: color-mix(in srgb, var(--color-accent) calc(var(--early) * 55%), transparent); }
.run .canvas small { opacity: 0.75; margin-left: 0.25rem; }
.run .canvas li.open { color: transparent; background: repeating-linear-gradient(45deg, transparent 0 4px,
  var(--border-color-primary) 4px 6px); }
.run .step { display: flex; align-items: center; gap: 0.5rem; margin-top: 0.5rem; font-size: 0.85rem; }
.run .step input { flex: 1; min-width: 4rem; accent-color: var(--color-accent); }
.note { opacity: 0.75; margin-top: 0.5rem; }
"""

#: A canvas goes back to the step that its slider says. A word that is clicked (or entered with the keyboard) becomes a
#: ``select`` event; arrow keys go from word to word.
JS = """
element.addEventListener('click', event => {
  const word = event.target.closest('button.word');
  if (!word) return;
  element.querySelectorAll('button.word').forEach(other => other.setAttribute('aria-pressed', other === word));
  trigger('select', {index: [Number(word.dataset.run), Number(word.dataset.word)], value: word.textContent});
});
element.addEventListener('input', event => {
  const box = event.target.closest('.run'), step = Number(event.target.value);
  event.target.nextElementSibling.textContent = step + ' of ' + event.target.max;
  box.querySelectorAll('.canvas li').forEach(cell => cell.classList.toggle('open', Number(cell.dataset.step) > step));
});
element.addEventListener('keydown', event => {
  const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
  const words = [...element.querySelectorAll('button.word')];
  const next = words[words.indexOf(document.activeElement) + step];
  if (!step || !words.includes(document.activeElement)) return;
  event.preventDefault();
  if (next) next.focus();
});
"""

START = '<p class="note">Choose a picture and press <b>Describe</b>.</p>'


def captions(result: Result) -> str:
    """One box per run: its name, its words, what it invents, and its speed. Words can be chosen once all runs are done."""
    done = all(run.done for run in result.runs)
    boxes = "".join(_box(run, number, done) for number, run in enumerate(result.runs))
    objects = result.picture.objects
    if objects is None:
        note = "What is in this picture is not known here, so no word is marked as wrong."
    else:
        marked = any(run.mentions is not None for run in result.runs)
        how = (
            "Objects that are not in it are underlined in red."
            if marked
            else "Wrong words are marked where simplemma is installed."
        )
        note = f"In the picture: {escape(', '.join(objects))}. {how}"
    return f'<div class="runs" aria-busy="{str(not done).lower()}">{boxes}</div><p class="note">{note}</p>'


def _box(run: Run, number: int, done: bool) -> str:
    parts = [f"<h3>{escape(run.spec.label)}</h3>", f"<p>{_words(run, number, done) or '...'}</p>"]
    if run.canvas:
        parts.append(_canvas(run))
    if run.error:
        parts.append(f'<p class="error" role="alert">{escape(run.error)}</p>')
    if run.hallucinated:  # also readable without colour
        parts.append(f'<p class="facts">Not in the picture: {escape(", ".join(run.hallucinated))}</p>')
    if run.done and run.ids:
        speed = len(run.ids) / max(run.seconds, 1e-9)
        left = f" ({len(run.kept.index)} kept)" if run.kept is not None else ""
        steps = f" in {run.steps} steps" if run.steps else ""
        facts = f"{len(run.ids)} tokens{steps}, {speed:.0f} tokens/s, {run.visual} visual tokens{left}"
        parts.append(f'<p class="facts">{facts}</p>')
    return f'<section class="run" aria-label="{escape(run.spec.label)}">{"".join(parts)}</section>'


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
            cells.append('<li data-step="0" style="--early: 0" title="behind the end, never written">&middot;</li>')
        else:
            cells.append('<li class="open" data-step="0" style="--early: 0" title="still masked">&middot;</li>')
    canvas = f'<ol class="canvas" aria-label="Canvas: words with the step that wrote them">{"".join(cells)}</ol>'
    if not run.done:
        return canvas
    label = escape(f"Denoising step of {run.spec.label}")
    slider = f'<input type="range" min="0" max="{last}" value="{last}" aria-label="{label}">'
    return f'{canvas}<label class="step">Step {slider}<output>{last} of {last}</output></label>'


def _words(run: Run, number: int, done: bool) -> str:
    false = [(m["start"], m["end"]) for m in run.mentions or () if m["hallucinated"]]
    shown, last = [], 0
    for index, (start, end) in enumerate(run.words):
        wrong = any(a < end and start < b for a, b in false)
        shown.append(escape(run.text[last:start]))
        word, kind = escape(run.text[start:end]), " false" if wrong else ""
        title = ' title="not in the picture"' if wrong else ""
        if done:
            where = f'data-run="{number}" data-word="{index}" aria-pressed="false"'
            shown.append(f'<button type="button" class="word{kind}" {where}{title}>{word}</button>')
        else:
            shown.append(f'<span class="word{kind}">{word}</span>')
        last = end
    return "".join(shown) + escape(run.text[last:])


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
