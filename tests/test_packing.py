"""Rows that share a context: laid out by definition, drawn from any tasks."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayes_lora.tasks import EncodedExample, collate, packing
from bayes_lora.tasks.batching import by_tokens
from bayes_lora.tasks.episode import attention_mask
from bayes_lora.tasks.packing import Context, in_context, pack, pack_rows

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
        assert episode.segments.shape[0] % len(tasks) == 0
        row, place = divmod(int(episode.sources[episode.target_sources[q]]), length)
        assert row // (len(episode.segments) // len(tasks)) == i // episode.shape[1]  # the task's own rows
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
def test_rows_hold_all_examples_in_order(task: list[EncodedExample], limit: int) -> None:
    """Only those with one context share a row, up to its length; the key says what is in it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "ROW_TOKENS", limit)
        rows = pack_rows(task)
    assert [example for row in rows for example in row.examples] == task
    for row in rows:
        contexts = {example.context for example in row.examples}
        assert len(contexts) == 1
        assert len(row.examples) == 1 or (None not in contexts and sum(map(len, row.examples)) <= limit)
        assert len(row) == len(row.tokens) == len(row.segments) == len(row.owners) == len(row.positions)
    keys = [row.key for row in rows]
    contents = [(tuple(e.key for e in row.examples)) for row in rows]
    assert len(set(keys)) == len(set(contents))


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
