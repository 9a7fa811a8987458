# SPDX-License-Identifier: Apache-2.0
"""The seven folders install as one import package, and the folder ``kernels`` does not shadow an installed ``kernels``."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]


def test_declared_packages_are_the_tree():
    folders = {
        str(path.parent.relative_to(ROOT))
        for path in ROOT.rglob("__init__.py")
        if not {"tests", "build", "dist"} & set(path.relative_to(ROOT).parts) and ".venv" not in str(path)
    }
    assert set(SETUPTOOLS["package-dir"].values()) == folders
    assert set(SETUPTOOLS["package-dir"]) == set(SETUPTOOLS["packages"])


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy of what git would clone (a build in the tree would leave files there)."""
    source, out = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    names = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"],
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "-q",
        "-w",
        str(out),
        str(source),
    ]
    subprocess.run(command, check=True, cwd=out)
    return zipfile.ZipFile(next(out.glob("*.whl")))


def test_wheel_has_one_top_level_name(wheel):
    top = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" not in name}
    assert top == {"vlm_attn"}


def test_wheel_holds_every_module_and_data_file(wheel):
    names = set(wheel.namelist())
    for package, folder in SETUPTOOLS["package-dir"].items():
        for path in (ROOT / folder).glob("*.py"):
            assert f"{package.replace('.', '/')}/{path.name}" in names
    for name in (
        "vlm_attn/py.typed",
        "vlm_attn/presets/llava-1.5-7b.json",
        "vlm_attn/evals/data/coco_objects.json",
        "vlm_attn/evals/scenes/data/atlas.png",
        "vlm_attn/evals/scenes/model/model.safetensors",
        "vlm_attn/evals/scenes/model_smol/adapter.safetensors",
    ):
        assert name in names


@pytest.mark.parametrize("installed", [True, False], ids=["kernels installed", "no kernels"])
def test_root_folder_does_not_shadow_installed_kernels(tmp_path, installed):
    """Python started in the root finds our folder ``kernels`` first; transformers must still get the installed one."""
    from transformers.utils.import_utils import KERNELS_MIN_VERSION

    if installed:
        (tmp_path / "kernels").mkdir()
        (tmp_path / "kernels" / "__init__.py").write_text("STUB = True\n")
        info = tmp_path / f"kernels-{KERNELS_MIN_VERSION}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {KERNELS_MIN_VERSION}\n")
    code = (
        "import transformers, vlm_attn, vlm_attn.kernels, kernels\n"
        "from transformers.utils.import_utils import is_kernels_available\n"
        "print(is_kernels_available(), getattr(kernels, 'STUB', False), hasattr(vlm_attn.kernels, 'Edit'))"
    )
    environment = {"PYTHONPATH": str(tmp_path), "PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(installed), str(installed), "True"]
