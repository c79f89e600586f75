"""Random weight matrices that stay unsampled: local reparameterisation as an effect handler.

Usage::

    with LocalReparameterization():
        loss = objective(episode)  # noise enters at activations; without it, whole matrices are drawn
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["DeferredWeight"]


class DeferredWeight(NamedTuple):
    r"""A random weight matrix that stays unsampled: what it makes of activations is (local reparameterisation).

    .. math::
        \Delta W x \sim \mathcal N\big(B_\mu A_\mu x,\; \textstyle\sum_j \sigma_{oj}^2 x_j^2\big), \qquad
        \sigma = B_\sigma A_\sigma

    for every x on its own (Kingma, Salimans and Welling, arXiv 1506.02557). :math:`\sigma` is of rank R; its square, of
    rank R (R + 1) / 2, is applied as such.

    Attributes:
        loc_A, loc_B: ``(*batch, layers, r, in)`` and ``(*batch, layers, out, r)``.
        scale_A, scale_B: likewise with R for r, a constant offset among them (a row of ones in A).
    """

    loc_A: Tensor
    loc_B: Tensor
    scale_A: Tensor
    scale_B: Tensor

    @property
    def shape(self) -> torch.Size:
        """That of the matrices, batch and layers before it."""
        return torch.Size((*self.loc_A.shape[:-2], self.loc_B.shape[-2], self.loc_A.shape[-1]))

    def layers(self) -> list[DeferredWeight]:
        """Each layer's."""
        return [DeferredWeight(*parts) for parts in zip(*(value.unbind(-3) for value in self), strict=True)]

    def variance(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Of each entry of ``dW x``, by the factors of the squared scale; ``(rows, ..., out)``."""
        first, second = torch.triu_indices(*[self.scale_A.shape[-2]] * 2, device=x.device)
        into = self.scale_A[..., first, :] * self.scale_A[..., second, :]
        weight = torch.where(first == second, 1.0, 2.0).to(x.dtype)
        out = self.scale_B[..., first] * self.scale_B[..., second] * weight
        return linear(linear(x.square(), into, row_groups), out, row_groups)

    def __call__(self, x: Tensor, row_groups: RowGroups | None = None) -> Tensor:
        """Draw ``dW x``, ``(rows, ..., in)`` to ``(rows, ..., out)``; noise is independent for every place."""
        mean = linear(linear(x, self.loc_A, row_groups), self.loc_B, row_groups)
        variance = self.variance(x, row_groups)
        # Where it is zero, or rounding makes it less, the root has no derivative.
        scale = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt() * (variance > 0)
        return mean + scale * torch.randn_like(mean)
