# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn eval | report | score | calibrate``: measure and compare methods, and score answers that exist."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

import vlm_attn
from vlm_attn.cli import options as opt
from vlm_attn.cli.common import (
    CALIBRATE,
    EVALUATE,
    Commands,
    Group,
    app,
    console_of,
    denoising,
    evals_module,
    help_without_command,
    load_model,
    progress_of,
    quiet_libraries,
    quiet_warnings,
    usual,
    write_json,
)


class EvalName(StrEnum):
    """The evaluations there are."""

    pope = "pope"
    chair = "chair"
    amber = "amber"


def check_data(data: str, split: str | None) -> None:
    """Refuse a split that there is not and a folder without annotations, before anything is imported or loaded."""
    if data != "scenes":
        evals_module("coco").find_annotations(data, split)
    elif split not in (None, "validation", "test"):
        raise ValueError(f"split {split!r}: the scenes world has validation and test")


def dataset_of(data: str, split: str | None) -> Any:
    """The scenes, or a COCO folder, by what ``--data`` and ``--split`` say."""
    check_data(data, split)
    if data == "scenes":
        return evals_module("scenes").dataset(split or "validation")
    return evals_module("coco").CocoDataset.from_folder(data, split)


@app.command("eval", rich_help_panel=EVALUATE)
def evaluate(
    evals: Annotated[list[EvalName], typer.Argument(help="What to measure.", metavar="pope|chair|amber...")],
    model: opt.Model = "scenes",
    method: opt.Method = None,
    param: opt.Param = None,
    preset: opt.Preset = None,
    data: Annotated[
        str,
        typer.Option(help="[b]scenes[/b], a folder with COCO annotations and images, or AMBER's data folder."),
    ] = "scenes",
    split: Annotated[
        str | None,
        typer.Option(help="scenes: validation or test. COCO: val2014, val2017 ...", show_default="validation"),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Number of images.", show_default="500; AMBER: all")] = None,
    seed: Annotated[int, typer.Option(help="Draws the images and POPE's questions.")] = 0,
    batch_size: Annotated[
        int | None, typer.Option(min=1, help="Images per step.", show_default="8, for the bundled model 32")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Folder for results.json and samples.jsonl; a stopped run goes on from there.",
            show_default="a new one in runs/, named by date and time",
            file_okay=False,
        ),
    ] = None,
    ids: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Image ids, one per line, in place of drawing them: image_ids.txt of a results folder, a JSON list, or any "
            "file with a record per image.",
        ),
    ] = None,
    pope_file: Annotated[
        list[Path] | None,
        typer.Option(
            help="Official POPE questions in place of built ones; --data may then be pictures alone. Repeats."
        ),
    ] = None,
    parser: opt.Parser = "official",
    variant: Annotated[
        str | None,
        typer.Option(
            help="CHAIR's ground truth: instances+captions (official) or instances.",
            show_default="official where there are captions",
        ),
    ] = None,
    similarity: Annotated[str, typer.Option(help="AMBER's words: exact, or spacy (its vectors).")] = "exact",
    prompt: Annotated[
        str | None,
        typer.Option(help="What to ask; for POPE and AMBER with {question} in it.", show_default="the protocol's"),
    ] = None,
    max_new_tokens: opt.MaxNewTokens = None,
    prune: opt.Prune = None,
    steps: opt.Steps = None,
    gen_length: opt.GenLength = None,
    block_length: opt.BlockLength = None,
    cache: opt.Cache = None,
    threshold: opt.Threshold = None,
    remasking: opt.Remasking = None,
    schedule: opt.Schedule = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = None,
    load_in_4bit: opt.Bits4 = False,
    load_in_8bit: opt.Bits8 = False,
    json_file: opt.Json = None,
    csv_file: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the figures here, a line each.")
    ] = None,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure hallucination, by default of the plain model, gift and var side by side.

    [b]pope[/b] asks whether an object is in the image; [b]chair[/b] counts the objects a caption makes up;
    [b]amber[/b] does both on AMBER's images, which are not included.

    Example: [b]vlm-attn eval pope --limit 50 --method baseline --method gift --out results/pope[/b]

    Ctrl-C keeps what is finished; the same command with the folder as --out goes on from there.
    """
    quiet_warnings()
    names = list(dict.fromkeys(name.value for name in evals))
    if "amber" in names and (len(names) > 1 or data == "scenes"):
        raise ValueError("amber has pictures of its own: run it by itself, with --data AMBER_DIR")
    alone = names == ["amber"] or (names == ["pope"] and bool(pope_file) and data != "scenes")
    if not alone:
        check_data(data, split)
    elif not Path(data).is_dir():
        raise FileNotFoundError(f"{data}: no such folder")
    runs = evals_module("specs").with_pruning(method or usual(model, "baseline", "gift", "var"), prune)
    specs = evals_module("specs").parse_specs(runs, param or [], preset)
    if "amber" in names:
        dataset = evals_module("amber").Amber.from_folder(data)
    elif alone and not evals_module("coco").is_annotated(data, split):
        pictures = evals_module("pope").picture_names(pope_file)
        dataset = evals_module("coco").CocoDataset.of_pictures(data, pictures, split)
    else:
        dataset = dataset_of(data, split)
    named = getattr(dataset, "dataset", dataset).image_names
    image_ids = evals_module("tasks").read_image_ids(ids, named) if ids is not None else None
    tasks = []
    for name in names:
        options: dict[str, Any] = {"limit": limit, "seed": seed, "image_ids": image_ids}
        if prompt is not None:
            options["prompt"] = prompt
        if max_new_tokens is not None:
            options["max_new_tokens"] = max_new_tokens
        if name == "pope":
            options["parser"] = parser
            if pope_file:
                read = evals_module("pope").read_questions
                options["questions"] = [question for file in pope_file for question in read(file)]
            tasks.append(evals_module("tasks").pope_task(dataset, **options))
        elif name == "amber":
            tasks.append(evals_module("tasks").amber_task(dataset, parser=parser, similarity=similarity, **options))
        else:
            if data == "scenes":
                options.setdefault("max_new_tokens", evals_module("models").caption_tokens(model) or 64)
            tasks.append(evals_module("tasks").chair_task(dataset, variant=variant, **options))
    quiet_libraries()
    processes = evals_module("processes").Processes()
    console = console_of(stderr=str(json_file) == "-")
    console.quiet = not processes.first
    device = processes.device(device)
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
    denoise = denoising(
        loaded,
        max_new_tokens,
        steps=steps,
        gen_length=gen_length,
        block_length=block_length,
        cache=cache,
        threshold=threshold,
        remasking=remasking,
        schedule=schedule,
    )

    if out is None:
        out = processes.on_first(lambda: _dated("-".join(names), model))
    finished = []
    for task in tasks:
        folder = out if len(tasks) == 1 else out / task.name
        results = _run_with_progress(
            console,
            task,
            specs,
            loaded,
            processor,
            model_name=model,
            seed=seed,
            batch_size=batch_size or (32 if model.startswith("scenes") else 8),
            out=folder,
            denoise=denoise,
        )
        finished.append(results)
        if processes.first:
            _print_results(console, results, folder)
        if results["status"] != "complete":
            break
    if json_file is not None and processes.first:
        write_json(json_file, finished[0] if len(tasks) == 1 else finished)
    if csv_file is not None and processes.first:
        evals_module("runner").write_text(csv_file, evals_module("export").to_csv(finished))
    if processes.first and finished[-1]["status"] == "complete":
        there = f" --data {data}" if data != "scenes" else ""
        console.print(f"Next: vlm-attn report {out}{there}", soft_wrap=True, markup=False)
    if finished[-1]["status"] == "interrupted":
        raise typer.Exit(130)


def _dated(evals: str, model: str) -> Path:
    """A folder for results that was not asked for by name: ``runs/2026-03-01-142530-chair-scenes``."""
    return Path("runs") / f"{datetime.now():%Y-%m-%d-%H%M%S}-{evals}-{Path(model).name}"


def _run_with_progress(console: Any, task: Any, specs: Sequence[Any], *args: Any, **options: Any) -> Any:
    with progress_of(console) as bar:
        rows = {
            spec.label: bar.add_task(f"{task.name} {spec.label}", total=len(task.samples), start=False)
            for spec in specs
        }

        def advance(label: str, count: int) -> None:
            bar.start_task(rows[label])
            bar.advance(rows[label], count)

        return evals_module("runner").run(task, specs, *args, progress=advance, **options)


def _print_results(console: Any, results: dict[str, Any], folder: Path) -> None:
    if results["metrics"]:
        console.print(evals_module("report").results_table(results))
        _print_remarks(console, results)
    if results["counts"]["empty"]:
        console.print(f"{results['counts']['empty']} answers are empty; they count.")
    if "skipped_images" in results:
        image, reason = next(iter(results["skipped_images"].items()))
        console.print(
            f"{results['counts']['skipped']} samples were skipped, as {len(results['skipped_images'])} pictures cannot be read "
            f"(first: image {image}, {reason}); all are in results.json."
        )
    if skipped := results["config"].get("questions_skipped"):
        console.print(f"{skipped} questions about images that are not in the data were left out.")
    if "note" in results:
        console.print(results["note"])
    console.print(f"Written: {folder / 'results.json'}, {folder / 'samples.jsonl'}", soft_wrap=True)
    if results["status"] == "interrupted":
        done = sum(results["counts"]["finished"].values())
        total = results["counts"]["samples"] * len(results["config"]["methods"])
        console.print(
            f"Stopped after {done} of {total} samples. The same command with --out {folder} goes on from there."
        )


def _print_remarks(console: Any, results: dict[str, Any]) -> None:
    for sentence in evals_module("report").remarks(results):
        console.print(sentence, style="yellow", markup=False)


@app.command(rich_help_panel=EVALUATE)
def report(
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="What eval --out or experiment --out wrote; all runs in it are found.")
    ],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Only these runs. Repeats.", show_default="all")
    ] = None,
    baseline: Annotated[str, typer.Option(help="What the others are compared with.")] = "baseline",
    searched: Annotated[
        list[str] | None,
        typer.Option(metavar="METHOD=N", help="How many settings were tried before this one was chosen. Repeats."),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="COCO folder of the runs, for pictures and boxes; scenes need none.")
    ] = None,
    split: opt.Part = None,
    worst: Annotated[int, typer.Option(min=0, help="How many of the worst images to show.")] = 20,
    out: Annotated[
        Path | None,
        typer.Option(help="Folder for report.html, report.md and plots.", show_default="DIR/report", file_okay=False),
    ] = None,
    json_file: opt.Json = None,
) -> None:
    """Compare methods: every figure with its difference to the plain model, plots, and the worst images as one HTML page.

    Example: [b]vlm-attn report runs --json effects.json[/b]
    """
    effects, tables = evals_module("effects"), evals_module("report")
    console = console_of(stderr=str(json_file) == "-")
    experiment = effects.read_experiment(folder)
    runs = effects.read_runs(folder, method, baseline=baseline)
    for label, count in effects.read_counts(searched or (), runs).items():
        experiment[label] = {**experiment.get(label, {}), "searched": count}
    worlds = effects.worlds(runs)
    pictures = [_pictures_of(world[0].config["data"], {run.eval for run in world}, data, split) for world in worlds]
    found, sections, texts = [], [], []
    place = _report_folder(console, folder, out)
    for number, (world, dataset) in enumerate(zip(worlds, pictures, strict=True), start=1):
        facts = effects.effects(world, baseline=baseline, experiment=experiment)
        suffix = f"-{number}" if number > 1 else ""
        console.print(tables.effects_group(facts))
        found.append(facts)
        if place is None:
            continue
        plots = [
            evals_module("plots").plot_frontier(facts, place / f"frontier{suffix}.png"),
            evals_module("plots").plot_categories(world, list(facts["methods"]), place / f"categories{suffix}.png"),
        ]
        texts.append(tables.effects_markdown(facts))
        drawn = [plot for plot in plots if plot is not None]
        sections.append(evals_module("page").section(facts, world, drawn, dataset=dataset, worst=worst))
    if json_file is not None:
        write_json(json_file, found)
    if place is not None:
        evals_module("runner").write_text(place / "report.md", "\n".join(texts))
        made = f"Made on {datetime.now():%Y-%m-%d} by vlm-attn {vlm_attn.__version__}."
        page = evals_module("page")
        evals_module("runner").write_text(place / "report.html", page.page(sections, page.title_of(found), made))
        console.print(f"Written: {place / 'report.html'}, {place / 'report.md'}", soft_wrap=True)


def _report_folder(console: Any, folder: Path, out: Path | None) -> Path | None:
    """Where the report goes; None where the results lie on a disk that cannot be written to, and no other place is given."""
    place = out or folder / "report"
    try:
        place.mkdir(parents=True, exist_ok=True)
        if not os.access(place, os.W_OK):
            raise PermissionError(f"{place}: cannot be written")
    except OSError:
        if out is not None:
            raise
        console.print(f"{place} cannot be written: here are the tables; --out FOLDER keeps the whole report.")
        return None
    return place


def _pictures_of(name: str, evals: set[str], data: Path | None, split: str | None) -> Any:
    """The data behind runs, for its pictures; None where it is not at hand."""
    if name.startswith("scenes:"):
        return dataset_of("scenes", name.removeprefix("scenes:"))
    if data is None:
        return None
    amber = evals_module("amber").Amber.from_folder(data) if "amber" in evals else None
    dataset = amber.dataset if amber else dataset_of(str(data), split)
    if dataset.name != name:
        raise ValueError(f"--data {data}: this is {dataset.name}, the run used {name}")
    return dataset


score_app = Commands(cls=Group, help="Score answers that exist already, without a model.")
app.add_typer(score_app, name="score", rich_help_panel=EVALUATE)


@score_app.callback(invoke_without_command=True)
def _score(context: typer.Context) -> None:
    """Score answers that exist already, without a model."""
    help_without_command(context)


@score_app.command("pope")
def score_pope(
    answers: Annotated[
        Path,
        typer.Option(
            help="JSON lines, JSON or CSV with answer, and question_id or image and question (else in order); or samples.jsonl."
        ),
    ],
    questions: Annotated[list[Path], typer.Option(help="Official questions, one file per split. Repeats.")],
    parser: opt.Parser = "official",
    answer_key: opt.AnswerKey = None,
    image_key: opt.ImageKey = None,
    method: opt.OneMethod = None,
    json_file: opt.Json = None,
) -> None:
    """Score a file of yes/no answers with POPE.

    Example: [b]vlm-attn score pope --answers answers.jsonl --questions coco_pope_popular.json[/b]
    """
    quiet_warnings()
    results = evals_module("scoring").score_pope(
        answers, questions, parser=parser, answer_key=answer_key, image_key=image_key, method=method
    )
    _print_scores(
        results,
        json_file,
        unanswered="questions have no answer; they were left out",
        skipped="answers are to no question; they were left out",
    )


@score_app.command("chair")
def score_chair(
    captions: opt.Captions,
    data: Annotated[Path, typer.Option(help="Folder with COCO annotations (no images needed).")],
    split: opt.Part = None,
    variant: Annotated[
        str | None,
        typer.Option(
            help="instances+captions (official) or instances.",
            show_default="official where there are captions",
        ),
    ] = None,
    caption_key: opt.CaptionKey = None,
    image_key: opt.ImageKey = None,
    method: opt.OneMethod = None,
    json_file: opt.Json = None,
) -> None:
    """Score a file of captions with CHAIR.

    Example: [b]vlm-attn score chair --captions captions.jsonl --data COCO_DIR --variant instances[/b]
    """
    quiet_warnings()
    results = evals_module("scoring").score_chair(
        captions, data, split=split, variant=variant, caption_key=caption_key, image_key=image_key, method=method
    )
    _print_scores(
        results,
        json_file,
        skipped="captions of images that are not in the data were left out",
        empty="captions are empty; they count, and name nothing",
    )


@score_app.command("amber")
def score_amber(
    answers: Annotated[Path, typer.Option(help="JSON array or lines with id (of the query) and response.")],
    data: Annotated[Path, typer.Option(help="AMBER's data folder (no images needed).")],
    parser: Annotated[
        str, typer.Option(help="official (Yes or No and nothing else), opera, vcd or strict.")
    ] = "official",
    similarity: Annotated[str, typer.Option(help="exact, or spacy (its vectors).")] = "exact",
    answer_key: opt.AnswerKey = None,
    method: opt.OneMethod = None,
    json_file: opt.Json = None,
) -> None:
    """Score a file of answers with AMBER.

    Example: [b]vlm-attn score amber --answers answers.json --data AMBER_DIR[/b]
    """
    quiet_warnings()
    results = evals_module("scoring").score_amber(
        answers, data, parser=parser, similarity=similarity, answer_key=answer_key, method=method
    )
    _print_scores(
        results,
        json_file,
        skipped="answers are to no query; they were left out",
        empty="answers are empty; they count",
    )


@score_app.command("clip")
def score_clip(
    captions: opt.Captions,
    data: Annotated[Path, typer.Option(help="COCO folder with the pictures.")],
    clip: Annotated[
        str, typer.Option(help="A CLIP model of open_clip: architecture:weights, weights a name or a file.")
    ] = "ViT-B-32-quickgelu:openai",
    split: opt.Part = None,
    caption_key: opt.CaptionKey = None,
    image_key: opt.ImageKey = None,
    method: opt.OneMethod = None,
    device: opt.Device = "auto",
    json_file: opt.Json = None,
) -> None:
    """Score a file of captions with CLIPScore: how well they fit their pictures.

    Example: [b]vlm-attn score clip --captions captions.jsonl --data COCO_DIR --clip ViT-B-32-quickgelu:weights.pt[/b]
    """
    quiet_warnings()
    device = evals_module("models").pick_device(device)
    results = evals_module("scoring").score_clip(
        captions, data, clip, split=split, device=device, caption_key=caption_key, image_key=image_key, method=method
    )
    _print_scores(
        results,
        json_file,
        skipped="captions of images that are not in the data were left out",
        cut="captions are longer than CLIP reads; only their beginning was scored",
    )


@score_app.command("mmhal")
def score_mmhal(
    answers: Annotated[Path, typer.Option(help="MMHal-Bench's JSON file with model_answer filled in.")],
    judge: Annotated[str, typer.Option(help="package.module:function, from prompt to reply.")],
    template: Annotated[
        Path | None,
        typer.Option(help="The judge's prompt, with {image_content}, {question}, {gt_answer}, {model_answer}."),
    ] = None,
    json_file: opt.Json = None,
) -> None:
    """Let a judge of yours rate answers to MMHal-Bench.

    Example: [b]vlm-attn score mmhal --answers answers.json --judge my_judge:ask[/b]
    """
    results = evals_module("scoring").score_mmhal(answers, judge, template=template)
    _print_scores(results, json_file, unparsed="replies hold no rating; they count 0")


def _print_scores(results: dict[str, Any], json_file: Path | None, **remarks: str) -> None:
    """Table, file, and a line for every count that is not 0."""
    console = console_of(stderr=str(json_file) == "-")
    if json_file is not None:
        write_json(json_file, results)
    console.print(evals_module("report").results_table(results))
    _print_remarks(console, results)
    for count, text in remarks.items():
        if results["counts"][count]:
            console.print(f"{results['counts'][count]} {text}.")


@app.command(rich_help_panel=CALIBRATE)
def calibrate(
    model: Annotated[str, typer.Argument(help="scenes, a folder, or a hub id.")],
    method: Annotated[
        list[str] | None,
        typer.Option(
            "--method",
            help="Whose constants to measure: gift, var, vhr, pai, paint, duo, razor. Repeats.",
            show_default="gift and var",
        ),
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
    heads: Annotated[
        int, typer.Option(help="Also find the heads that look at what a caption names, on this many images.", min=0)
    ] = 0,
    prompt: Annotated[
        str, typer.Option(help="The question of the measurement.")
    ] = "Please describe this image in detail.",
    batch_size: Annotated[int, typer.Option(help="Images at a time.", min=1)] = 8,
    steps: Annotated[int, typer.Option(help="Training steps of duo's gates.", min=1)] = 200,
    out: Annotated[Path, typer.Option("--out", "-o", help="The preset to write; its plot comes beside it.")] = Path(
        "preset.json"
    ),
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = None,
    load_in_4bit: opt.Bits4 = False,
    load_in_8bit: opt.Bits8 = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Measure the constants that methods need of a model, and write them as a preset.

    gift: the layer in which the question's words move their attention most over the image, and a band of layers to
    edit. var: the dimensions in which sink tokens are massive. vhr: the layers whose heads hang most on the picture.
    pai, paint: the layers from where the first token has become the sink on. duo: a gate for every KV head, trained on
    passkeys. razor: how much every head looks at copies of a word. What is written is used with --preset preset.json.

    Example: [b]vlm-attn calibrate llava-hf/llava-1.5-7b-hf --data COCO_DIR --search 150 --check 200 -o llava.json[/b]
    """
    check_data(data, split)
    module = evals_module("calibrate")
    names = list(dict.fromkeys(method or ("gift", "var")))
    module.check(names)
    if not out.parent.is_dir():
        raise ValueError(f"--out {out}: there is no folder {out.parent}")
    dataset = dataset_of(data, split)
    loaded, processor = load_model(
        console_of(),
        model,
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        device_map=device_map,
        load_in_4bit=load_in_4bit,
        load_in_8bit=load_in_8bit,
    )
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
        captioned=heads,
        batch_size=batch_size,
        steps=steps,
        console=console_of(),
    )
    picture = module.write(preset, found, out)
    console_of().print(f"Written: {out} (use it with --preset {out}), {picture}", soft_wrap=True)
