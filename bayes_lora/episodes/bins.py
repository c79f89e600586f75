"""Sequences of unequal length in rows of equal length: bin packing."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Sequence

__all__ = ["best_fit", "cheapest_capacity"]

ATTENTION_PLACES = 2000
"""A token's way through a layer costs as much as its attention to so many places: at SmolLM2-135M's shape on a CPU, a
token took 536 us in rows of 64 or 128, 564 in rows of 256, 646 of 512 and 785 of 1,024. In wider models it is more."""

CAPACITIES = 32
"""About so many row lengths are tried for an episode."""


def cheapest_capacity(sizes: Sequence[Sequence[int]], widths: Sequence[int], limit: int) -> int:
    """The length up to which sequences should share rows, so that the language model's work is least.

    Longer rows leave less padding at the end of each task, and take more attention.

    Args:
        sizes: lengths of each task's sequences, the largest first; tasks share no row.
        widths: lengths of other rows, which are there whatever is done.
        limit: of the length.
    """
    least = max([*widths, *(one[0] for one in sizes if one)])
    most = min(limit, max(256, 2 * least))

    def cost(capacity: int) -> int:
        lengths = [sum(one[k] for k in row) for one in sizes for row in best_fit(one, capacity)]
        longest = max([least, *lengths])
        return (len(widths) + len(lengths)) * longest * (longest + ATTENTION_PLACES)

    return min(range(min(least, most), most + 1, max(1, (most - least) // CAPACITIES)), key=cost)


def best_fit(sizes: Sequence[int], capacity: int) -> list[list[int]]:
    """Put items, the largest first, each into the fullest bin that has room; larger ones than that stand alone.

    Returns the indices in each bin.
    """
    bins: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # what is left in each bin, the least first
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
