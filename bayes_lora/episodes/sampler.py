"""Episodes drawn from a collection of tasks."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import median

import numpy as np

from bayes_lora.episodes.encoder import Encoder
from bayes_lora.episodes.episode import Episode, collate
from bayes_lora.errors import TaskError
from bayes_lora.tasks.task import Example, Task
from bayes_lora.tasks.task_set import TaskSet

__all__ = ["EpisodeSampler"]


class EpisodeSampler:
    """An infinite sequence of episodes from a collection of tasks, drawn without replacement within an episode.

    Episode ``i`` depends only on ``seed`` and ``i``, so a resumed run gets the episodes of an uninterrupted one.

    Args:
        tasks: the collection.
        encoder: encodes examples as packed rows.
        tasks_per_episode: T, at most the number of tasks.
        num_support: support examples per task.
        min_support: if given, each task of an episode has between ``min_support`` and ``num_support`` of them, all
            orders of magnitude alike, so that a guide learns how its posterior depends on their number.
        permute_labels: permute the labels of each task that has a fixed set of them, in each episode again and alike in
            support and query. Then a prompt alone does not tell its label, and a guide has to read the support.
        label_skew: if given, the labels of each such task have unequal frequencies in an episode, proportional to a
            draw of ``Dirichlet(1 / label_skew)`` for each label: about equal near 0, mostly one label above 1. It is
            limited by the number of examples that a task has of each label.
        num_query: query examples per task, disjoint from the support.
        score_support: whether the likelihood is computed on support and query, or on the query alone. In the latter
            case the LM does not run on the support, whose features are cached, and theta learns from generalisation.
        num_demonstrations: number of support examples that precede every query prompt with their answers; requires
            ``score_support=False``, because a demonstration would be scored with its answer in the prompt.
        seed: seed of the draws.

    Raises:
        TaskError: a task has fewer examples than ``num_support + num_query``, there are fewer tasks than T,
            there is no support or nothing to score, or demonstrations would be scored.
    """

    def __init__(
        self,
        tasks: TaskSet,
        encoder: Encoder,
        *,
        tasks_per_episode: int = 4,
        num_support: int = 8,
        num_query: int = 8,
        score_support: bool = True,
        num_demonstrations: int = 0,
        min_support: int | None = None,
        permute_labels: bool = False,
        label_skew: float | None = None,
        seed: int = 0,
    ) -> None:
        if not 0 < tasks_per_episode <= len(tasks):
            raise TaskError(f"tasks_per_episode={tasks_per_episode}: expected 1 to {len(tasks)}, the number of tasks.")
        if num_support < 1 or num_query < (0 if score_support else 1):
            raise TaskError(
                f"num_support={num_support}, num_query={num_query}: expected at least 1 support example, "
                "and at least 1 query example if score_support is false."
            )
        least = num_support if min_support is None else min_support
        if not 1 <= least <= num_support:
            raise TaskError(f"min_support={min_support}: expected 1 to num_support={num_support}.")
        if label_skew is not None and not 0 < label_skew < float("inf"):
            raise TaskError(f"label_skew={label_skew}: expected a positive number, or None.")
        if not 0 <= num_demonstrations <= least or (num_demonstrations and score_support):
            raise TaskError(
                f"num_demonstrations={num_demonstrations}: expected 0 to the smallest support, {least}, and "
                "score_support=False if there are any."
            )
        self.tasks, self.encoder, self.seed = list(tasks.values()), encoder, seed
        self.tasks_per_episode, self.num_support, self.num_query = tasks_per_episode, num_support, num_query
        self.score_support, self.num_demonstrations = score_support, num_demonstrations
        self.min_support, self.permute_labels, self.label_skew = least, permute_labels, label_skew
        lengths = [median(len(row) for row in encoder(task.examples)) for task in self.tasks]
        self._by_length = np.argsort(lengths, kind="stable")
        for task in self.tasks:
            task.split(num_support, seed=0, num_query=num_query)  # raises here, not in the middle of a run

    def __getitem__(self, index: int) -> Episode:
        """Draw episode ``index``."""
        rng = np.random.default_rng([self.seed, index])
        chosen = self._choose(rng)
        drawn = [self._draw(self.tasks[i], rng) for i in chosen]
        return collate(
            [self.encoder(self._scored(task), task.support[: self.num_demonstrations]) for task in drawn],
            [self.encoder(task.support) for task in drawn],
            num_data=[len(self.tasks[i]) for i in chosen],
            task_index=chosen.tolist(),
            num_tasks=len(self.tasks),
        )

    def __iter__(self) -> Iterator[Episode]:
        index = 0
        while True:
            yield self[index]
            index += 1

    def _scored(self, task: Task) -> Sequence[Example]:
        return task.examples if self.score_support else task.query

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        """Draw T of 2 T tasks of similar length, which reduces padding; each task is equally likely."""
        start, count = rng.integers(len(self.tasks)), min(2 * self.tasks_per_episode, len(self.tasks))
        neighbours = self._by_length[(start + np.arange(count)) % len(self.tasks)]
        return rng.choice(neighbours, self.tasks_per_episode, replace=False)

    def _draw(self, task: Task, rng: np.random.Generator) -> Task:
        seed, size = int(rng.integers(2**31)), self.num_support
        if self.min_support < size:
            size = int(np.exp(rng.uniform(np.log(self.min_support), np.log(size + 1))))
        if self.label_skew is None or not _has_labels(task):
            drawn = task.split(size, seed=seed, num_query=self.num_query)
        else:
            drawn = _skewed(task, size, self.num_query, self.label_skew, rng)
        return _permuted(drawn, rng) if self.permute_labels else drawn


def _has_labels(task: Task) -> bool:
    return not task.free_form and len({example.options for example in task.examples}) == 1


def _skewed(task: Task, num_support: int, num_query: int, skew: float, rng: np.random.Generator) -> Task:
    """Draw support and query with the same label frequencies, from a Dirichlet distribution."""
    frequencies = rng.dirichlet(np.full(len(task.examples[0].options), 1.0 / skew))
    with np.errstate(divide="ignore"):  # a frequency may underflow: its examples come last
        weights = np.log(frequencies)[[example.answer for example in task.examples]]
    # The largest sums with Gumbel noise are a draw without replacement, of each example proportional to its weight.
    order = np.argsort(-np.maximum(weights, -1e30) - rng.gumbel(size=len(weights)), kind="stable")
    drawn = [task.examples[i] for i in rng.permutation(order[: num_support + num_query])]
    return replace(task, support=tuple(drawn[:num_support]), query=tuple(drawn[num_support:]))


def _permuted(task: Task, rng: np.random.Generator) -> Task:
    """Permute the labels of a task whose examples all have the same options; return another task as it is."""
    if not _has_labels(task):
        return task
    labels = rng.permutation(len(task.examples[0].options)).tolist()

    def relabelled(rows: Sequence[Example]) -> tuple[Example, ...]:
        return tuple(replace(row, answer=labels[row.answer]) for row in rows)

    return replace(task, support=relabelled(task.support), query=relabelled(task.query))
