# SPDX-License-Identifier: Apache-2.0
"""One denoising step: which token every open position would get, how sure the model is of it, how many are written.

LLaDA (arXiv 2502.09992, algorithm 5), Dream (arXiv 2508.15487) and LaViDa (arXiv 2505.16839).
"""

from __future__ import annotations

import torch
from torch import Tensor

REMASKING = ("low_confidence", "random", "entropy", "margin")
SCHEDULES = ("linear", "dream")


def propose(logits: Tensor, temperature: float, generator: torch.Generator) -> Tensor:
    """``[B, L]`` tokens: the argmax, or with a temperature T the argmax of ``exp(logit) / (-log U)^T`` (Gumbel).

    Args:
        logits: ``[B, L, V]`` float64.
        temperature: 0 or more.
        generator: of U.
    """
    if temperature == 0:
        return logits.argmax(-1)
    uniform = torch.rand(logits.shape, dtype=torch.float64, device=logits.device, generator=generator)
    return (logits - temperature * (-uniform.clamp_min(1e-300).log()).log()).argmax(-1)


def confidence(logits: Tensor, tokens: Tensor, remasking: str, generator: torch.Generator) -> Tensor:
    """``[B, L]`` float64: how sure the model is; the surest positions are written first.

    ``low_confidence``: probability of the token. ``margin``: largest minus second probability. ``entropy``: sum of
    p log p. ``random``: U(0, 1).

    Args:
        logits: ``[B, L, V]`` float64.
        tokens: ``[B, L]`` from :func:`propose`.
        remasking: one of ``REMASKING``.
        generator: for ``random``.
    """
    if remasking == "random":
        return torch.rand(tokens.shape, dtype=torch.float64, device=logits.device, generator=generator)
    p = logits.softmax(-1)
    if remasking == "margin":
        first, second = p.topk(2, -1).values.unbind(-1)
        return first - second
    if remasking == "entropy":
        return torch.special.entr(p).sum(-1).neg()
    return p.gather(-1, tokens[..., None])[..., 0]


def counts(masks: Tensor, steps: int, schedule: str | float) -> Tensor:
    """``[B, steps]`` how many positions each step of a block writes.

    ``"linear"``: equal shares, the first steps one more (LLaDA). A number s: LaViDa's shift, with
    ``sigma(t) = s t / (1 + (s - 1) t)`` on equal parts of [0, 1]; the differences of ``floor(sigma m)``, at least 1 each,
    in reversed order, so that s > 1 writes few early and s < 1 many. ``"dream"``: ``floor(open (1 - t' / t))`` with t
    falling from 1 to 0.001. The last step writes what is left.

    Args:
        masks: ``[B]`` open positions of the block.
        steps: number of steps.
        schedule: see above.
    """
    out = torch.zeros(len(masks), steps, dtype=torch.long, device=masks.device)
    left = masks.clone()
    if schedule == "linear":
        share = masks[:, None] // steps
        return share + (torch.arange(steps, device=masks.device) < (masks % steps)[:, None])
    if schedule == "dream":
        times = torch.linspace(1, 1e-3, steps + 1, dtype=torch.float64)
        for i in range(steps):
            wanted = (left * (1 - float(times[i + 1] / times[i]))).long()
            out[:, i] = left if i == steps - 1 else wanted
            left = left - out[:, i]
        return out
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64, device=masks.device)
    sigma = float(schedule) * t / (1 + (float(schedule) - 1) * t)
    wanted = (sigma * masks[:, None]).floor().long().diff(dim=1).clamp_min(1).flip(1)
    for i in range(steps):
        out[:, i] = left if i == steps - 1 else torch.minimum(wanted[:, i], left)
        left = left - out[:, i]
    return out


def pick(score: Tensor, open_: Tensor, count: Tensor, threshold: float | None = None) -> Tensor:
    """``[B, L]`` bool: the positions to write, the ``count`` surest of the open ones; of equal ones the earlier.

    With a threshold: all that reach it, and always the surest (Fast-dLLM, arXiv 2505.22618).

    Args:
        score: ``[B, L]``.
        open_: ``[B, L]`` bool.
        count: ``[B]``.
        threshold: of the score.
    """
    score = score.masked_fill(~open_, -torch.inf)
    rank = score.argsort(dim=1, descending=True, stable=True).argsort(dim=1)
    if threshold is not None:
        return ((rank == 0) | (score >= threshold)) & open_
    return (rank < count[:, None]) & open_
