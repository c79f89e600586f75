r"""An ELBO estimator with the values of Pyro's ``TraceMeanField_ELBO`` that needs less memory.

.. math:: \mathrm{ELBO} = \mathbb E_q[\log p(y \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z))

in nats, with the divergence in closed form if the two families have one. With ``predictive=True`` draws are averaged
inside the logarithm, over the S draws of each observation,

.. math:: \sum_j \log \tfrac1S \textstyle\sum_s p(y_j \mid z_s) - \mathrm{KL}(q(z) \,\|\, p(z))

as predictions are scored. It is no bound on the evidence, and does not punish a wide posterior of which only some draws
are right (PAC-m bound, Morningstar et al., arXiv 2010.09629). Pyro's estimator also computes the log-density
of every latent site, and keeps what its backward would need. With separate LoRA weights for every task of an episode,
that is the largest item in memory after the language model's activations.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro import poutine
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor

from bayes_lora.distributions.divergence import divergence
from bayes_lora.errors import ConfigError, SiteError, did_you_mean

__all__ = ["AnalyticELBO", "site_divergence"]


class AnalyticELBO(TraceMeanField_ELBO):
    """Same values and gradients as ``TraceMeanField_ELBO``, for the same models and guides.

    Log-densities are computed for observed sites, and for latent sites whose divergence has no closed form. Divergences
    of normals save only their parameters for backward. Nothing is read back from the device, whereas Pyro's estimator
    synchronises three times per step.

    .. warning:: As in Pyro, every latent site of the guide must be reparameterised, and the guide's dependencies must
       be among those of the model.

    Args:
        num_particles: draws of the latent variables that the loss averages over. With ``vectorize_particles=True`` and
            ``max_plate_nesting=2`` (the plates ``task`` and ``example``) they share one forward.
        predictive: whether the likelihoods of draws are averaged before the logarithm; needs ``vectorize_particles``
            and at least two particles.

    Attributes:
        nll: the part of the last loss that is the negative log-likelihood, nats, detached; the rest are divergences.

    Raises:
        ConfigError: ``predictive`` without several draws in one forward.
        NotImplementedError: a latent site of the guide is not reparameterised; the message names it.
    """

    def __init__(self, *args: Any, predictive: bool = False, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)  # type: ignore[no-untyped-call]
        self.predictive = predictive
        self.nll: Tensor | None = None
        if predictive and not (self.vectorize_particles and self.num_particles > 1):
            raise ConfigError(
                f"predictive: expected at least two particles in one forward, got num_particles={self.num_particles}, "
                f"vectorize_particles={self.vectorize_particles}. Raise objective.num_particles."
            )

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        unwrapped: Any = poutine.unwrap(guide)
        if isinstance(unwrapped, Messenger):  # a guide that runs the model itself
            guide(*args, **kwargs)
            model_trace, guide_trace = unwrapped.get_traces()  # type: ignore[attr-defined]
        else:
            guide_trace = poutine.trace(guide).get_trace(*args, **kwargs)
            model_trace = poutine.trace(poutine.replay(model, trace=guide_trace)).get_trace(*args, **kwargs)
        if is_validation_enabled():
            check_sites(model_trace, guide_trace)
            check_model_guide_match(model_trace, guide_trace, self.max_plate_nesting)
        model_trace, guide_trace = prune_subsample_sites(model_trace), prune_subsample_sites(guide_trace)
        if is_validation_enabled():
            _check_mean_field_requirement(model_trace, guide_trace)
        return model_trace, guide_trace

    def _differentiable_loss_particle(self, model_trace: Any, guide_trace: Any) -> tuple[Any, Any]:
        model_trace.compute_log_prob(lambda _, site: site["is_observed"])
        elbo: Any = 0.0
        for name, site in model_trace.nodes.items():
            if site["type"] == "sample":
                if site["is_observed"]:
                    observed = self._observed(name, site)
                    elbo = elbo + observed
                    if not name.startswith("phi."):
                        self._add_nll(observed)
                    _check_shape(site, site["log_prob"], self.max_plate_nesting)
                else:
                    elbo = elbo - site_divergence(name, guide_trace, model_trace, self.max_plate_nesting)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:  # auxiliary sites of the guide
                _check_reparameterised(name, site)
                elbo = elbo - _log_density(site).sum()
        loss = -elbo
        return loss.detach() if torch.is_tensor(loss) else loss, loss

    def _observed(self, name: str, site: Any) -> Any:
        """Return the log-likelihood of an observed site, summed over draws."""
        if not self.predictive or name.startswith("phi."):  # a factor of the prior is no observation
            return site["log_prob_sum"]
        each, draws = site["unscaled_log_prob"], -self.max_plate_nesting
        mean = each.logsumexp(draws, keepdim=True) - math.log(self.num_particles)
        return self.num_particles * scale_and_mask(mean, scale=site["scale"], mask=site["mask"]).sum()

    def _add_nll(self, observed: Any) -> None:
        part = -torch.as_tensor(observed).detach() / self.num_particles
        self.nll = part if self.nll is None else self.nll + part

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Return the loss in nats; its gradient is that of the negative ELBO."""
        self.nll = None
        traces: Any = self._get_traces(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        losses = [self._differentiable_loss_particle(*pair)[1] for pair in traces]
        loss: Tensor = sum(losses) / self.num_particles
        return loss


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Check that a guide and a model that was replayed against it have the same latent sites.

    Raises:
        SiteError: a site is missing in one of them, or the event shapes differ.
    """
    of_model, of_guide = (_latent(trace) for trace in (model_trace, guide_trace))
    for name in of_guide.keys() - of_model.keys():
        near = did_you_mean(name, of_model, list_all=True)
        raise SiteError(f"site {name!r}: sampled by the guide, but the model has no such site{near}.")
    for name, site in of_model.items():
        if name not in of_guide:
            near = did_you_mean(name, of_guide, list_all=True)
            raise SiteError(
                f"site {name!r}: sampled by the model but not by the guide{near}, so it would keep its prior."
            )
        expected, got = (tuple(one["fn"].event_shape) for one in (site, of_guide[name]))
        if expected != got:
            hint = " Add .to_event(3)." if len(got) < len(expected) else ""
            raise SiteError(
                f"site {name!r}: expected event shape {expected} as in the model, got {got} from the guide.{hint}"
            )


def _latent(trace: Any) -> dict[str, Any]:
    """Return the latent sites by name, without plates and auxiliary sites of the guide."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("is_auxiliary")
    }


def site_divergence(name: str, guide_trace: Any, model_trace: Any, max_plate_nesting: float) -> Tensor:
    """Return the KL of one site, scaled, masked and summed: in closed form if possible, otherwise of the draw."""
    q, p = guide_trace.nodes[name], model_trace.nodes[name]
    _check_reparameterised(name, q)

    try:
        found = divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return _log_density(q).sum() - _log_density(p).sum()
    found = torch.as_tensor(scale_and_mask(found, scale=q["scale"], mask=q["mask"])).expand(q["fn"].batch_shape)
    _check_shape(q, found, max_plate_nesting)
    return found.sum()


def _log_density(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, scale=site["scale"], mask=site["mask"])  # type: ignore[no-any-return]


def _check_reparameterised(name: str, site: Any) -> None:
    if not site["fn"].has_rsample:
        raise NotImplementedError(
            f"site {name!r}: expected a reparameterised distribution, got {site['fn']}. Use one with rsample (Normal, "
            "Delta, ...) in the guide, or pass elbo=pyro.infer.Trace_ELBO()."
        )


def _check_shape(site: Any, log_prob: Tensor, max_plate_nesting: float) -> None:
    if is_validation_enabled():
        check_site_shape({**site, "log_prob": log_prob}, max_plate_nesting)  # type: ignore[typeddict-item, arg-type]
