"""Load a base model and its tokenizer from a hub id, a local folder or a GGUF file."""

from __future__ import annotations

import importlib.util
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from bayes_lora.errors import BayesLoraError, ConfigError, ModelError, ModelFileError
from bayes_lora.lm.model_files import HubOptions, find_model
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER

__all__ = ["load_base", "quantization_config", "reading"]


def quantization_config(bits: Literal["8bit", "4bit"], dtype: torch.dtype) -> BitsAndBytesConfig:
    """Return the settings of bitsandbytes.

    Raises:
        ConfigError: bitsandbytes is not installed.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(f"quantization {bits!r} needs bitsandbytes. Install it: pip install 'bayes-lora[quantized]'")
    if bits == "4bit":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    # With the default threshold some columns of the batch stay in 16 bits, and scores depend on the other rows.
    return BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=0.0)


def load_base(
    name_or_path: str | Path, revision: str | None, dtype: torch.dtype, model_kwargs: dict[str, Any]
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal LM and its tokenizer.

    Args:
        name_or_path: a hub id, a local folder or a GGUF file.
        revision: branch, tag or commit of a hub id.
        dtype: dtype of the weights.
        model_kwargs: the user's arguments of ``from_pretrained``.

    Raises:
        ModelFileError: files cannot be found, downloaded or read.
        ModelError: the model is not a causal language model.
        ConfigError: a package is missing, or a setting is wrong.
    """
    # Without a value, transformers asks on the terminal whether to run code that comes with the model.
    options = {"trust_remote_code": False, **model_kwargs}
    own = {name: options.pop(name) for name in HubOptions._fields if options.get(name) is not None}
    found = find_model(name_or_path, revision=revision, hub=HubOptions(**own))
    if (found / "adapter_config.json").is_file() and any(found.glob("adapter_model.*")):
        raise ModelFileError(
            f"'{found}': transformers would load the adapter in it (adapter_config.json) into the base model. Move the "
            "adapter's files to another folder, and pass that folder as adapter= to start at the adapter."
        )
    source = str(found)
    # A configuration without weights is left over from merging; transformers would look for the adapter.
    options["adapter_kwargs"] = {"subfolder": "no-adapter"}
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
    _check_one_device(model, options.get("device_map"))
    return model, tokenizer


def _check_one_device(model: PreTrainedModel, device_map: object) -> None:
    devices = sorted({str(parameter.device) for parameter in model.parameters()})
    if device_map is not None and len(devices) > 1 or devices == ["meta"]:
        raise ConfigError(
            f"device_map={device_map!r}: expected the whole model on one device, got {devices} (meta: on disk or "
            "offloaded). Pass {'': device}, and quantization='4bit' if it is too large."
        )


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
