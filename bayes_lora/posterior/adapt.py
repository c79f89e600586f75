"""From a fitted guide to the posterior of a new task: the amortized posterior, refined by K gradient steps."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch

from bayes_lora.distributions.joint_normal import JointNormal
from bayes_lora.distributions.unconstrained import map_parameters, scaled
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.errors import ConfigError, NonFiniteLoss, PosteriorError
from bayes_lora.infer.components import Components
from bayes_lora.infer.descent import Descent, SiteParameters, constrained_sites, unconstrained_sites
from bayes_lora.infer.handlers import AtMean
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.option_head import HEAD_SHAPES
from bayes_lora.lm.subspace import CODE
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks.task import Task
from bayes_lora.types import Distributions, Guide, Model, Predictive, Sites
from bayes_lora.utils.seeding import seeded

__all__ = ["adapt", "adapt_at", "amortized_posterior"]


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
    """Return the posterior of each task given its support: the amortized posterior, refined by gradient steps.

    With ``steps > 0`` the parameters of q(phi | support) become free, and Adam takes ``steps`` steps on the negative
    beta-ELBO of the support set, with theta at its mean. All tasks share the forward and backward of a step.

    Args:
        objective: the fitted model and guide with their beta.
        lm: the language model.
        tasks: only their ``support`` is read.
        steps: number of steps, K.
        learning_rate: learning rate of Adam.
        width: factor on the standard deviations after the steps, see :mod:`bayes_lora.posterior.calibrate`.
        seed: random seed of the draws in the steps, and of those that the guide makes.
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
    """Return what :func:`adapt` returns, and the mean of q(theta), at which it was computed."""
    rows = [lm.encoder(task.support) for task in tasks]
    model: Any = objective.model
    supports = collate(rows)
    theta, phi = amortized_posterior(objective, supports.without_task_ids().to(lm.device), seed)
    if steps:
        # Components take their steps in one batch, as if they were separate tasks.
        count = phi.count if isinstance(phi, Components) else 1
        episode = collate(rows * count).without_task_ids().to(lm.device)
        start, here = _side_by_side(phi), theta
        if isinstance(objective.guide, Guide) and objective.guide.num_members > 1:
            here = _theta_side_by_side(theta, len(tasks))
        descent = Descent(model, lambda name, site: learning_rate, beta=objective.target_beta)
        # Sites that diverge are named below, after the last step.
        with objective.running(), evaluating(objective), seeded(seed, lm.device), pyro.validation_enabled(False):
            moved = descent(episode, here, start, steps)
        _check_finite(moved, steps)
        origin = unconstrained_sites(start, len(episode.mask))
        end = constrained_sites(start, {key: value + moved[key] for key, value in origin.items()})
        phi = _as_components(end, count) if isinstance(phi, Components) else end
        if isinstance(start, JointNormal):
            # The steps went through the network, not through scores that are linear at the former origin.
            phi = JointNormal({site: fn.without_origin() for site, fn in end.items()})
    with torch.no_grad():
        shared, prior = model.shared(theta), model.phi_prior(theta)
    # A model may have random sites that the language model has not.
    sites = lm.sites.shapes.keys() | lm.sites.delta_shapes.keys() | HEAD_SHAPES.keys() | {CODE}
    own = {site: scaled(fn, width) for site, fn in phi.items() if site in sites}
    prior = {site: fn for site, fn in prior.items() if site in own}
    names = tuple(task.name for task in tasks)
    predictive: Predictive = getattr(objective.guide, "predictive", "draws")
    fixed = tuple(supports.fixed_options.tolist())
    found = TaskPosterior(lm, type(phi)(own), shared, names, predictive=predictive, fixed_options=fixed, prior=prior)
    return found, theta


def _side_by_side(phi: Distributions) -> Distributions:
    """Reshape components ``(K, T, 1)`` to ``(K * T, 1)``."""
    if not isinstance(phi, Components):
        return phi
    return {site: map_parameters(fn, lambda value: value.flatten(0, 1)) for site, fn in phi.items()}


def _as_components(phi: Distributions, count: int) -> Components:
    """Invert :func:`_side_by_side`."""
    return Components(
        {site: map_parameters(fn, lambda value: value.unflatten(0, (count, -1))) for site, fn in phi.items()}
    )


def _theta_side_by_side(theta: Sites, tasks: int) -> Sites:
    """Reshape the members' values ``(K, 1, 1, ...)`` to ``(K * T, 1, ...)``."""
    return {name: value.expand(-1, tasks, *value.shape[2:]).flatten(0, 1) for name, value in theta.items()}


def amortized_posterior(objective: BetaELBO, episode: Episode, seed: int = 0) -> tuple[Sites, Distributions]:
    """Return the mean of q(theta), and q(phi | support) at this mean, per random site: ``guide.amortized(support)``.

    For an ensemble the members are the first dimension of both, theta ``(K, 1, 1, ...)``. A guide that is not a
    :class:`bayes_lora.types.Guide`, such as an autoguide or a function, is run once with every latent site at its mean.

    Raises:
        ConfigError: the model is not a :class:`bayes_lora.types.Model`, or the guide samples several sites jointly.
        PosteriorError: a parameter of q(phi | support) is NaN or out of range.
    """
    guide = objective.guide
    if not isinstance(objective.model, Model):
        raise _unfit(f"the model {objective.model}")
    with objective.running(), evaluating(objective), torch.no_grad(), seeded(seed, episode.mask.device):
        if isinstance(guide, Guide):
            theta, phi = _amortized(guide, episode)
            return theta, phi if isinstance(phi, Components | JointNormal) else _for_tasks(phi, len(episode.mask))
        with AtMean():
            trace = pyro.poutine.trace(guide).get_trace(episode)
    sites: dict[str, Any] = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    joint = [name for name, node in sites.items() if node["infer"].get("is_auxiliary")]
    if joint:
        raise _unfit(f"one that samples {joint[0]!r}")
    theta = {name: node["value"] for name, node in sites.items() if name.startswith("theta.")}
    return theta, {name.removeprefix("phi."): node["fn"] for name, node in sites.items() if name.startswith("phi.")}


def _amortized(guide: Guide, episode: Episode) -> tuple[Sites, Distributions]:
    try:
        return guide.amortized(episode.support)
    except ValueError as error:
        if "to satisfy the constraint" not in str(error):  # torch's check of the parameters of a distribution
            raise
        what = f"q(phi | support) of {type(guide).__name__} is not a distribution: {str(error):.300}"
        raise PosteriorError(
            f"{what}. Check its parameters for NaN and for very large values, or fit again."
        ) from error


def _for_tasks(phi: Distributions, num_tasks: int) -> Distributions:
    """Expand distributions that are the same for all tasks to a batch of ``(T, 1)``."""
    batch = torch.Size((num_tasks, 1))
    return {site: fn if fn.batch_shape == batch else fn.expand(batch) for site, fn in phi.items()}


def _unfit(got: str) -> ConfigError:
    return ConfigError(
        "adapt: expected a HierarchicalModel, and a guide that samples each phi site by itself, as GradientGuide "
        f"does; got {got}. It can be trained, but gives no posterior of a new task."
    )


def _check_finite(moved: SiteParameters, steps: int) -> None:
    broken = [f"{name} of {site!r}" for (name, site), value in moved.items() if not value.isfinite().all()]
    if broken:
        raise NonFiniteLoss(f"after {steps} steps of adaptation {broken[:3]} is not finite. Lower learning_rate.")
