"""KL annealing: functions of the step that return the fraction of beta, in (0, 1]."""

from __future__ import annotations

from typing import Literal

__all__ = ["SCHEDULES", "Schedule", "beta_fraction", "cyclical", "linear_warmup"]

Schedule = Literal["constant", "linear", "cyclical"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cyclical")


def linear_warmup(step: int, steps: int, start: float = 0.1) -> float:
    """Return the fraction of beta at a step: linear from ``start`` to 1 over ``steps`` steps, then 1."""
    return 1.0 if steps <= 0 else min(1.0, start + (1.0 - start) * step / steps)


def cyclical(step: int, steps: int, start: float = 0.1) -> float:
    """Return the fraction of beta under a cyclical schedule (arXiv 1903.10145).

    Each cycle has ``2 * steps`` steps: a linear rise from ``start`` to 1, then ``steps`` steps at 1.
    """
    return 1.0 if steps <= 0 else linear_warmup(step % (2 * steps), steps, start)


def beta_fraction(schedule: Schedule, step: int, steps: int) -> float:
    """Return the fraction of beta at a step under a schedule that rises over ``steps`` steps."""
    if schedule == "constant":
        return 1.0
    return (linear_warmup if schedule == "linear" else cyclical)(step, steps)
