"""The base class of distributions over one LoRA site, defined by named tensors."""

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
"""Returns standard normal noise of the given shape."""

Parameters = dict[str, Tensor]
"""Name of a distribution's parameter to its value, of shape ``(*batch, ...)``."""


class WeightDistribution(TorchDistribution):
    """A distribution of event shape ``(layers, out, in)``. A subclass defines its tensors and how to sample from them.

    Attributes:
        dims: number of non-batch dimensions of each tensor, in the order of the constructor's arguments.
        positive: names of the positive tensors; gradient steps move their logarithms.
        fixed: names of the tensors that gradient steps do not move.

    Args:
        tensors: the tensors by name; None if a subclass does not need one.
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
                f"{type(self).__name__}: expected tensors with {self.dims} dimensions after the batch; got {short}."
            )
        batch = torch.broadcast_shapes(*(v.shape[: v.ndim - self.dims[name]] for name, v in given.items()))
        for name, dims in self.dims.items():
            value = given.get(name)
            setattr(self, name, None if value is None else value.expand((*batch, *value.shape[value.ndim - dims :])))
        super().__init__(batch, self.shape_of(given), validate_args=validate_args)

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor]) -> torch.Size:
        """Return the event shape ``(layers, out, in)``; by default that of the constructor's first tensor."""
        return tensors[next(iter(cls.dims))].shape[-3:]

    def tensors(self) -> Parameters:
        """Return the tensors that define the distribution, ``(*batch, ...)`` each."""
        found = {name: getattr(self, name) for name in self.dims}
        return {name: value for name, value in found.items() if value is not None}

    def unconstrained(self) -> Parameters:
        """Return the tensors that gradient steps move; positive ones as their logarithm, ``log_<name>``."""
        moved = {name: value for name, value in self.tensors().items() if name not in self.fixed}
        return {
            f"log_{name}" if name in self.positive else name: value.log() if name in self.positive else value
            for name, value in moved.items()
        }

    def constrained(self, values: Parameters) -> TorchDistribution:
        """Invert :meth:`unconstrained`: return the same family with these unconstrained parameters."""
        tensors = self.tensors()
        for name in tensors.keys() - self.fixed:
            tensors[name] = values[f"log_{name}"].exp() if name in self.positive else values[name]
        return type(self)(validate_args=None, **tensors)

    def map(self, function: Callable[[str, Tensor], Tensor]) -> Self:
        """Return the distribution with a function of name and tensor applied to each of its tensors."""
        made = {name: function(name, value) for name, value in self.tensors().items()}
        return type(self)(validate_args=False, **made)

    def expand(self, batch_shape: Any, _instance: Any = None) -> Self:
        """Return the distribution expanded to a larger batch."""
        return self.map(lambda name, value: value.expand((*batch_shape, *value.shape[value.ndim - self.dims[name] :])))

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Sample ``(*sample, *batch, layers, out, in)``."""
        like, count = next(iter(self.tensors().values())), torch.Size(sample_shape).numel()
        draws = self.drawn(count, lambda shape: _standard_normal(shape, dtype=like.dtype, device=like.device))
        return draws.view(*sample_shape, *draws.shape[1:])

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample ``(count, *batch, layers, out, in)`` from the given noise; no tensor is repeated for the draws."""
        raise NotImplementedError

    def scaled(self, factor: float) -> Self:
        """Return the distribution with its standard deviations multiplied by ``factor``."""
        raise NotImplementedError

    def kl_from(self, normal: torch.distributions.Normal) -> Tensor:
        """Return KL(self || normal) in nats, ``(*batch,)``, for independent normals.

        Raises:
            NotImplementedError: there is no closed form.
        """
        raise NotImplementedError(f"KL of {type(self).__name__} from {normal} has no closed form.")

    def squared_distance(self, normal: torch.distributions.Normal) -> Tensor:
        """Return E[(w - m)^2] / s^2 per weight, for a normal with mean m and standard deviation s."""
        return (self.variance + (self.mean - normal.loc).square()) / normal.scale.square()

    @property
    def variance(self) -> Tensor:
        """Marginal variance of each weight."""
        raise NotImplementedError

    @property
    def stddev(self) -> Tensor:
        """Marginal standard deviation of each weight."""
        return self.variance.sqrt()

    def mean_stddev(self) -> Tensor:
        """Return the mean of all standard deviations, a scalar."""
        return self.stddev.mean()


@register_kl(WeightDistribution, torch.distributions.Independent)  # type: ignore[untyped-decorator]
def _(q: WeightDistribution, p: torch.distributions.Independent[Any]) -> Tensor:
    if not isinstance(p.base_dist, torch.distributions.Normal):
        raise NotImplementedError(f"KL of {type(q).__name__} from {p} has no closed form.")
    return q.kl_from(p.base_dist)
