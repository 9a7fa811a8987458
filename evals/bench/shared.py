# SPDX-License-Identifier: Apache-2.0
"""What the benchmarks share: a clock, the spread of ratios, and the record that they write."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress

from vlm_attn.evals.models import pick_device


class Clock:
    """A streamer that only looks at the clock, once the device is done."""

    def __init__(self, device: torch.device, now: Callable[[], float] = time.perf_counter) -> None:
        self.cuda, self.now = device.type == "cuda", now
        self.times: list[float] = []

    def look(self) -> float:
        """The time when all that was asked of the device is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return self.now()

    def put(self, value: torch.Tensor) -> None:
        """Note when tokens came; the first are the prompt."""
        self.times.append(self.look())

    def end(self) -> None:
        """Nothing to do."""


def summary(values: list[float]) -> dict[str, float]:
    """Median, and the 20 % and 80 % quantiles, which never lie outside of what was measured."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3]}


FEW = 5  # paired runs below which their spread says little


def few(repeats: int) -> str:
    """A sentence for a table of few paired runs; nothing for enough."""
    if repeats >= FEW:
        return ""
    runs = f"{repeats} paired run{'s' * (repeats > 1)}"
    return f"Only {runs}: the spread says little; --repeats {FEW} or more tells what is noise."


def extra(cut: dict[str, float], repeats: int) -> str:
    """An additional time as text: where some paired runs were faster than the plain ones, it is within the noise."""
    if cut["p20"] <= 0:
        return f"within the noise of {repeats} runs"
    return f"{cut['median']:.2f}"


@contextmanager
def progress(what: str, total: int) -> Iterator[Callable[[str, str], None]]:
    """Show how far a benchmark is, on stderr: a bar on a terminal, and a line per case with what it gave.

    Yields:
        A function of the case's name and its result; call it once per case.
    """
    console = Console(stderr=True)
    done = 0
    with Progress(console=console, transient=True) as bar:
        task = bar.add_task(what, total=total)

        def tell(name: str, result: str) -> None:
            nonlocal done
            done += 1
            bar.advance(task)
            console.print(f"{done}/{total} {name}: {result}", style="dim", markup=False, highlight=False)

        yield tell


def clock_on(device: str, cpu_time: bool) -> tuple[str, Callable[[], float]]:
    """The device that is meant (``auto``: a GPU where there is one), and the clock to look at.

    Raises:
        ValueError: no such device here, or the CPU's time is asked for on a GPU.
    """
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else pick_device(device)
    if cpu_time and device.startswith("cuda"):
        raise ValueError("--cpu-time says nothing about a GPU: leave it out")
    if cpu_time:
        torch.set_num_threads(1)  # threads that wait for each other would count
    return device, time.process_time if cpu_time else time.perf_counter


def record(benchmark: str, device: str, schema: int = 1, **facts: Any) -> dict[str, Any]:
    """What a benchmark's JSON says beside its figures: when, on what, with which versions."""
    names = ("torch", "transformers", "triton")
    return {
        "schema_version": schema,
        "benchmark": benchmark,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name()
        if device.startswith("cuda")
        else platform.processor() or platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "vlm_attn": metadata.version("vlm-attn")}
        | {name: _version(name) for name in names},
        **facts,
    }


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
