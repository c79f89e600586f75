"""Overlap: texts of unseen tasks that occur, word for word or nearly, in training tasks.

A text is an example's input; two are compared as sets of shingles, the runs of ``shingle_size`` words of each, by their
Jaccard similarity |A and B| / |A or B| (Broder, 1997, "On the resemblance and containment of documents"). Comparing all
pairs takes too long, so MinHash picks candidates: a random hash takes its minimum over A and over B at the same shingle
with a probability equal to the similarity. Of ``num_permutations`` such minima a text's signature is made, cut into b
bands of r, and two texts are candidates where a band agrees: with probability 1 - (1 - s^r)^b at similarity s. r is as
large as it may be for a pair *at* the threshold to be missed with a probability of at most :data:`MISS`; pairs that are
more alike are missed more rarely, equal ones never. Of each candidate the similarity itself is computed, so what is
reported is exact, and nothing below the threshold is.

This is forty lines of numpy rather than a dependency: datasketch would bring SciPy along.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from hashlib import blake2b

import numpy as np
from numpy.typing import NDArray
from rich.markup import escape
from rich.table import Table

from bayes_lora.errors import TaskError
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["Overlap", "find_overlaps", "normalize_text", "overlap_table"]

MISS = 1e-3
"""Probability with which a pair of texts exactly as similar as the threshold may be missed."""

CHUNK = 1 << 16
"""Candidate pairs whose signatures are compared together, which bounds memory."""

BASE = 0x9E3779B97F4A7C15
"""Of the polynomial that hashes words in their order: an odd number without pattern, 2^64 over the golden ratio."""

Hashes = NDArray[np.uint64]


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
    training: TaskSet,
    unseen: TaskSet,
    threshold: float = 0.8,
    *,
    shingle_size: int = 3,
    num_permutations: int = 128,
    seed: int = 0,
) -> list[Overlap]:
    """Find the texts of unseen tasks that occur in training tasks.

    Texts that differ only in case, whitespace or punctuation count as one; where these carry meaning, as in formulae,
    look at the texts before you drop any. That a text is part of a longer one is not found.

    Args:
        training: Tasks to train on; support and query are both looked at.
        unseen: Tasks to evaluate on; so are theirs.
        threshold: Lowest similarity to report, in [0.1, 1]; 1 means equal sets of shingles.
        shingle_size: Words per shingle; a shorter text is one shingle. The larger, the more a changed word counts.
        num_permutations: Length of the signature.
        seed: Of the hashes, which decide what is missed at a similarity near the threshold.

    Returns:
        For each different text of an unseen task and each training task at most one overlap, with the most similar of
        its texts; in the order of the unseen tasks and their texts, then of the training tasks.

    Raises:
        TaskError: A parameter is out of range.
    """
    if not 0.1 <= threshold <= 1:
        raise TaskError(f"`threshold` must be in [0.1, 1], got {threshold}; 0.8 finds texts with a few changed words")
    if shingle_size < 1:
        raise TaskError(f"`shingle_size` must be at least 1 word, got {shingle_size}; 3 is usual")
    rows = _rows_per_band(threshold, num_permutations)
    ours, theirs = _Texts.of(unseen), _Texts.of(training)
    if not (ours.texts and theirs.texts):
        return []
    hashing = np.random.default_rng(seed).integers(0, 1 << 64, (num_permutations, 2), dtype=np.uint64)
    signatures = [_signatures(texts.normal, shingle_size, hashing) for texts in (ours, theirs)]
    shingles = _numbered_shingles(shingle_size)
    found: dict[tuple[int, str], Overlap] = {}
    for i, j in _candidates(signatures[0], signatures[1], rows, threshold):
        best = found.get((i, theirs.tasks[j]))
        if best is not None and best.exact:
            continue
        one, other = ours.normal[i], theirs.normal[j]
        similarity = _jaccard(shingles(one), shingles(other))
        # Equal texts are preferred to those that only have the same shingles.
        if similarity >= threshold and (best is None or (best.similarity, best.exact) < (similarity, one == other)):
            found[i, theirs.tasks[j]] = Overlap(
                ours.tasks[i], theirs.tasks[j], ours.texts[i], theirs.texts[j], similarity, one == other
            )
    return list(found.values())  # in order, for candidates are


def overlap_table(overlaps: Iterable[Overlap], unseen: TaskSet) -> Table:
    """Count overlaps per pair of tasks.

    Args:
        overlaps: From :func:`find_overlaps`.
        unseen: The unseen tasks that it was given, for the number of their different texts.
    """
    sizes = Counter(_Texts.of(unseen).tasks)
    counts: dict[tuple[str, str], list[Overlap]] = {}
    for overlap in overlaps:
        counts.setdefault((overlap.unseen_task, overlap.training_task), []).append(overlap)
    table = Table(title="Overlap", title_justify="left", show_edge=False, pad_edge=False)
    table.add_column("unseen task", overflow="fold")
    table.add_column("training task", overflow="fold")
    for heading in ("exact", "near", "of texts", "share"):
        table.add_column(heading, justify="right", no_wrap=True)
    for (one, other), pair in counts.items():
        exact, total = sum(overlap.exact for overlap in pair), sizes[one]
        cells = (str(exact), str(len(pair) - exact), str(total), f"{len(pair) / total:.1%}")
        table.add_row(escape(one), escape(other), *cells)
    return table


def normalize_text(text: str) -> str:
    """Return a text's words in lower case with single spaces between, or its symbols where it has no word."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    return " ".join(re.findall(r"\w+", folded) or folded.split())


@dataclass(frozen=True)
class _Texts:
    """The different texts of some tasks: of those of a task that are equal once normalised, the first."""

    tasks: list[str]
    texts: list[str]
    normal: list[str]

    @classmethod
    def of(cls, tasks: TaskSet) -> _Texts:
        first: dict[tuple[str, str], str] = {}
        for task in tasks.values():
            for example in task.examples:
                first.setdefault((task.name, normalize_text(example.input)), example.input)
        return cls([name for name, _ in first], list(first.values()), [normal for _, normal in first])


def _numbered_shingles(size: int) -> Callable[[str], frozenset[int]]:
    """Return a function from a normalised text to its set of shingles, as numbers: they are compared much faster."""
    numbers: dict[tuple[str, ...], int] = {}

    @cache
    def shingles(normal: str) -> frozenset[int]:
        words = normal.split(" ")
        runs = (tuple(words[i : i + size]) for i in range(max(1, len(words) - size + 1)))
        return frozenset(numbers.setdefault(run, len(numbers)) for run in runs)

    return shingles


def _jaccard(one: frozenset[int], other: frozenset[int]) -> float:
    common = len(one & other)
    return common / (len(one) + len(other) - common)


def _rows_per_band(threshold: float, num_permutations: int) -> int:
    """Return the largest r for which a pair at the threshold is missed with a probability of at most MISS."""
    fitting = [
        rows for rows in range(1, num_permutations + 1) if (1 - threshold**rows) ** (num_permutations // rows) <= MISS
    ]
    if not fitting:
        raise TaskError(
            f"`num_permutations`={num_permutations} is too few: more than {MISS:.1%} of the pairs of similarity "
            f"{threshold} would be missed; 128 serve any threshold"
        )
    return fitting[-1]


def _signatures(normal: Sequence[str], size: int, hashing: Hashes) -> Hashes:
    """Return the minima of random hashes over each text's shingles, ``(texts, permutations)``."""
    word_hash = lru_cache(maxsize=None)(lambda w: int.from_bytes(blake2b(w.encode(), digest_size=8).digest(), "little"))
    powers = _powers(size)
    parts = []
    for text in normal:
        words = np.array([word_hash(word) for word in text.split(" ")], dtype=np.uint64)
        windows = np.lib.stride_tricks.sliding_window_view(words, min(size, len(words)))
        parts.append(windows @ powers[: windows.shape[1]])  # wraps around, as it should
    starts = np.cumsum([0, *map(len, parts[:-1])])
    hashes, signatures = np.concatenate(parts), np.empty((len(normal), len(hashing)), dtype=np.uint64)
    for column, (factor, shift) in enumerate(hashing):
        # An odd factor permutes the 64-bit numbers; the shift decides which of them is the least.
        signatures[:, column] = np.minimum.reduceat(hashes * (factor | np.uint64(1)) + shift, starts)
    return signatures


def _candidates(ours: Hashes, theirs: Hashes, rows: int, threshold: float) -> Iterator[tuple[int, int]]:
    """Yield, in order, the pairs of texts that agree in a band, but those whose whole signatures rule them out."""
    count, permutations = len(theirs), ours.shape[1]
    pairs = np.empty(0, dtype=np.int64)
    for start in range(0, permutations - rows + 1, rows):
        # A band's hash: that two bands share one by chance only makes another candidate.
        keys = [part[:, start : start + rows] @ _powers(rows) for part in (ours, theirs)]
        order = np.argsort(keys[1], kind="stable")
        left, right = (np.searchsorted(keys[1][order], keys[0], side) for side in ("left", "right"))
        sizes = right - left
        within = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        found = np.repeat(np.arange(len(ours)), sizes) * count + order[np.repeat(left, sizes) + within]
        pairs = np.union1d(pairs, found)
    # The share of minima that agree is the similarity, give or take: five standard deviations lose a pair in millions.
    least = threshold - 5 * np.sqrt(threshold * (1 - threshold) / permutations)
    for start in range(0, len(pairs), CHUNK):
        i, j = np.divmod(pairs[start : start + CHUNK], count)
        likely = (ours[i] == theirs[j]).mean(axis=1) >= least
        yield from zip(i[likely].tolist(), j[likely].tolist(), strict=True)


def _powers(count: int) -> Hashes:
    return np.array([pow(BASE, k, 1 << 64) for k in range(count)], dtype=np.uint64)
