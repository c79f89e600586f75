"""Errors that a user can mend. The command line turns each into one line and exit code 2."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = [
    "BayesLoraError",
    "ConfigError",
    "ModelError",
    "ModelFileError",
    "NonFiniteLoss",
    "PosteriorError",
    "RunFolderError",
    "SiteError",
    "TaskError",
    "did_you_mean",
]


class BayesLoraError(Exception):
    """Base class: says what was expected, what came, and the cure."""


class ConfigError(BayesLoraError, ValueError):
    """A setting is unknown, of the wrong type or out of range."""


class ModelError(BayesLoraError, ValueError):
    """The language model is of an architecture that cannot be used."""


class ModelFileError(BayesLoraError, OSError):
    """The language model's files cannot be had."""


class NonFiniteLoss(BayesLoraError, ArithmeticError):
    """A loss, a gradient or a parameter is NaN or infinite."""


class PosteriorError(BayesLoraError, ValueError):
    """A saved posterior is damaged, or fits another model."""


class RunFolderError(BayesLoraError, OSError):
    """The run folder exists already, or does not hold a run."""


class SiteError(BayesLoraError, ValueError):
    """A LoRA site is missing, unknown, or bound to a value of the wrong shape."""


class TaskError(BayesLoraError, ValueError):
    """A task file is malformed, or a task is too small for what is asked of it."""


def did_you_mean(name: str, known: Iterable[str], *, list_all: bool = False) -> str:
    """Return ``" (did you mean 'a' or 'b'?)"`` for the known names nearest to ``name``, to end a message with.

    Args:
        name: what came.
        known: what was expected.
        list_all: where nothing is near, return all known names, ``" (known: 'a', 'b')"``, instead of nothing.
    """
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f" (did you mean {' or '.join(map(repr, near))}?)"
    return f" (known: {', '.join(map(repr, known))})" if list_all and known else ""
