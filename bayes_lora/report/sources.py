"""The folders that a report is made of, and what is in them. Nothing here imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bayes_lora.errors import PosteriorError, RunFolderError
from bayes_lora.runs.folder import (
    ADAPTATION,
    CONFIG,
    CURVE,
    EVALUATION,
    HOME,
    METRICS,
    POSTERIOR,
    SUPPORT_CURVE,
)
from bayes_lora.utils.reading import read_facts, read_json

__all__ = ["Source", "check_output", "open_sources"]

MADE_BY = "`bayes-lora fit`, `adapt`, `evaluate --output` or `demo`"
FACTS = ("posterior.json", "task_posterior.json")


@dataclass(frozen=True)
class Source:
    """A folder with results.

    Attributes:
        name: the folder's own name, which is its name in the report.
        path: the folder.
    """

    name: str
    path: Path

    def has(self, name: str) -> bool:
        """Return whether the folder has a file or folder of this name."""
        return (self.path / name).exists()

    @property
    def evaluated(self) -> bool:
        """Whether it has the predictions of each question."""
        return self.has(EVALUATION)

    def facts(self, name: str) -> dict[str, Any]:
        """Return a JSON file of the folder; empty if there is none.

        Raises:
            PosteriorError: the file is damaged.
        """
        return read_facts(self.path / name) if self.has(name) else {}

    def posterior_facts(self) -> dict[str, Any]:
        """Return the JSON file of its posterior: of a fit, or of an adapted task; empty if there is none."""
        for name in FACTS:
            if (found := self.facts(f"{POSTERIOR}/{name}")) or self.has(f"{POSTERIOR}/{name}"):
                return found
        return {}

    def history(self) -> list[dict[str, float]]:
        """Return the evaluations of its fit, with numbers by name; empty if there are none.

        Raises:
            PosteriorError: the file is damaged.
        """
        if not self.has(CURVE):
            return []
        rows = read_json(self.path / CURVE)
        if not isinstance(rows, list) or not all(isinstance(row, dict) and _are_numbers(row) for row in rows):
            raise PosteriorError(f"{self.path / CURVE} is damaged: expected a list of numbers by name. Restore it.")
        return rows

    def support_curve(self) -> dict[str, dict[int, dict[str, float]]]:
        """Return metrics by task and number of support examples; empty if there are none.

        Raises:
            PosteriorError: the file is damaged.
        """
        found = self.facts(SUPPORT_CURVE)
        try:
            return {
                task: {int(size): {name: float(value) for name, value in row.items()} for size, row in rows.items()}
                for task, rows in found.items()
            }
        except (AttributeError, TypeError, ValueError) as error:
            raise PosteriorError(f"{self.path / SUPPORT_CURVE} is damaged ({error}). Restore it.") from error

    def layers(self) -> dict[str, list[dict[str, Any]]]:
        """Return the mean distance of tasks' posteriors from the prior, rows by method; empty if there are none.

        Raises:
            PosteriorError: the file is damaged.
        """
        for name in (EVALUATION, ADAPTATION):
            found = self.facts(name).get("layers", {})
            if not isinstance(found, dict) or not all(map(_are_layers, found.values())):
                raise PosteriorError(f"{self.path / name} is damaged: expected rows by method in 'layers'. Restore it.")
            if found:
                return found
        return {}


def open_sources(paths: Sequence[Path]) -> list[Source]:
    """Check the folders of a report.

    Raises:
        RunFolderError: a folder does not exist, is not one of results, or has nothing to report; or two have one name.
    """
    found: dict[str, Source] = {}
    for path in paths:
        name = path.resolve().name
        if not path.is_dir():
            raise RunFolderError(f"{path} is not a folder. Name a folder written by {MADE_BY}.")
        source = Source(name, path)
        if not any(map(source.has, (CONFIG, HOME, METRICS))):
            expected = f"expected {CONFIG}, {HOME} or {METRICS} in it"
            raise RunFolderError(f"{path} is not a run folder: {expected}. Name a folder written by {MADE_BY}.")
        if not any(map(source.has, (METRICS, CURVE, POSTERIOR, SUPPORT_CURVE))):
            raise RunFolderError(
                f"{path} has nothing to report: expected {METRICS}, {CURVE} or {POSTERIOR}/ in it. Fit first, or run "
                f"bayes-lora evaluate --output {path}."
            )
        if name in found:
            raise RunFolderError(
                f"{found[name].path} and {path} are both named {name!r} in the report. Rename one of the folders."
            )
        found[name] = source
    return list(found.values())


def check_output(path: Path, *, overwrite: bool = False) -> None:
    """Check that a report may be written to a file.

    Raises:
        RunFolderError: the file exists and may not be replaced, or its folder does not exist.
    """
    if path.is_dir():
        raise RunFolderError(f"{path} is a folder. Name a file, such as --output {path / 'report.html'}.")
    if path.exists() and not overwrite:
        raise RunFolderError(f"{path} already exists. Use --overwrite to replace it, or another --output.")
    if not path.absolute().parent.is_dir():
        raise RunFolderError(f"{path}: the folder {path.parent} does not exist. Make it, or use another --output.")


def _are_numbers(row: dict[str, Any]) -> bool:
    return all(isinstance(value, int | float) and not isinstance(value, bool) for value in row.values())


def _are_layers(rows: Any) -> bool:
    texts, numbers = ("site", "module"), ("kl", "posterior_sd", "prior_sd")
    return isinstance(rows, list) and all(
        isinstance(row, dict)
        and all(isinstance(row.get(name), str) for name in texts)
        and all(isinstance(row.get(name, ""), int | float | None) for name in numbers)
        for row in rows
    )
