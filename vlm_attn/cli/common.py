# SPDX-License-Identifier: Apache-2.0
"""What the commands share: the app with its one-line errors, what is shown while they run, and late imports."""

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


class _PlainFlags:
    """Flags are shown without a type: they take no value."""

    def get_params(self, ctx: Any) -> Any:
        """The parameters, flags without a type."""
        found = super().get_params(ctx)  # type: ignore[misc]
        for parameter in found:
            if getattr(parameter, "is_flag", False) and parameter.metavar is None:
                parameter.metavar = ""
        return found


class _Command(_PlainFlags, typer.core.TyperCommand):
    """A command."""


class Group(_PlainFlags, typer.core.TyperGroup):
    """A command with commands below it."""


class Commands(typer.Typer):
    """A typer app whose commands show flags without a type."""

    def command(self, name: str | None = None, **options: Any) -> Any:
        """See `typer.Typer.command`."""
        return super().command(name, **{"cls": _Command, **options})


#: Headings of ``vlm-attn --help``, in its order.
LOOK, EVALUATE, CALIBRATE, MEASURE = PANELS = ("Look", "Evaluate", "Calibrate", "Measure")


class _Main(Group):
    """Turns the errors a user can cause into one line on stderr and exit code 2."""

    def list_commands(self, ctx: Any) -> list[str]:
        """The commands, heading by heading."""
        panels = {name: getattr(command, "rich_help_panel", None) for name, command in self.commands.items()}
        return sorted(panels, key=lambda name: PANELS.index(panels[name]) if panels[name] in PANELS else len(PANELS))

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


app = Commands(
    cls=_Main,
    name="vlm-attn",
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


def progress_of(console: Any) -> Any:
    """A progress bar with counts and times, gone when it ends."""
    from rich import progress

    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    return progress.Progress(*columns, console=console, transient=True)


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
    """The runs without --method; constants of gift and var are not known for every bundled model."""
    known = {"scenes-diffusion": methods[:1], "scenes-smol": (methods[0], "pai")}
    return list(known.get(model, methods))


def load_model(console: Any, model: str, *, load_in_4bit: bool, load_in_8bit: bool, **options: Any) -> tuple[Any, Any]:
    """`vlm_attn.evals.models.load_model` by the options of the command line, with a line that says so while it loads.

    Raises:
        ValueError: both --load-in-4bit and --load-in-8bit, and what the loader refuses.
    """
    if load_in_4bit and load_in_8bit:
        raise ValueError("--load-in-4bit and --load-in-8bit: choose one of them")
    bits = 4 if load_in_4bit else 8 if load_in_8bit else None
    with console.status(f"Loading {model} ..."):
        return evals_module("models").load_model(model, bits=bits, **options)


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
