"""Does it help to train with another mask? `python -m vlm_attn.evals.scenes.variants --out DIR` compares two or more.

Modality-mutual attention (AKI, arXiv 2503.02597) is a trained method: the language model learns under a causal mask
first, and the mask is changed for instruction tuning and inference. The comparison does the same at its small scale:

1. One common start: the tower of the bundled model, a new projector and new word embeddings aligned with it, and a new
   language model trained for a while under the causal mask.
2. From there, for every seed and mask, the same number of steps on the same scenes, every turn a row of its own (the
   picture's keys and values hold one question under MMA). A seed decides which scenes; the tower stays frozen.
3. POPE and CHAIR on validation scenes, greedy, with the mask of the training on the prompt.

A stopped run goes on from DIR with the same command.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlavaForConditionalGeneration

from vlm_attn.evals import runner, tasks
from vlm_attn.evals._extras import require
from vlm_attn.evals.scenes import dataset, model_path, train, world

# Of the start; 150 x 128 and 600 x 32 scenes.
START = train.Settings(steps=(1, 150, 600), seed=1)


def make_start(folder: Path, settings: train.Settings = START, **run: Any) -> Path:
    """Train the common start in `folder`, or go on with it, and return its finished model.

    `run`: see `train.run_stage`.
    """
    finished = folder / "model"
    if not (finished / "config.json").exists():
        resume = (folder / "checkpoint.pt").exists()
        if not resume:
            folder.mkdir(parents=True, exist_ok=True)
            model = train.build_model(settings)
            bundled = LlavaForConditionalGeneration.from_pretrained(model_path())
            model.model.vision_tower.load_state_dict(bundled.model.vision_tower.state_dict())
            state = {"stage": "tower", "step": 1, "settings": asdict(settings), "model": model.state_dict()}
            train.save(folder / "checkpoint.pt", state)
        # Not resuming, "align" begins at its step 0 with the checkpoint's weights.
        train.export(train.train(settings, folder, ("align", "language"), resume=resume, **run), settings, finished)
    return finished


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
                answer = coder.tokenizer.decode(tokens, skip_special_tokens=True)
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
    seeds: Sequence[int] = (2, 3, 4),
    *,
    steps: int = 300,
    scenes: int = 16,
    questions: int = 3,
    images: int = 500,
    start: train.Settings = START,
    **run: Any,
) -> dict[str, Any]:
    """Train every mask from every seed and compare all with the first.

    Args:
        folder: of checkpoints and results; finished runs found there are not repeated.
        names: masks, keys of `train.MASKS`.
        seeds: which training scenes; not the start's own.
        steps: language steps of a run.
        scenes: scenes of a step.
        questions: yes/no questions of a scene, beside its caption.
        images: validation scenes.
        start: settings of the common start.
        **run: see `train.run_stage`.

    Returns:
        `start`: figures of the common start; `runs`: figures per mask and seed; `differences`: per mask and figure,
        against the first mask.

    Raises:
        ValueError: a seed is the start's, so that scenes would repeat.
    """
    if start.seed in seeds:
        raise ValueError(f"seed {start.seed} is the start's: choose others")
    if len(names) < 2:
        raise ValueError("masks: name two or more to compare")
    model_folder = make_start(folder / "start", start, **run)

    def finished(name: str, settings: train.Settings) -> dict[str, float]:
        file = folder / name / "figures.json"
        config = json.loads(json.dumps(asdict(settings) | {"images": images}))
        if file.exists():
            content = json.loads(file.read_text())
            if content["config"] != config:
                raise ValueError(f"{file} holds a run with other settings: choose another folder")
            return content["figures"]
        if name == "start":
            model = LlavaForConditionalGeneration.from_pretrained(model_folder)
        else:
            resume = (folder / name / "checkpoint.pt").exists()
            begin = None if resume else model_folder
            model = train.train(settings, folder / name, ("language",), resume=resume, start=begin, **run)
        figures = evaluate(model, settings, images)
        runner.write_json(file, {"config": config, "figures": figures})
        return figures

    out: dict[str, Any] = {"start": finished("start", start), "runs": {name: {} for name in names}}
    for seed in seeds:
        for name in names:
            settings = replace(
                start,
                steps=(1, 1, steps),
                batch=(1, 1, scenes),
                questions=questions,
                seed=seed,
                mask=name,
                one_turn=True,
            )
            out["runs"][name][str(seed)] = finished(f"{name}-{seed}", settings)
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
    parser.add_argument("--masks", nargs="+", choices=tuple(train.MASKS), default=["causal", "mma"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[2, 3, 4])
    parser.add_argument("--steps", type=int, default=300, help="language steps of a run")
    parser.add_argument("--images", type=int, default=500, help="validation scenes")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the comparison here")
    parser.add_argument("--threads", type=int, default=0, help="torch threads (default: torch's own)")
    a = parser.parse_args(arguments)
    if a.threads:
        torch.set_num_threads(a.threads)
    found = compare(a.out, a.masks, a.seeds, steps=a.steps, images=a.images)
    names = list(next(iter(found["runs"][a.masks[0]].values())))
    print("percent".ljust(14), *(n.rjust(16) for n in names))
    rows = {"start": found["start"]}
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
        config |= {"world": world.WORLD_VERSION, "start": {"steps": START.steps, "seed": START.seed}}
        content = {"schema_version": 1, "comparison": "masks", "config": config, "versions": runner.versions(), **found}
        runner.write_json(a.json, content)


if __name__ == "__main__":
    main()
