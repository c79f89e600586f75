r"""Free parameters for the posterior, not amortised: for each task its own, or one posterior for all tasks.

.. math:: q(\phi_i) = F_{\lambda_i} \quad\text{or}\quad q(\phi_i) = F_\lambda

F is the family of p(phi | theta): for independent normals, mean field (in BLoB, arXiv 2406.11675, one for all tasks);
or another, see :mod:`bayes_lora.guides.family`. It starts at the prior.
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
    """q(theta) q(phi), the same for every task whatever its support.

    A new task gets a posterior of its own by gradient steps from there (``Posterior.adapt(steps=...)``).

    Args:
        model: a hierarchical model with ``theta()``, ``initial_theta()`` and ``phi_prior(theta)``.
        theta_guide: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
        family: of q(phi); by default the prior's own.
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
    """q(theta) prod_i q(phi_i), with parameters for each task of a collection.

    Tasks that the collection does not have (``Episode.without_task_ids()``) stay at p(phi | theta). Memory grows with
    the number of tasks: two numbers for every LoRA weight of each, for normals. The parameters stay on the CPU wherever
    the guide is moved; only those of an episode's tasks are copied to its device.

    Args:
        model: as in :class:`SharedMeanField`.
        num_tasks: size of the collection.
        theta_guide: as in :class:`SharedMeanField`.
        family: as in :class:`SharedMeanField`.

    Raises:
        ConfigError: ``num_tasks`` is not positive; when called, an episode is of a collection of another size.
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
                f"MeanField: made for a collection of {self._num_tasks} tasks, got an episode of one of "
                f"{support.num_tasks}. Mark tasks that are not of the collection by Episode.without_task_ids()."
            )
        places = index.clamp_min(0).cpu()
        values: SiteParameters = {}
        for key, unseen in unconstrained_sites(begin, len(index)).items():
            rows: Tensor = getattr(self.tables, parameter_name(*key))[places].to(index.device)
            values[key] = torch.where(known.view(-1, *[1] * (rows.ndim - 1)), rows, unseen)
        return values


class _OnCPU(PyroModule):
    """Parameters that change their dtype but not their place."""

    def _apply(self, fn: Any, recurse: bool = True) -> _OnCPU:
        for parameter in self.parameters():
            dtype = fn(parameter.data.new_empty(0)).dtype  # asked of an empty tensor, not to move a whole table
            parameter.data = parameter.data.to(dtype)
        return self
