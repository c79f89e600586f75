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
from bayes_lora.models.hierarchical_model import HierarchicalModel
from bayes_lora.types import Likelihood, Sites

__all__ = ["IndependentNormal"]


class IndependentNormal(HierarchicalModel):
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
        initial: Sites,
        *,
        random: Literal["A", "B", "AB"] = "AB",
        scale: tuple[float, float] = (0.1, 0.05),
        loc_scale: float = 1.0,
    ) -> None:
        super().__init__(likelihood, initial)
        if random not in ("A", "B", "AB"):
            raise ConfigError(f"random: expected 'A', 'B' or 'AB', got {random!r}.")
        if min(*scale, loc_scale) <= 0:
            raise ConfigError(f"expected positive scale and loc_scale, got {scale} and {loc_scale}.")
        self.random_sites = [site for site in initial if site.partition(".lora_")[2][0] in random]
        for site in self.random_sites:
            # Buffers, so that they follow the module to its device and are saved; under names that attributes may have.
            self.register_buffer(f"at_{site}".replace(".", "_"), initial[site].clone())
        self.scale = scale
        self.register_buffer("loc_scale", torch.tensor(loc_scale, dtype=next(iter(initial.values())).dtype))

    def initial_theta(self) -> Sites:
        """Where guides start each theta site."""
        return {f"theta.loc.{site}": value for site, value in self.initial.items() if site not in self.random_sites}

    def theta(self) -> Sites:
        """Sample p(theta): locations of what is shared."""
        return self.normal_theta()

    def phi_prior(self, theta: Sites) -> dict[str, dist.TorchDistribution]:
        """p(phi) of one task, per random site."""
        prior: dict[str, dist.TorchDistribution] = {}
        for site in self.random_sites:
            loc = getattr(self, f"at_{site}".replace(".", "_"))
            prior[site] = dist.Normal(loc, torch.full_like(loc, self.scale[".lora_B" in site])).to_event(3)
        return prior

    def shared(self, theta: Sites) -> Sites:
        """The factor that is not random."""
        return {name.removeprefix("theta.loc."): value for name, value in theta.items()}
