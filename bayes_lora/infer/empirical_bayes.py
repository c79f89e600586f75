r"""Empirical Bayes in the tangent space: fit the scales of a prior to many tasks, without a language model in the loop.

.. math:: f_i \sim \mathcal N(m_i, C_i), \qquad C_i = \sum_{s,l} \sigma_{s,l}^2 G_{i,s,l}, \qquad
    G_{i,s,l} = J_{i,s,l} J_{i,s,l}^\top

for the option scores f of task i (nats), linear in the weights of site s and layer l, whose prior has the standard
deviation :math:`\sigma_{s,l}`. The Gram matrices G are computed once; after that the
language model is not needed. Theta minimises one of

.. math::
    \text{evidence:} \quad & -\sum_i \log p(y_i \mid \theta) - \log p(\theta) \\
    \text{predictive:} \quad & -\tfrac1I \sum_i \tfrac1{|Q|} \sum_{j \in Q} \log \mathbb E_{f_j \mid S_i}
        \big[\mathrm{softmax}(f_j)_{y_j}\big]

The first is what the beta-ELBO with beta = 1 of :class:`bayes_lora.guides.TangentGuide` bounds, tightly so where scores
are linear. The second scores each task's queries Q given its support S, as predictions will be scored, and is less
affected where the model is wrong (Fong and Holmes, arXiv 1905.08737, relate the two). Both are deterministic: the order
of the tasks does not matter, and splits into support and query depend on a task's name alone.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import pyro
import torch
from scipy.optimize import minimize
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import ConfigError, NonFiniteLoss
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.infer.score_posterior import CategoricalAnswers, ScorePosterior, score_posterior
from bayes_lora.infer.tangent import tangent
from bayes_lora.types import Likelihood, Sites

__all__ = ["EmpiricalBayes", "TaskGrams", "check_scales", "fit_theta", "is_fitted", "task_grams"]

SLOPE = "head.slope"
NUM_SPLITS = 2
"""Splits of each task into support and queries, of the predictive objective."""


class TaskGrams(NamedTuple):
    """Scores of one task's n examples with K options, and inner products of their derivatives.

    Attributes:
        scores: ``(n, K)`` nats.
        kernels: G per site, ``(layers, n * K, n * K)``.
        rows: derivatives ``(n * K,)`` with respect to the sites that are a single number.
        answer: ``(n,)`` index of the gold option.
        option_mask: ``(n, K)``, whether an option is present.
    """

    scores: Tensor
    kernels: Sites
    rows: Sites
    answer: Tensor
    option_mask: Tensor


@torch.no_grad()
def task_grams(likelihood: Likelihood, episode: Episode, shared: Sites, phi: Sites, batch_size: int = 8) -> TaskGrams:
    """Return the Gram matrices of one task at phi.

    Args:
        likelihood: the language model.
        episode: one task.
        shared: values of the LoRA sites that all tasks share.
        phi: values ``(1, 1, layers, out, in)`` of the random sites.
        batch_size: examples per pass; bounds the memory.
    """
    one = {site: value.new_ones(()) for site, value in phi.items()}
    found = tangent(likelihood, episode, shared, phi, one, batch_size)
    kernels = {site: value[0].cpu() for site, value in found.kernels().items()}
    rows = {site: value.flatten().cpu() for site, value in found.gradients.items() if phi[site].numel() == 1}
    return TaskGrams(found.scores[0].cpu(), kernels, rows, episode.answer[0].cpu(), episode.option_mask[0].cpu())


class Parts(NamedTuple):
    """Splits of P tasks with s support examples, q queries and K options, as one batch; all in float64.

    The L layers of all sites are one dimension of the Gram matrices.

    Attributes:
        scores: ``(P, s + q, K)``, support first.
        rows: derivatives with respect to the sites that are a single number, ``(P, s + q, K)``.
        own: Gram matrices of the support, ``(P, L, s * K, s * K)``.
        cross: of queries with the support, ``(P, L, q * K, s * K)``.
        each: of every query with itself, ``(P, L, q, K, K)``.
        answer: ``(P, s + q)``.
        option_mask: ``(P, s + q, K)``.
    """

    scores: Tensor
    rows: Sites
    own: Tensor
    cross: Tensor
    each: Tensor
    answer: Tensor
    option_mask: Tensor


class EmpiricalBayes(nn.Module):
    """The loss of theta as a module; :func:`fit_theta` minimises it.

    Args:
        model: a hierarchical model with a normal prior of one standard deviation per layer.
        theta: q(theta), whose mean is fitted: that of the guide.
        tasks: Gram matrices by task, at the mean of p(phi | theta).
        objective: ``"evidence"`` or ``"predictive"``.
        num_support: support examples of a split; the others are its queries. With ``"evidence"`` all are support.
        num_splits: splits of each task, with ``"predictive"``.
        beta: the likelihood of the support is tempered by 1 / beta.

    Raises:
        ConfigError: the prior has other scales, or a task has no query.
    """

    def __init__(
        self,
        model: Any,
        theta: Any,
        tasks: Mapping[str, TaskGrams],
        *,
        objective: Literal["evidence", "predictive"] = "predictive",
        num_support: int = 16,
        num_splits: int = NUM_SPLITS,
        beta: float = 1.0,
    ) -> None:
        super().__init__()
        self.model, self.theta, self.objective, self.beta = model, theta, objective, beta
        check_scales(model, theta)
        with torch.no_grad():
            prior = self._prior()
        self.origin = {site: fn.mean.detach().clone() for site, fn in prior.items()}  # theta itself moves
        grouped: dict[tuple[int, int, int], list[Parts]] = {}
        for name in sorted(tasks):
            task = tasks[name]
            for support, query in self._splits(name, len(task.answer), num_support, num_splits):
                shape = len(support), len(query), task.scores.shape[-1]
                grouped.setdefault(shape, []).append(_part(task, support, query, list(prior)))
        self.parts = [_stacked(parts) for parts in grouped.values()]
        self.num_parts = sum(len(parts.answer) for parts in self.parts)

    def _splits(self, name: str, count: int, num_support: int, num_splits: int) -> list[tuple[Tensor, Tensor]]:
        if self.objective == "evidence":
            return [(torch.arange(count), torch.arange(0))]
        if count <= num_support:
            raise ConfigError(
                f"task {name!r}: expected more than num_support={num_support} examples, to have queries; got {count}. "
                "Lower episodes.num_support, or leave the task out."
            )
        orders = [list(range(count)) for _ in range(num_splits)]
        for i, order in enumerate(orders):
            random.Random(f"{name}/{i}").shuffle(order)
        return [(torch.tensor(order[:num_support]), torch.tensor(order[num_support:])) for order in orders]

    def _prior(self) -> Any:
        return self.model.phi_prior({site: self.theta.distribution(site).mean for site in self.theta.positive})

    def forward(self) -> Tensor:
        """Return the loss in nats: of all tasks for the evidence, of a query for the predictive."""
        weights, shift = self._weights_and_shift()
        total: Any = sum(self._loss(parts, weights, shift) for parts in self.parts)
        if self.objective == "predictive":
            return total / self.num_parts  # type: ignore[no-any-return]
        return total - self._log_prior().to(total.device)  # type: ignore[no-any-return]

    @torch.no_grad()
    def predict(self, task: TaskGrams, support: Tensor, query: Tensor) -> LinearScores:
        """Return the linear scores of some of a task's examples given others, at the present theta.

        Args:
            task: Gram matrices at the value that theta had when this module was made.
            support: indices of the support examples.
            query: indices of the queries.
        """
        return self._queries(_stacked([_part(task, support, query, list(self.origin))]), *self._weights_and_shift())

    def _weights_and_shift(self) -> tuple[Tensor, Sites]:
        """Return the weight of each Gram matrix, and the prior mean of sites that are a number, minus their origin."""
        prior = self._prior()
        variance = {site: fn.variance[:, 0, 0].double() for site, fn in prior.items()}
        if SLOPE in prior:
            # Scores are the slope times log-likelihoods, plus biases: it scales the derivatives by LoRA weights.
            slope, before = prior[SLOPE].mean.flatten().double(), self.origin[SLOPE].flatten().double()
            square = slope.square() / before.square()
            variance = {site: v if site.startswith("head.") else v * square for site, v in variance.items()}
        shift = {
            site: (fn.mean - self.origin[site]).double().flatten() for site, fn in prior.items() if fn.mean.numel() == 1
        }
        # Gram matrices are on the CPU, wherever theta is.
        return torch.cat(list(variance.values())).cpu(), {site: value.cpu() for site, value in shift.items()}

    def _support(self, parts: Parts, weights: Tensor, shift: Sites) -> tuple[Tensor, ScorePosterior]:
        """Return the prior mean of all scores, and the posterior of the support's."""
        mean = parts.scores
        for site, moved in shift.items():
            mean = mean + moved * parts.rows[site]
        count = parts.own.shape[-1] // mean.shape[-1]
        answers = CategoricalAnswers(parts.answer[:, :count], parts.option_mask[:, :count], self.beta)
        own = torch.einsum("l,plij->pij", weights, parts.own)
        return mean, score_posterior(mean[:, :count], own, answers)

    def _queries(self, parts: Parts, weights: Tensor, shift: Sites) -> LinearScores:
        """Return the linear scores of the queries of a batch of splits, all in one dimension."""
        mean, found = self._support(parts, weights, shift)
        queries = parts.each.shape[2]
        cross = torch.einsum("l,plij->pij", weights, parts.cross)
        moved = (cross @ found.weights[..., None]).view(mean[:, -queries:].shape)
        seen = cross.unflatten(1, (-1, mean.shape[-1]))  # (P, q, K, s * K)
        covariance = torch.einsum("l,plnij->pnij", weights, parts.each) - seen @ found.removed[:, None] @ seen.mT
        mask = parts.option_mask[:, -queries:]
        free = torch.zeros(mask.shape[:2], dtype=torch.bool)
        whole = (mean[:, -queries:] + moved, covariance, mask, free)
        return LinearScores(*(part.flatten(0, 1) for part in whole))

    def _loss(self, parts: Parts, weights: Tensor, shift: Sites) -> Tensor:
        """Return the loss summed over a batch of splits."""
        if self.objective == "evidence":
            return -self._support(parts, weights, shift)[1].log_evidence.sum()
        log_probs = self._queries(parts, weights, shift).log_probs()
        gold = log_probs.gather(-1, parts.answer[:, -parts.each.shape[2] :].flatten()[:, None])
        return -gold.view(len(parts.answer), -1).mean(-1).sum()

    def _log_prior(self) -> Tensor:
        """Return log p(theta) at the mean of q(theta), of the sites that the fit moves."""
        mean = {site: self.theta.distribution(site).mean for site in self.theta.positive}
        trace = pyro.poutine.trace(pyro.poutine.condition(self.model.theta, mean)).get_trace()
        trace.compute_log_prob()
        moved = [node["log_prob_sum"] for name, node in trace.nodes.items() if name in mean and is_fitted(name)]
        return sum(moved, torch.zeros(()))


def is_fitted(name: str) -> bool:
    """Return whether the fit changes a site of theta: scales, and the location of the slopes of an option head."""
    return name.startswith("theta.precision.") or name.endswith(SLOPE)


@torch.no_grad()
def check_scales(model: Any, theta: Any) -> None:
    """Check that a prior has one standard deviation per layer and site, whatever theta is.

    Args:
        model: a hierarchical model.
        theta: q(theta).

    Raises:
        ConfigError: it has others.
    """
    generator = torch.Generator().manual_seed(0)
    values = {site: theta.distribution(site).mean for site in theta.positive}
    for site, positive in theta.positive.items():
        if positive:  # at the start, all scales of a layer may be equal
            factor = 1 + torch.rand(values[site].shape, generator=generator)
            values[site] = values[site] * factor.to(values[site])
    for site, fn in model.phi_prior(values).items():
        scale = fn.stddev.flatten(1)
        if not torch.allclose(scale, scale[:, :1].expand_as(scale)):
            raise ConfigError(
                f"site {site!r}: expected one standard deviation per layer, so that Gram matrices determine theta; "
                f"{type(getattr(model, 'prior', model)).__name__} has others. Use LayerwiseScale "
                '(prior.name="layerwise-scale"), or fit theta by gradient steps: guide.theta_objective="elbo".'
            )


def _part(task: TaskGrams, support: Tensor, query: Tensor, sites: Sequence[str]) -> Parts:
    options, order = task.scores.shape[-1], torch.cat([support, query])
    kernels = torch.cat([task.kernels[site] for site in sites])
    columns, rows = _places(support, options), _places(query, options)
    places = rows.view(len(query), options)
    return Parts(
        task.scores[order].double(),
        {site: value.view(task.scores.shape)[order].double() for site, value in task.rows.items()},
        kernels[:, columns][:, :, columns].double(),
        kernels[:, rows][:, :, columns].double(),
        kernels[:, places[:, :, None], places[:, None, :]].double(),
        task.answer[order],
        task.option_mask[order],
    )


def _stacked(parts: Sequence[Parts]) -> Parts:
    first = parts[0]
    rows = {site: torch.stack([part.rows[site] for part in parts]) for site in first.rows}
    values = {name: torch.stack([getattr(part, name) for part in parts]) for name in Parts._fields if name != "rows"}
    return Parts(rows=rows, **values)


def _places(examples: Tensor, options: int) -> Tensor:
    """Return the rows of examples in a Gram matrix."""
    return (examples[:, None] * options + torch.arange(options)).flatten()


def fit_theta(
    loss: EmpiricalBayes,
    max_steps: int = 50,
    widest: float = 12.0,
    on_step: Callable[[float], None] | None = None,
) -> list[float]:
    """Minimise the loss over theta's parameters that it depends on, and return the loss after each step of L-BFGS-B.

    Args:
        loss: the loss, whose ``theta`` is changed.
        max_steps: maximum number of steps.
        widest: bound on the change of a parameter, such as the logarithm of a precision. A scale that the tasks say
            nothing about would otherwise grow or shrink without limit.
        on_step: called with the loss after each step.

    Raises:
        NonFiniteLoss: the loss is not finite at the start.
    """
    parameters = [parameter for parameter in loss.theta.parameters() if parameter.requires_grad]
    start_value = loss()
    if not start_value.requires_grad:  # a prior without scales to learn, such as IndependentNormal
        return [float(start_value)]
    gradients = torch.autograd.grad(start_value, parameters, allow_unused=True)
    used = [p for p, g in zip(parameters, gradients, strict=True) if g is not None and bool(g.any())]
    if not used:
        return [float(start_value.detach())]

    def at(values: np.ndarray[Any, Any]) -> tuple[float, np.ndarray[Any, Any]]:
        with torch.no_grad():
            vector_to_parameters(torch.from_numpy(values).to(used[0]), used)
        value: Tensor = loss()
        if not value.isfinite():  # a step too far, which the line search takes back
            return math.inf, np.zeros_like(values)
        found = torch.autograd.grad(value, used)
        gradient = torch.cat([one.flatten() for one in found]).double().cpu().numpy()
        return float(value.detach()), gradient

    start = parameters_to_vector(used).detach().double().cpu().numpy()
    first, gradient = at(start)
    if not (np.isfinite(first) and np.isfinite(gradient).all()):
        raise NonFiniteLoss(f"the {loss.objective} of theta is {first} at the start. Lower the prior's initial_scale.")
    history: list[float] = []

    def after_step(intermediate_result: Any) -> None:
        history.append(float(intermediate_result.fun))
        if on_step is not None:
            on_step(history[-1])

    bounds = list(zip(start - widest, start + widest, strict=True))
    options = {"maxiter": max_steps, "maxcor": 20}
    found = minimize(
        at,
        start,
        jac=True,
        method="L-BFGS-B",
        bounds=bounds,
        options=options,
        callback=after_step,
    )
    at(found.x)
    return [first, *history]
