r"""The tangent space of option scores: their derivatives with respect to each task's LoRA weights, and kernels of them.

.. math:: J_{jk} = \nabla_\phi f_{jk}(\phi), \qquad C_{jk, j'k'} = \langle \sigma J_{jk},\; \sigma J_{j'k'} \rangle

for the score f of option k of example j, in nats, and standard deviations sigma of the weights. Every example of a
minibatch has its own copy of the weights, so that K backward passes give the derivatives of all its scores.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.infer.curvature import scores_of_examples
from bayes_lora.types import Likelihood, Sites

__all__ = ["Tangent", "option_gradients", "tangent"]


class Tangent(NamedTuple):
    """Option scores of T tasks with N examples of K options, and their derivatives in units of ``unit``.

    Attributes:
        scores: ``(T, N, K)`` nats; 0 at absent options.
        gradients: ``(T, N, K, layers, out, in)`` per random site, times the units; 0 at absent options.
    """

    scores: Tensor
    gradients: Sites

    def kernels(self) -> dict[str, Tensor]:
        """Return the inner products of the gradients of each task, by site: ``(T, layers, N * K, N * K)``."""
        rows = {site: value.flatten(1, 2).movedim(2, 1).flatten(3) for site, value in self.gradients.items()}
        return {site: value @ value.mT for site, value in rows.items()}

    def combined(self, weights: Tensor) -> Sites:
        """Return ``J^T A`` per site, ``(T, 1, layers, out, in, r)``, for weights A ``(T, N * K, r)``."""
        return {
            site: torch.einsum("tjr,tjloi->tloir", weights, value.flatten(1, 2))[:, None]
            for site, value in self.gradients.items()
        }


def tangent(
    likelihood: Likelihood, episode: Episode, shared: Sites, phi: Sites, unit: Sites, batch_size: int = 4
) -> Tangent:
    """Return the scores of an episode's examples at phi, and their derivatives.

    Args:
        likelihood: the language model.
        episode: T tasks with up to N examples.
        shared: values of the LoRA sites that all tasks share.
        phi: values ``(T, 1, layers, out, in)`` of the random sites.
        unit: by what derivatives are multiplied, of a shape that broadcasts to that of phi.
        batch_size: number of examples in a forward; bounds its memory.
    """
    tasks, rows = episode.mask.shape
    places = episode.mask.flatten().nonzero()[:, 0]  # in the order of tasks and examples
    like = next(iter(phi.values()))
    parts = [
        (found, {site: value * unit[site].expand_as(phi[site])[task] for site, value in jacobian.items()})
        for task, found, jacobian in option_gradients(likelihood, episode, shared, phi, batch_size)
    ]
    options = max(found.shape[-1] for found, _ in parts)

    def gathered(pieces: list[Tensor], like: Tensor) -> Tensor:
        whole: Tensor = like.new_zeros(tasks * rows, options, *pieces[0].shape[2:])
        done = 0
        for piece in pieces:
            whole[places[done : done + len(piece)], : piece.shape[1]] = piece.to(like.dtype)
            done += len(piece)
        found: Tensor = whole.unflatten(0, (tasks, rows))
        return found

    gradients = {site: gathered([jacobian[site] for _, jacobian in parts], value) for site, value in phi.items()}
    return Tangent(gathered([found for found, _ in parts], like), gradients)


def option_gradients(
    likelihood: Likelihood, episode: Episode, shared: Sites, phi: Sites, batch_size: int
) -> Iterator[tuple[Tensor, Tensor, Sites]]:
    """Yield per batch the task of each example ``(n,)``, scores ``(n, K)``, gradients ``(n, K, layers, out, in)``.

    Scores and gradients of absent options are 0; K is the largest number of options in the batch. A likelihood with one
    score for each example, such as the mean of a real answer, has K = 1.
    """
    for task, each, own, found in scores_of_examples(likelihood, episode, shared, phi, batch_size):
        with torch.enable_grad():
            if found.ndim == 2:
                scores = found
            else:
                scores = found[:, 0].masked_fill(~each.option_mask[:, 0], 0.0)
            columns = []
            for k in range(scores.shape[-1]):
                last = k + 1 == scores.shape[-1]
                columns.append(torch.autograd.grad(scores[:, k].sum(), list(own.values()), retain_graph=not last))
        gradients = {
            site: torch.stack([column[index][:, 0] for column in columns], 1) for index, site in enumerate(own)
        }
        yield task, scores.detach(), gradients
