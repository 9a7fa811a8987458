# SPDX-License-Identifier: Apache-2.0
"""The notebooks and the README's code run, with the bundled model in the place of a large one."""

from __future__ import annotations

import json
import re
import sys
import types
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted((ROOT / "examples").glob("*.ipynb"))


def execute(blocks: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run blocks one after the other in one module."""
    module = types.ModuleType("example")
    monkeypatch.setitem(sys.modules, "example", module)  # dataclasses look up the module they are made in
    for number, block in enumerate(blocks):
        exec(compile(block, f"<block {number}>", "exec"), module.__dict__)
    return module.__dict__


def test_there_are_four() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["compare_methods", "prune_and_time", "quick_look", "write_a_method"]
    text = (ROOT / "README.md").read_text()
    assert all(f"(examples/{path.name})" in text for path in NOTEBOOKS)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for library in ("simplemma", "scipy"):
        pytest.importorskip(library)
    content = json.loads(path.read_text())
    assert (content["nbformat"], content["metadata"]["kernelspec"]["name"]) == (4, "python3")
    code = [cell for cell in content["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] and cell["execution_count"] is None for cell in code)  # stripped
    monkeypatch.chdir(tmp_path)
    found = execute(["".join(cell["source"]) for cell in code], monkeypatch)
    said = capsys.readouterr().out
    if path.stem == "quick_look":
        assert found["plain"] in said
        assert len(code) == 2  # the first is short
    elif path.stem == "compare_methods":
        assert (tmp_path / "captions.html").read_text().count("<article>") == 2
        assert "scene-3.png, gift: " in said
    elif path.stem == "prune_and_time":
        assert [row["visual tokens"] for row in found["rows"].values()] == [64, 32, 16, 8, 4]
        assert all(row["tokens/s"] > 0 for row in found["rows"].values())
        assert found["rows"]["all"]["recall %"] > found["rows"]["divprune 4"]["recall %"]
    else:
        assert len(set(re.findall(r"^[\d.]+ (.*)$", said, re.MULTILINE))) > 1


def test_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """The API section as it stands but for the model's name; what it prints is what the command line says."""
    pytest.importorskip("accelerate")
    from vlm_attn.evals import prompts, scenes
    from vlm_attn.evals.models import load_model

    section = (ROOT / "README.md").read_text().partition("\n## API\n")[2].partition("\n## ")[0]
    blocks = re.findall(r"```python\n(.*?)```", section, re.DOTALL)
    assert len(blocks) == 2
    large = '"llava-hf/llava-1.5-7b-hf"'
    assert blocks[0].count(large) == 1
    blocks[0] = blocks[0].replace(large, repr(str(scenes.model_path())))
    image = scenes.render(scenes.scene("validation", 3))
    image.save(tmp_path / "photo.jpg", "PNG")
    monkeypatch.chdir(tmp_path)
    execute(blocks, monkeypatch)
    model, processor = load_model("scenes")
    import vlm_attn

    with vlm_attn.patched(model, "gift", processor=processor):
        (wanted,), _ = prompts.generate(model, processor, [image], ["Please describe this image in detail."], 256)
    assert [line.strip() for line in capsys.readouterr().out.splitlines()] == [wanted, wanted]
