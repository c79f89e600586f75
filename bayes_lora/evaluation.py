"""Predictions averaged over draws, and how good they are for a task's examples."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bayes_lora.decoding import Generated
from bayes_lora.metrics import Metrics, compute_metrics
from bayes_lora.tasks.task import Example
from bayes_lora.text_metrics import TextMetrics, text_metrics

__all__ = ["predictive", "score", "score_text"]


def predictive(log_lik: Tensor) -> Tensor:
    r"""Posterior predictive log-probabilities: :math:`\log \frac1S \sum_s \mathrm{softmax}(\ell_s)`.

    Args:
        log_lik: option scores ``(S, ..., K)``, nats.

    Returns:
        ``(..., K)``, nats.
    """
    return torch.logsumexp(log_lik.log_softmax(-1), 0) - torch.tensor(float(len(log_lik))).log()


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
