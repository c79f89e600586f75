"""The contracts that every other module is written against.

Batch dimensions follow Pyro's convention and are counted from the right: ``task`` is dimension -2 and ``example``
dimension -1 of every log-probability, so a value that is constant over a task's examples has size 1 there. Leading
dimensions, if any, are draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor

from bayes_lora.episodes.episode import Episode

__all__ = [
    "Distributions",
    "Features",
    "Guide",
    "Likelihood",
    "LikelihoodSites",
    "Model",
    "SiteShapes",
    "Sites",
    "ThetaFactory",
    "ThetaGuide",
    "absent_score",
    "delta_site",
    "factor_sites",
]

Sites = dict[str, Tensor]
"""Site name (``"q_proj.lora_A"``) to value of shape ``(*batch, layers, out, in)``."""

SiteShapes = dict[str, tuple[int, int, int]]
"""Site name to event shape ``(layers, out, in)``."""

Distributions = dict[str, TorchDistribution]
"""Site name to a distribution with event shape ``(layers, out, in)``, and batch ``(T, 1)`` or what broadcasts to it."""


class Features(NamedTuple):
    """What the frozen LM knows of examples: the input of a guide's encoder; hidden and options are 0 where absent.

    Attributes:
        hidden: ``(T, N, 2, d)`` hidden states at the end of the prompt: at the first adapted layer, and at the head.
        options: ``(T, N, K, d)`` output embedding of each option, averaged over its tokens.
        log_probs: ``(T, N, K)`` zero-shot log-probabilities of the options, nats; of absent ones
            :func:`absent_score`.
    """

    hidden: Tensor
    options: Tensor
    log_probs: Tensor


class LikelihoodSites(Protocol):
    """The LoRA sites of a likelihood."""

    shapes: SiteShapes

    def initial(self) -> Sites:
        """Values at which the likelihood starts, ``(layers, out, in)`` per site; PEFT's for a new adapter."""
        ...

    def check(self, values: Sites) -> None:
        """Raise :class:`bayes_lora.errors.SiteError` unless these are values of all sites, of their event shapes."""
        ...


@runtime_checkable
class Likelihood(Protocol):
    """The language model: log p(option | prompt, phi)."""

    @property
    def sites(self) -> LikelihoodSites:
        """Its LoRA sites."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        ...

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        ...

    def __call__(self, phi: Sites, episode: Episode) -> Tensor:
        """Return option log-likelihoods in nats, ``(*draws, T, N, options)``; :func:`absent_score` of absent options.

        Args:
            phi: values of shape ``(*draws, T or 1, 1, layers, out, in)``, or ``(layers, out, in)`` for one draw
                shared by all tasks.
            episode: ``T`` tasks with ``N`` examples each.
        """
        ...

    def features(self, episode: Episode) -> Features:
        """What the frozen LM knows of each example, whatever its label."""
        ...


@runtime_checkable
class Model(Protocol):
    """A hierarchical Pyro model: p(theta) p(phi | theta) p(answer | phi).

    A subclass of :class:`bayes_lora.models.HierarchicalModel` is one.
    """

    @property
    def likelihood(self) -> Likelihood:
        """The language model."""
        ...

    @property
    def initial(self) -> Sites:
        """A value per LoRA site, ``(layers, out, in)``, at which guides start."""
        ...

    @property
    def random_sites(self) -> Sequence[str]:
        """The sites of phi."""
        ...

    @property
    def context(self) -> Callable[[], AbstractContextManager[Any]]:
        """Makes the context, such as an effect handler, inside which model and guide run."""
        ...

    def __call__(self, episode: Episode) -> Any:
        """Sample ``theta.*``, ``phi.<site>`` and the observed ``answer``."""
        ...

    def theta(self) -> Sites:
        """Sample p(theta)."""
        ...

    def initial_theta(self) -> Sites:
        """Where guides start each theta site."""
        ...

    def phi_prior(self, theta: Sites) -> Distributions:
        """p(phi | theta) of one task, per random site."""
        ...

    def shared(self, theta: Sites) -> Sites:
        """Values of the LoRA sites that all tasks share."""
        ...

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi; returns values of every LoRA site."""
        ...

    def answer(self, log_lik: Tensor) -> TorchDistribution:
        """p(y | x, phi), a batch of ``(T, N)``."""
        ...


@runtime_checkable
class ThetaGuide(Protocol):
    """A Pyro guide for theta alone: q(theta), independent over sites."""

    @property
    def positive(self) -> Mapping[str, bool]:
        """Theta site to whether its values are positive."""
        ...

    def __call__(self) -> Sites:
        """Sample every theta site."""
        ...

    def distribution(self, site: str) -> TorchDistribution:
        """q(theta) of one site."""
        ...


@runtime_checkable
class Guide(Protocol):
    """A Pyro guide with a posterior for any task: q(theta) q(phi | support). Reads only the support half of an episode.

    A subclass of :class:`bayes_lora.guides.TaskGuide` is one.
    """

    @property
    def num_members(self) -> int:
        """How many q(theta) there are: K for an ensemble, else 1."""
        ...

    @property
    def steps(self) -> int:
        """Gradient steps on the support that a posterior takes; 0 for one that needs none."""
        ...

    def __call__(self, episode: Episode) -> Sites:
        """Sample the model's latent sites and return phi."""
        ...

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        ...

    def amortized(self, support: Episode) -> tuple[Sites, Distributions]:
        """The mean of q(theta), and q(phi | support) there."""
        ...


ThetaFactory = Callable[[Model], ThetaGuide]
"""Makes q(theta) from a model, as a class of :mod:`bayes_lora.guides.theta` does."""


def absent_score(dtype: torch.dtype) -> float:
    """Score of an option that is not there: finite, and so low that it has no probability beside any real option.

    It is *half* the dtype's lowest value, which leaves room to subtract from it: the lowest value itself would overflow
    to -inf in a ``log_softmax``, or when a score is subtracted, and inf - inf is NaN.
    """
    return torch.finfo(dtype).min / 2


def delta_site(site: str) -> str:
    """The name of the whole update of which a site is a factor."""
    return re.sub(r"\.lora_[AB]", ".delta_weight", site)


def factor_sites(site: str) -> tuple[str, str]:
    """The names of an update's factors A and B."""
    return site.replace(".delta_weight", ".lora_A"), site.replace(".delta_weight", ".lora_B")
