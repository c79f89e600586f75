"""Settings of experiment trackers, read and checked without importing them."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any, Literal

from bayes_lora.errors import ConfigError, did_you_mean

__all__ = ["TrackingConfig", "check_trackers"]

PACKAGES = {"tensorboard": ("tensorboard", "tensorboardX"), "wandb": ("wandb",), "mlflow": ("mlflow",)}
"""Packages by tracker; one of them suffices, and the first is installed."""


@dataclass(frozen=True)
class TrackingConfig:
    """Settings of trackers, which show a fit while it runs. A run folder is complete without them.

    Attributes:
        trackers: names of trackers.
        project: project of W&B, experiment of MLflow.
        init: keyword arguments by tracker: of ``SummaryWriter``, of ``wandb.init`` and of Accelerate's
            ``MLflowTracker``.
    """

    trackers: list[Literal["tensorboard", "wandb", "mlflow"]] = field(default_factory=list)
    project: str = "bayes-lora"
    init: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in self.init:
            if name not in PACKAGES:
                near = did_you_mean(name, PACKAGES, list_all=True)
                raise ConfigError(f"init: {name!r} is not the name of a tracker{near}.")


def check_trackers(config: TrackingConfig) -> None:
    """Check that the packages of the trackers are installed.

    Raises:
        ConfigError: one is not.
    """
    for name in config.trackers:
        if not any(map(_is_installed, PACKAGES[name])):
            raise ConfigError(
                f"tracking.trackers: {name!r} is not installed. Run pip install {PACKAGES[name][0]}, or leave it out."
            )


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return sys.modules[package] is not None
    found = find_spec(package)
    return found is not None and found.origin is not None  # W&B writes into ./wandb, which Python can import too
