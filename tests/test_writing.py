"""Files that are written: errors of the disk, modes, and the order of writing and renaming."""

import os
import stat
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from bayes_lora.errors import RunFolderError
from bayes_lora.runs import report
from bayes_lora.runs.report import Comparison
from bayes_lora.utils import storage
from bayes_lora.utils.storage import new_folder, read_json, read_tensors, write_json, write_tensors


def full(*_, **__):
    raise OSError(28, "No space left on device")


@pytest.mark.parametrize("what", ["json", "tensors", "folder"])
def test_a_disk_that_cannot_be_written_is_one_error(tmp_path, monkeypatch, what):
    write = {
        "json": lambda: write_json(tmp_path / "x", {}),
        "tensors": lambda: write_tensors(tmp_path / "x", {"a": torch.zeros(9)}),
        "folder": lambda: new_folder(tmp_path / "x").__enter__(),
    }[what]
    write()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    monkeypatch.setattr(
        "safetensors.torch.save_file", lambda *_: (_ for _ in ()).throw(storage.SafetensorError("no room"))
    )
    monkeypatch.setattr(storage.Path, "mkdir", full)
    monkeypatch.setattr(storage.Path, "write_text", full)
    with pytest.raises(RunFolderError, match="x cannot be written: .*(No space left|no room).*choose another folder"):
        write()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()} == before


@pytest.mark.parametrize("umask, mode", [(0o022, 0o644), (0o027, 0o640), (0o002, 0o664)])
def test_modes_follow_the_umask(tmp_path, umask, mode):
    before = os.umask(umask)
    try:
        with new_folder(tmp_path / "x") as folder:
            write_tensors(folder / "a", {"a": torch.zeros(2)})
            write_json(folder / "b", {})
    finally:
        os.umask(before)
    assert {stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "x").iterdir()} == {mode}
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o777 & ~umask


def test_files_reach_the_disk_before_they_are_renamed(tmp_path, monkeypatch):
    order = []
    replace, fsync = os.replace, os.fsync

    def noted(descriptor):
        order.append(os.readlink(f"/proc/self/fd/{descriptor}").rpartition("/")[2])
        fsync(descriptor)

    monkeypatch.setattr(os, "fsync", noted)
    monkeypatch.setattr(os, "replace", lambda *paths: (order.append("renamed"), replace(*paths)))
    write_tensors(tmp_path / "a", {"a": torch.zeros(2)})
    temporary, *rest = order
    assert temporary.startswith(".a.") and rest == ["renamed", tmp_path.name]
    order.clear()
    write_json(tmp_path / "b", {})
    temporary, *rest = order
    assert temporary.startswith(".b.") and rest == ["renamed", tmp_path.name]
    assert read_tensors(tmp_path / "a")["a"].tolist() == [0.0, 0.0]


def test_a_report_that_cannot_be_written_is_one_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunFolderError, match="cannot be written: .*Not a directory"):
        Comparison({}).write(tmp_path / "file" / "report")
    monkeypatch.setattr(report, "reliability_diagram", full)
    with pytest.raises(RunFolderError, match="reliability.png cannot be written: .*No space left"):
        Comparison({}).write(tmp_path / "report")


def test_a_file_may_be_written_by_several_at_once(tmp_path):
    """Each writes its own temporary file, and the last one to be renamed is whole."""
    values = [{"writer": index, "rest": ["x" * 2000] * 50} for index in range(8)]
    with ThreadPoolExecutor(len(values)) as threads:
        for _ in range(20):
            list(threads.map(lambda value: write_json(tmp_path / "a.json", value), values))
            assert read_json(tmp_path / "a.json") in values
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"]
