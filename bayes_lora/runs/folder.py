"""The folder of a run: its settings, and the tasks its posterior was fitted on; and the folders written next to it.

Nothing here imports torch, so that a command that is given a wrong folder answers at once.
:mod:`bayes_lora.runs.loading` loads the posterior of a run, :mod:`bayes_lora.runs.logger` writes checkpoints and logs.
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError
from bayes_lora.recipes.config import LanguageModelConfig, RunConfig
from bayes_lora.tasks.readers.card import Card, card_from, card_values
from bayes_lora.tasks.readers.questions import OWN_OPTIONS
from bayes_lora.tasks.task import Example
from bayes_lora.utils.lock import check_unlocked, locked
from bayes_lora.utils.reading import read_facts, read_json
from bayes_lora.utils.storage import delete, is_temporary, make_folder, write_json, writing

__all__ = [
    "check_fitted",
    "check_report_folder",
    "check_run_folder",
    "language_model_of",
    "open_run_folder",
    "posterior_of",
    "read_fitted_tasks",
    "read_home",
    "read_question_card",
    "shipped_prior",
    "unseen_examples",
    "write_home",
    "write_settings",
]

CONFIG, CURVE, TASKS, POSTERIOR, METRICS = "config.json", "curve.json", "tasks.json", "posterior", "metrics.json"
EVALUATION, QUESTIONS, PREDICTIONS = "evaluation.json", "questions.jsonl", "predictions.safetensors"
SUPPORT_CURVE = "support_curve.json"
ADAPTATION = "adaptation.json"  # in an adapted folder: versions, and the distance from the prior
LOCK = ".lock"
HOME = "run.json"  # in an adapted folder: the run of its posterior
HALVES = ("training", "held_out")


def shipped_prior() -> Path:
    """Return the run folder of the prior that ships with the package; its README says what it was fitted on."""
    return Path(__file__).parents[1] / "prior"


@contextmanager
def open_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> Iterator[Path]:
    """Make a run folder, and hold its lock inside the block.

    What a killed process left unfinished is deleted; and everything, if ``overwrite`` is set (and ``resume`` is not).

    Raises:
        RunFolderError: see :func:`check_run_folder`; or the folder cannot be written.
    """
    check_run_folder(run, resume=resume, overwrite=overwrite)
    with writing(run):
        make_folder(run)
    with locked(run / LOCK):
        _check_contents(run, resume=resume, overwrite=overwrite)  # another process may have used it since
        with writing(run):
            _clear(run, temporaries_only=resume)
        yield run


def check_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check whether a run may use a folder, without changing it. A missing or empty folder may always be used.

    Raises:
        RunFolderError: another process uses it; it has a run, and neither ``resume`` nor ``overwrite`` is set; or it is
            not a run folder.
    """
    check_unlocked(run / LOCK)
    with writing(run):
        _check_contents(run, resume=resume, overwrite=overwrite)


def _check_contents(run: Path, *, resume: bool, overwrite: bool) -> None:
    if not run.exists() or (run.is_dir() and all(map(_is_left_over, run.iterdir()))):
        return
    if not (run / CONFIG).exists():
        raise RunFolderError(f"{run} exists and is not a run folder. Choose another name.")
    if not (resume or overwrite):
        cure = "Use --resume to continue, --overwrite to start over, or another --run."
        raise RunFolderError(f"{run} already exists. {cure}")


def _is_left_over(path: Path) -> bool:
    """Return whether a process that was killed before it wrote the settings may have left this."""
    return path.name == LOCK or is_temporary(path)


def _clear(run: Path, *, temporaries_only: bool) -> None:
    """Delete what killed processes left, or everything but the lock: the settings, which mark the folder, last."""
    found = sorted(run.iterdir(), key=lambda path: path.name == CONFIG)
    if temporaries_only:
        found += [path for folder in found if folder.is_dir() and not folder.is_symlink() for path in folder.iterdir()]
        found = [path for path in found if is_temporary(path) and not is_temporary(path.parent)]
    for path in found:
        if path.name != LOCK:
            delete(path)


def check_report_folder(folder: Path, *, overwrite: bool = False) -> None:
    """Check whether :meth:`Comparison.write` can write to a folder, so that long work is not lost.

    Raises:
        RunFolderError: the folder already has metrics that may not be replaced, or it cannot be made or written.
    """
    there = folder.absolute()
    try:
        taken = (folder / METRICS).exists() and not overwrite
        while not there.exists():
            there = there.parent
        tempfile.TemporaryDirectory(dir=there).cleanup()
    except OSError as error:
        raise RunFolderError(
            f"{folder}: expected a writable folder, but {there}: {error.strerror}. Use another --output."
        ) from error
    if taken:
        raise RunFolderError(f"{folder} already has metrics. Use --overwrite to replace them, or another --output.")


def write_settings(run: Path, config: RunConfig, training: Sequence[str], held_out: Sequence[str]) -> None:
    """Write a run's settings, and the names of its training and held-out tasks."""
    write_json(run / CONFIG, config.to_dict())
    write_json(run / TASKS, dict(zip(HALVES, (list(training), list(held_out)), strict=True)))


def read_fitted_tasks(run: Path) -> list[str]:
    """Return the names of the training and held-out tasks of a run; none, with a warning, if they are not recorded.

    Raises:
        PosteriorError: the list of tasks is damaged.
    """
    path = run / TASKS
    if not path.exists():
        if (run / POSTERIOR).exists():
            warnings.warn(f"{path} is missing: cannot tell which tasks the posterior was fitted on", stacklevel=2)
        return []
    facts = read_json(path)
    halves = [facts.get(half) for half in HALVES] if isinstance(facts, dict) else [None]
    if not all(isinstance(half, list) and all(isinstance(name, str) for name in half) for half in halves):
        raise PosteriorError(f"{path} is damaged: expected lists {' and '.join(HALVES)} of task names. Restore it.")
    return [name for half in halves for name in half or []]


def write_home(path: Path, run: Path, adapted: Path, card: Card | None = None, support: Sequence[Example] = ()) -> None:
    """Record in an adapted folder the path of the run, the card that reads questions from a table, and its examples.

    The path is relative to the folder, so that both can be moved together; it is None for the shipped prior. Of each
    example of the support set, a digest of its input is kept.
    """
    shipped = run.resolve() == shipped_prior().resolve()
    facts: dict[str, Any] = {"run": None if shipped else os.path.relpath(run.resolve(), adapted.resolve())}
    facts |= {} if card is None else {"questions": card_values(card)}
    write_json(path, facts | {"support": sorted({_digest(row) for row in support})})


def unseen_examples(adapted: Path, rows: Sequence[Example]) -> list[Example]:
    """Return the examples whose inputs are not in the support set of an adapted folder.

    Raises:
        PosteriorError: the folder's ``run.json`` is damaged.
    """
    home = read_json(adapted / HOME)
    seen = home.get("support", []) if isinstance(home, dict) else None
    if not isinstance(seen, list):
        raise PosteriorError(f"{adapted / HOME} is damaged: 'support': expected a list. Run adapt again.")
    return [row for row in rows if _digest(row) not in seen]


def _digest(example: Example) -> str:
    return blake2b(example.input.encode(), digest_size=8).hexdigest()


def read_question_card(adapted: Path) -> Card:
    """Return the card that reads questions from a table; the default one if an adapted folder has none.

    Raises:
        PosteriorError: the folder's ``run.json`` is damaged.
    """
    home = read_json(adapted / HOME)
    if not isinstance(home, dict) or "questions" not in home:
        return OWN_OPTIONS
    try:
        return card_from(home["questions"])
    except ConfigError as error:
        raise PosteriorError(f"{adapted / HOME} is damaged: 'questions': {error} Run adapt again.") from error


def read_home(adapted: Path) -> Path:
    """Return the run folder of an adapted folder.

    Raises:
        PosteriorError: the folder does not record its run, or the run does not exist.
    """
    home = read_json(adapted / HOME)
    if not isinstance(home, dict) or not isinstance(home.get("run", 0), str | None):
        raise PosteriorError(f"{adapted / HOME} is damaged: it has no 'run'. Run adapt again.")
    if home["run"] is None:
        return shipped_prior()
    run = Path(os.path.normpath(adapted.resolve() / home["run"]))
    if not run.is_dir():
        raise PosteriorError(
            f"{adapted} needs the run it was adapted from: expected {run}, which does not exist. Restore it (the two "
            "folders can be moved together), or run adapt again."
        )
    return run


def check_fitted(run: Path) -> None:
    """Check that a run has a posterior, and settings that can be read.

    Raises:
        PosteriorError: the posterior is missing, or the settings are missing or damaged.
    """
    posterior_of(run)
    language_model_of(run)


def posterior_of(run: Path) -> Path:
    """Return the folder of a run's posterior.

    Raises:
        PosteriorError: there is none.
    """
    folder = run / POSTERIOR
    if not folder.is_dir():
        raise PosteriorError(f"{folder} is missing: expected the folder of a run that has ended. Fit first.")
    return folder


def language_model_of(run: Path) -> LanguageModelConfig:
    """Return the settings of the language model of a run.

    Raises:
        PosteriorError: the settings of the run are missing or damaged.
    """
    path = run / CONFIG
    return RunConfig.from_dict(read_facts(path), str(path)).language_model
