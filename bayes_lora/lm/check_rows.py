"""Check that LoRA weights of a draw act on the rows of that draw, and on them alone, by comparing scores."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.errors import SiteError
from bayes_lora.lm.sites import LoraSites
from bayes_lora.types import Sites

if TYPE_CHECKING:
    from bayes_lora.lm.packed_forward import Forward

__all__ = ["check_rows"]

UPDATE = 0.1
"""Size of the random updates, relative to that of an activation."""


def check_rows(
    sites: LoraSites, forward: Forward, examples: Sequence[Sequence[EncodedExample]], tolerance: tuple[float, float]
) -> None:
    """Check that two tasks, each with its own random LoRA weights, have the same scores together as alone.

    Modules that see other tokens than those of all rows in order, such as an expert of a mixture, fail.

    Args:
        sites: the LoRA sites.
        forward: the forward.
        examples: examples of two tasks. One is moved to the first task, so that numbers of rows are unequal.
        tolerance: relative and absolute tolerance of scores.

    Raises:
        SiteError: the scores differ, or a module does not run at all, such as those of a vision tower.
    """
    tasks = [[*examples[0], examples[1][0]], list(examples[1][1:])]
    values = random_updates(sites, len(tasks))
    alone = [_score(sites, forward, [task], {s: v[t] for s, v in values.items()}) for t, task in enumerate(tasks)]
    seen: dict[str, set[int]] = {}
    with _record_tokens(sites, seen):
        try:
            together = _score(sites, forward, tasks, values)
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise _wrong_rows(sites, seen) from error
    if not torch.allclose(together, torch.cat(alone), rtol=tolerance[0], atol=tolerance[1]):
        raise _wrong_rows(sites, seen)
    unused = [name for names in sites.modules.values() for name in names if name not in seen]
    if unused:
        raise SiteError(
            f"module {unused[0]!r}: text does not reach it, so LoRA on it has no effect. Leave it out of "
            "target_modules, or add it to exclude_modules."
        )


def random_updates(sites: LoraSites, tasks: int) -> Sites:
    """Return random values ``(tasks, layers, out, in)`` of all sites, in the dtype of the sites."""
    values: Sites = {}
    for index, (site, initial) in enumerate(sites.initial().items()):
        generator = torch.Generator().manual_seed(index)
        noise = torch.randn(tasks, *initial.shape, generator=generator)
        scale = initial.shape[-1] ** -0.5 * (UPDATE if ".lora_B" in site else 1.0)
        values[site] = (scale * noise).to(initial)
    return values


def _score(sites: LoraSites, forward: Forward, tasks: Sequence[Sequence[EncodedExample]], values: Sites) -> Tensor:
    device = next(iter(values.values())).device
    episode = collate(tasks).to(device)
    with sites.bind(values, forward.rows_per_task(episode) if len(tasks) > 1 else None):
        return forward(episode).token_scores[0]


@contextmanager
def _record_tokens(sites: LoraSites, seen: dict[str, set[int]]) -> Iterator[None]:
    """Record inside the block the numbers of tokens in the input of each adapted module."""

    def record(name: str) -> Any:
        return lambda _, args: seen.setdefault(name, set()).add(args[0].numel() // args[0].shape[-1])

    handles = [slot.register_forward_pre_hook(record(name)) for name, slot in sites.slots()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _wrong_rows(sites: LoraSites, seen: dict[str, set[int]]) -> SiteError:
    """Return the error that names the first module which sees fewer tokens than another one."""
    most = max((max(counts) for counts in seen.values()), default=0)
    names = [name for names in sites.modules.values() for name in names]
    name = next((name for name in names if name in seen and max(seen[name]) < most), names[0])
    return SiteError(
        f"module {name!r}: LoRA on it cannot be random, because its input is not the tokens of all rows in order, and "
        "each draw acts on its own rows (one expert of a mixture sees some tokens of all). Leave it out of "
        "target_modules, or add it to exclude_modules."
    )
