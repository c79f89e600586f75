"""Distributions of one LoRA site that are more than independent normals, as tensors with names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.distributions.utils import _standard_normal

__all__ = ["Noise", "Parameters", "WeightDistribution"]

Noise = Callable[[torch.Size], Tensor]
"""Standard normal noise of a shape."""

Parameters = dict[str, Tensor]
"""Name of a distribution's parameter to its value, whose first dimensions are the distribution's whole batch."""


class WeightDistribution(TorchDistribution):
    """A distribution of event shape ``(layers, out, in)``; a subclass says what it is made of, and how it is drawn.

    Attributes:
        dims: for each tensor of the constructor, in its order, how many of its dimensions are no batch.
        positive: the tensors that are positive; gradient steps move their logarithms.
        fixed: the tensors that gradient steps leave as they are.

    Args:
        tensors: by name; None where a subclass can do without one.
        validate_args: whether to check values.

    Raises:
        ValueError: a tensor is missing, unknown, or has too few dimensions.
    """

    dims: ClassVar[dict[str, int]]
    positive: ClassVar[frozenset[str]] = frozenset()
    fixed: ClassVar[frozenset[str]] = frozenset()
    arg_constraints: ClassVar[dict[str, Any]] = {}
    support = constraints.independent(constraints.real, 3)
    has_rsample = True

    def __init__(self, *, validate_args: bool | None = None, **tensors: Tensor | None) -> None:
        given = {name: value for name, value in tensors.items() if value is not None}
        short = {name: tuple(value.shape) for name, value in given.items() if value.ndim < self.dims[name]}
        if short or next(iter(self.dims)) not in given:
            raise ValueError(
                f"{type(self).__name__}: expected tensors with {self.dims} dimensions behind the batch; got {short}."
            )
        batch = torch.broadcast_shapes(*(v.shape[: v.ndim - self.dims[name]] for name, v in given.items()))
        for name, dims in self.dims.items():
            value = given.get(name)
            setattr(self, name, None if value is None else value.expand((*batch, *value.shape[value.ndim - dims :])))
        super().__init__(batch, self.shape_of(given), validate_args=validate_args)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor]) -> torch.Size:
        """The event shape ``(layers, out, in)``; by default that of the constructor's first tensor."""
        return tensors[next(iter(cls.dims))].shape[-3:]

    def tensors(self) -> Parameters:
        """What it is made of, ``(*batch, ...)`` each."""
        found = {name: getattr(self, name) for name in self.dims}
        return {name: value for name, value in found.items() if value is not None}

    def unconstrained(self) -> Parameters:
        """What gradient steps move: its tensors, or ``log_<name>`` of those that are positive."""
        moved = {name: value for name, value in self.tensors().items() if name not in self.fixed}
        return {
            f"log_{name}" if name in self.positive else name: value.log() if name in self.positive else value
            for name, value in moved.items()
        }

    def constrained(self, values: Parameters) -> TorchDistribution:
        """The inverse of :meth:`unconstrained`: the same family with these unconstrained parameters."""
        tensors = self.tensors()
        for name in tensors.keys() - self.fixed:
            tensors[name] = values[f"log_{name}"].exp() if name in self.positive else values[name]
        return type(self)(validate_args=None, **tensors)

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
        draws = self.drawn(count, lambda shape: _standard_normal(shape, dtype=like.dtype, device=like.device))
        return draws.view(*sample_shape, *draws.shape[1:])

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Draws ``(count, *batch, layers, out, in)``, made of the noise alone; no tensor is repeated for them."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """The same distribution with its standard deviations multiplied by ``factor``."""
        raise NotImplementedError

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """KL(self || normal), nats, ``(*batch,)``; the normal is of each weight by itself.

        Raises:
            NotImplementedError: it has no closed form.
        """
        raise NotImplementedError(f"KL of {type(self).__name__} from {normal} has no closed form.")

    def squared_distance(self, normal: torch.distributions.Normal) -> Tensor:
        """E[(w - m)^2] / s^2 of each weight, for a normal with mean m and standard deviation s."""
        return (self.variance + (self.mean - normal.loc).square()) / normal.scale.square()

    @property
    def variance(self) -> Tensor:
        """Of each weight by itself."""
        raise NotImplementedError

    @property
    def stddev(self) -> Tensor:
        """Of each weight by itself."""
        return self.variance.sqrt()

    def mean_stddev(self) -> Tensor:
        """The mean of all standard deviations, a scalar."""
        return self.stddev.mean()


@register_kl(WeightDistribution, torch.distributions.Independent)  # type: ignore[untyped-decorator]
def _(q: WeightDistribution, p: torch.distributions.Independent[Any]) -> Tensor:
    if not isinstance(p.base_dist, torch.distributions.Normal):
        raise NotImplementedError(f"KL of {type(q).__name__} from {p} has no closed form.")
    return q.kl_from(p.base_dist)
