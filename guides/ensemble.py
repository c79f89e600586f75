r"""Deep ensemble: several guides, fitted in parallel (Lakshminarayanan et al., arXiv 1612.01474).

.. math:: q(\theta) \prod_i q(\phi_i \mid S_i) = \tfrac1K \textstyle\sum_k
    q_k(\theta) \prod_i q_k(\phi_i \mid S_i)

A draw comes from one member. In training the particles are divided among the members, which share no parameters: with
``BetaELBO(..., num_particles=K)`` every member is trained in every step. The mean of the members' ELBOs is a lower
bound on the ELBO of the mixture.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import pyro
import torch
from pydantic import Field
from pyro.nn import PyroModule
from torch import Tensor, nn

from bayes_lora.distributions.unconstrained import parameters, with_parameters
from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError
from bayes_lora.guides.point import SharedPoint
from bayes_lora.guides.task_guide import TaskGuide
from bayes_lora.guides.theta import PointTheta
from bayes_lora.infer.components import Components, choose_components, draws_around
from bayes_lora.infer.plates import sample_phi
from bayes_lora.types import Distributions, Model, Sites, ThetaFactory
from bayes_lora.utils.devices import send
from bayes_lora.utils.ranges import NonNegative

__all__ = ["Ensemble"]

Members: Any = PyroModule[nn.ModuleList]


class Ensemble(TaskGuide):
    """A uniform mixture of K guides, each with its own q(theta) and q(phi | support).

    Args:
        model: a hierarchical model.
        theta_guide: makes q(theta) of each member from the model: :class:`PointTheta` or :class:`NormalTheta`.
        make: makes one member, ``make(model, theta_guide=...)``; by default :class:`bayes_lora.guides.SharedPoint`, one
            LoRA for all tasks. Members differ by their random initialization.
        num_members: K, at least 2.
        spread: distance from the prior's mean at which the default members start, in prior standard deviations.

    Raises:
        ConfigError: there are fewer than two members, or, when called, a member has several components itself.
    """

    def __init__(
        self,
        model: Model,
        *,
        theta_guide: ThetaFactory = PointTheta,
        make: Callable[..., TaskGuide] | None = None,
        num_members: Annotated[int, Field(ge=2)] = 4,
        spread: NonNegative = 0.5,
    ) -> None:
        super().__init__(model, theta_guide=None)
        if num_members < 2:
            raise ConfigError(f"num_members: expected at least 2, got {num_members}.")
        make = make or partial(SharedPoint, spread=spread)
        members = [make(model, theta_guide=theta_guide) for _ in range(num_members)]
        if any(member.num_members > 1 for member in members):
            raise ConfigError("make: an ensemble cannot be a member of an ensemble. Raise num_members.")
        self.members, self.num_members = Members(members), num_members

    def amortized(self, support: Episode) -> tuple[Sites, Components]:
        """Return each member's mean of q(theta), ``(K, 1, 1, ...)``, and its q(phi | support), batch ``(K, T, 1)``."""
        thetas = [member.theta_mean() for member in self.members]
        theta = {site: torch.stack([one[site] for one in thetas])[:, None, None] for site in thetas[0]}
        return theta, self.posterior(support, theta)

    def posterior(self, support: Episode, theta: Sites) -> Components:
        """Return q(phi | support) of each member at its own theta ``(K, 1, 1, ...)``: batch ``(K, T, 1)``."""
        found = []
        for k, member in enumerate(self.members):
            found.append(self._one_component(k, member.posterior(support, {s: v[k, 0, 0] for s, v in theta.items()})))
        return Components.stack(found)

    def _one_component(self, k: int, posterior: Distributions) -> Distributions:
        if isinstance(posterior, Components):
            raise ConfigError(
                f"make: expected members with one component, but {type(self.members[k]).__name__} has several."
            )
        return posterior

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi; the draws are divided among the members."""
        chosen = choose_components(len(self.members))
        if draws_around() is None:
            member: Any = self.members[int(chosen)]
            return member(episode)  # type: ignore[no-any-return]
        order = chosen.argsort(stable=True)
        parts: list[dict[str, Any]] = []
        places: list[Tensor] = []
        for k in chosen.unique().tolist():
            member = self.members[k]
            draws = order[chosen[order] == k]
            fns = {site: member.theta.distribution(site) for site in member.theta.positive}
            parts.append({site: expand_batch(fn, len(draws), 1, 1) for site, fn in fns.items()})
            places.append(draws)
        theta = {site: pyro.sample(site, concatenate_members(parts, site, places)) for site in parts[0]}
        found = []
        for k, draws in zip(chosen.unique().tolist(), places, strict=True):
            own = {site: value[draws] for site, value in theta.items()}
            posterior = self._one_component(k, self.members[k].posterior(episode.support, own))
            tasks = len(episode.support.task_index)
            found.append({site: expand_batch(fn, len(draws), tasks, 1) for site, fn in posterior.items()})
        return sample_phi(episode, {site: concatenate_members(found, site, places) for site in found[0]})


def expand_batch(fn: Any, *batch: int) -> Any:
    """Expand a distribution to a batch of draws, tasks and examples."""
    return fn.expand(batch)


def concatenate_members(parts: list[dict[str, Any]], site: str, places: list[Tensor]) -> Any:
    """Join the members' distributions of one site into one batch, in the order of the draws."""
    tensors = [parameters(part[site]) for part in parts]
    back = send(torch.cat(places).argsort(), next(iter(tensors[0].values())).device)
    whole = {name: torch.cat([own[name] for own in tensors])[back] for name in tensors[0]}
    return with_parameters(parts[0][site], whole)
