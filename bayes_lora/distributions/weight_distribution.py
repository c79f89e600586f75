"""Distributions of one LoRA site that are more than independent normals, as tensors with names."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints

__all__ = ["WeightDistribution"]

Noise = Callable[[torch.Size], Tensor]
"""Standard normal noise of a shape."""


class WeightDistribution(TorchDistribution):
    """A distribution of event shape ``(layers, out, in)``; a subclass says what it is made of, and how it is drawn.

    Attributes:
        dims: for each tensor of the constructor, in its order, how many of its dimensions are no batch. The first is
            the location.

    Args:
        tensors: by name; None where a subclass can do without one.
        validate_args: whether to check values.

    Raises:
        ValueError: a tensor is missing, unknown, or has too few dimensions.
    """

    dims: ClassVar[dict[str, int]]
    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, *, validate_args: bool | None = None, **tensors: Tensor | None) -> None:
        given = {name: value for name, value in tensors.items() if value is not None}
        short = {name: tuple(value.shape) for name, value in given.items() if value.ndim < self.dims[name]}
        first = next(iter(self.dims))
        if short or first not in given:
            raise ValueError(
                f"{type(self).__name__}: expected tensors with {self.dims} dimensions behind the batch; got {short}."
            )
        batch = torch.broadcast_shapes(*(v.shape[: v.ndim - self.dims[name]] for name, v in given.items()))
        for name, dims in self.dims.items():
            value = given.get(name)
            setattr(self, name, None if value is None else value.expand((*batch, *value.shape[value.ndim - dims :])))
        super().__init__(batch, given[first].shape[-3:], validate_args=validate_args)

    def tensors(self) -> dict[str, Tensor]:
        """What it is made of, ``(*batch, ...)`` each."""
        found = {name: getattr(self, name) for name in self.dims}
        return {name: value for name, value in found.items() if value is not None}

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        """The same family, made of what the function makes of each name and tensor."""
        made = {name: function(name, value) for name, value in self.tensors().items()}
        return type(self)(validate_args=False, **made)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """The same distribution for a larger batch."""
        return self.map(lambda name, value: value.expand((*batch_shape, *value.shape[value.ndim - self.dims[name] :])))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Draws ``(*sample, *batch, layers, out, in)``."""
        like, count = next(iter(self.tensors().values())), torch.Size(sample_shape).numel()
        draws = self.drawn(count, lambda shape: torch.randn(shape, dtype=like.dtype, device=like.device))
        return draws.view(*sample_shape, *draws.shape[1:])

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Draws ``(count, *batch, layers, out, in)``, made of the noise alone; no tensor is repeated for them."""
        raise NotImplementedError

    def widened(self, width: float) -> Self:
        """The same distribution with its standard deviations multiplied by ``width``."""
        raise NotImplementedError

    @property
    def variance(self) -> Tensor:
        """Of each weight by itself."""
        raise NotImplementedError

    @property
    def stddev(self) -> Tensor:
        """Of each weight by itself."""
        return self.variance.sqrt()
