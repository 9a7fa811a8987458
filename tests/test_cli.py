# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import csv
import dataclasses
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from vlm_attn import __version__, cli

from .evals.conftest import coco_folder, tiny_model_folder, write_folder  # noqa: F401  (fixtures)

PARAMS = ["--param", "gift.saliency_layers=[1]", "--param", "gift.enhance_layers=[1,2]"]


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import warnings

    monkeypatch.chdir(tmp_path)  # results that were not given a folder go into runs/

    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)  # commands replace it: put it back
    monkeypatch.setenv("COLUMNS", "120")


def call(*args: object) -> Any:
    return CliRunner().invoke(cli.app, [str(arg) for arg in args])


def error_of(*args: object) -> str:
    """The one line of a command that has to fail as a user's error."""
    result = call(*args)
    assert result.exit_code == 2, result.output
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("Error: ")
    assert "Traceback" not in result.output
    return lines[0]


def test_help_and_version_need_no_torch() -> None:
    code = (
        "import sys; from vlm_attn import cli\n"
        "try: cli.app(sys.argv[1:])\n"
        "except SystemExit as end: assert not end.code\n"
        "print('heavy:', sorted({'torch', 'transformers', 'numpy', 'scipy'} & set(sys.modules)))"
    )
    for args in (["--help"], ["eval", "--help"], ["--version"], []):
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "heavy: []"
        assert ("Describe images" in done.stdout) is (args in (["--help"], []))


def test_what_needs_no_model_imports_no_torch(tmp_path: Path) -> None:
    """`methods`, scores of answers that exist, and whatever is refused before a model is needed start at once."""
    code = (
        "import sys; from vlm_attn import cli\n"
        "try: cli.app(sys.argv[1:])\n"
        "except SystemExit as end: code = end.code or 0\n"
        "print('heavy:', sorted({'torch', 'transformers'} & set(sys.modules)), code)"
    )
    (tmp_path / "q.json").write_text(
        json.dumps([{"image": f"{n}.jpg", "text": "Is there a cup in the image?", "label": label}
                    for n, label in enumerate(("yes", "no"))])
    )  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps([{"answer": "Yes"}, {"answer": "No"}]))
    missing = str(tmp_path / "none")
    cases: list[tuple[list[str], int]] = [
        (["methods"], 0),
        (["methods", "--json"], 0),
        (["score", "pope", "--answers", str(tmp_path / "a.json"), "--questions", str(tmp_path / "q.json")], 0),
        (["evil"], 2),
        (["eval", "pope", "--oops"], 2),
        (["eval", "pope", "--method", "gfit"], 2),
        (["eval", "pope", "--method", "gift", "--param", "gift.alpah=1"], 2),
        (["eval", "chair", "--data", missing], 2),
        (["eval", "chair", "--data", str(tmp_path)], 2),
        (["eval", "pope", "--data", missing, "--pope-file", str(tmp_path / "q.json")], 2),
        (["eval", "amber", "--data", missing], 2),
        (["caption", missing], 2),
        (["experiment", "--out", missing, "--data", missing, "--search-split", "val2014"], 2),
        (["experiment", "--out", missing, "--method", "gfit"], 2),
        (["calibrate", "scenes", "--data", missing], 2),
        (["score", "chair", "--captions", missing, "--data", missing], 2),
        (["report", missing], 2),
    ]
    for args, wanted in cases:
        done = subprocess.run([sys.executable, "-c", code, *args], capture_output=True, text=True, check=False)
        assert done.stdout.splitlines()[-1] == f"heavy: [] {wanted}", (args, done.stdout[-500:], done.stderr[-500:])
        assert "Traceback" not in done.stderr


def commands(group: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """Every command there is, with its name."""
    for key, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, f"{name}{key} ")
        else:
            yield name + key, command


def test_every_option_is_bound_once_and_m_is_the_model() -> None:
    found = dict(commands(typer.main.get_command(cli.app)))
    assert len(found) > 15
    for name, command in found.items():
        options = [text for param in command.params for text in (*param.opts, *param.secondary_opts)]
        assert len(options) == len(set(options)), name
        for param in command.params:
            assert "-m" not in param.opts or "--model" in param.opts, name


def test_console_script() -> None:
    script = Path(sys.executable).parent / "vlm-attn"
    if not script.exists():
        pytest.skip("the package is not installed with its console script here")
    done = subprocess.run([script, "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"vlm-attn {__version__}"
    done = subprocess.run([script, "caption", "no/such.jpg"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.strip() == "Error: no/such.jpg: no such image"


def test_help_is_grouped_and_flags_take_nothing() -> None:
    text = call("--help").output
    places = [text.index(f"─ {panel} ─") for panel in ("Look", "Evaluate", "Calibrate", "Measure")]
    assert places == sorted(places)
    for command, panel in (("demo", 0), ("data", 1), ("experiment", 2), ("bench", 3)):
        where = text.index(f"│ {command} ")
        assert places[panel] < where < [*places, len(text)][panel + 1]
    for command in ([], ["methods"], ["eval"], ["scenes", "card"], ["scenes", "render"], ["data", "coco"]):
        assert "<bool>" not in call(*command, "--help").output


def test_completion(tmp_path: Path) -> None:
    """What --install-completion writes into a new home completes commands in a real bash."""
    script = Path(sys.executable).parent / "vlm-attn"
    if not script.exists() or shutil.which("bash") is None:
        pytest.skip("needs the console script, and bash")
    environment = {"HOME": str(tmp_path), "PATH": f"{script.parent}:/usr/bin:/bin"}

    def bash(text: str) -> str:
        # Not the only command: bash would hand over to it, and be no shell above it any more.
        done = subprocess.run(
            ["bash", "-c", text + "; true"], env=environment, capture_output=True, text=True, check=True
        )
        return done.stdout

    assert "bash completion installed" in bash("vlm-attn --install-completion")
    # As bash does when Tab is pressed after "vlm-attn cal".
    found = bash(
        "source ~/.bashrc; COMP_WORDS=(vlm-attn cal); COMP_CWORD=1; COMP_LINE='vlm-attn cal'; COMP_POINT=12; "
        "$(complete -p vlm-attn | sed 's/.*-F \\([^ ]*\\) .*/\\1/') vlm-attn cal vlm-attn; echo \"${COMPREPLY[@]}\""
    )
    assert found.split() == ["calibrate"]


@pytest.mark.parametrize(
    "command", ["methods", "caption", "demo", "eval", "report", "score chair", "calibrate", "doctor", "data coco"]
)
def test_every_command_shows_an_example(command: str) -> None:
    result = call(*command.split(), "--help")
    assert result.exit_code == 0
    assert f"Example: vlm-attn {command}" in " ".join(result.output.split())


def test_benchmark_gets_its_own_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib

    seen: list[list[str]] = []
    monkeypatch.setattr(sys, "argv", list(sys.argv))
    module = type("Benchmark", (), {"main": staticmethod(lambda: seen.append(sys.argv[1:]))})
    load = importlib.import_module
    monkeypatch.setattr(
        importlib,
        "import_module",
        lambda name, *rest, **more: module if name == "vlm_attn.evals.bench.overhead" else load(name, *rest, **more),
    )
    assert call("bench", "overhead", "--layers", "2", "--help", "--json", "x").exit_code == 0
    assert seen == [["--layers", "2", "--help", "--json", "x"]]


def test_methods_are_described_as_their_classes_do() -> None:
    """What is read from their sources is what the classes say."""
    from vlm_attn import registry

    for name, info in registry.methods().items():
        assert info.cls.name == name
        assert info.summary == info.cls.__doc__.strip().splitlines()[0]
        assert info.paper == info.cls.paper
        assert registry._fields(info.cls.__module__, info.cls.__name__) == [
            f.name for f in dataclasses.fields(info.cls)
        ]


def test_methods() -> None:
    result = call("methods")
    assert result.exit_code == 0
    for word in ("baseline", "gift", "var", "2510.22067", "2503.03321"):
        assert word in result.output
    rows = json.loads(call("methods", "--json").stdout)
    assert {"gift", "var"} <= {row["name"] for row in rows}
    assert all(row["summary"] and row["paper"] for row in rows)


def test_doctor() -> None:
    result = call("doctor")
    assert result.exit_code == 0
    for word in (__version__, "torch", "transformers", "cpu", "evals", "demo", "clip", "Bundled model"):
        assert word in result.output


def test_doctor_says_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "gradio" else find(name, *a))
    result = call("doctor")
    assert result.exit_code == 0
    assert 'missing gradio: pip install "vlm-attn[demo]"' in result.output


def test_eval_side_by_side(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    out = tmp_path / "out"
    arguments = ["eval", "pope", "--model", tiny_model_folder, "--data", coco_folder, "--method", "baseline"]
    arguments += ["--method", "gift", *PARAMS, "--limit", "3", "--out", out, "--device", "cpu"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    for word in ("POPE of", "random", "popular", "adversarial", "mean of the splits", "baseline", "gift", "95 %"):
        assert word in result.output
    assert "scenes world" not in result.output
    results = json.loads((out / "results.json").read_text())
    assert results["status"] == "complete"
    assert results["config"]["images"] == 3
    assert list(results["metrics"]) == ["baseline", "gift"]
    accuracy = results["metrics"]["gift"]["mean"]["accuracy"]["value"]
    assert f"{accuracy:.1f}" in result.output
    assert call(*arguments).exit_code == 0  # finished: shows the same again
    assert "seed: 0, now 1" in error_of(*arguments, "--seed", 1)


def test_the_seed_draws_images_and_questions(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """It is not only written down: other seeds ask about other images, and the library draws the same."""
    from vlm_attn.evals.coco import CocoDataset
    from vlm_attn.evals.tasks import chair_task, pope_task

    dataset = CocoDataset.from_folder(coco_folder)
    drawn = set()
    for seed in (0, 5):
        arguments = ["--model", tiny_model_folder, "--device", "cpu", "--data", coco_folder, "--method", "baseline"]
        arguments += ["--limit", 3, "--max-new-tokens", 1, "--seed", seed, "--out", tmp_path / str(seed)]
        result = call("eval", "chair", "pope", *arguments)
        assert result.exit_code == 0, result.output
        for name, task in (("chair", chair_task), ("pope", pope_task)):
            folder = tmp_path / str(seed) / name
            wanted = task(dataset, limit=3, seed=seed)
            assert (folder / "image_ids.txt").read_text().split() == [str(image) for image in wanted.image_ids]
            assert json.loads((folder / "results.json").read_text())["seed"] == seed
            lines = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
            assert [line.get("question") for line in lines] == [s.facts.get("question") for s in wanted.samples]
            drawn.add((name, *wanted.image_ids, *(s.facts.get("question") for s in wanted.samples)))
    assert len(drawn) == 4


def test_eval_json_on_the_screen_is_only_json(coco_folder: Path, tiny_model_folder: Path) -> None:  # noqa: F811
    arguments = ["--data", coco_folder, "--method", "baseline", "--max-new-tokens", 4, "--json", "-"]
    result = call("eval", "chair", "pope", "--model", tiny_model_folder, *arguments)
    assert result.exit_code == 0, result.output
    chair, pope = json.loads(result.stdout)
    assert (chair["eval"], pope["eval"]) == ("chair", "pope")
    assert chair["config"]["variant"] == "instances+captions"
    assert set(chair["metrics"]["baseline"]["instances"]["chair_i"]) == {"value", "low", "high"}
    assert "CHAIR_S" in result.stderr


def test_scenes_numbers_say_where_they_come_from(tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    arguments = ["--method", "baseline", "--limit", 2, "--max-new-tokens", 4, "--out", tmp_path / "out"]
    result = call("eval", "chair", "--model", tiny_model_folder, *arguments)
    assert result.exit_code == 0, result.output
    assert "come from the scenes world" in result.output
    assert "not from COCO" in json.loads((tmp_path / "out" / "results.json").read_text())["note"]


def test_interrupt_keeps_what_is_finished(
    coco_folder: Path,  # noqa: F811
    tiny_model_folder: Path,  # noqa: F811
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from vlm_attn.evals import runner

    generate = runner.generate
    calls: list[int] = []

    def stop(*args: Any) -> Any:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return generate(*args)

    arguments = ["eval", "chair", "--model", tiny_model_folder, "--data", coco_folder, "--method", "baseline"]
    arguments += ["--max-new-tokens", 4, "--batch-size", 3, "--out", tmp_path / "out"]
    monkeypatch.setattr(runner, "generate", stop)
    result = call(*arguments)
    assert result.exit_code == 130
    said = "".join(result.output.split())
    assert "".join(f"Stopped after 3 of 7 samples. The same command with --out {tmp_path / 'out'}".split()) in said
    monkeypatch.setattr(runner, "generate", generate)
    result = call(*arguments)
    assert result.exit_code == 0
    assert json.loads((tmp_path / "out" / "results.json").read_text())["counts"]["finished"] == {"baseline": 7}


def test_results_without_a_folder_are_kept(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """In a dated folder, which the next step is named with; and as CSV."""
    arguments = ["eval", "chair", "--model", tiny_model_folder, "--data", coco_folder, "--method", "baseline"]
    arguments += ["--limit", 2, "--max-new-tokens", 4, "--csv", tmp_path / "figures.csv"]
    result = call(*arguments)
    assert result.exit_code == 0, result.output
    (folder,) = (tmp_path / "runs").iterdir()
    assert folder.name.endswith(f"-chair-{tiny_model_folder.name}")
    assert f"Next: vlm-attn report {folder.relative_to(tmp_path)} --data {coco_folder}" in result.output
    results = json.loads((folder / "results.json").read_text())
    with open(tmp_path / "figures.csv", newline="") as lines:
        rows = list(csv.DictReader(lines))
    wanted = results["metrics"]["baseline"]["instances"]["chair_s"]
    (row,) = (row for row in rows if (row["part"], row["figure"]) == ("instances", "chair_s"))
    assert [float(row[key]) for key in ("value", "low", "high")] == [wanted[key] for key in ("value", "low", "high")]
    assert (row["eval"], row["method"], row["images"], row["model"]) == (
        "chair",
        "baseline",
        "2",
        str(tiny_model_folder),
    )
    assert len(rows) == sum(len(part) for part in results["metrics"]["baseline"].values())


def test_a_folder_of_images_becomes_a_page(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    """Images beside captions, in one file that loads nothing, with the differences to the first caption marked."""
    own = tmp_path / "own <images>"
    own.mkdir()
    for file in sorted((coco_folder / "images").iterdir())[:2]:
        shutil.copy(file, own)
    (own / "notes.txt").write_text("not an image")
    arguments = ["--model", tiny_model_folder, *PARAMS, "--param", "gift.alpha=20", "--max-new-tokens", 12]
    result = call("caption", "--images", own, "scenes:validation/3", *arguments, "--json", tmp_path / "captions.json")
    assert result.exit_code == 0, result.output
    assert "Written: captions.html" in result.output
    page = (tmp_path / "captions.html").read_text()
    assert page.count("<article>") == page.count("<img ") == 3
    assert page.count('src="data:image/jpeg;base64,') == 3
    assert "http" not in page
    assert "own <images>" not in page
    assert "own &lt;images&gt;" in page
    records = json.loads((tmp_path / "captions.json").read_text())["captions"]
    pairs = list(zip(records[::2], records[1::2], strict=True))
    assert any(one["caption"] != two["caption"] for one, two in pairs)
    assert page.partition("</style>")[2].count("<ins") > 2  # the key has two
    assert "no images: name files" in error_of("caption")
    assert "notes: no such folder" in error_of("caption", "--images", tmp_path / "notes")
    assert "there is no folder" in error_of("caption", "scenes:validation/3", "--html", tmp_path / "none" / "a.html")


def test_caption(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    picture = coco_folder / "images" / f"{7:012d}.png"
    file = tmp_path / "captions.json"
    arguments = [picture, "scenes:validation/3", "--model", tiny_model_folder, *PARAMS, "--max-new-tokens", 12]
    result = call("caption", *arguments, "--json", file)
    assert result.exit_code == 0, result.output
    rows = json.loads(file.read_text())["captions"]
    assert {(row["image"], row["method"]) for row in rows} == {
        (name, method) for name in (str(picture), "scenes:validation/3") for method in ("baseline", "gift")
    }
    from vlm_attn.evals import scenes
    from vlm_attn.evals.chair import coco_vocabulary

    present = scenes.scene("validation", 3).categories
    assert ", ".join(present) in result.output
    for row in rows:
        assert row["caption"]
        assert row["caption"].split()[0] in result.output
        if row["image"].startswith("scenes:"):
            wrong = [
                m["text"] for m in coco_vocabulary().score(row["caption"], present)["mentions"] if m["hallucinated"]
            ]
            assert [mention["text"] for mention in row["hallucinated"]] == wrong
            assert not wrong or f"{row['method']} names what is not there: {', '.join(wrong)}" in result.output


def test_score_chair(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "data", {1: ["dog"], 2: ["cat", "car"]}, {1: ["a dog and a cup"]})
    captions = tmp_path / "captions.jsonl"
    lines = [(1, "a dog and two cups"), (2, "a cat with a kite"), (3, "somewhere else")]
    captions.write_text("\n".join(json.dumps({"image_id": image, "caption": text}) for image, text in lines))
    for variant, chair_s in (("instances", 100.0), ("instances+captions", 50.0)):
        arguments = ["--captions", captions, "--data", folder, "--variant", variant]
        result = call("score", "chair", *arguments, "--json", tmp_path / "out.json")
        assert result.exit_code == 0, result.output
        assert "1 captions of images that are not in the data" in result.output
        scores = json.loads((tmp_path / "out.json").read_text())
        assert scores["metrics"]["captions"][variant]["chair_s"]["value"] == chair_s
        assert scores["config"]["variant"] == variant
        assert scores["samples"][1]["score"]["mentions"][1] == {
            "text": "kite", "category": "kite", "start": 13, "end": 17, "hallucinated": True,
        }  # fmt: skip
    assert "occurs twice" in error_of("score", "chair", "--data", folder, "--captions", _twice(tmp_path))
    captions.write_text('{"image_id": 77, "caption": "a dog"}')
    assert "none of its 1 captions" in error_of("score", "chair", "--data", folder, "--captions", captions)


def _twice(folder: Path) -> Path:
    file = folder / "twice.jsonl"
    file.write_text('{"image_id": 1, "caption": "a"}\n' * 2)
    return file


def test_wrong_input_is_one_line(coco_folder: Path, tiny_model_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    pope = ["eval", "pope", "--data", coco_folder, "--model", tiny_model_folder, "--out", tmp_path / "out"]
    base = [*pope, "--method", "baseline"]
    bad = tmp_path / "bad.json"
    bad.write_text('{"image": "1.jpg", "text"')
    (tmp_path / "empty").mkdir()
    cases: list[tuple[list[object], str]] = [
        ([*pope, "--method", "gfit"], "did you mean 'gift'"),
        ([*pope, "--method", "gift", "--param", "gift.alpah=1"], "did you mean 'alpha'"),
        ([*pope, "--method", "gift", "--param", "gift.alpha=99"], "alpha"),
        ([*base, "--param", "gift.alpha=1"], "no run uses gift"),
        ([*pope, "--method", "gift", "--param", "gift.saliency_layers=[9]", *PARAMS[2:]], "saliency_layers"),
        (pope, "no preset"),  # the default runs include gift, which needs layers for this model
        ([*base, "--parser", "odd"], "official, opera, vcd, strict"),
        ([*base, "--pope-file", bad], "bad.json, line 1: not valid JSON"),
        ([*base, "--pope-file", tmp_path / "none.json"], "none.json: no such file"),
        ([*base, "--split", "test2014"], "val2014"),
        ([*base, "--prompt", "is it?"], "{question}"),
        ([*base, "--limit", "0"], "--limit"),
        ([*base, "--device", "nonsense"], "device 'nonsense'"),
        ([*base, "--dtype", "int8"], "dtype 'int8'"),
        (["eval", "pope", "--data", tmp_path / "empty", "--method", "baseline"], "empty: no COCO annotations"),
        (["eval", "pope", "--data", tmp_path / "none", "--method", "baseline"], "none: no such folder"),
        (["eval", "chair", "--split", "train", "--method", "baseline"], "validation and test"),
        (["eval", "chair", "--model", tmp_path / "none", "--limit", 1, "--method", "baseline"], "no such folder"),
        (["eval", "chair", "--model", tmp_path / "empty", "--limit", 1, "--method", "baseline"], "no config.json"),
        (["eval", "chair", "--model", "someone/model", "--limit", 1, "--method", "baseline"], "someone/model"),
        (["eval", "popes"], "'pope', 'chair'"),
        (["eval"], "Missing argument"),
        (["evil", "pope"], "Did you mean 'eval'"),
        (["caption", "scenes:validation/500"], "outside the validation split"),
        (["caption", "scenes:nowhere/5"], "unknown split 'nowhere'"),
        (["caption", "scenes:5"], "scenes:SPLIT/NUMBER"),
        (["caption", bad], "bad.json: not a picture"),
        (["score", "chair", "--captions", bad, "--data", coco_folder], "bad.json, line 1: not valid JSON"),
        (["calibrate", "scenes", "--method", "gfit"], "did you mean 'gift'"),
        (["calibrate", "scenes", "-o", tmp_path / "none" / "preset.json"], "there is no folder"),
        (["calibrate", "scenes", "--limit", "501"], "scenes:validation has 500"),
        (["bench", "nothing"], "No such command 'nothing'"),
    ]
    for arguments, message in cases:
        assert message in error_of(*arguments), arguments
    assert not (tmp_path / "out").exists()


def test_truncated_picture_and_instances(coco_folder: Path, tmp_path: Path) -> None:  # noqa: F811
    content = (coco_folder / "images" / f"{7:012d}.png").read_bytes()
    picture = tmp_path / "cut.png"
    picture.write_bytes(content[: len(content) // 2])
    assert "cut.png: cannot be read as an image" in error_of("caption", picture)
    folder = write_folder(tmp_path / "data", {1: ["dog"]})
    file = folder / "annotations" / "instances.json"
    file.write_text(file.read_text()[:50])
    assert "instances.json: not valid JSON" in error_of("eval", "chair", "--data", folder, "--method", "baseline")


def test_missing_extra_says_what_to_install(coco_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    for library in ("scipy", "simplemma"):
        with monkeypatch.context() as patch:
            patch.setitem(sys.modules, library, None)  # import now fails
            message = error_of("eval", "chair", "--data", coco_folder, "--method", "baseline")
        assert message == f'Error: {library} is not installed, and this needs it: pip install "vlm-attn[evals]"'


def test_debug_shows_where_an_error_comes_from() -> None:
    result = call("--debug", "caption", "no.jpg")
    assert isinstance(result.exception, FileNotFoundError)
    assert "Error:" not in result.stderr
    assert call("caption", "no.jpg").exit_code == 2  # and only in that call


def test_unexpected_errors_are_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli.show, "_open_images", lambda names: 1 / 0)
    assert isinstance(call("caption", "x.jpg").exception, ZeroDivisionError)


def test_mask_draws_and_saves(tmp_path: Path) -> None:
    from PIL import Image

    from vlm_attn.cli import drawing as drawn
    from vlm_attn.kernels import masks

    done = call("mask", "modality-mutual", "--layout", "v2 q1", "--save", tmp_path / "mask.png")
    assert done.exit_code == 0, done.output
    drawing, key = done.stdout.split("\n\n")
    assert drawing.splitlines() == ["  vvq", "v #.#", "v ###", "q ###"]
    assert "# sees, . does not; v visual, q question" in key
    assert f"Written: {tmp_path / 'mask.png'}" in key
    assert call("mask", "mma", "--layout", "v2 q1").stdout == done.stdout.partition("Written")[0]  # the method's name
    left, top, cell = drawn.where(masks.parse_layout("v2 q1")[0])
    with Image.open(tmp_path / "mask.png") as picture:
        pixels = picture.convert("RGB")

    def at(x: float, y: float) -> str:
        return "#" + bytes(pixels.getpixel((int(left + (x + 0.5) * cell), int(top + (y + 0.5) * cell)))).hex()

    cells = [[at(x, y) for x in range(3)] for y in range(3)]
    assert cells == [[drawn.SEES if sign == "#" else drawn.HIDDEN for sign in row] for row in ("#.#", "###", "###")]
    strip = -(0.5 + (4 + drawn.STRIP / 2) / cell)  # beside the cells: the colour of each token's group
    for axis in (lambda n: at(n, strip), lambda n: at(strip, n)):
        assert [axis(n) for n in range(3)] == [drawn.GROUPS[letter] for letter in "vvq"]
    assert "no mask 'mmma'" in error_of("mask", "mmma")
    assert "there is no folder" in error_of("mask", "mma", "--save", tmp_path / "none" / "mask.png")
    assert "layout part 'z1'" in error_of("mask", "causal", "--layout", "z1")
