r"""The base class of models: plates, and the likelihood of the answers.

.. math:: p(\theta) \prod_i p(\phi_i \mid \theta) \prod_j p(y_{ij} \mid x_{ij}, \phi_i)

A subclass defines theta, and how phi depends on it.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from importlib.util import find_spec
from typing import Any, ClassVar

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.infer.plates import observe_answers, task_plate
from bayes_lora.lm.option_head import HEAD_SHAPES, split_head
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.settings import RecordedSettings

__all__ = ["HierarchicalModel", "sample_normal"]


class HierarchicalModel(RecordedSettings, PyroModule):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    A subclass defines ``initial_theta``, ``theta`` and ``phi_prior``, and sets ``random_sites``. For a prior over LoRA
    factors start from :class:`bayes_lora.models.FactorModel`, which leaves only ``phi_prior`` to define.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start; by default the likelihood's own.

    Attributes:
        random_sites: names of the sites of phi.
        context: returns a context manager, such as an effect handler, inside which model and guide run.

    Raises:
        ConfigError: ``initial`` is None, and the likelihood has no initial values either.
        SiteError: the sites or event shapes of ``initial`` differ from those of the language model.
    """

    not_settings: ClassVar[tuple[str, ...]] = ("initial",)
    random_sites: list[str]
    context: Callable[[], AbstractContextManager[Any]] = nullcontext

    def __init__(self, likelihood: Likelihood, initial: Sites | None = None) -> None:
        super().__init__()
        sites = getattr(likelihood, "sites", None)  # without them, initial values are required
        if initial is None:
            if sites is None:
                raise ConfigError(f"initial: expected values for {type(likelihood).__name__}, which has no sites.")
            initial = sites.initial()
        elif split_head(initial)[1]:
            raise SiteError(f"initial: {[*HEAD_SHAPES]} are settings of WithHead. Leave them out.")
        elif sites is not None:  # now, because the first forward may come much later
            sites.check(initial)
        self.likelihood: Likelihood = likelihood
        self.initial: Sites = initial

    @abstractmethod
    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""

    @abstractmethod
    def theta(self) -> Sites:
        """Sample p(theta)."""

    @abstractmethod
    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site; event ``(layers, out, in)``."""

    def shared(self, theta: Sites) -> Sites:
        """Return the values of the LoRA sites that all tasks share."""
        return {}

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return phi per LoRA site; ``(T, 1, layers, out, in)`` for random sites."""
        theta = self.theta()
        phi = self.shared(theta)
        with task_plate(episode):
            for site, prior in self.phi_prior(theta).items():
                phi[site] = pyro.sample(f"phi.{site}", prior)
        return phi

    def forward(self, episode: Episode) -> Tensor:
        """Run the program, and return the option log-likelihoods ``(T, N, K)`` in nats."""
        log_lik = self.likelihood(self.sample_phi(episode), episode)
        self.observe(log_lik, episode)
        return log_lik

    def observe(self, log_lik: Tensor, episode: Episode) -> None:
        """Observe the gold options, see :func:`bayes_lora.infer.plates.observe_answers`."""
        observe_answers(log_lik, episode, answer=self.answer(log_lik), observed=self.answered(episode))

    def render(self, episode: Episode, filename: str | None = None) -> Any:
        """Return the plate diagram, a ``graphviz.Digraph``, and write it to ``filename`` if one is given.

        Args:
            episode: any episode; only its shapes are used, and the language model does not run.
            filename: ``model.png``, ``model.pdf``, ...; requires the program ``dot`` as well.

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
        """Return p(y | x, phi), of batch ``(T, N)``."""
        answer: dist.TorchDistribution = dist.Categorical(logits=log_lik)
        return answer

    def answered(self, episode: Episode) -> Tensor:
        """Return the observed values, ``(T, N)``."""
        return episode.answer


def _depends_on_phi(phi: Sites, episode: Episode) -> Tensor:
    """Return option scores that depend on phi, without a language model."""
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
