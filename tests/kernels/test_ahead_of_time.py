# SPDX-License-Identifier: Apache-2.0
"""Every kernel compiles for devices that are not here, uses matrix instructions, and fits the shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="triton is not installed")
# KiB a program may use; sm_86 and sm_89 take the blocks of sm_80 and have less than its 163.
SHARED = {"sm_80": 99, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}


@pytest.mark.parametrize("target", SHARED)
def test_compiles(target: str, tmp_path: Path) -> None:
    # A process of its own: in this one Triton may be an interpreter.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    script = Path(__file__).with_name("ahead_of_time.py")
    done = subprocess.run(
        [sys.executable, script, target], capture_output=True, text=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr[-2000:]
    results = json.loads(done.stdout.splitlines()[-1])
    kernels = {"partials", "head_mean", "masses", "combine", "tiles", "prefill", "sums", "totals", "columns"}
    assert {result["kernel"] for result in results} == {f"{name}_kernel" for name in kernels}
    for result in results:
        assert result["multiplies"] in (None, bool(result["matrix_instructions"])), result
        assert result["shared"] <= SHARED[target] * 1024, result
