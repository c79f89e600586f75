r"""Independent normals over the entries of a weight matrix, whose means and scales are low-rank (arXiv 2508.14285).

.. math:: \Delta W \sim \mathcal N\big(B_\mu A_\mu,\; (B_\sigma A_\sigma + c)^2\big) \quad\text{elementwise}

Sums over entries are taken some rows at a time, and
:class:`bayes_lora.distributions.deferred_weight.DeferredWeight` maps activations without the matrix.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import TorchDistribution
from torch import Tensor
from torch.distributions import constraints
from torch.distributions.kl import register_kl
from torch.distributions.utils import _standard_normal
from torch.utils.checkpoint import checkpoint

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.unconstrained import Parts, from_parts, to_parts, widened

__all__ = ["CHUNK", "FactoredNormal"]

CHUNK = 1 << 22
"""Sums over the entries of matrices hold at most this many entries at a time."""


class FactoredNormal(TorchDistribution):
    """The distribution of a weight matrix, of event shape ``(out, in)``; see above.

    The sign of the scale does not matter. Samples, mean and variance are whole matrices: ask for :meth:`deferred` where
    these are too large.

    Args:
        loc_A: ``(*batch, r, in)``.
        loc_B: ``(*batch, out, r)``.
        scale_A: ``(*batch, R, in)``.
        scale_B: ``(*batch, out, R)``.
        offset: c, at least 0.
        validate_args: whether to check shapes and values.

    Raises:
        ValueError: the factors do not fit one another.
    """

    arg_constraints = {name: constraints.independent(constraints.real, 2) for name in DeferredWeight._fields}
    support = constraints.independent(constraints.real, 2)
    has_rsample = True

    def __init__(
        self,
        loc_A: Tensor,
        loc_B: Tensor,
        scale_A: Tensor,
        scale_B: Tensor,
        *,
        offset: float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        factors = DeferredWeight(loc_A, loc_B, scale_A, scale_B)
        for a, b in ((loc_A, loc_B), (scale_A, scale_B)):
            if a.shape[-2] != b.shape[-1] or a.shape[-1] != loc_A.shape[-1] or b.shape[-2] != loc_B.shape[-2]:
                got = [tuple(value.shape) for value in factors]
                raise ValueError(f"expected factors (r, in), (out, r), (R, in) and (out, R), got {got}.")
        if not offset >= 0:
            raise ValueError(f"offset: expected at least 0, got {offset}.")
        batch = torch.broadcast_shapes(*(value.shape[:-2] for value in factors))
        factors = DeferredWeight(*(value.expand(*batch, *value.shape[-2:]) for value in factors))
        self.loc_A, self.loc_B, self.scale_A, self.scale_B = factors
        self.offset = offset
        super().__init__(batch, factors.shape[-2:], validate_args=validate_args)

    def expand(self, batch_shape: Any, _instance: Any = None) -> FactoredNormal:
        """The same distribution for a larger batch."""
        parts = [getattr(self, name) for name in DeferredWeight._fields]
        grown = [value.expand(*batch_shape, *value.shape[-2:]) for value in parts]
        return FactoredNormal(*grown, offset=self.offset, validate_args=False)

    def deferred(self) -> DeferredWeight:
        """Its draw, left to the activations."""
        scale_A = torch.cat([self.scale_A, torch.ones_like(self.scale_A[..., :1, :])], -2)
        scale_B = torch.cat([self.scale_B, torch.full_like(self.scale_B[..., :1], self.offset)], -1)
        return DeferredWeight(self.loc_A, self.loc_B, scale_A, scale_B)

    @property
    def mean(self) -> Tensor:
        """``B_mu A_mu``."""
        return self.loc_B @ self.loc_A

    @property
    def stddev(self) -> Tensor:
        """``|B_sigma A_sigma + c|``."""
        return (self.scale_B @ self.scale_A + self.offset).abs()

    @property
    def variance(self) -> Tensor:
        """Its square."""
        return self.stddev.square()

    def rsample(self, sample_shape: Any = ()) -> Tensor:
        """Whole matrices."""
        shape = self._extended_shape(sample_shape)
        return self.mean + self.stddev * _standard_normal(shape, dtype=self.loc_A.dtype, device=self.loc_A.device)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density of whole matrices, nats."""
        each: Tensor = torch.distributions.Normal(self.mean, self.stddev, validate_args=False).log_prob(value)
        return each.sum((-2, -1))

    def entropy(self) -> Tensor:
        """In nats."""
        count = self.event_shape.numel()
        logs = over_rows(lambda q: (q.scale_B @ q.scale_A + self.offset).abs().log(), self)
        return logs + 0.5 * count * math.log(2 * math.pi * math.e)


def over_rows(summand: Any, *normals: FactoredNormal) -> Tensor:
    """Sum ``summand(*factors)``, a function of entries, over the entries of matrices; some rows at a time.

    Where there is more than one piece, backward computes it anew.
    """
    batch = torch.broadcast_shapes(*(normal.batch_shape for normal in normals))
    out, inside = normals[0].event_shape
    step = max(1, CHUNK // max(1, batch.numel() * inside))

    def piece(start: int, *values: Tensor) -> Tensor:
        factors = [DeferredWeight(*values[i : i + 4]) for i in range(0, len(values), 4)]
        cut = [f._replace(loc_B=rows(f.loc_B, start), scale_B=rows(f.scale_B, start)) for f in factors]
        found: Tensor = summand(*cut).sum((-2, -1))
        return found

    def rows(value: Tensor, start: int) -> Tensor:
        return value[..., start : start + step, :]

    values = [getattr(normal, name) for normal in normals for name in DeferredWeight._fields]
    if step >= out:
        return piece(0, *values)
    kept = {"use_reentrant": False, "preserve_rng_state": False}
    again: Any = checkpoint
    return torch.stack([again(piece, start, *values, **kept) for start in range(0, out, step)]).sum(0)


@register_kl(FactoredNormal, FactoredNormal)  # type: ignore[untyped-decorator]
def _(q: FactoredNormal, p: FactoredNormal) -> Tensor:
    def each(of_q: DeferredWeight, of_p: DeferredWeight) -> Tensor:
        variance = (of_p.scale_B @ of_p.scale_A + p.offset).square()
        ratio = (of_q.scale_B @ of_q.scale_A + q.offset).square() / variance
        shift = of_q.loc_B @ of_q.loc_A - of_p.loc_B @ of_p.loc_A
        return 0.5 * (ratio - 1.0 - ratio.log() + shift.square() / variance)

    return over_rows(each, q, p)


@to_parts.register
def _(fn: FactoredNormal) -> Parts:
    return {name: getattr(fn, name) for name in DeferredWeight._fields}


@from_parts.register
def _(fn: FactoredNormal, parts: Parts) -> Any:
    return FactoredNormal(*(parts[name] for name in DeferredWeight._fields), offset=fn.offset)


@widened.register
def _(fn: FactoredNormal, width: float) -> Any:
    return FactoredNormal(fn.loc_A, fn.loc_B, fn.scale_A, width * fn.scale_B, offset=width * fn.offset)
