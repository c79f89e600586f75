"""What a posterior must beat: label counts, the pretrained model, and a LoRA fine-tuned on the same few examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from pyro.distributions import Delta

from bayes_lora.episodes.episode import collate
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.option_head import BIAS, MAX_OPTIONS, SLOPE
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks.task import Task
from bayes_lora.types import Distributions

__all__ = ["finetune_lora", "label_counts", "pretrained"]


def pretrained(lm: LanguageModel, tasks: Sequence[Task]) -> TaskPosterior:
    """The base model without any adapter: every B is zero, also if the LoRA starts at a trained adapter."""
    initial = lm.sites.initial()
    zero = {site: torch.zeros_like(value) for site, value in initial.items() if ".lora_B" in site}
    return TaskPosterior(lm, {}, initial | zero, tuple(task.name for task in tasks))


def label_counts(lm: LanguageModel, tasks: Sequence[Task]) -> TaskPosterior:
    r"""The frequencies of the support's labels, whatever the question; uniform where options differ by example.

    .. math:: p(y = k) = (n_k + 1) / (n + K)

    for a task with K labels of which label k occurs n_k times in the support: an option head of slope 0. Generated
    answers are the pretrained model's.
    """
    episode = collate([lm.encoder(task.support) for task in tasks])
    bias = torch.zeros(len(tasks), 1, 1, 1, MAX_OPTIONS)
    for own, answers, present in zip(bias, episode.answer, episode.mask, strict=True):
        counts = torch.bincount(answers[present], minlength=MAX_OPTIONS)[:MAX_OPTIONS]
        own[0, 0, 0] = (counts + 1.0).log()
    head = {SLOPE: torch.zeros(len(tasks), 1, 1, 1, 1), BIAS: bias}
    points: Distributions = {site: Delta(value.to(lm.device), event_dim=3) for site, value in head.items()}
    base = pretrained(lm, tasks)
    return TaskPosterior(lm, points, base.shared, base.names, fixed_options=tuple(episode.fixed_options.tolist()))


def finetune_lora(
    lm: LanguageModel, tasks: Sequence[Task], *, steps: int = 10, learning_rate: float = 1e-3
) -> TaskPosterior:
    """A LoRA per task, from ``lm.sites.initial()``, by Adam on the mean NLL of its support set (full batch).

    The tasks' LoRAs do not touch one another; they share forwards only.
    """
    episode = collate([lm.encoder(task.support) for task in tasks]).to(lm.device)
    phi = {
        site: value.expand(len(tasks), 1, *value.shape).clone().requires_grad_()
        for site, value in lm.sites.initial().items()
    }
    optimizer = torch.optim.Adam(phi.values(), lr=learning_rate)
    for _ in range(steps):
        log_probs = lm(phi, episode).log_softmax(-1)
        nll = -log_probs.gather(-1, episode.answer[..., None])[..., 0] * episode.mask
        optimizer.zero_grad()
        # A sum over tasks: each LoRA gets the gradient of its own task's mean alone.
        (nll.sum(-1) / episode.mask.sum(-1)).sum().backward()
        optimizer.step()
    points: Distributions = {site: Delta(value.detach(), event_dim=3) for site, value in phi.items()}
    return TaskPosterior(lm, points, {}, tuple(task.name for task in tasks))
