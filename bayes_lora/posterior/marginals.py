"""The distributions of a task's sites by name: what a notebook reads of the prior and the posterior."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from pyro.distributions import Categorical, MixtureSameFamily

from bayes_lora.distributions.unconstrained import map_parameters
from bayes_lora.errors import did_you_mean
from bayes_lora.infer.components import Components
from bayes_lora.types import Distributions

__all__ = ["SiteDistributions", "marginals"]

PHI = "phi."
"""What Pyro's name of a random site begins with."""


class SiteDistributions(dict[str, Any]):
    """From site name to distribution; Pyro's name of a site, ``phi.q_proj.lora_B``, is read as ``q_proj.lora_B``."""

    def __init__(self, found: Mapping[str, Any], what: str) -> None:
        super().__init__(found)
        self.what = what

    def __missing__(self, site: str) -> Any:
        short = site.removeprefix(PHI)
        if short in self:
            return self[short]
        raise KeyError(f"{self.what} has no site {site!r}{did_you_mean(short, self, list_all=True)}")


def marginals(phi: Distributions) -> Distributions:
    """Return the distribution of each site alone, batch ``(T, 1)``: the mixture, where there are components."""
    if not isinstance(phi, Components):
        return phi
    return {site: _mixture(fn, phi.count) for site, fn in phi.items()}


def _mixture(fn: Any, count: int) -> Any:
    """Return K equally likely components, batch ``(K, T, 1)``, as a mixture of batch ``(T, 1)``."""
    inner = map_parameters(fn, lambda value: value.movedim(0, 2))
    logits = torch.zeros(*fn.batch_shape[1:], count, device=inner.mean.device)
    return MixtureSameFamily(Categorical(logits=logits), inner, validate_args=False)
