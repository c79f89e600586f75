"""Read YAML that may be malformed, or made by someone else."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from bayes_lora.errors import ConfigError
from bayes_lora.utils.limits import check_nesting, read_limited

__all__ = ["parse_yaml", "read_yaml"]

MAX_BYTES = 1 << 18
MAX_VALUES = 100_000
"""Number of values in a file, with each alias written out: they are checked, merged and copied one by one."""
MALFORMED = (yaml.YAMLError, RecursionError, ValueError, LookupError, AttributeError, TypeError)
"""Errors of PyYAML; the last three are raised for an explicit tag of a wrong value, such as ``!!bool maybe``."""


def read_yaml(path: str | Path) -> Any:
    """Return the value in a YAML file; None if the file is empty.

    Raises:
        ConfigError: the file cannot be read as YAML, is a pipe or a device, or is too large or too deeply nested.
    """
    try:
        return _load(read_limited(Path(path), MAX_BYTES))
    except (OSError, *MALFORMED) as error:
        raise ConfigError(f"{path}: cannot be read as YAML: {error}") from error


def parse_yaml(text: str, source: str) -> Any:
    """Return the value of a text in YAML.

    Args:
        text: the text.
        source: where it comes from, for messages.

    Raises:
        ConfigError: see :func:`read_yaml`.
    """
    try:
        return _load(text)
    except MALFORMED as error:
        raise ConfigError(f"{source}: {text!r:.200} is not a YAML value: {error}") from error


def _load(text: str) -> Any:
    value = yaml.safe_load(text)
    check_nesting(value, MAX_VALUES)
    return value
