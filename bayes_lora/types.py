"""Protocols and type aliases shared by all modules.

Batch dimensions follow Pyro's convention and are counted from the right: ``task`` is dimension -2 and ``example``
dimension -1 of every log-probability, so a value that is constant over a task's examples has size 1 in the latter.
Leading dimensions, if any, are draws.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

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
    "Predictive",
    "SiteShapes",
    "Sites",
    "ThetaFactory",
    "ThetaGuide",
    "absent_score",
    "delta_site",
    "factor_sites",
]

Sites = dict[str, Tensor]
"""From site name (``"q_proj.lora_A"``, ``"head.slope"``) to value of shape ``(*batch, layers, out, in)``."""

SiteShapes = dict[str, tuple[int, int, int]]
"""From site name to event shape ``(layers, out, in)``."""

Distributions = dict[str, TorchDistribution]
"""From site name to a distribution with event shape ``(layers, out, in)`` and a batch shape that broadcasts to
``(T, 1)``."""


Predictive = Literal["draws", "linear"]
"""How a posterior predicts: the average over draws of weights, or scores that are linear in the weights."""


class Features(NamedTuple):
    """Features of examples from the frozen LM: the input of a guide's encoder.

    ``hidden`` and ``options`` are 0 for absent examples and options.

    Attributes:
        hidden: ``(T, N, 2, d)`` hidden states at the end of the prompt: at the first adapted layer, and at the head.
        options: ``(T, N, K, d)`` output embedding of each option, averaged over its tokens.
        log_probs: ``(T, N, K)`` zero-shot log-probabilities of the options, nats; :func:`absent_score` for absent ones.
    """

    hidden: Tensor
    options: Tensor
    log_probs: Tensor


class LikelihoodSites(Protocol):
    """The LoRA sites of a likelihood."""

    shapes: SiteShapes

    def initial(self) -> Sites:
        """Initial values, ``(layers, out, in)`` per site; those of PEFT for a new adapter."""
        ...

    def check(self, values: Sites) -> None:
        """Raise :class:`bayes_lora.errors.SiteError` unless all sites have a value of their event shape.

        Values of :mod:`bayes_lora.lm.option_head` are optional.
        """
        ...


@runtime_checkable
class Likelihood(Protocol):
    """The language model: log p(option | prompt, phi)."""

    @property
    def sites(self) -> LikelihoodSites:
        """The LoRA sites."""
        ...

    @property
    def hidden_size(self) -> int:
        """Width d of the residual stream."""
        ...

    @property
    def device(self) -> torch.device:
        """The device on which the likelihood is computed."""
        ...

    def __call__(self, phi: Sites, episode: Episode) -> Tensor:
        """Return option log-likelihoods in nats, ``(*draws, T, N, K)``; :func:`absent_score` for absent options.

        Args:
            phi: values of shape ``(*draws, T or 1, 1, layers, out, in)``, or ``(layers, out, in)`` for one draw
                shared by all tasks.
            episode: ``T`` tasks with ``N`` examples each.
        """
        ...

    def features(self, episode: Episode) -> Features:
        """Return the features of each example, which do not depend on its label."""
        ...


@runtime_checkable
class Model(Protocol):
    """A hierarchical Pyro model: p(theta) p(phi | theta) p(answer | phi).

    Subclasses of :class:`bayes_lora.models.HierarchicalModel` implement it.
    """

    @property
    def likelihood(self) -> Likelihood:
        """The language model."""
        ...

    @property
    def initial(self) -> Sites:
        """Initial values for guides, ``(layers, out, in)`` per LoRA site, and per site of an option head."""
        ...

    @property
    def random_sites(self) -> Sequence[str]:
        """The LoRA sites that are random, which make up phi."""
        ...

    @property
    def context(self) -> Callable[[], AbstractContextManager[Any]]:
        """A function that makes the context manager, such as an effect handler, inside which model and guide run."""
        ...

    def __call__(self, episode: Episode) -> Any:
        """Sample ``theta.*``, ``phi.<site>`` and the observed ``answer``."""
        ...

    def theta(self) -> Sites:
        """Sample p(theta)."""
        ...

    def initial_theta(self) -> Sites:
        """Initial values for guides, per theta site."""
        ...

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site."""
        ...

    def shared(self, theta: Sites) -> Sites:
        """Return the values of the LoRA sites that all tasks share."""
        ...

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return values of every LoRA site."""
        ...

    def answer(self, log_lik: Tensor) -> TorchDistribution:
        """Return p(y | x, phi), with batch shape ``(T, N)``."""
        ...


@runtime_checkable
class ThetaGuide(Protocol):
    """A Pyro guide for theta alone: q(theta), independent over sites."""

    @property
    def positive(self) -> Mapping[str, bool]:
        """From theta site to whether its values are positive."""
        ...

    def __call__(self) -> Sites:
        """Sample all theta sites."""
        ...

    def distribution(self, site: str) -> TorchDistribution:
        """Return q(theta) of one site."""
        ...


@runtime_checkable
class Guide(Protocol):
    """A Pyro guide with a posterior for any task: q(theta) q(phi | support). Reads only the support of an episode.

    Subclasses of :class:`bayes_lora.guides.TaskGuide` implement it.
    """

    @property
    def num_members(self) -> int:
        """Number of q(theta): K for an ensemble, otherwise 1."""
        ...

    @property
    def steps(self) -> int:
        """Number of gradient steps on the support that compute a posterior; 0 if there are none."""
        ...

    def __call__(self, episode: Episode) -> Sites:
        """Sample the model's latent sites and return phi."""
        ...

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """Return q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``."""
        ...

    def amortized(self, support: Episode) -> tuple[Sites, Distributions]:
        """Return the mean of q(theta), and q(phi | support) at that mean."""
        ...


ThetaFactory = Callable[[Model], ThetaGuide]
"""A function that makes q(theta) from a model, such as a class of :mod:`bayes_lora.guides.theta`."""


def absent_score(dtype: torch.dtype) -> float:
    """Score of an absent option: finite, and low enough to have zero probability next to any real option.

    It is *half* the lowest value of the dtype. The lowest value itself would overflow to -inf in a ``log_softmax`` or
    when a score is subtracted, and inf - inf is NaN.
    """
    return torch.finfo(dtype).min / 2


def delta_site(site: str) -> str:
    """Return the name of the whole update of which a site is a factor."""
    return re.sub(r"\.lora_[AB]", ".delta_weight", site)


def factor_sites(site: str) -> tuple[str, str]:
    """Return the names of the factors A and B of an update."""
    return site.replace(".delta_weight", ".lora_A"), site.replace(".delta_weight", ".lora_B")
