r"""Independent normals over the entries of a weight matrix, with low-rank means and scales (arXiv 2508.14285).

.. math:: \Delta W \sim \mathcal N\big(B_\mu A_\mu,\; (B_\sigma A_\sigma + c)^2\big) \quad\text{elementwise}

Sums over entries are computed in chunks of rows, and
:class:`bayes_lora.distributions.deferred_weight.DeferredWeight` maps activations without forming the matrix.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributions.kl import register_kl
from torch.utils.checkpoint import checkpoint

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.weight_distribution import Noise, WeightDistribution

__all__ = ["CHUNK", "FactoredNormal"]

CHUNK = 1 << 22
"""Sums over the entries of matrices hold at most this many entries at a time."""

FACTORS = DeferredWeight._fields


class FactoredNormal(WeightDistribution):
    """The distribution of one weight matrix per layer, of event shape ``(layers, out, in)``; see above.

    The sign of the scale does not matter. Samples, mean and variance are full matrices; use :meth:`deferred` if these
    are too large.

    Args:
        loc_A: ``(*batch, layers, r, in)``.
        loc_B: ``(*batch, layers, out, r)``.
        scale_A: ``(*batch, layers, R, in)``.
        scale_B: ``(*batch, layers, out, R)``.
        offset: c, at least 0; a number or ``(*batch,)``.
        validate_args: whether to check values.

    Raises:
        ValueError: the shapes of the factors do not match, or the offset is negative.
    """

    dims = {"loc_A": 3, "loc_B": 3, "scale_A": 3, "scale_B": 3, "offset": 0}
    fixed = frozenset({"offset"})
    loc_A: Tensor
    loc_B: Tensor
    scale_A: Tensor
    scale_B: Tensor
    offset: Tensor

    def __init__(
        self,
        loc_A: Tensor,
        loc_B: Tensor,
        scale_A: Tensor,
        scale_B: Tensor,
        *,
        offset: Tensor | float = 0.0,
        validate_args: bool | None = None,
    ) -> None:
        for a, b in ((loc_A, loc_B), (scale_A, scale_B)):
            if a.shape[-2] != b.shape[-1] or a.shape[-1] != loc_A.shape[-1] or b.shape[-2] != loc_B.shape[-2]:
                got = [tuple(value.shape) for value in (loc_A, loc_B, scale_A, scale_B)]
                raise ValueError(f"expected factors (r, in), (out, r), (R, in) and (out, R), got {got}.")
        if not isinstance(offset, Tensor):
            if not offset >= 0:
                raise ValueError(f"offset: expected at least 0, got {offset}.")
            offset = loc_A.new_full((), offset)
        super().__init__(
            loc_A=loc_A, loc_B=loc_B, scale_A=scale_A, scale_B=scale_B, offset=offset, validate_args=validate_args
        )

    @classmethod
    def shape_of(cls, tensors: Mapping[str, Tensor]) -> torch.Size:
        """Return the event shape ``(layers, out, in)``."""
        a, b = tensors["loc_A"], tensors["loc_B"]
        return torch.Size((*torch.broadcast_shapes(a.shape[-3:-2], b.shape[-3:-2]), b.shape[-2], a.shape[-1]))

    @property
    def _offset(self) -> Tensor:
        """The offset with dimensions that broadcast over a matrix."""
        return self.offset[..., None, None, None]

    def deferred(self) -> DeferredWeight:
        """Return a draw in deferred form: the language model samples its products with activations."""
        scale_A = torch.cat([self.scale_A, torch.ones_like(self.scale_A[..., :1, :])], -2)
        scale_B = torch.cat([self.scale_B, self._offset.expand_as(self.scale_B[..., :1])], -1)
        return DeferredWeight(self.loc_A, self.loc_B, scale_A, scale_B)

    @property
    def mean(self) -> Tensor:
        """The mean, ``B_mu A_mu``."""
        return self.loc_B @ self.loc_A

    @property
    def stddev(self) -> Tensor:
        """The standard deviation, ``|B_sigma A_sigma + c|``."""
        return (self.scale_B @ self.scale_A + self._offset).abs()

    @property
    def variance(self) -> Tensor:
        """The variance, elementwise."""
        return self.stddev.square()

    def mean_stddev(self) -> Tensor:
        """Return the mean of all standard deviations, without forming full matrices."""
        total = sum_in_chunks(lambda q: (q.scale_B @ q.scale_A + self._offset).abs(), self)
        return total.mean() / self.event_shape[1:].numel()

    def drawn(self, count: int, noise: Noise) -> Tensor:
        """Sample full matrices, ``(count, *batch, layers, out, in)``."""
        return self.mean + self.stddev * noise(torch.Size((count, *self.batch_shape, *self.event_shape)))

    def scaled(self, factor: float) -> FactoredNormal:
        """Return the distribution with ``B_sigma`` and c multiplied by ``factor``."""
        scale_B, offset = factor * self.scale_B, factor * self.offset
        return FactoredNormal(self.loc_A, self.loc_B, self.scale_A, scale_B, offset=offset, validate_args=False)

    def log_prob(self, value: Tensor) -> Tensor:
        """Return the log-density of full matrices, in nats."""
        each: Tensor = torch.distributions.Normal(self.mean, self.stddev, validate_args=False).log_prob(value)
        return each.sum((-3, -2, -1))

    def entropy(self) -> Tensor:
        """Return the entropy, in nats."""
        logs = sum_in_chunks(lambda q: (q.scale_B @ q.scale_A + self._offset).abs().log(), self).sum(-1)
        return logs + 0.5 * self.event_shape.numel() * math.log(2 * math.pi * math.e)


def sum_in_chunks(summand: Any, *normals: FactoredNormal) -> Tensor:
    """Sum ``summand(*factors)`` over the entries of each layer's matrix, in chunks of rows.

    Returns ``(*batch, layers)``. If there is more than one chunk, backward computes each chunk again.
    """
    batch = torch.broadcast_shapes(*(normal.batch_shape for normal in normals))
    layers, out, inside = normals[0].event_shape
    step = max(1, CHUNK // max(1, batch.numel() * layers * inside))

    def piece(start: int, *values: Tensor) -> Tensor:
        factors = [DeferredWeight(*values[i : i + 4]) for i in range(0, len(values), 4)]
        cut = [f._replace(loc_B=rows(f.loc_B, start), scale_B=rows(f.scale_B, start)) for f in factors]
        found: Tensor = summand(*cut).sum((-2, -1))
        return found

    def rows(value: Tensor, start: int) -> Tensor:
        return value[..., start : start + step, :]

    values = [getattr(normal, name) for normal in normals for name in FACTORS]
    if step >= out:
        return piece(0, *values)
    kept = {"use_reentrant": False, "preserve_rng_state": False}
    again: Any = checkpoint
    return torch.stack([again(piece, start, *values, **kept) for start in range(0, out, step)]).sum(0)


@register_kl(FactoredNormal, FactoredNormal)  # type: ignore[untyped-decorator]
def _(q: FactoredNormal, p: FactoredNormal) -> Tensor:
    def each(of_q: DeferredWeight, of_p: DeferredWeight) -> Tensor:
        variance = (of_p.scale_B @ of_p.scale_A + p._offset).square()
        ratio = (of_q.scale_B @ of_q.scale_A + q._offset).square() / variance
        shift = of_q.loc_B @ of_q.loc_A - of_p.loc_B @ of_p.loc_A
        return 0.5 * (ratio - 1.0 - ratio.log() + shift.square() / variance)

    return sum_in_chunks(each, q, p).sum(-1)
