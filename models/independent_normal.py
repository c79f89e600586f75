r"""Independent normal prior, the same for all tasks and not learnt: no hierarchy (BLoB, arXiv 2406.11675).

.. math:: \phi_i \sim \mathcal N(\phi_0, s^2) \quad\text{for each task } i

elementwise, around PEFT's initial values: A random, B zero. What the factor that is not random has in common for all
tasks is theta.
"""

from __future__ import annotations

from typing import Literal

import pyro.distributions as dist
import torch

from bayes_lora.errors import ConfigError
from bayes_lora.models.factor_model import FactorModel
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Positive

__all__ = ["IndependentNormal"]


class IndependentNormal(FactorModel):
    """p(phi_i) p(y | x, phi_i) as a Pyro program.

    Sites: ``theta.loc.<site>`` for LoRA sites that are not random; ``phi.<site>`` for those that are; ``answer``.

    Args:
        likelihood: the language model; a plain object, so that Pyro cannot reach its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``: phi_0, and where theta starts.
        random: which factors are random: ``"A"`` (BLoB), ``"B"`` or ``"AB"``.
        scale: s, for ``lora_A`` and ``lora_B``.
        loc_scale: standard deviation of theta around zero.
    """

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        random: Literal["A", "B", "AB"] = "AB",
        scale: tuple[Positive, Positive] = (0.1, 0.05),
        loc_scale: Positive = 1.0,
    ) -> None:
        super().__init__(likelihood, initial, random=random, loc_scale=loc_scale)
        if min(scale) <= 0:
            raise ConfigError(f"scale: expected two positive numbers (for A and B), got {scale}.")
        for site in self.random_sites:
            # Buffers, so that they follow the module to its device and are saved; under names that attributes may have.
            self.register_buffer(f"at_{site}".replace(".", "_"), self.initial[site].clone())
        self.scale = scale

    def initial_theta(self) -> Sites:
        """Where guides start each theta site."""
        return {f"theta.loc.{site}": value for site, value in self.initial.items() if site not in self.random_sites}

    def phi_prior(self, theta: Sites) -> Distributions:
        """p(phi) of one task, per random site."""
        prior: Distributions = {}
        for site in self.random_sites:
            loc = getattr(self, f"at_{site}".replace(".", "_"))
            prior[site] = dist.Normal(loc, torch.full_like(loc, self.scale[".lora_B" in site])).to_event(3)
        return prior
