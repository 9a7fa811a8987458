# SPDX-License-Identifier: Apache-2.0
"""Measure the constants that methods need of a model, and write them as a preset.

    vlm-attn calibrate MODEL --method gift --method var -o preset.json

GIFT: the saliency layer is the one with the largest total gaze shift (arXiv 2510.22067); the third of the layers from there on
is enhanced, as in the released settings of LLaVA-1.5-7B. VAR: sinks are massive in the dimensions in which a token exceeds
``tau`` times its RMS (arXiv 2503.03321), in most prompts. VHR: the layers whose heads' outputs change most when the picture is
taken away, as many as the paper reinforces. PAI, PAINT: the layers from where the first token has become the sink on. These two
rules are ours: the papers give the layers of LLaVA-1.5-7B. What the papers leave to the reader, strength and band,
``--search`` chooses by CHAIR among a small grid. ``duo`` and ``razor`` have profiles of their own, and ``--heads`` finds the
heads that look at what a caption names: `evals/heads.py`.
"""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, ClassVar

import torch
from rich import box
from rich.console import Console
from rich.progress import Progress, track
from rich.table import Table

import vlm_attn
from vlm_attn import presets
from vlm_attn.branch import Run
from vlm_attn.call import Call
from vlm_attn.evals import chair, pope, runner
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.heads import PROFILES, STEPS, visual_profile
from vlm_attn.evals.prompts import build_inputs
from vlm_attn.evals.report import signed
from vlm_attn.evals.specs import MethodSpec, unknown
from vlm_attn.evals.stats import Pair, difference, ratio
from vlm_attn.evals.tasks import Task, chair_task, image_ids_hash, pope_task
from vlm_attn.hallucination.gift import Gift, gaze_shift
from vlm_attn.hallucination.vhr import Vhr, forward_twice, head_divergence
from vlm_attn.kernels import Edit, Group

VHR_SHARE = 15 / 32  # of the layers: "the second and the last 14", arXiv 2412.13949
TAU = 20.0  # times the RMS: a massive dimension
SEEN = 0.2  # visual mass from which a head is image-centric, arXiv 2503.03321
ALPHAS = (1.0, 3.0, 5.0)  # strengths of the grid
SHOWN = 10  # visual retrieval heads in the table
LOST_RECALL = 0.01  # a setting that loses more than this against the plain model buys its score with silence
MEASURED = ("layers", "sinks", "peaks", "heads", "image_centric", "divergence", "visual_heads", "grid", "check")
FACTS = (
    "model_type",
    "text_config.num_hidden_layers",
    "text_config.hidden_size",
    "text_config.vocab_size",
    "vision_config.image_size",
)


@dataclass(frozen=True, kw_only=True)
class _Profile(Gift):
    """Reads what GIFT reads, of every layer, and edits nothing."""

    name: ClassVar[str] = "profile"

    def prompt_read(self, call: Call, rows: dict[int, torch.Tensor]) -> None:
        columns, layout = self.read_rows(call), call.layout
        inside = columns >= 0
        for layer, attention in rows.items():
            shift = gaze_shift(attention, columns, layout.visual).sum((1, 2, 3))
            last = attention[torch.arange(len(inside)), :, inside.sum(1) - 1]  # [B, H, P]: the question's last word
            mass = {g.name: (last * (layout.group == g)[:, None]).sum(-1).mean(1) for g in (Group.VISUAL, Group.QUERY)}
            mass["FIRST"] = last[torch.arange(len(inside)), :, layout.first].mean(1)
            call.memory(self)[layer] = {"shift": shift, **mass}
            call.memory(self)["heads", layer] = (last * layout.visual[:, None]).sum(-1)  # [B, H]

    def edit(self, call: Call, layer: int) -> Edit | None:
        return None


def measure(
    model: Any, processor: Any, dataset: CocoDataset, *, prompt: str, limit: int, tau: float = TAU, batch_size: int = 10
) -> dict[str, Any]:
    """Profile a model over the first images of a dataset.

    Args:
        model: an unpatched model.
        processor: its processor.
        dataset: the images.
        prompt: the question.
        limit: number of images.
        tau: a token is massive in a dimension if it exceeds tau times its RMS.
        batch_size: images per forward.

    Returns:
        ``layers``: per layer the mean total gaze shift and the mass of VISUAL, QUERY and the first token in the row of the
        question's last word; ``sinks``: per layer the massive dimensions with the share of images in which they occur, and the
        largest value of |x| / RMS; ``peaks``: for the dimensions with the largest values anywhere, the median over images of
        their largest |x| / RMS; ``heads``: visual mass of every head ``[layers][heads]``, and ``image_centric``, the share of
        images in which it is at least 0.2.
    """
    text = model.config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    profile = _Profile(saliency_layers=tuple(range(layers)), enhance_layers=(0,), query_words="all")
    sums: list[Counter[str]] = [Counter() for _ in range(layers)]
    sinks: list[Counter[int]] = [Counter() for _ in range(layers)]
    largest = [0.0] * layers
    peaks: list[torch.Tensor] = []  # one [B, D] for every batch
    heads = torch.zeros(2, layers, text.num_attention_heads)
    ids = dataset.image_ids[:limit]
    with vlm_attn.patched(model, profile, processor=processor), torch.inference_mode():
        engine = vlm_attn.patching.engine_of(model)
        mask = torch.ones(0)

        def look(layer: int) -> Any:
            def hook(module: Any, args: Any, kwargs: Any) -> None:
                x = (args[0] if args else kwargs["hidden_states"]).float()
                ratio = x.abs() / x.square().mean(-1, keepdim=True).sqrt().clamp_min(1e-12)
                ratio = ratio * mask[:, : x.shape[1], None]
                largest[layer] = max(largest[layer], float(ratio.max()))
                for row in (ratio >= tau).any(1):
                    sinks[layer].update(row.nonzero().flatten().tolist())
                peaks[-1] = torch.maximum(peaks[-1], ratio.amax(1).cpu())

            return hook

        handles = [
            layer.register_forward_pre_hook(look(i), with_kwargs=True)
            for i, layer in enumerate(engine.text_model.layers)  # type: ignore[arg-type]
        ]
        try:
            for start in track(
                range(0, len(ids), batch_size), "profiling", console=Console(stderr=True), transient=True
            ):
                images = [dataset.load_image(i) for i in ids[start : start + batch_size]]
                inputs = build_inputs(model, processor, images, [prompt] * len(images))
                mask = inputs["attention_mask"]
                peaks.append(torch.zeros(len(images), text.hidden_size))
                with engine.running(inputs) as call:
                    model(**inputs)
                for key, found in call.memory(profile).items():
                    if isinstance(key, int):
                        sums[key].update({name: float(value.sum()) for name, value in found.items()})
                    elif isinstance(key, tuple):
                        heads[0, key[1]] += found.sum(0).cpu()
                        heads[1, key[1]] += (found >= SEEN).sum(0).cpu()
        finally:
            for handle in handles:
                handle.remove()
    count = max(1, len(ids))
    typical = torch.cat(peaks).median(0).values
    return {
        "images": len(ids),
        "prompt": prompt,
        "tau": tau,
        "layers": [{key: value / count for key, value in total.items()} for total in sums],
        "sinks": [
            {"largest": largest[i], "dims": {str(d): n / count for d, n in sinks[i].most_common(8)}}
            for i in range(layers)
        ],
        "peaks": {str(d): float(typical[d]) for d in typical.argsort(descending=True)[:8].tolist()},
        "heads": (heads[0] / count).tolist(),
        "image_centric": (heads[1] / count).tolist(),
    }


def divergences(
    model: Any, processor: Any, dataset: CocoDataset, *, prompt: str, limit: int, batch_size: int = 10
) -> list[list[float]]:
    """How much what every head says at the end of a prompt hangs on the picture (VHR, arXiv 2412.13949).

    Args:
        model: an unpatched model.
        processor: its processor.
        dataset: the images.
        prompt: the question.
        limit: number of images.
        batch_size: images per forward, of twice as many rows.

    Returns:
        ``[layers][heads]``: the mean over images of ``|o - o'| / |o'|``, ``o'`` being the head's output without the picture.
    """
    total: dict[int, torch.Tensor] = {}

    def tap(layer: int, out: torch.Tensor, attend: Any) -> torch.Tensor:
        apart, size = head_divergence(*out[:, -1].float().chunk(2))
        found = (apart / size.sqrt().clamp_min(1e-12)).sum(0).cpu()
        total[layer] = total.get(layer, torch.zeros_like(found)) + found
        return out

    ids = dataset.image_ids[:limit]
    with vlm_attn.patched(model, Vhr(), processor=processor):
        engine = vlm_attn.patching.engine_of(model)
        for start in track(range(0, len(ids), batch_size), "heads", console=Console(stderr=True), transient=True):
            images = [dataset.load_image(i) for i in ids[start : start + batch_size]]
            inputs = build_inputs(model, processor, images, [prompt] * len(images))
            with engine.running(inputs) as call:
                forward_twice(Run(engine, model, call, inputs), tap)
    return [(total[layer] / max(1, len(ids))).tolist() for layer in sorted(total)]


# From what was measured to a method's constants: parameters and why.


def _gift(found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    shifts = [layer["shift"] for layer in found["layers"]]
    saliency = max(range(len(shifts)), key=shifts.__getitem__)
    band = _bands(saliency, len(shifts))[0]
    return (
        {"saliency_layers": [saliency], "enhance_layers": band},
        f"saliency layer: the largest total gaze shift ({shifts[saliency]:.3g}); enhanced: a third of the layers from there on",
    )


def _var(found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    share: dict[int, float] = {}
    for layer in found["sinks"]:
        for dim, images in layer["dims"].items():
            share[int(dim)] = max(share.get(int(dim), 0.0), images)
    dims = sorted(dim for dim, images in share.items() if images >= 0.5)
    if dims:
        return {"sink_dims": dims}, f"above {found['tau']:g} times the RMS in at least half of the prompts"
    dim, peak = next(iter(found["peaks"].items()))
    return (
        {"sink_dims": [int(dim)]},
        f"no dimension reaches {found['tau']:g} times the RMS in half of the prompts: this is the largest (typically "
        f"{peak:.3g} times), and with var's own tau nothing is a sink",
    )


def _vhr(found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    mean = [sum(heads) / len(heads) for heads in found["divergence"]]
    count = max(1, round(VHR_SHARE * len(mean)))
    layers = sorted(sorted(range(len(mean)), key=lambda layer: -mean[layer])[:count])
    return {"layers": layers}, (
        f"the {count} of {len(mean)} layers (the paper's share) whose heads' outputs change most when the picture is taken "
        f"away, relative to their size ({min(mean[layer] for layer in layers):.3g} and more)"
    )


def _settled(found: dict[str, Any]) -> tuple[dict[str, Any], str]:
    share = [layer["FIRST"] for layer in found["layers"]]
    rises = [after - before for before, after in zip(share, share[1:], strict=False)]
    start = 1 + max(range(len(rises)), key=rises.__getitem__) if rises else 0
    return {"layers": list(range(start, len(share)))}, (
        f"from the layer on where the first token's share of attention rises most (to {share[start]:.3g})"
    )


RULES: dict[str, Callable[[dict[str, Any]], tuple[dict[str, Any], str]]] = {
    "gift": _gift,
    "var": _var,
    "vhr": _vhr,
    "pai": _settled,
    "paint": _settled,
}


def _bands(saliency: int, layers: int) -> list[list[int]]:
    """Bands of the grid: the rule's first, then a third around the saliency layer, then the middle half."""
    third, half = max(1, round(layers / 3)), max(1, round(layers / 2))
    starts = (
        (min(saliency + 1, layers - third), third),
        (max(0, saliency - third // 2), third),
        ((layers - half) // 2, half),
    )
    bands = [list(range(start, min(start + size, layers))) for start, size in starts]
    return [band for i, band in enumerate(bands) if band not in bands[:i]]


def gift_grid(constants: dict[str, Any], layers: int) -> list[MethodSpec]:
    """The settings that ``--search`` compares: every band with every strength."""
    grid = []
    for band in _bands(constants["saliency_layers"][0], layers):
        for alpha in ALPHAS:
            label = f"layers {band[0]}-{band[-1]}, alpha {alpha:g}"
            params = {**constants, "enhance_layers": tuple(band), "alpha": alpha}
            grid.append(MethodSpec(label, ("gift",), {"gift": params}))
    return grid


def choose(metrics: dict[str, dict[str, Any]], labels: Sequence[str]) -> str:
    """The setting with the lowest CHAIR_I among those that keep the plain model's recall (to 1 point); else the highest recall.

    Args:
        metrics: per label what `chair.summarise` gives, ``baseline`` among them.
        labels: the settings.
    """
    least = metrics["baseline"]["recall"]["value"] - 100 * LOST_RECALL
    keep = [label for label in labels if metrics[label]["recall"]["value"] >= least]
    if not keep:
        return max(labels, key=lambda label: metrics[label]["recall"]["value"])
    return min(keep, key=lambda label: (metrics[label]["chair_i"]["value"], -metrics[label]["recall"]["value"]))


def score(
    model: Any,
    processor: Any,
    task: Task,
    specs: Sequence[MethodSpec],
    *,
    model_name: str,
    batch_size: int,
) -> dict[str, list[dict[str, Any]]]:
    """Run every setting on a task: label -> records, in the order of the samples.

    Raises:
        KeyboardInterrupt: it was interrupted.
    """
    bar = Progress(*Progress.get_default_columns(), console=Console(stderr=True), transient=True)
    with bar, TemporaryDirectory() as folder:
        row = bar.add_task(task.name, total=len(specs) * len(task.samples))
        results = runner.run(
            task,
            specs,
            model,
            processor,
            model_name=model_name,
            batch_size=batch_size,
            out=folder,
            progress=lambda label, count: bar.advance(row, count),
        )
        if results["status"] != "complete":
            raise KeyboardInterrupt
        records = [record for record in runner.read_records(Path(folder) / "samples.jsonl") if "skipped" not in record]
    return {spec.label: [record for record in records if record["method"] == spec.label] for spec in specs}


def compare(
    columns: dict[str, Pair], chosen: str, *, lowest: bool, labels: Sequence[str]
) -> dict[str, dict[str, float | None]]:
    """The chosen setting against the one that is best on these images: value of each setting, and the paired difference.

    Args:
        columns: per label numerators and denominators of the figure, per image.
        chosen: a label.
        lowest: whether low is good.
        labels: the settings that were choosable.

    Returns:
        ``values`` in percent by label, ``best``, and ``lost``: how much worse the chosen one is, with its interval.
    """
    values = {label: ratio(*pair, scale=100.0) for label, pair in columns.items()}
    best = (min if lowest else max)(labels, key=lambda label: values[label]["value"] or 0.0)
    sign = 100.0 if lowest else -100.0
    lost = difference([columns[chosen]], [columns[best]], scale=sign)
    return {"values": values, "best": best, "lost": lost}  # type: ignore[dict-item]


def verify(
    model: Any,
    processor: Any,
    dataset: CocoDataset,
    specs: Sequence[MethodSpec],
    chosen: str,
    *,
    model_name: str,
    batch_size: int,
) -> dict[str, Any]:
    """The whole grid on images that were not searched: what the choice loses against the best one there.

    Returns:
        ``chair_i`` and ``pope_adversarial_f1``, each as :func:`compare` gives it.
    """
    count = len(dataset.image_ids)
    runs = [MethodSpec("baseline"), *specs]
    shared: dict[str, Any] = {"model_name": model_name, "batch_size": batch_size}
    labels = [spec.label for spec in specs]
    captions = score(model, processor, chair_task(dataset, limit=count), runs, **shared)
    chairs = {label: chair.columns_of([r["score"] for r in rows])["chair_i"] for label, rows in captions.items()}
    questions = [q for q in pope.build_questions(dataset, images=count) if q.split == "adversarial"]
    answers = score(model, processor, pope_task(dataset, questions=questions), runs, **shared)
    f1 = {
        label: pope.columns_of([{**r, "split": "adversarial", "prediction": r["score"]["prediction"]} for r in rows])[
            "adversarial"
        ]["f1"]
        for label, rows in answers.items()
    }
    return {
        "images": count,
        "image_ids_sha256": image_ids_hash(dataset.image_ids),
        "chair_i": compare(chairs, chosen, lowest=True, labels=labels),
        "pope_adversarial_f1": compare(f1, chosen, lowest=False, labels=labels),
    }


def preset_of(
    model: Any, name: str, constants: dict[str, dict[str, Any]], why: dict[str, str], found: dict[str, Any]
) -> dict[str, Any]:
    """The content of a preset file."""
    facts = {key: presets.fact(model.config, key) for key in FACTS}
    tried = {"searched": {"gift": len(found["grid"]) - 1}} if "grid" in found else {}
    return {
        "description": f"measured on {name}",
        "model": {key: value for key, value in facts.items() if value is not None},
        "methods": constants,
        **tried,
        "provenance": {
            **why,
            "measured": f"{date.today().isoformat()}, vlm_attn {vlm_attn.__version__}, Python {platform.python_version()}: "
            f"{found['images']} images of {found['data']} (sha256 of their ids {found['image_ids_sha256'][:12]}), "
            f"question {found['prompt']!r}",
        },
        "measurements": {key: found[key] for key in MEASURED if key in found},
    }


def profile_table(found: dict[str, Any]) -> Table:
    """What was measured, a row per layer."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in (
        "layer",
        "gaze shift",
        "visual mass",
        "question mass",
        "first token",
        "image-centric heads",
        "largest |x|/RMS",
        f"dims >= {found['tau']:g}",
    ):
        table.add_column(title, justify="right")
    for i, (row, sink) in enumerate(zip(found["layers"], found["sinks"], strict=True)):
        dims = ", ".join(f"{d} ({share:.0%})" for d, share in sink["dims"].items()) or "-"
        cells = (f"{row[key]:.3f}" for key in ("shift", "VISUAL", "QUERY", "FIRST"))
        centric = sum(share >= 0.5 for share in found["image_centric"][i])
        table.add_row(str(i), *cells, f"{centric} of {len(found['heads'][i])}", f"{sink['largest']:.1f}", dims)
    return table


def heads_table(found: dict[str, Any]) -> Table:
    """The heads that look most often at what a caption names."""
    table = Table(box=box.SIMPLE_HEAD, title=f"{found['mentions']} mentions, by chance {found['chance']:.0%}")
    for name in ("layer", "head", "looks at what is named", "visual mass"):
        table.add_column(name, justify="right")
    score, mass = torch.tensor(found["score"]), torch.tensor(found["mass"])
    for place in score.flatten().argsort(descending=True, stable=True)[:SHOWN].tolist():
        layer, head = divmod(place, score.shape[1])
        table.add_row(str(layer), str(head), f"{score[layer, head]:.0%}", f"{mass[layer, head]:.3f}")
    return table


def check_table(check: dict[str, Any], chosen: str) -> Table:
    """The grid of ``--check``, and what the choice loses."""
    figures = {"CHAIR_I": check["chair_i"], "POPE adversarial F1": check["pope_adversarial_f1"]}
    table = Table(box=box.SIMPLE_HEAD, title=f"{check['images']} other images")
    for title in ("setting", *figures):
        table.add_column(title, justify="left" if title == "setting" else "right")
    for label in check["chair_i"]["values"]:
        marked = f"{label} <- chosen" if label == chosen else label
        table.add_row(marked, *(f"{figure['values'][label]['value']:.1f}" for figure in figures.values()))
    table.add_section()
    table.add_row("lost against the best (95 %)", *(signed(figure["lost"]) for figure in figures.values()))
    return table


def grid_table(metrics: dict[str, dict[str, Any]], chosen: str) -> Table:
    """The grid of ``--search``."""
    table = Table(box=box.SIMPLE_HEAD)
    for title in ("setting", "CHAIR_S", "CHAIR_I", "recall", ""):
        table.add_column(title, justify="left" if title in ("setting", "") else "right")
    for label, row in metrics.items():
        cells = (f"{row[key]['value']:.1f}" for key in ("chair_s", "chair_i", "recall"))
        table.add_row(label, *cells, "<- chosen" if label == chosen else "")
    return table


def plot(found: dict[str, Any], constants: dict[str, dict[str, Any]], path: Path) -> None:
    """Draw what was measured: gaze shift and masses by layer, with GIFT's choice; visual mass of every head, and how often it
    looks at what is named."""
    from matplotlib.figure import Figure

    tables = {"visual mass of every head": found["heads"]}
    if "visual_heads" in found:
        tables["looks at what is named"] = found["visual_heads"]["score"]
    figure = Figure(figsize=(7.4 + 3.6 * len(tables), 3.6), layout="constrained")
    shift, mass, *maps = figure.subplots(1, 2 + len(tables))
    layers = range(len(found["layers"]))
    shift.bar(layers, [row["shift"] for row in found["layers"]])
    shift.set(title="total gaze shift", xlabel="layer")
    for key, label in (("VISUAL", "image"), ("QUERY", "question"), ("FIRST", "first token")):
        mass.plot(layers, [row[key] for row in found["layers"]], marker="o", label=label)
    mass.set(title="attention of the question's last word", xlabel="layer", ylim=(0, 1))
    gift = constants.get("gift")
    if gift is not None:
        shift.patches[gift["saliency_layers"][0]].set_color("tab:red")
        mass.axvspan(gift["enhance_layers"][0] - 0.5, gift["enhance_layers"][-1] + 0.5, alpha=0.15, label="enhanced")
    mass.legend(fontsize="small")
    for axes, (title, table) in zip(maps, tables.items(), strict=True):
        shown = axes.imshow(table, vmin=0, vmax=1, aspect="auto")
        axes.set(title=title, xlabel="head", ylabel="layer")
        figure.colorbar(shown, ax=axes)
    figure.savefig(path, dpi=110)


def check(methods: Sequence[str]) -> None:
    """Refuse methods without a rule, and say what is missing for the plot.

    Raises:
        ValueError: names the method, and those there are.
        ImportError: matplotlib is missing.
    """
    require("matplotlib")  # now, not after hours of measuring
    for method in methods:
        if method not in RULES and method not in PROFILES:
            raise unknown("method to calibrate", method, [*RULES, *PROFILES])


def calibrate(
    model: Any,
    processor: Any,
    dataset: CocoDataset,
    methods: Sequence[str],
    *,
    model_name: str,
    prompt: str,
    limit: int = 50,
    searched: int = 0,
    checked: int = 0,
    batch_size: int = 8,
    steps: int = STEPS,
    captioned: int = 0,
    console: Console | None = None,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Measure a model and choose constants.

    Args:
        model: an unpatched model.
        processor: its processor.
        dataset: images; with objects, for ``searched``.
        methods: of :data:`RULES`, or of ``evals.heads.PROFILES``.
        model_name: what the preset calls it.
        prompt: the question of the profile.
        limit: images of the profile, at least 30 for constants to rely on.
        searched: images on which GIFT's grid is compared by CHAIR; 0 = the rule alone.
        checked: further images on which the choice is compared with the whole grid.
        batch_size: rows per forward.
        steps: training steps of `duo`'s gates.
        captioned: images on whose captions visual retrieval heads are looked for; 0 = none.
        console: where tables are printed; None: nowhere.

    Returns:
        The preset, and what was measured.

    Raises:
        ValueError: a method without a rule, a search without gift, fewer images than asked for, or none of those to be
            captioned has a box.
    """
    check(methods)
    if searched and "gift" not in methods:
        raise ValueError("--search compares settings of gift: name --method gift too, or leave it out")
    if checked and not searched:
        raise ValueError("--check compares the choice of --search: give --search a number of images too")
    most = max(limit, searched + checked, captioned)
    if most > len(dataset.image_ids):
        raise ValueError(
            f"{most} images are asked for, but {dataset.name} has {len(dataset.image_ids)}: "
            "lower --limit, --search, --check or --heads"
        )
    if captioned and not any(map(dataset.boxes, dataset.image_ids[:captioned])):
        raise ValueError(
            f"--heads needs the objects' boxes, and the first {captioned} images of {dataset.name} have none"
        )
    found = measure(model, processor, dataset, prompt=prompt, limit=limit, batch_size=batch_size)
    if "vhr" in methods:
        found["divergence"] = divergences(model, processor, dataset, prompt=prompt, limit=limit, batch_size=batch_size)
    if captioned:
        found["visual_heads"] = visual_profile(model, processor, dataset, limit=captioned, prompt=chair.PROMPT)
    found |= {"data": dataset.name, "image_ids_sha256": image_ids_hash(dataset.image_ids[:limit])}
    constants, why = {}, {}
    for method in methods:
        if method in RULES:
            constants[method], why[method] = RULES[method](found)
        else:
            constants[method], why[method] = PROFILES[method](model, processor, dataset, steps)
    if console is not None:
        console.print(profile_table(found))
        if captioned:
            console.print(heads_table(found["visual_heads"]))
    if searched:
        specs = gift_grid(constants["gift"], len(found["layers"]))
        shared: dict[str, Any] = {"model_name": model_name, "batch_size": batch_size}
        seen = dataset.subset(dataset.image_ids[:searched])
        task = chair_task(seen, limit=searched)
        records = score(model, processor, task, [MethodSpec("baseline"), *specs], **shared)
        metrics = {label: chair.summarise([r["score"] for r in rows]) for label, rows in records.items()}
        label = choose(metrics, [spec.label for spec in specs])
        params = next(spec.params["gift"] for spec in specs if spec.label == label)
        constants["gift"] = {**params, "enhance_layers": list(params["enhance_layers"])}
        plain, best = (
            f"{metrics[name]['chair_i']['value']:.1f} (recall {metrics[name]['recall']['value']:.1f})"
            for name in ("baseline", label)
        )
        why["gift"] = why["gift"].partition(";")[0] + (
            f"; band and strength: the lowest CHAIR_I of {len(specs)} settings that lose at most a point of recall, on "
            f"{searched} images of {dataset.name}: {best}, plain {plain}"
        )
        found["grid"] = metrics
        if console is not None:
            console.print(grid_table(metrics, label))
        if checked:
            unseen = dataset.subset(dataset.image_ids[searched : searched + checked])
            found["check"] = verify(model, processor, unseen, specs, label, **shared)
            lost = {key: signed(found["check"][key]["lost"]) for key in ("chair_i", "pope_adversarial_f1")}
            why["gift"] += (
                f"; on {checked} other images it loses {lost['chair_i']} points of CHAIR_I and "
                f"{lost['pope_adversarial_f1']} of POPE's adversarial F1 against the best of the grid there"
            )
            if console is not None:
                console.print(check_table(found["check"], label))
    preset = preset_of(model, model_name, constants, why, found)
    if console is not None:
        for method in methods:
            values = ", ".join(f"{key}={short(value)}" for key, value in constants[method].items())
            console.print(f"[bold]{method}[/bold]: {values}\n  {why[method]}", highlight=False)
    return preset, found


def short(value: Any) -> str:
    """A constant as it is printed: of a table its size."""
    if isinstance(value, list) and value and isinstance(value[0], list):
        return f"[{len(value)} layers][{len(value[0])} heads]"
    return str(value)


def write(preset: dict[str, Any], found: dict[str, Any], path: Path) -> Path:
    """Write a preset, and its plot beside it; returns the plot's path."""
    runner.write_json(path, preset)
    picture = path.with_suffix(".png")
    plot(found, preset["methods"], picture)
    return picture
