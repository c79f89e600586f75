"""Packed rows: each prompt is read once, followed by all of its options; demonstrations are shared by many prompts.

A row is a tree, or several trees that do not attend to each other. Demonstrations, if any, are the root, the prompts of
the examples are its children, and their options the leaves. A token attends to the path between it and the root, and
its positions count along that path. Scores equal those of every option of every example in a separate row.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from hashlib import blake2b
from itertools import accumulate

import torch
from torch import Tensor

from bayes_lora.episodes.batching import best_fit, cheapest_capacity

__all__ = [
    "Context",
    "EncodedExample",
    "PackedRow",
    "in_context",
    "pack",
    "pack_rows",
    "pack_tasks",
    "packed_row",
]

ROW_TOKENS = 1024
"""Maximum number of tokens of the examples in a shared row, without their context: attention is quadratic in it."""


@dataclass(frozen=True, eq=False)
class Context:
    """Tokenised demonstrations, which precede the prompts of several examples.

    Attributes:
        tokens: ``(C,)`` token ids.
        key: hash of the tokens.
    """

    tokens: Tensor
    key: bytes = field(repr=False)

    @classmethod
    def of(cls, tokens: Sequence[int]) -> Context:
        """Make a context of token ids."""
        return cls(torch.tensor(tokens, dtype=torch.long), digest(tokens))

    def __len__(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True, eq=False)
class EncodedExample:
    """One encoded example: ``L`` tokens, ``M`` source positions, ``Q`` option tokens.

    Positions count from the beginning of the prompt. The last token of an option is predicted but not read, so it is
    not part of the row.

    Attributes:
        tokens: ``(L,)`` token ids: the prompt, then the tokens of each option except its last.
        segments: ``(L,)`` 0 in the prompt, ``k + 1`` in option ``k``.
        positions: ``(L,)`` position ids.
        sources: ``(M,)`` distinct indices into ``tokens`` at which an option token is predicted; the first is the last
            token of the prompt.
        target_sources: ``(Q,)`` index of the source that predicts each option token.
        targets: ``(Q,)`` token ids of the options.
        target_options: ``(Q,)`` index of the option to which each token belongs.
        num_options: number of options; 2 for a free-form answer.
        answer: index of the gold option.
        key: hash of the row without its answer, used to cache what the frozen model computes from it.
        context: demonstrations before the prompt, if any.
        free_form: whether the answer is free text: option 0 is its tokens, and option 1, which has no tokens, is any
            other text.
    """

    tokens: Tensor
    segments: Tensor
    positions: Tensor
    sources: Tensor
    target_sources: Tensor
    targets: Tensor
    target_options: Tensor
    num_options: int
    answer: int
    key: bytes = field(repr=False)
    context: Context | None = None
    free_form: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def gold(self) -> Tensor:
        """Token ids of the gold option."""
        return self.targets[self.target_options == self.answer]

    @cached_property
    def option_tokens(self) -> tuple[int, bytes, bytes]:
        """The tokens of all options in order, to compare those of examples; computed once."""
        return self.num_options, self.targets.numpy().tobytes(), self.target_options.numpy().tobytes()


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A row of an episode: examples of one task with the same context or without any, ``L`` tokens.

    Attributes:
        examples: the examples, in order.
        members: index of each example among those of the task.
        starts: index in the row at which each example's prompt begins.
        tokens: ``(L,)`` token ids.
        segments: ``(L,)`` 0 in the context and in prompts, ``k + 1`` in an example's option ``k``.
        owners: ``(L,)`` 0 in the context, ``i + 1`` in example ``i``.
        positions: ``(L,)`` position ids.
        key: hash of the row, used to cache what the frozen model computes from it.
    """

    examples: tuple[EncodedExample, ...]
    members: tuple[int, ...]
    starts: tuple[int, ...]
    tokens: Tensor
    segments: Tensor
    owners: Tensor
    positions: Tensor
    key: bytes = field(repr=False)

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def context(self) -> Context | None:
        """The context shared by all examples; None if there is none."""
        return self.examples[0].context


def digest(*parts: object) -> bytes:
    """Return a hash of the ``repr`` of the parts."""
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def pack(
    prompt: Sequence[int], options: Sequence[Sequence[int]], answer: int, *, free_form: bool = False
) -> EncodedExample:
    """Pack the token ids of a prompt and of its options, or of its one free-form answer, into one row."""
    tokens, segments, positions = list(prompt), [0] * len(prompt), list(range(len(prompt)))
    sources, target_sources, targets, target_options = [len(prompt) - 1], [], [], []
    for index, option in enumerate(options):
        for offset, token in enumerate(option):
            if offset == 0:
                target_sources.append(0)
            else:
                tokens.append(option[offset - 1])
                segments.append(index + 1)
                positions.append(len(prompt) + offset - 1)
                target_sources.append(len(sources))
                sources.append(len(tokens) - 1)
            targets.append(token)
            target_options.append(index)
    return EncodedExample(
        tokens=torch.tensor(tokens),
        segments=torch.tensor(segments),
        positions=torch.tensor(positions),
        sources=torch.tensor(sources),
        target_sources=torch.tensor(target_sources),
        targets=torch.tensor(targets),
        target_options=torch.tensor(target_options),
        num_options=len(options) + free_form,
        answer=answer,
        key=digest(tokens, segments, targets, target_options),
        free_form=free_form,
    )


def in_context(example: EncodedExample, context: Context) -> EncodedExample:
    """Return the example with a context. Its positions do not change; :func:`pack_rows` shifts them."""
    return replace(example, context=context, key=digest(context.key, example.key))


def pack_rows(examples: Sequence[EncodedExample]) -> list[PackedRow]:
    """Arrange the examples of one task in rows, as :func:`pack_tasks` does."""
    return pack_tasks([examples])[0]


def pack_tasks(tasks: Sequence[Sequence[EncodedExample]]) -> list[list[PackedRow]]:
    """Arrange the examples of each task in rows, minimising the work for all rows padded to the longest.

    Examples with the same context share rows in order. The others may share rows up to a length that is chosen by
    search: long rows need less padding at the end of each task, short rows less attention.
    """
    in_contexts = [_by_context(task) for task in tasks]
    alone = [_without_context(task) for task in tasks]
    sizes = [[len(task[i]) for i in places] for task, places in zip(tasks, alone, strict=True)]
    widths = [_width(task, members) for task, rows in zip(tasks, in_contexts, strict=True) for members in rows]
    capacity = cheapest_capacity(sizes, widths, ROW_TOKENS)
    bins = [[[places[k] for k in one] for one in best_fit(s, capacity)] for s, places in zip(sizes, alone, strict=True)]
    return [
        [packed_row(task, members) for members in sorted(rows + [sorted(one) for one in others])]
        for task, rows, others in zip(tasks, in_contexts, bins, strict=True)
    ]


def _without_context(task: Sequence[EncodedExample]) -> list[int]:
    """Return the indices of examples without a context, the longest first."""
    return sorted((i for i, example in enumerate(task) if example.context is None), key=lambda i: -len(task[i]))


def _by_context(task: Sequence[EncodedExample]) -> list[list[int]]:
    """Return the indices of examples with a context, grouped by shared row."""
    rows: list[list[int]] = []
    length, key = 0, None
    for i, example in enumerate(task):
        if example.context is None:
            continue
        if example.context.key != key or length + len(example) > ROW_TOKENS:
            rows.append([])
            length, key = 0, example.context.key
        length += len(example)
        rows[-1].append(i)
    return rows


def _width(task: Sequence[EncodedExample], members: Sequence[int]) -> int:
    return len(task[members[0]].context or ()) + sum(len(task[i]) for i in members)


def packed_row(task: Sequence[EncodedExample], members: Sequence[int]) -> PackedRow:
    """Build a row from some of a task's examples, which have the same context or none."""
    examples = [task[i] for i in members]
    context = examples[0].context
    before = examples[0].tokens[:0] if context is None else context.tokens
    shift, blank = len(before), torch.zeros_like(before)
    return PackedRow(
        examples=tuple(examples),
        members=tuple(members),
        starts=tuple(accumulate(map(len, examples[:-1]), initial=shift)),
        tokens=torch.cat([before, *(example.tokens for example in examples)]),
        segments=torch.cat([blank, *(example.segments for example in examples)]),
        owners=torch.cat([blank, *(torch.full_like(e.segments, i) for i, e in enumerate(examples, start=1))]),
        positions=torch.cat([torch.arange(shift), *(example.positions + shift for example in examples)]),
        key=digest(*(example.key for example in examples)),
    )
