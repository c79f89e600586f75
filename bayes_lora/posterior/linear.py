r"""Predictions with option scores that are linear in the weights: a normal distribution of scores for each query.

.. math:: f \mid S \sim \mathcal N\big(f(\phi_0) + J (\mu - \phi_0),\; J \Sigma J^\top\big), \qquad
    J = \nabla_\phi f(\phi_0)

for a normal posterior :math:`\mathcal N(\mu, \Sigma)` of the weights (Immer et al., arXiv 2008.08217). Draws of the
weights go through the whole network, where a posterior that is as wide as its prior in thousands of directions leaves
the range in which the network is linear. These scores do not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from bayes_lora.distributions.joint_normal import SiteNormal
from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.errors import ConfigError
from bayes_lora.infer.components import Components
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.infer.tangent import option_gradients
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.types import Distributions, Sites

__all__ = ["linear_scores"]

NUMBERS = 1 << 26
"""Derivatives of a batch: 256 MiB in float32."""


@torch.no_grad()
def linear_scores(
    lm: LanguageModel,
    phi: Distributions,
    shared: Sites,
    tasks: Sequence[Sequence[EncodedExample]],
    fixed_options: Sequence[bool] | None = None,
) -> list[LinearScores]:
    """Return the linear scores of each task's examples.

    Args:
        lm: the language model.
        phi: q(phi | support) per random site, of batch ``(T, 1)``.
        shared: values of the sites that all tasks share, ``(layers, out, in)``.
        tasks: the examples of each task.
        fixed_options: whether the biases of an option head apply to each task; by default as its examples have it.

    Raises:
        ConfigError: the posterior has components, or a distribution that is not normal.
    """
    if isinstance(phi, Components):
        raise ConfigError('predictive: expected "draws" for a posterior with components, got "linear".')
    origin = {site: _origin(site, fn) for site, fn in phi.items()}
    flags = [None] * len(tasks) if fixed_options is None else [[flag] for flag in fixed_options]
    return [
        _of_task(lm, phi, shared, origin, t, rows, flag)
        for t, (rows, flag) in enumerate(zip(tasks, flags, strict=True))
    ]


def _of_task(
    lm: LanguageModel,
    phi: Distributions,
    shared: Sites,
    origin: Sites,
    t: int,
    rows: Sequence[EncodedExample],
    fixed: Sequence[bool] | None,
) -> LinearScores:
    like = next(iter(origin.values()))
    options = max((row.num_options for row in rows), default=0)
    mean, covariance = like.new_zeros(len(rows), options), like.new_zeros(len(rows), options, options)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))  # similar lengths, for less padding
    weights = sum(value[0].numel() for value in origin.values())
    size = max(1, min(16, NUMBERS // max(1, weights * options)))
    here = {site: value[t : t + 1] for site, value in origin.items()}
    for start in range(0, len(rows), size):
        chosen = order[start : start + size]
        episode = collate([[rows[i] for i in chosen]], fixed_options=fixed).to(lm.device)
        [(_, scores, gradients)] = option_gradients(lm, episode, shared, here, size)
        scores, spread = _moments(scores.to(like.dtype), gradients, phi, origin, t)
        width = scores.shape[-1]
        places = torch.tensor(chosen, device=like.device)
        mean[places, :width], covariance[places, :width, :width] = scores, spread
    mask = torch.arange(options) < torch.tensor([row.num_options for row in rows])[:, None]
    free = torch.tensor([row.free_form for row in rows], dtype=torch.bool)
    return LinearScores(mean, covariance, mask.to(like.device), free.to(like.device))


def _moments(scores: Tensor, gradients: Sites, phi: Distributions, origin: Sites, t: int) -> tuple[Tensor, Tensor]:
    """Return mean ``(n, K)`` and covariance ``(n, K, K)`` of scores with derivatives ``(n, K, layers, out, in)``."""
    covariance: Any = 0.0
    seen: Any = 0.0
    inner = None
    for site, fn in phi.items():
        rows = gradients[site].flatten(2)
        scores = scores + rows @ (fn.mean[t] - origin[site][t]).flatten()
        if isinstance(fn, Delta):
            continue
        base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
        scaled = rows * base.scale[t].flatten()
        covariance = covariance + scaled @ scaled.mT
        if isinstance(fn, SiteNormal):
            seen, inner = seen + scaled @ fn.factor[t, 0].flatten(0, 2), fn.inner[t, 0]
    if inner is not None:
        covariance = covariance - seen @ inner @ seen.mT
    return scores, covariance + torch.zeros_like(scores[..., None] * scores[..., None, :])


def _origin(site: str, fn: Any) -> Tensor:
    """Return the point at which the scores of a site's weights are linearised, ``(T, 1, layers, out, in)``."""
    base = fn.base_dist if isinstance(fn, torch.distributions.Independent) else fn
    if not isinstance(base, torch.distributions.Normal | SiteNormal | Delta):
        raise ConfigError(
            f'predictive: expected a normal distribution or a point for site {site!r} of "linear" predictions, got '
            f'{fn}. Use predictive="draws".'
        )
    origin = getattr(fn, "origin", None)
    found: Tensor = fn.mean if origin is None else origin
    return found
