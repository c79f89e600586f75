"""Kullback-Leibler divergences of distributions over LoRA weights."""

from __future__ import annotations

from typing import Any

import torch
from pyro.distributions import Normal
from torch import Tensor
from torch.distributions import kl_divergence

__all__ = ["divergence"]


def divergence(q: Any, p: Any) -> Tensor:
    """Return KL(q || p) in nats, of the batch shape. For normals, backward keeps only their parameters.

    If p has a method ``divergence_from(q)``, an upper bound on the divergence, its result is returned.

    Raises:
        NotImplementedError: there is neither a closed form nor a bound.
    """
    if hasattr(p, "divergence_from"):
        bound: Tensor = p.divergence_from(q)
        return bound
    # Only Independent is unwrapped, because a masked or transformed normal has another divergence.
    normals = [fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn for fn in (q, p)]
    if all(type(fn) is Normal for fn in normals) and len(q.event_shape) == len(p.event_shape):
        (one, other), events = normals, len(q.event_shape)
        each: Tensor = _NormalDivergence.apply(one.loc, one.scale, other.loc, other.scale)  # type: ignore[no-untyped-call]
        return each.sum(tuple(range(-events, 0))) if events else each
    return kl_divergence(q, p)


class _NormalDivergence(torch.autograd.Function):
    """KL of normals, elementwise; backward recomputes the eight intermediate tensors that torch's own KL keeps."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale, prior_loc, prior_scale)
        ratio = scale / prior_scale
        shift = (loc - prior_loc).div_(prior_scale)
        return (ratio.square() + shift.square_()).sub_(1.0).mul_(0.5).sub_(ratio.log())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        loc, scale, prior_loc, prior_scale = ctx.saved_tensors
        ratio, shift, weighed = scale / prior_scale, (loc - prior_loc) / prior_scale, gradient / prior_scale
        of_loc = weighed * shift
        of_prior_scale = weighed * (1.0 - ratio.square() - shift.square())
        return (
            of_loc.sum_to_size(loc.shape),
            (weighed * (ratio - ratio.reciprocal())).sum_to_size(scale.shape),
            -of_loc.sum_to_size(prior_loc.shape),
            of_prior_scale.sum_to_size(prior_scale.shape),
        )
