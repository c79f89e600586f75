"""Check that the input of each adapted module is divided into the rows of the batch, as LoRA weights per task need."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from bayes_lora.errors import SiteError
from bayes_lora.lm.sites import LoraSites

__all__ = ["check_divided", "record_undivided"]


@contextmanager
def record_undivided(model: nn.Module, sites: LoraSites) -> Iterator[list[str]]:
    """Record the adapted modules whose input is not divided into rows in some forward inside the block.

    For a batch ``(rows, L)``, an input ``(rows, ..., in)`` or ``(rows * L, in)`` is. The input of a routed expert is
    not: it has the tokens that were sent there, whatever their row.
    """
    found: list[str] = []
    batch: list[int] = []

    def start(_: nn.Module, __: Any, kwargs: dict[str, Any]) -> None:
        batch[:] = kwargs["input_ids"].shape

    def check(name: str) -> Callable[[nn.Module, Any], None]:
        def see(_: nn.Module, args: Any) -> None:
            rows, length = batch
            leading = args[0].shape[:-1]
            divided = leading == (rows * length,) or (len(leading) > 1 and leading[0] == rows)
            if not divided and name not in found:
                found.append(name)

        return see

    handles = [model.register_forward_pre_hook(start, with_kwargs=True)]
    handles += [slot.register_forward_pre_hook(check(name)) for name, slot in sites.first_slots()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def check_divided(undivided: list[str]) -> None:
    """Check that no module was recorded by :func:`record_undivided`.

    Raises:
        SiteError: a module was.
    """
    if undivided:
        raise SiteError(
            f"module {undivided[0]!r}: expected an input divided into the rows of the batch, got tokens of mixed rows, "
            f"as in routed experts, so LoRA cannot differ by task or draw there. Choose target_modules without it, or "
            "exclude it in a peft.LoraConfig(exclude_modules=...)."
        )
