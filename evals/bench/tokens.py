# SPDX-License-Identifier: Apache-2.0
"""What keeping fewer visual tokens, or fewer keys per head, buys: every method against the plain model, paired in one run.

The model is a LLaVA with random weights (see ``overhead``): speed does not depend on the weights. Beside each time stands the
ratio of floating-point operations, counted from the tokens that were really kept in every layer, so that a speed-up that
is not real shows. Every repetition runs all variants in a shuffled order; a ratio is taken within its repetition. ``--shape
llava-7b`` is for GPUs: the sizes of LLaVA-1.5-7B.
"""

from __future__ import annotations

import ctypes
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import vlm_attn
from vlm_attn import dropping, host, registry, visual_token_ops
from vlm_attn.evals.bench.flops import prefill_flops
from vlm_attn.evals.bench.overhead import build_model
from vlm_attn.evals.bench.shared import Clock, clock_on, few, progress, record, summary
from vlm_attn.evals.runner import write_json
from vlm_attn.reduction import Reducer, kept_count, scaled
from vlm_attn.tower import Merger, descent

# A tower that is about as small beside its language model as CLIP-L is beside a 7B one.
TOWER = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 8, "num_attention_heads": 4}
CLIP_L = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
SEVEN_B = {"layers": 32, "hidden": 4096, "intermediate": 11008, "head": 128, "tower": CLIP_L, "projected": -2}
REDUCERS = (
    "random",
    "downsample",
    "divprune",
    "tome",
    "visionzip",
    "prumerge",
    "holov",
    "fastv",
    "pyramid_drop",
    "sparsevlm",
    "vscan",
)
#: Methods that keep fewer keys per head: measured when they are named.
HEADS = ("duo", "razor", "longheads", "landmark", "routed", "recycled")


def reducer(name: str, keep: float, layers: int, heads: int = 1) -> Any:
    """A reducer as it is measured. FastV's K is 3 of 32 layers, at the same depth; the others scale by themselves.

    ``duo`` and ``razor`` have no profile here: the last ``keep`` of the heads keep everything, layer by layer, which is where
    the cache shrinks most. ``razor``'s window is that of its authors' second implementation, 256.
    """
    table = [[float(layer)] * heads for layer in range(layers)]
    if name == "duo":
        return visual_token_ops.Duo(gates=table, sparsity=1 - keep)  # type: ignore[arg-type]
    if name == "razor":
        return visual_token_ops.Razor(echo=table, induction=table, echo_share=keep, induction_share=0, local=256)  # type: ignore[arg-type]
    if name == "fastv":
        return visual_token_ops.FastV(layer=scaled((3,), layers)[0], keep=keep)
    return registry.build(name, keep=keep)


def patches_per_layer(config: Any, method: Any) -> list[int] | None:
    """On how many patches every layer of the tower runs, where a reducer merges there; None = all."""
    if not getattr(method, "merges", False):
        return None
    vision = config.vision_config
    whole, depth = (vision.image_size // vision.patch_size) ** 2, vision.num_hidden_layers
    merging = depth + 1 + config.vision_feature_layer
    left = descent(whole, kept_count(method.keep, whole), merging)
    return [whole, *left, *left[-1:] * (depth - merging)][:depth]


def peak_memory(restart: bool = False) -> tuple[int, int]:
    """Resident bytes of this process now and at most since the restart; zeros where the system does not say (not Linux)."""
    try:
        if restart:
            ctypes.CDLL(None).malloc_trim(0)  # what earlier runs freed would hide what this one needs
            Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        found = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text(encoding="utf-8").splitlines())
        now, most = (int(found[name].split()[0]) * 1024 for name in ("VmRSS", "VmHWM"))
    except (OSError, AttributeError, KeyError):
        return 0, 0
    return now, most


def columns_per_layer(model: Any, columns: int, layers: int) -> list[int]:
    """How many prompt columns every layer ran on, from what the model says it kept."""
    found = []
    for layer in range(layers):
        gone = 0
        for image in vlm_attn.kept(model):
            left = [len(index) for at, index in image.stages if at <= layer]
            gone += image.total - (left[-1] if left else image.total)
        found.append(columns - gone)
    return found


def time_once(
    model: Any, inputs: dict[str, Any], method: Any, tokens: int, now: Callable[[], float] = time.perf_counter
) -> dict[str, Any]:
    """One generation.

    Args:
        model: the model, not patched.
        inputs: its inputs.
        method: the method, None for the plain model.
        tokens: number of tokens to generate.
        now: the clock to look at.

    Returns:
        Seconds: ``first`` token from the call on, ``prefill`` without the vision tower, ``decode`` per token (median),
        ``select`` in choosing, merging and gathering. ``cache``: bytes of keys and values. ``peak``: bytes above what was there
        before, 0 where the system does not tell. ``columns``: per layer.
    """
    cuda = inputs["input_ids"].is_cuda
    clock = Clock(inputs["input_ids"].device, now)
    spent = 0.0
    originals = dropping._reduce, Merger.merge

    def timed(function: Callable[..., Any]) -> Callable[..., Any]:
        def measured(*args: Any) -> Any:
            nonlocal spent
            start = clock.look()
            result = function(*args)
            spent += clock.look() - start
            return result

        return measured

    layers = model.config.text_config.num_hidden_layers
    columns = [inputs["input_ids"].shape[1]] * layers
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else peak_memory(restart=True)[0]
    if method is not None:
        dropping._reduce, Merger.merge = timed(originals[0]), timed(originals[1])  # type: ignore[method-assign]
        vlm_attn.patch(model, method)
    try:
        start = clock.look()
        out = model.generate(
            **inputs,
            do_sample=False,
            max_new_tokens=tokens,
            min_new_tokens=tokens,
            streamer=clock,
            return_dict_in_generate=True,
        )
        if isinstance(method, Reducer):
            columns = columns_per_layer(model, columns[0], layers)
    finally:
        dropping._reduce, Merger.merge = originals  # type: ignore[method-assign]
        if vlm_attn.is_patched(model):
            vlm_attn.unpatch(model)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    held = [part for layer in host.cache_of(out).layers for part in (layer.keys, layer.values)]
    return {
        "first": clock.times[1] - start,
        "prefill": steps[0],
        "decode": statistics.median(steps[1:]),
        "select": spent,
        "cache": sum(part.numel() * part.element_size() for part in held),
        "peak": max(0, (torch.cuda.max_memory_allocated() if cuda else peak_memory()[1]) - before),
        "columns": columns,
    }


def run(
    *,
    methods: list[str],
    keeps: list[float],
    layers: int,
    hidden: int,
    images: int,
    text_tokens: int,
    tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    seed: int,
    cpu_time: bool = False,
    shape: str = "small",
) -> dict[str, Any]:
    """Measure; see :func:`tokens` for the parameters.

    Returns:
        The result as it is written to JSON.
    """
    device, now = clock_on(device, cpu_time)
    sizes: dict[str, Any] = SEVEN_B if shape == "llava-7b" else {"layers": layers, "hidden": hidden, "tower": TOWER}
    layers, hidden = sizes["layers"], sizes["hidden"]
    model = build_model(device=device, dtype=getattr(torch, dtype), **sizes)
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 31000, (1, text_tokens), generator=generator)
    image = torch.full((1, 576 * images), 31999)
    ids = torch.cat([text[:, : text_tokens // 2], image, text[:, text_tokens // 2 :]], 1).to(device)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(images, 3, 336, 336, generator=generator).to(
            device=device, dtype=getattr(torch, dtype)
        ),
    }
    compared: dict[str, Any] = {"plain": None}
    for name in methods:
        for keep in keeps if name != "vtw" else [0.0]:
            compared[f"{name} {keep:g}"] = reducer(name, keep, layers, model.config.text_config.num_attention_heads)
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in compared}
    order = list(compared)
    shuffle = random.Random(seed)
    warm = order if device.startswith("cuda") else order[:1]  # a GPU chooses kernels for every size
    with progress("measuring", repeats * len(order) + len(warm)) as tell:
        for repeat in range(-1, repeats):
            shuffle.shuffle(order)
            for name in order if repeat >= 0 else list(warm):
                measured = time_once(model, inputs, compared[name], tokens, now)
                if repeat >= 0:
                    runs[name].append(measured)
                tell(name, f"prompt {measured['prefill']:.2f} s" + " (warm-up)" * (repeat < 0))

    def flops(name: str, pictures: int = 0) -> int:
        patches = patches_per_layer(model.config, compared[name])
        return prefill_flops(model.config, runs[name][0]["columns"], pictures, patches)

    def absolute(name: str) -> dict[str, float]:
        middle = {key: statistics.median(run[key] for run in runs[name]) for key in ("first", "prefill", "decode")}
        return {
            "first_s": middle["first"],
            "prefill_s": middle["prefill"],
            "tokens_per_s": 1 / middle["decode"],
            "cache_mb": runs[name][0]["cache"] / 1e6,
            "peak_mb": statistics.median(run["peak"] for run in runs[name]) / 1e6,
            "prefill_tflop": flops(name) / 1e12,
            "first_tflop": flops(name, images) / 1e12,
        }

    results = {}
    for name in compared:
        if name == "plain":
            continue
        pairs = list(zip(runs[name], runs["plain"], strict=True))
        results[name] = {
            "flops": flops(name) / flops("plain"),
            "first_flops": flops(name, images) / flops("plain", images),
            **{key: summary([a[key] / b[key] for a, b in pairs]) for key in ("first", "prefill", "decode")},
            "select": summary([a["select"] / b["prefill"] for a, b in pairs]),
            "cache": pairs[0][0]["cache"] / pairs[0][1]["cache"],
            "peak": statistics.median(a["peak"] / b["peak"] for a, b in pairs)
            if all(b["peak"] for _, b in pairs)
            else None,
            "columns": runs[name][0]["columns"],
        }
    return record(
        "tokens",
        device,
        2,
        config={
            "shape": shape,
            "layers": layers,
            "hidden": hidden,
            "parameters": sum(p.numel() for p in model.parameters()),
            "visual_tokens": 576 * images,
            "text_tokens": text_tokens,
            "new_tokens": tokens,
            "repeats": repeats,
            "dtype": dtype,
            "seed": seed,
            "clock": "CPU time" if cpu_time else "wall time",
        },
        absolute={name: absolute(name) for name in compared},
        ratios_to_plain=results,
    )


def tokens(
    method: Annotated[
        list[str] | None,
        typer.Option(
            help="A reducer, or a method that keeps fewer keys per head; repeats.",
            show_default="all reducers, and vtw, which takes everything",
        ),
    ] = None,
    keep: Annotated[list[float] | None, typer.Option(help="Share kept; repeats.", show_default="0.5 0.25 0.11")] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers.", min=4)] = 12,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.", min=64)] = 1536,
    images: Annotated[int, typer.Option(help="Images of 576 tokens each; 5 make 2,880.", min=1)] = 1,
    text_tokens: Annotated[int, typer.Option(help="Text tokens around the image.", min=8)] = 30,
    new_tokens: Annotated[int, typer.Option("--tokens", help="Tokens to decode per run.", min=3)] = 16,
    repeats: Annotated[int, typer.Option(help="Paired repetitions.", min=1)] = 5,
    shape: Annotated[
        Literal["small", "llava-7b"],
        typer.Option(
            help="small: as --layers and --hidden say; llava-7b: the sizes of LLaVA-1.5-7B, its tower included."
        ),
    ] = "small",
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of inputs and order.")] = 0,
    cpu_time: Annotated[
        bool,
        typer.Option("--cpu-time", help="Count CPU time of one thread, where other programs keep the machine busy."),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """What keeping fewer visual tokens buys, against the plain model, paired in one run.

    Example: vlm-attn bench tokens --method fastv --method divprune --keep 0.25 --json tokens.json
    """
    known = (*REDUCERS, "vtw", *HEADS)
    wrong = [name for name in method or [] if name not in known]
    if wrong:
        raise typer.BadParameter(f"{wrong[0]!r} is no reducer and chooses no keys: known are {', '.join(known)}")
    result = run(
        methods=method or [*REDUCERS, "vtw"],
        keeps=keep or [0.5, 0.25, 0.11],
        layers=layers,
        hidden=hidden,
        images=images,
        text_tokens=text_tokens,
        tokens=new_tokens,
        repeats=repeats,
        device=device,
        dtype=dtype,
        seed=seed,
        cpu_time=cpu_time,
        shape=shape,
    )
    config = result["config"]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "FLOPs", "prefill", "FLOPs", "first token", "decode", "choosing", "cache", "peak"):
        table.add_column(column, justify="left" if not column else "right", no_wrap=True)
    for name, found in result["ratios_to_plain"].items():
        cells = [f"{found[k]['median']:.3f} ({found[k]['p20']:.2f}..{found[k]['p80']:.2f})" for k in ("prefill",)]
        cells += [f"{found['first_flops']:.3f}", *(f"{found[k]['median']:.3f}" for k in ("first", "decode"))]
        cells += [f"{found['select']['median']:.1%}", f"{found['cache']:.3f}"]
        table.add_row(name, f"{found['flops']:.3f}", *cells, f"{found['peak']:.3f}" if found["peak"] else "-")
    console = Console(width=max(Console().width, 120))
    console.print(
        f"random-weight LLaVA, {config['parameters'] / 1e6:.0f} M parameters, {config['visual_tokens']} visual + "
        f"{text_tokens} text tokens, {new_tokens} new tokens, {dtype} on {result['device']}, {result['threads']} threads; "
        f"{config['clock']}, ratios to the plain model, median and p20..p80 of {repeats} paired runs; "
        "FLOPs: without and with the vision tower; choosing: its share of a plain prefill; peak: memory above the weights"
    )
    plain = result["absolute"]["plain"]
    console.print(
        f"plain: first token after {plain['first_s']:.2f} s, of which the prompt {plain['prefill_s']:.2f} s "
        f"({plain['prefill_tflop']:.2f} TFLOP); {plain['tokens_per_s']:.1f} tokens/s; cache {plain['cache_mb']:.0f} MB, "
        f"peak {plain['peak_mb']:.0f} MB"
    )
    console.print(table)
    if note := few(repeats):
        console.print(note)
    if json_file is not None:
        write_json(json_file, result)


def main() -> int:
    """Entry of ``vlm-attn bench tokens``."""
    typer.run(tokens)
    return 0
