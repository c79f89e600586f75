r"""The beta-scaled ELBO: where beta and gamma enter.

.. math::
    \mathcal L = \sum_i \Big\{ -\tfrac{N_i}{n_i} \sum_j \mathbb E_q \log p(y_{ij} \mid x_{ij}, \phi_i)
        + \beta\, \mathrm{KL}(q(\phi_i \mid S_i) \,\|\, p(\phi_i \mid \theta)) \Big\}
        + \gamma\, \mathrm{KL}(q(\theta) \,\|\, p(\theta))

in nats, over all tasks of the collection (the ``task`` plate scales the T tasks of an episode up). ``beta = gamma = 1``
is the negative ELBO. N enters in the model's ``answer`` site; the divergences are never divided. (Where the latent
variables are an example's own, as the activations of ``ActivationSpace``, their divergence is scaled to N as well.)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.infer.elbo import AnalyticELBO, site_divergence
from bayes_lora.infer.handlers import ScaleLatents

__all__ = ["BetaELBO", "ScaleLatents", "evaluating"]


class _LastSite(Messenger):
    """Effect handler: notes which site was sampled last."""

    name: str | None = None

    def _pyro_sample(self, msg: Any) -> None:
        if not isinstance(msg["fn"], _Subsample):  # a plate's own
            self.name = msg["name"]


class _Scaled(nn.Module):
    """A model or guide under :class:`ScaleLatents`; a module, so that its parameters are found."""

    def __init__(self, program: Callable[..., Any], objective: BetaELBO) -> None:
        super().__init__()
        self.program: Any = program
        self._objective = (objective,)

    def forward(self, episode: Episode) -> Any:
        (objective,) = self._objective
        with objective.handled(), ScaleLatents(objective.beta, objective.gamma), _LastSite() as last:
            try:
                return self.program(episode)
            except ValueError as error:  # raised where a distribution is made, which does not know its site
                if "to satisfy the constraint" not in str(error):
                    raise
                name = getattr(self.program, "__name__", type(self.program).__name__)
                where = f"the site after {last.name!r}" if last.name else "the first site"
                raise SiteError(
                    f"{where} of {name}: {str(error).splitlines()[0]} A scale must be positive: take exp or softplus "
                    "of a free parameter. If it is NaN, training diverged: lower the learning rate."
                ) from error


class BetaELBO(nn.Module):
    """The negative beta-ELBO of a model and a guide as a loss module, for ordinary torch training.

    Example::

        objective = BetaELBO(model, guide, beta=1e-3)
        optimizer = torch.optim.Adam(objective.parameters(), lr=1e-3)
        loss = objective(episode)
        loss.backward()

    Args:
        model: a Pyro model.
        guide: a Pyro guide with the model's signature.
        beta: weight of KL(q(phi) || p(phi | theta)).
        gamma: weight of KL(q(theta) || p(theta)); by default beta, as in arXiv 2508.14285 v2.
        num_particles: draws of phi over which the loss averages, all in one forward.
        handler: makes an effect handler under which model and guide run wherever they are used, such as
            :class:`bayes_lora.infer.handlers.LocalReparameterization`.
        elbo: any Pyro ELBO; by default :class:`bayes_lora.infer.elbo.AnalyticELBO`, with analytic divergences where the
            families have them.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        beta: float = 1.0,
        gamma: float | None = None,
        num_particles: int = 1,
        handler: Callable[[], AbstractContextManager[Any]] = nullcontext,
        elbo: ELBO | None = None,
    ) -> None:
        super().__init__()
        if num_particles < 1:
            raise ConfigError(f"num_particles: expected at least 1, got {num_particles}.")
        for name, value in (("beta", beta), ("gamma", beta if gamma is None else gamma)):
            if not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        self.full_beta, self.full_gamma = beta, beta if gamma is None else gamma
        self.beta, self.gamma = self.full_beta, self.full_gamma
        self.handled = handler
        self.model, self.guide = _Scaled(model, self), _Scaled(guide, self)
        # Two plates: task and example.
        make: Any = AnalyticELBO
        self.elbo: Any = elbo or make(num_particles, max_plate_nesting=2, vectorize_particles=True)

    def forward(self, episode: Episode) -> Tensor:
        """Return the loss in nats, summed over the collection's examples; divide by their number to read it."""
        loss: Tensor = self.elbo.differentiable_loss(self.model, self.guide, episode)
        return loss

    def warm(self, fraction: float) -> None:
        """Set beta and gamma to this fraction of their full values."""
        self.beta, self.gamma = self.full_beta * fraction, self.full_gamma * fraction

    def terms(self, episode: Episode) -> dict[str, float]:
        """The loss's parts for one draw, unscaled by beta and gamma, in nats of the collection.

        ``nll`` (scaled to N), ``kl.<site>`` per random site, and ``kl`` their sum; sites of the guide alone among them.
        """
        with torch.no_grad(), unscaled(self):
            guide = pyro.poutine.trace(self.guide).get_trace(episode)
            model = pyro.poutine.trace(pyro.poutine.replay(self.model, guide)).get_trace(episode)
            model.compute_log_prob(lambda _, site: site["is_observed"])
            nodes: dict[str, Any] = dict(model.nodes)
            terms = {"nll": -float(nodes["answer"]["log_prob_sum"])}
            for name, site in nodes.items():
                if name.startswith("phi."):
                    factor = site["is_observed"]
                    kl = -site["log_prob_sum"] if factor else site_divergence(name, guide, model, 2)
                    terms[f"kl.{name[4:]}"] = float(kl)
            guide.compute_log_prob(lambda name, _: name not in nodes)
            for name, site in guide.nodes.items():
                if site["type"] == "sample" and name not in nodes:
                    terms[f"kl.{name.removeprefix('phi.')}"] = float(site["log_prob_sum"])
        terms["kl"] = sum(value for name, value in terms.items() if name.startswith("kl."))
        return terms


@contextmanager
def unscaled(objective: BetaELBO) -> Iterator[None]:
    """Inside the block beta = gamma = 1."""
    before = objective.beta, objective.gamma
    objective.beta = objective.gamma = 1.0
    try:
        yield
    finally:
        objective.beta, objective.gamma = before


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Inside the block the module is in evaluation mode (no dropout)."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)
