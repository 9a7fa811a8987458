# SPDX-License-Identifier: Apache-2.0
"""The tables of the pages that nobody writes by hand: ``python docs/tables.py`` writes them, a test compares.

A table of `results.md` follows a comment ``<!-- table: NAME -->``. The function of that name makes it of `evals/results`.
A table of methods follows ``<!-- methods: KIND -->``. Its rows are the registered methods of these kinds, its cells what the
section ``Overview`` of their docstrings says under the column's title.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

from vlm_attn.evals.report import clear, signed

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "evals" / "results"
Rows = list[list[str]]
TABLES: dict[str, Callable[[], Rows]] = {}


def table(function: Callable[[], Rows]) -> Callable[[], Rows]:
    """Register what makes a table: its head, then its rows."""
    TABLES[function.__name__.replace("_", "-")] = function
    return function


@cache
def results(name: str) -> Any:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text(encoding="utf-8"))


def interval(cell: dict[str, float], digits: int = 1) -> str:
    """``44.6 (40.4–49.0)``."""
    return f"{cell['value']:.{digits}f} ({cell['low']:.{digits}f}–{cell['high']:.{digits}f})"


def spread(cut: dict[str, float], digits: int = 2) -> str:
    """``0.61 (0.57–0.64)``: median, and the 20 % and 80 % quantiles."""
    return f"{cut['median']:.{digits}f} ({cut['p20']:.2f}–{cut['p80']:.2f})"


def changed(cell: dict[str, Any], *, short: bool = False) -> str:
    """``50.2 **+4.6** (+2.4 to +6.8)``: bold where the interval holds no 0. Short: without an interval, with a star instead."""
    if "difference" not in cell:
        return f"{cell['value']:.1f}"
    difference = cell["difference"]
    change, _, rest = signed(difference).partition(" ")
    if short and change == "0.0":
        return f"{cell['value']:.1f}"
    if short:
        return f"{cell['value']:.1f} {change}" + " *" * clear(difference)
    return f"{cell['value']:.1f} {f'**{change}**' if clear(difference) else change} {rest}".rstrip()


def metrics(name: str, group: str = "instances") -> dict[str, Any]:
    """Method -> figures of an evaluation."""
    return {label: of[group] for label, of in results(name)["metrics"].items()}


def plain(label: str) -> str:
    """A method's name as code; the baseline as the word for it."""
    return "plain" if label == "baseline" else f"`{label}`"


SPLITS = ("random", "popular", "adversarial")


@table
def bundled() -> Rows:
    """The bundled model with `gift` and `var`."""
    rows = [["", "CHAIR_S ↓", "CHAIR_I ↓", "recall ↑", "POPE random", "popular", "adversarial", "says yes"]]
    pope = results("scenes-validation-pope")["metrics"]
    for label, of in metrics("scenes-validation-chair").items():
        cells = [interval(of[key]) for key in ("chair_s", "chair_i", "recall")]
        cells += [interval(pope[label][split]["accuracy"]) for split in SPLITS]
        rows.append([plain(label), *cells, f"{pope[label]['mean']['yes_ratio']['value']:.1f}"])
    return rows


#: Rows of the table of effects, in the order of kinds.
EFFECTS = [
    "baseline",
    "gift",
    "ilvad",
    "pai",
    "paint",
    "head_guided",
    "vaf",
    "vhr",
    "var",
    "mma",
    "bidirectional",
    "croc",
    "vision_block",
    "prefix_lm",
    "vcd",
    "icd",
    "guidance",
    "pai+guidance",
    "agla",
    "dola",
    "opera",
    "mvp",
]


@table
def effect() -> Rows:
    """Every method against greedy decoding."""
    (found,) = results("effect-scenes")
    settings = results("effect-scenes-settings")
    head = ["", "setting (tried)", "CHAIR_S ↓", "CHAIR_I ↓", "recall ↑", "F1 ↑", "length", "distinct-1"]
    rows = [[*head, "POPE F1: random", "popular", "adversarial", "time"]]
    methods = found["methods"]
    for label in [*(name for name in EFFECTS if name in methods), *(name for name in methods if name not in EFFECTS)]:
        chair, pope = (methods[label]["figures"].get(name, {}) for name in ("chair", "pope"))
        chosen = [
            f"{key} {value:g}" if isinstance(value, float | int) else f"{key} {value}"
            for of in settings.get(label, {}).get("chosen", {}).values()
            for key, value in of.items()
        ]
        tried = methods[label]["searched"]
        cells = ["" if label == "baseline" else f"{', '.join(chosen) or '—'} ({tried})"]
        cells += [changed(chair[key]) if chair else "" for key in ("chair_s", "chair_i", "recall", "f1")]
        cells += [f"{chair[key]['value']:.1f}" if chair else "" for key in ("length", "distinct_1")]
        cells += [changed(pope[f"{split}.f1"], short=bool(chair)) for split in SPLITS]
        latency = methods[label]["latency"]
        rows.append([plain(label), *cells, f"{latency['latency']:.2f}" if latency else ""])
    return rows


@table
def masks() -> Rows:
    """Causal against modality-mutual attention."""
    found = results("masks-causal-mma")
    keys = ("pope_random", "pope_popular", "pope_adversarial", "chair_s", "chair_i", "recall")
    rows = [["", "POPE random", "popular", "adversarial", "CHAIR_S ↓", "CHAIR_I ↓", "recall ↑"]]
    for mask, of in found["start"].items():
        rows.append([f"start, asked with {mask}", *(f"{of[key]:.1f}" for key in keys)])
    for mask, seeds in found["runs"].items():
        for seed, of in seeds.items():
            rows.append([f"{mask}, seed {seed}", *(f"{of[key]:.1f}" for key in keys)])
    pairs = [
        [
            mma[key] - causal[key]
            for mma, causal in zip(*(found["runs"][m].values() for m in ("mma", "causal")), strict=True)
        ]
        for key in keys
    ]
    t = 2.7764451051977987  # 97.5 % quantile of Student's t with 4 degrees of freedom
    assert len(pairs[0]) == 5
    cells = []
    for values in pairs:
        mean, arm = statistics.mean(values), t * statistics.stdev(values) / len(values) ** 0.5
        cells.append(signed({"value": mean, "low": mean - arm, "high": mean + arm}))
    return [*rows, ["mma - causal", *cells]]


@table
def calibration() -> Rows:
    """Settings of `gift`, searched on some scenes and asked again on others."""
    found = results("calibrate-scenes")
    grid, check = found["measurements"]["grid"], found["measurements"]["check"]
    gift = found["methods"]["gift"]
    band = gift["enhance_layers"]
    chosen = f"layers {band[0]}-{band[-1]}, alpha {gift['alpha']:g}"
    rows = [["", "CHAIR_I, 150 searched", "recall", "CHAIR_I, 200 others", "POPE adversarial F1"]]
    for label, of in grid.items():
        name = "plain" if label == "baseline" else label + (" (chosen)" if label == chosen else "")
        again = [check[key]["values"][label] for key in ("chair_i", "pope_adversarial_f1")]
        rows.append([name, *(f"{cell['value']:.1f}" for cell in (of["chair_i"], of["recall"], *again))])
    return rows


@table
def denoising_quality() -> Rows:
    """Caches, parallel decoding and pruning: quality."""
    rows = [["", "forwards", "FLOPs", "CHAIR_I ↓", "Δ", "recall ↑", "Δ", "POPE F1 ↑", "Δ"]]
    for label, of in results("diffusion-scenes-quality")["quality"]["variants"].items():
        cells = [f"{of['chair']['forwards']:.1f}", f"{of['flops']:.3f}"]
        for cell, change in (
            (of["chair"]["chair_i"], "chair_i"),
            (of["chair"]["recall"], "recall"),
            (of["pope"]["f1"], "f1"),
        ):
            cells += [interval(cell), "" if of["against"] == label else signed(of["change"][change])]
        rows.append([f"`{label}`", *cells])
    return rows


@table
def denoising_speed() -> Rows:
    """Caches, parallel decoding and pruning: speed."""
    rows = [["", "forwards", "FLOPs", "time", "times faster", "of what FLOPs say"]]
    for label, of in results("diffusion-cpu-217M")["speed"]["ratios_to_none"].items():
        if label == "none":
            continue
        time = of["time"]
        one = time["p20"] == time["p80"]
        cells = [str(of["forwards"]), f"{of['flops']:.3f}", f"{time['median']:.3f}" if one else spread(time, 3)]
        rows.append([f"`{label}`", *cells, f"{of['speedup']:.2f}", f"{100 * of['reached']:.0f} %"])
    return rows


def _heads(shape: dict[str, Any]) -> str:
    return "/".join(map(str, shape["heads"]))


def _keys(shape: dict[str, Any]) -> str:
    return f"{shape['keys'] // 1024}k"


def _ratio(of: dict[str, Any], name: str, digits: int = 2) -> str:
    column = of["columns"].get(name)
    if column is None:
        return ""
    (ratio,) = (value for key, value in column.items() if key.startswith("ratio"))
    return f"{ratio['median']:.{digits}f}"


@table
def kernels_decode() -> Rows:
    """One decoding step on an H200."""
    found = results("kernels-h200")
    copy = found["ceilings"]["copy_bytes_per_second"]
    head = [
        "heads",
        "batch",
        "keys",
        "K and V",
        "SDPA",
        "plain",
        "`gift`",
        "`var`",
        "eager",
        "`gift`, of a copy's bandwidth",
    ]
    rows = [head]
    for of in found["decode"]:
        shape = of["shape"]
        size = of["kv_bytes"] / 2**20
        if (
            shape["keys"] == 1024
            and not (shape["heads"][1] == 32 and shape["batch"] > 1)
            or "sdpa" not in of["columns"]
        ):
            continue
        slow = "\\*" * (shape["heads"] == [28, 4] and shape["batch"] >= 8)  # the policy ran uncompiled there
        gift, var = _ratio(of, "ours gift"), _ratio(of, "ours var")
        if not (gift and var and _ratio(of, "eager")):
            continue
        share = of["columns"]["ours gift"]["bytes_per_second"] / copy
        sdpa = of["columns"]["sdpa"]["seconds"]["median"] * 1e6
        cells = [
            _heads(shape),
            str(shape["batch"]),
            _keys(shape),
            f"{size:.0f} MiB",
            f"{sdpa:.0f} µs",
            _ratio(of, "ours plain"),
        ]
        rows.append([*cells, gift + slow, var + slow, _ratio(of, "eager", 1), f"{100 * share:.0f} %"])
    return rows


@table
def kernels_prefill() -> Rows:
    """Masked prompts on an H200."""
    names = [
        "ours causal",
        "ours mutual",
        "ours window",
        "ours packed",
        "ours sums",
        "sdpa mutual",
        "varlen",
        "column sums",
    ]
    head = ["heads", "tokens", "SDPA, causal", "causal", "mutual", "window", "packed", "all at once", "SDPA, mutual"]
    rows = [[*head, "`varlen_attn`", "column sums"]]
    for of in results("kernels-h200")["prefill"]:
        sdpa = of["columns"]["sdpa causal"]["seconds"]["median"] * 1e3
        found = [next((name for name in of["columns"] if name.startswith(start)), "") for start in names]
        cells = [_heads(of["shape"]), _keys(of["shape"]), f"{sdpa:.2f} ms", *(_ratio(of, name) for name in found)]
        rows.append(cells)
    return rows


@table
def tokens_speed() -> Rows:
    """Fewer visual tokens: speed at 576."""
    found = results("tokens-cpu-447M")["ratios_to_plain"]
    rows = [["", "keep 0.5", "0.25", "0.11", "first token, 0.25", "decode", "choosing", "KV cache", "peak"]]
    for name in dict.fromkeys(label.split()[0] for label in found):
        keeps = [found.get(f"{name} {keep}") for keep in ("0.5", "0.25", "0.11")]
        if name == "vtw":
            keeps = [found["vtw 0"], None, None]
        middle = keeps[1] or keeps[0]
        cells = [f"{of['flops']:.2f}: {spread(of['prefill'])}" if of else "" for of in keeps]
        cells += [f"{middle[key]['median']:.2f}" for key in ("first", "decode")]
        cells += [f"{100 * middle['select']['median']:.1f} %", f"{middle['cache']:.2f}", f"{middle['peak']:.2f}"]
        rows.append([f"`{name}`", *cells])
    return rows


@table
def tokens_speed_2880() -> Rows:
    """Fewer visual tokens: speed at 2,880."""
    rows = [["`keep=0.25`", "FLOPs", "prefill", "first token", "decode", "choosing", "KV cache", "peak"]]
    for label, of in results("tokens-cpu-447M-2880")["ratios_to_plain"].items():
        cells = [
            f"{of['flops']:.3f}",
            spread(of["prefill"], 3),
            f"{of['first']['median']:.3f}",
            f"{of['decode']['median']:.2f}",
        ]
        cells += [f"{100 * of['select']['median']:.1f} %", f"{of['cache']:.3f}", f"{of['peak']:.3f}"]
        rows.append([f"`{label.split()[0]}`", *cells])
    return rows


@table
def heads_speed() -> Rows:
    """Fewer keys per head: speed."""
    rows = [["", "prefill", "decode", "KV cache"]]
    for label, of in results("tokens-heads-cpu-447M")["ratios_to_plain"].items():
        name = label.split()[0]
        note = " (half of the heads keep everything)" if name == "duo" else ""
        rows.append([f"`{name}`{note}", spread(of["prefill"]), f"{of['decode']['median']:.2f}", f"{of['cache']:.3f}"])
    return rows


KEEPS = ("0.5", "0.25", "0.11")


def _quality(kind: str, group: str, keys: Sequence[str], keeps: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """Method -> a cell per figure and share kept, of the files of reducers."""
    found: dict[str, dict[tuple[str, str], Any]] = {}
    for keep in KEEPS:
        for name in (f"tokens-scenes-{kind}-{keep}", f"tokens-scenes-{kind}-tome-{keep}"):
            if (RESULTS / f"{name}.json").exists():
                for label, of in metrics(name, group).items():
                    for key in keys:
                        found.setdefault(label, {})[key, keep] = of[key]
    return {label: [of.get((key, keep)) for key in keys for keep in keeps] for label, of in found.items()}


@table
def tokens_chair() -> Rows:
    """Fewer visual tokens: CHAIR."""
    rows = [["", "recall, keep 0.5", "0.25", "0.11", "CHAIR_I ↓, keep 0.5", "0.25", "0.11"]]
    for label, cells in _quality("chair", "instances", ("recall", "chair_i"), KEEPS).items():
        if label != "baseline":
            shown = [interval(c) if c else "" for c in cells[:3]] + [
                f"{c['value']:.1f}" if c else "" for c in cells[3:]
            ]
            if label == "vtw":  # takes everything, whatever the share
                shown = ["", next(filter(None, shown[:3])), "", "", next(filter(None, shown[3:])), ""]
            rows.append([f"`{label}`" + " (none from layer 3 of 6 on)" * (label == "vtw"), *shown])
    return rows


@table
def tokens_pope() -> Rows:
    """Fewer visual tokens: POPE."""
    rows = [["", "keep 0.5", "0.25", "0.11"]]
    for label, cells in _quality("pope", "mean", ("f1",), KEEPS).items():
        if label not in ("baseline", "vtw"):
            rows.append([f"`{label}`", *(interval(cell) if cell else "" for cell in cells)])
    return rows


@table
def heads_quality() -> Rows:
    """Fewer keys per head: CHAIR and POPE."""
    rows = [["", "CHAIR_I ↓", "recall ↑", "POPE F1"]]
    pope = metrics("heads-scenes-pope-0.25", "mean")
    words = {
        "longheads": ("half of the rows", "a quarter"),
        "landmark": ("half", "a quarter"),
        "routed": ("half of the regions", "a quarter"),
        "recycled": ("half of the keys", "a quarter"),
    }
    for label, names in words.items():
        for keep, word in zip(("0.5", "0.25"), names, strict=True):
            of = metrics(f"heads-scenes-chair-{keep}")[label]
            f1 = interval(pope[label]["f1"]) if keep == "0.25" else ""
            rows.append([f"`{label}`, {word}", interval(of["chair_i"]), interval(of["recall"]), f1])
    profiles = {
        "duo": "half of the heads stream (4 first, 16 latest columns)",
        "razor": "15 % of the heads keep everything (16 latest columns)",
    }
    for label, word in profiles.items():
        of, f1 = (
            metrics("heads-scenes-chair-profiles")[label],
            metrics("heads-scenes-pope-profiles", "mean")[label]["f1"],
        )
        rows.append([f"`{label}`, {word}", interval(of["chair_i"]), interval(of["recall"]), interval(f1)])
    return rows


def markdown(rows: Rows) -> str:
    """Rows as a table of Markdown."""
    head, *body = rows
    return "\n".join(
        ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(r) + " |" for r in body)]
    )


def filled(text: str) -> str:
    """A page with the tables of its comments made anew."""

    def made(match: re.Match[str]) -> str:
        return match[1] + markdown(TABLES[match[2]]()) + "\n"

    return re.sub(r"^(<!-- table: ([\w-]+) -->\n)(?:\|.*\n)*", made, text, flags=re.M)


def overview(cls: type) -> dict[str, str]:
    """The section ``Overview`` of a method's docstring: key -> text."""
    block = inspect.cleandoc(cls.__doc__ or "").partition("\nOverview:\n")[2]
    found: dict[str, str] = {}
    key = ""
    for line in block.splitlines():
        if match := re.fullmatch(r" {4}([a-z][a-z ]*): (.*)", line):
            key = match[1]
            found[key] = match[2]
        elif line.startswith(" " * 8) and key:
            found[key] += " " + line.strip()
        else:
            break
    return found


#: Titles of columns that hold the short text.
SHORT = ("what it does", "what is seen", "what it keeps", "what a head sees")


def kind(cls: type) -> str:
    """Which table a method is in."""
    from vlm_attn import Method, Reducer
    from vlm_attn.branch import Decoding
    from vlm_attn.heads import HeadMethod

    for base, name in ((Reducer, "tokens"), (HeadMethod, "keys"), (Decoding, "next")):
        if issubclass(cls, base):
            return name
    return "edit" if cls.mask is Method.mask else "mask"  # type: ignore[attr-defined]


ARXIV = r"arXiv (\d{4}\.\d{4,5})"


def method_rows(head: Sequence[str], kinds: Sequence[str], order: Sequence[str], *, short: bool) -> Rows:
    """Rows of a table of methods.

    Args:
        head: titles of the columns.
        kinds: which methods.
        order: names in the order of the page; others come after them.
        short: whether the page has the short text.
    """
    import vlm_attn
    from vlm_attn import registry

    infos = {
        name: info for name, info in vlm_attn.methods().items() if name in registry.METHODS and kind(info.cls) in kinds
    }
    rows = [list(head)]
    for name in sorted(infos, key=lambda name: (name not in order, order.index(name) if name in order else name)):
        info = infos[name]
        said = overview(info.cls)
        links = ", ".join(f"[{number}](https://arxiv.org/abs/{number})" for number in re.findall(ARXIV, info.paper))
        fixed = {
            "name": f"`{name}`",
            "paper": links if short else re.sub(ARXIV, r"[arXiv \1](https://arxiv.org/abs/\1)", info.paper),
        }
        cells = [fixed.get(title, said.get("in short" if short and title in SHORT else title, "")) for title in head]
        rows.append(cells)
    return rows


def with_methods(text: str, *, short: bool) -> str:
    """A page with its tables of methods made anew."""

    def made(match: re.Match[str]) -> str:
        head = [cell.strip() for cell in match[3].strip().strip("|").split("|")]
        order = re.findall(r"^\| `(\w+)` \|", match[0], re.M)
        return match[1] + markdown(method_rows(head, match[2].split(), order, short=short)) + "\n"

    return re.sub(r"^(<!-- methods: ([\w ]+) -->\n)(\|.*\n)(?:\|.*\n)*", made, text, flags=re.M)


PAGES = {
    ROOT / "docs" / "results.md": filled,
    ROOT / "docs" / "methods.md": partial(with_methods, short=False),
    ROOT / "README.md": partial(with_methods, short=True),
}


def main() -> int:
    """Write the pages; with ``--check`` only say which differ."""
    different = []
    for path, fill in PAGES.items():
        text = path.read_text(encoding="utf-8")
        if (made := fill(text)) != text:
            different.append(str(path.relative_to(ROOT)))
            if "--check" not in sys.argv[1:]:
                path.write_text(made, encoding="utf-8")
    print("\n".join(different) or "nothing differs")
    return int("--check" in sys.argv[1:] and bool(different))


if __name__ == "__main__":
    sys.exit(main())
