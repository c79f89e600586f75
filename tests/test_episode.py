"""Episodes: collating ragged tasks, drawing them, and the mask of packed rows."""

from __future__ import annotations

import math
from itertools import islice, pairwise
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bayes_lora.episodes import EncodedExample, Encoder, Episode, EpisodeSampler, collate
from bayes_lora.episodes.episode import attention_mask
from bayes_lora.episodes.packing import pack
from bayes_lora.errors import TaskError
from bayes_lora.tasks import Example, Task, TaskSet

IDS = st.lists(st.integers(1, 9), min_size=1, max_size=4)
ROWS = st.builds(pack, IDS, st.lists(IDS, min_size=2, max_size=4), st.integers(0, 1))
RAGGED = st.lists(st.lists(ROWS, min_size=1, max_size=4), min_size=1, max_size=4)
SMALL = [
    [pack([5, 6, 7], [[1], [2, 3]], 1)],
    [pack([4], [[8, 9, 1], [2, 3], [2, 4]], 2), pack([3, 3], [[1], [2]], 0)],
]
TENSORS = [name for name, kind in Episode.__annotations__.items() if kind == "Tensor"]


def same(a: Episode, b: Episode) -> bool:
    """Tell whether two episodes and their supports hold the same tensors."""
    equal = all(torch.equal(getattr(a, name), getattr(b, name)) for name in TENSORS)
    if a.separate_support is None or b.separate_support is None:
        return equal and a.separate_support is b.separate_support
    return equal and same(a.separate_support, b.separate_support)


# --- collate ---


def check_example(episode: Episode, index: int, example: EncodedExample | None) -> None:
    """Recover one example from the flattened tensors."""
    length, options = episode.input_ids.shape[1], episode.shape[2]
    scored = episode.target_options // options == index
    if example is None:
        assert not scored.any()
        return
    task, place = divmod(index, episode.shape[1])
    [(r, row)] = [(r, row) for r, row in enumerate(episode.rows[task]) if place in row.members]
    r, i = r + sum(episode.rows_per_task[:task]), row.members.index(place)
    begin = r * length + row.starts[i]
    inside = slice(begin, begin + len(example))
    assert row.examples[i] is example
    assert torch.equal(episode.input_ids.flatten()[inside], example.tokens)
    assert torch.equal(episode.segments.flatten()[inside], example.segments)
    assert torch.equal(episode.position_ids.flatten()[inside], example.positions)
    assert (episode.owners.flatten()[inside] == i + 1).all() and (episode.owners[r] == i + 1).sum() == len(example)
    here = (episode.sources >= inside.start) & (episode.sources < inside.stop)
    assert torch.equal(episode.sources[here] - begin, example.sources)
    assert torch.equal(episode.targets[scored], example.targets)
    assert torch.equal(episode.target_options[scored] - index * options, example.target_options)
    at = episode.sources[episode.target_sources[scored]] - begin
    assert torch.equal(at, example.sources[example.target_sources])
    assert int(episode.sources[episode.prompt_sources.flatten()[index]]) == begin + int(example.sources[0])


@given(tasks=RAGGED)
def test_collate_is_the_straightforward_loop(tasks: list[list[EncodedExample]]) -> None:
    """Each example is found again in the flat tensors, and what is padded is masked."""
    episode = collate(tasks)
    width, options = max(map(len, tasks)), max(row.num_options for task in tasks for row in task)
    assert episode.shape == (len(tasks), width, options)
    rows = [row for task in episode.rows for row in task]
    for name in ("input_ids", "segments", "owners", "position_ids"):
        assert getattr(episode, name).shape == (sum(episode.rows_per_task), max(map(len, rows)))
    for row, segments, owners in zip(rows, episode.segments, episode.owners, strict=True):
        assert (segments[: len(row)] >= 0).all() and (owners[: len(row)] > 0).all()
        assert (segments[len(row) :] == -1).all() and (owners[len(row) :] == -1).all()
    for t, task in enumerate(tasks):
        for n in range(width):
            row = task[n] if n < len(task) else None
            assert episode.examples[t][n] is row
            assert episode.mask[t, n] == (row is not None)
            assert episode.answer[t, n] == (0 if row is None else row.answer)
            count = 0 if row is None else row.num_options
            assert episode.option_mask[t, n].tolist() == [k < count for k in range(options)]
            check_example(episode, t * width + n, row)
    flat = [row for task in tasks for row in task]
    assert len(episode.sources) == sum(len(row.sources) for row in flat) == len(set(episode.sources.tolist()))
    assert len(episode.targets) == sum(len(row.targets) for row in flat)
    assert episode.num_data.tolist() == list(map(len, tasks))
    assert episode.task_index.tolist() == list(range(len(tasks)))
    assert episode.num_tasks == len(tasks)
    assert all(getattr(episode, name).dtype in (torch.long, torch.bool) for name in TENSORS)


def test_support_is_shared_or_separate() -> None:
    """Without support sets, a guide reads the scored examples; with them, those alone."""
    shared = collate(SMALL)
    assert shared.support is shared
    episode = collate(SMALL, SMALL[::-1], num_data=[7, 9], task_index=[3, 1], num_tasks=5)
    flags = episode.fixed_options
    assert same(episode.support, collate(SMALL[::-1], task_index=[3, 1], num_tasks=5, fixed_options=flags))
    assert episode.support.examples == collate(SMALL[::-1]).examples
    assert episode.support.num_data.tolist() == [2, 1]
    assert episode.support.support is episode.support
    assert (episode.num_data.tolist(), episode.task_index.tolist(), episode.num_tasks) == ([7, 9], [3, 1], 5)


def test_collate_takes_tensors() -> None:
    """Sizes and places may be tensors already."""
    episode = collate(SMALL, num_data=torch.tensor([7, 9]), task_index=torch.tensor([3, 1]), num_tasks=5)
    assert same(episode, collate(SMALL, num_data=[7, 9], task_index=[3, 1], num_tasks=5))


def test_to_moves_all_tensors() -> None:
    """Support moves too; the rows and the counts stay."""
    episode = collate(SMALL, SMALL, num_tasks=5)
    moved = episode.to("meta")
    for one, before in ((moved, episode), (moved.support, episode.support)):
        assert {getattr(one, name).device.type for name in TENSORS} == {"meta"}
        assert {getattr(before, name).device.type for name in TENSORS} == {"cpu"}
        assert (one.shape, one.num_tasks, one.rows) == (before.shape, 5, before.rows)
    alone = collate(SMALL).to("meta")
    assert alone.support is alone
    assert same(episode.to("cpu"), episode)


@pytest.mark.parametrize("tasks", [[], [[]], [SMALL[0], []]])
def test_collate_refuses_what_is_empty(tasks: Any) -> None:
    """No task, and a task without examples, scored or as support."""
    with pytest.raises(TaskError, match="at least one task, and every task at least one example"):
        collate(tasks)
    if tasks:
        with pytest.raises(TaskError, match="every task at least one example"):
            collate([SMALL[0]] * len(tasks), tasks)


def test_collate_refuses_support_of_other_tasks() -> None:
    """Support sets are per task."""
    with pytest.raises(TaskError, match="one support set per task: got 1 for 2 tasks"):
        collate(SMALL, SMALL[:1])


# --- the sampler ---


@pytest.fixture
def encoder(tokenizer: Any) -> Encoder:
    """Return an encoder of byte-level prompts."""
    return Encoder(tokenizer)


def keys(episode: Episode) -> list[set[bytes]]:
    """Return the keys of each task's examples, all of them different."""
    found = [[row.key for row in task if row is not None] for task in episode.examples]
    assert all(len(set(task)) == len(task) for task in found)
    return [set(task) for task in found]


@pytest.mark.parametrize("score_support", [True, False])
def test_an_episode_is_drawn_from_its_tasks(tasks: TaskSet, encoder: Encoder, score_support: bool) -> None:
    """Support and query are disjoint, of the sizes asked for, and from the tasks that are named."""
    sampler = EpisodeSampler(
        tasks, encoder, tasks_per_episode=3, num_support=4, num_query=5, score_support=score_support, seed=1
    )
    known = [{row.key for row in encoder(task.examples)} for task in tasks.values()]
    for episode in islice(sampler, 6):
        places = episode.task_index.tolist()
        assert len(set(places)) == 3
        assert episode.num_tasks == 4
        assert episode.num_data.tolist() == [12] * 3
        assert episode.shape[:2] == (3, 9 if score_support else 5)
        assert episode.support.shape[:2] == (3, 4)
        assert episode.support.task_index.tolist() == places
        assert episode.support.num_tasks == 4
        assert episode.support.num_data.tolist() == [4] * 3
        for place, scored, support in zip(places, keys(episode), keys(episode.support), strict=True):
            assert scored | support <= known[place]
            assert len(scored | support) == 9
            assert (scored & support) == (support if score_support else set())


def test_episodes_are_reproducible(tasks: TaskSet, encoder: Encoder) -> None:
    """An episode depends on seed and index alone, however it is reached."""

    def sampler(seed: int) -> EpisodeSampler:
        return EpisodeSampler(tasks, encoder, tasks_per_episode=2, num_support=3, num_query=3, seed=seed)

    walked = list(islice(sampler(5), 6))
    again = sampler(5)
    for index in (4, 0, 2, 5, 1, 3):
        assert same(again[index], walked[index])
    assert not any(same(a, b) for a, b in pairwise(walked))
    assert not any(same(sampler(6)[index], walked[index]) for index in range(6))


def test_all_tasks_and_examples_are_visited(tasks: TaskSet, encoder: Encoder) -> None:
    """No task and no example of it is out of reach, and tasks are drawn evenly."""
    sampler = EpisodeSampler(tasks, encoder, tasks_per_episode=2, num_support=3, num_query=3)
    episodes = list(islice(sampler, 60))
    counts = np.bincount(torch.cat([one.task_index for one in episodes]).numpy(), minlength=4)
    assert counts.sum() == 120
    assert counts.min() >= 15
    drawn = set().union(*(task for one in episodes for task in keys(one)))
    assert drawn == {row.key for task in tasks.values() for row in encoder(task.examples)}


def test_demonstrations_stand_before_every_query(tasks: TaskSet, encoder: Encoder) -> None:
    """They are the first support examples, solved; the guide's support has none."""
    settings: dict[str, Any] = dict(tasks_per_episode=2, num_support=3, num_query=4, score_support=False, seed=2)
    plain = EpisodeSampler(tasks, encoder, **settings)[1]
    episode = EpisodeSampler(tasks, encoder, num_demonstrations=2, **settings)[1]
    assert same(episode.support, plain.support)
    for t, place in enumerate(episode.task_index.tolist()):
        [row] = [row for row in episode.rows[t] if row is not None]
        contexts = {example.context for example in row.examples}
        known = {encoder([e])[0].key: e for e in tasks[f"task-{place}"].examples}
        shown = [known[e.key] for e in episode.support.examples[t][:2] if e is not None]
        assert contexts == {encoder([shown[0]], shown)[0].context}
        assert encoder.tokenizer.decode(row.tokens[: len(next(iter(contexts)))]).count("Answer:") == 2
    for wrong in (4, -1):
        with pytest.raises(TaskError, match=f"num_demonstrations={wrong}: expected 0 to the smallest support, 3"):
            EpisodeSampler(tasks, encoder, num_demonstrations=wrong, **settings)
    with pytest.raises(TaskError, match="score_support=False"):
        EpisodeSampler(tasks, encoder, **settings | dict(num_demonstrations=2, score_support=True))


def test_support_sets_have_different_sizes(tasks: TaskSet, encoder: Encoder) -> None:
    """Between both bounds, small ones as often as large ones; without a lower bound, episodes are as before."""
    settings: dict[str, Any] = dict(tasks_per_episode=2, num_support=8, num_query=3, score_support=False, seed=2)
    sampler = EpisodeSampler(tasks, encoder, min_support=2, **settings)
    sizes = torch.cat([episode.support.mask.sum(-1) for episode in islice(sampler, 200)])
    assert sizes.min() == 2
    assert sizes.max() == 8
    # Five standard errors of 400 draws are 0.125; if all sizes were equally likely, it would be 2 / 7.
    assert abs(float((sizes <= 3).double().mean()) - math.log(4 / 2) / math.log(9 / 2)) < 0.125
    assert all(same(sampler[i], EpisodeSampler(tasks, encoder, min_support=2, **settings)[i]) for i in (0, 7))
    assert same(
        EpisodeSampler(tasks, encoder, min_support=8, **settings)[3], EpisodeSampler(tasks, encoder, **settings)[3]
    )


def test_labels_are_permuted_alike_in_support_and_query(encoder: Encoder) -> None:
    """Of tasks with a fixed set of labels: a label of the episode is a function of the true one, and one to one."""
    labels = ("red", "green", "blue")
    fixed = Task("fixed", [Example(f"thing {i}", labels, i % 3) for i in range(18)])
    own = Task("own", [Example(f"which of {i}", (f"a{i}", f"b{i}"), i % 2) for i in range(18)])
    true = {row.key: row.answer for task in (fixed, own) for row in encoder(task.examples)}
    sampler = EpisodeSampler(TaskSet([fixed, own]), encoder, tasks_per_episode=2, num_support=6, num_query=6, seed=1)
    permuted = EpisodeSampler(
        TaskSet([fixed, own]),
        encoder,
        tasks_per_episode=2,
        num_support=6,
        num_query=6,
        seed=1,
        score_support=False,
        permute_labels=True,
    )
    seen = set()
    for plain, episode in zip(islice(sampler, 12), islice(permuted, 12), strict=True):
        assert plain.task_index.tolist() == episode.task_index.tolist()
        for t, place in enumerate(episode.task_index.tolist()):
            rows = [row for part in (episode, episode.support) for row in part.examples[t] if row is not None]
            pairs = {(true[row.key], row.answer) for row in rows}
            if place == 1:
                assert all(one == other for one, other in pairs)
            else:
                assert len(pairs) == len({one for one, _ in pairs}) == len({other for _, other in pairs})
                seen |= pairs
    assert len(seen) == 9  # every label stood for every other


def test_labels_have_unequal_frequencies(encoder: Encoder) -> None:
    """The share of a label has the variance of a Dirichlet draw, alike in support and query; by default it is equal."""
    labels = ("red", "green")
    fixed = Task("fixed", [Example(f"thing {i}", labels, i % 2) for i in range(100)])
    own = Task("own", [Example(f"which of {i}", (f"a{i}", f"b{i}"), i % 2) for i in range(40)])
    settings = dict(num_support=10, num_query=10, seed=1, score_support=False)

    def shares(skew: float | None) -> torch.Tensor:
        sampler = EpisodeSampler(TaskSet([fixed]), encoder, tasks_per_episode=1, label_skew=skew, **settings)
        parts = [(episode.support, episode) for episode in islice(sampler, 150)]
        return torch.tensor([[float(part.answer.double().mean()) for part in pair] for pair in parts])

    support, query = shares(2.0).unbind(-1)
    # Beta(1/2, 1/2) has variance 1/8; 10 draws of a share add a tenth of E[p (1 - p)] = 1/8. The standard error of the
    # variance is 0.008.
    assert abs(float(support.var()) - 0.1375) < 0.03
    assert float(torch.corrcoef(torch.stack([support, query]))[0, 1]) > 0.9
    assert float(shares(0.01)[:, 0].var()) < 0.05  # 1/4 / 10 = 0.025 and little more
    assert bool((shares(None)[:, 0] == 0.5).all())
    plain, skewed = (
        EpisodeSampler(TaskSet([own]), encoder, tasks_per_episode=1, label_skew=skew, **settings)
        for skew in (None, 2.0)
    )
    assert same(plain[3], skewed[3])  # a task without labels


def test_tasks_of_other_sizes(encoder: Encoder) -> None:
    """Each task has its own N, and support given with the task is sampled again."""
    examples = [Example(f"film {i}", ("yes", "no"), i % 2) for i in range(20)]
    tasks = TaskSet([Task("a", examples[:6], examples[6:9]), Task("b", examples[9:])])
    sampler = EpisodeSampler(tasks, encoder, tasks_per_episode=2, num_support=4, num_query=4)
    episode = sampler[0]
    assert [[9, 11][place] for place in episode.task_index] == episode.num_data.tolist()
    given = {row.key for row in encoder(tasks["a"].query)}
    assert any(given & set().union(*keys(one.support)) for one in islice(sampler, 5))


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"tasks_per_episode": 5}, "tasks_per_episode=5: expected 1 to 4, the number of tasks"),
        ({"tasks_per_episode": 0}, "tasks_per_episode=0: expected 1 to 4"),
        ({"num_support": 8, "num_query": 5}, r"'task-0' has 12 examples, but 13 .*\(8 support \+ 5 query\)"),
        ({"num_support": 13, "num_query": 0}, "'task-0' has 12 examples, but 13 were asked for"),
        ({"num_support": 0}, "num_support=0, num_query=2: expected at least 1 support example"),
        ({"num_support": 0, "score_support": False}, "num_support=0"),
        ({"num_query": 0, "score_support": False}, "num_query=0: .*1 query example if score_support is false"),
        ({"num_query": -1}, "num_query=-1"),
        ({"min_support": 3}, "min_support=3: expected 1 to num_support=2"),
        ({"min_support": 0}, "min_support=0: expected 1 to num_support=2"),
        ({"label_skew": 0.0}, "label_skew=0.0: expected a positive number, or None"),
        ({"min_support": 1, "num_demonstrations": 2, "score_support": False}, "the smallest support, 1"),
    ],
)
def test_sampler_refuses_at_once(tasks: TaskSet, encoder: Encoder, settings: dict[str, Any], match: str) -> None:
    """What cannot be drawn is told before the first episode."""
    with pytest.raises(TaskError, match=match):
        EpisodeSampler(tasks, encoder, **{"tasks_per_episode": 2, "num_support": 2, "num_query": 2} | settings)


def test_sampler_refuses_one_small_task_among_others(tasks: TaskSet, encoder: Encoder) -> None:
    """The task that is too small is named, wherever it stands."""
    small = Task("small", tasks["task-0"].examples[:3])
    with pytest.raises(TaskError, match="'small' has 3 examples, but 4 were asked for"):
        EpisodeSampler(TaskSet([*tasks.values(), small]), encoder, tasks_per_episode=1, num_support=2, num_query=2)


def test_no_query_is_fine_where_support_is_scored(tasks: TaskSet, encoder: Encoder) -> None:
    """Then the scored examples are the support."""
    sampler = EpisodeSampler(tasks, encoder, tasks_per_episode=2, num_support=4, num_query=0)
    assert keys(sampler[0]) == keys(sampler[0].support)


# --- the mask ---


@given(tasks=RAGGED, dtype=st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_attention_mask_is_the_triple_loop(tasks: list[list[EncodedExample]], dtype: torch.dtype) -> None:
    """A token sees what stands before it in its example's prompt and in its own segment; no token sees nothing."""
    padded = collate([[*task] for task in [*tasks, [SMALL[0][0]] * 5]]).padded
    segments = padded.segments
    rows, length = segments.shape
    mask = attention_mask(padded, dtype)
    assert (mask.shape, mask.dtype) == ((rows, 1, length, length), dtype)
    expected = []
    for row, owner in zip(segments.tolist(), padded.owners.tolist(), strict=True):
        for i in range(length):
            for j in range(length):
                own = owner[j] == owner[i] or owner[i] == -1  # padding sees every prompt
                seen = j <= i and own and (row[j] == 0 or row[j] == row[i])
                expected.append(0.0 if seen else torch.finfo(dtype).min)
    assert torch.equal(mask, torch.tensor(expected, dtype=dtype).view_as(mask))
    assert (mask == 0).any(-1).all()
