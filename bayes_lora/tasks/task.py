"""What a task is: labelled examples, multiple-choice or free-form, in a support half and a query half."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass
from functools import lru_cache

from bayes_lora.errors import TaskError
from bayes_lora.tasks.appearance import appearance

__all__ = ["Example", "Task", "check_options"]


def check_options(options: tuple[str, ...]) -> None:
    """Raise `TaskError` unless these are at least two answers that look different, none of them blank."""
    if len(options) < 2:
        cure = "for a free answer, give its texts as `references`"
        raise TaskError(f"`options` must hold at least 2 answers to choose from, got {options!r}; {cure}")
    if not all(option.strip() for option in options):
        raise TaskError(f"`options` holds an empty answer: {list(options)}; remove it or fill it in")
    twice = sorted({option for option in options if options.count(option) > 1})
    if twice:
        cure = "remove repeats (readers do, with merge_duplicates=True)"
        raise TaskError(f"`options` holds {', '.join(map(repr, twice))} more than once: {list(options)}; {cure}")
    if alike := _alike(options):
        cure = "write them alike if they are one answer (merge_duplicates=True merges them), else rename one"
        raise TaskError(f"`options` holds {alike[0]!r} and {alike[1]!r}, which look the same: {_spelt(alike)}; {cure}")


@lru_cache(maxsize=1024)  # the examples of a task mostly share their options
def _alike(options: tuple[str, ...]) -> tuple[str, str] | None:
    """Return two options that look the same, if there are any."""
    seen: dict[str, str] = {}
    for option in options:
        first = seen.setdefault(appearance(option), option)
        if first is not option:
            return first, option
    return None


def _spelt(pair: tuple[str, str]) -> str:
    return " and ".join(map(ascii, pair))


@dataclass(frozen=True, slots=True)
class Example:
    """One question with its gold answer: one of its options or, if it has none, free text.

    Attributes:
        input: The text before the answer; not blank.
        options: At least two non-blank answers that look different, in the order in which they are scored; empty if the
            answer is free.
        answer: Index of the gold option, ``0 <= answer < len(options)``; 0 if the answer is free.
        references: The correct texts of a free answer, not blank. The first is the target of training; any of them
            counts as a match. Empty if there are options.
    """

    input: str
    options: tuple[str, ...] = ()
    answer: int = 0
    references: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot be scored."""
        if not isinstance(self.input, str):
            raise TaskError(f"`input` must be a string, got {type(self.input).__name__}")
        if not self.input.strip():
            raise TaskError(f"`input` is empty (got {self.input!r}): give the text that precedes the answer")
        for field in ("options", "references"):
            texts: object = getattr(self, field)
            if not isinstance(texts, (tuple, list)) or not all(isinstance(text, str) for text in texts):
                raise TaskError(f"`{field}` must be a tuple of strings, got {texts!r}")
            object.__setattr__(self, field, tuple(texts))  # a list would make the example unhashable
        if not self.references:
            check_options(self.options)
        elif self.options:
            raise TaskError(
                f"`references` {list(self.references)} are of a free answer, but there are `options` "
                f"{list(self.options)}; give either"
            )
        elif not all(text.strip() for text in self.references):
            raise TaskError(f"`references` holds an empty answer: {list(self.references)}; remove it or fill it in")
        if not isinstance(self.answer, int) or isinstance(self.answer, bool):
            raise TaskError(f"`answer` must be the integer index of an option, got {self.answer!r}")
        if not 0 <= self.answer < max(1, len(self.options)):
            raise TaskError(
                f"`answer` must be in 0..{max(1, len(self.options)) - 1}, the indices of the options "
                f"{list(self.options)}; got {self.answer}"
            )
        self._check_characters()

    def _check_characters(self) -> None:
        try:
            "".join((self.input, *self.options, *self.references)).encode()
        except UnicodeEncodeError as error:
            half = ascii(error.object[error.start])
            raise TaskError(
                f"`input`, `options` or `references` holds half of a surrogate pair ({half}), which is no "
                "character; write both halves"
            ) from None

    @property
    def free_form(self) -> bool:
        """Whether the answer is free text."""
        return not self.options

    @property
    def output(self) -> str:
        """The gold answer's text; of a free one the first."""
        return self.references[0] if self.free_form else self.options[self.answer]


@dataclass(frozen=True, slots=True)
class Task:
    """A named set of examples that share one set of LoRA weights.

    Attributes:
        name: The task's name, unique in a `TaskSet`.
        support: Labelled examples to condition on.
        query: Examples to predict; disjoint from `support`.
    """

    name: str
    support: tuple[Example, ...]
    query: tuple[Example, ...] = ()

    def __post_init__(self) -> None:
        """Refuse a task without a name or without examples."""
        if not self.name:
            raise TaskError("`name` of a task is empty; every task needs a different name")
        object.__setattr__(self, "support", tuple(self.support))
        object.__setattr__(self, "query", tuple(self.query))
        if not self.examples:
            raise TaskError(f"task {self.name!r} has no examples; give at least one in `support` or `query`")
        free = sum(example.free_form for example in self.examples)
        if 0 < free < len(self):
            raise TaskError(
                f"task {self.name!r}: {free} of {len(self)} examples have no options, but the others do, and metrics "
                "of the two kinds cannot be averaged; make two tasks of them"
            )

    @property
    def examples(self) -> tuple[Example, ...]:
        """All examples: support, then query."""
        return self.support + self.query

    @property
    def free_form(self) -> bool:
        """Whether answers are free text: then no example has options, else all have."""
        return self.examples[0].free_form

    def __len__(self) -> int:
        """Number of examples, support and query together."""
        return len(self.support) + len(self.query)

    def split(self, num_support: int, *, seed: int, num_query: int | None = None) -> Task:
        """Redraw support and query, disjoint, from all examples of this task.

        Where all examples share one set of options, they are dealt from the classes (gold answers) in turn,
        first to support and then to query, so that the support counts of two classes differ by at most one
        until a class runs out. Otherwise the draw is uniform.

        Args:
            num_support: Size of the new support set.
            seed: Seed of the draw; the same seed on the same task gives the same split.
            num_query: Size of the new query set; all remaining examples when None.

        Raises:
            TaskError: The task has fewer examples than asked for.
        """
        _check_count(self.name, "num_support", num_support)
        _check_count(self.name, "num_query", num_query)
        asked = num_support + (num_query or 0)
        if asked > len(self):
            detail = f" ({num_support} support + {num_query} query)" if num_query else ""
            raise TaskError(
                f"task {self.name!r} has {len(self)} examples, but {asked} were asked for"
                f"{detail}; ask for fewer, or leave this task out"
            )
        dealt = _deal(self.examples, random.Random(seed))
        stop = None if num_query is None else asked
        return Task(self.name, tuple(dealt[:num_support]), tuple(dealt[num_support:stop]))

    def subset(self, num_support: int | None = None, num_query: int | None = None, *, seed: int) -> Task:
        """Keep a random part of support and of query, in their present order; None keeps all.

        Args:
            num_support: How many of the support examples to keep.
            num_query: How many of the query examples to keep.
            seed: Seed of the draw.

        Raises:
            TaskError: A half has fewer examples than asked for.
        """
        rng = random.Random(seed)
        support = self._sample("support", self.support, num_support, rng)
        query = self._sample("query", self.query, num_query, rng)
        return Task(self.name, support, query)

    def shuffle_options(self, *, seed: int) -> Task:
        """Shuffle the options of every example, to counter position bias.

        Args:
            seed: Seed of the orders; with a task's name and an example's text it gives the same order again.
        """

        def shuffled(example: Example) -> Example:
            if example.free_form:
                return example
            order = list(range(len(example.options)))
            random.Random(f"{seed} {self.name} {example.input}").shuffle(order)
            return Example(example.input, tuple(example.options[i] for i in order), order.index(example.answer))

        return Task(self.name, tuple(map(shuffled, self.support)), tuple(map(shuffled, self.query)))

    def _sample(
        self, half: str, examples: tuple[Example, ...], count: int | None, rng: random.Random
    ) -> tuple[Example, ...]:
        _check_count(self.name, f"num_{half}", count)
        if count is None:
            return examples
        if count > len(examples):
            raise TaskError(
                f"task {self.name!r} has {len(examples)} {half} examples, but {count} were asked "
                "for; ask for fewer, or redraw both halves with `split`"
            )
        return tuple(examples[index] for index in sorted(rng.sample(range(len(examples)), count)))


def _check_count(name: str, field: str, count: int | None) -> None:
    if count is not None and count < 0:
        raise TaskError(f"task {name!r}: `{field}` must be 0 or more, got {count}")


def _deal(examples: tuple[Example, ...], rng: random.Random) -> list[Example]:
    """Shuffle; if the label set is fixed, deal one example of each class in turn."""
    shuffled = rng.sample(examples, len(examples))
    if examples[0].free_form or len({frozenset(example.options) for example in examples}) > 1:
        return shuffled
    classes: dict[str, list[Example]] = {}
    for example in shuffled:
        classes.setdefault(example.output, []).append(example)
    rounds = itertools.zip_longest(*classes.values())
    return [example for dealt in rounds for example in dealt if example is not None]
