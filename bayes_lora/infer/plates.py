"""The plates of tasks and examples: the only place where N, the mask and the plates are written."""

from __future__ import annotations

import pyro
import pyro.distributions as dist
from torch import Tensor

from bayes_lora.episodes.episode import Episode
from bayes_lora.infer.components import Components
from bayes_lora.types import Sites

__all__ = ["examples_scale", "sample_phi", "task_plate"]


def sample_phi(episode: Episode, posterior: dict[str, dist.TorchDistribution]) -> Sites:
    """Sample ``phi.<site>`` for an episode's tasks from q(phi | support), of batch ``(T, 1)`` per site.

    Of :class:`bayes_lora.infer.components.Components` each draw takes one.
    """
    if isinstance(posterior, Components):
        posterior = posterior.of_draws()
    with pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2):
        return {site: pyro.sample(f"phi.{site}", fn) for site, fn in posterior.items()}


def task_plate(episode: Episode) -> pyro.plate:
    """The plate of the collection's tasks, of which the episode holds some: scales T tasks up to all."""
    return pyro.plate("task", episode.num_tasks, subsample=episode.task_index, dim=-2)


def examples_scale(episode: Episode, like: Tensor) -> Tensor:
    """N / n of each task, ``(T, 1)``."""
    return (episode.num_data[:, None] / episode.mask.sum(-1, keepdim=True)).to(like.dtype)
