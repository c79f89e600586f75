"""Compare a posterior with baselines on unseen tasks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from rich.progress import Progress

from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.infer.handlers import CommonNoise
from bayes_lora.lm.generation import Generated
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.metrics.options import Metrics, top_confidence
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.baselines import finetune_lora, label_counts, pretrained
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.predict import score, score_text
from bayes_lora.posterior.prediction_draws import PredictionDraws
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.runs.facts import facts_of, mean_distance, prior_distances
from bayes_lora.runs.report import Comparison, MethodResult
from bayes_lora.tasks.task import Example, Task
from bayes_lora.utils.processes import num_processes, share

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["compare", "warm_feature_cache"]

BATCH = 64
"""Number of examples whose features are read at once."""

Method = Callable[[Sequence[Task]], tuple[TaskPosterior, int]]
"""From tasks to their posterior, and the number of draws to predict with."""


def compare(
    posterior: Posterior,
    tasks: Sequence[Task],
    *,
    steps: Sequence[int] | None = None,
    learning_rate: float = 2e-3,
    num_draws: int = 10,
    lora_steps: int = 10,
    lora_learning_rates: Sequence[float] = (3e-4, 1e-3, 3e-3),
    num_demonstrations: int = 0,
    tasks_per_forward: int = 4,
    progress: Progress | None = None,
) -> Comparison:
    """Evaluate on unseen tasks: label counts, the pretrained model, LoRA at each step size, and the posterior.

    Tasks are adapted to and predicted together, ``tasks_per_forward`` at a time. Each uses the same noise, in the steps
    and in the predictions, so that the result of a task does not depend on the tasks it is grouped with.

    Args:
        posterior: a fitted posterior.
        tasks: ``support`` is adapted to, ``query`` is predicted.
        steps: numbers of gradient steps after the amortized posterior; a row each. By default 0 and
            :attr:`Posterior.default_steps`.
        learning_rate: of these steps.
        num_draws: number of draws of the posterior predictive, S.
        lora_steps: Adam steps of the LoRA baseline.
        lora_learning_rates: its step sizes, a row each.
        num_demonstrations: number of support examples placed, solved, before every query, for every method; the
            pretrained model then learns in context.
        tasks_per_forward: how many tasks share a forward and backward pass of adaptation; bounds its memory.
        progress: shows a bar.
    """
    lm = posterior.lm
    amortized = "ABMLL (closed form)" if posterior.default_steps == 0 else "ABMLL (amortized)"
    methods: dict[str, Method] = {
        "label counts": lambda group: (label_counts(lm, group), 0),
        "pretrained": lambda group: (pretrained(lm, group), 0),
    }
    for rate in lora_learning_rates:
        methods[f"LoRA, {lora_steps} steps of {rate:g}"] = lambda group, rate=rate: (  # type: ignore[misc]
            finetune_lora(lm, group, steps=lora_steps, learning_rate=rate),
            0,
        )
    counts = list(dict.fromkeys((0, posterior.default_steps)) if steps is None else steps)
    for count in counts:
        methods[f"{amortized} + {count} steps" if count else amortized] = lambda group, count=count: (  # type: ignore[misc]
            posterior.adapt(group, steps=count, learning_rate=learning_rate),
            num_draws,
        )
    warm_feature_cache(lm, [task.examples for task in tasks], "reading unseen tasks", progress)
    bar = progress.add_task("adapting and predicting", total=len(methods) * len(tasks)) if progress else None

    def advance(count: int) -> None:
        if progress is not None and bar is not None:
            progress.update(bar, advance=count)

    groups = [tasks[start : start + tasks_per_forward] for start in range(0, len(tasks), tasks_per_forward)]
    results = {}
    for name, method in methods.items():
        if progress is not None and bar is not None:
            progress.update(bar, description=name)
        results[name] = _evaluate(method, groups, num_demonstrations, advance)
    settings = {
        "draws": num_draws,
        "steps": counts,
        "learning_rate": learning_rate,
        "lora_steps": lora_steps,
        "lora_learning_rates": list(lora_learning_rates),
        "demonstrations": num_demonstrations,
    }
    return Comparison(results, lm.arithmetic, {"settings": settings, **facts_of(lm, tasks)})


def _evaluate(
    method: Method, groups: Sequence[Sequence[Task]], num_demonstrations: int, advance: Callable[[int], None]
) -> MethodResult:
    """Adapt to the tasks of a group together, and predict them together."""
    metrics: dict[str, Metrics | TextMetrics] = {}
    confidence, correct = [torch.zeros(0)], [torch.zeros(0, dtype=torch.bool)]
    draws: list[PredictionDraws] = []
    generated: dict[str, list[str]] = {}
    frames: list[pd.DataFrame] = []
    for group in groups:
        with CommonNoise():
            adapted, num_draws = method(group)
        shown = [task.support[:num_demonstrations] for task in group]
        predictions = adapted.predict_draws(
            [task.query for task in group], num_draws=num_draws, demonstrations=shown, common_noise=True
        )
        answers: Sequence[Sequence[Generated]] = [()] * len(group)
        if any(task.free_form for task in group):
            asked: list[Sequence[Example]] = [task.query if task.free_form else () for task in group]
            count = 0 if adapted.is_deferred else num_draws
            answers = adapted.generate(asked, num_draws=count, demonstrations=shown, common_noise=True)
        frames += prior_distances(adapted)
        for task, predicted, texts in zip(group, predictions, answers, strict=True):
            # On the CPU in 32 bits, because all tasks are kept until the end.
            mask = predicted.option_mask.cpu()
            draws.append(replace(predicted, log_probs=predicted.log_probs.float().cpu(), option_mask=mask))
            log_probs = predicted.mean()
            if task.free_form:
                metrics[task.name] = score_text(task.query, log_probs, texts)
                generated[task.name] = [answer.text for answer in texts]
                continue
            metrics[task.name] = score(task.query, log_probs)
            answer = torch.tensor([example.answer for example in task.query])
            sure, right = top_confidence(log_probs.cpu(), answer)
            confidence.append(sure)
            correct.append(right)
        advance(len(group))
    return MethodResult(
        metrics, torch.cat(confidence), torch.cat(correct), tuple(draws), generated, layers=tuple(mean_distance(frames))
    )


def warm_feature_cache(
    lm: LanguageModel,
    groups: Sequence[Sequence[Example]],
    what: str,
    progress: Progress | None,
    *,
    shared: bool = False,
) -> None:
    """Run the frozen part of the language model over examples once, with a bar.

    If ``shared`` is set, the processes of a fit divide the batches, and read those of the others from the language
    model's cache folder.
    """
    rows = lm.encoder([example for group in groups for example in group])
    bar = progress.add_task(what, total=len(rows)) if progress else None
    batches = [rows[start : start + BATCH] for start in range(0, len(rows), BATCH)]

    def read(batch: Sequence[EncodedExample]) -> None:
        lm.features(collate([batch]).to(lm.device))
        if progress is not None and bar is not None:
            progress.update(bar, advance=len(batch))

    if shared and num_processes() > 1 and lm.cache_folder is not None:
        share(read, batches)
        if progress is not None and bar is not None:
            progress.reset(bar)
    # Without a folder, or with folders of several machines, each process computes what it does not find.
    for batch in batches:
        read(batch)
