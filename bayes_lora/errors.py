"""Errors that the user can fix. The command line prints each as one line and exits with code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BayesLoraError",
    "ConfigError",
    "DeviceMemoryError",
    "ModelError",
    "ModelFileError",
    "NonFiniteLoss",
    "PosteriorError",
    "ProcessError",
    "RunFolderError",
    "SiteError",
    "TaskError",
    "did_you_mean",
]


class BayesLoraError(Exception):
    """Base class. The message states what was expected, what was given, and how to fix it.

    Attributes:
        everywhere: whether every process of a fit raises it, so that one of them has to print it.
    """

    everywhere = False


class ConfigError(BayesLoraError, ValueError):
    """A setting is unknown, has the wrong type or is out of range."""


class DeviceMemoryError(BayesLoraError, MemoryError):
    """A training step needs more memory than the GPU has."""


class ModelError(BayesLoraError, ValueError):
    """The architecture of the language model is not supported."""


class ModelFileError(BayesLoraError, OSError):
    """The language model's files are missing, unreadable or cannot be downloaded."""


class NonFiniteLoss(BayesLoraError, ArithmeticError):
    """A loss, a gradient or a parameter is NaN or infinite."""


class PosteriorError(BayesLoraError, ValueError):
    """A saved posterior is damaged, or belongs to another model."""


class ProcessError(BayesLoraError, RuntimeError):
    """Another process of the same fit failed or was lost."""


class RunFolderError(BayesLoraError, OSError):
    """The run folder already exists, or does not hold a run."""


class SiteError(BayesLoraError, ValueError):
    """A LoRA site is missing, unknown, or bound to a value of the wrong shape."""


class TaskError(BayesLoraError, ValueError):
    """A task file is malformed, or a task has too few examples."""


def did_you_mean(name: str, known: Iterable[str], *, list_all: bool = False) -> str:
    """Return ``" (did you mean 'a' or 'b'?)"`` with the known names closest to ``name``, as the end of a message.

    Args:
        name: the name that was given.
        known: the valid names.
        list_all: if no known name is close, return all of them, ``" (known: 'a', 'b')"``, instead of an empty string.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f" (known: {', '.join(map(repr, known))})" if list_all and known else ""
