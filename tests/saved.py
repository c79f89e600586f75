"""Changes of saved files, and what must come of them: the same predictions, or one of the package's own errors."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from bayes_lora.utils.storage import read_tensors, write_tensors


def change_facts(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a JSON file in place, or replace its value by what ``change`` returns."""
    facts = json.loads(path.read_text())
    made = change(facts)
    path.write_text(json.dumps(facts if made is None else made))


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a tensors' file and its SHA-256, as someone does who makes a file."""
    digest = write_tensors(path, change(read_tensors(path)))
    change_facts(path.with_suffix(".json"), lambda facts: facts.update({"sha256": digest}))


def flip(path: Path, place: float, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
