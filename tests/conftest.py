import gc

import peft
import pyro
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GemmaConfig,
    GemmaForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from bayes_lora.lm.arithmetic import _machine_key
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.tasks import Example, Task, TaskSet

# pytest explains the failed assertions of these, as it does those of test files.
pytest.register_assert_rewrite("conjugate", "runs")

SIZES = dict(
    vocab_size=320,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    bos_token_id=0,
    eos_token_id=0,
    # Large weights, so that a tiny random model has opinions.
    initializer_range=0.3,
)
GPT2_SIZES = dict(vocab_size=320, n_embd=16, n_layer=4, n_head=4, n_positions=256, initializer_range=0.3)
BUILDERS = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SIZES)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SIZES)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SIZES, head_dim=4)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SIZES)),
    "gemma": lambda: GemmaForCausalLM(GemmaConfig(**SIZES, head_dim=4)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SIZES, head_dim=4, query_pre_attn_scalar=4)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2_SIZES, bos_token_id=0, eos_token_id=0)),
}
TARGETS = {"gpt2": ["c_attn"]}


@pytest.fixture(autouse=True, scope="session")
def own_cache(tmp_path_factory):
    """Keep hidden states and tokens out of the user's cache; the default model is still read from it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_lora.lm.loading.cache_folder", lambda: tmp_path_factory.getbasetemp() / "cache")
        yield


@pytest.fixture(autouse=True, scope="session")
def same_arithmetic():
    """Compute in float32 by torch unless a test asks for something else: the fastest arithmetic depends on the CPU."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("bayes_lora.lm.arithmetic._known", {_machine_key(): {"torch": 1.0}})
        yield


@pytest.fixture(autouse=True, scope="session")
def frozen_modules():
    """Garbage collections do not scan what was imported, which is never freed."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def clean_state():
    pyro.clear_param_store()
    pyro.set_rng_seed(0)
    pyro.enable_validation(True)
    before = torch.get_default_dtype()
    yield
    torch.set_default_dtype(before)


@pytest.fixture
def simulated():
    """The device of :mod:`simulated_device`, which is registered once per process."""
    from simulated_device import DEVICE, usable

    with pytest.MonkeyPatch.context() as patch, usable():
        patch.setattr("bayes_lora.utils.devices.GPUS", {DEVICE.type})
        yield DEVICE


@pytest.fixture(scope="session")
def tokenizer():
    bpe = Tokenizer(models.BPE(unk_token="<s>"))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    text = ["the film was good and bad. Answer: yes no maybe not so positive negative"] * 3
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(
        text,
        trainers.BpeTrainer(vocab_size=300, special_tokens=["<s>"], initial_alphabet=alphabet, show_progress=False),
    )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token="<s>", pad_token="<s>")


def build_lm(
    kind,
    tokenizer,
    *,
    top_layers=2,
    targets=("q_proj", "v_proj", "o_proj"),
    dtype=torch.float64,
    seed=2,
    device="cpu",
    **kwargs,
):
    """A tiny random LM with LoRA of rank 3 on its top layers, or with None wherever a target is."""
    torch.manual_seed(1)
    model = BUILDERS[kind]().to(dtype)
    layers = model.config.num_hidden_layers
    lora = peft.LoraConfig(
        r=3,
        lora_alpha=6,
        target_modules=TARGETS.get(kind, list(targets)),
        layers_to_transform=None if top_layers is None else list(range(layers - top_layers, layers)),
        fan_in_fan_out=kind == "gpt2",
        task_type="CAUSAL_LM",
    )
    inject(lora, model, seed=seed)
    model.to(device)
    return LanguageModel(model, tokenizer, lora, name=kind, **{"max_length": 96} | kwargs)


@pytest.fixture(params=list(BUILDERS))
def any_lm(request, tokenizer):
    return build_lm(request.param, tokenizer)


@pytest.fixture
def lm(tokenizer):
    return build_lm("llama", tokenizer)


def make_tasks(num_tasks=4, num_examples=12):
    """Asymmetric tasks: other numbers of options, options of several tokens, prompts of several lengths."""
    labels = [("yes", "no"), ("positive", "not so negative", "maybe"), ("good", "bad film")]
    words = "the film was good and bad so maybe not".split()
    tasks = []
    for t in range(num_tasks):
        options = labels[t % len(labels)]
        examples = [
            Example(
                " ".join(words[(i * 5 + t + j) % len(words)] for j in range(3 + (i * 7 + t) % 6)) + f" {i}",
                options,
                (i * i + t) % len(options),
            )
            for i in range(num_examples)
        ]
        tasks.append(Task(f"task-{t}", tuple(examples)))
    return TaskSet(tasks)


@pytest.fixture
def tasks():
    return make_tasks()


@pytest.fixture(scope="session")
def model_folder(tokenizer, tmp_path_factory):
    """A tiny random Llama and its tokenizer, as a folder that ``from_pretrained`` reads."""
    folder = tmp_path_factory.mktemp("model") / "tiny-llama"
    torch.manual_seed(1)
    BUILDERS["llama"]().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
