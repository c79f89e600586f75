"""Rows that share a context: laid out by definition, drawn from any tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayes_lora.episodes import EncodedExample, collate, packing
from bayes_lora.episodes.batching import best_fit, by_tokens
from bayes_lora.episodes.episode import attention_mask
from bayes_lora.episodes.packing import Context, in_context, pack, pack_rows, pack_tasks

IDS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
PLAIN = st.builds(pack, IDS, st.lists(IDS, min_size=2, max_size=4), st.integers(0, 1))
CONTEXTS = [Context.of([7, 7, 1]), Context.of([8]), None]


@st.composite
def examples(draw: st.DrawFn) -> EncodedExample:
    """An example behind one of two contexts, or alone."""
    example, context = draw(PLAIN), draw(st.sampled_from(CONTEXTS))
    return example if context is None else in_context(example, context)


RAGGED = st.lists(st.lists(examples(), min_size=1, max_size=5), min_size=1, max_size=3)


@given(tasks=RAGGED, limit=st.sampled_from([1, 12, 2048]))
def test_every_option_reads_its_context_prompt_and_beginning(tasks: list[list[EncodedExample]], limit: int) -> None:
    """Whatever shares a row, what predicts a token is exactly the path to it, at consecutive positions."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_TOKENS", limit)
        episode = collate(tasks)
    seen = attention_mask(episode.padded, torch.float64)[:, 0] == 0
    assert seen.any(-1).all()
    flat = [example for task in episode.examples for example in task]
    length, options = episode.input_ids.shape[1], episode.shape[2]
    for q in range(len(episode.targets)):
        i, k = divmod(int(episode.target_options[q]), options)
        example = flat[i]
        assert example is not None
        row, place = divmod(int(episode.sources[episode.target_sources[q]]), length)
        own = sum(episode.rows_per_task[: i // episode.shape[1]])  # the first of the task's own rows
        assert own <= row < own + episode.rows_per_task[i // episode.shape[1]]
        behind = q - int((episode.target_options < episode.target_options[q]).sum())
        option = example.targets[example.target_options == k]
        context = [] if example.context is None else example.context.tokens.tolist()
        path = [*context, *example.tokens[example.segments == 0].tolist(), *option[:behind].tolist()]
        assert episode.input_ids[row][seen[row, place]].tolist() == path
        assert episode.position_ids[row][seen[row, place]].tolist() == list(range(len(path)))
        assert episode.targets[q] == option[behind]
    ends = episode.sources[episode.prompt_sources][episode.mask]
    assert (episode.segments.flatten()[ends] == 0).all()
    assert [int(t) for t in episode.input_ids.flatten()[ends]] == [
        int(e.tokens[e.segments == 0][-1]) for e in flat if e is not None
    ]


@given(task=st.lists(examples(), min_size=1, max_size=6), limit=st.sampled_from([1, 12, 2048]))
def test_rows_hold_every_example_once(task: list[EncodedExample], limit: int) -> None:
    """Those of a row have one context, or none, and are no longer than the limit; the key says what is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_TOKENS", limit)
        rows = pack_rows(task)
    assert sorted(member for row in rows for member in row.members) == list(range(len(task)))
    for context in CONTEXTS[:2]:  # in order
        members = [member for row in rows if row.context is context for member in row.members]
        assert members == [i for i, example in enumerate(task) if example.context is context]
    for row in rows:
        assert row.examples == tuple(task[member] for member in row.members)
        assert {example.context for example in row.examples} == {row.context}
        assert list(row.members) == sorted(row.members)
        assert len(row.examples) == 1 or sum(map(len, row.examples)) <= limit
        assert len(row) == len(row.tokens) == len(row.segments) == len(row.owners) == len(row.positions)
    keys = [row.key for row in rows]
    contents = [(tuple(e.key for e in row.examples)) for row in rows]
    assert len(set(keys)) == len(set(contents))


SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=12)


@given(tasks=st.lists(SIZES, min_size=1, max_size=5), limit=st.sampled_from([1, 100, 1024]))
def test_sharing_rows_never_reads_more_tokens(tasks: list[list[int]], limit: int) -> None:
    """Padding included; rows are not so long that attention, which costs their square, outweighs it."""
    encoded = [[pack([1] * size, [[2], [3]], 0) for size in sizes] for sizes in tasks]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_TOKENS", limit)
        rows = pack_tasks(encoded)
    for sizes, own in zip(tasks, rows, strict=True):
        assert sorted(member for row in own for member in row.members) == list(range(len(sizes)))
        assert all(len(row) == sum(sizes[member] for member in row.members) for row in own)
    longest = max(map(max, tasks))
    lengths = [len(row) for own in rows for row in own]
    assert max(lengths) <= max(longest, min(limit, max(256, 2 * longest)))
    assert len(lengths) * max(lengths) <= sum(map(len, tasks)) * longest
    if limit == 1:
        assert all(len(row.examples) == 1 for own in rows for row in own)


@given(sizes=SIZES.map(lambda sizes: sorted(sizes, reverse=True)), capacity=st.integers(1, 600))
def test_best_fit_leaves_no_two_bins_half_empty(sizes: list[int], capacity: int) -> None:
    """Every item is in one bin, none of which is over the capacity unless by an item of itself."""
    bins = best_fit(sizes, capacity)
    assert sorted(i for one in bins for i in one) == list(range(len(sizes)))
    filled = [sum(sizes[i] for i in one) for one in bins]
    assert all(total <= capacity or len(one) == 1 for total, one in zip(filled, bins, strict=True))
    assert sum(2 * total <= capacity for total in filled) <= 1


def test_tasks_of_unlike_lengths_are_padded_little() -> None:
    """Each has as many rows as it needs: here six short examples share a row, each long one has its own."""
    short, long = ([pack([1] * size, [[2], [3]], 0)] * 12 for size in (10, 60))
    episode = collate([short, long])
    assert episode.rows_per_task == (2, 12) and episode.input_ids.shape == (14, 60)
    assert not (episode.segments < 0).any()
    assert [row.members for row in episode.rows[0]] == [(0, 1, 2, 3, 4, 5), (6, 7, 8, 9, 10, 11)]


def test_a_long_context_is_read_once_for_many_examples() -> None:
    """It does not count against what examples may share a row."""
    context = Context.of([1] * (2 * packing.ROW_TOKENS))
    few = [in_context(pack([i, 2], [[3], [4, 5]], 0), context) for i in range(50)]
    assert len(pack_rows(few)) == 1


def test_a_context_is_part_of_the_key() -> None:
    """Or hidden states of another context would be taken for this one's."""
    example = pack([1, 2], [[3], [4]], 0)
    one, two = (in_context(example, Context.of(tokens)) for tokens in ([5], [6]))
    assert len({example.key, one.key, two.key}) == 3
    assert one.key == in_context(example, Context.of([5])).key


@given(lengths=st.lists(st.integers(1, 50), max_size=30), budget=st.integers(1, 120))
def test_batches_fill_a_budget_of_tokens(lengths: list[int], budget: int) -> None:
    """Each index once, within the budget, and no two neighbours would fit together."""
    batches = by_tokens(lengths, budget)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    for batch in batches:
        assert len(batch) == 1 or len(batch) * max(lengths[i] for i in batch) <= budget
    for before, after in zip(batches, batches[1:], strict=False):
        assert (len(before) + 1) * lengths[after[0]] > budget
        assert max(lengths[i] for i in before) <= min(lengths[i] for i in after)
