"""Tensors in RAM and on disk come back as they were put, within their budgets, in this process and in others."""

import multiprocessing
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import build_lm
from lm_helpers import query_episode, random_phi

from bayes_lora.errors import ConfigError
from bayes_lora.lm import tensor_store
from bayes_lora.lm.base_facts import base_facts
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.lm.tensor_store import TensorStore, entries


def tensors(i):
    return torch.full((3, 5), i + 0.5, dtype=torch.bfloat16), torch.arange(7 + i, dtype=torch.float64), torch.tensor(i)


def store(folder, about="a", **kwargs):
    return TensorStore(folder, {"what": about}, **kwargs)


def put(kept, *numbers):
    return kept.put({bytes([i]): tensors(i) for i in numbers})


def check(found, *numbers):
    assert list(found) == [bytes([i]) for i in numbers]
    for i, kept in zip(numbers, found.values(), strict=True):
        for value, expected in zip(kept, tensors(i), strict=True):
            assert value.dtype == expected.dtype and torch.equal(value, expected)


def get(kept, *numbers):
    return kept.get(bytes([i]) for i in numbers)


def test_ram_up_to_its_budget():
    size = sum(t.nbytes for t in tensors(0))
    kept = TensorCache(2 * size + 20)
    check(put(kept, 0, 1, 2, 3), 0, 1, 2, 3)  # returned, kept or not
    assert len(kept) == 2 and kept.ram_used <= kept.ram_bytes
    check(get(kept, 1, 3), 1)
    put(kept, 1)
    assert kept.ram_used < 2 * size + 20 and len(kept) == 2


def test_a_copy_is_kept():
    kept, value = TensorCache(1 << 20), torch.ones(4, 6)
    kept.put({b"a": (value.T[:3],)})
    value.zero_()
    [found] = kept.get([b"a"])[b"a"]
    assert torch.equal(found, torch.ones(3, 4)) and found.is_contiguous()


def test_disk_past_that(tmp_path):
    kept = TensorCache(0, store(tmp_path / "new" / "folder"))
    check(put(kept, *range(9)), *range(9))
    assert kept.ram_used == len(kept) == 0
    check(get(kept, 7, 2), 7, 2)
    later = TensorCache(1 << 20, store(tmp_path / "new" / "folder"))
    check(get(later, 2, 7, 11), 2, 7)
    assert len(later) == 2  # RAM is filled from disk


def test_stores_that_differ_in_what_determines_their_tensors(tmp_path):
    one, other = store(tmp_path, "a"), store(tmp_path, "b")
    one.put({b"k": tensors(1)})
    assert get(other, *b"k") == {}
    assert [entry.about for entry in entries(tmp_path)] == [{"what": name} for name in ("b", "a")]


READ = """
import sys; from test_cache import *
kept = store(sys.argv[1]); check(get(kept, 1), 1); put(kept, 2)
"""


def test_processes_share_it(tmp_path):
    kept = store(tmp_path)
    put(kept, 1)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([os.path.dirname(__file__), *sys.path])}
    subprocess.run([sys.executable, "-c", READ, tmp_path], check=True, env=environment, timeout=300)
    check(get(kept, 2), 2)


def write_for_ever(folder):
    kept, i = store(folder), 0
    while True:
        kept.put({i.to_bytes(8, "big"): (torch.full((1000,), i),)})
        i += 1


def test_a_killed_process_leaves_no_damage(tmp_path):
    """What was written stays, complete, and others go on writing."""
    writer = multiprocessing.get_context("spawn").Process(target=write_for_ever, args=(tmp_path,))
    writer.start()
    kept, keys = store(tmp_path), [i.to_bytes(8, "big") for i in range(5)]
    deadline = time.monotonic() + 120
    while len(kept.get(keys)) < len(keys) and time.monotonic() < deadline:
        time.sleep(0.01)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    for i, key in enumerate(keys):
        assert torch.equal(kept.get([key])[key][0], torch.full((1000,), i))
    put(kept, 3)
    check(get(kept, 3), 3)


def test_the_least_recently_used_is_deleted(tmp_path):
    big = {b"k": (torch.zeros(300_000),)}  # 1.2 MB
    for index, name in enumerate("abcd"):
        one = store(tmp_path, name, max_bytes=4 << 20)
        one.put(big)
        os.utime(one.path / "about.json", (index, index))
    store(tmp_path, "e", max_bytes=4 << 20).put(big)
    assert [entry.about["what"] for entry in entries(tmp_path)] == ["e", "d", "c", "b"]


def test_a_full_store_is_said_once(tmp_path):
    kept = TensorCache(0, store(tmp_path, max_bytes=1 << 20))
    with pytest.warns(UserWarning, match=r"cache folder .* is full \(0.000977 GiB\)") as record:
        kept.put({b"a": (torch.zeros(1 << 19),)})
        check(put(kept, 1), 1)
    assert len(record) == 1 and get(kept, 1) == {}


def test_what_a_full_store_holds_is_read(tmp_path):
    kept = store(tmp_path, max_bytes=1 << 20)
    put(kept, 1)
    with pytest.warns(UserWarning, match="is full"):
        kept.put({b"a": (torch.zeros(1 << 19),)})
    check(get(kept, 1), 1)


def test_one_folder_by_several_names_in_several_threads(tmp_path, monkeypatch):
    (tmp_path / "link").symlink_to(tmp_path / "real")
    monkeypatch.chdir(tmp_path)
    stores = [store(tmp_path / "real"), store("real"), store(tmp_path / "link")] * 3
    with ThreadPoolExecutor(len(stores)) as threads:
        list(threads.map(put, stores, range(len(stores))))
    check(get(stores[0], *range(len(stores))), *range(len(stores)))


@pytest.mark.filterwarnings("ignore:.*cannot be (used|read|written):UserWarning")
def test_a_store_that_is_deleted_while_threads_use_it(tmp_path):
    """As `bayes-lora cache --clear` does in another process: made again, or given up with a warning."""
    kept, other = store(tmp_path), store(tmp_path)
    deadline = time.monotonic() + 2

    def use(one):
        while time.monotonic() < deadline:
            put(one, 1)
            assert list(get(one, 1)) in ([bytes([1])], [])

    with ThreadPoolExecutor(3) as threads:
        found = [threads.submit(use, one) for one in (kept, other)]
        while time.monotonic() < deadline:
            shutil.rmtree(kept.path, ignore_errors=True)
            time.sleep(0.05)
        for one in found:
            one.result()


@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_a_forked_process_reads_and_writes(tmp_path):
    kept = store(tmp_path)
    put(kept, 1)
    child = os.fork()
    if not child:
        status = 1
        try:
            check(get(kept, 1), 1)
            put(kept, 2)
            status = 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    check(get(kept, 1, 2), 1, 2)


def test_a_damaged_file_is_rebuilt(tmp_path):
    one = store(tmp_path)
    put(one, 1)
    os.unlink(one.path / "data.mdb")
    (one.path / "data.mdb").write_bytes(b"not a database" * 1000)
    kept = store(tmp_path)
    with pytest.warns(UserWarning, match="is damaged and is rebuilt"):
        put(kept, 2)
    check(get(kept, 1, 2), 2)


def test_a_file_that_was_cut_is_rebuilt(tmp_path):
    one = store(tmp_path)
    one.put({b"k": (torch.zeros(100_000),)})
    whole = (one.path / "data.mdb").read_bytes()
    shutil.rmtree(one.path)
    (tmp_path / one.path.name).mkdir()
    (one.path / "data.mdb").write_bytes(whole[: len(whole) // 2])
    with pytest.warns(UserWarning, match="is damaged and is rebuilt .*bytes"):
        assert one.get([b"k"]) == {}


def test_a_store_whose_description_is_damaged_is_listed(tmp_path):
    one = store(tmp_path)
    put(one, 1)
    for text in ("", "[1]"):
        (one.path / "about.json").write_text(text)
        [entry] = entries(tmp_path)
        assert entry.about == {} and entry.num_bytes > 0


def test_a_damaged_value_is_told(tmp_path, monkeypatch):
    kept = store(tmp_path)
    monkeypatch.setattr(tensor_store, "_pack", lambda tensors: b"no tensors")
    put(kept, 1)
    with pytest.warns(UserWarning, match="cannot be read .* Delete it: no more tensors are stored"):
        assert get(kept, 1) == {}
    assert get(kept, 1) == {}


def test_folders_that_cannot_be_used(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match="cache folder .*file: expected a folder, but it is a file"):
        store(tmp_path / "file")
    kept = store(tmp_path / "file2")
    (tmp_path / "file2").write_text("")
    with pytest.warns(UserWarning, match="cannot be used .* no more tensors are stored"):
        put(kept, 1)
    assert get(kept, 1) == {}
    tmp_path.chmod(stat.S_IRUSR | stat.S_IXUSR)
    if os.geteuid() != 0:
        with pytest.warns(UserWarning, match="cannot be used"):
            put(store(tmp_path / "new"), 1)
    tmp_path.chmod(stat.S_IRWXU)


def test_a_second_language_model_reads_what_the_first_computed(tokenizer, tmp_path, monkeypatch):
    """States and features; not those of other weights, and scores are equal."""
    first = build_lm("llama", tokenizer, cache_folder=tmp_path)
    episode, _ = query_episode(first)
    phi = random_phi(first, 2, 2, 1)
    scores, features = first(phi, episode), first.features(episode)
    second = build_lm("llama", tokenizer, cache_folder=tmp_path)
    assert second.forward  # its self-check computes other examples
    monkeypatch.setattr(second.trunk, "_compute", None)  # nothing is computed
    monkeypatch.setattr(second.feature_reader, "_compute", None)
    torch.testing.assert_close(second(phi, episode), scores, rtol=0, atol=0)
    for one, other in zip(second.features(episode), features, strict=True):
        assert torch.equal(one, other)
    assert {entry.about["what"] for entry in entries(tmp_path / "states")} == {"hidden states", "features"}


def changed_bits(lm):
    lm.model.get_input_embeddings().weight[3, 2] += 1e-3


def changed_order(lm):
    weight = lm.model.get_submodule("model.layers.0.self_attn.o_proj").weight
    weight.copy_(weight.flip(1))


def changed_signs(lm):
    lm.model.get_submodule("model.layers.0.self_attn.o_proj").weight[:, :2] *= -1


def changed_angles(lm):
    lm.model.get_submodule("model.rotary_emb").inv_freq *= 0.5


def changed_attention(lm):
    lm.model.set_attn_implementation("eager")


def changed_class(lm):
    lm.model.__class__ = type("Own", (type(lm.model),), {})


@pytest.mark.parametrize(
    "change", [changed_bits, changed_order, changed_signs, changed_angles, changed_attention, changed_class]
)
@torch.no_grad()
def test_another_base_model_has_other_stores(tokenizer, change):
    one, other = (build_lm("llama", tokenizer) for _ in range(2))
    assert base_facts(one.model, "") == base_facts(other.model, "")
    change(other)
    assert base_facts(one.model, "") != base_facts(other.model, "")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_stores_do_not_depend_on_what_is_computed_first(tokenizer, tmp_path, dtype):
    paths = []
    for first in ("features", "scores"):
        lm = build_lm("llama", tokenizer, dtype=dtype, cache_folder=tmp_path)
        episode, _ = query_episode(lm)
        lm.features(episode) if first == "features" else lm(random_phi(lm, dtype=torch.float32), episode)
        paths.append((lm.trunk.cache.store.path, lm.feature_reader.cache.store.path))
        assert lm.trunk.cache.store.about["dtype"] == str(dtype)
    assert paths[0] == paths[1]


def test_lora_weights_are_not_part_of_the_base_model(tokenizer):
    one, other = (build_lm("llama", tokenizer) for _ in range(2))
    for site in other.sites.initial().values():
        site.data.add_(1.0)
    assert base_facts(one.model, "") == base_facts(other.model, "")
