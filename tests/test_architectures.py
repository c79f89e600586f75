"""Scores on many architectures, against plain transformers and plain PEFT with one row per option."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from architectures import WINDOW, Plain, build, language_model, lora_config, random_rows

from bayes_lora.episodes import collate
from bayes_lora.errors import ModelError
from bayes_lora.lm.kv_cache_forward import PromptCacheForward
from bayes_lora.lm.packed_forward import PackedForward
from bayes_lora.lm.text_config import max_row_length
from bayes_lora.tasks import Example

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

MLA = {"num_key_value_heads": 4, "head_dim": 4}
SPARSE = MLA | {"index_topk": 24, "index_n_heads": 2, "index_head_dim": 8}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 1}
DBRX = {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2}
PER_LAYER = {"num_kv_shared_layers": 0, "vocab_size_per_layer_input": 320, "hidden_size_per_layer_input": 8}
PACKED: dict[str, dict[str, Any]] = {
    **dict.fromkeys(
        "apertus arcee aria_text beam biogpt bitnet cohere cohere2 cohere2_moe ctrl cwm diffllama ernie4_5 "
        "ernie4_5_moe exaone4 exaone_moe flex_olmo flint gemma gemma2 gemma3_text glm glm4 glm4_moe gpt2 gpt_bigcode "
        "gpt_neox gpt_neox_japanese gpt_oss granite granite_swa granitemoe granitemoe_swa granitemoeshared helium "
        "hunyuan_v1_dense hunyuan_v1_moe hy_v3 hyperclovax jais2 jetmoe kolibri1 laguna lfm2 llama mellum "
        "mimo_v2_flash minimax_m2 minimax_m3_vl_text ministral ministral3 mistral mixtral modernbert-decoder moshi "
        "nanochat nemotron olmo olmo2 olmo3 olmoe opt persimmon phi phi3 phimoe qwen2_moe qwen3 qwen3_moe seed_oss "
        "smollm3 solar_open stablelm starcoder2 vaultgemma whisper xglm".split(),
        {},
    ),
    "axk1": MLA,
    "axk2": SPARSE,
    "codegen": {"rotary_dim": 4},
    "dbrx": {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2, "clip_qkv": 8.0}, "ffn_config": DBRX},
    "deepseek_v2": MLA,
    "deepseek_v3": MLA,
    "deepseek_v32": SPARSE,
    "doge": {"keep_window_size": 24, "sliding_window": None},
    "dots1": {"n_shared_experts": 1},
    "falcon": {"head_dim": ...},
    "gemma3n_text": PER_LAYER,
    "gemma4_text": PER_LAYER | {"head_dim": ...},
    "glm4_moe_lite": MLA,
    "gptj": {"rotary_dim": 4},
    "hrm_text": {"num_hidden_layers": 2},
    "llama4_text": {"attention_chunk_size": 24},
    "minicpm3": MLA,
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
}
"""Architectures that take packed rows: shared demonstrations, several examples and tasks in one batch."""

CACHED: dict[str, dict[str, Any]] = {
    "bloom": {},
    "glm_moe_dsa": SPARSE,
    "gpt_neo": {
        "num_hidden_layers": ...,
        "num_layers": 4,
        "attention_types": [[["global", "local"], 2]],
        "window_size": 24,
    },
    "hy_v4": {},
    "mpt": {},
}
"""Architectures that need a key-value cache: position biases of a 2-D mask, and masks of their own."""

NO_CACHE = "with a key-value cache, it raises AttributeError: '[A-Za-z0-9]*Output' object has no attribute 'past_key"
NO_COPIES = (
    "with a key-value cache, it raises AttributeError: 'LinearAttentionLayer' object has no attribute 'batch_rep"
)
NO_LENGTH = "with a key-value cache, it raises ValueError: `get_seq_length` can only be called on Attention layers"
NO_ROWS = "with a key-value cache, it raises RuntimeError: Sizes of tensors must match"
NOT_CAUSAL = "with a key-value cache, it raises AttributeError: 'NoneType' object has no attribute 'batch_repeat"
OFF = "with a key-value cache, its scores are off by"
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "bailing_hybrid": ({}, NO_LENGTH),
    "bamba": (MAMBA | {"attn_layer_indices": [1]}, NO_COPIES),
    "bart": ({}, OFF),
    "bert": ({}, NOT_CAUSAL),
    "blenderbot": ({}, OFF),
    "electra": ({}, NOT_CAUSAL),
    "falcon_h1": (MAMBA | {"mamba_d_ssm": 64}, NO_ROWS),
    "falcon_mamba": ({}, NO_CACHE),
    "granitemoehybrid": (MAMBA | {"layer_types": ["mamba", "attention", "mamba"]}, NO_COPIES),
    "inkling_text": ({"sliding_window_size": 24}, NO_ROWS),
    "jamba": ({}, NO_LENGTH),
    "lfm2_moe": ({"layer_types": ["conv", "full_attention", "conv"]}, NO_COPIES),
    "lfm3": ({}, NO_COPIES),
    "mamba": ({}, NO_CACHE),
    "mamba2": ({"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 1}, NO_CACHE),
    "marian": ({}, OFF),
    "mbart": ({}, OFF),
    "minimax": ({}, "it raises IndexError: list index out of range"),
    "nemotron_h": ({}, NO_COPIES),
    "olmo_hybrid": ({}, NO_COPIES),
    "openai-gpt": ({}, NO_CACHE),
    "qwen3_5_text": ({}, NO_LENGTH),
    "qwen3_next": ({}, NO_LENGTH),
    "recurrent_gemma": ({}, NO_CACHE),
    "roberta": ({}, NOT_CAUSAL),
    "roformer": ({}, NOT_CAUSAL),
    "rwkv": ({}, NO_CACHE),
    "xlstm": ({"v_head_dim": ..., "head_dim": ...}, "it raises ValueError: matC_old has wrong shape"),
    "zamba": ({"num_hidden_layers": 8}, NO_COPIES),
    "zaya": ({"num_experts_per_tok": 1}, NO_ROWS),
}
"""Architectures that are refused on first use: recurrent states, no cache that can be copied, or not causal."""

FAST = "bloom deepseek_v32 falcon gemma2 gpt2 llama llama4_text mamba mistral mixtral opt qwen2_moe".split()
EXPERTS = {"gate_proj", "up_proj", "down_proj", "router", "out_proj"}
"""Modules that PEFT changes or refuses in some architectures: routers, names of experts, projections of Mamba."""


def rows_of(*tables: Any) -> list[Any]:
    kinds = [kind for table in tables for kind in table]
    return [pytest.param(kind, marks=() if kind in FAST else pytest.mark.slow) for kind in kinds]


class Setting:
    """Our model and the plain one, with LoRA on all layers but the lowest; three draws, one for each task."""

    def __init__(
        self, kind: str, overrides: dict[str, Any], tokenizer: Any, dtype: torch.dtype = torch.float32
    ) -> None:
        base = build(kind, overrides, dtype)
        lora = lora_config(base, layers=[1, 2, 3], exclude=EXPERTS)
        self.lm = language_model(copy.deepcopy(base), tokenizer, lora)
        self.plain = Plain(base, lora)
        self.episode = random_rows(min(max_row_length(base.config) or 60, 60))
        self.draws = [self.plain.random_factors(seed) for seed in range(3)]
        by_task = [self.lm.sites.stack(draw) for draw in self.draws]
        self.phi = {site: torch.stack([phi[site] for phi in by_task])[:, None] for site in by_task[0]}

    def scores(self) -> torch.Tensor:
        return self.lm(self.phi, self.episode)[self.episode.option_mask]

    def plain_scores(self, padding: int = 0) -> torch.Tensor:
        scores = [self.task_scores(t, t, padding) for t in range(len(self.draws))]
        return torch.cat(scores)

    def task_scores(self, task: int, draw: int, padding: int = 0) -> torch.Tensor:
        self.plain.assign(self.draws[draw])
        examples = [example for example in self.episode.examples[task] if example is not None]
        return torch.cat([self.plain.scores(example, padding) for example in examples])


@pytest.mark.filterwarnings("ignore:.*Options are scored from a key-value cache", "ignore:.*All layers run every time")
@pytest.mark.parametrize("kind", rows_of(PACKED, CACHED))
@torch.no_grad()
def test_scores_are_those_of_plain_transformers_and_plain_peft(kind: str, tokenizer: Any) -> None:
    setting = Setting(kind, (PACKED | CACHED)[kind], tokenizer)
    expected = setting.plain_scores()
    torch.testing.assert_close(setting.scores(), expected, rtol=0, atol=1e-4)
    assert isinstance(setting.lm.forward, PackedForward if kind in PACKED else PromptCacheForward)
    # The draw of another task would give other scores, so the comparison tells tasks apart.
    other = setting.task_scores(-1, 0)
    assert float((other - expected[-len(other) :]).abs().max()) > 0.01


@pytest.mark.parametrize("kind", rows_of(REFUSED))
def test_other_architectures_are_refused_with_the_reason(kind: str, tokenizer: Any) -> None:
    overrides, reason = REFUSED[kind]
    setting = Setting(kind, overrides, tokenizer)
    with pytest.raises(ModelError, match=f"{type(setting.lm.model).__name__} is not supported: .*{reason}"):
        setting.scores()


@pytest.mark.parametrize("kind", ["mistral", "gpt_oss", "llama4_text", "deepseek_v32"])
@pytest.mark.filterwarnings("ignore:.*prompts are longer")
@torch.no_grad()
def test_texts_beyond_a_window_are_cut_and_scored_as_the_ordinary_forward_does(kind: str, tokenizer: Any) -> None:
    """The window is 24 tokens, ``max_length`` 64."""
    setting = Setting(kind, PACKED[kind], tokenizer)
    long = Example("the film was good and bad so maybe not " * 20, ("yes", "no"), 0)
    short = Example("the film", ("yes", "no"), 1)
    encoded = [setting.lm.encoder(task) for task in ([long, short, long], [short], [long, short])]
    lengths = [int(example.positions.max()) + 1 for task in encoded for example in task]
    assert WINDOW - 2 <= max(lengths) <= WINDOW
    setting.episode = collate(encoded)
    torch.testing.assert_close(setting.scores(), setting.plain_scores(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "qwen2_moe", "bloom"])
@pytest.mark.filterwarnings("ignore:.*Options are scored from a key-value cache")
def test_gradients_are_those_of_plain_peft(kind: str, tokenizer: Any) -> None:
    """With respect to phi, of a weighted sum of all scores."""
    setting = Setting(kind, (PACKED | CACHED)[kind], tokenizer)
    for value in setting.phi.values():
        value.requires_grad_()
    scores = setting.scores()
    weights = torch.linspace(-1, 1, len(scores))
    (scores * weights).sum().backward()
    start = 0
    for t, (draw, task) in enumerate(zip(setting.draws, setting.episode.examples, strict=True)):
        setting.plain.assign(draw)
        setting.plain.model.zero_grad()
        own = torch.cat([setting.plain.scores(example) for example in task if example is not None])
        (own * weights[start : start + len(own)]).sum().backward()
        start += len(own)
        found = setting.lm.sites.unstack({site: value.grad[t, 0] for site, value in setting.phi.items()})
        for name, gradient in found.items():
            expected = setting.plain.factors[name].grad
            torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))
    assert start == len(scores)


@pytest.mark.filterwarnings("ignore:.*Options are scored from a key-value cache")
@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2", "opt", "mistral", "bloom"])
@torch.no_grad()
def test_in_bfloat16_rounding_is_no_larger_than_of_the_ordinary_forward(kind: str, tokenizer: Any) -> None:
    """Errors against float32 with the same rounded weights: ours, of a row alone, and of a row with padding.

    The errors of about 40 scores are random, so their root mean squares differ by some 20 %. The bound of 1.5 is above
    that, and far below a wrong mask or position.
    """
    setting = Setting(kind, (PACKED | CACHED)[kind], tokenizer, torch.bfloat16)
    for draw in setting.draws:
        for name, value in draw.items():
            draw[name] = value.bfloat16().float()
    alone, padded = setting.plain_scores(), setting.plain_scores(padding=5)
    scores = setting.scores()
    setting.plain.model.float()
    exact = setting.plain_scores()

    def error(found: torch.Tensor, expected: torch.Tensor) -> float:
        return float((found - expected).square().mean().sqrt())

    scatter = max(error(alone, exact), error(padded, exact))
    assert 0 < error(scores, exact) < 1.5 * scatter
    assert error(scores, alone) < 1.5 * (error(alone, exact) + error(padded, exact))
