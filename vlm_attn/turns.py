# SPDX-License-Identifier: Apache-2.0
"""Whose turn it is: calls of one patched model run one after the other, also where one is cut short or the process forks."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any
from weakref import WeakSet

from torch import nn

POLL = 0.05  # seconds between two looks at whether the one that is waited for is still there
FORWARD = nn.Module._call_impl.__code__
_all: WeakSet[Turns] = WeakSet()


@dataclass(frozen=True)
class Holder:
    """One turn.

    Attributes:
        thread: the thread that has it.
        frame: the forward that it lasts for; None = it is given back by a ``finally``.
        before: what to go back to where it ends without being given back.
    """

    thread: int
    frame: FrameType | None
    before: Any

    @property
    def over(self) -> bool:
        """Whether it has ended without being given back."""
        running = sys._current_frames().get(self.thread)
        if self.frame is None or running is None:
            return running is None
        while running is not None and running is not self.frame:
            running = running.f_back
        return running is None


class Turns:
    """A lock that its thread may take again, and that is free again once what held it is gone.

    A bare forward has its turn from a hook at its begin to a hook at its end. PyTorch runs no hook where ``KeyboardInterrupt``
    or ``SystemExit`` end it, so its frame is kept: a frame that its thread no longer runs holds nothing. In a forked process,
    the turns of other threads end, because these threads are not there.

    Args:
        state: what a turn goes back to where it is not given back.
        settle: goes back to it.
    """

    def __init__(self, state: Callable[[], Any], settle: Callable[[Any], None]) -> None:
        self.state, self.settle = state, settle
        self.held: list[Holder] = []  # of one thread, the innermost last
        self._change = threading.Condition(threading.Lock())
        _all.add(self)

    @property
    def mine(self) -> bool:
        """Whether this thread has the turn."""
        return bool(self.held) and self.held[-1].thread == threading.get_ident()

    def take(self, frame: FrameType | None = None) -> None:
        """Wait for this thread's turn."""
        with self._change:
            while True:
                while self.held and self.held[-1].over:
                    self.settle(self.held.pop().before)
                if not self.held or self.mine:
                    break
                self._change.wait(POLL)
            self.held.append(Holder(threading.get_ident(), frame, self.state()))

    def give(self) -> None:
        """Give the innermost turn back."""
        with self._change:
            self.held.pop()
            self._change.notify()

    def forked(self) -> None:
        """This process is a copy: of the threads, only this one came along."""
        self._change = threading.Condition(threading.Lock())  # the old one may have been held at that moment
        while self.held and not self.mine:
            self.settle(self.held.pop().before)


def running_forward() -> FrameType | None:
    """The frame of the module's forward whose hook asks."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not FORWARD:
        frame = frame.f_back
    return frame


def _forked() -> None:
    for turns in list(_all):
        turns.forked()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forked)
