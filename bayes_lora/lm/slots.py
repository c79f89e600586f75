"""Slots: linear maps that replace PEFT's LoRA linears and whose weights are bound from outside."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["Bound", "Slot", "unchanged"]

Function = Callable[[Tensor, RowGroups | None], Tensor]
Bound = Tensor | Function | None
"""A weight, a function of activations, or nothing."""


def unchanged(x: Tensor, _: RowGroups | None = None) -> Tensor:
    """The identity; bound to A when the whole update is bound to B."""
    return x


class Slot(nn.Module):
    """A linear map without bias whose weight is bound from outside: ``y = x W^T``.

    A bound weight is 2-D ``(out, in)``, shared by all rows, or 3-D ``(groups, out, in)``: the rows of the batch are
    then divided in order into ``groups`` groups, each with its own weight (one ``bmm``). The groups have equal size
    unless ``row_groups`` is bound too. A function of x and ``row_groups`` may also be bound. If nothing is bound, the
    slot returns zeros, and the layer computes what it would without the adapter, even if the adapter was trained.

    Attributes:
        initial: ``(out, in)``, the weight of the linear that the slot replaced. Guides start there. It is not used in
            a forward unless it is bound.
    """

    initial: Tensor

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        # A buffer, so that it follows .to(device), but not in the state dict: it is not a parameter of the LM.
        self.register_buffer("initial", initial.detach().clone(), persistent=False)
        self.bound: Bound = None
        self.row_groups: RowGroups | None = None

    @property
    def weight(self) -> Tensor:
        """The bound value, or the initial one. PEFT reads its ``dtype``."""
        return self.bound if isinstance(self.bound, Tensor) else self.initial

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, ..., in)`` to ``(rows, ..., out)``, or ``(rows * length, in)`` to ``(rows * length, out)``."""
        if self.bound is None:
            return x.new_zeros(*x.shape[:-1], len(self.initial))
        if x.ndim == 2 and self.row_groups is not None:  # some models flatten rows before an MLP or a router
            return _apply(self.bound, x.unflatten(0, (len(self.row_groups.group), -1)), self.row_groups).flatten(0, 1)
        return _apply(self.bound, x, self.row_groups)


def _apply(bound: Tensor | Function, x: Tensor, row_groups: RowGroups | None) -> Tensor:
    return linear(x, bound, row_groups) if isinstance(bound, Tensor) else bound(x, row_groups)
