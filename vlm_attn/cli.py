"""The command line: ``vlm-attn methods | caption | demo | eval | score | mask | scenes | bench | doctor``.

This module imports only typer when it is loaded, so that help is quick; torch, the evaluations and everything
above this package are imported by name when a command runs.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
import sys
from collections.abc import Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

#: Errors that a user can cause and mend: one line, exit code 2.
USER_ERRORS = (ValueError, TypeError, NotImplementedError, ImportError, OSError)
_debug = False


class _Commands(typer.core.TyperGroup):
    """Turns the errors a user can cause into one line on stderr and exit code 2."""

    def main(self, args: Sequence[str] | None = None, standalone_mode: bool = True, **kwargs: Any) -> Any:  # type: ignore[override]
        """Run; see `typer.core.TyperGroup.main`."""
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **kwargs)
        global _debug
        _debug = False
        try:
            sys.exit(super().main(args, standalone_mode=False, **kwargs) or 0)
        except typer.Abort:
            sys.exit(130)
        except Exception as error:
            usage = hasattr(error, "format_message")  # click's own: unknown option, missing argument
            memory = type(error).__name__ == "OutOfMemoryError"
            if _debug or not (usage or memory or isinstance(error, USER_ERRORS)):
                raise
            message = error.format_message() if hasattr(error, "format_message") else str(error)
            hint = " (a smaller --batch-size needs less memory)" if memory else ""
            typer.echo(f"Error: {' '.join(message.split()) or type(error).__name__}{hint}", err=True)
            sys.exit(2)


app = typer.Typer(
    cls=_Commands,
    name="vlm-attn",
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    help="Make vision-language models hallucinate less, without training.",
)


class EvalName(StrEnum):
    """The evaluations there are."""

    pope = "pope"
    chair = "chair"


def _evals(module: str) -> Any:
    return importlib.import_module(f"vlm_attn.evals.{module}")


def _console(stderr: bool = False) -> Any:
    from rich.console import Console

    return Console(stderr=stderr, highlight=False)


def _version(value: bool) -> None:
    if value:
        import vlm_attn

        typer.echo(f"vlm-attn {vlm_attn.__version__}")
        raise typer.Exit


@app.callback(invoke_without_command=True)
def _main(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where an error comes from.")] = False,
) -> None:
    global _debug
    _debug = debug
    _help_without_command(context)


def _help_without_command(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="[b]scenes[/b] (the small bundled model, no download), a folder, or a hub id such as "
        "llava-hf/llava-1.5-7b-hf.",
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
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, mps.")]
Dtype = Annotated[str, typer.Option(help="auto (float32 on a CPU), float32, bfloat16, float16.")]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Let a checkpoint run its code.")]
MaxNewTokens = Annotated[
    int | None, typer.Option(min=1, help="Longest answer, in tokens.", show_default="what the task needs")
]


def _quiet_libraries() -> None:
    """Keep loading bars of the libraries out of our output, and show warnings as one line each."""
    import warnings

    from transformers.utils import logging

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"Note: {' '.join(str(message).split())}", err=True)

    warnings.showwarning = note

    logging.set_verbosity_error()
    logging.disable_progress_bar()


@app.command()
def methods(
    as_json: Annotated[bool, typer.Option("--json", help="As JSON on standard output.")] = False,
) -> None:
    """List the methods there are, with what they do and where they come from.

    Example: [b]vlm-attn methods[/b]
    """
    import vlm_attn

    rows = [
        {"name": name, "summary": entry.summary, "paper": entry.paper}
        for name, entry in sorted(vlm_attn.methods().items())
    ]
    if as_json:
        typer.echo(json.dumps(rows, indent=2, ensure_ascii=False))
        return
    from rich.table import Table

    table = Table("Method", "What it does", "Paper")
    table.add_row("baseline", "the plain model", "")
    for row in rows:
        table.add_row(row["name"], row["summary"], row["paper"])
    _console().print(table)


def _open_images(names: Sequence[str]) -> list[tuple[str, Any, list[str] | None]]:
    """(name, picture, objects in it where known) of files and of scenes such as ``scenes:validation/3``."""
    opened = []
    for name in names:
        if name.startswith("scenes:"):
            split, slash, index = name.removeprefix("scenes:").partition("/")
            if not slash or not index.isdecimal():
                raise ValueError(f"image {name!r}: expected scenes:SPLIT/NUMBER, such as scenes:validation/3")
            world = _evals("scenes")
            try:
                scene = world.scene(split, int(index))
            except (ValueError, IndexError) as error:
                raise ValueError(f"image {name!r}: {error}") from error
            opened.append((name, world.render(scene), scene.categories))
        else:
            opened.append((name, _evals("coco").open_image(name), None))
    return opened


@app.command()
def caption(
    images: Annotated[
        list[str],
        typer.Argument(metavar="IMAGE...", help="Picture files; [b]scenes:validation/3[/b] is a drawn scene to try."),
    ],
    model: Model = "scenes",
    method: Method = None,
    param: Param = None,
    preset: Preset = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Please describe this image in detail.",
    max_new_tokens: MaxNewTokens = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write captions here; - is the screen.")
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also draw, on every picture, where the prompt makes the model look."),
    ] = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Describe images, by default once with the plain model and once with gift.

    Example: [b]vlm-attn caption scenes:validation/3 --method baseline --method var --param var.p=0.6[/b]

    Where the objects in a picture are known, named objects that are not in it are marked red.
    """
    opened = _open_images(images)
    specs = _evals("specs").parse_specs(method or ["baseline", "gift"], param or [], preset)
    _quiet_libraries()
    console = _console(stderr=str(json_file) == "-")
    with console.status(f"Loading {model} ..."):
        loaded, processor = _evals("models").load_model(model, device, dtype, trust_remote_code)
    longest = max_new_tokens or (64 if model == "scenes" else 256)
    records: list[dict[str, Any]] = []
    try:
        for name, image, objects in opened:
            rows: list[dict[str, Any]] = []
            for spec in specs:
                with console.status(f"{name}: {spec.label} ..."), spec.applied(loaded, processor):
                    answers, tokens = _evals("prompts").generate(loaded, processor, [image], [prompt], longest)
                row = {"image": name, "method": spec.label, "caption": answers[0], "tokens": tokens}
                if objects is not None:
                    row |= {"objects": objects, "hallucinated": _hallucinated(answers[0], objects)}
                rows.append(row)
            records += rows
            _print_captions(console, name, objects, rows)
            if overlay is not None:
                file = _draw_saliency(loaded, processor, image, prompt, preset, overlay, name)
                console.print(f"Where the prompt looks: {file}")
    finally:  # also what is finished before an error or Ctrl-C
        if json_file is not None and records:
            _write_json(json_file, {"model": model, "prompt": prompt, "captions": records})


def _draw_saliency(
    model: Any, processor: Any, image: Any, prompt: str, preset: str | None, folder: Path, name: str
) -> Path:
    """Save the picture with gift's saliency map over it; returns the file."""
    import vlm_attn

    inputs = _evals("prompts").build_inputs(model, processor, [image], [prompt])
    maps = vlm_attn.saliency(model, inputs, processor=processor, preset=preset)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{Path(name.replace(':', '-').replace('/', '-') if ':' in name else name).stem}.png"
    draw = importlib.import_module("vlm_attn.demo")
    draw.overlay(image, maps[0], box=draw.seen_box(processor, image.size)).save(file)
    return file


def _hallucinated(text: str, objects: Sequence[str]) -> list[dict[str, Any]]:
    """Mentions of objects that are not there; nothing where the evals extra is missing."""
    if importlib.util.find_spec("simplemma") is None:
        return []
    score = _evals("chair").coco_vocabulary().score(text, objects)
    return [mention for mention in score["mentions"] if mention["hallucinated"]]


def _print_captions(console: Any, name: str, objects: list[str] | None, rows: list[dict[str, Any]]) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=name, title_justify="left", show_header=False, show_lines=True)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for row in rows:
        text = Text(row["caption"] or "(nothing)")
        for mention in row.get("hallucinated", []):
            text.stylize("bold red", mention["start"], mention["end"])
        table.add_row(row["method"], text)
    if objects is not None:
        table.add_row("in the image", Text(", ".join(objects), style="dim"))
    console.print(table)
    for row in rows:
        words = ", ".join(mention["text"] for mention in row.get("hallucinated", []))
        if words:  # also readable without colour
            console.print(f"{row['method']} names what is not there: {words}", style="red", markup=False)


def _write_json(path: Path, content: Any) -> None:
    if str(path) == "-":
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        _evals("runner").write_json(path, content)


def _dataset(data: str, split: str | None) -> Any:
    if data == "scenes":
        if split not in (None, "validation", "test"):
            raise ValueError(f"split {split!r}: the scenes world has validation and test")
        return _evals("scenes").dataset(split or "validation")
    return _evals("coco").CocoDataset.from_folder(data, split)


@app.command("eval")
def evaluate(
    evals: Annotated[list[EvalName], typer.Argument(help="What to measure.", metavar="pope|chair...")],
    model: Model = "scenes",
    method: Method = None,
    param: Param = None,
    preset: Preset = None,
    data: Annotated[
        str,
        typer.Option(help="[b]scenes[/b], or a folder with COCO annotations and images."),
    ] = "scenes",
    split: Annotated[
        str | None,
        typer.Option(help="scenes: validation or test. COCO: val2014, val2017 ...", show_default="validation"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images.", show_default="500")] = None,
    seed: Annotated[int, typer.Option(help="Draws the images and POPE's questions.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step.", show_default="8, for the bundled model 32")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and samples.jsonl; a stopped run goes on from there.",
            file_okay=False,
        ),
    ] = None,
    pope_file: Annotated[
        list[Path] | None,
        typer.Option(help="Official POPE questions (JSON lines) in place of built ones. Repeats."),
    ] = None,
    parser: Annotated[str, typer.Option(help="POPE answers: official, opera, vcd or strict.")] = "official",
    variant: Annotated[
        str | None,
        typer.Option(
            help="CHAIR's ground truth: instances+captions (official) or instances.",
            show_default="official where there are captions",
        ),
    ] = None,
    prompt: Annotated[
        str | None,
        typer.Option(help="What to ask; for POPE with {question} in it.", show_default="the protocol's"),
    ] = None,
    max_new_tokens: MaxNewTokens = None,
    device: Device = "auto",
    dtype: Dtype = "auto",
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the results here; - is the screen."),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure hallucination, by default of the plain model, gift and var side by side.

    [b]pope[/b] asks whether an object is in the image; [b]chair[/b] counts the objects a caption makes up.

    Example: [b]vlm-attn eval pope --limit 50 --method baseline --method gift --out results/pope[/b]

    Ctrl-C keeps what is finished; the same command goes on from there when it has --out.
    """
    names = list(dict.fromkeys(name.value for name in evals))
    specs = _evals("specs").parse_specs(method or ["baseline", "gift", "var"], param or [], preset)
    dataset = _dataset(data, split)
    tasks = []
    for name in names:
        options: dict[str, Any] = {"limit": limit, "seed": seed}
        if prompt is not None:
            options["prompt"] = prompt
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        if name == "pope":
            options["parser"] = parser
            if pope_file:
                read = _evals("pope").read_questions
                options["questions"] = [question for file in pope_file for question in read(file)]
            tasks.append(_evals("tasks").pope_task(dataset, **options))
        else:
            if data == "scenes":
                options.setdefault("max_new_tokens", 64)  # its captions are one sentence
            tasks.append(_evals("tasks").chair_task(dataset, variant=variant, **options))
    _quiet_libraries()
    console = _console(stderr=str(json_file) == "-")
    with console.status(f"Loading {model} ..."):
        loaded, processor = _evals("models").load_model(model, device, dtype, trust_remote_code)

    finished = []
    for task in tasks:
        folder = out if out is None or len(tasks) == 1 else out / task.name
        results = _run_with_progress(
            console,
            task,
            specs,
            loaded,
            processor,
            model_name=model,
            seed=seed,
            batch_size=batch_size or (32 if model == "scenes" else 8),
            out=folder,
        )
        finished.append(results)
        _print_results(console, results, folder)
        if results["status"] != "complete":
            break
    if json_file is not None:
        _write_json(json_file, finished[0] if len(tasks) == 1 else finished)
    if finished[-1]["status"] == "interrupted":
        raise typer.Exit(130)


def _run_with_progress(console: Any, task: Any, specs: Sequence[Any], *args: Any, **options: Any) -> Any:
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    with progress.Progress(*columns, console=console, transient=True) as bar:
        rows = {
            spec.label: bar.add_task(f"{task.name} {spec.label}", total=len(task.samples), start=False)
            for spec in specs
        }

        def advance(label: str, count: int) -> None:
            bar.start_task(rows[label])
            bar.advance(rows[label], count)

        return _evals("runner").run(task, specs, *args, progress=advance, **options)


def _print_results(console: Any, results: dict[str, Any], folder: Path | None) -> None:
    skipped = results["config"].get("questions_skipped", 0)
    if results["metrics"]:
        console.print(_evals("report").results_table(results))
    if skipped:
        console.print(f"{skipped} questions about images that are not in the data were left out.")
    if "note" in results:
        console.print(results["note"])
    if folder is not None:
        console.print(f"Written: {folder / 'results.json'}, {folder / 'samples.jsonl'}", soft_wrap=True)
    if results["status"] == "interrupted":
        done = sum(results["counts"]["finished"].values())
        total = results["counts"]["samples"] * len(results["config"]["methods"])
        kept = "The same command goes on from there." if folder is not None else "With --out it could go on."
        console.print(f"Stopped after {done} of {total} samples. {kept}")


score_app = typer.Typer(help="Score answers that exist already, without a model.")
app.add_typer(score_app, name="score")


@score_app.callback(invoke_without_command=True)
def _score(context: typer.Context) -> None:
    """Score answers that exist already, without a model."""
    _help_without_command(context)


@score_app.command("chair")
def score_chair(
    captions: Annotated[Path, typer.Option(help="JSON lines with image_id and caption.")],
    data: Annotated[Path, typer.Option(help="Folder with COCO annotations (no images needed).")],
    split: Annotated[str | None, typer.Option(help="val2014, val2017 ...", show_default="the first found")] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="instances+captions (official) or instances.",
            show_default="official where there are captions",
        ),
    ] = None,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", metavar="FILE", help="Also write the results here; - is the screen."),
    ] = None,
) -> None:
    """Score a file of captions with CHAIR.

    Example: [b]vlm-attn score chair --captions captions.jsonl --data COCO_DIR --variant instances[/b]
    """
    results = _evals("scoring").score_chair(captions, data, split=split, variant=variant)
    console = _console(stderr=str(json_file) == "-")
    if json_file is not None:
        _write_json(json_file, results)
    console.print(_evals("report").results_table(results))
    if results["counts"]["skipped"]:
        console.print(f"{results['counts']['skipped']} captions of images that are not in the data were left out.")


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="scenes, a folder, or a hub id.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", "-m", help="Whose constants to measure: gift, var. [default: both]")
    ] = None,
    data: Annotated[str, typer.Option(help="scenes, or a COCO folder.")] = "scenes",
    split: Annotated[str | None, typer.Option(help="Part of the data.", show_default="validation, or val2014")] = None,
    limit: Annotated[int, typer.Option(help="Images to look at; 30 or more.", min=1)] = 50,
    search: Annotated[
        int, typer.Option(help="Also compare gift's bands and strengths by CHAIR, on this many images.", min=0)
    ] = 0,
    check: Annotated[
        int, typer.Option(help="Then see on this many other images what that choice loses against the best.", min=0)
    ] = 0,
    prompt: Annotated[
        str, typer.Option(help="The question of the measurement.")
    ] = "Please describe this image in detail.",
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    out: Annotated[Path, typer.Option("--out", "-o", help="The preset to write; its plot comes beside it.")] = Path(
        "preset.json"
    ),
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Measure the constants that methods need of a model, and write them as a preset.

    gift: the layer in which the question's words move their attention most over the image, and a band of layers to
    edit. var: the dimensions in which sink tokens are massive. What is written is used with --preset preset.json.

    Example: [b]vlm-attn calibrate llava-hf/llava-1.5-7b-hf --data COCO_DIR --search 150 --check 200 -o llava.json[/b]
    """
    module = _evals("calibrate")
    names = list(dict.fromkeys(method or module.RULES))
    module.check(names)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    dataset = _dataset(data, split)
    loaded, processor = _evals("models").load_model(model, device, dtype, trust_remote_code)
    preset, found = module.calibrate(
        loaded,
        processor,
        dataset,
        names,
        model_name=model,
        prompt=prompt,
        limit=limit,
        searched=search,
        checked=check,
        batch_size=batch_size,
        console=_console(),
    )
    picture = module.write(preset, found, out)
    _console().print(f"Written: {out} (use it with --preset {out}), {picture}", soft_wrap=True)


@app.command("mask")
def draw_mask(
    name: Annotated[str, typer.Argument(help="Its name; sliding:N is causal within the last N columns.")],
    layout: Annotated[
        str,
        typer.Option(help="Parts of the prompt: s system, v visual, q question, r template tail, a answer, p padding."),
    ] = "s4 v9 q5 a3",
    save: Annotated[Path | None, typer.Option(metavar="FILE", help="Also save a picture (PNG).")] = None,
) -> None:
    """Draw who may attend to whom: a line per row, # where it sees a key.

    Example: [b]vlm-attn mask modality-mutual --layout "s4 v9 q5 a3"[/b]
    """
    from vlm_attn.kernels import masks

    mask, (group, image) = masks.named(name), masks.parse_layout(layout)
    typer.echo(masks.drawing(mask, group, image))
    if save is not None:
        from PIL import Image

        visible = masks.materialise(mask, group, image=image)[0, 0]
        side = max(1, 512 // len(visible))  # pixels of one cell
        cells = (~visible).byte().mul(255).repeat_interleave(side, 0).repeat_interleave(side, 1)
        Image.fromarray(cells.numpy()).save(save, format="PNG")


scenes_app = typer.Typer(help="The scenes world and its bundled model: look at it, train it, rebuild its card.")
app.add_typer(scenes_app, name="scenes")


@scenes_app.callback(invoke_without_command=True)
def _scenes(context: typer.Context) -> None:
    """The scenes world and its bundled model: look at it, train it, rebuild its card."""
    _help_without_command(context)


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
    look = _evals("scenes.look")
    chosen = [scene for name in scenes for scene in look.parse_scenes(name)]
    out.mkdir(parents=True, exist_ok=True)
    for scene in chosen:
        picture = look.with_boxes(scene, scale) if boxes else _evals("scenes").render(scene)
        picture.save(out / f"scenes_{scene.split}_{scene.index:06d}.png")
    typer.echo(f"{len(chosen)} written to {out}")


@scenes_app.command("stats")
def scenes_stats(
    split: Annotated[str, typer.Option(help="train, validation or test.")] = "train",
    limit: Annotated[int | None, typer.Option(min=1, help="Number of scenes.", show_default="500")] = None,
    of: Annotated[
        list[str] | None, typer.Option(metavar="CATEGORY", help="Only this one, with all its companions. Repeats.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write all counts here; - is the screen.")
    ] = None,
) -> None:
    """Count objects, and what stands together with what.

    Example: [b]vlm-attn scenes stats --limit 2000 --of car --of "tennis racket"[/b]
    """
    look = _evals("scenes.look")
    found = look.statistics(split, limit)
    table = look.statistics_tables(found, of or ())
    _console(stderr=str(json_file) == "-").print(table)
    if json_file is not None:
        _write_json(json_file, found)


@scenes_app.command(
    "train",
    add_help_option=False,  # the script shows its own
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
)
def scenes_train(context: typer.Context) -> None:
    """Train the scenes model or a variant of it; --resume goes on where a run was stopped.

    Example: [b]vlm-attn scenes train --out runs/mma --start scenes --stage language --mask mma[/b]
    """
    _evals("scenes.train").main(context.args, "vlm-attn scenes train")


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
    json_file: Annotated[
        Path | None, typer.Option("--json", metavar="FILE", help="Also write the figures here; - is the screen.")
    ] = None,
    readme: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also put them between the marks of this model card.")
    ] = None,
) -> None:
    """Measure every figure of the model card: POPE, CHAIR, where captions go wrong, and how attention is spread.

    Example: [b]vlm-attn scenes card --limit 100[/b]
    """
    card = _evals("scenes.card")
    _quiet_libraries()
    console = _console(stderr=str(json_file) == "-")
    if readme is not None:
        card.check_readme(readme, "test" if test else "validation")  # now, not after minutes
    with console.status(f"Loading {model} ..."):
        loaded, processor = _evals("models").load_model(model)
    with console.status("Measuring ..."):
        found = card.measure(
            loaded, processor, "test" if test else "validation", limit=limit, batch_size=batch_size, out=out
        )
    console.print(card.markdown(found), markup=False, soft_wrap=True)
    if json_file is not None:
        _write_json(json_file, found)
    if readme is not None:
        card.write_readme(readme, found)


bench_app = typer.Typer(help="Measure speed.")
app.add_typer(bench_app, name="bench")


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure speed."""
    _help_without_command(context)


def _benchmark(name: str, arguments: list[str]) -> None:
    try:
        benchmark = _evals(f"bench.{name}")
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("vlm_attn.evals.bench"):
            raise
        raise NotImplementedError(f"this installation has no benchmark {name!r}") from error
    sys.argv = [f"vlm-attn bench {name}", *arguments]
    raise typer.Exit(benchmark.main() or 0)


# Each benchmark has its own options and shows its own help.
_OWN_OPTIONS: dict[str, Any] = {
    "add_help_option": False,
    "context_settings": {"allow_extra_args": True, "ignore_unknown_options": True},
}


@bench_app.command("overhead", **_OWN_OPTIONS)
def bench_overhead(context: typer.Context) -> None:
    """What an edit costs: patched models against the plain one, in one run.

    Example: [b]vlm-attn bench overhead --help[/b]
    """
    _benchmark("overhead", context.args)


@bench_app.command("kernels", **_OWN_OPTIONS)
def bench_kernels(context: typer.Context) -> None:
    """Edited decoding and masked prefill, kernel by kernel, against SDPA and others, in one run.

    Example: [b]vlm-attn bench kernels --help[/b]
    """
    _benchmark("kernels", context.args)


@bench_app.command("tokens", **_OWN_OPTIONS)
def bench_tokens(context: typer.Context) -> None:
    """What keeping fewer visual tokens buys: reducers against the plain model, in one run.

    Example: [b]vlm-attn bench tokens --help[/b]
    """
    _benchmark("tokens", context.args)


@app.command()
def demo(
    model: Model = "scenes",
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to listen on.", show_default="the first free one from 7860"),
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through gradio's servers.")] = False,
    device: Device = "auto",
    dtype: Dtype = "auto",
    trust_remote_code: TrustRemoteCode = False,
) -> None:
    """Compare methods in the browser: captions side by side, and what each word looks at.

    Example: [b]vlm-attn demo --model llava-hf/llava-1.5-7b-hf --port 8000[/b]
    """
    page = importlib.import_module("vlm_attn.demo.app")  # says what to install before a model is loaded
    _quiet_libraries()
    with _console().status(f"Loading {model} ..."):
        loaded, processor = _evals("models").load_model(model, device, dtype, trust_remote_code)
    studio = importlib.import_module("vlm_attn.demo.studio").Studio(loaded, processor, model)
    page.serve(studio, host=host, port=port, share=share)


@app.command()
def doctor() -> None:
    """Show versions, devices, and which optional parts are installed and what they are for.

    Example: [b]vlm-attn doctor[/b]
    """
    from importlib import metadata

    from rich.table import Table

    console = _console()

    def installed(name: str) -> str:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return "not installed"

    table = Table(title="Versions", title_justify="left", show_header=False)
    table.add_row("python", platform.python_version())
    for name in ("vlm-attn", "torch", "transformers", "triton", "pillow", "numpy"):
        table.add_row(name, installed(name))
    console.print(table)

    table = Table(title="Devices", title_justify="left", show_header=False)
    for name, value in _devices():
        table.add_row(name, value)
    console.print(table)

    table = Table("Extra", "Status", "What it unlocks", title="Extras", title_justify="left")
    for extra, (modules, purpose) in _evals("_extras").EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        fix = f'missing {", ".join(missing)}: pip install "vlm-attn\\[{extra}]"'
        table.add_row(extra, fix if missing else "installed", purpose)
    console.print(table)

    try:
        console.print(f"Bundled model: {_evals('scenes').model_path()}", soft_wrap=True)
    except (ImportError, OSError) as error:
        console.print(f"Bundled model: missing ({error})", soft_wrap=True)


def _devices() -> list[tuple[str, str]]:
    try:
        import torch
    except ImportError as error:
        return [("torch", f"cannot be imported: {error}")]
    rows = [("cpu", f"{torch.get_num_threads()} threads")]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            facts = torch.cuda.get_device_properties(index)
            rows.append((f"cuda:{index}", f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"))
    else:
        rows.append(("cuda", "none: everything runs on the CPU, large models slowly"))
    rows.append(("mps", "available" if torch.backends.mps.is_available() else "none"))
    triton = importlib.util.find_spec("triton") is not None and torch.cuda.is_available()
    rows.append(("attention", "PyTorch eager and SDPA" + (", Triton kernels" if triton else "")))
    return rows


def main() -> None:
    """Entry point of the console script."""
    app()


if __name__ == "__main__":
    main()
