# SPDX-License-Identifier: Apache-2.0
"""``vlm-attn bench``: each benchmark takes its own options."""

from __future__ import annotations

import sys
from typing import Any

import typer

from vlm_attn.cli.common import MEASURE, Commands, Group, app, evals_module, help_without_command

bench_app = Commands(cls=Group, help="Measure speed side by side with the plain model, in one run.")
app.add_typer(bench_app, name="bench", rich_help_panel=MEASURE)


@bench_app.callback(invoke_without_command=True)
def _bench(context: typer.Context) -> None:
    """Measure speed side by side with the plain model, in one run."""
    help_without_command(context)


def _benchmark(name: str, arguments: list[str]) -> None:
    try:
        benchmark = evals_module(f"bench.{name}")
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
    """What a method costs: patched models against the plain one.

    Example: [b]vlm-attn bench overhead --help[/b]
    """
    _benchmark("overhead", context.args)


@bench_app.command("kernels", **_OWN_OPTIONS)
def bench_kernels(context: typer.Context) -> None:
    """Edited decoding and masked prefill, kernel by kernel, against SDPA and others.

    Example: [b]vlm-attn bench kernels --help[/b]
    """
    _benchmark("kernels", context.args)


@bench_app.command("tokens", **_OWN_OPTIONS)
def bench_tokens(context: typer.Context) -> None:
    """What keeping fewer visual tokens, or fewer keys per head, buys: against the plain model.

    Example: [b]vlm-attn bench tokens --help[/b]
    """
    _benchmark("tokens", context.args)


@bench_app.command("diffusion", **_OWN_OPTIONS)
def bench_diffusion(context: typer.Context) -> None:
    """What caches, parallel decoding and pruning do for masked-diffusion models: speed and quality.

    Example: [b]vlm-attn bench diffusion --help[/b]
    """
    _benchmark("diffusion", context.args)
