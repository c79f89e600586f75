"""Sizes of a run without its numbers: against closed formulas, and against what a forward keeps."""

import json
from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
from conftest import make_tasks
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_lora.episodes import collate
from bayes_lora.errors import ModelFileError, SiteError
from bayes_lora.infer import tangent
from bayes_lora.infer.empirical_bayes import EmpiricalBayes
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.recipes.config import EpisodeConfig, LanguageModelConfig, RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.runs.dry_run import dry_run, read_architecture
from bayes_lora.runs.empirical_bayes import grams_of_tasks
from bayes_lora.runs.fit import split_tasks
from bayes_lora.tasks import Example, Task, TaskSet

CONFIGS = Path(__file__).parent.parent / "examples" / "configs"


def closed_form(values, rank):
    """Base parameters and LoRA weights of a Llama or Qwen2 with LoRA on q, v, o and the three MLP matrices."""
    h, m, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    kv = h // values["num_attention_heads"] * values["num_key_value_heads"]
    biases = h + 2 * kv if values["model_type"] == "qwen2" else 0
    layer = 2 * h * h + 2 * h * kv + 3 * h * m + 2 * h + biases
    lora = rank * ((h + h) + (h + kv) + (h + h) + 3 * (h + m))
    return layers * layer + 2 * values["vocab_size"] * h + h, layers * lora


@pytest.mark.parametrize("name", ["llama-3-8b", "qwen2-7b"])
def test_the_shipped_settings(name):
    config = RunConfig.load(CONFIGS / f"{name}.yaml")
    values = json.loads((CONFIGS / f"{name}.json").read_text())
    found = dry_run(config, read_architecture(CONFIGS / f"{name}.json"))
    base, lora = closed_form(values, 8)
    # theta's location and precision; the gradient guide has no other parameters.
    assert found.parameters == {"base": base, "lora": lora, "trained": 2 * lora}
    assert 7.6e9 < base < 8.1e9
    h, m, layers = values["hidden_size"], values["intermediate_size"], values["num_hidden_layers"]
    assert found.sites["down_proj.lora_A"] == (layers, 8, m) and found.sites["gate_proj.lora_B"] == (layers, m, 8)
    assert len(found.sites) == 12 and found.tokens == 2 * 6 * 512
    assert found.memory["base"] == 2 * base
    assert found.memory["trained"] == 24 * 2 * lora and found.memory["phi"] == 32 * 2 * lora
    assert found.memory["activations"] == 2 * found.tokens * (layers * h + 7 * h + 4 * m)
    assert found.memory["total"] == sum(size for name, size in found.memory.items() if name != "total")


@pytest.mark.parametrize("recipe", ["abmll-weight", "abmll-released"])
def test_forms_with_two_pairs_of_factors(recipe):
    """For theta and for every task."""
    architecture = read_architecture(CONFIGS / "llama-3-8b.json")
    configs = [RunConfig.load(CONFIGS / "llama-3-8b.yaml", [f"recipe={name}"]) for name in (recipe, "abmll")]
    found, plain = (dry_run(config, architecture) for config in configs)
    assert found.parameters["trained"] == 2 * plain.parameters["lora"]
    assert found.memory["phi"] == 2 * plain.memory["phi"]


def test_four_bits_and_what_is_not_quantised():
    config = RunConfig.load(CONFIGS / "llama-3-8b.yaml", ["language_model.quantization=4bit"])
    found = dry_run(config, read_architecture(CONFIGS / "llama-3-8b.json"))
    embeddings, norms = 2 * 128256 * 4096, (2 * 32 + 1) * 4096
    linear = found.parameters["base"] - embeddings - norms
    assert found.memory["base"] == 2 * (embeddings + norms) + linear * 9 // 16


SMALL = dict(vocab_size=320, hidden_size=64, intermediate_size=160, num_hidden_layers=5, num_attention_heads=4,
             num_key_value_heads=2, max_position_embeddings=256)  # fmt: skip


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["q_proj", "v_proj", "o_proj", "down_proj"]])
def test_trained_parameters_and_activations_are_those_of_a_real_run(tokenizer, targets):
    """The network guide's parameters to the last one; what a forward keeps for backward within 15 %."""
    settings = LanguageModelConfig(r=3, top_layers=5, target_modules=targets, max_length=64, dtype="float32")
    episodes = EpisodeConfig(tasks_per_episode=2, num_support=3, num_query=4)
    config = RunConfig(recipe="abmll-network", language_model=settings, episodes=episodes)
    found = dry_run(config, LlamaConfig(**SMALL))
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    lora = peft.LoraConfig(r=3, target_modules=targets, task_type="CAUSAL_LM")
    inject(lora, model)
    lm = LanguageModel(model, tokenizer, lora, max_length=64)
    assert found.sites == lm.sites.shapes
    objective = build_objective(lm, config)
    assert found.parameters["trained"] == sum(p.numel() for p in objective.parameters())
    assert found.parameters["base"] == sum(p.numel() for p in model.parameters())
    tasks = [task.examples[:4] for task in make_tasks(2).values()]
    episode = collate([lm.encoder(task) for task in tasks])
    phi = {site: torch.randn(2, 1, *shape).requires_grad_() for site, shape in lm.sites.shapes.items()}
    lm(phi, episode)  # the check on first use
    kept = {}
    ours = {value.untyped_storage().data_ptr() for value in (*phi.values(), *model.parameters())}

    def pack(tensor):
        if tensor.untyped_storage().data_ptr() not in ours:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        scores = lm(phi, episode)
    assert scores.requires_grad
    logits = len(episode.sources) * 320 * 4
    share = episode.input_ids.numel() / found.tokens
    assert (sum(kept.values()) - logits) / (found.memory["activations"] * share) == pytest.approx(1.0, abs=0.15)


SIZES = ((7, 2), (12, 3), (10, 2))
"""Examples and options of the tasks of a closed-form fit."""


def sized_tasks():
    names = ("yes", "no", "maybe")
    return TaskSet(
        Task(f"{n} of {k}", tuple(Example(f"the film {i}", names[:k], i % k) for i in range(n))) for n, k in SIZES
    )


def closed_form_config(**guide):
    settings = LanguageModelConfig(r=3, top_layers=5, target_modules=["q_proj", "v_proj"], max_length=64)
    settings = replace(settings, dtype="float32")
    return RunConfig(
        guide={"batch_size": 4, **guide},
        language_model=settings,
        episodes=EpisodeConfig(num_support=4, held_out=0, examples_per_task=11),
    )


def test_a_closed_form_fit_of_a_subspace():
    """Counted by hand: all weights, the directions, the code, and two sets of examples to train the network on."""
    config = replace(closed_form_config(rank=6), recipe="subspace-network", prior={"size": 9})
    found = dry_run(config, LlamaConfig(**SMALL), sized_tasks())
    all_rows, others = 7 * 2 + 11 * 3 + 10 * 2, (7 + 11 + 10) * 8
    assert found.work["derivatives"] == 4 * all_rows + others and found.work["examples"] == 28
    assert found.work["forward"] == 5 * 8 and found.work["backward"] == 4 * 19 + 8 * 8
    weights = 5 * 64 * 3 + 5 * 32 * 3
    assert found.memory["directions"] == (4 + 4 + 8) * weights * (2 * 9 + 33)
    network = (2 * 64 + 1) * 6 + (2 * 64 + 1) * 128 + (128 + 1) * 6 + 64 * 6 + 6 * 9
    assert found.memory["network"] == 4 * 4 * network
    assert found.memory["derivatives"] == 2 * 4 * 33 * weights
    assert found.memory["theta"] == 4 * (3 * 5 * 64 * 3 + 5 * 32 * 3 + 9 * weights + 1 + 3)
    # Scales of the code, the slopes and the biases, and the mean of the slopes.
    assert found.parameters["trained"] == network + 4
    config = replace(config, recipe="subspace", guide={"batch_size": 4})
    assert dry_run(config, LlamaConfig(**SMALL), sized_tasks()).work["derivatives"] == 3 * all_rows


def test_a_closed_form_fit():
    """By hand: 11 of the 12 examples of the second task, and the last pass of each task is smaller."""
    found = dry_run(closed_form_config(), LlamaConfig(**SMALL), sized_tasks())
    derivatives = 7 * 2 + 11 * 3 + 10 * 2
    assert found.work == {"tasks": 3, "examples": 28, "derivatives": derivatives, "forward": 8, "backward": 19}
    weights, layers = 5 * 64 * 3 + 5 * 32 * 3 + 1 + 32, 5 + 5 + 1 + 1  # B of q and v, a slope and biases
    assert found.parameters["trained"] == layers + 1  # a scale each, and the mean of the slopes
    memory = dict(found.memory)
    assert memory.pop("base") == 4 * found.parameters["base"]
    assert memory.pop("total") == found.memory["base"] + sum(memory.values())
    assert memory.pop("states") == 0  # all layers are adapted
    assert found.tokens == 4 * 64
    splits = 8 * 8 + 6 * 8 + 3 * 2 * 2, 12 * 12 + 21 * 12 + 7 * 3 * 3, 8 * 8 + 12 * 8 + 6 * 2 * 2
    assert memory.pop("margin") == int(0.1 * sum(memory.values()))
    assert memory == {
        "theta": 4 * (3 * 5 * 64 * 3 + 5 * 32 * 3 + 10 + 3),  # locations of A as well
        "phi": 4 * 4 * weights,
        "derivatives": 2 * 4 * 33 * weights,
        "activations": 4 * found.tokens * 5 * (7 * 64 + 3 * 160),
        "grams": 4 * layers * (14**2 + 33**2 + 20**2),
        "splits": 2 * 8 * layers * 2 * sum(splits),
    }
    whole = dry_run(closed_form_config(theta_objective="evidence"), LlamaConfig(**SMALL), sized_tasks())
    assert whole.memory["splits"] == 2 * 8 * layers * (14**2 + 33**2 + 20**2)
    assert dry_run(closed_form_config(theta_objective="elbo"), LlamaConfig(**SMALL), sized_tasks()).work == {}
    one = dry_run(closed_form_config(), LlamaConfig(**SMALL)).work
    assert one == {"tasks": 1, "examples": 11, "derivatives": 44, "forward": 3, "backward": 12}
    tables = found.tables()
    assert [table.name for table in tables] == ["sites", "parameters", "work", "memory"]
    assert tables[-1].title == f"Memory of a closed-form fit in passes of {4 * 64} tokens (estimate)"
    assert {row["name"]: row["memory_bytes"] for row in tables[-1].rows} == found.memory


def test_the_work_of_a_closed_form_fit_is_that_of_a_real_one(tokenizer, monkeypatch):
    config, tasks = closed_form_config(), sized_tasks()
    found = dry_run(config, LlamaConfig(**SMALL), tasks)
    model = LlamaForCausalLM(LlamaConfig(**SMALL))
    lora = peft.LoraConfig(r=3, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    inject(lora, model)
    lm = LanguageModel(model, tokenizer, lora, max_length=64)
    counted = {"forward": 0, "backward": 0}
    inner, grad = tangent.scores_of_examples, torch.autograd.grad

    def forward(*args):
        for batch in inner(*args):
            counted["forward"] += 1
            yield batch

    def backward(*args, **kwargs):
        counted["backward"] += 1
        return grad(*args, **kwargs)

    objective, kept = build_objective(lm, config), split_tasks(tasks, config)[0]
    guide = objective.guide
    with monkeypatch.context() as patch:
        patch.setattr(tangent, "scores_of_examples", forward)
        patch.setattr(torch.autograd, "grad", backward)
        grams = grams_of_tasks(lm, objective.model, guide.theta_mean(), kept, guide.batch_size)
    assert counted == {name: found.work[name] for name in counted}
    assert found.work["derivatives"] == sum(one.scores.numel() for one in grams.values())
    kernels = [value for one in grams.values() for value in one.kernels.values()]
    assert found.memory["grams"] == sum(value.nbytes for value in kernels)
    loss = EmpiricalBayes(objective.model, guide.theta, grams, num_support=4)
    fields = [getattr(parts, name) for parts in loss.parts for name in ("own", "cross", "each")]
    assert found.memory["splits"] == 2 * sum(value.nbytes for value in fields)
    theta = dict(guide.theta.named_parameters())
    assert found.memory["theta"] == sum(value.nbytes for value in theta.values())
    found_grads = grad(loss(), list(theta.values()), allow_unused=True)
    moved = sum(value.numel() for value in found_grads if value is not None and value.any())
    assert moved == found.parameters["trained"]


def test_a_saved_adapter_decides_the_sites(tmp_path):
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], layers_to_transform=[0, 3])
    lora.base_model_name_or_path = "base"
    lora.save_pretrained(tmp_path)
    config = RunConfig(language_model=LanguageModelConfig(adapter=str(tmp_path)))
    a, q, v = (2, 2, 64), (2, 64, 2), (2, 32, 2)
    sites = {"q_proj.lora_A": a, "q_proj.lora_B": q, "v_proj.lora_A": a, "v_proj.lora_B": v}
    assert dry_run(config, LlamaConfig(**SMALL)).sites == sites
    lora.rank_pattern = {"v_proj": 3}
    lora.save_pretrained(tmp_path)
    assert dry_run(config, LlamaConfig(**SMALL)).sites["v_proj.lora_B"] == (2, 32, 3)
    config = replace(config, language_model=LanguageModelConfig(layers_to_transform=[1], lora_alpha=3, r=5))
    assert dry_run(config, LlamaConfig(**SMALL)).sites["q_proj.lora_A"] == (1, 5, 64)
    config = replace(config, language_model=LanguageModelConfig(adapter=str(tmp_path / "nowhere")))
    with pytest.raises(ModelFileError, match="nowhere': the adapter cannot be read"):
        dry_run(config, LlamaConfig(**SMALL))


def test_what_is_wrong_is_named(tmp_path):
    config = replace(RunConfig(), language_model=LanguageModelConfig(target_modules=["q_projj"]))
    with pytest.raises(SiteError, match="no module 'q_projj' .did you mean 'q_proj'"):
        dry_run(config, LlamaConfig(**SMALL))
    for text in ("", "[]", '{"hidden_size": 3}', '{"model_type": "lama"}'):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ModelFileError, match="expected the config.json of a causal LM, with its model_type"):
            read_architecture(tmp_path / "config.json")
    with pytest.raises(ModelFileError, match="missing.json"):
        read_architecture(tmp_path / "missing.json")


def test_nothing_is_drawn(monkeypatch):
    """Not every version of torch draws from every family on the meta device."""

    def refuse(*_, **__):
        raise NotImplementedError("aten::_standard_gamma on the meta device")

    monkeypatch.setattr(torch.distributions.Gamma, "rsample", refuse)
    architecture = read_architecture(CONFIGS / "qwen2-7b.json")
    assert dry_run(RunConfig(recipe="abmll-network"), architecture).parameters["trained"] > 0


def test_lower_layers_in_ram_are_not_on_the_gpu():
    architecture = read_architecture(CONFIGS / "llama-3-8b.json")
    here, there = (
        dry_run(
            RunConfig(
                recipe="abmll-network",
                language_model=LanguageModelConfig(dtype="bfloat16", top_layers=6, offload_trunk=on),
            ),
            architecture,
        ).memory
        for on in (None, True)
    )
    h, m, kv = 4096, 14336, 1024
    layer = 2 * h * h + 2 * h * kv + 3 * h * m + 2 * h
    assert here["base"] - there["base"] == 2 * 26 * layer
    parts = {name: size for name, size in there.items() if name not in ("base", "states", "margin", "total")}
    assert there["margin"] == int(0.1 * sum(parts.values())) and parts.keys() == {"trained", "phi", "activations"}


def test_states_of_all_examples_as_far_as_they_may_stay_on_the_gpu():
    architecture, tasks = LlamaConfig(**SMALL), sized_tasks()

    def states(collection=None, **settings):
        settings = {"dtype": "float32", "max_length": 50, "top_layers": 2} | settings
        config = RunConfig(recipe="abmll", language_model=LanguageModelConfig(**settings))
        return dry_run(config, architecture, collection).memory["states"]

    of_tasks = sum(map(len, tasks.values())) * 50 * 64 * 4
    assert states(tasks) == of_tasks and states() == 2 << 30
    assert states(tasks, gpu_cache_gib=of_tasks / 2**31) == of_tasks // 2
    assert states(tasks, top_layers=5) == 0
