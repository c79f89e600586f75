"""Progress bars of the command line, on standard error."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

__all__ = ["bars", "hide_loading_bar"]


@contextmanager
def bars() -> Iterator[Progress]:
    """Progress bars with an estimate of the time left."""
    columns = (TextColumn("{task.description:<32}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    console = Console(stderr=True)
    progress = Progress(*columns, TextColumn("left"), TimeRemainingColumn(), console=console)
    if console.is_interactive:
        with progress:
            yield progress
    else:  # in a log, once at the end; Progress would put an empty line before an error
        yield progress
        console.print(progress.get_renderable())


def hide_loading_bar() -> None:
    """Switch off transformers' bar for reading weights, which would stand between our lines; not that of downloads."""
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar

    downloads_shown = not are_progress_bars_disabled()
    disable_progress_bar()
    if downloads_shown:
        enable_progress_bars()
