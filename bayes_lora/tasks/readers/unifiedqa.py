r"""Reader of UnifiedQA's text-to-text files.

A task is a folder ``<task>/`` of ``train.tsv``, ``dev.tsv`` and ``test.tsv``, or one such file. Each line is a question
and its answer, a tab between them; in the question its parts are separated by the two characters ``\n``::

    which is best conductor? \n (a) iron (b) feather \n metals conduct heat.<TAB>iron

The second part lists the options, if there are any; the last one, if there is one, is the context. Letters may be upper
case. A task is *multiple choice* if more than half of its lines list options; then all must. It is *yes/no* if every
answer is ``yes`` or ``no``. All others (extractive, abstractive) are *free-form*, with one reference a line. No
quotes are read.
"""

from __future__ import annotations

import itertools
import os
import re
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from bayes_lora.errors import TaskError
from bayes_lora.tasks.appearance import appearance
from bayes_lora.tasks.readers.table_rows import at
from bayes_lora.tasks.readers.text_files import inside, lines, listed, short
from bayes_lora.tasks.task import Example, Task

__all__ = ["normal", "options_in", "read_unifiedqa", "same"]

PARTS = ("train", "dev", "test")
YES_NO = ("yes", "no")
# A letter or a number in brackets between spaces: neither f(a) nor (a)symmetric.
MARKER = re.compile(r"(?<!\S)\(([A-Za-z]|[1-9])\)(?=\s|$)")
ALPHABETS = ("abcdefghijklmnopqrstuvwxyz", "ABCDEFGHIJKLMNOPQRSTUVWXYZ", "123456789")
# Options that contain (b) themselves can be read in many ways; the numbers of readings and of letters are limited.
MAX_READINGS, MAX_MARKERS = 64, 200


def read_unifiedqa(path: str | Path, *, query: str | None = None, merge_duplicates: bool = False) -> Task:
    r"""Read one task, named after its folder or file.

    Support is ``train.tsv``; query is ``dev.tsv``, or else ``test.tsv``, without the inputs of
    support. A single file is all support. An input is the question and, on lines of their own, the parts after it;
    the options are removed, because a `PromptTemplate` lists them.

    Args:
        path: the folder or the file.
        query: ``dev`` or ``test``, instead of the first there is.
        merge_duplicates: take an option that a line lists twice as one option, instead of refusing the line.

    Raises:
        TaskError: a file is missing, or a line is malformed or of another kind than the others.
    """
    path = Path(path).absolute()
    if not os.path.isdir(path):
        return Task(path.stem, tuple(_examples([path], merge_duplicates)[path]))
    files = {part: inside(path, path / f"{part}.tsv") for part in PARTS if (path / f"{part}.tsv").exists()}
    if query not in (None, "dev", "test"):
        raise TaskError(f"{path}: `query` must be 'dev' or 'test', got {query!r}; pass one of these")
    for part in ("train", query or "train"):
        if part not in files:
            found = [file.name for file in files.values()]
            raise TaskError(f"{path}: expected {part}.tsv here, got {found}; add the file")
    part = query or next((part for part in PARTS[1:] if part in files), "")
    chosen = [files[part] for part in ("train", part) if part in files]
    examples = _examples(chosen, merge_duplicates)
    support, seen = examples[chosen[0]], {example.input for example in examples[chosen[0]]}
    query_examples = [example for file in chosen[1:] for example in examples[file] if example.input not in seen]
    return Task(path.name, tuple(support), tuple(query_examples))


def _examples(files: list[Path], merge_duplicates: bool) -> dict[Path, list[Example]]:
    expected = "one question and its answer a line, a tab between them"
    found = [(file, place, *_pair(place, text)) for file in files for place, text in lines(file, "tsv", expected)]
    choice = 2 * sum(bool(_divide(question)[1]) for _, _, question, _ in found) > len(found)
    make: Callable[[str, str], Example] = partial(_choice, merge_duplicates=merge_duplicates) if choice else _free_form
    if not choice and all(normal(answer) in YES_NO for *_, answer in found):
        make = _yes_no
    examples: dict[Path, list[Example]] = {file: [] for file in files}
    for file, place, question, answer in found:
        with at(place):
            examples[file].append(make(question, answer))
    return examples


def _pair(place: str, line: str) -> tuple[str, str]:
    fields = line.split("\t")
    if len(fields) != 2:
        cure = "write one tab, between the question and its answer"
        raise TaskError(f"{place}: expected 2 fields, a question and its answer; got {len(fields)}; {cure}")
    if not fields[1].strip():
        raise TaskError(f"{place}: the answer is empty; fill it in or remove the line")
    return fields[0].strip(), fields[1].strip()


def _divide(question: str) -> tuple[str, str]:
    """Return the text without the part that lists the options, and that part."""
    parts = _parts(question)
    at = next((i for i, part in enumerate(parts) if part[:3] in ("(a)", "(A)") and MARKER.match(part)), None)
    listing = "" if at is None else parts.pop(at)
    return "\n".join(parts), listing


def _parts(question: str) -> list[str]:
    return [part.strip() for part in question.split(r"\n") if part.strip()]


def _yes_no(question: str, answer: str) -> Example:
    # A context may begin with (a), but the options are not there.
    return Example("\n".join(_parts(question)), YES_NO, YES_NO.index(normal(answer)))


def _free_form(question: str, answer: str) -> Example:
    return Example("\n".join(_parts(question)), references=(answer,))


def _choice(question: str, answer: str, merge_duplicates: bool) -> Example:
    text, listing = _divide(question)
    if not listing:
        problem = r"no options here, but other lines list them; expected `\n (a) ... (b) ...` in the question"
        raise TaskError(f"{problem}; add them, or remove the line")
    options = options_in(listing, answer)
    if not any(same(option, answer) for option in options):
        problem = f"the answer must be one of the options: got {short(answer)}, options are {listed(options)}"
        raise TaskError(f"{problem}; spell it as the option, or add it to the list")
    return _example(text, options, answer, merge_duplicates)


def _example(text: str, options: list[str], answer: str, merge_duplicates: bool) -> Example:
    """Make an example; options that look the same but for case are one text, which cannot be chosen twice."""
    texts = [normal(option) for option in options]
    first = [i for i, option in enumerate(texts) if option not in texts[:i]]
    if len(first) < len(texts) and not merge_duplicates:
        twice = next(option for i, option in enumerate(options) if i not in first)
        raise TaskError(
            f"option {short(twice)} occurs twice in {listed(options)}; remove it, or pass merge_duplicates=True"
        )
    kept = [options[i] for i in first]
    return Example(text, tuple(kept), [texts[i] for i in first].index(normal(answer)))


def options_in(listing: str, answer: str, readings: int = MAX_READINGS) -> list[str]:
    """Read ``(a) iron (b) feather`` as ``["iron", "feather"]``.

    An option may itself hold ``(a)`` or ``(b)``: of the ways to read them, this is the first that holds the answer; or
    simply the first, each letter at its first occurrence, if none does.
    """
    markers = list(itertools.islice(MARKER.finditer(listing), MAX_MARKERS))
    alphabet = next((letters for letters in ALPHABETS if markers and markers[0][1] == letters[0]), "")
    plain: list[str] = []
    for chain in itertools.islice(_chains(markers[:1], markers, alphabet), readings) if alphabet else ():
        ends = [marker.start() for marker in chain[1:]] + [len(listing)]
        options = [listing[marker.end() : end].strip() for marker, end in zip(chain, ends, strict=True)]
        plain = plain or options
        if len(options) > 1 and any(same(option, answer) for option in options):
            return options
    return plain


def _chains(chain: list[re.Match[str]], markers: list[re.Match[str]], alphabet: str) -> Iterator[list[re.Match[str]]]:
    """Yield the ways in which markers follow the alphabet: those that go on before those that end, early ones first."""
    if len(chain) < len(alphabet):
        for marker in markers:
            if marker[1] == alphabet[len(chain)] and marker.start() > chain[-1].start():
                yield from _chains([*chain, marker], markers, alphabet)
    yield chain


def normal(text: str) -> str:
    """Return a text as it is compared: equal for texts that look the same but for case."""
    return appearance(text).casefold()


def same(option: str, answer: str) -> bool:
    """Whether two texts are equal except for case and spaces; a much longer text is not compared."""
    return len(option) <= 2 * len(answer) + 100 and normal(option) == normal(answer)
