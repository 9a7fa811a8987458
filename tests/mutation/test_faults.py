# SPDX-License-Identifier: Apache-2.0
"""The planted faults are still faults of what is there; whether tests notice them is for ``python -m tests.mutation``."""

from __future__ import annotations

from tests.mutation.__main__ import ROOT, faults


def test_every_fault_can_be_planted() -> None:
    found = faults()
    assert len({(fault.file, fault.old, fault.new) for fault in found}) == len(found) > 50
    for fault in found:
        assert fault.old != fault.new, fault.what
        assert fault.planted(), fault.what
        assert fault.tests, fault.what
        for test in fault.tests:
            assert (ROOT / test.split("::")[0]).exists(), f"{fault.what}: {test}"
