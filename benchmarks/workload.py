"""The workload of the speed benchmarks: language models of known shapes with random weights, and random tasks.

Nothing is downloaded. A token is a word, so lengths are exact.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import peft
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, Qwen2Config

from bayes_lora.episodes import PromptTemplate
from bayes_lora.lm.arithmetic import Arithmetic
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.onednn_linear import use_onednn
from bayes_lora.tasks import Example, Task

WORDS = 4096
FLOAT32 = Arithmetic(torch.float32, "torch")


@dataclass(frozen=True)
class Shape:
    """The sizes of a causal LM."""

    name: str
    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocab: int
    tied: bool = False

    @property
    def linears(self) -> dict[str, tuple[int, int]]:
        """In and out features of each linear module of a layer."""
        h, kv = self.hidden, self.hidden // self.heads * self.kv_heads
        attention = {"q_proj": (h, h), "k_proj": (h, kv), "v_proj": (h, kv), "o_proj": (h, h)}
        m = self.intermediate
        return attention | {"gate_proj": (h, m), "up_proj": (h, m), "down_proj": (m, h)}

    def tiny(self) -> Shape:
        """The same architecture, small enough for a test."""
        return replace(
            self, name=f"tiny {self.kind}", layers=6, hidden=32, heads=4, kv_heads=2, intermediate=48, vocab=512
        )


SHAPES = {
    shape.name: shape
    for shape in (
        Shape("smollm2-135m", "llama", 30, 576, 9, 3, 1536, 49152, tied=True),
        Shape("llama-3-8b", "llama", 32, 4096, 32, 8, 14336, 128256),
        Shape("qwen2-7b", "qwen2", 28, 3584, 28, 4, 18944, 152064),
    )
}


@dataclass(frozen=True)
class Sizes:
    """The amount of work of each case.

    Attributes:
        tasks: T, tasks per training step.
        examples: scored examples per task of a training step.
        prompt: shortest and longest prompt, in tokens; CrossFit's classification tasks have a median of 21 words.
        options: options of each task in turn: a median of 2 and a mean of 3.5, as in CrossFit's classification tasks.
        support: support examples of a new task.
        steps: LoRA steps with which adaptation is compared.
        draws: S, draws per prediction.
        queries: examples of a prediction with draws, or with demonstrations.
        demonstrations: solved examples before each of them.
        wide_queries: examples of the prediction with many options.
        wide_options: number of options in that prediction.
        wide_prompt: length of its prompts, in tokens.
        collections: collection sizes for which training memory is measured.
        task_size: examples per task in these collections.
        collection_tasks: tasks per step with these collections.
        budget: seconds after which a case starts no further round.
        rounds: minimum and maximum number of rounds of a case.
    """

    tasks: int = 8
    examples: int = 4
    prompt: tuple[int, int] = (16, 48)
    options: tuple[int, ...] = (2, 2, 2, 2, 3, 4, 5, 8)
    support: int = 16
    steps: int = 10
    draws: int = 10
    queries: int = 16
    demonstrations: int = 8
    wide_queries: int = 4
    wide_options: int = 5
    wide_prompt: int = 120
    collections: tuple[int, ...] = (10, 100, 1000)
    task_size: int = 8
    collection_tasks: int = 4
    budget: float = 40.0
    rounds: tuple[int, int] = (3, 15)

    @classmethod
    def quick(cls) -> Sizes:
        """Sizes for a test."""
        return cls(
            tasks=2, examples=2, prompt=(4, 8), options=(2, 3), support=4, steps=2, draws=2, queries=3,
            demonstrations=2, wide_queries=2, wide_prompt=12, collections=(4, 8), task_size=8, collection_tasks=2,
            budget=0.2, rounds=(1, 1),
        )  # fmt: skip


@dataclass(frozen=True, eq=False)
class Setup:
    """A language model to measure, and how much work to do with it."""

    shape: Shape
    sizes: Sizes
    base: Any
    tokenizer: PreTrainedTokenizerFast
    arithmetic: Arithmetic
    flops_per_second: float

    @property
    def device(self) -> torch.device:
        """The device of the model."""
        return self.base.device  # type: ignore[no-any-return]

    def language_model(
        self, layers: int | None = None, targets: Sequence[str] = ("q_proj", "v_proj"), cache_folder: str | None = None
    ) -> LanguageModel:
        """A bayes-lora language model with LoRA on the top layers, or on all."""
        lora, model = lora_config(self.shape, layers, targets), twin(self.base)
        inject(lora, model)
        model.to(self.device)
        template = PromptTemplate(prompt="{input}")
        options = {"template": template, "max_length": 512, "cache_folder": cache_folder}
        return LanguageModel(model, self.tokenizer, lora, name=self.shape.name, **options)

    def task(
        self,
        seed: int,
        num_support: int,
        num_query: int = 0,
        *,
        options: int = 4,
        prompt: tuple[int, int] | None = None,
    ) -> Task:
        """A task of random words; its options have one or two tokens."""
        rng = random.Random(seed)
        words = min(WORDS, self.shape.vocab - 1)
        drawn = rng.sample(range(words), 2 * options)
        texts = tuple(" ".join(f"w{w}" for w in drawn[2 * k : 2 * k + 1 + k % 2]) for k in range(options))

        def example() -> Example:
            length = rng.randint(*(prompt or self.sizes.prompt))
            return Example(" ".join(f"w{rng.randrange(words)}" for _ in range(length)), texts, rng.randrange(options))

        support, query = ([example() for _ in range(count)] for count in (num_support, num_query))
        return Task(f"task-{seed}", tuple(support), tuple(query))


def build_setup(
    shape: Shape, sizes: Sizes, device: torch.device, arithmetic: Arithmetic, flops_per_second: float
) -> Setup:
    """Make a model with random weights on the device on which it runs."""
    settings: dict[str, Any] = dict(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=shape.tied,
    )
    config = (LlamaConfig if shape.kind == "llama" else Qwen2Config)(**settings)
    torch.manual_seed(0)
    with torch.device(device):
        base = AutoModelForCausalLM.from_config(config, dtype=arithmetic.dtype)
    if arithmetic.linear_backend == "onednn":
        use_onednn(base)
    tokenizer = word_tokenizer(shape.vocab)
    return Setup(shape, sizes, base.requires_grad_(False).eval(), tokenizer, arithmetic, flops_per_second)


def twin(model: nn.Module) -> Any:
    """Copy the modules, so that PEFT can inject into them, but share the weights."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def lora_config(shape: Shape, layers: int | None, targets: Sequence[str]) -> peft.LoraConfig:
    """LoRA of rank 8 on the top layers, or on all."""
    chosen = range(shape.layers - (layers or shape.layers), shape.layers)
    return peft.LoraConfig(
        r=8, lora_alpha=16, target_modules=list(targets), layers_to_transform=list(chosen), task_type="CAUSAL_LM"
    )


def word_tokenizer(vocab: int, words: Sequence[str] | None = None) -> PreTrainedTokenizerFast:
    """One token for each of the words that fit the vocabulary, by default w0, w1, ..."""
    words = [f"w{i}" for i in range(WORDS)] if words is None else words
    tokens = {"<unk>": 0} | {word: i + 1 for i, word in enumerate(words[: vocab - 1])}
    tokenizer = Tokenizer(models.WordLevel(tokens, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>", pad_token="<unk>")
