"""Every fast way to run a language model against the plain one: demonstrations, checkpointing, 16 bits, caches."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm, make_tasks
from lm_helpers import bloom, closeness, query_episode, random_phi
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import (
    GPTJConfig,
    GPTJForCausalLM,
    GPTNeoConfig,
    GPTNeoForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from bayes_lora.episodes import collate, packing
from bayes_lora.episodes.episode import attention_mask
from bayes_lora.errors import ConfigError, ModelError, SiteError
from bayes_lora.lm import choose_forward as fast_path
from bayes_lora.lm import packed_forward as forward
from bayes_lora.lm.kv_cache_forward import PromptCacheForward
from bayes_lora.lm.packed_forward import PackedForward
from bayes_lora.lm.tensor_cache import TensorCache
from bayes_lora.lm.tensor_store import TensorStore
from bayes_lora.lm.trunk import Trunk


def plain_scores(lm: Any, example: Any) -> torch.Tensor:
    """An option a row, through Hugging Face's forward and full logits, whatever stands before the prompt."""
    context = [] if example.context is None else example.context.tokens.tolist()
    before = context + example.tokens[example.segments == 0].tolist()
    scores = []
    for k in range(example.num_options):
        option = example.targets[example.target_options == k].tolist()
        logits = lm.model(torch.tensor([before + option])).logits[0].log_softmax(-1)
        scores.append(sum(logits[len(before) + i - 1, token] for i, token in enumerate(option)))
    return torch.stack(scores)


def expected_scores(lm: Any, phi: Any, episode: Any) -> torch.Tensor:
    """A loop over draws, tasks, examples and options."""
    draws, tasks = next(iter(phi.values())).shape[:2]
    rows = []
    for d in range(draws):
        for t in range(tasks):
            with lm.sites.bind({site: value[d, t, 0] for site, value in phi.items()}):
                for example in episode.examples[t]:
                    if example is not None:
                        rows.append(plain_scores(lm, example))
    return torch.cat(rows)


def present(scores: torch.Tensor, episode: Any) -> torch.Tensor:
    return scores[:, episode.option_mask].flatten()


def check_against_plain(lm: Any, episode: Any, **tolerance: float) -> None:
    """Scores, and gradients of a weighted sum of them."""
    found, wanted = (random_phi(lm, 2, episode.shape[0], 1, seed=3) for _ in range(2))
    for phi in (found, wanted):
        for value in phi.values():
            value.requires_grad_()
    scores, expected = present(lm(found, episode), episode), expected_scores(lm, wanted, episode)
    torch.testing.assert_close(scores, expected, **tolerance)
    weights = torch.linspace(-1, 1, len(scores), dtype=scores.dtype)
    (scores * weights).sum().backward()
    (expected * weights).sum().backward()
    for site, value in found.items():
        scale = float(wanted[site].grad.abs().max())
        # Most models normalise in float32, whatever their dtype.
        torch.testing.assert_close(value.grad, wanted[site].grad, rtol=1e-5, atol=(1e-4 if tolerance else 1e-5) * scale)


def episode_with_demonstrations(lm: Any) -> Any:
    tasks = list(make_tasks(2).values())
    rows = [
        lm.encoder(tasks[0].examples[4:7], tasks[0].examples[:2]),  # of other lengths, and one fewer
        lm.encoder(tasks[1].examples[4:8], tasks[1].examples[:1]),
    ]
    return collate(rows, [lm.encoder(task.examples[:4]) for task in tasks])


@pytest.mark.parametrize("row_tokens", [2048, 1])
def test_shared_demonstrations_equal_each_query_behind_its_own(
    any_lm: Any, row_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "ROW_TOKENS", row_tokens)
    episode = episode_with_demonstrations(any_lm)
    assert len(episode.rows[1]) == (1 if row_tokens > 1 else 4)
    assert any_lm.trunk.depth == 2
    check_against_plain(any_lm, episode, **closeness(any_lm))
    assert isinstance(any_lm._forward, PackedForward)


def test_gradient_checkpointing_changes_nothing(any_lm: Any, tokenizer: Any) -> None:
    """Backward runs the layers again, when other values, or none, are bound; once a layer."""
    plain, lm = any_lm, build_lm(any_lm.name, tokenizer, gradient_checkpointing=True)
    episode, _ = query_episode(lm)
    calls = []
    lm.trunk.layers[-1].register_forward_pre_hook(lambda *_: calls.append(1))
    inside = next(m for name, m in lm.trunk.layers[-1].named_modules() if name.endswith(("mlp.act_fn", "mlp.act")))
    inside.register_forward_hook(lambda *_: calls.append(2))
    found = {}
    for one in (plain, lm):
        phi = {site: value.requires_grad_() for site, value in random_phi(one, 2, 2, 1).items()}
        scores = one(phi, episode)
        calls.clear()
        with lm.sites.bind(random_phi(lm, seed=8)):
            present(scores, episode).square().sum().backward()
        found[one] = scores, {site: value.grad for site, value in phi.items()}
    assert calls in ([2], [1, 2])  # the layer's forward is run again: before transformers 5.23, with the layer's hooks
    torch.testing.assert_close(found[lm][0], found[plain][0])
    for site, gradient in found[lm][1].items():
        torch.testing.assert_close(gradient, found[plain][1][site])
    assert not any(module.training for module in lm.model.modules() if isinstance(module, torch.nn.Dropout))


def test_backward_twice_through_checkpoints(lm: Any, tokenizer: Any) -> None:
    """As for second-order gradient steps."""
    plain, lm = lm, build_lm("llama", tokenizer, gradient_checkpointing=True)
    episode, _ = query_episode(lm)
    seconds = []
    for one in (plain, lm):
        phi = {site: value.requires_grad_() for site, value in random_phi(one, 2, 2, 1).items()}
        with sdpa_kernel(SDPBackend.MATH):
            loss = present(one(phi, episode), episode).square().sum()
            first = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            sum(value.square().sum() for value in first).backward()
        seconds.append(phi["o_proj.lora_B"].grad)
    torch.testing.assert_close(*seconds)


def test_checkpointed_layers_apply_no_dropout(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """OPT's do it themselves, by their own flag."""
    config = dict(vocab_size=320, hidden_size=16, ffn_dim=24, num_hidden_layers=4, num_attention_heads=4)
    settings = dict(config, word_embed_proj_dim=16, max_position_embeddings=256, dropout=0.4, init_std=0.3)
    monkeypatch.setitem(BUILDERS, "opt", lambda: OPTForCausalLM(OPTConfig(**settings)))
    monkeypatch.setitem(TARGETS, "opt", ["q_proj", "v_proj"])
    lm = build_lm("opt", tokenizer, gradient_checkpointing=True)
    check_against_plain(lm, query_episode(lm)[0])


def test_checkpointing_and_a_key_value_cache_exclude_each_other(
    tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm = bloom(tokenizer, monkeypatch, gradient_checkpointing=True)
    with pytest.raises(ConfigError, match="gradient_checkpointing: BloomForCausalLM requires a key-value cache"):
        lm.features(query_episode(lm)[0])


def test_a_model_without_checkpointing_refuses_it(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaForCausalLM

    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    with pytest.raises(ConfigError, match="not supported by LlamaForCausalLM"):
        build_lm("llama", tokenizer, gradient_checkpointing=True)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_a_base_in_16_bits_keeps_phi_and_scores_in_32(kind: str, tokenizer: Any) -> None:
    """Gradients too, or small steps would be rounded away; values are those of float32 up to bfloat16's rounding."""
    full, half = (build_lm(kind, tokenizer, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    episode, _ = query_episode(full)
    seen = []
    adapted = next(m for m in half.model.modules() if hasattr(m, "lora_A"))
    adapted.lora_A["default"].register_forward_hook(lambda _, args, out: seen.append((args[0].dtype, out.dtype)))
    results = []
    for lm in (full, half):
        phi = {s: (0.1 * v).float().requires_grad_() for s, v in random_phi(lm, 3, 2, 1).items()}
        scores = lm(phi, episode)
        assert scores.dtype == torch.float32
        scores.log_softmax(-1)[..., 0][:, episode.mask].sum().backward()
        gradients = torch.cat([value.grad.flatten() for value in phi.values()])
        assert gradients.dtype == torch.float32
        results.append((present(scores, episode), gradients))
    assert set(seen[-1]) == {torch.bfloat16}
    for whole, rounded in zip(*results, strict=True):
        assert 0 < float((whole - rounded).detach().norm() / whole.detach().norm()) < 0.1
    assert half.features(episode).log_probs.dtype == torch.float32


# --- the check on first use, and where it leads ---


@contextmanager
def shifted(self: Any, states: Any) -> Any:
    with original_skipped(self, None if states is None else states + 0.5):
        yield


original_skipped = Trunk.skipped


def test_a_wrong_trunk_is_noticed_and_left_out(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One warning; scores are then those of the full forward."""
    monkeypatch.setattr(Trunk, "skipped", shifted)
    episode, _ = query_episode(lm)
    with pytest.warns(UserWarning, match="with cached hidden states at layer 2, its scores are off by"):
        lm.features(episode)
    assert lm.trunk.depth == 0
    check_against_plain(lm, episode)
    assert len(lm.trunk.cache) == 3  # a made-up row, and two made-up examples of the check


@pytest.mark.parametrize("demonstrations", [True, False])
def test_a_model_without_4_d_masks_uses_its_key_value_cache(
    tokenizer: Any, demonstrations: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Bloom makes its position bias of a 2-D mask."""
    lm = bloom(tokenizer, monkeypatch)
    episode = episode_with_demonstrations(lm) if demonstrations else query_episode(lm)[0]
    with pytest.warns(UserWarning, match="BloomForCausalLM: with packed rows .* it raises .* key-value cache"):
        features = lm.features(episode)
    assert isinstance(lm._forward, PromptCacheForward) and lm.trunk.depth == 0
    check_against_plain(lm, episode, rtol=1e-4, atol=1e-4)
    alone = plain_scores(lm, episode.examples[1][2]).log_softmax(-1)
    torch.testing.assert_close(features.log_probs[1, 2, : len(alone)], alone, rtol=1e-4, atol=1e-4)
    prompt = episode.examples[1][2]
    before = [] if prompt.context is None else prompt.context.tokens.tolist()
    output = lm.model.transformer(torch.tensor([before + prompt.tokens[prompt.segments == 0].tolist()]))
    torch.testing.assert_close(features.hidden[1, 2, 1], output.last_hidden_state[0, -1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_the_key_value_cache_scores_as_packed_rows_do(kind: str, tokenizer: Any) -> None:
    """On models that can take either; options of one token need no second forward."""
    lm = build_lm(kind, tokenizer, dtype=torch.float32)
    episode, _ = query_episode(lm)
    phi = random_phi(lm, 2, 2, 1)
    packed = present(lm(phi, episode), episode)
    lm._forward = PromptCacheForward(lm.model)
    torch.testing.assert_close(present(lm(phi, episode), episode), packed, rtol=1e-4, atol=1e-4)
    short = collate([[packing.pack([5, 6, 7], [[1], [2]], 0), packing.pack([9], [[1], [3]], 1)]])
    phi = random_phi(lm, 2, 1, 1)
    found = present(lm(phi, short), short)
    torch.testing.assert_close(found, expected_scores(lm, phi, short), rtol=1e-4, atol=1e-4)


def test_a_mask_of_its_own_is_noticed_before_it_matters(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-Neo's local layers look back 8 places of the row, whatever the mask; a short row does not show it."""
    sizes = dict(vocab_size=320, hidden_size=16, num_layers=4, num_heads=4, window_size=8, max_position_embeddings=256)
    layers = dict(attention_types=[[["global", "local"], 2]], initializer_range=0.3)
    monkeypatch.setitem(BUILDERS, "neo", lambda: GPTNeoForCausalLM(GPTNeoConfig(**sizes, **layers)))
    monkeypatch.setitem(TARGETS, "neo", ["q_proj", "v_proj"])
    lm = build_lm("neo", tokenizer, dtype=torch.float32)
    with pytest.warns(UserWarning, match="GPTNeoForCausalLM: with packed rows .* its scores are off"):
        lm.features(collate([[packing.pack([5, 6], [[1], [2]], 0)]]))
    check_against_plain(lm, query_episode(lm)[0], rtol=1e-4, atol=1e-4)


def test_examples_that_see_one_another_are_noticed(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mask that keeps them apart behind demonstrations alone: nothing else of the check would show it."""

    def leaky(rows: Any, dtype: torch.dtype) -> torch.Tensor:
        alone = (rows.owners != 0).all(-1, keepdim=True)
        return attention_mask(rows._replace(owners=rows.owners.where(~alone, rows.owners.clamp(max=1))), dtype)

    monkeypatch.setattr(forward, "attention_mask", leaky)
    with pytest.warns(UserWarning, match="LlamaForCausalLM: with packed rows .* its scores are off"):
        lm.features(query_episode(lm)[0])
    check_against_plain(lm, query_episode(lm)[0])


class RoutedExperts(torch.nn.Module):
    """Experts that are linear modules and get the tokens sent to them, as in some models with code of their own."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.router = torch.nn.Linear(width, 2, bias=False)
        self.experts = torch.nn.ModuleList(torch.nn.Linear(width, width, bias=False) for _ in range(2))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        flat = hidden.flatten(0, -2)
        weights, chosen = self.router(flat).softmax(-1).max(-1)
        out = torch.zeros_like(flat)
        for index, expert in enumerate(self.experts):
            out[chosen == index] = expert(flat[chosen == index])
        return (weights[:, None] * out).view_as(hidden)


@pytest.mark.parametrize("targets", [["experts.0", "experts.1"], ["router", "q_proj"]])
def test_lora_on_routed_experts_is_refused(targets: list[str], tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their tokens are not grouped by task, and an even number of them would be divided among tasks silently."""

    def routed() -> Any:
        model = original()
        for layer in model.model.layers:
            layer.mlp = RoutedExperts(model.config.hidden_size)
        return model

    original = BUILDERS["llama"]
    monkeypatch.setitem(BUILDERS, "routed", routed)
    lm = build_lm("routed", tokenizer, targets=targets)
    episode, _ = query_episode(lm)
    if "router" in targets:
        check_against_plain(lm, episode)
        return
    expected = r"module 'model.layers.2.mlp.experts.0': LoRA on it cannot be random, .* exclude_modules"
    with pytest.raises(SiteError, match=expected):
        lm(random_phi(lm, 2, 2, 1), episode)


# --- examples that share a row ---


def uneven_episode(lm: Any, counts: tuple[int, ...] = (5, 1, 7)) -> Any:
    """Tasks with unequal numbers of examples and of rows, several of them in a row."""
    tasks = list(make_tasks(len(counts)).values())
    encoded = [lm.encoder(task.examples[:n]) for task, n in zip(tasks, counts, strict=True)]
    encoded[1] = encoded[1] + lm.encoder(tasks[1].examples[8:12], tasks[1].examples[:1])  # and some that share more
    return collate(encoded)


def test_sharing_a_row_equals_a_row_alone(any_lm: Any) -> None:
    """Values and gradients of draws of every task, from the trunk computed, kept, and kept in part."""
    episode = uneven_episode(any_lm)
    assert len(set(episode.rows_per_task)) > 1
    assert any(len(row.examples) > 1 and row.context is None for task in episode.rows for row in task)
    first = [example for example in episode.examples[2] if example is not None][:3]
    any_lm.features(collate([first]))  # from here on these are known to the trunk
    assert len(any_lm.trunk.cache) == 3 + 3  # those of the check, too
    for _ in range(2):
        check_against_plain(any_lm, episode, **closeness(any_lm))


@pytest.mark.parametrize("checkpointing", [False, True])
def test_sharing_rows_without_a_trunk(tokenizer: Any, checkpointing: bool) -> None:
    """All layers adapted; backward through checkpoints takes the tasks' rows apart as forward did."""
    lm = build_lm("llama", tokenizer, top_layers=None, gradient_checkpointing=checkpointing)
    assert lm.trunk.depth == 0
    check_against_plain(lm, uneven_episode(lm))


def test_an_example_in_other_company_is_known_to_the_trunk(lm: Any) -> None:
    """What it shares a row with does not matter; a row behind demonstrations is known as a whole."""
    tasks = list(make_tasks(3).values())
    encoded = [lm.encoder(task.examples[:8]) for task in tasks]
    behind = lm.encoder(tasks[0].examples[8:11], tasks[0].examples[:2])
    lm.features(collate([encoded[0][:1]]))
    phi, sizes = random_phi(lm), []
    lm.trunk.layers[0].register_forward_hook(lambda _, args, out: sizes.append(args[0].shape[0]))
    alone = lm(phi, collate([[example] for example in encoded[1]]))
    assert sum(sizes) == 8
    for company in ([encoded[1]], [encoded[1][::-1]], [encoded[1][:3], encoded[1][3:]]):
        found = lm(phi, collate(company))
        torch.testing.assert_close(found[found > -1e9].sort().values, alone[alone > -1e9].sort().values)
    assert sum(sizes) == 8
    lm(phi, collate([encoded[2][:2] + encoded[1][:2], behind]))
    assert sum(sizes) == 8 + 2 + 1  # two new examples, and one row behind demonstrations
    lm(phi, collate([behind + encoded[2][:1]]))
    assert sum(sizes) == 11
    lm(phi, collate([behind[:2]]))  # another row
    assert sum(sizes) == 12


def test_layers_that_return_tuples(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-J's do: a kept trunk, and the head alone, in pieces."""
    sizes = dict(vocab_size=320, n_embd=16, n_layer=4, n_head=4, rotary_dim=2, n_positions=256, initializer_range=0.3)
    monkeypatch.setitem(BUILDERS, "gptj", lambda: GPTJForCausalLM(GPTJConfig(**sizes)))
    monkeypatch.setitem(TARGETS, "gptj", ["q_proj", "v_proj", "out_proj"])
    monkeypatch.setattr(forward, "LOGIT_BYTES", 3 * 320 * 8)
    lm = build_lm("gptj", tokenizer)
    check_against_plain(lm, episode_with_demonstrations(lm), rtol=1e-5, atol=1e-5)
    assert lm.trunk.depth == 2


def test_a_model_that_cannot_be_used_is_refused(lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = fast_path.plain_scores
    monkeypatch.setattr(fast_path, "plain_scores", lambda *args: plain(*args) + 1.0)
    with pytest.raises(ModelError, match="4-D mask, its scores are off by 1 nats; with a key-value cache, its"):
        lm.features(query_episode(lm)[0])


def test_the_check_needs_no_warning_where_all_is_well(any_lm: Any) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        any_lm.features(query_episode(any_lm)[0])
    assert any_lm.trunk.depth == 2


def test_states_on_disk_score_as_those_in_ram(lm: Any, tmp_path: Any) -> None:
    episode, _ = query_episode(lm)
    phi = random_phi(lm, 2, 2, 1)
    first = lm(phi, episode)
    lm.trunk.cache = TensorCache(0, TensorStore(tmp_path, {}))
    for _ in range(2):  # written, then read
        torch.testing.assert_close(lm(phi, episode), first, rtol=0, atol=0)
    assert lm.trunk.cache.ram_used == 0
