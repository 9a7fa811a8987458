# SPDX-License-Identifier: Apache-2.0
"""Pins of behaviour, for work that must not change any: every method on every current family in several ways of running.

A pin is what one cell gave: tokens and logits, or the words of the error. They depend on the machine's arithmetic, so they
are recorded before the work, compared after every step of it, and never committed:

    python -m tests.pins record FILE [--methods gift,fastv] [--families llava]
    python -m tests.pins compare FILE [...]          # prints what differs, exits with 1

Settings are names and parameters, not classes, so files may be moved and classes renamed.
"""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from functools import cache
from typing import Any

import torch
from safetensors.torch import load_file, safe_open, save_file
from torch import Tensor

import vlm_attn
from tests import rows, tiny
from tests.helpers import ACTIVE
from vlm_attn.host import CACHE

FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "internvl",
    "gemma3",
    "gemma4",
    "smolvlm",
    "mistral3",
    "glm4v",
    "lfm2_vl",
    "paligemma",
)
PLAIN = "plain"
SETTINGS: dict[str, dict[str, Any]] = {
    PLAIN: {},
    **ACTIVE,
    "ilvad": {},
    "recycled": {},
    "dola": {},
    "vcd": {},
    "icd": {"prefix": (5, 6, 7)},
    "guidance": {},
    "opera": {},
    "mma": {},
    "bidirectional": {},
    "croc": {},
    "vision_block": {},
    "prefix_lm": {},
    "random": {},
    "downsample": {},
    "divprune": {"keep": 0.5},
    "fastv": {"layer": 2},
    "pyramid_drop": {"layers": (1, 2, 3), "keep": 0.3},
    "sparsevlm": {"layers": (0, 1), "keep": 0.4, "recycle": 0.5},
    "visionzip": {"keep": 0.5, "contextual": 0.3},
    "prumerge": {"keep": 0.4},
    "holov": {"keep": 0.5, "chunks": 3},
    "vscan": {"keep": 0.3, "first": 2.0, "window": 2, "layer": 2},
    "vtw": {"layer": 2},
    "layer_skip": {},
    "tome": {"keep": 0.5},
}
PROMPTS = [[3, "image", 7], [1, "image", 9], [5, "image", 4]]
NEW = 5
Cell = tuple[Tensor, Tensor]


@cache
def built(family: str) -> tiny.Built:
    return tiny.FAMILIES[family]() if family in tiny.FAMILIES else rows.build(family)


def _generate(model: Any, inputs: dict[str, Any], **options: Any) -> Cell:
    with torch.no_grad():
        out = model.generate(
            **inputs,
            **{"do_sample": False, "max_new_tokens": NEW, "suppress_tokens": [tiny.IMAGE], **options},
            output_logits=True,
            return_dict_in_generate=True,
        )
    return out.sequences, torch.stack(out.logits) if out.logits else torch.zeros(0)


def _bare(model: Any, inputs: Callable[..., Any]) -> Cell:
    with torch.no_grad():
        return torch.zeros(0), model(**inputs(PROMPTS[:1], seed=1)).logits


def _plain(model: Any, inputs: Callable[..., Any]) -> Cell:
    return _generate(model, inputs(PROMPTS[:1], seed=1))


def _padded(model: Any, inputs: Callable[..., Any]) -> Cell:
    return _generate(model, inputs(PROMPTS, seed=1))


def _static(model: Any, inputs: Callable[..., Any]) -> Cell:
    return _generate(model, inputs(PROMPTS[:1], seed=1), cache_implementation="static")


def _beams(model: Any, inputs: Callable[..., Any]) -> Cell:
    return _generate(model, inputs(PROMPTS[:2], seed=1), num_beams=2)


def _second_turn(model: Any, inputs: Callable[..., Any]) -> Cell:
    """A further question, without an image, on the cache of the first turn."""
    first = inputs(PROMPTS[:1], seed=1)
    with torch.no_grad():
        out = model.generate(
            **first, do_sample=False, max_new_tokens=NEW, return_dict_in_generate=True, suppress_tokens=[tiny.IMAGE]
        )
    ids = torch.cat([out.sequences, torch.tensor([[7, 9, 11, 13]])], 1)
    length = ids.shape[1]
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), CACHE: out.past_key_values}
    for name in ("token_type_ids", "mm_token_type_ids"):
        if name in first:
            given[name] = (ids == tiny.IMAGE).int()
    with vlm_attn.spans(model, query=[(length - 4, length)]) if vlm_attn.is_patched(model) else nullcontext():
        return _generate(model, given)


WAYS: dict[str, Callable[[Any, Callable[..., Any]], Cell]] = {
    "bare": _bare,
    "plain": _plain,
    "padded": _padded,
    "static": _static,
    "beams": _beams,
    "second_turn": _second_turn,
}


def cells(methods: list[str], families: list[str]) -> Iterator[tuple[str, Cell | str]]:
    """Name of every cell and what it gave: tokens and logits, or an error's type and words."""
    for family in families:
        model, inputs = built(family)
        for method in methods:
            for way, run in WAYS.items():
                try:
                    torch.manual_seed(0)
                    if method == PLAIN:
                        found: Cell | str = run(model, inputs)
                    else:
                        with vlm_attn.patched(model, method, **SETTINGS[method]):
                            found = run(model, inputs)
                except Exception as error:
                    found = f"{type(error).__name__}: {error}"
                assert not vlm_attn.is_patched(model)
                yield f"{family}/{method}/{way}", found


def differences(name: str, found: Cell | str, wanted: Cell | str | None) -> str | None:
    """What is different in a cell, in words; None = nothing."""
    if wanted is None:
        return f"{name}: not recorded"
    if isinstance(found, str) or isinstance(wanted, str):
        if found == wanted:
            return None
        before, now = (x if isinstance(x, str) else "runs" for x in (wanted, found))
        return f"{name}\n    before: {before}\n    now:    {now}"
    for what, a, b in zip(("tokens", "logits"), found, wanted, strict=True):
        if a.shape != b.shape:
            return f"{name}: {what} {tuple(b.shape)} -> {tuple(a.shape)}"
        if not torch.equal(a, b):
            return f"{name}: {what} differ by {(a.double() - b.double()).abs().max():.2e}"
    return None


def main(arguments: list[str] | None = None) -> int:
    """The command line above."""
    parser = argparse.ArgumentParser(prog="python -m tests.pins")
    parser.add_argument("what", choices=("record", "compare"))
    parser.add_argument("file")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=list(SETTINGS))
    parser.add_argument("--families", type=lambda text: text.split(","), default=list(FAMILIES))
    given = parser.parse_args(arguments)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)  # the same order of sums every time
    found = dict(cells(given.methods, given.families))
    if given.what == "record":
        tensors = {
            f"{name}#{part}": value.contiguous().clone()
            for name, cell in found.items()
            if not isinstance(cell, str)
            for part, value in zip(("tokens", "logits"), cell, strict=True)
        }
        save_file(tensors, given.file, {name: cell for name, cell in found.items() if isinstance(cell, str)})
        print(f"{len(found)} cells, {sum(not isinstance(cell, str) for cell in found.values())} of them run")
        return 0
    tensors = load_file(given.file)
    with safe_open(given.file, "pt") as file:
        wanted: dict[str, Cell | str] = dict(file.metadata() or {})
    wanted |= {
        name: (tensors[f"{name}#tokens"], tensors[f"{name}#logits"]) for name in {key.split("#")[0] for key in tensors}
    }
    said = [text for name, cell in found.items() if (text := differences(name, cell, wanted.get(name)))]
    print("\n".join([*said, f"{len(found)} cells, {len(said)} differ"]))
    return int(bool(said))


if __name__ == "__main__":
    sys.exit(main())
