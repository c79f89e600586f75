"""Read nested settings from YAML files and flags, merge them, and check their keys."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from bayes_lora.episodes.templates import TEMPLATES
from bayes_lora.errors import ConfigError, did_you_mean
from bayes_lora.utils import yaml_files

PARTS = ("prior", "guide")
"""Sections with the name of a class and its settings."""

NAMED = ("start", "family", "theta_guide")
"""Settings of a guide that are a name, or a mapping of a name and settings."""

__all__ = ["check_keys", "merge", "named_template", "nested", "read_yaml"]


def read_yaml(path: Path) -> Mapping[str, Any]:
    """Read a mapping; an empty file is an empty mapping."""
    read = yaml_files.read_yaml(path)
    return {} if read is None else read


def nested(setting: str) -> Mapping[str, Any]:
    """Turn ``a.b=c`` into ``{"a": {"b": c}}``; c is YAML."""
    key, equals, text = setting.partition("=")
    if not equals or not all(key.split(".")):
        raise ConfigError(f"--set {setting!r}: expected section.key=value, such as objective.beta=1e-4.")
    value = yaml_files.parse_yaml(text, f"--set {setting!r:.200}")
    for part in reversed(key.split(".")):
        value = {part: value}
    return value  # type: ignore[no-any-return]


def named_template(values: Mapping[str, Any], source: str) -> Mapping[str, Any]:
    """Replace the name of a template by the template, and ``rank``, the name in older files, by ``r``."""
    section = values.get("language_model") if isinstance(values, Mapping) else None
    if isinstance(section, Mapping) and "rank" in section:
        if "r" in section:
            raise ConfigError(f"{source}: language_model.rank and language_model.r are the same. Leave out rank.")
        section = {"r" if key == "rank" else key: value for key, value in section.items()}
        values = {**values, "language_model": section}
    name = section.get("template") if isinstance(section, Mapping) else None
    if not isinstance(section, Mapping) or not isinstance(name, str):
        return values
    if name not in TEMPLATES:
        near = did_you_mean(name, TEMPLATES, list_all=True)
        raise ConfigError(f"{source}: language_model.template {name!r} is not the name of a template{near}.")
    return {**values, "language_model": {**section, "template": asdict(TEMPLATES[name])}}


def merge(values: dict[str, Any], over: Mapping[str, Any]) -> None:
    """Override values by others, section by section."""
    for key, value in over.items():
        inner = values.get(key)
        if isinstance(inner, str) and isinstance(value, Mapping) and key in NAMED:
            inner = values[key] = {"name": inner}  # settings for a part that was given by its name alone
        if isinstance(value, Mapping) and isinstance(inner, dict):
            if key in NAMED and value.get("name", inner.get("name")) != inner.get("name"):
                inner.clear()  # they were settings of another class
            merge(inner, value)
        else:
            values[key] = dict(value) if isinstance(value, Mapping) else value


def check_keys(values: Any, known: Mapping[str, Any], source: str, prefix: str = "") -> None:
    """Raise :class:`ConfigError` for an unknown key; the message names similar keys."""
    if not isinstance(values, Mapping):
        where = f"{prefix[:-1]}: expected a section" if prefix else "expected a mapping"
        raise ConfigError(f"{source}: {where} with {list(known)}, got {reprlib.repr(values)}.")
    for key, value in values.items():
        if key not in known:
            near = did_you_mean(str(key), known, list_all=True)
            raise ConfigError(f"{source}: unknown key {prefix + str(key)!r}{near}.")
        if not prefix and key in PARTS:  # the keys of these sections are checked with the named class
            if not isinstance(value, Mapping):
                got = reprlib.repr(value)
                raise ConfigError(f"{source}: {key}: expected a section with a name and settings, got {got}.")
        elif isinstance(known[key], Mapping) and known[key] and not is_dataclass(value):  # an empty one takes any keys
            check_keys(value, known[key], source, f"{prefix}{key}.")
