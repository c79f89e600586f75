"""Load a causal LM with LoRA injected: a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import peft
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bayes_lora.errors import BayesLoraError, ConfigError, ModelError, ModelFileError, SiteError, did_you_mean
from bayes_lora.lm.adapters import (
    active_adapter,
    check_lora_config,
    check_not_taken,
    load_adapter_weights,
    read_lora_config,
)
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.model_files import DEFAULT_MODEL, cache_folder, find_model
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER
from bayes_lora.lm.sites import remove_dropout
from bayes_lora.lm.text_config import text_config
from bayes_lora.utils.seeding import seeded

__all__ = ["default_dtype", "default_lora", "from_peft", "inject", "load_language_model", "reading"]


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
    _check_layers(layers_to_transform, top_layers)
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
    if text_config(model.config) is model.config:
        return None
    decoder = model.get_decoder()
    prefix = next((name for name, module in model.named_modules() if module is decoder), "")
    return rf"(?!{re.escape(prefix)}\.).*" if prefix else None


def _check_layers(layers_to_transform: object, top_layers: object) -> None:
    if layers_to_transform is not None and top_layers is not None:
        raise ConfigError(
            f"layers_to_transform={layers_to_transform} and top_layers={top_layers}: both choose layers. Give one."
        )


def default_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 on a GPU that supports it, otherwise float32.

    On CPUs bfloat16 is slower: by 25 % on one with AVX512-BF16, by a factor of more than 50 on one without AVX2.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _dtype(dtype: object, device: torch.device) -> torch.dtype:
    named = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    found = default_dtype(device) if dtype is None else named.get(dtype, dtype) if isinstance(dtype, str) else dtype
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"dtype: expected a torch.dtype, 'float32' or 'bfloat16', got {dtype!r}.")
    return found


def _quantization(bits: Literal["8bit", "4bit"], dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {bits!r} needs bitsandbytes. Install it: pip install 'bayes-lora[quantized]'")
    if bits == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # With the default threshold some columns of the batch stay in 16 bits, and scores depend on the other rows.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


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
    quantization: Literal["8bit", "4bit"] | None = None,
    seed: int = 0,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> LanguageModel:
    """Load a causal LM, inject LoRA with PEFT, and make its LoRA weights bindable.

    The LoRA is defined by a ``lora_config``, by a saved ``adapter``, or by the arguments of :func:`default_lora`:
    ``r``, ``lora_alpha``, ``layers_to_transform`` or ``top_layers``, and ``target_modules``.

    Args:
        name_or_path: a hub id, a local folder, or a GGUF file.
        lora_config: any PEFT LoRA configuration.
        r: rank, by default 8.
        lora_alpha: PEFT scales the update by ``lora_alpha / r``; by default ``2 r``.
        layers_to_transform: indices of the adapted layers, counted from the bottom.
        top_layers: alternatively, the number of adapted layers, counted from the top; by default 6.
        target_modules: names of module kinds (``q_proj``); by default see :func:`default_lora`.
        adapter: a LoRA adapter written by ``save_pretrained``: a folder or a hub id. Its weights are the initial values
            of the sites, ``lm.sites.initial()``, where guides start; see :func:`from_peft`.
        revision: branch, tag or commit of a hub id, for its configuration, tokenizer and weights; by default the main
            branch.
        device: by default a GPU if there is one.
        dtype: dtype of the base; by default :func:`default_dtype`. LoRA weights and scores have at least 32 bits.
        quantization: store the base's linear layers in 8 or 4 bits with bitsandbytes; alternatively, ``model_kwargs``
            may have a ``quantization_config``.
        seed: seed of PEFT's random initial A.
        model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (attention implementation). Python code that
            comes with a model runs only with ``{"trust_remote_code": True}``.
        **kwargs: passed to :class:`LanguageModel`: ``template``, ``max_length``, ``normalize``, ``token_budget``,
            ``cache_bytes``, ``cache_folder``, ``gradient_checkpointing``; and ``token_folder``, which by default is
            ``tokens`` in the folder of :func:`bayes_lora.lm.model_files.cache_folder`.

    Raises:
        ModelFileError: files cannot be found, downloaded or read, or the adapter does not match the model.
        SiteError: a target module is not in the model, or the adapter is not plain LoRA on linear modules.
        ModelError: the model is not a causal language model.
        ConfigError: a package is needed but not installed, or a setting is wrong or contradicts another.
    """
    choice: dict[str, Any] = {
        "r": r,
        "lora_alpha": lora_alpha,
        "layers_to_transform": layers_to_transform,
        "top_layers": top_layers,
        "target_modules": target_modules,
    }
    _check_choice(lora_config, adapter, [name for name, value in choice.items() if value is not None])
    _check_layers(layers_to_transform, top_layers)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype, options = _dtype(dtype, device), dict(model_kwargs or {})
    for name in ("dtype", "torch_dtype"):
        if name in options:
            raise ConfigError(f"model_kwargs: {name} is the argument dtype= of load_language_model. Pass it there.")
    revision = _one_revision(revision, options.pop("revision", None))
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, dtype)
    model, tokenizer = _load_base(name_or_path, revision, dtype, options)
    source = None
    if adapter is not None:
        # An absolute path, so that a saved posterior finds the adapter from another folder.
        source = str(Path(adapter).expanduser().resolve()) if Path(adapter).expanduser().exists() else str(adapter)
        lora_config = _inject_adapter(source, model)
    else:
        lora_config = lora_config or default_lora(model, **choice)
        inject(lora_config, model, seed=seed)
    model.to(device)  # type: ignore[arg-type]
    kwargs.setdefault("token_folder", cache_folder() / "tokens")
    name = str(name_or_path)
    return LanguageModel(model, tokenizer, lora_config, name=name, revision=revision, adapter=source, **kwargs)


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
    kwargs.setdefault("token_folder", cache_folder() / "tokens")
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


def _load_base(
    name_or_path: str | Path, revision: str | None, dtype: torch.dtype, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    found = find_model(name_or_path, revision=revision)
    if (found / "adapter_config.json").is_file():
        raise ModelFileError(
            f"'{found}': transformers would load the adapter in it (adapter_config.json) into the base model. Move the "
            "adapter's files to another folder, and pass that folder as adapter= to start at the adapter."
        )
    # Without a value, transformers asks on the terminal whether to run code that comes with the model.
    source, options = str(found), {"trust_remote_code": False, **model_kwargs}
    if isinstance(found, Path) and found.suffix == ".gguf":
        source, options["gguf_file"] = str(found.parent), found.name
    shared = {key: value for key, value in options.items() if key in ("gguf_file", "trust_remote_code")}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # mismatched weights raise an error below
    gguf = "gguf_file" in options
    with reading("config.json", name_or_path, found, revision):
        if not gguf:  # the settings of a GGUF file are read with its tokenizer
            _check_causal(AutoConfig.from_pretrained(source, **shared), found)
    with reading("file" if gguf else "tokenizer", name_or_path, found, revision):
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    with reading("weights", name_or_path, found, revision, model_kwargs):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise ModelFileError(
            f"'{found}': {len(wrong)} weights are missing or have another shape than config.json says, such as "
            f"{wrong[0]}. {_cure('weights', name_or_path, found, revision)}"
        )
    return model, tokenizer


def _check_causal(config: Any, found: Path) -> None:
    own_class = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})  # code that comes with the model
    if config.is_encoder_decoder or not (own_class or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING):
        kind = "an encoder-decoder" if config.is_encoder_decoder else "not a causal language model"
        raise ModelError(
            f"'{found}': expected a causal language model (AutoModelForCausalLM), but {config.model_type!r} is {kind}. "
            "Choose a decoder-only model."
        )


@contextmanager
def reading(
    part: str,
    name_or_path: str | Path,
    found: Path,
    revision: str | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
) -> Iterator[None]:
    """Convert any error that transformers raises for damaged files into a one-line error with a remedy.

    Args:
        part: the part of the model that is read.
        name_or_path: hub id or path, as the user gave it.
        found: folder or file that is read.
        revision: revision of a hub id.
        model_kwargs: the user's arguments of ``from_pretrained``, which may be the cause.

    Raises:
        ConfigError: a package is missing.
        ModelFileError: any other error.
    """
    chosen = f"{', '.join(model_kwargs)} in model_kwargs" if model_kwargs else ""
    try:
        yield
    except (BayesLoraError, MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        if isinstance(error, ImportError):
            other = f", or change {chosen}" if chosen else ""
            raise ConfigError(
                f"'{found}': the {part} cannot be read ({reason}). Install the package that is missing{other}."
            ) from error
        if "trust_remote_code" in str(error):
            raise ModelFileError(
                f"'{found}': the {part} needs Python code that comes with the model. Inspect it; to run it, pass "
                "model_kwargs={'trust_remote_code': True} to load_language_model."
            ) from error
        cure = _cure(part, name_or_path, found, revision)
        # Files are whole more often than arguments are right.
        cure = f"Check {chosen}. Otherwise: {cure[0].lower()}{cure[1:]}" if chosen else cure
        raise ModelFileError(f"'{found}': the {part} cannot be read ({reason}). {cure}") from error


def _cure(part: str, name_or_path: str | Path, found: Path, revision: str | None = None) -> str:
    if part == "adapter":
        return "Expected adapter_config.json and adapter_model.safetensors of a LoRA on this model. Save it again."
    if found.name == CONVERTED_FOLDER:
        return "Delete this folder, then run: bayes-lora fetch"
    if not Path(name_or_path).expanduser().exists():
        option = "" if revision is None else f" --revision {revision}"
        return f"Download it again: hf download --force-download {name_or_path}{option}"
    if part == "tokenizer" and found.is_dir():
        return "Put the model's tokenizer.json and tokenizer_config.json there, or copy the model again."
    return "Copy or save the model again."


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
    wanted = sorted(lora.target_modules) if isinstance(lora.target_modules, (set, list)) else []
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


def _check_rank(lora: peft.LoraConfig, model: PreTrainedModel) -> None:
    """Refuse a rank that no matrix has, which may need more memory than there is."""
    embeddings = (model.get_input_embeddings(), model.get_output_embeddings())
    modules = (module for module in model.modules() if module not in embeddings)
    sizes = (max(value.shape) for module in modules for value in module.parameters(recurse=False) if value.ndim == 2)
    largest, rank = max(sizes, default=None), max([lora.r, *(lora.rank_pattern or {}).values()])
    if largest is not None and rank > largest:
        raise SiteError(f"LoraConfig(r={rank}): the model's largest matrix has {largest} rows. Choose a smaller rank.")
