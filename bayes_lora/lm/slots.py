"""What stands in place of PEFT's LoRA linears: maps that are bound from outside."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["Bound", "Slot", "unchanged"]

Bound = Tensor | Callable[[Tensor, RowGroups | None], Tensor] | None
"""A weight, a function of activations, or nothing."""


def unchanged(x: Tensor, _: RowGroups | None = None) -> Tensor:
    """Bound to A where B takes the whole matrix."""
    return x


class Slot(nn.Module):
    """A linear map without bias whose weight is bound from outside: ``y = x W^T``.

    A bound weight is 2-D ``(out, in)``, one for all rows, or 3-D ``(groups, out, in)``: then the rows of the batch
    are taken in order as ``groups`` blocks, each of which has its own weight (one ``bmm``): of equal size, unless
    ``blocks`` are bound, too. A function of x and blocks may be bound as well. Unbound, the slot returns zeros: the
    layer computes what it would without the adapter, also if the adapter was trained before.

    Attributes:
        initial: ``(out, in)``, the weight of the linear that the slot replaced. It is where guides start; it does not
            take part in a forward unless it is bound.
    """

    initial: Tensor

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        # A buffer, so that it follows .to(device), but not in the state dict: it is no parameter of the LM.
        self.register_buffer("initial", initial.detach().clone(), persistent=False)
        self.bound: Bound = None
        self.blocks: RowGroups | None = None

    @property
    def weight(self) -> Tensor:
        """The bound value, or the initial one. PEFT reads its ``dtype``."""
        return self.bound if isinstance(self.bound, Tensor) else self.initial

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, ..., in)`` to ``(rows, ..., out)``."""
        if self.bound is None:
            return x.new_zeros(*x.shape[:-1], len(self.initial))
        if isinstance(self.bound, Tensor):
            return linear(x, self.bound, self.blocks)
        return self.bound(x, self.blocks)
