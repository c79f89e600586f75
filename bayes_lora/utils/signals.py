"""Signals that ask a process to end, deferred until its work is saved."""

from __future__ import annotations

import os
import signal
import stat
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

__all__ = ["SIGNALS", "HeldSignals", "held_signals", "leave_lost_terminal"]

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))
"""Ctrl-C, the end of a job or of the machine, and the end of a session. Windows has no SIGHUP."""


@dataclass
class HeldSignals:
    """The signals that arrived in a block of :func:`held_signals`.

    Attributes:
        received: the signal that waits; None if there is none.
        handlers: the handlers from before the block.
    """

    received: int | None = None
    handlers: dict[int, Any] = field(default_factory=dict)

    def deliver(self) -> None:
        """Restore the former handlers, and pass the signal that waits on to its own; do nothing if there is none."""
        if self.received is not None:
            received, self.received = self.received, None
            self._restore()
            signal.raise_signal(received)

    def _hold(self) -> None:
        for number in SIGNALS:
            handler = signal.getsignal(number)
            if handler not in (signal.SIG_IGN, None):  # nohup ignores SIGHUP; None is not of Python
                self.handlers[number] = signal.signal(number, self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        leave_lost_terminal()
        again, self.received = self.received is not None, number
        if again:
            self.deliver()

    def _restore(self) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)
        self.handlers = {}


@contextmanager
def held_signals() -> Iterator[HeldSignals]:
    """Hold SIGINT, SIGTERM and SIGHUP inside the block.

    The first one waits for :meth:`HeldSignals.deliver`, at the latest until the end of the block. A second one is not
    held. Signals that are ignored stay ignored. Only the main thread can hold signals; in others nothing is held.
    """
    held = HeldSignals()
    if threading.current_thread() is threading.main_thread():
        held._hold()
    try:
        yield held
    finally:
        held._restore()
        held.deliver()


def leave_lost_terminal() -> None:
    """Discard what is written to a terminal that was closed, which is an error otherwise: work must still be saved."""
    for descriptor in (1, 2):
        try:
            lost = stat.S_ISCHR(os.fstat(descriptor).st_mode) and not os.isatty(descriptor)
        except OSError:  # it is closed
            continue
        if lost:
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, descriptor)
            os.close(null)
