"""Slots: linear maps that replace PEFT's LoRA linears and whose weights are bound from outside."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from bayes_lora.utils.grouped_linear import RowGroups, linear

__all__ = ["Bindings", "Bound", "Slot", "Values", "unchanged"]

Function = Callable[[Tensor, RowGroups | None], Tensor]
Bound = Tensor | Function | None
"""A weight, a function of activations, or nothing."""


def unchanged(x: Tensor, _: RowGroups | None = None) -> Tensor:
    """The identity; bound to A when the whole update is bound to B."""
    return x


class Values(NamedTuple):
    """What is bound to the slots of a model: per site a value for each layer, and groups of rows of unequal size."""

    by_site: Mapping[str, Sequence[Bound]]
    row_groups: RowGroups | None = None


class Bindings:
    """Holds what is bound to the slots of a model, so that binding takes no time for each layer.

    Attributes:
        values: what is bound now.
    """

    def __init__(self) -> None:
        self.values = Values({})


class Slot(nn.Module):
    """A linear map without bias whose weight is bound from outside: ``y = x W^T``.

    A bound weight is 2-D ``(out, in)``, shared by all rows, or 3-D ``(groups, out, in)``: the rows of the batch are
    then divided in order into ``groups`` groups, each with its own weight (one ``bmm``). The groups have equal size
    unless ``row_groups`` is bound too. A function of x and ``row_groups`` may also be bound. If nothing is bound, the
    slot returns zeros, and the layer computes what it would without the adapter, even if the adapter was trained.

    Args:
        initial: ``(out, in)``, the weight of the linear that the slot replaced.
        dtype: dtype of the base model; by default that of ``initial``.

    Attributes:
        initial: guides start there. It is not used in a forward unless it is bound.
    """

    initial: Tensor
    empty: Tensor

    def __init__(self, initial: Tensor, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        # Buffers, so that they follow .to(device), but not in the state dict: they are no parameters of the LM.
        self.register_buffer("initial", initial.detach().clone(), persistent=False)
        self.register_buffer("empty", initial.detach().new_empty(0, dtype=dtype), persistent=False)
        self.attach(Bindings(), "", 0)

    def attach(self, bindings: Bindings, site: str, layer: int) -> None:
        """Take weights from ``bindings``, those of a layer of a site."""
        self._bindings, self._site, self._layer = bindings, site, layer

    def bind(self, weight: Bound, row_groups: RowGroups | None = None) -> None:
        """Bind a weight to this slot alone."""
        self.attach(Bindings(), "", 0)
        self._bindings.values = Values({"": [weight]}, row_groups)

    @property
    def bound(self) -> Bound:
        """What is bound; None if nothing is."""
        layers = self._bindings.values.by_site.get(self._site)
        return None if layers is None else layers[self._layer]

    @property
    def weight(self) -> Tensor:
        """The bound value, whose dtype PEFT reads; if there is none, an empty tensor in the dtype of the base.

        PEFT casts activations to this dtype, and casts the result back.
        """
        bound = self.bound
        if bound is None:
            return self.empty
        return bound if isinstance(bound, Tensor) else self.initial

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(rows, ..., in)`` to ``(rows, ..., out)``."""
        bound, row_groups = self.bound, self._bindings.values.row_groups
        if bound is None:
            return x.new_zeros(*x.shape[:-1], len(self.initial))
        if x.ndim == 2 and row_groups is not None:
            # Some layers flatten rows and tokens (OPT's MLP).
            return _apply(bound, x.unflatten(0, (len(row_groups.group), -1)), row_groups).flatten(0, 1)
        return _apply(bound, x, row_groups)


def _apply(bound: Tensor | Function, x: Tensor, row_groups: RowGroups | None) -> Tensor:
    return linear(x, bound, row_groups) if isinstance(bound, Tensor) else bound(x, row_groups)
