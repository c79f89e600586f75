"""Splits that come with the package, and which file a split is looked up in."""

from __future__ import annotations

import json
import shutil
import warnings
from importlib import resources
from pathlib import Path

import pytest
from real_data import data_folder, needs_data

from bayes_lora.errors import TaskError
from bayes_lora.tasks import load_split
from bayes_lora.tasks.splits import shipped_splits

CROSSFIT = data_folder("crossfit")
SIZES = {
    "abmll/cls-45": (34, 15),
    "abmll/cls-23": (28, 15),
    "abmll/nli": (41, 8),
    "abmll/para": (46, 4),
    "abmll/mcqa": (18, 12),
    "metaicl/class_to_class": (43, 20),
    "metaicl/non_class_to_class": (37, 20),
    "metaicl/qa_to_qa": (37, 22),
    "metaicl/non_nli_to_nli": (55, 8),
    "metaicl/non_paraphrase_to_paraphrase": (59, 4),
    "metaicl/hr_to_lr": (61, 26),
}
CLS_45 = shipped_splits()["abmll/cls-45"]


def make_tasks(root: Path, names: list[str]) -> Path:
    """Make a file for each task; splits need only their names."""
    for name in names:
        (root / f"{name}.jsonl").write_text("")
    return root


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with all tasks of cls-45."""
    return make_tasks(tmp_path, [name for half in CLS_45 for name in half])


def test_shipped_splits() -> None:
    """Sizes are as published; no task is twice in a split, but the one that MetaICL leaks."""
    splits = shipped_splits()
    assert {name: (len(train), len(test)) for name, (train, test) in splits.items()} == SIZES
    assert all(len(set(half)) == len(half) for halves in splits.values() for half in halves)
    leaks = {name: set(train) & set(test) for name, (train, test) in splits.items() if set(train) & set(test)}
    assert leaks == {"metaicl/non_nli_to_nli": {"sick"}}


def test_a_shipped_split_needs_no_file(root: Path) -> None:
    """Without splits.json, and with one that lacks the split, the shipped one is found by either name."""
    for text in (None, '{"mine": {"train": ["imdb"], "test": ["ag_news"]}}'):
        if text is not None:
            (root / "splits.json").write_text(text)
        assert load_split(root, "cls-45") == load_split(root, "abmll/cls-45") == CLS_45
    assert load_split(root, "mine") == (["imdb"], ["ag_news"])


def test_the_folder_s_own_split_comes_first(root: Path) -> None:
    """A split of the same name in the folder wins; one that is ambiguous or broken there is not passed over."""
    own = {"train": ["imdb"], "test": ["ag_news"]}
    (root / "splits.json").write_text(json.dumps({"abmll": {"cls-45": own}}))
    assert load_split(root, "cls-45") == load_split(root, "abmll/cls-45") == (["imdb"], ["ag_news"])
    (root / "splits.json").write_text(json.dumps({"a": {"nli": own}, "b": {"nli": own}}))
    with pytest.raises(TaskError, match="split 'nli' is ambiguous; say which: a/nli, b/nli"):
        load_split(root, "nli")
    (root / "splits.json").write_text("{")
    with pytest.raises(TaskError, match=r"splits\.json: broken JSON"):
        load_split(root, "cls-45")


def test_missing_tasks_of_a_shipped_split(root: Path) -> None:
    """All missing tasks are listed and refused, or left out with one warning that lists them."""
    gone = ["imdb", "anli", "wiki_qa"]
    for name in gone:
        (root / f"{name}.jsonl").unlink()
    with pytest.raises(TaskError, match=r"3 of 49 tasks are missing: 'imdb', 'anli', 'wiki_qa'.*allow_missing=True"):
        load_split(root, "cls-45")
    with pytest.warns(UserWarning, match="3 of 49 tasks are missing and left out: imdb, anli, wiki_qa$"):
        train, test = load_split(root, "cls-45", allow_missing=True)
    assert train == [name for name in CLS_45[0] if name not in gone]
    assert test == [name for name in CLS_45[1] if name not in gone]


def test_an_unknown_split_is_told_what_there_is(root: Path) -> None:
    """The message names the file, its splits and those of the package; a missing folder stays an error."""
    with pytest.raises(TaskError, match=r"splits\.json: .*No such file.*'cls45' is unknown.*come with.*abmll/cls-45, "):
        load_split(root, "cls45")
    (root / "splits.json").write_text('{"mine": {"train": [], "test": []}}')
    with pytest.raises(
        TaskError, match="'cls45' is unknown; known splits: mine; splits that come with bayes_lora: abm"
    ):
        load_split(root, "cls45")
    with pytest.raises(TaskError, match="gone: expected a folder that can be read, got: No such file"):
        load_split(root / "gone", "cls-45")


def test_the_file_is_part_of_the_package() -> None:
    """The installed package holds the file."""
    assert (resources.files("bayes_lora.tasks") / "splits.json").is_file()


@needs_data("crossfit")
def test_shipped_splits_are_those_of_the_data(tmp_path: Path) -> None:
    """A split is the same whether the folder's file or the package's is read."""
    tree = json.loads((CROSSFIT / "splits.json").read_text())
    listed = {f"{group}/{name}": (half["train"], half["test"]) for group in tree for name, half in tree[group].items()}
    assert shipped_splits() == listed
    names = [child.name for child in CROSSFIT.iterdir() if child.is_dir()]
    make_tasks(tmp_path, names)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        without = {name: load_split(tmp_path, name, allow_missing=True) for name in SIZES}
        shutil.copy(CROSSFIT / "splits.json", tmp_path)
        assert {name: load_split(tmp_path, name, allow_missing=True) for name in SIZES} == without
