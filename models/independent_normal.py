r"""Independent normal prior without a hierarchy: fixed, and equal for all tasks (BLoB, arXiv 2406.11675).

.. math:: \phi_i \sim \mathcal N(\phi_0, s^2) \quad\text{for each task } i

elementwise, around PEFT's initial values: A random, B zero. If only A or only B is random, theta is the other factor,
which all tasks share.
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
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``: phi_0, and the initial value of theta.
        random: which factors are random: ``"A"`` (BLoB), ``"B"`` or ``"AB"``.
        scale: s, for ``lora_A`` and ``lora_B``.
        loc_scale: prior standard deviation of theta around zero.
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
            # Buffers are saved and follow the module's device; their names may not contain dots.
            self.register_buffer(f"at_{site}".replace(".", "_"), self.initial[site].clone())
        self.scale = scale

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        return {f"theta.loc.{site}": value for site, value in self.initial.items() if site not in self.random_sites}

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi) of one task, per random site."""
        prior: Distributions = {}
        for site in self.random_sites:
            loc = getattr(self, f"at_{site}".replace(".", "_"))
            prior[site] = dist.Normal(loc, torch.full_like(loc, self.scale[".lora_B" in site])).to_event(3)
        return prior
