"""Sequences of unequal length: packed into rows of equal length, or divided into batches of similar length."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["best_fit", "by_tokens", "cheapest_capacity"]

ATTENTION_PLACES = 2000
"""Number of positions such that attending to them costs as much as the rest of a layer, per token. On a CPU, with a
model of SmolLM2-135M's shape, a token took 536 us in rows of 64 or 128, 564 in rows of 256, 646 of 512 and 785 of
1,024. The number is larger for wider models."""

CAPACITIES = 32
"""Approximate number of row lengths that are tried for an episode."""


def cheapest_capacity(sizes: Sequence[Sequence[int]], widths: Sequence[int], limit: int) -> int:
    """Return the length up to which sequences should share rows to minimise the language model's work.

    Longer rows leave less padding at the end of each task, but cost more attention.

    Args:
        sizes: lengths of each task's sequences, in descending order; tasks do not share rows.
        widths: lengths of other rows, which do not depend on the choice.
        limit: maximum length.
    """
    least = max([*widths, *(one[0] for one in sizes if one)])
    most = min(limit, max(256, 2 * least))

    def cost(capacity: int) -> int:
        lengths = [sum(one[k] for k in row) for one in sizes for row in best_fit(one, capacity)]
        longest = max([least, *lengths])
        return (len(widths) + len(lengths)) * longest * (longest + ATTENTION_PLACES)

    return min(range(min(least, most), most + 1, max(1, (most - least) // CAPACITIES)), key=cost)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put each item, in descending order of size, into the fullest bin that has room.

    An item above the capacity gets its own bin. Returns the indices in each bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # free capacity of each bin, ascending
    for index, size in enumerate(sizes):
        at = bisect_left(rooms, (size, -1))
        if at < len(rooms):
            room, chosen = rooms.pop(at)
        else:
            room, chosen = capacity, len(bins)
            bins.append([])
        bins[chosen].append(index)
        insort(rooms, (room - size, chosen))
    return bins


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide sequences into batches of at most ``budget`` tokens, padding included.

    A longer sequence gets its own batch. Sequences of similar length share a batch, which reduces padding. Returns the
    indices of each batch, shortest first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # The sequences are sorted, so this one is the longest so far.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
