"""Sweeps: one fit per value of beta, or per configuration, maybe on other machines; compared on held-out tasks."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Protocol

from rich.progress import Progress

from bayes_lora.errors import ConfigError
from bayes_lora.infer.objective import evaluating
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_language_model
from bayes_lora.runs.empirical_bayes import held_out_linear_nll
from bayes_lora.runs.fit import build_episodes, fit_posterior, split_tasks
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.seeding import seeded
from bayes_lora.utils.tables import Column, ResultTable

__all__ = ["BetaPoint", "Executor", "sweep", "sweep_beta", "sweep_table"]


class Executor(Protocol):
    """Runs calls in other processes or on other machines: one of ``concurrent.futures``, or of ``submitit``."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """Start a call, and return a future, whose ``result()`` waits for the result."""


def sweep(
    tasks: TaskSet, configs: Mapping[str, RunConfig], folder: str | Path, executor: Executor | None = None
) -> dict[str, dict[str, float]]:
    """Fit once per configuration, and return the best row of each history, with ``held_out_nll`` to compare.

    Each fit loads the language model of its configuration, and has a run folder. A sweep that is called again resumes
    its fits.

    Args:
        tasks: training tasks.
        configs: configurations by name.
        folder: folder of the run folders, which have these names; on a disk that all machines share.
        executor: where fits run; by default here, one after another.
    """
    calls = {name: (tasks, config, Path(folder).absolute() / name) for name, config in configs.items()}
    if executor is None:
        return {name: _fit_run(*call) for name, call in calls.items()}
    jobs = {name: executor.submit(_fit_run, *call) for name, call in calls.items()}
    return {name: job.result() for name, job in jobs.items()}


def _fit_run(tasks: TaskSet, config: RunConfig, run: Path) -> dict[str, float]:
    lm = build_language_model(config.language_model)
    _, state = fit_posterior(lm, tasks, config, run=run, resume=True)
    return state.history[state.best or 0] if state.history else {}


@dataclass(frozen=True)
class BetaPoint:
    """Results of a fit with one value of beta.

    Attributes:
        beta: the value of beta.
        nll: predictive NLL of the held-out tasks' query, nats per example, with draws from q(phi | support), or with
            linear scores for a guide that predicts with them.
        width: factor of the standard deviations of q(phi | support) that minimises the held-out NLL.
        nll_at_width: the NLL at that width.
        divergence: KL(q(phi | support) || p(phi | theta)), nats per held-out task.
        posterior: the fitted posterior.
    """

    beta: float
    nll: float
    width: float
    nll_at_width: float
    divergence: float
    posterior: Posterior


def sweep_beta(
    lm: LanguageModel,
    tasks: TaskSet,
    betas: Sequence[float],
    config: RunConfig | None = None,
    *,
    num_draws: int = 5,
    progress: Progress | None = None,
) -> list[BetaPoint]:
    """Fit once per value of beta, with the same held-out tasks, episodes and seeds.

    The training loss depends on beta, so it cannot be used to choose it. Beta is too small if ``width`` is well above 1
    (the posterior is overconfident), and too large if ``divergence`` is near zero (the posterior equals the prior).

    Args:
        lm: the language model.
        tasks: training tasks, some of which are held out.
        betas: values of beta.
        config: the other settings.
        num_draws: posterior draws of the NLL.
        progress: shows progress bars.

    Raises:
        ConfigError: there are no values, or no held-out tasks.
    """
    config = config or RunConfig()
    if not betas or not config.episodes.held_out:
        got = f"betas={list(betas)}, episodes.held_out={config.episodes.held_out}"
        raise ConfigError(f"expected values of beta, and held-out tasks to compare them on; got {got}.")
    return [_point(lm, tasks, beta, config, num_draws, progress) for beta in betas]


def _point(
    lm: LanguageModel, tasks: TaskSet, beta: float, config: RunConfig, num_draws: int, progress: Progress | None
) -> BetaPoint:
    config = replace(config, objective=replace(config.objective, beta=beta))
    posterior, _ = fit_posterior(lm, tasks, config, progress=progress)
    _, held_out = build_episodes(lm, tasks, config)
    objective, nll = posterior.objective, {}
    for width in (1.0, posterior.width):
        if getattr(posterior.guide, "predictive", "draws") == "linear":
            nll[width] = held_out_linear_nll(lm, objective, split_tasks(tasks, config)[1], width)
            continue
        with seeded(config.seed, lm.device):
            nll[width] = held_out_nll(objective, held_out, num_draws, width)
    with evaluating(objective):
        divergence = fmean(objective.terms(episode)["kl"] for episode in held_out)
    return BetaPoint(beta, nll[1.0], posterior.width, nll[posterior.width], divergence, posterior)


def sweep_table(points: Sequence[BetaPoint]) -> ResultTable:
    """Return a table with a row per beta and the best NLL in bold."""
    columns = [
        Column("beta", lambda row: f"{row['beta']:g}"),
        Column("NLL", lambda row: f"{row['nll_nats']:.3f}"),
        Column("width", lambda row: f"{row['width']:g}"),
        Column("NLL at that width", lambda row: f"{row['nll_at_width_nats']:.3f}"),
        Column("KL per task (nats)", lambda row: f"{row['divergence_nats']:.1f}"),
    ]
    rows = [
        {
            "beta": point.beta,
            "nll_nats": point.nll,
            "width": point.width,
            "nll_at_width_nats": point.nll_at_width,
            "divergence_nats": point.divergence,
        }
        for point in points
    ]
    best = min(point.nll_at_width for point in points)
    winners = [index for index, point in enumerate(points) if point.nll_at_width == best]
    bold = frozenset((index, column.heading) for index in winners for column in columns)
    return ResultTable("sweep", columns, rows, bold=bold)
