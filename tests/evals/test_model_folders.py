# SPDX-License-Identifier: Apache-2.0
"""Model folders: only whole safetensors are read, and what is broken is named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from vlm_attn import cli
from vlm_attn.evals.models import load_model


@pytest.fixture
def folder(tiny_model_folder: Path, tmp_path: Path) -> Path:
    return shutil.copytree(tiny_model_folder, tmp_path / "model")


class Trap:
    """Unpickling it leaves a file behind."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def __reduce__(self) -> Any:
        return (Path.touch, (self.file,))


def sharded(folder: Path, name: str = "shard-1.safetensors") -> None:
    (folder / "model.safetensors").rename(folder / name)
    weights = load_file(folder / name) if name.endswith(".safetensors") else {"x": None}
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, name)}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def as_bin(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    torch.save({**weights, "trap": Trap(folder / "ran")}, folder / "part.bin")
    index = {"metadata": {"total_size": 1}, "weight_map": dict.fromkeys(weights, "part.bin")}
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def configured(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def cut(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def without_a_weight(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights.pop(next(name for name in weights if "q_proj" in name))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def of_another_shape(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    name = next(name for name in weights if "q_proj" in name)
    save_file({**weights, name: weights[name][:4].clone()}, folder / "model.safetensors", metadata={"format": "pt"})


def deep(name: str) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_text('{"a": ' + "[" * 100_000)


def with_adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text(
        json.dumps({"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    )
    torch.save({"trap": Trap(folder / "ran")}, folder / "adapter_model.bin")


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut off": (cut, "model.safetensors is cut off or broken"),
    "empty": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "model.safetensors is cut off or broken"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "cannot be loaded"),
    "index of a pickle": (as_bin, "only safetensors are read, but its index names 'part.bin'"),
    "index that leads out": (lambda f: sharded(f, "../out.safetensors"), "its index names '../out"),
    "weights named by the config": (lambda f: configured(f, transformers_weights="model.bin"), "names 'model.bin'"),
    "adapter as a pickle": (with_adapter, "its adapter has no adapter_model.safetensors"),
    "shard that is missing": (lambda f: (sharded(f), (f / "shard-1.safetensors").unlink()), "which is not in the folder"),
    "deep config": (deep("config.json"), "config.json: nested too deeply"),
    "deep index": (lambda f: ((f / "model.safetensors").unlink(), deep("model.safetensors.index.json")(f)), "nested"),
    "deep tokenizer": (deep("tokenizer.json"), "cannot be loaded"),
    "deep preprocessor": (deep("processor_config.json"), "cannot be loaded"),
    "config that is a list": (lambda f: (f / "config.json").write_text("[]"), "config.json: expected an object, got list"),
    "config of other types": (lambda f: configured(f, text_config=3), "cannot be loaded"),
    "weight that is missing": (without_a_weight, "1 of its weights are not in the checkpoint"),
    "weight of another shape": (of_another_shape, "cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_folders_are_one_clear_error(folder: Path, name: str) -> None:
    change, message = BROKEN[name]
    change(folder)
    with pytest.raises(ValueError, match="model '.*'") as error:
        load_model(str(folder), "cpu")
    assert message in str(error.value)
    assert not (folder / "ran").exists()


def test_the_command_line_says_it_in_one_line(folder: Path) -> None:
    cut(folder)
    done = CliRunner().invoke(
        cli.app, ["caption", "scenes:validation/3", "--model", str(folder), "--method", "baseline"]
    )
    assert done.exit_code == 2
    assert done.stderr.strip().splitlines()[-1].startswith("Error: model ")
    assert "Traceback" not in done.output


def test_shards_are_read(folder: Path) -> None:
    whole, _ = load_model(str(folder), "cpu")
    sharded(folder)
    parts, _ = load_model(str(folder), "cpu")
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), parts.state_dict().values(), strict=True))
