"""Random weight matrices that stay unsampled: local reparameterisation as an effect handler.

Usage::

    with LocalReparameterization():
        loss = objective(episode)  # noise enters at activations; without it, whole matrices are drawn
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor
from torch.nn import functional as F

__all__ = ["Blocks", "DeferredWeight", "LocalReparameterization", "linear"]


class Blocks(NamedTuple):
    """Groups of unequal size into which the rows of a batch fall, in order.

    Attributes:
        sizes: rows of each group.
        group: ``(rows,)`` the group of each row.
    """

    sizes: tuple[int, ...]
    group: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> Blocks | None:
        """None where all are equally large."""
        if len(set(sizes)) <= 1:
            return None
        group = torch.tensor([index for index, size in enumerate(sizes) for _ in range(size)])
        return cls(tuple(sizes), group.to(device, non_blocking=True))


def linear(x: Tensor, weight: Tensor, blocks: Blocks | None = None) -> Tensor:
    """``x W^T``: ``(rows, ..., in)`` to ``(rows, ..., out)``.

    A 3-D weight ``(groups, out, in)`` takes the rows in order as groups, each with its own matrix: of equal size, or
    as ``blocks`` says.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    if blocks is not None and 4 * min(weight.shape[1:]) > x.shape[1:-1].numel():
        # A copy of the matrix for each row would not be small beside the row's activations.
        parts = zip(x.split(blocks.sizes), weight, strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in parts])
    if blocks is not None:
        rows: Tensor = _LinearByRow.apply(x.flatten(1, -2), weight, blocks.group)  # type: ignore[no-untyped-call]
        return rows.reshape(*x.shape[:-1], weight.shape[-2])
    grouped = x.reshape(weight.shape[0], -1, weight.shape[-1])  # (groups, rows / groups * length, in)
    return torch.bmm(grouped, weight.mT).reshape(*x.shape[:-1], weight.shape[-2])


class _LinearByRow(torch.autograd.Function):
    """``x_i W_g(i)^T`` of each row i; keeps the groups' matrices for backward, not a copy for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, group)
        return torch.bmm(x, weight.index_select(0, group).mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Of differentiable operations, for second-order steps differentiate through this.
        (gradient,) = gradients
        x, weight, group = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        return (
            torch.bmm(gradient, weight.index_select(0, group)) if to_x else None,
            torch.zeros_like(weight).index_add(0, group, torch.bmm(gradient.mT, x)) if to_weight else None,
            None,
        )


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

    def variance(self, x: Tensor, blocks: Blocks | None = None) -> Tensor:
        """Of each entry of ``dW x``, by the factors of the squared scale; ``(rows, ..., out)``."""
        first, second = torch.triu_indices(*[self.scale_A.shape[-2]] * 2, device=x.device)
        into = self.scale_A[..., first, :] * self.scale_A[..., second, :]
        weight = torch.where(first == second, 1.0, 2.0).to(x.dtype)
        out = self.scale_B[..., first] * self.scale_B[..., second] * weight
        return linear(linear(x.square(), into, blocks), out, blocks)

    def __call__(self, x: Tensor, blocks: Blocks | None = None) -> Tensor:
        """Draw ``dW x``, ``(rows, ..., in)`` to ``(rows, ..., out)``; noise is independent for every place."""
        mean = linear(linear(x, self.loc_A, blocks), self.loc_B, blocks)
        variance = self.variance(x, blocks)
        # Where it is zero, or rounding makes it less, the root has no derivative.
        scale = variance.clamp_min(torch.finfo(x.dtype).tiny).sqrt() * (variance > 0)
        return mean + scale * torch.randn_like(mean)


class LocalReparameterization(Messenger):
    """Effect handler: a latent site whose distribution has a ``deferred()`` form takes that for its value.

    Around a guide (and a model that is replayed against it) the language model draws what such weights make of each
    activation, instead of the weights: less variance in the gradient, and no matrix of a task's own in memory. A draw
    is then no longer one model for all tokens. It reaches into programs that a guide runs by itself.
    """

    def _pyro_sample(self, msg: Any) -> None:
        if msg["is_observed"] or msg["done"]:
            return
        fn = msg["fn"]
        while isinstance(fn, torch.distributions.Independent):
            fn = fn.base_dist
        if hasattr(fn, "deferred"):
            msg["value"], msg["done"] = fn.deferred(), True
