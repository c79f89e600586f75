"""A sweep over beta: one fit per value, compared on the held-out tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from rich.progress import Progress
from rich.table import Table

from bayes_lora.errors import ConfigError
from bayes_lora.infer.objective import evaluating
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.runs.empirical_bayes import held_out_linear_nll
from bayes_lora.runs.fit import build_episodes, fit_posterior, split_tasks
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.seeding import seeded

__all__ = ["BetaPoint", "sweep_beta", "sweep_table"]


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


def sweep_table(points: Sequence[BetaPoint]) -> Table:
    """Return a table with one line per beta and the best NLL in bold."""
    table = Table("beta", "NLL", "width", "NLL at that width", "KL per task (nats)")
    best = min(point.nll_at_width for point in points)
    for point in points:
        bold = "bold" if point.nll_at_width == best else ""
        table.add_row(
            f"{point.beta:g}",
            f"{point.nll:.3f}",
            f"{point.width:g}",
            f"{point.nll_at_width:.3f}",
            f"{point.divergence:.1f}",
            style=bold,
        )
    return table
