# SPDX-License-Identifier: Apache-2.0
"""Does it help to train with another mask? `python -m vlm_attn.evals.scenes.variants --out DIR` compares two or more.

Modality-mutual attention (AKI, arXiv 2503.02597) is a trained method: the language model is trained under a causal mask
first, and the mask is changed for instruction tuning and inference. The comparison does the same at its small scale:

1. The common start is the bundled model, trained under the causal mask, or another finished one (`--start`).
2. From there, for every seed and mask, the same number of steps on the same scenes, every turn a row of its own (the
   picture's keys and values hold one question under MMA). A seed decides which scenes; the tower stays frozen.
3. POPE and CHAIR on validation scenes, greedy, with the mask of the training on the prompt. The start is scored under
   every mask, too: what the mask does to a model that was not trained with it.

A stopped run goes on from DIR with the same command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from vlm_attn.evals import runner, tasks
from vlm_attn.evals._extras import require
from vlm_attn.evals.scenes import dataset, model_path, train, world

_OWN_SEED = 0  # of the bundled model: its scenes are not used again


def evaluate(
    model: LlavaForConditionalGeneration, settings: train.Settings, images: int, batch_size: int = 60
) -> dict[str, float]:
    """Return POPE and CHAIR figures in percent on validation scenes, with the mask of `settings` on the prompt.

    Args:
        model: the model.
        settings: its settings.
        images: number of scenes.
        batch_size: questions of one forward.
    """
    scenes = dataset("validation")
    coder = train.Coder(settings.visual_tokens)
    model.eval()
    out: dict[str, float] = {}
    for task in (tasks.pope_task(scenes, limit=images), tasks.chair_task(scenes, limit=images, max_new_tokens=64)):
        length = 3 if task.name == "pope" else task.max_new_tokens
        records = []
        for start in range(0, len(task.samples), batch_size):
            part = task.samples[start : start + batch_size]
            ids = list(dict.fromkeys(s.image_id for s in part))
            pictures = torch.from_numpy(np.stack([train.pixels(world.scene_of(i), settings.image_size) for i in ids]))
            asked = [(ids.index(s.image_id), s.prompt) for s in part]
            said = train.greedy(model, coder, pictures, asked, mask=settings.mask, max_new_tokens=length)
            for sample, tokens in zip(part, said, strict=True):
                answer = str(coder.tokenizer.decode(tokens, skip_special_tokens=True))
                score = task.score(sample, answer)
                records.append({"image_id": sample.image_id, **sample.facts, "answer": answer, "score": score})
        metrics = task.summarise(records)
        if task.name == "pope":
            for split in ("random", "popular", "adversarial"):
                out[f"pope_{split}"] = metrics[split]["accuracy"]["value"]
            out["says_yes"] = metrics["random"]["yes_ratio"]["value"]
        else:
            figures = next(iter(metrics.values()))
            out |= {name: figures[name]["value"] for name in ("chair_s", "chair_i", "recall")}
    return out


def difference(first: Sequence[float], second: Sequence[float]) -> dict[str, Any]:
    """Return the mean of `second - first` over seeds with its 95 % t-interval, and the single differences."""
    gaps = np.subtract(second, first)
    if len(gaps) < 2:
        return {"mean": float(gaps.mean()), "low": None, "high": None, "seeds": gaps.tolist()}
    reach = require("scipy.stats").t.ppf(0.975, len(gaps) - 1) * gaps.std(ddof=1) / len(gaps) ** 0.5
    return {"mean": float(gaps.mean()), "low": gaps.mean() - reach, "high": gaps.mean() + reach, "seeds": gaps.tolist()}


def compare(
    folder: Path,
    names: Sequence[str] = ("causal", "mma"),
    seeds: Sequence[int] = (1, 2, 3),
    *,
    steps: int = 100,
    scenes: int = 12,
    questions: int = 3,
    images: int = 200,
    start: Path | None = None,
    **run: Any,
) -> dict[str, Any]:
    """Train every mask from every seed and compare all with the first.

    Args:
        folder: of checkpoints and figures; finished runs found there are not repeated.
        names: masks, keys of `train.MASKS`.
        seeds: which training scenes.
        steps: language steps of a run.
        scenes: scenes of a step.
        questions: yes/no questions of a scene, beside its caption.
        images: validation scenes.
        start: folder of a finished model; default: the bundled one.
        **run: see `train.run_stage`.

    Returns:
        `start`: figures of the start per mask; `runs`: figures per mask and seed; `settings`: of every run;
        `differences`: per mask and figure, against the first mask.

    Raises:
        ValueError: fewer than two masks, a seed that repeats the bundled model's scenes, or a folder with other runs.
        FileNotFoundError: no finished model in `start`.
    """
    if len(set(names)) < 2:
        raise ValueError("masks: name two or more to compare")
    if _OWN_SEED in seeds:
        raise ValueError(f"seed {_OWN_SEED} is the bundled model's, whose scenes would repeat: choose others")
    begin = start or model_path()

    def finished(name: str, settings: train.Settings, trained: bool = True) -> dict[str, float]:
        file = folder / name / "figures.json"
        config = json.loads(json.dumps(asdict(settings) | {"images": images, "start": begin.name}))
        if file.exists():
            content = json.loads(file.read_text())
            if content["config"] != config:
                raise ValueError(f"{file} holds a run with other settings: choose another folder")
            return content["figures"]
        if trained:
            resume = (folder / name / "checkpoint.pt").exists()
            weights = None if resume else begin
            model = train.train(settings, folder / name, ("language",), resume=resume, start=weights, **run)
        else:
            model = train.build_model(settings)
            train.load_weights(model, begin)
        figures = evaluate(model, settings, images)
        runner.write_json(file, {"config": config, "figures": figures})
        return figures

    def settings(name: str, seed: int) -> train.Settings:
        return train.Settings((1, 1, steps), (1, 1, scenes), questions=questions, seed=seed, mask=name, one_turn=True)

    out: dict[str, Any] = {
        "start": {name: finished(f"start-{name}", settings(name, _OWN_SEED), trained=False) for name in names},
        "runs": {name: {} for name in names},
        "settings": {k: v for k, v in asdict(settings(names[0], seeds[0])).items() if k not in ("mask", "seed")},
    }
    for seed in seeds:
        for name in names:
            out["runs"][name][str(seed)] = finished(f"{name}-{seed}", settings(name, seed))
    first = list(out["runs"][names[0]].values())
    out["differences"] = {
        name: {
            figure: difference([r[figure] for r in first], [r[figure] for r in out["runs"][name].values()])
            for figure in first[0]
        }
        for name in names[1:]
    }
    return out


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line entry."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of checkpoints and figures")
    parser.add_argument(
        "--masks", nargs="+", choices=[m for m in train.MASKS if m != "full"], default=["causal", "mma"]
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[1, 2, 3])
    parser.add_argument("--steps", type=int, default=100, help="language steps of a run")
    parser.add_argument("--images", type=int, default=200, help="validation scenes")
    parser.add_argument("--start", type=Path, metavar="MODEL", help="a finished model in place of the bundled one")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    found = compare(a.out, a.masks, a.seeds, steps=a.steps, images=a.images, start=a.start)
    names = list(next(iter(found["runs"][a.masks[0]].values())))
    print("percent".ljust(14), *(n.rjust(16) for n in names))
    rows = {f"start, {mask}": figures for mask, figures in found["start"].items()}
    rows |= {f"{mask} {seed}": r for mask, runs in found["runs"].items() for seed, r in runs.items()}
    for label, figures in rows.items():
        print(label.ljust(14), *(f"{figures[n]:.1f}".rjust(16) for n in names))
    for mask, gaps in found["differences"].items():
        for n in names:
            gap = gaps[n]
            ends = "" if gap["low"] is None else f" ({gap['low']:+.1f} to {gap['high']:+.1f})"
            print(f"{mask} - {a.masks[0]}, {n}: {gap['mean']:+.1f}{ends}")
    if a.json:
        config = {"masks": a.masks, "seeds": a.seeds, "steps": a.steps, "images": a.images}
        config |= {"world": world.WORLD_VERSION, "start": a.start.name if a.start else "bundled model"}
        content = {"schema_version": 1, "comparison": "masks", "config": config, "versions": runner.versions(), **found}
        runner.write_json(a.json, content)


if __name__ == "__main__":
    main()
