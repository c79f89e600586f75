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
from bayes_lora.types import Model, Sites
from bayes_lora.utils.settings import RecordedSettings

__all__ = ["Made", "describe", "make_guide", "make_model"]

Made = type[RecordedSettings] | RecordedSettings | Callable[..., Any] | None
"""A user's own class, an object of it, or a function that makes one; None for a class of this package."""

FUNCTIONS = {"same_as_prior": same_as_prior}

WRAPS = "prior"
"""The key of the prior inside a :class:`bayes_lora.models.WithHead`."""


def describe(value: Any, name: str) -> Any:
    """Describe a model, a guide or one of their settings in plain values that JSON can hold.

    An object of a class is ``{"class": "RankARD", "settings": {"random": "B"}}``, with ``"own": true`` if the class is
    not one of this package's. A ``WithHead`` also has ``"prior"``, the description of the prior inside it.

    Raises:
        PosteriorError: the value, or one of its settings, has no such description, such as a function. The message
            names it.
    """
    if isinstance(value, str | int | float | None):
        return value
    if isinstance(value, list | tuple):
        return [describe(one, name) for one in value]
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: describe(one, f"{name}.{key}") for key, one in value.items()}}
    if isinstance(value, RecordedSettings) and value.unnamed is None:
        wraps = {WRAPS: describe(value.prior, f"{name}.prior")} if isinstance(value, models.WithHead) else {}
        return _named(type(value)) | {"settings": _settings(value.settings, name)} | wraps
    if is_dataclass(value) and not isinstance(value, type):
        settings = {field.name: getattr(value, field.name) for field in fields(value)}
        return _named(type(value)) | {"settings": _settings(settings, name)}
    if isinstance(value, partial) and isinstance(value.func, type) and not value.args:
        return _named(value.func) | {"partial": _settings(value.keywords, name)}
    if isinstance(value, type):
        return _named(value)
    for known, function in FUNCTIONS.items():
        if value is function:
            return {"function": known}
    if isinstance(value, RecordedSettings):
        raise PosteriorError(
            f"{name}: {type(value).__name__} takes settings in {value.unnamed!r}, without names, so that they cannot "
            "be saved. Make them keyword arguments."
        )
    raise PosteriorError(
        f"{name}: {value!r} cannot be saved. A model must be a HierarchicalModel and a guide a TaskGuide, whose "
        "settings are numbers, texts, mappings of texts, classes of bayes_lora.guides, or functools.partial of one."
    )


def _settings(settings: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {key: describe(value, f"{name}.{key}") for key, value in settings.items()}


def _named(cls: type) -> dict[str, Any]:
    """The name of a class, and whether it is the user's own, even if a class of this package has the same name."""
    ours = any(getattr(room, cls.__name__, None) is cls for room in (models, guides))
    return {"class": cls.__name__} | ({} if ours else {"own": True})


def make_model(facts: Any, likelihood: Any, initial: Sites | None, own: Made, where: str) -> Any:
    """Build the model that :func:`describe` described, or that ``own`` makes.

    Args:
        facts: the description.
        likelihood: the language model.
        initial: initial values that differ from the likelihood's own; None for these.
        own: the user's class, an object of it, or a function of the likelihood.
        where: name of the file, for messages.

    Raises:
        PosteriorError: the file names a class of the user's that was not passed; or it is damaged.
    """
    given = () if initial is None else (initial,)
    if isinstance(facts, Mapping) and WRAPS in facts and (own is None or isinstance(own, type)):
        inside = facts[WRAPS]
        if isinstance(inside, Mapping) and WRAPS in inside:
            raise PosteriorError(f"{where} is damaged: its model has two option heads. Restore it, or fit again.")
        outer = own if own is not None and issubclass(own, models.WithHead) else None
        made = make_model(inside, likelihood, initial, None if outer else own, where)
        return _make(facts, (made,), outer, models, "model", where)
    return _make(facts, (likelihood, *given), own, models, "model", where)


def make_guide(facts: Any, model: Model, own: Made, where: str) -> Any:
    """Build the guide that :func:`describe` described, or that ``own`` makes of the model.

    Raises:
        PosteriorError: see :func:`make_model`.
    """
    return _make(facts, (model,), own, guides, "guide", where)


def _make(facts: Any, arguments: tuple[Any, ...], own: Made, room: Any, what: str, where: str) -> Any:
    if not isinstance(facts, Mapping) or not isinstance(facts.get("class"), str):
        raise PosteriorError(f"{where} is damaged: expected the {what}'s class and settings. Restore it, or fit again.")
    if own is not None and not isinstance(own, type):
        return own if isinstance(own, RecordedSettings) else own(arguments[0])
    name = facts["class"]
    ours = name in room.__all__ and not facts.get("own")
    cls: Any = own if own is not None else (getattr(room, name) if ours else None)
    if cls is None:
        raise PosteriorError(
            f"{where}: its {what} is of class {name!r}, which is not one of bayes_lora's. Pass it: "
            f"load(..., {what}={name})."
        )
    if cls.__name__ != name:
        raise PosteriorError(f"{where}: its {what} is of class {name!r}, but {what}={cls.__name__} was passed.")
    try:
        settings = {key: _value(value, arguments, what) for key, value in facts.get("settings", {}).items()}
        return cls(*arguments, **settings)
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RuntimeError) as error:
        raise PosteriorError(f"{where}: the {what} {name} cannot be made of its saved settings: {error}") from error


def _value(value: Any, arguments: tuple[Any, ...], what: str) -> Any:
    if isinstance(value, list):
        return tuple(_value(one, arguments, what) for one in value)
    if not isinstance(value, dict):
        return value
    if "mapping" in value:
        return {key: _value(one, arguments, what) for key, one in value["mapping"].items()}
    if "function" in value:
        return FUNCTIONS[value["function"]]
    if value["class"] not in guides.__all__ or value.get("own"):
        raise ValueError(
            f"its setting of class {value['class']!r} is not one of bayes_lora.guides. Pass a function that makes the "
            f"{what}: load(..., {what}=lambda {'likelihood' if what == 'model' else 'model'}: ...)"
        )
    cls = getattr(guides, value["class"])
    if "partial" in value:
        return partial(cls, **{key: _value(one, arguments, what) for key, one in value["partial"].items()})
    if "settings" not in value:
        return cls
    settings = {key: _value(one, arguments, what) for key, one in value["settings"].items()}
    return cls(*arguments, **settings) if issubclass(cls, guides.TaskGuide) else cls(**settings)
