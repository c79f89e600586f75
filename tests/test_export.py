"""A posterior exported for servers: transformers and peft alone, with scores.json, give its predictions."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import peft
import pytest
import torch
from conftest import BUILDERS, make_tasks
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lm_helpers import closeness, random_phi
from pyro.distributions import Delta, Normal
from safetensors.torch import load_file
from served import adapters_of, check_vllm_rules, completions_server, log_probs_by_hand
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.episodes import PromptTemplate
from bayes_lora.errors import BayesLoraError, ConfigError, PosteriorError, RunFolderError, SiteError, TaskError
from bayes_lora.infer.components import Components
from bayes_lora.lm.adapters import lora_layers
from bayes_lora.lm.inject import inject
from bayes_lora.lm.language_model import LanguageModel
from bayes_lora.lm.merge import merged_weights
from bayes_lora.lm.option_head import BIAS, HEAD_SHAPES, SLOPE
from bayes_lora.lm.plain_adapter import plain_config, plain_tensors
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.tasks import Example

# PEFT 0.21 on transformers 5.23
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")

DRAWS, SEED = 3, 11
OPTIONS = ("positive", "not so negative", "maybe")
QUESTIONS = [example.input for example in list(make_tasks(2).values())[1].examples[:4]]
TOLERANCE = {"rtol": 0, "atol": 2e-5}
"""Of log-probabilities (nats) in float64: files have the weights in float32, each rounded by at most 6e-8 of it."""

CHAT = (
    "{% for m in messages %}{{ '<s>' + m.role + '\n' + m.content + '</s>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\n' }}{% endif %}"
)


def base(kind: str = "llama") -> Any:
    torch.manual_seed(1)
    return BUILDERS[kind]().double().eval()


def language_model(tokenizer: Any, kind: str = "llama", lora: dict[str, Any] | None = None, **kwargs: Any) -> Any:
    config = peft.LoraConfig(**{"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "o_proj"]} | (lora or {}))
    model = base(kind)
    inject(config, model, seed=2)
    return LanguageModel(model, tokenizer, config, name=kind, **{"max_length": 96} | kwargs)


def normal(mean: torch.Tensor, scale: float) -> Any:
    return Normal(mean[None, None], torch.full_like(mean, scale)[None, None]).to_event(3)


def posterior_of(lm: Any, *, head: bool = False, **kwargs: Any) -> TaskPosterior:
    """Half of the sites are random, the others are shared; the head's slope is not 1 and its biases differ."""
    values = random_phi(lm, scale=0.3)
    shared = {site: value for site, value in values.items() if site.startswith("o_proj.lora_A")}
    phi = {site: normal(value, 0.15) for site, value in values.items() if site not in shared}
    if head:
        phi[SLOPE] = normal(torch.full(HEAD_SHAPES[SLOPE], 0.4).double(), 0.1)
        phi[BIAS] = normal(torch.linspace(-1, 1, 32).double().reshape(HEAD_SHAPES[BIAS]).exp(), 0.5)
    return TaskPosterior(lm, phi, shared, ("a",), **kwargs)


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "head and temperature": dict(posterior=dict(head=True, temperature=1.7)),
    "head without biases": dict(posterior=dict(head=True, fixed_options=(False,))),
    "mean over tokens": dict(lm=dict(normalize="mean"), posterior=dict(head=True)),
    "patterns": dict(
        lora=dict(
            rank_pattern={"q_proj": 5, r"layers\.1\.self_attn\.o_proj": 1},
            alpha_pattern={r"layers\.2.*q_proj": 9, "o_proj": 1},
            use_rslora=True,
        ),
        posterior=dict(head=True),
    ),
    "other modules in each layer": dict(
        lora=dict(target_modules=r"model\.layers\.(1\.self_attn\.q_proj|3\.mlp\.(up|down)_proj)", lora_alpha=5)
    ),
    "excluded modules": dict(lora=dict(exclude_modules=r".*\.0\..*", layers_to_transform=[0, 1, 3])),
    "Conv1D": dict(kind="gpt2", lora=dict(target_modules=["c_attn", "c_proj"], fan_in_fan_out=True, lora_alpha=4)),
    "letters": dict(lm=dict(template=PromptTemplate("{input}\n{options}\nAnswer: ", separator="\n", letters=True))),
    "zeros for other layers": {"lora": dict(layers_to_transform=[2, 3]), "all": True},
    "zeros for other layers of Conv1D": {
        "kind": "gpt2",
        "lora": dict(target_modules=["c_attn", "mlp.c_fc"], layers_to_transform=[3], fan_in_fan_out=True),
        "all": True,
    },
    "chat": dict(chat=True, posterior=dict(head=True)),
}


def made(name: str, tokenizer: Any) -> tuple[TaskPosterior, str, Any]:
    case = CASES[name]
    kwargs, kind = dict(case.get("lm", {})), case.get("kind", "llama")
    if case.get("chat"):
        tokenizer = copy.deepcopy(tokenizer)
        tokenizer.chat_template = CHAT
        kwargs["template"] = PromptTemplate("{options}?\n{input}", chat=True)
    lm = language_model(tokenizer, kind, case.get("lora"), **kwargs)
    return posterior_of(lm, **case.get("posterior", {})), kind, tokenizer


@pytest.mark.parametrize("name", CASES)
def test_peft_alone_predicts_what_the_posterior_does(name: str, tokenizer: Any, tmp_path: Path) -> None:
    """Under the mean, under each draw, and averaged; and each folder obeys the rules of vLLM's loader."""
    posterior, kind, tokenizer = made(name, tokenizer)
    folder, zeros = tmp_path / "served", CASES[name].get("all", False)
    found = posterior.export(folder, num_draws=DRAWS, seed=SEED, options=OPTIONS, all_layers=zeros)
    assert found.adapters == ("mean", "draw-0", "draw-1", "draw-2") and found.merged_bytes is None
    assert sorted(path.name for path in folder.iterdir()) == sorted([*found.adapters, "scores.json"])
    for adapter in found.adapters:
        assert check_vllm_rules(folder / adapter, base(kind))["r"] == found.rank
        assert found.adapter_bytes == sum(file.stat().st_size for file in (folder / adapter).iterdir())
    models = adapters_of(folder, lambda: base(kind))
    examples = [Example(question, OPTIONS) for question in QUESTIONS]
    draws, mean = (posterior.predict_draws(examples, num_draws=count, seed=SEED) for count in (DRAWS, 0))
    for n, question in enumerate(QUESTIONS):
        by_hand = log_probs_by_hand(folder, models, tokenizer, question)
        expected = {"mean": mean.mean()[n], "average": draws.mean()[n]}
        expected |= {f"draw-{k}": draws.log_probs[k, n] for k in range(DRAWS)}
        assert by_hand.keys() == expected.keys()
        for key, value in expected.items():
            torch.testing.assert_close(torch.tensor(by_hand[key]).double(), value, **TOLERANCE, msg=f"{key}, {n}")
    assert (draws.log_probs[0] - draws.log_probs[1]).abs().max() > 0.01 < (draws.mean() - mean.mean()).abs().max()


def test_a_task_with_other_options_in_each_question_has_the_template(tokenizer: Any, tmp_path: Path) -> None:
    posterior = posterior_of(language_model(tokenizer), head=True)
    posterior.export(tmp_path / "served")
    facts = json.loads((tmp_path / "served" / "scores.json").read_text())
    assert facts["prompt"] is None and facts["option_tokens"] is None and facts["options"] is None
    assert facts["template"]["prompt"] == PromptTemplate().prompt and facts["num_draws"] == 0
    assert len(facts["adapters"]["mean"]["bias"]) == 32 and list(facts["adapters"]) == ["mean"]


def test_draws_are_those_of_the_posterior(tokenizer: Any, tmp_path: Path) -> None:
    """Shared sites are in each; another seed makes other draws."""
    posterior = posterior_of(language_model(tokenizer))
    for seed in (0, 1):
        posterior.export(tmp_path / str(seed), num_draws=2, seed=seed)
    first, second = (load_file(tmp_path / seed / "draw-1" / "adapter_model.safetensors") for seed in "01")
    check_draw(posterior, second, 1, num_draws=2, seed=1)
    for key, value in first.items():
        assert torch.equal(value, second[key]) == ("o_proj.lora_A" in key)


def test_draws_of_components_take_turns(tokenizer: Any, tmp_path: Path) -> None:
    lm = language_model(tokenizer)
    values = {site: value[:, None, None] for site, value in random_phi(lm, 3, scale=0.3).items()}
    phi = Components({site: Normal(value, torch.full_like(value, 0.1)).to_event(3) for site, value in values.items()})
    posterior = TaskPosterior(lm, phi, {}, ("a",))
    posterior.export(tmp_path / "served", num_draws=4)
    for index in range(4):
        tensors = load_file(tmp_path / "served" / f"draw-{index}" / "adapter_model.safetensors")
        check_draw(posterior, tensors, index, num_draws=4, seed=0)


def check_draw(posterior: TaskPosterior, tensors: dict[str, Any], index: int, **words: Any) -> None:
    """Tensors of an adapter are one of the posterior's draws, with the scaling 2 of ``language_model`` in B."""
    draws = posterior.draw(**words)
    phi = {site: value[index if len(value) > 1 else 0, 0, 0] for site, value in draws.items()}
    for name, value in posterior.lm.sites.unstack(phi).items():
        scale = 2.0 if name.endswith("lora_B") else 1.0
        torch.testing.assert_close(tensors[f"base_model.model.{name}.weight"].double(), scale * value)


PATTERNS = st.dictionaries(
    st.sampled_from(["q_proj", "mlp.up_proj", r"layers\.2\..*", r"layers\.[13]\.self_attn\.q_proj", "down_proj"]),
    st.integers(1, 7),
    max_size=3,
)


@pytest.mark.filterwarnings("ignore:The following (alpha|rank)_pattern keys did not match:RuntimeWarning")
@settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate])
@given(
    rank=st.integers(1, 6),
    alpha=st.integers(1, 20),
    ranks=PATTERNS,
    alphas=PATTERNS,
    rslora=st.booleans(),
    layers=st.none() | st.sets(st.integers(0, 3), min_size=1).map(sorted),
    whole=st.booleans(),
)
def test_updates_are_those_of_peft_whatever_the_patterns(
    tokenizer: Any,
    rank: int,
    alpha: int,
    ranks: dict[str, int],
    alphas: dict[str, int],
    rslora: bool,
    layers: list[int] | None,
    whole: bool,
) -> None:
    """One rank and a scaling of 1 give each module the update that PEFT computes from its own rank and alpha."""
    lora = dict(r=rank, lora_alpha=alpha, rank_pattern=ranks, alpha_pattern=alphas, use_rslora=rslora)
    lora |= dict(target_modules=["q_proj", "up_proj", "down_proj"], layers_to_transform=layers)
    lm = language_model(tokenizer, lora=lora)
    values = random_phi(lm)
    tensors, config = plain_tensors(lm, values, torch.float64, all_layers=whole), plain_config(lm, all_layers=whole)
    modules = dict(lora_layers(lm.model, "default"))
    others = {name: value for name, value in tensors.items() if not any(f".{module}." in name for module in modules)}
    assert len(tensors) == 2 * (12 if whole else len(modules)) and not any(map(torch.any, others.values()))
    with lm.sites.bind(values):
        for name, layer in modules.items():
            a, b = (tensors[f"base_model.model.{name}.lora_{factor}.weight"] for factor in "AB")
            assert len(a) == b.shape[1] == config["r"] == config["lora_alpha"]
            torch.testing.assert_close(b @ a, layer.get_delta_weight("default"))
    fresh = base()
    inject(peft.LoraConfig(**{k: v for k, v in config.items() if k != "peft_type"}), fresh)
    found = [f"base_model.model.{name}.lora_A.weight" for name, _ in lora_layers(fresh, "default")]
    assert sorted(found) == sorted(name for name in tensors if ".lora_A." in name)


# A merged model


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
def test_a_merged_model_has_the_scores_of_the_mean(kind: str, tokenizer: Any, tmp_path: Path) -> None:
    """Transformers alone reads it; the language model in memory is not changed."""
    lora = dict(target_modules=["c_attn"], fan_in_fan_out=True) if kind == "gpt2" else {}
    lm = language_model(tokenizer, kind, lora | dict(use_rslora=True))
    lm.model.generation_config = GenerationConfig(max_new_tokens=7, eos_token_id=0)
    posterior = posterior_of(lm)
    examples = [Example(question, OPTIONS) for question in QUESTIONS]
    expected = posterior.predict(examples, num_draws=0)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    config = copy.deepcopy(lm.model.config)
    found = posterior.export(tmp_path / "served", merge=True, options=OPTIONS)
    folder = tmp_path / "served" / "merged"
    assert len({path.stat().st_mode for path in folder.iterdir()}) == 1  # a server may run as another user
    assert found.merged_bytes == sum(file.stat().st_size for file in folder.iterdir())
    after = lm.model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert torch.equal(posterior.predict(examples, num_draws=0), expected) and lm.model.config.to_dict() == (
        config.to_dict()
    )
    merged = AutoModelForCausalLM.from_pretrained(folder).eval()
    assert type(merged) is type(base(kind)) and merged.dtype == torch.float64
    assert merged.generation_config.max_new_tokens == 7
    assert merged.state_dict().keys() == base(kind).state_dict().keys()
    read = AutoTokenizer.from_pretrained(folder)
    for n, question in enumerate(QUESTIONS):
        by_hand = log_probs_by_hand(tmp_path / "served", {"mean": merged}, read, question)
        found_here = torch.tensor(by_hand["mean"]).double()
        torch.testing.assert_close(found_here, expected[n], rtol=0, atol=closeness(lm).get("atol", 1e-6))


def test_a_merged_model_in_another_dtype_is_rounded_once(tokenizer: Any, tmp_path: Path) -> None:
    lm = language_model(tokenizer, "gemma")  # whose head is its embedding
    posterior = posterior_of(lm)
    posterior.export(tmp_path / "served", merge=True, dtype="bfloat16")
    weights = load_file(tmp_path / "served" / "merged" / "model.safetensors")
    assert "lm_head.weight" not in weights and {value.dtype for value in weights.values()} == {torch.bfloat16}
    assert json.loads((tmp_path / "served" / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    adapter = load_file(tmp_path / "served" / "mean" / "adapter_model.safetensors")
    assert {value.dtype for value in adapter.values()} == {torch.bfloat16}
    with lm.sites.bind({site: value[0, 0] for site, value in posterior.mean().items()}):
        for name, layer in lora_layers(lm.model, "default"):
            exact = layer.get_base_layer().weight + layer.get_delta_weight("default")
            assert torch.equal(weights[f"{name}.weight"], exact.bfloat16())


def test_merging_copies_the_adapted_weights_only(tokenizer: Any) -> None:
    lm = language_model(tokenizer)
    values = {site: value[0, 0] for site, value in posterior_of(lm).mean().items()}
    adapted = {f"{name}.weight" for name, _ in lora_layers(lm.model, "default")}
    own = {name.replace(".base_layer.", "."): value for name, value in lm.model.state_dict().items()}
    found = merged_weights(lm, values)
    copied = {name for name, value in found.items() if value.data_ptr() != own[name].data_ptr()}
    assert copied == adapted and found.keys() == own.keys()


@pytest.mark.parametrize("how", ["quantiser", "weights"])
def test_a_quantised_base_is_not_merged(how: str, tokenizer: Any, tmp_path: Path) -> None:
    posterior = posterior_of(language_model(tokenizer))
    if how == "quantiser":
        quantizer = SimpleNamespace(quantization_config=SimpleNamespace(quant_method="bitsandbytes"))
        posterior.lm.model.hf_quantizer = quantizer
    else:
        codes = torch.ones(4, 4, dtype=torch.int8)
        posterior.lm.model.lm_head.weight = torch.nn.Parameter(codes, requires_grad=False)
    with pytest.raises(ConfigError, match="that is not quantised, got llama in .* Serve the adapters instead") as error:
        posterior.export(tmp_path / "served", merge=True)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())
    posterior.export(tmp_path / "served")


# Bad inputs


def deferred(lm: Any) -> TaskPosterior:
    values = random_phi(lm)
    loc = [values[f"q_proj.lora_{factor}"][None, None] for factor in "AB"]
    phi = {"q_proj.delta_weight": FactoredNormal(*loc, *(0.1 * value.abs() for value in loc))}
    return TaskPosterior(lm, phi, {site: v for site, v in values.items() if site.startswith("o_proj")}, ("a",))


def point(lm: Any) -> TaskPosterior:
    phi = {site: Delta(value[None, None], event_dim=3) for site, value in random_phi(lm).items()}
    return TaskPosterior(lm, phi, {}, ("a",))


def two_tasks(lm: Any) -> TaskPosterior:
    phi = {s: Normal(v.expand(2, 1, *v.shape), 0.1).to_event(3) for s, v in random_phi(lm).items()}
    return TaskPosterior(lm, phi, {}, ("a", "b"))


def merged_already(lm: Any) -> TaskPosterior:
    _, layer = next(iter(lora_layers(lm.model, "default")))
    layer.merged_adapters.append("other")
    return posterior_of(lm)


def too_large(lm: Any) -> TaskPosterior:
    return TaskPosterior(lm, {}, {site: 1e5 + value for site, value in random_phi(lm).items()}, ("a",))


def not_finite(lm: Any) -> TaskPosterior:
    return TaskPosterior(lm, {}, {site: math.nan * value for site, value in random_phi(lm).items()}, ("a",))


BAD: dict[str, tuple[Any, dict[str, Any], type[BayesLoraError], str]] = {
    "draws below 0": (posterior_of, dict(num_draws=-1), ConfigError, "num_draws: expected 0 or more, got -1"),
    "half a draw": (posterior_of, dict(num_draws=1.5), ConfigError, "num_draws: expected 0 or more, got 1.5"),
    "draws of whole updates": (deferred, dict(num_draws=1), ConfigError, "is not a LoRA. Export the mean: num_draws=0"),
    "draws of a point": (point, dict(num_draws=2), ConfigError, "is a point, whose draws are all its mean. Export it"),
    "several tasks": (two_tasks, {}, TaskError, r"expected one task, got 2. select\(\) one of \['a', 'b'\] first"),
    "a dtype of no file": (posterior_of, dict(dtype="int8"), ConfigError, "expected one of float32, .* got 'int8'"),
    "an adapter that is merged": (merged_already, {}, SiteError, r"\['other'\] are merged. Call unmerge_adapter"),
    "a merge on a merge": (merged_already, dict(merge=True), SiteError, "are merged. Call unmerge_adapter"),
    "float16 that overflows": (too_large, dict(dtype="float16"), PosteriorError, "float16, .* Use float32 or bfloat16"),
    "NaN": (not_finite, {}, PosteriorError, "lora_A: expected finite values .* Fit and adapt again"),
    "options that are a text": (posterior_of, dict(options="yes"), TaskError, "expected a list of texts"),
    "one option": (posterior_of, dict(options=["yes"]), TaskError, "at least 2 answers"),
    "an option with a placeholder": (posterior_of, dict(options=["{input}", "b"]), TaskError, "without '{input}'"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_exported_is_one_line_and_leaves_no_file(name: str, tokenizer: Any, tmp_path: Path) -> None:
    make, words, kind, message = BAD[name]
    posterior = make(language_model(tokenizer))
    with pytest.raises(kind, match=message) as error:
        posterior.export(tmp_path / "served", **words)
    assert "\n" not in str(error.value) and not list(tmp_path.iterdir())


def test_means_of_whole_updates_and_points_are_exported(tokenizer: Any, tmp_path: Path) -> None:
    for make in (deferred, point):
        posterior = make(language_model(tokenizer))
        posterior.export(tmp_path / make.__name__, options=OPTIONS)
        models = adapters_of(tmp_path / make.__name__, base)
        expected = posterior.predict([Example(QUESTIONS[0], OPTIONS)], num_draws=0)[0]
        found = log_probs_by_hand(tmp_path / make.__name__, models, tokenizer, QUESTIONS[0])["average"]
        torch.testing.assert_close(torch.tensor(found).double(), expected, **TOLERANCE)


def test_only_an_export_is_replaced(tokenizer: Any, tmp_path: Path) -> None:
    posterior = posterior_of(language_model(tokenizer))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(RunFolderError, match="mine has no scores.json, so it is not replaced"):
        posterior.export(tmp_path / "mine", overwrite=True)
    posterior.export(tmp_path / "served", num_draws=2)
    with pytest.raises(RunFolderError, match="served already exists"):
        posterior.export(tmp_path / "served")
    posterior.export(tmp_path / "served", overwrite=True)
    assert sorted(path.name for path in (tmp_path / "served").iterdir()) == ["mean", "scores.json"]


def test_draws_of_a_posterior_with_linear_predictions_are_warned_of(tokenizer: Any, tmp_path: Path) -> None:
    posterior = dataclasses.replace(posterior_of(language_model(tokenizer)), predictive="linear")
    posterior.export(tmp_path / "mean")
    with pytest.warns(UserWarning, match=r"linear in the weights, .* Serve the mean \(num_draws=0\)") as caught:
        posterior.export(tmp_path / "draws", num_draws=1)
    assert [Path(one.filename).name for one in caught] == [Path(__file__).name]


# The page of the documentation

PAGE = Path(__file__).parents[1] / "docs" / "serving.md"


def test_the_client_of_the_docs_returns_the_posterior_s_predictions(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The page's client asks a server over HTTP that answers as vLLM does."""
    monkeypatch.chdir(tmp_path)
    posterior = posterior_of(language_model(tokenizer), head=True, temperature=0.7)
    posterior.export("served", num_draws=DRAWS, options=OPTIONS)
    tokenizer.save_pretrained("model")
    blocks = re.findall(r"^```python\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)
    [client] = [block for block in blocks if "urllib" in block]
    assert "bayes_lora" not in client
    names: dict[str, Any] = {}
    with completions_server(Path("served"), base) as url:
        code = client.replace("http://localhost:8000", url)
        code = re.sub(r"from_pretrained\(.*\)", 'from_pretrained("model")', code)
        exec(compile(code, str(PAGE), "exec"), names)
        found = names["predict"](QUESTIONS)
        only = names["predict"](QUESTIONS, draws=False)
    examples = [Example(question, OPTIONS) for question in QUESTIONS]
    for log_probs, count in ((found, DRAWS), (only, 0)):
        expected = posterior.predict(examples, num_draws=count)
        torch.testing.assert_close(torch.tensor(log_probs).double(), expected, **TOLERANCE)
