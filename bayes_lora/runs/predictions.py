"""The predictions of an evaluation, question by question, in files that are read without a language model.

``questions.jsonl`` has one JSON object per line: ``task``, ``input``, ``options`` and ``gold``, the index of the gold
option. Where answers are generated, it has ``references`` and ``generated``, the text of each method, instead of the
last two. ``predictions.safetensors`` has one float32 tensor per method, ``(S, C)``: log-probabilities in nats under
each of S draws. Its columns are the options of the first question, then those of the second, and so on. A question
whose answer is generated has two columns: its first reference, and any other text. ``evaluation.json`` has the names of
the methods in order, the SHA-256 of both files, and what the evaluation was made with, see
:class:`bayes_lora.runs.report.Comparison`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from bayes_lora.errors import PosteriorError, TaskError
from bayes_lora.runs.folder import EVALUATION, PREDICTIONS, QUESTIONS
from bayes_lora.tasks.task import Example
from bayes_lora.utils.limits import read_limited
from bayes_lora.utils.reading import SHA256, read_facts, read_tensors
from bayes_lora.utils.storage import write_tensors, write_text

__all__ = ["Predictions", "Question", "read_predictions", "write_predictions"]

METHODS, QUESTIONS_SHA256 = "methods", "questions_sha256"
MAX_BYTES = 1 << 28
"""Maximum size of ``questions.jsonl``, 256 MiB."""


@dataclass(frozen=True)
class Question:
    """A question of an evaluation.

    Attributes:
        task: name of its task.
        example: its text, options and gold answer.
        generated: the generated answer of each method; empty if there are options.
    """

    task: str
    example: Example
    generated: Mapping[str, str] = field(default_factory=dict)

    @property
    def num_columns(self) -> int:
        """Number of its columns in the tensor of a method."""
        return len(self.example.options) or 2


@dataclass(frozen=True)
class Predictions:
    """Questions, and the log-probabilities of their options by method.

    Attributes:
        questions: N questions, in the order of the columns.
        log_probs: by method ``(S, C)``, nats, where C is the number of columns of all questions.
    """

    questions: tuple[Question, ...]
    log_probs: Mapping[str, Tensor]

    @cached_property
    def option_mask(self) -> Tensor:
        """Whether a question has an option, ``(N, K)``."""
        counts = torch.tensor([question.num_columns for question in self.questions], dtype=torch.long)
        return torch.arange(int(counts.max()) if len(counts) else 0) < counts[:, None]

    @property
    def gold(self) -> Tensor:
        """Indices of the gold options, ``(N,)``."""
        return torch.tensor([question.example.answer for question in self.questions], dtype=torch.long)

    @property
    def tasks(self) -> list[str]:
        """Name of the task of each question."""
        return [question.task for question in self.questions]

    def padded(self, method: str) -> Tensor:
        """Return the log-probabilities of a method, ``(S, N, K)`` nats, with -inf for absent options."""
        rows = self.log_probs[method]
        found = rows.new_full((len(rows), *self.option_mask.shape), -torch.inf)
        found[:, self.option_mask] = rows
        return found

    def with_options(self) -> Predictions:
        """Return the questions that have options."""
        kept = [question for question in self.questions if question.example.options]
        columns = [bool(q.example.options) for q in self.questions for _ in range(q.num_columns)]
        chosen = torch.tensor(columns, dtype=torch.bool)
        return Predictions(tuple(kept), {name: rows[:, chosen] for name, rows in self.log_probs.items()})


def write_predictions(folder: Path, predictions: Predictions) -> dict[str, Any]:
    """Write ``questions.jsonl`` and ``predictions.safetensors``; return what ``evaluation.json`` has to hold."""
    lines = [json.dumps(_to_json(question), ensure_ascii=False) + "\n" for question in predictions.questions]
    text = "".join(lines)
    write_text(folder / QUESTIONS, text)
    tensors = {name: rows.float() for name, rows in predictions.log_probs.items()}
    return {
        METHODS: list(tensors),
        SHA256: write_tensors(folder / PREDICTIONS, tensors),
        QUESTIONS_SHA256: hashlib.sha256(text.encode()).hexdigest(),
    }


def read_predictions(folder: Path) -> Predictions:
    """Read the predictions in a folder.

    Raises:
        PosteriorError: a file is missing or damaged, or does not fit the others.
    """
    facts = read_facts(folder / EVALUATION)
    questions = _read_questions(folder / QUESTIONS, facts.get(QUESTIONS_SHA256))
    log_probs = read_tensors(folder / PREDICTIONS, facts.get(SHA256))
    methods, width = facts.get(METHODS), sum(question.num_columns for question in questions)
    if not isinstance(methods, list) or sorted(map(repr, methods)) != sorted(map(repr, log_probs)):
        raise PosteriorError(
            f"{folder / EVALUATION} is damaged: expected the methods {sorted(log_probs)} of {PREDICTIONS}, got "
            f"{methods!r:.200}. Evaluate again."
        )
    for name, rows in log_probs.items():
        if rows.ndim != 2 or not len(rows) or rows.shape[1] != width or not rows.is_floating_point():
            raise PosteriorError(
                f"{folder / PREDICTIONS} is damaged: method {name!r}: expected (S, {width}) floating-point values, got "
                f"{tuple(rows.shape)} of {rows.dtype}. Evaluate again."
            )
    return Predictions(tuple(questions), {name: log_probs[name] for name in methods})


def _to_json(question: Question) -> dict[str, Any]:
    example = question.example
    facts: dict[str, Any] = {"task": question.task, "input": example.input}
    if example.free_form:
        return facts | {"references": list(example.references), "generated": dict(question.generated)}
    return facts | {"options": list(example.options), "gold": example.answer}


def _read_questions(path: Path, sha256: object) -> Sequence[Question]:
    try:
        text = read_limited(path, MAX_BYTES)
        found = hashlib.sha256(text.encode()).hexdigest()
        if found != sha256:
            raise ValueError(f"its SHA-256 is {found}, but {EVALUATION} has {sha256!r:.80}")
        return [_question(line, number) for number, line in enumerate(text.split("\n")[:-1], 1)]
    except FileNotFoundError as error:
        raise PosteriorError(f"{path} is missing. Evaluate again.") from error
    except (OSError, ValueError, TaskError) as error:
        raise PosteriorError(f"{path} is damaged ({error}). Evaluate again.") from error


def _question(line: str, number: int) -> Question:
    facts = json.loads(line)
    if not isinstance(facts, dict) or not isinstance(facts.get("task"), str):
        raise ValueError(f"line {number}: expected an object with a 'task'")
    generated = facts.get("generated", {})
    if not isinstance(generated, dict) or not all(isinstance(text, str) for text in generated.values()):
        raise ValueError(f"line {number}: expected the text of each method in 'generated'")
    try:
        example = Example(
            facts.get("input", ""), facts.get("options", ()), facts.get("gold", 0), facts.get("references", ())
        )
    except TaskError as error:
        raise ValueError(f"line {number}: {error}") from error
    return Question(facts["task"], example, generated)
