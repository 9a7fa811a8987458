# SPDX-License-Identifier: Apache-2.0
"""What mkdocs adds to the files of this folder: one page per method, made from its docstring, and pages that lie elsewhere.

Nothing is written here: the pages exist in the site only.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib
import inspect
import json
import posixpath
import re
import shutil
import sys
import tempfile
import tomllib
from enum import EnumType
from functools import cache
from pathlib import Path
from typing import Any

import equations
import tables
from mkdocs.plugins import event_priority
from mkdocs.structure.files import File

import vlm_attn
from vlm_attn.demo.controls import parameter_help
from vlm_attn.registry import MethodInfo

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the site that are files outside this folder.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "scenes-model.md": "evals/scenes/model/README.md",
    "scenes-smol-model.md": "evals/scenes/model_smol/README.md",
    "scenes-diffusion-model.md": "evals/scenes/model_diffusion/README.md",
}
FILES = "evals/results"  # the measurements, as they are
ARXIV = r"arXiv (\d{4}\.\d{4,5})"
#: Modules whose ``__all__`` is public, each a page of the API reference.
API = {
    "vlm_attn": "Patch a model, look at its attention, list the methods.",
    "vlm_attn.hallucination": "Methods that edit attention, set the prompt's mask, or choose the next token.",
    "vlm_attn.visual_token_ops": "Methods that keep fewer visual tokens, or fewer keys per head.",
    "vlm_attn.diffusion": "Decoding of masked-diffusion models.",
    "vlm_attn.hallucination.vhr": "How much each head, and each token of an answer, depends on the image.",
    "vlm_attn.visual_token_ops.retrieval": "Find the heads that copy, or that attend to what they name.",
    "vlm_attn.method": "Write a method: the base class of edits, and checks of parameters.",
    "vlm_attn.heads": "Write a method: the base class of those that choose keys per head.",
    "vlm_attn.visual_token_ops.chunks": "Write a method: cut the keys of an image into chunks.",
    "vlm_attn.analysis": "Types of what the analysis functions return.",
    "vlm_attn.kernels": "Attention kernels, and their PyTorch twins.",
    "vlm_attn.evals.scenes": "The scenes world: drawn images with known objects.",
    "vlm_attn.demo": "Draw a map over an image.",
}
#: Headings of the navigation by the package that a method lies in; reducers have their own.
KINDS = {"hallucination": "Attention and decoding", "visual_token_ops": "What every head sees"}


@event_priority(100)  # before mkdocstrings reads its own
def on_config(config: Any) -> None:
    """Show mkdocstrings the package. Put the methods into the navigation, and at its end pages that it does not name."""
    config.plugins["mkdocstrings"].config.handlers["python"]["paths"] = [str(installed())]
    (methods,) = (item["Methods"] for item in config.nav if "Methods" in item)
    for kind in dict.fromkeys(map(_kind, vlm_attn.methods().values())):
        found = [name for name, info in vlm_attn.methods().items() if _kind(info) == kind]
        methods.append({kind: [{name: f"methods/{name}.md"} for name in found]})
    (reference,) = (item["API"] for item in config.nav if "API" in item)
    reference += [{name: f"api/{name}.md"} for name in API]
    named = json.dumps(config.nav)
    config.nav += [path.name for path in sorted((ROOT / "docs").glob("*.md")) if f'"{path.name}"' not in named]


def on_files(files: Any, config: Any) -> None:
    """Add the pages that are no files of this folder."""
    for uri, path in ELSEWHERE.items():
        files.append(File.generated(config, uri, content=(ROOT / path).read_text(encoding="utf-8")))
    names = sorted(path.name for path in (ROOT / FILES).glob("*.json"))
    listed = "\n".join(f"- [{name}](results/{name})" for name in names)
    text = (
        f"# Files\n\nThe results files behind [the tables](results.md), as the commands there wrote them.\n\n{listed}\n"
    )
    files.append(File.generated(config, "files.md", content=text))
    for name in names:
        files.append(File.generated(config, f"results/{name}", abs_src_path=str(ROOT / FILES / name)))
    for notebook in sorted((ROOT / "examples").glob("*.ipynb")):  # the README links to them
        files.append(File.generated(config, f"examples/{notebook.name}", abs_src_path=str(notebook)))
    for info in vlm_attn.methods().values():
        files.append(File.generated(config, f"methods/{info.name}.md", content=method_page(info)))
    rows = "\n".join(f"| [{name}]({name}.md) | {about} |" for name, about in API.items())
    listed = f"# API\n\nEvery public name, from its docstring.\n\n| module | what for |\n|---|---|\n{rows}\n"
    files.append(File.generated(config, "api/index.md", content=listed))
    for name in API:
        files.append(File.generated(config, f"api/{name}.md", content=api_page(name)))


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links between files of the repository become links between pages."""
    uri = page.file.src_uri
    source = ELSEWHERE.get(uri, f"docs/{uri}")
    pages = {path: name for name, path in ELSEWHERE.items()} | {FILES: "files.md"}

    def link(match: re.Match[str]) -> str:
        target, _, anchor = match[1].partition("#")
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        if target and path in pages or path.startswith("docs/"):
            found = pages.get(path, path.removeprefix("docs/"))
            target = posixpath.relpath(found, posixpath.dirname(uri))
        return f"]({target}{'#' if anchor else ''}{anchor})"

    markdown = re.sub(r"\]\((?!\w+:)([^)\s]+)\)", link, markdown)
    if uri == "methods.md":  # the overview's tables lead to the methods' pages
        names = "|".join(vlm_attn.methods())
        markdown = re.sub(rf"^\| `({names})` \|", r"| [`\1`](methods/\1.md) |", markdown, flags=re.M)
    return markdown


@cache
def installed() -> Path:
    """A folder with the package as it installs: the repository's folders as links, for tools that read source files."""
    folders = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"]
    keep = Path(tempfile.mkdtemp(prefix="vlm-attn-docs-"))
    atexit.register(shutil.rmtree, keep, ignore_errors=True)
    (keep / "vlm_attn").mkdir()
    for path in (ROOT / "vlm_attn").iterdir():
        (keep / "vlm_attn" / path.name).symlink_to(path)
    for package, folder in folders.items():
        if package.count(".") == 1 and not folder.startswith("vlm_attn/"):
            (keep / package.replace(".", "/")).symlink_to(ROOT / folder)
    return keep


def on_page_content(html: str, **_: Any) -> str:
    """References of docstrings (``:func:`` and others) lose their role: the API pages show the name."""
    return re.sub(r":\w+:(<code>)~?(?:[\w.]+\.)?(\w+)(?=</code>)", r"\1\2", html)


def public(module: str) -> list[str]:
    """The names of a module's ``__all__`` that are not modules, imported: lazy ones are looked up."""
    found = importlib.import_module(module)
    return [name for name in found.__all__ if not inspect.ismodule(getattr(found, name))]


def api_page(module: str) -> str:
    """A page of the reference; names that an earlier module already shows are left to it."""
    earlier = list(API)[: list(API).index(module)]
    before = {canonical(other, name) for other in earlier for name in public(other)}
    blocks = []
    for name in public(module):
        if (path := canonical(module, name)) not in before:
            bare = name.isupper() or isinstance(getattr(importlib.import_module(module), name), EnumType)
            blocks.append(f"::: {path}" + "\n    options:\n      show_if_no_docstring: true" * bare)
    return "\n\n".join([f"# {module}", API[module], *blocks]) + "\n"


def canonical(module: str, name: str) -> str:
    """Where a public name is defined, if that is known: ``vlm_attn.patch`` is ``vlm_attn.patching.patch``."""
    value = getattr(importlib.import_module(module), name)
    home = getattr(value, "__module__", module)
    return f"{home}.{name}" if home.startswith("vlm_attn") and hasattr(sys.modules[home], name) else f"{module}.{name}"


def method_page(info: MethodInfo) -> str:
    """A method's page: what its docstrings say, its parameters, and what was published about it."""
    module = inspect.cleandoc(sys.modules[info.cls.__module__].__doc__ or "")
    idea, sections, rest = docstring(info.cls)
    numbers = re.findall(ARXIV, info.paper)
    paper = "" if numbers and set(numbers) <= set(re.findall(ARXIV, module)) else f"{info.paper}."
    first, _, more = idea.partition("\n")
    texts = [f"# {info.name}", f"**{first}**", paper, module, more.strip()]
    parts = [_markdown(text) for text in texts if text]
    seen = {key: text for key, text in tables.overview(info.cls).items() if key != "in short"}
    if seen:
        parts += ["| | |\n|---|---|\n" + "\n".join(f"| {key} | {text} |" for key, text in seen.items())]
    if "Equation" in sections:
        names = [field.name for field in dataclasses.fields(info.cls)]
        parts += ["## Equation", equations.html(sections["Equation"], names)]
    parts += ["## Parameters", _parameters(info)]
    call = f'model = vlm_attn.patch(model, "{info.name}", processor=processor)'
    shell = f"vlm-attn caption photo.jpg --model MODEL --method baseline --method {info.name}"
    parts += ["## Use", f"```python\n{call}\n```", f"```bash\n{shell}\n```"]
    parts += ["## Caveats", _markdown(rest or "None known.")]
    parts += ["## Published numbers", *_published(info.name)]
    return "\n\n".join(parts) + "\n"


def docstring(cls: type) -> tuple[str, dict[str, str], str]:
    """A class's docstring as (text before its sections, sections such as ``Equation`` by name, text behind them)."""
    text, sections, name = {True: "", False: ""}, {}, ""
    for line in inspect.cleandoc(cls.__doc__ or "").splitlines():
        if re.fullmatch(r"[A-Z]\w+:", line):
            name = line[:-1]
            sections[name] = ""
        elif name and (line.startswith("    ") or not line):
            sections[name] += line[4:] + "\n"
        else:
            name = ""
            text[not sections] += line + "\n"
    return text[True].strip(), {key: value.strip("\n") for key, value in sections.items()}, text[False].strip()


def _kind(info: MethodInfo) -> str:
    if issubclass(info.cls, vlm_attn.Reducer):
        return "Fewer visual tokens"
    package = info.cls.__module__.split(".")[1]
    return KINDS.get(package, package)


def _parameters(info: MethodInfo) -> str:
    fields, texts = dataclasses.fields(info.cls), parameter_help(info.cls)
    lines = []
    for field in fields:
        shown = f"{field.default:.4g}" if isinstance(field.default, float) else repr(field.default)
        lines.append(f"- **`{field.name}`**, default `{shown}`: {_markdown(texts.get(field.name, ''))}")
    return "\n".join(lines) or "None."


def _published(name: str) -> list[str]:
    tables = [table for table in published() if name in table["methods"]]
    if not tables:
        return [
            "No figure that could be checked. What this package measured itself is in [the results](../results.md)."
        ]
    parts = [
        "Not measured here: as the sources give them. Settings differ between sources, so compare within a table only."
    ]
    for table in tables:
        rows = [table["head"], ["---"] * len(table["head"]), *table["rows"]]
        lines = "\n".join(f"| {' | '.join(map(str, row))} |" for row in rows)
        parts += [
            f"**{table['title']}.** {table.get('note', '')}".strip(),
            lines,
            f"Source: {_linked(table['source'])}.",
        ]
    return parts


@cache
def published() -> list[dict[str, Any]]:
    """The tables of ``published.toml``."""
    return tomllib.loads((ROOT / "docs" / "published.toml").read_text(encoding="utf-8"))["table"]


def _linked(text: str) -> str:
    return re.sub(ARXIV, r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def _markdown(text: str) -> str:
    """A docstring's text as Markdown."""
    text = re.sub(r":\w+:`~?(?:[\w.]+\.)?(\w+)`", r"``\1``", text)
    return _linked(text)
