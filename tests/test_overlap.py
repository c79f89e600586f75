"""Texts of unseen tasks in training tasks, against brute force."""

from __future__ import annotations

import random
import time
from functools import cache

import pytest
from hypothesis import given
from hypothesis import strategies as st
from real_data import data_folder, needs_data
from rich.console import Console

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Example, Task, TaskSet, load_tasks
from bayes_lora.tasks.overlap import Overlap, find_overlaps, normalize_text, overlap_table

CROSSFIT = data_folder("crossfit")
VOCABULARY = [f"w{index}" for index in range(2000)]


def task_set(texts: dict[str, list[str]]) -> TaskSet:
    """Make tasks of these inputs, one half support and one half query."""
    tasks = []
    for name, inputs in texts.items():
        examples = [Example(text, ("a", "b"), 0) for text in inputs]
        tasks.append(Task(name, tuple(examples[::2]), tuple(examples[1::2])))
    return TaskSet(tasks)


@cache
def shingles(text: str, size: int) -> frozenset[str]:
    """Return a text's runs of words, written out once more."""
    words = text.lower().split()
    return frozenset(" ".join(words[i : i + size]) for i in range(max(len(words) - size, 0) + 1))


def similarity(one: str, other: str, size: int = 3) -> float:
    """Return the Jaccard similarity of shingles."""
    sets = shingles(one, size), shingles(other, size)
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def perturbed(words: list[str], changes: int, rng: random.Random) -> list[str]:
    """Replace, drop or insert words."""
    words = list(words)
    for _ in range(changes):
        at = rng.randrange(len(words))
        words[at : at + rng.randrange(2)] = rng.sample(VOCABULARY, rng.randrange(1, 2))
    return words


def perturbed_tasks(num: int, seed: int = 0) -> tuple[TaskSet, TaskSet]:
    """Return training texts of 40 to 80 words, and unseen ones made of them by a few changes."""
    rng = random.Random(seed)
    originals = [rng.choices(VOCABULARY, k=rng.randrange(40, 80)) for _ in range(num)]
    copies = [perturbed(words, rng.randrange(8), rng) for words in originals]
    return task_set({"train": [" ".join(w) for w in originals]}), task_set({"unseen": [" ".join(w) for w in copies]})


@pytest.mark.parametrize("threshold", [0.5, 0.8, 0.9])
def test_recall_against_brute_force(threshold: float) -> None:
    """What is found is what comparing all pairs finds, with the same similarities."""
    training, unseen = perturbed_tasks(600)
    brute = {}
    for example in unseen["unseen"].examples:
        scores = [similarity(example.input, other.input) for other in training["train"].examples]
        if max(scores) >= threshold:
            brute[example.input] = max(scores)
    found = {one.unseen_text: one.similarity for one in find_overlaps(training, unseen, threshold)}
    assert len(brute) > 100
    assert found == brute


@pytest.mark.parametrize("shingle_size", [1, 2, 5])
@pytest.mark.parametrize("seed", [1, 2])
def test_recall_of_other_parameters(shingle_size: int, seed: int) -> None:
    """Nothing is missed at other shingle sizes."""
    training, unseen = perturbed_tasks(150, seed)
    alike = [
        one.input
        for one in unseen["unseen"].examples
        if any(similarity(one.input, other.input, shingle_size) >= 0.7 for other in training["train"].examples)
    ]
    assert len(alike) > 30
    assert [one.unseen_text for one in find_overlaps(training, unseen, 0.7, shingle_size=shingle_size)] == alike


WORDS = st.lists(st.sampled_from(["the", "film", "was", "good", "bad", "é", "not"]), min_size=1, max_size=9)
TEXTS = st.lists(WORDS.map(" ".join), min_size=1, max_size=6)


@given(training=TEXTS, unseen=TEXTS, threshold=st.sampled_from([0.1, 0.2, 0.3, 0.5, 0.6, 0.7, 0.8, 1.0]))
def test_overlaps_are_those_of_all_pairs(training: list[str], unseen: list[str], threshold: float) -> None:
    """Each overlap has the similarity that its texts have; none is missed, not even one exactly at the threshold."""
    found = find_overlaps(task_set({"t": training}), task_set({"u": unseen}), threshold)
    scores = {text: max(similarity(text, other) for other in training) for text in unseen}
    assert {one.unseen_text: one.similarity for one in found} == {
        text: score for text, score in scores.items() if score >= threshold
    }
    for one in found:
        assert one.similarity == similarity(one.unseen_text, one.training_text) >= threshold
        assert one.exact == (one.unseen_text == one.training_text)
    exact = {one.unseen_text for one in found if one.exact}
    assert exact == set(unseen) & set(training)
    assert len({one.unseen_text for one in found}) == len(found)


@given(texts=TEXTS)
def test_similarity_is_symmetric(texts: list[str]) -> None:
    """Exchanging training and unseen tasks finds the same equal texts."""
    half = len(texts) // 2 + 1
    one, other = task_set({"a": texts[:half]}), task_set({"b": texts[half:] or ["the"]})
    forth, back = find_overlaps(one, other), find_overlaps(other, one)
    assert {x.unseen_text for x in forth if x.exact} == {x.training_text for x in back if x.exact}


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("  The film -- was GOOD!\n", "the film was good"),
        ("Straße № 5", "strasse no 5"),
        ("e\u0301te\u0301", "\u00e9t\u00e9"),
        ("?! :-)", "?! :-)"),
    ],
)
def test_normalize_text(text: str, normal: str) -> None:
    """Case, whitespace, punctuation and composition of letters do not count; a text of symbols keeps them."""
    assert normalize_text(text) == normal
    assert normalize_text(normal) == normal


@given(text=st.text(min_size=1).filter(str.strip))
def test_normalize_text_is_idempotent_and_never_empty(text: str) -> None:
    """Normalising twice is normalising once."""
    normal = normalize_text(text)
    assert normal
    assert normalize_text(normal) == normal


def test_find_overlaps_prefers_the_most_similar_text() -> None:
    """One overlap per unseen text and training task, in order, with the nearest text; copies count once."""
    long = "one two three four five six seven eight nine ten eleven twelve"
    training = task_set({"b": [f"{long} thirteen", long.upper()], "a": [f"zero {long}"], "c": ["else"]})
    unseen = task_set({"u": [long, "nothing like it", f"{long}."], "v": ["Else!"]})
    near = 10 / 11
    assert find_overlaps(training, unseen) == [
        Overlap("u", "b", long, long.upper(), 1.0, True),
        Overlap("u", "a", long, f"zero {long}", near, False),
        Overlap("v", "c", "Else!", "else", 1.0, True),
    ]
    assert [one.training_task for one in find_overlaps(training, unseen, 0.95)] == ["b", "c"]
    assert find_overlaps(training, TaskSet([])) == find_overlaps(TaskSet([]), unseen) == []


def test_same_shingles_are_not_exact() -> None:
    """Texts of other length may have the same shingles: similarity 1, but not equal; an equal one is preferred."""
    unseen = task_set({"u": ["a a a a"]})
    assert find_overlaps(task_set({"t": ["a a a a a"]}), unseen) == [
        Overlap("u", "t", "a a a a", "a a a a a", 1.0, False)
    ]
    [one] = find_overlaps(task_set({"t": ["a a a a a", "A a a a"]}), unseen)
    assert one.exact and one.training_text == "A a a a"


def test_find_overlaps_refuses() -> None:
    """A parameter out of range is named, with what came and what would do."""
    tasks = task_set({"t": ["x"]})
    for threshold in (0.0, 1.1, float("nan")):
        with pytest.raises(TaskError, match=rf"`threshold` must be in \[0.1, 1\], got {threshold}"):
            find_overlaps(tasks, tasks, threshold)
    with pytest.raises(TaskError, match="`shingle_size` must be at least 1 word, got 0"):
        find_overlaps(tasks, tasks, shingle_size=0)


def test_overlap_table_counts_per_pair() -> None:
    """Exact and near ones are counted apart, against the number of different texts; names are no markup."""
    overlaps = [
        Overlap("[u]", "t", "x", "X", 1.0, True),
        Overlap("[u]", "t", "y", "y z", 0.9, False),
        Overlap("v", "t", "q", "q", 1.0, True),
    ]
    unseen = task_set({"[u]": ["x", "X!", "y", "n", "m"], "v": ["q"]})
    console = Console(width=100)
    with console.capture() as capture:
        console.print(overlap_table(overlaps, unseen))
    rows = [line.replace("│", " ").split() for line in capture.get().splitlines()[3:]]
    assert rows == [["[u]", "t", "1", "1", "4", "50.0%"], ["v", "t", "1", "0", "1", "100.0%"]]


def test_free_form_tasks_overlap_as_others_do() -> None:
    """What is compared is the input, whatever the answers are."""
    training = task_set({"choice": ["who wrote the old book", "what is a cat"]})
    free = [Example(text, references=("x", "y")) for text in ("Who wrote the old book?", "where is it now")]
    unseen = TaskSet([Task("free", (free[0],), (free[1],))])
    one, two = "who wrote the old book", "Who wrote the old book?"
    assert find_overlaps(training, unseen) == [Overlap("free", "choice", two, one, 1.0, True)]
    assert find_overlaps(unseen, training) == [Overlap("choice", "free", one, two, 1.0, True)]


def test_a_hundred_tasks_take_seconds() -> None:
    """100 tasks of 200 texts of 60 words, a tenth of them unseen: 2 s on one core, with room for a busy machine."""
    rng = random.Random(0)
    texts = {f"t{i}": [" ".join(rng.choices(VOCABULARY, k=60)) for _ in range(200)] for i in range(100)}
    texts["t95"][:5] = texts["t3"][:5]
    tasks = task_set(texts)
    names = list(texts)
    start = time.perf_counter()
    found = find_overlaps(tasks.select(names[:90]), tasks.select(names[90:]))
    assert time.perf_counter() - start < 20
    assert [(one.unseen_task, one.training_task, one.exact) for one in found] == [("t95", "t3", True)] * 5


@needs_data("crossfit")
def test_ethos_tasks_share_their_texts() -> None:
    """The ETHOS tasks ask several questions of the same comments, and stand in both halves of cls-45."""
    tasks = load_tasks(CROSSFIT, names=["ethos-gender", "ag_news", "ethos-race"])
    found = find_overlaps(tasks.select(["ethos-gender"]), tasks.select(["ag_news", "ethos-race"]))
    assert {one.unseen_task for one in found} == {"ethos-race"}
    assert len(found) == len({normalize_text(one.input) for one in tasks["ethos-race"].examples})
