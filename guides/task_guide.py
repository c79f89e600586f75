"""What guides share."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import pyro.distributions as dist
import torch
from torch import nn

from bayes_lora.errors import ConfigError

Normal, Mixture = torch.distributions.Normal, torch.distributions.MixtureSameFamily

__all__ = ["attribute", "check_factors", "check_normal", "normal_of", "show_to_svi"]


def attribute(prefix: str, site: str) -> str:
    """The attribute under which a module keeps a site's parameter (module attributes may hold no dots)."""
    return f"{prefix}_{site}".replace(".", "_")


def show_to_svi(module: nn.Module) -> None:
    """Let ``pyro.infer.SVI`` find a module's plain parameters.

    With ``module_local_params`` SVI asks every parameter for its unconstrained twin, which Pyro 1.9.2 attaches to a
    PyroParam but not to an ``nn.Parameter``; a real parameter is its own twin.
    """
    for parameter in module.parameters():
        parameter.unconstrained = weakref.ref(parameter)  # type: ignore[attr-defined]


def check_normal(model: Any, guide: str) -> None:
    """Refuse a model whose p(phi | theta) is not normal."""
    _check(model, guide, "to be normal", lambda fn: isinstance(getattr(fn, "base_dist", fn), Normal))


def check_factors(model: Any, guide: str) -> None:
    """Refuse a model whose phi is anything but LoRA factors with means and standard deviations."""
    _check(model, guide, "of LoRA factors", lambda fn: isinstance(getattr(fn, "base_dist", fn), (Normal, Mixture)))


def _check(model: Any, guide: str, what: str, fits: Callable[[Any], bool]) -> None:
    with torch.no_grad():
        prior = model.phi_prior(model.initial_theta())
    for site, fn in prior.items():
        if not fits(fn):
            raise ConfigError(
                f"{guide}: expected p(phi | theta) {what}, got {fn} for site {site!r} of "
                f"{type(model).__name__}. Use GradientGuide, or a model of LoRA factors (HierarchicalNormal)."
            )


def normal_of(prior: Any) -> Any:
    """The independent normals that a prior is made of; of a mixture, those with its means and variances."""
    base = getattr(prior, "base_dist", prior)
    return base if isinstance(base, Normal) else dist.Normal(base.mean, base.stddev)
