# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

import vlm_attn
from tests.checkpoints import CHECKPOINTS
from vlm_attn import cli
from vlm_attn.evals import pope, prompts, runner
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.prompts import PLAIN_TEMPLATE, build_inputs, chat_prompt, generate
from vlm_attn.evals.report import COLUMNS, results_table
from vlm_attn.evals.specs import parse_specs
from vlm_attn.evals.tasks import Task, chair_task, image_ids_hash, pope_task

from .conftest import shared_file

PARAMS = ["gift.saliency_layers=[1]", "gift.enhance_layers=[1, 2]", "gift.query_words=all"]


@pytest.fixture(scope="module")
def dataset(coco_folder: Path) -> CocoDataset:
    return CocoDataset.from_folder(coco_folder)


def run(task: Task, tiny_model: tuple[Any, Any], out: Path | None = None, **options: Any) -> dict[str, Any]:
    specs = parse_specs(["baseline", "gift"], PARAMS)
    options = {"model_name": "tiny", "batch_size": 4} | options
    return runner.run(task, specs, *tiny_model, out=out, **options)


def lasting(folder: Path) -> tuple[dict[str, Any], str]:
    """What two runs have to agree on: all but time and host."""
    results = json.loads((folder / "results.json").read_text())
    assert results.pop("environment")["seconds"] >= 0
    return results, (folder / "samples.jsonl").read_text()


def test_pope_results(dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    task = pope_task(dataset, seed=5)
    seen: list[tuple[str, int]] = []
    results = run(task, tiny_model, tmp_path, seed=5, progress=lambda label, count: seen.append((label, count)))
    assert json.loads((tmp_path / "results.json").read_text()) == results
    assert results["schema_version"] == 1
    assert results["status"] == "complete"
    config = results["config"]
    assert config["eval"] == "pope"
    assert results["prompt"] == "{question}"
    assert results["parser"] == "official"
    assert results["seed"] == 5
    assert results["device"] == "cpu"
    assert results["image_ids_sha256"] == image_ids_hash(task.image_ids)
    assert config["methods"]["gift"][0]["params"]["saliency_layers"] == [1]
    assert {"torch", "transformers", "vlm-attn", "python"} <= results["versions"].keys()
    assert results["counts"] == {
        "samples": len(task.samples),
        "finished": {"baseline": len(task.samples), "gift": len(task.samples)},
        "skipped": 0,
        "empty": 0,
    }
    for label in ("baseline", "gift"):
        assert sum(count for name, count in seen if name == label) == len(task.samples)

    lines = [json.loads(line) for line in (tmp_path / "samples.jsonl").read_text().splitlines()]
    assert [(line["method"], line["sample"]) for line in lines] == [
        (label, place) for label in ("baseline", "gift") for place in range(len(task.samples))
    ]
    # A question that several splits share is asked once, and counts in each.
    questions = pope.build_questions(dataset, seed=5)
    assert len(lines) < 2 * len(questions)
    assert sum(len(line["splits"]) for line in lines) == 2 * len(questions)
    # The metrics are those of the written answers.
    for label in ("baseline", "gift"):
        rows = [line for line in lines if line["method"] == label]
        for split in pope.SPLITS:
            right = [pope.parse_official(line["answer"]) == line["label"] for line in rows if split in line["splits"]]
            accuracy = results["metrics"][label][split]["accuracy"]["value"]
            assert accuracy == pytest.approx(100 * sum(right) / len(right))
            assert results["metrics"][label][split]["questions"] == len(questions) // 3
    assert {line["answer"] for line in lines if line["method"] == "baseline"} != {
        line["answer"] for line in lines if line["method"] == "gift"
    }
    assert not vlm_attn.is_patched(tiny_model[0])


def test_batches_do_not_change_answers(dataset: CocoDataset, tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    images = [dataset.load_image(image) for image in dataset.image_ids]
    texts = ["Is there a car in the image?", "Describe the image.", "what", "is it a dog", "yes?", "photo", "a b c"]
    together, tokens = generate(model, processor, images, texts, 8)
    alone = [generate(model, processor, [i], [t], 8) for i, t in zip(images, texts, strict=True)]
    assert together == [answers[0] for answers, _ in alone]
    assert tokens == sum(count for _, count in alone)
    assert len(set(together)) > 1


class Stop(Exception):
    """Stands for a crash."""


@pytest.mark.parametrize("error", [KeyboardInterrupt, Stop])
@pytest.mark.parametrize("after", [1, 3, 4])
def test_stopped_and_resumed_equals_plain(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path, error: type[BaseException], after: int
) -> None:
    task = chair_task(dataset, max_new_tokens=6)  # 7 images in batches of 4: two batches for each of two methods
    run(task, tiny_model, tmp_path / "plain")
    steps: list[int] = []

    def stop(label: str, count: int) -> None:
        steps.append(count)
        if len([count for count in steps if count]) == after:
            raise error

    folder = tmp_path / "stopped"
    if error is Stop:
        with pytest.raises(Stop):
            run(task, tiny_model, folder, progress=stop)
    else:
        assert run(task, tiny_model, folder, progress=stop)["status"] == "interrupted"
    finished = {1: [4, 0], 3: [7, 4], 4: [7, 7]}[after]
    partial = json.loads((folder / "results.json").read_text())
    assert partial["status"] == ("interrupted" if error is KeyboardInterrupt else "failed")
    assert list(partial["counts"]["finished"].values()) == finished
    assert list(partial["metrics"]) == ["baseline", "gift"][: 1 + (finished[1] > 0)]
    assert not vlm_attn.is_patched(tiny_model[0])
    results_table(partial)

    again: list[int] = []
    run(task, tiny_model, folder, progress=lambda label, count: again.append(count))
    assert again[0] == finished[0]  # starts where it stopped
    assert lasting(folder) == lasting(tmp_path / "plain")


def test_killed_in_the_middle_of_a_line(dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    task = chair_task(dataset, max_new_tokens=6)
    run(task, tiny_model, tmp_path)
    expected = lasting(tmp_path)
    samples = tmp_path / "samples.jsonl"
    text = samples.read_text()
    # A run that is killed leaves its first results.json behind, and may leave a batch cut anywhere.
    results = json.loads((tmp_path / "results.json").read_text())
    (tmp_path / "results.json").write_text(json.dumps({**results, "status": "running", "metrics": {}}))
    for cut in (len(text) - 1, len(text) * 2 // 3, len(text) // 4, 5, 0):
        samples.write_text(text[:cut])
        run(task, tiny_model, tmp_path)
        assert lasting(tmp_path) == expected, cut
    samples.unlink()
    run(task, tiny_model, tmp_path)
    assert lasting(tmp_path) == expected
    assert {p.name for p in tmp_path.iterdir()} - {".lock"} == {"results.json", "samples.jsonl", "image_ids.txt"}


def test_resumed_from_any_record_of_a_batch_equals_plain(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    """A batch that was cut short is run again as a whole: batches of the resumed run are those of the plain one."""
    task = chair_task(dataset, max_new_tokens=6)  # 7 images in batches of 4, for two methods: 0, 4, 7, 11, 14 are whole
    run(task, tiny_model, tmp_path)
    expected = lasting(tmp_path)
    samples, results = tmp_path / "samples.jsonl", json.loads((tmp_path / "results.json").read_text())
    lines = samples.read_text().splitlines(keepends=True)
    batches: list[list[Any]] = []
    plain = runner.generate
    for kept in range(len(lines)):
        (tmp_path / "results.json").write_text(json.dumps({**results, "status": "running", "metrics": {}}))
        samples.write_text("".join(lines[:kept]))
        begun: list[tuple[str, int]] = []
        batches.append([])
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(runner, "generate", lambda *args: batches[-1].append(len(args[2])) or plain(*args))
            run(task, tiny_model, tmp_path, progress=lambda *what, seen=begun: seen.append(what))
        assert lasting(tmp_path) == expected, kept
        whole = max(size for size in (0, 4, 7, 11, 14) if size <= kept)
        assert batches[-1] == {0: [4, 3, 4, 3], 4: [3, 4, 3], 7: [4, 3], 11: [3]}[whole], kept
        assert begun[0] == ("baseline", min(whole, 7)), kept


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda r: {**r, "image_id": r["image_id"] + 1},
            r"line 3: is about image \d+, sample 2 of this run is image \d+",
        ),
        (lambda r: {k: v for k, v in r.items() if k != "score"}, "line 3: needs 'score'"),
        (lambda r: {**r, "score": []}, "line 3: 'score' should be an object"),
        (lambda r: {**r, "sample": 3}, "line 3: not of this run"),
        (lambda r: {**r, "answer": None}, "line 3: 'answer' should be a text"),
    ],
)
def test_a_damaged_folder_is_not_resumed(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path, change: Any, message: str
) -> None:
    task = chair_task(dataset, max_new_tokens=2)
    run(task, tiny_model, tmp_path)
    samples = tmp_path / "samples.jsonl"
    lines = samples.read_text().splitlines()
    lines[2] = json.dumps(change(json.loads(lines[2])))
    samples.write_text("\n".join(lines) + "\n")
    with pytest.raises(ValueError, match=message):
        run(task, tiny_model, tmp_path)
    assert samples.read_text().splitlines() == lines  # left alone
    lines[2] = lines[2][:20]
    samples.write_text("\n".join(lines) + "\n")
    with pytest.raises(
        ValueError, match=r"samples\.jsonl, line 3: not valid JSON"
    ):  # in the middle: damaged, not cut short
        run(task, tiny_model, tmp_path)


@pytest.fixture
def read_only() -> Iterator[Any]:
    """A context in which a folder below the yielded one cannot be written to, by rights, also for root."""
    import tempfile

    with tempfile.TemporaryDirectory() as root:
        Path(root).chmod(0o755)

        @contextlib.contextmanager
        def sealed() -> Iterator[None]:
            places = list(Path(root).rglob("*"))
            for path in places:
                path.chmod(0o555 if path.is_dir() else 0o444)
            Path(root).chmod(0o555)
            if os.geteuid() == 0:
                os.seteuid(65534)
            try:
                yield
            finally:
                if os.getuid() == 0:
                    os.seteuid(0)
                Path(root).chmod(0o755)
                for path in places:
                    path.chmod(0o755 if path.is_dir() else 0o644)

        yield Path(root), sealed


@pytest.mark.skipif(not hasattr(os, "seteuid"), reason="needs the rights of POSIX")
def test_a_finished_run_on_a_read_only_disk_is_read(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], read_only: Any
) -> None:
    root, sealed = read_only
    task = chair_task(dataset, max_new_tokens=2)
    results = run(task, tiny_model, root / "done")
    shutil.copytree(root / "done", root / "part")
    lines = (root / "part" / "samples.jsonl").read_text().splitlines(keepends=True)
    (root / "part" / "samples.jsonl").write_text("".join(lines[:4]))
    (root / "part" / "results.json").write_text(json.dumps({**results, "status": "interrupted"}))
    shutil.copytree(root / "done", root / "other")
    assert (
        CliRunner().invoke(cli.app, ["report", str(root / "other")]).exit_code == 0
    )  # imports what nobody else may read
    with sealed():
        again = run(task, tiny_model, root / "done")
        shown = CliRunner().invoke(cli.app, ["report", str(root / "done")])
        with pytest.raises(OSError, match=r"part: cannot be written .*choose another --out"):
            run(task, tiny_model, root / "part")
    assert again["status"] == "complete"
    assert again["metrics"] == results["metrics"]
    assert shown.exit_code == 0, shown.output
    assert "CHAIR_S" in shown.output
    assert "cannot be written: here are the tables" in " ".join(shown.output.split())


def test_finished_run_computes_nothing(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = chair_task(dataset, max_new_tokens=6)
    run(task, tiny_model, tmp_path)
    expected = lasting(tmp_path)
    monkeypatch.setattr(runner, "generate", None)
    assert run(task, tiny_model, tmp_path)["status"] == "complete"
    assert lasting(tmp_path) == expected


def test_folder_of_another_run_is_refused_and_left_alone(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    run(chair_task(dataset, max_new_tokens=6), tiny_model, tmp_path)
    before = (tmp_path / "results.json").read_text(), (tmp_path / "samples.jsonl").read_text()
    for task, options, what in (
        (chair_task(dataset, max_new_tokens=7), {}, "max_new_tokens: 6, now 7"),
        (chair_task(dataset, max_new_tokens=6), {"batch_size": 3}, "batch_size: 4, now 3"),
        (chair_task(dataset, max_new_tokens=6), {"model_name": "other"}, "model"),
        (chair_task(dataset, max_new_tokens=6, limit=3), {}, "image"),
        (pope_task(dataset), {}, "eval"),
    ):
        with pytest.raises(ValueError, match=what):
            run(task, tiny_model, tmp_path, **options)
    assert before == ((tmp_path / "results.json").read_text(), (tmp_path / "samples.jsonl").read_text())
    (tmp_path / "results.json").write_text("{}")
    with pytest.raises(ValueError, match="not a results file"):
        run(chair_task(dataset, max_new_tokens=6), tiny_model, tmp_path)
    (tmp_path / "results.json").unlink()
    with pytest.raises(ValueError, match=r"no results\.json"):
        run(chair_task(dataset, max_new_tokens=6), tiny_model, tmp_path)


def test_other_weights_under_the_same_name_are_another_run(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    import torch

    task = chair_task(dataset, max_new_tokens=4)
    run(task, tiny_model, tmp_path)
    weight = tiny_model[0].get_output_embeddings().weight
    with torch.no_grad():
        weight.add_(1)
        try:
            with pytest.raises(ValueError, match="weights"):
                run(task, tiny_model, tmp_path)
        finally:
            weight.sub_(1)


def test_method_that_does_not_fit_fails_before_anything_runs(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "generate", None)
    specs = parse_specs(["baseline", "gift"], ["gift.saliency_layers=[1]", "gift.enhance_layers=[9]"])
    with pytest.raises(ValueError, match="enhance_layers"):
        runner.run(chair_task(dataset), specs, *tiny_model, model_name="tiny", out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pictures_that_cannot_be_read_are_skipped_and_counted(
    coco_folder: Path, tiny_model: tuple[Any, Any], tmp_path: Path
) -> None:
    folder = shutil.copytree(coco_folder, tmp_path / "data")
    task = chair_task(CocoDataset.from_folder(folder), max_new_tokens=4)
    missing, truncated = task.image_ids[1], task.image_ids[5]
    (folder / "images" / f"{missing:012d}.png").unlink()
    file = folder / "images" / f"{truncated:012d}.png"
    file.write_bytes(file.read_bytes()[:-900])
    results = run(task, tiny_model, tmp_path / "out")
    assert results["counts"] == {"samples": 7, "finished": {"baseline": 7, "gift": 7}, "skipped": 2, "empty": 0}
    assert list(results["skipped_images"]) == [missing, truncated]
    assert "not in" in results["skipped_images"][missing]
    assert "cannot be read" in results["skipped_images"][truncated]
    # The figures and answers are those of the pictures that are there.
    there = [image for image in task.image_ids if image not in (missing, truncated)]
    alone = run(chair_task(task.dataset, image_ids=there, max_new_tokens=4), tiny_model, tmp_path / "alone")
    assert results["metrics"] == alone["metrics"]
    lines = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert [line["sample"] for line in lines if "skipped" in line] == [1, 5, 1, 5]
    assert run(task, tiny_model, tmp_path / "out")["metrics"] == results["metrics"]  # nothing left to do
    # Not one picture of the first batch: the folder is wrong, and nothing is reported as if it were a result.
    shutil.rmtree(folder / "images")
    with pytest.raises(FileNotFoundError, match="put the pictures into one of these"):
        run(task, tiny_model, tmp_path / "empty")
    assert json.loads((tmp_path / "empty" / "results.json").read_text())["metrics"] == {}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_full_disk_loses_nothing_finished(dataset: CocoDataset, tiny_model: tuple[Any, Any], tmp_path: Path) -> None:
    task = chair_task(dataset, max_new_tokens=6)
    run(task, tiny_model, tmp_path / "plain")
    folder, kept = tmp_path / "full", tmp_path / "kept.jsonl"
    samples = folder / "samples.jsonl"

    def fill(label: str, count: int) -> None:
        if count == 4 and not kept.exists():  # after the first batch, every write says that there is no space
            samples.rename(kept)
            samples.symlink_to("/dev/full")

    with pytest.raises(
        OSError, match=r"samples\.jsonl: cannot be written \(No space left on device\); .* same command"
    ):
        run(task, tiny_model, folder, progress=fill)
    assert not vlm_attn.is_patched(tiny_model[0])
    samples.unlink()
    kept.rename(samples)
    assert len(samples.read_text().splitlines()) == 4
    run(task, tiny_model, folder)
    assert lasting(folder) == lasting(tmp_path / "plain")


def test_empty_answers_are_counted(
    dataset: CocoDataset, tiny_model: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        runner, "generate", lambda model, processor, images, *_: (["a dog", *[""] * (len(images) - 1)], 1)
    )
    results = run(chair_task(dataset, limit=4), tiny_model)
    assert results["counts"]["empty"] == 6
    assert results["metrics"]["gift"]["instances+captions"]["length"]["value"] == 0.5  # they count, and name nothing


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    file = tmp_path / "new" / "results.json"
    runner.write_json(file, {"a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        runner.write_json(file, {"a": float("nan")})  # NaN is no JSON
    with pytest.raises(TypeError):
        runner.write_json(file, {"a": object()})
    assert json.loads(file.read_text()) == {"a": 1}
    assert list(file.parent.iterdir()) == [file]


def test_chair_task_draws_by_seed_and_scores_both_truths(dataset: CocoDataset, tiny_model: tuple[Any, Any]) -> None:
    drawn = {seed: chair_task(dataset, limit=4, seed=seed).image_ids for seed in range(5)}
    assert all(len(set(ids)) == 4 and set(ids) <= set(dataset.image_ids) for ids in drawn.values())
    assert len({tuple(ids) for ids in drawn.values()}) > 1
    assert drawn[3] == chair_task(dataset, limit=4, seed=3).image_ids
    task = chair_task(dataset, variant="instances", max_new_tokens=4)
    results = run(task, tiny_model)
    assert list(results["metrics"]["gift"]) == ["instances", "instances+captions"]
    without = CocoDataset("plain", dataset.instances, None, dataset.load_image)
    assert chair_task(without).config["variant"] == "instances"
    with pytest.raises(ValueError, match="none of the 7 images has reference captions"):
        chair_task(without, variant="instances+captions")


def test_official_questions_on_a_part_of_the_images(dataset: CocoDataset) -> None:
    questions = [
        pope.Question(11, "Is there a car in the image?", "yes", "popular"),
        pope.Question(999, "Is there a car in the image?", "no", "popular"),
        pope.Question(7, "Is there a cup in the image?", "no", "popular"),
    ]
    task = pope_task(dataset, questions=questions)
    assert [sample.image_id for sample in task.samples] == [11, 7]
    assert task.config["questions_skipped"] == 1
    assert [s.image_id for s in pope_task(dataset, questions=questions, limit=1).samples] == [11]
    with pytest.raises(ValueError, match="image 999"):
        pope_task(dataset, questions=questions[1:2])
    prompted = pope_task(dataset, questions=questions, prompt="{question} Answer with one word.")
    assert prompted.samples[0].prompt == "Is there a car in the image? Answer with one word."
    with pytest.raises(ValueError, match="question"):
        pope_task(dataset, questions=questions, prompt="Answer with one word.")


def test_prompts_with_and_without_a_chat_template(dataset: CocoDataset, tiny_model: tuple[Any, Any]) -> None:
    model, processor = tiny_model
    text = chat_prompt(processor, "Is there a dog?")
    assert text.count(processor.image_token) == 1
    assert text.endswith("ASSISTANT:")
    template, processor.chat_template = processor.chat_template, None
    try:
        prompts._say_once.cache_clear()
        with pytest.warns(UserWarning, match="no chat template") as caught:
            said = [chat_prompt(processor, "Is there a dog?") for _ in range(2)]
        assert said == [PLAIN_TEMPLATE.format(image="<image>", text="Is there a dog?")] * 2
        assert len(caught) == 1
    finally:
        processor.chat_template = template
    images = [dataset.load_image(image) for image in dataset.image_ids[:2]]
    inputs = build_inputs(model, processor, images, ["Is there a dog in the image?", "what"])
    assert inputs["pixel_values"].shape[0] == 2
    assert inputs["attention_mask"][1, 0] == 0  # padded on the left
    assert inputs["attention_mask"][:, -1].tolist() == [1, 1]
    with pytest.raises(ValueError, match="2 images but 1 texts"):
        build_inputs(model, processor, images, ["what"])


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # two processors of transformers
@pytest.mark.parametrize("name", [name for name in CHECKPOINTS if name != "smolvlm"])
def test_prompts_are_those_of_the_processor(name: str) -> None:
    """Row by row the ids of apply_chat_template(tokenize=True), with one BOS at most; the question is found in them."""
    processor = CHECKPOINTS[name].processor()
    images = [Image.new("RGB", (40, 40), colour) for colour in ("red", "blue")]
    texts = ["Is there a dog?", "Describe this image in detail."]
    rows = build_inputs(SimpleNamespace(device="cpu", dtype=torch.float32), processor, images, texts)
    found = vlm_attn.explain(processor, rows).rows
    for row, (image, text) in enumerate(zip(images, texts, strict=True)):
        ids = rows["input_ids"][row][rows["attention_mask"][row] == 1]
        if processor.chat_template is not None:
            content = [{"type": "image", "image": image}, {"type": "text", "text": text}]
            chat = [{"role": "user", "content": content}]
            wanted = processor.apply_chat_template(
                chat, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
            )["input_ids"][0]
        else:  # the model card's form: the text as it is
            wanted = processor(text="<image>" + text, images=image, return_tensors="pt")["input_ids"][0]
            assert "USER" not in processor.decode(ids)
        assert torch.equal(ids, wanted)
        assert ids.tolist().count(processor.tokenizer.bos_token_id) <= 1
        assert [part[3].strip() for part in found[row] if part[0] == "QUERY"] == [text]


def test_real_photos_run_through(tiny_model_folder: Path, tmp_path: Path) -> None:
    """Processor, batches with padding, official questions, both results and the report, by the commands a user gives."""
    photos = shared_file("coco_photos")

    def call(*args: object) -> str:
        done = CliRunner().invoke(cli.app, [str(arg) for arg in args], env={"COLUMNS": "120"})
        assert done.exit_code == 0, done.output
        return done.stdout

    params = [text for param in PARAMS for text in ("--param", param)]
    shared = ["--data", photos, "--method", "baseline", "--method", "gift", *params, "--max-new-tokens", 4]
    model = ["--model", tiny_model_folder, "--device", "cpu"]
    call("eval", "chair", "pope", *model, *shared, "--limit", 3, "--out", tmp_path / "runs")
    call("report", tmp_path / "runs", "--data", photos)
    html = (tmp_path / "runs" / "report" / "report.html").read_text()
    assert 3 <= html.count("data:image/jpeg") <= 6  # each evaluation draws its own images
    for name in ("chair", "pope"):
        results = json.loads((tmp_path / "runs" / name / "results.json").read_text())
        assert results["status"] == "complete"
        assert results["counts"]["skipped"] == 0
        assert set(results["metrics"]) == {"baseline", "gift"}
    questions = tmp_path / "gqa_pope_random.json"
    name = next((photos / "images").iterdir()).name
    questions.write_text(json.dumps({"image": name, "text": "Is there a cup in the image?", "label": "yes"}))
    assert "random" in call("eval", "pope", *model, *shared[2:], "--data", photos / "images", "--pope-file", questions)
    # The bundled model takes photos as it takes scenes.
    assert "CHAIR_S" in call(
        "eval", "chair", "--model", "scenes", "--data", photos, "--method", "baseline", "--limit", 2
    )


@pytest.mark.parametrize("name", ["pope", "chair"])
def test_table_fits_into_80_columns(name: str) -> None:
    from rich.console import Console

    metric = {"value": 123.4, "low": 99.94, "high": 134.56}
    columns = ["accuracy", "precision", "recall", "f1", "yes_ratio", "chair_s", "chair_i", "length"]
    group = dict.fromkeys(columns, metric) | {"unparsed": 3000}
    console = Console(width=80, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(
        results_table(
            {
                "eval": name,
                "config": {"model": "m", "data": "d", "images": 500},
                "counts": {"samples": 10, "finished": {"var+gift": 5}},
                "metrics": {"var+gift": {"random": group}},
            }
        )
    )
    text = console.export_text()
    for cell in ("var+gift", "5 of 10 done", "99.9–135", "123.4"):
        assert cell in text
    assert text.count("99.9–135") == len(COLUMNS[name])
    assert "…" not in text
