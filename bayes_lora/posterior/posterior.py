"""A fitted posterior over theta and its guide: adapt to new tasks, save, load."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from bayes_lora.errors import ConfigError, PosteriorError, TaskError
from bayes_lora.guides import TaskGuide
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.classes import Made, describe, make_guide, make_model
from bayes_lora.posterior.diagnose import Diagnosis, diagnose
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks.task import Task
from bayes_lora.types import Guide, Model, Sites
from bayes_lora.utils.allocation import AllocationLimit
from bayes_lora.utils.reading import SHA256, check_finite, check_like, positive, read_facts, read_header, read_tensors
from bayes_lora.utils.storage import new_folder, write_json, write_tensors

__all__ = ["Posterior", "check_pair"]

TENSORS, FACTS = "posterior.safetensors", "posterior.json"
INITIAL = "initial."


class Posterior:
    """The result of a fit: q(theta), and a guide that turns a support set into q(phi | support).

    Args:
        lm: the language model.
        model: the model.
        guide: the fitted guide.
        beta: weight of KL(q(phi) || p(phi | theta)) in gradient steps of adaptation.
        gamma: weight of KL(q(theta) || p(theta)); by default beta.
        width: factor on the standard deviations of q(phi | support), see :mod:`bayes_lora.posterior.calibrate`.
        temperature: divides the option scores, see :mod:`bayes_lora.posterior.calibrate`.

    Attributes:
        objective: the beta-ELBO of model and guide.
    """

    def __init__(
        self,
        lm: LanguageModel,
        model: Model,
        guide: Guide,
        *,
        beta: float = 1.0,
        gamma: float | None = None,
        width: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        check_pair(model, guide)
        self.lm, self.width, self.temperature = lm, width, temperature
        self.objective = BetaELBO(model, guide, beta=beta, gamma=gamma).eval()

    @classmethod
    def from_objective(
        cls, lm: LanguageModel, objective: BetaELBO, *, width: float = 1.0, temperature: float = 1.0
    ) -> Posterior:
        """Make the posterior of a fitted objective: its model and guide, with its beta and context."""
        found = cls.__new__(cls)
        found.lm, found.objective, found.width, found.temperature = lm, objective.eval(), width, temperature
        return found

    @property
    def model(self) -> Model:
        """The model."""
        model: Model = self.objective.model
        return model

    @property
    def guide(self) -> Guide:
        """The fitted guide."""
        guide: Guide = self.objective.guide
        return guide

    @property
    def default_steps(self) -> int:
        """Gradient steps that the command ``adapt`` takes by default: 10, or 0 after a posterior in closed form.

        A posterior that predicts with linear scores is the optimum of the linear model already.
        """
        return 0 if getattr(self.guide, "predictive", "draws") == "linear" else 10

    def adapt(
        self,
        tasks: Task | Sequence[Task] | Mapping[str, Task],
        *,
        steps: int = 0,
        learning_rate: float = 2e-3,
        width: float | None = None,
        seed: int = 0,
    ) -> TaskPosterior:
        """Return the posterior of each task given its ``support``, refined by ``steps`` gradient steps.

        Its standard deviations are multiplied by ``width``, by default the posterior's own.

        Raises:
            TaskError: something else than tasks was passed.
        """
        width = self.width if width is None else width
        listed: list[Any] = (
            [tasks] if isinstance(tasks, Task) else list(tasks.values() if isinstance(tasks, Mapping) else tasks)
        )
        if not all(isinstance(task, Task) for task in listed):
            raise TaskError(
                f"tasks: expected a Task, or a list of them, got {tasks!r:.60}. See bayes_lora.tasks.load_tasks."
            )
        found = adapt(self.objective, self.lm, listed, steps=steps, learning_rate=learning_rate, width=width, seed=seed)
        return replace(found, temperature=self.temperature)

    def diagnose(self, tasks: Sequence[Task], *, steps: int = 0, num_draws: int = 10, seed: int = 0) -> Diagnosis:
        """Whether draws change predictions on query examples, and how wide each site is next to its prior."""
        calibration = {"width": self.width, "temperature": self.temperature}
        return diagnose(
            self.objective, self.lm, list(tasks), steps=steps, num_draws=num_draws, seed=seed, **calibration
        )

    def save(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Write parameters (safetensors), classes and their settings (JSON) to a folder.

        Raises:
            RunFolderError: the folder exists.
            PosteriorError: the model or the guide cannot be described in a file, such as a plain function.
        """
        with new_folder(Path(path), overwrite=overwrite) as folder:
            self.write(folder)

    def write(self, folder: Path) -> None:
        """Write the posterior's two files into an existing folder."""
        objective, model = self.objective, self.model
        described = {"model": describe(model, "model"), "guide": describe(self.guide, "guide")}
        if objective.context is not model.context:
            raise PosteriorError("context: expected the model's own, because a file cannot hold another one.")
        facts: dict[str, Any] = described | {
            "beta": objective.target_beta,
            "gamma": objective.target_gamma,
            "width": self.width,
            "temperature": self.temperature,
            "frozen": [name for name, parameter in objective.named_parameters() if not parameter.requires_grad],
            FINGERPRINT: fingerprint(self.lm),
            "arithmetic": self.lm.arithmetic.to_dict(),
            "versions": {
                "torch": torch.__version__,
                "transformers": transformers.__version__,
                "peft": peft.__version__,
            },
        }
        tensors = objective.state_dict()
        own = self.lm.sites.initial()
        # Other sites, such as the option head's, have the values of their settings.
        initial = {site: model.initial[site] for site in own}
        if any(not torch.equal(value, own[site]) for site, value in initial.items()):
            tensors |= {f"{INITIAL}{site}": value for site, value in initial.items()}
        facts[SHA256] = write_tensors(folder / TENSORS, tensors)
        write_json(folder / FACTS, facts)

    @classmethod
    def load(
        cls, path: str | Path, lm: LanguageModel, *, model: Made = None, guide: Made = None, same_copy: bool = True
    ) -> Posterior:
        """Load a saved posterior. Its predictions are equal to those before saving, bit for bit.

        Args:
            path: the folder.
            lm: the language model it was fitted with, see :func:`bayes_lora.load_posterior`.
            model: the model's class, if it is not one of :mod:`bayes_lora.models`; or a function of the likelihood that
                makes the model.
            guide: the guide's class, if it is not one of :mod:`bayes_lora.guides`; or a function of the model.
            same_copy: whether the language model must have the same weights and tokenizer. Otherwise another copy of it
                passes with a warning, such as the hub's next to one quantised to 4 bits.

        Raises:
            PosteriorError: a file is missing or damaged, or was saved with another language model; or it names a class
                that is not one of this package's, and that was not passed.
        """
        path = Path(path)
        facts, header = read_facts(path / FACTS), read_header(path / TENSORS)
        check_fingerprint(facts, lm, path / FACTS, same_copy=same_copy)
        found = _made(facts, header, path, lm, model, guide)
        objective = found.objective
        initial = {f"{INITIAL}{site}" for site in lm.sites.shapes}
        saved = {name: value for name, value in header.items() if name not in initial}
        check_like(saved, objective.state_dict(), path / TENSORS)
        tensors = read_tensors(path / TENSORS, facts.get(SHA256))
        check_finite(tensors, path / TENSORS)
        for name, value in [*objective.named_parameters(), *objective.named_buffers()]:
            if name in saved:  # of the dtype that was saved, which may be another than the constructor's
                value.data = value.data.to(saved[name].dtype)
        frozen = _section(facts, "frozen", path)
        if not isinstance(frozen, list) or not all(isinstance(name, str) and name in saved for name in frozen):
            raise PosteriorError(
                f"{path / FACTS} is damaged: expected names of parameters 'frozen', got {frozen!r:.200}."
            )
        for name, parameter in objective.named_parameters():
            parameter.requires_grad_(name not in frozen)
        objective.to(lm.device).load_state_dict({name: tensors[name] for name in saved})
        return found


def _made(facts: dict[str, Any], header: Sites, path: Path, lm: LanguageModel, model: Made, guide: Made) -> Posterior:
    """Make the posterior that was saved, with initial parameters."""
    # In the order of the sites, in which random numbers are drawn: a file has none.
    own = {site: f"{INITIAL}{site}" for site in lm.sites.shapes if f"{INITIAL}{site}" in header}
    initial = lm.sites.initial()
    check_like(
        {site: header[name] for site, name in own.items()}, {site: initial[site] for site in own}, path / TENSORS
    )
    values = read_tensors(path / TENSORS, names=own.values()) if own else {}
    given = {site: values[name].to(lm.device) for site, name in own.items()} or None
    factors = {name: positive(facts, name, path / FACTS) for name in ("beta", "gamma", "width", "temperature")}
    where = str(path / FACTS)
    with AllocationLimit([*header.values(), *initial.values()]):
        made = make_model(_section(facts, "model", path), lm, given, model, where)
        return Posterior(lm, made, make_guide(_section(facts, "guide", path), made, guide, where), **factors)


def check_pair(model: Model, guide: Guide) -> None:
    """Check that a guide was made for this model.

    Raises:
        ConfigError: it was made for another one.
    """
    if isinstance(guide, TaskGuide) and guide.model is not model:
        raise ConfigError(
            f"guide: this {type(guide).__name__} was made for another model. Make it for the one that is passed: "
            f"{type(guide).__name__}(model)."
        )


def _section(facts: dict[str, Any], name: str, path: Path) -> Any:
    if name not in facts:
        raise PosteriorError(f"{path / FACTS} is damaged: it has no {name!r}. Restore it, or run again.")
    return facts[name]
