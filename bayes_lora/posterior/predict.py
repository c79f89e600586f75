"""Predictions averaged over draws, and how good they are for a task's examples."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.infer.predictive import predictive, tempered
from bayes_lora.lm.generation import Generated
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.metrics.options import Metrics, compute_metrics
from bayes_lora.metrics.text import TextMetrics, text_metrics
from bayes_lora.tasks.task import Example
from bayes_lora.types import Sites, absent_score

__all__ = ["batches", "predict_tasks", "score", "score_text"]

TASK = -5
"""The tasks' dimension of ``(T, 1, layers, out, in)``."""


def predict_tasks(
    lm: LanguageModel,
    phi: Sites,
    tasks: Sequence[Sequence[EncodedExample]],
    temperature: float,
    max_tokens: Callable[[], int],
) -> list[Tensor]:
    """Predictive log-probabilities ``(N, K)`` of each task's examples.

    Examples of all tasks share forwards with all draws, each under the draws of its own task, and then go back to their
    places.

    Args:
        lm: the language model.
        phi: draws ``(S, T or 1, 1, layers, out, in)``.
        tasks: per task its examples.
        temperature: by which option scores are divided.
        max_tokens: of a forward without its draws, see :func:`batches`.
    """
    widths = [max((row.num_options for row in rows), default=0) for rows in tasks]
    pieces: list[list[Tensor]] = [[] for _ in tasks]
    places: list[list[int]] = [[] for _ in tasks]
    for batch in batches(tasks, max_tokens):
        episode = collate([[tasks[t][i] for i in members] for t, members in batch.items()]).to(lm.device)
        scores = lm(of_tasks(phi, list(batch), len(tasks)), episode)
        for (t, members), found in zip(batch.items(), predictive(tempered(scores, episode, temperature)), strict=True):
            own = found[: len(members), : widths[t]]
            absent = widths[t] - own.shape[-1]
            pieces[t].append(nn.functional.pad(own, (0, absent), value=absent_score(own.dtype)))
            places[t] += members
    none = torch.zeros(0, 0, device=lm.device)
    return [
        torch.cat(parts)[torch.tensor(at, device=lm.device).argsort()] if parts else none
        for parts, at in zip(pieces, places, strict=True)
    ]


def of_tasks(phi: Sites, chosen: Sequence[int], count: int) -> Sites:
    """The draws of some of ``count`` tasks, in this order."""
    if list(chosen) == list(range(count)):
        return phi
    found: Sites = tree_map(lambda v: v if v.shape[TASK] == 1 else v[:, list(chosen)], phi)
    return found


def batches(tasks: Sequence[Sequence[EncodedExample]], max_tokens: Callable[[], int]) -> Iterator[dict[int, list[int]]]:
    """Which examples of each task share a forward: of like length, and of at most ``max_tokens()``, padding included.

    A longer one stands alone. Demonstrations are read once for all examples of a task that stand behind them. The
    first task's are not counted, for queries are worth their demonstrations; where there are more tasks, all is.
    """
    places = [(t, i) for t, rows in enumerate(tasks) for i in range(len(rows))]

    def order(place: tuple[int, int]) -> tuple[int, int, int]:
        row = tasks[place[0]][place[1]]
        shown = len(row.context or ())
        return shown, place[0] if shown else 0, len(row)

    places.sort(key=order)
    done = 0
    while done < len(places):
        budget = max_tokens()  # asked anew each time, for the first forward may measure it
        batch: dict[int, list[int]] = {}
        longest, begin = 0, done
        for t, i in itertools.islice(places, begin, None):
            row = tasks[t][i]
            shown, longest = len(row.context or ()), max(longest, len(row))
            count, sharing = done - begin + 1, len(batch.keys() | {t})
            size, limit = count * longest, max(budget, shown)
            if shown and sharing > 1:
                most = max(len(members) + (other == t) for other, members in (batch | {t: batch.get(t, [])}).items())
                size, limit = sharing * (shown + most * longest), budget
            if batch and size > limit:
                break
            batch.setdefault(t, []).append(i)
            done += 1
        yield dict(sorted(batch.items()))


def score(examples: Sequence[Example], log_probs: Tensor) -> Metrics:
    """Metrics of predictive log-probabilities ``(N, K)`` against the gold options of the examples."""
    answer = torch.tensor([example.answer for example in examples])
    counts = torch.tensor([len(example.options) for example in examples])
    mask = torch.arange(log_probs.shape[-1]) < counts[:, None]
    return compute_metrics(log_probs.cpu(), answer, mask)


def score_text(examples: Sequence[Example], log_probs: Tensor, answers: Sequence[Generated]) -> TextMetrics:
    """Metrics of decoded answers, and of the log-probabilities ``(N, 2)`` of the gold text and of any other."""
    texts = [answer.text for answer in answers]
    return text_metrics(texts, [example.references for example in examples], log_probs[:, 0])
