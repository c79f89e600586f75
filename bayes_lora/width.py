r"""How wide the posterior should be: one factor on the standard deviations of q(phi | S), chosen on held-back tasks.

.. math:: w^* = \arg\min_w \; -\sum_{ij} \log \tfrac1S \sum_s p(y_{ij} \mid x_{ij}, \mu_i + w\, \sigma_i \epsilon_{is})

in nats. The ELBO averages log-probabilities over draws, which punishes every draw that is wrong; predictions average
probabilities, which rewards draws that disagree where the support says little. A posterior fitted by the one is
therefore too narrow for the other, the more so where beta is below 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from pyro.poutine.messenger import Messenger
from torch import Tensor

from bayes_lora.adaptation import draw_phi
from bayes_lora.errors import ConfigError
from bayes_lora.evaluation import predictive
from bayes_lora.families import widened
from bayes_lora.objective import BetaELBO, evaluating
from bayes_lora.seeding import seeded
from bayes_lora.tasks.episode import Episode

__all__ = ["WIDTHS", "Widened", "choose_width", "held_back_nll"]

WIDTHS = (1.0, 1.4, 2.0, 2.8)


class Widened(Messenger):
    """Effect handler: the standard deviation of every ``phi.*`` site is multiplied by ``width``.

    Around a guide, it draws from the widened q(phi | S). Families for which ``bayes_lora.families.widened`` is not
    registered, points among them, stay as they are.
    """

    def __init__(self, width: float) -> None:
        super().__init__()
        if not width > 0:
            raise ConfigError(f"width: expected a positive number, got {width}.")
        self.width = width

    def _pyro_sample(self, msg: Any) -> None:
        if msg["name"].startswith("phi.") and not msg["done"]:
            msg["fn"] = widened(msg["fn"], self.width)


def held_back_nll(objective: BetaELBO, episodes: Sequence[Episode], num_draws: int, width: float = 1.0) -> float:
    """Mean predictive NLL (nats) of the scored examples after one pass over the support, averaged over tasks."""
    total, count = 0.0, 0
    model = objective.model.program
    for episode in episodes:
        with objective.handled(), evaluating(objective), torch.no_grad(), Widened(width):
            phi = draw_phi(model, objective.guide.program, episode, num_draws)
        with torch.no_grad():
            log_probs: Tensor = predictive(model.likelihood(phi, episode))
        nll = -log_probs.gather(-1, episode.answer[..., None])[..., 0]
        total += float(((nll * episode.mask).sum(-1) / episode.mask.sum(-1)).sum())
        count += len(nll)
    return total / count


def choose_width(
    objective: BetaELBO,
    episodes: Sequence[Episode],
    *,
    widths: Sequence[float] = WIDTHS,
    num_draws: int = 5,
    seed: int = 0,
    on_width: Callable[[], None] | None = None,
) -> tuple[float, dict[float, float]]:
    """The width of least predictive NLL on held-back tasks, and the NLL (nats) of each; draws are common to all.

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
            curve[width] = held_back_nll(objective, episodes, num_draws, width)
        if on_width:
            on_width()
    return min(curve, key=curve.__getitem__), curve
