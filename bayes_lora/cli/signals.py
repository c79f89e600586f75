"""Signals that end a command: in one line, and with 128 plus the signal's number as exit code."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from bayes_lora.utils.signals import SIGNALS, leave_lost_terminal

__all__ = ["Terminated", "terminations"]

DEFAULTS = (signal.SIG_DFL, signal.default_int_handler)


class Terminated(BaseException):
    """The process was asked to end by a signal other than that of Ctrl-C, which is a KeyboardInterrupt."""


@contextmanager
def terminations() -> Iterator[list[int]]:
    """Raise :class:`Terminated` on SIGTERM and SIGHUP, and KeyboardInterrupt on SIGINT, inside the block.

    Signals that are ignored, as under nohup, stay ignored. Yields a list of the signals that were received: where an
    import is cut off, packages may raise an error of their own instead.
    """
    received: list[int] = []

    def end(number: int, frame: FrameType | None) -> None:
        leave_lost_terminal()
        received.append(number)
        raise KeyboardInterrupt if number == signal.SIGINT else Terminated

    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    replaced = [number for number, handler in handlers.items() if handler in DEFAULTS]
    for number in replaced:
        signal.signal(number, end)
    try:
        yield received
    finally:
        for number in replaced:
            signal.signal(number, handlers[number])
