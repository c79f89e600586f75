"""Linear maps over a batch whose rows are divided into groups, each with its own matrix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from bayes_lora.utils.devices import send

__all__ = ["RowGroups", "linear"]


class RowGroups(NamedTuple):
    """Groups of unequal size that divide the rows of a batch, in order.

    Attributes:
        sizes: number of rows of each group.
        group: ``(rows,)`` index of the group of each row.
    """

    sizes: tuple[int, ...]
    group: Tensor

    @classmethod
    def of(cls, sizes: Sequence[int], device: torch.device) -> RowGroups | None:
        """Make groups of these sizes; None if all sizes are equal."""
        if len(set(sizes)) <= 1:
            return None
        group = torch.tensor([index for index, size in enumerate(sizes) for _ in range(size)])
        return cls(tuple(sizes), send(group, device))


def linear(x: Tensor, weight: Tensor, row_groups: RowGroups | None = None) -> Tensor:
    """``x W^T``: ``(rows, ..., in)`` to ``(rows, ..., out)``.

    With a 3-D weight ``(groups, out, in)``, the rows are divided in order into groups, each with its own matrix. The
    groups have equal size, or the sizes of ``row_groups``.
    """
    if weight.ndim == 2:
        return F.linear(x, weight)
    if row_groups is not None and 4 * min(weight.shape[1:]) > math.prod(x.shape[1:-1]):
        # A copy of the matrix for each row would not be small compared with the row's activations.
        parts = zip(x.split(row_groups.sizes), weight, strict=True)
        return torch.cat([F.linear(part, matrix) for part, matrix in parts])
    if row_groups is not None:
        rows: Tensor = _LinearByRow.apply(x.flatten(1, -2), weight, row_groups.group)  # type: ignore[no-untyped-call]
        return rows.reshape(*x.shape[:-1], weight.shape[-2])
    grouped = x.reshape(weight.shape[0], -1, weight.shape[-1])  # (groups, rows / groups * length, in)
    return torch.bmm(grouped, weight.mT).reshape(*x.shape[:-1], weight.shape[-2])


class _LinearByRow(torch.autograd.Function):
    """``x_i W_g(i)^T`` for each row i; saves the matrices of the groups for backward, not a copy for each row."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, group: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, group)
        return torch.bmm(x, weight.index_select(0, group).mT)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        # Only differentiable operations, because second-order steps differentiate through this.
        (gradient,) = gradients
        x, weight, group = ctx.saved_tensors
        to_x, to_weight = ctx.needs_input_grad[:2]
        return (
            torch.bmm(gradient, weight.index_select(0, group)) if to_x else None,
            torch.zeros_like(weight).index_add(0, group, torch.bmm(gradient.mT, x)) if to_weight else None,
            None,
        )
