"""PEFT adapters: check that an adapter is supported, select one of a ``PeftModel``, and load a saved one."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any
from weakref import WeakSet

import peft
import torch
from peft.tuners.lora import LoraLayer
from safetensors import safe_open
from torch import Tensor, nn
from transformers import PreTrainedModel

from bayes_lora.errors import ConfigError, ModelFileError, SiteError, did_you_mean
from bayes_lora.lm.text_config import decoder_name
from bayes_lora.utils.reading import SHA256, digest_of

__all__ = [
    "TAKEN",
    "active_adapter",
    "check_adapted",
    "check_drawn",
    "check_injected",
    "check_lora_config",
    "check_not_taken",
    "check_unwrapped",
    "load_adapter_weights",
    "lora_layers",
    "read_lora_config",
]

BASE_CHANGING_INITS = ("corda", "loftq", "lora_ga", "olora", "pissa")
"""``init_lora_weights`` that subtract the initial update from the base weights."""
PLAIN_INITS = (True, False, "gaussian", "orthogonal", "eva")

PLAIN_SETTINGS = frozenset(
    {
        *("task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
        *("inference_mode", "r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "lora_dropout"),
        *("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication"),
        *("fan_in_fan_out", "init_lora_weights", "runtime_config"),
        # These have no effect unless another setting is refused.
        *("loftq_config", "eva_config", "corda_config", "lora_ga_config", "qalora_group_size", "megatron_core"),
        "ensure_weight_tying",
    }
)
"""Settings of plain LoRA. Any other one, such as those of later versions of PEFT, must have its default value."""

EXPORTED_SETTINGS = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "layers_to_transform")
"""Settings by which PEFT computes the updates of an exported adapter."""

TAKEN: WeakSet[LoraLayer] = WeakSet()
"""LoRA layers of existing language models. PEFT may replace their slots, so slots alone do not tell."""


def check_not_taken(model: nn.Module) -> None:
    """Check that no LoRA layer belongs to a language model, whose predictions another adapter would change.

    Raises:
        SiteError: a layer does.
    """
    for name, layer in model.named_modules():
        if layer in TAKEN:
            raise SiteError(f"module {name!r}: its LoRA already belongs to a LanguageModel. Load the model again.")


def check_unwrapped(model: object) -> None:
    """Check that a model is one of transformers, because a wrapper changes the names of modules, and so of exports.

    Raises:
        ConfigError: the model is a ``PeftModel``, compiled, distributed, or otherwise wrapped.
    """
    if isinstance(model, peft.PeftModel):
        cure = "Use from_peft(peft_model, tokenizer)"
    elif isinstance(model, PreTrainedModel):
        return
    else:
        cure = "Pass the model inside it"
    raise ConfigError(f"model: expected a transformers PreTrainedModel, got {type(model).__name__}. {cure}.")


def check_lora_config(config: peft.PeftConfig) -> peft.LoraConfig:
    """Return the configuration if it trains only LoRA factors of linear modules.

    The target modules are checked by :func:`bayes_lora.lm.sites.find_sites`.

    Raises:
        SiteError: it belongs to another PEFT method, or trains or changes weights outside the LoRA sites.
    """
    if not isinstance(config, peft.LoraConfig) or config.peft_type != peft.PeftType.LORA:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise SiteError(f"expected a LoRA adapter (peft.LoraConfig), got one of type {kind}.")
    for field in fields(config):
        value, default = getattr(config, field.name), _default(field)
        unset = value == default or (value in (False, [], {}, set()) and not default)
        if field.name not in PLAIN_SETTINGS and not unset:
            cure = f"Leave {field.name} out" if default is None else f"Set {field.name}={default!r}"
            raise SiteError(
                f"LoraConfig({field.name}={value!r}): only plain LoRA can be random, because its factors are the only "
                f"weights that are sampled. {cure}."
            )
    init = config.init_lora_weights
    if isinstance(init, str) and init.lower().startswith(BASE_CHANGING_INITS):
        raise SiteError(
            f"LoraConfig(init_lora_weights={init!r}): this changes the base weights. Use True or 'gaussian', or "
            "convert a trained adapter to plain LoRA (save_pretrained with path_initial_model_for_weight_conversion)."
        )
    if (init.lower() if isinstance(init, str) else init) not in PLAIN_INITS:
        raise SiteError(
            f"LoraConfig(init_lora_weights={init!r}): expected True, False, 'gaussian', 'orthogonal' or 'eva'."
        )
    return config


def check_injected(config: peft.LoraConfig, model: nn.Module, adapter_name: str) -> None:
    """Check that the adapter in a model was injected with this configuration, which is exported with its weights.

    Raises:
        ConfigError: settings that change its updates differ.
    """
    injected = getattr(model, "peft_config", {}).get(adapter_name, config)
    for name in EXPORTED_SETTINGS:
        given, there = getattr(config, name), getattr(injected, name)
        if given != there:
            raise ConfigError(
                f"lora_config: its {name} is {given!r}, but adapter {adapter_name!r} was injected with {there!r}. Pass "
                "the configuration that it was injected with."
            )


def check_adapted(model: Any, adapted: Sequence[str]) -> None:
    """Check that modules are inside the text decoder, and not the LM head.

    Raises:
        SiteError: one is not.
    """
    head, prefix = model.get_output_embeddings(), decoder_name(model)
    if any(module is head for name, module in model.named_modules() if name in adapted):
        raise SiteError("LoRA on the LM head cannot be random: its input is answer positions, not the rows of a draw.")
    outside = next((name for name in adapted if prefix and not name.startswith(f"{prefix}.")), None)
    if outside is not None:
        raise SiteError(
            f"module {outside!r}: text does not reach it, because it is outside the decoder {prefix!r}, so LoRA on it "
            f"has no effect. Set exclude_modules='(?!{prefix}.).*'."
        )


def check_drawn(config: peft.LoraConfig) -> None:
    """Check that PEFT draws the initial values of a new adapter when it is injected.

    Raises:
        SiteError: they are computed from data.
    """
    if config.init_lora_weights == "eva":
        raise SiteError(
            "LoraConfig(init_lora_weights='eva'): PEFT computes these values from data. Use True or 'gaussian', or "
            "call peft.initialize_lora_eva_weights, then from_peft(peft_model, tokenizer)."
        )


def _default(field: Field[Any]) -> Any:
    return field.default if field.default_factory is MISSING else field.default_factory()


def lora_layers(model: nn.Module, adapter_name: str) -> Iterator[tuple[str, LoraLayer]]:
    """Yield names and layers that have this adapter, in the order of ``model.named_modules()``."""
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and adapter_name in layer.r:
            yield name, layer


def active_adapter(model: peft.PeftModel, adapter_name: str | None = None) -> str:
    """Return the name of the adapter that becomes the LoRA sites, and activate it.

    Args:
        model: a model with one active adapter; others may be loaded.
        adapter_name: name of the adapter; by default the active one.

    Raises:
        ConfigError: there is no such adapter, or several are active.
        SiteError: the adapter is not plain LoRA, it is merged, disabled or scaled, or the model already belongs to a
            language model.
    """
    if not isinstance(model, peft.PeftModel):
        raise ConfigError(f"expected a peft.PeftModel, got {type(model).__name__}.")
    check_not_taken(model.get_base_model())
    active = list(model.active_adapters)
    if adapter_name is not None and adapter_name not in model.peft_config:
        near = did_you_mean(adapter_name, model.peft_config, list_all=True)
        raise ConfigError(f"adapter {adapter_name!r}: the PeftModel has no such adapter{near}.")
    if len(active) != 1:
        one = adapter_name or next(iter(model.peft_config))
        raise ConfigError(
            f"expected one active adapter, got {active}. Choose one first: peft_model.set_adapter({one!r})."
        )
    name = adapter_name or active[0]
    config = check_lora_config(model.peft_config[name])
    for module, layer in model.get_base_model().named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        if layer.merged:
            raise SiteError(f"module {module!r}: {layer.merged_adapters} are merged. Call unmerge_adapter() first.")
        if layer.disable_adapters:
            raise SiteError(f"module {module!r}: its adapters are disabled. Enable them first.")
        if name in layer.r:
            usual = layer.lora_alpha[name] / (math.sqrt(layer.r[name]) if config.use_rslora else layer.r[name])
            if not math.isclose(layer.scaling[name], usual):
                raise SiteError(
                    f"module {module!r}: expected lora_alpha's scaling {usual:g}, got {layer.scaling[name]:g}. Undo "
                    "set_scale() first."
                )
    model.set_adapter(name)
    return name


def read_lora_config(adapter: str | Path) -> peft.LoraConfig:
    """Read the configuration of a saved adapter.

    Args:
        adapter: a folder that ``save_pretrained`` wrote, or a hub id.

    Raises:
        SiteError: see :func:`check_lora_config`.
    """
    return check_lora_config(peft.PeftConfig.from_pretrained(str(adapter)))


def load_adapter_weights(model: PreTrainedModel, adapter: str | Path) -> None:
    """Load the weights of a saved adapter into the injected ``"default"`` adapter.

    They have at least 32 bits, whatever the dtype of the base model.

    Raises:
        ModelFileError: weights of adapted modules are missing or not finite, or there are weights of other modules.
    """
    for _, layer in lora_layers(model, "default"):
        for factors in (layer.lora_A, layer.lora_B):
            factor: Any = factors["default"]
            factor.to(torch.promote_types(factor.weight.dtype, torch.float32))
    weights = peft.load_peft_weights(str(adapter), device=str(model.device))
    _check_digest(Path(adapter).expanduser() / "adapter_model.safetensors", weights)
    broken = next((name for name, value in weights.items() if not bool(value.isfinite().all())), None)
    if broken is not None:
        raise ModelFileError(f"'{adapter}': {broken} has NaN or infinite values. Train or save the adapter again.")
    named = {name.removeprefix("base_model.model."): value for name, value in weights.items()}
    result: Any = peft.set_peft_model_state_dict(model, named)
    missing = sorted(name for name in result.missing_keys if ".lora_" in name)
    for names, problem in ((missing, "are missing"), (sorted(result.unexpected_keys), "match no adapted module")):
        if names:
            raise ModelFileError(
                f"'{adapter}': {len(names)} weights {problem}, such as {names[0]}. Was it trained on another model?"
            )


def _check_digest(path: Path, weights: Mapping[str, Tensor]) -> None:
    """Compare weights with the SHA-256 that ``export_peft`` wrote into their file's header, if it did."""
    if not path.is_file():
        return  # of the hub, or pickled
    with safe_open(path, framework="pt") as file:
        expected = (file.metadata() or {}).get(SHA256)
    if expected is not None and digest_of(weights) != expected:
        raise ModelFileError(f"'{path}' is damaged: its weights have another SHA-256 than its header. Export it again.")
