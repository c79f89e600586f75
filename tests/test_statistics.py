"""Statistics of tasks, and the command that shows them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from files import write_examples
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from runs import run

from bayes_lora.episodes import Encoder, PromptTemplate
from bayes_lora.episodes.encoder import token_counter
from bayes_lora.tasks import Example, Task
from bayes_lora.tasks.statistics import count_words, statistics_table, task_statistics

AB = ("a", "b")


def statistics_of(task: Task, *arguments: Any, **options: Any) -> Any:
    """Return the statistics of one task."""
    [(_, one)] = task_statistics([task], *arguments, **options).iterrows()
    return one


def test_statistics_of_a_task() -> None:
    """Every number is as counted by hand."""
    support = [Example("one", AB, 0), Example("one two", ("b", "a"), 1), Example("one two three", AB, 0)]
    query = [Example("one two three four", AB, 1), Example("1 2 3 4 5", ("a", "b"), 0)]
    one = statistics_of(Task("t", tuple(support), tuple(query)), max_length=3)
    assert (one.name, one.num_support, one.num_query, one.num_options) == ("t", 3, 2, (2, 2))
    assert one.fixed_options and one.top_share == 4 / 5
    assert (one.lengths, one.answer_lengths) == ((1, 3, 5), (1, 1, 1))
    assert (one.num_repeats, one.truncated, one.warnings) == (0, 2 / 5, ())


def test_options_that_differ() -> None:
    """Where options are not fixed, balance is that of the gold option's place."""
    examples = [Example(f"q{i}", (f"x{i}", f"y{i}", "z")[: 2 + i % 2], i % 2) for i in range(5)]
    one = statistics_of(Task("t", tuple(examples)))
    assert (one.num_options, one.fixed_options, one.top_share, "truncated" in one) == ((2, 3), False, 3 / 5, False)


@pytest.mark.parametrize(
    ("support", "query", "match"),
    [
        ([Example("x", AB, 1), Example("y", AB, 1)], [], "all 2 answers are 'b'"),
        ([Example("x", AB, 1), Example("y", ("b", "a"), 0)], [], "all 2 answers are 'b'"),
        ([Example("x", ("a", "b"), 1), Example("y", ("c", "d"), 1)], [], "gold option is always number 2"),
        ([Example("x", AB, 0)], [Example("x", AB, 0), Example("y", AB, 1)], "1 of 2 query inputs are in the support"),
        ([Example("x\n y", AB, 0), Example("x\n y", ("b", "a"), 0)], [], "1 inputs have several .* such as 'x y'"),
        (
            [Example("x", ("w", "w w w w"), 0), Example("y", ("w", "w w w w w"), 1), Example("z", ("u", "v"), 1)],
            [],
            r"very different length in 2 of 3 examples \(up to 1 against 5\).*normalize=mean",
        ),
    ],
)
def test_warnings(support: list[Example], query: list[Example], match: str) -> None:
    """Each problem is told in one sentence, and alone."""
    [warning] = statistics_of(Task("t", tuple(support), tuple(query))).warnings
    assert re.search(match, warning)


def test_equal_inputs_with_other_options_are_no_conflict() -> None:
    """A question asked twice with other options is a repeat, but contradicts nothing."""
    one = statistics_of(Task("t", (Example("x", ("a", "b"), 0), Example("x", ("c", "d"), 1))))
    assert (one.num_repeats, one.warnings) == (1, ())


def free(text: str, *references: str) -> Example:
    """Return a free-form example."""
    return Example(text, references=references)


def test_statistics_of_a_free_form_task() -> None:
    """Balance is the share of the most frequent answer, and an answer's length that of the first reference."""
    support = [free("one", "a", "b c d e f"), free("one two", "a b"), free("one two three", "a", "c")]
    one = statistics_of(Task("t", tuple(support), (free("1 2 3 4", "b c d e"),)), max_length=3)
    assert (one.num_options, one.fixed_options, one.top_share) == ((0, 0), True, 2 / 4)
    assert (one.lengths, one.answer_lengths) == ((1, 2, 4), (1, 2, 4))
    assert (one.num_repeats, one.truncated, one.warnings) == (0, 2 / 4, ())  # one row, two answers


@pytest.mark.parametrize(
    ("support", "query", "match"),
    [
        ([free("x", "a"), free("y", "a", "b")], [], "all 2 answers are 'a': there is nothing to tell apart"),
        ([free("x", "a")], [free("x", "b", "a"), free("y", "c")], "1 of 2 query inputs are in the support"),
        (
            [free("x\n y", "a", "b"), free("x\n y", "c")],
            [],
            "1 inputs have several answers in as many .* 'x y': make them",
        ),
        ([free("x", "a", "b"), free("x", "b", "c"), free("x", "c", "a")], [], "1 inputs have several answers"),
    ],
)
def test_warnings_of_a_free_form_task(support: list[Example], query: list[Example], match: str) -> None:
    """Examples that share a reference agree; the lengths of answers are no matter."""
    [warning] = statistics_of(Task("t", tuple(support), tuple(query))).warnings
    assert re.search(match, warning)


def test_free_answers_that_agree() -> None:
    """A question may come twice, and answers may be short and long."""
    examples = (free("x", "a", "b"), free("x", "b"), free("y", "w " * 50))
    one = statistics_of(Task("t", examples))
    assert (one.num_repeats, one.warnings, one.answer_lengths[2] > 40) == (1, (), True)


ANSWERS = st.lists(st.tuples(st.text("ab ", min_size=1).filter(str.strip), st.integers(0, 1)), min_size=1, max_size=20)


@given(rows=ANSWERS, at=st.integers(0, 20), limit=st.integers(0, 9))
def test_statistics_are_within_their_bounds(rows: list[tuple[str, int]], at: int, limit: int) -> None:
    """Shares are in [0, 1], percentiles in order, and halves do not matter but for their sizes."""
    examples = [Example(text, AB, answer) for text, answer in rows]
    task = Task("t", tuple(examples[:at]), tuple(examples[at:]))
    one = statistics_of(task, max_length=limit)
    assert one.num_support + one.num_query == len(rows)
    assert 0.5 <= one.top_share <= 1
    low, middle, high = one.lengths
    lengths = [len(text.split()) for text, _ in rows]
    assert min(lengths) <= low <= middle <= high <= max(lengths)
    assert one.truncated == np.mean([length > limit for length in lengths])
    assert one.num_repeats == len(rows) - len({text for text, _ in rows})


@pytest.mark.filterwarnings("ignore:.*longer than max_length")
def test_tokens_are_those_of_the_encoder(tokenizer: Any) -> None:
    """A row counts as long as the encoder makes it, and as truncated exactly if the encoder cuts it."""
    template = PromptTemplate("{options}: {input}\nAnswer:")
    words = "the film was good and bad so maybe not".split()
    options = ("positive", "not so negative")
    examples = [Example(" ".join(words[: 1 + i % 9]) + f" {i}", options, i % 2) for i in range(30)]
    for limit in range(30, 60, 7):
        encoder = Encoder(tokenizer, template, limit)
        count = token_counter(encoder)
        whole = Encoder(tokenizer, template, 1000)(examples)
        assert [count(example).row for example in examples] == [len(row) for row in whole]
        assert count(examples[0]).options == tuple((whole[0].target_options == k).sum().item() for k in range(2))
        cut = [encoder.encode(example)[1] for example in examples]
        assert statistics_of(Task("t", tuple(examples)), count, max_length=limit).truncated == np.mean(cut)
        free = [Example(e.input[:9], references=("so" + " so" * 4 * i,)) for i, e in enumerate(examples[:9])]
        cut = [encoder.encode(example)[1] for example in free]
        assert any(cut) and not all(cut)
        assert statistics_of(Task("t", tuple(free)), count, max_length=limit).truncated == np.mean(cut)
        assert [count(e).options for e in free] == [(len(row.gold),) for row in Encoder(tokenizer, template)(free)]


def test_table() -> None:
    """A line per task, with the unit said, and names that are no markup."""
    fixed = Task("[b]", (Example("x y", AB, 0), Example("x y", AB, 1)), (Example("x", AB, 1),))
    open_ended = Task("u", (Example("x", ("a", "b"), 0), Example("y", ("a", "c", "d"), 2)))
    wide = Console(width=100)
    with wide.capture() as capture:
        wide.print(statistics_table(task_statistics((fixed, open_ended), max_length=1), "words", 1))
    head, _, *rows, note = [line.replace("│", " ").replace("┃", " ").split() for line in capture.get().splitlines()]
    assert head == "task support query options top label words 5/50/95% repeats >1".split()
    assert note[:3] == ["*", "options", "differ"]
    assert rows == [
        ["[b]", "2", "1", "2", "67%", "1/2/2", "1", "67%"],
        ["u", "2", "0", "2-3", "50%*", "1/1/1", "0", "0%"],
    ]


def test_table_with_a_free_form_task() -> None:
    """The lengths of answers get a column, for the other tasks as well."""
    choice = Task("c", (Example("x y", ("a b c", "d"), 0), Example("x", ("a b c", "d"), 1)))
    tasks = (Task("f", (free("x y", "a b"), free("z", "a b"), free("u", "c")), (free("v", "d e f"),)), choice)
    wide = Console(width=100)
    with wide.capture() as capture:
        wide.print(statistics_table(task_statistics(tasks)))
    head, _, *rows = [line.replace("│", " ").replace("┃", " ").split() for line in capture.get().splitlines()]
    assert head == "task support query options top label words 5/50/95% answer repeats".split()
    assert rows == [
        ["f", "3", "1", "free", "50%", "1/1/2", "1/2/3", "0"],
        ["c", "2", "0", "2", "50%", "1/2/2", "1/2/3", "0"],
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Return a folder with a good task, one with constant labels, one in the MetaICL layout, and a split."""
    root = tmp_path / "data"
    write_examples(root / "good.jsonl", [Example(f"a long enough text number {i}", AB, i % 2) for i in range(6)])
    write_examples(root / "flat.jsonl", [Example(f"another text of number {i}", AB, 0) for i in range(4)])
    for seed in (13, 21):
        for part, start in (("train", 0), ("dev", 10)):
            examples = [
                Example(f"A long enough text, number {i}!", AB, i % 2)
                for i in range(start + 10 * seed, start + 10 * seed + 5)
            ]
            write_examples(root / "meta" / f"meta_16_{seed}_{part}.jsonl", examples)
    (root / "splits.json").write_text(
        '{"s": {"train": ["good"], "test": ["flat"]}, "r": {"train": ["flat"], "test": []}}'
    )
    return root


def test_tasks_command(monkeypatch, capsys, folder, model_folder) -> None:
    """A folder, a file and a MetaICL folder are shown in words, or in the tokens of a model or a run."""
    code, out, err = run(monkeypatch, capsys, "tasks", folder)
    assert (code, err) == (0, "")
    assert "words 5/50/95%" in out and "flat: all 4 answers are 'a'" in out
    assert [name in out for name in ("good", "flat", "meta")] == [True] * 3
    code, out, _ = run(monkeypatch, capsys, "tasks", folder / "meta", "--seed", 21)
    assert code == 0 and out.splitlines()[2].replace("│", " ").split()[:4] == ["meta", "5", "5", "2"]
    code, out, _ = run(monkeypatch, capsys, "tasks", folder, "--seed", 21)
    assert code == 0 and "meta │       5 │     5" in out
    code, out, _ = run(monkeypatch, capsys, "tasks", folder / "good.jsonl", "--model", model_folder)
    assert code == 0 and "tokens 5/50/95%" in out and ">128" in out
    settings = {"language_model": {"name": str(model_folder), "max_length": 20}}
    (folder / "config.json").write_text(json.dumps(settings))
    code, out, _ = run(monkeypatch, capsys, "tasks", folder / "good.jsonl", "--run", folder)
    assert code == 0 and ">20" in out and "100%" in out
    code, out, _ = run(monkeypatch, capsys, "tasks", folder / "good.jsonl", "--run", folder, "--max-length", 90)
    assert code == 0 and ">90" in out


def test_tasks_command_shows_free_form_tasks(monkeypatch, capsys, folder) -> None:
    """A free-form task stands among the others."""
    lines = [json.dumps({"input": f"q {i}", "output": ["Paris", "paris"], "options": []}) for i in range(3)]
    (folder / "open.jsonl").write_text("\n".join(lines))
    code, out, err = run(monkeypatch, capsys, "tasks", folder)
    assert (code, err) == (0, "")
    assert re.search(r"open +│ +3 │ +0 │ +free │ +100% │ +2/2/2 │ +1/1/1 │ +0", out)
    assert "open: all 3 answers are 'Paris': there is nothing to tell apart" in out


def test_tasks_command_tells_overlap(monkeypatch, capsys, folder) -> None:
    """With a split, texts that its halves share are counted, or said to be none."""
    code, out, _ = run(monkeypatch, capsys, "tasks", folder, "--split", "s")
    assert code == 0 and "no text of the 1 unseen tasks" in out and "meta" not in out
    write_examples(folder / "flat.jsonl", [Example(f"A long enough TEXT, number {i}", AB, 0) for i in range(4)])
    code, out, _ = run(monkeypatch, capsys, "tasks", folder, "--split", "s")
    assert code == 0 and "flat        │ good          │     4 │    0 │        4 │ 100.0%" in out


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["nowhere"], ["nowhere", "no such file"]),
        (["bad"], ["bad.jsonl:1: ", "broken JSON"]),
        (["good.jsonl", "--seed", 13], ["good.jsonl", "a single file has no support sets by seed"]),
        (["meta", "--seed", 7], ["no train file of seed 7", "13, 21"]),
        ([".", "--split", "t"], ["splits.json", "'t' is unknown", "known splits: s, r", "abmll/cls-45"]),
        (["good.jsonl", "--max-length", 9], ["--max-length 9", "--model or --run"]),
        (["good.jsonl", "--model", "./none"], ["none", "does not exist"]),
        (["good.jsonl", "--model", "./none", "--run", "r"], ["expected one of them"]),
        (["good.jsonl", "--run", "none"], ["none", "config.json"]),
    ],
)
def test_tasks_command_refuses(monkeypatch, capsys, folder, words, parts) -> None:
    """Bad input is one line and exit code 2."""
    (folder / "bad").mkdir()
    (folder / "bad" / "bad.jsonl").write_text("{")
    monkeypatch.chdir(folder)
    code, out, err = run(monkeypatch, capsys, "tasks", *words)
    assert (code, out, err.count("\n"), err[:7]) == (2, "", 1, "error: ")
    assert all(part in err for part in parts), err


@pytest.mark.parametrize("command", ["tasks", "show"])
def test_help_shows_an_example(monkeypatch, capsys, command) -> None:
    """Each command's help ends with a line to copy."""
    code, out, err = run(monkeypatch, capsys, command, "--help")
    assert (code, err) == (0, "")
    assert f"Example: bayes-lora {command}" in " ".join(out.replace("`", "").split())


def test_words_are_counted_in_the_input_and_the_options() -> None:
    """Without a tokenizer the prompt's template does not count."""
    assert count_words(Example("a b\nc", ("d", "e  f"), 0)) == (3, (1, 2))
