"""Answers to a task's questions that are generated under each posterior draw: whether to trust them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeVar

import torch
from torch import Tensor

from bayes_lora.errors import ConfigError
from bayes_lora.lm.generation_draws import GeneratedText
from bayes_lora.metrics.semantic import Same, group_texts, same_text, semantic_entropy

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["GeneratedDraws"]

Value = TypeVar("Value", int, str)


@dataclass(frozen=True)
class GeneratedDraws:
    """Texts that answer one task's N questions, R under each of S draws of the weights: M = S * R for each question.

    A draw is one coherent model, the same for a whole text and for all questions. Texts that were decoded greedily or
    by beam search differ only because the weights do. Samples also differ because the model leaves the text open; with
    a temperature of 1 and all tokens they are samples of the posterior predictive.

    Attributes:
        task: name of the task.
        questions: the questions.
        texts: for each question M texts, those of the first draw first.
        log_probs: ``(N, M)`` log-probability of each text's tokens and its end under the text's own draw, nats; of its
            tokens if it did not end. It is that of the model, without a temperature or a limit on tokens.
        average_log_probs: ``(N, M)`` log of the mean over draws of the same probability, nats; None if it was not
            asked for.
        num_draws: number of draws, S.
    """

    task: str
    questions: tuple[str, ...]
    texts: tuple[tuple[GeneratedText, ...], ...]
    log_probs: Tensor
    average_log_probs: Tensor | None
    num_draws: int

    def __len__(self) -> int:
        """Number of draws, S."""
        return self.num_draws

    def clusters(self, same: Same = same_text) -> Tensor:
        """Return the group of each text, ``(N, M)``: texts of a group say the same. Other methods take the result.

        Args:
            same: whether two answers say the same, ``same(question, one, other)``; see
                :func:`bayes_lora.metrics.semantic.group_texts`. By default
                :func:`bayes_lora.metrics.semantic.same_text`. For longer answers pass a model of entailment.
        """
        rows = [
            group_texts(question, [one.text for one in own], same)
            for question, own in zip(self.questions, self.texts, strict=True)
        ]
        return torch.tensor(rows, dtype=torch.long).reshape(self.log_probs.shape)

    def agreement(self, clusters: Tensor | None = None) -> Tensor:
        """Return the share of texts in the largest group, ``(N,)``: of draws, if each has one text.

        NaN if there is a single text: it does not tell an answer that is certain from one that was not repeated.

        Args:
            clusters: what :meth:`clusters` returns, by default for texts that are equal but for case and spaces.
        """
        groups = self._groups(clusters)
        ones = torch.ones(groups.shape, dtype=torch.double)
        return self._several(torch.zeros_like(ones).scatter_add(-1, groups, ones).amax(-1) / groups.shape[-1])

    def entropy(
        self, clusters: Tensor | None = None, *, weights: Literal["counts", "probability"] = "counts"
    ) -> Tensor:
        """Return the semantic entropy of each question, ``(N,)`` nats, at most ``log(M)``.

        NaN if there is a single text. See :mod:`bayes_lora.metrics.semantic`.

        Args:
            clusters: see :meth:`agreement`.
            weights: ``"counts"``: all texts weigh the same. ``"probability"``: each distinct text has the weight of its
                probability under the average over draws.

        Raises:
            ConfigError: the average over draws is needed, but is not known.
        """
        groups = self._groups(clusters)
        if weights == "counts":
            return self._several(semantic_entropy(groups))
        if weights != "probability":
            raise ConfigError(f"weights: expected 'counts' or 'probability', got {weights!r}.")
        if self.average_log_probs is None:
            raise ConfigError("entropy: the average over draws is not known. Call generate_draws with average=True.")
        # A text that several draws wrote has its probability once.
        repeated = [[own.index(one) < m for m, one in enumerate(own)] for own in self.texts]
        mask = torch.tensor(repeated, dtype=torch.bool).reshape(groups.shape)
        return self._several(semantic_entropy(groups, self.average_log_probs.cpu().masked_fill(mask, -torch.inf)))

    def most_common(self, clusters: Tensor | None = None) -> list[str]:
        """Return the most frequent answer to each question: the most frequent text of the largest group.

        Of groups, or of texts, that are equally frequent, that with the larger sum of probabilities.

        Args:
            clusters: see :meth:`agreement`.
        """
        rows = zip(self._groups(clusters).tolist(), self.texts, self.log_probs.tolist(), strict=True)
        return [_most_common(groups, [one.text for one in own], log_probs) for groups, own, log_probs in rows]

    def answers(self, clusters: Tensor | None = None, *, abstain_at: float = 0.0) -> list[str | None]:
        """Return the most frequent answer to each question, or None where its agreement is not above ``abstain_at``.

        Args:
            clusters: see :meth:`agreement`.
            abstain_at: an agreement, in [0, 1].

        Raises:
            ConfigError: ``abstain_at`` is NaN, or above 0 although there is a single text.
        """
        if math.isnan(abstain_at):
            raise ConfigError("abstain_at: expected an agreement in [0, 1], got nan.")
        groups = self._groups(clusters)
        if groups.shape[-1] == 1 and abstain_at <= 0.0:
            return list(self.most_common(groups))
        if groups.shape[-1] == 1:
            raise ConfigError("abstain_at: a single text has no agreement. Ask for more draws, or for samples.")
        rows = zip(self.most_common(groups), self.agreement(groups).tolist(), strict=True)
        return [text if share > abstain_at else None for text, share in rows]

    def uncertainty(self, clusters: Tensor | None = None) -> pd.DataFrame:
        """Return a frame with one row per question.

        Columns: ``task``, ``question``, ``answer`` (the most frequent one), ``agreement``, ``entropy`` (semantic, nats)
        and ``groups`` (their number). With a single text per question the last three are NaN.

        Args:
            clusters: see :meth:`agreement`.
        """
        import pandas

        groups = self._groups(clusters)
        several = groups.shape[-1] > 1
        counts = torch.tensor([len(set(row)) for row in groups.tolist()], dtype=torch.double)
        frame = pandas.DataFrame({"question": list(self.questions), "answer": self.most_common(groups)}, dtype=object)
        frame.insert(0, "task", self.task)
        frame["agreement"] = self.agreement(groups).numpy()
        frame["entropy"] = self.entropy(groups).numpy()
        frame["groups"] = self._several(counts).numpy()
        frame.attrs["notes"] = [] if several or not len(frame) else ["agreement, entropy, groups: there is one text"]
        return frame

    def to_frame(self, clusters: Tensor | None = None) -> pd.DataFrame:
        """Return a frame with one row per text.

        Columns: ``task``, ``question``, ``draw``, ``text``, ``log_prob`` (nats, under the draw), ``group`` (among those
        of the question), ``ended`` (whether before the maximum number of tokens); and ``average_log_prob`` (nats, under
        the average over draws) if it is known.

        Args:
            clusters: see :meth:`agreement`.
        """
        import pandas

        groups = self._groups(clusters)
        each = groups.shape[-1] // self.num_draws
        rows = [
            (self.task, question, m // each, one.text, one.ended)
            for question, own in zip(self.questions, self.texts, strict=True)
            for m, one in enumerate(own)
        ]
        frame = pandas.DataFrame(rows, columns=["task", "question", "draw", "text", "ended"])
        frame.insert(4, "log_prob", self.log_probs.flatten().cpu().numpy())
        frame.insert(5, "group", groups.flatten().numpy())
        if self.average_log_probs is not None:
            frame["average_log_prob"] = self.average_log_probs.flatten().cpu().numpy()
        return frame

    def _several(self, values: Tensor) -> Tensor:
        return values if self.log_probs.shape[-1] > 1 else torch.full_like(values, torch.nan)

    def _groups(self, clusters: Tensor | None) -> Tensor:
        if clusters is None:
            return self.clusters()
        if clusters.shape != self.log_probs.shape:
            expected = tuple(self.log_probs.shape)
            raise ConfigError(f"clusters: expected groups {expected} of these texts, got {tuple(clusters.shape)}.")
        count = clusters.shape[-1]
        if clusters.is_floating_point() or bool(((clusters < 0) | (clusters >= count)).any()):
            raise ConfigError(f"clusters: expected numbers of groups in 0..{count - 1}. Pass what clusters() returns.")
        return clusters.cpu()


def _most_common(groups: Sequence[int], texts: Sequence[str], log_probs: Sequence[float]) -> str:
    """Return the most frequent text of the largest group."""
    largest = _most_frequent(groups, log_probs)
    inside = [m for m, group in enumerate(groups) if group == largest]
    return _most_frequent([texts[m] for m in inside], [log_probs[m] for m in inside])


def _most_frequent(values: Sequence[Value], log_probs: Sequence[float]) -> Value:
    """Return the most frequent value; among several that whose probabilities have the largest sum, then the first."""
    weights: dict[Value, tuple[int, float]] = {}
    for value, log_prob in zip(values, log_probs, strict=True):
        count, total = weights.get(value, (0, 0.0))
        weights[value] = count + 1, total + math.exp(log_prob)
    return max(weights, key=weights.__getitem__)
