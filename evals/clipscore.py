# SPDX-License-Identifier: Apache-2.0
"""CLIPScore: how well a caption fits its picture, by a CLIP model.

A check that fewer inventions are not bought with worse captions.

Hessel et al., 2021, "CLIPScore: A Reference-free Evaluation Metric for Image Captioning" (arXiv 2104.08718):

* ``CLIP-S(c, v) = 2.5 max(cos(E_c, E_v), 0)``, with "A photo depicts" in front of the caption;
* ``RefCLIP-S`` = the harmonic mean of CLIP-S and ``max(max_r cos(E_c, E_r), 0)`` over the reference captions r.

The published figures are of OpenAI's ViT-B/32. CLIP reads 77 tokens: of a longer caption only the beginning is scored, and such
captions are counted.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from vlm_attn import clip
from vlm_attn.evals._extras import require
from vlm_attn.evals.coco import CocoDataset
from vlm_attn.evals.stats import Metric, ratio

PREFIX = "A photo depicts "
WEIGHT = 2.5


def clip_scores(
    name: str, dataset: CocoDataset, captions: Sequence[Mapping[str, Any]], *, device: str = "cpu", batch_size: int = 32
) -> list[dict[str, Any]]:
    """CLIPScore of every caption.

    Args:
        name: a CLIP model of open_clip, ``architecture:weights``; weights are one of its names, or a file.
        dataset: pictures and reference captions.
        captions: records with ``image_id`` and ``caption``.
        device: where CLIP runs.
        batch_size: pictures per forward.

    Returns:
        per caption ``clip_score``, ``ref_clip_score`` (None where there is no reference caption) and ``cut``, whether CLIP read
        only its beginning.

    Raises:
        ImportError, ValueError, NotImplementedError: see `vlm_attn.clip.load`; a picture that cannot be read.
    """
    clip.check_clip("CLIPScore", name)
    open_clip = require("open_clip", "clip")
    model, tokenizer = clip.load(name)
    model.to(device)
    tower = model.visual
    prepare = open_clip.image_transform(tower.image_size, is_train=False, mean=tower.image_mean, std=tower.image_std)

    def texts(lines: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Unit vectors ``[n, d]``, and which of the texts fill CLIP's length ``[n]``."""
        tokens = tokenizer([PREFIX + line for line in lines]).to(device)
        return model.encode_text(tokens, normalize=True), tokens[:, -1] != 0

    scores = []
    with torch.inference_mode():
        for start in range(0, len(captions), batch_size):
            batch = captions[start : start + batch_size]
            pictures = torch.stack([prepare(dataset.load_image(record["image_id"])) for record in batch]).to(device)
            seen = model.encode_image(pictures, normalize=True)
            said, cut = texts([record["caption"] for record in batch])
            fits = WEIGHT * (seen * said).sum(-1).clamp_min(0)
            for row, record in enumerate(batch):
                references = dataset.reference_captions(record["image_id"])
                reference = None
                if references:
                    likest = (texts(references)[0] @ said[row]).max().clamp_min(0)
                    reference = float(2 * fits[row] * likest / (fits[row] + likest).clamp_min(1e-12))
                scores.append({"clip_score": float(fits[row]), "ref_clip_score": reference, "cut": bool(cut[row])})
    return scores


def summarise(scores: Sequence[Mapping[str, Any]], *, seed: int = 0) -> dict[str, Metric]:
    """Means in percent with 95 % bootstrap intervals over images: ``clip_score``, and ``ref_clip_score`` where all have one."""
    names = [name for name in ("clip_score", "ref_clip_score") if all(score[name] is not None for score in scores)]
    return {name: ratio([s[name] for s in scores], [1] * len(scores), scale=100.0, seed=seed) for name in names}
