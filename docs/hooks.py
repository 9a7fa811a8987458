"""What mkdocs adds to the files of this folder: one page per method, made from its docstring, and pages that lie elsewhere.

Nothing is written here: the pages exist in the site only.
"""

from __future__ import annotations

import inspect
import json
import posixpath
import re
import sys
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

import vlm_attn
from vlm_attn.demo.controls import controls
from vlm_attn.registry import MethodInfo

ROOT = Path(__file__).resolve().parents[1]
#: Pages of the site that are files outside this folder.
ELSEWHERE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "scenes-model.md": "evals/scenes/model/README.md",
    "scenes-diffusion-model.md": "evals/scenes/model_diffusion/README.md",
}
FILES = "evals/results"  # the measurements, as they are
ARXIV = r"arXiv (\d{4}\.\d{4,5})"
#: Headings of the navigation by the package that a method lies in; reducers have their own.
KINDS = {"hallucination": "Attention and decoding", "visual_token_ops": "What every head sees"}


def on_config(config: Any) -> None:
    """Put the methods into the navigation, and at its end pages that it does not name."""
    (methods,) = (item["Methods"] for item in config.nav if "Methods" in item)
    for kind in dict.fromkeys(map(_kind, vlm_attn.methods().values())):
        found = [name for name, info in vlm_attn.methods().items() if _kind(info) == kind]
        methods.append({kind: [{name: f"methods/{name}.md"} for name in found]})
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
    for info in vlm_attn.methods().values():
        files.append(File.generated(config, f"methods/{info.name}.md", content=method_page(info)))


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


def method_page(info: MethodInfo) -> str:
    """A method's page: what its docstrings say, its parameters, and what was published about it."""
    module = inspect.cleandoc(sys.modules[info.cls.__module__].__doc__ or "")
    idea, sections, rest = docstring(info.cls)
    numbers = re.findall(ARXIV, info.paper)
    paper = "" if numbers and set(numbers) <= set(re.findall(ARXIV, module)) else f"{info.paper}."
    first, _, more = idea.partition("\n")
    texts = [f"# {info.name}", f"**{first}**", paper, module, more.strip()]
    parts = [_markdown(text) for text in texts if text]
    if "Equation" in sections:
        parts += ["## Equation", f"```text\n{sections['Equation']}\n```"]
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
    found = controls(info.cls)
    if not found:
        return "None."
    shown = [f"{c.default:.4g}" if isinstance(c.default, float) else repr(c.default) for c in found]
    return "\n".join(f"- **`{c.name}`**, default `{s}`: {_markdown(c.help)}" for c, s in zip(found, shown, strict=True))


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
