# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn experiment``: settings searched on one split, every method scored once on another."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_attn.cli import options as opt
from vlm_attn.cli.common import (
    CALIBRATE,
    app,
    console_of,
    evals_module,
    load_model,
    progress_of,
    quiet_libraries,
    quiet_warnings,
)
from vlm_attn.cli.evaluate import check_data, dataset_of


@app.command(rich_help_panel=CALIBRATE)
def experiment(
    out: Annotated[Path, typer.Option(help="Folder of everything; a stopped run goes on from there.", file_okay=False)],
    model: opt.Model = "scenes",
    method: Annotated[
        list[str] | None,
        typer.Option("--method", help="Only these runs, such as gift or pai+guidance. Repeats.", show_default="all"),
    ] = None,
    data: Annotated[str, typer.Option(help="[b]scenes[/b], or a COCO folder.")] = "scenes",
    search_split: Annotated[str, typer.Option(help="Where settings are chosen.")] = "validation",
    split: Annotated[str, typer.Option(help="Where they are scored, once.")] = "test",
    search: Annotated[int, typer.Option(help="Images to choose settings on.", min=2)] = 150,
    limit: Annotated[int | None, typer.Option(help="Images to score on.", min=2, show_default="500")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step.", min=1)] = 32,
    max_new_tokens: opt.MaxNewTokens = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = None,
    load_in_4bit: opt.Bits4 = False,
    load_in_8bit: opt.Bits8 = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Search every method's settings on one split and score it once on another, beside the plain model.

    Takes hours on a CPU. [b]vlm-attn report OUT/test[/b] makes the tables.

    Example: [b]vlm-attn experiment --out runs/effect --method gift --method vcd[/b]
    """
    quiet_warnings()
    for part in (search_split, split):
        check_data(data, part)
    module = evals_module("experiment")
    labels = list(dict.fromkeys(method or module.GRIDS))
    for label in labels:
        module.settings(label)
    searched_on, tested_on = dataset_of(data, search_split), dataset_of(data, split)
    quiet_libraries()
    console = console_of()
    loaded, processor = load_model(
        console,
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
    )
    with progress_of(console) as bar:
        rows: dict[str, Any] = {}

        def done(what: str, count: int, total: int) -> None:
            if what not in rows:
                rows[what] = bar.add_task(what, total=total)
            bar.advance(rows[what], count)
            bar.update(rows[what], visible=not bar.tasks[rows[what]].finished)

        module.experiment(
            loaded,
            processor,
            labels,
            model_name=model,
            searched_on=searched_on,
            tested_on=tested_on,
            out=out,
            search_images=search,
            limit=limit,
            max_new_tokens=max_new_tokens
            or ((evals_module("models").caption_tokens(model) or 64) if data == "scenes" else 512),
            batch_size=batch_size,
            done=done,
        )
    console.print(f"Written: {out}. The tables: vlm-attn report {out / 'test'}", soft_wrap=True)
