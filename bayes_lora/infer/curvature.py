r"""Fisher information of each task's support at a value of phi, from gradients of single examples.

.. math:: F = \sum_j \mathbb E_{y \sim p(y \mid x_j, \phi)} \big[g_j g_j^\top\big], \qquad
    g_j = \nabla_\phi \log p(y \mid x_j, \phi)

For these likelihoods it is the generalised Gauss-Newton matrix. It is approximated by its diagonal, or by a Kronecker
product of two sides per layer. Each example of a minibatch has its own copy of the weights, so that one backward pass
gives the gradients of all examples; the Jacobian of the whole set is never stored.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.types import Likelihood, Sites

__all__ = ["Sides", "diagonal", "gradients_of_examples", "kronecker", "scores_of_examples"]


class Sides(NamedTuple):
    r"""Sums over examples whose Kronecker product, divided by the trace, approximates F.

    With G_j the gradient as a matrix, the sides are :math:`\sum_j G_j G_j^\top` and :math:`\sum_j G_j^\top G_j`: one
    step from the identity towards the nearest Kronecker product (Morwani et al., arXiv 2406.17748). The approximation
    is exact if F is a Kronecker product. Of a side longer than ``largest`` only the diagonal is kept.

    Attributes:
        left: ``(T, 1, layers, out, out)``, or its diagonal ``(T, 1, layers, out)``.
        right: ``(T, 1, layers, in, in)``, or its diagonal ``(T, 1, layers, in)``.
        trace: ``(T, 1, layers)``, the trace of F.
    """

    left: Tensor
    right: Tensor
    trace: Tensor

    def eigen(self) -> tuple[Tensor | None, Tensor | None, Tensor]:
        """Return the eigenvectors of both sides (None if diagonal) and F's eigenvalues ``(T, 1, layers, out, in)``."""
        vectors: list[Tensor | None] = []
        values: list[Tensor] = []
        for side in (self.left, self.right):
            square = side.ndim > self.trace.ndim + 1
            of_side, basis = torch.linalg.eigh(side) if square else (side, None)
            values.append(of_side.clamp_min(0.0))
            vectors.append(basis)
        trace = self.trace.clamp_min(torch.finfo(self.trace.dtype).tiny)[..., None, None]
        return vectors[0], vectors[1], values[0][..., :, None] * values[1][..., None, :] / trace


def gradients_of_examples(
    model: Any, support: Episode, theta: Sites, phi: Sites, num_samples: int, batch_size: int
) -> Iterator[tuple[Tensor, Sites]]:
    """Yield per pass the task of each example ``(n,)`` and its gradient per random site ``(n, 1, layers, out, in)``.

    Args:
        model: a hierarchical model.
        support: support sets of T tasks.
        theta: values of theta, which determine the LoRA sites that all tasks share.
        phi: values of phi, ``(T, 1, layers, out, in)`` per random site.
        num_samples: answers drawn per example, with one backward pass each.
        batch_size: examples per pass.
    """
    for task, _, own, scores in scores_of_examples(model.likelihood, support, model.shared(theta), phi, batch_size):
        with torch.enable_grad():
            answers = model.answer(scores)
            for i in range(num_samples):
                log_prob: Tensor = answers.log_prob(answers.sample()).sum()
                found = torch.autograd.grad(log_prob, list(own.values()), retain_graph=i + 1 < num_samples)
                yield task, dict(zip(own, found, strict=True))


def scores_of_examples(
    likelihood: Likelihood, episode: Episode, shared: Sites, phi: Sites, batch_size: int
) -> Iterator[tuple[Tensor, Episode, Sites, Tensor]]:
    """Score examples in batches, each example with its own copy of the weights of its task.

    Args:
        likelihood: the language model.
        episode: T tasks with their examples.
        shared: values of the LoRA sites that all tasks share.
        phi: values of phi, ``(T, 1, layers, out, in)`` per random site.
        batch_size: examples per forward.

    Yields:
        The task of each example ``(n,)``, the examples as tasks of their own, the copies ``(n, 1, layers, out, in)``
        per random site, which require gradients, and the scores ``(n, 1, K)`` in nats.
    """
    counts = episode.mask.sum(-1)
    total = sum(example is not None for task in episode.examples for example in task)
    task_of = torch.arange(len(counts), device=counts.device).repeat_interleave(counts, output_size=total)
    for start in range(0, len(task_of), batch_size):
        each, task = episode.per_example(start, start + batch_size), task_of[start : start + batch_size]
        own = {site: value.detach()[task].requires_grad_() for site, value in phi.items()}
        with torch.enable_grad():
            scores = likelihood(shared | own, each)
        yield task, each, own, scores


def diagonal(passes: Iterator[tuple[Tensor, Sites]], phi: Sites, num_samples: int) -> Sites:
    """Return the diagonal of F per random site, ``(T, 1, layers, out, in)``."""
    total = {site: torch.zeros_like(value) for site, value in phi.items()}
    for task, gradients in passes:
        for site, gradient in gradients.items():
            total[site].index_add_(0, task, gradient.square())
    return {site: value / num_samples for site, value in total.items()}


def kronecker(passes: Iterator[tuple[Tensor, Sites]], unit: Sites, num_samples: int, largest: int) -> dict[str, Sides]:
    """Return both sides of F per random site, with phi in units of ``unit``, ``(T, 1, layers, out, in)``."""
    found: dict[str, Sides] = {}
    for task, gradients in passes:
        for site, gradient in gradients.items():
            scaled = gradient * unit[site][task]
            parts = _side(scaled, largest), _side(scaled.mT, largest), scaled.square().sum((-2, -1))
            if site not in found:
                tasks = len(unit[site])
                found[site] = Sides(*(part.new_zeros(tasks, *part.shape[1:]) for part in parts))
            for total, part in zip(found[site], parts, strict=True):
                total.index_add_(0, task, part / num_samples)
    return found


def _side(matrix: Tensor, largest: int) -> Tensor:
    """Return ``G G^T``, or its diagonal if G has more than ``largest`` rows."""
    return matrix.square().sum(-1) if matrix.shape[-2] > largest else matrix @ matrix.mT
