# SPDX-License-Identifier: Apache-2.0
"""Runs that are killed, or given their images: the same results."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.runner import run
from vlm_attn.evals.specs import parse_specs
from vlm_attn.evals.tasks import chair_task, pope_task, read_image_ids

GIFT = ["--param", "gift.saliency_layers=[1]", "--param", "gift.enhance_layers=[1,2]"]


def command(coco: Path, model: Path, out: Path, *more: object) -> list[str]:
    args = ["eval", "pope", "--model", model, "--data", coco, "--batch-size", 2, "--device", "cpu", "--out", out]
    return [*map(str, [*args, "--method", "baseline", "--method", "gift", *GIFT, *more])]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "ACCELERATE_USE_CPU": "true"}


def call(*args: str, **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *args], capture_output=True, text=True, env=environment(), check=False, **options
    )


def lasting(folder: Path) -> tuple[Any, str]:
    """Everything but time and host."""
    results = json.loads((folder / "results.json").read_text())
    return {k: v for k, v in results.items() if k != "environment"}, (folder / "samples.jsonl").read_text()


@pytest.fixture(scope="module")
def plain(coco_folder: Path, tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, str]:
    out = tmp_path_factory.mktemp("plain")
    done = call("vlm_attn.cli", *command(coco_folder, tiny_model_folder, out))
    assert done.returncode == 0, done.stderr
    return lasting(out)


def test_kill_9_then_the_same_command(
    plain: tuple[Any, str], coco_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    arguments = [sys.executable, "-m", "vlm_attn.cli", *command(coco_folder, tiny_model_folder, tmp_path)]
    process = subprocess.Popen(arguments, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    samples = tmp_path / "samples.jsonl"
    deadline = time.monotonic() + 120
    while not (samples.exists() and samples.stat().st_size) and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    with open(samples, "a", encoding="utf-8") as file:
        file.write('{"method": "baseline", "sam')  # what a batch cut short by the kill looks like
    done = call("vlm_attn.cli", *command(coco_folder, tiny_model_folder, tmp_path))
    assert done.returncode == 0, done.stderr
    assert lasting(tmp_path) == plain


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--nproc-per-node", "2", "--standalone"],
    # With --cpu it starts several processes only through MPI; --multi_gpu starts them as torchrun does, GPUs or not.
    "accelerate launch": [
        "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
}  # fmt: skip


@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_give_the_same_files(
    launcher: str, plain: tuple[Any, str], coco_folder: Path, tiny_model_folder: Path, tmp_path: Path
) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    launch = LAUNCHERS[launcher]
    shared = command(coco_folder, tiny_model_folder, tmp_path)
    done = call(*launch, "-m", "vlm_attn.cli", *shared)
    assert done.returncode == 0, done.stderr
    assert lasting(tmp_path) == plain
    assert json.loads((tmp_path / "results.json").read_text())["environment"]["processes"] == 2
    assert done.stdout.count("Written:") == 1  # one process speaks


@pytest.fixture(scope="module")
def dataset(coco_folder: Path) -> CocoDataset:
    return CocoDataset.from_folder(coco_folder)


def test_a_folder_belongs_to_one_run_at_a_time(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    task = pope_task(dataset, limit=2)
    options = {"model_name": "tiny", "batch_size": 4, "out": tmp_path}
    seen = []

    def second(label: str, count: int) -> None:
        if not seen:
            seen.append(label)
            with pytest.raises(ValueError, match="another run is writing there"):
                run(task, parse_specs(["baseline"]), *tiny_model, **options)

    assert run(task, parse_specs(["baseline"]), *tiny_model, progress=second, **options)["status"] == "complete"
    assert seen == ["baseline"]
    assert run(task, parse_specs(["baseline"]), *tiny_model, **options)["status"] == "complete"  # let go of again


def test_image_ids_are_saved_and_used_again(dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    drawn = chair_task(dataset, limit=3, seed=4, max_new_tokens=2)
    run(drawn, parse_specs(["baseline"]), *tiny_model, model_name="tiny", out=tmp_path)
    ids = read_image_ids(tmp_path / "image_ids.txt")
    assert ids == drawn.image_ids
    assert chair_task(dataset, image_ids=ids).image_ids == ids
    assert chair_task(dataset, image_ids=ids, limit=2).image_ids == ids[:2]
    asked = pope_task(dataset, image_ids=[9, 2, 5])  # 2 holds one object: POPE needs three
    assert asked.image_ids == [9, 5]
    assert asked.config["images_skipped"] == 1
    with pytest.raises(ValueError, match="1 of 2 image ids are not in .*first: 999"):
        chair_task(dataset, image_ids=[2, 999])


@pytest.mark.parametrize(
    ("text", "message"), [("[3, 3]", "image 3 occurs twice"), ("3\ncat\n", "found cat"), ("", "found nothing")]
)
def test_wrong_image_id_files(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "ids.txt"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        read_image_ids(file)
    file.write_text("[7, 5]\n")
    assert read_image_ids(file) == [7, 5]
