# SPDX-License-Identifier: Apache-2.0
"""Results as a table for other programs."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

COLUMNS = ("eval", "model", "data", "images", "method", "part", "figure", "value", "low", "high", "finished", "samples")


def to_csv(results: Sequence[Mapping[str, Any]]) -> str:
    """Figures of results files as CSV: one line per evaluation, method, part and figure, with 95 % intervals.

    Args:
        results: contents of ``results.json`` files. ``part`` is a split of POPE, a ground truth of CHAIR, a part of AMBER;
            counts that have no interval leave ``low`` and ``high`` empty.
    """
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerow(COLUMNS)
    for run in results:
        config, counts = run["config"], run["counts"]
        for method, parts in run["metrics"].items():
            for part, figures in parts.items():
                for figure, value in figures.items():
                    plain = {"value": value, "low": None, "high": None}
                    cells = value if isinstance(value, Mapping) else plain
                    writer.writerow(
                        [
                            *(run["eval"], config["model"], config["data"], config["images"], method, part, figure),
                            *(cells.get(key) for key in ("value", "low", "high")),
                            *(counts["finished"][method], counts["samples"]),
                        ]
                    )
    return stream.getvalue()
