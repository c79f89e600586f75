"""The plates of tasks and examples, which scale the likelihood to the number of examples N of each task.

A custom model::

    def model(episode):
        with task_plate(episode):
            phi = {site: pyro.sample(f"phi.{site}", prior) for site, prior in priors.items()}
        observe_answers(lm(phi, episode), episode)
"""

from __future__ import annotations

from typing import Any

import pyro
import pyro.distributions as dist
import torch
from pyro.infer.util import is_validation_enabled
from pyro.poutine import runtime
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.errors import SiteError
from bayes_lora.infer.components import Components
from bayes_lora.types import Distributions, Sites

__all__ = ["examples_scale", "observe_answers", "same_task_plate", "sample_phi", "task_plate"]


def task_plate(episode: Episode) -> pyro.plate:
    """Return the plate of the collection's tasks at dimension -2, subsampled to the T tasks of the episode."""
    plate: Any = pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2)
    # A guide that draws tasks by itself overrides them when the model is replayed.
    if is_validation_enabled() and not torch.equal(plate._indices, episode.task_index):
        raise SiteError(
            f"plate 'task': the guide drew tasks {plate._indices.tolist()}, the episode holds "
            f"{episode.task_index.tolist()}. Give one of Pyro's autoguides the plate: AutoNormal(model, "
            "create_plates=task_plate)."
        )
    return plate  # type: ignore[no-any-return]


def sample_phi(episode: Episode, posterior: Distributions) -> Sites:
    """Sample ``phi.<site>`` for an episode's tasks from q(phi | support), of batch ``(T, 1)`` per site.

    A draw from :class:`bayes_lora.infer.components.Components` takes one component for all sites.
    """
    if isinstance(posterior, Components):
        posterior = posterior.of_draws()
    with task_plate(episode):
        return {site: pyro.sample(f"phi.{site}", fn) for site, fn in posterior.items()}


def observe_answers(
    log_lik: Tensor, episode: Episode, *, answer: dist.TorchDistribution | None = None, observed: Tensor | None = None
) -> None:
    r"""Observe an episode's answers: the site ``answer``, in the plates ``task`` and ``example``.

    .. math:: \tfrac{N_i}{n_i} \textstyle\sum_j m_{ij} \log p(y_{ij} \mid x_{ij}, \phi_i)

    in nats, over the n examples of task i, scaled to all N of them; m is the mask of present examples.

    Args:
        log_lik: option log-likelihoods ``(*draws, T, N, K)``, nats.
        episode: T tasks with up to N examples each.
        answer: p(y | x, phi), with batch shape ``(*draws, T, N)``; by default categorical over the options.
        observed: observed values, ``(T, N)``; by default the index of each gold option.
    """
    mask: Any = episode.mask  # Pyro annotates it as a BoolTensor
    with (
        same_task_plate(episode),
        pyro.plate("example", episode.mask.shape[-1], dim=-1),
        pyro.poutine.scale(scale=examples_scale(episode, log_lik)),
        pyro.poutine.mask(mask=mask),
    ):
        fn = dist.Categorical(logits=log_lik) if answer is None else answer
        pyro.sample("answer", fn, obs=episode.answer if observed is None else observed)


def examples_scale(episode: Episode, like: Tensor) -> Tensor:
    """Return N / n of each task, ``(T, 1)``."""
    return (episode.num_data[:, None] / episode.mask.sum(-1, keepdim=True)).to(like.dtype)


def same_task_plate(episode: Episode) -> Any:
    """Enter the plate of tasks again, hiding its second site from the trace."""
    if any(isinstance(handler, pyro.plate) and handler.name == "task" for handler in runtime._PYRO_STACK):
        return pyro.poutine.scale(scale=1.0)  # the caller is inside the plate
    with pyro.poutine.block(hide=["task"]):
        return task_plate(episode)
