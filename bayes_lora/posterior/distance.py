r"""How far the posterior of each task is from the prior, layer by layer.

.. math:: \sum_{w} \mathrm{KL}\big(\mathcal N(\mu_w, \sigma_w^2) \,\|\, \mathcal N(m_w, s_w^2)\big)

over the weights w of a layer, in nats, with the marginal mean and standard deviation of each weight under the posterior
and under p(phi | theta) at the mean of q(theta). Correlations are left out, so that the numbers can be added up over
layers; where weights are correlated or not normal, this is not the divergence of the joint distributions.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError
from bayes_lora.types import factor_sites

if TYPE_CHECKING:
    import pandas as pd

    from bayes_lora.posterior.task_posterior import TaskPosterior

__all__ = ["distance_from_prior"]

POINTS = "sites that are points have no rows"
COLUMNS = ("task", "site", "module", "kl", "posterior_sd", "prior_sd", "shift")


@torch.no_grad()
def distance_from_prior(adapted: TaskPosterior) -> pd.DataFrame:
    """See :meth:`TaskPosterior.distance_from_prior`."""
    import pandas as pd

    random = adapted.distributions()
    missing = sorted(random.keys() - adapted.prior.keys())
    if missing:
        raise ConfigError(
            f"distance_from_prior: the prior of site {missing[0]!r} is not known. Adapt with Posterior.adapt, or pass "
            "prior= to TaskPosterior."
        )
    rows, notes = [], [POINTS] if len(random) < len(adapted.phi) else []
    for site, q in random.items():
        mean, sd = _moments(q)
        prior_mean, prior_sd = (value.expand(mean.shape) for value in _moments(adapted.prior[site]))
        shift = (mean - prior_mean) / prior_sd
        kl = 0.5 * ((sd / prior_sd).square() + shift.square() - 1.0) - (sd / prior_sd).log()
        flat = ~prior_sd.isfinite()
        shift, kl = shift.masked_fill(flat, torch.nan), kl.masked_fill(flat, torch.nan)
        if bool(flat.any()):
            notes.append(f"kl, shift of {site}: the prior has no finite standard deviation")
        elif not bool(kl.isfinite().all()):
            notes.append(f"kl of {site}: a weight of the posterior, or of the prior, is a point")
        for t, task in enumerate(adapted.names):
            for layer, module in enumerate(_modules(adapted, site)):
                at = (t, 0, layer)
                numbers = kl[at].sum(), sd[at].mean(), prior_sd[at].mean(), shift[at].square().mean().sqrt()
                rows.append((task, site, module, *map(float, numbers)))
    frame = pd.DataFrame(rows, columns=COLUMNS)
    frame.attrs["notes"] = notes
    return frame


def _modules(adapted: TaskPosterior, site: str) -> list[str]:
    """Return the name of each layer's module; that of the site, if it belongs to none."""
    sites = adapted.lm.sites
    factor = factor_sites(site)[0] if site in sites.delta_shapes else site
    return sites.modules.get(factor, [site])


def _moments(fn: Any) -> tuple[Tensor, Tensor]:
    """Return mean and standard deviation, ``(T or 1, 1, layers, out, in)``; those of the mixture for components."""
    mean, variance = fn.mean.double(), fn.variance.double()
    if mean.ndim == 6:
        mean, variance = mean.mean(0), variance.mean(0) + mean.var(0, correction=0)
    while mean.ndim < 5:
        mean, variance = mean[None], variance[None]
    return mean, variance.sqrt()
