r"""A prior with an option head: a slope and a bias per label for each task, next to its LoRA weights.

.. math::
    f_k &= s_i\, \Big(\ell_k - \tfrac1K \textstyle\sum_{k'} \ell_{k'}\Big) + b_{ik}, \qquad
        y \mid x, \phi_i \sim \mathrm{Categorical}(\mathrm{softmax}(f)) \\
    \mu_s &\sim \mathcal N(0, s_0^2), \qquad \tau_s, \tau_b \sim \mathrm{Gamma}(a_0, b_0) \\
    s_i \mid \theta &\sim \mathcal N(\mu_s, 1 / \tau_s), \qquad b_{ik} \mid \theta \sim \mathcal N(0, 1 / \tau_b)
    \quad\text{for each task } i

with the option log-likelihoods l of the language model, in nats. The slope scales what the language model says. The
biases say how frequent the labels are; they apply to tasks with a fixed set of labels
(:mod:`bayes_lora.lm.option_head`).
"""

from __future__ import annotations

import math
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.infer.plates import same_task_plate
from bayes_lora.lm.option_head import BIAS, HEAD_SHAPES, SLOPE
from bayes_lora.models.hierarchical_model import HierarchicalModel
from bayes_lora.types import Distributions, Sites
from bayes_lora.utils.ranges import Finite, Positive

__all__ = ["WithHead"]

LOC, PRECISIONS = f"theta.loc.{SLOPE}", {SLOPE: f"theta.precision.{SLOPE}", BIAS: f"theta.precision.{BIAS}"}


class WithHead(HierarchicalModel):
    """Another prior, with an option head: p(theta) p(phi_i | theta) p(y | x, phi_i) as a Pyro program.

    Sites: those of the other prior; ``theta.loc.head.slope``, ``theta.precision.head.slope``,
    ``theta.precision.head.bias`` and ``phi.head.slope``, ``(1, 1, 1)`` each; ``phi.head.bias``, ``(1, 1, 32)``. Options
    from the 33rd on have no bias.

    Example::

        model = WithHead(LayerwiseScale(lm, random="B"))

    Args:
        prior: the prior over LoRA weights; it is the attribute ``prior``.
        slope: the mean of the slopes at which guides start. At 1 the language model's scores are not scaled.
        slope_scale: the standard deviation of the slopes at which guides start.
        bias_scale: the standard deviation of the biases at which guides start, nats.
        loc_scale: s_0.
        concentration: a_0.
        rate: b_0.

    Raises:
        ConfigError: a setting is out of range; or the other prior has a head already, or calls the language model
            itself, as ``ActivationSpace`` does.
    """

    def __init__(
        self,
        prior: HierarchicalModel,
        *,
        slope: Finite = 1.0,
        slope_scale: Positive = 0.3,
        bias_scale: Positive = 1.0,
        loc_scale: Positive = 1.0,
        concentration: Positive = 1.0,
        rate: Positive = 0.01,
    ) -> None:
        _check_prior(prior)
        super().__init__(prior.likelihood, prior.initial)
        positive = dict(slope_scale=slope_scale, bias_scale=bias_scale)
        hyper = dict(loc_scale=loc_scale, concentration=concentration, rate=rate)
        for name, value in (positive | hyper).items():
            if not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        if not math.isfinite(slope):
            raise ConfigError(f"slope: expected a finite number, got {slope}.")
        self.prior, self.context = prior, prior.context
        like = next(iter(prior.initial.values()))
        for name, value in hyper.items():
            self.register_buffer(name, torch.tensor(value, dtype=like.dtype))
        self.slope, self.scales = slope, {SLOPE: slope_scale, BIAS: bias_scale}
        start = {SLOPE: slope, BIAS: 0.0}
        self.initial = prior.initial | {site: like.new_full(shape, start[site]) for site, shape in HEAD_SHAPES.items()}
        self.random_sites = [*prior.random_sites, *HEAD_SHAPES]

    def initial_theta(self) -> Sites:
        """Return the value at which guides start each theta site."""
        theta: Sites = {LOC: self.initial[SLOPE]}
        for site, name in PRECISIONS.items():
            theta[name] = self.initial[SLOPE].new_full((1, 1, 1), self.scales[site] ** -2)
        return theta | self.prior.initial_theta()

    def theta(self) -> Sites:
        """Sample p(theta): the sites of the head, then those of the other prior."""
        return self._head_theta() | self.prior.theta()

    def _head_theta(self) -> Sites:
        loc: Any = dist.Normal(torch.zeros_like(self.loc_scale), self.loc_scale)
        theta: Sites = {LOC: pyro.sample(LOC, loc.expand((1, 1, 1)).to_event(3))}
        for name in PRECISIONS.values():
            gamma = dist.Gamma(self.concentration, self.rate).expand((1, 1, 1)).to_event(3)
            theta[name] = pyro.sample(name, gamma)
        return theta

    def phi_prior(self, theta: Sites) -> Distributions:
        """Return p(phi | theta) of one task, per random site."""
        return self.prior.phi_prior(theta) | self._head_prior(theta)

    def _head_prior(self, theta: Sites) -> Distributions:
        slope = dist.Normal(theta[LOC], theta[PRECISIONS[SLOPE]].rsqrt()).to_event(3)
        none = torch.zeros_like(self.initial[BIAS])
        return {SLOPE: slope, BIAS: dist.Normal(none, theta[PRECISIONS[BIAS]].rsqrt()).to_event(3)}

    def shared(self, theta: Sites) -> Sites:
        """Return the values of the LoRA sites that all tasks share."""
        return self.prior.shared(theta)

    def sample_phi(self, episode: Episode) -> Sites:
        """Sample theta and phi, and return phi per site; ``(T, 1, layers, out, in)`` for random sites."""
        # Theta first, as in guides: sites in another order are a warning of Pyro's.
        head = self._head_prior(self._head_theta())
        phi = self.prior.sample_phi(episode)
        with same_task_plate(episode):
            return phi | {site: pyro.sample(f"phi.{site}", fn) for site, fn in head.items()}

    def observe(self, log_lik: Tensor, episode: Episode) -> None:
        """Observe the answers as the other prior does."""
        self.prior.observe(log_lik, episode)

    def answer(self, log_lik: Tensor) -> dist.TorchDistribution:
        """Return p(y | x, phi), of batch ``(T, N)``."""
        return self.prior.answer(log_lik)

    def answered(self, episode: Episode) -> Tensor:
        """Return the observed values, ``(T, N)``."""
        return self.prior.answered(episode)


def _check_prior(prior: Any) -> None:
    """Check that a prior can have a head.

    Raises:
        ConfigError: it cannot.
    """
    kind = type(prior).__name__
    if not isinstance(prior, HierarchicalModel):
        raise ConfigError(f"WithHead: expected a prior, got {kind}. Write WithHead(LayerwiseScale(lm)).")
    if isinstance(prior, WithHead):
        raise ConfigError("WithHead: the prior has an option head already. Pass its settings to the one WithHead.")
    if type(prior).forward is not HierarchicalModel.forward:
        raise ConfigError(
            f"WithHead: {kind} calls the language model itself, so that the scores do not pass through a head. Use a "
            "prior over LoRA weights (LayerwiseScale, WeightSpace)."
        )
