# SPDX-License-Identifier: Apache-2.0
"""The conformance matrix over transformers' image-text-to-text mapping: ``python -m tests.families`` writes docs/families.md.

Every family that can be built from config is built small, with random weights, and run with methods of three kinds: one that
reads attention and edits the last row, one that reads hidden states and edits the prompt's text rows, one that sets the mask.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES as MAPPING

import vlm_attn
from tests import canvas, helpers, rows
from tests.helpers import ACTIVE, MARGIN, Inputs, alone, close, differ, margins, same
from vlm_attn import host
from vlm_attn.patching import engine_of, find_decoder

METHODS = ("gift", "var", "vision_block")
PAGE = Path(__file__).parents[1] / "docs" / "families.md"
PROMPTS = ([[3, "image", 7], [1, "image", 4, "image", 6]], (1, 2))
SINGLE = ([[3, "image", 7], [1, "image", 11]], (1, 1))


def generate(model: Any, inputs: Inputs, **options: Any) -> tuple[Tensor, Tensor]:
    """Four greedy tokens and their logits. A new image token is none of a prompt's: hosts that run all again fail on it."""
    config = model.config
    never = [getattr(config, name, None) for name in ("image_token_id", "video_token_id", "audio_token_id")]
    never = [token for token in never if isinstance(token, int) and token < config.get_text_config().vocab_size]
    tokens, scores = helpers.generate(model, inputs, new=4, suppress_tokens=never, **options)
    return tokens, finite(scores)


def logits(model: Any, inputs: Inputs) -> Tensor:
    """Logits of every row of a forward."""
    return finite(helpers.logits(model, inputs))


def finite(scores: Tensor) -> Tensor:
    """Without what some hosts rule out altogether (Chameleon: words that stand for images)."""
    return scores.masked_fill(scores <= torch.finfo(scores.dtype).min, 0.0)


@dataclass
class Result:
    """What became of one family.

    Attributes:
        works: what works, by method.
        refused: the error's words, by method.
        stock: what the plain model itself does not do.
        failed: what should work and does not.
        missing: why the family was not run at all.
    """

    works: list[str] = field(default_factory=list)
    refused: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    stock: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    missing: str = ""


def settings(method: str, model: Any) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """Active and neutral parameters, on layers that can be edited."""
    config = model.config.get_text_config(decoder=True)
    layers = [index for index, _ in find_decoder(model, config)[2]]
    if method == "gift":
        active = {**ACTIVE["gift"], "saliency_layers": layers[:2][-1:], "enhance_layers": layers}
        return active, {**active, "alpha": 0.0}
    if method == "var":
        active = {**ACTIVE["var"], "layers": layers}
        return active, {**active, "p": 0.0}
    return {}, None


def run(name: str) -> Result:
    """Build one family and try everything on it."""
    result = Result()
    if name in rows.MISSING:
        return Result(missing=rows.MISSING[name])
    if name not in MAPPING:
        return Result(missing=f"not in transformers {transformers.__version__}")
    if name not in rows.ROWS:
        return Result(missing="no tiny configuration for it yet")
    model, inputs = rows.build(name)
    prompts, images = PROMPTS if rows.ROWS[name].several else SINGLE
    make = partial(inputs, prompts)
    for method in METHODS:
        try:
            parameters, neutral = settings(method, model)
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                vlm_attn.unpatch(vlm_attn.patch(model, method, **parameters))
            result.notes += [str(w.message) for w in caught if "cannot be edited" in str(w.message)]
        except NotImplementedError as error:
            result.refused[method] = str(error)
            continue
        try:
            try_all = conform if getattr(model.config, "canvas_length", None) is None else conform_canvas
            try_all(model, make, images, method, parameters, neutral, result)
            result.works.append(method)
        except Exception as error:
            result.failed[method] = f"{type(error).__name__}: {error}"
            if vlm_attn.is_patched(model):
                vlm_attn.unpatch(model)
    result.notes = list(dict.fromkeys(result.notes))
    result.stock = list(dict.fromkeys(result.stock))
    return result


def conform(
    model: Any,
    make: Callable[..., Inputs],
    images: tuple[int, ...],
    method: str,
    parameters: dict[str, Any],
    neutral: dict[str, Any] | None,
    result: Result,
) -> None:
    """Everything a method must do on a family; the first thing it does not do is an error."""
    config = model.config
    x = make(seed=1)
    plain, plain_run = logits(model, x), generate(model, x)
    if neutral is not None:
        with vlm_attn.patched(model, method, **neutral):
            assert torch.equal(logits(model, x), plain), "neutral changes the logits"
            assert torch.equal(generate(model, x)[1], plain_run[1]), "neutral changes generate()"
    for seed in range(1, 9):  # a prompt on which no choice between heads is a matter of rounding
        x = make(seed=seed)
        plain, here = logits(model, x), x["attention_mask"].bool()
        cached = holds(lambda: same(generate(model, x, use_cache=False), generate(model, x)))  # noqa: B023
        batched = holds(lambda: rows_alone(model, x, images))  # noqa: B023
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with vlm_attn.patched(model, method, **parameters), margins() as margin:
                now, now_run = logits(model, x), generate(model, x)
                differ(now[here], plain[here])
                close(now_run[1][0], now[:, -1])
                try:
                    if cached:
                        same(generate(model, x, use_cache=False), now_run)
                    if batched:
                        rows_alone(model, x, images)
                except AssertionError:
                    if min(margin.values, default=1.0) > MARGIN or seed == 8:
                        raise
                    continue
        if min(margin.values, default=1.0) > MARGIN:
            break
    with vlm_attn.patched(model, method, **parameters):
        engine = engine_of(model)
        reached: set[int] = set()
        engine.watch = lambda layer, *_: reached.add(layer)
        logits(model, x)
        covered = {index for index, _ in find_decoder(model, engine.text_config)[2]}
    if method == "gift":
        assert reached == covered, f"layers {sorted(covered - reached)} do not call the attention function"
    result.stock += [] if cached else ["cached and uncached decoding differ"]
    result.stock += [] if batched else ["a padded batch and its rows alone differ"]
    assert torch.equal(logits(model, x), plain), "unpatch does not restore the logits"
    assert model.config is config, "unpatch does not restore the config"


def conform_canvas(
    model: Any,
    make: Callable[..., Inputs],
    images: tuple[int, ...],
    method: str,
    parameters: dict[str, Any],
    neutral: dict[str, Any] | None,
    result: Result,
) -> None:
    """The same of a model that denoises a canvas: a step behind the prompt, a step on its cache, and ``generate``."""
    x, config = make(seed=1), model.config
    plain, run = canvas.logits(model, x), canvas.denoise(model, x)
    if neutral is not None:
        with vlm_attn.patched(model, method, **neutral):
            assert torch.equal(canvas.logits(model, x), plain), "neutral changes the logits"
            assert torch.equal(canvas.denoise(model, x)[1], run[1]), "neutral changes generate()"
    with vlm_attn.patched(model, method, **parameters):
        first = canvas.step(model, x, x["attention_mask"])
        differ(first.logits, plain)
        differ(canvas.denoise(model, x)[1][0], run[1][0])
        close(canvas.step(model, {host.CACHE: first[host.CACHE]}, x["attention_mask"]).logits, first.logits)
        for row in range(len(images)):
            close(canvas.logits(model, alone(x, row, images)), first.logits[row : row + 1])
    assert torch.equal(canvas.logits(model, x), plain), "unpatch does not restore the logits"
    assert model.config is config, "unpatch does not restore the config"
    result.notes.append("a canvas is denoised beside the prompt's cache: all its rows are edited at every step")


def holds(check: Callable[[], None]) -> bool:
    """Whether the plain model does it."""
    try:
        check()
    except Exception:
        return False
    return True


def rows_alone(model: Any, x: Inputs, images: tuple[int, ...]) -> None:
    """A padded batch gives what its rows give alone."""
    tokens, scores = generate(model, x)
    for row in range(len(images)):
        same(generate(model, alone(x, row, images)), (tokens[row : row + 1], scores[:, row : row + 1]))


def check(name: str) -> Result:
    """:func:`run`, with a family that cannot be built as a result too."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return run(name)
        except Exception as error:
            return Result(failed={"build": f"{type(error).__name__}: {error}"})


def first_sentence(text: str) -> str:
    """For a cell of a table."""
    return text.split(". ")[0].replace("|", "\\|").replace("\n", " ")


def line(name: str, result: Result) -> str:
    """One line of the page's table."""
    cells = ["yes" if method in result.works else "refused" for method in METHODS]
    reasons = list(dict.fromkeys(first_sentence(words) for words in result.refused.values()))
    if result.missing:
        cells, reasons = ["not run"] * len(METHODS), [result.missing]
    notes = [*reasons, *result.notes, *(f"stock transformers: {words}" for words in result.stock)]
    return f"| `{name}` | {' | '.join(cells)} | {'; '.join(notes)} |"


def page(results: dict[str, Result]) -> str:
    """docs/families.md."""
    works = sum(bool(r.works) for r in results.values())
    refused = sum(not r.works and not r.missing for r in results.values())
    text = HEAD.format(version=transformers.__version__, works=works, refused=refused, all=len(results))
    return text + "\n".join(line(name, result) for name, result in results.items()) + "\n\n" + processors()


def processors() -> str:
    """The page's part on processors, from the table of :mod:`tests.engine.test_prompts`."""
    from tests.checkpoints import CHECKPOINTS
    from tests.engine.test_prompts import REFUSED
    from tests.prompts import CASES

    lines = []
    for name, checkpoint in CHECKPOINTS.items():
        refused = REFUSED.get(name, {})
        template = "none" if checkpoint.template is None else "ours, its own" if checkpoint.shared else "ours"
        said = "; ".join(sorted(set(refused.values()))) or "none"
        lines.append(f"| {name} | `{checkpoint.model_type}` | {template} | {len(refused)} | {said} |")
    return PROCESSORS.format(cases=len(CASES)) + "\n".join(lines) + "\n"


HEAD = """# Families

What works with every entry of the image-text-to-text mapping of transformers {version}:
{works} of {all} work, {refused} are refused with the reason, the others were not run.
Written by `python -m tests.families`; `tests/engine/test_families.py` runs the same.

Every family is built from its config, tiny and with random weights; real checkpoints were not run. The batch holds two
prompts of different lengths (one with two images where the family takes them). Three methods stand for three kinds:
`gift` reads attention and edits the last row and what follows, `var` reads hidden states and edits the prompt's text rows,
`vision_block` sets the prompt's mask. "yes" means: neutral parameters give the plain model's logits bit for bit, active ones
give others; the padded batch equals its rows alone; decoding with a cache equals running everything again; after `unpatch`
the logits are the plain model's bit for bit. What the plain model itself does not do is left out and named.

| model type | gift | var | vision_block | why, what to know |
|---|---|---|---|---|
"""

PROCESSORS = """## Processors

The question, the image tokens and the opening of the answer are read through the processor.
`tests/engine/test_prompts.py` tries the processors below, built in transformers with the special tokens of these
checkpoints and small vocabularies, on up to {cases} prompts each: system messages, texts before and after images, several
images and turns, quoted role words, other scripts, code, thinking switches, begun answers, videos. Every prompt is laid
out exactly, or refused because the question cannot be known. "ours" is a template of the same form, "its own" the one of
the checkpoint, which is not part of this package. Checkpoints themselves were not loaded. `python -m tests.families
processors` writes this part alone.

| processor | model type | template | prompts refused | why |
|---|---|---|---|---|
"""


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1:] == ["processors"]:
        before = PAGE.read_text(encoding="utf-8").partition("## Processors")[0].rstrip()
        PAGE.write_text(f"{before}\n\n{processors()}", encoding="utf-8")
        sys.exit()
    transformers.logging.set_verbosity_error()
    found = {}
    for name in sys.argv[1:] or MAPPING:
        found[name] = check(name)
        print(line(name, found[name]), found[name].failed or "", flush=True)
    if not sys.argv[1:]:
        failed = [name for name, result in found.items() if result.failed]
        if failed:
            sys.exit(f"nothing written: {', '.join(failed)} do not do what they should")
        PAGE.write_text(page(found), encoding="utf-8")
