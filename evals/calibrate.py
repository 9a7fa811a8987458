"""Measure the constants that GIFT and VAR need of a model: the saliency layer, where attention is, the sink dimensions.

    python -m vlm_attn.evals.calibrate --model scenes --limit 50

prints them per layer. The choice stays with the reader for now: the saliency layer is the one with the largest total gaze shift
(arXiv 2510.22067), sink dimensions are those in which a token exceeds ``tau`` times its RMS (arXiv 2503.03321).
"""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar

import torch
import typer
from rich import box
from rich.console import Console
from rich.progress import track
from rich.table import Table

import vlm_attn
from vlm_attn.call import Call
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.prompts import build_inputs
from vlm_attn.hallucination.gift import Gift, gaze_shift
from vlm_attn.kernels import Edit, Group


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
            first = (layout.group != Group.PAD).int().argmax(1)
            mass["FIRST"] = last[torch.arange(len(first)), :, first].mean(1)
            call.memory(self)[layer] = {"shift": shift, **mass}

    def edit(self, call: Call, layer: int) -> Edit | None:
        return None


def measure(
    model: Any, processor: Any, dataset: CocoDataset, *, prompt: str, limit: int, tau: float, batch_size: int = 10
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
        largest value of |x| / RMS.
    """
    text = model.config.get_text_config(decoder=True)
    layers = text.num_hidden_layers
    profile = _Profile(saliency_layers=tuple(range(layers)), enhance_layers=(0,), query_words="all")
    sums: list[Counter[str]] = [Counter() for _ in range(layers)]
    sinks: list[Counter[int]] = [Counter() for _ in range(layers)]
    largest = [0.0] * layers
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
                with engine.running(inputs) as call:
                    model(**inputs)
                for layer, found in call.memory(profile).items():
                    if isinstance(layer, int):
                        sums[layer].update({key: float(value.sum()) for key, value in found.items()})
        finally:
            for handle in handles:
                handle.remove()
    count = max(1, len(ids))
    return {
        "images": len(ids),
        "prompt": prompt,
        "tau": tau,
        "layers": [{key: value / count for key, value in total.items()} for total in sums],
        "sinks": [
            {"largest": largest[i], "dims": {str(d): n / count for d, n in sinks[i].most_common(8)}}
            for i in range(layers)
        ],
    }


def calibrate(
    model: Annotated[str, typer.Option(help="scenes, a folder, or a hub id.")] = "scenes",
    data: Annotated[str, typer.Option(help="scenes (validation split) or a COCO folder.")] = "scenes",
    limit: Annotated[int, typer.Option(help="Number of images.", min=1)] = 50,
    prompt: Annotated[str, typer.Option(help="The question.")] = "Please describe this image in detail.",
    tau: Annotated[float, typer.Option(help="Threshold of a massive dimension.")] = 20.0,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the result here.")
    ] = None,
) -> None:
    """Measure where a model looks, layer by layer, and its massive dimensions."""
    from vlm_attn.evals.models import load_model

    loaded, processor = load_model(model)
    if data == "scenes":
        from vlm_attn.evals import scenes

        dataset = scenes.dataset("validation", limit=limit)
    else:
        dataset = CocoDataset.from_folder(data)
    found = measure(loaded, processor, dataset, prompt=prompt, limit=limit, tau=tau)
    table = Table(box=box.SIMPLE_HEAD)
    for title in (
        "layer",
        "gaze shift",
        "visual mass",
        "question mass",
        "first token",
        "largest |x|/RMS",
        f"dims >= {tau:g}",
    ):
        table.add_column(title, justify="right")
    for i, (row, sink) in enumerate(zip(found["layers"], found["sinks"], strict=True)):
        dims = ", ".join(f"{d} ({share:.0%})" for d, share in sink["dims"].items()) or "-"
        cells = (f"{row[key]:.3f}" for key in ("shift", "VISUAL", "QUERY", "FIRST"))
        table.add_row(str(i), *cells, f"{sink['largest']:.1f}", dims)
    Console().print(table)
    if json_file is not None:
        json_file.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(calibrate)
