# SPDX-License-Identifier: Apache-2.0
"""What the documentation says: its code runs, its tables and pages are whole, and the site builds."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest

import vlm_attn
from tests import fidelity
from vlm_attn import registry
from vlm_attn.demo.controls import controls

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
BLOCK = re.compile(r"^```python(?: title=\"(?P<file>[\w.]+)\")?\n(?P<code>.*?)^```$", re.M | re.S)


def run_blocks(page: str, folder: Path) -> dict[str, Any]:
    """Run a page's Python blocks as one program; a block with a title is a file beside it."""
    names: dict[str, Any] = {}
    for number, block in enumerate(BLOCK.finditer((DOCS / page).read_text(encoding="utf-8")), 1):
        if block["file"]:
            (folder / block["file"]).write_text(block["code"], encoding="utf-8")
        else:
            exec(compile(block["code"], f"{page}, block {number}", "exec"), names)
    return names


@cache
def hooks() -> Any:
    """``docs/hooks.py``, which makes the pages."""
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: the docs extra brings it")
    spec = importlib.util.spec_from_file_location("hooks", DOCS / "hooks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(DOCS))  # its own siblings, as mkdocs does it
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(DOCS))
    return module


def test_quick_start_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("quickstart.md", tmp_path)
    assert not vlm_attn.is_patched(names["model"])
    assert "VISUAL" in capsys.readouterr().out
    assert [tuple(found.shape) for found in names["maps"]] == [(8, 8)]


def test_plugins_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = run_blocks("plugins.md", tmp_path)
    assert names["found"][0]["generated_text"].strip()
    vlm_attn.unpatch(names["model"])


def test_tutorial_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The method of the page, in its file, and under its name once a package says so in its entry points."""
    monkeypatch.syspath_prepend(tmp_path)
    names = run_blocks("write-a-method.md", tmp_path)
    assert names["plain"] != names["away"]
    entry = re.search(r"^```toml\n(.*?)^```$", (DOCS / "write-a-method.md").read_text(), re.M | re.S)
    assert entry is not None
    group, line = entry[1].splitlines()
    info = tmp_path / "spotlight-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: spotlight\nVersion: 1.0\n")
    found = re.fullmatch(r'(\w+) = "([\w.:]+)"', line)
    assert found is not None
    (info / "entry_points.txt").write_text(
        f"{group.replace('project.entry-points.', '').replace(chr(34), '')}\n{found[1]} = {found[2]}\n"
    )
    registry._targets.cache_clear()
    try:
        with vlm_attn.patched(names["model"], "spotlight", factor=3.0) as model:
            assert [method.factor for method in vlm_attn.patching.engine_of(model).methods] == [3.0]
        assert vlm_attn.methods()["spotlight"].summary == "Multiply what the image gets."
    finally:
        registry._targets.cache_clear()


@pytest.mark.parametrize("page", ["README.md", "docs/methods.md"])
def test_every_method_has_its_line(page: str) -> None:
    """A row of a table begins with the name it is about, and every method has one."""
    named = re.findall(r"^\| `(\w+)` \|", (ROOT / page).read_text(encoding="utf-8"), re.M)
    assert sorted(named) == sorted(registry.METHODS)


def test_every_method_is_for_something() -> None:
    """The page of goals leaves no method out, and names none that is not there."""
    goals, _, costs = (DOCS / "choose.md").read_text(encoding="utf-8").partition("## By cost")
    named = re.findall(r"`(\w+)`", goals)
    assert set(named) == set(registry.METHODS)
    assert set(re.findall(r"`(\w+)`", costs)) <= set(registry.METHODS)


def test_links_lead_somewhere() -> None:
    """Relative links of every page, as a reader of the repository follows them."""
    for page in [*ROOT.glob("*.md"), *DOCS.glob("*.md"), *ROOT.glob("evals/scenes/model*/README.md")]:
        for target in re.findall(r"\]\((?!\w+:|#)([^)\s#]+)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("name", registry.METHODS)
def test_docstrings_are_whole(name: str) -> None:
    """Idea, equation, every parameter, caveats: what a method's page is made of."""
    info = vlm_attn.methods()[name]
    idea, sections, rest = hooks().docstring(info.cls)
    assert info.summary.endswith(".")
    assert idea.startswith(info.summary)
    assert sections["Equation"].strip()
    for control in controls(info.cls):
        assert control.help, control.key
    assert rest, "nothing is said of rows, deviations, cost or limits"


def test_fidelity_page_is_the_data() -> None:
    assert fidelity.page() == fidelity.PAGE.read_text(encoding="utf-8"), "run python -m tests.fidelity"
    assert not fidelity.missing()
    for row in fidelity.data()["method"]:
        assert set(row) == {"name", *fidelity.FIELDS}, row["name"]


def test_published_numbers_name_their_source() -> None:
    for table in hooks().published():
        assert set(table["methods"]) <= set(registry.METHODS)
        assert "arXiv" in table["source"], table["title"]
        assert {len(row) for row in table["rows"]} == {len(table["head"])}, table["title"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built so that every warning is an error."""
    for name in ("mkdocs", "material", "mkdocstrings"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name} is not installed: the docs extra brings it")
    out = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(out)],
        cwd=ROOT,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return out


def test_site_has_a_page_for_every_method(site: Path) -> None:
    for name, info in vlm_attn.methods().items():
        page = (site / "methods" / name / "index.html").read_text(encoding="utf-8")
        for field in dataclasses.fields(info.cls):
            assert f"<code>{field.name}</code>" in page, (name, field.name)
        assert f'href="{name}/"' in (site / "methods" / "index.html").read_text(encoding="utf-8")


def public_modules() -> list[str]:
    """Every module of the package with an ``__all__``, but the command line, whose reference is its help."""
    package = {
        **{
            f"vlm_attn.{folder}": ROOT / folder
            for folder in ("kernels", "hallucination", "visual_token_ops", "evals", "demo")
        },
        "vlm_attn": ROOT / "vlm_attn",
    }
    found = []
    for name, folder in package.items():
        for file in folder.rglob("*.py"):
            if re.search(r"^ *__all__ = ", file.read_text(encoding="utf-8"), re.M):
                parts = [name, *file.relative_to(folder).with_suffix("").parts]
                found.append(".".join(part for part in parts if part != "__init__"))
    return sorted(name for name in found if not name.startswith("vlm_attn.cli"))


def test_every_public_module_is_in_the_reference() -> None:
    """A name is public where an ``__all__`` says so, and then the reference has it."""
    api, listed = hooks().API, {}
    for module in public_modules():
        listed[module] = {hooks().canonical(module, name) for name in hooks().public(module)}
    shown = set().union(*(listed[module] for module in api))
    missing = {module: names - shown for module, names in listed.items() if names - shown}
    assert not missing, f"add the module to API in docs/hooks.py: {missing}"
    assert set(api) <= set(listed)


def test_site_shows_every_public_name(site: Path) -> None:
    for module in hooks().API:
        page = (site / "api" / module / "index.html").read_text(encoding="utf-8")
        elsewhere = "".join((site / "api" / other / "index.html").read_text(encoding="utf-8") for other in hooks().API)
        for name in hooks().public(module):
            assert f'id="{hooks().canonical(module, name)}"' in page + elsewhere, f"{module}.{name}"
        assert ":func:" not in page


@pytest.mark.parametrize("name", registry.METHODS)
def test_equations_lose_nothing(name: str) -> None:
    """The MathML of an equation is well-formed and has every sign of the text."""
    info = vlm_attn.methods()[name]
    equation = hooks().docstring(info.cls)[1]["Equation"]
    made = hooks().equations.html(equation, [field.name for field in dataclasses.fields(info.cls)])
    root = ElementTree.fromstring(made.replace("&#x2061;", ""))
    assert root.findall(".//math"), "nothing was taken for mathematics"
    made_by = hooks().equations
    plain = re.sub(rf"(?<![A-Za-z_])({'|'.join(made_by.GREEK)})(?![a-z])", lambda m: made_by.GREEK[m[0]], equation)
    signs = "|".join(map(re.escape, sorted(made_by.OPERATORS, key=len, reverse=True)))
    plain = re.sub(signs, lambda m: made_by.OPERATORS[m[0]], plain)

    def bare(text: str) -> list[str]:
        return sorted(re.sub(r"[\s_^()\[\]'′]|sqrt", "", text.replace("−", "-")))  # brackets of subscripts go

    assert bare("".join(root.itertext())) == bare(plain)


def test_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(
            r"<(?:script|img|link rel=\"(?:stylesheet|preconnect)\")[^>]*(?:src|href)=\"(http[^\"]*)", page.read_text()
        )
        assert loaded == [], page


@pytest.mark.browser
@pytest.mark.parametrize("width", [390, 1400])
def test_site_cuts_nothing(site: Path, width: int) -> None:
    """Long lines of code go on below, equations are drawn, and only tables scroll."""
    browsing = pytest.importorskip("tests.demo.browsing")
    if browsing.CHROMIUM is None:
        pytest.skip("there is no chromium on this machine")
    with browsing.sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=browsing.CHROMIUM, args=["--no-sandbox"])
        tab = browser.new_page(viewport={"width": width, "height": 900})
        for page in ("quickstart", "methods/gift", "results"):
            tab.goto((site / page / "index.html").as_uri())
            assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth"), page
            cut = "[...document.querySelectorAll('pre > code')].filter(c => c.scrollWidth > c.clientWidth + 1).length"
            assert tab.evaluate(cut) == 0, page
            if page == "methods/gift":
                assert tab.locator("table.equation math").count() > 10
                low, high = (
                    tab.locator(f"table.equation math {part}").first.bounding_box() for part in ("msub mi", "msub mrow")
                )
                assert high["y"] + high["height"] > low["y"] + low["height"], "a subscript is not drawn lower"
            browsing.keep(tab, f"site-{page.replace('/', '-')}-{width}.png")
        browser.close()
