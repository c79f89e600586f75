"""q(theta): a point, or independent normals; and what guides share. They sample the model's theta sites alone."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor, nn
from torch.distributions import constraints

from bayes_lora.errors import ConfigError
from bayes_lora.guides.components import Components
from bayes_lora.tasks.episode import Episode
from bayes_lora.types import Sites

Normal, Mixture = torch.distributions.Normal, torch.distributions.MixtureSameFamily

__all__ = [
    "NormalTheta",
    "PointTheta",
    "attribute",
    "check_factors",
    "check_normal",
    "normal_of",
    "sample_phi",
    "show_to_svi",
]


def attribute(prefix: str, site: str) -> str:
    """The attribute under which a module keeps a site's parameter (module attributes may hold no dots)."""
    return f"{prefix}_{site}".replace(".", "_")


def show_to_svi(module: nn.Module) -> None:
    """Let ``pyro.infer.SVI`` find a module's plain parameters.

    With ``module_local_params`` SVI asks every parameter for its unconstrained twin, which Pyro 1.9.2 attaches to a
    PyroParam but not to an ``nn.Parameter``; a real parameter is its own twin.
    """
    for parameter in module.parameters():
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]


def sample_phi(episode: Episode, posterior: dict[str, dist.TorchDistribution]) -> Sites:
    """Sample ``phi.<site>`` for an episode's tasks from q(phi | support), of batch ``(T, 1)`` per site.

    Of :class:`bayes_lora.guides.components.Components` each draw takes one.
    """
    if isinstance(posterior, Components):
        posterior = posterior.of_draws()
    with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
        return {site: pyro.sample(f"phi.{site}", fn) for site, fn in posterior.items()}


def check_normal(model: Any, guide: str) -> None:
    """Refuse a model whose p(phi | theta) is not normal."""
    _check(model, guide, "to be normal", lambda fn: isinstance(getattr(fn, "base_dist", fn), Normal))


def check_factors(model: Any, guide: str) -> None:
    """Refuse a model whose phi is anything but LoRA factors with means and standard deviations."""
    _check(model, guide, "of LoRA factors", lambda fn: isinstance(getattr(fn, "base_dist", fn), (Normal, Mixture)))


def _check(model: Any, guide: str, what: str, fits: Callable[[Any], bool]) -> None:
    with torch.no_grad():
        prior = model.phi_prior(model.initial_theta())
    for site, fn in prior.items():
        if not fits(fn):
            raise ConfigError(
                f"{guide}: expected p(phi | theta) {what}, got {fn} for site {site!r} of "
                f"{type(model).__name__}. Use GradientGuide, or a model of LoRA factors (HierarchicalNormal)."
            )


def normal_of(prior: Any) -> Any:
    """The independent normals that a prior is made of; of a mixture, those with its means and variances."""
    base = getattr(prior, "base_dist", prior)
    return base if isinstance(base, Normal) else dist.Normal(base.mean, base.stddev)


class PointTheta(PyroModule):
    """q(theta) is a point, as in ABMLL: KL(q || p) = -log p(theta).

    Args:
        model: offers ``initial_theta()`` and ``theta()``, the program of p(theta).
    """

    def __init__(self, model: PyroModule) -> None:
        super().__init__()
        with torch.no_grad():
            sites = pyro.poutine.trace(model.theta).get_trace().nodes
        self.positive: dict[str, bool] = {}
        for site, value in model.initial_theta().items():
            support = sites[site]["fn"].support
            while isinstance(support, constraints.independent):
                support = support.base_constraint
            self.positive[site] = support is not constraints.real
            self._create(site, value.log() if self.positive[site] else value)
        show_to_svi(self)

    def _create(self, site: str, value: Tensor) -> None:
        setattr(self, attribute("loc", site), nn.Parameter(value.clone()))

    def forward(self) -> Sites:
        """Sample every theta site, ``(layers, out, in)`` each."""
        return {site: pyro.sample(site, self.distribution(site)) for site in self.positive}

    def distribution(self, site: str) -> dist.TorchDistribution:
        """Q of one site."""
        value = getattr(self, attribute("loc", site))
        return dist.Delta(value.exp() if self.positive[site] else value, event_dim=value.ndim)


class NormalTheta(PointTheta):
    """q(theta) is Normal for real sites and LogNormal for positive ones, elementwise.

    Args:
        model: as in :class:`PointTheta`.
        initial_scale: standard deviation at the start (of the logarithm, for positive sites).
    """

    def __init__(self, model: PyroModule, initial_scale: float = 1e-3) -> None:
        self._initial_scale = initial_scale
        super().__init__(model)

    def _create(self, site: str, value: Tensor) -> None:
        super()._create(site, value)
        log_scale = torch.full_like(value, self._initial_scale).log()
        setattr(self, attribute("log_scale", site), nn.Parameter(log_scale))

    def distribution(self, site: str) -> dist.TorchDistribution:
        """Q of one site."""
        loc, log_scale = getattr(self, attribute("loc", site)), getattr(self, attribute("log_scale", site))
        family = dist.LogNormal if self.positive[site] else dist.Normal
        normal: dist.TorchDistribution = family(loc, log_scale.exp()).to_event(loc.ndim)  # type: ignore[no-untyped-call]
        return normal
