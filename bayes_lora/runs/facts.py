"""What results were made with: data, versions, language model, and the distance of posteriors from the prior."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bayes_lora import __version__
from bayes_lora.lm.fingerprint import FINGERPRINT, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.runs.folder import ADAPTATION
from bayes_lora.runs.logger import digest_of_task
from bayes_lora.tasks.task import Task
from bayes_lora.utils.storage import write_json

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["facts_of", "mean_distance", "prior_distances", "versions", "write_adaptation"]

PACKAGES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "pyro": "pyro-ppl", "numpy": "numpy"}


def versions() -> dict[str, str]:
    """Return versions by name: bayes_lora, python, torch, transformers, peft, pyro and numpy."""
    found = {"bayes_lora": __version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}


def facts_of(lm: LanguageModel, tasks: Sequence[Task]) -> dict[str, Any]:
    """Return versions of packages, sizes and hashes of tasks, and the fingerprint of the language model."""
    sizes = {
        task.name: {"support": len(task.support), "query": len(task.query), "fingerprint": digest_of_task(task)}
        for task in tasks
    }
    return {"versions": versions(), "tasks": sizes, FINGERPRINT: fingerprint(lm)}


def prior_distances(adapted: TaskPosterior) -> list[pd.DataFrame]:
    """Return :meth:`TaskPosterior.distance_from_prior`.

    There is none if the prior is not known or has no moments, or if whole updates are random, whose moments are large.
    """
    if adapted.is_deferred or not adapted.prior:
        return []
    try:
        return [adapted.distance_from_prior()]
    except NotImplementedError:  # raised by distributions without a mean or a variance
        return []


def mean_distance(frames: Sequence[pd.DataFrame]) -> list[dict[str, Any]]:
    """Return the mean over the tasks of all frames, a row per site and layer. Numbers that are not finite are None."""
    if not sum(map(len, frames)):
        return []
    import pandas as pd

    means = pd.concat(frames).groupby(["site", "module"], sort=False).mean(numeric_only=True)
    rows = means.reset_index().to_dict("records")
    infinite = {float("inf"), float("-inf")}
    return [{str(k): None if v != v or v in infinite else v for k, v in row.items()} for row in rows]


def write_adaptation(folder: Path, adapted: TaskPosterior, tasks: Sequence[Task]) -> None:
    """Write ``adaptation.json`` into an adapted folder: facts, and in ``layers`` the distance from the prior."""
    layers = {"": mean_distance(prior_distances(adapted))}
    write_json(folder / ADAPTATION, {**facts_of(adapted.lm, tasks), "layers": {k: v for k, v in layers.items() if v}})
