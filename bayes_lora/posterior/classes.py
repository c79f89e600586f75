"""What a saved posterior is made of: classes and their settings as JSON, and objects of them.

Only classes of this package are looked up by the name that a file holds, in closed tables. A user's own class is passed
to :meth:`bayes_lora.posterior.posterior.Posterior.load`; nothing is ever imported because a file names it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

from bayes_lora import guides, models
from bayes_lora.errors import PosteriorError
from bayes_lora.guides.family import same_as_prior
from bayes_lora.types import Model
from bayes_lora.utils.settings import RecordedSettings

__all__ = ["Made", "describe", "make_guide", "make_model"]

Made = type[RecordedSettings] | RecordedSettings | Callable[..., Any] | None
"""A user's own class, an object of it, or a function that makes one; None for a class of this package."""

FUNCTIONS = {"same_as_prior": same_as_prior}


def describe(value: Any, name: str) -> Any:
    """A model, a guide or a setting of theirs as plain values: ``{"class": "RankARD", "settings": {"random": "B"}}``.

    Raises:
        PosteriorError: it is, or holds, an object that has no such description, such as a function; names it.
    """
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [describe(one, name) for one in value]
    if isinstance(value, Mapping):
        return {str(key): describe(one, f"{name}.{key}") for key, one in value.items()}
    if isinstance(value, RecordedSettings):
        return {"class": type(value).__name__, "settings": describe(value.settings, name)}
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: getattr(value, field.name) for field in fields(value)}
        return {"class": type(value).__name__, "settings": describe(settings, name)}
    if isinstance(value, partial):
        return {"class": value.func.__name__, "partial": describe(value.keywords, name)}
    if isinstance(value, type):
        return {"class": value.__name__}
    if value in FUNCTIONS.values():
        return {"function": value.__name__}
    raise PosteriorError(
        f"{name}: {value!r} cannot be saved. A model must be a HierarchicalModel and a guide a TaskGuide, whose "
        "settings are numbers, texts, classes of bayes_lora.guides, or functools.partial of one."
    )


def make_model(facts: Any, likelihood: Any, own: Made, where: str) -> Any:
    """The model that :func:`describe` described, or ``own``.

    Raises:
        PosteriorError: the file names a class that is not of this package, and it was not passed; or it is damaged.
    """
    return _make(facts, (likelihood,), own, models, "model", where)


def make_guide(facts: Any, model: Model, own: Made, where: str) -> Any:
    """The guide that :func:`describe` described, or ``own``.

    Raises:
        PosteriorError: as :func:`make_model`.
    """
    return _make(facts, (model,), own, guides, "guide", where)


def _make(facts: Any, arguments: tuple[Any, ...], own: Made, room: Any, what: str, where: str) -> Any:
    if not isinstance(facts, Mapping) or not isinstance(facts.get("class"), str):
        raise PosteriorError(f"{where} is damaged: expected the {what}'s class and settings. Restore it, or fit again.")
    if own is not None and not isinstance(own, type):
        return own if isinstance(own, RecordedSettings) else own(*arguments)
    name = facts["class"]
    cls: Any = own if own is not None else (getattr(room, name) if name in room.__all__ else None)
    if cls is None:
        raise PosteriorError(
            f"{where}: its {what} is of class {name!r}, which is not one of bayes_lora's. Pass it: "
            f"load(..., {what}={name})."
        )
    if cls.__name__ != name:
        raise PosteriorError(f"{where}: its {what} is of class {name!r}, but {what}={cls.__name__} was passed.")
    try:
        settings = {key: _value(value, arguments) for key, value in facts.get("settings", {}).items()}
        return cls(*arguments, **settings)
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise PosteriorError(f"{where}: the {what} {name} cannot be made of its saved settings: {error}") from error


def _value(value: Any, arguments: tuple[Any, ...]) -> Any:
    if isinstance(value, list):
        return tuple(_value(one, arguments) for one in value)
    if not isinstance(value, dict):
        return value
    if "function" in value:
        return FUNCTIONS[value["function"]]
    if "class" not in value:
        return {key: _value(one, arguments) for key, one in value.items()}
    if value["class"] not in guides.__all__:
        raise ValueError(f"class {value['class']!r} is not one of bayes_lora.guides")
    cls = getattr(guides, value["class"])
    if "partial" in value:
        return partial(cls, **_value(value["partial"], arguments))
    if "settings" not in value:
        return cls
    settings = _value(value["settings"], arguments)
    return cls(*arguments, **settings) if issubclass(cls, guides.TaskGuide) else cls(**settings)
