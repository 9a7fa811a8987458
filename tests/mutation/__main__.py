# SPDX-License-Identifier: Apache-2.0
"""See the package."""

from __future__ import annotations

import argparse
import ast
import contextlib
import importlib.machinery
import importlib.util
import io
import os
import sys
import time
import tomllib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
FAULTS = Path(__file__).parent / "faults"
NO_SOURCES = ("tests", "docs", "build", "dist", "site", "runs")


@dataclass(frozen=True)
class Fault:
    """One fault; see the package."""

    area: str
    what: str
    file: str
    old: str
    new: str
    tests: tuple[str, ...]

    def place(self) -> Path:
        """The file that holds ``old`` once.

        Raises:
            LookupError: none or several do.
        """
        path = ROOT / self.file
        if path.exists() and path.read_text(encoding="utf-8").count(self.old) == 1:
            return path
        holders = [path for path in sources() if path.read_text(encoding="utf-8").count(self.old) == 1]
        if len(holders) > 1:  # the one that kept its name
            holders = [path for path in holders if path.name == Path(self.file).name]
        if len(holders) != 1:
            raise LookupError(f"{self.area}: {self.what}: {self.file} does not hold {self.old!r} once")
        return holders[0]

    def planted(self) -> str:
        """The file's source with the fault in it.

        Raises:
            LookupError: see :meth:`place`.
            SyntaxError: that is no Python.
        """
        source = self.place().read_text(encoding="utf-8").replace(self.old, self.new)
        ast.parse(source)
        return source


def sources() -> Iterator[Path]:
    """The project's source files."""
    for folder in sorted(ROOT.iterdir()):
        if folder.is_dir() and folder.name not in NO_SOURCES and not folder.name.startswith("."):
            yield from sorted(folder.rglob("*.py"))


def faults() -> list[Fault]:
    """All faults, by area."""
    found = []
    for path in sorted(FAULTS.glob("*.toml")):
        for row in tomllib.loads(path.read_text(encoding="utf-8"))["fault"]:
            found.append(Fault(path.stem, row["what"], row["file"], row["old"], row["new"], tuple(row["tests"])))
    return found


def plant(fault: Fault) -> None:
    """From now on in this process, the file is imported with the fault in it."""
    path, source = str(fault.place()), fault.planted().encode()
    compiled, stock = importlib.util.cache_from_source(path), importlib.machinery.SourceFileLoader.get_data
    sys.dont_write_bytecode = True

    def get_data(self: Any, asked: str) -> bytes:
        if asked == compiled:
            raise OSError("the compiled file is without the fault")
        return source if asked == path else stock(self, asked)

    importlib.machinery.SourceFileLoader.get_data = get_data  # type: ignore[method-assign, assignment]


def in_a_process(tests: Sequence[str], fault: Fault | None) -> str:
    """Run tests in a process of their own until one fails; its name, "" where none does."""
    reads, writes = os.pipe()
    child = os.fork()
    if child:
        os.close(writes)
        with os.fdopen(reads, encoding="utf-8") as answer:
            said = answer.read()
        os.waitpid(child, 0)
        return said if said != "passed" else ""
    os.close(reads)
    first = "the process died"
    try:
        import pytest

        class First:
            def pytest_runtest_logreport(self, report: Any) -> None:
                nonlocal first
                if report.failed and not first:
                    first = report.nodeid

            def pytest_collectreport(self, report: Any) -> None:
                nonlocal first
                if report.failed and not first:
                    first = f"{report.nodeid} (import)"

        if fault is not None:
            plant(fault)
        first = ""
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            code = pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests], plugins=[First()])
        first = first or ("passed" if code == 0 else f"pytest ended with {int(code)}")
    finally:
        with os.fdopen(writes, "w", encoding="utf-8") as answer:
            answer.write(first)
        os._exit(0)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutation", description="Do the tests notice planted faults?")
    parser.add_argument("words", nargs="*", help="only faults whose area, file or description holds one of these")
    parser.add_argument("--list", action="store_true", help="name the faults, run nothing")
    parser.add_argument("--unchecked", action="store_true", help="do not run the tests without a fault first")
    given = parser.parse_args()
    chosen = [
        fault
        for fault in faults()
        if not given.words or any(word in " ".join((fault.area, fault.file, fault.what)) for word in given.words)
    ]
    for fault in chosen:
        fault.planted()
    if given.list:
        for fault in chosen:
            print(f"{fault.area}: {fault.file}: {fault.what}")
        return
    os.chdir(ROOT)
    import tests.tiny  # noqa: F401  # what every test needs, loaded once; nothing of the project

    assert "vlm_attn" not in sys.modules
    every = dict.fromkeys(test for fault in chosen for test in fault.tests)
    if not given.unchecked and (broken := in_a_process(list(every), None)):
        sys.exit(f"{broken} fails without any fault")
    noticed: Counter[str] = Counter()
    for fault in chosen:
        begun = time.monotonic()
        by = in_a_process(fault.tests, fault)
        noticed[fault.area] += bool(by)
        print(
            f"{'noticed ' if by else 'SURVIVED'} {time.monotonic() - begun:5.1f} s  {fault.area}: {fault.what}", end=""
        )
        print(f"  [{by}]" if by else "", flush=True)
    print("\n| area | noticed | of |\n|---|---|---|")
    for area, count in Counter(fault.area for fault in chosen).items():
        print(f"| {area} | {noticed[area]} | {count} |")
    sys.exit(noticed.total() < len(chosen))


if __name__ == "__main__":
    main()
