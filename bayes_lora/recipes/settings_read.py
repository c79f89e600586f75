"""Which settings a recipe reads, found by watching it read them; what it leaves unread must stand at its default."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from dataclasses import fields, is_dataclass
from typing import Any, TypeVar

from bayes_lora.recipes.config import RunConfig

__all__ = ["changed_settings", "describe", "settings_of", "unread_settings", "warn_of_no_fit", "watched"]

Section = TypeVar("Section")

NOT_OF_RECIPES = ("recipe", "language_model", "episodes", "fit", "seed")
"""Sections of :class:`RunConfig` that a run itself reads, whatever its recipe."""


def watched(section: Section, read: set[str], prefix: str = "") -> Section:
    """The same settings; the dotted name of every value that is read from them is added to ``read``.

    They stay dataclasses, so that ``asdict``, ``replace`` and ``vars`` work and are seen. What is read and then dropped
    is not seen.
    """
    names = {f.name for f in fields(section)}  # type: ignore[arg-type]

    class Watched(type(section)):  # type: ignore[misc]
        def __getattribute__(self, name: str) -> Any:
            read.update(prefix + one for one in (names if name == "__dict__" else names & {name}))
            return super().__getattribute__(name)

    found: Section = object.__new__(Watched)
    for name in names:
        value = getattr(section, name)
        inner = watched(value, read, f"{prefix}{name}.") if is_dataclass(value) else value
        object.__setattr__(found, name, inner)  # its dataclass may be frozen
    return found


def settings_of(section: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted names and values, in order."""
    for f in fields(section):
        value = getattr(section, f.name)
        yield from settings_of(value, f"{prefix}{f.name}.") if is_dataclass(value) else [(prefix + f.name, value)]


def changed_settings(config: RunConfig) -> dict[str, tuple[Any, Any]]:
    """Dotted names of the settings that are not at their defaults, to the default and the value."""
    defaults = dict(settings_of(RunConfig()))
    return {name: (defaults[name], value) for name, value in settings_of(config) if value != defaults[name]}


def unread_settings(config: RunConfig, read: Collection[str]) -> str | None:
    """Says which settings that a recipe could read are changed, and not read; None where there are none."""
    unread = [
        f"{name} (default {default!r}, got {value!r})"
        for name, (default, value) in changed_settings(config).items()
        if name.partition(".")[0] not in NOT_OF_RECIPES and name not in read
    ]
    if not unread:
        return None
    return (
        f"recipe {config.recipe!r} does not read {', '.join(unread)}. Leave out what it does not read, or take a "
        f"recipe that reads it (docs/recipes.md). {config.recipe!r} reads {describe(read)}."
    )


def warn_of_no_fit(config: RunConfig) -> None:
    """Warn where settings of the fit are changed though the recipe has nothing to fit.

    A warning, for the demonstration and files for several recipes have such settings.
    """
    unused = [name for name in changed_settings(config) if name.startswith("fit.")]
    if unused:
        message = f"recipe {config.recipe!r} has nothing to fit: {', '.join(unused)} change nothing"
        warnings.warn(message, stacklevel=3)


def describe(read: Collection[str]) -> str:
    """``"prior (initial_scale, loc_scale), objective"``: sections, with the names of values where not all are read."""
    parts = []
    for f in fields(RunConfig):
        if f.name in NOT_OF_RECIPES:
            continue
        names = [name for name, _ in settings_of(getattr(RunConfig(), f.name))]
        seen = [name for name in names if f"{f.name}.{name}" in read]
        if seen:
            parts.append(f.name if seen == names else f"{f.name} ({', '.join(seen)})")
    return ", ".join(parts)
