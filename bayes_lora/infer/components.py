"""Posteriors with several equally likely components, such as the members of an ensemble or posterior samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyro
import torch
from pyro.poutine import runtime
from torch import Tensor

from bayes_lora.distributions.unconstrained import map_parameters, parameters, with_parameters
from bayes_lora.utils.devices import send

__all__ = ["Components", "choose_components", "draws_around"]

DRAWS = -3
"""Dimension of the plate of draws or of vectorised particles, outside ``task`` and ``example``."""


class Components(dict[str, Any]):
    """From site name to a distribution with batch ``(K, T, 1)``: a draw takes one of K components for all sites."""

    @classmethod
    def stack(cls, members: Sequence[dict[str, Any]]) -> Components:
        """Stack K posteriors of the same families, each with batch ``(T, 1)``."""
        return cls({site: stack_distributions([member[site] for member in members]) for site in members[0]})

    @property
    def count(self) -> int:
        """Number of components."""
        return int(next(iter(self.values())).batch_shape[0])

    def of_draws(self) -> dict[str, Any]:
        """Select one component per draw of the enclosing plate: batch ``(S, T, 1)``, or ``(T, 1)`` without a plate."""
        return self.take(choose_components(self.count))

    def take(self, chosen: Tensor) -> dict[str, Any]:
        """Select components by index: batch ``(S, T, 1)`` for indices ``(S,)``, ``(T, 1)`` for a scalar index."""
        device = next(iter(parameters(next(iter(self.values()))).values())).device
        # A number is read where it is: as an index on a GPU, it would be read back for each parameter.
        index = int(chosen) if chosen.ndim == 0 else send(chosen, device)
        return {site: map_parameters(fn, lambda value: value[index]) for site, fn in self.items()}


def stack_distributions(fns: Sequence[Any]) -> Any:
    """Stack distributions of one family along a new leading batch dimension."""
    parts = [parameters(fn) for fn in fns]
    return with_parameters(fns[0], {name: torch.stack([part[name] for part in parts]) for name in parts[0]})


def draws_around() -> int | None:
    """Return the number of draws of the enclosing plate of draws; None if there is no such plate."""
    plates = [h for h in runtime._PYRO_STACK if isinstance(h, pyro.plate) and h.dim == DRAWS]
    return int(plates[-1].subsample_size) if plates else None


def choose_components(count: int) -> Tensor:
    """Choose the component of each draw, ``(S,)``, or ``()`` without a plate of draws.

    The components are chosen equally often, as far as S allows.
    """
    draws, order = draws_around(), torch.randperm(count)
    return order[0] if draws is None else order[torch.arange(draws) % count]
