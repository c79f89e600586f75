"""The parameters of a distribution: as its constructor takes them, and unconstrained, as gradient steps move them.

Torch's own distributions declare theirs (``arg_constraints``), and a
:class:`bayes_lora.distributions.weight_distribution.WeightDistribution` does by its attributes. A distribution of your
own that steps should move is a subclass of the latter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor
from torch.distributions import biject_to, constraints
from torch.distributions.transforms import ExpTransform

from bayes_lora.distributions.weight_distribution import Noise, Parameters, WeightDistribution

__all__ = [
    "Parameters",
    "common_noise",
    "constrained",
    "drawn",
    "has_parameters",
    "map_parameters",
    "parameters",
    "scaled",
    "unconstrained",
    "with_parameters",
]


def parameters(fn: Any) -> Parameters:
    """The tensors that a distribution is made of, by the names that its constructor has for them."""
    base = _base(fn)
    if isinstance(base, WeightDistribution):
        return base.tensors()
    if isinstance(base, dist.Delta):
        return {"v": base.v}
    return {name: getattr(base, name) for name in base.arg_constraints}


def with_parameters(fn: Any, values: Parameters) -> Any:
    """A distribution of the family of ``fn`` made of other tensors, named as by :func:`parameters`."""
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(with_parameters(fn.base_dist, values), fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.Delta):
        return dist.Delta(values["v"], event_dim=fn.event_dim)
    return type(fn)(**values)


def map_parameters(fn: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A distribution of the family of ``fn``, made of what the function makes of each of its tensors."""
    return with_parameters(fn, {name: function(value) for name, value in parameters(fn).items()})


def unconstrained(fn: Any) -> Parameters:
    """The parameters of a distribution without constraints: ``"loc"`` and ``"log_scale"`` of a normal.

    A positive parameter is its logarithm, ``log_<name>``; of a point the only one is its ``"value"``.
    """
    base = _base(fn)
    if isinstance(base, WeightDistribution):
        return base.unconstrained()
    if isinstance(base, dist.Delta):
        return {"value": base.v}
    return {
        _free_name(name, constraint): _transform(constraint).inv(getattr(base, name))
        for name, constraint in base.arg_constraints.items()
    }


def constrained(fn: Any, values: Parameters) -> Any:
    """The inverse of :func:`unconstrained`: the family of ``fn`` with these unconstrained parameters.

    An improper flat density becomes a point.
    """
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(constrained(fn.base_dist, values), fn.reinterpreted_batch_ndims)
    if isinstance(fn, WeightDistribution):
        return fn.constrained(values)
    if isinstance(fn, dist.Delta):
        return dist.Delta(values["value"], event_dim=fn.event_dim)
    found = {name: _transform(c)(values[_free_name(name, c)]) for name, c in fn.arg_constraints.items()}
    return type(fn)(**found)


def scaled(fn: Any, factor: float) -> Any:
    """The same distribution with its standard deviations multiplied by ``factor``.

    Normals and weight distributions alone are scaled; others, points among them, stay as they are.
    """
    if isinstance(fn, torch.distributions.Independent):
        return dist.Independent(scaled(fn.base_dist, factor), fn.reinterpreted_batch_ndims)
    if isinstance(fn, WeightDistribution):
        return fn.scaled(factor)
    if isinstance(fn, torch.distributions.Normal):
        return dist.Normal(fn.loc, factor * fn.scale)
    return fn


def drawn(fn: Any, count: int, noise: Noise) -> Tensor:
    """Draws ``(count, *batch, *event)`` of a normal, a point or a weight distribution, made of the noise alone.

    Raises:
        NotImplementedError: it is of another family.
    """
    base = _base(fn)
    if isinstance(base, WeightDistribution):
        return base.drawn(count, noise)
    if isinstance(base, dist.Delta):
        value: Tensor = base.v
        return value.expand(count, *value.shape)
    if isinstance(base, torch.distributions.Normal):
        return base.loc + base.scale * noise(torch.Size((count, *base.loc.shape)))
    raise NotImplementedError(f"{fn} is not drawn from given noise: expected a Normal, Delta or WeightDistribution.")


def common_noise(noise: Noise, axis: int) -> Noise:
    """The same noise all along an axis of the shapes that are asked for."""

    def common(shape: torch.Size) -> Tensor:
        return noise(torch.Size((*shape[:axis], 1, *shape[axis + 1 :]))).expand(shape)

    return common


def has_parameters(fn: Any) -> bool:
    """Whether a distribution is of a family that gradient steps move: normals, points and weight distributions."""
    return isinstance(_base(fn), torch.distributions.Normal | dist.Delta | WeightDistribution)


def _base(fn: Any) -> Any:
    return fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn


def _free_name(name: str, constraint: Any) -> str:
    return f"log_{name}" if constraint is constraints.positive else name


def _transform(constraint: Any) -> Any:
    """From the real numbers. For positive ones torch has an exponential with an affine map behind it, for nothing."""
    return ExpTransform() if constraint is constraints.positive else biject_to(constraint)
