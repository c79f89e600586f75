"""Checkpoints, history and progress of a fit, and what must be equal to resume it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from hashlib import blake2b
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress, TaskID

from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.training import FitState
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.checkpoint import load_checkpoint, save_checkpoint
from bayes_lora.runs.folder import CURVE
from bayes_lora.tasks.task import Task
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.types import Sites
from bayes_lora.utils.storage import write_json

__all__ = ["RunLogger", "digest", "identity"]

CHECKPOINT = "checkpoint"


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
        """Print the evaluation, and save."""
        if self.progress is not None:
            values = (f"{name.replace('_', ' ')} {value:.4g}" for name, value in state.history[-1].items())
            self.progress.console.print(", ".join(values))
        self.save(state)

    def save(self, state: FitState) -> None:
        """Write a checkpoint and the history."""
        if self.run is not None:
            save_checkpoint(self.run / CHECKPOINT, self.objective, self.optimizer, state, self.identity, self.lm)
            write_json(self.run / CURVE, state.history)

    def close_bar(self, state: FitState) -> None:
        """Complete the bar, also after early stopping."""
        if self.progress is not None and self.bar is not None:
            self.progress.update(self.bar, total=state.step, completed=state.step)
