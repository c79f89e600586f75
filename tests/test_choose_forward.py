"""The check on first use judges how a model is run, and not the rounding of 16 bits."""

from contextlib import contextmanager

import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm
from lm_helpers import query_episode, random_phi
from torch import nn
from transformers import MptConfig, MptForCausalLM, OPTConfig, OPTForCausalLM

from bayes_lora.episodes.episode import attention_mask
from bayes_lora.errors import SiteError
from bayes_lora.lm import choose_forward as chooser
from bayes_lora.lm import packed_forward
from bayes_lora.lm.float32 import in_float32
from bayes_lora.lm.kv_cache_forward import PromptCacheForward
from bayes_lora.lm.packed_forward import PackedForward

HALF = [torch.bfloat16, torch.float16]


def add(monkeypatch, name, model, targets):
    monkeypatch.setitem(BUILDERS, name, model)
    monkeypatch.setitem(TARGETS, name, targets)


def mpt():
    """Its position bias depends on places in the row; that of a tiny model is below the rounding of 16 bits."""
    return MptForCausalLM(
        MptConfig(vocab_size=320, d_model=16, n_layers=4, n_heads=4, max_seq_len=1024, initializer_range=0.3)
    )


def alone(model, example):
    """The scores of an encoded example's options, one row at a time, by transformers' forward."""
    prompt, scores = example.tokens[example.segments == 0].tolist(), []
    for k in range(example.num_options):
        option = example.targets[example.target_options == k].tolist()
        with torch.no_grad():
            logits = model(torch.tensor([prompt + option])).logits[0].float().log_softmax(-1)
        scores.append(sum(logits[len(prompt) + i - 1, token] for i, token in enumerate(option)))
    return torch.stack(scores)


@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_a_wrong_way_is_rejected_in_any_dtype(dtype, tokenizer, monkeypatch):
    add(monkeypatch, "mpt", mpt, ["Wqkv"])
    lm = build_lm("mpt", tokenizer, dtype=dtype)
    episode, _ = query_episode(lm)
    with pytest.warns(UserWarning, match="MptForCausalLM: with packed rows .* its scores are off by"):
        features = lm.features(episode)
    assert isinstance(lm.forward, PromptCacheForward)
    example = episode.examples[1][2]
    expected = alone(lm.model, example).log_softmax(-1)
    found = features.log_probs[1, 2, : len(expected)]
    torch.testing.assert_close(found, expected, rtol=0.0, atol=1e-4 if dtype == torch.float32 else 0.15)


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", list(BUILDERS))
def test_a_right_way_is_accepted_in_16_bits(kind, dtype, tokenizer):
    """Without a warning, which would be an error here; and the model is as before."""
    lm = build_lm(kind, tokenizer, dtype=dtype)
    before = {name: (value, value.data_ptr(), value.clone()) for name, value in lm.model.state_dict().items()}
    assert isinstance(lm.forward, PackedForward) and lm.trunk.depth == 2
    for name, value in lm.model.state_dict().items():
        old, address, copied = before[name]
        assert value.dtype == old.dtype and value.data_ptr() == address and torch.equal(value, copied)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in lm.model.modules())


def test_autocast_does_not_disturb_the_check(tokenizer):
    lm = build_lm("llama", tokenizer, dtype=torch.float32)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            assert isinstance(lm.forward, PackedForward) and lm.trunk.depth == 2
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_in_float32_a_model_computes_what_its_copy_does(kind):
    torch.manual_seed(1)
    model = BUILDERS[kind]().bfloat16().eval()
    tokens = torch.randint(320, (2, 9))
    with torch.no_grad():
        with in_float32(model):
            found = model(tokens).logits
        rounded, expected = model(tokens).logits, model.float()(tokens).logits
    assert torch.equal(found, expected) and rounded.dtype == torch.bfloat16


def test_an_error_leaves_a_model_as_it_was():
    model = BUILDERS["llama"]().bfloat16()
    with pytest.raises(IndexError), in_float32(model):
        model(torch.tensor([[400]]))
    handle = model.model.layers[1].mlp.register_forward_pre_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), in_float32(model):
        model(torch.tensor([[4]]))
    handle.remove()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_kernels_in_16_bits_only_are_compared_in_16_bits(tokenizer, monkeypatch):
    @contextmanager
    def refuse(model):
        raise RuntimeError("FlashAttention only support fp16 and bf16 data type")
        yield

    monkeypatch.setattr(chooser, "in_float32", refuse)
    lm = build_lm("llama", tokenizer, dtype=torch.bfloat16)
    assert isinstance(lm.forward, PackedForward)

    def causal(rows, dtype):
        return attention_mask(
            rows._replace(segments=rows.segments.clamp(max=0), owners=rows.owners.clamp(max=0)), dtype
        )

    monkeypatch.setattr(packed_forward, "attention_mask", causal)
    with pytest.warns(UserWarning, match="its scores are off by"):
        assert isinstance(build_lm("llama", tokenizer, dtype=torch.bfloat16).forward, PromptCacheForward)


def test_a_mask_that_overflows_in_16_bits_is_noticed(tokenizer, monkeypatch):
    def overflowing(rows, dtype):
        mask = attention_mask(rows, dtype)
        return mask * 2 - mask * 2 if dtype == torch.bfloat16 else mask

    monkeypatch.setattr(packed_forward, "attention_mask", overflowing)
    with pytest.warns(UserWarning, match=r"its scores in torch.bfloat16 are not finite"):
        assert isinstance(build_lm("llama", tokenizer, dtype=torch.bfloat16).forward, PromptCacheForward)


# Rows that reach the adapted modules


class Experts(nn.Module):
    """Two linear experts, of which each token takes one, as in mixtures of experts."""

    def __init__(self):
        super().__init__()
        self.expert_a, self.expert_b = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x):
        tokens = x.flatten(0, -2)
        first, out = tokens[:, 0] > 0, torch.zeros_like(tokens)
        out[first], out[~first] = self.expert_a(tokens[first]), self.expert_b(tokens[~first])
        return out.view_as(x)


class Mixed(nn.Module):
    """Flattens tokens, and reverses them."""

    def __init__(self):
        super().__init__()
        self.mixed = nn.Linear(16, 16)

    def forward(self, x):
        return self.mixed(x.flatten(0, -2).flip(0)).flip(0).view_as(x)


def opt():
    sizes = dict(vocab_size=320, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=4)
    return OPTForCausalLM(OPTConfig(**sizes, word_embed_proj_dim=16, max_position_embeddings=256, init_std=0.3))


def llama_with(mlp):
    def build():
        model = BUILDERS["llama"]()
        for layer in model.model.layers:
            layer.mlp = mlp()
        return model

    return build


def test_layers_that_flatten_rows_and_tokens(tokenizer, monkeypatch):
    """Two tasks with unequal numbers of rows, each with its own weights."""
    add(monkeypatch, "opt", opt, ["fc1", "fc2"])
    lm = build_lm("opt", tokenizer)
    monkeypatch.setattr("bayes_lora.episodes.packing.ROW_TOKENS", 1)
    episode, _ = query_episode(lm, (1, 3))
    assert episode.rows_per_task == (1, 3)
    phi = random_phi(lm, 2, 1)
    scores = lm(phi, episode)
    for t, task in enumerate(episode.examples):
        with lm.sites.bind({site: value[t, 0] for site, value in phi.items()}):
            for i, example in enumerate(task):
                if example is not None:
                    expected = alone(lm.model, example).to(scores.dtype)
                    torch.testing.assert_close(scores[t, i, : len(expected)], expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("mlp", "targets", "named"), [(Experts, ["expert_a", "q_proj"], "expert_a"), (Mixed, ["mixed"], "mixed")]
)
def test_modules_that_see_other_tokens_are_refused(mlp, targets, named, tokenizer, monkeypatch):
    add(monkeypatch, "mixture", llama_with(mlp), targets)
    lm = build_lm("mixture", tokenizer)
    message = rf"module 'model\.layers\.2\.mlp\.{named}': LoRA on it cannot be random, because its input is not the tok"
    with pytest.raises(SiteError, match=message):
        lm.features(query_episode(lm)[0])


def test_modules_that_no_text_reaches_are_refused(tokenizer, monkeypatch):
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.picture = nn.Linear(16, 16)

        def forward(self, x):
            return x

    add(monkeypatch, "unused", llama_with(Unused), ["picture", "q_proj"])
    lm = build_lm("unused", tokenizer)
    with pytest.raises(SiteError, match=r"module 'model\.layers\.2\.mlp\.picture': text does not reach it"):
        lm.features(query_episode(lm)[0])
