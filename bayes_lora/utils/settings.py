"""Objects that record the arguments of their constructor, so that they can be saved and built again."""

from __future__ import annotations

import inspect
from typing import Any, Self

__all__ = ["RecordedSettings"]


class RecordedSettings:
    """A base class that records the arguments of the constructor.

    Attributes:
        settings: the arguments that were passed to the constructor, by name, except the first one and ``initial``:
            the likelihood or model that an object is made for, and its initial values, are not settings.
    """

    settings: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the object and record its settings."""
        self = super().__new__(cls)
        given: dict[str, Any] = {}
        if args or kwargs:  # copy and pickle make objects without arguments, and restore the recorded settings
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            for name, value in list(bound.arguments.items())[2:]:
                kind = bound.signature.parameters[name].kind
                given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        given.pop("initial", None)
        object.__setattr__(self, "settings", given)
        return self
