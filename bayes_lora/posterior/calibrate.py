r"""Calibration on held-out tasks: how wide the posterior should be, or how sure a point.

The **width** is one factor on the standard deviations of q(phi | S):

.. math:: w^* = \arg\min_w \; -\sum_{ij} \log \tfrac1S \sum_s p(y_{ij} \mid x_{ij}, \mu_i + w\, \sigma_i \epsilon_{is})

in nats. The ELBO averages log-probabilities over draws, which punishes every draw that is wrong; predictions average
probabilities, which rewards draws that disagree where the support says little. A posterior fitted by the one is
therefore too narrow for the other, the more so where beta is below 1.

The **temperature** is one divisor of the option scores (Guo et al., arXiv 1706.04599):

.. math:: \tau^* = \arg\min_\tau \; -\sum_{ij} \log \tfrac1S \sum_s \mathrm{softmax}(\ell_{ijs} / \tau)_{y_{ij}}

in nats. A point has no width; a temperature is what can make it less sure of itself, of all questions alike. Free
answers have none: see :func:`bayes_lora.infer.predictive.tempered`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.distributions import Delta
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.infer.predictive import draw_phi, held_out_nll, predictive, tempered
from bayes_lora.types import Guide
from bayes_lora.utils.processes import share
from bayes_lora.utils.seeding import seeded

__all__ = ["TEMPERATURES", "WIDTHS", "choose_temperature", "choose_width", "has_width"]

WIDTHS = (1.0, 1.4, 2.0, 2.8)
TEMPERATURES = tuple(round(0.7 * 1.05**i, 4) for i in range(50))  # to 7.6; scores of absent options stay finite


def choose_width(
    objective: BetaELBO,
    episodes: Sequence[Episode],
    *,
    widths: Sequence[float] = WIDTHS,
    num_draws: int = 5,
    seed: int = 0,
    on_width: Callable[[], None] | None = None,
    shared: bool = False,
) -> tuple[float, dict[float, float]]:
    """Return the width with the lowest predictive NLL on held-out tasks, and the NLL (nats) at each width.

    Args:
        objective: the fitted model and guide.
        episodes: episodes of tasks that were not trained on.
        widths: the candidates.
        num_draws: number of draws, S; the same for all widths.
        seed: random seed of the draws.
        on_width: called after each width.
        shared: whether the processes of a fit divide the episodes, see :mod:`bayes_lora.utils.processes`.
    """
    curve = {}
    for width in widths:
        with seeded(seed, episodes[0].input_ids.device):
            curve[width] = held_out_nll(objective, episodes, num_draws, width, shared=shared)
        if on_width:
            on_width()
    return min(curve, key=curve.__getitem__), curve


def has_width(objective: BetaELBO, episode: Episode) -> bool:
    """Whether q(phi | support) has a standard deviation to scale: samples and points have none."""
    guide = objective.guide
    if not isinstance(guide, Guide):
        return True  # one that samples by itself: its sites are scaled as they are sampled
    with objective.running(), evaluating(objective), torch.no_grad(), seeded(0, episode.mask.device):
        _, posterior = guide.amortized(episode.support)
    return any(not isinstance(fn, Delta) for fn in posterior.values())


@torch.no_grad()
def choose_temperature(
    objective: BetaELBO, episodes: Sequence[Episode], *, num_draws: int = 1, seed: int = 0, shared: bool = False
) -> tuple[float, dict[float, float]]:
    """Return the temperature with the lowest predictive NLL on held-out tasks, and the NLL (nats) at each temperature.

    Args:
        objective: the fitted model and guide; the posterior is the amortized one.
        episodes: episodes of tasks that were not trained on.
        num_draws: number of draws, S.
        seed: random seed of the draws.
        shared: whether the processes of a fit divide the episodes, see :mod:`bayes_lora.utils.processes`.
    """
    model: Any = objective.model

    def total(episode: Episode) -> Tensor:
        with objective.running(), evaluating(objective), seeded(seed, episode.input_ids.device):
            scores = model.likelihood(draw_phi(model, objective.guide, episode, num_draws), episode)
        ways = torch.tensor(TEMPERATURES, dtype=scores.dtype, device=scores.device).view(1, -1, 1, 1, 1)
        log_probs = predictive(tempered(scores[:, None], episode, ways))  # (temperatures, T, N, K)
        answer = episode.answer.expand(log_probs.shape[:-1])[..., None]
        nll = -log_probs.gather(-1, answer)[..., 0] * episode.mask
        return (nll.sum(-1) / episode.mask.sum(-1)).sum(-1).double().cpu()

    totals = share(total, episodes) if shared else [total(episode) for episode in episodes]
    count = sum(len(episode.mask) for episode in episodes)
    curve = dict(zip(TEMPERATURES, (torch.stack(totals).sum(0) / count).tolist(), strict=True))
    # If all held-out tasks have generated answers, every temperature gives the same NLL: 1 is chosen.
    return min(curve, key=lambda one: (curve[one], abs(math.log(one)))), curve
