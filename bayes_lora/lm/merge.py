"""The language model with values of its LoRA sites merged into its weights, as a folder of transformers."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor

from bayes_lora.errors import ConfigError, ModelFileError
from bayes_lora.lm.adapters import lora_layers
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.plain_adapter import check_unmerged
from bayes_lora.types import Sites
from bayes_lora.utils.storage import writing

__all__ = ["check_mergeable", "merged_weights", "save_merged"]


def check_mergeable(lm: LanguageModel) -> None:
    """Check that LoRA can be merged into the weights of a base model.

    Raises:
        ConfigError: they are quantised.
        SiteError: an adapter is merged already.
    """
    check_unmerged(lm)
    method = _quantization(lm)
    if method is not None:
        raise ConfigError(
            f"merge: expected a base model that is not quantised, got {lm.name} in {method}. Serve the adapters "
            "instead, which servers add to a quantised base, or adapt with a language model that is not quantised."
        )


def _quantization(lm: LanguageModel) -> str | None:
    """Return how the base is quantised; None if it is not. The weights of a GGUF file are floating-point here."""
    quantizer: Any = getattr(lm.model, "hf_quantizer", None)
    if quantizer is not None:
        method = getattr(quantizer.quantization_config, "quant_method", "")
        if (name := str(getattr(method, "value", method))) != "gguf":
            return name or type(quantizer).__name__
    for parameter in lm.model.parameters():
        if not parameter.is_floating_point() or parameter.dtype.itemsize < 2:
            return f"{type(parameter).__name__} of {parameter.dtype}"
    return None


def merged_weights(lm: LanguageModel, values: Sites, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """Return the weights of the base with LoRA added, by their names before PEFT wrapped the layers.

    Weights that no LoRA changes are those of the language model, not copies, unless ``dtype`` differs.

    Args:
        lm: the language model, whose weights do not change.
        values: values ``(layers, out, in)`` of all sites.
        dtype: dtype of the weights; by default that of each.
    """
    found: dict[str, Tensor] = {}
    cast: dict[tuple[int, torch.Size], Tensor] = {}  # tied weights stay one tensor, which the file then has once
    for name, value in lm.model.state_dict().items():
        if any(f".{part}." in name for part in LoraLayer.adapter_layer_names):
            continue  # of other adapters; those of this one are bound
        if dtype is not None and value.is_floating_point():
            value = cast.setdefault((value.data_ptr(), value.shape), value.to(dtype))
        found[name.replace(".base_layer.", ".")] = value
    lora = {site: value for site, value in values.items() if site in lm.sites.shapes}
    with lm.sites.bind(lora), torch.no_grad():
        for name, layer in lora_layers(lm.model, lm.adapter_name):
            linear: Any = layer  # of PEFT's subclasses for linear modules, which have these members
            update: Tensor = linear.get_delta_weight(lm.adapter_name)
            base: Tensor = linear.get_base_layer().weight
            # Added in the wider dtype of the two, and rounded once.
            whole = base.to(torch.promote_types(base.dtype, update.dtype)) + update
            found[f"{name}.weight"] = whole.to(found[f"{name}.weight"].dtype)
    return found


def save_merged(lm: LanguageModel, values: Sites, folder: Path, dtype: torch.dtype | None = None) -> None:
    """Write the merged model, its configurations and its tokenizer; ``AutoModelForCausalLM`` reads the folder.

    The language model stays as it is, and only the adapted weights are copied: the model that is saved has no weights
    of its own.

    Args:
        lm: the language model.
        values: see :func:`merged_weights`.
        folder: the folder.
        dtype: see :func:`merged_weights`.

    Raises:
        ConfigError, SiteError: see :func:`check_mergeable`.
        ModelFileError: transformers refuses to save the model.
    """
    check_mergeable(lm)
    config = copy.deepcopy(lm.model.config)
    config.__dict__.pop("quantization_config", None)  # of a GGUF file
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        skeleton: Any = type(lm.model)(config)
    skeleton.to(dtype or lm.model.dtype)
    skeleton.generation_config = copy.deepcopy(lm.model.generation_config)
    with writing(folder):
        try:
            skeleton.save_pretrained(folder, state_dict=merged_weights(lm, values, dtype))
        except (ValueError, RuntimeError, NotImplementedError) as error:
            raise ModelFileError(f"'{lm.name}': transformers cannot save the merged model: {error}") from error
        lm.tokenizer.save_pretrained(folder)
        for file in folder.glob("*.safetensors"):  # which safetensors makes private
            file.chmod((folder / "config.json").stat().st_mode)
