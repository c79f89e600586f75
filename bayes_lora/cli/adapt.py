"""The commands for a single task: bayes-lora adapt | predict."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from bayes_lora.cli.console import print_line, status
from bayes_lora.cli.options import DATA, Draws, FittedRun, Format, Input, Label, MaxOptions, Overwrite, Steps, Task

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.tasks import Example

# Imports are inside the commands, so that --help is fast: those of torch after the checks, so that errors are too.

__all__ = ["adapt", "predict"]

Tokens = Annotated[int, typer.Option(help="Maximum number of tokens of a generated answer.", min=1)]


def adapt(
    examples: Annotated[Path, typer.Option(help=f"The new task: {DATA}.")],
    output: Annotated[Path, typer.Option(help="Folder for the task's posterior and its PEFT adapter.")],
    run: FittedRun = None,
    task: Task = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    max_options: MaxOptions = None,
    shots: Annotated[
        int | None,
        typer.Option(help="Number of support examples, sampled as in `evaluate`; by default all.", min=1),
    ] = None,
    seed: Annotated[int, typer.Option(help="Seed of the sample, as in `evaluate`, or of the support set.")] = 13,
    steps: Steps = None,
    predict: Annotated[
        Path | None, typer.Option(help="Then predict these examples, and print what the command `predict` prints.")
    ] = None,
    draws: Draws = 10,
    max_new_tokens: Tokens = 32,
    overwrite: Overwrite = False,
) -> None:
    """Adapt to a new task from a few examples; write its posterior and a plain PEFT adapter.

    Example: `bayes-lora adapt --examples tickets.csv --shots 16 --output runs/tickets --predict questions.csv`
    """
    from bayes_lora.cli.task_source import TaskSource, one_task, questions, support_of
    from bayes_lora.runs.folder import HOME, check_fitted, shipped_prior, write_home
    from bayes_lora.utils.progress import hide_loading_bar
    from bayes_lora.utils.storage import check_new_folder, new_folder

    run = shipped_prior() if run is None else run
    check_fitted(run)
    source = TaskSource(examples, format, input, label, max_options)
    chosen = one_task(source, task, seed)
    support = support_of(chosen, seed, shots)
    found = None if predict is None else questions(predict, source.card(chosen))
    check_new_folder(output, overwrite=overwrite, marker=HOME)
    hide_loading_bar()
    from bayes_lora.runs.loading import load_posterior

    posterior = load_posterior(run)
    status(f"{posterior.lm.name}: {posterior.lm.arithmetic}")
    with new_folder(output, overwrite=overwrite, marker=HOME) as folder:
        adapted = posterior.adapt(support, steps=posterior.default_steps if steps is None else steps)
        adapted.save(folder / "posterior")
        adapted.export_peft(folder / "adapter")
        write_home(folder / HOME, run, output, source.card(chosen))
    places = f"posterior in {output / 'posterior'}, PEFT adapter in {output / 'adapter'}"
    if found is None:
        print_line(f"adapted to {len(support)} examples: {places}")
        return
    status(f"adapted to {len(support)} examples: {places}")
    _print_answers(adapted, found, draws, max_new_tokens)


def predict(
    adapted: Annotated[Path, typer.Option(help="A folder written by `adapt`.")],
    examples: Annotated[
        Path, typer.Option(help="A table without answers, or a .jsonl file with `input` and `options` per line.")
    ],
    draws: Draws = 10,
    max_new_tokens: Tokens = 32,
) -> None:
    """Predict with a task's posterior, and print one JSON object per example.

    The columns of a table and the options are those given to `adapt`. Without options the answer is free text.

    Example: `bayes-lora predict --adapted runs/tickets --examples questions.csv > answers.jsonl`
    """
    from bayes_lora.cli.task_source import questions
    from bayes_lora.runs.folder import language_model_of, read_home, read_question_card
    from bayes_lora.utils.progress import hide_loading_bar

    run = read_home(adapted)
    language_model_of(run)
    found = questions(examples, read_question_card(adapted))
    hide_loading_bar()
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.runs.loading import load_language_model_of

    lm = load_language_model_of(run)
    status(f"{lm.name}: {lm.arithmetic}")
    posterior = TaskPosterior.load(adapted / "posterior", lm)
    _print_answers(posterior, found, draws, max_new_tokens)


def _print_answers(
    posterior: TaskPosterior, questions: Sequence[Example | str], draws: int, max_new_tokens: int
) -> None:
    for answer in _answers(posterior, questions, draws, max_new_tokens):
        sys.stdout.write(json.dumps(answer) + "\n")


def _answers(
    posterior: TaskPosterior, questions: Sequence[Example | str], draws: int, max_new_tokens: int
) -> Iterator[dict[str, Any]]:
    """Yield the prediction of each question: an option with the probabilities of all, or a text with its own."""
    choices = [one for one in questions if not isinstance(one, str) and not one.free_form]
    if not choices:
        [texts] = posterior.generate([questions], num_draws=draws, max_new_tokens=max_new_tokens)
        for question, answer in zip(questions, texts, strict=True):
            asked = question if isinstance(question, str) else question.input
            yield {"input": asked, "prediction": answer.text, "log_prob": round(answer.log_prob, 6)}
        return
    [log_probs] = posterior.predict([choices], num_draws=draws)
    for choice, row in zip(choices, log_probs.exp().tolist(), strict=True):
        probs = dict(zip(choice.options, (round(p, 6) for p in row), strict=False))
        yield {"input": choice.input, "prediction": max(probs, key=probs.__getitem__), "probs": probs}
