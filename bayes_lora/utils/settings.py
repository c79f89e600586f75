"""Objects that know the keyword arguments they were made with, so that files can name them."""

from __future__ import annotations

import inspect
from typing import Any, Self

__all__ = ["RecordedSettings"]


class RecordedSettings:
    """A base class that records what an object was made with.

    Attributes:
        settings: the arguments that were given to the constructor, by name, but for the first one and ``initial``:
            what an object is made *for* (a likelihood, a model) and where it starts are no settings.
    """

    settings: dict[str, Any]

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the object, and record its settings."""
        self = super().__new__(cls)
        given: dict[str, Any] = {}
        if args or kwargs:  # copy and pickle make objects without any, and restore what was recorded
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            for name, value in list(bound.arguments.items())[2:]:
                kind = bound.signature.parameters[name].kind
                given |= value if kind is inspect.Parameter.VAR_KEYWORD else {name: value}
        given.pop("initial", None)
        object.__setattr__(self, "settings", given)
        return self
