# SPDX-License-Identifier: Apache-2.0
"""Means with 95 % intervals: a percentile bootstrap over images.

All figures of CHAIR and POPE are ratios of sums (CHAIR_I = hallucinated mentions / mentions), or a mean of
such ratios. The image is the unit that is drawn again: questions about one image are not independent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from vlm_attn.evals._extras import require

#: Differences and ends of intervals below this are 0: what is left of rounding, in percent or in tokens.
ROUNDING = 1e-9

Metric = dict[str, float | None]
Pair = tuple[Sequence[float], Sequence[float]]


def mean_of_ratios(
    pairs: Sequence[Pair],
    *,
    scale: float = 1.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Metric:
    """Mean over pairs of ``sum(numerator) / sum(denominator)``, with a bootstrap interval.

    Args:
        pairs: (numerator, denominator) per image; every column holds one entry for each image.
        scale: factor on the value and its interval, for example 100 for percent.
        confidence: level of the interval.
        resamples: how many times the images are drawn again.
        seed: of the drawing; the same seed gives the same interval.

    Returns:
        ``{"value", "low", "high"}``. A ratio over nothing counts as 0. The interval is None for fewer than
        two images.
    """
    return _bootstrap(pairs, np.full(len(pairs), scale / max(1, len(pairs))), confidence, resamples, seed)


def difference(
    pairs: Sequence[Pair],
    base: Sequence[Pair],
    *,
    scale: float = 1.0,
    confidence: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> Metric:
    """``mean_of_ratios(pairs) - mean_of_ratios(base)`` over the same images, drawn again together.

    What the images have in common cancels, so the interval is that of the difference, not of two separate figures.

    Args:
        pairs: see `mean_of_ratios`.
        base: the same images under what is compared with, entry by entry.
        scale: see `mean_of_ratios`; so are the others.

    Returns:
        as `mean_of_ratios`; what is 0 but for rounding is 0.0, so that an interval that ends at 0 holds it.

    Raises:
        ValueError: not the same number of images.
    """
    if len({len(column) for pair in (*pairs, *base) for column in pair}) > 1:
        raise ValueError("a paired difference needs the same images on both sides")
    weights = [scale / max(1, len(pairs))] * len(pairs) + [-scale / max(1, len(base))] * len(base)
    found = _bootstrap([*pairs, *base], np.array(weights), confidence, resamples, seed)
    return {name: value if value is None or abs(value) >= ROUNDING else 0.0 for name, value in found.items()}


def _bootstrap(pairs: Sequence[Pair], weights: np.ndarray, confidence: float, resamples: int, seed: int) -> Metric:
    """A weighted sum of ratios of sums, with its interval."""
    columns = [np.asarray(column, dtype=float) for pair in pairs for column in pair]

    def statistic(*columns: np.ndarray, axis: int = -1) -> Any:
        sums = [column.sum(axis=axis) for column in columns]
        ratios = [
            np.divide(top, bottom, out=np.zeros_like(bottom), where=bottom != 0)
            for top, bottom in zip(map(np.asarray, sums[::2]), map(np.asarray, sums[1::2]), strict=True)
        ]
        return np.tensordot(weights, np.asarray(ratios), axes=1)

    value = float(statistic(*columns)) if columns and columns[0].size else 0.0
    if not columns or columns[0].size < 2:
        return {"value": value, "low": None, "high": None}
    interval = (
        require("scipy.stats")
        .bootstrap(
            columns,
            statistic,
            n_resamples=resamples,
            batch=200,  # bounds the memory: 200 x images x columns numbers at a time
            paired=True,
            vectorized=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        )
        .confidence_interval
    )
    return {"value": value, "low": float(interval.low), "high": float(interval.high)}


def ratio(top: Sequence[float], bottom: Sequence[float], **options: Any) -> Metric:
    """``sum(top) / sum(bottom)`` over images with a bootstrap interval: see `mean_of_ratios`."""
    return mean_of_ratios([(top, bottom)], **options)
