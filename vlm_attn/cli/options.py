# SPDX-License-Identifier: Apache-2.0
"""Options that several commands have."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="[b]scenes[/b] (the small bundled model, no download), [b]scenes-smol[/b] (the bundled one on a pretrained "
        "language model), [b]scenes-diffusion[/b], a folder, or a hub id such as llava-hf/llava-1.5-7b-hf.",
    ),
]
Method = Annotated[
    list[str] | None,
    typer.Option(
        "--method",
        help="A run: a method's name, [b]baseline[/b] for the plain model, or [b]var+gift[/b] for two "
        "together. Repeat it to compare.",
    ),
]
Param = Annotated[
    list[str] | None,
    typer.Option("--param", help="Set a method's parameter, for example [b]gift.alpha=4[/b]. Repeats."),
]
Preset = Annotated[
    str | None,
    typer.Option(
        help="Constants of the methods for this model: a bundled preset's name, or a JSON file.",
        show_default="the one that fits the model",
    ),
]
LOADING = "How the model is loaded"
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.", rich_help_panel=LOADING)]
Dtype = Annotated[
    str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.", rich_help_panel=LOADING)
]
DeviceMap = Annotated[
    str | None,
    typer.Option(
        help="Spread the model over devices with accelerate: auto, balanced, sequential.", rich_help_panel=LOADING
    ),
]
Bits4 = Annotated[
    bool, typer.Option("--load-in-4bit", help="Weights in 4 bits, with bitsandbytes.", rich_help_panel=LOADING)
]
Bits8 = Annotated[
    bool, typer.Option("--load-in-8bit", help="Weights in 8 bits, with bitsandbytes.", rich_help_panel=LOADING)
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Let a checkpoint run its code.", rich_help_panel=LOADING)
]
_DENOISING: dict[str, Any] = {"rich_help_panel": "Masked-diffusion models"}
Prune = Annotated[
    str | None, typer.Option(help="Beside every run: a method that keeps fewer visual tokens, for example divprune.")
]
Steps = Annotated[int | None, typer.Option(help="Denoising steps.", show_default="half the length", **_DENOISING)]
GenLength = Annotated[int | None, typer.Option(help="Positions of the answer.", show_default="32", **_DENOISING)]
BlockLength = Annotated[
    int | None, typer.Option(help="Positions that are filled together.", show_default="all", **_DENOISING)
]
Cache = Annotated[
    str | None, typer.Option(help="none, prefix, block, dual or delayed.", show_default="prefix", **_DENOISING)
]
Threshold = Annotated[float | None, typer.Option(help="Write all positions of this probability at once.", **_DENOISING)]
Remasking = Annotated[
    str | None,
    typer.Option(help="low_confidence, random, entropy or margin.", show_default="low_confidence", **_DENOISING),
]
Schedule = Annotated[
    str | None, typer.Option(help="linear, dream, or a shift such as 0.33.", show_default="linear", **_DENOISING)
]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="what the task needs")
]
Json = Annotated[
    Path | None, typer.Option("--json", metavar="FILE", help="Also write the results here; - is the screen.")
]
Parser = Annotated[str, typer.Option(help="Yes/no answers: official, opera, vcd or strict.")]
Part = Annotated[str | None, typer.Option(help="val2014, val2017 ...", show_default="the first found")]
Captions = Annotated[
    Path,
    typer.Option(help="Captions: JSON lines, a JSON array or map, CSV with image_id and caption; or a samples.jsonl."),
]
CaptionKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Key of the caption.", show_default="caption, answer, response or text"),
]
AnswerKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Key of the answer.", show_default="caption, answer, response or text"),
]
ImageKey = Annotated[
    str | None,
    typer.Option(metavar="KEY", help="Key of the image.", show_default="image_id, image, file_name or id"),
]
OneMethod = Annotated[
    str | None, typer.Option("--method", help="Whose answers, where a samples.jsonl has those of several methods.")
]
