"""Choosing beta: a fit for each value, compared on the held-out tasks."""

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
from bayes_lora.runs.fit import build_episodes, fit_posterior
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.seeding import seeded

__all__ = ["BetaPoint", "sweep_beta", "sweep_table"]


@dataclass(frozen=True)
class BetaPoint:
    """One value of beta, after its fit.

    Attributes:
        beta: the value.
        nll: predictive NLL of the held-out tasks' query, nats per example, of draws from q(phi | support) as fitted.
        width: factor on its standard deviations that suits those tasks best.
        nll_at_width: the NLL there.
        divergence: KL(q(phi | support) || p(phi | theta)), nats per held-out task.
        posterior: what was fitted.
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
    """Fit once for each beta, everything else alike: the same held-out tasks, episodes and seeds.

    The training loss cannot choose beta, for it contains it. A beta is too small where ``width`` is well above 1 (the
    posterior is too sure of itself), and too large where ``divergence`` is near zero (it does not leave the prior).

    Args:
        lm: the language model.
        tasks: training tasks, some of which the settings hold out.
        betas: the values.
        config: the other settings.
        num_draws: S of the NLL.
        progress: shows bars.

    Raises:
        ConfigError: no value is given, or the settings hold no task back.
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
        with seeded(config.seed, lm.device):
            nll[width] = held_out_nll(objective, held_out, num_draws, width)
    with evaluating(objective):
        divergence = fmean(objective.terms(episode)["kl"] for episode in held_out)
    return BetaPoint(beta, nll[1.0], posterior.width, nll[posterior.width], divergence, posterior)


def sweep_table(points: Sequence[BetaPoint]) -> Table:
    """One line per beta, the best NLL in bold."""
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
