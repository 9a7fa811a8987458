# SPDX-License-Identifier: Apache-2.0
"""Launches every kernel once, on shapes that fill no block; run under compute-sanitizer by ``test_sanitizer.py``."""

from __future__ import annotations

import torch

from vlm_attn.kernels import (
    Edit,
    ScoreEdit,
    combine,
    edited_attention,
    masked_attention,
    masks,
    one_hot_segments,
    probe,
    segmented_attention,
)


def main() -> None:
    """Every operation on the Triton backend."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dim, dtype in ((72, torch.float16), (16, torch.float32)):
        query = torch.randn(2, 6, 3, dim, device=device, dtype=dtype)
        key, value = torch.randn(2, 2, 2, 77, dim, device=device, dtype=dtype).unbind(0)
        ids = torch.randint(3, (2, 77), device=device)
        segments = one_hot_segments(ids, 3, twin_of=1, log_weight=torch.rand(2, 77, device=device))
        mask = torch.rand(2, 1, 3, 77, device=device) > 0.3
        where = {"mask": mask, "scale": 0.3, "softcap": 5.0, "backend": "triton"}
        lse, out = segmented_attention(query, key, value, segments, **where)
        combine(lse, out, lse.new_zeros(()), backend="triton")
        edits = [ScoreEdit(torch.rand(2, 70, device=device), "head_mean"), Edit(segments, lambda mass: 1 + mass)]
        edited_attention(query, key, value, edits, **where)
        last = torch.tensor([[5, 76, -1]], device=device)
        probe(query, key, segments=segments, last=last, keys=ids > 0, maps=True, **where)
        masked_attention(
            query,
            key,
            value,
            masks.croc,
            ids.to(torch.uint8),
            document=masks.documents(torch.tensor([0, 30, 77], device=device)).expand(2, -1),
            scale=0.3,
            log_weight=torch.rand(1, 77, device=device),
            segments=segments,
            summed=torch.tensor([[True, False, True]], device=device),
            backend="triton",
        )
    if device == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
