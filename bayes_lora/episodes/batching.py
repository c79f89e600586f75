"""Batches of like length, filled up to a number of tokens."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["by_tokens"]


def by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Divide sequences into batches of at most ``budget`` tokens, padding included; a longer one stands alone.

    Neighbours in length share a batch, so little is padded. Returns the indices of each batch, shortest first.
    """
    batches: list[list[int]] = []
    for index in sorted(range(len(lengths)), key=lengths.__getitem__):
        # Sorted, so that this one is the longest so far.
        if batches and (len(batches[-1]) + 1) * lengths[index] <= budget:
            batches[-1].append(index)
        else:
            batches.append([index])
    return batches
