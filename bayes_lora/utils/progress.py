"""Progress of the command line on standard error: bars in a terminal, plain lines in a log."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

__all__ = ["bars", "hide_loading_bar"]


@contextmanager
def bars(console: Console | None = None) -> Iterator[Progress]:
    """Show progress with an estimate of the remaining time.

    Args:
        console: where to show it, by default standard error: as bars in a terminal, otherwise as lines.
    """
    console = console or Console(stderr=True)
    if not console.is_interactive:
        yield _Lines(console=console)  # not entered: it would print an empty line before an error
        return
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console) as progress:
        yield progress


class _Lines(Progress):
    """Progress as plain lines: ``lines`` of them per task, and one whenever ``pause`` seconds have passed."""

    lines, pause = 10, 30.0

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._first: dict[TaskID, float] = {}  # completed when the task was added, not 0 for a resumed task
        self._printed: dict[TaskID, tuple[int, float]] = {}  # share and time at the last line

    def add_task(self, *args: Any, **kwargs: Any) -> TaskID:
        name = super().add_task(*args, **kwargs)
        task = self._tasks[name]
        self._first[name], self._printed[name] = task.completed, (self._share(task), self.get_time())
        return name

    def update(self, task_id: TaskID, **kwargs: Any) -> None:
        super().update(task_id, **kwargs)
        self._print(task_id)

    def advance(self, task_id: TaskID, advance: float = 1) -> None:
        super().advance(task_id, advance)
        self._print(task_id)

    def _print(self, name: TaskID) -> None:
        task, now = self._tasks[name], self.get_time()
        share, then = self._printed[name]
        if self._share(task) > share or (now - then >= self.pause and not task.finished):
            self._printed[name] = self._share(task), now
            self.console.print(self._line(name), markup=False, highlight=False, soft_wrap=True)

    def _line(self, name: TaskID) -> str:
        task = self._tasks[name]
        passed, done = task.elapsed or 0.0, task.completed - self._first[name]
        line = f"{task.description}: {task.completed:.0f}/{task.total or 0:.0f}, {_clock(passed)}"
        if task.finished or not done:
            return line
        return f"{line}, {_clock(passed / done * (task.remaining or 0))} left"

    def _share(self, task: Task) -> int:
        return int(self.lines * task.completed / task.total) if task.total else 0


def _clock(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))


def hide_loading_bar() -> None:
    """Switch off transformers' bar for reading weights, which would break up our lines, but not that of downloads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads_shown = not are_progress_bars_disabled()
    disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
