r"""Prior in a subspace: a few hundred numbers for each task, with directions in weight space that all tasks share.

.. math::
    D_m \sim \mathcal N(0, s_0^2), \qquad 1 / \sigma^2 \sim \mathrm{Gamma}(a_0, b_0), \qquad
    c_i \mid \theta \sim \mathcal N(0, \sigma^2 I_M), \qquad \phi_i = \mu_\theta + \textstyle\sum_m c_{im} D_m

Inference in a subspace of the weights (Izmailov et al., arXiv 1907.07504), whose directions are learned from many
tasks. A posterior of M numbers can have a full covariance at any size of model. A closed-form fit (recipes ``subspace``
and ``subspace-network``) finds the directions in the derivatives of the training tasks, see
:mod:`bayes_lora.infer.directions`. Stochastic variational inference trains them, from random ones unless others are
given.
"""

from __future__ import annotations

from typing import ClassVar, Literal

import pyro
import pyro.distributions as dist
import torch

from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.lm.subspace import CODE, directions_of
from bayes_lora.models.factor_model import FactorModel
from bayes_lora.models.hierarchical_model import sample_normal
from bayes_lora.types import Distributions, Likelihood, Sites
from bayes_lora.utils.ranges import Count, Positive

__all__ = ["Subspace"]

PRECISION = f"theta.precision.{CODE}"


class Subspace(FactorModel):
    """p(theta) p(c_i | theta) p(y | x, phi_i) as a Pyro program.

    Sites: ``theta.loc.<site>`` for every LoRA site; ``theta.directions.<site>``, ``(size * layers, out, in)``, for
    those that differ between tasks; ``theta.precision.code``, ``(1, 1, 1)``; ``phi.code``, ``(1, 1, size)``;
    ``answer``.

    Args:
        likelihood: the language model; not a submodule, so that Pyro does not see its parameters.
        initial: a value per LoRA site, ``(layers, out, in)``, at which guides start ``theta.loc``.
        directions: a value per LoRA site, ``(size * layers, out, in)``, at which guides start ``theta.directions``;
            by default random ones, of unit length over all sites in expectation. A closed-form fit keeps those that are
            given, and replaces random ones.
        size: M, the number of directions.
        random: which factors differ between tasks: ``"A"``, ``"B"`` or ``"AB"``.
        initial_scale: sigma at which guides start.
        loc_scale: s_0.
        concentration: a_0.
        rate: b_0.

    Raises:
        ConfigError: a setting is out of range.
        SiteError: ``initial`` or ``directions`` do not fit the likelihood's sites.
    """

    not_settings: ClassVar[tuple[str, ...]] = ("initial", "directions")

    def __init__(
        self,
        likelihood: Likelihood,
        initial: Sites | None = None,
        *,
        directions: Sites | None = None,
        size: Count = 128,
        random: Literal["A", "B", "AB"] = "B",
        initial_scale: Positive = 1.0,
        loc_scale: Positive = 1.0,
        concentration: Positive = 1.0,
        rate: Positive = 0.01,
    ) -> None:
        super().__init__(likelihood, initial, random=random, loc_scale=loc_scale)
        if size < 1 or not initial_scale > 0:
            raise ConfigError(
                f"expected a size of at least 1 and a positive initial_scale, got size={size}, "
                f"initial_scale={initial_scale}."
            )
        self.set_hyperparameters(concentration=concentration, rate=rate)
        self.size, self.random, self.initial_scale = size, random, initial_scale
        self.varied = self.random_sites
        self.given = directions is not None
        self.directions = self._random_directions() if directions is None else self._checked(directions)
        like = next(iter(self.initial.values()))
        self.initial = self.initial | {CODE: like.new_zeros(1, 1, size)}
        self.random_sites = [CODE]

    def _shape(self, site: str) -> tuple[int, int, int]:
        layers, rows, columns = self.initial[site].shape
        return self.size * layers, rows, columns

    def _random_directions(self) -> Sites:
        count = sum(self.initial[site].numel() for site in self.varied)
        return {
            site: torch.randn(self._shape(site)).to(self.initial[site]) / max(count, 1) ** 0.5 for site in self.varied
        }

    def _checked(self, directions: Sites) -> Sites:
        for site in self.varied:
            got = tuple(directions[site].shape) if site in directions else None
            if got != self._shape(site):
                raise SiteError(
                    f"directions: site {site!r}: expected {self._shape(site)} (size * layers, out, in), got {got}."
                )
        if directions.keys() != set(self.varied):
            raise SiteError(f"directions: expected the sites {self.varied}, got {[*directions]}.")
        return {site: directions[site].to(self.initial[site]) for site in self.varied}

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta = {f"theta.loc.{site}": value for site, value in self.initial.items() if site != CODE}
        theta |= {f"theta.{directions_of(site)}": value for site, value in self.directions.items()}
        return theta | {PRECISION: self.initial[CODE].new_full((1, 1, 1), self.initial_scale**-2)}

    def theta(self) -> Sites:
        """Sample p(theta): locations and directions, and the precision of the code."""
        start = self.initial_theta()
        del start[PRECISION]
        gamma = dist.Gamma(self.concentration, self.rate).expand((1, 1, 1)).to_event(3)
        return sample_normal(start, self.loc_scale) | {PRECISION: pyro.sample(PRECISION, gamma)}

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(c | theta) of one task."""
        none = torch.zeros_like(self.initial[CODE])
        return {CODE: dist.Normal(none, theta[PRECISION].rsqrt()).to_event(3)}

    def shared(self, theta: Sites) -> Sites:
        """Return the locations of all LoRA sites and the directions."""
        return {name.removeprefix("theta.loc.").removeprefix("theta."): theta[name] for name in self._shared_names()}

    def _shared_names(self) -> list[str]:
        locations = [f"theta.loc.{site}" for site in self.initial if site != CODE]
        return locations + [f"theta.{directions_of(site)}" for site in self.varied]
