"""The folder of a run: its settings, the tasks its posterior was fitted on, and the checkpoints and logs of a fit."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from bayes_lora.errors import ConfigError, PosteriorError, RunFolderError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.fingerprint import FINGERPRINT
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.model_files import warn_of_download
from bayes_lora.posterior.classes import Made
from bayes_lora.posterior.posterior import FACTS, Posterior
from bayes_lora.recipes.config import LanguageModelConfig, RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from bayes_lora.tasks.readers.card import Card, card_from, card_values
from bayes_lora.tasks.readers.questions import OWN_OPTIONS
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Sites
from bayes_lora.utils.reading import read_facts, read_json
from bayes_lora.utils.storage import write_json, writing

__all__ = [
    "RunLogger",
    "check_run_folder",
    "digest",
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
HOME = "run.json"  # in an adapted folder: the run of its posterior
HALVES = ("training", "held_out")


def prepare_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> Path:
    """Make a run folder, replacing an existing one if ``overwrite`` is set (and ``resume`` is not).

    Raises:
        RunFolderError: see :func:`check_run_folder`; or the folder cannot be written.
    """
    check_run_folder(run, resume=resume, overwrite=overwrite)
    with writing(run):
        if run.exists() and not resume:
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
    return run


def check_run_folder(run: Path, *, resume: bool = False, overwrite: bool = False) -> None:
    """Check whether a run may use a folder, without changing it. A missing or empty folder may always be used.

    Raises:
        RunFolderError: it has a run, and neither ``resume`` nor ``overwrite`` is set; or it is not a run folder.
    """
    if not run.exists() or (run.is_dir() and not any(run.iterdir())):
        return
    if not (run / CONFIG).exists():
        raise RunFolderError(f"{run} exists and is not a run folder. Choose another name.")
    if not (resume or overwrite):
        cure = "Use --resume to continue, --overwrite to start over, or another --run."
        raise RunFolderError(f"{run} already exists. {cure}")


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


def write_home(path: Path, run: Path, adapted: Path, card: Card | None = None) -> None:
    """Record in an adapted folder the path of the run, and the card that reads questions from a table.

    The path is relative to the folder, so that both can be moved together.
    """
    facts: dict[str, Any] = {"run": os.path.relpath(run.resolve(), adapted.resolve())}
    write_json(path, facts | ({} if card is None else {"questions": card_values(card)}))


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
    if not isinstance(home, dict) or not isinstance(home.get("run"), str):
        raise PosteriorError(f"{adapted / HOME} is damaged: it has no 'run'. Run adapt again.")
    run = Path(os.path.normpath(adapted.resolve() / home["run"]))
    if not run.is_dir():
        raise PosteriorError(
            f"{adapted} needs the run it was adapted from: expected {run}, which does not exist. Restore it (the two "
            "folders can be moved together), or run adapt again."
        )
    return run


def load_language_model_of(run: Path) -> LanguageModel:
    """Load the language model of a run's posterior, without the posterior.

    Raises:
        PosteriorError: the settings of the run are missing or damaged.
    """
    path = run / CONFIG
    settings = RunConfig.from_dict(read_facts(path), str(path)).language_model
    _check_rank(settings, run)
    warn_of_download(settings.name, settings.revision, path, adapter=settings.adapter)
    # The cache is of the machine that fitted.
    return build_language_model(replace(settings, cache_folder=None, cache_gib=LanguageModelConfig().cache_gib))


def _check_rank(settings: LanguageModelConfig, run: Path) -> None:
    """Check that the settings ask for LoRA factors as large as those of the posterior, before these are made."""
    path = run / POSTERIOR / FACTS
    saved = read_facts(path).get(FINGERPRINT) if path.exists() else None
    sites = saved.get("shapes") if isinstance(saved, dict) else None
    shapes = [shape for site, shape in sites.items() if ".lora_A" in site] if isinstance(sites, dict) else []
    ranks = [shape[1] for shape in shapes if isinstance(shape, list) and len(shape) == 3 and type(shape[1]) is int]
    if settings.r is not None and ranks and settings.r > max(ranks):
        raise PosteriorError(
            f"{run / CONFIG} is damaged: expected the rank of the posterior's LoRA, {max(ranks)}, got "
            f"{settings.r:.6g}. Restore it, or run again."
        )


def load_posterior(
    run: str | Path, lm: LanguageModel | None = None, *, model: Made = None, guide: Made = None
) -> Posterior:
    """Load the posterior of a run folder, by default with the language model of its settings.

    Args:
        run: a folder written by ``fit_posterior(..., run=run)``, ``bayes-lora fit`` or ``bayes-lora demo``.
        lm: the language model, if it is already loaded.
        model: see :meth:`bayes_lora.posterior.posterior.Posterior.load`.
        guide: see :meth:`bayes_lora.posterior.posterior.Posterior.load`.

    Raises:
        PosteriorError: there is no posterior; otherwise see :meth:`bayes_lora.posterior.posterior.Posterior.load`.
    """
    folder = Path(run) / POSTERIOR
    if not folder.is_dir():
        raise PosteriorError(f"{folder} is missing: expected the folder of a run that has ended. Fit first.")
    lm = lm or load_language_model_of(Path(run))
    return Posterior.load(folder, lm, model=model, guide=guide)


def identity(config: RunConfig, tasks: TaskSet) -> list[Any]:
    """Return what must be equal to resume a run: the settings, and the examples of each task, in order.

    ``fit.steps`` and ``fit.patience`` are left out, because they only decide when to stop, and so are settings of the
    cache and of kernels.
    """
    settings = config.to_dict()
    for name in ("cache_gib", "cache_folder", "disk_cache", "linear_backend"):
        del settings["language_model"][name]
    settings["fit"] = {name: value for name, value in settings["fit"].items() if name not in ("steps", "patience")}
    return [settings, [[name, _digest(task)] for name, task in tasks.items()]]


def digest(values: Sites) -> str:
    """Return a hash of values, to compare those of a resumed run with."""
    found = blake2b(digest_size=16)
    for site, value in values.items():
        found.update(site.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def _digest(task: Task) -> str:
    content = [[e.input, e.options, e.answer, *e.references] for e in task.examples]
    return blake2b(json.dumps(content).encode(), digest_size=16).hexdigest()


@dataclass
class RunLogger:
    """Writes checkpoints and the history of a fit, and shows its progress.

    Attributes:
        run: the run folder; None writes nothing.
        lm: the language model.
        objective: model and guide.
        optimizer: the optimizer, whose moments are part of a checkpoint.
        identity: see :func:`identity`.
        progress: shows the progress bar; None shows nothing.
        bar: the progress bar, once it is open.
    """

    run: Path | None
    lm: LanguageModel
    objective: BetaELBO
    optimizer: torch.optim.Optimizer
    identity: list[Any]
    progress: Progress | None
    bar: TaskID | None = None

    def resumed(self) -> FitState:
        """Return the state of the folder's checkpoint, or the initial state if there is none."""
        if self.run is None or not (self.run / CHECKPOINT).exists():
            return FitState()
        return load_checkpoint(self.run / CHECKPOINT, self.objective, self.optimizer, self.identity, self.lm)

    def open_bar(self, state: FitState, steps: int) -> None:
        """Open the progress bar of ``steps`` steps."""
        if self.progress is not None:
            self.bar = self.progress.add_task("meta-learning", total=steps, completed=state.step)

    def on_step(self, state: FitState, loss: float) -> None:
        """Advance the bar."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=state.step, description=f"meta-learning, loss {loss:.2f}")

    def on_evaluate(self, state: FitState) -> None:
        """Print the evaluation; write a checkpoint and the history."""
        if self.progress is not None:
            values = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in state.history[-1].items())
            self.progress.console.print(", ".join(values))
        if self.run is not None:
            save_checkpoint(self.run / CHECKPOINT, self.objective, self.optimizer, state, self.identity, self.lm)
            write_json(self.run / CURVE, state.history)

    def close_bar(self, state: FitState) -> None:
        """Complete the bar, also after early stopping."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, total=state.step, completed=state.step)
