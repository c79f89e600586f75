"""Directions of a :class:`bayes_lora.models.Subspace` from the derivatives of training tasks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor

from bayes_lora.episodes.episode import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides.theta import PointTheta, parameter_name
from bayes_lora.infer.directions import centred, leading_directions
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, fit_theta
from bayes_lora.infer.tangent import tangent
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.subspace import directions_of
from bayes_lora.models import LayerwiseScale, Subspace, WithHead
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks.task import Task
from bayes_lora.types import Sites

__all__ = ["check_size", "set_directions", "subspace_of"]

EXAMPLES = 12
"""Number of examples of each task whose derivatives are read: the directions are those of many tasks."""
INITIAL_SCALE = (0.1, 2.0)
"""Standard deviations of A and B at which the fit of the units starts."""


def subspace_of(model: Any) -> Subspace | None:
    """Return a model's subspace, under an option head or not; None if it has none."""
    prior = model.prior if isinstance(model, WithHead) else model
    return prior if isinstance(prior, Subspace) else None


def check_size(model: Any, tasks: Mapping[str, Task]) -> None:
    """Check that derivatives of the training tasks can span as many directions as a model's subspace has, if any.

    Raises:
        ConfigError: they cannot.
    """
    subspace = subspace_of(model)
    if subspace is None or subspace.given:
        return
    rows = [row for task in tasks.values() for row in task.examples[:EXAMPLES]]
    most = sum(len(row.options) - 1 for row in rows)
    if subspace.size > most:
        raise ConfigError(
            f"prior.size: expected at most {most}, because the directions are found in the derivatives of {len(rows)} "
            f"examples of the training tasks; got {subspace.size}. Lower it, or add tasks."
        )


def set_directions(
    lm: LanguageModel,
    guide: Any,
    tasks: Mapping[str, Task],
    num_support: int,
    *,
    max_steps: int = 50,
    progress: Progress | None = None,
) -> None:
    """Set theta's directions to the leading ones of the training tasks, in units of a fitted layerwise prior.

    First the standard deviations of :class:`bayes_lora.models.LayerwiseScale` are fitted, with the same option head if
    there is one, because directions depend on the units of the weights. The option head starts from what was fitted.

    Args:
        lm: the language model.
        guide: a guide of a model with a subspace; the parameters of its theta are changed.
        tasks: training tasks.
        num_support: support examples of a split of a task; the others are its queries.
        max_steps: maximum number of steps of L-BFGS.
        progress: shows progress bars.

    Raises:
        ConfigError: the derivatives span fewer directions, or a task is too small.
    """
    model: Any = guide.model
    subspace = subspace_of(model)
    if subspace is None or subspace.given:
        return
    initial = {site: subspace.initial[site] for site in lm.sites.shapes}
    wide: Any = LayerwiseScale(lm, initial, random=subspace.random, initial_scale=INITIAL_SCALE)
    wide = (WithHead(wide, **model.settings) if isinstance(model, WithHead) else wide).to(lm.device)
    theta = PointTheta(wide).to(lm.device)
    grams = grams_of_tasks(lm, wide, wide.initial_theta(), tasks, guide.batch_size, progress, shared=True)
    settings: Any = {"objective": guide.theta_objective, "num_support": num_support, "beta": guide.beta}
    fit_theta(EmpiricalBayes(wide, theta, grams, **settings), max_steps)
    with torch.no_grad():
        fitted = {site: theta.distribution(site).mean for site in theta.positive}
        unit = {site: fn.stddev for site, fn in wide.phi_prior(fitted).items() if site in subspace.varied}
        rows = _rows(lm, wide.shared(fitted), initial, unit, tasks, guide.batch_size)
        found = leading_directions(rows, subspace.size)
        parts = found.split([unit[site].numel() for site in subspace.varied], -1)
        for site, part in zip(subspace.varied, parts, strict=True):
            directions = part.unflatten(-1, unit[site].shape) * unit[site]
            _set(guide.theta, f"theta.{directions_of(site)}", directions.flatten(0, 1))
        for name in theta.positive:
            if ".head." in name:
                _set(guide.theta, name, getattr(theta, parameter_name("loc", name)))


def _set(theta: Any, name: str, value: Tensor) -> None:
    """Set the location of q(theta) of one site."""
    getattr(theta, parameter_name("loc", name)).copy_(value)


def _rows(
    lm: LanguageModel, shared: Sites, initial: Sites, unit: Sites, tasks: Mapping[str, Task], batch_size: int
) -> Iterator[Tensor]:
    """Yield the derivatives ``(n, P)`` of the centred scores of some examples of each task, in units."""
    phi = {site: initial[site].expand(1, 1, *value.shape) for site, value in unit.items()}
    for name in sorted(tasks):
        episode = collate([lm.encoder(tasks[name].examples[:EXAMPLES])]).to(lm.device)
        found = tangent(lm, episode, shared, phi, unit, batch_size)
        present = episode.option_mask[0]
        rows = torch.cat([centred(value[0], present).flatten(2) for value in found.gradients.values()], -1)
        yield rows[present]
