# SPDX-License-Identifier: Apache-2.0
"""What a method costs: patched-neutral and methods against the plain model, paired in one run.

The model is a LLaVA with random weights (>= 0.1 B parameters, 576 visual tokens): speed does not depend on the
weights. Times come from native ``generate()`` through a streamer: prefill is the time to the first token, decode the
median time between tokens. Every repetition runs all variants in a shuffled order; a ratio is taken within its
repetition and the median over repetitions is reported. The whole of ``generate()`` is timed as well, without a streamer:
it is the only figure of a beam search (``opera``).
"""

from __future__ import annotations

import random
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import vlm_attn
from vlm_attn import registry
from vlm_attn.branch import Decoding
from vlm_attn.evals.bench.shared import Clock, clock_on, extra, few, progress, record, summary
from vlm_attn.evals.runner import write_json
from vlm_attn.hallucination import Gift, Icd, Var

CAPTURED = 16


@dataclass(frozen=True, kw_only=True)
class Capture(vlm_attn.Method):
    """Read what the last rows of the prompt attend to, in every layer, and edit nothing."""

    name: ClassVar[str] = "capture"
    edited_rows: ClassVar[Literal["last", "text", "none"]] = "none"

    layers: int

    @property
    def read_layers(self) -> tuple[int, ...]:
        """All layers."""
        return tuple(range(self.layers))

    def read_rows(self, call: Any) -> torch.Tensor:
        """The last :data:`CAPTURED` columns."""
        last = torch.arange(call.prompt.length - CAPTURED, call.prompt.length, device=call.layout.group.device)
        return last.expand(call.batch, -1)

    def edit(self, call: Any, layer: int) -> None:
        """Nothing."""
        return None


SMALL_TOWER: Mapping[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}


def build_model(
    layers: int,
    hidden: int,
    device: str,
    dtype: torch.dtype,
    *,
    intermediate: int = 0,
    head: int = 64,
    tower: Mapping[str, Any] = SMALL_TOWER,
    projected: int = -1,
) -> Any:
    """A LLaVA with random weights: CLIP-shaped 24 x 24 patches, Llama-shaped text model.

    Args:
        layers: decoder layers.
        hidden: size of the residual stream, a multiple of ``head``.
        device: where the weights are made.
        dtype: their type.
        intermediate: size of the MLP, 0 = 8/3 of ``hidden``.
        head: size of an attention head.
        tower: sizes of the vision tower.
        projected: the tower's layer whose output is projected.
    """
    from transformers import AutoModelForImageTextToText, CLIPVisionConfig, LlamaConfig, LlavaConfig

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**tower, image_size=336, patch_size=14),
        text_config=LlamaConfig(
            vocab_size=32000,
            hidden_size=hidden,
            intermediate_size=intermediate or hidden * 8 // 3 // 64 * 64,
            num_hidden_layers=layers,
            num_attention_heads=hidden // head,
            num_key_value_heads=hidden // head,
            max_position_embeddings=4096,
        ),
        image_token_index=31999,
        vision_feature_layer=projected,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model: Any = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    model = model.eval()
    model.generation_config.eos_token_id = None
    return model


def variants(layers: int, hidden: int, names: Sequence[str] = ("gift", "var")) -> dict[str, list[Any] | None]:
    """The things compared: methods with their defaults; gift's layers scale with the presets of LLaVA-1.5-7B: saliency at
    11/32, enhancement of 12..22 of 32.

    Raises:
        ValueError: unknown method, or one that needs words: the model has no tokenizer.
    """
    if "mvp" in names:
        raise ValueError("mvp asks for three captions in words first, and this model has no tokenizer: leave it out")
    band = tuple(range(layers * 12 // 32, layers * 23 // 32))
    gift: dict[str, Any] = {"saliency_layers": (layers * 11 // 32,), "enhance_layers": band, "query_words": "all"}
    var: dict[str, Any] = {"sink_dims": (0, hidden // 2), "tau": 2.5, "rho": 0.5, "visual_floor": 0.2}
    ready = {"gift": Gift(**gift), "var": Var(**var), "icd": Icd(prefix=tuple(range(100, 108)))}
    compared: dict[str, list[Any] | None] = {"plain": None, "neutral": [Gift(**gift, alpha=0.0), Var(**var, p=0.0)]}
    compared[f"capture {CAPTURED}"] = [Capture(layers=layers)]
    return compared | {name: [ready.get(name) or registry.build(name)] for name in names}


def time_once(model: Any, inputs: dict[str, Any], methods: list[Any] | None, tokens: int) -> tuple[float, float]:
    """Seconds of the prefill and of one decoded token (median)."""
    clock = Clock(inputs["input_ids"].device)
    if methods:
        vlm_attn.patch(model, methods)
    try:
        model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens, streamer=clock)
    finally:
        if methods:
            vlm_attn.unpatch(model)
    steps = [b - a for a, b in zip(clock.times, clock.times[1:], strict=False)]
    return steps[0], statistics.median(steps[1:])


def time_whole(model: Any, inputs: dict[str, Any], methods: list[Any] | None, tokens: int) -> float:
    """Seconds of a whole ``generate``."""
    clock = Clock(inputs["input_ids"].device)
    with vlm_attn.patched(model, methods) if methods else nullcontext():
        begun = clock.look()
        model.generate(**inputs, do_sample=False, max_new_tokens=tokens, min_new_tokens=tokens)
        return clock.look() - begun


def streams(methods: list[Any] | None) -> bool:
    """Whether a streamer can follow: a beam search writes several answers at once."""
    return not any(isinstance(method, Decoding) and method.beam_search for method in methods or ())


def run(
    *,
    methods: Sequence[str],
    layers: int,
    hidden: int,
    text_tokens: int,
    tokens: int,
    repeats: int,
    device: str,
    dtype: str,
    seed: int,
) -> dict[str, Any]:
    """Measure; see :func:`overhead` for the parameters.

    Returns:
        The result as it is written to JSON.
    """
    model = build_model(layers, hidden, device, getattr(torch, dtype))
    parameters = sum(p.numel() for p in model.parameters())
    generator = torch.Generator().manual_seed(seed)
    text = torch.randint(3, 31000, (1, text_tokens), generator=generator)
    image = torch.full((1, 576), 31999)
    inputs = {
        "input_ids": torch.cat([text[:, : text_tokens // 2], image, text[:, text_tokens // 2 :]], 1).to(device),
        "pixel_values": torch.randn(1, 3, 336, 336, generator=generator).to(device=device, dtype=getattr(torch, dtype)),
    }
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    compared = variants(layers, hidden, methods)
    whole: dict[str, list[float]] = {name: [] for name in compared}
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in compared}
    order = list(compared)
    shuffle = random.Random(seed)
    with progress("measuring", (repeats + 1) * len(order)) as tell:
        for repeat in range(-1, repeats):  # the first round warms up
            shuffle.shuffle(order)
            for name in order:
                measured = time_once(model, inputs, compared[name], tokens) if streams(compared[name]) else None
                took = time_whole(model, inputs, compared[name], tokens)
                if repeat >= 0:
                    whole[name].append(took)
                    times[name] += [measured] if measured is not None else []
                token = f", {1000 * measured[1]:.1f} ms per token" if measured is not None else ""
                tell(name, f"{took:.2f} s{token}" + " (warm-up)" * (repeat < 0))
    ratios = {}
    for name in compared:
        if name == "plain":
            continue
        ratios[name] = {"whole": summary([a / b for a, b in zip(whole[name], whole["plain"], strict=True)])}
        if not times[name]:
            continue
        prefill = [a[0] / b[0] for a, b in zip(times[name], times["plain"], strict=True)]
        decode = [a[1] / b[1] for a, b in zip(times[name], times["plain"], strict=True)]
        longer = [(a[0] - b[0]) / b[1] for a, b in zip(times[name], times["plain"], strict=True)]
        ratios[name] |= {
            "prefill": summary(prefill),
            "decode": summary(decode),
            "prefill_extra_in_tokens": summary(longer),
        }
    return record(
        "overhead",
        device,
        config={
            "layers": layers,
            "hidden": hidden,
            "parameters": parameters,
            "visual_tokens": 576,
            "text_tokens": text_tokens,
            "new_tokens": tokens,
            "repeats": repeats,
            "dtype": dtype,
            "seed": seed,
        },
        ratios_to_plain=ratios,
    )


def overhead(
    method: Annotated[
        list[str] | None, typer.Option(help="A method (repeat); default: gift and var.", show_default=False)
    ] = None,
    layers: Annotated[int, typer.Option(help="Decoder layers.", min=4)] = 12,
    hidden: Annotated[int, typer.Option(help="Hidden size, a multiple of 64.", min=64)] = 1536,
    text_tokens: Annotated[int, typer.Option(help="Text tokens around the image.", min=8)] = 30,
    tokens: Annotated[int, typer.Option(help="Tokens to decode per run.", min=3)] = 32,
    repeats: Annotated[int, typer.Option(help="Paired repetitions.", min=1)] = 9,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto.")] = "auto",
    dtype: Annotated[str, typer.Option(help="float32 or bfloat16.")] = "float32",
    seed: Annotated[int, typer.Option(help="Seed of inputs and order.")] = 0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """What a method costs, against the plain model, paired in one run: prefill, decode and the whole of generate().

    "capture 16" reads what the last 16 rows of the prompt attend to in every layer, and edits nothing: see its prefill.
    An edit costs a fixed handful of small operations per layer, so its share falls with the size of the model.

    Example: vlm-attn bench overhead --hidden 768 --method vcd --method guidance --method dola --json overhead.json
    """
    device, _ = clock_on(device, cpu_time=False)
    names = method or ["gift", "var"]
    try:
        variants(layers, hidden, names)
    except (TypeError, ValueError) as error:
        raise typer.BadParameter(str(error)) from None
    result = run(
        methods=names,
        layers=layers,
        hidden=hidden,
        text_tokens=text_tokens,
        tokens=tokens,
        repeats=repeats,
        device=device,
        dtype=dtype,
        seed=seed,
    )
    config = result["config"]
    table = Table(box=box.SIMPLE_HEAD)
    for column in ("", "prefill", "decode, per token", "prefill extra, in tokens", "generate()"):
        table.add_column(column, justify="left" if not column else "right")
    for name, ratio in result["ratios_to_plain"].items():
        cells = {k: f"{cut['median']:.3f}x [{cut['p20']:.3f}, {cut['p80']:.3f}]" for k, cut in ratio.items()}
        if "prefill_extra_in_tokens" in ratio:
            cells["prefill_extra_in_tokens"] = extra(ratio["prefill_extra_in_tokens"], repeats)
        columns = ("prefill", "decode", "prefill_extra_in_tokens", "whole")
        table.add_row(name, *(cells.get(column, "") for column in columns))
    console = Console()
    console.print(
        f"random-weight LLaVA, {config['parameters'] / 1e6:.0f} M parameters, 576 visual + {text_tokens} text tokens, "
        f"{tokens} new tokens, {dtype} on {result['device']}, {result['threads']} threads; "
        f"median [p20, p80] of {repeats} paired runs against the plain model"
    )
    console.print(table)
    if note := few(repeats):
        console.print(note)
    if json_file is not None:
        write_json(json_file, result)


def main() -> int:
    """Entry of ``vlm-attn bench overhead``."""
    typer.run(overhead)
    return 0
