"""Build priors and guides from names and settings.

The name of ``RankARD`` is ``rank-ard``. Its settings are the keyword arguments of its constructor, with their types and
defaults. Classes of :mod:`bayes_lora.models` and :mod:`bayes_lora.guides` are registered automatically.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import is_dataclass
from functools import cache, partial
from typing import Any, get_type_hints

from pydantic import BaseModel, ConfigDict, ValidationError, create_model

from bayes_lora import guides, models
from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.guides.family import Family, same_as_prior
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.types import Likelihood, Model, ThetaFactory

__all__ = ["FAMILIES", "GUIDES", "PRIORS", "THETA_GUIDES", "build_guide", "build_prior", "check_settings", "name_of"]

Settings = Mapping[str, Any]


def name_of(cls: type | str) -> str:
    """Return the name of a class in settings: ``RankARD`` is ``rank-ard``."""
    name = cls if isinstance(cls, str) else cls.__name__
    return re.sub(r"(?<=[a-z])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", name).lower()


def _named(package: Any, keep: Callable[[type], bool]) -> dict[str, Any]:
    classes = [getattr(package, name) for name in package.__all__]
    return {name_of(cls): cls for cls in classes if isinstance(cls, type) and keep(cls)}


HEAD = "option head"
"""The head's name in messages; it belongs to a prior, and is not one of :data:`PRIORS`."""

BASES = (models.FactorModel, models.HierarchicalModel, models.WithHead, TaskGuide)

PRIORS: dict[str, type[models.HierarchicalModel]] = _named(models, lambda cls: cls not in BASES)
GUIDES: dict[str, type[TaskGuide]] = _named(guides, lambda cls: issubclass(cls, TaskGuide) and cls not in BASES)
FAMILIES: dict[str, Any] = _named(guides, is_dataclass)
THETA_GUIDES: dict[str, ThetaFactory] = {"point": guides.PointTheta, "normal": guides.NormalTheta}


def build_prior(spec: Settings, likelihood: Likelihood) -> models.HierarchicalModel:
    """Make the prior of a specification such as ``{"name": "rank-ard", "random": "B"}``.

    With ``"head": True``, or a mapping of settings such as ``{"slope": 0.5}``, it gets an option head, see
    :class:`bayes_lora.models.WithHead`.

    Raises:
        ConfigError: there is no such prior or setting, or a value has the wrong type or is out of range.
    """
    (cls, settings), head = _prior(spec)
    made: models.HierarchicalModel = cls(likelihood, **settings)
    return made if head is None else models.WithHead(made, **head)


def build_guide(spec: Settings, model: Model, *, num_tasks: int, beta: float) -> TaskGuide:
    """Make the guide of a specification such as ``{"name": "gradient-guide", "steps": 5}``.

    Args:
        spec: name and settings of the guide.
        model: the model.
        num_tasks: number of training tasks, for guides with parameters per task.
        beta: beta of the objective, which is the default of the guide's ``beta`` setting.

    Raises:
        ConfigError: see :func:`build_prior`.
    """
    return _guide("guide", spec, model, num_tasks, beta)


def check_settings(prior: Settings, guide: Settings, source: str) -> None:
    """Check names, types and ranges of the settings of a prior and a guide, without making them.

    Raises:
        ConfigError: a setting is wrong; the message names it.
    """
    try:
        _prior(prior)
        _part("guide", guide, GUIDES)
    except ConfigError as error:
        raise ConfigError(f"{source}: {error}") from error


def parameters_of(cls: type) -> dict[str, inspect.Parameter]:
    """Return the keyword arguments of a class that can be settings, including those passed on to base classes."""
    found: dict[str, inspect.Parameter] = {}
    for base in cls.__mro__:
        signature = inspect.signature(vars(base)["__init__"]) if "__init__" in vars(base) else None
        if signature is None:
            continue
        found = {
            name: p.replace(annotation=_hints(base).get(name, Any))
            for name, p in signature.parameters.items()
            if p.kind is p.KEYWORD_ONLY or (is_dataclass(cls) and name != "self")
        } | found
        if not any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values()):
            break
    others = getattr(cls, "not_settings", ())
    return {name: p for name, p in found.items() if name not in others and not _is_function(p.annotation)}


@cache
def _hints(cls: type) -> dict[str, Any]:
    return get_type_hints(vars(cls)["__init__"], include_extras=True)


def _is_function(hint: Any) -> bool:
    """Return whether values are functions without a name in settings, unlike q(theta) and families."""
    return "Callable" in str(hint) and hint not in (ThetaFactory, Family)


@cache
def _schema(cls: type) -> type[BaseModel]:
    """Return a pydantic model of a class's settings."""
    fields: dict[str, Any] = {}
    for name, parameter in parameters_of(cls).items():
        special = parameter.annotation in (ThetaFactory, Family) or _is_guide(parameter.annotation)
        fields[name] = (Any if special else parameter.annotation, parameter.default)
    return create_model(cls.__name__, __config__=ConfigDict(extra="forbid", arbitrary_types_allowed=True), **fields)


def _is_guide(hint: Any) -> bool:
    return bool(hint == (TaskGuide | None))


def _prior(spec: Settings) -> tuple[tuple[Any, dict[str, Any]], dict[str, Any] | None]:
    """Return the class and settings of a prior, and the settings of its option head; None without a head."""
    given = dict(spec)
    head = given.pop("head", False)
    part = _part("prior", given, PRIORS)
    if head is None or isinstance(head, bool):
        return part, {} if head else None
    if not isinstance(head, Mapping):
        raise ConfigError(f"prior.head: expected true, false, or a mapping of settings, got {head!r}.")
    if "name" in head:
        raise ConfigError("unknown key 'prior.head.name': there is one option head. Leave it out.")
    return part, _part("prior.head", {"name": HEAD, **head}, {HEAD: models.WithHead})[1]


def _part(section: str, spec: Settings, table: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the class named in ``spec`` and its validated settings, with q(theta) and families as objects."""
    settings = dict(spec)
    name = settings.pop("name", None)
    name = name_of(name) if isinstance(name, str) else name  # or the name of the class itself
    if not isinstance(name, str) or name not in table:
        what = section.rpartition(".")[2]
        raise ConfigError(f"{section}.name: unknown {what} {name!r}{did_you_mean(str(name), table, list_all=True)}.")
    cls, known = table[name], parameters_of(table[name])
    for key in settings:
        if key not in known:
            near = did_you_mean(str(key), known, list_all=True)
            others = [other for other in table if key in parameters_of(table[other])]
            cure = f" It is one of {', '.join(others)}: set {section}.name." if others else ""
            raise ConfigError(f"unknown key {f'{section}.{key}'!r}: not a setting of {name}{near}.{cure}")
    try:
        values = {key: getattr(_schema(cls)(**settings), key) for key in settings}
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in (section, *first["loc"]))
        raise ConfigError(f"{where}: {first['msg']}, got {first['input']!r}.") from error
    for key, value in values.items():
        hint, where = known[key].annotation, f"{section}.{key}"
        if hint == ThetaFactory:
            factory, own = _part(where, _spec(where, value), THETA_GUIDES)
            values[key] = partial(factory, **own) if own else factory
        elif hint == Family and value != "same-as-prior":
            family, own = _part(where, _spec(where, value), FAMILIES)
            values[key] = family(**own)
        elif hint == Family:
            values[key] = same_as_prior
        elif _is_guide(hint) and value is not None:
            _part(where, _spec(where, value), GUIDES)
    return cls, values


def _guide(section: str, spec: Settings, model: Model, num_tasks: int, beta: float) -> TaskGuide:
    cls, settings = _part(section, spec, GUIDES)
    known = inspect.signature(cls).parameters
    for key, parameter in parameters_of(cls).items():
        if _is_guide(parameter.annotation) and settings.get(key) is not None:
            inner = f"{section}.{key}"
            start = dict(_spec(inner, settings[key]))
            if "theta_guide" in spec:  # a guide that starts from another one has the other's q(theta)
                start.setdefault("theta_guide", spec["theta_guide"])
                del settings["theta_guide"]
            settings[key] = _guide(inner, start, model, num_tasks, beta)
    if "beta" in known and settings.get("beta") is None:
        settings["beta"] = beta
    counts = (num_tasks,) if "num_tasks" in known else ()
    made: TaskGuide = cls(model, *counts, **settings)
    return made


def _spec(section: str, value: Any) -> Settings:
    """Return a specification; a name alone means default settings."""
    if isinstance(value, str):
        return {"name": value}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{section}: expected a name, or a mapping with a name and settings, got {value!r}.")
    return value
