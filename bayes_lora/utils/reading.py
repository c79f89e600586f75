"""Read safetensors and JSON files that may be damaged, or made by someone else: a wrong file is refused, not obeyed.

A file is refused before memory is taken for what it says: JSON is limited in size and depth, and the names, dtypes and
shapes of tensors are in the header of their file (:func:`read_header`). A SHA-256 in the JSON file next to the tensors
detects a changed bit.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from bayes_lora.errors import PosteriorError
from bayes_lora.utils.limits import check_nesting, check_regular, read_limited

if TYPE_CHECKING:
    from torch import Tensor

# torch is imported inside the functions that need it, because commands that only read JSON answer without it.

__all__ = [
    "SHA256",
    "check_finite",
    "check_like",
    "digest_of",
    "positive",
    "read_facts",
    "read_header",
    "read_json",
    "read_tensors",
]

SHA256 = "sha256"
"""Key of a JSON file: the SHA-256 of the tensors' file next to it. Files of earlier versions do not have it."""

MAX_JSON_BYTES = 1 << 25
SMALLEST, LARGEST = 2.0**-126, (2 - 2.0**-23) * 2.0**127
"""Range of the numbers that 32-bit floats can hold."""

DTYPES = {
    **{"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"},
    **{"I64": "int64", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8"},
    "BOOL": "bool",
}
"""Names in torch of the dtypes of safetensors."""


def read_json(path: Path) -> Any:
    """Read JSON.

    Raises:
        PosteriorError: the file is missing or damaged, is a pipe or a device, or is too large or too deeply nested.
    """
    with _reading(path):
        value = json.loads(read_limited(path, MAX_JSON_BYTES))
        check_nesting(value)
        return value


def read_facts(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object; raises as :func:`read_json`."""
    value = read_json(path)
    if not isinstance(value, dict):
        raise PosteriorError(
            f"{path} is damaged: expected a JSON object, got {type(value).__name__}. Restore it, or run again."
        )
    return value


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the names, dtypes and shapes of a safetensors file, as tensors on the ``meta`` device, which have no values.

    Raises:
        PosteriorError: the file is missing or damaged, or a dtype is neither floating point, integer nor boolean.
    """
    import torch

    with _reading(path), safe_open(check_regular(path), framework="pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118, because it is no mapping
        other = {name: kind for name, one in slices.items() if (kind := one.get_dtype()) not in DTYPES}
        if other:
            name, kind = next(iter(other.items()))
            raise ValueError(f"tensor {name!r} has dtype {kind}, expected one of {', '.join(DTYPES)}")
        return {
            name: torch.empty(one.get_shape(), dtype=getattr(torch, DTYPES[one.get_dtype()]), device="meta")
            for name, one in slices.items()
        }


def read_tensors(path: Path, sha256: object = None, names: Collection[str] | None = None) -> dict[str, Tensor]:
    """Read safetensors.

    Args:
        path: the file.
        sha256: what :func:`bayes_lora.utils.storage.write_tensors` returned; None for a file of an earlier version.
        names: names of the tensors to read; by default all.

    Raises:
        PosteriorError: the file is missing or damaged, or has another SHA-256.
    """
    with _reading(path):
        with check_regular(path).open("rb") as file:
            found = None if sha256 is None else hashlib.file_digest(file, "sha256").hexdigest()
        if found != sha256:
            raise ValueError(f"its SHA-256 is {found}, but the JSON file next to it has {sha256!r:.80}")
        with safe_open(path, framework="pt") as opened:
            return {name: opened.get_tensor(name) for name in (opened.keys() if names is None else names)}


def check_like(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], path: Path) -> None:
    """Check that tensors have the names and shapes of others, and are floating point if those are.

    Raises:
        PosteriorError: they do not; the message names one.
    """
    for problem, names in (("is missing", expected.keys() - found), ("is unknown", found.keys() - expected)):
        if names:
            raise PosteriorError(f"{path} is damaged or of another version: tensor {min(names)!r} {problem}. {_CURE}")
    for name, value in expected.items():
        was, now = ((tuple(one.shape), one.dtype) for one in (value, found[name]))
        same_kind = was[1] == now[1] or (value.is_floating_point() and found[name].is_floating_point())
        if was[0] != now[0] or not same_kind:
            raise PosteriorError(
                f"{path} is damaged or of another version: tensor {name!r}: expected {was[0]} of {was[1]}, got "
                f"{now[0]} of {now[1]}. {_CURE}"
            )


def digest_of(tensors: Mapping[str, Tensor]) -> str:
    """Return the SHA-256 of the names, shapes and values of tensors of at least one dimension."""
    import torch

    found = hashlib.sha256()
    for name, value in sorted(tensors.items()):
        found.update(f"{name} {value.dtype} {tuple(value.shape)} ".encode())
        found.update(value.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_finite(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Raise :class:`PosteriorError` if a value is NaN or infinite."""
    for name, value in tensors.items():
        if value.is_floating_point() and not bool(value.isfinite().all()):
            raise PosteriorError(f"{path} is damaged: tensor {name!r} has NaN or infinite values. {_CURE}")


def positive(facts: Mapping[str, Any], name: str, path: Path) -> float:
    """Return a positive number of a JSON file.

    Raises:
        PosteriorError: it is missing, is not a number, or is not positive and finite in 32 bits.
    """
    if name not in facts:
        raise PosteriorError(f"{path} is damaged: it has no {name!r}. {_CURE}")
    value = facts[name]
    if isinstance(value, bool) or not isinstance(value, int | float) or not SMALLEST <= value <= LARGEST:
        expected = (
            f"expected a positive {name!r}, got {value!r:.80}, which must be a number that 32-bit floats can hold"
        )
        raise PosteriorError(f"{path} is damaged: {expected}. {_CURE}")
    return float(value)


_CURE = "Restore it, or run again."


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Convert errors of reading a file into :class:`PosteriorError`."""
    try:
        yield
    except FileNotFoundError as error:
        raise PosteriorError(f"{path} is missing. Check that {path.parent} is the right folder.") from error
    except (OSError, ValueError, RecursionError, SafetensorError) as error:
        raise PosteriorError(f"{path} is damaged ({error}). {_CURE}") from error
