# SPDX-License-Identifier: Apache-2.0
"""One command in several processes, as ``accelerate launch`` starts them; a lone process is the same with a count of 1."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from vlm_attn.evals._extras import require


class Processes:
    """The processes of this run: which one this is, and how they exchange plain Python objects.

    Raises:
        ImportError: there are several processes, and accelerate is not installed.
    """

    def __init__(self) -> None:
        state = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            import torch

            # Without a word about the CPU, accelerate takes a machine that has nothing else for a lone process.
            state = require("accelerate").PartialState(cpu=not torch.accelerator.is_available())
        self._state = state
        self.count: int = state.num_processes if state else 1
        self.rank: int = self._state.process_index if self._state else 0

    @property
    def first(self) -> bool:
        """Whether this process is the one that writes."""
        return self.rank == 0

    def device(self, wanted: str) -> str:
        """This process's device where ``"auto"`` is wanted: each has a GPU of its own."""
        return str(self._state.device) if self._state and wanted == "auto" else wanted

    def gather(self, value: Any) -> list[Any]:
        """The values of all processes, in the order of their ranks, in every process."""
        if self.count == 1:
            return [value]
        return require("accelerate.utils").gather_object([value])

    def on_first(self, work: Callable[[], Any]) -> Any:
        """What the first process computes; if it fails, all fail with its error."""
        value, error = None, None
        if self.first:
            try:
                value = work()
            except Exception as raised:
                error = raised
        value, error = self.gather((value, error))[0]
        if error is not None:
            raise error
        return value
