"""A mean that is moved by a mixture of directions, without keeping the mixture for backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["moved"]


def moved(loc: Tensor, scale: Tensor, mixed: Tensor, directions: Tensor, added: Tensor | None = None) -> Tensor:
    r"""Return :math:`\mu + \sigma (\sum_m c_m D_m + a)` for each task, ``(..., T, 1, layers, out, in)``.

    Backward computes the sum again: kept for each task, it would be as large as a draw of the weights.

    Args:
        loc: mu, which broadcasts to the result.
        scale: sigma, which broadcasts to the result.
        mixed: c, ``(..., T, layers, m)``.
        directions: D, ``(layers, m, out, in)``.
        added: a, ``(..., T, layers, out, in)``.
    """
    found: Tensor = _Moved.apply(loc, scale, mixed, directions, added)  # type: ignore[no-untyped-call]
    return found


def _shift(mixed: Tensor, directions: Tensor, added: Tensor | None) -> Tensor:
    shift = torch.einsum("...tlm,lmoi->...tloi", mixed, directions)
    return (shift if added is None else shift + added).unsqueeze(-4)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, loc: Tensor, scale: Tensor, mixed: Tensor, directions: Tensor, added: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(scale, mixed, directions, added)
        ctx.loc = loc.shape, loc.dtype
        return torch.addcmul(loc, scale, _shift(mixed, directions, added))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        # Only differentiable operations, because second-order steps differentiate through this.
        (gradient,) = gradients
        scale, mixed, directions, added = ctx.saved_tensors
        to_loc, to_scale, to_mixed, to_directions, to_added = ctx.needs_input_grad
        of_shift = (gradient * scale).squeeze(-4).to(mixed.dtype)  # a guide may have another dtype than its prior
        shape, dtype = ctx.loc
        return (
            gradient.sum_to_size(shape).to(dtype) if to_loc else None,
            (gradient * _shift(mixed, directions, added)).sum_to_size(scale.shape).to(scale) if to_scale else None,
            torch.einsum("...tloi,lmoi->...tlm", of_shift, directions).sum_to_size(mixed.shape) if to_mixed else None,
            torch.einsum("...tlm,...tloi->lmoi", mixed, of_shift) if to_directions else None,
            of_shift.sum_to_size(added.shape).to(added.dtype) if to_added and added is not None else None,
        )
