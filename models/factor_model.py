r"""The base class of priors over LoRA factors. To write a new prior, define one method.

.. math:: p(\theta) \prod_i p(\phi_i \mid \theta) \prod_j p(y_{ij} \mid x_{ij}, \phi_i), \qquad
    \mu_\theta \sim \mathcal N(0, s_0^2)

Usage::

    class HeavyTailed(FactorModel):
        def phi_prior(self, theta):
            return {s: StudentT(4.0, theta[f"theta.loc.{s}"], 0.05).to_event(3) for s in self.random_sites}
"""

from __future__ import annotations

from typing import Literal

import torch

from bayes_lora.errors import ConfigError
from bayes_lora.models.hierarchical_model import HierarchicalModel, sample_normal
from bayes_lora.types import Likelihood, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["FactorModel"]


class FactorModel(HierarchicalModel):
    """p(theta) p(phi_i | theta) p(y | x, phi_i) over the LoRA factors A and B. A subclass defines ``phi_prior``.

    Theta is a location per LoRA site, ``theta.loc.<site>``, unless a subclass overrides ``initial_theta`` and
    ``theta``. If only A or only B is random, all tasks share the other factor: ``phi = theta.loc``.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start ``theta.loc``; by default the
            initial values of the likelihood.
        random: which factors are random: ``"A"``, ``"B"`` or ``"AB"``.
        loc_scale: s_0.

    Raises:
        ConfigError: ``random`` is none of these values, or ``loc_scale`` is not positive.
        SiteError: ``initial`` does not fit the likelihood's sites.
    """

    loc_scale: torch.Tensor

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        random: Literal["A", "B", "AB"] = "AB",
        loc_scale: Positive = 1.0,
    ) -> None:
        super().__init__(likelihood, initial)
        if random not in ("A", "B", "AB"):
            raise ConfigError(f"random: expected 'A', 'B' or 'AB', got {random!r}.")
        self.random_sites = [site for site in self.initial if site.partition(".lora_")[2][0] in random]
        self.set_hyperparameters(loc_scale=loc_scale)

    def set_hyperparameters(self, **values: float) -> None:
        """Register positive hyperparameters as buffers, which are saved and follow the module's device and dtype.

        Raises:
            ConfigError: a value is not positive.
        """
        for name, value in values.items():
            if not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
            self.register_buffer(name, torch.tensor(value, dtype=next(iter(self.initial.values())).dtype))

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site: ``initial`` for locations."""
        return {f"theta.loc.{site}": value for site, value in self.initial.items()}

    def theta(self) -> Sites:
        """Sample p(theta): every site of ``initial_theta`` from N(0, s_0^2)."""
        return sample_normal(self.initial_theta(), self.loc_scale)

    def shared(self, theta: Sites) -> Sites:
        """Return the values of the factor that is not random."""
        return {site: theta[f"theta.loc.{site}"] for site in self.initial if site not in self.random_sites}
