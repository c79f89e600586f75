"""Episodes: the padded tensors of T tasks at once, and the sampler that draws them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayes_lora.errors import TaskError
from bayes_lora.tasks.prompts import EncodedExample, Encoder
from bayes_lora.tasks.task import Task, TaskSet

__all__ = ["Episode", "EpisodeSampler", "attention_mask", "collate"]


@dataclass(frozen=True, eq=False)
class Episode:
    """``T`` tasks with up to ``N`` scored examples each, and the support sets that a guide may read.

    Rows are flattened to ``R = T * N``. ``L`` tokens a row, ``M`` positions at which the head is needed, ``Q`` option
    tokens in all, ``K`` options at most.

    Attributes:
        input_ids: ``(R, L)`` packed rows.
        segments: ``(R, L)`` 0 prompt, ``k + 1`` option ``k``, -1 padding.
        position_ids: ``(R, L)``.
        sources: ``(M,)`` positions in the flattened ``R * L``, ordered by row.
        target_sources: ``(Q,)`` indices into ``sources``.
        targets: ``(Q,)`` token ids.
        target_options: ``(Q,)`` indices into the flattened ``T * N * K``.
        option_mask: ``(T, N, K)`` true where there is an option.
        answer: ``(T, N)`` index of the gold option.
        mask: ``(T, N)`` true where there is an example.
        num_data: ``(T,)`` each task's N, to which the likelihood of these examples is scaled.
        task_index: ``(T,)`` the tasks' places in the collection.
        num_tasks: size of the collection from which the tasks were drawn.
        rows: the encoded examples, ``None`` where a task has fewer than ``N``.
        separate_support: the support sets, where they are other examples than the scored ones.
    """

    input_ids: Tensor
    segments: Tensor
    position_ids: Tensor
    sources: Tensor
    target_sources: Tensor
    targets: Tensor
    target_options: Tensor
    option_mask: Tensor
    answer: Tensor
    mask: Tensor
    num_data: Tensor
    task_index: Tensor
    num_tasks: int
    rows: tuple[tuple[EncodedExample | None, ...], ...]
    separate_support: Episode | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """``(T, N, K)``."""
        return tuple(self.option_mask.shape)  # type: ignore[return-value]

    @property
    def support(self) -> Episode:
        """What a guide may read: the support sets, which are the scored examples themselves if none were given."""
        return self if self.separate_support is None else self.separate_support

    def to(self, device: torch.device | str) -> Episode:
        """Copy the tensors to a device."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: v.to(device) for n, v in values.items() if isinstance(v, Tensor | Episode)}
        return replace(self, **moved)


def collate(
    tasks: Sequence[Sequence[EncodedExample]],
    support: Sequence[Sequence[EncodedExample]] | None = None,
    *,
    num_data: Sequence[int] | Tensor | None = None,
    task_index: Sequence[int] | Tensor | None = None,
    num_tasks: int | None = None,
) -> Episode:
    """Pad the encoded examples of T tasks to one episode.

    Args:
        tasks: per task the examples whose answers are scored. Where a task has fewer than another, the missing
            ones are masked at the end.
        support: per task the examples that a guide may read; by default the scored ones.
        num_data: each task's N; by default the number of its examples here.
        task_index: the tasks' places in the collection; by default 0 to T - 1.
        num_tasks: size of the collection; by default T.

    Raises:
        TaskError: there is no task, a task has no example, or ``support`` is of other tasks.
    """
    if not tasks or not all(tasks):
        raise TaskError("an episode needs at least one task, and every task at least one example.")
    if support is not None and len(support) != len(tasks):
        raise TaskError(f"an episode needs one support set per task: got {len(support)} for {len(tasks)} tasks.")
    width = max(map(len, tasks))
    rows = tuple(tuple([*task, *[None] * (width - len(task))]) for task in tasks)
    flat = [row for task in rows for row in task]
    some = [(i, row) for i, row in enumerate(flat) if row is not None]
    blank = torch.zeros(1, dtype=torch.long)
    input_ids = pad_sequence([blank if r is None else r.tokens for r in flat], batch_first=True)
    segments = pad_sequence([blank - 1 if r is None else r.segments for r in flat], batch_first=True, padding_value=-1)
    position_ids = pad_sequence([blank if r is None else r.positions for r in flat], batch_first=True)
    length, options = input_ids.shape[1], max(row.num_options for _, row in some)
    offsets = np.cumsum([0, *(len(row.sources) for _, row in some)])
    counts = torch.tensor([0 if r is None else r.num_options for r in flat]).view(len(rows), width)
    return Episode(
        input_ids=input_ids,
        segments=segments,
        position_ids=position_ids,
        sources=torch.cat([row.sources + i * length for i, row in some]),
        target_sources=torch.cat([r.target_sources + int(o) for (_, r), o in zip(some, offsets, strict=False)]),
        targets=torch.cat([row.targets for _, row in some]),
        target_options=torch.cat([row.target_options + i * options for i, row in some]),
        option_mask=torch.arange(options) < counts[..., None],
        answer=torch.tensor([0 if r is None else r.answer for r in flat]).view(len(rows), width),
        mask=counts > 0,
        num_data=torch.as_tensor([len(task) for task in tasks] if num_data is None else num_data),
        task_index=torch.as_tensor(range(len(rows)) if task_index is None else task_index),
        num_tasks=len(rows) if num_tasks is None else num_tasks,
        rows=rows,
        separate_support=None if support is None else collate(support, task_index=task_index, num_tasks=num_tasks),
    )


def attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """The additive block mask ``(rows, 1, L, L)`` of packed rows: an option sees the prompt and itself.

    Padding sees the prompt too, for a softmax over nothing is NaN. The mask is a float, since a boolean one is read
    differently by models that add their own terms to it (Gemma 2).
    """
    length = segments.shape[-1]
    query, key = segments[:, :, None], segments[:, None, :]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    seen = ((key == 0) | (key == query)) & causal
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]


class EpisodeSampler:
    """Endless episodes from a collection of tasks, drawn without replacement within an episode.

    Episode ``i`` depends on ``seed`` and ``i`` alone, so a resumed run sees what an uninterrupted one would have seen.

    Args:
        tasks: the collection.
        encoder: turns examples into packed rows.
        tasks_per_episode: T, at most the number of tasks.
        num_support: support examples per task.
        num_query: query examples per task, disjoint from the support.
        score_support: whether the likelihood is taken on support and query, or on the query alone: then the LM never
            runs on the support, whose features are cached, and theta learns from generalisation only.
        seed: of the draws.

    Raises:
        TaskError: a task has fewer examples than ``num_support + num_query``, there are fewer tasks than T, or
            nothing is left to condition on or to score.
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
        seed: int = 0,
    ) -> None:
        if not 0 < tasks_per_episode <= len(tasks):
            raise TaskError(f"tasks_per_episode={tasks_per_episode}: expected 1 to {len(tasks)}, the number of tasks.")
        if num_support < 1 or num_query < (0 if score_support else 1):
            raise TaskError(
                f"num_support={num_support}, num_query={num_query}: expected at least 1 support example, "
                "and at least 1 query example where score_support is false."
            )
        self.tasks, self.encoder, self.seed = list(tasks.values()), encoder, seed
        self.tasks_per_episode, self.num_support, self.num_query = tasks_per_episode, num_support, num_query
        self.score_support = score_support
        lengths = [median(len(row) for row in encoder(task.examples)) for task in self.tasks]
        self._by_length = np.argsort(lengths, kind="stable")
        for task in self.tasks:
            task.split(num_support, seed=0, num_query=num_query)  # fails now, not in the middle of a run

    def __getitem__(self, index: int) -> Episode:
        """Draw episode ``index``."""
        rng = np.random.default_rng([self.seed, index])
        chosen = self._choose(rng)
        drawn = [self._draw(self.tasks[i], rng) for i in chosen]
        return collate(
            [self.encoder(task.examples if self.score_support else task.query) for task in drawn],
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

    def _choose(self, rng: np.random.Generator) -> np.ndarray:
        """Draw T tasks among 2 T neighbours in length, so that little is padded; each task is equally likely."""
        start, count = rng.integers(len(self.tasks)), min(2 * self.tasks_per_episode, len(self.tasks))
        neighbours = self._by_length[(start + np.arange(count)) % len(self.tasks)]
        return rng.choice(neighbours, self.tasks_per_episode, replace=False)

    def _draw(self, task: Task, rng: np.random.Generator) -> Task:
        return task.split(self.num_support, seed=int(rng.integers(2**31)), num_query=self.num_query)
