"""How beta rises to its full value: functions of the step that return a fraction in (0, 1]."""

from __future__ import annotations

from typing import Literal

__all__ = ["SCHEDULES", "Schedule", "beta_fraction", "cyclical", "linear_warmup"]

Schedule = Literal["constant", "linear", "cyclical"]
SCHEDULES: tuple[Schedule, ...] = ("constant", "linear", "cyclical")


def linear_warmup(step: int, steps: int, start: float = 0.1) -> float:
    """Fraction of beta at a step: linear from ``start`` to 1 over ``steps`` steps, then 1."""
    return 1.0 if steps <= 0 else min(1.0, start + (1.0 - start) * step / steps)


def cyclical(step: int, steps: int, start: float = 0.1) -> float:
    """Cycles of 2 ``steps`` steps: a linear rise from ``start`` to 1, then as long at 1 (arXiv 1903.10145)."""
    return 1.0 if steps <= 0 else linear_warmup(step % (2 * steps), steps, start)


def beta_fraction(schedule: Schedule, step: int, steps: int) -> float:
    """Fraction of beta under a schedule whose rise takes ``steps`` steps."""
    if schedule == "constant":
        return 1.0
    return (linear_warmup if schedule == "linear" else cyclical)(step, steps)
