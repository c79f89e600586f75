"""Gradient descent on the negative beta-ELBO of support sets, with all tasks in one batch."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any, Literal

import pyro
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_lora.distributions.unconstrained import Parameters, constrained, unconstrained
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.infer.elbo import AnalyticELBO
from bayes_lora.infer.handlers import ScaleLatents, isolated
from bayes_lora.infer.plates import sample_phi
from bayes_lora.types import Distributions, Sites

__all__ = ["Adam", "Descent", "SiteParameters", "constrained_sites", "minibatch", "unconstrained_sites"]

SiteParameters = dict[tuple[str, str], Tensor]
"""The unconstrained parameters of all sites: ``("loc", site)`` and ``("log_scale", site)`` for normals."""


class Descent:
    """Takes the gradient steps of :class:`bayes_lora.guides.GradientGuide`.

    Args:
        model: a Pyro model whose theta sites can be conditioned on.
        rate: function from a parameter's name and site to its step size.
        optimizer: ``"sgd"`` or ``"adam"``.
        beta: weight of the divergence.
        num_particles: draws per step.
        second: whether the displacement is differentiable with respect to theta and start.
        batch_size: examples of each support set per step; None takes all.
    """

    def __init__(
        self,
        model: Any,
        rate: Callable[[str, str], Tensor | float],
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: float = 1.0,
        num_particles: int = 1,
        second: bool = False,
        batch_size: int | None = None,
    ) -> None:
        self.model, self.rate, self.second, self.scale = model, rate, second, ScaleLatents(beta, 1.0)
        self.batch_size = batch_size
        make: Any = AnalyticELBO
        self.elbo: Any = make(num_particles, max_plate_nesting=2, vectorize_particles=True)
        self.direction = Adam() if optimizer == "adam" else lambda _, gradient: gradient

    def __call__(
        self,
        support: Episode,
        theta: Sites,
        start: Distributions,
        steps: int,
        on_step: Callable[[int, SiteParameters], None] | None = None,
    ) -> SiteParameters:
        """Take the steps, and return the displacement of each parameter. Tasks are treated as independent.

        ``on_step`` is called after each step with its index and the displacements so far, which it may change.
        """
        origin = unconstrained_sites(start, len(support.task_index))
        if not self.second:
            origin = {key: value.detach() for key, value in origin.items()}
            theta = {site: value.detach() for site, value in theta.items()}
        moved = {key: torch.zeros_like(value) for key, value in origin.items()}
        alone = support.independent_tasks()
        for step in range(steps):
            batch = alone if self.batch_size is None else minibatch(alone, step, self.batch_size)
            gradients = self.gradients(batch, theta, start, {key: origin[key] + moved[key] for key in origin})
            for key, gradient in gradients.items():
                moved[key] = moved[key] - self.rate(*key) * self.direction(key, gradient)
            if on_step is not None:
                on_step(step, moved)
        return moved

    def gradients(self, support: Episode, theta: Sites, like: Distributions, values: SiteParameters) -> SiteParameters:
        """Return the gradients of the negative beta-ELBO of each support set at these values of the parameters."""

        def guide(episode: Episode) -> None:
            sample_phi(episode, constrained_sites(like, values))

        attention = _twice_differentiable() if self.second else nullcontext()
        with isolated(), torch.enable_grad(), attention:
            values = {
                key: value if self.second and value.requires_grad else value.detach().requires_grad_()
                for key, value in values.items()
            }
            model = self.scale(pyro.condition(self.model, data=theta))
            loss = self.elbo.differentiable_loss(model, self.scale(guide), support)
            gradients = torch.autograd.grad(loss, list(values.values()), create_graph=self.second)
        return dict(zip(values, gradients, strict=True))


class Adam:
    """Update directions of Adam (Kingma and Ba, arXiv 1412.6980) as differentiable functions of the gradients."""

    def __init__(self, decays: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        self.decays, self.epsilon = decays, epsilon
        self.moments: dict[tuple[str, str], tuple[int, Tensor, Tensor]] = {}

    def __call__(self, key: tuple[str, str], gradient: Tensor) -> Tensor:
        """Return the direction for one tensor; its moments are stored under the key."""
        zero = torch.zeros_like(gradient)
        count, first, second = self.moments.get(key, (0, zero, zero))
        count, (a, b) = count + 1, self.decays
        first, second = a * first + (1 - a) * gradient, b * second + (1 - b) * gradient.square()
        self.moments[key] = (count, first, second)
        # Added under the root, because the derivative of the root at zero is infinite.
        root = (second / (1 - b**count) + self.epsilon**2).sqrt()
        return first / (1 - a**count) / (root + self.epsilon)


def minibatch(episode: Episode, step: int, size: int) -> Episode:
    """Return the minibatch of a step: ``size`` examples per task in turn, scaled to all examples of the task."""
    rows = [[example for example in task if example is not None] for task in episode.examples]
    taken = [[task[(step * size + i) % len(task)] for i in range(min(size, len(task)))] for task in rows]
    part = collate(
        taken,
        num_data=episode.num_data,
        task_index=episode.task_index,
        num_tasks=episode.num_tasks,
        fixed_options=episode.fixed_options,
    )
    return part.to(episode.mask.device)


def unconstrained_sites(distributions: Distributions, num_tasks: int | None = None) -> SiteParameters:
    """Return the unconstrained parameters of all sites.

    If ``num_tasks`` is given, parameters of distributions without a batch are expanded to batch ``(num_tasks, 1)``.
    """
    found: SiteParameters = {}
    for site, fn in distributions.items():
        for name, value in unconstrained(fn).items():
            whole = num_tasks is None or fn.batch_shape
            found[name, site] = value if whole else value.expand(num_tasks or 0, 1, *value.shape)
    return found


def constrained_sites(like: Distributions, values: SiteParameters) -> Distributions:
    """Make distributions of the families of ``like`` with these parameters: inverse of :func:`unconstrained_sites`."""
    by_site: dict[str, Parameters] = {site: {} for site in like}
    for (name, site), value in values.items():
        by_site[site][name] = value
    return {site: constrained(fn, by_site[site]) for site, fn in like.items()}


def _twice_differentiable() -> AbstractContextManager[None]:
    """Use the implementation of attention that has a second derivative inside the block."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
