"""Statistics of tasks: sizes, answers and lengths, and what in them deserves a second look."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from bayes_lora.tasks.task import Example, Task
from bayes_lora.utils.tables import Column, ResultTable

if TYPE_CHECKING:
    from pandas import DataFrame

__all__ = ["Lengths", "count_words", "example_frame", "statistics_table", "task_statistics"]

QUANTILES = (5, 50, 95)
"""Percentiles of lengths."""
RATIO, GAP = 3, 3
"""Options are of very different length if the longest is three times the shortest and three units longer."""


class Lengths(NamedTuple):
    """Length of an example, in tokens or words.

    Attributes:
        row: of what the model reads: in tokens, prompt and options without the options' last tokens; in words, the
            input.
        options: of each option; of a free answer, of its first reference alone.
    """

    row: int
    options: tuple[int, ...]


def count_words(example: Example) -> Lengths:
    """Count the words of the input and of each answer, which needs no tokenizer."""
    answers = example.references[:1] if example.free_form else example.options
    return Lengths(len(example.input.split()), tuple(len(answer.split()) for answer in answers))


def example_frame(task: Task, count: Callable[[Example], Lengths] = count_words) -> DataFrame:
    """Return a row per example: its half, texts, gold answer and lengths (``row``, ``answer``, ``options``)."""
    import pandas

    lengths = [count(example) for example in task.examples]
    return pandas.DataFrame(
        {
            "is_query": [index >= len(task.support) for index in range(len(task))],
            "input": [example.input for example in task.examples],
            "options": [frozenset(example.options) for example in task.examples],
            "references": [frozenset(example.references) for example in task.examples],
            "num_options": [len(example.options) for example in task.examples],
            "output": [example.output for example in task.examples],
            "place": [example.answer for example in task.examples],
            "row": [length.row for length in lengths],
            "answer": [length.options[one.answer] for length, one in zip(lengths, task.examples, strict=True)],
            "shortest": [min(length.options) for length in lengths],
            "longest": [max(length.options) for length in lengths],
        }
    )


def task_statistics(
    tasks: Iterable[Task], count: Callable[[Example], Lengths] = count_words, *, max_length: int | None = None
) -> DataFrame:
    """Compute the statistics of tasks.

    Args:
        tasks: support and query of each are taken together, except for their sizes and for leaks.
        count: from :func:`bayes_lora.episodes.encoder.token_counter`; by default words are counted.
        max_length: limit on a row in the same unit, as that of `Encoder`.

    Returns:
        A row per task, by name, with the columns

        - ``num_support``, ``num_query``: examples in either half;
        - ``num_options``: fewest and most options of an example, (0, 0) if answers are free;
        - ``fixed_options``: whether all examples have the same set of options; true if answers are free;
        - ``top_share``: share of the most frequent answer or, if options are not fixed, of the gold option's most
          frequent place;
        - ``lengths``, ``answer_lengths``: 5th, 50th and 95th percentile of the lengths of rows and of gold answers;
        - ``num_repeats``: examples whose input an earlier example has;
        - ``truncated``, with a ``max_length``: share of the examples of which `Encoder` cuts something: the row, or the
          end of a free answer longer than half of it;
        - ``warnings``: sentences.
    """
    import pandas

    records = {}
    for task in tasks:
        frame = example_frame(task, count)
        fixed = frame["options"].nunique() == 1
        quantiles = frame[["row", "answer"]].describe(percentiles=[q / 100 for q in QUANTILES]).round().loc["5%":"95%"]
        records[task.name] = {
            "num_support": len(task.support),
            "num_query": len(task.query),
            "num_options": (int(frame["num_options"].min()), int(frame["num_options"].max())),
            "fixed_options": fixed,
            "top_share": frame["output" if fixed else "place"].value_counts(normalize=True).max(),
            "lengths": tuple(quantiles["row"].astype(int)),
            "answer_lengths": tuple(quantiles["answer"].astype(int)),
            "num_repeats": int(frame["input"].duplicated().sum()),
            "warnings": tuple(_warnings(frame, task.free_form, fixed)),
        }
        if max_length is not None:
            cut = (frame["row"] > max_length) | (task.free_form & (frame["answer"] > max_length // 2))
            records[task.name]["truncated"] = cut.mean()
    return pandas.DataFrame(list(records.values()), index=list(records))


def statistics_table(statistics: DataFrame, unit: str = "words", max_length: int | None = None) -> ResultTable:
    """Return a table of statistics, a row per task; the lengths of answers are shown only if some task is free-form.

    Args:
        statistics: from :func:`task_statistics`.
        unit: in which lengths were counted.
        max_length: to which ``truncated`` belongs.
    """
    rows = [_row(str(name), one, unit, max_length) for name, one in statistics.iterrows()]
    columns = [
        Column("task", lambda row: row["task"], is_number=False),
        Column("support", lambda row: str(row["num_support"])),
        Column("query", lambda row: str(row["num_query"])),
        Column("options", _options),
        Column("top label", lambda row: f"{row['top_share']:.0%}" + ("" if row["fixed_options"] else "*")),
        Column(f"{unit} 5/50/95%", lambda row: "/".join(str(row[f"{unit}_p{q}"]) for q in QUANTILES), optional=1),
    ]
    if any(not row["max_options"] for row in rows):
        columns.append(Column("answer", lambda row: "/".join(str(row[f"answer_{unit}_p{q}"]) for q in QUANTILES)))
    columns.append(Column("repeats", lambda row: str(row["num_repeats"]), optional=2))
    if max_length is not None:
        columns.append(Column(f">{max_length}", lambda row: f"{row['truncated_share']:.0%}"))
    notes = []
    if not statistics["fixed_options"].all():
        notes.append("* options differ between examples: share of the gold option's most frequent position")
    return ResultTable("tasks", columns, rows, notes=notes)


def _row(name: str, one: Any, unit: str, max_length: int | None) -> dict[str, Any]:
    """Return the values of a row of the table."""
    fewest, most = one.num_options
    row = {"task": name, "num_support": one.num_support, "num_query": one.num_query}
    row |= {"min_options": fewest, "max_options": most, "fixed_options": bool(one.fixed_options)}
    row |= {"top_share": float(one.top_share)}
    for prefix, lengths in (("", one.lengths), ("answer_", one.answer_lengths)):
        row |= {f"{prefix}{unit}_p{q}": int(length) for q, length in zip(QUANTILES, lengths, strict=True)}
    row |= {"num_repeats": one.num_repeats}
    if max_length is not None:
        row |= {"max_length": max_length, "truncated_share": float(one.truncated)}
    return row | {"warnings": list(one.warnings)}


def _options(row: Mapping[str, Any]) -> str:
    fewest, most = row["min_options"], row["max_options"]
    return "free" if not most else str(most) if fewest == most else f"{fewest}-{most}"


def _warnings(frame: DataFrame, free: bool, fixed: bool) -> Iterable[str]:
    inputs, query = frame["input"], frame["is_query"]
    if len(frame) > 1 and fixed and frame["output"].nunique() == 1:
        yield f"all {len(frame)} answers are {frame['output'][0]!r}: there is nothing to tell apart"
    if len(frame) > 1 and not fixed and frame["place"].nunique() == 1:
        place = frame["place"][0] + 1
        yield f"the gold option is always number {place}, and prompts list options in order: shuffle them"
    if leaks := inputs[query].isin(inputs[~query]).sum():
        yield f"{leaks} of {query.sum()} query inputs are in the support as well: remove them from one"
    if free:
        # Whichever reference is given, one of these examples counts it wrong.
        common = frame.groupby("input", sort=False)["references"].agg(lambda sets: len(frozenset.intersection(*sets)))
        if several := list(common.index[common == 0]):
            problem = f"{len(several)} inputs have several answers in as many examples, such as {_short(several[0])}"
            yield f"{problem}: make them references of one example"
        return
    answers = frame.groupby(["input", "options"], sort=False)["output"].nunique()
    if several := list(answers.index[answers > 1]):
        yield f"{len(several)} inputs have several answers among the same options, such as {_short(several[0][0])}"
    gaps = frame["longest"] - frame["shortest"]
    uneven = (frame["longest"] >= RATIO * frame["shortest"]) & (gaps >= GAP)
    if 2 * uneven.sum() >= len(frame):  # a sum over tokens ranks options by their length
        most: Any = frame.loc[gaps[uneven].idxmax()]
        yield (
            f"options are of very different length in {uneven.sum()} of {len(frame)} examples (up to {most.shortest} "
            f"against {most.longest}), and scores that sum over tokens favour short ones: consider "
            "language_model.normalize=mean"
        )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
