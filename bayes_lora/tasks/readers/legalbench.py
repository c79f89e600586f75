"""Reader of LegalBench's folders.

A task is a folder ``<task>/`` of ``base_prompt.txt`` and ``train.tsv``, and perhaps ``test.tsv`` (of the hub). A table
has a first row of column names; cells in double quotes may hold tabs and line ends. The column ``answer`` holds the
answer. The prompt is a template in which ``{{text}}`` is replaced by the cell of the column ``text``. Before the query
it holds *demonstrations*: the rows of ``train.tsv``, solved.

The options are those that the prompt lists in lines ``Option A: ...`` (then they are the letters), or ``No`` and
``Yes`` if there is no other answer, or else all distinct answers of the task, in alphabetical order: there must be
few of them, and the prompt, without its demonstrations, must name every one, or half of the rows, or more, repeat one.
All other tasks are free-form, and a cell is one reference: if it lists names, all of them are asked for, and the
answer is the list. One in brackets and quotes, as Python writes it, loses them, as in the demonstrations.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.table_rows import Row, Table, at, read_table
from bayes_lora.tasks.readers.text_files import (
    CannotScore,
    inside,
    listed,
    option_texts,
    read_text,
    short,
    warn_above_limit,
)
from bayes_lora.tasks.task import Example, Task

__all__ = ["read_legalbench", "without_demonstrations"]

PLACEHOLDER = re.compile(r"\{\{([^{}\n]+)\}\}")
LISTED = re.compile(r"^[ \t]*Option ([A-Z])[ \t]*:", re.MULTILINE)
# Shorter cells may occur in the instructions by chance.
TELLING_LENGTH = 20
NO_YES = ("No", "Yes")
# A list of texts as Python writes it; of other escapes than quotes the data hold none.
QUOTED = r"""'[^'\n]*'|"[^"\n]*\""""
PYTHON_LIST = re.compile(rf"\[(?:{QUOTED})(?:, (?:{QUOTED}))*\]")


def read_legalbench(
    path: str | Path,
    *,
    demonstrations: bool = False,
    answer: str = "answer",
    options: Sequence[str] | None = None,
    max_options: int = 32,
    separator: str | None = None,
) -> Task:
    """Read one task, named after its folder.

    Support is ``train.tsv``, query is ``test.tsv`` if there is one, without the inputs of support. An input is the
    prompt with the row's cells in it; it ends as the prompt does, often with ``Answer:``, so that
    ``PromptTemplate("{input}")`` suits it.

    Args:
        path: the folder.
        demonstrations: whether the input keeps the prompt's demonstrations. They are the examples of support, with
            their answers: a model that reads them need not learn from support, and they take most of its context.
        answer: column of the answers.
        options: the options of all rows, in order.
        max_options: a task of more distinct answers is free-form, with a warning if they would otherwise be options.
        separator: separates answers that are all right in a cell of a free-form task, as the comma in
            the test half of definition_extraction.

    Raises:
        CannotScore: the task has no rows, or the same answer in all of them.
        TaskError: a file or a column is missing, a row is malformed, or its answer is none of the options.
    """
    if separator == "":
        raise TaskError("`separator` is empty; expected what separates answers, as in ','; None separates nothing")
    path = Path(path).absolute()
    prompt = read_text(inside(path, path / "base_prompt.txt"), "prompt")
    train = _table(path, "train.tsv", answer)
    test = _table(path, "test.tsv", answer) if (path / "test.tsv").exists() else Table(path / "test.tsv")
    if not train.rows:
        problem = "no rows below its header; the few-shot half holds none of this task"
        raise CannotScore(f"{path / 'train.tsv'}: {problem}; add rows, or leave {path.name!r} out", "without rows")
    short_prompt = without_demonstrations(prompt, train.rows)
    _check_prompt(path, short_prompt, [train, test] if test.rows else [train])
    rows = train.rows + test.rows
    fixed = option_texts(options) if options is not None else _options(path, short_prompt, rows, answer, max_options)
    template = prompt if demonstrations else short_prompt
    examples = [_example(row, template, answer, fixed, separator) for row in rows]
    support, query = examples[: len(train.rows)], examples[len(train.rows) :]
    seen = {example.input for example in support}
    return Task(path.name, tuple(support), tuple(example for example in query if example.input not in seen))


def without_demonstrations(prompt: str, rows: Sequence[Row] = ()) -> str:
    """Cut the solved rows out of a prompt: the text between the instructions and the query.

    The query begins on the line of the first placeholder, with a label such as ``Clause:``. The first line that begins
    with the same label, or that holds one of the rows, begins the demonstrations.
    """
    first = PLACEHOLDER.search(prompt)
    if first is None:
        return prompt
    query = prompt.rfind("\n", 0, first.start()) + 1
    before = prompt[:query]
    label, colon, _ = prompt[query : first.start()].partition(":")
    starts = [query]
    if label.strip():
        starts += [match.start() for match in re.finditer(rf"^[ \t]*{re.escape(label.strip() + colon)}", before, re.M)]
    cells = (cells.get(first[1], "").strip() for _, cells in rows)
    places = (before.find(cell) for cell in cells if len(cell) >= TELLING_LENGTH)
    starts += [before.rfind("\n", 0, place) + 1 for place in places if place >= 0]
    return prompt[: min(starts)] + prompt[query:]


def _table(path: Path, name: str, answer: str) -> Table:
    file = inside(path, path / name)
    if name == "train.tsv" and not file.exists():
        raise CannotScore(f"{file}: there is no such file; add it, or leave {path.name!r} out", "without rows")
    table = read_table(file)
    table.require(answer, "name the column of the answers as `answer`")
    return table


def _check_prompt(path: Path, prompt: str, tables: Sequence[Table]) -> None:
    file = path / "base_prompt.txt"
    columns = PLACEHOLDER.findall(prompt)
    if not columns:
        raise TaskError(f"{file}: no placeholder such as {{{{text}}}} here; without one all inputs are the same")
    for table in tables:
        for column in columns:
            table.require(column, f"{file.name} has a placeholder for it")


def _options(path: Path, prompt: str, rows: Sequence[Row], answer: str, max_options: int) -> tuple[str, ...]:
    """Return the options that all rows share; none if the task is free-form."""
    letters = tuple(dict.fromkeys(LISTED.findall(prompt)))
    if len(letters) > 1:
        return letters
    answers = sorted({cells[answer].strip() for _, cells in rows} - {""})
    if answers and set(answers) <= set(NO_YES):
        return NO_YES
    named = all(re.search(rf"(?<!\w){re.escape(text)}(?!\w)", prompt, re.IGNORECASE) for text in answers)
    if not (named or 2 * len(answers) <= len(rows)):
        return ()
    if len(answers) > max_options:
        warn_above_limit(path, len(answers), max_options)
        return ()
    if len(answers) < 2:
        problem = f"every answer is {short(''.join(answers))}, and one option leaves nothing to choose"
        cure = f"leave {path.name!r} out, or name its answers as `options`"
        raise CannotScore(f"{rows[0][0]}: {problem}; {cure}", "one label")
    return tuple(answers)


def _example(row: Row, template: str, answer: str, options: tuple[str, ...], separator: str | None) -> Example:
    place, cells = row
    gold = cells[answer].strip()
    if not gold:
        raise TaskError(f"{place}: `{answer}` is empty; fill it in or remove the row")
    if options and gold not in options:
        problem = f"`{answer}` must be one of the options: got {short(gold)}, options are {listed(options)}"
        raise TaskError(f"{place}: {problem}; correct it, or name all answers as `options`")
    columns = PLACEHOLDER.findall(template)
    if not any(cells[column].strip() for column in columns):
        raise TaskError(f"{place}: nothing to put into the prompt: {', '.join(columns)} empty; remove the row")
    # One pass: a cell may contain braces as well.
    text = PLACEHOLDER.sub(lambda match: cells[match[1]].strip(), template).strip()
    with at(place):
        if options:
            return Example(text, options, options.index(gold))
        return Example(text, references=_references(gold, separator))


def _references(cell: str, separator: str | None) -> tuple[str, ...]:
    if PYTHON_LIST.fullmatch(cell):
        cell = ", ".join(text[1:-1] for text in re.findall(QUOTED, cell))
    texts = [cell] if separator is None else [text.strip() for text in cell.split(separator)]
    return tuple(dict.fromkeys(texts))
