"""Models of the Hugging Face hub: those in its cache, and downloads."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from bayes_lora.errors import ModelFileError

__all__ = [
    "HUB_FILES",
    "HubOptions",
    "download_from_hub",
    "find_in_hub_cache",
    "hub_name",
    "is_model_folder",
    "list_on_hub",
]

HUB_ANSWER_SECONDS = 5.0
# Name resolution without a network may hang longer than any socket timeout, hence a second, outer limit.
HUB_LIMIT_SECONDS = 8.0
HUB_FILES = ["*.json", "*.jinja", "*.model", "*.txt"]


class HubOptions(NamedTuple):
    """Where the files of a hub id are, with the names of ``from_pretrained``.

    Attributes:
        cache_dir: folder of the Hugging Face cache; by default its usual one.
        token: token of the hub; by default the one of ``hf auth login``.
        local_files_only: whether files must be on this machine.
        subfolder: folder of the repository or of a local folder in which the model is.
    """

    cache_dir: str | Path | None = None
    token: str | bool | None = None
    local_files_only: bool = False
    subfolder: str = ""

    def file(self, name: str) -> str:
        """Return the path of a file, or of a pattern of files, in the repository."""
        return f"{self.subfolder.strip('/')}/{name}" if self.subfolder else name


def is_model_folder(folder: Path) -> bool:
    """Return whether a folder has a config and all weights; an interrupted download is incomplete."""
    if (folder / "config.json").is_file():
        for name in ("model.safetensors", "pytorch_model.bin"):
            if (folder / name).is_file():
                return True
            index = folder / f"{name}.index.json"
            if index.is_file():
                return all((folder / shard).is_file() for shard in json.loads(index.read_text())["weight_map"].values())
    return False


def hub_name(name: str, revision: str | None) -> str:
    """Return a hub id and its revision, for a message."""
    return f"'{name}'" if revision is None else f"'{name}' at revision {revision!r}"


def find_in_hub_cache(name: str, revision: str | None = None, hub: HubOptions = HubOptions()) -> Path | None:  # noqa: B008
    """Return the folder of a model in the cache of the hub; None if it is not there, or incomplete."""
    # Not snapshot_download(local_files_only=True): it rejects a snapshot from which any file was left out.
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        config = try_to_load_from_cache(name, hub.file("config.json"), hub.cache_dir, revision)
    except HFValidationError as error:
        raise ModelFileError(f"'{name}' is neither a path nor a hub id: {error}") from error
    return Path(config).parent if isinstance(config, str) and is_model_folder(Path(config).parent) else None


def list_on_hub(
    name: str, revision: str | None = None, token: str | bool | None = None
) -> dict[str, int | None] | Exception:
    """List a model's files on the hub and their bytes, waiting a few seconds at most; on failure return the exception.

    Bytes are None where the hub does not say.
    """
    from huggingface_hub import HfApi

    answer: list[dict[str, int | None] | Exception] = []

    def ask() -> None:
        try:
            info = HfApi().model_info(
                name, revision=revision, timeout=HUB_ANSWER_SECONDS, token=token, files_metadata=True
            )
            answer.append({file.rfilename: file.size for file in info.siblings or []})
        except Exception as error:
            answer.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(HUB_LIMIT_SECONDS)
    return answer[0] if answer else TimeoutError(f"no answer in {HUB_LIMIT_SECONDS:.0f} s")


def download_from_hub(
    name: str,
    revision: str | None = None,
    hub: HubOptions = HubOptions(),  # noqa: B008
    console: Console | None = None,
) -> Path:
    """Download a model's configuration, tokenizer and weights, and return their folder.

    Args:
        name: hub id.
        revision: branch, tag or commit; by default the main branch.
        hub: where the files are.
        console: where to print how much is downloaded, before it is; by default nowhere.

    Raises:
        ModelFileError: there is no such model or revision, it has no weights, or the hub cannot be reached.
    """
    if hub.local_files_only:
        where = "this machine" if hub.cache_dir is None else f"this machine, in '{hub.cache_dir}'"
        raise ModelFileError(
            f"{hub_name(name, revision)} is not on {where}, and local_files_only=True. Leave it out to download it."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

    try:
        files = list_on_hub(name, revision, hub.token)
        if isinstance(files, Exception):
            raise files
        weights = "model*.safetensors" if any(file.endswith(".safetensors") for file in files) else "pytorch_model*.bin"
        patterns = [hub.file(pattern) for pattern in (*HUB_FILES, weights)]
        others = [hub.file("*/*")]
        chosen = filter_repo_objects(files, allow_patterns=patterns, ignore_patterns=others)
        size = _size([files[file] for file in chosen])
        if console is not None:
            console.print(
                f"{hub_name(name, revision)} is not on this machine: downloading {size} from the Hugging Face hub",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
        snapshot = snapshot_download(
            name,
            revision=revision,
            cache_dir=hub.cache_dir,
            token=hub.token,
            allow_patterns=patterns,
            ignore_patterns=others,
        )
        folder = Path(snapshot) / hub.subfolder
    except RevisionNotFoundError as error:
        raise ModelFileError(
            f"'{name}' has no revision {revision!r} on the Hugging Face hub. Expected a branch, a tag or a commit: see "
            f"https://huggingface.co/{name}/commits"
        ) from error
    except RepositoryNotFoundError as error:
        raise ModelFileError(
            f"'{name}' is not accessible on the Hugging Face hub. Check the name; "
            "if the model is private or gated, run: hf auth login"
        ) from error
    # The hub's client raises the errors of whichever HTTP library its version uses.
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        option = "" if revision is None else f" --revision {revision}"
        raise ModelFileError(
            f"{hub_name(name, revision)} is not on this machine and the Hugging Face hub cannot be reached "
            f"({reason}). With a connection, run: hf download {name}{option}"
        ) from error
    if not is_model_folder(folder):
        raise ModelFileError(
            f"{hub_name(name, revision)} on the Hugging Face hub lacks a config.json, safetensors or .bin weights"
        )
    return folder


def _size(sizes: list[int | None]) -> str:
    """Return the bytes of some files in words; "at least" if those of some files are unknown."""
    total = sum(size or 0 for size in sizes)
    words = f"{total / 1e9:.1f} GB" if total >= 1e9 else f"{total / 1e6:.0f} MB"
    return words if None not in sizes else f"at least {words}" if total else f"{len(sizes)} files"
