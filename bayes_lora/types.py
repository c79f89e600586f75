"""The contracts that every other module is written against.

Batch dimensions follow Pyro's convention and are counted from the right: ``task`` is dimension -2 and ``example``
dimension -1 of every log-probability, so a value that is constant over a task's examples has size 1 there. Leading
dimensions, if any, are draws.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor

if TYPE_CHECKING:
    from bayes_lora.episodes.episode import Episode

__all__ = [
    "Features",
    "Guide",
    "Likelihood",
    "Model",
    "SiteShapes",
    "Sites",
    "absent_score",
    "delta_site",
    "factor_sites",
]

Sites = dict[str, Tensor]
"""Site name (``"q_proj.lora_A"``) to value of shape ``(*batch, layers, out, in)``."""

SiteShapes = dict[str, tuple[int, int, int]]
"""Site name to event shape ``(layers, out, in)``."""


def absent_score(dtype: torch.dtype) -> float:
    """Score of an option that is not there: finite, and so low that it has no probability beside any real option.

    It is *half* the dtype's lowest value, which leaves room to subtract from it: the lowest value itself would overflow
    to -inf in a ``log_softmax``, or when a score is subtracted, and inf - inf is NaN.
    """
    return torch.finfo(dtype).min / 2


@runtime_checkable
class Likelihood(Protocol):
    """The language model: log p(option | prompt, phi)."""

    def __call__(self, phi: Sites, episode: Episode) -> Tensor:
        """Return option log-likelihoods in nats, ``(*draws, T, N, options)``; :func:`absent_score` of absent options.

        Args:
            phi: values of shape ``(*draws, T or 1, 1, layers, out, in)``, or ``(layers, out, in)`` for one draw
                shared by all tasks.
            episode: ``T`` tasks with ``N`` examples each.
        """
        ...


@runtime_checkable
class Model(Protocol):
    """A Pyro model: p(theta) p(phi | theta) p(answer | phi)."""

    def __call__(self, episode: Episode) -> Any:
        """Sample ``theta.*``, ``phi.<site>`` and the observed ``answer``."""
        ...


@runtime_checkable
class Guide(Protocol):
    """A Pyro guide: q(theta) q(phi | support). Reads only the support half of the episode."""

    def __call__(self, episode: Episode) -> Any:
        """Sample the model's latent sites and return phi."""
        ...


def delta_site(site: str) -> str:
    """The name of the whole update of which a site is a factor."""
    return re.sub(r"\.lora_[AB]", ".delta_weight", site)


def factor_sites(site: str) -> tuple[str, str]:
    """The names of an update's factors A and B."""
    return site.replace(".delta_weight", ".lora_A"), site.replace(".delta_weight", ".lora_B")


class Features(NamedTuple):
    """What the frozen LM knows of examples: the input of a guide's encoder; hidden and options are 0 where absent.

    Attributes:
        hidden: ``(T, N, 2, d)`` hidden states at the end of the prompt: at the first adapted layer, and at the head.
        options: ``(T, N, K, d)`` output embedding of each option, averaged over its tokens.
        log_probs: ``(T, N, K)`` zero-shot log-probabilities of the options, nats; of absent ones
            :func:`bayes_lora.types.absent_score`.
    """

    hidden: Tensor
    options: Tensor
    log_probs: Tensor
