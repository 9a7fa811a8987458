# SPDX-License-Identifier: Apache-2.0
"""What every method does to one model: settings are searched on one split, then every method is scored once on another.

    vlm-attn experiment --out runs/effect

Three stages, each resumable, each in folders of its own below ``--out``:

* ``search/METHOD``: CHAIR of every setting of :data:`GRIDS` on some images of the search split. One is chosen by the rule
  of ``vlm-attn calibrate``: the lowest CHAIR_I among those that keep the plain model's recall to a point, else the
  highest recall.
* ``test/METHOD/chair`` and ``pope``: the chosen setting on the test split, in the format of ``vlm-attn eval``, so that
  ``vlm-attn report`` reads them. No choice is made after this.
* the time of a batch of captions over that of the plain model, alternating in one process.

What was searched, chosen and timed is in ``settings.json``.
"""

from __future__ import annotations

import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vlm_attn.evals import runner
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.prompts import generate
from vlm_attn.evals.specs import BASELINE, MethodSpec, unknown
from vlm_attn.evals.tasks import Task, chair_task, pope_task

#: Per run the values that are tried of each parameter, in all combinations; none: the defaults, or the preset's constants.
#: Constants that belong to a checkpoint (layers, sink dimensions) come from its preset.
GRIDS: dict[str, dict[str, Sequence[Any]]] = {
    "gift": {"gift.alpha": (1.0, 3.0, 5.0)},
    "var": {"var.tau": (3.5, 20.0), "var.p": (0.3, 0.6)},
    "vhr": {"vhr.alpha": (1.5, 2.0, 3.0)},
    "pai": {"pai.alpha": (0.1, 0.2, 0.5)},
    "paint": {"paint.alpha": (0.1, 0.3, 0.7), "paint.beta": (0.1, 0.3)},
    "vaf": {"vaf.visual": (1.05, 1.15, 1.3), "vaf.system": (0.8, 0.95)},
    "head_guided": {"head_guided.alpha": (0.25, 0.5, 1.0)},
    "ilvad": {"ilvad.alpha": (1.0, 3.0, 5.0), "ilvad.beta": (0.5, 1.0)},
    "vcd": {"vcd.alpha": (0.5, 1.0), "vcd.noise_step": (300, 500, 999)},
    "icd": {"icd.alpha": (0.25, 0.5, 1.0)},
    "guidance": {"guidance.gamma": (1.1, 1.5, 2.0)},
    "pai+guidance": {"pai.alpha": (0.1, 0.2), "guidance.gamma": (1.1, 1.5)},
    "agla": {"agla.alpha": (1.0, 2.0), "agla.keep": (0.5, 0.75)},
    "dola": {"dola.layers": ("low", "high")},
    "opera": {"opera.weight": (0.5, 1.0)},
    "mvp": {},
    "mma": {},
    "bidirectional": {},
    "croc": {},
    "vision_block": {},
    "prefix_lm": {},
}
NO_CAPTIONS = ("mvp",)  # answers closed questions only

Done = Callable[[str, int, int], None]  # (what, samples finished now, samples in all)


def settings(label: str) -> list[MethodSpec]:
    """All settings of a run's grid.

    Raises:
        ValueError: no grid of that name.
    """
    if label not in GRIDS:
        raise unknown("run", label, list(GRIDS))
    names = tuple(label.split("+"))
    specs = []
    for values in itertools.product(*GRIDS[label].values()):
        params: dict[str, dict[str, Any]] = {}
        for key, value in zip(GRIDS[label], values, strict=True):
            method, _, parameter = key.partition(".")
            params.setdefault(method, {})[parameter] = value
        chosen = ", ".join(f"{key}={value}" for key, value in zip(GRIDS[label], values, strict=True))
        specs.append(MethodSpec(chosen or label, names, params))
    return specs


def _run(
    model: Any, processor: Any, task: Task, specs: Sequence[MethodSpec], out: Path, done: Done, **options: Any
) -> dict[str, Any]:
    """`runner.run` with a progress report for the whole folder.

    Raises:
        KeyboardInterrupt: it was interrupted; what is finished is kept.
    """
    total, what = len(specs) * len(task.samples), "/".join(out.parts[-3 if task.name == out.name else -2 :])
    results = runner.run(
        task, specs, model, processor, out=out, progress=lambda _, count: done(what, count, total), **options
    )
    if results["status"] != "complete":
        raise KeyboardInterrupt
    return results


def search(
    model: Any, processor: Any, label: str, task: Task, out: Path, done: Done, **options: Any
) -> tuple[MethodSpec, dict[str, Any]]:
    """Try a run's settings by CHAIR and choose one.

    Args:
        model: an unpatched model.
        processor: its processor.
        label: of :data:`GRIDS`.
        task: captions of the images to search on.
        out: folder below which ``baseline`` and the run have theirs.
        done: progress.
        **options: of `runner.run`.

    Returns:
        The chosen spec, under the run's label, and ``{"searched", "settings"}``: how many, and their figures in percent.
    """
    from vlm_attn.evals.calibrate import choose

    grid = settings(label)
    if len(grid) > 1:
        tried = {
            spec_label: next(iter(groups.values()))
            for specs, folder in (([MethodSpec(BASELINE)], BASELINE), (grid, label))
            for spec_label, groups in _run(model, processor, task, specs, out / folder, done, **options)[
                "metrics"
            ].items()
        }
        best = choose(tried, [spec.label for spec in grid])
        figures = {
            name: {key: row[key]["value"] for key in ("chair_s", "chair_i", "recall")} for name, row in tried.items()
        }
    else:
        best, figures = grid[0].label, {}
    spec = next(spec for spec in grid if spec.label == best)
    return MethodSpec(label, spec.names, spec.params), {
        "searched": len(grid),
        "chosen": spec.params,
        "settings": figures,
    }


def latency(
    model: Any, processor: Any, spec: MethodSpec, task: Task, *, images: int = 8, pairs: int = 7
) -> dict[str, float]:
    """What a batch of captions costs under a method, against the plain model, one after the other.

    Args:
        model: an unpatched model.
        processor: its processor.
        spec: the method.
        task: captions.
        images: captions of a batch.
        pairs: repetitions; a first one warms up and does not count.

    Returns:
        ``latency``: the median over pairs of time per caption over the plain model's; ``low`` and ``high``, the 20 % and 80 %
        quantiles. On one CPU thread it is processor time, which other work on the machine does not change.
    """
    import torch

    clock = time.process_time if model.device.type == "cpu" and torch.get_num_threads() == 1 else time.perf_counter
    samples = task.samples[:images]
    pictures = [task.dataset.load_image(sample.image_id) for sample in samples]
    prompts = [sample.prompt for sample in samples]

    def once(run: MethodSpec) -> float:
        with run.applied(model, processor):
            begun = clock()
            # Its answers are on the CPU, so the device is done.
            generate(model, processor, pictures, prompts, task.max_new_tokens)
            return clock() - begun

    ratios = [once(spec) / once(MethodSpec(BASELINE)) for _ in range(pairs + 1)][1:]
    low, *_, high = statistics.quantiles(ratios, n=5, method="inclusive") if len(ratios) > 1 else (ratios[0], ratios[0])
    return {"latency": statistics.median(ratios), "low": low, "high": high}


def experiment(
    model: Any,
    processor: Any,
    labels: Sequence[str],
    *,
    model_name: str,
    searched_on: CocoDataset,
    tested_on: CocoDataset,
    out: Path,
    search_images: int = 150,
    limit: int | None = None,
    max_new_tokens: int = 512,
    batch_size: int = 32,
    done: Done = lambda what, count, total: None,
) -> dict[str, Any]:
    """All stages of all runs, the plain model's among them.

    Args:
        model: an unpatched model.
        processor: its processor.
        labels: of :data:`GRIDS`.
        model_name: what results call the model.
        searched_on: images for choosing settings.
        tested_on: images for the figures.
        out: folder of everything; stages that are finished there are not run again.
        search_images: how many of the first.
        limit: how many of the second (default: the protocols' 500).
        max_new_tokens: length limit of a caption.
        batch_size: rows of a step.
        done: progress.

    Returns:
        label -> what was searched and chosen, and the latency ratio; also in ``out/settings.json``.

    Raises:
        ValueError: an unknown run, one split for both, or ``out`` holds another experiment.
        KeyboardInterrupt: it was interrupted; the same call goes on from there.
    """
    for label in labels:
        settings(label)
    if searched_on.name == tested_on.name:
        raise ValueError(f"settings cannot be searched and tested on the same images ({tested_on.name})")
    options: dict[str, Any] = {"model_name": model_name, "batch_size": batch_size}
    file = out / "settings.json"
    known: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    tasks = [chair_task(tested_on, limit=limit, max_new_tokens=max_new_tokens), pope_task(tested_on, limit=limit)]

    looked_at = chair_task(searched_on, limit=search_images, max_new_tokens=max_new_tokens)

    def test(spec: MethodSpec) -> None:
        for task in tasks:
            if not (task.name == "chair" and spec.label in NO_CAPTIONS):
                _run(model, processor, task, [spec], out / "test" / spec.label / task.name, done, **options)

    test(MethodSpec(BASELINE))
    for label in labels:
        spec, found = search(model, processor, label, looked_at, out / "search", done, **options)
        if label in known and known[label]["chosen"] != json.loads(json.dumps(spec.params)):
            raise ValueError(f"{file}: {label} was tested with {known[label]['chosen']}; choose another --out")
        test(spec)
        if label not in known:
            speed = {} if label in NO_CAPTIONS else latency(model, processor, spec, looked_at)
            known[label] = {**found, **speed}
            runner.write_json(file, known)
    return known
