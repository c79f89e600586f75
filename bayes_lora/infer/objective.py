r"""The beta-scaled ELBO.

.. math::
    \mathcal L = \sum_i \Big\{ -\tfrac{N_i}{n_i} \sum_j \mathbb E_q \log p(y_{ij} \mid x_{ij}, \phi_i)
        + \beta\, \mathrm{KL}(q(\phi_i \mid S_i) \,\|\, p(\phi_i \mid \theta)) \Big\}
        + \gamma\, \mathrm{KL}(q(\theta) \,\|\, p(\theta))

in nats, over all tasks of the collection (the ``task`` plate scales up the T tasks of an episode). With ``beta = gamma
= 1`` it is the negative ELBO. The model's ``answer`` site is scaled to N; the divergences are not divided by N. If each
example has its own latent variables, such as the activations of ``ActivationSpace``, their divergence is also scaled
to N.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pyro
import torch
from pyro.infer import ELBO
from torch import Tensor, nn

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.infer.elbo import AnalyticELBO, site_divergence
from bayes_lora.infer.handlers import LastSite, ModuleParameters, ScaleLatents

__all__ = ["BetaELBO", "evaluating"]


class BetaELBO(nn.Module):
    """The negative beta-ELBO of a model and a guide as a loss module, for training with torch optimizers.

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
        predictive: whether the likelihood of each example is averaged over the draws before the logarithm, as
            predictions are, see :mod:`bayes_lora.infer.elbo`; needs several particles.
        context: a function that makes a context manager, such as an effect handler, inside which model and guide run;
            by default ``model.context``, if the model has one.
        elbo: any Pyro ELBO; by default :class:`bayes_lora.infer.elbo.AnalyticELBO`, which computes divergences in
            closed form if the families have one.
    """

    def __init__(
        self,
        model: Callable[..., Any],
        guide: Callable[..., Any],
        *,
        beta: float = 1.0,
        gamma: float | None = None,
        num_particles: int = 1,
        predictive: bool = False,
        context: Callable[[], AbstractContextManager[Any]] | None = None,
        elbo: ELBO | None = None,
    ) -> None:
        super().__init__()
        if num_particles < 1:
            raise ConfigError(f"num_particles: expected at least 1, got {num_particles}.")
        for name, value in (("beta", beta), ("gamma", beta if gamma is None else gamma)):
            if not value > 0:
                raise ConfigError(f"{name}: expected a positive number, got {value}.")
        self.target_beta, self.target_gamma = beta, beta if gamma is None else gamma
        self.beta, self.gamma = self.target_beta, self.target_gamma
        self.context: Callable[[], AbstractContextManager[Any]]
        self.context = getattr(model, "context", nullcontext) if context is None else context
        self.model: Any = model
        self.guide: Any = guide
        # Two plates: task and example.
        if elbo is None:
            settings: Any = {"max_plate_nesting": 2, "vectorize_particles": True, "predictive": predictive}
            elbo = AnalyticELBO(num_particles, **settings)
        elif predictive:
            raise ConfigError("predictive: expected no elbo as well. Pass AnalyticELBO(predictive=True) as elbo.")
        self.elbo: Any = elbo

    def forward(self, episode: Episode) -> Tensor:
        """Return the loss in nats, summed over the examples of the collection.

        Raises:
            SiteError: a parameter of a distribution is out of range, such as a scale that is not positive.
        """
        with self.running(), ScaleLatents(self.beta, self.gamma), LastSite() as last:
            try:
                loss: Tensor = self.elbo.differentiable_loss(self.model, self.guide, episode)
            except ValueError as error:  # raised when a distribution is made, which does not know its site
                if "to satisfy the constraint" not in str(error):
                    raise
                where = f"the site after {last.name!r}" if last.name else "the first site"
                raise SiteError(
                    f"{where}: {str(error).splitlines()[0]} A scale must be positive: apply exp or softplus to an "
                    "unconstrained parameter. If it is NaN, training diverged: lower the learning rate."
                ) from error
        return loss

    @contextmanager
    def running(self) -> Iterator[None]:
        """Enter ``context`` and :class:`ModuleParameters`, as running the model or the guide requires."""
        with ModuleParameters(), self.context():
            yield

    def anneal(self, fraction: float) -> None:
        """Set beta and gamma to this fraction of their target values."""
        self.beta, self.gamma = self.target_beta * fraction, self.target_gamma * fraction

    def terms(self, episode: Episode) -> dict[str, float]:
        """Return the terms of the loss for one draw, not scaled by beta and gamma, in nats over the collection.

        They are ``nll`` (scaled to N), ``kl.<site>`` per random site, and their sum ``kl``, which includes auxiliary
        sites of the guide.
        """
        with torch.no_grad(), self.running():
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
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put the module into evaluation mode (no dropout) inside the block."""
    before = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(before)
