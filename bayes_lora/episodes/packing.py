"""Packed rows: a prompt once with all of its options behind it, and demonstrations once with many prompts behind them.

A row is a tree, or several that do not see one another. Demonstrations, if any, are its trunk, each example's prompt is
a branch, and each of its options a twig: a token sees what lies between it and the root, and its positions count along
that path alone. So scoring a packed row equals scoring every option of every example in a row of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
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
"""Examples share a row up to so many tokens of their own: attention costs a row's square, a context its length."""


@dataclass(frozen=True, eq=False)
class Context:
    """Demonstrations, tokenised: what stands before the prompts of several examples.

    Attributes:
        tokens: ``(C,)`` token ids.
        key: hash of them.
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
    """One example. ``L`` tokens, ``M`` source positions, ``Q`` option tokens; all positions count from its own prompt.

    An option's last token is predicted but never read, so it is no part of the row.

    Attributes:
        tokens: ``(L,)`` token ids: prompt, then the options' tokens without their last ones.
        segments: ``(L,)`` 0 in the prompt, ``k + 1`` in option ``k``.
        positions: ``(L,)`` position ids.
        sources: ``(M,)`` distinct places in ``tokens`` at which an option token is predicted; the first one is the
            prompt's last.
        target_sources: ``(Q,)`` for each option token, which source predicts it.
        targets: ``(Q,)`` token ids of the options.
        target_options: ``(Q,)`` the option to which each belongs.
        num_options: number of options; 2 of a free answer.
        answer: index of the gold option.
        key: hash of the row without its answer, under which what the frozen model computes of it may be kept.
        context: what stands before the prompt.
        free_form: whether the answer is free text: option 0 is its tokens, and option 1, which has none, is any other
            text.
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


@dataclass(frozen=True, eq=False)
class PackedRow:
    """A row of an episode: examples of one task, all behind the same context or all without any. ``L`` tokens.

    Attributes:
        examples: in order.
        members: the place of each among the task's examples.
        starts: place in the row at which each example's prompt begins.
        tokens: ``(L,)`` token ids.
        segments: ``(L,)`` 0 in the context and in prompts, ``k + 1`` in an example's option ``k``.
        owners: ``(L,)`` 0 in the context, ``i + 1`` in example ``i``.
        positions: ``(L,)`` position ids.
        key: hash, under which what the frozen model computes of the row may be kept.
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
        """What stands before all of its examples."""
        return self.examples[0].context


def digest(*parts: object) -> bytes:
    """A hash of what the parts print."""
    return blake2b(repr(parts).encode(), digest_size=16).digest()


def pack(
    prompt: Sequence[int], options: Sequence[Sequence[int]], answer: int, *, free_form: bool = False
) -> EncodedExample:
    """Pack token ids of a prompt and of its options, or of its one free answer, into one row."""
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
    """The example behind a context. Its own positions stay as they are; :func:`pack_rows` shifts them."""
    return replace(example, context=context, key=digest(context.key, example.key))


def pack_rows(examples: Sequence[EncodedExample]) -> list[PackedRow]:
    """Lay the examples of one task out in rows, as :func:`pack_tasks` does."""
    return pack_tasks([examples])[0]


def pack_tasks(tasks: Sequence[Sequence[EncodedExample]]) -> list[list[PackedRow]]:
    """Lay the examples of each task out in rows of its own, so that all rows, padded to the longest, cost little.

    Examples with one context share rows in order. Of the others, any may share a row up to a length that is searched
    for: long rows leave little to be padded at the end of each task, short ones take less attention.
    """
    behind = [_behind_contexts(task) for task in tasks]
    alone = [_without_context(task) for task in tasks]
    sizes = [[len(task[i]) for i in places] for task, places in zip(tasks, alone, strict=True)]
    widths = [_width(task, members) for task, rows in zip(tasks, behind, strict=True) for members in rows]
    capacity = cheapest_capacity(sizes, widths, ROW_TOKENS)
    bins = [[[places[k] for k in one] for one in best_fit(s, capacity)] for s, places in zip(sizes, alone, strict=True)]
    return [
        [packed_row(task, members) for members in sorted(rows + [sorted(one) for one in others])]
        for task, rows, others in zip(tasks, behind, bins, strict=True)
    ]


def _without_context(task: Sequence[EncodedExample]) -> list[int]:
    """The examples that may share a row with any other, the longest first."""
    return sorted((i for i, example in enumerate(task) if example.context is None), key=lambda i: -len(task[i]))


def _behind_contexts(task: Sequence[EncodedExample]) -> list[list[int]]:
    """Which examples share a row because they share a context."""
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
    """The row of some of a task's examples, which have the same context or none."""
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
