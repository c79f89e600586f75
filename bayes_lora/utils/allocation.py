"""A limit on the memory that objects made from a file may take: settings in a damaged file can ask for any amount."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayes_lora.errors import PosteriorError

__all__ = ["AllocationLimit"]

FACTOR, LEAST = 64, 1 << 16
"""Constructors make temporary values too, such as random numbers that are then scaled."""


class AllocationLimit(TorchDispatchMode):
    """Inside the block, raise :class:`PosteriorError` before new tensors have many more values than those of a file.

    The sizes are known before a tensor is made, so that no memory is taken.

    Args:
        saved: the tensors that were saved, and others of the size of those that may be made.
    """

    def __init__(self, saved: Iterable[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.limit = LEAST + FACTOR * sum(value.numel() for value in saved)
        self.made = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Count the values of the operation's result, then run it."""
        kwargs = kwargs or {}
        if not func.is_view and not func._schema.is_mutable:
            self.made += _size(func.overloadpacket.__name__, args, kwargs)
            if self.made > self.limit:
                raise PosteriorError(
                    f"expected settings of at most {self.limit:,} values, which is several times the number in the "
                    "file of tensors, but they ask for more"
                )
        return func(*args, **kwargs)


def _size(name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Return about how many values an operation makes: those of the shape it is given, or of its largest tensor."""
    shapes = [value for value in (*args, *kwargs.values()) if _is_shape(value)]
    largest: int = max((value.numel() for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)), default=0)
    if name in ("eye", "arange", "linspace", "logspace", "randperm"):
        numbers = [abs(int(value)) for value in (*args, *kwargs.values()) if isinstance(value, int | float)]
        return max(numbers) ** 2 if name == "eye" else max(numbers)
    if name == "repeat":
        return int(largest * math.prod(shapes[0]))
    of_shape: int = max([math.prod(shape) for shape in shapes], default=1)
    return largest if largest and not name.startswith("new_") else of_shape


def _is_shape(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(isinstance(size, int) for size in value)
