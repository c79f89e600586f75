"""From a fitted guide to the posterior of a new task: one pass, then K gradient steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import nn

from bayes_lora.errors import NonFiniteLoss
from bayes_lora.guides.theta import attribute
from bayes_lora.language_model import LanguageModel
from bayes_lora.objective import BetaELBO, evaluating
from bayes_lora.seeding import seeded
from bayes_lora.task_posterior import TaskPosterior
from bayes_lora.tasks.episode import Episode, collate
from bayes_lora.tasks.task import Task
from bayes_lora.types import Sites

__all__ = ["AtMean", "adapt", "draw_phi"]


class AtMean(Messenger):
    """Effect handler: every latent site takes the mean of its distribution."""

    def _pyro_sample(self, msg: Any) -> None:
        if not msg["is_observed"] and not msg["done"] and hasattr(msg["fn"], "mean"):
            msg["value"], msg["done"] = msg["fn"].mean, True


def draw_phi(model: Any, guide: Callable[..., Any], episode: Episode, num_draws: int) -> Sites:
    """Draw phi from q(theta) q(phi | support): ``(num_draws, T, 1, layers, out, in)``, for any guide."""
    with torch.no_grad(), pyro.plate("draws", num_draws, dim=-3):
        trace = pyro.poutine.trace(guide).get_trace(episode)
        phi: Sites = pyro.poutine.replay(model.sample_phi, trace=trace)(episode)
    return phi


class _Refined(PyroModule):
    """A guide whose q(phi) starts at given normals and is free; theta stays at a point."""

    def __init__(self, theta: Sites, phi: dict[str, dist.TorchDistribution]) -> None:
        super().__init__()
        self.point, self.sites = theta, [name for name in phi]
        for name, normal in phi.items():
            setattr(self, attribute("loc", name), nn.Parameter(normal.mean.detach().clone()))
            setattr(self, attribute("log_scale", name), nn.Parameter(normal.stddev.detach().log()))

    def normal(self, name: str) -> dist.TorchDistribution:
        loc, log_scale = getattr(self, attribute("loc", name)), getattr(self, attribute("log_scale", name))
        normal: dist.TorchDistribution = dist.Normal(loc, log_scale.exp()).to_event(3)
        return normal

    def forward(self, episode: Episode) -> Sites:
        values = {name: pyro.sample(name, dist.Delta(value, event_dim=3)) for name, value in self.point.items()}
        with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
            return values | {name: pyro.sample(name, self.normal(name)) for name in self.sites}


def adapt(
    objective: BetaELBO,
    lm: LanguageModel,
    tasks: Sequence[Task],
    *,
    steps: int = 0,
    learning_rate: float = 2e-3,
    width: float = 1.0,
    seed: int = 0,
) -> TaskPosterior:
    """The posterior of each task given its support: the guide's one pass, then gradient steps.

    With ``steps > 0`` the guide's normals become free parameters, and Adam takes ``steps`` steps on the negative
    beta-ELBO of the support set, theta held at its mean; all tasks in one batched forward and backward per step.

    Args:
        objective: the fitted model and guide with their beta.
        lm: the language model.
        tasks: their ``support`` is read, nothing else.
        steps: K.
        learning_rate: Adam's, for loc and log scale.
        width: factor on the standard deviations in the end, see :mod:`bayes_lora.width`.
        seed: of the draws inside the steps.
    """
    episode = collate([lm.encoder(task.support) for task in tasks]).to(lm.device)
    model, guide = objective.model.program, objective.guide.program
    with evaluating(objective), torch.no_grad(), AtMean():
        trace = pyro.poutine.trace(guide).get_trace(episode)
    sites: dict[str, Any] = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    theta: Sites = {name: node["value"] for name, node in sites.items() if name.startswith("theta.")}
    phi = {name: node["fn"] for name, node in sites.items() if name.startswith("phi.")}
    refined = _Refined(theta, phi)
    if steps:
        with evaluating(objective), seeded(seed, lm.device):
            _descend(BetaELBO(model, refined, beta=objective.full_beta), refined, episode, steps, learning_rate)
    with torch.no_grad():
        normals = {name.removeprefix("phi."): refined.normal(name) for name in refined.sites}
        prefix = "theta.loc."
        loc = {name.removeprefix(prefix): value for name, value in theta.items() if name.startswith(prefix)}
        loc = {site: value.expand(1, 1, *value.shape[-3:]) for site, value in loc.items()}
        # Contiguous, as they come back from a file: another layout would take other kernels, and round differently.
        loc |= {site: normal.mean.contiguous() for site, normal in normals.items()}
        scale = {site: (width * normal.stddev).contiguous() for site, normal in normals.items()}
    return TaskPosterior(lm, loc, scale, tuple(task.name for task in tasks))


def _descend(objective: BetaELBO, refined: _Refined, episode: Episode, steps: int, learning_rate: float) -> None:
    parameters = list(refined.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for step in range(steps):
        gradients = torch.autograd.grad(objective(episode), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        broken = [name for name, value in refined.named_parameters() if not value.isfinite().all()]
        if broken:
            raise NonFiniteLoss(f"step {step} of adaptation: {broken[:3]} are not finite. Try a lower learning_rate.")
