# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn methods | caption | mask | demo | doctor``: what there is, and what it does to a picture."""

from __future__ import annotations

import importlib
import importlib.util
import json
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from vlm_attn.cli import options as opt
from vlm_attn.cli.common import (
    LOOK,
    app,
    console_of,
    denoising,
    evals_module,
    load_model,
    quiet_libraries,
    usual,
    write_json,
)


@app.command(rich_help_panel=LOOK)
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
    console_of().print(table)


def _open_images(names: Sequence[str]) -> list[tuple[str, Any, list[str] | None]]:
    """(name, picture, objects in it where known) of files and of scenes such as ``scenes:validation/3``."""
    opened = []
    for name in names:
        if name.startswith("scenes:"):
            split, slash, index = name.removeprefix("scenes:").partition("/")
            if not slash or not index.isdecimal():
                raise ValueError(f"image {name!r}: expected scenes:SPLIT/NUMBER, such as scenes:validation/3")
            world = evals_module("scenes")
            try:
                scene = world.scene(split, int(index))
            except (ValueError, IndexError) as error:
                raise ValueError(f"image {name!r}: {error}") from error
            opened.append((name, world.render(scene), scene.categories))
        else:
            opened.append((name, evals_module("coco").open_image(name), None))
    return opened


@app.command(rich_help_panel=LOOK)
def caption(
    images: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[IMAGE]...",
            help="Image files; [b]scenes:validation/3[/b] is a drawn scene to try.",
            show_default=False,
        ),
    ] = None,
    model: opt.Model = "scenes",
    method: opt.Method = None,
    param: opt.Param = None,
    preset: opt.Preset = None,
    prompt: Annotated[str, typer.Option(help="What to ask.")] = "Please describe this image in detail.",
    max_new_tokens: opt.MaxNewTokens = None,
    prune: opt.Prune = None,
    steps: opt.Steps = None,
    gen_length: opt.GenLength = None,
    block_length: opt.BlockLength = None,
    cache: opt.Cache = None,
    threshold: opt.Threshold = None,
    remasking: opt.Remasking = None,
    schedule: opt.Schedule = None,
    json_file: opt.Json = None,
    folder: Annotated[
        Path | None,
        typer.Option(
            "--images", metavar="FOLDER", help="All images in a folder; the captions also go to --html.", exists=False
        ),
    ] = None,
    html: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write images and captions side by side, with the differences marked, as one HTML file.",
            show_default="captions.html, with --images",
        ),
    ] = None,
    overlay: Annotated[
        Path | None,
        typer.Option(metavar="FOLDER", help="Also draw, on every picture, where the prompt makes the model look."),
    ] = None,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = None,
    load_in_4bit: opt.Bits4 = False,
    load_in_8bit: opt.Bits8 = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Describe images, by default once with the plain model and once with gift.

    Example: [b]vlm-attn caption scenes:validation/3 --method baseline --method var --param var.p=0.6[/b]

    One's own images as a page: [b]vlm-attn caption --images holiday --method baseline --method gift[/b]

    Where the objects in an image are known, named objects that are not in it are marked red.
    """
    if not images and folder is None:
        raise ValueError("no images: name files, or a folder with --images FOLDER")
    names = [*(images or []), *_images_in(folder)]
    if folder is not None and html is None:
        html = Path("captions.html")
    for file in (json_file, html):  # now, not after minutes
        if file is not None and str(file) != "-" and not file.parent.is_dir():
            raise ValueError(f"{file}: there is no folder {file.parent}")
    opened = _open_images(names)
    runs = evals_module("specs").with_pruning(method or usual(model, "baseline", "gift"), prune)
    specs = evals_module("specs").parse_specs(runs, param or [], preset)
    quiet_libraries()
    console = console_of(stderr=str(json_file) == "-")
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
    longest = max_new_tokens or evals_module("models").caption_tokens(model) or 256
    records: list[dict[str, Any]] = []
    try:
        for name, image, objects in opened:
            rows: list[dict[str, Any]] = []
            for spec in specs:
                with console.status(f"{name}: {spec.label} ..."), spec.applied(loaded, processor):
                    answers, tokens = evals_module("prompts").generate(
                        loaded, processor, [image], [prompt], longest, denoise
                    )
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
            write_json(json_file, {"model": model, "prompt": prompt, "captions": records})
        if html is not None and records:
            facts = f'Written by {model}, asked: "{prompt}", at most {longest} tokens.'
            page = evals_module("gallery").page("Captions side by side", opened, records, facts)
            evals_module("runner").write_text(html, page)
            console.print(f"Written: {html} (open it in a browser)", soft_wrap=True, markup=False)


#: What counts as an image in a folder.
_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


def _images_in(folder: Path | None) -> list[str]:
    """The image files of a folder, by name; none where there is no folder to look into.

    Raises:
        ValueError: no such folder, or no images in it.
    """
    if folder is None:
        return []
    if not folder.is_dir():
        raise ValueError(f"--images {folder}: no such folder")
    found = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not found:
        raise ValueError(f"--images {folder}: no images in it (looked for {', '.join(_SUFFIXES)})")
    return found


def _draw_saliency(
    model: Any, processor: Any, image: Any, prompt: str, preset: str | None, folder: Path, name: str
) -> Path:
    """Save the picture with gift's saliency map over it; returns the file."""
    import vlm_attn

    inputs = evals_module("prompts").build_inputs(model, processor, [image], [prompt])
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
    score = evals_module("chair").coco_vocabulary().score(text, objects)
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


@app.command("mask", rich_help_panel=LOOK)
def draw_mask(
    name: Annotated[
        str,
        typer.Argument(help="Its name, or that of the method (mma); sliding:N is causal within the last N columns."),
    ],
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
    typer.echo("\n" + masks.key(mask, group))
    if save is not None:
        if not save.parent.is_dir():
            raise ValueError(f"--save {save}: there is no folder {save.parent}")
        from vlm_attn.cli import drawing

        visible = masks.materialise(mask, group, image=image)[0, 0]
        drawing.image(mask, group, visible.tolist()).save(save, format="PNG")
        typer.echo(f"Written: {save}")


@app.command(rich_help_panel=LOOK)
def demo(
    model: opt.Model = "scenes",
    param: Annotated[
        list[str] | None,
        typer.Option(
            "--param",
            help="Set a method's parameter for all visitors. Those that name a file or a model, such as "
            "[b]cdpruner.clip[/b], can only be set here. Repeats.",
        ),
    ] = None,
    preset: opt.Preset = None,
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="Port to listen on.", show_default="the first free one from 7860"),
    ] = None,
    share: Annotated[bool, typer.Option("--share", help="Also make a public link, through gradio's servers.")] = False,
    device: opt.Device = "auto",
    dtype: opt.Dtype = "auto",
    device_map: opt.DeviceMap = None,
    load_in_4bit: opt.Bits4 = False,
    load_in_8bit: opt.Bits8 = False,
    trust_remote_code: opt.TrustRemoteCode = False,
) -> None:
    """Compare methods in the browser: captions side by side, and what each word looks at.

    Example: [b]vlm-attn demo --model llava-hf/llava-1.5-7b-hf --port 8000[/b]
    """
    page = importlib.import_module("vlm_attn.demo.app")  # says what to install before a model is loaded
    quiet_libraries()
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
    studio = importlib.import_module("vlm_attn.demo.studio").Studio(loaded, processor, model, param or (), preset)
    page.serve(studio, host=host, port=port, share=share)


@app.command(rich_help_panel=LOOK)
def doctor() -> None:
    """Show versions, devices, and which optional parts are installed and what they are for.

    Example: [b]vlm-attn doctor[/b]
    """
    from importlib import metadata

    from rich.table import Table

    console = console_of()

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
    for extra, (modules, purpose) in evals_module("_extras").EXTRAS.items():
        missing = [name for name in modules if importlib.util.find_spec(name) is None]
        fix = f'missing {", ".join(missing)}: pip install "vlm-attn\\[{extra}]"'
        table.add_row(extra, fix if missing else "installed", purpose)
    console.print(table)

    from vlm_attn.words import rule_in_use

    console.print(f'Content words of a question (query_words="content"): {rule_in_use()}', soft_wrap=True)
    try:
        console.print(f"Bundled model: {evals_module('scenes').model_path()}", soft_wrap=True)
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
