"""Cards: tables as tasks.

The fixtures in fixtures_cards stand for the data sets of the hub, which the tests do not ask: three rows each, with the
columns and types that the data set is known to have (a class label as its number), and the examples that should come of
them. They were written down by hand: that a card fits the hub's table of today is for a test of mark `hub` to find out.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import datasets
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from bayes_lora.errors import ConfigError, TaskError
from bayes_lora.tasks import Example, Task
from bayes_lora.tasks.readers import card_examples as cards
from bayes_lora.tasks.readers.card import Card, RowOptions, fill, gallery, key_of, placeholders, read_card
from bayes_lora.tasks.readers.card_examples import load_card

FIXTURES = Path(__file__).parent / "fixtures_cards"
BASE = {"name": "t", "files": "data.jsonl", "input": "{text}", "options": ["bad", "good"], "label": "label"}
ROWS = [{"text": "awful", "label": 0}, {"text": "fine", "label": 1}, {"text": "poor", "label": 0}]
EXAMPLES = tuple(Example(row["text"], ("bad", "good"), row["label"]) for row in ROWS)


def write_card(folder: Path, /, **changes: Any) -> Path:
    """Write a card; a key changed to ... is left out."""
    values = {key: value for key, value in (BASE | changes).items() if value is not ...}
    (folder / "card.yaml").write_text(yaml.safe_dump(values), encoding="utf-8")
    return folder / "card.yaml"


def load(folder: Path, rows: list[dict[str, Any]] | None = None, /, **changes: Any) -> Task:
    """Load rows of data.jsonl by a card beside it."""
    if rows is not None:
        (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return load_card(write_card(folder, **changes), cache_dir=folder / "cache")


# --- The gallery ---


def test_each_card_of_the_gallery_has_a_fixture() -> None:
    assert set(gallery()) == {path.stem for path in FIXTURES.glob("*.json")}
    assert len(gallery()) == 61


@pytest.mark.parametrize("name", gallery())
def test_gallery(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    fixture = json.loads((FIXTURES / f"{name}.json").read_text(encoding="utf-8"))
    card = read_card(gallery()[name])
    assert (card.name, card.path, card.config) == (name, fixture["path"], fixture["config"])
    assert len(fixture["rows"]) == 3
    table = datasets.Dataset.from_list(fixture["rows"])
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: table)
    found = load_card(replace(card, query_split=None)).support
    assert [expected(example) for example in found] == fixture["expected"]


def expected(example: Example) -> dict[str, Any]:
    """What a fixture says of an example."""
    if example.free_form:
        return {"input": example.input, "references": list(example.references)}
    return {"input": example.input, "options": list(example.options), "output": example.output}


@pytest.mark.hub
@pytest.mark.skipif("BAYES_LORA_HUB" not in os.environ, reason="BAYES_LORA_HUB=1 asks the hub for each card's table")
def test_gallery_on_the_hub(tmp_path: Path) -> None:
    problems = []
    for name in gallery():
        try:
            assert len(load_card(name, max_examples=200, cache_dir=tmp_path).support) > 100
        except TaskError as error:
            problems.append(str(error))
    assert not problems, "\n".join(problems)


def test_a_name_of_the_gallery(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def rows(path: str, name: str | None, split: str, **_: Any) -> datasets.Dataset:
        asked.append((path, name, split))
        features = datasets.Features(
            {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["0", "1", "2", "3"])}
        )
        texts = {"text": ["both", f"only {split}"], "label": [1, 3]}
        return datasets.Dataset.from_dict(texts, features=features)

    monkeypatch.setattr(datasets, "load_dataset", rows)
    task = load_card("ag_news")
    assert asked == [("fancyzhx/ag_news", None, "train"), ("fancyzhx/ag_news", None, "test")]
    assert [(e.input, e.output) for e in task.support] == [("both", "Sports"), ("only train", "Sci/Tech")]
    assert [e.input for e in task.query] == ["only test"]
    with pytest.raises(
        ConfigError, match=r"card 'ag_new': no such file, and none in the gallery \(did you mean 'ag_news"
    ):
        load_card("ag_new")


# --- Files ---


@pytest.mark.parametrize(
    "name", ["data.csv", "data.tsv", "data.jsonl", "data.json", "data.parquet", "od[d] *name.csv", "pipe.csv"]
)
def test_files(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What `datasets` writes is read back."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    table, path = datasets.Dataset.from_list(ROWS), str(tmp_path / name)
    changes: dict[str, Any] = {"delimiter": "|"} if name == "pipe.csv" else {}
    separators = {"pipe.csv": "|", "data.tsv": "\t"}
    if name.startswith("data.json"):
        table.to_json(path, lines=name.endswith("l"))
    elif name.endswith("parquet"):
        table.to_parquet(path)
    else:
        table.to_csv(path, sep=separators.get(name, ","))
    assert load(tmp_path, files=name, **changes) == Task("t", EXAMPLES)
    assert {path.name for path in tmp_path.iterdir()} == {name, "card.yaml"}


def test_splits_of_files(tmp_path: Path) -> None:
    for name, texts in {"a": ["x", "y", "z"], "b": ["y", "w"]}.items():
        (tmp_path / f"{name}.csv").write_text("text,label\n" + "".join(f"{text},good\n" for text in texts))
    files = {"train": "a.csv", "test": str(tmp_path / "b.csv")}

    def inputs(**changes: Any) -> list[list[str]]:
        task = load(tmp_path, files=files, **changes)
        return [[example.input for example in half] for half in (task.support, task.query)]

    assert inputs(query_split="test") == [["x", "y", "z"], ["w"]]
    assert inputs(split="train[:1]+test") == [["x", "y", "w"], []]
    with pytest.raises(TaskError, match=r"card 't': split 'dev' cannot be read: Unknown split \"dev\".*train"):
        inputs(split="dev")
    with pytest.raises(TaskError, match="none of the 1 rows is left"):
        inputs(split="train", query_split="test[:1]")


def test_cells_are_read_as_they_stand(tmp_path: Path) -> None:
    """01, NA and 1.50 are texts; a quoted cell may hold a line; a byte order mark is no part of a name."""
    text = '\ufefftext,A,B,label\n"a\nb",1.50,1.5,A\nNA,None,nan,nan\nc,01,1,01\n'
    (tmp_path / "data.csv").write_text(text, encoding="utf-8")
    task = load(tmp_path, files="data.csv", options={"columns": ["A", "B"]})
    assert task.support == (
        Example("a\nb", ("1.50", "1.5"), 0),
        Example("NA", ("None", "nan"), 1),
        Example("c", ("01", "1"), 0),
    )


BAD_FILES = {
    "missing.csv": (None, r"missing\.csv: there is no such file; relative paths begin at the card's folder"),
    "empty.csv": (b"", r"empty\.csv: the file is empty"),
    "blank.csv": (b"\n\n", r"blank\.csv: the file is empty; expected a first row that names the columns"),
    "twice.csv": (b"text,text,label\na,b,1\n", r"twice\.csv:1: column 'text' occurs twice"),
    "header.csv": (b"text,label\n", r"header\.csv: expected rows, got none; columns are \['text', 'label'\]"),
    "long.csv": (b"text,label\na,1\nb, c,1\n", r"long\.csv:3: expected 2 cells, .* got 3; quote a cell that holds ','"),
    "short.csv": (b"text,label\na,1\nb\n", r"short\.csv:3: expected 2 cells, .* got 1"),
    "void.csv": (b"text,label\na,1\nb,\n", r"void\.csv:3: column 'label': the value is missing; fill it in"),
    "quote.csv": (b'text,label\na,1\n"b,1\n', r"quote\.csv:3: broken table .*is a quote left open"),
    "latin.csv": ("text,label\né,1\n".encode("latin-1"), r"latin\.csv:2: expected UTF-8, got byte 0xe9 at position 1"),
    "latin.jsonl": (
        '{"text": "é", "label": 1}\n'.encode("latin-1"),
        r"latin\.jsonl:1: .*UTF-8, got byte 0xe9",
    ),
    "empty.jsonl": (b"", "the file is empty"),
    "blank.jsonl": (b"\n", r"blank\.jsonl: the file is empty; expected one JSON object a line"),
    "broken.jsonl": (b'{"text": "a", "label": 1}\nx\n', r"broken\.jsonl:2: broken JSON"),
    "list.jsonl": (b"[1, 2]\n", r"list\.jsonl:1: expected an object with named fields such as .*; got list"),
    "broken.json": (b'[{"text": "a", "label": 1}, {]', r"broken\.json: broken JSON .*expected one whole list"),
    "list.json": (b'[{"text": "a", "label": 1}, 2]', r"list\.json, row 2: expected an object .*; got int"),
    "not.parquet": (b"text,label\na,1\n", r"not\.parquet: expected a Parquet file that can be read, got: .*; write it"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name: str, tmp_path: Path) -> None:
    content, match = BAD_FILES[name]
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(TaskError, match=match) as caught:
        load(tmp_path, files=name)
    assert str(caught.value).startswith(f"card 't': {tmp_path / name}")
    assert "\n" not in str(caught.value)


def test_errors_of_the_hub_are_causes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset(*names: str, **arguments: Any) -> None:
        assert names == ("a/b", "c") and arguments == {"revision": "d", "split": "train", "cache_dir": None}
        raise RuntimeError("Dataset scripts are no longer supported, but found b.py")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    bars = datasets.are_progress_bars_disabled()
    card = Card("t", "{text}", ("a", "b"), "label", path="a/b", config="c", revision="d")
    with pytest.raises(
        TaskError, match=r"card 't': train of a/b cannot be read: RuntimeError: Dataset scripts.*`split`"
    ) as e:
        load_card(card)
    assert isinstance(e.value.__cause__, RuntimeError)
    assert datasets.are_progress_bars_disabled() == bars


# --- Rows ---


def test_draw(tmp_path: Path) -> None:
    """A draw keeps the order, depends on the seed, and is large enough where rows are left out."""
    rows = [{"text": str(i), "label": i % 3} for i in range(60)]
    labels = {0: "bad", 1: "good", 2: None}
    whole = load(tmp_path, rows, labels=labels).support
    assert [e.input for e in whole] == [str(i) for i in range(60) if i % 3 < 2]
    drawn = [load(tmp_path, labels=labels, max_examples=20, seed=seed).support for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20
    assert list(drawn[0]) == [e for e in whole if e in drawn[0]]
    card = write_card(tmp_path, labels=labels, max_examples=20)
    assert len(load_card(card, max_examples=3, cache_dir=tmp_path / "cache")) == 3
    assert len(load_card(card, max_examples=99, cache_dir=tmp_path / "cache")) == 40
    with pytest.raises(ConfigError, match="`max_examples` must be 1 or more, got 0"):
        load_card(card, max_examples=0, cache_dir=tmp_path / "cache")


FREE_ROWS: dict[str, tuple[Any, str, tuple[str, ...]]] = {
    "text": ("a king", "a", ("a king",)),
    "text as it stands": (" 01 ", "a", (" 01 ",)),
    "list": (["b", "a", "b"], "a", ("b", "a")),
    "list under a key": ({"text": ["b", "a"], "start": [3, 1]}, "a.text", ("b", "a")),
    "records": ([{"text": "b"}, {"text": "a"}], "a.text", ("b", "a")),
}


@pytest.mark.parametrize("case", FREE_ROWS)
@pytest.mark.parametrize("options", [..., None])
def test_free_form_rows(case: str, options: Any, tmp_path: Path) -> None:
    """Options left out, or null, leave the answer free."""
    value, label, references = FREE_ROWS[case]
    [example] = load(tmp_path, [{"text": "q", "a": value}], options=options, label=label).support
    assert example == Example("q", references=references)


def test_free_form_cells_of_a_table(tmp_path: Path) -> None:
    """A CSV file holds texts, so a number in it is one."""
    (tmp_path / "data.csv").write_text("text,label\nhow many?,07\nwho?,NA\n", encoding="utf-8")
    task = load(tmp_path, files="data.csv", options=...)
    assert task.free_form
    assert task.support == (Example("how many?", references=("07",)), Example("who?", references=("NA",)))


@pytest.mark.parametrize(
    ("value", "match"),
    [
        (
            1,
            "column 'label': got 1; without `options`, a free answer is a text or a list.* and a label needs `options`",
        ),
        (True, "column 'label': got True; "),
        ([1, 2], r"column 'label': got \[1, 2\]; "),
        ([], "column 'label': the list holds no answer; remove the row, or see whether another `split`"),
        (None, "column 'label': the value is missing"),
        ({"a": "b"}, "column 'label': expected a text or a number, got {'a': 'b'}"),
        (" ", "`references` holds an empty answer"),
        (["a", ""], "`references` holds an empty answer"),
    ],
)
def test_bad_free_form_rows(value: Any, match: str, tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=match) as caught:
        load(tmp_path, [{"text": "q", "label": value}], options=...)
    assert str(caught.value).startswith(f"card 't': {tmp_path / 'data.jsonl'}:1: ")


NESTED = {"text": "q", "choices": [{"text": "x", "label": "P"}, {"text": "y", "label": "Q"}], "label": "Q"}
GOOD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], tuple[list[str], int]]] = {
    "index": ({"label": 1}, {}, (["bad", "good"], 1)),
    "whole float": ({"label": 1.0}, {}, (["bad", "good"], 1)),
    "text": ({"label": "good"}, {}, (["bad", "good"], 1)),
    "letter": ({"label": "B"}, {}, (["bad", "good"], 1)),
    "digits": ({"label": "1"}, {}, (["bad", "good"], 1)),
    "bool": ({"label": True}, {"options": ["true", "false"]}, (["true", "false"], 0)),
    "text of a number": ({"label": 5}, {"options": ["3", "4", "5"]}, (["3", "4", "5"], 2)),
    "labels": ({"label": 0}, {"labels": {0: "good", 1: "bad"}}, (["bad", "good"], 1)),
    "labels of texts": ({"label": "pos"}, {"labels": {"neg": "bad", "pos": "good"}}, (["bad", "good"], 1)),
    "labels of bools": ({"label": True}, {"labels": {False: "bad", True: "good"}}, (["bad", "good"], 1)),
    "labels before texts": ({"label": 0}, {"options": ["1", "0"], "labels": {0: "1"}}, (["1", "0"], 0)),
    "letters": ({"label": 2}, {"letters": ["1", "2"]}, (["bad", "good"], 1)),
    "letters before texts": ({"label": "1"}, {"options": ["1", "0"], "letters": ["0", "1"]}, (["1", "0"], 1)),
    "texts, not places": (
        {"a": 2, "b": 0, "label": 0},
        {"options": {"columns": ["a", "b"]}, "letters": {"columns": ["a", "b"]}},
        (["2", "0"], 1),
    ),
    "records": (
        NESTED,
        {"options": {"column": "choices.text"}, "letters": {"column": "choices.label"}},
        (["x", "y"], 1),
    ),
    "numbers": ({"o": [3, 4], "label": "B"}, {"options": {"column": "o"}}, (["3", "4"], 1)),
    "a dot in a name": ({"a.b": ["x", "y"], "label": "y"}, {"options": {"column": "a.b"}}, (["x", "y"], 1)),
    "merged": (
        {"o": ["x", "x", "y"], "label": 2},
        {"options": {"column": "o"}, "merge_duplicates": True},
        (["x", "y"], 1),
    ),
}


@pytest.mark.parametrize("case", GOOD_ROWS)
def test_rows(case: str, tmp_path: Path) -> None:
    row, changes, (options, answer) = GOOD_ROWS[case]
    assert load(tmp_path, [{"text": "q"} | row], **changes).support == (Example("q", tuple(options), answer),)


OWN = {"options": {"column": "o"}}
BAD_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any], str]] = {
    "text that is no option": ({"label": "god"}, {}, r"expected one of \['bad', 'good'\], its letter.*got 'god'"),
    "index too large": ({"label": 2}, {}, r"its index in 0\.\.1; got 2; other labels need `labels`"),
    "index below 0": ({"label": -1}, {}, "got -1.* another `split`"),
    "fraction": ({"label": 0.5}, {}, "got 0.5"),
    "letter too late": ({"label": "C"}, {}, "got 'C'"),
    "long digits": ({"label": "9" * 5000}, {}, "got '9999"),
    "label missing": ({"label": None}, {}, "column 'label': the value is missing; fill it in, or remove"),
    "label a list": ({"label": [1]}, {}, r"column 'label': expected a text or a number, got \[1\]"),
    "two ways": ({"label": "A"}, {"options": ["B", "A"]}, "got 'A', the text of one option and the place of another"),
    "two ways, number": ({"label": 1}, {"options": ["1", "2"]}, "the place of another .*add `letters`"),
    "not in labels": ({"label": 2}, {"labels": {0: "bad", 1: "good"}}, "got 2, which is none of `labels`.*'0', '1'"),
    "labels to no option": ({"label": 0, "o": ["x", "y"]}, {"labels": {0: "z"}, **OWN}, "maps to 'z', none of"),
    "not in letters": ({"label": "3"}, {"letters": ["1", "2", "3"]}, r"got '3'; `letters` of the 2 options are \['1'"),
    "letters no list": ({"label": "3", "l": "x"}, {"letters": {"column": "l"}}, "column 'l': expected a list, got 'x'"),
    "input blank": ({"text": " ", "label": 0}, {"input": "Q: {text}"}, "`input` is empty: column 'text' holds nothing"),
    "input missing": ({"text": None, "label": 0}, {}, "column 'text': the value is missing"),
    "input a record": ({"text": {"a": 1}, "label": 0}, {}, "column 'text': expected a text or a number, got {'a': 1}"),
    "options missing": ({"o": None, "label": 0}, OWN, "column 'o': expected a list, got None"),
    "option missing": ({"o": ["x", None], "label": 0}, OWN, "column 'o': mixed types"),
    "option blank": ({"o": ["x", ""], "label": 0}, OWN, "holds an empty answer"),
    "options mixed": ({"o": ["x", 1], "label": 0}, OWN, "column 'o': mixed types, expected a list of texts; got"),
    "one option": ({"o": ["x"], "label": 0}, OWN, "at least 2 answers"),
    "no option": ({"o": [], "label": 0}, OWN, "column 'label'|at least 2"),
    "option twice": ({"o": ["x", "x", "y"], "label": 2}, OWN, "holds 'x' more than once"),
    "one when merged": ({"o": ["x", "x"], "label": 1}, {**OWN, "merge_duplicates": True}, "at least 2 answers"),
    "no such key": ({"o": {"a": ["x"]}, "label": 0}, {"options": {"column": "o.b"}}, "'o.b': no 'b' there, only a"),
    "a key of a text": ({"o": "x", "label": 0}, {"options": {"column": "o.b"}}, "'o.b': no 'b' there, only 'x'"),
}


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(case: str, tmp_path: Path) -> None:
    row, changes, match = BAD_ROWS[case]
    with pytest.raises(TaskError, match=match) as caught:
        load(tmp_path, [{"text": "q"} | row], **changes)
    assert str(caught.value).startswith(f"card 't': {tmp_path / 'data.jsonl'}:1: ")


def test_mixed_labels(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"l:3: column 'label': mixed types, number in .*l:1 and text in .*l:3; "):
        load(tmp_path, [*ROWS[:2], {"text": "x", "label": "bad"}])


def test_nan_in_parquet(tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"text": ["a"], "label": [float("nan")]}).to_parquet(str(tmp_path / "d.parquet"))
    with pytest.raises(TaskError, match=r"d\.parquet, row 1: column 'label': the value is missing"):
        load(tmp_path, files="d.parquet")


@pytest.mark.parametrize(
    "changes",
    [
        {"input": "{txt}"},
        {"label": "txt"},
        {"letters": {"column": "txt"}},
        {"options": {"column": "txt.x"}},
        {"options": {"columns": ["text", "txt"]}},
    ],
)
def test_missing_columns(changes: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"data\.jsonl: no column 'txt.*; columns are \['text', 'label'\]") as caught:
        load(tmp_path, ROWS, **changes)
    assert "did you mean 'text'" in str(caught.value)


# --- The card itself ---


def test_all_keys(tmp_path: Path) -> None:
    path = write_card(tmp_path, files={"train": "a.csv", "test": "b.csv"}, delimiter="|", labels={0: "bad", -1: None})
    card = read_card(path)
    assert card.folder == tmp_path
    assert (card.options, card.labels, card.delimiter) == (("bad", "good"), {0: "bad", -1: None}, "|")
    made = Card("t", "{text}", ["a", "b"], "y", files="x.csv", letters=["p", "q"])  # type: ignore[arg-type]
    assert (made.options, made.letters) == (("a", "b"), ("p", "q"))
    card = read_card(write_card(tmp_path, options={"columns": ["A", "B"]}, letters=["x", "y"]))
    assert (card.options, card.letters) == (RowOptions(columns=("A", "B")), ("x", "y"))


BAD_CARDS: list[tuple[dict[str, Any], str]] = [
    ({"lable": "x"}, r"unknown key 'lable' \(did you mean 'label'"),
    ({"folder": "x"}, "unknown key 'folder'"),
    ({"options": {"colum": "x"}}, r"unknown key 'options.colum' \(did you mean"),
    ({"options": {}}, "expected either `column`"),
    ({"options": {"column": "a", "columns": ["b"]}}, "expected either `column`"),
    ({"options": {"column": 3}}, "`options`: .*string, got 3; put it in quotes"),
    ({"options": [True, False]}, "`options`: .*string, got True; put it in quotes"),
    ({"options": ["a"]}, "at least 2 answers"),
    ({"options": ["a", "a"]}, "holds 'a' more than once"),
    ({"options": ["a", " "]}, "holds an empty answer"),
    ({"options": "ab"}, "`options`: "),
    ({"label": ...}, "key 'label' is missing; every card has name"),
    ({"label": " "}, "`label` is empty"),
    ({"name": ""}, "`name` is empty"),
    ({"name": None}, "`name`: .*string, got None"),
    ({"input": "text"}, "`input` 'text' names no column"),
    ({"input": "{text"}, "`input` '{text': '{' at position 1 stands alone; .* '{{'"),
    ({"input": "{text}}"}, "'}' at position 7 stands alone"),
    ({"input": "{}"}, "'{' at position 1 stands alone"),
    ({"files": ...}, "either `path`, a data set of the hub, or `files`"),
    ({"path": "a/b"}, "either `path`"),
    ({"files": ..., "path": "data.csv"}, "is no name on the hub.*give files as `files`"),
    ({"files": ..., "path": "../x"}, "is no name on the hub"),
    ({"files": ..., "path": "a/b/c"}, "is no name on the hub"),
    ({"files": ..., "path": "a/b", "delimiter": ","}, "`delimiter` is of CSV"),
    ({"files": "../data.csv"}, r"`files` '\.\./data\.csv' leaves the card's folder"),
    ({"files": "a/../../data.csv"}, "leaves the card's folder"),
    ({"files": {"train": "a.csv", "test": "../b.csv"}}, r"'\.\./b\.csv' leaves"),
    ({"files": "data.xlsx"}, r"`files` must be of one kind among \.csv.*got 'data.xlsx'"),
    ({"files": {"train": "a.csv", "test": "b.tsv"}}, "of one kind"),
    ({"files": {}}, "of one kind"),
    ({"config": "x"}, "`config` and `revision` are of a data set of the hub"),
    ({"files": "a.csv", "delimiter": "::"}, "`delimiter` must be one character"),
    ({"query_split": "train"}, "`query_split` is 'train', as is `split`"),
    ({"max_examples": 0}, "`max_examples`: .*greater than or equal to 1, got 0"),
    ({"max_examples": "many"}, "`max_examples`: .*integer.* got 'many'"),
    ({"seed": -1}, "`seed`: "),
    ({"letters": ["a", "b"], "labels": {0: "bad"}}, "both say what a label means"),
    ({"letters": ["a", "a"]}, "`letters` must be at least 2 different names"),
    ({"letters": "l"}, "`letters`: .*got 'l'"),
    ({"letters": {"colum": "l"}}, "unknown key 'letters.colum'"),
    ({"letters": []}, "`letters` must be at least 2 different names"),
    ({"labels": {0: "god"}}, r"`labels` maps 0 to 'god', which is none of `options` \(did you mean 'good'"),
    ({"labels": {0: "bad", "0": "good"}}, r"`labels` holds a value in two spellings: \[0, '0'\]"),
    ({"labels": {0: False}}, "`labels`: .*got False; put it in quotes"),
    (
        {"options": ..., "letters": ["a", "b"]},
        "`letters` speaks of options, but there are none; give `options`, or leave",
    ),
    ({"options": None, "labels": {0: "bad"}}, "`labels` speaks of options, .* leave `labels` out: `label` then holds"),
    ({"options": ..., "merge_duplicates": True}, "`merge_duplicates` speaks of options, but there are none"),
    ({"options": ..., "label": ...}, "key 'label' is missing; every card has name, input and label"),
]


@pytest.mark.parametrize(("changes", "match"), BAD_CARDS)
def test_bad_cards(changes: dict[str, Any], match: str, tmp_path: Path) -> None:
    path = write_card(tmp_path, **changes)
    with pytest.raises(ConfigError, match=match) as caught:
        load_card(path)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [b"- 1\n", b"", b"name: [\n", b"\xff\xfe", b"3: 4\n", b"name: !!python/name:os.system"]
)
def test_no_card(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "card.yaml").write_bytes(content)
    with pytest.raises(ConfigError, match=r"card\.yaml: (cannot be read as YAML|expected a mapping|unknown key '3')"):
        read_card(tmp_path / "card.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read as YAML"):
        read_card(tmp_path / "none.yaml")


# --- Properties ---

NAMES = st.text(st.characters(exclude_characters="{}", exclude_categories=["Cs"]), min_size=1)


@given(st.lists(st.text() | NAMES.map(lambda name: (name,))), st.text())
def test_a_template_gives_its_texts_and_values(parts: list[str | tuple[str]], value: str) -> None:
    template = "".join(
        f"{{{part[0]}}}" if isinstance(part, tuple) else part.replace("{", "{{").replace("}", "}}") for part in parts
    )
    assert placeholders(template) == [part[0] for part in parts if isinstance(part, tuple)]
    expected = "".join(f"<{part[0]}|{value}>" if isinstance(part, tuple) else part for part in parts)
    assert fill(template, lambda name: f"<{name}|{value}>") == expected


@given(st.text("{}ab"))
def test_any_template_is_read_or_refused(template: str) -> None:
    try:
        names = placeholders(template)
    except ConfigError:
        return
    assert len(fill(template, lambda name: "")) <= len(template) - 2 * len(names)


VALUES = st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(min_size=1)


@settings(deadline=None)
@given(st.lists(VALUES, min_size=2, max_size=6, unique_by=(key_of, lambda value: value)), st.data())
def test_labels_are_mapped(values: list[Any], data: st.DataObject) -> None:
    """Whatever the values and wherever the options stand, a label gives the option that the map says."""
    texts = [f"option {i}" for i in range(len(values))]
    order = data.draw(st.permutations(texts))
    labels = dict(zip(values, texts, strict=True))
    card = Card("t", "{text}", tuple(order), "label", path="a/b", labels=labels)
    for value, text in zip(values, texts, strict=True):
        example = cards.example_of(card, {"text": "q", "label": value}, {}, "row 1")
        assert example is not None
        assert example.output == text


@settings(deadline=None)
@given(VALUES | st.none() | st.lists(VALUES | st.none(), max_size=3))
def test_any_free_answer_is_kept_or_refused(value: Any) -> None:
    """Texts come out as they went in; nothing else becomes a text."""
    card = Card("t", "{text}", None, "label", path="a/b")
    try:
        example = cards.example_of(card, {"text": "q", "label": value}, {}, "row 1")
    except TaskError:
        return
    assert example is not None
    assert list(example.references) == list(dict.fromkeys([value] if isinstance(value, str) else value))


@settings(deadline=None)
@given(st.lists(st.text() | st.integers(0, 9).map(str), min_size=2, max_size=5), VALUES | st.none())
def test_any_row_is_an_example_or_a_task_error(options: list[str], label: Any) -> None:
    """And the gold option has to do with the label: its text, its letter or its index."""
    card = Card("t", "{text}", RowOptions(column="o"), "label", path="a/b")
    try:
        example = cards.example_of(card, {"text": "q", "label": label, "o": options}, {}, "row 1")
    except TaskError:
        return
    assert example is not None
    assert key_of(label) in (key_of(example.output), "ABCDE"[example.answer]) or int(label) == example.answer
