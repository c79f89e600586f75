"""Overlap: texts of unseen tasks that occur, word for word or nearly, in training tasks.

A text is an example's input. Two texts are compared by the Jaccard similarity |A and B| / |A or B| of their sets of
shingles: the runs of ``shingle_size`` words (Broder, 1997, "On the resemblance and containment of documents"). An
inverted index with a prefix filter (Chaudhuri, Ganti and Kaushik, 2006) finds all pairs without comparing all. Sort the
shingles of each set by one order, the rarest in training first. A pair of similarity t or more has at least t |A|
shingles in common, and at least t |B|, so that the first |A| - ceil(t |A|) + 1 of A and the first |B| - ceil(t |B|) + 1
of B share a shingle. Only these prefixes are indexed and looked up. The search is exact: no pair is missed.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from math import ceil

from bayes_lora.errors import TaskError
from bayes_lora.tasks.task_set import TaskSet
from bayes_lora.utils.tables import Column, ResultTable

__all__ = ["Overlap", "find_overlaps", "normalize_text", "overlap_table"]


@dataclass(frozen=True, slots=True)
class Overlap:
    """A text of an unseen task, and the text of a training task that is most similar to it.

    Attributes:
        unseen_task: Name of the unseen task.
        training_task: Name of the training task.
        unseen_text: The unseen task's input, as it is.
        training_text: The training task's input, as it is.
        similarity: Jaccard similarity of the two sets of shingles, in [threshold, 1].
        exact: Whether the texts are equal but for case, whitespace and punctuation.
    """

    unseen_task: str
    training_task: str
    unseen_text: str
    training_text: str
    similarity: float
    exact: bool


def find_overlaps(
    training: TaskSet, unseen: TaskSet, threshold: float = 0.8, *, shingle_size: int = 3
) -> list[Overlap]:
    """Find the texts of unseen tasks that occur in training tasks.

    Texts that differ only in case, whitespace or punctuation count as one. Where these carry meaning, as in formulae,
    look at the texts before you remove any. A text that is a part of a longer one is not found.

    Args:
        training: tasks to train on; support and query are both searched.
        unseen: tasks to evaluate on; support and query as well.
        threshold: lowest similarity to report, in [0.1, 1]; 1 means equal sets of shingles.
        shingle_size: words per shingle; a shorter text is one shingle. The larger, the more a changed word counts.

    Returns:
        For each different text of an unseen task and each training task at most one overlap, with the most similar of
        its texts; in the order of the unseen tasks and their texts, then of the training tasks.

    Raises:
        TaskError: a parameter is out of range.
    """
    if not 0.1 <= threshold <= 1:
        raise TaskError(f"`threshold` must be in [0.1, 1], got {threshold}; 0.8 finds texts with a few changed words")
    if shingle_size < 1:
        raise TaskError(f"`shingle_size` must be at least 1 word, got {shingle_size}; 3 is usual")
    shingles = _numbered_shingles(shingle_size)
    known = [(task, normal, text, shingles(normal)) for (task, normal), text in _different_texts(training).items()]
    counts = Counter(itertools.chain.from_iterable(one for *_, one in known))

    def prefix(one: frozenset[int]) -> list[int]:
        length = len(one) - ceil(threshold * len(one) - 1e-9) + 1  # a rounding error only makes it longer
        return sorted(one, key=lambda shingle: (counts[shingle], shingle))[:length]

    index: dict[int, list[int]] = defaultdict(list)
    for place, (*_, one) in enumerate(known):
        for shingle in prefix(one):
            index[shingle].append(place)
    found: list[Overlap] = []
    for (task, normal), text in _different_texts(unseen).items():
        one = shingles(normal)
        best: dict[str, Overlap] = {}
        for place in sorted({place for shingle in prefix(one) for place in index.get(shingle, ())}):
            name, other_normal, other_text, other = known[place]
            common = len(one & other)
            similarity, exact = common / (len(one) + len(other) - common), normal == other_normal
            # Equal texts are preferred to those that only have the same shingles.
            if similarity >= threshold and (
                name not in best or (best[name].similarity, best[name].exact) < (similarity, exact)
            ):
                best[name] = Overlap(task, name, text, other_text, similarity, exact)
        found += best.values()
    return found


def overlap_table(overlaps: Iterable[Overlap], unseen: TaskSet) -> ResultTable:
    """Count overlaps per pair of tasks.

    Args:
        overlaps: from :func:`find_overlaps`.
        unseen: the unseen tasks that it was given, for the number of their different texts.
    """
    sizes = Counter(name for name, _ in _different_texts(unseen))
    counts: dict[tuple[str, str], list[Overlap]] = {}
    for overlap in overlaps:
        counts.setdefault((overlap.unseen_task, overlap.training_task), []).append(overlap)
    columns = [
        Column("unseen task", lambda row: row["unseen_task"], is_number=False),
        Column("training task", lambda row: row["training_task"], is_number=False),
        Column("exact", lambda row: str(row["exact"])),
        Column("near", lambda row: str(row["near"])),
        Column("of texts", lambda row: str(row["num_texts"])),
        Column("share", lambda row: f"{row['share']:.1%}"),
    ]
    rows = []
    for (one, other), pair in counts.items():
        exact, total = sum(overlap.exact for overlap in pair), sizes[one]
        row = {"unseen_task": one, "training_task": other, "exact": exact, "near": len(pair) - exact}
        rows.append(row | {"num_texts": total, "share": len(pair) / total})
    return ResultTable("overlap", columns, rows, "Overlap")


def normalize_text(text: str) -> str:
    """Return a text's words in lower case with single spaces between, or its symbols if it has no word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded) or folded.split())


def _different_texts(tasks: TaskSet) -> dict[tuple[str, str], str]:
    """Map a task's name and a normalised text to the first input of the task that is equal once normalised."""
    first: dict[tuple[str, str], str] = {}
    for task in tasks.values():
        for example in task.examples:
            first.setdefault((task.name, normalize_text(example.input)), example.input)
    return first


def _numbered_shingles(size: int) -> Callable[[str], frozenset[int]]:
    """Return a function from a normalised text to its set of shingles, as numbers, which are fast to compare."""
    numbers: dict[tuple[str, ...], int] = {}

    @cache
    def shingles(normal: str) -> frozenset[int]:
        words = normal.split(" ")
        runs = (tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
        return frozenset(numbers.setdefault(run, len(numbers)) for run in runs)

    return shingles
