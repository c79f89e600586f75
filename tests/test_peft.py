"""From PEFT and back: an adapter that was trained elsewhere, against plain PEFT and transformers."""

import copy
import json
import re
import shutil
from pathlib import Path

import peft
import pytest
import torch
from conftest import BUILDERS, TARGETS, build_lm, make_tasks
from safetensors.torch import load_file, save_file

import bayes_lora
from bayes_lora.episodes import PromptTemplate, collate
from bayes_lora.errors import ConfigError, ModelFileError, PosteriorError, SiteError
from bayes_lora.infer.training import FitConfig
from bayes_lora.lm.fingerprint import FINGERPRINT, fingerprint
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.loading import from_peft, load_language_model
from bayes_lora.lm.weight_samples import adapter_sample, weight_sample
from bayes_lora.models import HierarchicalNormal
from bayes_lora.posterior.baselines import finetune_lora, pretrained
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import LanguageModelConfig, RunConfig
from bayes_lora.recipes.recipes import build_language_model, build_objective
from bayes_lora.runs.folder import write_settings
from bayes_lora.runs.loading import load_posterior

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

SMALL = {"recipe": "abmll-network", "guide": {"hidden": 4, "directions": 1, "bilinear": 1}}
FACTORS = ("lora_A", "lora_B")


def lora_config(kind="llama", **kwargs):
    settings = dict(r=3, lora_alpha=6, layers_to_transform=[2, 3], fan_in_fan_out=kind == "gpt2", task_type="CAUSAL_LM")
    return peft.LoraConfig(**settings | {"target_modules": TARGETS.get(kind, ["q_proj", "v_proj", "o_proj"])} | kwargs)


def base_model(kind="llama", dtype=torch.float64):
    torch.manual_seed(1)
    return BUILDERS[kind]().to(dtype).eval()


def train(model, seed, adapter="default"):
    """Random factors of an adapter, as if it had been trained."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{factor}.{adapter}." in name for factor in FACTORS):
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return model


def trained(kind="llama", seed=3, dtype=torch.float64, **kwargs):
    return train(peft.get_peft_model(base_model(kind, dtype), lora_config(kind, **kwargs)), seed).eval()


def ours(model, tokenizer, **kwargs):
    return from_peft(model, tokenizer, **{"name": "llama", "max_length": 96, "cache_folder": None} | kwargs)


def plain_scores(model, tokenizer, example):
    """Each option in a row of its own, by transformers' forward."""
    prompt, options = PromptTemplate().render(example)
    scores, before = [], tokenizer(prompt)["input_ids"]
    for option in options:
        whole = tokenizer(prompt + option)["input_ids"]
        logits = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        scores.append(sum(logits[i - 1, whole[i]] for i in range(len(before), len(whole))))
    return torch.stack(scores)


EXAMPLES = make_tasks(2)["task-1"].examples[:3]


def all_scores(model, tokenizer):
    with torch.no_grad():
        return torch.stack([plain_scores(model, tokenizer, example) for example in EXAMPLES])


def episode_of(lm):
    return collate([lm.encoder(EXAMPLES)])


def without_update(lm):
    return {s: torch.zeros_like(v) if ".lora_B" in s else v for s, v in lm.sites.initial().items()}


def closeness(kind):
    """Gemma 2's attention takes its softmax in float32, whatever the model's dtype."""
    return {"rtol": 2e-6, "atol": 1e-5} if kind == "gemma2" else {}


@pytest.mark.parametrize("kind", list(BUILDERS))
def test_scores_are_those_of_the_peft_model_and_of_its_base(kind, tokenizer):
    model = trained(kind)
    with_adapter, merged = all_scores(model, tokenizer), all_scores(copy.deepcopy(model).merge_and_unload(), tokenizer)
    without = all_scores(base_model(kind), tokenizer)
    assert (with_adapter - without).abs().max() > 0.1
    lm = ours(model, tokenizer)
    [scores] = lm(lm.sites.initial(), episode_of(lm))
    torch.testing.assert_close(scores, with_adapter, **closeness(kind))
    torch.testing.assert_close(scores, merged, **closeness(kind))
    [scores] = lm(without_update(lm), episode_of(lm))
    torch.testing.assert_close(scores, without, **closeness(kind))
    [features] = lm.features(episode_of(lm)).log_probs
    torch.testing.assert_close(features, without.log_softmax(-1), **closeness(kind))
    torch.testing.assert_close(all_scores(lm.model, tokenizer), without)  # nothing is bound


def test_features_are_those_of_a_language_model_without_a_trained_adapter(tokenizer):
    lm, fresh = ours(trained(), tokenizer), build_lm("llama", tokenizer)
    for part, expected in zip(lm.features(episode_of(lm)), fresh.features(episode_of(fresh)), strict=True):
        torch.testing.assert_close(part, expected, rtol=0, atol=0)


def test_base_weights_are_left_alone_and_named(tokenizer):
    model, before = trained(), base_model().state_dict()
    model.get_base_model().name_or_path = "here/base"
    model.peft_config["default"].base_model_name_or_path = None
    lm = from_peft(model, tokenizer, cache_folder=None)
    after = {name.replace(".base_layer.", "."): value for name, value in lm.model.state_dict().items()}
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert lm.name == "here/base" and lm.adapter is None
    model = trained()
    model.peft_config["default"].base_model_name_or_path = "their/base"
    assert from_peft(model, tokenizer, cache_folder=None).name == "their/base"


def test_gradients_are_those_of_peft_s_parameters(tokenizer):
    model = trained()
    sum(plain_scores(model, tokenizer, example)[example.answer] for example in EXAMPLES).backward()
    expected = {name.replace("base_model.model.", "").replace(".default.weight", ""): p.grad
                for name, p in model.named_parameters() if p.grad is not None}  # fmt: skip
    lm = ours(model, tokenizer)
    phi = {site: value.requires_grad_() for site, value in lm.sites.initial().items()}
    lm(phi, episode_of(lm)).gather(-1, episode_of(lm).answer[..., None]).sum().backward()
    found = lm.sites.unstack({site: value.grad for site, value in phi.items()})
    assert found.keys() == expected.keys()
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name])
        assert gradient.abs().max() > 0


def test_guides_start_at_the_adapter_and_baselines_as_they_say(tokenizer):
    model = trained()
    with_adapter, without = all_scores(model, tokenizer), all_scores(base_model(), tokenizer)
    factors = {name.replace("base_model.model.", "").replace(".default.weight", ""): value.clone()
               for name, value in model.state_dict().items() if ".lora_" in name}  # fmt: skip
    lm = ours(model, tokenizer)
    program = build_objective(lm, RunConfig.from_dict(SMALL)).guide
    start = {site: program.theta.distribution(f"theta.loc.{site}").mean for site in lm.sites.shapes}
    for name, value in lm.sites.unstack(start).items():
        torch.testing.assert_close(value.double(), factors[name], rtol=1e-6, atol=1e-6)
    task = make_tasks(2)["task-1"].split(4, seed=0)
    task = type(task)(task.name, task.support, EXAMPLES)
    [found] = pretrained(lm, [task]).predict([task.query], num_draws=0)
    torch.testing.assert_close(found, without.log_softmax(-1))
    [found] = finetune_lora(lm, [task], steps=0).predict([task.query], num_draws=0)
    torch.testing.assert_close(found, with_adapter.log_softmax(-1))


def two_adapters():
    model = trained()
    model.add_adapter("other", lora_config(target_modules=["k_proj", "q_proj"], layers_to_transform=[1, 3], r=2))
    return train(model, 8, "other")


@pytest.mark.parametrize("active", ["default", "other"])
@pytest.mark.parametrize("named", [True, False])
def test_one_of_several_adapters(tokenizer, active, named):
    model = two_adapters()
    model.set_adapter(active)
    expected = all_scores(model, tokenizer)
    if named:
        model.set_adapter({"default": "other", "other": "default"}[active])
    lm = ours(model, tokenizer, adapter=active if named else None)
    assert lm.sites.shapes.keys() == {
        f"{kind}.{factor}" for kind in lm.lora_config.target_modules for factor in FACTORS
    }
    [scores] = lm(lm.sites.initial(), episode_of(lm))
    torch.testing.assert_close(scores, expected)
    [scores] = lm(without_update(lm), episode_of(lm))
    torch.testing.assert_close(scores, all_scores(base_model(), tokenizer))
    assert weight_sample(lm.model) == weight_sample(base_model())  # the other adapter's weights are no base weights


def merged():
    model = trained()
    model.merge_adapter()
    return model


def disabled():
    model = trained()
    model.base_model.disable_adapter_layers()
    return model


def both_active():
    model = two_adapters()
    model.base_model.set_adapter(["default", "other"])
    return model


def scaled():
    model = trained()
    model.get_base_model().model.layers[3].self_attn.q_proj.set_scale("default", 0.5)
    return model


def pissa():
    return peft.get_peft_model(base_model(dtype=torch.float32), lora_config(init_lora_weights="pissa"))


def prompt_tuning():
    return peft.get_peft_model(base_model(), peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))


REFUSED = {
    "DoRA": (lambda: trained(use_dora=True), SiteError, r"LoraConfig\(use_dora=True\): only plain LoRA"),
    "lora_bias": (
        lambda: trained("qwen2", target_modules=["q_proj"], lora_bias=True),
        SiteError,
        "Set lora_bias=False",
    ),
    "bias": (lambda: trained(bias="all"), SiteError, "Set bias='none'"),
    "saved": (lambda: trained(modules_to_save=["lm_head"]), SiteError, r"modules_to_save=\['lm_head'\].*Leave"),
    "tokens": (lambda: trained(trainable_token_indices=[1]), SiteError, r"trainable_token_indices=\[1\]"),
    "PiSSA": (pissa, SiteError, "'pissa'.: this changes the base weights"),
    "embeddings": (
        lambda: trained(target_modules=["embed_tokens"], layers_to_transform=None),
        SiteError,
        "'model.embed_tokens': only plain LoRA on linear modules",
    ),
    "prompt tuning": (prompt_tuning, SiteError, "expected a LoRA adapter .*PROMPT_TUNING"),
    "AdaLoRA": (
        lambda: peft.get_peft_model(base_model(), peft.AdaLoraConfig(total_step=9, target_modules=["q_proj"])),
        SiteError,
        "expected a LoRA adapter .*ADALORA",
    ),
    "merged": (merged, SiteError, r"\['default'\] are merged. Call unmerge_adapter"),
    "disabled": (disabled, SiteError, "adapters are disabled"),
    "both active": (
        both_active,
        ConfigError,
        r"got \['default', 'other'\]. Choose one first: .*set_adapter\('default'\)",
    ),
    "scaled": (
        scaled,
        SiteError,
        r"layers.3.self_attn.q_proj': expected lora_alpha's scaling 2, got 1. Undo set_scale",
    ),
    "no PeftModel": (base_model, ConfigError, "expected a peft.PeftModel, got LlamaForCausalLM"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", REFUSED)
def test_what_is_refused(kind, tokenizer):
    build, error, message = REFUSED[kind]
    with pytest.raises(error, match=message) as caught:
        ours(build(), tokenizer)
    assert "\n" not in str(caught.value)


def test_a_model_that_is_taken_over_is_refused(tokenizer):
    model = trained()
    ours(model, tokenizer)
    with pytest.raises(SiteError, match=r"q_proj': its LoRA already belongs to a LanguageModel. Load the model again"):
        ours(model, tokenizer)


def test_an_unknown_adapter_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"adapter 'othr': .*did you mean 'other'"):
        ours(two_adapters(), tokenizer, adapter="othr")


def test_another_active_adapter_is_refused_by_find_sites(tokenizer):
    model = both_active()
    with pytest.raises(SiteError, match=r"adapters \['other'\] are active in addition to 'default'"):
        LanguageModel(model.get_base_model(), tokenizer, model.peft_config["default"])


def test_an_inactive_or_merged_adapter_is_refused_by_find_sites(tokenizer):
    for build, message in ((disabled, "adapter 'default' is not active"), (merged, "are merged. Call unmerge")):
        model = build()
        with pytest.raises(SiteError, match=message):
            LanguageModel(model.get_base_model(), tokenizer, model.peft_config["default"])


def inject_ours(model, tokenizer):
    inject(lora_config(target_modules=["k_proj"]), model)


def inject_theirs(model, tokenizer):
    """PEFT replaces the slots of an adapter of the same name, or deactivates it for one of another name."""
    config = lora_config(target_modules=["k_proj"], layers_to_transform=[1])
    peft.inject_adapter_in_model(config, model, "second")
    LanguageModel(model, tokenizer, config, adapter_name="second")


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
@pytest.mark.parametrize("second", [inject_ours, inject_theirs])
def test_a_second_language_model_on_one_base_is_refused(tokenizer, second):
    lm = build_lm("llama", tokenizer)
    phi = {site: value + 0.1 for site, value in lm.sites.initial().items()}
    before = lm(phi, episode_of(lm))
    with pytest.raises(SiteError, match=r"its LoRA already belongs to a LanguageModel. Load the model again"):
        second(lm.model, tokenizer)
    if second is inject_ours:
        torch.testing.assert_close(lm(phi, episode_of(lm)), before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_slots_that_peft_replaced_are_not_taken_for_a_new_model(tokenizer):
    lm, config = build_lm("llama", tokenizer), lora_config()
    peft.inject_adapter_in_model(config, lm.model)
    with pytest.raises(SiteError, match="already belongs to a LanguageModel"):
        LanguageModel(lm.model, tokenizer, config)


def test_a_second_adapter_of_a_model_that_is_taken_over_is_refused(tokenizer):
    model = two_adapters()
    lm = ours(model, tokenizer)
    before = lm(lm.sites.initial(), episode_of(lm))
    with pytest.raises(SiteError, match="already belongs to a LanguageModel"):
        ours(model, tokenizer, adapter="other")
    torch.testing.assert_close(lm(lm.sites.initial(), episode_of(lm)), before, rtol=0, atol=0)


@pytest.mark.parametrize("there", [lora_config(), peft.IA3Config(target_modules=["k_proj"], feedforward_modules=[])])
def test_an_adapter_that_is_there_already_is_refused(tokenizer, there):
    model = peft.inject_adapter_in_model(there, base_model())
    message = r"module 'model.layers.\d.self_attn.\w_proj': the model already has an adapter.*from_peft\(peft_model"
    with pytest.raises(SiteError, match=message):
        inject(lora_config(target_modules=["v_proj"]), model)


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")
def test_an_adapter_of_another_method_is_refused_by_find_sites(tokenizer):
    model = peft.inject_adapter_in_model(lora_config(), base_model())
    other = peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"])
    peft.inject_adapter_in_model(other, model, "other")
    with pytest.raises(SiteError, match="expected LoRA alone, got an adapter of PEFT's Linear"):
        LanguageModel(model, tokenizer, lora_config())


def test_dropout_of_training_is_over(tokenizer):
    model = trained(lora_dropout=0.5)
    expected = all_scores(model, tokenizer)
    lm = ours(model.train(), tokenizer)  # no warning, which would be an error here
    torch.testing.assert_close(lm(lm.sites.initial(), episode_of(lm))[0], expected)


# A saved adapter


@pytest.fixture
def adapter(tmp_path, model_folder):
    """A saved adapter of the model in ``model_folder``, which has 32 bits."""
    model = trained(dtype=torch.float32, lora_dropout=0.1)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def load(model_folder, lora=None, **kwargs):
    return load_language_model(model_folder, lora, device="cpu", cache_folder=None, **kwargs)


def test_a_saved_adapter_is_loaded(model_folder, adapter, tokenizer, monkeypatch):
    plain = peft.PeftModel.from_pretrained(base_model(dtype=torch.float32), adapter).eval()
    monkeypatch.chdir(adapter.parent)
    lm = load(model_folder, adapter="adapter")
    torch.testing.assert_close(lm(lm.sites.initial(), episode_of(lm))[0], all_scores(plain, tokenizer))
    saved = load_file(adapter / "adapter_model.safetensors")
    for name, value in lm.sites.unstack(lm.sites.initial()).items():
        assert torch.equal(value, saved[f"base_model.model.{name}.weight"])
    assert lm.adapter == str(adapter) and lm.lora_config.r == 3
    half = load(model_folder, adapter=adapter, dtype="bfloat16")
    for site, value in half.sites.initial().items():
        assert torch.equal(value, lm.sites.initial()[site])  # not rounded to the base's 16 bits


def test_an_adapter_in_the_folder_of_the_model_is_refused(model_folder, adapter, tmp_path):
    """transformers would load it into the base model."""
    folder = shutil.copytree(model_folder, tmp_path / "both")
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    with pytest.raises(ModelFileError, match=r"both': transformers would load the adapter in it .*pass that folder as"):
        load(folder)


def test_a_saved_adapter_that_does_not_fit_is_refused(model_folder, adapter, tmp_path):
    file, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    weights, settings = load_file(file), config.read_text()
    with pytest.raises(ModelFileError, match=r"nowhere': the adapter cannot be read \(.*Expected adapter_config.json"):
        load(model_folder, adapter=tmp_path / "nowhere")
    first = sorted(weights)[0]
    save_file({name: value for name, value in weights.items() if name != first}, file)
    with pytest.raises(ModelFileError, match=r"adapter': 1 weights are missing, such as model\.layers\.2.*lora_A"):
        load(model_folder, adapter=adapter)
    save_file(weights | {first.replace("layers.2", "layers.1"): weights[first].clone()}, file)
    with pytest.raises(ModelFileError, match=r"1 weights match no adapted module, such as .*layers\.1"):
        load(model_folder, adapter=adapter)
    save_file(weights | {first: weights[first][:, :5].contiguous()}, file)
    with pytest.raises(ModelFileError, match="the adapter cannot be read .*size mismatch"):
        load(model_folder, adapter=adapter)
    save_file(weights, file)
    config.write_text(json.dumps(json.loads(settings) | {"use_dora": True}))
    with pytest.raises(SiteError, match="use_dora=True"):
        load(model_folder, adapter=adapter)
    config.write_text(json.dumps({"peft_type": "IA3", "target_modules": ["q_proj"]}))
    with pytest.raises(SiteError, match="expected a LoRA adapter .*IA3"):
        load(model_folder, adapter=adapter)


@pytest.mark.parametrize("init", [False, "orthogonal"])
def test_the_pretrained_baseline_is_the_base_model_whatever_the_initial_factors(model_folder, tokenizer, init):
    """Both initialisations have B other than zero, and with the first the initial update is not zero."""
    lm = load(model_folder, lora_config(init_lora_weights=init, r=2))
    initial = lm.sites.initial()
    assert all(value.abs().max() > 0 for value in initial.values())
    task = make_tasks(2)["task-1"]
    [found] = pretrained(lm, [task]).predict([EXAMPLES], num_draws=0)
    without = all_scores(base_model(dtype=torch.float32), tokenizer)
    torch.testing.assert_close(found, without.log_softmax(-1), rtol=1e-4, atol=1e-4)
    with_update = lm(initial, episode_of(lm))[0]
    assert ((with_update - without).abs().max() > 1e-3) == (init is False)


# PEFT's words


def test_the_words_are_peft_s(model_folder):
    named = load(model_folder, r=2, lora_alpha=12, layers_to_transform=[0, 3], target_modules=["q_proj", "down_proj"])
    config = peft.LoraConfig(r=2, lora_alpha=12, layers_to_transform=[0, 3], target_modules=["q_proj", "down_proj"])
    theirs = load(model_folder, config)
    assert named.sites.modules == theirs.sites.modules and named.sites.shapes == theirs.sites.shapes
    assert named.sites.modules["q_proj.lora_A"] == [f"model.layers.{i}.self_attn.q_proj" for i in (0, 3)]
    assert named.sites.shapes["down_proj.lora_A"] == (2, 2, 24)
    phi = {site: value + 0.1 for site, value in named.sites.initial().items()}
    assert torch.equal(named(phi, episode_of(named)), theirs(phi, episode_of(theirs)))
    default = load(model_folder)
    assert (default.lora_config.r, default.lora_config.lora_alpha) == (8, 16)
    assert default.sites.shapes["o_proj.lora_A"] == (4, 8, 16)
    assert load(model_folder, r=3).lora_config.lora_alpha == 6
    one = load(model_folder, layers_to_transform=1)
    assert one.sites.modules["v_proj.lora_B"] == ["model.layers.1.self_attn.v_proj"]


def test_contradictions_are_refused(model_folder, adapter):
    both = r"layers_to_transform=\[1\] and top_layers=2: both choose layers. Give one"
    with pytest.raises(ConfigError, match=both):
        load(model_folder, layers_to_transform=[1], top_layers=2)
    with pytest.raises(ConfigError, match=r"expected some of the model's layers 0 to 3, got \[2, 4\]"):
        load(model_folder, layers_to_transform=[2, 4])
    with pytest.raises(ConfigError, match=r"lora_config, r, top_layers: lora_config already defines the LoRA"):
        load(model_folder, lora_config(), r=3, top_layers=1)
    with pytest.raises(ConfigError, match=r"adapter, target_modules: adapter already defines the LoRA"):
        load(model_folder, adapter=adapter, target_modules=["q_proj"])
    with pytest.raises(ConfigError, match=r"lora_config, adapter: lora_config already defines"):
        load(model_folder, lora_config(), adapter=adapter)


CHOICES = [
    {"r": 2, "lora_alpha": 12, "layers_to_transform": [0, 3], "target_modules": ["q_proj", "down_proj"]},
    {"top_layers": 2},
    {"lora": lora_config(layers_to_transform=None, r=2)},
    {"lora": lora_config(layers_to_transform=2, lora_alpha=5)},
    {"lora": lora_config(target_modules={"v_proj"}, layers_to_transform=[2, 3])},
    {"adapter": "adapter"},
]


@pytest.mark.parametrize("choice", CHOICES)
def test_settings_that_are_saved_say_what_was_loaded(choice, model_folder, adapter, monkeypatch):
    monkeypatch.chdir(adapter.parent)
    lm = load(model_folder, **choice)
    settings = LanguageModelConfig(top_layers=1, disk_cache=False).matching(lm)
    values = json.loads(json.dumps(RunConfig(language_model=settings).to_dict()))
    monkeypatch.chdir(adapter)
    again = build_language_model(RunConfig.from_dict(values).language_model)
    assert again.sites.modules == lm.sites.modules and again.sites.shapes == lm.sites.shapes
    assert fingerprint(again) == fingerprint(lm)
    for site, value in again.sites.initial().items():
        assert torch.equal(value, lm.sites.initial()[site])


# Saving and loading


def saved(lm, folder):
    """A posterior, and one of a task, in folders; and what the latter predicts."""
    config = RunConfig.from_dict(SMALL)
    config = RunConfig.from_dict(config.to_dict() | {"language_model": config.language_model.matching(lm).__dict__})
    posterior = Posterior.from_objective(
        lm, build_objective(lm, config).to(lm.sites.initial()["q_proj.lora_A"].dtype).eval()
    )
    posterior.save(folder / "posterior")
    write_settings(folder, config, [], [])  # as a run's folder has them
    adapted = posterior.adapt([make_tasks(2)["task-1"].split(3, seed=0)])
    adapted.save(folder / "task_posterior")
    return adapted.predict([EXAMPLES], num_draws=2)[0]


KINDS = {"posterior": Posterior.load, "task_posterior": TaskPosterior.load}


@pytest.mark.parametrize("kind", KINDS)
def test_a_posterior_is_refused_on_another_adapter(kind, tokenizer, tmp_path):
    expected = saved(ours(trained(), tokenizer), tmp_path)
    folder, read = tmp_path / kind, KINDS[kind]
    same, other, fresh = ours(trained(), tokenizer), ours(trained(seed=4), tokenizer), build_lm("llama", tokenizer)
    loaded = read(folder, same)
    if kind == "posterior":
        loaded = loaded.adapt([make_tasks(2)["task-1"].split(3, seed=0)])
    assert torch.equal(loaded.predict([EXAMPLES], num_draws=2)[0], expected)
    with pytest.raises(PosteriorError, match=r"fitted on an adapter other than that of llama, such as model.layers."):
        read(folder, other)
    with pytest.raises(
        PosteriorError, match=r"starts at a trained adapter, but that of llama starts at PEFT's initial"
    ):
        read(folder, fresh)
    file = folder / f"{kind}.json"
    facts = json.loads(file.read_text())
    assert facts[FINGERPRINT]["adapter_weights"] == adapter_sample(same)
    facts[FINGERPRINT]["adapter_weights"] = [1]
    file.write_text(json.dumps(facts))
    with pytest.raises(PosteriorError, match="is damaged: 'fingerprint' has no mapping 'adapter_weights'"):
        read(folder, same)


def test_a_posterior_is_refused_on_an_adapter_that_differs_in_one_layer(tokenizer, tmp_path):
    saved(ours(trained(), tokenizer), tmp_path)
    changed = trained()
    [layer] = [value for name, value in changed.named_parameters() if "layers.2.self_attn.v_proj.lora_B" in name]
    layer.data *= 1.1
    message = r"on an adapter other than that of llama, such as model\.layers\.2\.self_attn\.v_proj\.lora_B"
    with pytest.raises(PosteriorError, match=message):
        Posterior.load(tmp_path / "posterior", ours(changed, tokenizer))


def test_a_posterior_of_a_fresh_lora_is_refused_on_a_trained_adapter(lm, tokenizer, tmp_path):
    saved(lm, tmp_path)
    assert adapter_sample(lm) == {}
    with pytest.raises(PosteriorError, match=r"starts at PEFT's initial values, but that of llama starts at a trained"):
        Posterior.load(tmp_path / "posterior", ours(trained(), tokenizer))


def test_an_adapter_in_fewer_bits_is_the_same_adapter(tokenizer, tmp_path):
    saved(ours(trained(), tokenizer), tmp_path)
    rounded = trained()
    for name, parameter in rounded.named_parameters():
        if ".lora_" in name:
            parameter.data = parameter.data.bfloat16().double()
    Posterior.load(tmp_path / "posterior", ours(rounded, tokenizer))


def test_a_posterior_finds_its_saved_adapter(model_folder, adapter, tmp_path, monkeypatch):
    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))
    expected = saved(load(model_folder, adapter=adapter), tmp_path)
    posterior = load_posterior(tmp_path)
    assert posterior.lm.adapter == str(adapter)
    adapted = posterior.adapt([make_tasks(2)["task-1"].split(3, seed=0)])
    torch.testing.assert_close(adapted.predict([EXAMPLES], num_draws=2)[0], expected)


@pytest.mark.parametrize("name", ["default", "other"])
def test_the_exported_prior_mean_is_the_adapter(tokenizer, tmp_path, name):
    model = two_adapters()
    model.set_adapter(name)
    expected = all_scores(model, tokenizer)
    model.save_pretrained(tmp_path / "theirs", selected_adapters=[name])
    theirs = tmp_path / "theirs" / ("" if name == "default" else name)
    lm = ours(model, tokenizer)
    prior = HierarchicalNormal(lm, lm.sites.initial())
    phi = {site: fn.expand((1, 1)) for site, fn in prior.phi_prior(prior.initial_theta()).items()}
    TaskPosterior(lm, phi, {}, ("a",)).export_peft(tmp_path / "ours")
    here, there = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "ours", theirs))
    assert here.keys() == there.keys() and all(torch.equal(here[key], there[key]) for key in here)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (tmp_path / "ours", theirs)]
    for config in configs:
        config.pop("base_model_name_or_path")
        config["target_modules"] = sorted(config["target_modules"])
    assert configs[0] == configs[1]
    plain = peft.PeftModel.from_pretrained(base_model(), tmp_path / "ours", autocast_adapter_dtype=False).eval()
    torch.testing.assert_close(all_scores(plain, tokenizer), expected)


# The documentation

DOCS = Path(__file__).parent.parent / "docs" / "peft.md"


@pytest.mark.filterwarnings("ignore:.*prompts are longer")
def test_the_code_of_the_docs_runs(model_folder, adapter, tmp_path, monkeypatch):
    text = DOCS.read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    code = "\n".join(blocks).replace("HuggingFaceTB/SmolLM2-135M-Instruct", str(model_folder))
    adapter.rename(tmp_path / "my-adapter")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("BAYES_LORA_CACHE", str(tmp_path / "cache"))
    fit = bayes_lora.fit_posterior
    config = RunConfig(fit=FitConfig(steps=1))
    monkeypatch.setattr(bayes_lora, "fit_posterior", lambda lm, tasks: fit(lm, tasks, config), raising=False)
    found = {}
    exec(compile(code, str(DOCS), "exec"), found)
    assert len(blocks) == 5 and isinstance(found["model"], peft.PeftModel)
    exported, lm = load_file("tickets-adapter/adapter_model.safetensors"), found["lm"]
    for name, value in lm.sites.unstack(lm.sites.initial()).items():
        assert exported[f"base_model.model.{name}.weight"].shape == value.shape
