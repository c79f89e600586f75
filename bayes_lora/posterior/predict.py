"""Predictions averaged over draws, and how good they are for a task's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from bayes_lora.episodes.batching import by_tokens
from bayes_lora.episodes.episode import collate
from bayes_lora.episodes.packing import EncodedExample
from bayes_lora.infer.predictive import predictive, tempered
from bayes_lora.lm.generation import Generated
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.metrics.options import Metrics, compute_metrics
from bayes_lora.metrics.text import TextMetrics, text_metrics
from bayes_lora.tasks.task import Example
from bayes_lora.types import Sites, absent_score

__all__ = ["predict_rows", "score", "score_text", "task_of"]

TASK = -5
"""The tasks' dimension of ``(T, 1, layers, out, in)``."""


def task_of(phi: Sites, index: int) -> Sites:
    """The draws of one task."""
    found: Sites = tree_map(lambda v: v if v.shape[TASK] == 1 else v[:, index : index + 1], phi)
    return found


def predict_rows(
    lm: LanguageModel,
    phi: Sites,
    rows: Sequence[EncodedExample],
    temperature: float,
    max_tokens: Callable[[], int],
) -> Tensor:
    """Predictive log-probabilities ``(N, K)`` of one task's examples under draws ``(S, 1, 1, layers, out, in)``.

    Rows of like length share a forward with all draws, of at most ``max_tokens()``, and then go back to their places.
    """
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
    width = max(row.num_options for row in rows)
    pieces: list[Tensor] = []
    done = 0
    while done < len(order):
        # Asked anew each time, for the first forward may measure it. Queries are worth their demonstrations.
        budget = max(max_tokens(), len(rows[0].context or ()))
        batch = order[done : done + len(by_tokens([len(rows[i]) for i in order[done:]], budget)[0])]
        done += len(batch)
        episode = collate([[rows[i] for i in batch]]).to(lm.device)
        log_probs = predictive(tempered(lm(phi, episode), episode, temperature))[0]
        absent = width - log_probs.shape[-1]
        pieces.append(nn.functional.pad(log_probs, (0, absent), value=absent_score(log_probs.dtype)))
    return torch.cat(pieces)[torch.tensor(order, device=pieces[0].device).argsort()]


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
