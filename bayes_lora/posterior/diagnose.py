r"""Diagnosis of a posterior: whether draws change its predictions, and how wide it is next to its prior.

The draws of a posterior that is too narrow predict what its mean predicts, and it is calibrated like a point. One that
is too wide predicts worse than its mean. Neither shows in training: the loss is finite and the divergence positive.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from bayes_lora.distributions.divergence import divergence
from bayes_lora.distributions.weight_distribution import WeightDistribution
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.posterior.adapt import adapt_at
from bayes_lora.posterior.predict import score
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks.task import Task
from bayes_lora.utils.tables import Column, ResultTable

__all__ = ["Diagnosis", "SiteWidth", "diagnose"]

NARROW, WIDE, BENT = 0.01, 0.2, 0.1
"""Draws that change no answer and move probabilities by less than ``NARROW`` have no effect; draws that cost more than
``WIDE`` nats are noise. If draws, or the network at the mean, cost ``BENT`` nats more than linear scores, the posterior
has left the range in which scores are linear."""


@dataclass(frozen=True)
class SiteWidth:
    """The width of one site, averaged over tasks.

    Attributes:
        divergence: KL(q(phi | support) || p(phi | theta)) of a task, nats.
        scale: mean standard deviation of q(phi | support).
        prior_scale: mean standard deviation of p(phi | theta).
    """

    divergence: float
    scale: float
    prior_scale: float


@dataclass(frozen=True)
class Diagnosis:
    """The effect of posterior draws on predictions, averaged over tasks.

    Attributes:
        nll: mean NLL (nats) of the posterior mean, and of the average over draws.
        ece: ECE of the posterior mean, and of the average over draws, over tasks with options; NaN without any.
        moved: mean change of the answers' probabilities (total variation).
        changed: share of the questions whose most probable answer changes.
        sites: width of each site.
        warnings: problems, with the setting to change; empty if there are none.
        linear: NLL (nats) and ECE of linear predictions; None if the posterior predicts with draws.
    """

    nll: tuple[float, float]
    ece: tuple[float, float]
    moved: float
    changed: float
    sites: dict[str, SiteWidth]
    warnings: tuple[str, ...]
    linear: tuple[float, float] | None = None

    def table(self) -> ResultTable:
        """Return a table with one row per site, and the effect of the draws in its title."""
        title = (
            f"mean / draws: NLL {self.nll[0]:.3f} / {self.nll[1]:.3f}, ECE {self.ece[0]:.3f} / {self.ece[1]:.3f}; "
            f"{self.changed:.1%} of the answers changed, probabilities moved by {self.moved:.3f}"
        )
        if self.linear:
            title += f"; linear scores: NLL {self.linear[0]:.3f}, ECE {self.linear[1]:.3f}"
        columns = [
            Column("site", lambda row: row["site"], is_number=False),
            Column("KL (nats a task)", lambda row: f"{row['divergence_nats']:.1f}"),
            Column("sd", lambda row: f"{row['scale']:.2e}"),
            Column("prior sd", lambda row: f"{row['prior_scale']:.2e}"),
        ]
        rows = [
            {
                "site": site,
                "divergence_nats": width.divergence,
                "scale": width.scale,
                "prior_scale": width.prior_scale,
            }
            for site, width in self.sites.items()
        ]
        return ResultTable("sites", columns, rows, title, notes=self.warnings)


def diagnose(
    objective: BetaELBO,
    lm: LanguageModel,
    tasks: Sequence[Task],
    *,
    steps: int = 0,
    learning_rate: float = 2e-3,
    width: float = 1.0,
    temperature: float = 1.0,
    num_draws: int = 10,
    seed: int = 0,
) -> Diagnosis:
    """Adapt to tasks, and compare the mean with draws on their query examples.

    Args:
        objective: the fitted model and guide.
        lm: the language model.
        tasks: split into support and query.
        steps: gradient steps after the guide's one pass.
        learning_rate: theirs.
        width: factor on the standard deviations.
        temperature: by which option scores are divided.
        num_draws: S.
        seed: of the draws.
    """
    adapted, theta = adapt_at(objective, lm, tasks, steps, learning_rate, width, seed)
    adapted = replace(adapted, temperature=temperature)
    queries = [task.query for task in tasks]
    mean, drawn = (adapted.predict(queries, num_draws=count, seed=seed, predictive="draws") for count in (0, num_draws))
    linear = _scores(tasks, adapted.predict(queries)) if adapted.predictive == "linear" else None
    nll, ece = zip(_scores(tasks, mean), _scores(tasks, drawn), strict=True)
    pairs = list(zip(mean, drawn, strict=True))
    moved = fmean(float((a.exp() - b.exp()).abs().sum(-1).mean()) / 2 for a, b in pairs)
    changed = fmean(float((a.argmax(-1) != b.argmax(-1)).double().mean()) for a, b in pairs)
    model: Any = objective.model
    sites = _sites(model.phi_prior(theta), adapted)
    warnings = _warnings(nll, moved, changed, sites, adapted.is_point, linear)
    return Diagnosis(nll, ece, moved, changed, sites, warnings, linear)


@torch.no_grad()
def _sites(prior: dict[str, Any], adapted: TaskPosterior) -> dict[str, SiteWidth]:
    sites = {}
    for site, q in adapted.distributions().items():
        p = prior[site]
        sites[site] = SiteWidth(float(divergence(q, p).mean()), _mean_scale(q), _mean_scale(p))
    return sites


def _mean_scale(fn: Any) -> float:
    return float(fn.mean_stddev() if isinstance(fn, WeightDistribution) else fn.stddev.mean())


def _scores(tasks: Sequence[Task], predictions: Sequence[Tensor]) -> tuple[float, float]:
    """Mean NLL, and mean ECE of the tasks with options."""
    nll = [-float(p[:, 0].mean()) for task, p in zip(tasks, predictions, strict=True) if task.free_form]
    known = [score(task.query, p) for task, p in zip(tasks, predictions, strict=True) if not task.free_form]
    return fmean([*nll, *(one.nll for one in known)]), fmean(one.ece for one in known) if known else math.nan


def _warnings(
    nll: Any, moved: float, changed: float, sites: dict[str, SiteWidth], point: bool, linear: tuple[float, float] | None
) -> tuple[str, ...]:
    if point:
        return ("The posterior is a point: draws are the mean. Use a model and a guide whose phi has a scale.",)
    found = []
    if moved < NARROW and not changed:
        found.append(
            f"Collapsed: draws move probabilities by {moved:.4f} and change no answer. Raise prior.initial_scale or "
            "objective.beta, or adapt with a larger width."
        )
    if linear and max(nll) > linear[0] + BENT:
        found.append(
            "The posterior has left the range in which scores are linear in the weights. NLL minus that of linear "
            f"scores: {nll[0] - linear[0]:+.2f} nats for the mean, {nll[1] - linear[0]:+.2f} for draws. Keep "
            'predictive="linear", or adapt with a smaller width.'
        )
    elif nll[1] > nll[0] + WIDE:
        found.append(
            f"Run-away: draws cost {nll[1] - nll[0]:.2f} nats beside the mean. Lower prior.initial_scale, or adapt "
            "with a smaller width."
        )
    wide = [site for site, width in sites.items() if width.scale > 3.0 * width.prior_scale]
    if wide:
        found.append(f"Wider than three times the prior: {wide[:3]}. Raise objective.beta, which holds q to the prior.")
    return tuple(found)
