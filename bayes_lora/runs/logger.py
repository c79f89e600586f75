"""Checkpoints, history and progress of a fit, and what must be equal to resume it."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.checkpoint import Checkpoints
from bayes_lora.runs.folder import CURVE
from bayes_lora.runs.tracking import FINAL, Trackers
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Sites
from bayes_lora.utils.signals import HeldSignals
from bayes_lora.utils.storage import write_json

__all__ = ["RunLogger", "digest", "digest_of_task", "identity"]

CHECKPOINT = "checkpoint"
SHARE = 20
"""By default a checkpoint is due when the time since the last one is this many times that of writing it."""
MAY_DIFFER = ("steps", "patience", "checkpoint_every")
"""Settings of the fit that may differ in a resumed run: they decide when to stop and to save."""


def identity(config: RunConfig, tasks: TaskSet) -> list[Any]:
    """Return what must be equal to resume a run: the settings, and the examples of each task, in order.

    ``fit.steps``, ``fit.patience`` and ``fit.checkpoint_every`` are left out, because they only decide when to stop and
    to save, and so are settings of the cache, of kernels and of trackers.
    """
    settings = config.to_dict()
    for name in ("cache_gib", "gpu_cache_gib", "cache_folder", "disk_cache", "linear_backend", "offload_trunk"):
        del settings["language_model"][name]
    del settings["tracking"]
    settings["fit"] = {name: value for name, value in settings["fit"].items() if name not in MAY_DIFFER}
    return [settings, [[name, digest_of_task(task)] for name, task in tasks.items()]]


def digest(values: Sites) -> str:
    """Return a hash of values, to compare those of a resumed run with."""
    found = blake2b(digest_size=16)
    for site, value in values.items():
        found.update(site.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return found.hexdigest()


def digest_of_task(task: Task) -> str:
    """Return a hash of the texts, options and answers of a task's examples, support first."""
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
        every: steps between checkpoints; by default see :class:`bayes_lora.infer.fit_config.FitConfig`.
        signals: signals to save and stop at.
        trackers: what shows the fit elsewhere; only rank 0 has some.
        bar: the progress bar, once it is open.
    """

    run: Path | None
    lm: LanguageModel
    objective: BetaELBO
    optimizer: torch.optim.Optimizer
    identity: list[Any]
    progress: Progress | None
    every: int | None = None
    signals: HeldSignals = field(default_factory=HeldSignals)
    trackers: Trackers = field(default_factory=Trackers)
    bar: TaskID | None = None
    _checkpoints: Checkpoints | None = field(default=None, init=False)
    _saved_at: float = field(default=0.0, init=False)
    _seconds: float = field(default=0.0, init=False)

    def __post_init__(self) -> None:
        if self.run is not None:
            self._checkpoints = Checkpoints(
                self.run / CHECKPOINT, self.objective, self.optimizer, self.identity, self.lm
            )

    def resumed(self) -> FitState:
        """Return the state of the folder's checkpoint, or the initial state if there is none."""
        if self._checkpoints is None or not self._checkpoints.exists():
            return FitState()
        state = self._checkpoints.load()
        if self.progress is not None:
            self.progress.console.print(f"resumed at step {state.step}")
        return state

    def open_bar(self, state: FitState, steps: int) -> None:
        """Open the progress bar of ``steps`` steps."""
        if self.progress is not None:
            self.bar = self.progress.add_task("meta-learning", total=steps, completed=state.step)

    def on_step(self, state: FitState, loss: float) -> None:
        """Advance the bar, and log the step."""
        self.trackers.log("train", state.terms, state.step)
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, completed=state.step, description=f"meta-learning, loss {loss:.2f}")

    def on_evaluate(self, state: FitState) -> None:
        """Print and log the evaluation, and write the history."""
        self._log_evaluation(state.history[-1])
        if self.progress is not None:
            values = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in state.history[-1].items())
            self.progress.console.print(", ".join(values))
        if self.run is not None:
            write_json(self.run / CURVE, state.history)

    def log_history(self, state: FitState) -> None:
        """Log the steps of a closed-form fit, which has ended."""
        for row in state.history:
            self._log_evaluation(row)

    def log_final(self, state: FitState, factors: dict[str, float]) -> None:
        """Log the row that is kept, and what was chosen on held-out tasks."""
        row = state.history[state.best or 0] if state.history else {}
        self.trackers.log(FINAL, {**row, **factors}, state.step, retry=True)

    def _log_evaluation(self, row: dict[str, float]) -> None:
        values = {name: value for name, value in row.items() if name != "step"}
        self.trackers.log("eval", values, int(row["step"]), retry=True)

    def save(self, state: FitState) -> None:
        """Write a checkpoint and the history."""
        if self.run is not None and self._checkpoints is not None:
            began = time.monotonic()
            self._checkpoints.save(state)
            write_json(self.run / CURVE, state.history)
            self.trackers.save()
            self._saved_at = time.monotonic()
            self._seconds = self._saved_at - began

    def due(self, state: FitState) -> bool:
        """Return whether a checkpoint follows this step, see :class:`bayes_lora.infer.fit_config.FitConfig`."""
        if self.every is not None:
            return state.step % self.every == 0
        evaluated = not state.losses
        return evaluated and time.monotonic() - self._saved_at >= SHARE * self._seconds

    def close_bar(self, state: FitState) -> None:
        """Complete the bar, also after early stopping."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, total=state.step, completed=state.step)
