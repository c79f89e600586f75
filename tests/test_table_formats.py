"""Tables as text in a narrow terminal, in a pipe, and as JSON, CSV and Markdown."""

import csv
import fcntl
import json
import math
import os
import pty
import re
import struct
import subprocess
import sys
import termios
from io import StringIO
from types import SimpleNamespace
from typing import Any

import pandas
import pytest
from conftest import make_tasks
from files import write_examples
from rich.cells import cell_len
from rich.console import Console
from runs import run

from bayes_lora.metrics.options import Metrics
from bayes_lora.metrics.text import TextMetrics
from bayes_lora.posterior.diagnose import Diagnosis, SiteWidth
from bayes_lora.runs.dry_run import DryRun
from bayes_lora.runs.report import metrics_table
from bayes_lora.runs.sweep import sweep_table
from bayes_lora.utils.table_layout import fold
from bayes_lora.utils.tables import Column, ResultTable, TableFormat, write_tables

METHODS = ["label counts", "LoRA, 10 steps of 0.0003", "ABMLL (closed form)", "ABMLL (amortized) + 10 steps"]
TASKS = {
    "tweet_eval-stance_abortion": Metrics(0.9123456789, 0.25, 1 / 3, 0.05, 8),
    "a|task": Metrics(0.8, math.inf, 0.4, math.nan, 12),
    "short-answers": TextMetrics(0.1, 0.2, 3.25, 9),
}
NUMBER = re.compile(r"-?\d+(\.\d+)?|inf|nan")


def comparison():
    """A table with long names of tasks and methods, and metrics of both kinds."""
    return metrics_table({method: TASKS for method in METHODS}, "Unseen tasks")


def printed(table, width):
    console = Console(width=width, file=StringIO())
    console.print(table)
    return console.file.getvalue()


def grid(text):
    """The cells of a table as text, column by column."""
    lines = [line for line in text.splitlines() if "┃" in line or "│" in line]
    rows = [[cell.strip() for cell in re.split("[┃│]", line)] for line in lines]
    assert len({len(row) for row in rows}) == 1, text
    return list(zip(*rows, strict=True))


def test_a_narrow_terminal_folds_words_and_no_numbers():
    wide = grid(printed(comparison(), 200))
    assert set(METHODS) <= {*wide[1]} and {*TASKS} <= {*wide[0]}
    narrow = printed(comparison(), 80)
    assert max(map(cell_len, narrow.splitlines())) <= 80
    tasks, methods, *numbers = grid(narrow)
    words = {word for method in METHODS for word in method.split()} | {"method", ""}
    assert {word for cell in methods for word in cell.split()} <= words
    assert " ".join(cell for cell in methods[1 : len(methods) // 5] if cell).startswith(METHODS[0])
    assert "".join(tasks[1:5]).startswith("tweet_eval-stance_abortion"[:20])
    for column, full in zip(numbers, wide[2:], strict=True):
        assert [cell for cell in column if cell] == [cell for cell in full if cell]


def test_a_narrower_terminal_leaves_columns_out_and_says_so():
    text = printed(comparison(), 60)
    assert max(map(cell_len, text.splitlines())) <= 60
    headings = [column[0] for column in grid(text)]
    assert "NLL" in headings and "Brier" not in headings and "ECE" not in headings
    assert "left out, because the terminal is narrow: Brier, ECE" in " ".join(text.split())


def test_the_narrowest_terminal_has_a_line_per_cell():
    lines = printed(comparison(), 30).splitlines()
    assert lines[0] == "Unseen tasks" and "method: label counts" in lines
    assert "accuracy: 0.912" in lines and "Brier: 0.333" in lines and "F1: 0.200" in lines


@pytest.mark.parametrize(
    ("text", "width", "lines"),
    [
        ("one two three", 7, ["one two", "three"]),
        ("tweet_eval-stance x", 8, ["tweet_", "eval-", "stance x"]),
        ("unbreakable", 4, ["unbr", "eaka", "ble"]),
        ("情感 分析", 5, ["情感", "分析"]),
        ("", 4, [""]),
    ],
)
def test_folding(text, width, lines):
    assert fold(text, width).split("\n") == lines
    assert all(cell_len(line) <= width for line in lines)


def test_json_and_csv_have_numbers_in_full_precision():
    table = comparison()
    found = json.loads(write_tables([table], TableFormat.JSON))["metrics"]
    assert len(found) == 4 * 5  # three tasks and two means
    first = found[0]
    assert first == {
        "task": "tweet_eval-stance_abortion",
        "method": "label counts",
        "num_tasks": 1,
        "num_examples": 8,
        **{"accuracy": 0.9123456789, "exact_match": None, "f1": None},
        **{"nll_nats": 0.25, "brier": 1 / 3, "ece": 0.05},
    }
    assert [row["num_tasks"] for row in found[::4]] == [1, 1, 1, 2, 1]
    assert found[4]["nll_nats"] is None and found[4]["ece"] is None  # infinite, NaN: none is JSON
    frame = pandas.read_csv(StringIO(write_tables([table], TableFormat.CSV)))
    assert list(frame.columns) == list(first) and len(frame) == 20
    assert frame["brier"][0] == 1 / 3 and frame["nll_nats"][4] == math.inf and math.isnan(frame["ece"][4])
    assert set(frame["task"]) >= {*TASKS}


def test_markdown_escapes_what_would_break_the_table():
    text = comparison().to_markdown()
    title, head, rule, *rows = [line for line in text.splitlines() if line]
    assert title == "**Unseen tasks**"
    bars = {len(re.findall(r"(?<!\\)\|", line)) for line in (head, rule, *rows)}
    assert bars == {9} and r"a\|task" in text and "tweet_eval-stance_abortion" in text
    table = ResultTable("t", [Column("x", lambda row: row["x"], is_number=False)], [{"x": "<b> `*` _a_\nb"}])
    assert table.to_markdown().splitlines()[-1] == r"| \<b> \`\*\` \_a\_ b |"


def test_cells_cannot_manipulate_the_terminal():
    row = {"x": "a\x1b[2Jb\r\nc :smile: [bold]d"}
    table = ResultTable("t", [Column("x", lambda row: row["x"], is_number=False)], [row])
    assert str(table).splitlines()[-1] == r"a\x1b[2Jb c :smile: [bold]d"
    assert json.loads(write_tables([table], TableFormat.JSON))["t"] == [row]


@pytest.fixture
def folder(tmp_path):
    """Tasks, of which one has a long name and repeats a text of another, and a split."""
    tasks = list(make_tasks(num_tasks=2, num_examples=6).values())
    for name, task in (("a_task-with_a-very_long-name_of-many-parts.of.it", tasks[0]), ("b:smile:", tasks[0])):
        write_examples(tmp_path / "data" / f"{name}.jsonl", task.examples)
    names = sorted(path.stem for path in (tmp_path / "data").iterdir())
    (tmp_path / "data" / "splits.json").write_text(json.dumps({"s": {"train": names[:1], "test": names[1:]}}))
    llama = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
    (tmp_path / "llama.json").write_text(json.dumps(llama | {"num_attention_heads": 4, "vocab_size": 500}))
    return tmp_path


def commands(folder, model_folder):
    data = folder / "data"
    return {
        "tasks": ["tasks", data],
        "split": ["tasks", data, "--split", "s"],
        "cache": ["cache", "--folder", folder / "cache"],
        "env": ["env"],
        "dry-run": ["dry-run", "--architecture", folder / "llama.json"],
        "show": ["show", data, "--task", "b:smile:", "--model", model_folder],
    }


EXPECTED = {
    "tasks": ["tasks"],
    "split": ["tasks", "overlap"],
    "cache": ["cache"],
    "env": ["environment"],
    "dry-run": ["sites", "parameters", "work", "memory"],
    "show": ["example"],
}


@pytest.mark.parametrize("name", EXPECTED)
def test_commands_write_nothing_but_the_table(monkeypatch, capsys, folder, model_folder, name):
    words = commands(folder, model_folder)[name]
    code, out, _ = run(monkeypatch, capsys, *words, "--table", "json")
    found = json.loads(out)
    assert code == 0 and list(found) == EXPECTED[name] and all(found.values())
    code, out, _ = run(monkeypatch, capsys, *words, "--table", "csv")
    [*lines] = csv.reader(StringIO(out))
    assert code == 0 and len({len(line) for line in lines}) == 1
    assert len(lines) == 1 + sum(map(len, found.values()))
    assert ("table" in lines[0]) == (len(found) > 1)
    code, out, _ = run(monkeypatch, capsys, *words, "--table", "markdown")
    assert code == 0 and all(line[0] in "|*" for line in out.splitlines() if line and not line.startswith("\\*"))


def test_values_of_the_tables_of_commands(monkeypatch, capsys, folder, model_folder):
    found = {}
    for name, words in commands(folder, model_folder).items():
        code, out, _ = run(monkeypatch, capsys, *words, "--table", "json")
        assert code == 0
        found[name] = json.loads(out)
    first = found["split"]["tasks"][0]
    assert first["num_support"] == 6 and first["words_p5"] <= first["words_p50"] <= first["words_p95"]
    [overlap] = found["split"]["overlap"]
    assert overlap["exact"] == overlap["num_texts"] and overlap["share"] == 1.0
    sizes = {row["name"]: row["memory_bytes"] for row in found["dry-run"]["memory"]}
    assert sizes["total"] == sum(size for name, size in sizes.items() if name != "total")
    options = [row for row in found["show"]["example"] if row["part"] == "option"]
    assert sum(row["is_gold"] for row in options) == 1
    assert all("".join(row["tokens"]) == row["text"] and len(row["tokens"]) == row["num_tokens"] for row in options)


def test_clearing_the_cache_prints_no_table(monkeypatch, capsys, tmp_path):
    code, out, err = run(monkeypatch, capsys, "cache", "--folder", tmp_path, "--clear", "--table", "csv")
    assert (code, out) == (2, "") and "--clear prints no table" in err


PRINT = """
import sys
from bayes_lora.cli.main import main
for words in {words}:
    sys.argv = ["bayes-lora", *words]
    print("#", *words[:1], flush=True)
    try:
        main()
    except SystemExit as stop:
        assert not stop.code, stop.code
"""


def in_terminal(code, columns):
    """Run Python code in a terminal of so many columns, and return what it shows."""
    parent, child = pty.openpty()
    fcntl.ioctl(child, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    own = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES")}
    own |= {"TERM": "xterm", "NO_COLOR": "1"}
    process = subprocess.Popen([sys.executable, "-c", code], stdin=child, stdout=child, stderr=child, env=own)
    os.close(child)
    shown = b""
    while True:
        try:
            part = os.read(parent, 65536)
        except OSError:  # Linux reports the end of a terminal as an error
            break
        if not part:
            break
        shown += part
    os.close(parent)
    assert process.wait() == 0, shown.decode()
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown.decode()).replace("\r\n", "\n")


def test_every_table_fits_into_a_terminal(folder, model_folder):
    """In a pseudo-terminal of 80 columns, or printed in as many: no line is wider, no column has two characters."""
    words = [list(map(str, commands(folder, model_folder)[name])) for name in ("tasks", "split", "cache")]
    shown = in_terminal(PRINT.format(words=words), 80)
    tables = re.split(r"^# [a-z-]+\n", shown, flags=re.MULTILINE)[1:]
    assert len(tables) == len(words)
    widths = {f"model.layers.q_proj.lora_{name}": SiteWidth(1234.5, 1e-3, 2.0) for name in "AB"}
    point: Any = SimpleNamespace(beta=1e-3, nll=0.5, width=1.0, nll_at_width=0.5, divergence=12.0)
    others = [
        *DryRun({"q_proj.lora_A": (30, 8, 576)}, {"base": 10**9}, {"total": 10**10}, 4096, {"derivatives": 9}).tables(),
        Diagnosis((0.5, 0.6), (0.1, 0.2), 0.3, 0.4, widths, ("Collapsed: " + "a long sentence " * 9,)).table(),
        sweep_table([point, point]),
        comparison(),
    ]
    for text in [*tables, *(printed(table, 80) for table in others)]:
        lines = [line for line in text.splitlines() if re.search("[┃│╇┼]", line)]
        assert lines and max(map(cell_len, lines)) <= 80, text
        rules = [line for line in lines if set(line) <= set("━╇")]
        for rule in rules:
            assert min(map(len, rule.split("╇"))) > 2, text
    for name in ("b:smile:", "passed checks", "words", "training task"):
        assert name in shown
    pieces = re.findall(r"^[a-z_.-]+(?= )", tables[0], flags=re.MULTILINE)
    assert "".join(pieces).startswith("task" + "a_task-with_a-very_long-name_of-many-parts.of.it")
