"""Exported adapters under many LoRA settings, loaded by plain PEFT into a freshly loaded base."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from architectures import build, plain_scores, random_rows
from pyro.distributions import Delta
from transformers import AutoModelForCausalLM

from bayes_lora.errors import SiteError
from bayes_lora.lm.loading import from_peft, load_language_model
from bayes_lora.posterior.task_posterior import TaskPosterior

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},
    "gpt2": {},
    "phi3": {"sliding_window": None},
    "gpt_neox": {},
    "falcon": {"head_dim": ...},
    "mixtral": {},
}
ATTENTION = ["q_proj", "v_proj"]
DROPOUT = "ignore:lora_dropout=0.4 is not applied:UserWarning"
SETTINGS: dict[str, tuple[str, dict[str, Any]]] = {
    "rank 1": ("llama", dict(r=1, target_modules=ATTENTION)),
    "rank 16": ("llama", dict(r=16, target_modules=ATTENTION)),
    "alpha 1": ("llama", dict(lora_alpha=1, target_modules=ATTENTION)),
    "alpha 32": ("llama", dict(lora_alpha=32, r=8, target_modules=ATTENTION)),
    "alpha 2.5": ("llama", dict(lora_alpha=2.5, target_modules=ATTENTION)),
    "rslora": ("llama", dict(use_rslora=True, target_modules=ATTENTION)),
    "rslora, rank 9": ("llama", dict(use_rslora=True, r=9, lora_alpha=4, target_modules=ATTENTION)),
    "one module": ("llama", dict(target_modules=["o_proj"])),
    "a set": ("llama", dict(target_modules={"k_proj", "o_proj"})),
    "longer names": ("llama", dict(target_modules=["self_attn.q_proj", "mlp.down_proj"])),
    "whole names": ("llama", dict(target_modules=["model.layers.1.self_attn.q_proj", "model.layers.2.mlp.up_proj"])),
    "regex": ("llama", dict(target_modules=r".*self_attn\.(q|v)_proj")),
    "regex of layers": ("llama", dict(target_modules=r"model\.layers\.(0|2)\.mlp\.(up|down)_proj")),
    "all-linear": ("llama", dict(target_modules="all-linear")),
    "default modules": ("llama", dict(target_modules=None)),
    "one layer": ("llama", dict(layers_to_transform=1, target_modules=ATTENTION)),
    "layers": ("llama", dict(layers_to_transform=[0, 2], target_modules=ATTENTION)),
    "layers in another order": ("llama", dict(layers_to_transform=[2, 1], target_modules=ATTENTION)),
    "layers pattern": ("llama", dict(layers_to_transform=[1], layers_pattern="layers", target_modules=ATTENTION)),
    "layers patterns": ("llama", dict(layers_to_transform=[2], layers_pattern=["layers"], target_modules=ATTENTION)),
    "exclude": ("llama", dict(exclude_modules=["v_proj"], target_modules=["q_proj", "v_proj", "o_proj"])),
    "exclude, regex": ("llama", dict(exclude_modules=r".*\.0\..*", target_modules=ATTENTION)),
    "exclude of all-linear": ("llama", dict(exclude_modules=r".*mlp.*", target_modules="all-linear")),
    "rank pattern": ("llama", dict(rank_pattern={"q_proj": 5}, target_modules=ATTENTION)),
    "rank pattern of a layer": (
        "llama",
        dict(rank_pattern={r"layers.1.self_attn.v_proj": 4}, target_modules=ATTENTION),
    ),
    "rank pattern, regex": ("llama", dict(rank_pattern={r"^model.*\.[02]\..*q_proj": 1}, target_modules=ATTENTION)),
    "alpha pattern": ("llama", dict(alpha_pattern={"v_proj": 12}, target_modules=ATTENTION)),
    "alpha pattern of a layer": ("llama", dict(alpha_pattern={r"layers.2.*q_proj": 7}, target_modules=ATTENTION)),
    "both patterns": ("llama", dict(rank_pattern={"q_proj": 4}, alpha_pattern={"q_proj": 9}, target_modules=ATTENTION)),
    "both patterns, rslora": (
        "llama",
        dict(rank_pattern={"q_proj": 4}, alpha_pattern={"v_proj": 9}, use_rslora=True, target_modules=ATTENTION),
    ),
    "no initialisation": ("llama", dict(init_lora_weights=False, target_modules=ATTENTION)),
    "gaussian": ("llama", dict(init_lora_weights="gaussian", target_modules=ATTENTION)),
    "orthogonal": ("llama", dict(init_lora_weights="orthogonal", target_modules=ATTENTION)),
    "dropout": ("llama", dict(lora_dropout=0.4, target_modules=ATTENTION)),
    "no task type": ("llama", dict(task_type=None, target_modules=ATTENTION)),
    "a revision": ("llama", dict(revision="v2", target_modules=ATTENTION)),
    "biases of the base": ("qwen2", dict(target_modules=["q_proj", "k_proj", "v_proj"])),
    "qwen2, all-linear": ("qwen2", dict(target_modules="all-linear", use_rslora=True)),
    "Conv1D": ("gpt2", dict(target_modules=["c_attn"], fan_in_fan_out=True)),
    "Conv1D, all": ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"], fan_in_fan_out=True)),
    "Conv1D, all-linear": ("gpt2", dict(target_modules="all-linear", fan_in_fan_out=True)),
    "Conv1D, layer": ("gpt2", dict(target_modules=["c_proj"], layers_to_transform=[1], fan_in_fan_out=True)),
    "Conv1D, layers pattern": (
        "gpt2",
        dict(target_modules=["c_fc"], layers_to_transform=[2], layers_pattern="h", fan_in_fan_out=True),
    ),
    "Conv1D, regex": ("gpt2", dict(target_modules=r".*h\.[12]\.attn\.c_proj", fan_in_fan_out=True)),
    "Conv1D, rank pattern": (
        "gpt2",
        dict(target_modules=["c_proj"], rank_pattern={"attn.c_proj": 3}, fan_in_fan_out=True),
    ),
    "fused qkv": ("phi3", dict(target_modules=["qkv_proj"])),
    "fused qkv and MLP": ("phi3", dict(target_modules=["qkv_proj", "gate_up_proj"], use_rslora=True)),
    "fused qkv by heads": ("gpt_neox", dict(target_modules=["query_key_value"])),
    "gpt_neox, all-linear": ("gpt_neox", dict(target_modules="all-linear", layers_to_transform=None)),
    "linear of another class": ("falcon", dict(target_modules=["query_key_value", "dense"])),
    "experts left alone": ("mixtral", dict(target_modules=["q_proj", "o_proj"])),
}
REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "DoRA": ("llama", dict(use_dora=True, target_modules=ATTENTION), r"use_dora=True.*Set use_dora=False"),
    "bias": ("qwen2", dict(bias="lora_only", target_modules=ATTENTION), r"bias='lora_only'.*Set bias='none'"),
    "lora_bias": ("qwen2", dict(lora_bias=True, target_modules=ATTENTION), "Set lora_bias=False"),
    "embeddings": ("llama", dict(target_modules=["embed_tokens"]), "only plain LoRA on linear modules can be random"),
    "head": ("llama", dict(target_modules=["lm_head"]), "LoRA on the LM head cannot be random"),
    "tokens": ("llama", dict(trainable_token_indices=[3], target_modules=ATTENTION), r"trainable_token_indices=\[3\]"),
    "parameters": ("mixtral", dict(target_parameters=["mlp.experts.down_proj"], target_modules=ATTENTION), "Leave"),
    "experts": ("mixtral", dict(target_modules=["w1", "w2"]), "target_modules: the model has no module 'w1'"),
    "all-linear with experts": (
        "mixtral",
        dict(target_modules="all-linear"),
        r"target_modules 'all-linear': PEFT adapts .*'gate_up_proj'.* of experts or routers, not linear",
    ),
    "no such module": ("llama", dict(target_modules=["q_projj"]), "the model has no module 'q_projj'.*did you mean"),
    "no such regex": ("llama", dict(target_modules=r".*query"), "Target modules .*query not found"),
    "all excluded": ("llama", dict(exclude_modules=["q_proj"], target_modules=["q_proj"]), "excluded"),
}  # fmt: skip


@pytest.fixture(scope="module")
def folders(tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Tiny models as folders that ``from_pretrained`` reads."""
    found = {}
    for kind, overrides in MODELS.items():
        found[kind] = tmp_path_factory.mktemp("models") / kind
        build(kind, overrides).save_pretrained(found[kind])
        tokenizer.save_pretrained(found[kind])
    return found


def config_of(settings: dict[str, Any]) -> peft.LoraConfig:
    return peft.LoraConfig(**{"r": 2, "lora_alpha": 3, "task_type": "CAUSAL_LM"} | settings)


def base(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def check_export(lm: Any, folder: Path, tmp_path: Path) -> None:
    """Scores with random weights bound are those of plain PEFT with the exported adapter, and not of the base."""
    generator = torch.Generator().manual_seed(5)
    phi = {site: 0.3 * torch.randn(1, 1, *shape, generator=generator) for site, shape in lm.sites.shapes.items()}
    episode = random_rows(24).per_example()
    with torch.no_grad():
        scores = lm({site: value[0, 0] for site, value in phi.items()}, episode)[episode.option_mask]
    distributions = {site: Delta(value, event_dim=3) for site, value in phi.items()}
    TaskPosterior(lm, distributions, {}, ("a",)).export_peft(tmp_path / "exported")
    loaded = peft.PeftModel.from_pretrained(base(folder), tmp_path / "exported").eval()
    examples = [example for task in episode.examples for example in task]
    with torch.no_grad():
        expected = torch.cat([plain_scores(loaded, example) for example in examples])
        with loaded.disable_adapter():
            without = torch.cat([plain_scores(loaded, example) for example in examples])
    torch.testing.assert_close(scores, expected, rtol=0, atol=1e-4)
    assert float((expected - without).abs().max()) > 0.01


@pytest.mark.filterwarnings(DROPOUT)
@pytest.mark.parametrize("name", SETTINGS)
def test_an_exported_adapter_has_the_same_scores_in_plain_peft(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    kind, settings = SETTINGS[name]
    lm = load_language_model(folders[kind], config_of(settings), cache_folder=None, device="cpu")
    check_export(lm, folders[kind], tmp_path)


@pytest.mark.parametrize("how", ["adapter", "from_peft"])
@pytest.mark.parametrize("name", ["rslora", "regex", "layers pattern", "both patterns", "dropout", "Conv1D, all"])
def test_an_adapter_from_peft_is_exported(
    name: str, how: str, folders: dict[str, Path], tokenizer: Any, tmp_path: Path
) -> None:
    kind, settings = SETTINGS[name]
    model = peft.get_peft_model(base(folders[kind]), config_of(settings | {"init_lora_weights": False}))
    model.save_pretrained(tmp_path / "theirs")
    expected = model.eval()(torch.tensor([[5, 6, 7]])).logits
    if how == "adapter":
        lm = load_language_model(folders[kind], adapter=tmp_path / "theirs", cache_folder=None, device="cpu")
    else:
        lm = from_peft(model, tokenizer, cache_folder=None)
    with lm.sites.bind(lm.sites.initial()):
        torch.testing.assert_close(lm.model(torch.tensor([[5, 6, 7]])).logits, expected, rtol=0, atol=1e-4)
    check_export(lm, folders[kind], tmp_path)


@pytest.mark.filterwarnings("ignore:The following .*_pattern keys did not match:RuntimeWarning")  # PEFT's own keys
@pytest.mark.parametrize("name", REFUSED)
def test_other_settings_are_refused(name: str, folders: dict[str, Path]) -> None:
    kind, settings, message = REFUSED[name]
    with pytest.raises(SiteError, match=message):
        load_language_model(folders[kind], config_of(settings), cache_folder=None, device="cpu")
