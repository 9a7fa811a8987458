"""Denoising: what caches, parallel decoding and pruning buy, and what they cost in quality.

Two tables. *Speed* is of a LLaVA with random weights and fixed steps (confidence means nothing there): times beside the
operations that were really run, as ratios to full recompute within one repetition. *Quality* is of the bundled
masked-diffusion model on scenes: CHAIR, recall and POPE, with the forwards that an answer took.
"""

from __future__ import annotations

import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import vlm_attn
from vlm_attn import diffusion, registry
from vlm_attn.evals import prompts, scenes, tasks
from vlm_attn.evals.bench.flops import denoising_flops
from vlm_attn.evals.bench.overhead import _summary, build_model
from vlm_attn.evals.models import load_model

KEEPS, STARTS = (0.5, 0.25, 0.1), (0.25, 0.5, 0.75)
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
    attention: str,
    repeats: int,
    device: str,
    dtype: str,
    seed: int,
    now: Callable[[], float],
) -> dict[str, Any]:
    """Ratios of time and operations to full recompute; see :func:`denoise` for the parameters."""
    model = build_model(layers, hidden, device, getattr(torch, dtype))
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 31000, (1, 30), generator=generator)
    ids = torch.cat([text[:, :15], torch.full((1, 576), 31999), text[:, 15:]], 1).to(device)
    pixels = torch.randn(1, 3, 336, 336, generator=generator).to(device=device, dtype=getattr(torch, dtype))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
    compared = {name: variants("none")[name] for name in names}
    runs: dict[str, list[float]] = {name: [] for name in compared}
    operations: dict[str, int] = {}
    forwards: dict[str, int] = {}
    order, shuffle = list(compared), random.Random(seed)
    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("speed", total=repeats * len(order))
        for _ in range(repeats):
            shuffle.shuffle(order)
            for name in order:
                with _applied(model, compared[name]):
                    sizes: dict[str, Any] = {"steps": steps, "gen_length": length, "block_length": block}
                    options = {**sizes, "attention": attention, **compared[name][2]}
                    begin = now()
                    out = diffusion.generate(model, inputs, mask_id=31998, eos_id=-1, **options)
                    if device.startswith("cuda"):
                        torch.cuda.synchronize()
                    runs[name].append(now() - begin)
                operations[name] = denoising_flops(model.config, out.work, 1)
                forwards[name] = out.forwards
                progress.advance(task)
    found = {}
    for name in compared:
        ratios = [a / b for a, b in zip(runs[name], runs["none"], strict=True)]
        flops = operations[name] / operations["none"]
        found[name] = {
            "time": _summary(ratios),
            "flops": flops,
            "speedup": 1 / statistics.median(ratios),
            "reached": flops / statistics.median(ratios),  # 1 = as fast as the operations say
            "forwards": forwards[name],
        }
    return {"parameters": sum(p.numel() for p in model.parameters()), "ratios_to_none": found}


def quality(names: list[str], *, steps: int, length: int, limit: int, model: str) -> dict[str, Any]:
    """Scores of the bundled model with every variant; see :func:`denoise` for the parameters."""
    loaded, processor = load_model(model)
    data = scenes.dataset("validation")
    chair, pope = tasks.chair_task(data, limit=limit), tasks.pope_task(data, limit=limit)
    known = {**variants("prefix"), "threshold 0.9": (None, {}, {"cache": "prefix", "threshold": 0.9})}
    known["one token a step"] = (None, {}, {"cache": "prefix", "steps": length})
    found: dict[str, Any] = {}
    with Progress(console=Console(stderr=True), transient=True) as progress:
        todo = progress.add_task("quality", total=len(names) * (len(chair.samples) + len(pope.samples)))
        for name in names:
            variant = known[name]
            options = {"steps": steps, "gen_length": length, "block_length": length, **variant[2]}
            scores: dict[str, Any] = {}
            with _applied(loaded, variant):
                for task in (chair, pope):
                    records: list[Any] = []
                    forwards: list[int] = []
                    tokens: list[int] = []
                    size = 1 if task is chair else 32  # of a batch, forwards are those of its slowest row
                    for start in range(0, len(task.samples), size):
                        batch = task.samples[start : start + size]
                        images = [data.load_image(sample.image_id) for sample in batch]
                        inputs = prompts.build_inputs(loaded, processor, images, [sample.prompt for sample in batch])
                        out = diffusion.generate(loaded, inputs, **options)
                        forwards.append(out.forwards)
                        tokens += map(len, out.answers)
                        texts = processor.batch_decode(out.answers, skip_special_tokens=True)
                        for sample, answer in zip(batch, texts, strict=True):
                            record = {**sample.facts, "image_id": sample.image_id, "answer": answer.strip()}
                            records.append({**record, "score": task.score(sample, answer.strip())})
                        progress.advance(todo, len(batch))
                    scores[task.name] = task.summarise(records)
                    scores[task.name] |= {"forwards": statistics.mean(forwards), "tokens": statistics.mean(tokens)}
            found[name] = scores
    return {"model": model, "scenes": limit, "steps": steps, "gen_length": length, "variants": found}


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
    attention: Annotated[str, typer.Option(help="Speed: who sees whom.")] = "full",
    repeats: Annotated[int, typer.Option(help="Speed: paired repetitions.", min=1)] = 3,
    device: Annotated[str, typer.Option(help="Speed: cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="Speed: float32 or bfloat16.")] = "float32",
    cpu_time: Annotated[bool, typer.Option("--cpu-time", help="Speed: CPU time of one thread.")] = False,
    limit: Annotated[int, typer.Option(help="Quality: scenes.", min=1)] = 200,
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
    timed = list(variants("none"))
    scored = [*timed, "one token a step", "threshold 0.9"]
    wrong = [name for name in variant or [] if name not in scored]
    if wrong:
        raise ValueError(f"--variant {wrong[0]!r}: there are {', '.join(scored)}")
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if cpu_time and device.startswith("cuda"):
        raise ValueError("--cpu-time says nothing about a GPU: leave it out")
    if cpu_time:
        torch.set_num_threads(1)
    result: dict[str, Any] = {
        "schema_version": 1,
        "benchmark": "diffusion",
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "clock": "CPU time" if cpu_time else "wall time",
        "device": torch.cuda.get_device_name() if device.startswith("cuda") else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "vlm_attn": vlm_attn.__version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    console = Console(width=max(Console().width, 120))
    chosen = variant or scored
    if part != "quality":
        settings: dict[str, Any] = {
            "layers": layers,
            "hidden": hidden,
            "steps": steps,
            "length": length,
            "block": block,
        }
        settings |= {"attention": attention, "repeats": repeats, "device": device, "dtype": dtype, "seed": seed}
        names = list(dict.fromkeys(["none", *(n for n in chosen if n in timed)]))
        clock = time.process_time if cpu_time else time.perf_counter
        result["speed"] = {"config": settings, **speed(names, **settings, now=clock)}
        _print_speed(console, result)
    if part != "speed":
        result["quality"] = quality(chosen, steps=16, length=32, limit=limit, model=model)
        _print_quality(console, result["quality"])
    if json_file is not None:
        json_file.parent.mkdir(parents=True, exist_ok=True)
        json_file.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


def _print_speed(console: Console, result: dict[str, Any]) -> None:
    found, config = result["speed"], result["speed"]["config"]
    console.print(
        f"random-weight LLaVA, {found['parameters'] / 1e6:.0f} M parameters, 606 prompt tokens, {config['length']} positions "
        f"in blocks of {config['block']}, {config['steps']} steps, attention {config['attention']}, {result['clock']}, "
        f"{config['repeats']} paired runs; ratios to full recompute"
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


def _print_quality(console: Console, found: dict[str, Any]) -> None:
    console.print(
        f"{found['model']}, {found['scenes']} validation scenes of the scenes world (not COCO), {found['gen_length']} "
        f"positions in one block, {found['steps']} steps; percent with 95 % intervals. Forwards: of a caption"
    )
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "forwards", "tokens", "CHAIR_I", "recall", "POPE accuracy", "POPE F1"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for name, row in found["variants"].items():
        chair, pope = row["chair"], row["pope"]
        cells = [f"{chair['forwards']:.1f}", f"{chair['tokens']:.1f}"]
        named = chair["instances"]
        values = [named["chair_i"], named["recall"], pope["random"]["accuracy"], pope["random"]["f1"]]
        cells += [f"{v['value']:.1f} ({v['low']:.1f}-{v['high']:.1f})" for v in values]
        table.add_row(name, *cells)
    console.print(table)


def main() -> int:
    """Entry of ``vlm-attn bench diffusion``."""
    typer.run(denoise)
    return 0
