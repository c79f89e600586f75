"""The command for a report: bayes-lora report."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from bayes_lora.cli.console import print_line
from bayes_lora.cli.options import Overwrite

__all__ = ["report"]


def report(
    runs: Annotated[
        list[Path],
        typer.Argument(help="Folders written by `evaluate --output`, `demo`, `fit` or `adapt`.", metavar="RUN"),
    ],
    output: Annotated[Path, typer.Option(help="The HTML file.")],
    overwrite: Overwrite = False,
) -> None:
    """Write a report of one or several runs as one HTML file, which opens without a network.

    Example: `bayes-lora report runs/demo --output report.html`
    """
    from bayes_lora.report.sources import check_output, open_sources

    sources = open_sources(runs)
    check_output(output, overwrite=overwrite)
    from bayes_lora.report.page import render_report  # imports torch
    from bayes_lora.utils.storage import write_text

    write_text(output, render_report(sources))
    print_line(f"report of {', '.join(source.name for source in sources)} in {output}")
