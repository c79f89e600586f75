"""Writing of task files."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from bayes_lora.tasks import Example


def write(path: Path, content: str | bytes) -> Path:
    """Write a file and the folders above it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def write_examples(path: Path, examples: Iterable[Example], *, labelled: bool = True) -> Path:
    """A JSON line for each example, with its answer where ``labelled``."""
    rows = [
        {"input": x.input, "options": list(x.options)} | ({"output": x.output} if labelled else {}) for x in examples
    ]
    return write(path, "".join(json.dumps(row) + "\n" for row in rows))
