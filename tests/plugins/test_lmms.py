# SPDX-License-Identifier: Apache-2.0
"""lmms-eval finds the plugin and runs a task with a patched model; the answers are those of generate()."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest

from vlm_attn.evals import prompts, scenes
from vlm_attn.evals.models import load_model
from vlm_attn.evals.specs import parse_specs

pytest.importorskip("lmms_eval", reason="the lmms extra (lmms-eval) is not installed")
ASKED = "Please describe this image in detail."
SCENES = (3, 8, 2)
TASK = """
task: drawn
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: generate_until
doc_to_visual: !function drawn_utils.visual
doc_to_text: !function drawn_utils.text
doc_to_target: answer
process_results: !function drawn_utils.results
generation_kwargs: {{max_new_tokens: 40, temperature: 0, until: [","]}}
metric_list:
  - metric: same
    aggregation: mean
    higher_is_better: true
"""
UTILS = """
from vlm_attn.evals import scenes
def visual(doc):
    return [scenes.render(scenes.scene("validation", doc["scene"]))]
def text(doc):
    return doc["question"]
def results(doc, results):
    return {"same": float(results[0] == doc["answer"])}
"""


@pytest.fixture(scope="module")
def models() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what other packages say when they are imported
        return pytest.importorskip("lmms_eval.models", reason="a library that lmms-eval needs is not installed")


def expected(label: str, params: list[str]) -> list[str]:
    """The first part of the captions, up to a comma, as this package makes them."""
    model, processor = load_model("scenes", "cpu")
    (spec,) = parse_specs([label], params)
    pictures = [scenes.render(scenes.scene("validation", number)) for number in SCENES]
    with spec.applied(model, processor):
        answers, _ = prompts.generate(model, processor, pictures, [ASKED] * len(SCENES), 40)
    return [answer.split(",")[0] for answer in answers]


def test_registered(models: Any) -> None:
    assert "vlm_attn" in models.list_available_models()
    assert models.get_model("vlm_attn").is_simple is False


def test_runs_a_task(models: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lmms_eval import evaluator
    from lmms_eval.tasks import TaskManager

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    answers = expected("gift", ["gift.alpha=12"])
    assert answers != expected("baseline", [])  # else it would show nothing
    data = tmp_path / "data.jsonl"
    rows = [{"scene": n, "question": ASKED, "answer": a} for n, a in zip(SCENES, answers, strict=True)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "tasks"
    folder.mkdir()
    (folder / "drawn.yaml").write_text(TASK.format(data=data))
    (folder / "drawn_utils.py").write_text(UTILS)
    found = evaluator.simple_evaluate(
        model="vlm_attn",
        model_args="pretrained=scenes,method=gift,gift.alpha=12",
        tasks=["drawn"],
        task_manager=TaskManager(include_path=str(folder)),
        batch_size=2,
        device="cpu",
        bootstrap_iters=0,
    )
    assert found["results"]["drawn"]["same,none"] == 1.0
    assert [sample["filtered_resps"] for sample in found["samples"]["drawn"]] == [[answer] for answer in answers]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=gfit", "did you mean 'gift'"),
        ("method=gift,gift.alpha=99", "alpha=99 is outside"),
        ("method=gift,depth=3", "METHOD.PARAMETER=VALUE"),
        ("pretrained=scenes-diffusion,method=baseline", "use vlm-attn eval"),
    ],
)
def test_wrong_arguments(models: Any, arguments: str, message: str) -> None:
    with pytest.raises((ValueError, NotImplementedError), match=message):
        models.get_model("vlm_attn").create_from_arg_string(arguments, {"batch_size": 1, "device": "cpu"})
