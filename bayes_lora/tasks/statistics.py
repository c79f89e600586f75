"""Statistics of a task: its size, answers and lengths, and what in it deserves a second look."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from bayes_lora.tasks.task import Example, Task

__all__ = ["Lengths", "TaskStatistics", "count_words", "statistics_table", "task_statistics"]


RATIO, GAP = 3, 3
"""Options are of very different length where the longest is three times the shortest and three units longer."""


class Lengths(NamedTuple):
    """Length of an example, in tokens or words.

    Attributes:
        row: what the model reads: in tokens prompt and options, without the options' last tokens; in words the input.
        options: of each option; of a free answer, of its first reference alone.
    """

    row: int
    options: tuple[int, ...]


@dataclass(frozen=True)
class TaskStatistics:
    """What can be said of a task without a model.

    Attributes:
        name: of the task.
        num_support: examples in the support half.
        num_query: examples in the query half.
        num_options: fewest and most options of an example; (0, 0) where answers are free.
        fixed_options: whether all examples have the same set of options; True where answers are free.
        top_share: share of the most frequent answer; where options are not fixed, of the gold option's most frequent
            place.
        lengths: 5th, 50th and 95th percentile of the rows' lengths, see :class:`Lengths`.
        answer_lengths: the same of the gold answers' lengths.
        num_repeats: examples whose input an earlier example has.
        truncated: share of the rows that are longer than a limit; None without a limit.
        warnings: sentences.
    """

    name: str
    num_support: int
    num_query: int
    num_options: tuple[int, int]
    fixed_options: bool
    top_share: float
    lengths: tuple[int, int, int]
    answer_lengths: tuple[int, int, int]
    num_repeats: int
    truncated: float | None
    warnings: tuple[str, ...]

    @property
    def free_form(self) -> bool:
        """Whether answers are free text."""
        return self.num_options == (0, 0)


def count_words(example: Example) -> Lengths:
    """Count the words of the input and of each answer: what can be counted without a tokenizer."""
    answers = example.references[:1] if example.free_form else example.options
    return Lengths(len(example.input.split()), tuple(len(answer.split()) for answer in answers))


def task_statistics(
    task: Task, count_tokens: Callable[[Example], Lengths] = count_words, *, max_length: int | None = None
) -> TaskStatistics:
    """Compute a task's statistics.

    Args:
        task: its support and query are taken together, but for their sizes and for leaks.
        count_tokens: from :func:`token_counter`; by default words are counted.
        max_length: limit on a row in the same unit, as :class:`Encoder` has it.
    """
    examples = task.examples
    lengths = [count_tokens(example) for example in examples]
    rows = np.array([length.row for length in lengths])
    counts = [len(example.options) for example in examples]
    fixed = len({frozenset(example.options) for example in examples}) == 1
    answers = Counter(example.output if fixed else example.answer for example in examples)
    golds = [length.options[example.answer] for length, example in zip(lengths, examples, strict=True)]
    return TaskStatistics(
        name=task.name,
        num_support=len(task.support),
        num_query=len(task.query),
        num_options=(min(counts), max(counts)),
        fixed_options=fixed,
        top_share=max(answers.values()) / len(examples),
        lengths=_percentiles(rows),
        answer_lengths=_percentiles(golds),
        num_repeats=len(examples) - len({example.input for example in examples}),
        truncated=None if max_length is None else _share_cut(task, rows, golds, max_length),
        warnings=tuple(
            warning
            for warning in (
                _constant(examples, fixed),
                _leaks(task),
                _contradictions(examples) if task.free_form else _conflicts(examples),
                None if task.free_form else _uneven(lengths),
            )
            if warning is not None
        ),
    )


def _share_cut(task: Task, rows: np.ndarray, golds: Sequence[int], max_length: int) -> float:
    """Share of the examples of which `Encoder` cuts something: of a free answer longer than half a row, its end."""
    cut = rows > max_length
    if task.free_form:
        cut |= np.array(golds) > max_length // 2
    return float(cut.mean())


def statistics_table(statistics: Iterable[TaskStatistics], unit: str = "words", max_length: int | None = None) -> Table:
    """Show statistics, a line per task; the lengths of answers only where some task is free-form.

    Args:
        statistics: of the tasks.
        unit: in which lengths were counted.
        max_length: to which ``truncated`` belongs.
    """
    table = Table(title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("task", overflow="fold")
    statistics = list(statistics)
    free = any(one.free_form for one in statistics)
    headings = ["support", "query", "options", "top label", f"{unit} 5/50/95%", *["answer"] * free, "repeats"]
    for heading in headings if max_length is None else [*headings, f">{max_length}"]:
        table.add_column(heading, justify="right", no_wrap=True)
    for one in statistics:
        fewest, most = one.num_options
        cells = [
            str(one.num_support),
            str(one.num_query),
            "free" if one.free_form else str(most) if fewest == most else f"{fewest}-{most}",
            f"{one.top_share:.0%}" + ("" if one.fixed_options else "*"),
            "/".join(map(str, one.lengths)),
            *["/".join(map(str, one.answer_lengths))] * free,
            str(one.num_repeats),
        ]
        table.add_row(escape(one.name), *cells, *([] if one.truncated is None else [f"{one.truncated:.0%}"]))
    return table


def _percentiles(lengths: Sequence[int] | NDArray[np.int64]) -> tuple[int, int, int]:
    low, middle, high = np.percentile(lengths, (5, 50, 95)).round().astype(int).tolist()
    return low, middle, high


def _constant(examples: Sequence[Example], fixed: bool) -> str | None:
    outputs, places = {example.output for example in examples}, {example.answer for example in examples}
    if len(examples) < 2:
        return None
    if fixed and len(outputs) == 1:
        return f"all {len(examples)} answers are {examples[0].output!r}: there is nothing to tell apart"
    if not fixed and len(places) == 1:
        place = examples[0].answer + 1
        return f"the gold option is always number {place}, and prompts list options in order: shuffle them"
    return None


def _leaks(task: Task) -> str | None:
    known = {example.input for example in task.support}
    leaks = sum(example.input in known for example in task.query)
    return f"{leaks} of {len(task.query)} query inputs are in the support, too: remove them from one" if leaks else None


def _conflicts(examples: Sequence[Example]) -> str | None:
    answers: dict[tuple[str, frozenset[str]], set[str]] = {}
    for example in examples:
        answers.setdefault((example.input, frozenset(example.options)), set()).add(example.output)
    several = [text for (text, _), outputs in answers.items() if len(outputs) > 1]
    if not several:
        return None
    return f"{len(several)} inputs have several answers among the same options, such as {_short(several[0])}"


def _contradictions(examples: Sequence[Example]) -> str | None:
    """Warn of inputs whose examples have no reference in common: whichever is given, one of them counts it wrong."""
    common: dict[str, set[str]] = {}
    for example in examples:
        known = common.setdefault(example.input, set(example.references))
        known &= set(example.references)
    several = [text for text, references in common.items() if not references]
    if not several:
        return None
    cure = "make them references of one example"
    return f"{len(several)} inputs have several answers in as many examples, such as {_short(several[0])}: {cure}"


def _uneven(lengths: Sequence[Lengths]) -> str | None:
    """Warn of options that a sum over tokens would rank by their length."""
    pairs = [(min(length.options), max(length.options)) for length in lengths]
    uneven = [(low, high) for low, high in pairs if high >= RATIO * low and high >= low + GAP]
    if 2 * len(uneven) < len(pairs):
        return None
    low, high = max(uneven, key=lambda pair: pair[1] - pair[0])
    return (
        f"options are of very different length in {len(uneven)} of {len(pairs)} examples (up to {low} against {high}), "
        "and scores that sum over tokens favour short ones: consider language_model.normalize=mean"
    )


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:57]}...")
