"""The commands that inspect tasks: bayes-lora tasks | show. They load at most a model's tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from bayes_lora.cli.console import err, out, print_line, print_remark, print_tables, status
from bayes_lora.cli.options import DATA, Format, Input, Label, MaxLength, MaxOptions, Table, Task
from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.utils.tables import TableFormat

if TYPE_CHECKING:
    from collections.abc import Callable

    from bayes_lora.episodes import Encoder
    from bayes_lora.tasks import Example
    from bayes_lora.tasks.statistics import Lengths

# Imports are inside the commands, so that --help is fast: those of torch after the checks, so that errors are too.

__all__ = ["show", "tasks"]

Tasks = Annotated[Path, typer.Argument(help=f"A folder of tasks, or one task: {DATA}.")]
Model = Annotated[str | None, typer.Option(help="Hub id, folder or GGUF file of the model whose tokenizer to use.")]
Run = Annotated[Path | None, typer.Option(help="A run folder whose tokenizer, template and max_length to use.")]
Seed = Annotated[
    int | None, typer.Option(help="Seed of the support set (MetaICL, CrossFit); by default all are pooled.")
]


def tasks(
    path: Tasks,
    split: Annotated[
        str | None, typer.Option(help="Only the tasks of a split; also show texts that its two halves share.")
    ] = None,
    model: Model = None,
    run: Run = None,
    max_length: MaxLength = None,
    seed: Seed = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    max_options: MaxOptions = None,
    table: Table = TableFormat.TEXT,
) -> None:
    """Show each task's size, options, label balance, lengths and duplicates, and warn about likely errors.

    Lengths are numbers of words of the input or, with --model or --run, of tokens of the whole row.

    Example: `bayes-lora tasks data/crossfit --split cls-45 --model HuggingFaceTB/SmolLM2-135M-Instruct`
    """
    from bayes_lora.cli.task_source import TaskSource
    from bayes_lora.tasks import load_split
    from bayes_lora.tasks.statistics import count_words, statistics_table, task_statistics

    encoder = _encoder(model, run, max_length) if model or run else None
    if encoder is None and max_length is not None:
        raise ConfigError(f"--max-length {max_length} is in tokens: expected --model or --run for the tokenizer.")
    halves = None if split is None else load_split(path, split, allow_missing=True)
    names = None if halves is None else list(dict.fromkeys(halves[0] + halves[1]))
    _check_seed(path, seed)
    loaded = TaskSource(path, format, input, label, max_options).load(names, seed)
    count: Callable[[Example], Lengths] = count_words
    limit, unit = None, "words"
    if encoder is not None:
        from bayes_lora.episodes.encoder import token_counter

        count, limit, unit = token_counter(encoder), encoder.max_length, "tokens"
    statistics = task_statistics(loaded.values(), count, max_length=limit)
    tables = [statistics_table(statistics, unit, limit)]
    if halves is not None:
        from bayes_lora.tasks.overlap import find_overlaps, overlap_table

        training, unseen = loaded.select(halves[0]), loaded.select(halves[1])
        overlaps = find_overlaps(training, unseen)
        tables.append(overlap_table(overlaps, unseen))
    # As text, the second table comes after the warnings of the first, and not at all if it is empty.
    as_text = table is TableFormat.TEXT
    print_tables(tables[:1] if as_text else tables, table)
    for name, warnings in statistics["warnings"].items():
        for warning in warnings:
            console = out if as_text else err
            console.print(f"{name}: {warning}", style="yellow", markup=False, highlight=False, soft_wrap=True)
    if halves is not None and overlaps and as_text:
        print_tables(tables[1:], table)
    elif halves is not None and not overlaps:
        num_unseen, num_training = len(unseen), len(training)
        print_remark(
            f"no text of the {num_unseen} unseen tasks is (nearly) in the {num_training} training tasks", table
        )


def show(
    path: Tasks,
    task: Task = None,
    example: Annotated[int, typer.Option(help="Index of the example, from 0: support, then query.", min=0)] = 0,
    model: Model = None,
    run: Run = None,
    demonstrations: Annotated[int, typer.Option(help="Number of demonstrations before it.", min=0)] = 0,
    max_length: MaxLength = None,
    seed: Seed = None,
    format: Format = None,
    input: Input = None,
    label: Label = None,
    max_options: MaxOptions = None,
    table: Table = TableFormat.TEXT,
) -> None:
    """Show an example as the model reads it: its row, what was cut, and the option tokens that are scored.

    Option tokens are in colour, or each in brackets; the gold option is starred.

    Example: `bayes-lora show data/crossfit --task ag_news --example 3 --run runs/cls --demonstrations 2`
    """
    from bayes_lora.cli.task_source import TaskSource, one_task

    _check_seed(path, seed)
    chosen = one_task(TaskSource(path, format, input, label, max_options), task, seed)
    if example >= len(chosen):
        raise TaskError(f"task {chosen.name!r} has examples 0 to {len(chosen) - 1}, got --example {example}.")
    # Without the example itself, as a query is not part of the support.
    others = [one for index, one in enumerate(chosen.support) if index != example]
    if demonstrations > len(others):
        raise TaskError(
            f"task {chosen.name!r} has {len(others)} other support examples, got --demonstrations {demonstrations}."
        )
    from bayes_lora.cli.show import show_example

    shown = show_example(_encoder(model, run, max_length), chosen.examples[example], others[:demonstrations])
    half = "support" if example < len(chosen.support) else "query"
    summary = f"{chosen.name}, example {example} of {len(chosen)} ({half}): {shown.summary()}"
    if table is not TableFormat.TEXT:
        status(summary)
        print_tables([shown.table()], table)
        return
    print_line(f"{summary}\n")
    out.print(shown.render(colour=out.color_system is not None and not out.no_color), soft_wrap=True)


def _check_seed(path: Path, seed: int | None) -> None:
    if seed is not None and path.is_file():
        raise TaskError(f"{path}: a single file has no support sets by seed. Leave out --seed {seed}.")


def _encoder(model: str | None, run: Path | None, max_length: int | None) -> Encoder:
    """Return the encoder of a run, or that of a model with default settings."""
    from bayes_lora.lm.model_files import warn_of_download
    from bayes_lora.recipes.config import LanguageModelConfig
    from bayes_lora.runs.folder import CONFIG, language_model_of

    if model is not None and run is not None:
        raise ConfigError("--model and --run: expected one of them, because a run defines its model.")
    settings = LanguageModelConfig() if model is None else LanguageModelConfig(name=model)
    if run is not None:
        settings = language_model_of(run)
        warn_of_download(settings.name, settings.revision, run / CONFIG, weights=False)
    from bayes_lora.cli.show import load_encoder

    length = max_length or settings.max_length
    return load_encoder(settings.name, settings.template, length, settings.revision)
