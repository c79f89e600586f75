"""The commands for a single task: bayes-lora adapt | predict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_lora.cli.answers import print_answers
from bayes_lora.cli.console import print_line, status
from bayes_lora.cli.options import DATA, Draws, FittedRun, Format, Input, Label, MaxOptions, Overwrite, Steps, Task
from bayes_lora.errors import TaskError

if TYPE_CHECKING:
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.tasks import Example

# Imports are inside the commands, so that --help is fast: those of torch after the checks, so that errors are too.

__all__ = ["adapt", "fitted_run", "predict"]

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
    from bayes_lora.runs.folder import HOME, write_home
    from bayes_lora.utils.progress import hide_loading_bar
    from bayes_lora.utils.storage import check_new_folder, new_folder

    run = fitted_run(run)
    source = TaskSource(examples, format, input, label, max_options)
    chosen = one_task(source, task, seed)
    support = support_of(chosen, seed, shots)
    found = None if predict is None else questions(predict, source.card(chosen))
    check_new_folder(output, overwrite=overwrite, marker=HOME)
    hide_loading_bar()
    from bayes_lora.lm.model_files import model_line
    from bayes_lora.runs.facts import write_adaptation
    from bayes_lora.runs.loading import load_posterior

    posterior = load_posterior(run)
    status(model_line(posterior.lm.name, posterior.lm.arithmetic))
    with new_folder(output, overwrite=overwrite, marker=HOME) as folder:
        adapted = posterior.adapt(support, steps=posterior.default_steps if steps is None else steps)
        adapted.save(folder / "posterior")
        adapted.export_peft(folder / "adapter")
        write_home(folder / HOME, run, output, source.card(chosen), support.examples)
        write_adaptation(folder, adapted, [support])
    places = f"posterior in {output / 'posterior'}, PEFT adapter in {output / 'adapter'}"
    if found is None:
        print_line(f"adapted to {len(support)} examples: {places}")
        return
    status(f"adapted to {len(support)} examples: {places}")
    print_answers(adapted, found, draws, max_new_tokens)


def predict(
    adapted: Annotated[Path, typer.Option(help="A folder written by `adapt`.")],
    examples: Annotated[
        Path, typer.Option(help="A table without answers, or a .jsonl file with `input` and `options` per line.")
    ],
    draws: Draws = 10,
    max_new_tokens: Tokens = 32,
    abstain_at: Annotated[
        float, typer.Option(help="Give no answer whose probability is not above this.", min=0.0, max=1.0)
    ] = 0.0,
    labelled: Annotated[
        Path | None,
        typer.Option(help="Labelled rows, to choose where to abstain by --max-error; not those that `adapt` used."),
    ] = None,
    max_error: Annotated[
        float | None,
        typer.Option(help="Bound on the share of wrong answers among those given, with --labelled.", min=0.0, max=1.0),
    ] = None,
    delta: Annotated[
        float, typer.Option(help="Probability that the bound of --max-error fails.", min=0.0, max=1.0)
    ] = 0.1,
    each_draw: Annotated[
        bool, typer.Option("--each-draw", help="Of free text, also write what each draw answers, and their agreement.")
    ] = False,
) -> None:
    """Predict with a task's posterior, and print one JSON object per example.

    The columns of a table and the options are those given to `adapt`. Without options the answer is free text. Where no
    answer is given, the prediction is null. With `--each-draw`, `draws` holds a text, its log-probability (nats) and
    its group for each draw; `agreement` is the share of draws in the largest group, `entropy` that of groups (nats).

    Example: `bayes-lora predict --adapted runs/tickets --examples questions.csv > answers.jsonl`
    """
    from bayes_lora.cli.task_source import labelled as labelled_rows
    from bayes_lora.cli.task_source import questions
    from bayes_lora.runs.folder import language_model_of, read_home, read_question_card
    from bayes_lora.utils.progress import hide_loading_bar

    if (labelled is None) != (max_error is None):
        raise typer.BadParameter("--labelled and --max-error are given together.")
    run = read_home(adapted)
    language_model_of(run)
    card = read_question_card(adapted)
    found = questions(examples, card)
    known = None if labelled is None else _not_adapted_to(adapted, labelled, labelled_rows(labelled, card))
    hide_loading_bar()
    from bayes_lora.lm.model_files import model_line
    from bayes_lora.posterior.task_posterior import TaskPosterior
    from bayes_lora.runs.loading import load_language_model_of

    lm = load_language_model_of(run)
    status(model_line(lm.name, lm.arithmetic))
    posterior = TaskPosterior.load(adapted / "posterior", lm)
    if known is not None and max_error is not None:
        abstain_at = max(abstain_at, _threshold(posterior, known, draws, max_error, delta))
    print_answers(posterior, found, draws, max_new_tokens, abstain_at, each_draw=each_draw)


def fitted_run(run: Path | None) -> Path:
    """Return a folder with a fitted posterior: the one given, or that of the package, and then say so."""
    from bayes_lora.runs.folder import check_fitted, read_fitted_tasks, shipped_prior

    found = shipped_prior() if run is None else run
    check_fitted(found)
    if run is None:
        status(f"prior: that of this package, learned from {len(read_fitted_tasks(found))} tasks; --run takes another")
    return found


def _not_adapted_to(adapted: Path, path: Path, rows: Sequence[Example]) -> list[Example]:
    """Leave out rows that the posterior was adapted to: of these, what a threshold promises would not hold."""
    from bayes_lora.runs.folder import unseen_examples

    found = unseen_examples(adapted, rows)
    if not found:
        raise TaskError(f"{path}: the posterior was adapted to all of these rows. Give others with --labelled.")
    if len(found) < len(rows):
        status(f"left out {len(rows) - len(found)} of {len(rows)} labelled rows: the posterior was adapted to them")
    return found


def _threshold(posterior: TaskPosterior, known: Sequence[Example], draws: int, max_error: float, delta: float) -> float:
    """Return the probability at which to abstain, and tell what it promises."""
    [found] = posterior.predict_draws([known], num_draws=draws)
    control = found.control_risk([row.answer for row in known], max_error, delta=delta)
    status(
        f"answers above a probability of {max(0.0, control.threshold):.3f}, which are {control.coverage:.0%} of "
        f"{control.num_examples} labelled rows; {control.guarantee}"
    )
    return control.threshold
