r"""What every hierarchical model shares: plates, and the likelihood of the answers.

.. math:: p(\theta) \prod_i p(\phi_i \mid \theta) \prod_j p(y_{ij} \mid x_{ij}, \phi_i)

A model says what theta is and how phi depends on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.infer.plates import observe_answers, task_plate
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.settings import RecordedSettings

__all__ = ["HierarchicalModel", "sample_normal"]


class HierarchicalModel(RecordedSettings, PyroModule):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    A subclass defines ``initial_theta``, ``theta`` and ``phi_prior``, and sets ``random_sites``. For priors over LoRA
    factors, :class:`bayes_lora.models.FactorModel` leaves only ``phi_prior``.

    Args:
        likelihood: the language model; a plain object, so that Pyro cannot reach its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start; by default the likelihood's own.

    Attributes:
        random_sites: the sites of phi.
        context: makes the context, such as an effect handler, inside which model and guide run.

    Raises:
        SiteError: ``initial`` has a site that the language model lacks, or lacks one, or has another event shape.
    """

    random_sites: list[str]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, likelihood: Likelihood, initial: Sites | None = None) -> None:
        super().__init__()
        sites = getattr(likelihood, "sites", None)  # a likelihood without any needs initial values
        if initial is None:
            if sites is None:
                raise ConfigError(f"initial: expected values for {type(likelihood).__name__}, which has no sites.")
            initial = sites.initial()
        elif sites is not None:  # before a first forward, which may be far off
            sites.check(initial)
        self.likelihood: Likelihood = likelihood
        self.initial: Sites = initial

    @abstractmethod
    def initial_theta(self) -> Sites:
        """Where guides start each theta site."""

    @abstractmethod
    def theta(self) -> Sites:
        """Sample p(theta)."""

    @abstractmethod
    def phi_prior(self, theta: Sites) -> Distributions:
        """p(phi | theta) of one task, per random site; event ``(layers, out, in)``."""

    def shared(self, theta: Sites) -> Sites:
        """Values of the LoRA sites that all tasks share."""
        return {}

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi; returns phi for every LoRA site, ``(T, 1, layers, out, in)`` where it is random."""
        theta = self.theta()
        phi = self.shared(theta)
        with task_plate(episode):
            for site, prior in self.phi_prior(theta).items():
                phi[site] = pyro.sample(f"phi.{site}", prior)
        return phi

    def forward(self, episode: Episode) -> Tensor:
        """Run the program; returns the option log-likelihoods ``(T, N, K)``, nats."""
        log_lik = self.likelihood(self.sample_phi(episode), episode)
        self.observe(log_lik, episode)
        return log_lik

    def observe(self, log_lik: Tensor, episode: Episode) -> None:
        """Observe the gold options, see :func:`bayes_lora.infer.plates.observe_answers`."""
        observe_answers(log_lik, episode, answer=self.answer(log_lik), observed=self.answered(episode))

    def render(self, episode: Episode, filename: str | None = None) -> Any:
        """The plate diagram, a ``graphviz.Digraph``; written to ``filename`` as an image where one is given.

        Args:
            episode: any, for its shapes; the language model is not run.
            filename: ``model.png``, ``model.pdf``, ...; needs the program ``dot`` as well.

        Raises:
            ConfigError: the Python package graphviz is missing.
        """
        if find_spec("graphviz") is None:
            raise ConfigError("render: needs the Python package graphviz: pip install 'bayes-lora[render]'.")
        likelihood = self.likelihood
        self.likelihood = _depends_on_phi  # type: ignore[assignment]
        try:
            return pyro.render_model(self, model_args=(episode,), filename=filename, render_distributions=True)
        finally:
            self.likelihood = likelihood

    def answer(self, log_lik: Tensor) -> dist.TorchDistribution:
        """p(y | x, phi), a batch of ``(T, N)``."""
        answer: dist.TorchDistribution = dist.Categorical(logits=log_lik)
        return answer

    def answered(self, episode: Episode) -> Tensor:
        """What was observed, ``(T, N)``."""
        return episode.answer


def _depends_on_phi(phi: Sites, episode: Episode) -> Tensor:
    """Option scores without a language model."""
    total: Any = sum(value.sum((-3, -2, -1)) for value in phi.values())
    zeros: Tensor = torch.zeros(episode.shape, device=episode.mask.device)
    return zeros + total[..., None]  # type: ignore[no-any-return]


def sample_normal(start: Sites, scale: Tensor) -> Sites:
    """Sample a theta site from N(0, scale^2), elementwise, for each name and shape of ``start``."""
    theta: Sites = {}
    for name, value in start.items():
        prior = dist.Normal(torch.zeros_like(scale), scale).expand(value.shape).to_event(value.ndim)
        theta[name] = pyro.sample(name, prior)
    return theta
