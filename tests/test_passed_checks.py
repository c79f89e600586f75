"""A language model that passed the check of its forward is not checked again; any other one is."""

import json

import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm
from lm_helpers import query_episode, random_phi
from torch import nn
from transformers import MptConfig, MptForCausalLM

from bayes_lora.lm import language_model, passed_checks
from bayes_lora.lm.packed_forward import PackedForward


@pytest.fixture
def checks(monkeypatch):
    """The models that are checked."""
    checked, choose = [], language_model.choose_forward

    def choose_forward(model, sites, trunk):
        checked.append(model)
        return choose(model, sites, trunk)

    monkeypatch.setattr(language_model, "choose_forward", choose_forward)
    return checked


def files(folder):
    return sorted((folder / "forwards").glob("*"))


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_model_is_checked_once(kind, tokenizer, tmp_path, checks):
    first, second, unknown = (build_lm(kind, tokenizer, cache_folder=folder) for folder in (tmp_path, tmp_path, None))
    episode, _ = query_episode(first)
    phi = random_phi(first)
    expected = first(phi, episode)
    assert checks == [first.model]
    assert torch.equal(second(phi, episode), expected)
    assert checks == [first.model]
    assert isinstance(second.forward, PackedForward)
    assert (second.trunk.depth, second.trunk.in_tuple) == (first.trunk.depth, first.trunk.in_tuple)
    assert first.trunk.cache.store.path == second.trunk.cache.store.path
    assert torch.equal(unknown(phi, episode), expected)
    assert len(checks) == 2 and len(files(tmp_path)) == 1


def other_weights(lm, monkeypatch):
    lm.model.get_submodule("model.layers.0.mlp.up_proj").weight.data[0, 0] += 1.0


def other_attention(lm, monkeypatch):
    lm.model.set_attn_implementation("eager")


def a_hook(lm, monkeypatch):
    lm.trunk.layers[0].register_forward_hook(lambda *_: None)


def a_forward_of_its_own(lm, monkeypatch):
    layer = lm.trunk.layers[1]
    layer.forward = layer.forward


def a_replaced_function(lm, monkeypatch):
    cls = type(lm.trunk.layers[0])
    forward = cls.forward
    monkeypatch.setattr(cls, "forward", lambda self, *args, **kwargs: forward(self, *args, **kwargs))


def another_class(lm, monkeypatch):
    norm = lm.trunk.layers[0].input_layernorm
    norm.__class__ = type("Norm", (type(norm),), {})


def other_code(lm, monkeypatch):
    monkeypatch.setattr(passed_checks, "ROOMS", ("lm",))


def another_processor(lm, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")


def weights_in_a_format_of_their_own(lm, monkeypatch):
    linear = lm.model.get_submodule("model.layers.0.mlp.up_proj")
    linear.weight = type("Codes", (nn.Parameter,), {})(linear.weight.data, requires_grad=False)


CHANGES = [
    other_weights,
    other_attention,
    a_hook,
    a_forward_of_its_own,
    a_replaced_function,
    another_class,
    other_code,
    another_processor,
    weights_in_a_format_of_their_own,
]


@pytest.mark.parametrize("change", CHANGES)
def test_another_model_is_checked(change, tokenizer, tmp_path, checks, monkeypatch):
    first, second = (build_lm("llama", tokenizer, cache_folder=tmp_path) for _ in range(2))
    assert first.forward
    change(second, monkeypatch)
    assert second.forward
    assert checks == [first.model, second.model]


def test_a_model_whose_lowest_layer_is_adapted_is_checked_once(tokenizer, tmp_path, checks):
    for _ in range(2):
        lm = build_lm("llama", tokenizer, top_layers=None, cache_folder=tmp_path)
        assert lm.forward and lm.trunk.depth == 0
    assert len(checks) == 1


def test_other_sites_are_checked(tokenizer, tmp_path, checks):
    for targets in (["q_proj"], ["q_proj", "v_proj"]):
        assert build_lm("llama", tokenizer, targets=targets, cache_folder=tmp_path).forward
    assert len(checks) == 2 and len(files(tmp_path)) == 2


def test_a_result_with_a_warning_is_not_remembered(tokenizer, tmp_path, checks, monkeypatch):
    settings = {"vocab_size": 320, "d_model": 16, "n_layers": 4, "n_heads": 4, "max_seq_len": 1024}
    monkeypatch.setitem(BUILDERS, "mpt", lambda: MptForCausalLM(MptConfig(**settings, initializer_range=0.3)))
    monkeypatch.setitem(TARGETS, "mpt", ["Wqkv"])
    for _ in range(2):
        lm = build_lm("mpt", tokenizer, dtype=torch.float32, cache_folder=tmp_path)
        with pytest.warns(UserWarning, match="with packed rows"):
            assert lm.forward
    assert len(checks) == 2 and not files(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", json.dumps({"in_tuple": 1})])
def test_a_damaged_file_is_replaced(text, tokenizer, tmp_path, checks):
    first, second, third = (build_lm("llama", tokenizer, cache_folder=tmp_path) for _ in range(3))
    assert first.forward
    [path] = files(tmp_path)
    content = path.read_text()
    path.write_text(text)
    assert second.forward and path.read_text() == content
    assert third.forward
    assert checks == [first.model, second.model]


def test_a_folder_that_cannot_be_written_changes_nothing(tokenizer, tmp_path, checks):
    (tmp_path / "forwards").write_text("")
    for _ in range(2):
        assert build_lm("llama", tokenizer, cache_folder=tmp_path).forward
    assert len(checks) == 2
