"""Inject new LoRA into a model with PEFT: default configurations, and checks before the model is changed."""

from __future__ import annotations

import re
from collections.abc import Sequence

import peft
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel

from bayes_lora.errors import ConfigError, SiteError, did_you_mean
from bayes_lora.lm.adapters import check_lora_config, check_not_taken
from bayes_lora.lm.text_config import decoder_name, text_config
from bayes_lora.utils.seeding import seeded

__all__ = ["check_layers", "default_lora", "inject"]


def default_lora(
    model: PreTrainedModel,
    *,
    r: int | None = None,
    lora_alpha: int | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    top_layers: int | None = None,
    target_modules: Sequence[str] | None = None,
) -> peft.LoraConfig:
    """Make a LoRA configuration for a model.

    If only the top layers are adapted, the layers below run once per example (see :mod:`bayes_lora.lm.trunk`).

    Args:
        model: the model.
        r: rank, by default 8.
        lora_alpha: PEFT scales the update by ``lora_alpha / r``; by default ``2 r``.
        layers_to_transform: indices of the adapted layers, counted from the bottom.
        top_layers: alternatively, the number of adapted layers, counted from the top; by default 6.
        target_modules: by default PEFT's default modules and the attention's output projection, whose B writes into
            the residual stream.

    Raises:
        ConfigError: ``layers_to_transform`` and ``top_layers`` are both given, the model has no such layer, or
            ``target_modules`` is a text.
    """
    check_layers(layers_to_transform, top_layers)
    if isinstance(target_modules, str):
        raise ConfigError(
            f"target_modules: expected a list of names, got the text {target_modules!r}. Pass [{target_modules!r}], or "
            "a regular expression in a LoRA configuration: peft.LoraConfig(target_modules=...)."
        )
    if target_modules is None:
        target_modules = _usual_modules(model)
    count = int(text_config(model.config).num_hidden_layers)
    if layers_to_transform is None:
        layers = list(range(max(0, count - (6 if top_layers is None else top_layers)), count))
    else:
        layers = [layers_to_transform] if isinstance(layers_to_transform, int) else list(layers_to_transform)
    if not layers or not all(0 <= layer < count for layer in layers):
        raise ConfigError(f"layers_to_transform: expected some of the model's layers 0 to {count - 1}, got {layers}.")
    r = 8 if r is None else r
    return peft.LoraConfig(
        r=r,
        lora_alpha=2 * r if lora_alpha is None else lora_alpha,
        target_modules=None if target_modules is None else list(target_modules),
        exclude_modules=_outside_decoder(model),
        layers_to_transform=layers,
        task_type="CAUSAL_LM",
    )


def _usual_modules(model: PreTrainedModel) -> list[str] | None:
    names = [name for name, _ in model.named_modules()]
    kinds = {name.rpartition(".")[2] for name in names}
    known = (model.config.model_type, text_config(model.config).model_type)
    defaults = (TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(kind) for kind in known)
    usual = next((modules for modules in defaults if modules is not None), [])
    if isinstance(usual, str):  # a regular expression, as PEFT has it for some multimodal models
        usual = sorted({name.rpartition(".")[2] for name in names if re.fullmatch(usual, name)})
    return [*usual, *({"o_proj"} & kinds)] or None


def _outside_decoder(model: PreTrainedModel) -> str | None:
    """Return a regular expression of modules that text does not reach, such as a vision tower; None for no module."""
    prefix = decoder_name(model)
    return rf"(?!{re.escape(prefix)}\.).*" if prefix else None


def check_layers(layers_to_transform: object, top_layers: object) -> None:
    """Raise :class:`ConfigError` if both settings that choose layers are given."""
    if layers_to_transform is not None and top_layers is not None:
        raise ConfigError(
            f"layers_to_transform={layers_to_transform} and top_layers={top_layers}: both choose layers. Give one."
        )


def inject(lora: peft.LoraConfig, model: PreTrainedModel, *, seed: int = 0) -> None:
    """Inject LoRA in place, with PEFT's initial values drawn under ``seed``.

    Raises:
        SiteError: a target module is not in the model, the LoRA is not plain LoRA, or the model has an adapter.
    """
    check_lora_config(lora)
    check_not_taken(model)
    there = next((name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)), None)
    if there is not None:
        raise SiteError(
            f"module {there!r}: the model already has an adapter, which would change the base model. Load the model "
            "without it, or make the adapter the LoRA: from_peft(peft_model, tokenizer)."
        )
    _check_rank(lora, model)
    given = lora.target_modules  # PEFT replaces "all-linear" by names
    wanted = sorted(given) if isinstance(given, (set, list)) else []
    names = [name for name, _ in model.named_modules()]
    kinds = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())})
    # PEFT ignores names that match no module if another name matches one.
    unknown = [name for name in wanted if not any(f".{module}".endswith(f".{name}") for module in names)]
    if unknown:
        listed = ", ".join(f"{name!r}{did_you_mean(name, kinds)}" for name in unknown)
        raise SiteError(f"target_modules: the model has no module {listed}. It has {kinds}.")
    with seeded(seed, model.device):
        try:
            peft.inject_adapter_in_model(lora, model)
        except ValueError as error:
            raise SiteError(
                f"target_modules {wanted or lora.target_modules}: {error}. The model has {kinds}."
            ) from error
    if lora.target_parameters:  # PEFT finds weights there that were modules in older versions of transformers
        raise SiteError(
            f"target_modules {wanted or repr(given)}: PEFT adapts {sorted(lora.target_parameters)} for them, which are "
            f"parameters of experts or routers, not linear modules. Choose others of {kinds}."
        )


def _check_rank(lora: peft.LoraConfig, model: PreTrainedModel) -> None:
    """Refuse a rank that no matrix has, which may need more memory than there is."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = (module for module in model.modules() if module not in embeddings)
    sizes = (max(value.shape) for module in modules for value in module.parameters(recurse=False) if value.ndim == 2)
    largest, rank = max(sizes, default=None), max([lora.r, *(lora.rank_pattern or {}).values()])
    if largest is not None and rank > largest:
        raise SiteError(f"LoraConfig(r={rank}): the model's largest matrix has {largest} rows. Choose a smaller rank.")
