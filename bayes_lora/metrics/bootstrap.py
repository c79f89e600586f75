"""Resampling of tasks and of questions within them: intervals, and a paired test."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

__all__ = ["Array", "balanced_weights", "basic_interval", "percentile_interval", "resampled_weights", "sign_flip_test"]

Array = npt.NDArray[np.float64]

_CHUNK = 2_000_000  # numbers in one block of weights, 16 MB


def balanced_weights(task: npt.NDArray[np.int64]) -> Array:
    """Return the weight of each question, ``(N,)``: equal within a task, and each task has the same sum.

    Args:
        task: index of the task of each question, ``(N,)``, from 0 to T - 1.
    """
    counts = np.bincount(task)
    return 1.0 / (len(counts) * counts[task])


def resampled_weights(task: npt.NDArray[np.int64], num_resamples: int, seed: int) -> Iterator[Array]:
    """Yield blocks ``(R, N)`` of weights, each row a bootstrap sample whose weights sum to 1.

    T tasks are drawn with replacement, and for each time a task is drawn, as many of its questions as it has, with
    replacement. A task that is drawn twice has twice the weight.
    """
    rng = np.random.default_rng(seed)
    members = [np.flatnonzero(task == t) for t in range(int(task.max()) + 1)]
    block = max(1, _CHUNK // len(task))
    for begin in range(0, num_resamples, block):
        size = min(block, num_resamples - begin)
        chosen = rng.multinomial(len(members), np.full(len(members), 1.0 / len(members)), size=size)
        weights = np.empty((size, len(task)))
        for t, own in enumerate(members):
            counts = rng.multinomial(chosen[:, t] * len(own), np.full(len(own), 1.0 / len(own)))
            weights[:, own] = counts / (len(own) * len(members))
        yield weights


def percentile_interval(resamples: Array, level: float) -> tuple[float, float]:
    """Return the quantiles of the resamples that are not NaN; NaN without any."""
    known = resamples[~np.isnan(resamples)]
    if not len(known):
        return float("nan"), float("nan")
    # "linear" would subtract infinities, of an infinite NLL, from each other.
    low, high = np.quantile(known, [(1.0 - level) / 2.0, (1.0 + level) / 2.0], method="nearest")
    return float(low), float(high)


def basic_interval(value: float, resamples: Array, level: float) -> tuple[float, float]:
    """Return the percentile interval reflected at the value.

    A resample is to the sample as the sample is to the truth: what resampling adds to an error that is a sum of
    absolute values, sampling has added before.
    """
    low, high = percentile_interval(resamples, level)
    return 2.0 * value - high, 2.0 * value - low


def sign_flip_test(differences: Array, seed: int, num_flips: int = 9999) -> float:
    """Return the two-sided p-value of a zero mean, from random signs of the differences.

    It is exact if the sign of each difference is arbitrary, as when two methods are interchangeable within each task.
    With T differences it is at least about ``2 / 2 ** T``.
    """
    rng = np.random.default_rng(seed)
    observed = abs(differences.sum()) * (1.0 - 1e-12)
    extreme = 0
    block = max(1, _CHUNK // len(differences))
    for begin in range(0, num_flips, block):
        signs = rng.integers(0, 2, (min(block, num_flips - begin), len(differences))) * 2.0 - 1.0
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (num_flips + 1)
