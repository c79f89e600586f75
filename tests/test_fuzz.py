"""Two thousand broken files for each reader: it gives a whole task, or raises its own error, which names the file."""

from __future__ import annotations

import json
import random
import tempfile
import warnings
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bayes_lora.errors import TaskError
from bayes_lora.tasks import Card, Example, Task, TaskSet, read_questions
from bayes_lora.tasks.readers.crossfit import read_crossfit
from bayes_lora.tasks.readers.legalbench import read_legalbench
from bayes_lora.tasks.readers.load import load_tasks, task_from
from bayes_lora.tasks.readers.metaicl import read_metaicl
from bayes_lora.tasks.readers.questions import read_table_questions
from bayes_lora.tasks.readers.table import load_table
from bayes_lora.tasks.readers.unifiedqa import read_unifiedqa

pytestmark = pytest.mark.slow

BROKEN_FILES = 2_000
RUN = settings(
    max_examples=BROKEN_FILES,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],  # shrinking a failure is for who debugs it
    suppress_health_check=list(HealthCheck),
)

# --- valid files ---

JSONL = "".join(
    json.dumps(
        {"task": "t", "input": f"question {i}", "output": "bé"[: 1 + i % 2], "options": ["b", "bé", "c"]},
        ensure_ascii=False,
    )
    + "\n"
    for i in range(4)
)
FREE_JSONL = "".join(
    json.dumps({"input": f"question {i}", "output": output, "options": []}, ensure_ascii=False) + "\n"
    for i, output in enumerate(["a king", ["é", "e", "É"], "b", ["nine"]])
)
LABELLED = 'a film\tgood\nbad {{ film }}\tpoor\na "quoted" one\tgood\nein böser\tpoor\nlast\tpoor\n'
LISTED = "who? (A) me (B) you (C) f(A) all\tyou\nwhen? (A) now (B) then [SEP] long ago\tthen\nwhy? (A) so (B) no\tso\n"
SEVERAL = 'who?\ta king\tthe king\nwhen? (A) or (B)\t"now"\nwhy? [SEP] é\tso\tSo\tso\nhow?\tslowly\n'
CHOICE = (
    "which? \\n (a) iron (b) feather \\n metals.\tiron\nwho? \\n (a) x y (b) z (c) é\tX  y\nhow? \\n (a) so (b) no\tno"
)
YES_NO = "is it? \\n (a) context\tyes\nis he?\tNo\nare they? \\n so\tno\n"
ABSTRACTIVE = "who? \\n (a) context\tthe king\nis he?\tNo\nwhy? \\n so \\n é\tbe cause\n"
PROMPT = "Tort or tax?\n\nText: a long cell of this table\nOf: b\nAnswer: tort\n\nText: {{text}}\nOf: {{who}}\nAnswer:"
ROWS = 'index\ttext\tanswer\twho\n0\ta long cell of this table\ttort\tb\n1\t"two\n""lines"""\ttax\tc\n2\té\ttax\td\n'
NAMES = """text\tanswer\twho\na long cell of this table\tAnn, Bé\tb\n"two\nlines"\t['Cy', 'D']\tc\né\tAnn\td\n"""
CSV = "id,smiles,tox,active\nm1,C[C@H](N),1,0.0\nm2,C#N,0,\nm3,O,,TRUE\nm4,é,1.0,1\n"
TABLE = 'id,Title,text,label\n1,é,"two\n""lines""",good\n2,,b,bad\n3,c,"a, b",good\n4,d,e,good\n5,f,g,bad\n'
OWN = "".join(
    json.dumps({"n": i, "question": f"who {i}?", "options": ["me", "you", "é"][: 2 + i % 2], "answer": "AB"[i % 2]})
    + "\n"
    for i in range(4)
)
CARD = 'name: c\nfiles: t.csv\ninput: "{text}"\noptions: [bad, good]\nlabel: label\n'

FILES = {
    "metaicl": {"t/t_16_13_train.jsonl": JSONL, "t/t_16_87_train.jsonl": JSONL.replace("question", "query")},
    "metaicl free-form": {
        "t/t_16_13_train.jsonl": FREE_JSONL,
        "t/t_16_87_dev.jsonl": FREE_JSONL.replace("question", "query"),
    },
    "crossfit": {"t/t_16_13_train.tsv": LABELLED, "t/t_16_13_dev.tsv": LABELLED.replace("film", "play")},
    "crossfit choice": {"t/t_16_13_train.tsv": LISTED, "t/t_16_13_dev.tsv": LISTED.replace("w", "W")},
    "crossfit free-form": {"t/t_16_13_train.tsv": SEVERAL, "t/t_16_13_dev.tsv": SEVERAL.replace("?", " else?")},
    "unifiedqa": {"t/train.tsv": CHOICE, "t/test.tsv": CHOICE.replace("?", " else?")},
    "unifiedqa yes-no": {"t/train.tsv": YES_NO, "t/dev.tsv": YES_NO.replace("?", " else?")},
    "unifiedqa free-form": {"t/train.tsv": ABSTRACTIVE, "t/dev.tsv": ABSTRACTIVE.replace("?", " else?")},
    "legalbench": {"t/base_prompt.txt": PROMPT, "t/train.tsv": ROWS, "t/test.tsv": ROWS.replace("cell", "row")},
    "legalbench free-form": {
        "t/base_prompt.txt": PROMPT,
        "t/train.tsv": NAMES,
        "t/test.tsv": NAMES.replace("cell", "row"),
    },
    "molecules": {"t.csv": CSV},
    "table": {"t.csv": TABLE},
    "table of options": {"t.jsonl": OWN},
    "table of tabs": {"t.tsv": TABLE.replace(",", "\t")},
}
READERS = {
    "metaicl": lambda root: read_metaicl(root / "t"),
    "crossfit": lambda root: read_crossfit(root / "t"),
    "unifiedqa": lambda root: read_unifiedqa(root / "t"),
    "legalbench": lambda root: read_legalbench(root / "t"),
    "legalbench free-form": lambda root: read_legalbench(root / "t", separator=","),
    "molecules": lambda root: load_tasks(root / "t.csv", format="molecules"),
    "table": lambda root: load_table(next(root.glob("t.*"))),
}

# --- what breaks them ---

FRAGMENTS = [
    *(b"\t", b"\n", b"\r", b"\r\n", b'"', b'""', b",", b";", b" ", b"\\", b"\\n", b"\0", b"\0" * 40, b"\x1a", b"\x85"),
    *(
        b"\xff",
        b"\xc3",
        b"\xed\xa0\x80",
        b"\xef\xbb\xbf",
        b"\xff\xfe",
        b"\xfe\xff",
        "\u2028".encode(),
        "é\u0301".encode(),
    ),
    *(b"(a) ", b" (b) ", b"(A)", b" [SEP] ", b"{{", b"}}", b"{{text}}", b"{{answer}}", b"Option A:\nOption B:\n"),
    *(
        b"NaN",
        b"nan",
        b"-1",
        b"2",
        b"1e5",
        b"true",
        b"null",
        b"yes",
        b"[]",
        b"{}",
        b"[" * 3000,
        b'"\\ud800"',
        b"1" * 5000,
    ),
    *(
        b'{"input": "q", "output": "b", "options": ["b", "b"]}\n',
        b"smiles,",
        b"answer\t",
        b"x" * 140_000,
        b"(a) (b) " * 9000,
    ),
]


def some_mutation(rng):
    """Draw one way to break a file. Hypothesis would take four times as long as the readers."""

    def place():
        return rng.choice([0.0, 1.0]) if rng.random() < 0.1 else rng.random()

    def text():
        """Characters of one, two, three and four bytes, none of them surrogates."""
        ends = rng.choices([0x7F, 0x7FF, 0xD7FF, 0x10FFFF], k=rng.randint(1, 8))
        codes = [rng.randint(0xE000 if end > 0xFFFF else 0, end) for end in ends]
        return "".join(map(chr, codes)).encode()

    ways = [
        lambda: ("drop", place(), rng.randint(1, 30)),
        lambda: ("insert", place(), rng.choice(FRAGMENTS)),
        lambda: ("insert", place(), rng.randbytes(rng.randint(1, 8))),
        lambda: ("insert", place(), text()),
        lambda: ("flip", place(), rng.randint(1, 255)),
        lambda: ("cut", place(), None),
        lambda: ("column", rng.randint(0, 3), rng.randint(0, 4)),
        lambda: ("swap", rng.choice([b"\t", b",", b"\n", b'"', b"\\n"]), rng.choice(FRAGMENTS[:14])),
        lambda: ("line", place(), place()),
        lambda: ("encode", rng.choice(["utf-16", "utf-16-le", "utf-8-sig", "latin-1"]), None),
    ]
    return rng.choice(ways)()


def mutate(data, mutation):
    """Break a file in one way."""
    kind, first, second = mutation
    if kind == "swap":
        return data.replace(first, second)
    if kind == "encode":
        return data.decode("utf-8", "replace").encode(first, "replace")
    rows = data.split(b"\n")
    if kind == "line":  # one line comes a second time, elsewhere
        rows.insert(int(second * len(rows)), rows[int(first * (len(rows) - 1))])
        return b"\n".join(rows)
    if kind == "column":  # one comes a second time, in its place or in another's, header and all
        delimiter = b"\t" if b"\t" in data else b","
        cells = [row.split(delimiter) for row in rows]
        return b"\n".join(delimiter.join([*row[:second], *row[first : first + 1], *row[second:]]) for row in cells)
    at = int(first * len(data))
    if kind == "insert":
        return data[:at] + second + data[at:]
    if kind == "drop":
        return data[:at] + data[at + second :]
    return data[:at] + (bytes([data[at] ^ second]) + data[at + 1 :] if kind == "flip" and at < len(data) else b"")


def check(tasks):
    """Raise unless every task is whole."""
    assert isinstance(tasks, TaskSet) and len(tasks) > 0
    for name, task in tasks.items():
        assert isinstance(task, Task) and task.name == name and len(task) > 0 and len(task.support) > 0
        assert not {example.input for example in task.support} & {example.input for example in task.query}
        assert len({example.free_form for example in task.examples}) == 1
        for example in task.examples:
            assert example.input.strip() and example.input.encode()
            answers = example.references if task.free_form else example.options
            assert len(set(answers)) == len(answers) >= (1 if task.free_form else 2)
            assert all(answer.strip() and answer.encode() for answer in answers)
            assert example.output == answers[example.answer]


def outcome(read, root):
    """Return ``read`` or ``refused``; anything else that a reader does is a failure of this test."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            made = read(root)
    except TaskError as error:
        assert str(root) in str(error) and str(error).splitlines() == [str(error)]
        return "refused"
    check(TaskSet([made]) if isinstance(made, Task) else made)
    return "read"


def fuzz(files, read, count=BROKEN_FILES):
    """Break one file of these so many times."""
    seen, rng = Counter(), random.Random(0)
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        (root / "t").mkdir()
        for name, text in files.items():
            (root / name).write_bytes(text.encode())
        seen[outcome(read, root)] += 1
        assert seen["read"]
        for _ in range(count):
            name = rng.choice(sorted(files))
            data, mutations = files[name].encode(), [some_mutation(rng) for _ in range(rng.randint(1, 3))]
            for mutation in mutations:
                data = mutate(data, mutation)
            (root / name).write_bytes(data)
            try:
                seen[outcome(read, root)] += 1
            except Exception as error:
                raise AssertionError(f"{name} broken by {mutations}") from error
            (root / name).write_bytes(files[name].encode())
    assert sum(seen.values()) > count
    # Neither a reader that takes everything nor one that refuses everything would pass.
    assert min(seen["read"], seen["refused"]) > count / 20


@pytest.mark.parametrize("kind", FILES)
def test_broken_files(kind):
    """Each format's own reader."""
    fuzz(FILES[kind], READERS.get(kind, READERS[kind.split()[0]]))


def test_broken_files_of_any_format():
    """The one line for all, on all formats in turn."""
    for kind in FILES:
        fuzz(FILES[kind], load_tasks, BROKEN_FILES // len(FILES))


def test_broken_questions():
    """Questions to predict have no output, but are as whole."""
    fuzz({"t/q.jsonl": JSONL}, lambda root: Task("q", tuple(read_questions(root / "t/q.jsonl"))))


def test_broken_free_form_questions():
    """Without an output, a free-form question is a text."""

    def read(root):
        questions = read_questions(root / "t/q.jsonl")
        return Task("q", tuple(Example(q, references=("x",)) if isinstance(q, str) else q for q in questions))

    fuzz({"t/q.jsonl": FREE_JSONL.replace('"output": "a king", ', "")}, read)


def test_broken_questions_of_a_table():
    """Neither do those of a table, whose options are known or in a column."""
    card = Card("q", "{Title} {text}", ("a", "b"), "")
    fuzz({"t.csv": TABLE}, lambda root: Task("q", tuple(read_table_questions(root / "t.csv", card))))
    fuzz({"t.jsonl": OWN}, lambda root: Task("q", tuple(read_table_questions(root / "t.jsonl"))))


def test_broken_cards():
    """A card that is read names a table that is there, or is refused."""
    fuzz({"c.yaml": CARD, "t.csv": TABLE}, partial(load_tasks, format="card"))


ANY = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=3)
    | st.lists(st.text(max_size=2), max_size=3)
)
FIELDS = st.fixed_dictionaries(
    {},
    optional={
        "input": st.just("q") | ANY,
        "output": st.sampled_from(["a", "b"]) | ANY,
        "options": st.just(["a", "b"]) | st.just(("b", "a")) | ANY,
        "references": st.just(("a", "b")) | ANY,
    },
)
WHOLE = st.just({"input": "q", "output": "a", "options": ["a", "b"]}) | st.just({"input": "q", "output": ("a", "b")})


@RUN
@given(rows=st.lists(WHOLE | FIELDS | ANY, max_size=3) | ANY, name=st.just("t") | st.text(max_size=2))
def test_broken_rows(rows, name):
    """What Python holds: whole, or an error that names the task."""
    try:
        task = task_from(name, rows)
    except TaskError as error:
        assert "task" in str(error)
    else:
        check(TaskSet([task]))
