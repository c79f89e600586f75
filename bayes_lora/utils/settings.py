"""Objects that record the arguments of their constructor, so that they can be saved and built again."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, Self

__all__ = ["RecordedSettings"]


class RecordedSettings:
    """A base class that records the arguments of the constructor.

    Attributes:
        settings: the arguments that were passed to the constructor, by name, except the first one (the likelihood or
            the model that an object is made for) and those of ``not_settings``.
        unnamed: name of a parameter that took settings without a name (``*args``, positional-only); None if there is
            none. Such settings cannot be saved.
        not_settings: names of arguments that are saved in another way.
    """

    settings: dict[str, Any]
    unnamed: str | None
    not_settings: ClassVar[tuple[str, ...]] = ()

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Make the object and record its settings."""
        self = super().__new__(cls)
        given: dict[str, Any] = {}
        unnamed = None
        if args or kwargs:  # copy and pickle make objects without arguments, and restore the recorded settings
            bound = inspect.signature(cls.__init__).bind(self, *args, **kwargs)
            for name, value in list(bound.arguments.items())[1:]:
                kind, first = bound.signature.parameters[name].kind, value is (args[0] if args else None)
                if kind is inspect.Parameter.VAR_KEYWORD:
                    given |= value
                elif kind is inspect.Parameter.VAR_POSITIONAL:
                    unnamed = name if value[len(value) == len(args) :] else unnamed
                elif kind is inspect.Parameter.POSITIONAL_ONLY and not first:
                    unnamed = name
                elif not first:
                    given[name] = value
            if not args:  # made for an object that was passed by name
                given.pop(next(name for name in (*bound.arguments, *given) if name in kwargs), None)
        settings = {name: value for name, value in given.items() if name not in cls.not_settings}
        object.__setattr__(self, "settings", settings)
        object.__setattr__(self, "unnamed", unnamed)
        return self
