"""Predictions under each draw, and their metrics."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.errors import PosteriorError
from bayes_lora.infer.predictive import tempered
from bayes_lora.lm.generation import Generated
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.metrics.options import Metrics, compute_metrics
from bayes_lora.metrics.text import TextMetrics, text_metrics
from bayes_lora.tasks.task import Example
from bayes_lora.types import Sites, absent_score

__all__ = ["batches", "predict_tasks", "score", "score_text"]

TASK = -5
"""Dimension of the tasks in ``(T, 1, layers, out, in)``."""


def predict_tasks(
    lm: LanguageModel,
    phi: Sites,
    tasks: Sequence[Sequence[EncodedExample]],
    temperature: float,
    max_tokens: Callable[[], int],
    fixed_options: Sequence[bool] | None = None,
) -> list[Tensor]:
    """Return the log-probabilities ``(S, N, K)``, nats, of each task's examples under each draw.

    Examples of all tasks share forwards with all draws, each example under the draws of its own task.

    Args:
        lm: the language model.
        phi: draws ``(S, T or 1, 1, layers, out, in)`` per site.
        tasks: the examples of each task.
        temperature: divides the option scores.
        max_tokens: returns the maximum number of tokens of a forward for each draw, see :func:`batches`.
        fixed_options: whether each task has a fixed set of labels; by default all have.

    Raises:
        PosteriorError: a prediction is NaN.
    """
    widths = [max((row.num_options for row in rows), default=0) for rows in tasks]
    pieces: list[list[Tensor]] = [[] for _ in tasks]
    places: list[list[int]] = [[] for _ in tasks]
    for batch in batches(tasks, max_tokens):
        fixed = [fixed_options is None or fixed_options[t] for t in batch]
        rows = [[tasks[t][i] for i in members] for t, members in batch.items()]
        episode = collate(rows, fixed_options=fixed).to(lm.device)
        scores = lm(of_tasks(phi, list(batch), len(tasks)), episode)
        log_probs = tempered(scores, episode, temperature).log_softmax(-1)  # (S, T, N, K)
        for (t, members), found in zip(batch.items(), log_probs.unbind(1), strict=True):
            own = found[:, : len(members), : widths[t]]
            absent = widths[t] - own.shape[-1]
            pieces[t].append(nn.functional.pad(own, (0, absent), value=absent_score(own.dtype)))
            places[t] += members
    none = torch.zeros(1, 0, 0, device=lm.device)
    predictions = [
        torch.cat(parts, 1)[:, torch.tensor(at, device=lm.device).argsort()] if parts else none
        for parts, at in zip(pieces, places, strict=True)
    ]
    if any(bool(found.isnan().any()) for found in predictions):
        raise PosteriorError(
            f"predictions of {lm.name} are NaN: values drawn from the posterior are too large for its dtype. "
            "Restore the posterior, or fit and adapt again."
        )
    return predictions


def of_tasks(phi: Sites, chosen: Sequence[int], count: int) -> Sites:
    """Select the draws of some of ``count`` tasks, in this order."""
    if list(chosen) == list(range(count)):
        return phi
    found: Sites = tree_map(lambda v: v if v.shape[TASK] == 1 else v[:, list(chosen)], phi)
    return found


def batches(tasks: Sequence[Sequence[EncodedExample]], max_tokens: Callable[[], int]) -> Iterator[dict[int, list[int]]]:
    """Yield the examples of each task that share a forward: similar lengths, at most ``max_tokens()`` with padding.

    A longer example gets a forward to itself. Demonstrations are read once for all queries of a task. In a forward of
    one task they do not count towards the limit, which then bounds the queries alone; in a forward of several they do.
    """
    places = [(t, i) for t, rows in enumerate(tasks) for i in range(len(rows))]

    def order(place: tuple[int, int]) -> tuple[int, int, int]:
        row = tasks[place[0]][place[1]]
        shown = len(row.context or ())
        return shown, place[0] if shown else 0, len(row)

    places.sort(key=order)
    done = 0
    while done < len(places):
        budget = max_tokens()  # called every time, because the first forward may measure it
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
    """Compute metrics of predictive log-probabilities ``(N, K)`` against the gold options of the examples."""
    answer = torch.tensor([example.answer for example in examples])
    counts = torch.tensor([len(example.options) for example in examples])
    mask = torch.arange(log_probs.shape[-1]) < counts[:, None]
    return compute_metrics(log_probs.cpu(), answer, mask)


def score_text(examples: Sequence[Example], log_probs: Tensor, answers: Sequence[Generated]) -> TextMetrics:
    """Compute metrics of generated answers, and of log-probabilities ``(N, 2)`` of the gold text and of any other."""
    texts = [answer.text for answer in answers]
    return text_metrics(texts, [example.references for example in examples], log_probs[:, 0])
