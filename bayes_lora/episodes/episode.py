"""Episodes: the padded tensors of T tasks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from bayes_lora.episodes.packing import EncodedExample, PackedRow, pack_tasks
from bayes_lora.errors import TaskError
from bayes_lora.utils.devices import send

__all__ = ["Episode", "PaddedRows", "attention_mask", "collate", "pad_rows", "send"]

Item = TypeVar("Item")


class PaddedRows(NamedTuple):
    """Rows of tokens, padded on the right, ``(R, L)`` each. See :class:`Episode`."""

    input_ids: Tensor
    segments: Tensor
    owners: Tensor
    position_ids: Tensor

    def to(self, device: torch.device | str) -> PaddedRows:
        """Copy to a device."""
        return PaddedRows(*(send(tensor, device) for tensor in self))


@dataclass(frozen=True, eq=False)
class Episode:
    """``T`` tasks with up to ``N`` scored examples each, and the support sets that a guide may read.

    The examples of a task share rows, and the rows of a task are contiguous. There are ``R`` rows in total of ``L``
    tokens each, ``M`` positions at which the head is needed, ``Q`` option tokens in total, and at most ``K`` options.

    Attributes:
        input_ids: ``(R, L)`` token ids of the packed rows.
        segments: ``(R, L)`` 0 in the prompt or context, ``k + 1`` in option ``k``, -1 in padding.
        owners: ``(R, L)`` 0 in the context, ``i + 1`` in the row's example ``i``, -1 in padding.
        position_ids: ``(R, L)`` position ids.
        sources: ``(M,)`` positions in the flattened ``R * L``, grouped by example, in the order of examples.
        prompt_sources: ``(T, N)`` index into ``sources`` of the last token of each prompt; 0 if there is no example.
        target_sources: ``(Q,)`` indices into ``sources`` of the positions that predict the option tokens.
        targets: ``(Q,)`` token ids of the option tokens.
        target_options: ``(Q,)`` indices into the flattened ``T * N * K``.
        option_mask: ``(T, N, K)`` true for present options.
        answer: ``(T, N)`` index of the gold option.
        free_form: ``(T, N)`` true if the answer is free text: option 0 is the gold answer, option 1 any other text.
        mask: ``(T, N)`` true for present examples.
        num_data: ``(T,)`` each task's N, to which the likelihood of these examples is scaled.
        task_index: ``(T,)`` index of each task in the collection; -1 for tasks that are not in it.
        fixed_options: ``(T,)`` whether all examples of a task, scored and support, have the same options in the same
            order.
        num_tasks: size of the collection from which the tasks were drawn.
        examples: per task ``N`` encoded examples, padded with ``None``.
        rows: per task its rows.
        separate_support: the support sets, if they differ from the scored examples.
    """

    input_ids: Tensor
    segments: Tensor
    owners: Tensor
    position_ids: Tensor
    sources: Tensor
    prompt_sources: Tensor
    target_sources: Tensor
    targets: Tensor
    target_options: Tensor
    option_mask: Tensor
    answer: Tensor
    free_form: Tensor
    mask: Tensor
    num_data: Tensor
    task_index: Tensor
    fixed_options: Tensor
    num_tasks: int
    examples: tuple[tuple[EncodedExample | None, ...], ...]
    rows: tuple[tuple[PackedRow, ...], ...]
    separate_support: Episode | None = None

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of tasks, examples and options, ``(T, N, K)``."""
        return tuple(self.option_mask.shape)  # type: ignore[return-value]

    @property
    def rows_per_task(self) -> tuple[int, ...]:
        """Number of rows of each task; they sum to ``R``."""
        return tuple(map(len, self.rows))

    @property
    def padded(self) -> PaddedRows:
        """The rows that the language model reads."""
        return PaddedRows(self.input_ids, self.segments, self.owners, self.position_ids)

    @property
    def support(self) -> Episode:
        """The support sets, which a guide may read; by default the scored examples themselves."""
        return self if self.separate_support is None else self.separate_support

    def independent_tasks(self) -> Episode:
        """Return the same examples without scaling to a collection: N and the number of tasks are those present."""
        index = torch.arange(len(self.task_index), device=self.task_index.device)
        return replace(self, task_index=index, num_tasks=len(index), num_data=self.mask.sum(-1))

    def per_example(self, start: int = 0, stop: int | None = None) -> Episode:
        """Return every example as a separate task, in the order of tasks and examples, from ``start`` to ``stop``."""
        rows = [[example] for task in self.examples for example in task if example is not None]
        fixed = self.fixed_options.repeat_interleave(self.mask.sum(-1), output_size=len(rows))
        return collate(rows[start:stop], fixed_options=fixed[start:stop]).to(self.mask.device)

    def without_task_ids(self) -> Episode:
        """Return the same tasks marked as absent from the collection, so that no per-task parameters apply to them."""
        support = None if self.separate_support is None else self.separate_support.without_task_ids()
        return replace(self, task_index=torch.full_like(self.task_index, -1), separate_support=support)

    def to(self, device: torch.device | str) -> Episode:
        """Copy the tensors to a device; to a GPU asynchronously, from pinned memory."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        moved: dict[str, Any] = {n: send(v, device) for n, v in values.items() if isinstance(v, Tensor)}
        if self.separate_support is not None:
            moved["separate_support"] = self.separate_support.to(device)
        return replace(self, **moved)


def collate(
    tasks: Sequence[Sequence[EncodedExample]],
    support: Sequence[Sequence[EncodedExample]] | None = None,
    *,
    num_data: Sequence[int] | Tensor | None = None,
    task_index: Sequence[int] | Tensor | None = None,
    num_tasks: int | None = None,
    fixed_options: Sequence[bool] | Tensor | None = None,
) -> Episode:
    """Collate the encoded examples of T tasks into one padded episode.

    Args:
        tasks: per task the examples whose answers are scored. Tasks with fewer examples are padded at the end.
        support: per task the examples that a guide may read; by default the scored ones.
        num_data: N of each task; by default the number of its examples here.
        task_index: index of each task in the collection; by default 0 to T - 1.
        num_tasks: size of the collection; by default T.
        fixed_options: whether each task has a fixed set of labels; by default whether the options of all examples here
            are equal, which a single example always is.

    Raises:
        TaskError: there is no task, a task has no example, or ``support`` or ``fixed_options`` has another number of
            tasks.
    """
    if not tasks or not all(tasks):
        raise TaskError("an episode needs at least one task, and every task at least one example.")
    if support is not None and len(support) != len(tasks):
        raise TaskError(f"an episode needs one support set per task: got {len(support)} for {len(tasks)} tasks.")
    if fixed_options is None:
        groups = tasks if support is None else [[*own, *more] for own, more in zip(tasks, support, strict=True)]
        fixed_options = [len({example.option_tokens for example in group}) == 1 for group in groups]
    if len(fixed_options) != len(tasks):
        raise TaskError(f"fixed_options: expected one for each of {len(tasks)} tasks, got {len(fixed_options)}.")
    fixed = torch.as_tensor(fixed_options, dtype=torch.bool)
    examples, rows = _filled(tasks), pack_tasks(tasks)
    flat = [example for task in examples for example in task]
    some = [(i, example) for i, example in enumerate(flat) if example is not None]
    padded = pad_rows([row for task in rows for row in task])
    length, options = padded.input_ids.shape[1], max(e.num_options for _, e in some)
    shape = (len(examples), len(examples[0]))
    begins = _begins(rows, length)
    # Index of the first source of each example.
    first = np.cumsum([0, *(0 if e is None else len(e.sources) for e in flat)])[:-1]
    offsets = [int(first[i]) for i, _ in some]
    counts = torch.tensor([0 if e is None else e.num_options for e in flat]).view(shape)
    return Episode(
        **padded._asdict(),
        sources=torch.cat([e.sources + begin for (_, e), begin in zip(some, begins, strict=True)]),
        prompt_sources=torch.from_numpy(first).view(shape) * (counts > 0),
        target_sources=torch.cat([e.target_sources + o for (_, e), o in zip(some, offsets, strict=True)]),
        targets=torch.cat([e.targets for _, e in some]),
        target_options=torch.cat([e.target_options + i * options for i, e in some]),
        option_mask=torch.arange(options) < counts[..., None],
        answer=torch.tensor([0 if e is None else e.answer for e in flat]).view(shape),
        free_form=torch.tensor([e is not None and e.free_form for e in flat]).view(shape),
        mask=counts > 0,
        num_data=torch.as_tensor([len(task) for task in tasks] if num_data is None else num_data),
        task_index=torch.as_tensor(range(len(tasks)) if task_index is None else task_index),
        fixed_options=fixed,
        num_tasks=len(tasks) if num_tasks is None else num_tasks,
        examples=examples,
        rows=tuple(map(tuple, rows)),
        separate_support=None
        if support is None
        else collate(support, task_index=task_index, num_tasks=num_tasks, fixed_options=fixed),
    )


def _filled(tasks: Sequence[Sequence[Item]]) -> tuple[tuple[Item | None, ...], ...]:
    """Pad all tasks with None to the same number of items."""
    width = max(map(len, tasks))
    return tuple(tuple([*task, *[None] * (width - len(task))]) for task in tasks)


def _begins(rows: Sequence[Sequence[PackedRow]], length: int) -> list[int]:
    """Return the start of each example in the flattened ``R * L``, in the order of tasks and examples."""
    begins, count = [], 0
    for task in rows:
        places = {
            member: (count + r) * length + start
            for r, row in enumerate(task)
            for member, start in zip(row.members, row.starts, strict=True)
        }
        begins += [places[member] for member in range(len(places))]
        count += len(task)
    return begins


def pad_rows(rows: Sequence[PackedRow]) -> PaddedRows:
    """Pad rows to the length of the longest."""
    return PaddedRows(
        pad_sequence([row.tokens for row in rows], batch_first=True),
        pad_sequence([row.segments for row in rows], batch_first=True, padding_value=-1),
        pad_sequence([row.owners for row in rows], batch_first=True, padding_value=-1),
        pad_sequence([row.positions for row in rows], batch_first=True),
    )


def attention_mask(rows: PaddedRows, dtype: torch.dtype) -> Tensor:
    """Return the additive attention mask ``(R, 1, L, L)`` of packed rows.

    A token attends to previous tokens of the context, of its own example's prompt, and of its own option. Padding
    attends to the context and the prompts, because a softmax over no positions is NaN. The mask is a float, because
    models that add their own terms to it (Gemma 2) interpret a boolean mask differently.
    """
    _, segments, owners, _ = rows
    length = segments.shape[-1]
    causal = torch.ones(length, length, dtype=torch.bool, device=segments.device).tril()
    prompt = segments[:, None, :] == 0
    own = (owners[:, None, :] == owners[:, :, None]) | (owners[:, None, :] == 0) | (owners[:, :, None] < 0)
    seen = causal & own & (prompt | (segments[:, None, :] == segments[:, :, None]))
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[:, None]
