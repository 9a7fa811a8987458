# SPDX-License-Identifier: Apache-2.0
"""What a repository of a library has besides code: versions that agree, workflows that name what exists, templates."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

yaml = pytest.importorskip("yaml", reason="PyYAML is not installed: transformers brings it")

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def read(path: str | Path) -> Any:
    return yaml.safe_load((ROOT / path).read_text(encoding="utf-8"))


def test_the_version_is_one() -> None:
    import vlm_attn

    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert PROJECT["version"] == vlm_attn.__version__ == read("CITATION.cff")["version"]
    assert re.search(rf"^## \[?{re.escape(PROJECT['version'])}\b", changelog, re.M)


def test_the_changelog_keeps_its_form() -> None:
    """Keep a Changelog: versions with their day, newest first; only the first may be unpublished."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    first, *published = re.findall(r"^## (.+)$", text, re.M)
    dated = r"\d+\.\d+\.\d+ - (\d{4}-\d{2}-\d{2})"
    assert (
        first == "Unreleased" or re.fullmatch(r"\d+\.\d+\.\d+ - not yet published", first) or re.fullmatch(dated, first)
    )
    days = [re.fullmatch(dated, title) for title in published]
    assert all(days), published
    assert [day[1] for day in days if day] == sorted((day[1] for day in days if day), reverse=True)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    assert set(re.findall(r"^### (.+)$", text, re.M)) <= kinds


def test_citation() -> None:
    citation = read("CITATION.cff")
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    assert citation["license"] == PROJECT["license"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_workflows_name_what_exists(path: Path) -> None:
    """Files, extras and supported versions that a workflow speaks of are there."""
    text = path.read_text(encoding="utf-8")
    jobs = read(path)["jobs"]
    assert jobs
    for named in re.findall(r"(?<![\w/])(?:tests/[\w/]+\.py|\.ci/\w+)", text):
        assert (ROOT / named).exists(), named
    for extras in re.findall(r"-e \"\.\[([\w,]+)\]\"", text):
        assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"])
    for job in jobs.values():
        for python in job.get("strategy", {}).get("matrix", {}).get("python", []):
            assert f"Programming Language :: Python :: {python}" in PROJECT["classifiers"]


@pytest.mark.parametrize("name", ["bug", "method"])
def test_issue_forms(name: str) -> None:
    """What GitHub demands of a form: fields with ids of their own, each with a label."""
    form = read(f".github/ISSUE_TEMPLATE/{name}.yml")
    assert {"name", "description", "body"} <= set(form)
    fields = [field for field in form["body"] if field["type"] != "markdown"]
    assert len({field["id"] for field in fields}) == len(fields)
    assert all(field["attributes"]["label"] for field in fields)
    assert any(field.get("validations", {}).get("required") for field in fields)


def test_pull_requests_ask_what_contributing_asks() -> None:
    """The template names the same files as the steps of CONTRIBUTING.md."""
    template = (ROOT / ".github/PULL_REQUEST_TEMPLATE.md").read_text(encoding="utf-8")
    steps = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").partition("## A new method")[2].partition("\n## ")[0]
    for named in re.findall(r"`((?:[\w]+/)+\w+\.(?:py|toml|md))`", template):
        assert (ROOT / named).exists(), named
        assert named in steps, named


def test_hooks_name_what_exists() -> None:
    """Before a commit: the same linter and formatter as in CI, and tests that are there."""
    hooks = [hook for repo in read(".pre-commit-config.yaml")["repos"] for hook in repo["hooks"]]
    entries = " ".join(hook.get("entry", "") for hook in hooks)
    assert "ruff check" in entries
    assert "ruff format" in entries
    for named in re.findall(r"tests/[\w/]+\.py", entries):
        assert (ROOT / named).exists(), named


def test_every_source_file_names_its_licence() -> None:
    from tests.headers import missing

    assert [str(file.relative_to(ROOT)) for file in missing()] == [], "run: python -m tests.headers"
