"""Predictions of a task's questions under each posterior draw: what a notebook analyses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.infer.predictive import mean_over_draws
from bayes_lora.metrics.draws import SUM_TOLERANCE
from bayes_lora.metrics.selective import RiskControl, risk_control_threshold
from bayes_lora.metrics.uncertainty import uncertainty as of_log_probs
from bayes_lora.tasks.task import Example
from bayes_lora.types import absent_score

if TYPE_CHECKING:
    import pandas as pd
    import xarray

__all__ = ["PredictionDraws", "prediction_draws", "uncertainty"]

Gold = Sequence[int | str]
"""Gold answers of one task's questions: indices of options, or their texts."""


@dataclass(frozen=True)
class PredictionDraws:
    """Log-probabilities of the options of one task's N questions under each of S draws.

    For linear predictions a draw is one of the points that represent the distribution of the scores, which are as many
    whatever number of draws is asked for, and always the same.

    Attributes:
        task: name of the task.
        examples: the questions; their gold answers were not used.
        log_probs: ``(S, N, K)`` nats. A question whose answer is generated has two options: its first
            reference, and any other text.
        option_mask: ``(N, K)``, whether an option is present.

    Raises:
        TaskError: the shapes do not fit the questions.
    """

    task: str
    examples: tuple[Example, ...]
    log_probs: Tensor
    option_mask: Tensor

    def __post_init__(self) -> None:
        count, shape = len(self.examples), self.log_probs.shape
        if (
            self.log_probs.ndim != 3
            or not len(self.log_probs)
            or shape[1] != count
            or self.option_mask.shape != shape[1:]
        ):
            raise TaskError(
                f"task {self.task!r}: expected log_probs (S, {count}, K) of {count} questions and option_mask "
                f"({count}, K), got {tuple(shape)} and {tuple(self.option_mask.shape)}."
            )

    def __len__(self) -> int:
        """Number of draws, S."""
        return len(self.log_probs)

    def mean(self) -> Tensor:
        """Return the posterior predictive log-probabilities ``(N, K)``, nats, as :meth:`TaskPosterior.predict` does."""
        found = mean_over_draws(self.log_probs)
        return found.masked_fill(~self.option_mask, absent_score(found.dtype))

    def answers(self, *, abstain_at: float = 0.0) -> list[str | None]:
        """Return the most probable option of each question, or None where its probability is not above ``abstain_at``.

        For a generated answer it is the reference, or None where any other text is more probable. A threshold that
        bounds the share of wrong answers is chosen by :meth:`control_risk`.

        Raises:
            TaskError: the threshold or a probability is NaN, or the probabilities are not normalised.
        """
        if math.isnan(abstain_at):
            raise TaskError("abstain_at: expected a probability, got nan.")
        confidence, chosen = self._confidence()
        texts = [row.options or (row.references[0], None) for row in self.examples]
        rows = zip(texts, confidence.tolist(), chosen.tolist(), strict=True)
        return [options[k] if p > abstain_at else None for options, p, k in rows]

    def control_risk(self, answers: Gold, target: float, *, delta: float | None = None) -> RiskControl:
        """Choose the confidence at which to abstain from these labelled questions.

        Answers to *other* questions of the same task, ``draws.answers(abstain_at=control.threshold)``, then keep the
        promise ``control.guarantee``; see :func:`bayes_lora.metrics.risk_control_threshold`.

        Args:
            answers: the gold answers. The posterior must not have been adapted to these questions.
            target: bound on the share of questions that are answered and wrong; with ``delta``, on the share of wrong
                answers among those given.
            delta: probability that the bound does not hold.

        Raises:
            TaskError: there are no questions, an answer is not among its options, a probability is NaN, or the
                probabilities are not normalised.
            ValueError: ``target`` or ``delta`` is not between 0 and 1.
        """
        if not self.examples:
            raise TaskError(f"control_risk: task {self.task!r} has no questions. Pass labelled ones to predict_draws.")
        confidence, chosen = self._confidence()
        return risk_control_threshold(confidence, chosen == torch.tensor(self._indices(answers)), target, delta)

    def uncertainty(self, answers: Gold | None = None, *, level: float = 0.9) -> pd.DataFrame:
        """Return a frame with one row per question, see :func:`bayes_lora.metrics.uncertainty`.

        Args:
            answers: the gold answers, if they are known.
            level: probability of the credible intervals.
        """
        if not self.examples:
            return _frame_of_nothing(level)
        texts = [row.options or (row.references[0], "(another text)") for row in self.examples]
        width = self.option_mask.shape[-1]
        return of_log_probs(
            self.log_probs,
            None if answers is None else torch.tensor(self._indices(answers)),
            option_mask=self.option_mask,
            task=self.task,
            question=[row.input for row in self.examples],
            options=[[*own, *[""] * (width - len(own))] for own in texts],
            level=level,
        )

    def _confidence(self) -> tuple[Tensor, Tensor]:
        """Return the probability and the index of the most probable option of each question."""
        if not self.examples:
            return torch.zeros(0), torch.zeros(0, dtype=torch.long)
        probs = self.mean().cpu().exp()
        error = (probs.sum(-1) - 1).abs().nan_to_num(torch.inf)
        if not bool((error <= SUM_TOLERANCE).all()):
            row = int(error.argmax())
            raise TaskError(
                f"task {self.task!r}, question {row}: expected probabilities that sum to 1, got "
                f"{probs[row].sum():.4g}. Pass normalised log-probabilities."
            )
        confidence, chosen = probs.max(-1)
        return confidence, chosen

    def _indices(self, answers: Gold) -> list[int]:
        if answers is None or isinstance(answers, str) or len(answers) != len(self.examples):
            got = repr(answers) if answers is None or isinstance(answers, str) else len(answers)
            raise TaskError(f"answers: expected one for each of {len(self.examples)} questions, got {got}.")
        return [_index(i, row, answer) for i, (row, answer) in enumerate(zip(self.examples, answers, strict=True))]

    def to_dataset(self) -> xarray.Dataset:
        """Return an xarray Dataset: ``probability`` with dimensions chain, draw, question and option.

        Probabilities of absent options are NaN. Coordinates are the texts of the questions, and those of the options if
        all questions have the same; ``option_text`` has the texts otherwise. It needs the extra ``arviz``.

        Raises:
            ConfigError: xarray is not installed.
        """
        try:
            import xarray
        except ImportError as error:
            raise ConfigError("to_dataset: xarray is not installed. Install bayes-lora[arviz].") from error

        absent = ~self.option_mask.expand(self.log_probs.shape)
        probability = self.log_probs.exp().masked_fill(absent, torch.nan)[None].cpu()
        count = self.option_mask.shape[-1]
        texts = [[*row.options, *[""] * (count - len(row.options))] for row in self.examples]
        same = texts and not any(row != texts[0] for row in texts) and all(texts[0])
        variables = {"probability": (("chain", "draw", "question", "option"), probability.numpy())}
        if not same and texts:
            variables["option_text"] = (("question", "option"), texts)  # type: ignore[assignment]
        return xarray.Dataset(
            variables,
            coords={
                "chain": [0],
                "draw": range(len(self)),
                "question": [row.input for row in self.examples],
                "option": texts[0] if same else range(count),
            },
            attrs={"task": self.task},
        )


def _index(question: int, row: Example, answer: Any) -> int:
    """Return the index of a gold answer, which is an index or a text."""
    known: Sequence[str] = row.options or row.references
    if isinstance(answer, str):
        if answer not in known:
            raise TaskError(f"answers: expected one of {list(known)} for question {question}, got {answer!r}.")
        return known.index(answer) if row.options else 0
    count = len(row.options) or 2
    try:
        index = int(answer)
    except (TypeError, ValueError):
        index = -1
    if not 0 <= index < count or index != answer:
        raise TaskError(
            f"answers: expected an index in 0..{count - 1} or one of {list(known)} for question {question}, got "
            f"{answer!r}."
        )
    return index


def _frame_of_nothing(level: float) -> pd.DataFrame:
    import pandas

    frame = pandas.DataFrame()
    frame.attrs = {"level": level, "notes": ["there are no questions"]}
    return frame


def prediction_draws(task: str, examples: Sequence[Example], log_probs: Tensor) -> PredictionDraws:
    """Return the predictions ``(S, N, K)`` of a task's examples with the mask of their options."""
    counts = torch.tensor([len(row.options) or 2 for row in examples])
    mask = torch.arange(log_probs.shape[-1]) < counts[:, None]
    return PredictionDraws(task, tuple(examples), log_probs, mask.to(log_probs.device))


def uncertainty(
    draws: PredictionDraws | Sequence[PredictionDraws],
    answers: Gold | Sequence[Gold] | None = None,
    *,
    level: float = 0.9,
) -> pd.DataFrame:
    """Return a frame with one row per question of each task, see :func:`bayes_lora.metrics.uncertainty`.

    Example::

        draws = adapted.predict_draws(task.query)
        frame = bayes_lora.uncertainty(draws, [example.answer for example in task.query])

    Args:
        draws: what :meth:`TaskPosterior.predict_draws` returns, of one task or of several.
        answers: the gold answers, indices of options or their texts; for several tasks a list for each.
        level: probability of the credible intervals.

    Raises:
        TaskError: ``draws`` are others, there is another number of answers than of questions, or one is not among the
            options.
    """
    import pandas

    if isinstance(draws, PredictionDraws):
        return draws.uncertainty(answers, level=level)  # type: ignore[arg-type]
    if not isinstance(draws, Sequence) or not all(isinstance(one, PredictionDraws) for one in draws):
        raise TaskError(
            f"draws: expected what predict_draws returns, got {type(draws).__name__}. For arrays there is "
            "bayes_lora.metrics.uncertainty.uncertainty."
        )
    golds: Sequence[Any] = [None] * len(draws) if answers is None else answers
    if len(golds) != len(draws):
        raise TaskError(f"answers: expected a list for each of {len(draws)} tasks, got {len(golds)}.")
    frames = [one.uncertainty(gold, level=level) for one, gold in zip(draws, golds, strict=True) if one.examples]
    if not frames:
        return _frame_of_nothing(level)
    found = pandas.concat(frames, ignore_index=True)
    found.attrs = {"level": level, "notes": sorted({note for one in frames for note in one.attrs["notes"]})}
    return found
