"""A problem whose posterior is known: a linear "language model" with Gaussian noise, its A fixed, its B random.

    b_i ~ N(mu, tau^2) elementwise,   y_ij | x_ij, b_i ~ N(b_i . A x_ij, noise^2)

Given mu, the posterior of b_i is N(m_i, P_i^-1) with P_i = F_i^T F_i / noise^2 + 1 / tau^2, F_i = X_i A^T.
"""

import math
from dataclasses import dataclass, fields

import pyro
import pyro.distributions as dist
import torch

from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.episodes import Episode, collate
from bayes_lora.episodes.packing import pack
from bayes_lora.models import HierarchicalNormal, WeightSpace
from bayes_lora.types import Features

SITE, RANK, WIDTH = "linear.lora_B", 2, 3
UPDATE = "linear.delta_weight"
TAU, NOISE, LOC_SCALE = 0.8, 0.7, 1.5
MU = torch.tensor([0.6, -0.4], dtype=torch.float64)
A = torch.tensor([[1.0, 0.5, -0.3], [0.2, -1.0, 0.8]], dtype=torch.float64)


@dataclass(frozen=True, eq=False)
class LinearEpisode(Episode):
    """An episode with inputs ``(T, N, d)`` and real answers ``(T, N)``."""

    x: torch.Tensor = None
    y: torch.Tensor = None

    def per_example(self, start=0, stop=None):
        return linear_episode(self.x.flatten(0, 1)[start:stop, None], self.y.flatten(0, 1)[start:stop, None])


def linear_episode(x, y, support=None, **kwargs):
    rows = [[pack([1, 2], [[3], [4]], 0)] * x.shape[1]] * len(x)
    plain = collate(rows, **kwargs)
    values = {field.name: getattr(plain, field.name) for field in fields(plain)}
    return LinearEpisode(**values | {"separate_support": support}, x=x, y=y)


class LinearLikelihood:
    """Means ``(..., T, N)``. Its features hold what a posterior depends on."""

    hidden_size = RANK + 3

    def __call__(self, phi, episode):
        return (phi[SITE][..., 0, 0, :] * (episode.x @ A.T)).sum(-1)

    def features(self, episode):
        f = episode.x @ A.T
        # Beside large constants, for the network normalises each example's features.
        large = torch.tensor([8.0, -8.0], dtype=f.dtype).expand(*f.shape[:2], 2)
        ends = torch.cat([f * episode.y[..., None], episode.y[..., None], large], -1)
        options = torch.ones(*episode.shape, self.hidden_size, dtype=f.dtype)
        return Features(torch.stack([ends, ends], -2), options, torch.zeros(episode.shape, dtype=f.dtype))


class LinearModel(HierarchicalNormal):
    """p(mu) p(b_i | mu) p(y | x, b_i), tau known."""

    def __init__(self):
        super().__init__(LinearLikelihood(), {SITE: MU.view(1, 1, RANK)}, loc_scale=LOC_SCALE)

    def initial_theta(self):
        return {f"theta.loc.{SITE}": self.initial[SITE]}

    def theta(self):
        prior = dist.Normal(torch.zeros(1, 1, RANK, dtype=torch.float64), self.loc_scale).to_event(3)
        return {f"theta.loc.{SITE}": pyro.sample(f"theta.loc.{SITE}", prior)}

    def phi_prior(self, theta):
        loc = theta[f"theta.loc.{SITE}"]
        return {SITE: dist.Normal(loc, torch.full_like(loc, TAU)).to_event(3)}

    def answer(self, log_lik):
        return dist.Normal(log_lik, NOISE)

    def answered(self, episode):
        return episode.y


class WholeLikelihood(LinearLikelihood):
    """The same for an update ``(1, r)`` of a weight that reads ``A x``; drawn, or deferred to each input."""

    def __call__(self, phi, episode):
        weight, f = phi[UPDATE], episode.x @ A.T
        if isinstance(weight, torch.Tensor):
            return (weight[..., 0, 0, :] * f).sum(-1)
        [layer] = weight.layers()
        *draws, tasks, _, _, _ = layer.shape
        each = DeferredWeight(*(value.flatten(0, -3) for value in layer))
        return each(f.repeat(math.prod(draws), 1, 1)).view(*draws, tasks, f.shape[1])


class LinearWeightSpace(WeightSpace):
    """p(mu) p(b_i | mu) p(y | x, b_i), mu and tau as products of factors."""

    def __init__(self):
        factors = {SITE.replace("B", "A"): MU.view(1, 1, RANK), SITE: torch.ones(1, 1, 1, dtype=MU.dtype)}
        super().__init__(WholeLikelihood(), factors, offset=TAU, rate=1e-9)

    def initial_theta(self):
        towards = torch.tensor([0.7, 0.5], dtype=MU.dtype).view(1, 1, RANK)  # all scales may shrink from there
        return super().initial_theta() | {"theta.scale.linear.lora_A": towards}

    answer, answered = LinearModel.answer, LinearModel.answered


def make_data(tasks=3, examples=6, orthogonal=False, seed=0):
    """Inputs, weights and answers drawn from the model; orthogonal features make a posterior's elements independent."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tasks, examples, WIDTH, generator=generator, dtype=torch.float64)
    if orthogonal:
        f, _ = torch.linalg.qr(torch.randn(tasks, examples, RANK, generator=generator, dtype=torch.float64))
        x = f * torch.tensor([2.5, 1.2], dtype=torch.float64) @ torch.linalg.pinv(A).T
    b = MU + TAU * torch.randn(tasks, RANK, generator=generator, dtype=torch.float64)
    y = ((x @ A.T) * b[:, None]).sum(-1)
    return x, b, y + NOISE * torch.randn(y.shape, generator=generator, dtype=torch.float64)


def exact_posterior(x, y, mu=MU):
    """Mean ``(T, r)`` and precision ``(T, r, r)`` of each b_i given mu."""
    f = x @ A.T
    precision = f.mT @ f / NOISE**2 + torch.eye(RANK, dtype=f.dtype) / TAU**2
    return torch.linalg.solve(precision, (f.mT @ y[..., None])[..., 0] / NOISE**2 + mu / TAU**2), precision


def log_evidence(x, y, mu=MU):
    """log p(y_i | x_i, mu) per task, nats."""
    f = x @ A.T
    covariance = NOISE**2 * torch.eye(x.shape[1], dtype=f.dtype) + TAU**2 * f @ f.mT
    return torch.distributions.MultivariateNormal((f @ mu), covariance).log_prob(y)


def exact_theta(x, y):
    """Mean and precision of mu given all tasks."""
    f = x @ A.T
    covariance = NOISE**2 * torch.eye(x.shape[1], dtype=f.dtype) + TAU**2 * f @ f.mT
    inverse = torch.linalg.inv(covariance)
    precision = torch.eye(RANK, dtype=f.dtype) / LOC_SCALE**2 + (f.mT @ inverse @ f).sum(0)
    return torch.linalg.solve(precision, (f.mT @ inverse @ y[..., None]).sum(0)[:, 0]), precision


def elbo(x, y, loc, scale, mu=MU):
    """ELBO of each task for q(b_i) = N(loc, scale^2) ``(T, r)``, in closed form, nats."""
    f = x @ A.T
    error = (y - (f * loc[:, None]).sum(-1)).square() + (f.square() * scale[:, None].square()).sum(-1)
    log_lik = (-error / (2 * NOISE**2) - torch.tensor(2 * torch.pi * NOISE**2).log() / 2).sum(-1)
    q, p = torch.distributions.Normal(loc, scale), torch.distributions.Normal(mu, TAU)
    return log_lik - torch.distributions.kl_divergence(q, p).sum(-1)
