# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn data``: where the data of evaluations comes from, and whether it is all there."""

from __future__ import annotations

import dataclasses
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from vlm_attn.cli import options as opt
from vlm_attn.cli.common import (
    EVALUATE,
    Commands,
    Group,
    app,
    console_of,
    evals_module,
    help_without_command,
    write_json,
)

data_app = Commands(cls=Group, help="Say what to download for an evaluation, and check what is there.")
app.add_typer(data_app, name="data", rich_help_panel=EVALUATE)


@data_app.callback(invoke_without_command=True)
def _data(context: typer.Context) -> None:
    """Say what to download for an evaluation, and check what is there."""
    help_without_command(context)


class Split(StrEnum):
    """The splits of COCO that have annotations."""

    val2014 = "val2014"
    val2017 = "val2017"
    train2014 = "train2014"
    train2017 = "train2017"


@data_app.command("coco")
def coco(
    out: Annotated[Path, typer.Option(help="COCO's folder; it need not exist yet.", file_okay=False)],
    split: Annotated[Split, typer.Option(help="Published figures are mostly of val2014.")] = Split.val2014,
    json_file: opt.Json = None,
) -> None:
    """Print the exact downloads of COCO, and check what is in the folder: names, counts, size and MD5 of the archives.

    Nothing is downloaded. The exit status is 0 when an evaluation can run on the folder, else 1.

    Example: [b]vlm-attn data coco --out COCO_DIR[/b]
    """
    downloads = evals_module("downloads")
    console = console_of(stderr=str(json_file) == "-")
    found = downloads.check(out, split.value)
    complete = downloads.complete(found)
    if json_file is not None:
        write_json(json_file, {"complete": complete, "found": [dataclasses.asdict(finding) for finding in found]})
    if not complete:
        console.print(f"COCO {split.value}:", style="bold")
        for archive in downloads.archives(split.value):
            console.print(f"  {archive.address}  {archive.size:,} bytes  MD5 {archive.md5}", soft_wrap=True)
        console.print("To download and unpack (goes on where it broke off):", style="bold")
        for line in downloads.commands(split.value, out):
            console.print(f"  {line}", markup=False, soft_wrap=True)
    colours = {"ok": "green", "missing": "yellow", "wrong": "red", "absent": "dim"}
    console.print(f"In {out}:", style="bold", markup=False, soft_wrap=True)
    for finding in found:
        console.print(f"  {finding.state:<8}", style=colours[finding.state], end="")
        console.print(f"{finding.what}: {finding.detail}", markup=False, soft_wrap=True)
    if not complete:
        raise typer.Exit(1)
    console.print(
        f"Next: vlm-attn eval chair --data {out} --split {split.value} --model MODEL", soft_wrap=True, markup=False
    )
