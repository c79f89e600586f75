"""Values of the LoRA sites as a plain PEFT adapter, in the form that inference servers read.

Servers such as vLLM read fewer settings than PEFT does. Some read ``r`` and ``lora_alpha`` alone, and would scale a
module with a rank or an alpha of its own wrongly. An adapter is therefore written with one rank and a scaling of 1:
each module's own scaling is multiplied into its B, and factors of a smaller rank are padded with zeros. Which modules
are adapted is said by the names of the tensors; settings of layers and modules are for PEFT.

Other servers (TGI, LoRAX) leave out all modules of a kind, without a message, if one layer has none. For them the
modules of the layers that are not adapted are written too, as zeros (``all_layers``).
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
from transformers.pytorch_utils import Conv1D

from bayes_lora.errors import ConfigError, PosteriorError, SiteError
from bayes_lora.lm.adapters import lora_layers
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.types import Sites
from bayes_lora.utils.storage import make_folder, write_json, write_tensors

__all__ = ["check_unmerged", "common_rank", "dtype_named", "plain_config", "plain_tensors", "write_plain_adapter"]

CONFIG, TENSORS = "adapter_config.json", "adapter_model.safetensors"

LAYER = r"\.(\d+)\."
"""What the number of a layer looks like in the name of a module."""

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


def write_plain_adapter(
    lm: LanguageModel, values: Sites, folder: Path, dtype: torch.dtype, *, all_layers: bool = False
) -> None:
    """Write values ``(layers, out, in)`` of all sites as an adapter's two files into a new folder.

    Raises:
        PosteriorError: see :func:`plain_tensors`.
        RunFolderError: the folder cannot be written.
    """
    make_folder(folder)
    write_tensors(folder / TENSORS, plain_tensors(lm, values, dtype, all_layers=all_layers), {"format": "pt"})
    write_json(folder / CONFIG, plain_config(lm, all_layers=all_layers))


def plain_tensors(
    lm: LanguageModel, values: Sites, dtype: torch.dtype, *, all_layers: bool = False
) -> dict[str, Tensor]:
    """Return the tensors of an adapter of rank r: ``(r, in)`` for A and ``(out, r)`` for B, whose scaling is 1.

    Args:
        lm: the language model.
        values: values ``(layers, out, in)`` of all sites; those of an option head are left out.
        dtype: dtype of the tensors.
        all_layers: whether to add zeros for the same modules of all other layers.

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
    for name, (out, into) in _others(lm).items() if all_layers else ():
        found[f"base_model.model.{name}.lora_A.weight"] = torch.zeros(rank, into, dtype=dtype)
        found[f"base_model.model.{name}.lora_B.weight"] = torch.zeros(out, rank, dtype=dtype)
    return found


def plain_config(lm: LanguageModel, *, all_layers: bool = False) -> dict[str, Any]:
    """Return the values of ``adapter_config.json``, only those that every version of PEFT and every server knows."""
    rank, names = common_rank(lm), _adapted(lm)
    targets, layers = _targets(lm, names | _others(lm).keys() if all_layers else names)
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
        "fan_in_fan_out": any(
            getattr(layer, "fan_in_fan_out", False) for _, layer in lora_layers(lm.model, lm.adapter_name)
        ),
        "bias": "none",
        "modules_to_save": None,
        "init_lora_weights": True,
    }


def _adapted(lm: LanguageModel) -> set[str]:
    return {name for name, _ in lora_layers(lm.model, lm.adapter_name)}


def _others(lm: LanguageModel) -> dict[str, tuple[int, int]]:
    """Return the modules of other layers at the places of the adapted ones, with their sizes (out, in)."""
    adapted = _adapted(lm)
    places = {_place(name) for name in adapted}
    found: dict[str, tuple[int, int]] = {}
    for name in _modules(lm.model):
        if name not in adapted and _place(name) in places:
            module: Any = lm.model.get_submodule(name)
            if isinstance(module, Conv1D):
                found[name] = (module.nf, module.nx)
            else:
                found[name] = (module.out_features, module.in_features)
    return found


def _place(name: str) -> str:
    """Return the name of a module without the number of its layer."""
    return re.sub(LAYER, ".*.", name, count=1)


def _targets(lm: LanguageModel, names: set[str]) -> tuple[list[str], list[int] | None]:
    """Return names of modules and indices of layers by which PEFT finds the modules of these names, and no others.

    Names of kinds (``q_proj``) if they do; otherwise the whole names of all modules.
    """
    kinds = sorted({name.rpartition(".")[2] for name in names})
    numbers = {re.search(LAYER, name) for name in names}
    layers = sorted({int(number[1]) for number in numbers if number})
    for indices in (None, layers):
        config = peft.LoraConfig(target_modules=kinds, layers_to_transform=indices)
        if {name for name in _modules(lm.model) if check_target_module_exists(config, name)} == names:
            return kinds, indices
    return sorted(names), None


def _modules(model: nn.Module) -> Iterator[str]:
    """Yield the names of all modules as they were before PEFT wrapped some."""
    wrapped = ""
    for name, module in model.named_modules():
        if wrapped and name.startswith(wrapped):
            continue
        wrapped = f"{name}." if isinstance(module, LoraLayer) else ""
        yield name
