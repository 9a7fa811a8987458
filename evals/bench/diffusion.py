# SPDX-License-Identifier: Apache-2.0
"""Denoising: what caches, parallel decoding and pruning buy, and what they cost in quality.

Two tables. *Speed* is of a LLaVA with random weights and fixed steps (confidence means nothing there): times beside the
operations that were really run, as ratios to full recompute within one repetition. *Quality* is of the bundled
masked-diffusion model on scenes: CHAIR, recall and POPE, with the forwards that an answer took.
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import vlm_attn
from vlm_attn import diffusion, registry
from vlm_attn.evals import chair, pope, prompts, scenes, tasks
from vlm_attn.evals.bench.flops import denoising_flops
from vlm_attn.evals.bench.overhead import build_model
from vlm_attn.evals.bench.shared import clock_on, few, progress, record, summary
from vlm_attn.evals.models import load_model
from vlm_attn.evals.runner import write_json
from vlm_attn.evals.stats import difference

KEEPS, STARTS = (0.5, 0.25, 0.1), (0.25, 0.5, 0.75)
THRESHOLDS = (0.9, 0.8, 0.7, 0.6)
IN_BLOCKS, ONE_BY_ONE = ", 4 blocks", "one token a step"
SHORT = 4  # positions of a yes/no answer
Variant = tuple[str | None, dict[str, Any], dict[str, Any]]  # method, its parameters, options of generate


def variants(pruning_cache: str) -> dict[str, Variant]:
    """What is compared, by name; the first is full recompute.

    Args:
        pruning_cache: the cache that pruning strategies run with.
    """
    out: dict[str, Variant] = {"none": (None, {}, {"cache": "none"})}
    out |= {cache: (None, {}, {"cache": cache}) for cache in ("prefix", "block", "dual", "delayed")}
    beside = {"cache": pruning_cache}
    for keep in KEEPS:
        out[f"divprune {keep:g}"] = ("divprune", {"keep": keep}, beside)
        for start in STARTS:
            out[f"late_step {keep:g} from {start:g}"] = ("late_step", {"keep": keep, "start_at": start}, beside)
        out[f"progressive {keep:g}"] = ("progressive", {"keep": keep}, beside)
    out["layer_skip"] = ("layer_skip", {}, beside)
    return out


def _applied(model: Any, variant: Variant) -> Any:
    from contextlib import nullcontext

    method, given, _ = variant
    return nullcontext() if method is None else vlm_attn.patched(model, registry.build(method, **given))


def speed(
    names: list[str],
    *,
    layers: int,
    hidden: int,
    steps: int,
    length: int,
    block: int,
    prune_steps: int,
    attention: str,
    repeats: int,
    cache_repeats: int,
    device: str,
    dtype: str,
    seed: int,
    now: Callable[[], float],
) -> dict[str, Any]:
    """Ratios of time and operations to full recompute; see :func:`denoise` for the parameters.

    Caches fill ``length`` positions in blocks; pruning strategies, which say nothing about blocks, fill one block in
    ``prune_steps`` steps. Each is compared with full recompute of the same.
    """
    model = build_model(layers, hidden, device, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 31000, (1, 30), generator=generator)
    ids = torch.cat([text[:, :15], torch.full((1, 576), 31999), text[:, 15:]], 1).to(device)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(device=device, dtype=getattr(torch, dtype))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    known = variants("none")
    whole = {"steps": steps, "gen_length": length, "block_length": block}
    one_block = {"steps": prune_steps, "gen_length": block, "block_length": block}
    pruned = [name for name in names if known[name][0] is not None]
    caches = [name for name in names if name not in pruned and name != "none"]
    groups = [(repeats, one_block, ["none", *pruned])] if pruned else []
    if caches or not pruned:
        groups.insert(0, (cache_repeats, whole, ["none", *caches]))
    found: dict[str, Any] = {}
    shuffle = random.Random(seed)

    def run(variant: Variant, sizes: dict[str, Any]) -> tuple[float, Any]:
        with _applied(model, variant):
            begin = now()
            out = diffusion.generate(
                model, inputs, mask_id=31998, eos_id=-1, **{**sizes, "attention": attention, **variant[2]}
            )
            if device.startswith("cuda"):
                torch.cuda.synchronize()
            return now() - begin, out

    with progress("speed", sum(times * len(group) for times, _, group in groups)) as tell:
        run(known["none"], {**one_block, "steps": 1})  # the first run of all pays for what is set up once
        for times, sizes, group in groups:
            runs: dict[str, list[float]] = {name: [] for name in group}
            operations: dict[str, int] = {}
            forwards: dict[str, int] = {}
            for _ in range(times):
                for name in shuffle.sample(group, len(group)):
                    seconds, out = run(known[name], sizes)
                    runs[name].append(seconds)
                    operations[name], forwards[name] = denoising_flops(model.config, out.work, 1), out.forwards
                    tell(name, f"{seconds:.2f} s")
            for name in group:
                if name in found:  # full recompute, a second time
                    continue
                ratios = [a / b for a, b in zip(runs[name], runs["none"], strict=True)]
                flops = operations[name] / operations["none"]
                found[name] = {
                    **sizes,
                    "forwards": forwards[name],
                    "time": summary(ratios),
                    "flops": flops,
                    "speedup": 1 / statistics.median(ratios),
                    "reached": flops / statistics.median(ratios),  # 1 = as fast as the operations say
                    "seconds": statistics.median(runs[name]),
                    "seconds_of_none": statistics.median(runs["none"]),
                }
    ordered = {name: found[name] for name in names}
    return {"parameters": sum(p.numel() for p in model.parameters()), "ratios_to_none": ordered}


def scored(steps: int, length: int, layers: int = 6) -> dict[str, Variant]:
    """What is compared in quality, by name: what :func:`variants` has, and what needs a trained model.

    Args:
        steps: of a caption.
        length: positions of a caption.
        layers: of the model's decoder; the bundled one has 6.
    """
    out = variants("prefix")
    out["layer_skip, lower half"] = ("layer_skip", {"layers": tuple(range(layers // 2))}, {"cache": "prefix"})
    for cache in ("none", "block", "dual"):
        out[f"{cache}{IN_BLOCKS}"] = (None, {}, {"cache": cache, "block_length": length // 4})
    out[ONE_BY_ONE] = (None, {}, {"cache": "prefix", "steps": length})
    out |= {f"threshold {t:g}": (None, {}, {"cache": "prefix", "threshold": t}) for t in THRESHOLDS}
    return out


def reference(name: str) -> str:
    """The variant whose scores a variant's are compared with: what it is a faster form of."""
    if name.startswith("threshold"):
        return ONE_BY_ONE
    return f"none{IN_BLOCKS}" if name.endswith(IN_BLOCKS) else "none"


def quality(names: list[str], *, steps: int, length: int, limit: int, pope_limit: int, model: str) -> dict[str, Any]:
    """Scores of the bundled model with every variant, and how far they are from those of their :func:`reference`.

    Captions fill ``length`` positions in ``steps`` steps; yes/no answers ``SHORT`` positions, one a step, so that every
    start falls on a step of its own. See :func:`denoise` for the parameters.
    """
    loaded, processor = load_model(model)
    data = scenes.dataset("validation")
    chair_task, pope_task = tasks.chair_task(data, limit=limit), tasks.pope_task(data, limit=pope_limit)
    known = scored(steps, length, loaded.config.get_text_config(decoder=True).num_hidden_layers)
    names = list(dict.fromkeys(["none", *(reference(name) for name in names), *names]))
    found: dict[str, Any] = {}
    columns: dict[str, tuple[Any, Any]] = {}
    with progress("quality", len(names)) as tell:
        for name in names:
            scores: dict[str, Any] = {}
            kept: dict[str, Any] = {}
            with _applied(loaded, known[name]):
                for task, n, positions in ((chair_task, steps, length), (pope_task, SHORT, SHORT)):
                    options = {"steps": n, "gen_length": positions, "block_length": positions, **known[name][2]}
                    options |= {k: min(options[k], positions) for k in ("steps", "block_length")}
                    runs = list(_answers(loaded, processor, task, options))
                    records = [record for run in runs for record in run[0]]
                    work = [done for run in runs for done in run[1]]
                    tokens = [count for run in runs for count in run[2]]
                    operations = [denoising_flops(loaded.config, done, 1) for done in work]
                    scores[task.name] = task.summarise(records)["instances" if task is chair_task else "mean"] | {
                        "forwards": statistics.mean(map(len, work)),
                        "tokens": statistics.mean(tokens),
                        "gflops": statistics.mean(operations) / 1e9,
                    }
                    kept[task.name] = records
            columns[name] = (
                chair.columns_of([record["score"] for record in kept["chair"]]),
                list(pope.columns_of(pope.by_split(kept["pope"])).values()),
            )
            mine, other = columns[name], columns[reference(name)]
            found[name] = scores | {
                "flops": scores["chair"]["gflops"] / found.get("none", scores)["chair"]["gflops"],
                "against": reference(name),
                "change": {
                    "chair_i": difference([mine[0]["chair_i"]], [other[0]["chair_i"]], scale=100.0),
                    "recall": difference([mine[0]["recall"]], [other[0]["recall"]], scale=100.0),
                    "f1": difference([c["f1"] for c in mine[1]], [c["f1"] for c in other[1]], scale=100.0),
                },
            }
            named = scores["chair"]
            tell(name, f"CHAIR_I {named['chair_i']['value']:.1f}, recall {named['recall']['value']:.1f}")
    sizes = {"scenes": limit, "scenes_asked_about": pope_limit, "questions": len(pope_task.samples)}
    return {"model": model, **sizes, "steps": steps, "gen_length": length, "variants": found}


def _answers(
    model: Any, processor: Any, task: Any, options: dict[str, Any]
) -> Iterator[tuple[list[Any], list[Any], list[int]]]:
    """Batch by batch: records, the work of every run, tokens of every answer."""
    # Of a batch, forwards are those of its slowest row: where they differ, a caption runs alone.
    alone = task.name == "chair" and ("threshold" in options or options["block_length"] < options["gen_length"])
    size = 1 if alone else 25
    for start in range(0, len(task.samples), size):
        batch = task.samples[start : start + size]
        images = [task.dataset.load_image(sample.image_id) for sample in batch]
        inputs = prompts.build_inputs(model, processor, images, [sample.prompt for sample in batch])
        out = diffusion.generate(model, inputs, **options)
        texts = processor.batch_decode(out.answers, skip_special_tokens=True)
        records = [
            {
                **sample.facts,
                "image_id": sample.image_id,
                "answer": text.strip(),
                "score": task.score(sample, text.strip()),
            }
            for sample, text in zip(batch, texts, strict=True)
        ]
        yield records, [out.work] * len(batch), [len(answer) for answer in out.answers]


def denoise(
    variant: Annotated[
        list[str] | None, typer.Option(help="One of the names in the table; repeats.", show_default="all")
    ] = None,
    part: Annotated[str, typer.Option(help="speed, quality or both.")] = "both",
    layers: Annotated[int, typer.Option(help="Speed: decoder layers.", min=4)] = 12,
    hidden: Annotated[int, typer.Option(help="Speed: hidden size, a multiple of 64.", min=64)] = 1024,
    steps: Annotated[int, typer.Option(help="Speed: denoising steps.", min=1)] = 64,
    length: Annotated[int, typer.Option("--gen-length", help="Speed: positions.", min=1)] = 256,
    block: Annotated[int, typer.Option("--block-length", help="Speed: positions of a block.", min=1)] = 32,
    prune_steps: Annotated[
        int, typer.Option(help="Speed: steps of a pruned answer, which is one block; a multiple of 4.", min=1)
    ] = 4,
    attention: Annotated[str, typer.Option(help="Speed: who sees whom.")] = "full",
    repeats: Annotated[int, typer.Option(help="Speed: paired repetitions of pruning strategies.", min=1)] = 3,
    cache_repeats: Annotated[int, typer.Option(help="Speed: of caches, which take minutes.", min=1)] = 1,
    device: Annotated[str, typer.Option(help="Speed: cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Speed: float32 or bfloat16.")] = "float32",
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Speed: CPU time of one thread.")] = False,
    limit: Annotated[int, typer.Option(help="Quality: scenes to describe.", min=1)] = 150,
    pope_limit: Annotated[int, typer.Option(help="Quality: scenes to ask about.", min=1)] = 75,
    model: Annotated[str, typer.Option(help="Quality: the model.")] = "scenes-diffusion",
    seed: Annotated[int, typer.Option(help="Of inputs and order.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Caches, parallel decoding and pruning of masked-diffusion models against full recompute, in one run.

    Example: vlm-attn bench diffusion --part quality --limit 100 --json diffusion.json
    """
    if part not in ("speed", "quality", "both"):
        raise ValueError(f"--part {part!r}: speed, quality or both")
    steps_of_caption, length_of_caption = 16, 32  # what the bundled model's card uses
    timed, known = list(variants("none")), list(scored(steps_of_caption, length_of_caption))
    wrong = [name for name in variant or [] if name not in known]
    if wrong:
        raise ValueError(f"--variant {wrong[0]!r}: there are {'; '.join(known)}")
    device, now = clock_on(device, cpu_time)
    result = record("diffusion", device, clock="CPU time" if cpu_time else "wall time")
    console = Console(width=max(Console().width, 220))
    chosen = variant or known
    if part != "quality":
        settings: dict[str, Any] = {
            "layers": layers,
            "hidden": hidden,
            "steps": steps,
            "length": length,
            "block": block,
            "prune_steps": prune_steps,
        }
        settings |= {"attention": attention, "repeats": repeats, "cache_repeats": cache_repeats}
        settings |= {"device": device, "dtype": dtype, "seed": seed}
        names = list(dict.fromkeys(["none", *(n for n in chosen if n in timed)]))
        result["speed"] = {"config": settings, **speed(names, **settings, now=now)}
        _print_speed(console, result)
    if part != "speed":
        sizes = {"steps": steps_of_caption, "length": length_of_caption, "limit": limit, "pope_limit": pope_limit}
        result["quality"] = quality(chosen, model=model, **sizes)
        _print_quality(console, result["quality"])
    if json_file is not None:
        write_json(json_file, result)


def _print_speed(console: Console, result: dict[str, Any]) -> None:
    found, config = result["speed"], result["speed"]["config"]
    console.print(
        f"random-weight LLaVA, {found['parameters'] / 1e6:.0f} M parameters, 606 prompt tokens, {config['length']} positions "
        f"in blocks of {config['block']}, {config['steps']} steps; pruning: one block, {config['prune_steps']} steps; "
        f"attention {config['attention']}, {result['clock']} of {result['threads']} threads, {config['cache_repeats']} and "
        f"{config['repeats']} paired runs; ratios to full recompute of the same"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "forwards", "FLOPs", "time", "times faster", "of what FLOPs say"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in found["ratios_to_none"].items():
        cells = (
            f"{row['flops']:.3f}",
            f"{row['time']['median']:.3f}",
            f"{row['speedup']:.2f}",
            f"{row['reached']:.0%}",
        )
        table.add_row(name, str(row["forwards"]), *cells)
    console.print(table)
    if note := few(min(config["repeats"], config["cache_repeats"])):
        console.print(note)


def _print_quality(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"{found['model']}, validation scenes of the scenes world (not COCO): {found['scenes']} captions of "
        f"{found['gen_length']} positions in {found['steps']} steps, {found['questions']} yes/no questions about "
        f"{found['scenes_asked_about']} scenes in {SHORT}; percent with 95 % intervals, +- = paired difference to the "
        "variant named last. Forwards and FLOPs: of a caption"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "forwards", "FLOPs", "CHAIR_I", "+-", "recall", "+-", "POPE F1", "+-", "against"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in found["variants"].items():
        named, change = row["chair"], row["change"]
        cells = [f"{row['chair']['forwards']:.1f}", f"{row['flops']:.3f}"]
        for value, moved in (
            (named["chair_i"], change["chair_i"]),
            (named["recall"], change["recall"]),
            (row["pope"]["f1"], change["f1"]),
        ):
            cells.append(f"{value['value']:.1f} ({value['low']:.1f} to {value['high']:.1f})")
            same = row["against"] == name
            cells.append("" if same else f"{moved['value']:+.1f} ({moved['low']:+.1f} to {moved['high']:+.1f})")
        table.add_row(name, *cells, "" if same else row["against"])
    console.print(table)


def main() -> int:
    """Entry of ``vlm-attn bench diffusion``."""
    typer.run(denoise)
    return 0
