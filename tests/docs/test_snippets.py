# SPDX-License-Identifier: Apache-2.0
"""Every snippet of the pages: Python runs or at least names nothing that is not there, commands exist with their options."""

from __future__ import annotations

import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from .test_pages import DOCS, ROOT

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    *sorted(DOCS.glob("*.md")),
    *ROOT.glob("evals/scenes/model*/README.md"),
]
#: Pages whose Python runs from top to bottom elsewhere: `test_pages.py`.
RUN = {"quickstart.md", "plugins.md", "write-a-method.md"}


def blocks(page: Path, language: str) -> list[str]:
    """The blocks of a language in a page."""
    return re.findall(rf"^```{language}[^\n]*\n(.*?)^```$", page.read_text(encoding="utf-8"), re.M | re.S)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_names_what_is_there(page: Path, tmp_path: Path) -> None:
    """A page's blocks are one program: it compiles, and every name in it is defined (ruff's F821)."""
    program = tmp_path / "page.py"
    program.write_text("\n".join(blocks(page, "python")), encoding="utf-8")
    compile(program.read_text(), page.name, "exec")
    pytest.importorskip("ruff", reason="ruff is not installed: the dev extra brings it")
    done = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "F821,F822,F823", str(program)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_imports_are_there(page: Path) -> None:
    """What a page imports from this package and from transformers exists."""
    for module, names in re.findall(
        r"^from ((?:vlm_attn|transformers)[\w.]*) import ([\w, ]+)", "\n".join(blocks(page, "python")), re.M
    ):
        for name in names.split(","):
            found = importlib.import_module(module)
            assert hasattr(found, name.strip()) or importlib.util.find_spec(f"{module}.{name.strip()}"), (
                f"{module}.{name}"
            )


def test_masked_diffusion_page_runs(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first blocks, with the bundled model; the last one needs a checkpoint of DiffusionGemma."""
    names: dict[str, Any] = {}
    first, second, *_ = blocks(DOCS / "diffusion.md", "python")
    for block in (first, second):
        exec(compile(block, "diffusion.md", "exec"), names)
    assert int(names["order"].max()) == 16
    assert names["out"].tokens.shape == names["order"].shape


def commands(text: str) -> Iterator[list[str]]:
    """The calls of ``vlm-attn`` in a block of bash: loops unrolled once, variables filled in, substitutions left out."""
    text = re.sub(r"\\\n\s*", " ", text)
    variables: dict[str, str] = {"k": "0.5", "m": "fastv"}
    for line in text.splitlines():
        line = re.sub(r"(?:^|\s)#.*", "", line)
        line = re.sub(r"\$\((?:[^()]|\([^()]*\))*\)", "", line)
        if found := re.fullmatch(r'\s*([A-Z])=(?:"([^"]*)"|(\S*))\s*', line):
            variables[found[1]] = found[2] or found[3] or ""
            continue
        line = re.sub(r"\$\{?(\w+)\}?", lambda m: variables.get(m[1], m[0]), line)
        for part in re.split(r"&&|;|\|", line):
            words = shlex.split(part)
            while words and (re.fullmatch(r"[A-Z_]+=\S*", words[0]) or words[0] in ("do", "then")):
                words.pop(0)
            if words and words[0].rpartition("/")[2] == "vlm-attn":
                yield words[1:]


CALLS = [(page, call) for page in PAGES for block in blocks(page, "bash") for call in commands(block)]


@pytest.mark.parametrize(("page", "call"), CALLS, ids=[f"{p.name}:{n}" for n, (p, _) in enumerate(CALLS)])
def test_commands_exist(page: Path, call: list[str]) -> None:
    """The command line takes every documented call, up to the files that it names."""
    if wrong := refused(call):
        pytest.fail(f"{page.name}: vlm-attn {' '.join(call)}: {wrong}")


def refused(call: list[str]) -> str:
    """Why the command line does not take a call; nothing where it does."""
    import typer

    from vlm_attn import cli

    command = typer.main.get_command(cli.app)
    words = list(call)
    while hasattr(command, "commands") and words and words[0] in command.commands:
        command = command.commands[words.pop(0)]
    if hasattr(command, "commands") and words and not words[0].startswith("-"):
        return f"no command {words[0]!r}"
    if call[:1] == ["bench"] and not hasattr(command, "commands"):  # benchmarks parse their own options
        module = importlib.import_module(f"vlm_attn.evals.bench.{command.name}")
        function = module.denoise if command.name == "diffusion" else getattr(module, command.name)
        app = typer.Typer()
        app.command()(function)
        command = typer.main.get_command(app)
    try:
        command.make_context(command.name, words, resilient_parsing=False)
    except typer.Exit:  # --help, --version
        return ""
    except typer.BadParameter.__base__ as error:  # a UsageError, of the click that typer uses
        return "" if "does not exist" in str(error) else str(error)  # files that a page names are not here
    return ""


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "bash")], ids=lambda p: p.name)
def test_bash_is_bash(page: Path) -> None:
    for block in blocks(page, "bash"):
        done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{block}\n{done.stderr}"


def test_calls_are_found() -> None:
    """The reader of bash blocks itself, so that it does not skip what it does not understand."""
    text = """P="--preset x.json"
for k in 0.5; do
  A=1 vlm-attn eval chair $P --keep $k $(for m in a; do echo $m; done)  # why
done
vlm-attn \\
  doctor | cat"""
    assert list(commands(text)) == [["eval", "chair", "--preset", "x.json", "--keep", "0.5"], ["doctor"]]
    written = sum(
        len(re.findall(r"(?:^|\s|/)vlm-attn (?=\w)", b.replace("vlm-attn methods lists", "")))
        for p in PAGES
        for b in blocks(p, "bash")
    )
    assert len(CALLS) >= 0.9 * written
    for wrong in (
        ["evaluate"],
        ["eval", "chair", "--methods", "gift"],
        ["bench", "tokens", "--keeps", "1"],
        ["report"],
    ):
        assert refused(wrong), wrong
