r"""Free parameters for the posterior, not amortised: for each task its own, or one posterior for all tasks.

.. math:: q(\phi_i) = F_{\lambda_i} \quad\text{or}\quad q(\phi_i) = F_\lambda

F is the family of p(phi | theta): for independent normals, mean field (in BLoB, arXiv 2406.11675, one for all tasks).
It starts at the prior.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.errors import ConfigError
from bayes_lora.guides.descent import Distributions, from_point, to_point
from bayes_lora.guides.theta import PointTheta, attribute, sample_phi, show_to_svi
from bayes_lora.tasks.episode import Episode
from bayes_lora.types import Sites

__all__ = ["MeanField", "SharedMeanField"]


class SharedMeanField(PyroModule):
    """q(theta) q(phi), the same for every task whatever its support.

    A new task gets a posterior of its own by gradient steps from there (``Posterior.adapt(steps=...)``).

    Args:
        model: a hierarchical model with ``theta()``, ``initial_theta()`` and ``phi_prior(theta)``.
        theta: makes q(theta) from the model: :class:`PointTheta` or :class:`NormalTheta`.
    """

    def __init__(self, model: PyroModule, *, theta: Callable[[Any], PyroModule] = PointTheta) -> None:
        super().__init__()
        # In a tuple: as an attribute the model would become a submodule, and its parameters the guide's.
        self._model = (model,)
        self.theta = theta(model)
        with torch.no_grad():
            self.names = to_point(model.phi_prior(model.initial_theta()))
            for (part, site), value in self.names.items():
                setattr(self, attribute(part, site), nn.Parameter(self._start(value)))
        show_to_svi(self)

    def _start(self, value: Tensor) -> Tensor:
        return value.clone()

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi."""
        theta = self.theta()
        return sample_phi(episode, self.posterior(episode.support, theta))

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        (model,) = self._model
        prior = model.phi_prior(theta)
        values = self._values(support, prior)
        batches = {key: torch.broadcast_shapes(v.shape[:-3], (len(support.task_index), 1)) for key, v in values.items()}
        return from_point(prior, {key: v.expand(*batches[key], *v.shape[-3:]) for key, v in values.items()})

    def _values(self, support: Episode, prior: Distributions) -> dict[tuple[str, str], Tensor]:
        return {key: getattr(self, attribute(*key)) for key in self.names}


class MeanField(SharedMeanField):
    """q(theta) prod_i q(phi_i), with parameters for each task of a collection.

    Tasks that the collection does not have (``Episode.unseen()``) stay at p(phi | theta). Memory grows with the number
    of tasks: two numbers for every LoRA weight of each, for normals.

    Args:
        model: as in :class:`SharedMeanField`.
        num_tasks: size of the collection.
        theta: as in :class:`SharedMeanField`.

    Raises:
        ConfigError: ``num_tasks`` is not positive; when called, an episode is of a collection of another size.
    """

    def __init__(self, model: PyroModule, num_tasks: int, *, theta: Callable[[Any], PyroModule] = PointTheta) -> None:
        if num_tasks < 1:
            raise ConfigError(f"num_tasks: expected at least 1, got {num_tasks}.")
        self._num_tasks = num_tasks
        super().__init__(model, theta=theta)

    def _start(self, value: Tensor) -> Tensor:
        return value.expand(self._num_tasks, 1, *value.shape[-3:]).clone()

    def _values(self, support: Episode, prior: Distributions) -> dict[tuple[str, str], Tensor]:
        index = support.task_index
        known = (index >= 0)[:, None, None, None, None]
        if support.num_tasks != self._num_tasks and bool(known.any()):
            raise ConfigError(
                f"MeanField: made for a collection of {self._num_tasks} tasks, got an episode of one of "
                f"{support.num_tasks}. Mark tasks that are not of the collection by Episode.unseen()."
            )
        rows = {key: getattr(self, attribute(*key))[index.clamp_min(0)] for key in self.names}
        begin = to_point(prior, len(index))
        return {key: torch.where(known, value, begin[key]) for key, value in rows.items()}
