"""Splits: which tasks of a collection are for training, and which are kept unseen."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.metaicl import present_tasks, task_places

__all__ = ["load_split"]


def load_split(root: str | Path, split: str, *, allow_missing: bool = False) -> tuple[list[str], list[str]]:
    """Read from ``<root>/splits.json`` which tasks to train on and which are kept unseen.

    The file is ``{split: {"train": [...], "test": [...]}}``, or has one more level of groups above the
    splits; a split in a group is named ``<group>/<split>``, or ``<split>`` where only one group has it.

    Args:
        root: Folder that holds the tasks and ``splits.json``.
        split: Name of the split.
        allow_missing: Leave out tasks that are not in `root`, with one warning, instead of raising.

    Returns:
        The names of the training tasks and of the unseen tasks. A task in both is warned about.

    Raises:
        TaskError: The file is missing or malformed, the split is unknown, or tasks of it are missing.
    """
    path = Path(root) / "splits.json"
    known = dict(_walk_splits(path, _read_json(path), ""))
    matches = [key for key in known if key == split] or [key for key in known if key.endswith(f"/{split}")]
    if len(matches) != 1:
        listed = ", ".join(matches or known)
        problem = f"is ambiguous; say which: {listed}" if matches else f"is unknown; known splits: {listed}"
        raise TaskError(f"{path}: split {split!r} {problem}")
    train, test = known[matches[0]]
    leaks = [name for name in test if name in train]
    if leaks:
        warnings.warn(f"{path}: {split!r} trains on tasks it calls unseen: {', '.join(leaks)}", stacklevel=2)
    present = present_tasks(root, train + test, task_places(root), allow_missing)
    return [name for name in train if name in present], [name for name in test if name in present]


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
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
