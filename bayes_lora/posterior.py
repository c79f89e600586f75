"""Posteriors: of a fitted (model, guide) pair, and of single tasks; draws, predictions, refinement by gradients."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.guides.theta import attribute
from bayes_lora.language_model import LanguageModel
from bayes_lora.metrics import Metrics, compute_metrics
from bayes_lora.objective import BetaELBO
from bayes_lora.tasks.episode import Episode, collate
from bayes_lora.tasks.task import Example, Task
from bayes_lora.types import Sites

__all__ = ["TaskPosterior", "adapt", "draw_phi", "predictive"]


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


def predictive(log_lik: Tensor) -> Tensor:
    r"""Posterior predictive log-probabilities: :math:`\log \frac1S \sum_s \mathrm{softmax}(\ell_s)`.

    Args:
        log_lik: option scores ``(S, ..., K)``, nats.

    Returns:
        ``(..., K)``, nats.
    """
    return torch.logsumexp(log_lik.log_softmax(-1), 0) - torch.tensor(float(len(log_lik))).log()


@dataclass(frozen=True)
class TaskPosterior:
    """q(phi | support) of T tasks: independent normals, elementwise.

    Attributes:
        lm: the language model.
        loc: per LoRA site ``(T, 1, layers, out, in)`` (size 1 for T where the site is shared by all tasks).
        scale: likewise, for the random sites alone.
        names: the tasks' names.
    """

    lm: LanguageModel
    loc: Sites
    scale: Sites
    names: tuple[str, ...]

    def draw(self, num_draws: int, *, seed: int = 0) -> Sites:
        """Draw phi: ``(num_draws, T, 1, layers, out, in)``; the same draws for the same seed."""
        if num_draws < 1:
            raise ConfigError(f"num_draws: expected at least 1, got {num_draws}.")
        generator = torch.Generator().manual_seed(seed)
        phi = dict(self.loc)
        for site, scale in self.scale.items():
            # Drawn on the CPU, so that a seed means the same on every device.
            noise = torch.randn(num_draws, *scale.shape, generator=generator, dtype=scale.dtype)
            phi[site] = self.loc[site] + scale * noise.to(scale.device)
        return phi

    @torch.no_grad()
    def predict(
        self, queries: Sequence[Sequence[Example]], *, num_draws: int = 10, seed: int = 0, batch_size: int = 64
    ) -> list[Tensor]:
        """Posterior predictive log-probabilities of each task's query examples, nats.

        Args:
            queries: per task, its examples (their gold answers are not used).
            num_draws: S; 0 predicts with the posterior mean.
            seed: of the draws, which are the same for all examples: a draw is one coherent model.
            batch_size: examples per task and forward.

        Returns:
            Per task ``(len(query), K)``, with the dtype's lowest value where an option is absent.
        """
        if len(queries) != len(self.names):
            raise TaskError(f"expected one list of examples for each of {len(self.names)} tasks, got {len(queries)}.")
        phi = self.draw(num_draws, seed=seed) if num_draws else self.loc
        encoded = [self.lm.encoder(query) for query in queries]
        pieces: list[list[Tensor]] = [[] for _ in queries]
        for start in range(0, max(map(len, encoded)), batch_size):
            batch = [(i, rows[start : start + batch_size]) for i, rows in enumerate(encoded) if len(rows) > start]
            index = torch.tensor([i for i, _ in batch], device=self.lm.device)
            episode = collate([rows for _, rows in batch], num_support=0).to(self.lm.device)
            some = {site: v if v.shape[-5] == 1 else v.index_select(-5, index) for site, v in phi.items()}
            log_lik = self.lm(some, episode)
            log_probs = predictive(log_lik if num_draws else log_lik[None])
            for (i, rows), values in zip(batch, log_probs, strict=True):
                pieces[i].append(values[: len(rows)])
        return [_cat(parts) for parts in pieces]

    def evaluate(
        self, queries: Sequence[Sequence[Example]], *, num_draws: int = 10, seed: int = 0
    ) -> dict[str, Metrics]:
        """Metrics per task on labelled query examples."""
        predictions = self.predict(queries, num_draws=num_draws, seed=seed)
        return {name: score(q, p) for name, q, p in zip(self.names, queries, predictions, strict=True)}


def score(examples: Sequence[Example], log_probs: Tensor) -> Metrics:
    """Metrics of predictive log-probabilities ``(N, K)`` against the examples' gold answers."""
    answer = torch.tensor([example.answer for example in examples])
    counts = torch.tensor([len(example.options) for example in examples])
    mask = torch.arange(log_probs.shape[-1]) < counts[:, None]
    return compute_metrics(log_probs.cpu(), answer, mask)


def _cat(parts: Iterable[Tensor]) -> Tensor:
    parts = list(parts)
    width = max(part.shape[-1] for part in parts)
    lowest = torch.finfo(parts[0].dtype).min / 2
    return torch.cat([nn.functional.pad(p, (0, width - p.shape[-1]), value=lowest) for p in parts])


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
        return dist.Normal(loc, log_scale.exp()).to_event(3)

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
        seed: of the draws inside the steps.
    """
    episode = collate([lm.encoder(task.support) for task in tasks], num_support=max(len(t.support) for t in tasks))
    episode = episode.to(lm.device)
    model, guide = objective.model.program, objective.guide.program
    was_training = objective.training
    objective.eval()
    with torch.no_grad(), AtMean():
        trace = pyro.poutine.trace(guide).get_trace(episode)
    sites = {name: node for name, node in trace.nodes.items() if node["type"] == "sample"}
    theta = {name: node["value"] for name, node in sites.items() if name.startswith("theta.")}
    phi = {name: node["fn"] for name, node in sites.items() if name.startswith("phi.")}
    refined = _Refined(theta, phi)
    if steps:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            _descend(BetaELBO(model, refined, beta=objective.full_beta), refined, episode, steps, learning_rate)
    objective.train(was_training)
    with torch.no_grad():
        normals = {name.removeprefix("phi."): refined.normal(name) for name in refined.sites}
        prefix = "theta.loc."
        loc = {name.removeprefix(prefix): value for name, value in theta.items() if name.startswith(prefix)}
        loc = {site: value.expand(1, 1, *value.shape[-3:]) for site, value in loc.items()}
        loc |= {site: normal.mean for site, normal in normals.items()}
        scale = {site: normal.stddev for site, normal in normals.items()}
    return TaskPosterior(lm, loc, scale, tuple(task.name for task in tasks))


def _descend(objective: BetaELBO, refined: _Refined, episode: Episode, steps: int, learning_rate: float) -> None:
    parameters = list(refined.parameters())
    optimizer = torch.optim.Adam(parameters, lr=learning_rate)
    for _ in range(steps):
        gradients = torch.autograd.grad(objective(episode), parameters)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
