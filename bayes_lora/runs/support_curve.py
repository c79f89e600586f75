"""How predictions and their uncertainty change with the number of support examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from rich.progress import Progress

from bayes_lora.errors import ConfigError
from bayes_lora.guides import TangentGuide
from bayes_lora.infer.empirical_bayes import EmpiricalBayes
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.tasks.task import Task

__all__ = ["support_curve"]


def support_curve(
    posterior: Posterior,
    tasks: Sequence[Task],
    sizes: Sequence[int] = (2, 4, 8, 16, 32),
    progress: Progress | None = None,
) -> dict[str, dict[int, dict[str, float]]]:
    """Adapt to the first examples of each task's support, and predict its query.

    The derivatives of a task's scores are computed once, and serve all sizes.

    Args:
        posterior: a posterior in closed form, whose guide is a :class:`bayes_lora.guides.TangentGuide`.
        tasks: their support has as many examples as the largest size.
        sizes: numbers of support examples.
        progress: shows a progress bar.

    Returns:
        By task and size: ``accuracy``, ``nll`` (nats), and ``epistemic_share``, the mean epistemic part of the
        predictive entropy over the mean of that entropy.

    Raises:
        ConfigError: the guide is another one, or a task has too few support examples.
    """
    guide = posterior.guide
    if not isinstance(guide, TangentGuide):
        raise ConfigError(
            f"support_curve: expected a posterior of a TangentGuide, got one of a {type(guide).__name__}."
        )
    for task in tasks:
        if len(task.support) < max(sizes):
            raise ConfigError(f"task {task.name!r}: expected {max(sizes)} support examples, got {len(task.support)}.")
    scores = EmpiricalBayes(posterior.model, guide.theta, {}, beta=guide.beta)
    whole = {task.name: Task(task.name, task.support + task.query) for task in tasks}
    grams = grams_of_tasks(posterior.lm, posterior.model, guide.theta_mean(), whole, guide.batch_size, progress)
    found: dict[str, dict[int, dict[str, float]]] = {}
    for task in tasks:
        query = torch.arange(len(task.support), len(task.support) + len(task.query))
        answer = torch.tensor([example.answer for example in task.query])
        found[task.name] = {}
        for size in sizes:
            drawn = scores.predict(grams[task.name], torch.arange(size), query)
            log_probs, (total, epistemic) = drawn.log_probs().cpu(), drawn.entropies()
            found[task.name][size] = {
                "accuracy": float((log_probs.argmax(-1) == answer).double().mean()),
                "nll": -float(log_probs.gather(-1, answer[:, None]).mean()),
                "epistemic_share": float(epistemic.mean() / total.mean()),
            }
    return found
