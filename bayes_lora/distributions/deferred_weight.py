"""Random weight matrices that are never sampled: local reparameterisation.

Usage::

    with LocalReparameterization():
        loss = objective(episode)  # samples activations; without it, whole matrices are sampled
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["DeferredWeight"]


class DeferredWeight(NamedTuple):
    r"""A random weight matrix whose products with activations are sampled, not the matrix itself.

    .. math::
        \Delta W x \sim \mathcal N\big(B_\mu A_\mu x,\; \textstyle\sum_j \sigma_{oj}^2 x_j^2\big), \qquad
        \sigma = B_\sigma A_\sigma

    independently for every x (local reparameterisation: Kingma, Salimans and Welling, arXiv 1506.02557).
    :math:`\sigma` has rank R, so its elementwise square has rank at most R (R + 1) / 2 and is applied in factored form.

    Attributes:
        loc_A, loc_B: ``(*batch, layers, r, in)`` and ``(*batch, layers, out, r)``.
        scale_A, scale_B: the same with R in place of r; a constant offset is one of the R (a row of ones in A).
    """

    loc_A: Tensor
    loc_B: Tensor
    scale_A: Tensor
    scale_B: Tensor

    @property
    def shape(self) -> torch.Size:
        """Shape of the matrices, ``(*batch, layers, out, in)``."""
        return torch.Size((*self.loc_A.shape[:-2], self.loc_B.shape[-2], self.loc_A.shape[-1]))

    def layers(self) -> list[DeferredWeight]:
        """Split into one function of activations per layer."""
        return [DeferredWeight(*parts) for parts in zip(*(value.unbind(-3) for value in self), strict=True)]

    def variance(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Return the variance of each entry of ``dW x``, ``(rows, ..., out)``, from factors of the squared scale."""
        first, second = torch.triu_indices(*[self.scale_A.shape[-2]] * 2, device=x.device)
        into = self.scale_A[..., first, :] * self.scale_A[..., second, :]
        weight = torch.where(first == second, 1.0, 2.0).to(x.dtype)
        out = self.scale_B[..., first] * self.scale_B[..., second] * weight
        return linear(linear(x.square(), into, row_groups), out, row_groups)

    def __call__(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Draw ``dW x``, ``(rows, ..., in)`` to ``(rows, ..., out)``; the noise is independent per position."""
        mean = linear(linear(x, self.loc_A, row_groups), self.loc_B, row_groups)
        variance = self.variance(x, row_groups)
        # The square root has no derivative at zero, and rounding can make the variance negative.
        scale = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt() * (variance > 0)
        return mean + scale * torch.randn_like(mean)
