"""Cards: YAML files that say how a table (a data set of the Hugging Face hub, or local files) is read as a task.

An example, with comments on what a card may contain::

    name: ag_news                  # the task's name
    path: fancyzhx/ag_news         # a data set of the hub; or files: data.csv, or files: {train: a.csv, test: b.csv}
    split: train                   # read as support; train+test and train[:10%] are splits too
    query_split: test              # read as query; left out, there is none
    input: "{text}"                # columns in braces; {{ and }} are braces
    options: [World, Sports, Business, Sci/Tech]  # of all rows; or {column: choices.text}, or {columns: [A, B]}
    label: label                   # the column that tells which option is right

Without ``options`` the answer is free, and ``label`` is the column that holds it: a text, or a list of texts that are
all right, as ``answers.text`` of SQuAD. More keys are ``config`` and ``revision`` (of a data set of the hub),
``delimiter`` (of CSV), ``letters``, ``labels``, ``max_examples``, ``seed`` and ``merge_duplicates``; :class:`Card`
defines them.
"""

from __future__ import annotations

import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, TypeAdapter, ValidationError

from bayes_lora.errors import ConfigError, TaskError, did_you_mean
from bayes_lora.tasks.task import check_options
from bayes_lora.utils.yaml_files import read_yaml

__all__ = [
    "Card",
    "RowOptions",
    "card_from",
    "card_of",
    "card_values",
    "fill",
    "gallery",
    "key_of",
    "placeholders",
    "read_card",
]

KINDS = (".csv", ".tsv", ".jsonl", ".json", ".parquet")
PIECE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
EITHER = "expected either `path`, a data set of the hub, or `files`, local ones."
HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)


@dataclass(frozen=True)
class RowOptions:
    """Texts that differ from row to row: in one column that holds a list, or in several that hold a text each."""

    column: str | None = None
    columns: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if (self.column is None) == (self.columns is None):
            raise ConfigError("expected either `column`, which holds a list, or `columns`, which hold a text each.")

    @property
    def names(self) -> list[str]:
        """The columns."""
        return list(self.columns or ()) if self.column is None else [self.column]


@dataclass(frozen=True)
class Card:
    """How rows of a table become the examples of a task.

    Where a column is named, ``a.b`` is what the column ``a`` holds under ``b``; of a list of records, the list of
    what each holds there.

    Attributes:
        name: the task's name.
        input: template of the input, with columns in braces. A card without a source, which reads questions only, may
            leave it empty: then it is guessed from the names of the columns.
        options: the options of all rows, in order, or the columns of a row's own. None, or no such key in the YAML
            file: the answer is free.
        label: column of the gold answer: the option's index from 0, its text, or its letter from A. A value that could
            be read in two ways is refused; ``letters`` or ``labels`` say which is meant. A free answer is a text, or a
            list of texts: the first is the target of training, and any of them counts as a match. May be empty as
            ``input`` may.
        path: data set on the hub. The source is either this or ``files``.
        files: a CSV, TSV, JSONL or Parquet file, which is then the split ``train``, or one file for each split.
            Relative paths begin at the card's folder, and stay in it.
        config: which configuration of the data set.
        revision: which commit, tag or branch of the data set.
        delimiter: separates the cells of a CSV or TSV file; by default detected from its first rows: a comma, a
            semicolon, a tab or ``|``.
        split: rows of the support set, as `datasets` spells it.
        query_split: rows of the query set, without those whose input is in support.
        letters: what the options are called in the label column, in order: of all rows, or the columns of a row's own.
        labels: text of the option for each value of the label column; None leaves out the rows with this value.
        max_examples: at most that many examples of either set are drawn; None takes all.
        seed: seed of the draw.
        merge_duplicates: take options of a row that look the same as one option, instead of refusing the row.
        folder: the folder of ``files`` and of the YAML file; not a key of it.
    """

    name: str
    input: str
    options: tuple[str, ...] | RowOptions | None
    label: str
    path: str | None = None
    files: str | dict[str, str] | None = None
    config: str | None = None
    revision: str | None = None
    delimiter: str | None = None
    split: str = "train"
    query_split: str | None = None
    letters: tuple[str, ...] | RowOptions | None = None
    labels: dict[bool | int | float | str, str | None] | None = None
    max_examples: Annotated[int, Field(ge=1)] | None = None
    seed: Annotated[int, Field(ge=0)] = 0
    merge_duplicates: bool = False
    folder: Path = Path()

    def __post_init__(self) -> None:
        """Refuse a card that no table fits."""
        for key in ("options", "letters"):
            if isinstance(getattr(self, key), list):
                object.__setattr__(self, key, tuple(getattr(self, key)))
        sourced = self.path is not None or self.files is not None
        for key in ("name", "split", *["label"] * sourced):
            if not getattr(self, key).strip():
                raise ConfigError(f"`{key}` is empty; fill it in.")
        if not placeholders(self.input) and (self.input or sourced):
            raise ConfigError(f"`input` {self.input!r} names no column; expected one in braces, as in '{{text}}'.")
        if self.query_split == self.split:
            raise ConfigError(f"`query_split` is {self.split!r}, as is `split`; name other rows, or leave it out.")
        if self.max_examples is not None and self.max_examples < 1:
            raise ConfigError(f"`max_examples` must be 1 or more, got {self.max_examples}.")
        self._check_source()
        self._check_answers()

    def _check_source(self) -> None:
        if self.path is not None and self.files is not None:
            raise ConfigError(EITHER)
        if self.path is not None and (not HUB_ID.fullmatch(self.path) or Path(self.path).suffix.lower() in KINDS):
            raise ConfigError(f"`path` {self.path!r} is no name on the hub, as 'owner/data'; give files as `files`.")
        if self.files is not None and (self.config is not None or self.revision is not None):
            raise ConfigError("`config` and `revision` are of a data set of the hub, but there are `files`.")
        kinds = {Path(file).suffix.lower() for file in self.split_files.values()}
        if self.files is not None and (len(kinds) != 1 or not kinds <= {*KINDS}):
            raise ConfigError(f"`files` must be of one kind among {', '.join(KINDS)}; got {self.files!r}.")
        for file in self.split_files.values():
            if not Path(file).is_absolute() and os.path.normpath(file).split(os.sep)[0] == os.pardir:
                raise ConfigError(f"`files` {file!r} leaves the card's folder; move the file there, or the card.")
        if self.delimiter is not None and not kinds & {".csv", ".tsv"}:
            raise ConfigError("`delimiter` is of CSV and TSV files; leave it out.")
        if self.delimiter is not None and (len(self.delimiter) != 1 or self.delimiter in '"\r\n'):
            raise ConfigError(f"`delimiter` must be one character that separates cells, got {self.delimiter!r}.")

    def _check_answers(self) -> None:
        for name in ("letters", "labels", "merge_duplicates"):
            if self.options is None and getattr(self, name) not in (None, False):
                cure = f"give `options`, or leave `{name}` out: `label` then holds a free answer"
                raise ConfigError(f"`{name}` speaks of options, but there are none; {cure}.")
        if self.letters is not None and self.labels is not None:
            raise ConfigError("`letters` and `labels` both say what a label means; leave one out.")
        if isinstance(self.letters, tuple) and len(set(self.letters)) < max(2, len(self.letters)):
            raise ConfigError(f"`letters` must be at least 2 different names, got {list(self.letters)}.")
        if len(self.texts) < len(self.labels or {}):
            raise ConfigError(f"`labels` holds a value in two spellings: {list(self.labels or {})}; leave one out.")
        if self.options is None or isinstance(self.options, RowOptions):
            return
        try:
            check_options(self.options)
        except TaskError as error:
            raise ConfigError(str(error)) from None
        for key, text in (self.labels or {}).items():
            if text is not None and text not in self.options:
                near = did_you_mean(text, self.options, list_all=True)
                raise ConfigError(f"`labels` maps {key!r} to {text!r}, which is none of `options`{near}.")

    @property
    def split_files(self) -> Mapping[str, str]:
        """The file of each split; none for a data set of the hub."""
        return {"train": self.files} if isinstance(self.files, str) else self.files or {}

    @property
    def columns(self) -> list[str]:
        """The columns that the card names."""
        found = [*placeholders(self.input), *[self.label] * bool(self.label)]
        for where in (self.options, self.letters):
            if isinstance(where, RowOptions):
                found += where.names
        return found

    @cached_property
    def texts(self) -> dict[str, str | None]:
        """``labels``, by the values as :func:`key_of` spells them."""
        return {key_of(value): text for value, text in (self.labels or {}).items()}


def key_of(value: object) -> str:
    """Spell a value of the label column: as a table holds it, a YAML file writes it, or CSV keeps it as text."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value)
    return text.lower() if text.lower() in ("true", "false") else text


def placeholders(template: str) -> list[str]:
    """List the columns that a template names, in order.

    Raises:
        ConfigError: a brace has no partner.
    """
    names = []
    for match in PIECE.finditer(template):
        if match[0] in ("{", "}"):
            place = f"{match[0]!r} at position {match.start() + 1} stands alone"
            cure = f"name a column in braces, or write {match[0] * 2!r} for the brace itself"
            raise ConfigError(f"`input` {template!r}: {place}; {cure}.")
        if match[1]:
            names.append(match[1])
    return names


def fill(template: str, value: Callable[[str], str]) -> str:
    """Replace each column that a template names by its value, and doubled braces by single ones."""
    return PIECE.sub(lambda match: value(match[1]) if match[1] else match[0][0], template)


def gallery() -> dict[str, Path]:
    """Return the cards that ship with the package, by the name of their task."""
    with resources.as_file(resources.files("bayes_lora.tasks") / "gallery") as folder:
        return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def read_card(path: str | Path) -> Card:
    """Read a card.

    Raises:
        ConfigError: the file cannot be read as YAML, a key is unknown (near ones are named) or missing, or a value is
            of the wrong type or does not fit another.
    """
    return card_of(path, read_yaml(path))


def card_of(path: str | Path, values: Any) -> Card:
    """Make the card that a file holds; raises as `read_card`."""
    try:
        card = replace(card_from(values), folder=Path(path).parent)
        if card.path is None and card.files is None:
            raise ConfigError(EITHER)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return card


def card_from(values: Any) -> Card:
    """Make a card of what :func:`card_values` returns or a YAML file holds; raises as `read_card`."""
    known = [field.name for field in fields(Card) if field.name != "folder"]
    _check_keys(values, known)
    for key in ("options", "letters"):
        if isinstance(values.get(key), Mapping):
            _check_keys(values[key], ["column", "columns"], f"{key}.")
    try:
        return TypeAdapter(Card).validate_python({"options": None, **values})
    except ValidationError as error:
        raise ConfigError(_problem(error)) from error


def card_values(card: Card) -> dict[str, Any]:
    """Return what JSON can hold of a card: all but defaults and the folder."""
    values: dict[str, Any] = TypeAdapter(Card).dump_python(card, mode="json", exclude={"folder"}, exclude_defaults=True)
    return values


def _check_keys(values: Any, known: list[str], prefix: str = "") -> None:
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a mapping with {', '.join(known)}; got {reprlib.repr(values)}.")
    for key in values:
        if key not in known:
            raise ConfigError(f"unknown key {prefix + str(key)!r}{did_you_mean(str(key), known, list_all=True)}.")


def _problem(error: ValidationError) -> str:
    # Of a key that may be of several types, the deepest problem is the one of the type that was meant.
    worst = max(error.errors(), key=lambda problem: (len(problem["loc"]), "error" in problem.get("ctx", {})))
    raised = worst.get("ctx", {}).get("error")
    if raised:
        return str(raised)
    key, value = worst["loc"][0], worst["input"]
    if worst["type"] == "missing":
        return f"key {key!r} is missing; every card has name, input and label."
    # YAML reads a bare yes, no, on and off as true and false.
    cure = "; put it in quotes" if worst["type"] == "string_type" and isinstance(value, (bool, int, float)) else ""
    return f"`{key}`: {worst['msg']}, got {reprlib.repr(value)}{cure}."
