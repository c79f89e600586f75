"""Signals that end a command: in one line, and with 128 plus the signal's number as exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bayes_lora.utils.signals import SIGNALS, leave_lost_terminal

__all__ = ["Terminated", "terminations"]


class Terminated(BaseException):
    """The process was asked to end by a signal other than that of Ctrl-C, which is a KeyboardInterrupt.

    Attributes:
        number: number of the signal.
    """

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.number = number


@contextmanager
def terminations() -> Iterator[None]:
    """Raise :class:`Terminated` on SIGTERM and SIGHUP inside the block, unless they are ignored, as under nohup."""
    numbers = [n for n in SIGNALS if n != signal.SIGINT and signal.getsignal(n) == signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, _terminate)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)


def _terminate(number: int, frame: FrameType | None) -> None:
    leave_lost_terminal()
    raise Terminated(number)
