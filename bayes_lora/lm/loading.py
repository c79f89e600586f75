"""Load a causal LM with LoRA injected: a hub id, a local folder or a GGUF file."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from bayes_lora.errors import ConfigError
from bayes_lora.lm.adapters import (
    active_adapter,
    check_drawn,
    check_lora_config,
    load_adapter_weights,
    lora_layers,
    read_lora_config,
)
from bayes_lora.lm.arithmetic import LinearBackend, choose_arithmetic
from bayes_lora.lm.base_model import load_base, quantization_config, reading
from bayes_lora.lm.fingerprint import check_exported
from bayes_lora.lm.inject import check_layers, default_lora, inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.model_files import DEFAULT_MODEL, cache_folder
from bayes_lora.lm.offload import is_too_large, move
from bayes_lora.lm.onednn_linear import use_onednn
from bayes_lora.lm.sites import remove_dropout
from bayes_lora.utils.devices import is_gpu
from bayes_lora.utils.processes import default_device, from_main, join

__all__ = ["from_peft", "load_language_model"]


def load_language_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    lora_config: peft.LoraConfig | None = None,
    *,
    r: int | None = None,
    lora_alpha: int | None = None,
    layers_to_transform: Sequence[int] | int | None = None,
    top_layers: int | None = None,
    target_modules: Sequence[str] | None = None,
    adapter: str | Path | None = None,
    revision: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["float32", "bfloat16"] | None = None,
    linear_backend: LinearBackend | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    seed: int = 0,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> LanguageModel:
    """Load a causal LM, inject LoRA with PEFT, and make its LoRA weights bindable.

    The LoRA is defined by a ``lora_config``, by a saved ``adapter``, or by the arguments of
    :func:`bayes_lora.lm.inject.default_lora`: ``r``, ``lora_alpha``, ``layers_to_transform`` or ``top_layers``, and
    ``target_modules``.

    Args:
        name_or_path: a hub id, a local folder, or a GGUF file.
        lora_config: any PEFT LoRA configuration.
        r: rank, by default 8.
        lora_alpha: PEFT scales the update by ``lora_alpha / r``; by default ``2 r``.
        layers_to_transform: indices of the adapted layers, counted from the bottom.
        top_layers: alternatively, the number of adapted layers, counted from the top; by default 6.
        target_modules: names of module kinds (``q_proj``); by default see ``default_lora``.
        adapter: a LoRA adapter written by ``save_pretrained``: a folder or a hub id. Its weights are the initial values
            of the sites, ``lm.sites.initial()``, where guides start; see :func:`from_peft`. A folder written by
            :meth:`bayes_lora.TaskPosterior.export_peft` is refused on another base, revision or tokenizer.
        revision: branch, tag or commit of a hub id, for its configuration, tokenizer and weights; by default the main
            branch.
        device: by default a GPU if there is one; of several processes, the GPU of the local rank of this one.
        dtype: dtype of the base. By default bfloat16 on a GPU that supports it and on a CPU where it is measured to be
            at least 1.5 times as fast, otherwise float32. LoRA weights and scores have at least 32 bits.
        linear_backend: what computes the frozen float32 linear layers on a CPU: ``"torch"``, by its default, or
            ``"onednn"``. By default the faster one, measured once per machine (:mod:`bayes_lora.lm.arithmetic`).
        quantization: store the base's linear layers in 8 or 4 bits with bitsandbytes; alternatively, ``model_kwargs``
            may have a ``quantization_config``.
        seed: seed of PEFT's random initial A.
        model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (attention implementation). ``cache_dir``,
            ``token``, ``local_files_only`` and ``subfolder`` apply to the configuration and the tokenizer too. A
            ``device_map`` in place of ``device`` must put the whole model on one device. Python code that comes with a
            model runs only with ``{"trust_remote_code": True}``.
        **kwargs: passed to :class:`LanguageModel`: ``template``, ``max_length``, ``normalize``, ``token_budget``,
            ``cache_bytes``, ``gpu_cache_bytes``, ``offload_trunk``, ``gradient_checkpointing``; and ``cache_folder``,
            which by default is :func:`bayes_lora.lm.model_files.cache_folder`.

    Raises:
        ModelFileError: files cannot be found, downloaded or read, or the adapter does not match the model.
        SiteError: a target module is not in the model, or the adapter is not plain LoRA on linear modules.
        ModelError: the model is not a causal language model.
        ConfigError: a package is needed but not installed, or a setting is wrong or contradicts another.
        ProcessError: a launcher has started several processes, and one of them failed or was lost.
    """
    choice: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "layers_to_transform": layers_to_transform,
        "top_layers": top_layers,
        "target_modules": target_modules,
    }
    _check_choice(lora_config, adapter, [name for name, value in choice.items() if value is not None])
    check_layers(layers_to_transform, top_layers)
    options = dict(model_kwargs or {})
    if device is not None and options.get("device_map") is not None:
        raise ConfigError(
            f"device={str(device)!r} and model_kwargs={{'device_map': {options['device_map']!r}}}: both choose the "
            "device. Give one."
        )
    device = torch.device(device or default_device())
    join(device)  # which chooses the GPU of this process, before anything is put on it
    kwargs.setdefault("cache_folder", cache_folder())
    folder = None if kwargs["cache_folder"] is None else Path(kwargs["cache_folder"])
    quantized = quantization is not None or "quantization_config" in options
    choose = partial(choose_arithmetic, dtype, linear_backend, device, folder, quantized=quantized)
    # What a CPU does fastest is measured, so processes that measure would not all choose the same.
    dtype, backend = choose() if device.type == "cuda" else from_main(choose)
    for name in ("dtype", "torch_dtype"):
        if name in options:
            raise ConfigError(f"model_kwargs: {name} is the argument dtype= of load_language_model. Pass it there.")
    revision = _one_revision(revision, options.pop("revision", None))
    if quantization is not None:
        options["quantization_config"] = quantization_config(quantization, dtype)
    model, tokenizer = load_base(name_or_path, revision, dtype, options)
    source = None
    if adapter is not None:
        # An absolute path, so that a saved posterior finds the adapter from another folder.
        source = str(Path(adapter).expanduser().resolve()) if Path(adapter).expanduser().exists() else str(adapter)
        lora_config = _inject_adapter(source, model)
    else:
        lora_config = lora_config or default_lora(model, **choice)
        check_drawn(lora_config)
        inject(lora_config, model, seed=seed)
    offloads = kwargs.get("offload_trunk")
    offloads = is_too_large(model, device) if offloads is None else offloads and is_gpu(device)
    if options.get("device_map") is None:
        names = [layer for layer, _ in lora_layers(model, "default")] if offloads else []
        move(model, device, names)
    if backend == "onednn":
        use_onednn(model)
    name = str(name_or_path)
    lm = LanguageModel(model, tokenizer, lora_config, name=name, revision=revision, adapter=source, **kwargs)
    if source is not None:
        check_exported(Path(source), lm)
    return lm


def _one_revision(revision: str | None, of_model: str | None) -> str | None:
    if None not in (revision, of_model) and revision != of_model:
        raise ConfigError(
            f"revision={revision!r} and model_kwargs={{'revision': {of_model!r}}}: they differ. Give one."
        )
    return of_model if revision is None else revision


def from_peft(
    peft_model: peft.PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    adapter: str | None = None,
    name: str | None = None,
    **kwargs: Any,
) -> LanguageModel:
    """Make the LoRA weights of a ``PeftModel`` bindable, and use them as initial values for guides.

    The adapter's weights become the initial values of the sites, ``lm.sites.initial()``. With these bound, scores are
    those of ``peft_model``. With all B zero, and in ``lm.features``, they are those of the base model.

    The model is modified in place: its LoRA linears become slots, all its parameters are frozen, it is put into
    evaluation mode, and outside ``lm.sites.bind`` it runs without the adapter. Call ``peft_model.save_pretrained``
    before, or :meth:`bayes_lora.TaskPosterior.export_peft` after. The base model's weights do not change.
    ``lora_dropout`` is removed. Other adapters of the model are kept but inactive.

    Args:
        peft_model: a causal LM with a LoRA adapter, by ``peft.get_peft_model`` or ``peft.PeftModel.from_pretrained``.
        tokenizer: the tokenizer of the model.
        adapter: PEFT's name of the adapter; by default the active one.
        name: hub id or path of the base model, which is recorded in saved posteriors and exported adapters; by default
            the one of the adapter's configuration, and so is its ``revision``.
        **kwargs: as in :func:`load_language_model`.

    Raises:
        ConfigError: the model has no such adapter, or several are active.
        SiteError: the adapter is not plain LoRA on linear modules (DoRA, ``bias``, ``lora_bias``, ``modules_to_save``),
            or is merged or disabled.
    """
    adapter_name = active_adapter(peft_model, adapter)
    lora_config = check_lora_config(peft_model.peft_config[adapter_name])
    model = cast(PreTrainedModel, peft_model.get_base_model())
    remove_dropout(model, adapter_name)  # without the warning of find_sites, because dropout was set for training
    kwargs.setdefault("cache_folder", cache_folder())
    if name is None:
        kwargs.setdefault("revision", lora_config.revision)
    name = name or lora_config.base_model_name_or_path or str(model.name_or_path)
    return LanguageModel(model, tokenizer, lora_config, name=name, adapter_name=adapter_name, **kwargs)


def _check_choice(lora_config: object, adapter: object, given: Sequence[str]) -> None:
    whole = [name for name, value in (("lora_config", lora_config), ("adapter", adapter)) if value is not None]
    if whole and len([*whole, *given]) > 1:
        raise ConfigError(f"{', '.join([*whole, *given])}: {whole[0]} already defines the LoRA. Leave out the others.")


def _inject_adapter(adapter: str, model: PreTrainedModel) -> peft.LoraConfig:
    """Inject a saved adapter as PEFT's ``"default"``, and return its configuration."""
    with reading("adapter", adapter, Path(adapter)):
        lora_config = read_lora_config(adapter)
    inject(lora_config, model)
    with reading("adapter", adapter, Path(adapter)):
        load_adapter_weights(model, adapter)
    remove_dropout(model, "default")
    return lora_config
