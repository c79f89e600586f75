r"""An ELBO estimator that holds on to no more than it needs: Pyro's ``TraceMeanField_ELBO`` with less memory.

.. math:: \mathrm{ELBO} = \mathbb E_q[\log p(y \mid z)] - \mathrm{KL}(q(z) \,\|\, p(z))

in nats, with the divergence in closed form where the two families have one. Pyro's estimator computes the log-density
of every latent site besides, and keeps what backward would need of it; with LoRA weights of their own for every task of
an episode that is the largest thing in memory after the language model's activations.
"""

from __future__ import annotations

from typing import Any

import torch
from pyro import poutine
from pyro.distributions import Normal, Unit
from pyro.distributions.util import scale_and_mask
from pyro.infer import TraceMeanField_ELBO
from pyro.infer.trace_mean_field_elbo import _check_mean_field_requirement
from pyro.infer.util import is_validation_enabled
from pyro.poutine.messenger import Messenger
from pyro.poutine.subsample_messenger import _Subsample
from pyro.poutine.util import prune_subsample_sites
from pyro.util import check_model_guide_match, check_site_shape
from torch import Tensor
from torch.distributions import kl_divergence

from bayes_lora.errors import ConfigError, SiteError, did_you_mean

__all__ = ["AnalyticELBO", "ScaleLatents", "divergence", "site_divergence"]


class ScaleLatents(Messenger):
    """Effect handler: scales log-densities of ``phi.*`` sites by beta, of ``theta.*`` sites by gamma; factors too.

    Around the model *and* the guide it scales their Kullback-Leibler divergence, in every Pyro ELBO. What a guide
    samples for all latent variables together, as Pyro's autoguides do, is scaled by beta.

    Raises:
        ConfigError: there is such a site, and gamma is not beta.
    """

    def __init__(self, beta: float | Tensor, gamma: float | Tensor) -> None:
        super().__init__()
        self.scales = {"phi": beta, "theta": gamma}

    def _pyro_sample(self, msg: Any) -> None:
        prefix = msg["name"].partition(".")[0]
        # One that a guide names a part of phi or theta is that alone.
        if msg["infer"].get("is_auxiliary") and not msg["is_observed"] and prefix not in self.scales:
            if self.scales["phi"] != self.scales["theta"]:
                raise ConfigError(
                    f"gamma: expected beta, {self.scales['phi']}, for site {msg['name']!r} stands for phi and theta "
                    f"together; got {self.scales['theta']}."
                )
            prefix = "phi"
        # A pyro.factor of theta or phi is observed, yet none of the data.
        if prefix in self.scales and (not msg["is_observed"] or isinstance(msg["fn"], Unit)):
            msg["scale"] = msg["scale"] * self.scales[prefix]


class AnalyticELBO(TraceMeanField_ELBO):
    """The estimator of ``TraceMeanField_ELBO``: the same values and gradients, for the same models and guides.

    Log-densities are computed for observed sites, and for latent ones whose divergence has no closed form. Divergences
    of normals keep their parameters alone. Nothing is read back from the device, where Pyro's estimator waits for it
    three times a step.

    .. warning:: As in Pyro, every latent site of the guide must be reparameterised, and the guide's dependencies must
       be among the model's.

    Args:
        num_particles: draws of the latent variables that the loss averages over; with ``vectorize_particles=True`` and
            ``max_plate_nesting=2`` (the two plates of our models) they share one forward.

    Raises:
        NotImplementedError: a latent site of the guide is not reparameterised; names it.
    """

    def _get_trace(self, model: Any, guide: Any, args: Any, kwargs: Any) -> tuple[Any, Any]:
        unwrapped: Any = poutine.unwrap(guide)
        if isinstance(unwrapped, Messenger):  # one that runs the model itself
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
                    elbo = elbo + site["log_prob_sum"]
                    _check_shape(site, site["log_prob"], self.max_plate_nesting)
                else:
                    elbo = elbo - site_divergence(name, guide_trace, model_trace, self.max_plate_nesting)
        for name, site in guide_trace.nodes.items():
            if site["type"] == "sample" and name not in model_trace.nodes:  # auxiliary sites of the guide
                _check_reparameterised(name, site)
                elbo = elbo - _log_density(site).sum()
        loss = -elbo
        return loss.detach() if torch.is_tensor(loss) else loss, loss

    def differentiable_loss(self, model: Any, guide: Any, *args: Any, **kwargs: Any) -> Tensor:
        """The loss in nats, whose gradient is that of the negative ELBO."""
        traces: Any = self._get_traces(model, guide, args, kwargs)  # type: ignore[no-untyped-call]
        losses = [self._differentiable_loss_particle(*pair)[1] for pair in traces]
        loss: Tensor = sum(losses) / self.num_particles
        return loss


def check_sites(model_trace: Any, guide_trace: Any) -> None:
    """Compare the latent sites of a guide with those of a model that was replayed against it.

    Raises:
        SiteError: one has a site that the other lacks, or of another event shape.
    """
    of_model, of_guide = (_latent(trace) for trace in (model_trace, guide_trace))
    for name in of_guide.keys() - of_model.keys():
        near = did_you_mean(name, of_model, list_all=True)
        raise SiteError(f"site {name!r}: the guide samples it, the model has no such site{near}.")
    for name, site in of_model.items():
        if name not in of_guide:
            near = did_you_mean(name, of_guide, list_all=True)
            raise SiteError(f"site {name!r}: the model samples it, the guide does not{near}; it would keep its prior.")
        expected, got = (tuple(one["fn"].event_shape) for one in (site, of_guide[name]))
        if expected != got:
            hint = " Add .to_event(3)." if len(got) < len(expected) else ""
            expected_here = f"expected event shape {expected} as in the model, the guide has {got}"
            raise SiteError(f"site {name!r}: {expected_here}.{hint}")


def _latent(trace: Any) -> dict[str, Any]:
    """All but plates, and what a guide samples for itself."""
    return {
        name: site
        for name, site in trace.nodes.items()
        if site["type"] == "sample"
        and not site["is_observed"]
        and not isinstance(site["fn"], _Subsample)
        and not site["infer"].get("is_auxiliary")
    }


def site_divergence(name: str, guide_trace: Any, model_trace: Any, max_plate_nesting: float) -> Tensor:
    """KL of one site, scaled, masked and summed: in closed form, or else of the draw."""
    q, p = guide_trace.nodes[name], model_trace.nodes[name]
    _check_reparameterised(name, q)

    try:
        found = divergence(q["fn"], p["fn"])
    except NotImplementedError:
        return _log_density(q).sum() - _log_density(p).sum()
    found = torch.as_tensor(scale_and_mask(found, scale=q["scale"], mask=q["mask"])).expand(q["fn"].batch_shape)
    _check_shape(q, found, max_plate_nesting)
    return found.sum()


def divergence(q: Any, p: Any) -> Tensor:
    """KL(q || p) in nats, of the batch shape; of normals (to any event) it keeps their parameters alone for backward.

    Where p has none in closed form, but a bound of its own, ``divergence_from(q)``, it is that.

    Raises:
        NotImplementedError: it has no closed form.
    """
    if hasattr(p, "divergence_from"):
        bound: Tensor = p.divergence_from(q)
        return bound
    # Independent alone is unwrapped: what masks or transforms a normal has another divergence.
    normals = [fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn for fn in (q, p)]
    if all(type(fn) is Normal for fn in normals) and len(q.event_shape) == len(p.event_shape):
        (one, other), events = normals, len(q.event_shape)
        each: Tensor = _NormalDivergence.apply(one.loc, one.scale, other.loc, other.scale)  # type: ignore[no-untyped-call]
        return each.sum(tuple(range(-events, 0))) if events else each
    return kl_divergence(q, p)


class _NormalDivergence(torch.autograd.Function):
    """KL of normals, elementwise: backward computes anew what torch's own would have kept of it, eight tensors."""

    @staticmethod
    def forward(ctx: Any, loc: Tensor, scale: Tensor, prior_loc: Tensor, prior_scale: Tensor) -> Tensor:
        ctx.save_for_backward(loc, scale, prior_loc, prior_scale)
        ratio = scale / prior_scale
        shift = (loc - prior_loc).div_(prior_scale)
        return (ratio.square() + shift.square_()).sub_(1.0).mul_(0.5).sub_(ratio.log())

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        (gradient,) = gradients
        loc, scale, prior_loc, prior_scale = ctx.saved_tensors
        ratio, shift, weighed = scale / prior_scale, (loc - prior_loc) / prior_scale, gradient / prior_scale
        of_loc = weighed * shift
        of_prior_scale = weighed * (1.0 - ratio.square() - shift.square())
        return (
            of_loc.sum_to_size(loc.shape),
            (weighed * (ratio - ratio.reciprocal())).sum_to_size(scale.shape),
            -of_loc.sum_to_size(prior_loc.shape),
            of_prior_scale.sum_to_size(prior_scale.shape),
        )


def _log_density(site: Any) -> Tensor:
    log_prob = site["fn"].log_prob(site["value"], *site["args"], **site["kwargs"])
    return scale_and_mask(log_prob, scale=site["scale"], mask=site["mask"])  # type: ignore[no-any-return]


def _check_reparameterised(name: str, site: Any) -> None:
    if not site["fn"].has_rsample:
        raise NotImplementedError(
            f"site {name!r}: expected a reparameterised distribution, got {site['fn']}. Give its guide one that has "
            "rsample (Normal, Delta, ...), or pass elbo=pyro.infer.Trace_ELBO()."
        )


def _check_shape(site: Any, log_prob: Tensor, max_plate_nesting: float) -> None:
    if is_validation_enabled():
        check_site_shape({**site, "log_prob": log_prob}, max_plate_nesting)  # type: ignore[typeddict-item, arg-type]
