"""What the commands share: the app with its one-line errors, their common options, and late imports."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Sequence
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


def evals_module(module: str) -> Any:
    """A module of ``vlm_attn.evals``, imported when a command needs it."""
    return importlib.import_module(f"vlm_attn.evals.{module}")


def console_of(stderr: bool = False) -> Any:
    """A rich console on standard output, or on standard error where the output is data."""
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
    help_without_command(context)


def help_without_command(context: typer.Context) -> None:
    """A group that is called without a command shows its help."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="[b]scenes[/b] (the small bundled model, no download), [b]scenes-diffusion[/b], a folder, or a hub id such as "
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


def quiet_warnings() -> None:
    """Show warnings as one line each."""
    import warnings

    def note(message: Warning | str, *_: Any, **__: Any) -> None:
        typer.echo(f"Note: {' '.join(str(message).split())}", err=True)

    warnings.showwarning = note


def quiet_libraries() -> None:
    """Keep loading bars of the libraries out of our output, and show warnings as one line each."""
    from transformers.utils import logging

    quiet_warnings()
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all; ``-`` is the screen."""
    if str(path) == "-":
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        evals_module("runner").write_json(path, content)


def main() -> None:
    """Entry point of the console script."""
    app()


def usual(model: str, *methods: str) -> list[str]:
    """The runs without --method; constants of gift and var are not known for the diffusion sibling."""
    return [methods[0]] if model == "scenes-diffusion" else list(methods)


def denoising(model: Any, max_new_tokens: int | None, **given: Any) -> Any:
    """How a masked-diffusion model writes, checked; None for other models."""
    if given["schedule"] is not None:
        given["schedule"] = evals_module("specs").parse_value(given["schedule"])
    options = evals_module("prompts").denoising(model, given)
    if options is not None and max_new_tokens is not None:
        raise ValueError(
            f"--max-new-tokens {max_new_tokens}: this model fills in all positions of an answer: --gen-length says how many"
        )
    return options
