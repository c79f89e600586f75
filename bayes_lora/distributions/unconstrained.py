"""What gradient steps move: a distribution as a few unconstrained tensors, and back.

A family is a distribution type with three functions. They are registered for normals here, and for other families in
their own modules::

    @to_parts.register(MyFamily)
    def _(fn: MyFamily) -> Parts: ...
"""

from __future__ import annotations

from functools import singledispatch
from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

__all__ = ["Parts", "Tensors", "from_parts", "rebuilt", "tensors_of", "to_parts", "widened"]

Parts = dict[str, Tensor]
"""Name of an unconstrained parameter (``"loc"``, ``"log_scale"``) to its value ``(*batch, layers, out, in)``."""


Tensors = dict[str, tuple[Tensor, int]]
"""Name of a constructor's argument to its value, and how many of its dimensions are no batch."""


@singledispatch
def to_parts(fn: Any) -> Parts:
    """The unconstrained parameters of a distribution.

    Raises:
        NotImplementedError: no family is registered for its type.
    """
    raise _unknown(fn)


@singledispatch
def from_parts(fn: Any, parts: Parts) -> Any:
    """A distribution of the same family and event dimension as ``fn``, with these parameters."""
    raise _unknown(fn)


@singledispatch
def widened(fn: Any, width: float) -> Any:
    """The same distribution with its standard deviations multiplied by ``width``; itself where none is registered."""
    return fn


def has_parameters(fn: Any) -> bool:
    """Whether :func:`to_parts` is registered for a distribution's family."""
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    return to_parts.dispatch(type(base)) is not to_parts.dispatch(object)


def tensors_of(fn: Any) -> Tensors:
    """What a distribution over ``(layers, out, in)`` is made of, as its constructor takes it."""
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    if isinstance(base, dist.Delta):
        return {"v": (base.v, len(fn.event_shape))}
    if hasattr(base, "tensors"):
        return {name: (value, base.dims[name]) for name, value in base.tensors().items()}
    event = len(fn.event_shape)
    return {name: (getattr(base, name), event) for name in base.arg_constraints}


def rebuilt(fn: Any, tensors: dict[str, Tensor]) -> Any:
    """A distribution like ``fn`` of other tensors, named as :func:`tensors_of` names them."""
    if isinstance(fn, torch.distributions.Independent):
        # Its own type is torch's or Pyro's; to_event gives Pyro's.
        return rebuilt(fn.base_dist, tensors).to_event(fn.reinterpreted_batch_ndims)
    if isinstance(fn, dist.Delta):
        return dist.Delta(tensors["v"], event_dim=fn.event_dim)
    if hasattr(fn, "offset"):
        return type(fn)(**tensors, offset=fn.offset)
    return type(fn)(**tensors)


def _unknown(fn: Any) -> NotImplementedError:
    return NotImplementedError(
        f"no family is registered for {type(fn).__name__}. Use Normal(loc, scale).to_event(3), or register the type "
        "with bayes_lora.distributions.unconstrained.to_parts, from_parts and widened."
    )


@to_parts.register(torch.distributions.Independent)
def _(fn: Any) -> Parts:
    return to_parts(fn.base_dist)


@from_parts.register(torch.distributions.Independent)
def _(fn: Any, parts: Parts) -> Any:
    return from_parts(fn.base_dist, parts).to_event(fn.reinterpreted_batch_ndims)


@widened.register(torch.distributions.Independent)
def _(fn: Any, width: float) -> Any:
    return widened(fn.base_dist, width).to_event(fn.reinterpreted_batch_ndims)


@to_parts.register(dist.Delta)
def _(fn: Any) -> Parts:
    return {"value": fn.v}


@from_parts.register(dist.Delta)
def _(fn: Any, parts: Parts) -> Any:
    return dist.Delta(parts["value"], event_dim=fn.event_dim)


@to_parts.register(torch.distributions.Normal)
def _(fn: Any) -> Parts:
    return {"loc": fn.loc, "log_scale": fn.scale.log()}


@from_parts.register(torch.distributions.Normal)
def _(fn: Any, parts: Parts) -> Any:
    return dist.Normal(parts["loc"], parts["log_scale"].exp())


@widened.register(torch.distributions.Normal)
def _(fn: Any, width: float) -> Any:
    return dist.Normal(fn.loc, width * fn.scale)
