# SPDX-License-Identifier: Apache-2.0
"""Run methods over an evaluation: resumable, one line per sample, one JSON of results.

Batches are cut from the full ordered list of samples, and whole batches are what is written and resumed, so a
resumed run equals a plain one in everything but the ``environment`` field (time, host). Under ``torchrun`` or ``accelerate
launch`` every process takes every n-th batch and the first one writes, in the order of the list.

A results folder holds

* ``samples.jsonl``: one line per sample and method: ``method``, ``sample`` (place in the list), ``image_id``,
  ``answer``, ``score`` and facts of the sample; lines are flushed to disk batch by batch. A sample whose picture cannot be
  read has ``skipped``, the reason, in place of answer and score; it is counted in ``counts`` and is in no figure;
* ``results.json``: ``schema_version, status, eval, config, versions, device, seed, prompt, image_ids_sha256,
  parser, counts, metrics, environment``; metrics are ``{"value", "low", "high"}`` with 95 % intervals,
  percentages in percent;
  ``environment.speed`` holds, per method, samples, tokens and seconds of generation but for the first batch, which warms up;
* ``image_ids.txt``: the images, one id per line, as ``--ids`` takes them;
* ``.lock``: held while a run writes here.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlm_attn.evals.models import weights_hash
from vlm_attn.evals.processes import Processes
from vlm_attn.evals.prompts import denoising, generate
from vlm_attn.evals.reading import read_json
from vlm_attn.evals.samples import check_record, check_results, read_records
from vlm_attn.evals.specs import MethodSpec
from vlm_attn.evals.tasks import Task, image_ids_hash

SCHEMA_VERSION = 1
# Beside "config" in a results file, not in it; a run that is resumed has to agree on them as well.
TOP_LEVEL = ("device", "seed", "prompt", "image_ids_sha256", "parser")
SCENES_NOTE = "These numbers come from the scenes world of this package, not from COCO."


def write_json(path: str | Path, content: Any) -> None:
    """Write a JSON file whole or not at all: to a temporary file beside it, then rename.

    Raises:
        OSError: the folder cannot be made or written to.
    """
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    write_text(path, text)


def write_text(path: str | Path, text: str) -> None:
    """Write a text file whole or not at all; see `write_json`."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        # Half a character (a lone surrogate) becomes its escape, which is how JSON writes it.
        with open(temporary, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@functools.cache
def versions() -> dict[str, str]:
    """Versions of what decides about the numbers."""
    from importlib.metadata import version

    names = ("vlm-attn", "torch", "transformers", "numpy", "pillow")
    return {"python": platform.python_version()} | {name: version(name) for name in names}


class _Store:
    """The results folder: what is finished, and how more is added. Without a folder: a list in memory."""

    def __init__(self, folder: Path | None) -> None:
        self.folder = folder
        self.records: list[dict[str, Any]] = []
        self.speed: dict[str, dict[str, Any]] = {}

    def lock(self) -> contextlib.AbstractContextManager[Any]:
        """Keep other runs out of the folder; the system lets go of it when this process ends, however it ends.

        A finished run needs no lock where nothing can be written: it is only read.

        Raises:
            ValueError: another run is writing there.
            OSError: nothing can be written there, and the run is not finished.
        """
        if self.folder is None:
            return contextlib.nullcontext()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            return FileLock(self.folder / ".lock").acquire(timeout=0)
        except Timeout as error:
            if os.access(self.folder, os.W_OK):
                raise ValueError(
                    f"{self.folder}: another run is writing there; wait for it, or choose another --out"
                ) from error
            reason = "not writable"
        except OSError as error:
            reason = error.strerror or str(error)
        results = self.folder / "results.json"
        content = read_json(results) if results.is_file() else None
        if isinstance(content, dict) and content.get("status") == "complete":
            return contextlib.nullcontext()
        raise OSError(f"{self.folder}: cannot be written ({reason}); choose another --out")

    def resume(self, config: Mapping[str, Any], expected: Sequence[tuple[str, int, int]], batch: Sequence[int]) -> None:
        """Load what an earlier run with the same config finished.

        Args:
            config: of this run.
            expected: (method, sample, image id) of every line of a complete run, in order.
            batch: for every prefix length that is a whole number of batches, that length.

        Raises:
            ValueError: the folder holds another run, or is damaged.
        """
        if self.folder is None:
            return
        results, samples = self.folder / "results.json", self.folder / "samples.jsonl"
        if not results.exists():
            if samples.exists():
                raise ValueError(f"{self.folder}: has samples.jsonl but no results.json; choose another --out")
            return
        try:
            content = check_results(results, read_json(results), TOP_LEVEL)
        except ValueError as error:
            raise ValueError(f"{error}; choose another --out") from error
        earlier = {**content["config"], **{key: content[key] for key in TOP_LEVEL}}
        wanted = json.loads(json.dumps(dict(config)))
        changed = [key for key in {**wanted, **earlier} if earlier.get(key) != wanted.get(key)]
        if changed:
            # A hash says little to a reader: named only where nothing else differs.
            telling = [key for key in changed if key not in ("weights", "image_ids_sha256")] or changed
            differences = ", ".join(f"{k}: {_short(earlier.get(k))}, now {_short(wanted.get(k))}" for k in telling)
            raise ValueError(f"{self.folder} holds another run ({differences}); choose another --out")
        records = read_records(samples)
        for place, record in enumerate(records):
            where = f"{samples}, line {place + 1}"
            if place >= len(expected) or (record["method"], record["sample"]) != expected[place][:2]:
                raise ValueError(f"{where}: not of this run; choose another --out")
            check_record(where, content["eval"], record)
            if record["image_id"] != expected[place][2]:
                raise ValueError(
                    f"{where}: is about image {record['image_id']}, sample {record['sample']} of this run is image "
                    f"{expected[place][2]}; choose another --out"
                )
        self.speed = content.get("environment", {}).get("speed", {})
        whole = max(size for size in batch if size <= len(records))
        self.records = records[:whole]
        text = "".join(_line(record) for record in self.records)
        if samples.exists() and samples.read_text(encoding="utf-8", errors="replace") != text:
            write_text(samples, text)

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Add the records of a finished batch, on disk before this returns."""
        if self.folder is not None:
            file = self.folder / "samples.jsonl"
            try:
                with open(file, "a", encoding="utf-8", errors="backslashreplace") as lines:
                    lines.write("".join(_line(record) for record in records))
                    lines.flush()
                    os.fsync(lines.fileno())
            except OSError as error:
                raise OSError(
                    f"{file}: cannot be written ({error.strerror}); what is finished is kept, and the same command goes on "
                    "from there when it can be"
                ) from error
        self.records.extend(records)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _line(record: dict[str, Any]) -> str:
    return json.dumps(record, ensure_ascii=False) + "\n"


def run(
    task: Task,
    specs: Sequence[MethodSpec],
    model: Any,
    processor: Any,
    *,
    model_name: str,
    seed: int = 0,
    batch_size: int = 8,
    out: str | Path | None = None,
    denoise: dict[str, Any] | None = None,
    progress: Callable[[str, int], None] | None = None,
) -> dict[str, Any]:
    """Evaluate every method on a task and return the content of ``results.json``.

    Ctrl-C ends the run early: what is finished is scored, written and returned with status ``interrupted``.
    The same call later goes on where it stopped. In several processes (`Processes`) the first one gets the results,
    the others only their status. A picture that cannot be read is skipped and counted, unless none of the first batch can.

    Args:
        task: from `vlm_attn.evals.tasks`.
        specs: the methods, each one a run over all samples.
        model: the plain model; it is patched for each run and given back as it was.
        processor: the model's.
        model_name: what results call it.
        seed: recorded; the task has already used it.
        batch_size: rows of one ``generate`` call.
        out: results folder, made if needed; None: nothing is written.
        denoise: how a masked-diffusion model writes, from `vlm_attn.evals.prompts.denoising`; default: its defaults.
        progress: called with (method label, number of samples just finished), at first with what an earlier
            run had finished.

    Raises:
        ValueError: ``out`` holds a run with another config, or another run is writing there.
        ValueError, TypeError, NotImplementedError: a method cannot be applied to this model; before any run.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size}: expected at least 1")
    denoise = denoise or denoising(model, {})
    if denoise is not None:
        for spec in specs:
            with spec.applied(model, processor):
                denoising(model, denoise)  # refuses what cannot go together
    config = {
        "eval": task.name,
        "model": model_name,
        "weights": weights_hash(model),
        "device": model.device.type,
        "dtype": str(model.dtype).removeprefix("torch."),
        "methods": {spec.label: spec.describe(model, processor) for spec in specs},
        "data": task.dataset.name,
        "images": len(task.image_ids),
        "image_ids_sha256": image_ids_hash(task.image_ids),
        "seed": seed,
        "batch_size": batch_size,
        "max_new_tokens": task.max_new_tokens,
        "decoding": "greedy" if denoise is None else {"masked diffusion": denoise},
        **task.config,
    }
    processes = Processes()
    store = _Store(Path(out) if out is not None else None)
    with contextlib.ExitStack() as held:
        processes.on_first(lambda: held.enter_context(store.lock()) and None)
        return _run(task, specs, model, processor, config, processes, store, batch_size, progress, denoise)


def _run(
    task: Task,
    specs: Sequence[MethodSpec],
    model: Any,
    processor: Any,
    config: Mapping[str, Any],
    processes: Processes,
    store: _Store,
    batch_size: int,
    progress: Callable[[str, int], None] | None,
    denoise: dict[str, Any] | None,
) -> dict[str, Any]:
    folder = store.folder
    size = len(task.samples)
    starts = range(0, size, batch_size)
    expected = [(spec.label, place, sample.image_id) for spec in specs for place, sample in enumerate(task.samples)]
    whole = [
        row * size + end
        for row in range(len(specs))
        for end in [0, *(min(start + batch_size, size) for start in starts)]
    ]

    def begin() -> int:
        store.resume(config, expected, whole)
        return len(store.records)

    finished_before = processes.on_first(begin)
    clock = time.perf_counter()
    started = datetime.now(UTC).isoformat(timespec="seconds")
    speed = store.speed

    def results(status: str) -> dict[str, Any]:
        finished = {s.label: [r for r in store.records if r["method"] == s.label] for s in specs}
        answered = {label: [r for r in rows if "skipped" not in r] for label, rows in finished.items()}
        skipped = {r["sample"]: r for r in store.records if "skipped" in r}
        content = {
            "schema_version": SCHEMA_VERSION,
            "status": status,
            "eval": task.name,
            "config": {key: value for key, value in config.items() if key not in TOP_LEVEL},
            "versions": versions(),
            **{key: config[key] for key in TOP_LEVEL},
            "counts": {
                "samples": size,
                "finished": {k: len(v) for k, v in finished.items()},
                "skipped": len(skipped),
                "empty": sum(not r["answer"].strip() for rows in answered.values() for r in rows),
            },
            "metrics": {label: task.summarise(rows) for label, rows in answered.items() if rows},
            "environment": {
                "started": started,
                "seconds": round(time.perf_counter() - clock, 3),
                "speed": speed,
                "processes": processes.count,
                "platform": platform.platform(),
                "device": _device_name(model),
            },
        }
        if skipped:
            content["skipped_images"] = {r["image_id"]: r["skipped"] for r in skipped.values()}
        if task.dataset.name.startswith("scenes:"):
            content["note"] = SCENES_NOTE
        if folder is not None:
            # A failure has been reported already, and what was finished before needs no writing: a full or read-only disk.
            left = status == "failed" or finished_before == len(expected)
            with contextlib.suppress(*((OSError,) if left else ())):
                write_json(folder / "results.json", content)
        return content

    if processes.first and finished_before < len(expected) and folder is not None:
        write_text(folder / "image_ids.txt", "".join(f"{image}\n" for image in task.image_ids))
        results("running")
    status = "failed"
    load_image = functools.lru_cache(maxsize=2 * batch_size)(task.dataset.load_image)

    def attempt(spec: MethodSpec, starts: Sequence[int]) -> tuple[list[dict[str, Any]], int, float, Exception | None]:
        """Records, tokens and seconds of generation of the batches that begin at ``starts``.

        An error is handed on, so that all processes end.
        """
        records: list[dict[str, Any]] = []
        tokens, seconds = 0, 0.0
        try:
            for start in starts:
                batch = task.samples[start : start + batch_size]
                opened = [_opened(load_image, sample.image_id) for sample in batch]
                broken = [picture for picture in opened if isinstance(picture, Exception)]
                if start == 0 and len(broken) == len(batch):
                    raise broken[0]  # not single pictures: the folder is wrong
                there = [(s, p) for s, p in zip(batch, opened, strict=True) if not isinstance(p, Exception)]
                answers: list[str] = []
                if there:
                    begun = time.perf_counter()
                    answers, count = generate(
                        model,
                        processor,
                        [p for _, p in there],
                        [s.prompt for s, _ in there],
                        task.max_new_tokens,
                        denoise,
                    )
                    tokens, seconds = tokens + count, seconds + time.perf_counter() - begun
                written = iter(answers)
                for offset, (sample, picture) in enumerate(zip(batch, opened, strict=True)):
                    record = {
                        "method": spec.label,
                        "sample": start + offset,
                        "image_id": sample.image_id,
                        **sample.facts,
                    }
                    if isinstance(picture, Exception):
                        records.append(record | {"skipped": str(picture)})
                    else:
                        answer = next(written)
                        records.append(record | {"answer": answer, "score": task.score(sample, answer)})
        except Exception as error:
            return [], tokens, seconds, error
        return records, tokens, seconds, None

    try:
        for row, spec in enumerate(specs):
            done = min(max(finished_before - row * size, 0), size)
            if progress is not None:
                progress(spec.label, done)
            if done == size:
                continue
            starts_left = range(done, size, batch_size)
            with spec.applied(model, processor):
                measured = speed.setdefault(spec.label, {"samples": 0, "tokens": 0, "seconds": 0.0})
                for turn in range(0, len(starts_left), processes.count):
                    mine = starts_left[turn + processes.rank :][:1]
                    gathered = processes.gather(attempt(spec, mine))
                    # The first turn also warms up: it is timed only where it is the only one.
                    timed = turn > 0 or len(starts_left) <= processes.count
                    measured["seconds"] += timed * max(seconds for *_, seconds, _ in gathered)
                    for records, count, _, error in gathered:
                        if error is not None:
                            raise error
                        if not records:  # the last turn may have fewer batches than there are processes
                            continue
                        if processes.first:
                            store.append(records)
                        measured["samples"] += timed * len(records)
                        measured["tokens"] += timed * count
                        if progress is not None:
                            progress(spec.label, len(records))
        status = "complete"
    except KeyboardInterrupt:
        status = "interrupted"
    finally:
        # Also after an error: what is finished stays readable, and the same command can go on.
        content = results(status) if processes.first else {"status": status}
    return content


def _opened(load_image: Callable[[int], Any], image_id: int) -> Any:
    """The picture, or why it cannot be read."""
    try:
        return load_image(image_id)
    except (OSError, ValueError) as error:
        return error


def _device_name(model: Any) -> str:
    import torch

    if model.device.type == "cuda":
        return torch.cuda.get_device_name(model.device)
    return f"{model.device.type} ({torch.get_num_threads()} threads)"
