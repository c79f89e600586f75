"""bitsandbytes' 8- and 4-bit layers under LoRA weights bound from outside, on the CPU."""

import importlib.util
import logging

import pytest
import torch
from conftest import SIZES, make_tasks
from lm_helpers import query_episode, random_phi
from peft.utils.integrations import dequantize_bnb_weight
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.float32 import in_float32
from bayes_lora.lm.loading import load_language_model
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective

needs_bitsandbytes = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed: make test-quantized"
)


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny Llama whose layers are wide enough for blocks of 64 weights."""
    folder = tmp_path_factory.mktemp("model") / "quantisable"
    torch.manual_seed(1)
    LlamaForCausalLM(LlamaConfig(**SIZES | {"hidden_size": 64, "intermediate_size": 128})).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(params=["8bit", "4bit"])
def bits(request):
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)  # says of every cast to float16
    return request.param


def load(folder, bits=None):
    return load_language_model(folder, r=3, top_layers=2, quantization=bits, device="cpu")


def scores_and_gradients(lm, phi, episode):
    phi = {site: value.clone().requires_grad_() for site, value in phi.items()}
    scores = lm(phi, episode)
    (scores * episode.option_mask).sum().backward()
    return scores.detach(), [value.grad for value in phi.values()]


@needs_bitsandbytes
def test_draws_together_equal_draws_alone(folder, bits):
    """Five draws of two tasks, through packed rows and a kept trunk; a gradient passes after scoring without one."""
    lm = load(folder, bits)
    episode = query_episode(lm)[0]
    phi = random_phi(lm, 5, 2, 1, scale=0.1, dtype=torch.float32)
    with torch.no_grad():
        whole = lm(phi, episode)
        alone = torch.stack([lm({s: v[d] for s, v in phi.items()}, episode) for d in range(5)])
    assert lm.trunk.depth == 2
    torch.testing.assert_close(whole, alone)
    after = scores_and_gradients(lm, phi, episode)
    torch.testing.assert_close(after[0], whole)
    torch.testing.assert_close(after, scores_and_gradients(load(folder, bits), phi, episode))
    assert all((gradient.flatten(2).abs().sum(-1) > 0).all() for gradient in after[1])


@needs_bitsandbytes
def test_four_bits_are_those_of_the_dequantised_weights(folder):
    lm, plain = load(folder, "4bit"), load(folder)
    layers, count = dict(plain.model.named_modules()), 0
    for name, module in lm.model.named_modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ == "Params4bit":
            layers[name].weight.data = dequantize_bnb_weight(weight).float()
            count += 1
    assert count == 4 * 7
    episode, phi = query_episode(lm)[0], random_phi(lm, 2, 2, 1, scale=0.1, dtype=torch.float32)
    found, expected = (scores_and_gradients(one, phi, episode) for one in (lm, plain))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


@needs_bitsandbytes
def test_in_float32_a_model_has_its_dequantised_weights(folder, bits):
    """Used and fresh; its own forward rounds activations too, in 8 bits."""
    lm, plain = load(folder, bits), load(folder)
    layers = dict(plain.model.named_modules())
    for name, module in lm.model.named_modules():
        weight = module._parameters.get("weight")
        if type(weight).__name__ in ("Params4bit", "Int8Params"):
            found = dequantize_bnb_weight(weight, state=getattr(module, "state", None))
            layers[name].weight.data = found.float().clone()
    tokens = torch.arange(1, 21).view(2, 10)
    with torch.no_grad():
        expected = plain.model(tokens).logits
        for _ in range(2):
            with in_float32(lm.model):
                torch.testing.assert_close(lm.model(tokens).logits, expected, rtol=1e-5, atol=1e-4)
            own = lm.model(tokens).logits
    assert bits == "4bit" or (own - expected).abs().max() > 1e-3
    assert not any("forward" in vars(module) for module in lm.model.modules())


@needs_bitsandbytes
def test_a_posterior_belongs_to_its_quantised_base(folder, bits, tmp_path):
    lm = load(folder, bits)
    episode = query_episode(lm)[0]
    objective = build_objective(lm, RunConfig(recipe="abmll-network"))
    objective(episode).backward()
    facts = {FINGERPRINT: fingerprint(lm)}
    Posterior.from_objective(lm, objective).save(tmp_path / "posterior")
    loaded = Posterior.load(tmp_path / "posterior", lm=load(folder, bits))  # used, and fresh
    tasks = [task.split(6, seed=0) for task in make_tasks(2).values()]
    predictions = [
        one.adapt(tasks).predict([task.query for task in tasks], num_draws=2)
        for one in (Posterior.from_objective(lm, objective.eval()), loaded)
    ]
    for before, after in zip(*predictions, strict=True):
        torch.testing.assert_close(before, after)  # not to the bit: hidden states were kept from other batches
    with pytest.raises(PosteriorError, match="fitted on base weights other"):
        check_fingerprint(facts, load(folder), tmp_path)


def test_without_bitsandbytes_it_says_what_to_install(folder, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"needs bitsandbytes. Install it: pip install 'bayes-lora\[quantized\]'"):
        load(folder, "4bit")
