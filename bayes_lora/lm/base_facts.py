"""All that determines what a base model computes from tokens, to find what was stored for the same model."""

from __future__ import annotations

import inspect
from hashlib import blake2b
from itertools import chain
from pathlib import Path
from typing import Any

import torch
import transformers
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from bayes_lora.lm.arithmetic import arithmetic_used
from bayes_lora.lm.text_config import computation_values

__all__ = ["base_facts"]

VERSION = 1
"""Changed with what is stored, so that tensors of former versions are not read."""

MULTIPLIER = 0x1E3779B97F4A7C15
"""An odd number whose products with the odd numbers have their bits well mixed."""
CHUNK = 1 << 17
"""Number of values whose products are in memory at once: 1 MiB, which the cache of a core holds."""


def base_facts(model: Any, name: str) -> dict[str, Any]:
    """Return the facts as JSON values.

    Args:
        model: the model; LoRA weights in it are left out.
        name: its hub id or path, which is shown to the user.
    """
    return {
        "model": name,
        "weights": _content(model),
        "config": computation_values(model.config),
        "class": f"{type(model).__module__}.{type(model).__qualname__}",
        "code": _code(type(model)),
        "attention": str(getattr(model.config, "_attn_implementation", None)),
        "dtype": str(model.dtype),
        "linear_backend": arithmetic_used(model).linear_backend,
        "device": model.device.type,
        "versions": {"format": VERSION, "torch": torch.__version__, "transformers": transformers.__version__},
    }


def _code(cls: type) -> str | None:
    """Return a hash of the file of a class that is not transformers' own."""
    if cls.__module__.startswith("transformers.models."):
        return None
    try:
        return blake2b(Path(inspect.getfile(cls)).read_bytes(), digest_size=16).hexdigest()
    except (OSError, TypeError):  # of a notebook
        return None


@torch.no_grad()
def _content(model: nn.Module) -> str:
    """Return a hash of all weights and buffers: their names, shapes, dtypes, and the sums of their rows' bits."""
    found = blake2b(digest_size=16)
    adapter = [f".{part}." for part in (*LoraLayer.adapter_layer_names, *LoraLayer.other_param_names)]
    values = {**model.state_dict(), **dict(chain(model.named_parameters(), model.named_buffers()))}
    for name, value in values.items():
        if isinstance(value, Tensor) and not any(part in f".{name}." for part in adapter):
            facts = name.replace(".base_layer.", "."), tuple(value.shape), value.dtype
            found.update(repr(facts).encode() + _row_sums(value).cpu().numpy().tobytes())
    return found.hexdigest()


def _row_sums(value: Tensor) -> Tensor:
    """Return sums of the bits of each row, weighted by position, as integers modulo 2^64.

    They do not depend on the order of summation, so that they are equal for any number of threads.
    """
    # Eight bytes as two numbers: of 64 bits, the highest would be lost where two of them change.
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int32}
    if value.numel() == 0:
        return torch.zeros(0, dtype=torch.int64)
    rows = value.detach().reshape(len(value) if value.ndim > 1 else 1, -1).contiguous()
    bits = rows.view(kinds[rows.dtype.itemsize])
    weights = (2 * torch.arange(bits.shape[1], device=bits.device) + 1) * MULTIPLIER
    parts = bits.split(max(1, CHUNK // bits.shape[1]))
    return torch.cat([(part.to(torch.int64) * weights).sum(-1) for part in parts])
