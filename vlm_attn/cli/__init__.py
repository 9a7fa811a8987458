# SPDX-License-Identifier: Apache-2.0
"""The command line: ``vlm-attn eval | report | score | experiment | calibrate | caption | demo | methods | bench ...``.

This package imports only typer when it is loaded, so that help is quick; torch, the evaluations and everything
above it are imported by name when a command runs.
"""

from vlm_attn.cli import bench, data, evaluate, experiment, scenes, show
from vlm_attn.cli.common import app, main

__all__ = ["app", "bench", "data", "evaluate", "experiment", "main", "scenes", "show"]
