"""Encoded examples on disk, so that a collection is tokenised once: Arrow files, written with the library `datasets`.

The name of an entry is a hash of all that determines its content: the tokenizer, the template, the texts around
prompts, ``max_length`` and the examples. Entries are therefore immutable and never out of date.
"""

from __future__ import annotations

import shutil
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from bayes_lora.episodes.packing import EncodedExample

__all__ = ["TokenStore"]

TENSORS = ("tokens", "segments", "positions", "sources", "target_sources", "targets", "target_options")
FACTS = {"num_options": "int32", "answer": "int32", "free_form": "bool", "key": "binary"}
FEWEST = 1000
"""Minimum number of examples of an entry; fewer are tokenised faster than `datasets` is imported."""

Encoded = tuple[EncodedExample, bool]
"""A row, and whether it was cut."""


@dataclass(frozen=True)
class TokenStore:
    """A folder of entries.

    Attributes:
        folder: the folder, which is made when the first entry is written.
        fewest: minimum number of examples of an entry.
        max_bytes: maximum size of the folder; the least recently used entries are deleted beyond it.
    """

    folder: Path
    fewest: int = FEWEST
    max_bytes: int = 2 << 30

    def read(self, key: bytes) -> list[Encoded] | None:
        """Return the examples of an entry, in order; None if there is no such entry.

        A damaged entry is deleted, with a warning.
        """
        path = self.folder / key.hex()
        if not path.is_dir():
            return None
        import datasets
        from pyarrow import ArrowException

        try:
            table = datasets.load_from_disk(str(path)).data
            columns = {name: _flat(table.column(name)) for name in TENSORS}
            facts = [table.column(name).to_pylist() for name in (*FACTS, "cut")]
        except (OSError, ValueError, KeyError, TypeError, ArrowException) as error:
            warnings.warn(f"{path} is damaged and is rebuilt ({type(error).__name__}: {error})", stacklevel=2)
            shutil.rmtree(path)
            return None
        path.touch()
        rows = []
        for i, (num_options, answer, free_form, name, cut) in enumerate(zip(*facts, strict=True)):
            parts: dict[str, Any] = {
                column: values[begins[i] : begins[i + 1]] for column, (values, begins) in columns.items()
            }
            row = EncodedExample(**parts, num_options=num_options, answer=answer, key=name, free_form=free_form)
            rows.append((row, cut))
        return rows

    def write(self, key: bytes, encoded: Sequence[Encoded]) -> None:
        """Write an entry; warn if the folder cannot be written."""
        import datasets

        columns: dict[str, Any] = {name: [getattr(row, name).numpy() for row, _ in encoded] for name in TENSORS}
        columns |= {name: [getattr(row, name) for row, _ in encoded] for name in FACTS}
        columns["cut"] = [cut for _, cut in encoded]
        kinds = {name: datasets.List(datasets.Value("int32")) for name in TENSORS}
        kinds |= {name: datasets.Value(kind) for name, kind in {**FACTS, "cut": "bool"}.items()}
        made = datasets.Dataset.from_dict(columns, features=datasets.Features(kinds))
        bars = not datasets.are_progress_bars_disabled()
        datasets.disable_progress_bars()
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=self.folder) as folder:
                made.save_to_disk(folder + "/entry")
                # Another process may have written it first; its entry is the same.
                with suppress(FileExistsError):
                    (Path(folder) / "entry").rename(self.folder / key.hex())
            self._prune()
        except OSError as error:
            warnings.warn(f"tokens are not stored: {self.folder}: {error.strerror or error}", stacklevel=2)
        finally:
            if bars:
                datasets.enable_progress_bars()

    def _prune(self) -> None:
        entries = sorted(self.folder.iterdir(), key=lambda entry: entry.stat().st_mtime, reverse=True)
        total = 0
        for index, entry in enumerate(entries):
            total += sum(file.stat().st_size for file in entry.iterdir())
            if index and total > self.max_bytes:
                shutil.rmtree(entry)


def _flat(column: Any) -> tuple[torch.Tensor, list[int]]:
    """Return all values of a column of lists, and the offset of each list followed by the end of the last."""
    lists = column.combine_chunks()
    lengths = np.diff(lists.offsets.to_numpy())
    values = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    return torch.from_numpy(values), [0, *np.cumsum(lengths).tolist()]
