# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn scenes``: the scenes world and its model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from vlm_attn.cli import options as opt
from vlm_attn.cli.common import (
    LOOK,
    Commands,
    Group,
    app,
    console_of,
    evals_module,
    help_without_command,
    quiet_libraries,
    write_json,
)

scenes_app = Commands(cls=Group, help="The scenes world and its bundled model: look at it, train it, rebuild its card.")
app.add_typer(scenes_app, name="scenes", rich_help_panel=LOOK)


@scenes_app.callback(invoke_without_command=True)
def _scenes(context: typer.Context) -> None:
    """The scenes world and its bundled model: look at it, train it, rebuild its card."""
    help_without_command(context)


@scenes_app.command("render")
def scenes_render(
    scenes: Annotated[
        list[str], typer.Argument(metavar="SCENE...", help="Such as [b]validation/3[/b] or [b]validation/0-15[/b].")
    ],
    out: Annotated[Path, typer.Option(help="Folder for the pictures (PNG).", file_okay=False)],
    boxes: Annotated[
        bool, typer.Option(help="Draw every object's box and name, coloured by how hard it is to see.")
    ] = True,
    scale: Annotated[int, typer.Option(min=1, max=8, help="Enlargement of pictures with boxes.")] = 2,
) -> None:
    """Draw scenes, with the boxes and names of their objects.

    Example: [b]vlm-attn scenes render validation/0-15 --out pictures[/b]

    Boxes: green = clear, blue = small, purple = faint, orange = mostly covered.
    """
    look = evals_module("scenes.look")
    chosen = [scene for name in scenes for scene in look.parse_scenes(name)]
    out.mkdir(parents=True, exist_ok=True)
    for scene in chosen:
        picture = look.with_boxes(scene, scale) if boxes else evals_module("scenes").render(scene)
        picture.save(out / f"scenes_{scene.split}_{scene.index:06d}.png")
    typer.echo(f"{len(chosen)} written to {out}")


@scenes_app.command("stats")
def scenes_stats(
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of scenes.", show_default="500")] = None,
    of: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY", help="Only this one, with all its companions. Repeats.")
    ] = None,
    json_file: opt.Json = None,
) -> None:
    """Count objects, and what stands together with what.

    Example: [b]vlm-attn scenes stats --limit 2000 --of car --of "tennis racket"[/b]
    """
    look = evals_module("scenes.look")
    found = look.statistics(split, limit)
    table = look.statistics_tables(found, of or ())
    console_of(stderr=str(json_file) == "-").print(table)
    if json_file is not None:
        write_json(json_file, found)


@scenes_app.command(
    "train",
    add_help_option=False,  # the script shows its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def scenes_train(context: typer.Context) -> None:
    """Train the scenes model or a variant of it; --resume goes on where a run was stopped.

    Example: [b]vlm-attn scenes train --out runs/mma --start scenes --stage language --mask mma[/b]

    With --language smollm2 it trains scenes-smol, which has options of its own: add --help.
    """
    pretrained = any(argument.partition("=")[0] == "--language" for argument in context.args)
    evals_module("scenes.smol_train" if pretrained else "scenes.train").main(context.args, "vlm-attn scenes train")


@scenes_app.command("card")
def scenes_card(
    model: Annotated[
        str, typer.Option("--model", "-m", help="[b]scenes[/b] (the bundled one), or a folder that training wrote.")
    ] = "scenes",
    test: Annotated[
        bool, typer.Option("--test", help="The test split in place of validation: once, when all choices are made.")
    ] = False,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of scenes.", show_default="all 500")] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Rows per step.")] = 32,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for all answers; a stopped run goes on from there.", file_okay=False),
    ] = None,
    json_file: opt.Json = None,
    readme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also put them between the marks of this model card.")
    ] = None,
) -> None:
    """Measure every figure of the model card: POPE, CHAIR, where captions go wrong, and how attention is spread.

    Example: [b]vlm-attn scenes card --limit 100[/b]
    """
    card = evals_module("scenes.card")
    quiet_libraries()
    console = console_of(stderr=str(json_file) == "-")
    if readme is not None:
        card.check_readme(readme, "test" if test else "validation")  # now, not after minutes
    with console.status(f"Loading {model} ..."):
        loaded, processor = evals_module("models").load_model(model)
    with console.status("Measuring ..."):
        found = card.measure(
            loaded, processor, "test" if test else "validation", limit=limit, batch_size=batch_size, out=out
        )
    console.print(card.markdown(found), markup=False, soft_wrap=True)
    if json_file is not None:
        write_json(json_file, found)
    if readme is not None:
        card.write_readme(readme, found)
