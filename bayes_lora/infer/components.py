"""A posterior of several equally likely components, such as an ensemble's members or a sampler's samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from torch import Tensor

from bayes_lora.distributions.unconstrained import map_parameters, parameters, with_parameters

__all__ = ["Components", "choose_components", "draws_around"]

DRAWS = -3
"""Dimension of the plate of draws or of vectorised particles, outside of ``task`` and ``example``."""


class Components(dict[str, Any]):
    """Site name to a distribution with batch ``(K, T, 1)``: K components, of which a draw takes one for all sites."""

    @classmethod
    def stack(cls, members: Sequence[dict[str, Any]]) -> Components:
        """Of K posteriors with batch ``(T, 1)``, each of the same families."""
        return cls({site: stack_distributions([member[site] for member in members]) for site in members[0]})

    @property
    def count(self) -> int:
        """K."""
        return int(next(iter(self.values())).batch_shape[0])

    def of_draws(self) -> dict[str, Any]:
        """For the plate of draws that is running: batch ``(S, T, 1)``, or ``(T, 1)`` where there is none."""
        return self.take(choose_components(self.count))

    def take(self, chosen: Tensor) -> dict[str, Any]:
        """The chosen components, ``(S,)``, or one of them: batch ``(S, T, 1)`` or ``(T, 1)``."""
        return {site: map_parameters(fn, lambda value: value[chosen.to(value.device)]) for site, fn in self.items()}


def stack_distributions(fns: Sequence[Any]) -> Any:
    """One distribution with a new batch dimension before all others."""
    parts = [parameters(fn) for fn in fns]
    return with_parameters(fns[0], {name: torch.stack([part[name] for part in parts]) for name in parts[0]})


def draws_around() -> int | None:
    """How many draws share the forward that is running; None where there is no plate of them."""
    plates = [h for h in runtime._PYRO_STACK if isinstance(h, pyro.plate) and h.dim == DRAWS]
    return int(plates[-1].subsample_size) if plates else None


def choose_components(count: int) -> Tensor:
    """The component of each draw, ``(S,)``, all equally often as far as S allows; ``()`` without a plate of draws."""
    draws, order = draws_around(), torch.randperm(count)
    return order[0] if draws is None else order[torch.arange(draws) % count]
