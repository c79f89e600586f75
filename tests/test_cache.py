"""Tensors in RAM and on disk come back as they were put, within their budgets, and leave no file behind."""

import os
import stat

import pytest
import torch

from bayes_lora.errors import ConfigError
from bayes_lora.lm import tensor_cache as cache
from bayes_lora.lm.tensor_cache import TensorCache


def tensors(i):
    return torch.full((3, 5), i + 0.5, dtype=torch.bfloat16), torch.arange(7 + i, dtype=torch.float64), torch.tensor(i)


def check(kept, i):
    for found, expected in zip(kept, tensors(i), strict=True):
        assert found.dtype == expected.dtype and torch.equal(found, expected)


def test_ram_up_to_its_budget():
    size = sum(t.nbytes for t in tensors(0))
    kept = TensorCache(2 * size + 20)
    for i in range(4):
        check(kept.put(bytes([i]), tensors(i)), i)  # returned, kept or not
    assert len(kept) == 2 and kept.ram_used <= kept.ram_bytes and kept.disk_used == 0
    check(kept.get(bytes([1])), 1)
    assert bytes([3]) not in kept and kept.get(bytes([3])) is None
    kept.put(bytes([1]), tensors(1))
    assert kept.ram_used < 2 * size + 20 and len(kept) == 2


def test_disk_past_that(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SEGMENT", 400)
    kept = TensorCache(0, tmp_path / "new" / "folder", disk_bytes=1000)
    for i in range(9):
        check(kept.put(bytes([i]), tensors(i)), i)
    assert 2 < len(kept) < 9 and kept.disk_used == 800 and kept.ram_used == 0
    for i in range(len(kept)):
        check(kept.get(bytes([i])), i)
    assert not list((tmp_path / "new" / "folder").iterdir())


def test_more_than_a_segment(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "SEGMENT", 16)
    kept = TensorCache(0, tmp_path)
    big = torch.randn(50)
    kept.put(b"big", (big,))
    assert torch.equal(kept.get(b"big")[0], big)


def test_a_copy_is_kept():
    kept, value = TensorCache(1 << 20), torch.ones(4, 6)
    kept.put(b"a", (value.T[:3],))
    value.zero_()
    assert torch.equal(kept.get(b"a")[0], torch.ones(3, 4)) and kept.get(b"a")[0].is_contiguous()


def test_a_full_disk_is_said_once(tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    kept = TensorCache(0, tmp_path)
    with pytest.warns(UserWarning, match="is full .*No space left on device") as record:
        kept.put(b"a", tensors(0))
        check(kept.put(b"b", tensors(1)), 1)
    assert len(record) == 1 and len(kept) == 0 and not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache folder .*file.* cannot be written"):
        TensorCache(0, tmp_path / "file")
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() != 0:
        with pytest.raises(ConfigError, match="cannot be written"):
            TensorCache(0, tmp_path)
    tmp_path.chmod(stat.S_IRWXU)
