# SPDX-License-Identifier: Apache-2.0
"""The page of what every method was compared with, made of ``docs/fidelity.toml``: ``python -m tests.fidelity`` writes it."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Any

from vlm_attn import registry
from vlm_attn.method import ModelFacts
from vlm_attn.reduction import ADAPTIVE, Reducer, Staged

DOCS = Path(__file__).resolve().parents[1] / "docs"
DATA, PAGE = DOCS / "fidelity.toml", DOCS / "fidelity.md"
FIELDS = ("code", "by", "difference", "switches", "bugs")

HEAD = """# Fidelity

Every method beside the code its authors released: what was compared, and how far the two are apart. The page is written by
`python -m tests.fidelity` from `docs/fidelity.toml`. Nothing is copied from those repositories: several have no licence, or a
non-commercial one. "Compared" means that both ran on the same tensors or tiny models, in float32 on a CPU; "read" means that
somebody read the code. A test named here needs files with the released code's outputs, which are not part of this
repository, and skips without them.

| method | compared with | by | largest difference | released behaviour | known bugs of the released code |
|---|---|---|---|---|---|
"""
NONE = """
No released code:

| method | why |
|---|---|
"""


ROWS = """
## What a row of a published table means

A number such as "192 tokens" means another amount of work in every paper: tokens before the language model, tokens
left in the last layers, or a mean over the layers. `keep="NAME"` sets what the row of that name stands for, and
nothing else may contradict it. Below: the tokens that the layers of LLaVA-1.5-7B run on (576 tokens, 32 layers). `+
1` is the one token more that stands for those that go. SparseVLM's version 1 adds the means of what it recycles at
every stage, and its authors count the layer that rates as pruned; FastV's paper has no rows by mean, those are later
papers' (K = 2 here, which they do not say).

| method | row | the call | tokens per layer | mean |
|---|---|---|---|---|
"""
LLAVA = ModelFacts(model_type="llava", layers=32, heads=32, hidden=4096)
TOKENS = 576


def per_layer(method: Reducer) -> list[int]:
    """Tokens of one image that every layer runs on, for LLaVA-1.5-7B."""
    bound: Any = method.bind(LLAVA) if isinstance(method, Staged) else method  # others would load what they ask
    left, here = [], TOKENS
    for layer in range(LLAVA.layers):
        for stage, at in enumerate(bound.stages):
            here = bound.left(stage, TOKENS) if at == layer else here
        left.append(here)
    return left


def budgets() -> list[str]:
    """The lines of the table of published rows."""
    lines = []
    for name in sorted(registry.METHODS):
        cls: Any = registry.method_class(name)
        for row in getattr(cls, "published", {}):
            method = cls(keep=row)
            call = f'`{cls.__name__}(keep="{row}")`'
            if method.keep == ADAPTIVE:
                lines.append(f"| `{name}` | {row} | {call} | found image by image | |")
                continue
            left = per_layer(method)
            more = " + 1" if cls.adaptive else ""
            runs = ", ".join(f"{n}{more} x {left.count(n)}" for n in dict.fromkeys(left))
            lines.append(f"| `{name}` | {row} | {call} | {runs} | {sum(left) / len(left) + bool(more):.4g} |")
    return lines


def data() -> dict[str, Any]:
    """The data file."""
    return tomllib.loads(DATA.read_text(encoding="utf-8"))


def page() -> str:
    """docs/fidelity.md."""
    found = data()
    rows = {row["name"]: [row[field] or "–" for field in FIELDS] for row in found["method"]}
    lines = [f"| {' | '.join([f'`{name}`', *rows[name]])} |" for name in sorted(rows)]
    none = [f"| `{name}` | {why} |" for name, why in sorted(found["none"].items())]
    return HEAD + "\n".join(lines) + "\n" + NONE + "\n".join(none) + "\n" + ROWS + "\n".join(budgets()) + "\n"


def missing() -> set[str]:
    """Methods of the registry that the data file says nothing of, and names it has that are none."""
    found = data()
    return {row["name"] for row in found["method"]} ^ set(found["none"]) ^ set(registry.METHODS)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
