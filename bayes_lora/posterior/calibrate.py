r"""How wide the posterior should be: one factor on the standard deviations of q(phi | S), chosen on held-out tasks.

.. math:: w^* = \arg\min_w \; -\sum_{ij} \log \tfrac1S \sum_s p(y_{ij} \mid x_{ij}, \mu_i + w\, \sigma_i \epsilon_{is})

in nats. The ELBO averages log-probabilities over draws, which punishes every draw that is wrong; predictions average
probabilities, which rewards draws that disagree where the support says little. A posterior fitted by the one is
therefore too narrow for the other, the more so where beta is below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from pyro.distributions import Delta

from bayes_lora.episodes.episode import Episode
from bayes_lora.infer.objective import BetaELBO, evaluating
from bayes_lora.infer.predictive import held_out_nll
from bayes_lora.types import Guide
from bayes_lora.utils.seeding import seeded

__all__ = ["WIDTHS", "choose_width", "has_width"]

WIDTHS = (1.0, 1.4, 2.0, 2.8)


def choose_width(
    objective: BetaELBO,
    episodes: Sequence[Episode],
    *,
    widths: Sequence[float] = WIDTHS,
    num_draws: int = 5,
    seed: int = 0,
    on_width: Callable[[], None] | None = None,
) -> tuple[float, dict[float, float]]:
    """The width of least predictive NLL on held-out tasks, and the NLL (nats) of each; draws are common to all.

    Args:
        objective: the fitted model and guide.
        episodes: of tasks that were not trained on.
        widths: those compared.
        num_draws: S.
        seed: of the draws.
        on_width: called after each.
    """
    curve = {}
    for width in widths:
        with seeded(seed, episodes[0].input_ids.device):
            curve[width] = held_out_nll(objective, episodes, num_draws, width)
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
