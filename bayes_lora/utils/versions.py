"""Versions of this package and of those that decide its numbers."""

from __future__ import annotations

import importlib.metadata
import platform

__all__ = ["versions"]

PACKAGES = {"torch": "torch", "transformers": "transformers", "peft": "peft", "pyro": "pyro-ppl", "numpy": "numpy"}


def versions() -> dict[str, str]:
    """Return versions by name: bayes_lora, python, torch, transformers, peft, pyro and numpy."""
    import bayes_lora

    found = {"bayes_lora": bayes_lora.__version__, "python": platform.python_version()}
    return found | {name: importlib.metadata.version(package) for name, package in PACKAGES.items()}
