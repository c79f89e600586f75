"""Types of settings with the range of their values, which is validated when settings are read."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

__all__ = ["Count", "Finite", "Fraction", "Natural", "NonNegative", "Positive", "Rate"]

Count = Annotated[int, Field(ge=1)]
"""An integer of at least 1."""

Natural = Annotated[int, Field(ge=0)]
"""An integer of at least 0."""

Finite = Annotated[float, Field(allow_inf_nan=False)]
"""A number that is not infinite or NaN."""

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
"""A positive number."""

NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
"""Zero or a positive number."""

Fraction = Annotated[float, Field(ge=0, lt=1)]
"""A number in [0, 1)."""

Rate = Annotated[float, Field(gt=0, lt=1)]
"""A number in (0, 1)."""
