"""A fitted posterior over theta and its guide: adapt to new tasks, save, load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bayes_lora.errors import PosteriorError
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.fingerprint import check_identity, identity
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.diagnose import Diagnosis, diagnose
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_language_model, build_objective
from bayes_lora.tasks.task import Task
from bayes_lora.utils.storage import new_folder, read_json, read_tensors, write_json, write_tensors

__all__ = ["Posterior"]

TENSORS, CONFIG = "posterior.safetensors", "posterior.json"


class Posterior:
    """What a fit returns: q(theta), and a guide that turns a support set into q(phi | support).

    Attributes:
        lm: the language model.
        objective: the fitted model and guide with their beta.
        config: the settings of the run.
        width: factor on the standard deviations of q(phi | support), chosen on held-back tasks
            (see :mod:`bayes_lora.posterior.calibrate`).
        temperature: by which option scores are divided, likewise (see :mod:`bayes_lora.posterior.temperature`).
    """

    def __init__(
        self,
        lm: LanguageModel,
        objective: BetaELBO,
        config: RunConfig,
        width: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        self.lm, self.objective, self.config = lm, objective, config
        self.width, self.temperature = width, temperature

    def adapt(
        self,
        tasks: Task | Sequence[Task] | Mapping[str, Task],
        *,
        steps: int = 0,
        learning_rate: float = 2e-3,
        width: float | None = None,
        seed: int = 0,
    ) -> TaskPosterior:
        """The posterior of each task given its ``support``: the guide's one pass, then ``steps`` gradient steps.

        Its standard deviations are multiplied by ``width``, by default the posterior's own.
        """
        width = self.width if width is None else width
        listed = [tasks] if isinstance(tasks, Task) else list(tasks.values() if isinstance(tasks, Mapping) else tasks)
        found = adapt(self.objective, self.lm, listed, steps=steps, learning_rate=learning_rate, width=width, seed=seed)
        return replace(found, temperature=self.temperature)

    def diagnose(self, tasks: Sequence[Task], *, steps: int = 0, num_draws: int = 10, seed: int = 0) -> Diagnosis:
        """Whether the draws do anything on these tasks' query examples, and how wide each site is beside its prior."""
        calibration = {"width": self.width, "temperature": self.temperature}
        return diagnose(
            self.objective, self.lm, list(tasks), steps=steps, num_draws=num_draws, seed=seed, **calibration
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write parameters (safetensors) and settings (JSON) to a folder.

        Raises:
            RunFolderError: the folder exists.
        """
        with new_folder(Path(path), overwrite=overwrite) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the posterior's two files into an existing folder."""
        write_tensors(folder / TENSORS, self.objective.state_dict())
        versions = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__}
        sites = {site: list(shape) for site, shape in self.lm.sites.shapes.items()}
        config = self.config.to_dict()
        config["language_model"]["cache_folder"] = None  # of this machine
        facts: dict[str, Any] = {"config": config, "sites": sites, "versions": versions}
        facts |= {"width": self.width, "temperature": self.temperature}
        write_json(folder / CONFIG, facts | identity(self.lm))

    @classmethod
    def load(cls, path: str | Path, lm: LanguageModel | None = None) -> Posterior:
        """Read a saved posterior; it predicts bit for bit what it did before.

        Args:
            path: the folder.
            lm: the language model; by default the one that the settings name is loaded.

        Raises:
            PosteriorError: a file is missing or damaged, or does not fit the language model, its weights included.
        """
        path = Path(path)
        facts, tensors = read_json(path / CONFIG), read_tensors(path / TENSORS)
        config = RunConfig.from_dict(_section(facts, "config", path), str(path / CONFIG))
        lm = lm or build_language_model(config.language_model)
        saved, here = _section(facts, "sites", path), {s: list(shape) for s, shape in lm.sites.shapes.items()}
        if saved != here:
            raise PosteriorError(f"{path}: made for LoRA sites {saved}, but {lm.name} has {here}.")
        check_identity(facts, lm, path)
        # Folders of version 0.1.0 may hold settings that the recipe dropped; what was fitted is here all the same.
        objective = build_objective(lm, config, strict=False)
        try:
            objective.load_state_dict(tensors)
        except RuntimeError as error:
            raise PosteriorError(f"{path / TENSORS} is damaged or of another version: {error}") from error
        return cls(lm, objective.eval(), config, *(_positive(facts, name, path) for name in ("width", "temperature")))


def _positive(facts: Any, name: str, path: Path) -> float:
    value = facts.get(name, 1.0)  # folders of version 0.1.0 have none
    if not isinstance(value, int | float) or not value > 0:
        raise PosteriorError(f"{path / CONFIG} is damaged: expected a positive {name!r}, got {value!r}.")
    return float(value)


def _section(facts: Any, name: str, path: Path) -> Any:
    if not isinstance(facts, dict) or name not in facts:
        raise PosteriorError(f"{path / CONFIG} is damaged: it has no {name!r}. Restore it, or run again.")
    return facts[name]
