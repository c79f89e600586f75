"""Read Parquet files. Compressed, any table fits into a few bytes, so that sizes are checked before reading."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bayes_lora.errors import TaskError
from bayes_lora.tasks.readers.text_files import listed
from bayes_lora.utils.limits import check_regular

__all__ = ["read_parquet"]

MAX_ROWS, MAX_VALUES, MAX_BYTES = 2_000_000, 20_000_000, 1 << 30
"""Limits on a file. The bytes are those of the columns, uncompressed."""

BATCH = 1000


def read_parquet(path: Path) -> tuple[list[str], list[dict[str, Any]]]:
    """Return the columns of a file, and its rows.

    Raises:
        TaskError: the file cannot be read, it is too large, or two columns have the same name.
    """
    import pyarrow
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(check_regular(path)) as file:
            _check_size(path, file.metadata)
            columns = list(file.schema_arrow.names)
            rows = [row for batch in _batches(path, file) for row in batch]
    except TaskError:
        raise
    except (OSError, ValueError, pyarrow.ArrowException) as error:
        reason = " ".join(str(error).split())
        problem = f"expected a Parquet file that can be read, got: {reason}; write it again"
        raise TaskError(f"{path}: {problem}") from error
    if len(set(columns)) < len(columns):
        raise TaskError(f"{path}: expected columns of different names, got {listed(columns)}; rename one")
    return columns, rows


def _check_size(path: Path, metadata: Any) -> None:
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    values = sum(group.column(i).num_values for group in groups for i in range(group.num_columns))
    for count, limit, unit in (
        (metadata.num_rows, MAX_ROWS, "rows"),
        (values, MAX_VALUES, "values"),
        (sum(group.total_byte_size for group in groups), MAX_BYTES, "uncompressed bytes"),
    ):
        if count > limit:
            raise TaskError(f"{path}: expected at most {limit:,} {unit}, got {count:,}; keep a part of the rows")


def _batches(path: Path, file: Any) -> Iterator[list[dict[str, Any]]]:
    """Yield the rows in batches. A text that is stored once may be in every row, so their size is counted again."""
    size = 0
    for batch in file.iter_batches(BATCH):
        size += batch.nbytes
        if size > MAX_BYTES:
            limit = f"{MAX_BYTES:,} uncompressed bytes"
            raise TaskError(f"{path}: expected at most {limit}, got more; keep a part of the rows")
        yield batch.to_pylist()
