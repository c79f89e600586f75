"""Exact match and token F1 of generated answers, with SQuAD's normalisation (arXiv 1606.05250)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from bayes_lora.metrics.draws import tensor_of

__all__ = ["TextMetrics", "text_metrics"]


@dataclass(frozen=True, slots=True)
class TextMetrics:
    """Scores of one free-form task, or their average over tasks.

    Texts are compared in lower case, without punctuation and without the articles a, an and the, with whitespace
    normalised.

    Attributes:
        exact_match: Share of answers that equal a reference; in [0, 1], higher is better.
        f1: Mean over examples of the harmonic mean of precision and recall of the answer's words with respect to the
            best reference; in [0, 1], higher is better.
        nll: Mean negative log-probability of the first reference including its end of text, in nats; lower is better.
        num_examples: Number of examples that were scored.
    """

    exact_match: float
    f1: float
    nll: float
    num_examples: int

    def to_dict(self) -> dict[str, float]:
        """Return the fields by name, ready for JSON."""
        return asdict(self)


def text_metrics(texts: Sequence[str], references: Sequence[Sequence[str]], log_probs: Any) -> TextMetrics:
    """Score generated answers.

    Args:
        texts: Decoded answers.
        references: Correct texts of each answer.
        log_probs: Log-probabilities of the first references in nats, ``(N,)``.

    Raises:
        ValueError: There are no answers, the lengths differ, an answer has no reference, or a log-probability is NaN.
    """
    log_probs = tensor_of(log_probs, "log_probs").double()
    from torchmetrics.functional.text import squad  # takes long to import

    if not texts or not len(texts) == len(references) == len(log_probs) or not all(references):
        raise ValueError(
            "`texts`, `references` and `log_probs` must have the same length N >= 1, with a reference for each text; "
            f"got {len(texts)}, {len(references)} and {len(log_probs)}"
        )
    if any(isinstance(group, str) for group in references):
        raise ValueError("`references` must hold a sequence of texts for each answer, got a text")
    if bool(log_probs.isnan().any()):
        raise ValueError(f"`log_probs` must not be NaN, but that of answer {int(log_probs.isnan().nonzero()[0])} is")
    predicted: Any = [{"prediction_text": text, "id": str(i)} for i, text in enumerate(texts)]
    right: Any = [
        {"answers": {"answer_start": [0] * len(group), "text": list(group)}, "id": str(i)}
        for i, group in enumerate(references)
    ]
    found = squad(predicted, right)
    return TextMetrics(
        exact_match=float(found["exact_match"]) / 100,
        f1=float(found["f1"]) / 100,
        nll=float(-log_probs.mean()),
        num_examples=len(texts),
    )
