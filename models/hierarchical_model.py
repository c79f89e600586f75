r"""What every hierarchical model shares: plates, and the likelihood of the answers.

.. math:: p(\theta) \prod_i p(\phi_i \mid \theta) \prod_j p(y_{ij} \mid x_{ij}, \phi_i)

A model says what theta is and how phi depends on it.
"""

from __future__ import annotations

from abc import abstractmethod
from importlib.util import find_spec
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.infer.plates import examples_scale, task_plate
from bayes_lora.types import Likelihood, Sites

__all__ = ["HierarchicalModel"]


class HierarchicalModel(PyroModule):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    A subclass gives ``initial_theta``, ``theta`` and ``phi_prior``, and fills ``random_sites``.

    Attributes:
        likelihood: the language model; a plain object, so that Pyro cannot reach its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start.
        random_sites: the sites of phi.

    Raises:
        SiteError: ``initial`` has a site that the language model lacks, or lacks one, or has another event shape.
    """

    random_sites: list[str]

    def __init__(self, likelihood: Likelihood, initial: Sites) -> None:
        super().__init__()
        sites = getattr(likelihood, "sites", None)
        if sites is not None:  # before a first forward, which may be far off
            sites.check(initial)
        self.likelihood, self.initial = likelihood, initial

    @abstractmethod
    def initial_theta(self) -> Sites:
        """Where guides start each theta site."""

    @abstractmethod
    def theta(self) -> Sites:
        """Sample p(theta)."""

    @abstractmethod
    def phi_prior(self, theta: Sites) -> dict[str, dist.TorchDistribution]:
        """p(phi | theta) of one task, per random site; event ``(layers, out, in)``."""

    def normal_theta(self) -> Sites:
        """Sample every theta site of ``initial_theta`` from N(0, s_0^2), where a model has a buffer ``loc_scale``."""
        theta: Sites = {}
        for name, value in self.initial_theta().items():
            prior = dist.Normal(torch.zeros_like(self.loc_scale), self.loc_scale).expand(value.shape).to_event(3)
            theta[name] = pyro.sample(name, prior)
        return theta

    def shared(self, theta: Sites) -> Sites:
        """Values of the LoRA sites that all tasks share."""
        return {}

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi; returns phi for every LoRA site, ``(T, 1, layers, out, in)`` where it is random."""
        return self._sample_phi(task_plate(episode))

    def _sample_phi(self, tasks: pyro.plate) -> Sites:
        theta = self.theta()
        phi = self.shared(theta)
        with tasks:
            for site, prior in self.phi_prior(theta).items():
                phi[site] = pyro.sample(f"phi.{site}", prior)
        return phi

    def forward(self, episode: Episode) -> Tensor:
        """Run the program; returns the option log-likelihoods ``(T, N, K)``, nats."""
        tasks = task_plate(episode)
        log_lik = self.likelihood(self._sample_phi(tasks), episode)
        with tasks:
            self.observe(log_lik, episode)
        return log_lik

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
        self.likelihood = _depends_on_phi
        try:
            return pyro.render_model(self, model_args=(episode,), filename=filename, render_distributions=True)
        finally:
            self.likelihood = likelihood

    def observe(self, log_lik: Tensor, episode: Episode) -> None:
        """Observe the gold options. Here N enters: a task's sum is scaled from n examples to its N."""
        mask: Any = episode.mask  # Pyro types it as BoolTensor, which torch makes nothing of
        with (
            pyro.plate("example", episode.mask.shape[-1], dim=-1),
            pyro.poutine.scale(scale=examples_scale(episode, log_lik)),
            pyro.poutine.mask(mask=mask),
        ):
            pyro.sample("answer", self.answer(log_lik), obs=self.answered(episode))

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
