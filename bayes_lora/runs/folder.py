"""The folder of a run: who may write it, which tasks its posterior was fitted on, what a fit leaves on its way."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.classes import Made
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from bayes_lora.tasks.readers.card import Card, card_from, card_values
from bayes_lora.tasks.readers.questions import OWN_OPTIONS
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.storage import read_json, write_json

__all__ = [
    "RunLogger",
    "check_run_folder",
    "identity",
    "load_language_model_of",
    "load_posterior",
    "prepare_run_folder",
    "read_fitted_tasks",
    "read_home",
    "read_question_card",
    "write_home",
    "write_settings",
]

CONFIG, CHECKPOINT, CURVE, TASKS, POSTERIOR = "config.json", "checkpoint", "curve.json", "tasks.json", "posterior"
HOME = "run.json"  # of an adapted folder: names the run from which its posterior comes
HALVES = ("training", "held_out")


def prepare_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a run folder, in place of an old one if ``overwrite`` is set (and ``resume`` is not).

    Raises:
        RunFolderError: as :func:`check_run_folder`, or it cannot be written.
    """
    check_run_folder(run, resume=resume, overwrite=overwrite)
    try:
        if run.exists() and not resume:
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunFolderError(f"{run} cannot be written: {error}") from error
    return run


def check_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Look whether a run may use a folder, and change nothing. A missing or empty folder may always be used.

    Raises:
        RunFolderError: it holds a run, and neither ``resume`` nor ``overwrite`` is set; or it is not a run's folder.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not (run / CONFIG).exists():
        raise RunFolderError(f"{run} exists and is no run folder. Give another name.")
    if not (resume or overwrite):
        cure = "Use --resume to go on, --overwrite to start again, or another --run."
        raise RunFolderError(f"{run} already exists. {cure}")


def write_settings(run: Path, config: RunConfig, training: Sequence[str], held_out: Sequence[str]) -> None:
    """Write a run's settings, and the names of the tasks that it trains on and that choose its checkpoint."""
    write_json(run / CONFIG, config.to_dict())
    write_json(run / TASKS, dict(zip(HALVES, (list(training), list(held_out)), strict=True)))


def read_fitted_tasks(run: Path) -> list[str]:
    """The names of the tasks that a run trained on or held out; none, with a warning, where its folder has no list.

    Raises:
        PosteriorError: the file that tells is damaged.
    """
    path = run / TASKS
    if not path.exists():
        if (run / POSTERIOR).exists():
            warnings.warn(f"{path} is missing: tasks that the posterior was fitted on cannot be told", stacklevel=2)
        return []
    facts = read_json(path)
    halves = [facts.get(half) for half in HALVES] if isinstance(facts, dict) else [None]
    if not all(isinstance(half, list) and all(isinstance(name, str) for name in half) for half in halves):
        raise PosteriorError(f"{path} is damaged: expected lists {' and '.join(HALVES)} of task names. Restore it.")
    return [name for half in halves for name in half or []]


def write_home(path: Path, run: Path, adapted: Path, card: Card | None = None) -> None:
    """Note in a file of an adapted folder where the run is, and the card by which questions are read from a table.

    The path of the run is relative to the folder, so that the two may move together.
    """
    facts: dict[str, Any] = {"run": os.path.relpath(run.resolve(), adapted.resolve())}
    write_json(path, facts | ({} if card is None else {"questions": card_values(card)}))


def read_question_card(adapted: Path) -> Card:
    """Return the card by which questions are read from a table; the default one if an adapted folder has none.

    Raises:
        PosteriorError: the folder's note is damaged.
    """
    home = read_json(adapted / HOME)
    if not isinstance(home, dict) or "questions" not in home:
        return OWN_OPTIONS
    try:
        return card_from(home["questions"])
    except ConfigError as error:
        raise PosteriorError(f"{adapted / HOME} is damaged: 'questions': {error} Run adapt again.") from error


def read_home(adapted: Path) -> Path:
    """The run folder from which an adapted folder comes.

    Raises:
        PosteriorError: the folder does not tell, or the run is not there.
    """
    home = read_json(adapted / HOME)
    if not isinstance(home, dict) or not isinstance(home.get("run"), str):
        raise PosteriorError(f"{adapted / HOME} is damaged: it names no 'run'. Run adapt again.")
    run = Path(os.path.normpath(adapted.resolve() / home["run"]))
    if not run.is_dir():
        raise PosteriorError(
            f"{adapted} needs the run it was adapted from: expected {run}, which is not there. Put it back (the two "
            "folders may move together), or run adapt again."
        )
    return run


def load_language_model_of(run: Path) -> LanguageModel:
    """The language model that a run's posterior was fitted with, without the posterior itself.

    Raises:
        PosteriorError: there are no settings of a run, or they are damaged.
    """
    path = run / CONFIG
    facts = read_json(path)
    if not isinstance(facts, dict):
        raise PosteriorError(f"{path} is damaged: expected settings, got {facts!r}. Restore it, or run again.")
    return build_language_model(RunConfig.from_dict(facts, str(path)).language_model)


def load_posterior(
    run: str | Path, lm: LanguageModel | None = None, *, model: Made = None, guide: Made = None
) -> Posterior:
    """Read the posterior of a run's folder; by default with the language model that its settings name.

    Args:
        run: the folder that ``fit_posterior(..., run=run)``, ``bayes-lora fit`` or ``bayes-lora demo`` wrote.
        lm: the language model, if it is loaded already.
        model: see :meth:`bayes_lora.posterior.posterior.Posterior.load`.
        guide: likewise.

    Raises:
        PosteriorError: as ``Posterior.load``.
    """
    lm = lm or load_language_model_of(Path(run))
    return Posterior.load(Path(run) / POSTERIOR, lm, model=model, guide=guide)


def identity(config: RunConfig, tasks: TaskSet) -> list[Any]:
    """What must be the same for a run to go on: the settings, and each task's examples, in order.

    ``fit.steps`` and ``fit.patience`` are left out, for they say only when to stop, and so is the cache's place.
    """
    settings = config.to_dict()
    for name in ("cache_gib", "cache_folder", "token_cache"):
        del settings["language_model"][name]
    settings["fit"] = {name: value for name, value in settings["fit"].items() if name not in ("steps", "patience")}
    return [settings, [[name, _digest(task)] for name, task in tasks.items()]]


def _digest(task: Task) -> str:
    content = [[e.input, e.options, e.answer, *e.references] for e in task.examples]
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclass
class RunLogger:
    """What a fit writes to its folder and shows on its way.

    Attributes:
        run: the folder; None writes nothing.
        objective: model and guide.
        optimizer: holds the moments that a checkpoint needs.
        identity: see :func:`identity`.
        progress: shows the bar; None shows nothing.
        bar: the bar, once it is open.
    """

    run: Path | None
    objective: BetaELBO
    optimizer: torch.optim.Optimizer
    identity: list[Any]
    progress: Progress | None
    bar: TaskID | None = None

    def resumed(self) -> FitState:
        """The state of the folder's checkpoint, or that of a fit that begins."""
        if self.run is None or not (self.run / CHECKPOINT).exists():
            return FitState()
        return load_checkpoint(self.run / CHECKPOINT, self.objective, self.optimizer, self.identity)

    def open_bar(self, state: FitState, steps: int) -> None:
        """Show how many of ``steps`` are done."""
        if self.progress is not None:
            self.bar = self.progress.add_task("meta-learning", total=steps, completed=state.step)

    def on_step(self, state: FitState, loss: float) -> None:
        """Move the bar."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=state.step, description=f"meta-learning, loss {loss:.2f}")

    def on_evaluate(self, state: FitState) -> None:
        """Show the look; write a checkpoint and the curve."""
        if self.progress is not None:
            values = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in state.history[-1].items())
            self.progress.console.print(", ".join(values))
        if self.run is not None:
            save_checkpoint(self.run / CHECKPOINT, self.objective, self.optimizer, state, self.identity)
            write_json(self.run / CURVE, state.history)

    def close_bar(self, state: FitState) -> None:
        """Fill the bar: a fit that ran out of patience is done, too."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, total=state.step, completed=state.step)
