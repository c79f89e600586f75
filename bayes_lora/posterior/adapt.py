"""From a fitted guide to the posterior of a new task: one pass, then K gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch

from bayes_lora.distributions.unconstrained import map_parameters, scaled, unconstrained
from bayes_lora.distributions.weight_distribution import WeightDistribution
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.errors import ConfigError, NonFiniteLoss
from bayes_lora.infer.components import Components
from bayes_lora.infer.descent import Descent, SiteParameters, constrained_sites, unconstrained_sites
from bayes_lora.infer.handlers import AtMean
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.sites import factor_sites
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks.task import Task
from bayes_lora.types import Distributions, Guide, Model, Sites
from bayes_lora.utils.seeding import seeded

__all__ = ["adapt", "adapt_at", "one_pass"]


def adapt(
    objective: BetaELBO,
    lm: LanguageModel,
    tasks: Sequence[Task],
    *,
    steps: int = 0,
    learning_rate: float = 2e-3,
    width: float = 1.0,
    seed: int = 0,
) -> TaskPosterior:
    """The posterior of each task given its support: the guide's one pass, then gradient steps.

    With ``steps > 0`` the guide's normals become free parameters, and Adam takes ``steps`` steps on the negative
    beta-ELBO of the support set, theta held at its mean; all tasks in one batched forward and backward per step.

    Args:
        objective: the fitted model and guide with their beta.
        lm: the language model.
        tasks: their ``support`` is read, nothing else.
        steps: K.
        learning_rate: Adam's, for loc and log scale.
        width: factor on the standard deviations in the end, see :mod:`bayes_lora.posterior.calibrate`.
        seed: of the draws inside the steps, and of those that the guide takes on its own.
    """
    return adapt_at(objective, lm, tasks, steps, learning_rate, width, seed)[0]


def adapt_at(
    objective: BetaELBO,
    lm: LanguageModel,
    tasks: Sequence[Task],
    steps: int,
    learning_rate: float,
    width: float,
    seed: int,
) -> tuple[TaskPosterior, Sites]:
    """What :func:`adapt` returns, and the mean of q(theta) at which it stands."""
    rows = [lm.encoder(task.support) for task in tasks]
    theta, start = one_pass(objective, collate(rows).unseen().to(lm.device), seed)
    if steps:
        # Components take their steps side by side, as tasks of their own.
        count = start.count if isinstance(start, Components) else 1
        episode = collate(rows * count).unseen().to(lm.device)
        begin, here = _flat(start) if count > 1 else start, theta
        if count > 1 and objective.guide.num_members > 1:
            here = _flat_theta(theta, len(tasks))
        descent = Descent(objective.model, lambda part, site: learning_rate, beta=objective.target_beta)
        # What diverges is named below, once all steps are taken.
        with objective.running(), evaluating(objective), seeded(seed, lm.device), pyro.validation_enabled(False):
            moved = descent(episode, here, begin, steps)
        _check_finite(moved, steps)
        origin = unconstrained_sites(begin, len(episode.mask))
        end = constrained_sites(begin, {key: value + moved[key] for key, value in origin.items()})
        start = _unflat(end, count) if count > 1 else end
    with torch.no_grad():
        shared = objective.model.shared(theta)
    return _posterior(lm, shared, {site: scaled(fn, width) for site, fn in start.items()}, tasks), theta


def _flat(start: Distributions) -> Distributions:
    """Components ``(K, T, 1)`` as ``(K * T, 1)``."""
    return {site: map_parameters(fn, lambda value: value.flatten(0, 1)) for site, fn in start.items()}


def _unflat(end: Distributions, count: int) -> Distributions:
    return {site: map_parameters(fn, lambda value: value.unflatten(0, (count, -1))) for site, fn in end.items()}


def _flat_theta(theta: Sites, tasks: int) -> Sites:
    """Members' own values ``(K, 1, 1, ...)`` as ``(K * T, 1, ...)``."""
    return {name: value.expand(-1, tasks, *value.shape[2:]).flatten(0, 1) for name, value in theta.items()}


def one_pass(objective: BetaELBO, episode: Episode, seed: int = 0) -> tuple[Sites, Distributions]:
    """The mean of q(theta), and q(phi | support) there, per random site.

    Of an ensemble both have its members before all other dimensions, theta ``(K, 1, 1, ...)``.

    Raises:
        ConfigError: the model or the guide is of another kind than those of this package.
    """
    guide = objective.guide
    if not isinstance(objective.model, Model):
        raise _unfit(f"the model {objective.model}")
    with objective.running(), evaluating(objective), torch.no_grad(), seeded(seed, episode.mask.device):
        if isinstance(guide, Guide):
            return guide.amortized(episode.support)
    with objective.running(), evaluating(objective), torch.no_grad(), AtMean(), seeded(seed, episode.mask.device):
        trace = pyro.poutine.trace(guide).get_trace(episode)
    sites: dict[str, Any] = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    joint = [name for name, node in sites.items() if node["infer"].get("is_auxiliary")]
    if joint:
        raise _unfit(f"one that samples {joint[0]!r}")
    theta = {name: node["value"] for name, node in sites.items() if name.startswith("theta.")}
    return theta, {name.removeprefix("phi."): node["fn"] for name, node in sites.items() if name.startswith("phi.")}


def _unfit(got: str) -> ConfigError:
    return ConfigError(
        "adapt: expected a HierarchicalModel, and a guide that samples each phi site by itself, as GradientGuide "
        f"does; got {got}. It can be trained, but gives no posterior of a new task."
    )


def _posterior(lm: LanguageModel, shared: Sites, phi: dict[str, Any], tasks: Sequence[Task]) -> TaskPosterior:
    loc = {site: v if v.ndim > 5 else v.expand(1, 1, *v.shape[-3:]) for site, v in shared.items()}
    scale: Sites = {}
    noise: Sites = {}
    joint: dict[str, WeightDistribution] = {}
    for site, fn in phi.items():
        if site in lm.sites.delta_shapes:
            weight, factors = fn.deferred(), factor_sites(site)
            loc |= zip(factors, (weight.loc_A, weight.loc_B), strict=True)
            noise |= zip(factors, (weight.scale_A, weight.scale_B), strict=True)
        elif site in lm.sites.shapes:
            loc[site] = fn.mean
            if isinstance(fn, WeightDistribution):
                joint[site] = fn.map(lambda _, value: value.contiguous())
            if site in joint or "value" not in unconstrained(fn):  # which a point has for its only part
                scale[site] = fn.stddev
    # Contiguous, as they come back from a file: another layout would take other kernels, and round differently.
    parts = ({site: value.contiguous() for site, value in part.items()} for part in (loc, scale, noise))
    loc, scale, noise = parts
    return TaskPosterior(lm, loc, scale, tuple(task.name for task in tasks), noise, joint)


def _check_finite(moved: SiteParameters, steps: int) -> None:
    broken = [f"{part} of {site!r}" for (part, site), value in moved.items() if not value.isfinite().all()]
    if broken:
        raise NonFiniteLoss(f"after {steps} steps of adaptation {broken[:3]} is not finite. Lower learning_rate.")
