"""Tasks, splits and the reader of the MetaICL layout."""

from __future__ import annotations

import json
import pickle
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from real_data import data_folder, needs_data

from bayes_lora.errors import TaskError
from bayes_lora.tasks import (
    Example,
    Task,
    TaskSet,
    load_split,
    load_tasks,
    read_examples,
    read_questions,
)
from bayes_lora.tasks.readers.metaicl import read_metaicl

CROSSFIT = data_folder("crossfit")
LABELS = ("no", "yes", "maybe")
GOOD = {"task": "t", "input": "q", "output": "b", "options": ["a", "b"]}


def example(index: int, answer: int = 0, options: tuple[str, ...] = LABELS) -> Example:
    """Return an example whose input tells it from the others."""
    return Example(f"question {index}", options, answer)


def write(path: Path, inputs: list[str], **changes: Any) -> Path:
    """Write one good line for each input."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(GOOD | changes | {"input": text}) + "\n" for text in inputs))
    return path


ALIKE = {
    "two ways to write an accent": ("caf\u00e9", "cafe\u0301"),
    "a no-break space": ("very good", "very\u00a0good"),
    "a zero-width space": ("pos", "pos\u200b"),
    "a byte-order mark": ("pos", "\ufeffpos"),
    "a zero-width joiner": ("pos", "po\u200ds"),
    "a mark of direction": ("pos", "pos\u200e"),
    "full width": ("1", "\uff11"),
    "a ligature": ("fine", "\ufb01ne"),
    "spaces": ("very good", "very  good"),
    "a space at the end": ("good", "good "),
}
DIFFERENT = {
    "case": ("pos", "Pos"),
    "an accent": ("cafe", "caf\u00e9"),
    "an exponent": ("x2", "x\u00b2"),
    "an index": ("x2", "x\u2082"),
    "a family and its members": ("\U0001f468\u200d\U0001f469", "\U0001f468\U0001f469"),
    "England and Scotland": tuple(f"\U0001f3f4{code}\U000e007f" for code in ("\U000e0065", "\U000e0073")),
    "a non-joiner between Persian letters": ("\u0645\u06cc\u200c\u062e", "\u0645\u06cc\u062e"),
}


@pytest.mark.parametrize("kind", ALIKE)
def test_options_that_look_the_same_are_refused(kind: str) -> None:
    """Both are named as code points, in either order, and with others between them."""
    for pair in (ALIKE[kind], ALIKE[kind][::-1]):
        with pytest.raises(TaskError, match="`options` holds .*, which look the same: .*; write them alike") as caught:
            Example("q", (pair[0], "other", pair[1]))
        assert all(ascii(option) in str(caught.value) for option in pair)


@pytest.mark.parametrize("kind", DIFFERENT)
def test_options_that_look_different_are_taken(kind: str) -> None:
    assert Example("q", DIFFERENT[kind]).options == DIFFERENT[kind]


def test_options_that_look_the_same_are_refused_by_readers(tmp_path: Path) -> None:
    """With the file, and the line or the column; also those that differ in case as well."""
    labels = [("caf\u00e9", "cafe\u0301", "bar")[i % 3] for i in range(12)]
    lines = [json.dumps(GOOD | {"options": ["bar", "caf\u00e9", "cafe\u0301"], "output": "bar"})]
    files = {
        "t.csv": ("text,label\n" + "".join(f"film {i},{label}\n" for i, label in enumerate(labels)), "column 'label'"),
        "t.jsonl": (lines[0], r"t\.jsonl:1: `options`"),
        "t/t_16_13_train.tsv": ("".join(f"film {i}\t{label}\n" for i, label in enumerate(labels)), "t_16_13_train"),
    }
    for name, (text, place) in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
        with pytest.raises(TaskError, match=rf"{place}.* holds .* look the same.*; write them alike") as caught:
            load_tasks(path if path.parent == tmp_path else path.parent)
        assert r"'caf\xe9'" in str(caught.value) and r"'cafe\u0301'" in str(caught.value)
    [merged] = load_tasks(tmp_path / "t.jsonl", merge_duplicates=True)["t"].examples
    assert (merged.options, merged.output) == (("bar", "caf\u00e9"), "bar")
    (tmp_path / "t.csv").write_text("text,label\n" + "a,Very good\nb,very\u00a0good\n" * 2, encoding="utf-8")
    with pytest.raises(TaskError, match=r"column 'label' holds both 'Very good' and 'very\\xa0good'; write them"):
        load_tasks(tmp_path / "t.csv")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with a task of two seeds, one with a test file, a single file and a free-form task."""
    for seed, names in ((13, "abc"), (100, "cde")):
        write(tmp_path / f"plain/plain_16_{seed}_train.jsonl", [f"{name}{name}" for name in names])
        write(tmp_path / f"plain/plain_16_{seed}_dev.jsonl", ["aa", f"dev {seed}", "dev both"])
        write(tmp_path / f"tested/tested_16_{seed}_train.jsonl", [f"{seed}", "both"])
        write(tmp_path / f"tested/tested_16_{seed}_dev.jsonl", [f"dev {seed}"])
    write(tmp_path / "tested/tested_16_100_test.jsonl", ["13", "t", "t"])
    write(tmp_path / "single.jsonl", ["x", "y"])
    write(tmp_path / "free/free_16_13_train.jsonl", ["x"], options=[])
    (tmp_path / "notes").mkdir()
    return tmp_path


# --- Example, Task, TaskSet ---


def test_example_output_and_tuple() -> None:
    """The gold option's text is the output; a list of options becomes a tuple."""
    listed = Example("q", ["a", "b"], 1)  # type: ignore[arg-type]
    assert listed.output == "b"
    assert {listed: 1}[Example("q", ("a", "b"), 1)] == 1
    assert pickle.loads(pickle.dumps(listed)) == listed


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((3, ("a", "b"), 0), "`input` must be a string, got int"),
        ((" \n", ("a", "b"), 0), "`input` is empty"),
        (("q", "ab", 0), "`options` must be a tuple of strings, got 'ab'"),
        (("q", ("a", 1), 0), "`options` must be a tuple of strings"),
        (("q", ("a",), 0), r"at least 2 answers to choose from, got \('a',\)"),
        (("q", ("a", " "), 0), "holds an empty answer"),
        (("q", ("a", "b", "a"), 0), "holds 'a' more than once"),
        (("q", ("a", "b"), 2), r"must be in 0\.\.1, .*got 2"),
        (("q", ("a", "b"), -1), "got -1"),
        (("q", ("a", "b"), True), "integer index of an option, got True"),
        (("q", ("a", "b"), "a"), "integer index of an option, got 'a'"),
        (("q\ud800", ("a", "b"), 0), "half of a surrogate pair"),
    ],
)
def test_example_refuses(arguments: tuple[Any, Any, Any], match: str) -> None:
    """Each field that cannot be scored is named."""
    with pytest.raises(TaskError, match=match):
        Example(*arguments)


def test_task_refuses() -> None:
    """A task without a name, without examples, or smaller than asked for is named."""
    task = Task("small", (example(0), example(1)), (example(2),))
    with pytest.raises(TaskError, match="`name` of a task is empty"):
        Task("", (example(0),))
    with pytest.raises(TaskError, match="task 'none' has no examples"):
        Task("none", ())
    with pytest.raises(TaskError, match=r"'small' has 3 examples, but 5 were asked for \(2 support \+ 3 query\)"):
        task.split(2, num_query=3, seed=0)
    with pytest.raises(TaskError, match="'small' has 3 examples, but 4 were asked for; ask for fewer"):
        task.split(4, seed=0)
    with pytest.raises(TaskError, match="`num_support` must be 0 or more, got -1"):
        task.split(-1, seed=0)
    with pytest.raises(TaskError, match="`num_query` must be 0 or more, got -2"):
        task.subset(num_query=-2, seed=0)
    with pytest.raises(TaskError, match="'small' has 1 query examples, but 2 were asked for"):
        task.subset(num_query=2, seed=0)


@given(
    answers=st.lists(st.integers(0, 2), min_size=1, max_size=40),
    fixed=st.booleans(),
    seed=st.integers(0, 2**32),
    data=st.data(),
)
def test_split_is_disjoint_stratified_and_deterministic(
    answers: list[int], fixed: bool, seed: int, data: st.DataObject
) -> None:
    """A split has the sizes asked for, shares nothing, and deals the classes evenly while they last."""
    options = [LABELS if fixed else (f"o{index}", *LABELS[1:]) for index in range(len(answers))]
    task = Task("t", tuple(example(i, a, o) for i, (a, o) in enumerate(zip(answers, options, strict=True))))
    num_support = data.draw(st.integers(0, len(task)))
    num_query = data.draw(st.none() | st.integers(0 if num_support else 1, len(task) - num_support))
    split = task.split(num_support, seed=seed, num_query=num_query)
    assert split == task.split(num_support, seed=seed, num_query=num_query)
    assert len(split.support) == num_support
    assert len(split.query) == (len(task) - num_support if num_query is None else num_query)
    assert len(set(split.examples)) == len(split)
    assert set(split.examples) <= set(task.examples)
    if fixed:
        size, drawn = Counter(answers), Counter(one.answer for one in split.support)
        most = max(drawn.values(), default=0)
        assert all(drawn[label] >= min(size[label], most - 1) for label in size)


def test_split_draws_anew_with_the_seed() -> None:
    """Different seeds give different splits, and the query half takes part."""
    task = Task("t", tuple(example(i, i % 2) for i in range(10)), tuple(example(i, i % 2) for i in range(10, 20)))
    assert len({task.split(6, seed=seed).support for seed in range(5)}) == 5
    assert any(set(task.split(6, seed=seed).support) & set(task.query) for seed in range(5))


@given(num_support=st.none() | st.integers(1, 6), num_query=st.none() | st.integers(0, 4), seed=st.integers())
def test_subset_keeps_halves_and_order(num_support: int | None, num_query: int | None, seed: int) -> None:
    """A subset stays in its half, in order, with the sizes asked for."""
    task = Task("t", tuple(map(example, range(6))), tuple(map(example, range(6, 10))))
    kept = task.subset(num_support, num_query, seed=seed)
    assert kept == task.subset(num_support, num_query, seed=seed)
    assert len(kept.support) == (6 if num_support is None else num_support)
    assert len(kept.query) == (4 if num_query is None else num_query)
    assert set(kept.support) <= set(task.support)
    assert set(kept.query) <= set(task.query)
    assert list(kept.examples) == sorted(kept.examples, key=task.examples.index)


def test_taskset_is_an_ordered_mapping() -> None:
    """A task set keeps order, selects in the order asked for, and shows its counts."""
    tasks = TaskSet(Task(name, (example(0),), (example(1), example(2))) for name in ("c", "a", "b"))
    assert list(tasks) == ["c", "a", "b"]
    assert list(tasks.select(["b", "c"])) == ["b", "c"]
    assert repr(tasks) == "TaskSet(3 tasks: 3 support and 6 query examples)"
    assert "a" in tasks
    assert tasks.get("z") is None
    assert len(tasks["a"]) == 3


def test_taskset_refuses() -> None:
    """Unknown names come with near ones; duplicate names and empty parts are refused."""
    tasks = TaskSet(Task(name, (example(0),)) for name in ("glue-rte", "glue-mnli"))
    with pytest.raises(TaskError, match=r"among the 2 at hand: 'glue-rt' \(did you mean 'glue-rte'.*, 'zzz'$"):
        tasks.select(["glue-rt", "glue-mnli", "zzz"])
    with pytest.raises(KeyError, match="no task 'glue-mnl' .*did you mean 'glue-mnli'"):
        tasks["glue-mnl"]
    with pytest.raises(TaskError, match="task 'glue-rte' occurs twice"):
        TaskSet([*tasks.values(), tasks["glue-rte"]])
    for held_out in (0, 2, 0.1, 1.0, -1):
        with pytest.raises(TaskError, match=f"`held_out`={held_out} would hold out"):
            tasks.split(held_out, seed=0)


@given(held_out=st.integers(1, 9), seed=st.integers())
def test_taskset_split_holds_back_whole_tasks(held_out: int, seed: int) -> None:
    """Both parts keep the order, share nothing and hold everything; a fraction means a count."""
    tasks = TaskSet(Task(str(index), (example(0),)) for index in range(10))
    kept, held = tasks.split(held_out, seed=seed)
    assert len(held) == held_out
    assert sorted([*kept, *held]) == list(tasks)
    assert list(kept) == sorted(kept)
    assert tasks.split(held_out / 10, seed=seed) == (kept, held)


# --- the reader ---


@pytest.mark.parametrize(
    ("line", "match"),
    [
        (b'{"input": "q"', r"broken JSON \(Expecting ',' delimiter"),
        (b"[" * 100_000, "broken JSON"),
        (b"1" * 5000, "broken JSON"),
        (b"[1]", "expected an object with named fields such as `input`, `output`, `options`; got list"),
        (b'{"output": "a"}', r"field `input` is missing; got only \['output'\]"),
        (json.dumps(GOOD | {"output": 3}).encode(), "field `output` must be a str, got 3"),
        (json.dumps(GOOD | {"options": "ab"}).encode(), "field `options` must be a list, got 'ab'"),
        (json.dumps(GOOD | {"options": ["b", 1]}).encode(), "`options` must be a tuple of strings"),
        (json.dumps(GOOD | {"output": "c"}).encode(), r"got 'c', options are \['a', 'b'\]"),
        (
            json.dumps(GOOD | {"options": ["a", "b", "a"]}).encode(),
            "'a' more than once.*merge_duplicates=True",
        ),
        (json.dumps(GOOD | {"options": ["b"]}).encode(), "at least 2 answers"),
        (json.dumps(GOOD | {"input": ""}).encode(), "`input` is empty"),
        (json.dumps(GOOD | {"options": []}).encode(), r"empty, but is not in .*bad\.jsonl:1; .*make two tasks of them"),
        (
            b'{"input": "q", "output": "a"}',
            r"field `options` is missing; got only .*write \[\] if the answer is free",
        ),
        (json.dumps(GOOD | {"input": "\ud800"}).encode(), "half of a surrogate pair"),
        ('{"input": "é"}'.encode("latin-1"), "expected UTF-8, got byte 0xe9 at position 12; save"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: bytes, match: str) -> None:
    """A bad line is named by file and number, blank lines counted."""
    path = tmp_path / "bad.jsonl"
    path.write_bytes(json.dumps(GOOD).encode() + b"\n\n" + line + b"\n")
    with pytest.raises(TaskError, match=rf"(?s)bad\.jsonl:3: .*{match}"):
        read_examples(path)


def test_file_that_cannot_be_read(tmp_path: Path) -> None:
    """A file that is empty or absent is named."""
    (tmp_path / "empty.jsonl").write_text("\n \n")
    with pytest.raises(TaskError, match=r"empty\.jsonl: the file is empty"):
        read_examples(tmp_path / "empty.jsonl")
    with pytest.raises(TaskError, match=r"none\.jsonl: expected a jsonl file that can be read, got: No such file"):
        read_examples(tmp_path / "none.jsonl")


def test_reading_keeps_text(tmp_path: Path) -> None:
    """A byte-order mark, CRLF and line separators inside a string do not disturb the reader."""
    path = tmp_path / "odd.jsonl"
    text = json.dumps(GOOD | {"input": "one\u2028two"}, ensure_ascii=False)
    path.write_bytes(b"\xef\xbb\xbf" + text.encode() + b"\r\n" + text.encode())
    assert read_examples(path) == [Example("one\u2028two", ("a", "b"), 1)] * 2


def test_merge_duplicates(tmp_path: Path) -> None:
    """Equal options become one, the gold answer follows; one option alone stays refused."""
    path = write(tmp_path / "t.jsonl", ["q"], options=["a", "a", "b", "b", "c"])
    assert read_examples(path, merge_duplicates=True) == [Example("q", ("a", "b", "c"), 1)]
    path = write(tmp_path / "t.jsonl", ["q"], options=["b", "b"])
    with pytest.raises(TaskError, match="at least 2"):
        read_examples(path, merge_duplicates=True)


def test_unlabelled_lines(tmp_path: Path) -> None:
    """Questions to predict need no output; one that is there still counts, and must be an option."""
    path = tmp_path / "questions.jsonl"
    question = {"input": "q", "options": ["a", "b"]}
    path.write_text("\n".join(map(json.dumps, [question, GOOD])))
    assert read_questions(path) == [Example("q", ("a", "b"), 0), Example("q", ("a", "b"), 1)]
    with pytest.raises(TaskError, match=r"questions\.jsonl:1: field `output` is missing"):
        read_examples(path)
    path.write_text(json.dumps(question | {"options": ["a", "a", "b"]}))
    assert read_questions(path, merge_duplicates=True) == [Example("q", ("a", "b"), 0)]
    for wrong, match in (
        ({"output": "c"}, r":1: `output` must be one of `options`: got 'c'"),
        ({"output": 3}, ":1: field `output` must be a str, got 3"),
        ({"options": ["a"]}, ":1: .*at least 2 answers"),
    ):
        path.write_text(json.dumps(question | wrong))
        with pytest.raises(TaskError, match=match):
            read_questions(path)


FREE = {"input": "Capital of France?", "output": ["Paris", "paris ", "Paris", "Lutetia"], "options": []}


def test_free_form_lines(tmp_path: Path) -> None:
    """An output is one reference or several, of which the first is learnt from; a repeat counts once."""
    path = tmp_path / "free.jsonl"
    path.write_text("\n".join(map(json.dumps, [FREE, {"input": "2 + 3", "output": " 5", "options": []}])))
    several, one = read_examples(path)
    assert several == Example("Capital of France?", references=("Paris", "paris ", "Lutetia"))
    assert one == Example("2 + 3", references=(" 5",))
    assert [e.output for e in read_metaicl(path).support] == ["Paris", " 5"]
    assert read_metaicl(path).free_form


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"output": []}, r"field `output` must be a str, or a list of them that is not empty, where .* got \[\]"),
        ({"output": ["a", 3]}, r"field `output` must be .*; got \['a', 3\]"),
        ({"output": None}, "field `output` must be .*; got None"),
        ({"output": ["a", " "]}, r"`references` holds an empty answer: \['a', ' '\]"),
        ({"output": "\ud800"}, ".*half of a surrogate pair"),
        ({"output": ["a"], "options": ["a", "b"]}, r"field `output` must be a str, got \['a'\]"),
    ],
)
def test_bad_free_form_lines(tmp_path: Path, changes: dict[str, object], match: str) -> None:
    """What is no answer is named by file and line."""
    (tmp_path / "bad.jsonl").write_text(json.dumps(FREE) + "\n" + json.dumps(FREE | changes))
    with pytest.raises(TaskError, match=rf"bad\.jsonl:2: {match}"):
        read_examples(tmp_path / "bad.jsonl")


def test_mixed_lines(root: Path) -> None:
    """The first line of the other kind is named, and one of the first kind, in a file and across a task's files."""
    free, choice = json.dumps(FREE), json.dumps(GOOD)
    for lines, match in (
        (
            [choice, "", choice, free],
            r"m\.jsonl:4: `options` is empty, but is not in .*m\.jsonl:1; a task is all multiple",
        ),
        (
            [free, choice],
            r"m\.jsonl:2: `options` is not empty, but is in .*m\.jsonl:1; .* two tasks of them, or fix this",
        ),
    ):
        (root / "m.jsonl").write_text("\n".join(lines))
        for read in (read_examples, read_questions, read_metaicl):
            with pytest.raises(TaskError, match=match):
                read(root / "m.jsonl")
    (root / "plain" / "plain_16_100_dev.jsonl").write_text(free)
    with pytest.raises(TaskError, match=r"100_dev\.jsonl:1: `options` is empty, but is not in .*13_train\.jsonl:1; "):
        read_metaicl(root / "plain")


def test_free_form_questions(tmp_path: Path) -> None:
    """A question to predict is its text where it has neither options nor an answer, else an example."""
    path = tmp_path / "q.jsonl"
    question = {"input": " how? ", "options": []}
    path.write_text("\n".join(map(json.dumps, [question, FREE])))
    assert read_questions(path) == [" how? ", Example(FREE["input"], references=("Paris", "paris ", "Lutetia"))]
    path.write_text(json.dumps({"input": "q", "options": ["a", "a", "b"]}))
    assert read_questions(path, merge_duplicates=True) == [Example("q", ("a", "b"), 0)]
    for wrong, match in (
        ({"input": " "}, "`input` is empty"),
        ({"input": "\ud800"}, ".*half of a surrogate pair"),
        ({"output": None}, "field `output` must be .*; got None"),
    ):
        path.write_text(json.dumps(question | wrong))
        with pytest.raises(TaskError, match=rf"q\.jsonl:1: {match}"):
            read_questions(path)


JSON = st.recursive(st.none() | st.booleans() | st.integers() | st.floats() | st.text(), st.lists, max_leaves=6)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "input": JSON,
        "output": st.sampled_from(["a", "b"]) | JSON,
        "options": st.just(["a", "b"]) | JSON,
    },
)
LINES = st.lists(st.binary(max_size=30) | (FIELDS | JSON).map(lambda value: json.dumps(value).encode()), max_size=4)


@given(lines=LINES, merge=st.booleans(), labelled=st.booleans())
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=300)
def test_any_bytes_give_examples_or_a_task_error(
    tmp_path: Path, lines: list[bytes], merge: bool, labelled: bool
) -> None:
    """Whatever the file holds, the reader returns whole examples or raises its own error."""
    path = tmp_path / "junk.jsonl"
    path.write_bytes(b"\n".join(lines))
    try:
        found = (read_examples if labelled else read_questions)(path, merge_duplicates=merge)
    except TaskError as error:
        assert str(error).startswith(str(path))
    else:
        assert 0 < len(found) <= b"\n".join(lines).count(b"\n") + 1
        examples = [one for one in found if isinstance(one, Example)]
        assert len(examples) == len(found) or (not labelled and all(isinstance(one, str) and one for one in found))
        assert all(one.input.strip() and one.output in (one.options or one.references) for one in examples)


# --- tasks, task sets and splits on disk ---


def inputs(examples: tuple[Example, ...]) -> list[str]:
    """Return the inputs, which tell where each example came from."""
    return [one.input for one in examples]


def test_load_task(root: Path) -> None:
    """Each layout gives the support and the query that it promises."""
    assert read_metaicl(root / "single.jsonl") == Task("single", tuple(read_examples(root / "single.jsonl")))
    pooled = read_metaicl(root / "plain")
    assert (pooled.name, inputs(pooled.support)) == ("plain", ["aa", "bb", "cc", "dd", "ee"])
    assert inputs(pooled.query) == ["dev 13", "dev both", "dev 100"]
    one = read_metaicl(root / "plain", seed=13)
    assert (inputs(one.support), inputs(one.query)) == (["aa", "bb", "cc"], ["dev 100", "dev both"])
    assert inputs(read_metaicl(root / "plain", seed=100).query) == ["aa", "dev 13", "dev both"]
    assert inputs(read_metaicl(root / "tested").query) == ["dev 13", "dev 100"]
    assert inputs(read_metaicl(root / "tested", seed=13).query) == ["t", "t"]
    assert inputs(read_metaicl(root / "tested", seed=100).query) == ["13", "t", "t"]


def test_read_metaicl_in_the_current_folder(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A task is named after its folder, also where the path does not say it."""
    monkeypatch.chdir(root / "plain")
    assert read_metaicl(".").name == "plain"


def test_read_metaicl_refuses(root: Path) -> None:
    """A missing task, seed or train file is named."""
    with pytest.raises(TaskError, match=r"plain: no train file of seed 7; seeds here: 13, 100"):
        read_metaicl(root / "plain", seed=7)
    with pytest.raises(TaskError, match=r"single\.jsonl: a file has no seeds, got seed=13"):
        read_metaicl(root / "single.jsonl", seed=13)
    with pytest.raises(TaskError, match="nowhere: expected a jsonl file that can be read, got: No such file"):
        read_metaicl(root / "nowhere", seed=13)
    with pytest.raises(TaskError, match="notes: no train file here; expected notes_16_<seed>_train"):
        read_metaicl(root / "notes")


def test_load_tasks(root: Path) -> None:
    """All tasks by default, or those named; free-form ones can be left out, and missing ones raise or warn."""
    assert list(load_tasks(root)) == ["free", "plain", "single", "tested"]
    assert [task.name for task in load_tasks(root).values() if task.free_form] == ["free"]
    with pytest.warns(UserWarning, match=r"1 of 4 tasks are left out: 1 free-form \(free\)$") as caught:
        assert list(load_tasks(root, free_form=False)) == ["plain", "single", "tested"]
    with pytest.warns(UserWarning, match="1 of 2 tasks are left out: 1 free-form") as more:
        assert list(load_tasks(root, names=["plain", "free"], free_form=False)) == ["plain"]
    caught = [*caught, *more]
    assert [Path(one.filename).name for one in caught] == ["test_tasks.py"] * 2
    assert list(load_tasks(root, names=["tested", "plain"], seed=13, format="metaicl")) == ["tested", "plain"]
    with pytest.warns(UserWarning, match="2 of 3 tasks are missing and left out: zzz, plan$"):
        assert list(load_tasks(root, names=["zzz", "plain", "plan"], allow_missing=True)) == ["plain"]
    with pytest.raises(TaskError, match=r"2 of 3 tasks are missing: 'zzz', 'plan' \(did you mean 'plain'"):
        load_tasks(root, names=["zzz", "plain", "plan"])


def test_load_tasks_refuses(root: Path) -> None:
    """A wrong root, a bare string, an empty choice and an ambiguous name are refused."""
    with pytest.raises(TaskError, match="gone: there is no such file or folder"):
        load_tasks(root / "gone")
    with pytest.raises(TaskError, match=r"got the string 'plain'; pass \['plain'\]"):
        load_tasks(root, names="plain")
    with pytest.raises(TaskError, match=r"notes: no task of a format that is known here; .*<task>\.jsonl"):
        load_tasks(root / "notes")
    with pytest.raises(TaskError, match="no task to load, of 1 .*; task 'free' is free-form; pass free_form=True"):
        load_tasks(root, names=["free"], free_form=False)
    with pytest.raises(TaskError, match="task 'plain' occurs twice"):
        load_tasks(root, names=["plain", "plain"])
    write(root / "plain.jsonl", ["x"])
    with pytest.raises(TaskError, match=r"task 'plain' is there twice, plain and plain\.jsonl; remove one"):
        load_tasks(root, names=["tested"])


def test_load_split(root: Path) -> None:
    """Flat and grouped files are read; leaks and missing tasks are told."""
    leaky = {"train": ["plain", "gone"], "test": ["plain"]}
    tree = {"s": {"train": ["plain"], "test": ["single"]}, "g": {"s": leaky, "u": leaky}, "h": {"u": leaky}}
    (root / "splits.json").write_text(json.dumps(tree))
    assert load_split(root, "s") == (["plain"], ["single"])
    with pytest.warns(UserWarning) as caught:
        assert load_split(root, "g/s", allow_missing=True) == (["plain"], ["plain"])
    assert [Path(one.filename).name for one in caught] == ["test_tasks.py"] * 2
    assert "'g/s' trains on tasks it calls unseen: plain" in str(caught[0].message)
    assert "1 of 3 tasks are missing and left out: gone" in str(caught[1].message)
    with pytest.raises(TaskError, match="split 'u' is ambiguous; say which: g/u, h/u"):
        load_split(root, "u")
    with pytest.raises(TaskError, match="split 'v' is unknown; known splits: s, g/s, g/u, h/u"):
        load_split(root, "v")
    with warnings.catch_warnings(), pytest.raises(TaskError, match="1 of 3 tasks are missing: 'gone'"):
        warnings.simplefilter("ignore")
        load_split(root, "h/u")


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (None, "expected a file of splits, got: No such file"),
        ("{", "broken JSON"),
        ("[1]", r"must hold two lists `train` and `test`, got \[1\]"),
        ('{"s": {"train": []}}', r"'s/train' must hold two lists `train` and `test`, got \[\]"),
        ('{"s": {"train": [], "test": "plain"}}', "split 's' must hold two lists of task names, got 'plain'"),
        ('{"s": {"train": [], "test": [1]}}', r"split 's' must hold two lists of task names, got \[1\]"),
    ],
)
def test_load_split_refuses(root: Path, text: str | None, match: str) -> None:
    """A malformed file of splits is named with the field."""
    if text is not None:
        (root / "splits.json").write_text(text)
    with pytest.raises(TaskError, match=rf"splits\.json: .*{match}"):
        load_split(root, "s")


@needs_data("crossfit")
def test_every_crossfit_task_loads() -> None:
    """Every task loads, pooled and by seed, and the splits name tasks that are there."""
    pooled = load_tasks(CROSSFIT, merge_duplicates=True)
    by_seed = load_tasks(CROSSFIT, names=list(pooled), seed=13, merge_duplicates=True)
    assert len(pooled) >= 105
    for task in [*pooled.values(), *by_seed.values()]:
        assert len(task.support) >= 15
        assert len(task.query) > 0
        assert not set(inputs(task.support)) & set(inputs(task.query))
    for split in ("cls-45", "cls-23", "nli", "para", "mcqa"):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            train, test = load_split(CROSSFIT, split, allow_missing=True)
        assert train and test
        assert set(train + test) <= set(pooled)
        assert not set(train) & set(test)


def test_options_in_an_order_of_their_own():
    """The gold text stays, every order comes, and the same seed gives the same one."""
    examples = tuple(Example(f"question {i}", ("a", "b", "c"), i % 3) for i in range(600))
    task = Task("task", examples[:400], examples[400:])
    shuffled = task.shuffle_options(seed=1)
    assert shuffled == task.shuffle_options(seed=1) != task.shuffle_options(seed=2)
    assert [e.output for e in shuffled.examples] == [e.output for e in task.examples]
    assert [e.input for e in shuffled.support] == [e.input for e in task.support]
    orders = [e.options for e in shuffled.examples]
    counts = {order: orders.count(order) for order in set(orders)}
    assert len(counts) == 6 and all(60 < count < 145 for count in counts.values())  # 100 each, 5 standard errors
    assert {e.options for e in Task("other", examples).shuffle_options(seed=1).examples} == set(counts)
