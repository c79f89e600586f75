"""Predictions of a task's questions under each posterior draw: what a notebook analyses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from bayes_lora.infer.predictive import mean_over_draws
from bayes_lora.tasks.task import Example
from bayes_lora.types import absent_score

if TYPE_CHECKING:
    import xarray

__all__ = ["PredictionDraws", "prediction_draws"]


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
    """

    task: str
    examples: tuple[Example, ...]
    log_probs: Tensor
    option_mask: Tensor

    def __len__(self) -> int:
        """Number of draws, S."""
        return len(self.log_probs)

    def mean(self) -> Tensor:
        """Return the posterior predictive log-probabilities ``(N, K)``, nats, as :meth:`TaskPosterior.predict` does."""
        found = mean_over_draws(self.log_probs)
        return found.masked_fill(~self.option_mask, absent_score(found.dtype))

    def answers(self, *, abstain_at: float = 0.0) -> list[str | None]:
        """Return the most probable option of each question, or None where its probability is below ``abstain_at``.

        For a generated answer it is the reference, or None where any other text is more probable.
        """
        confidence, chosen = self.mean().exp().max(-1) if self.examples else (torch.zeros(0), torch.zeros(0))
        texts = [row.options or (row.references[0], None) for row in self.examples]
        return [
            options[int(k)] if float(p) >= abstain_at else None
            for options, p, k in zip(texts, confidence, chosen, strict=True)
        ]

    def to_dataset(self) -> xarray.Dataset:
        """Return an xarray Dataset: ``probability`` with dimensions chain, draw, question and option.

        Probabilities of absent options are NaN. Coordinates are the texts of the questions, and those of the options if
        all questions have the same; ``option_text`` has the texts otherwise. It needs the extra ``arviz``.
        """
        import xarray

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


def prediction_draws(task: str, examples: Sequence[Example], log_probs: Tensor) -> PredictionDraws:
    """Return the predictions ``(S, N, K)`` of a task's examples with the mask of their options."""
    counts = torch.tensor([len(row.options) or 2 for row in examples])
    mask = torch.arange(log_probs.shape[-1]) < counts[:, None]
    return PredictionDraws(task, tuple(examples), log_probs, mask.to(log_probs.device))
