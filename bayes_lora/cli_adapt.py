"""The command line's way with one task: bayes-lora adapt | predict."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_lora.cli_options import DATA, Draws, Format, Input, Label, Overwrite, Run, Steps, Task
from bayes_lora.console import say
from bayes_lora.errors import TaskError

if TYPE_CHECKING:
    from bayes_lora.posterior import Posterior

# Heavy imports (torch, transformers) stand inside the commands, so that --help answers at once.

__all__ = ["adapt", "load_posterior", "predict"]


def adapt(
    run: Run,
    examples: Annotated[Path, typer.Option(help=f"The new task: {DATA}.")],
    output: Annotated[Path, typer.Option(help="Folder for the task's posterior and its PEFT adapter.")],
    task: Task = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    shots: Annotated[
        int | None, typer.Option(help="So many examples, drawn as by evaluate; by default all.", min=1)
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the draw, as for evaluate; or which support set.")] = 13,
    steps: Steps = 10,
    overwrite: Overwrite = False,
) -> None:
    """Adapt to a new task from a few examples; write its posterior and a plain PEFT adapter.

    Example: `bayes-lora adapt --run runs/demo --examples tickets.csv --shots 16 --output runs/tickets`
    """
    from bayes_lora.run_folder import HOME, write_home
    from bayes_lora.storage import check_new_folder, new_folder
    from bayes_lora.task_options import TaskSource, one_task, support_of

    source = TaskSource(examples, format, input, label)
    chosen = one_task(source, task, seed)
    support = support_of(chosen, seed, shots)
    check_new_folder(output, overwrite=overwrite, marker=HOME)
    posterior = load_posterior(run)
    with new_folder(output, overwrite=overwrite, marker=HOME) as folder:
        adapted = posterior.adapt(support, steps=steps)
        adapted.save(folder / "posterior")
        adapted.export_peft(folder / "adapter")
        write_home(folder / HOME, run, output, source.form(chosen))
    places = f"posterior in {output / 'posterior'}, PEFT adapter in {output / 'adapter'}"
    say(f"adapted to {len(support)} examples: {places}")


def predict(
    adapted: Annotated[Path, typer.Option(help="A folder that `adapt` wrote.")],
    examples: Annotated[
        Path, typer.Option(help="A table without answers, or a .jsonl file with `input` and `options` per line.")
    ],
    draws: Draws = 10,
) -> None:
    """Predict with a task's posterior; prints one JSON object per example.

    Columns of a table, and the options, are those that `adapt` was given.

    Example: `bayes-lora predict --adapted runs/tickets --examples questions.csv > answers.jsonl`
    """
    from bayes_lora.progress import hide_loading_bar
    from bayes_lora.run_folder import load_language_model_of, read_home, read_question_form
    from bayes_lora.task_options import questions
    from bayes_lora.task_posterior import TaskPosterior
    from bayes_lora.tasks import Example

    run = read_home(adapted)
    found = questions(examples, read_question_form(adapted))
    choices = [question for question in found if isinstance(question, Example)]
    if len(choices) < len(found):
        raise TaskError(
            f"{examples}: {adapted} was adapted to free text, and only options are predicted. Adapt to some."
        )
    hide_loading_bar()
    posterior = TaskPosterior.load(adapted / "posterior", load_language_model_of(run))
    [log_probs] = posterior.predict([choices], num_draws=draws)
    for question, row in zip(choices, log_probs.exp().tolist(), strict=True):
        probs = dict(zip(question.options, (round(p, 6) for p in row), strict=False))
        best = max(probs, key=probs.__getitem__)
        sys.stdout.write(json.dumps({"input": question.input, "prediction": best, "probs": probs}) + "\n")


def load_posterior(run: Path) -> Posterior:
    """Load a run's posterior, without a bar."""
    from bayes_lora.posterior import Posterior
    from bayes_lora.progress import hide_loading_bar

    hide_loading_bar()
    return Posterior.load(run / "posterior")
