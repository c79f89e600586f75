"""Load a causal LM with LoRA injected: a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import peft
import torch
from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from bayes_lora.errors import ConfigError, ModelFileError, SiteError, did_you_mean
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.model_files import DEFAULT_MODEL, cache_folder, find_model
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER
from bayes_lora.utils.seeding import seeded

__all__ = ["default_dtype", "default_lora", "inject", "load_language_model", "reading"]


def default_lora(
    model: PreTrainedModel, *, rank: int = 8, top_layers: int = 6, target_modules: Sequence[str] | None = None
) -> peft.LoraConfig:
    """LoRA of rank r on the top layers, ``lora_alpha = 2 r``.

    By default on the modules that PEFT adapts by default and the attention's output projection, whose B writes into
    the residual stream. Adapting the top layers only lets everything below them run once per example (see
    :mod:`bayes_lora.lm.trunk`).
    """
    if target_modules is None:
        kinds = {name.rpartition(".")[2] for name, _ in model.named_modules()}
        usual = TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(model.config.model_type, [])
        target_modules = [*usual, *({"o_proj"} & kinds)] or None
    layers = model.config.num_hidden_layers
    return peft.LoraConfig(
        r=rank,
        lora_alpha=2 * rank,
        target_modules=None if target_modules is None else list(target_modules),
        layers_to_transform=list(range(max(0, layers - top_layers), layers)),
        task_type="CAUSAL_LM",
    )


def default_dtype(device: torch.device) -> torch.dtype:
    """bfloat16 on a GPU that computes in it, else float32.

    On CPUs bfloat16 is slower: by a quarter on one with AVX512-BF16, more than fiftyfold on one without AVX2.
    """
    fast = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if fast else torch.float32


def _quantization(bits: Literal["8bit", "4bit"], dtype: torch.dtype) -> BitsAndBytesConfig:
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {bits!r} needs bitsandbytes. Install it: pip install 'bayes-lora[quantized]'")
    if bits == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # Above its usual threshold whole columns of the batch stay in 16 bits, and a row's scores depend on its company.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def load_language_model(
    name_or_path: str | Path = DEFAULT_MODEL,
    lora: peft.LoraConfig | None = None,
    *,
    rank: int = 8,
    top_layers: int = 6,
    target_modules: Sequence[str] | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | Literal["float32", "bfloat16"] | None = None,
    quantization: Literal["8bit", "4bit"] | None = None,
    seed: int = 0,
    model_kwargs: dict[str, Any] | None = None,
    **kwargs: Any,
) -> LanguageModel:
    """Load a causal LM, inject LoRA with PEFT, and make its LoRA weights bindable.

    Args:
        name_or_path: a hub id, a local folder, or a GGUF file.
        lora: any PEFT LoRA configuration; where it is None, :func:`default_lora` makes one from the next three.
        rank: r.
        top_layers: how many layers, counted from the top, are adapted.
        target_modules: names of module kinds (``q_proj``); by default see :func:`default_lora`.
        device: by default a GPU if there is one.
        dtype: of the base; by default :func:`default_dtype`. LoRA weights and scores have at least 32 bits.
        quantization: store the base's linear layers in 8 or 4 bits through bitsandbytes; ``model_kwargs`` may hold a
            ``quantization_config`` instead.
        seed: of PEFT's random initial A.
        model_kwargs: passed to ``AutoModelForCausalLM.from_pretrained`` (attention implementation, revision).
        **kwargs: passed to :class:`LanguageModel`: ``template``, ``max_length``, ``normalize``, ``token_budget``,
            ``cache_bytes``, ``cache_folder``, ``gradient_checkpointing``; and ``token_folder``, which by default is
            ``tokens`` in the folder of :func:`bayes_lora.lm.model_files.cache_folder`.

    Raises:
        ModelFileError: the files cannot be had, or are damaged.
        SiteError: a target module is not in the model; names near ones.
        ConfigError: bitsandbytes is wanted and not installed, or a setting is wrong.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if isinstance(dtype, str):
        dtype = {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]
    dtype, options = dtype or default_dtype(device), dict(model_kwargs or {})
    if quantization is not None:
        options["quantization_config"] = _quantization(quantization, dtype)
    model, tokenizer = _load_base(name_or_path, dtype, options)
    if lora is None:
        lora = default_lora(model, rank=rank, top_layers=top_layers, target_modules=target_modules)
    inject(lora, model, seed=seed)
    model.to(device)  # type: ignore[arg-type]
    kwargs.setdefault("token_folder", cache_folder() / "tokens")
    return LanguageModel(model, tokenizer, lora, name=str(name_or_path), **kwargs)


def _load_base(
    name_or_path: str | Path, dtype: torch.dtype, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    found = find_model(name_or_path)
    source, options = str(found), dict(model_kwargs)
    if isinstance(found, Path) and found.suffix == ".gguf":
        source, options["gguf_file"] = str(found.parent), found.name
    shared = {key: value for key, value in options.items() if key in ("gguf_file", "trust_remote_code")}
    options |= {"output_loading_info": True, "ignore_mismatched_sizes": True}  # weights that do not fit are named below
    gguf = "gguf_file" in options
    with reading("config.json", name_or_path, found):
        if not gguf:  # whose settings are read with its tokenizer
            AutoConfig.from_pretrained(source, **shared)
    with reading("file" if gguf else "tokenizer", name_or_path, found):
        tokenizer = AutoTokenizer.from_pretrained(source, **shared)
    with reading("weights", name_or_path, found):
        loaded: Any = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **options)
    model, info = loaded
    wrong = sorted(info["missing_keys"]) + sorted(key for key, *_ in info["mismatched_keys"])
    if wrong:
        raise ModelFileError(
            f"'{found}': {len(wrong)} weights are missing or of another shape than config.json says, such as "
            f"{wrong[0]}. {_cure('weights', name_or_path, found)}"
        )
    return model, tokenizer


@contextmanager
def reading(part: str, name_or_path: str | Path, found: Path) -> Iterator[None]:
    """Turn whatever transformers raises over damaged files (of any type) into one line that says what to do."""
    try:
        yield
    except (MemoryError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = textwrap.shorten(f"{type(error).__name__}: {error}", 240, placeholder=" ...")
        raise ModelFileError(
            f"'{found}': the {part} cannot be read ({reason}). {_cure(part, name_or_path, found)}"
        ) from error


def _cure(part: str, name_or_path: str | Path, found: Path) -> str:
    if found.name == CONVERTED_FOLDER:
        return "Delete this folder, then run: bayes-lora fetch"
    if not Path(name_or_path).expanduser().exists():
        return f"Download it anew: hf download --force-download {name_or_path}"
    if part == "tokenizer" and found.is_dir():
        return "Put the model's tokenizer.json and tokenizer_config.json there, or copy the model anew."
    return "Copy or save the model anew."


def inject(lora: peft.LoraConfig, model: PreTrainedModel, *, seed: int = 0) -> None:
    """Inject LoRA in place, with PEFT's initial values drawn under ``seed``.

    Raises:
        SiteError: a target module is not in the model.
    """
    wanted = sorted(lora.target_modules) if isinstance(lora.target_modules, (set, list)) else []
    names = [name for name, _ in model.named_modules()]
    kinds = sorted({name.rpartition(".")[2] for name, module in model.named_modules() if not list(module.children())})
    # PEFT passes over a name that fits no module, as long as another one does.
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
