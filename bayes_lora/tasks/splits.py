"""Splits: which tasks of a collection are for training, and which are kept unseen.

Splits of published work come with the package, as lists of names (``splits.json`` next to this file): ``cls-45``,
``cls-23``, ``nli``, ``para`` and ``mcqa`` of ABMLL (arXiv 2508.14285; ``sick`` is not a training task of ``nli`` here,
because it is an unseen one), and MetaICL's six settings (arXiv 2110.15943). The tasks themselves do not. To
hold tasks back at random, see :meth:`bayes_lora.tasks.TaskSet.split`.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.folders import present_tasks
from bayes_lora.tasks.readers.table_rows import TABLES
from bayes_lora.tasks.readers.text_files import children
from bayes_lora.utils.limits import read_limited

__all__ = ["load_split", "shipped_splits"]

FILE = "splits.json"
MAX_BYTES = 1 << 25

Splits = dict[str, tuple[list[str], list[str]]]


def load_split(root: str | Path, split: str, *, allow_missing: bool = False) -> tuple[list[str], list[str]]:
    """Say which tasks of a folder to train on and which are kept unseen.

    The split is looked up in ``<root>/splits.json`` and then, if it is not there, among the :func:`shipped_splits`. The
    file is ``{split: {"train": [...], "test": [...]}}``, or has one more level of groups above the splits. A split in a
    group is named ``<group>/<split>``, or ``<split>`` if only one group has it.

    Args:
        root: Folder that holds the tasks and, optionally, ``splits.json``.
        split: Name of the split.
        allow_missing: Leave out tasks that are not in `root`, with one warning, instead of raising.

    Returns:
        The names of the training tasks and of the unseen tasks. A task in both is warned about.

    Raises:
        TaskError: The file is malformed, the split is unknown or ambiguous, or tasks of it are missing (all are
            listed).
    """
    path = Path(root) / FILE
    train, test = _find(path, split)
    leaks = [name for name in test if name in train]
    if leaks:
        warnings.warn(f"{path}: {split!r} trains on tasks it calls unseen: {', '.join(leaks)}", stacklevel=2)
    present = present_tasks(root, train + test, _names_in(root), allow_missing)
    return [name for name in train if name in present], [name for name in test if name in present]


def shipped_splits() -> Splits:
    """Return the splits that come with the package: ``<group>/<split>`` to training tasks and unseen tasks."""
    with resources.as_file(resources.files("bayes_lora.tasks") / FILE) as path:
        return dict(_walk_splits(path, json.loads(path.read_text(encoding="utf-8")), ""))


def _names_in(root: str | Path) -> list[str]:
    """List the names that tasks in a folder may have, whatever their format."""
    entries = children(root)
    return [one.name if one.is_dir() else one.stem for one in entries if one.is_dir() or one.suffix.lower() in TABLES]


def _find(path: Path, split: str) -> tuple[list[str], list[str]]:
    """Return the halves of a split of this file or of the package."""
    own: Splits = {}
    problem = f"split {split!r} is unknown"
    try:
        own = dict(_walk_splits(path, _read_json(path), ""))
        problem += f"; known splits: {', '.join(own)}"
    except FileNotFoundError as error:
        problem = f"expected a file of splits, got: {error.strerror}; {problem}"
    shipped = shipped_splits()
    for known in (own, shipped):
        matches = [key for key in known if key == split] or [key for key in known if key.endswith(f"/{split}")]
        if len(matches) > 1:
            raise TaskError(f"{path}: split {split!r} is ambiguous; say which: {', '.join(matches)}")
        if matches:
            return known[matches[0]]
    raise TaskError(f"{path}: {problem}; splits that come with bayes_lora: {', '.join(shipped)}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_limited(path, MAX_BYTES))
    except FileNotFoundError:
        raise
    except OSError as error:
        raise TaskError(f"{path}: expected a file of splits, got: {error.strerror}") from None
    except (ValueError, RecursionError) as error:
        raise TaskError(f"{path}: broken JSON ({error})") from None


def _walk_splits(path: Path, tree: Any, group: str) -> Iterator[tuple[str, tuple[list[str], list[str]]]]:
    """Yield the name of each split, with the names of its train and test tasks."""
    for name, node in tree.items() if isinstance(tree, dict) else [("", tree)]:
        if isinstance(node, dict) and "train" in node and "test" in node:
            for half in (node["train"], node["test"]):
                if not isinstance(half, list) or not all(isinstance(task, str) for task in half):
                    raise TaskError(f"{path}: split {name!r} must hold two lists of task names, got {half!r}")
            yield group + name, (node["train"], node["test"])
        elif isinstance(node, dict) and not group:
            yield from _walk_splits(path, node, f"{name}/")
        else:
            raise TaskError(f"{path}: {group + name!r} must hold two lists `train` and `test`, got {node!r}")
