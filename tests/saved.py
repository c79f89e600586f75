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


def tensors_of(folder: Path) -> Path:
    """The file of tensors in a saved folder; of a checkpoint that of its step."""
    [found] = [path for path in folder.glob("*.safetensors") if not path.name.startswith("best-")]
    return found


def set_digest(path: Path, digest: str | None) -> None:
    """Set the SHA-256 of a file of tensors in the JSON file next to it, or delete it."""

    def change(facts: dict[str, Any]) -> None:
        named = [entry for entry in facts.get("files", {}).values() if entry["name"] == path.name]
        place = named[0] if named else facts
        place["sha256"] = digest
        if digest is None:
            del place["sha256"]

    [facts] = path.parent.glob("*.json")
    change_facts(facts, change)


def change_tensors(path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]]) -> None:
    """Rewrite a tensors' file and its SHA-256, as someone does who makes a file."""
    set_digest(path, write_tensors(path, change(read_tensors(path))))


def flip(path: Path, place: float, bit: int) -> None:
    """Flip one bit of a file."""
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 1 << bit
    path.write_bytes(data)
