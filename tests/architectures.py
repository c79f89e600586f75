"""Tiny random models of the architectures of transformers, and their scores by plain transformers and plain PEFT."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Iterator
from typing import Any

import peft
import torch
from torch import nn
from transformers import CONFIG_MAPPING, AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from bayes_lora.episodes import collate, packing
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import inject

VOCABULARY = 320
WINDOW = 24
LORA = dict(r=2, lora_alpha=3, task_type="CAUSAL_LM")
SIZES: dict[str, Any] = dict(
    vocab_size=VOCABULARY, max_position_embeddings=160, bos_token_id=0, eos_token_id=0, pad_token_id=0,
    hidden_size=32, d_model=32, word_embed_proj_dim=32, num_hidden_layers=3, decoder_layers=3,
    num_attention_heads=4, decoder_attention_heads=4, num_key_value_heads=2, head_dim=8, sliding_window=WINDOW,
    kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
    intermediate_size=24, ffn_dim=24, decoder_ffn_dim=24, ffn_hidden_size=24, moe_intermediate_size=16,
    shared_expert_intermediate_size=16, num_experts=4, num_local_experts=4, n_routed_experts=4, num_experts_per_tok=2,
    n_group=2, topk_group=1, initializer_range=0.3,
)  # fmt: skip
"""Settings of all architectures that have them."""


def build(kind: str, overrides: dict[str, Any], dtype: torch.dtype = torch.float32) -> Any:
    """A model whose linear maps and embeddings are random enough that an error changes the scores."""
    config_class = CONFIG_MAPPING[kind]
    usual = vars(config_class()).keys() | config_class.attribute_map.keys()
    sizes = {name: value for name, value in SIZES.items() if name in usual} | overrides
    config = config_class(**{name: value for name, value in sizes.items() if value is not ...})
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear | nn.Embedding | Conv1D):
                module.weight.normal_(0, 0.3)
                if getattr(module, "bias", None) is not None:
                    module.bias.normal_(0, 0.3)
    return model.to(dtype)


def _parts(model: Any) -> Iterator[tuple[str, Any]]:
    return ((part, module) for name, module in model.named_modules() for part in name.split("."))


def lora_config(model: Any, targets: Any = None, layers: Any = None, exclude: Any = None) -> peft.LoraConfig:
    """LoRA on all linear maps of the decoder layers, or on the given ones."""
    head = model.get_output_embeddings()
    linear = {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and module is not head and re.search(r"\.\d+\.", name)
    }
    return peft.LoraConfig(
        **LORA,
        target_modules=targets or sorted(linear - set(exclude or ())),
        exclude_modules=r".*\.encoder_attn\..*" if "encoder_attn" in dict(_parts(model)) else None,  # never run
        layers_to_transform=layers,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
    )


def language_model(model: Any, tokenizer: Any, lora: peft.LoraConfig) -> LanguageModel:
    lora = copy.deepcopy(lora)
    inject(lora, model)
    return LanguageModel(model, tokenizer, lora, name="tiny", max_length=64)


class Plain:
    """A model with plain PEFT, which scores one option at a time."""

    def __init__(self, model: Any, lora: peft.LoraConfig) -> None:
        self.model: Any = peft.get_peft_model(model, copy.deepcopy(lora), autocast_adapter_dtype=False).eval()
        self.factors = {
            name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
            for name, parameter in self.model.named_parameters()
            if ".lora_" in name
        }

    def random_factors(self, seed: int, scale: float = 0.5) -> dict[str, torch.Tensor]:
        """Random A and B by module, such that an update of all modules changes the scores."""
        generator = torch.Generator().manual_seed(seed)
        return {
            name: scale / math.sqrt(p.shape[1]) * torch.randn(p.shape, generator=generator)
            for name, p in self.factors.items()
        }

    def assign(self, factors: dict[str, torch.Tensor]) -> None:
        with torch.no_grad():
            for name, value in factors.items():
                self.factors[name].copy_(value)

    def scores(self, example: Any, padding: int = 0) -> torch.Tensor:
        return plain_scores(self.model, example, padding)


def plain_scores(model: Any, example: Any, padding: int = 0) -> torch.Tensor:
    """Log-probabilities of the options, one row per option, optionally followed by padding."""
    before = [] if example.context is None else example.context.tokens.tolist()
    before = before + example.tokens[example.segments == 0].tolist()
    found = []
    for k in range(example.num_options):
        option = example.targets[example.target_options == k].tolist()
        row = torch.tensor([before + option[:-1] + [0] * padding])
        mask = (torch.arange(row.shape[1]) < row.shape[1] - padding).long()[None]
        logits = model(input_ids=row, attention_mask=mask, use_cache=False).logits[0].float().log_softmax(-1)
        found.append(sum(logits[len(before) - 1 + i, token] for i, token in enumerate(option)))
    return torch.stack(found)


def random_rows(longest: int) -> Any:
    """Three tasks with unequal numbers of rows: shared demonstrations, rows without any, and one long row.

    Options have one to three tokens; some begin with equal tokens.
    """
    generator = torch.Generator().manual_seed(7)

    def tokens(count: int) -> list[int]:
        return torch.randint(1, VOCABULARY, (count,), generator=generator).tolist()

    def example(length: int, counts: tuple[int, ...]) -> Any:
        first = tokens(1)
        return packing.pack(tokens(length), [first + tokens(n - 1) if n > 1 else tokens(1) for n in counts], 0)

    context = packing.Context.of(tokens(longest - 12))
    shared = [packing.in_context(example(n, c), context) for n, c in ((7, (1, 2, 3)), (3, (1, 1)), (5, (2, 2)))]
    apart = [example(n, c) for n, c in ((5, (3, 3)), (2, (1, 2)), (9, (2, 1, 1)), (1, (1, 1)))]
    return collate([shared + apart[:1], apart, [example(longest - 3, (2, 3)), example(4, (1, 1, 1))]])
