r"""Reader of CrossFit's own tab-separated files.

A task is a folder ``<task>/`` of files ``<task>_<shots>_<seed>_<part>.tsv``, where part is ``train``, ``dev`` or
``test``, or one such file. Each line is ``input<TAB>output``; more outputs, if there are any, are right as well. No
quotes are read, and there is no header. Options have no field:

- *multiple choice*: the input ends in ``(A) iron (B) feather``, or is followed by `` [SEP] `` and a context, and the
  output is the text of one of them. A task is of this kind if more than half of its lines are.
- *classification*: the options are the distinct outputs of all files of the task, in alphabetical order. They must be
  few, and half as many as there are lines, or fewer.
- *free-form*: all others. The outputs of a line are its references.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.folders import seeded_files, seeded_task
from bayes_lora.tasks.readers.table_rows import at
from bayes_lora.tasks.readers.text_files import (
    CannotScore,
    inside,
    lines,
    listed,
    option_texts,
    short,
    warn_above_limit,
)
from bayes_lora.tasks.readers.unifiedqa import MARKER, MAX_READINGS, options_in, same
from bayes_lora.tasks.task import Example, Task

__all__ = ["read_crossfit"]

SEPARATOR = " [SEP] "
# A line of a million letters in brackets is refused as fast as others.
MAX_STARTS, MAX_LISTING = 8, 100_000
Line = tuple[str, str, list[str]]  # place, input, outputs


def read_crossfit(
    path: str | Path, *, seed: int | None = None, options: Sequence[str] | None = None, max_options: int = 64
) -> Task:
    """Read one task, named after its folder or file.

    What is support and what is query, with and without a seed, is as in `read_metaicl`; a single file is all support.

    Args:
        path: the folder or the file.
        seed: which of the folder's seeds to read.
        options: the options of all lines, in order, instead of the distinct outputs.
        max_options: a task of more distinct outputs is free-form, with a warning if they are at most half as many as
            the lines; 0 reads outputs as free-form however few there are.

    Raises:
        CannotScore: all outputs are the same, and few as they are, they are labels.
        TaskError: there is no such task or seed, or a line is malformed or its output is none of the options.
    """
    path = Path(path).absolute()
    if not os.path.isdir(path):
        if seed is not None:
            raise TaskError(f"{path}: a file has no seeds, got seed={seed}; use `Task.split(..., seed={seed})`")
        return Task(path.stem, tuple(_examples(path.stem, [path], options, max_options)[path]))
    files = seeded_files(path, ".tsv", shots="[0-9]{1,9}")
    every = [inside(path, file) for part in files.values() for file in part.values()]
    if not every:
        raise TaskError(f"{path}: no task files here; expected {path.name}_16_<seed>_train.tsv")
    examples = _examples(path.name, every, options, max_options)
    return seeded_task(path, files, seed, lambda file: examples[file])


def _examples(
    name: str, files: list[Path], options: Sequence[str] | None, max_options: int
) -> dict[Path, list[Example]]:
    expected = "one input and its output a line, a tab between them"
    found = {file: [_line(place, text) for place, text in lines(file, "tsv", expected)] for file in files}
    every = [line for part in found.values() for line in part]
    make = _maker(name, every, options, max_options)
    examples: dict[Path, list[Example]] = {file: [] for file in found}
    for file, line in ((file, line) for file, part in found.items() for line in part):
        with at(line[0]):
            examples[file].append(make(line))
    return examples


def _maker(
    name: str, every: Sequence[Line], options: Sequence[str] | None, max_options: int
) -> Callable[[Line], Example]:
    """Return the function that makes an example of a line: of which kind the task is takes all lines to tell."""
    if options is not None:
        return partial(_labelled, labels=option_texts(options))
    if 2 * sum(_listed(line) is not None for line in every) > len(every):
        return _choice
    labels = sorted({output for _, _, outputs in every for output in outputs})
    if 2 * len(labels) > len(every) or any(len(outputs) > 1 for _, _, outputs in every):
        return _free_form
    if len(labels) > max_options:
        warn_above_limit(every[0][0].rpartition(":")[0], len(labels), max_options)
        return _free_form
    if len(labels) < 2:
        problem = f"every output is {short(labels[0])}, and one option leaves nothing to choose"
        raise CannotScore(f"{every[0][0]}: {problem}; leave {name!r} out, or name its labels as `options`", "one label")
    return partial(_labelled, labels=tuple(labels))


def _line(place: str, text: str) -> Line:
    fields = [field.strip() for field in text.split("\t")]
    if len(fields) < 2:
        expected = "expected an input and its output, a tab between them"
        raise TaskError(f"{place}: the output is missing; {expected}; add it, or remove the line")
    if not all(fields[1:]):
        raise TaskError(f"{place}: output {fields.index('', 1)} is empty; fill it in or remove it")
    return place, fields[0], list(dict.fromkeys(fields[1:]))


def _labelled(line: Line, labels: tuple[str, ...]) -> Example:
    _, text, outputs = line
    if len(outputs) > 1:
        raise TaskError(f"expected one output, got {len(outputs)}: {', '.join(map(short, outputs))}; keep one")
    if outputs[0] not in labels:
        problem = f"the output must be one of the options: got {short(outputs[0])}, options are {listed(labels)}"
        raise TaskError(f"{problem}; correct it, or add it to `options`")
    return Example(text, labels, labels.index(outputs[0]))


def _free_form(line: Line) -> Example:
    return Example(line[1], references=tuple(line[2]))


def _listed(line: Line) -> tuple[str, list[str], int] | None:
    """Return question, options and the index of the gold one of a line that lists its options; None of another."""
    _, text, outputs = line
    starts = (marker for marker in MARKER.finditer(text) if marker[1] in "aA1")
    # A context may hold anything, so the options end before it, if there is one.
    spans = [
        (marker.start(), end)
        for marker in itertools.islice(starts, MAX_STARTS)
        for end in (len(text), text.find(SEPARATOR, marker.end()))
        if marker.start() < end <= marker.start() + MAX_LISTING
    ]
    # The question may contain the first letter as well: late beginnings and plain readings are more likely.
    for readings, (start, end) in itertools.product((1, MAX_READINGS), spans[::-1] if len(outputs) == 1 else ()):
        options = options_in(text[start:end], outputs[0], readings)
        gold = [index for index, option in enumerate(options) if same(option, outputs[0])]
        if len(gold) == 1 and len(options) > 1:
            around = (text[:start].strip(), text[end:].removeprefix(SEPARATOR).strip())
            return SEPARATOR.join(part for part in around if part), options, gold[0]
    return None


def _choice(line: Line) -> Example:
    listed = _listed(line)
    if listed is None:
        problem = f"the output {short(line[2][0])} must be one option, once, of those that the input lists"
        raise TaskError(f"{problem} as `(A) ... (B) ...`; most other lines are so: fix or remove this one")
    question, options, gold = listed
    return Example(question, tuple(options), gold)
