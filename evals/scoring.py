"""Score captions that exist already: no model, no pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlm_attn.evals import chair
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.runner import SCHEMA_VERSION, versions
from vlm_attn.evals.tasks import image_ids_hash


def score_chair(
    captions: str | Path, data: str | Path, *, split: str | None = None, variant: str | None = None
) -> dict[str, Any]:
    """CHAIR of a file of captions.

    Args:
        captions: JSON lines with ``image_id`` and ``caption``.
        data: folder with COCO annotations.
        split: see `CocoDataset.from_folder`.
        variant: ``instances`` or ``instances+captions``; default: `chair.default_variant`.

    Returns:
        The fields of a results file, with every caption's score under ``samples``. Captions of images that
        are not in the data are counted in ``counts["skipped"]``.

    Raises:
        FileNotFoundError, ValueError: a file that is missing or malformed, no caption about an image of the
            data, or ``instances+captions`` without reference captions.
    """
    for library in ("scipy", "simplemma"):
        require(library)
    dataset = CocoDataset.from_folder(data, split)
    records = chair.read_captions(captions)
    known = set(dataset.image_ids)
    kept = [record for record in records if record["image_id"] in known]
    if not kept:
        raise ValueError(f"{captions}: none of its {len(records)} captions is about an image of {dataset.name}")
    variant = variant or chair.default_variant(dataset)
    if variant == "instances+captions" and not dataset.captions:
        raise ValueError(f"{data}: has no reference captions; use --variant instances")
    vocabulary = chair.coco_vocabulary()
    samples = [
        {
            "image_id": record["image_id"],
            "answer": record["caption"],
            "score": vocabulary.score(record["caption"], vocabulary.truth(dataset, record["image_id"], variant)),
        }
        for record in kept
    ]
    label = Path(captions).stem
    ids = [record["image_id"] for record in kept]
    return {
        "schema_version": SCHEMA_VERSION,
        "status": "complete",
        "eval": "chair",
        "config": {
            "model": label,
            "data": dataset.name,
            "variant": variant,
            "images": len(ids),
        },
        "versions": versions(),
        "image_ids_sha256": image_ids_hash(ids),
        "parser": "coco_objects",
        "counts": {
            "samples": len(kept),
            "finished": {label: len(kept)},
            "skipped": len(records) - len(kept),
            "empty": sum(not record["caption"].strip() for record in kept),
        },
        "metrics": {label: {variant: chair.summarise([sample["score"] for sample in samples])}},
        "samples": samples,
    }
