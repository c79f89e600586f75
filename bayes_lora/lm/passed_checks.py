"""Which language models have passed the check of their forward, on disk, because the check takes about a second.

Only the usual result is kept: packed rows, and hidden states cached below the adapted layers. Any other result is
found again in each process, with its warning. The name of a file is a hash of all that the scores depend on: weights,
configuration, the code of all modules and of this package, versions, sites, dtype and processor. A model with hooks,
with a ``forward`` that is set on a single module, or with quantised weights is checked in each process.
"""

from __future__ import annotations

import inspect
import json
import platform
from collections.abc import Iterable, Mapping
from contextlib import suppress
from hashlib import blake2b
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

from bayes_lora.errors import RunFolderError
from bayes_lora.lm.sites import LoraSites
from bayes_lora.lm.trunk import Trunk
from bayes_lora.utils.limits import read_limited
from bayes_lora.utils.storage import write_json

__all__ = ["PassedChecks"]

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
ROOMS = ("episodes", "lm", "utils")
"""Folders of this package with the code of a forward."""
MAX_BYTES = 1 << 20


class PassedChecks:
    """Remembers whether a language model has passed the check of its forward.

    Args:
        folder: folder of the files, one for each language model.
        model: the model.
        sites: its LoRA sites.
        trunk: its lower layers.
        base: the facts of the base model, see :func:`bayes_lora.lm.base_facts.base_facts`.
    """

    def __init__(self, folder: Path, model: nn.Module, sites: LoraSites, trunk: Trunk, base: Mapping[str, Any]) -> None:
        self.trunk, self.depth = trunk, trunk.depth
        self.path: Path | None = None
        if not any(_is_changed(module) for module in model.modules()):
            facts = _facts(model, sites, trunk.depth, base)
            name = blake2b(json.dumps(facts, sort_keys=True).encode(), digest_size=16).hexdigest()
            self.path = folder / f"{name}.json"

    def recall(self) -> bool:
        """Return whether the check was passed, and set the output type of the lower layers, which it found."""
        if self.path is None or not self.path.is_file():
            return False
        try:
            found = json.loads(read_limited(self.path, MAX_BYTES))
        except (OSError, ValueError, RecursionError):
            return False
        if not isinstance(found, dict) or not isinstance(found.get("in_tuple"), bool):
            return False
        self.trunk.in_tuple = found["in_tuple"]
        return True

    def keep(self) -> None:
        """Remember that the check was passed, unless it found that hidden states of lower layers cannot be used."""
        if self.path is not None and self.trunk.depth == self.depth:
            with suppress(OSError, RunFolderError):  # the cache is read only, or full
                self.path.parent.mkdir(parents=True, exist_ok=True)
                write_json(self.path, {"in_tuple": self.trunk.in_tuple})


def _facts(model: nn.Module, sites: LoraSites, depth: int, base: Mapping[str, Any]) -> dict[str, Any]:
    device = next(model.parameters()).device
    classes = {type(module) for module in model.modules()}
    own = (path for room in ROOMS for path in (Path(__file__).parents[1] / room).glob("*.py"))
    return {
        "base": {name: value for name, value in base.items() if name != "model"},  # its name, which computes nothing
        "modules": [(name, type(module).__qualname__) for name, module in model.named_modules()],
        "forwards": sorted((cls.__module__, cls.__qualname__, _code(cls.forward)) for cls in classes),
        "files": _hash_files([*own, *_sources(classes)]),
        "sites": {site: [list(shape), list(sites.modules[site])] for site, shape in sites.shapes.items()},
        "depth": depth,
        "processor": [platform.machine(), torch.backends.cpu.get_cpu_capability()],
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "peft": peft.__version__,
    }


def _is_changed(module: nn.Module) -> bool:
    """Return whether a module computes something else than its class and weights say."""
    hooked = any(getattr(module, hooks) for hooks in HOOKS)
    quantised = any(type(weight) is not nn.Parameter for weight in module._parameters.values() if weight is not None)
    return hooked or quantised or "forward" in vars(module)


def _code(function: Any) -> str:
    """Return a hash of a function, which may have been replaced since its file was read."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    return blake2b(repr(function).encode() if code is None else code.co_code, digest_size=16).hexdigest()


def _sources(classes: Iterable[type]) -> set[Path]:
    found = set()
    for cls in classes:
        with suppress(OSError, TypeError):  # of a notebook
            found.add(Path(inspect.getfile(cls)))
    return found


def _hash_files(paths: Iterable[Path]) -> str:
    found = blake2b(digest_size=16)
    for path in sorted(set(paths)):
        found.update(path.name.encode() + blake2b(path.read_bytes()).digest())
    return found.hexdigest()
