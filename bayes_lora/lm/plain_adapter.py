"""Values of the LoRA sites as a plain PEFT adapter, in the form that inference servers read.

Servers such as vLLM read fewer settings than PEFT does. Some read ``r`` and ``lora_alpha`` alone, and would scale a
module with a rank or an alpha of its own wrongly; none needs ``layers_to_transform`` or ``exclude_modules``, because the
names of the tensors say which modules are adapted. An adapter is therefore written with one rank and a scaling of 1:
each module's own scaling is multiplied into its B, and factors of a smaller rank are padded with zeros.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft
import torch
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import check_target_module_exists
from torch import Tensor, nn

from bayes_lora.errors import ConfigError, PosteriorError, SiteError
from bayes_lora.lm.adapters import lora_layers
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.types import Sites
from bayes_lora.utils.storage import write_json, write_tensors

__all__ = ["check_unmerged", "common_rank", "dtype_named", "plain_config", "plain_tensors", "write_plain_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def dtype_named(name: str | torch.dtype | None, default: torch.dtype) -> torch.dtype:
    """Return the dtype of a name.

    Raises:
        ConfigError: there is no such dtype for files.
    """
    found = default if name is None else DTYPES.get(str(name).removeprefix("torch."))
    if found is None:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {name!r}.")
    return found


def check_unmerged(lm: LanguageModel) -> None:
    """Check that the base model's weights are its own.

    Raises:
        SiteError: an adapter is merged into them.
    """
    for name, layer in lm.model.named_modules():
        if isinstance(layer, LoraLayer) and layer.merged:
            raise SiteError(f"module {name!r}: {layer.merged_adapters} are merged. Call unmerge_adapter() first.")


def common_rank(lm: LanguageModel) -> int:
    """Return the largest rank of the adapted modules."""
    return max(shape[1] for site, shape in lm.sites.shapes.items() if ".lora_A" in site)


def write_plain_adapter(lm: LanguageModel, values: Sites, folder: Path, dtype: torch.dtype) -> None:
    """Write values ``(layers, out, in)`` of all sites as an adapter's two files into a new folder.

    Raises:
        PosteriorError: see :func:`plain_tensors`.
        RunFolderError: the folder exists, or cannot be written.
    """
    folder.mkdir()
    write_tensors(folder / TENSORS, plain_tensors(lm, values, dtype), {"format": "pt"})
    write_json(folder / CONFIG, plain_config(lm))


def plain_tensors(lm: LanguageModel, values: Sites, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the tensors of an adapter of rank r: ``(r, in)`` for A and ``(out, r)`` for B, whose scaling is 1.

    Args:
        lm: the language model.
        values: values ``(layers, out, in)`` of all sites; those of an option head are left out.
        dtype: dtype of the tensors.

    Raises:
        PosteriorError: a value is not finite, or not in this dtype.
    """
    scalings = {name: layer.scaling[lm.adapter_name] for name, layer in lora_layers(lm.model, lm.adapter_name)}
    rank, found = common_rank(lm), {}
    for name, value in lm.sites.unstack(values).items():
        module, _, factor = name.rpartition(".")
        if factor == "lora_A":
            padded = nn.functional.pad(value, (0, 0, 0, rank - len(value)))
        else:
            padded = nn.functional.pad(scalings[module] * value, (0, rank - value.shape[1]))
        found[f"base_model.model.{name}.weight"] = written = padded.to(dtype)
        if not bool(written.isfinite().all()):
            cure = "Use float32 or bfloat16" if bool(padded.isfinite().all()) else "Fit and adapt again"
            raise PosteriorError(f"{name}: expected finite values in {dtype}, got infinite ones or NaN. {cure}.")
    return found


def plain_config(lm: LanguageModel) -> dict[str, Any]:
    """Return the values of ``adapter_config.json``, only those that every version of PEFT and every server knows."""
    rank = common_rank(lm)
    targets, layers = _targets(lm)
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": lm.name,
        "revision": lm.revision,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "target_modules": targets,
        "layers_to_transform": layers,
        "fan_in_fan_out": any(layer.fan_in_fan_out for _, layer in lora_layers(lm.model, lm.adapter_name)),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _targets(lm: LanguageModel) -> tuple[list[str], list[int] | None]:
    """Return names of modules and indices of layers by which PEFT finds the adapted modules, and no others.

    Names of kinds (``q_proj``) if they do; otherwise the whole names of all modules.
    """
    adapted = {name for name, _ in lora_layers(lm.model, lm.adapter_name)}
    kinds = sorted({name.rpartition(".")[2] for name in adapted})
    numbers = {re.search(r"\.(\d+)\.", name) for name in adapted}
    layers = sorted({int(number[1]) for number in numbers if number})
    for indices in (None, layers):
        config = peft.LoraConfig(target_modules=kinds, layers_to_transform=indices)
        if {name for name in _modules(lm.model) if check_target_module_exists(config, name)} == adapted:
            return kinds, indices
    return sorted(adapted), None


def _modules(model: nn.Module) -> Iterator[str]:
    """Yield the names of all modules as they were before PEFT wrapped some."""
    wrapped = ""
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        wrapped = f"{name}." if isinstance(module, LoraLayer) else ""
        yield name
