"""The answers that bayes-lora predict prints: a JSON object on each line."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any, TextIO

from bayes_lora.cli.console import err
from bayes_lora.utils.progress import bars

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.tasks import Example

__all__ = ["CHUNK", "print_answers"]

CHUNK = 256
"""Questions that are answered before the first answer is printed: enough that their forwards are full."""


def print_answers(
    posterior: TaskPosterior,
    questions: Sequence[Example | str],
    draws: int,
    max_new_tokens: int,
    abstain_at: float = 0.0,
    *,
    each_draw: bool = False,
) -> None:
    """Print the answers of some questions as soon as they are there; all are given by the same draws.

    Where standard output is not a terminal, in which answers are progress enough, progress is shown on standard error.
    """
    # What is drawn while weights are used depends on what is computed together.
    size = max(1, len(questions)) if posterior.is_deferred else CHUNK
    chunks = [questions[start : start + size] for start in range(0, len(questions), size)]
    # A bar would redirect what is printed while it is shown to its own console.
    output, told = sys.stdout, len(chunks) > 1 and not sys.stdout.isatty()
    with bars(err) if told else nullcontext() as progress:
        task = progress.add_task("questions", total=len(questions)) if progress else None
        for chunk in chunks:
            more: list[dict[str, Any]] = [{} for _ in chunk]
            if each_draw:  # first, because it refuses questions with options
                more = list(_each_draw(posterior, chunk, draws, max_new_tokens))
            answers = _answers(posterior, chunk, draws, max_new_tokens, abstain_at)
            output.writelines(_line(one | rest, output) for one, rest in zip(answers, more, strict=True))
            output.flush()
            if progress and task is not None:
                progress.advance(task, len(chunk))


def _line(answer: dict[str, Any], output: TextIO) -> str:
    """Return JSON in the letters of the answer, or with escapes where they cannot be printed."""
    line = json.dumps(answer, ensure_ascii=False) + "\n"
    try:
        line.encode(output.encoding or "ascii")
    except UnicodeEncodeError:
        return json.dumps(answer) + "\n"
    return line


def _each_draw(
    posterior: TaskPosterior, questions: Sequence[Example | str], draws: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the agreement of the draws on each question, and what each of them answers."""
    [found] = posterior.generate_draws([questions], num_draws=draws, max_new_tokens=max_new_tokens)
    groups = found.clusters()
    columns = found.agreement(groups), found.entropy(groups), found.log_probs, groups
    for own, agreement, entropy, scores, places in zip(found.texts, *(one.tolist() for one in columns), strict=True):
        rows = zip(own, scores, places, strict=True)
        texts = [{"text": one.text, "log_prob": round(p, 6), "group": group} for one, p, group in rows]
        numbers = {"agreement": agreement, "entropy": entropy}  # NaN, of a single text, is no JSON
        yield {name: None if math.isnan(one) else round(one, 6) for name, one in numbers.items()} | {"draws": texts}


def _answers(
    posterior: TaskPosterior, questions: Sequence[Example | str], draws: int, max_new_tokens: int, abstain_at: float
) -> Iterator[dict[str, Any]]:
    """Yield the prediction of each question: an option with the probabilities of all, or a text with its own."""
    choices = [one for one in questions if not isinstance(one, str) and not one.free_form]
    if not choices:
        [texts] = posterior.generate([questions], num_draws=draws, max_new_tokens=max_new_tokens)
        for question, answer in zip(questions, texts, strict=True):
            asked = question if isinstance(question, str) else question.input
            given = math.exp(answer.log_prob) > abstain_at
            text = answer.text if given else None
            yield {"input": asked, "prediction": text, "log_prob": round(answer.log_prob, 6)}
        return
    [found] = posterior.predict_draws([choices], num_draws=draws)
    for choice, row, text in zip(
        choices, found.mean().exp().tolist(), found.answers(abstain_at=abstain_at), strict=True
    ):
        probs = dict(zip(choice.options, (round(p, 6) for p in row), strict=False))
        yield {"input": choice.input, "prediction": text, "probs": probs}
