r"""Posteriors with free parameters, not amortised: one per task, or one for all tasks.

.. math:: q(\phi_i) = F_{\lambda_i} \quad\text{or}\quad q(\phi_i) = F_\lambda

F is the family of p(phi | theta), or another one (see :mod:`bayes_lora.guides.family`). With independent normals it is
mean field; BLoB (arXiv 2406.11675) has one posterior for all tasks. q starts at the prior.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.family import Family, same_as_prior
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.guides.theta import PointTheta, parameter_name
from bayes_lora.infer.descent import SiteParameters, constrained_sites, unconstrained_sites
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory

__all__ = ["MeanField", "SharedMeanField"]


class SharedMeanField(TaskGuide):
    """q(theta) q(phi), the same q(phi) for every task and support.

    ``Posterior.adapt(steps=...)`` takes gradient steps from it, to fit a separate posterior to a new task.

    Args:
        model: a hierarchical model with ``theta()``, ``initial_theta()`` and ``phi_prior(theta)``.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        family: the family of q(phi); by default the prior's own.
    """

    def __init__(self, model: Model, *, theta_guide: ThetaFactory = PointTheta, family: Family = same_as_prior) -> None:
        super().__init__(model, theta_guide=theta_guide)
        self.family = family
        with torch.no_grad():
            start = unconstrained_sites(self._family(model.phi_prior(model.initial_theta())))
        self.names = list(start)
        self._create(start)

    def _create(self, start: SiteParameters) -> None:
        for key, value in start.items():
            setattr(self, parameter_name(*key), nn.Parameter(value.clone()))

    def _family(self, prior: Distributions) -> Distributions:
        return {site: self.family(site, fn) for site, fn in prior.items()}

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        begin = self._family(self.prior(theta))
        found = constrained_sites(begin, self._values(support, begin))
        batch = (len(support.task_index), 1)
        return {site: fn.expand(torch.broadcast_shapes(fn.batch_shape, batch)) for site, fn in found.items()}

    def _values(self, support: Episode, begin: Distributions) -> SiteParameters:
        return {key: getattr(self, parameter_name(*key)) for key in self.names}


class MeanField(SharedMeanField):
    """q(theta) prod_i q(phi_i), with separate parameters for each task of a collection.

    Tasks outside the collection (``Episode.without_task_ids()``) stay at p(phi | theta). Memory grows with the number
    of tasks: with normals, two numbers per LoRA weight and task. The parameters stay on the CPU when the guide is
    moved; those of an episode's tasks are copied to its device.

    Args:
        model: as in :class:`SharedMeanField`.
        num_tasks: number of tasks in the collection.
        theta_guide: as in :class:`SharedMeanField`.
        family: as in :class:`SharedMeanField`.

    Raises:
        ConfigError: ``num_tasks`` is not positive, or, when called, an episode comes from a collection of another size.
    """

    def __init__(
        self,
        model: Model,
        num_tasks: int,
        *,
        theta_guide: ThetaFactory = PointTheta,
        family: Family = same_as_prior,
    ) -> None:
        if num_tasks < 1:
            raise ConfigError(f"num_tasks: expected at least 1, got {num_tasks}.")
        self._num_tasks = num_tasks
        super().__init__(model, theta_guide=theta_guide, family=family)

    def _create(self, start: SiteParameters) -> None:
        self.tables = _OnCPU()
        for key, value in start.items():
            rows = value.expand(self._num_tasks, 1, *value.shape).clone()
            setattr(self.tables, parameter_name(*key), nn.Parameter(rows))

    def _values(self, support: Episode, begin: Distributions) -> SiteParameters:
        index = support.task_index
        known = index >= 0
        if support.num_tasks != self._num_tasks and bool(known.any()):
            raise ConfigError(
                f"MeanField: made for a collection of {self._num_tasks} tasks, got an episode of a collection of "
                f"{support.num_tasks}. Mark tasks outside the collection with Episode.without_task_ids()."
            )
        places = index.clamp_min(0).cpu()
        values: SiteParameters = {}
        for key, unseen in unconstrained_sites(begin, len(index)).items():
            rows: Tensor = getattr(self.tables, parameter_name(*key))[places].to(index.device)
            values[key] = torch.where(known.view(-1, *[1] * (rows.ndim - 1)), rows, unseen)
        return values


class _OnCPU(PyroModule):
    """Holds parameters that follow changes of dtype, but stay on the CPU."""

    def _apply(self, fn: Any, recurse: bool = True) -> _OnCPU:
        for parameter in self.parameters():
            dtype = fn(parameter.data.new_empty(0)).dtype  # an empty tensor, so that no table is moved
            parameter.data = parameter.data.to(dtype)
        return self
