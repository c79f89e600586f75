"""The readers of CrossFit's, UnifiedQA's and LegalBench's files, of molecules, and `load_tasks` above them all."""

from __future__ import annotations

import json
import os
import re
from functools import partial
from pathlib import Path

import pytest
from files import write

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Example, Task
from bayes_lora.tasks.readers import molecules, table_rows, text_files
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.legalbench import read_legalbench, without_demonstrations
from bayes_lora.tasks.readers.load import load_tasks, task_from
from bayes_lora.tasks.readers.metaicl import read_examples
from bayes_lora.tasks.readers.table_rows import read_table
from bayes_lora.tasks.readers.text_files import CannotScore, children, inside
from bayes_lora.tasks.readers.unifiedqa import options_in, read_unifiedqa

ANSWER = r"\(a\) \.\.\. \(b\)"
GOOD = {"input": "q", "output": "b", "options": ["a", "b"]}


def triples(examples):
    return [(example.input, example.options, example.output) for example in examples]


def references(examples):
    assert not any(example.options for example in examples)
    return [(example.input, example.references) for example in examples]


# --- text files ---


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"a\tx\nb\t\xe9\n", r"t\.tsv:2: expected UTF-8, got byte 0xe9 at position 3; save the file as UTF-8"),
        (
            "a\tx\n".encode("utf-16"),
            r"t\.tsv:1: expected UTF-8, got the byte-order mark of UTF-16; save the file as UTF-8",
        ),
        (
            "a\tx\n".encode("utf-16-le"),
            r"t\.tsv:1: expected text, got a null byte at position 2; if the file is UTF-16",
        ),
        (
            b"a\tx\n" + b"b" * 41,
            r"t\.tsv:2: expected a line, got more than 40 bytes without an end; the limit is 40 \(bayes",
        ),
        (b" \n\t\n", r"t\.tsv: the file is empty; expected one input and its output a line"),
        (None, r"t\.tsv: expected a tsv file that can be read, got: No such file or directory"),
    ],
)
def test_lines_refuse(tmp_path, monkeypatch, data, match):
    """What is no text in UTF-8, or has no end, is named with its line; a long line is not read to its end."""
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 40)
    if data is not None:
        write(tmp_path / "t.tsv", data)
    with pytest.raises(TaskError, match=match):
        read_crossfit(tmp_path / "t.tsv")


def test_a_line_without_end_stays_out_of_memory(tmp_path, monkeypatch):
    """Of a sparse file of 3 GB only the first bytes are read."""
    with (tmp_path / "huge.jsonl").open("wb") as file:
        file.truncate(3_000_000_000)
    with pytest.raises(TaskError, match=r"huge\.jsonl:1: .*more than 10,000,000 bytes without an end"):
        read_examples(tmp_path / "huge.jsonl")


def test_lines_of_the_limit_are_read(tmp_path, monkeypatch):
    """The limit itself fits; a byte-order mark, CRLF and blank lines do not disturb."""
    monkeypatch.setattr(text_files, "MAX_LINE_BYTES", 11)
    text = "\ufeffaa\tx\r\n\r\nbbbbbbbb\tx\nc\ty\r\n d\ty "
    task = read_crossfit(write(tmp_path / "t.tsv", text))
    assert triples(task.support) == [
        (name, ("x", "y"), out) for name, out in zip(["aa", "b" * 8, "c", "d"], "xxyy", strict=True)
    ]


@pytest.mark.parametrize("name", ["a\0b", "a\ud800", "a" * 5000])
@pytest.mark.parametrize(
    "reader", [read_crossfit, read_unifiedqa, read_legalbench, molecules.read_molecules, load_tasks]
)
def test_names_that_no_file_can_have(tmp_path, reader, name):
    with pytest.raises(TaskError, match=r"can be read|can be followed|no such file"):
        reader(tmp_path / name)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("", "t: the file is empty; expected a first row that names the columns"),
        ("\n a,b \n1,2\n\n1\n", "t:5: expected 2 cells, as many as the header; got 1; write an empty cell"),
        ('a,b\n"1\n2",3\n1,2,3\n', "t:4: expected 2 cells, as many as the header; got 3"),
        ('a,b\n1,2\n"1,2\n3,4\n', r"t:3: broken table \(unexpected end of data\); is a quote left open"),
        ('a,b\n"1"2,3\n', r"t:2: broken table \(',' expected after '\"'\)"),
        ("a,b\n1,2\n" + "x" * 140_000 + ",2\n", r"t:3: broken table \(field larger .* longer than 131,072 characters"),
        (",".join("abcdefg" * 8), r"t:1: column 'a' occurs twice in \[.* and 6 more; rename"),
        ("a,b,a\n", r"t:1: column 'a' occurs twice in \['a', 'b', 'a'\]; rename"),
        ("a,b\n1,\r2\n", r"t:2: broken table \(new-line character seen"),
    ],
)
def test_table_refuses(tmp_path, monkeypatch, text, match):
    """A row is named by the line on which it begins, though cells before it span lines."""
    monkeypatch.setattr(table_rows, "MAX_CELL", 131_072)
    with pytest.raises(TaskError, match=match):
        read_table(write(tmp_path / "t", text), ".csv")


def test_folders_and_links(tmp_path):
    """A link or a name that leads out is refused, as is a pipe; one that stays inside is followed."""
    secret = write(tmp_path / "secret.tsv", "a\tb\n")
    root = tmp_path / "root"
    write(root / "t/train.tsv", "q\tyes\n")
    (root / "link").symlink_to(root / "t")
    assert inside(root, root / "link/train.tsv") == root / "link/train.tsv"
    for path in (root / "../secret.tsv", secret):
        with pytest.raises(TaskError, match=r"leads out of the folder .*root, to .*secret\.tsv; copy the file into"):
            inside(root, path)
    os.mkfifo(root / "t/dev.tsv")
    with pytest.raises(TaskError, match=r"dev\.tsv: expected a file or a folder, got a pipe or a device; remove it"):
        read_unifiedqa(root / "t")
    with pytest.raises(TaskError, match="gone: expected a folder that can be read, got: No such file"):
        children(tmp_path / "gone")


@pytest.mark.parametrize(
    ("reader", "name"),
    [
        (load_tasks, "t_16_13_train.jsonl"),
        (read_crossfit, "t_16_13_train.tsv"),
        (read_unifiedqa, "train.tsv"),
        (read_legalbench, "base_prompt.txt"),
        (load_tasks, "t.csv"),
    ],
)
def test_a_file_that_is_a_link_out_of_the_folder(tmp_path, reader, name):
    secret = write(tmp_path / "secret", "q\tyes\n")
    (tmp_path / "t").mkdir()
    (tmp_path / "t" / name).symlink_to(secret)
    with pytest.raises(TaskError, match=rf"t/{name}: leads out of the folder .*/t, to .*secret"):
        reader(tmp_path / "t")


# --- CrossFit ---


def test_crossfit_pools_and_splits_by_seed(tmp_path):
    """Labels are those of all files, the test file included; support and query are as in the MetaICL layout."""
    files = {"13_train": "aa\tx\nbb\ty\n", "13_dev": "cc\ty\n", "87_train": "dd\tx\n", "87_dev": "aa\tx\nee\ty\n"}
    for name, text in (files | {"13_test": "ff\tz\naa\tx\n gg \t z\t z\n"}).items():
        write(tmp_path / f"t/t_16_{name}.tsv", text)
    write(tmp_path / "t/other_16_13_train.tsv", "broken")
    labels = ("x", "y", "z")
    pooled = read_crossfit(tmp_path / "t")
    assert triples(pooled.support) == [("aa", labels, "x"), ("bb", labels, "y"), ("dd", labels, "x")]
    assert triples(pooled.query) == [("cc", labels, "y"), ("ee", labels, "y")]
    one = read_crossfit(tmp_path / "t", seed=13)
    assert (one.name, triples(one.query)) == ("t", [("ff", labels, "z"), ("gg", labels, "z")])
    named = read_crossfit(tmp_path / "t", options=("z", "y", "x", "w"))
    assert triples(named.support)[1] == ("bb", ("z", "y", "x", "w"), "y")


def test_crossfit_multiple_choice(tmp_path):
    """Options that the input lists leave it, whether a context follows or not, in letters or numbers."""
    text = (
        "Who (A) or (B)? (A) me (B) you (C) f(A) x\tYOU\n"
        "Where? (1) here (2) there [SEP] A long (A) story\tthere\n"
        "Why? (a) so (b) no\tso\n"
    )
    assert triples(read_crossfit(write(tmp_path / "t.tsv", text)).support) == [
        ("Who (A) or (B)?", ("me", "you", "f(A) x"), "you"),
        ("Where? [SEP] A long (A) story", ("here", "there"), "there"),
        ("Why?", ("so", "no"), "so"),
    ]
    bad = text + "When? (A) now (B) later\tnever\n"
    with pytest.raises(TaskError, match=r"t\.tsv:4: the output 'never' must be one option, once, .*fix or remove"):
        read_crossfit(write(tmp_path / "t.tsv", bad))
    with pytest.raises(TaskError, match=r"t\.tsv:4: `options` holds 'now' more than once"):
        read_crossfit(write(tmp_path / "t.tsv", bad.replace("later\tnever", "then (C) now\tthen")))
    with pytest.raises(TaskError, match=r"t\.tsv:1: `input` is empty"):
        read_crossfit(write(tmp_path / "t.tsv", "(A) now (B) then\tthen\n"))


def test_crossfit_storm_of_letters(tmp_path):
    """A line of a million letters in brackets takes no longer than others, nor does its message."""
    text = "q (A) x (B) y\tx\n" * 2 + "(A) (B) " * 500_000 + "\tx\n"
    with pytest.raises(TaskError, match=r"t\.tsv:3: the output 'x' must be one option, once, of those that the input"):
        read_crossfit(write(tmp_path / "t.tsv", text))
    with pytest.raises(
        TaskError, match=r"t\.tsv:1: the answer must be one of the options: got 'x', options are"
    ) as caught:
        read_unifiedqa(write(tmp_path / "t.tsv", "(a) u " + "v " * 500_000 + "(b) w\tx\n"))
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a\tx\nb\ty\nc\ty\n", [("a", ("x",)), ("b", ("y",)), ("c", ("y",))]),
        ("a\tx\nb\ty \t z\ty\nc\ty\nd\ty\n", [("a", ("x",)), ("b", ("y", "z")), ("c", ("y",)), ("d", ("y",))]),
        ("who? (A) me (B) you\tyou\nwhy? (A)\tso\n", [("who? (A) me (B) you", ("you",)), ("why? (A)", ("so",))]),
        ("a\tx\n", [("a", ("x",))]),
    ],
)
def test_crossfit_free_form(tmp_path, text, found):
    """Outputs that are no labels, or several on a line, are references; the first is learnt from."""
    assert references(read_crossfit(write(tmp_path / "t.tsv", text)).support) == found


def test_crossfit_free_form_by_seed(tmp_path):
    """What kind a task is takes all of its files to tell; 0 labels make any task free-form."""
    for name, text in {"13_train": "aa\tx\nbb\ty\tx\n", "87_train": "cc\tx\n", "87_dev": "dd\tx\n"}.items():
        write(tmp_path / f"t/t_16_{name}.tsv", text)
    task = read_crossfit(tmp_path / "t", seed=13)
    assert references(task.support) == [("aa", ("x",)), ("bb", ("y", "x"))]
    assert references(task.query) == [("dd", ("x",))]
    write(tmp_path / "t/t_16_13_train.tsv", "aa\tx\nbb\ty\n")
    assert triples(read_crossfit(tmp_path / "t", seed=87).query) == []
    assert read_crossfit(tmp_path / "t").support[0].options == ("x", "y")
    assert references(read_crossfit(tmp_path / "t", max_options=0).support)[1:] == [("bb", ("y",)), ("cc", ("x",))]


def test_the_limit_of_options_is_told(tmp_path):
    """A warning names the count and the option where only the limit makes answers free text; 0 and 1 ask for it."""
    rows = "".join(f"text {i} of it\tlabel {i % 35}\n" for i in range(70))
    file = write(tmp_path / "c/t/t_16_13_train.tsv", rows)
    folder = legal(tmp_path / "l/t", "{{text}}", "text\tanswer\n" + rows)
    limits = {read_crossfit: (34, file.parent), read_legalbench: (32, folder)}
    for reader, (limit, path) in limits.items():
        there = re.escape(str(path))
        match = (
            rf"^{there}.*: answers are free text, because there are 35 different ones, and at most {limit} would be "
        )
        for read in (reader, partial(load_tasks, format=reader.__name__.removeprefix("read_"))):
            options = {"max_options": 34} if reader is read_crossfit else {}
            with pytest.warns(
                UserWarning, match=match + r"options; pass max_options=35 \(--max-options 35\)"
            ) as caught:
                made = read(path, **options)
            assert [warning.filename for warning in caught] == [__file__]
            assert (made if isinstance(made, Task) else made["t"]).free_form
        assert len(reader(path, max_options=35).support[0].options) == 35
        assert reader(path, max_options=0).free_form and reader(path, max_options=1).free_form
    write(file, rows.removesuffix("text 69 of it\tlabel 34\n"))
    assert read_crossfit(file, max_options=34).free_form  # more than half as many as lines: free text at any limit


def test_crossfit_of_one_label(tmp_path):
    """Nothing is to be learnt from it, unless the labels that are missing are named."""
    path = write(tmp_path / "t.tsv", "a\tx\nb\tx\n")
    with pytest.raises(
        CannotScore, match=r"t\.tsv:1: every output is 'x', and one option leaves nothing .*leave 't'"
    ) as e:
        read_crossfit(path)
    assert e.value.reason == "one label"
    assert read_crossfit(path, options=["y", "x"]).support[1] == Example("b", ("y", "x"), 1)


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("a\tx\nb\n", "t.tsv:2: the output is missing; expected an input and its output, a tab between them"),
        ("a\tx\nb\t\ty\n", "t.tsv:2: output 1 is empty; fill it in or remove it"),
        ("a\tx\n\ty\nb\tx\nc\ty\n", "t.tsv:2: `input` is empty"),
    ],
)
def test_crossfit_refuses_lines(tmp_path, text, match):
    with pytest.raises(TaskError, match=match):
        read_crossfit(write(tmp_path / "t.tsv", text))


def test_crossfit_refuses(tmp_path):
    file = write(tmp_path / "t/t_32_13_train.tsv", "a\tx\nb\ty\nc\tx\nd\ty\n")
    with pytest.raises(TaskError, match=r"t: no train file of seed 14; seeds here: 13"):
        read_crossfit(tmp_path / "t", seed=14)
    with pytest.raises(TaskError, match=r"train\.tsv: a file has no seeds, got seed=13; use `Task\.split"):
        read_crossfit(file, seed=13)
    with pytest.raises(
        TaskError, match=r"train\.tsv:2: the output must be one of the options: got 'y', options are \['x', 'z'"
    ):
        read_crossfit(file, options=["x", "z"])
    with pytest.raises(TaskError, match="`options` must be a list of texts, got the string 'xy'"):
        read_crossfit(file, options="xy")
    assert not read_crossfit(file).free_form
    with pytest.raises(TaskError, match=r"train\.tsv:1: expected one output, got 2: 'x', 'z'; keep one"):
        read_crossfit(write(tmp_path / "train.tsv", "a\tx\tz\n"), options=["x", "z"])
    write(tmp_path / "t/t_16_13_train.tsv", "a\tx\n")
    with pytest.raises(TaskError, match=r"t: t_\d\d_13_train\.tsv and t_\d\d_13_train\.tsv are of one seed; keep one"):
        read_crossfit(tmp_path / "t")
    write(tmp_path / "u/u_16_1_dev.tsv", "a\tx\nb\ty\nc\tx\nd\ty\n")
    with pytest.raises(TaskError, match=r"u: no train file here; expected u_16_<seed>_train\.tsv"):
        read_crossfit(tmp_path / "u")
    (tmp_path / "v").mkdir()
    with pytest.raises(TaskError, match=r"v: no task files here; expected v_16_<seed>_train\.tsv"):
        read_crossfit(tmp_path / "v")


# --- UnifiedQA ---


@pytest.mark.parametrize(
    ("listing", "answer", "options"),
    [
        ("(a) iron (b) feather", "iron", ["iron", "feather"]),
        ("(A) f(b) (B) (b)all  (C)  both (A) and (B)", "both (a) and (b)", ["f(b)", "(b)all", "both (A) and (B)"]),
        ("(a) part (a) of it (b) none", "none", ["part (a) of it", "none"]),
        ("(a) both (b) and (c) (b) neither (c) x", "neither", ["both (b) and (c)", "neither", "x"]),
        ("(a) yes (b) plan (c)", "plan (c)", ["yes", "plan (c)"]),
        ("(1) one (2) two", "two", ["one", "two"]),
        ("(1) a (2) b (3) c (4) d (5) e (6) f (7) g (8) h (9) i (10) j", "i (10) j", [*"abcdefgh", "i (10) j"]),
        ("(a) iron (c) tin (b) feather", "gold", ["iron (c) tin", "feather"]),
        ("(b) iron", "iron", []),
        ("nothing", "iron", []),
    ],
)
def test_options_in(listing, answer, options):
    """Brackets inside an option are part of it; where they can be misread, the answer tells."""
    assert options_in(listing, answer) == options


def test_options_in_a_storm_of_letters():
    """Many ways to read a listing cost a bounded time."""
    assert len(options_in("(a) x " + "(b) y (c) z (d) w " * 50_000, "none")) == 4


def test_unifiedqa_multiple_choice(tmp_path):
    """The options leave the input, the context stays; case and spaces of the answer do not matter."""
    write(
        tmp_path / "q/train.tsv",
        "which? \\n (a) Iron rod (b) feather \\n metals conduct.\tiron  Rod\nwho? \\n (a) x (b) y (c) z\ty\n",
    )
    write(tmp_path / "q/test.tsv", "who?\\n(A) t (B) u\tu\nhow? \\n (a) so (b) no\tno\n")
    task = read_unifiedqa(tmp_path / "q")
    assert triples(task.support) == [
        ("which?\nmetals conduct.", ("Iron rod", "feather"), "Iron rod"),
        ("who?", ("x", "y", "z"), "y"),
    ]
    assert triples(task.query) == [("how?", ("so", "no"), "no")]
    write(tmp_path / "q/dev.tsv", "dev? \\n (a) so (b) no\tso\n")
    assert triples(read_unifiedqa(tmp_path / "q").query) == [("dev?", ("so", "no"), "so")]
    assert triples(read_unifiedqa(tmp_path / "q", query="test").query) == [("how?", ("so", "no"), "no")]


def test_unifiedqa_yes_no(tmp_path):
    """A context that begins with a letter in brackets is no listing."""
    text = "is it? \\n context one\tYes\nis he? \\n (a) first, (b) second\tno\nare they?\tno\n"
    assert triples(read_unifiedqa(write(tmp_path / "boolq.tsv", text)).support) == [
        ("is it?\ncontext one", ("yes", "no"), "yes"),
        ("is he?\n(a) first, (b) second", ("yes", "no"), "no"),
        ("are they?", ("yes", "no"), "no"),
    ]


def test_unifiedqa_free_form(tmp_path):
    """Where few lines list options and some answer is neither yes nor no, each answer is a reference as it stands."""
    text = "who? \\n (a) king (b) queen \\n a long story\tthe  Queen\nis it?\tyes\nwhy?\\n\\nso\tbecause.\n"
    write(tmp_path / "q/train.tsv", text)
    write(tmp_path / "q/dev.tsv", "is it?\tno\nis she?\tno\n")
    task = read_unifiedqa(tmp_path / "q")
    assert references(task.support) == [
        ("who?\n(a) king (b) queen\na long story", ("the  Queen",)),
        ("is it?", ("yes",)),
        ("why?\nso", ("because.",)),
    ]
    assert references(task.query) == [("is she?", ("no",))]
    with pytest.raises(TaskError, match=r"t\.tsv:2: `input` is empty"):
        read_unifiedqa(write(tmp_path / "t.tsv", "who?\tme\n \\n \tyou\n"))


LISTED = "which? \\n (a) x (b) y\tx\n" * 3


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("who?\tx\ty\n", r"t\.tsv:1: expected 2 fields, a question and its answer; got 3; write one tab"),
        ("who?\n", r"t\.tsv:1: expected 2 fields, .*got 1"),
        ("who?\t \n", r"t\.tsv:1: the answer is empty"),
        (
            LISTED + "who? \\n (a) x (b) y\tz\n",
            r"t\.tsv:4: the answer must be one of the options: got 'z', options are \['x', 'y'\]",
        ),
        (LISTED + "who?\tx\n", r"t\.tsv:4: no options here, but other lines list them; expected `\\n \(a\)"),
        (
            LISTED + "who? \\n (a) x (b) X (c) y\tx\n",
            r"t\.tsv:4: option 'X' occurs twice in \['x', 'X', 'y'\]; .*merge_duplicates=True",
        ),
        (LISTED + "who? \\n (a) x\tx\n", r"t\.tsv:4: `options` must hold at least 2"),
        (LISTED + "\\n (a) x (b) y\tx\n", r"t\.tsv:4: `input` is empty"),
        (LISTED + "who? \\n (a) x (b) (c) y\tx\n", r"t\.tsv:4: `options` holds an empty answer"),
    ],
)
def test_unifiedqa_refuses_lines(tmp_path, text, match):
    with pytest.raises(TaskError, match=match):
        read_unifiedqa(write(tmp_path / "t.tsv", text))


def test_unifiedqa_refuses(tmp_path):
    text = "who? \\n (a) x (b) X (c) y\ty\n"
    assert read_unifiedqa(write(tmp_path / "t.tsv", text), merge_duplicates=True).support[0] == Example(
        "who?", ("x", "y"), 1
    )
    write(tmp_path / "q/dev.tsv", text)
    with pytest.raises(TaskError, match=r"q: expected train\.tsv here, got \['dev\.tsv'\]"):
        read_unifiedqa(tmp_path / "q")
    write(tmp_path / "q/train.tsv", text)
    with pytest.raises(TaskError, match=r"q: expected test\.tsv here, got \['train\.tsv', 'dev\.tsv'\]"):
        read_unifiedqa(tmp_path / "q", query="test")
    with pytest.raises(TaskError, match="`query` must be 'dev' or 'test', got 'train'"):
        read_unifiedqa(tmp_path / "q", query="train")


# --- LegalBench ---

PROMPT = """Say what the clause is. Clause: means this.

Clause: the seller shall insure the goods
Of: buyer
Answer: Duty

Clause: short
Of: me
Label: Right

Clause: {{text}}
Of: {{party}}
Answer:"""
ROWS = "index\ttext\tanswer\tparty\n0\tthe seller shall insure the goods\tDuty\tbuyer\n1\tshort\tRight\tme\n"


def legal(folder, prompt=PROMPT, train=ROWS, test=None):
    write(folder / "base_prompt.txt", prompt)
    write(folder / "train.tsv", train)
    if test is not None:
        write(folder / "test.tsv", test)
    return folder


def test_legalbench(tmp_path):
    """Each input is the prompt of its row without the solved rows; quoted cells keep tabs, lines and braces."""
    more = '2\t"a\t""quoted""\n{{party}} text"\tRight\tyou\n3\tlast\tDuty\tus\n'
    test = "party\ttext\tanswer\nme\tshort\tRight\nher\tnew\tDuty\n"
    task = read_legalbench(legal(tmp_path / "t", train=ROWS + more, test=test))
    assert (task.name, len(task.support)) == ("t", 4)
    head = "Say what the clause is. Clause: means this.\n\nClause: "
    assert triples(task.support)[1:3] == [
        (head + "short\nOf: me\nAnswer:", ("Duty", "Right"), "Right"),
        (head + 'a\t"quoted"\n{{party}} text\nOf: you\nAnswer:', ("Duty", "Right"), "Right"),
    ]
    assert triples(task.query) == [(head + "new\nOf: her\nAnswer:", ("Duty", "Right"), "Duty")]
    kept = read_legalbench(tmp_path / "t", demonstrations=True)
    assert kept.support[1].input == PROMPT.replace("{{text}}", "short").replace("{{party}}", "me")


@pytest.mark.parametrize(
    ("prompt", "left"),
    [
        ("Do.\n\nQ: one\nA: x\n\nQ: {{text}}\nA:", "Do.\n\nQ: {{text}}\nA:"),
        ("Do.\n\n{{text}}\nA:", "Do.\n\n{{text}}\nA:"),
        ("Do.\n\n  a cell of twenty letters\nA: x\n\n{{text}}\nA:", "Do.\n\n{{text}}\nA:"),
        ("Is Q: clear?\nQ: {{text}}", "Is Q: clear?\nQ: {{text}}"),
        ("Do.\nThe mark one is x\nThe mark {{text}} is", "Do.\nThe mark {{text}} is"),
        ("Question: one?\nQ: a\nA: x\nQ: {{text}}\nA:", "Question: one?\nQ: {{text}}\nA:"),
        ("none", "none"),
    ],
)
def test_without_demonstrations(prompt, left):
    """Solved rows are found by the query's label, or by their text where there is none."""
    assert without_demonstrations(prompt, [("t:2", {"text": "a cell of twenty letters"})]) == left


@pytest.mark.parametrize(
    ("answers", "prompt", "options"),
    [
        (["Yes", "Yes"], "{{t}}", ("No", "Yes")),
        (["No", "Yes"], "{{t}}", ("No", "Yes")),
        (["B"], "Option A: x\nOption B: y\n Option D : z\n{{t}}", ("A", "B", "D")),
        (["tort", "fraud", "tax"], "Is it Tort, fraud or tax?\n{{t}}", ("fraud", "tax", "tort")),
        (["u", "v", "u", "v"], "{{t}}", ("u", "v")),
    ],
)
def test_legalbench_options(tmp_path, answers, prompt, options):
    rows = "".join(f"{index} cell\t{answer}\n" for index, answer in enumerate(answers))
    task = read_legalbench(legal(tmp_path / "t", prompt, "t\tanswer\n" + rows))
    assert [(e.options, e.output) for e in task.support] == [(options, answer) for answer in answers]


@pytest.mark.parametrize(
    ("rows", "reason", "match"),
    [
        ("", "without rows", r"train\.tsv: no rows below its header"),
        ("1 q\ttax\n2 q\ttax\n", "one label", r"train\.tsv:2: every answer is 'tax', and one option leaves nothing"),
    ],
)
def test_legalbench_that_cannot_be_scored(tmp_path, rows, reason, match):
    with pytest.raises(CannotScore, match=match) as caught:
        read_legalbench(legal(tmp_path / "t", "Taxes or tort?\n{{t}}", "t\tanswer\n" + rows))
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("cell", "separator", "found"),
    [
        ("Juniper, Inc.", None, ("Juniper, Inc.",)),
        ("Ann B. Cole,Dee Ek", None, ("Ann B. Cole,Dee Ek",)),
        ("decide, decision ,decide", ",", ("decide", "decision")),
        ("['Ann B. Cole', 'Dee Ek']", None, ("Ann B. Cole, Dee Ek",)),
        ("['Not named']", None, ("Not named",)),
        ("[\"O'Neil\", 'x']", None, ("O'Neil, x",)),
        ("['a', 'b'] or c", None, ("['a', 'b'] or c",)),
        ("['a' 'b']", None, ("['a' 'b']",)),
    ],
)
def test_legalbench_free_form(tmp_path, cell, separator, found):
    """A cell is one reference; alternatives are told by a separator, and a list of Python's loses its brackets."""
    quoted = '"' + cell.replace('"', '""') + '"'
    folder = legal(tmp_path / "t", train=f"text\tanswer\tparty\none\tsome other\ta\nshort\t{quoted}\tb\n")
    head = "Say what the clause is. Clause: means this.\n\nClause: "
    assert references(read_legalbench(folder, separator=separator).support) == [
        (head + "one\nOf: a\nAnswer:", ("some other",)),
        (head + "short\nOf: b\nAnswer:", found),
    ]


def test_legalbench_free_form_refuses(tmp_path):
    folder = legal(tmp_path / "t", "{{text}}", "text\tanswer\none\tx,y\ntwo\tu,,v\n")
    with pytest.raises(TaskError, match=r"train\.tsv:3: `references` holds an empty answer: \['u', '', 'v'\]"):
        read_legalbench(folder, separator=",")
    with pytest.raises(TaskError, match="`separator` is empty; expected what separates answers"):
        read_legalbench(folder, separator="")
    folder = legal(tmp_path / "t", "{{text}}", "text\tanswer\none\tx,y\ntwo\t \nthree\tz\n")
    with pytest.raises(TaskError, match=r"train\.tsv:3: `answer` is empty"):
        read_legalbench(folder)
    assert read_legalbench(legal(tmp_path / "t", "{{t}}", "t\tanswer\na\tx\nb\tx\n"), max_options=0).free_form


@pytest.mark.parametrize(
    ("prompt", "train", "match"),
    [
        (
            "Say.",
            ROWS,
            r"base_prompt\.txt: no placeholder such as \{\{text\}\} here; without one all inputs are the same",
        ),
        (
            "{{texts}}",
            ROWS,
            r"train\.tsv:1: column 'texts' is missing; got \['index', .*did you mean 'text'\?\); base_prompt",
        ),
        (
            "{{text}}",
            ROWS.replace("answer", "anwser"),
            r"train\.tsv:1: column 'answer' is missing.*'anwser'.*as `answer`",
        ),
        (PROMPT, ROWS + "2\tx\t \tus\n", r"train\.tsv:4: `answer` is empty; fill it in or remove the row"),
        (
            PROMPT,
            ROWS * 2,
            r"train\.tsv:4: expected a row of the table, got the header again; remove this line",
        ),
        (
            PROMPT,
            ROWS + "2\t \tDuty\t\n3\tx\tDuty\t\n",
            r"train\.tsv:4: nothing to put into the prompt: text, party empty; remove",
        ),
        (PROMPT, ROWS + "2\tx\tDuty\n", r"train\.tsv:4: expected 4 cells"),
        (
            "Option A: x\nOption B: y\n{{text}}",
            ROWS,
            r"train\.tsv:2: `answer` must be .*got 'Duty', options are \['A', 'B'\]",
        ),
    ],
)
def test_legalbench_refuses(tmp_path, prompt, train, match):
    with pytest.raises(TaskError, match=match):
        read_legalbench(legal(tmp_path / "t", prompt, train), options=("Duty", "Right") if prompt == PROMPT else None)


def test_legalbench_other_files(tmp_path):
    folder = legal(tmp_path / "t", "{{text}}", ROWS, test="text\tanswer\tparty\n")
    assert read_legalbench(folder, answer="party", options=["me", "you", "buyer"]).support[0].answer == 2
    with pytest.raises(TaskError, match=r"train\.tsv:2: `options` holds 'me' more than once"):
        read_legalbench(folder, answer="party", options=["me", "me", "buyer"])
    legal(folder, "{{text}}", ROWS, test="texts\tanswer\nx\tDuty\n")
    with pytest.raises(TaskError, match=r"test\.tsv:1: column 'text' is missing"):
        read_legalbench(folder, options=["Duty", "Right"])
    with pytest.raises(
        TaskError, match=r"base_prompt\.txt: expected a prompt file that can be read, got: No such file"
    ):
        read_legalbench(write(tmp_path / "u/train.tsv", ROWS).parent)
    with pytest.raises(CannotScore, match=r"train\.tsv: there is no such file; add it, or leave 'v' out"):
        read_legalbench(write(tmp_path / "v/base_prompt.txt", PROMPT).parent)


# --- molecules ---

CSV = "id,SMILES,tox,weight,active,same\nm1,CCO,1,18.0,true,1\nm2,C,0,1,,1\nm3,N#N,,0,False,1\nm4,O,1.0,2.5, ,\n"


def read_molecules(path, **options):
    return load_tasks(path, format="molecules", **options)


def test_molecules(tmp_path):
    """One task for each column of labels; blanks are left out, and a column of one label is, with a warning."""
    path = write(tmp_path / "set.csv", CSV)
    with pytest.warns(UserWarning, match=r"set\.csv: 1 of 3 tasks are left out: 1 one label \(set/same\)") as caught:
        tasks = read_molecules(path)
    assert Path(caught[0].filename).name == "test_readers.py"
    assert list(tasks) == ["set/tox", "set/active"]
    assert triples(tasks["set/tox"].support) == [
        (f"SMILES: {smiles}\ntox?", ("no", "yes"), label)
        for smiles, label in [("CCO", "yes"), ("C", "no"), ("O", "yes")]
    ]
    assert [e.answer for e in tasks["set/active"].support] == [1, 0]
    named = read_molecules(
        path, labels=["active"], options=("inert", "active"), template="{label}: {smiles} {x} {label}"
    )
    assert triples(named["set/active"].support)[1] == ("active: N#N {x} active", ("inert", "active"), "inert")
    assert read_molecules(path, smiles="id", labels=["tox"])["set/tox"].support[0].input == "SMILES: m1\ntox?"


@pytest.mark.parametrize(
    ("text", "match"),
    [
        (
            CSV.replace("N#N,,", "N#N,NaN,"),
            r"set\.csv:4: column 'tox' must be 0, 1 or blank, got 'NaN'; leave it blank",
        ),
        (CSV.replace("O,1.0", "O,0.5"), r"set\.csv:5: column 'tox' must be 0, 1 or blank, got '0\.5'"),
        (
            CSV.replace("SMILES", "molecule"),
            r"set\.csv:1: no column of molecules: expected 'smiles' or 'mol', got \['id', 'mol",
        ),
        (CSV.replace("CCO", " "), r"set\.csv:2: column 'SMILES' is empty, but 'tox' is 1; remove the row"),
        ("smiles,x\nC,3\nN,a\n", r"set\.csv: no column of labels 0 and 1 next to 'smiles', got \['x'\]; name them"),
        ("smiles,x\nC,1\nN,1\n", r"set\.csv: column 'x' holds only the label 1; leave it out of `labels`"),
        ("smiles,x\n", r"set\.csv: no column of labels"),
        ("smiles,x,smiles\nC,1,C\n", r"set\.csv:1: column 'smiles' occurs twice"),
        ("smiles;x\nC;1\n", r"set\.csv: column 'x' holds only the label 1"),
    ],
)
def test_molecules_refuse_files(tmp_path, text, match):
    with pytest.raises(TaskError, match=match):
        read_molecules(write(tmp_path / "set.csv", text))


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"labels": "tox"}, r"`labels` must be a list of column names, got the string 'tox'; pass \['tox'\]"),
        ({"labels": ["toxic"]}, r"set\.csv:1: column 'toxic' is missing; got .*did you mean 'tox'.*`labels` names it"),
        ({"labels": ["tox", "tox"]}, "`labels` names 'tox' twice; remove one"),
        ({"labels": ["tox", "same"]}, "column 'same' holds only the label 1"),
        ({"smiles": "mol"}, r"set\.csv:1: column 'mol' is missing; .*`smiles` names it"),
        ({"options": ("a", "b", "c")}, r"`options` must be two texts, of the labels 0 and 1; got \('a', 'b', 'c'\)"),
        ({"options": "ab"}, "`options` must be two texts"),
        ({"options": ("a", "a")}, r"set\.csv:2: `options` holds 'a' more than once"),
        ({"template": "{label}"}, r"`template` '\{label\}': expected the placeholder \{smiles\} in it"),
    ],
)
def test_molecules_refuse_arguments(tmp_path, arguments, match):
    with pytest.raises(TaskError, match=match):
        read_molecules(write(tmp_path / "set.csv", CSV), **arguments)


# --- what Python holds ---


def test_task_from():
    example = Example("p", ("a", "b"), 1)
    rows = [GOOD, GOOD | {"options": ("b", "c"), "id": 3}, example]
    assert task_from("t", iter(rows)) == Task("t", (Example("q", ("a", "b"), 1), Example("q", ("b", "c"), 0), example))
    merged = task_from("t", [GOOD | {"options": ["a", "a", "b"]}], merge_duplicates=True)
    assert merged.support == (Example("q", ("a", "b"), 1),)


def test_task_from_free_form():
    """Without options, an output is a reference, or several; these may be called so."""
    example = Example("r", references=("x",))
    rows = [
        {"input": "p", "output": "a b"},
        {"input": "q", "output": ("a", "b", "a"), "options": ()},
        {"input": "s", "references": ["c", "d"], "id": 3},
        {"input": "t", "references": ("e",), "options": []},
        example,
    ]
    assert references(task_from("t", rows).support) == [
        *(("p", ("a b",)), ("q", ("a", "b")), ("s", ("c", "d")), ("t", ("e",)), ("r", ("x",))),
    ]
    assert task_from("t", [GOOD | {"references": ()}]).support == (Example("q", ("a", "b"), 1),)


@pytest.mark.parametrize(
    ("rows", "match"),
    [
        ([GOOD, {"input": "q"}], r"task 't', example 2: field `output` is missing; got only \['input', 'options'\]"),
        (
            [GOOD, GOOD | {"output": "z"}],
            r"example 2: `output` must be one of `options`: got 'z', options are \['a', 'b'\]",
        ),
        ([GOOD | {"options": ["b", "b"]}], "example 1: `options` holds 'b' more than once"),
        ([GOOD | {"input": float("nan")}], "example 1: field `input` must be a str, got nan"),
        ([GOOD, {"input": "q", "output": "x"}], "task 't': 1 of 2 examples have no options.*make two tasks"),
        ([GOOD | {"options": None}], "example 1: field `options` must be a list, got None"),
        ([{"input": "q", "output": {"a"}}], "example 1: field `output` must be a str, or a list of them .*got {'a'}"),
        ([{"input": "q", "references": []}], "example 1: field `output` is missing"),
        ([{"input": "q", "references": None}], "example 1: field `output` must be .*got None"),
        ([GOOD | {"references": ["b"]}], r"example 1: `references` \['b'\] replace `output` and `options`"),
        ([{"input": "q", "output": "a", "references": ["b"]}], "example 1: `references` .* leave one or other out"),
        (["q"], "example 1: expected an Example, or a mapping with `input`, `options`, `output`; got 'q'"),
        ("q", "task 't': expected a list of examples, got str; put it in a list"),
        (GOOD, "task 't': expected a list of examples, got dict"),
        (3, "task 't': expected a list of examples, got int"),
        ([], "task 't' has no examples"),
    ],
)
def test_task_from_refuses(rows, match):
    with pytest.raises(TaskError, match=match):
        task_from("t", rows)


# --- load_tasks ---


@pytest.fixture
def shelf(tmp_path):
    """One folder of each format, every one but that of molecules with a multiple-choice task and a free-form one."""
    line, free = json.dumps(GOOD), json.dumps(GOOD | {"options": []})
    write(tmp_path / "metaicl/one/one_16_13_train.jsonl", line)
    write(tmp_path / "metaicl/two.jsonl", free)
    write(tmp_path / "crossfit/one/one_16_13_train.tsv", "a\tx\nb\ty\nc\tx\nd\ty\n")
    write(tmp_path / "crossfit/two/two_16_13_train.tsv", "a\tx\nb\ty\n")
    write(tmp_path / "unifiedqa/one/train.tsv", "a?\tyes\nb?\tno\n")
    write(tmp_path / "unifiedqa/two/train.tsv", "a?\tit is so\n")
    legal(tmp_path / "legalbench/one", train=ROWS * 1 + "2\tx\tDuty\ty\n3\tz\tRight\ty\n")
    legal(tmp_path / "legalbench/two")
    write(tmp_path / "molecules/one.csv", CSV.replace("same", ""))
    write(tmp_path / "molecules/two.csv", "smiles,p\nC,1\n")
    for name in ("metaicl", "crossfit", "unifiedqa", "legalbench", "molecules"):
        write(tmp_path / name / "splits.json", "{}")
        (tmp_path / name / "notes").mkdir()
    return tmp_path


FORMATS = ["metaicl", "crossfit", "unifiedqa", "legalbench"]


@pytest.mark.parametrize("format", FORMATS)
def test_load_tasks_tells_the_format(shelf, format):
    """A folder of tasks gives all of them; names choose, and a missing one raises or warns."""
    tasks = load_tasks(shelf / format)
    assert [(name, task.free_form) for name, task in tasks.items()] == [("one", False), ("two", True)]
    assert list(load_tasks(shelf / format, names=["two", "one"], format=format)) == ["two", "one"]
    with pytest.warns(UserWarning, match="1 of 2 tasks are missing and left out: ona") as caught:
        assert list(load_tasks(shelf / format, names=["ona", "one"], allow_missing=True)) == ["one"]
    assert [Path(one.filename).name for one in caught] == ["test_readers.py"]
    with pytest.raises(TaskError, match=r"1 of 2 tasks are missing: 'onee' \(did you mean 'one'"):
        load_tasks(shelf / format, names=["onee", "one"])


@pytest.mark.parametrize("format", FORMATS)
def test_load_tasks_without_free_form(shelf, format):
    """They are left out whether named or not, and one warning counts them."""
    for names in (None, ["one", "two"]):
        with pytest.warns(UserWarning, match=rf"{format}: 1 of 2 tasks are left out: 1 free-form \(two\)$") as caught:
            assert list(load_tasks(shelf / format, names=names, free_form=False)) == ["one"]
        assert [Path(one.filename).name for one in caught] == ["test_readers.py"]
    with pytest.raises(
        TaskError, match=r"no task to load, of 1 .*; task 'two' is free-form; pass free_form=True to load"
    ):
        load_tasks(shelf / format, names=["two"], free_form=False)


def test_load_tasks_that_cannot_be_scored(shelf):
    """Of all tasks they are left out, and one warning counts them by reason; one that is named is an error."""
    write(shelf / "crossfit/three/three_16_13_train.tsv", "a\tx\nb\tx\n")
    legal(shelf / "legalbench/three", train=ROWS.replace("Right", "Duty"), prompt="Duty? {{text}}")
    legal(shelf / "legalbench/four", train="text\tanswer\tparty\n")
    for format, first, count, reasons, other in (
        ("crossfit", "one", "1 of 3", r"1 one label \(three\)", "three"),
        ("legalbench", "one", "2 of 4", r"1 without rows \(four\); 1 one label \(three\)", "four"),
        ("molecules", "one/tox", "1 of 3", r"1 one label \(two/p\)", "two/p"),
    ):
        with pytest.warns(UserWarning, match=f"{format}: {count} tasks are left out: {reasons}$") as caught:
            assert first in load_tasks(shelf / format)
        assert [Path(one.filename).name for one in caught] == ["test_readers.py"]
        with pytest.raises(CannotScore):
            load_tasks(shelf / format, names=[first, other])
    assert list(load_tasks(shelf / "molecules", names=["one/active"], free_form=False)) == ["one/active"]


def test_load_tasks_of_one(shelf):
    """The folder of one task, or a file, is a task set of one."""
    for path in ("metaicl/one", "crossfit/one", "unifiedqa/one", "legalbench/one"):
        assert list(load_tasks(shelf / path)) == ["one"]
    assert load_tasks(shelf / "metaicl/one")["one"] == Task("one", tuple(task_from("one", [GOOD]).support))
    assert list(load_tasks(shelf / "molecules/one.csv")) == ["one/tox", "one/active"]
    assert list(load_tasks(write(shelf / "a.jsonl", json.dumps(GOOD)))) == ["a"]
    tsv = write(shelf / "b.tsv", "a?\tyes\nb?\tno\nc?\tno\nd?\tno\n")
    assert load_tasks(tsv, format="unifiedqa")["b"].support[0].options == ("yes", "no")
    assert load_tasks(tsv, format="crossfit")["b"].support[0].options == ("no", "yes")
    with pytest.raises(
        TaskError, match=r"b\.tsv: cannot tell the format; pass `format`; known formats: metaicl .*molecules"
    ):
        load_tasks(tsv)


def test_load_tasks_passes_options(shelf):
    kept = load_tasks(shelf / "legalbench", names=["one"], demonstrations=True)
    assert "Answer: Duty" in kept["one"].support[1].input
    with pytest.raises(
        TaskError, match=r"'legalbench' has no option `seed`; it has demonstrations, answer, options, max"
    ):
        load_tasks(shelf / "legalbench", seed=13)
    with pytest.raises(TaskError, match=r"'crossfit' has no option `sede` \(did you mean 'seed'"):
        load_tasks(shelf / "crossfit", sede=13)
    with pytest.raises(TaskError, match="one: no train file of seed 14; seeds here: 13"):
        load_tasks(shelf / "metaicl/one", seed=14)


def test_load_tasks_refuses(shelf):
    for name in ("../crossfit/one", "/etc", 3):
        with pytest.raises(
            TaskError, match=rf"`names` holds '?{name}'?, which leads out of .*unifiedqa; expected the name"
        ):
            load_tasks(shelf / "unifiedqa", names=[name], allow_missing=True)
    with pytest.raises(TaskError, match=r"`names` must be a list of task names, got the string 'one'; pass \['one'\]"):
        load_tasks(shelf / "unifiedqa", names="one")
    with pytest.raises(TaskError, match=r"`format` 'metalcl' is unknown \(did you mean 'metaicl'.*; known formats"):
        load_tasks(shelf / "metaicl", format="metalcl")
    with pytest.raises(TaskError, match="metaicl: no task of the format 'crossfit' here; known formats: metaicl"):
        load_tasks(shelf / "metaicl", format="crossfit")
    with pytest.raises(TaskError, match="notes: no task of a format that is known here; known formats: metaicl"):
        load_tasks(shelf / "metaicl/notes")
    with pytest.raises(TaskError, match="gone: there is no such file or folder; check the path"):
        load_tasks(shelf / "gone")
    write(shelf / "crossfit/two/two_16_13_train.tsv", "a\tx\nb\tx\n")
    with pytest.raises(TaskError, match=r"two: no task to load, of 1 in the format 'crossfit'; .*every output is 'x'"):
        load_tasks(shelf / "crossfit/two")
    with pytest.raises(TaskError, match="no task to load, of 0 in the format 'crossfit'"):
        load_tasks(shelf / "crossfit", names=[])
    write(shelf / "crossfit/b.csv", CSV)
    with pytest.raises(
        TaskError, match="holds tasks of several formats: crossfit, molecules; pass one of them as `format`"
    ):
        load_tasks(shelf / "crossfit")
    write(shelf / "metaicl/one.jsonl", json.dumps(GOOD))
    with pytest.raises(TaskError, match=r"task 'one' is there twice, one(\.jsonl)? and one(\.jsonl)?; remove one"):
        load_tasks(shelf / "metaicl")
    (shelf / "unifiedqa/three").symlink_to(shelf / "crossfit/one")
    (shelf / "unifiedqa/four").symlink_to(shelf / "unifiedqa/one")
    (shelf / "unifiedqa/three").unlink()
    assert list(load_tasks(shelf / "unifiedqa", names=["four"])) == ["four"]
    (shelf / "legalbench/three").symlink_to(legal(shelf / "elsewhere"))
    with pytest.raises(TaskError, match="three: leads out of the folder .*legalbench, to .*elsewhere"):
        load_tasks(shelf / "legalbench")
