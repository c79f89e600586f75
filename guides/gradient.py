r"""Gradient guide: q(phi | support) by K steps of descent from theta (ABML, Ravi and Beatson, ICLR 2019).

As in arXiv 2508.14285:

.. math::
    \lambda_i^0 &= (\mu_\theta, \log \sigma_\theta) \\
    \lambda_i^{k+1} &= \lambda_i^k - \alpha \nabla_\lambda \big\{ -\mathbb E_{q_\lambda}[\log p(S_i \mid \phi)]
        + \beta\, \mathrm{KL}(q_\lambda(\phi) \,\|\, p(\phi \mid \theta)) \big\} \\
    q(\phi_i \mid S_i) &= \mathcal N\big(\mathrm{loc}(\lambda_i^K), \mathrm{scale}(\lambda_i^K)^2\big)

in nats, the log-likelihood summed over the support. All tasks of an episode take their steps in one batched forward and
backward. For theta's gradient the displacement :math:`\lambda^K - \lambda^0` is a constant (first order), or is
differentiated through (second order). With K = 0 it is the prior, and :math:`\lambda^0` may come from another guide.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Literal

import pyro
import pyro.distributions as dist
import torch
from pyro.nn import PyroModule
from pyro.poutine import runtime
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from bayes_lora.deferred import LocalReparameterization
from bayes_lora.elbo import AnalyticELBO, ScaleLatents
from bayes_lora.errors import ConfigError
from bayes_lora.families import Parts, from_parts, to_parts
from bayes_lora.guides.theta import PointTheta, attribute, sample_phi, show_to_svi
from bayes_lora.tasks.episode import Episode
from bayes_lora.types import Sites

__all__ = ["Descent", "GradientGuide", "from_point", "to_point"]

Distributions = dict[str, dist.TorchDistribution]
"""Site name to a distribution, of batch ``(T, 1)`` or what broadcasts to it."""

Point = dict[tuple[str, str], Tensor]
"""``(part, site)`` to an unconstrained parameter, ``("loc", site)`` and ``("log_scale", site)`` for normals."""


class GradientGuide(PyroModule):
    """q(theta) q(phi | support), amortised by gradient steps on the support's negative beta-ELBO.

    Args:
        model: a hierarchical model with ``random_sites``, ``theta()`` and ``phi_prior(theta)``.
        start: a guide with ``theta`` and ``posterior(support, theta)`` at which the steps begin; by default they
            begin at p(phi | theta).
        theta: makes q(theta) from the model, where ``start`` has none: :class:`PointTheta` or :class:`NormalTheta`.
        steps: K.
        learning_rate: alpha, of every part of the family (loc and log scale of normals).
        optimizer: ``"sgd"``, or ``"adam"`` (each task's and element's own moments, none kept between episodes).
        beta: weight of the divergence inside; independent of the objective's.
        num_particles: draws of phi per step, in one forward.
        second_order: whether theta's gradient flows through the steps. For small models: every step keeps its graph,
            and attention takes its plain form, the only one that can be differentiated twice.
        learn_rates: whether alpha is learnt, one for each part of each site (its loc, its log scale).

    Raises:
        ConfigError: a setting is out of range.
    """

    def __init__(
        self,
        model: PyroModule,
        *,
        start: PyroModule | None = None,
        theta: Callable[[Any], PyroModule] = PointTheta,
        steps: int = 5,
        learning_rate: float = 2e-3,
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: float = 1.0,
        num_particles: int = 1,
        second_order: bool = False,
        learn_rates: bool = False,
    ) -> None:
        super().__init__()
        if steps < 0 or num_particles < 1 or not learning_rate > 0 or not beta > 0:
            raise ConfigError(
                "expected steps of at least 0, num_particles of at least 1, positive learning_rate and beta; got "
                f"steps={steps}, num_particles={num_particles}, learning_rate={learning_rate}, beta={beta}."
            )
        if optimizer not in ("sgd", "adam"):
            raise ConfigError(f"optimizer: expected 'sgd' or 'adam', got {optimizer!r}.")
        # In a tuple: as an attribute the model would become a submodule, and its parameters the guide's.
        self._model = (model,)
        self.start = start
        if start is None:
            self.own_theta = theta(model)
        self.steps, self.learning_rate, self.optimizer = steps, learning_rate, optimizer
        self.beta, self.num_particles, self.second_order = beta, num_particles, second_order
        if learn_rates:
            with torch.no_grad():
                prior = model.phi_prior(model.initial_theta())
            for part, site in to_point(prior):
                self._set(part, site, nn.Parameter(torch.tensor(learning_rate).log()))
        show_to_svi(self)

    @property
    def theta(self) -> Any:
        """q(theta): its own, or that of the guide it starts from."""
        return self.own_theta if self.start is None else self.start.theta

    def _set(self, part: str, site: str, value: nn.Parameter) -> None:
        setattr(self, attribute(f"log_rate_{part}", site), value)

    def _rate(self, part: str, site: str) -> Tensor | float:
        log_rate = getattr(self, attribute(f"log_rate_{part}", site), None)
        return self.learning_rate if log_rate is None else log_rate.exp()

    def forward(self, episode: Episode) -> Sites:
        """Sample theta and phi; reads only ``episode.support``."""
        theta = self.theta()
        return sample_phi(episode, self.posterior(episode.support, theta))

    def posterior(self, support: Episode, theta: Sites) -> Distributions:
        """q(phi | support) per random site: batch ``(T, 1)``, event ``(layers, out, in)``.

        The steps are taken at the mean of q(theta), once for all draws of theta: a draw moves where they end by as much
        as it moves p(phi | theta).
        """
        (model,) = self._model
        tasks = len(support.task_index)
        mean = {site: self.theta.distribution(site).mean for site in self.theta.positive}
        start = self._begin(support, mean)
        if not self.steps and self.start is None:
            return {site: fn.expand((tasks, 1)) if not fn.batch_shape else fn for site, fn in start.items()}
        here, there, end = to_point(model.phi_prior(theta)), to_point(model.phi_prior(mean)), to_point(start, tasks)
        moved = self.displacement(support, mean, start) if self.steps else {}
        for key in end:
            end[key] = end[key] + moved.get(key, 0.0) + (here[key] - there[key])
        return from_point(start, end)

    def _begin(self, support: Episode, theta: Sites) -> Distributions:
        (model,) = self._model
        begin: Distributions = model.phi_prior(theta) if self.start is None else self.start.posterior(support, theta)
        return begin

    def displacement(self, support: Episode, theta: Sites, start: Distributions) -> Point:
        """How far K steps move each ``(part, site)`` from ``start``, at one value of theta."""
        (model,) = self._model
        second = self.second_order and torch.is_grad_enabled()
        descent = Descent(model, self._rate, self.optimizer, self.beta, self.num_particles, second)
        return descent(support, theta, start, self.steps)


class Descent:
    """The steps themselves; see :class:`GradientGuide` for what is set.

    Args:
        model: a Pyro model whose theta sites can be conditioned on.
        rate: step size of ``(part, site)``.
        optimizer: ``"sgd"`` or ``"adam"``.
        beta: weight of the divergence.
        num_particles: draws per step.
        second: whether the displacement can be differentiated in theta and start.
    """

    def __init__(
        self,
        model: Any,
        rate: Callable[[str, str], Tensor | float],
        optimizer: Literal["sgd", "adam"] = "adam",
        beta: float = 1.0,
        num_particles: int = 1,
        second: bool = False,
    ) -> None:
        self.model, self.rate, self.second, self.scale = model, rate, second, ScaleLatents(beta, 1.0)
        make: Any = AnalyticELBO
        self.elbo: Any = make(num_particles, max_plate_nesting=2, vectorize_particles=True)
        self.direction = Adam() if optimizer == "adam" else lambda _, gradient: gradient

    def __call__(self, support: Episode, theta: Sites, start: Distributions, steps: int) -> Point:
        """Take the steps; every task counts for itself, whatever collection it is from."""
        origin = to_point(start, len(support.task_index))
        if not self.second:
            origin = {key: value.detach() for key, value in origin.items()}
            theta = {site: value.detach() for site, value in theta.items()}
        moved = {key: torch.zeros_like(value) for key, value in origin.items()}
        alone = support.alone()
        for _ in range(steps):
            gradients = self._gradients(alone, theta, start, {key: origin[key] + moved[key] for key in origin})
            for key, gradient in gradients.items():
                moved[key] = moved[key] - self.rate(*key) * self.direction(key, gradient)
        return moved

    def _gradients(self, support: Episode, theta: Sites, like: Distributions, point: Point) -> Point:
        def guide(episode: Episode) -> None:
            sample_phi(episode, from_point(like, point))

        attention = _twice_differentiable() if self.second else nullcontext()
        with _apart(), torch.enable_grad(), attention:
            point = {
                key: value if self.second and value.requires_grad else value.detach().requires_grad_()
                for key, value in point.items()
            }
            model = self.scale(pyro.condition(self.model, data=theta))
            loss = self.elbo.differentiable_loss(model, self.scale(guide), support)
            gradients = torch.autograd.grad(loss, list(point.values()), create_graph=self.second)
        return dict(zip(point, gradients, strict=True))


class Adam:
    """Directions of Adam (Kingma and Ba, arXiv 1412.6980) as functions of gradients, to be differentiated through."""

    def __init__(self, decays: tuple[float, float] = (0.9, 0.999), epsilon: float = 1e-8) -> None:
        self.decays, self.epsilon = decays, epsilon
        self.moments: dict[tuple[str, str], tuple[int, Tensor, Tensor]] = {}

    def __call__(self, key: tuple[str, str], gradient: Tensor) -> Tensor:
        """The direction for one tensor, whose moments are kept under the key."""
        zero = torch.zeros_like(gradient)
        count, first, second = self.moments.get(key, (0, zero, zero))
        count, (a, b) = count + 1, self.decays
        first, second = a * first + (1 - a) * gradient, b * second + (1 - b) * gradient.square()
        self.moments[key] = (count, first, second)
        # Under the root, where the derivative at zero would be infinite.
        root = (second / (1 - b**count) + self.epsilon**2).sqrt()
        return first / (1 - a**count) / (root + self.epsilon)


def to_point(distributions: Distributions, tasks: int | None = None) -> Point:
    """The unconstrained parameters of all sites, ``(tasks, 1, layers, out, in)`` each where tasks is given."""
    point = {(part, site): value for site, fn in distributions.items() for part, value in to_parts(fn).items()}
    if tasks is None:
        return point
    return {key: v.expand(tasks, 1, *v.shape[-3:]) if v.ndim == 3 else v for key, v in point.items()}


def from_point(like: Distributions, point: Point) -> Distributions:
    """Distributions of the families of ``like`` with these parameters."""
    parts: dict[str, Parts] = {site: {} for site in like}
    for (part, site), value in point.items():
        parts[site][part] = value
    return {site: from_parts(fn, parts[site]) for site, fn in like.items()}


@contextmanager
def _apart() -> Iterator[None]:
    """Inside the block Pyro is as if no model, guide or plate were running around it; local reparameterisation stays.

    ``poutine.block`` hides sites, but the names and dimensions of the plates around it would stay taken.
    """
    handlers, plates = list(runtime._PYRO_STACK), runtime._DIM_ALLOCATOR._stack
    runtime._PYRO_STACK[:] = [handler for handler in handlers if isinstance(handler, LocalReparameterization)]
    runtime._DIM_ALLOCATOR._stack = []
    try:
        yield
    finally:
        runtime._PYRO_STACK[:], runtime._DIM_ALLOCATOR._stack = handlers, plates


def _twice_differentiable() -> AbstractContextManager[None]:
    """Inside the block attention takes the form that has a second derivative."""
    context: AbstractContextManager[None] = sdpa_kernel(SDPBackend.MATH)
    return context
