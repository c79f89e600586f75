"""A user's own table becomes a task: which columns are taken, what is refused, and which formats are told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import yaml
from files import write
from pyarrow import parquet

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks import Example, RowOptions, Task, load_tasks, task_format
from bayes_lora.tasks.readers.card import Card, card_from, card_values, read_card
from bayes_lora.tasks.readers.card_examples import load_card
from bayes_lora.tasks.readers.questions import OWN_OPTIONS, question_card, read_table_questions
from bayes_lora.tasks.readers.table import load_table
from bayes_lora.tasks.readers.text_files import CannotScore

REVIEWS = "id,review,label\n1,fine,good\n2,awful,bad\n3,nice,good\n4,poor,bad\n"
TWO = ("bad", "good")


def told(path: Path, **options: Any) -> str:
    """What is said of the columns."""
    lines: list[str] = []
    load_table(path, on_card=lambda card, line: lines.append(f"{card.files}: {line}"), **options)
    [line] = lines
    return line


def read(path: Path, **options: Any) -> Task:
    """The task, without a warning of what was decided."""
    return load_table(path, on_card=lambda *_: None, **options)


def test_one_line(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", REVIEWS)
    texts = {"fine": 1, "awful": 0, "nice": 1, "poor": 0}
    expected = Task("reviews", tuple(Example(text, TWO, answer) for text, answer in texts.items()))
    assert dict(load_tasks(path)) == {"reviews": expected}
    assert dict(load_tasks(tmp_path)) == {"reviews": expected}
    assert told(path) == "reviews.csv: input is {review}, answers from label: bad, good; not read: id"


@pytest.mark.parametrize("kind", ["csv", "semicolons.csv", "tsv", "jsonl", "parquet"])
def test_kinds_of_files(tmp_path: Path, kind: str) -> None:
    """All give the same task, though numbers are texts in some."""
    rows = [{"Text": f"a; {i}\tb, c", "n": i, "Class": ["no", "yes", "maybe"][i % 3]} for i in range(6)]
    path = tmp_path / f"t.{kind}"
    if kind == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    elif kind == "jsonl":
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        cut = {"csv": ",", "semicolons.csv": ";", "tsv": "\t"}[kind]
        write(path, "".join(cut.join(f'"{cell}"' for cell in row) + "\n" for row in [rows[0], *map(dict.values, rows)]))
    task = read(path)
    options = ("maybe", "no", "yes")
    assert task.support == tuple(Example(row["Text"], options, options.index(row["Class"])) for row in rows)
    reason = "because other columns hold texts"
    assert f": input is {{Text}}, answers from Class: maybe, no, yes; not read: n, {reason}" in told(path)


INPUTS = {
    "the column that is left": ("n,answer\n1,x\n2,y\n3,x\n4,y\n", {}, "1"),
    "columns of texts": ("a,b,n,label\nu,v,1,x\nw,,2,y\n,z,3,x\nk,l,4,y\n", {}, "a: u\nb: v"),
    "columns of numbers": ("a,b,label\n1,2,x\n3,4,y\n5,6,x\n7,8,y\n", {}, "a: 1\nb: 2"),
    "a column": ("a,b,label\nu,v,x\nw,z,y\n1,2,x\n3,4,y\n", {"input": "b"}, "v"),
    "a template": ("a,b,label\nu,v,x\nw,z,y\n1,2,x\n3,4,y\n", {"input": "{{{b}}} or {a}?"}, "{v} or u?"),
    "both": ("a,b\nu,x\nw,y\n1,x\n2,y\n", {"input": "a", "label": "b"}, "u"),
    "the answer's name in another case": ("a,SentiMent \nu,x\nw,y\n1,x\n2,y\n", {}, "u"),
    "without ids": (",uuid,ticket_id,Customer ID,a,label\n0,1,2,3,u,x\n,,,,w,y\n,,,,1,x\n,,,,2,y\n", {}, "u"),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_inputs(tmp_path: Path, kind: str) -> None:
    text, options, expected = INPUTS[kind]
    task = read(write(tmp_path / "t.csv", text), **options)
    assert (task.support[0].input, task.support[0].options, task.support[0].answer) == (expected, ("x", "y"), 0)
    assert len(task) == 4


LABEL_TEXT = "text,label,label_text\n" + "".join(f"film {i},{i % 2},{('bad', 'good')[i % 2]}\n" for i in range(8))
STARS = "text,label,stars\n" + "".join(f"film {i},{('bad', 'good')[i % 6 > 2]},{i % 6}\n" for i in range(12))


@pytest.mark.parametrize(
    ("text", "label", "column"),
    {
        "the label's text": (LABEL_TEXT, None, "label_text"),
        "the label's code": (LABEL_TEXT, "label_text", "label"),
        "several values of an answer": (STARS, None, "stars"),
        "a code among numbers": (STARS.replace("film ", ""), None, "stars"),
        "an answer spelt by a blank": (LABEL_TEXT.replace(",bad", ","), None, "label_text"),
        "some values missing": (LABEL_TEXT.replace("film 7,1,good", "film 7,1,"), None, "label_text"),
        "answers that are many": (
            "text,label,name\n" + "".join(f"film {i},{i % 65},genre {i % 65}\n" for i in range(130)),
            None,
            "name",
        ),
    }.values(),
)
def test_columns_that_give_the_answer_away_are_left_out(
    tmp_path: Path, text: str, label: str | None, column: str
) -> None:
    path = write(tmp_path / "t.csv", text)
    assert {example.input.rpartition(" ")[0] for example in read(path, label=label).support} <= {"film", ""}
    assert told(path, label=label).endswith(f"; not read: {column}, because each value of it stands for one answer")
    every = read(path, label=label, input=f"{{text}}: {{{column}}}").support
    assert any(": " in example.input and not example.input.endswith(": ") for example in every)


def test_left_out_columns_are_named_with_their_reason(tmp_path: Path) -> None:
    """Ids, and columns that give the answer away, in one line; columns that the caller chose are not judged."""
    rows = "".join(f"{i},film {i},{i % 2},{'ab'[i % 2]},{'cd'[i % 2]}\n" for i in range(8))
    path = write(tmp_path / "t.csv", "id,text,label,x,y\n" + rows)
    reason = "not read: x, y, because each value of them stands for one answer"
    assert told(path) == f"t.csv: input is {{text}}, answers from label: 0, 1; not read: id; {reason}"
    assert told(path, input="text").endswith("answers from label: 0, 1; not read: id, x, y")


@pytest.mark.parametrize(
    "column",
    {
        "each value once": [f"note {i}" for i in range(12)],
        "a value with both answers": ["p", "p", "q", "r"] * 3,
        "many values of an answer": [f"note {i % 8}" for i in range(12)],
        "an answer without a value": ["", "p", "", ""] * 3,
        "mostly missing": ["p", "q", *[""] * 10],
        "one value": ["p"] * 12,
    }.values(),
)
def test_columns_that_tell_more_than_the_answer_are_read(tmp_path: Path, column: list[str]) -> None:
    rows = "".join(f"film {i},{('bad', 'good')[i % 2]},{cell}\n" for i, cell in enumerate(column))
    path = write(tmp_path / "t.csv", "text,label,more\n" + rows)
    assert told(path).startswith("t.csv: input is text: {text}\\nmore: {more}, answers from label")


def test_a_table_of_nothing_but_the_answer(tmp_path: Path) -> None:
    """Refused if several columns spell it; one column can only be the input, but what it tells is said."""
    path = write(
        tmp_path / "t.csv", "id,label,x,y\n" + "".join(f"{i},{i % 2},{i % 2},{'ab'[i % 2]}\n" for i in range(8))
    )
    match = r"t\.csv: no column .* \['x', 'y'\] would give the answer away, .*; add a column .* --input 'x' if it is"
    with pytest.raises(TaskError, match=match):
        load_table(path)
    assert load_table(path, input="y").support[0].input == "a"
    write(path, path.read_text().replace("label,x", "label,idx"))
    reason = "each value of y, the only column left, stands for one answer"
    assert told(path) == f"t.csv: input is {{y}}, answers from label: 0, 1; not read: id, idx; {reason}"
    assert told(path, input="y") == "t.csv: input is {y}, answers from label: 0, 1; not read: id, idx"


def test_answers(tmp_path: Path) -> None:
    """Spaces around an answer are no part of it; given options keep their order, and need not all occur."""
    path = write(tmp_path / "t.csv", "text,label\na, 10\nb,9 \nc,10\nd,9\n,\n")
    assert [(e.options, e.output) for e in load_table(path).support[:2]] == [(("10", "9"), "10"), (("10", "9"), "9")]
    assert load_table(path, options=["9", "10", "11"]).support[0] == Example("a", ("9", "10", "11"), 1)
    rows = [{"text": "a", "label": True}, {"text": "b", "label": False}, {"text": "a", "label": False}] * 2
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_table(path).support[0] == Example("a", ("false", "true"), 1)


def test_options_of_rows(tmp_path: Path) -> None:
    path = write(tmp_path / "t.csv", 'q,Options,answer\nwho?,"[""me"", ""you""]",you\nwhen?,now | then|never,C\n')
    expected = (Example("who?", ("me", "you"), 1), Example("when?", ("now", "then", "never"), 2))
    assert load_table(path).support == expected
    assert told(path) == "t.csv: input is {q}, answers from answer: one of the row's Options"
    rows = [{"q": "who?", "options": ["me", "you"], "answer": 1}, {"q": "when?", "options": ["a", "b"], "answer": 0}]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_table(path).support == (expected[0], Example("when?", ("a", "b"), 0))


def test_free_text(tmp_path: Path) -> None:
    """Where nearly every row has another answer, or there are many, they are free text; a list holds several."""
    path = write(tmp_path / "t.csv", "question,answer\nof France?,Paris\nof Spain?, Madrid\nof Italy?,Rome\n")
    assert load_table(path).support[1] == Example("of Spain?", references=("Madrid",))
    assert (
        told(path)
        == "t.csv: input is {question}, answers from answer: free text, because there are 3 different answers in 3 rows"
    )
    many = "".join(f"text {i},{i % 65}\n" for i in range(650))
    assert read(write(path, "text,label\n" + many)).free_form
    assert len(load_table(write(path, "text,label\n" + many.replace(",64\n", ",63\n"))).support[0].options) == 64
    rows = [{"q": "who?", "answer": ["she", "her"]}, {"q": "when?", "answer": ["then"]}]
    path = write(tmp_path / "t.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    assert load_table(path).support[0].references == ("she", "her")
    assert told(path) == "t.jsonl: input is {q}, answers from answer: free text"


def test_the_limit_of_options_is_told_and_set(tmp_path: Path) -> None:
    """Above it answers are free text, with the reason; more than half as many as rows are free text at any limit."""
    path = write(tmp_path / "t.csv", "text,label\n" + "".join(f"text {i},{i % 65}\n" for i in range(130)))
    reason = "there are 65 different answers, and at most 64 would be options (max_options, --max-options)"
    assert told(path) == f"t.csv: input is {{text}}, answers from label: free text, because {reason}"
    assert len(load_table(path, max_options=65).support[0].options) == 65
    assert told(path, max_options=65).endswith("and 55 more")
    assert len(load_tasks(path, max_options=65)["t"].support[0].options) == 65
    assert "at most 3 would be options" in told(path, max_options=3)
    write(path, "\n".join(path.read_text().splitlines()[:-1]))
    reason = "because there are 65 different answers in 129 rows"
    assert told(path, max_options=65).endswith(reason) and told(path).endswith(reason)
    for wrong in (1, True, "9"):
        with pytest.raises(TaskError, match=r"`max_options` \(--max-options\) must be an integer of 2 or more, got "):
            load_table(path, max_options=wrong)  # type: ignore[arg-type]


REFUSED = {
    "no answer": (
        "text,mood\na,x\nb,y\nc,x\nd,y\n",
        {},
        r"t\.csv: cannot tell .* columns are \['text', 'mood'\], and none is named label, output, .*--label 'mood', or",
    ),
    "two answers": ("text,label,Target\na,x,y\n", {}, r"\['label', 'Target'\] may all be; say which, as in --label"),
    "unknown label": ("text,mood\na,x\n", {"label": "mod"}, r"`label` \(--label\) names 'mod'.*did you mean 'mood'"),
    "unknown input": ("text,label\na,x\nb,y\n", {"input": "{txt}"}, r"`input` \(--input\) names 'txt'.*mean 'text'"),
    "no column in the input": ("text,label\na,x\nb,y\n", {"input": "txt"}, r"`input` \(--input\) names 'txt'"),
    "half a brace": ("text,label\na,x\nb,y\n", {"input": "{text"}, r"t\.csv: `input` '{text': '{' at position 1"),
    "no input": ("id,label\n1,x\n2,y\n", {}, r"t\.csv: no column is left for the input; columns are \['id', 'label'\]"),
    "a brace in a name": ("te{xt,label\na,x\nb,y\n", {}, "column 'te{xt' has a brace in its name.*rename it"),
    "no label": ("text,label\na,x\nb, \nc,x\nd,y\n", {}, r"t\.csv:3: column 'label': the value is missing; fill it in"),
    "no text": ("text,label\na,x\n ,y\nc,x\nd,y\n", {}, r"t\.csv:3: `input` is empty: column 'text' holds nothing"),
    "two spellings": (
        "text,label\na,x\nb,X\nc,x\nd,x\n",
        {},
        "column 'label' holds both 'X' and 'x'; write them alike",
    ),
    "another option": (
        "text,label\na,x\nb,z\n",
        {"options": ["x", "y"]},
        r"t\.csv:3: column 'label': got 'z', which is",
    ),
    "one option": ("text,label\na,x\n", {"options": ["x"]}, "`options` must be a list of at least 2 different texts"),
    "a text for options": ("text,label\na,x\n", {"options": "xy"}, "`options` must be a list"),
    "one option in a row": ("q,options,answer\na,x,x\n", {}, r"t\.csv:2: `options` must hold at least 2"),
    "not among a row's options": (
        "q,options,answer\na,x|y,z\n",
        {},
        r"t\.csv:2: column 'answer': expected one of \['x'",
    ),
    "no rows": ("text,label\n,\n", {}, r"t\.csv: expected rows, got none; columns are \['text', 'label'\]"),
    "nothing": ("", {}, r"t\.csv: the file is empty; expected a first row"),
    "a cell too many": ("text,label\na,x\nb, c,y\n", {}, r"t\.csv:3: expected 2 cells, .* got 3; quote a cell"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_refused(tmp_path: Path, kind: str) -> None:
    text, options, match = REFUSED[kind]
    with pytest.raises(TaskError, match=match) as caught:
        load_table(write(tmp_path / "t.csv", text), **options)
    assert "\n" not in str(caught.value)


def test_one_answer_is_left_out(tmp_path: Path) -> None:
    """As a file it is refused, and in a folder it is counted."""
    path = write(tmp_path / "one.csv", "text,label\na,x\nb,x\n")
    with pytest.raises(CannotScore, match=r"one\.csv: column 'label' holds only 'x', but a task needs two answers"):
        load_table(path)
    with pytest.raises(TaskError, match=r"one\.csv: no task to load, .*holds only 'x'"):
        load_tasks(path)
    write(tmp_path / "reviews.csv", REVIEWS)
    with pytest.warns(UserWarning, match=r"1 of 2 tasks are left out: 1 one label \(one\)"):
        assert list(load_tasks(tmp_path)) == ["reviews"]


def test_other_files_are_refused(tmp_path: Path) -> None:
    for name, match in {"t.xlsx": "got '.xlsx'; save the sheet as CSV in UTF-8", "t.txt": "got '.txt'; check"}.items():
        with pytest.raises(TaskError, match=match):
            load_table(write(tmp_path / name, "text,label\n"))
        with pytest.raises(TaskError, match="cannot tell the format.*save a spreadsheet as CSV"):
            load_tasks(tmp_path / name)
    with pytest.raises(
        TaskError, match=r"t\.parquet: expected a Parquet file that can be read, got: .*; write it again"
    ):
        load_table(write(tmp_path / "t.parquet", "text,label\n"))
    for line, match in {"[1]": "expected an object with named fields such as .* got list", "{": "broken JSON"}.items():
        with pytest.raises(TaskError, match=rf"t\.jsonl:2: {match}"):
            load_table(write(tmp_path / "t.jsonl", f'{{"a": 1, "label": "x"}}\n{line}\n'))


def test_the_card_of_the_message_does(tmp_path: Path) -> None:
    """What an error offers to write is a card that reads the table."""
    for name, cut in {"t.csv": ",", "t.tsv": "\t", "u.csv": ";"}.items():
        path = write(tmp_path / name, "text,mood\na,é\nb,y\nc,y\nd,é\n".replace(",", cut))
        with pytest.raises(TaskError) as caught:
            load_table(path)
        text = str(caught.value)
        card = write(tmp_path / "card.yaml", text[text.index("with {") + 5 :])
        task = load_card(card, cache_dir=tmp_path / "cache")
        assert task == read(path, label="mood")


def test_a_table_is_read_as_by_its_card(tmp_path: Path) -> None:
    path = write(tmp_path / "reviews.csv", REVIEWS)
    cards: list[Card] = []
    task = load_table(path, on_card=lambda card, _: cards.append(card))
    assert load_card(cards[0], cache_dir=tmp_path / "cache") == task


# --- questions ---


def questions(path: Path, input: str = "", label: str = "", options: Any = ...) -> list[Example] | list[str]:
    return read_table_questions(path, Card("q", input, OWN_OPTIONS.options if options is ... else options, label))


def test_questions(tmp_path: Path) -> None:
    path = write(tmp_path / "q.csv", "n,text\n1,a\n2,b\n")
    assert questions(path, options=TWO) == [Example("a", TWO), Example("b", TWO)]
    assert questions(path, "{n}) {text}", options=TWO)[1] == Example("2) b", TWO)
    assert questions(path, options=None) == ["a", "b"]
    write(path, "text,label\na,good\nb,\n")
    assert (
        questions(path, options=TWO)
        == questions(path, "{text}", "label", TWO)
        == [Example("a", TWO), Example("b", TWO)]
    )
    write(path, "text,mine\na,x|y\n")
    assert questions(path, options=RowOptions("mine")) == [Example("a", ("x", "y"))]
    write(path, "text,A,B\na,x,y\n")
    assert questions(path, options=RowOptions(columns=("A", "B"))) == [Example("a", ("x", "y"))]
    for name in ("options", "Options"):
        write(path, f"text,{name}\na,x|y\n")
        assert read_table_questions(path) == [Example("a", ("x", "y"))]


@pytest.mark.parametrize(
    ("text", "options", "match"),
    [
        (
            "text\na\n",
            {},
            r"q\.csv: no column `options`, of options; columns are \['text'\]; add one, with a list",
        ),
        ("text\na\n", {"options": RowOptions("o")}, r"q\.csv: no column `o`, of options; columns are \['text'\]"),
        ("title\na\n", {"options": TWO, "input": "{text}"}, r"q\.csv: `input` \(--input\) names 'text'"),
        ("text,n\na,1\n ,2\n", {"options": TWO}, r"q\.csv:3: `input` is empty: column 'text' holds nothing"),
        ("text,options\na,x\n", {}, r"q\.csv:2: `options` must hold at least 2"),
    ],
)
def test_questions_refused(tmp_path: Path, text: str, options: dict[str, Any], match: str) -> None:
    with pytest.raises(TaskError, match=match):
        questions(write(tmp_path / "q.csv", text), **options)


CARDS = [
    OWN_OPTIONS,
    Card("t", "{text}", TWO, "label", files="t.csv", labels={text: text for text in TWO}),
    Card("t", "{text}", None, "label", path="a/b", query_split="test"),
    Card("t", "{text}", RowOptions("mine"), "label", files={"train": "t.csv"}, delimiter="|"),
    Card("t", "{text}", RowOptions(columns=("A", "B")), "label", files="t.csv", letters=("x", "y"), max_examples=3),
]


@pytest.mark.parametrize("card", CARDS)
def test_cards_are_kept(card: Card) -> None:
    assert card_from(json.loads(json.dumps(card_values(card)))) == card


@pytest.mark.parametrize("values", [None, {}, card_values(CARDS[0]) | {"input": 3}, card_values(CARDS[0]) | {"x": "y"}])
def test_bad_cards(values: Any) -> None:
    with pytest.raises(ConfigError, match="expected|missing|string|unknown key"):
        card_from(values)


def test_cards_of_tasks(tmp_path: Path) -> None:
    """A table's card is the one it was read by; other tasks have one that knows their options."""
    found: list[Card] = []
    load_table(write(tmp_path / "t.csv", REVIEWS), on_card=lambda card, _: found.append(card))
    labels = {text: text for text in TWO}
    assert found == [Card("t", "{review}", TWO, "label", files="t.csv", labels=labels, folder=tmp_path)]
    assert question_card(Task("t", (Example("a", TWO),))) == Card("t", "", TWO, "")
    several = Task("t", (Example("a", TWO), Example("b", ("x", "y"))))
    assert question_card(several) == Card("t", "", RowOptions("options"), "")
    assert question_card(Task("t", (Example("a", references=("b",)),))) == Card("t", "", None, "")


# --- formats ---

LINE = '{"input": "q", "options": ["a", "b"], "output": "a"}\n'
FORMATS = {
    "t.csv": {"smiles,x\nC,1\n": "molecules", "MOL,x\nC,1\n": "molecules", "a,label\nu,x\n": "table", "": "table"},
    "t.tsv": {"a\tLabel\nu\tx\n": "table"},
    "t.jsonl": {LINE: "metaicl", "[1]\n": "metaicl", "": "metaicl", '{"text": "q", "label": 1}\n': "table"},
    "t.parquet": {"": "table"},
    "t.yaml": {"input: '{a}'\n": "card", '{"name": "t", "input": "{a}"}': "card", '{\n"input": "{a}"}\n': "card"},
    "t.yml": {"name: t\ninput: '{a}'\n": "card"},
}


@pytest.mark.parametrize("name", FORMATS)
def test_formats(tmp_path: Path, name: str) -> None:
    for text, format in FORMATS[name].items():
        path = write(tmp_path / "d" / name, text)
        assert task_format(path) == task_format(tmp_path / "d") == format
    other = {"t.csv": "table", "t.tsv": "table", "t.jsonl": "table", "t.parquet": "table"}.get(name, "card")
    assert task_format(tmp_path / "d", other) == task_format(path, other) == other


@pytest.mark.parametrize(
    ("name", "text"),
    [("t.csv", REVIEWS), ("t.csv", "smiles;x\nC;1\nN;0\n"), ("t.tsv", REVIEWS.replace(",", "\t")), ("t.jsonl", LINE)],
)
def test_a_file_is_opened_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str) -> None:
    """What is read to recognise the format is passed on, for a file and for a folder."""
    path, opened, really = write(tmp_path / name, text), [], Path.open

    def count(self: Path, *arguments: Any) -> Any:
        opened.append(self)
        return really(self, *arguments)

    monkeypatch.setattr(Path, "open", count)
    for place in (path, tmp_path):
        opened.clear()
        assert len(load_tasks(place)) == 1
        assert opened == [path]


def test_files_that_are_no_tasks(tmp_path: Path) -> None:
    """A file of settings is no card, and a TSV file without a header is no table."""
    write(tmp_path / "config.yaml", "fit:\n  input: 3\n")
    write(tmp_path / "t.tsv", "a film\tgood\n")
    with pytest.raises(TaskError, match="no task of a format that is known here"):
        task_format(tmp_path)
    for name in ("config.yaml", "t.tsv"):
        with pytest.raises(TaskError, match="cannot tell the format"):
            task_format(tmp_path / name)


def test_cards_of_a_folder(tmp_path: Path) -> None:
    """A card's task has the name that the card gives, and the table beside it is no task of its own."""
    card = {"name": "film", "files": "t.csv", "input": "{review}!", "options": ["bad", "good"], "label": "label"}
    write(tmp_path / "t.csv", REVIEWS)
    path = write(tmp_path / "a.yaml", yaml.safe_dump(card))
    for place in (tmp_path, path):
        tasks = load_tasks(place, cache_dir=tmp_path / "cache", max_examples=3)
        assert list(tasks) == ["film"] and len(tasks["film"]) == 3
        assert tasks["film"].support[0].input.endswith("!")
    assert list(load_tasks(tmp_path, names=["film"], cache_dir=tmp_path / "cache")) == ["film"]
    with pytest.raises(TaskError, match=r"1 of 1 tasks are missing: 'films' \(did you mean 'film'"):
        load_tasks(tmp_path, names=["films"])
    write(tmp_path / "b.yaml", yaml.safe_dump(card))
    with pytest.raises(TaskError, match=r"b\.yaml: the name 'film' is that of another card here; change one"):
        load_tasks(tmp_path)
    write(tmp_path / "b.yaml", "input: 3\n")
    with pytest.raises(TaskError, match=r"b\.yaml: key 'name' is missing"):
        load_tasks(tmp_path)
    write(tmp_path / "b.yaml", "input: [\n")
    for place in (tmp_path, tmp_path / "b.yaml"):
        with pytest.raises(TaskError, match=r"b\.yaml: cannot be read as YAML: .*line 2") as caught:
            load_tasks(place)
        assert "\n" not in str(caught.value)
    assert read_card(path).name == "film"
    with pytest.raises(
        TaskError, match=r"the format 'table' has no option `seed`; it has input, label, options, max_options"
    ):
        load_tasks(tmp_path / "t.csv", seed=3)
