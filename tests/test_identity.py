"""A posterior knows the base weights that it was fitted on, in whatever format they come."""

import json
import math

import pytest
import torch
from conftest import SIZES, build_lm, make_tasks
from transformers import LlamaConfig, LlamaForCausalLM

from bayes_lora.episodes import PromptTemplate
from bayes_lora.errors import PosteriorError
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.weight_samples import NUM_VALUES, weight_sample
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective

DIFFERENT = "fitted on base weights other than those of llama, such as .*Use the same copy"


def through_json(lm):
    return json.loads(json.dumps({FINGERPRINT: fingerprint(lm)}))


def other_seed(lm):
    torch.manual_seed(5)
    for parameter in lm.model.parameters():
        parameter.normal_(std=0.3)


def in_four_bits(lm):
    """RowGroups of 32 values with their own least value and step, as in GGUF's Q4_1."""
    for parameter in lm.model.parameters():
        blocks = torch.nn.functional.pad(parameter.flatten(), (0, -parameter.numel() % 32)).view(-1, 32)
        least, step = blocks.amin(1, True), (blocks.amax(1, True) - blocks.amin(1, True)) / 15
        rounded = least + step * ((blocks - least) / step.clamp(min=1e-9)).round()
        parameter.copy_(rounded.flatten()[: parameter.numel()].view_as(parameter))


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_another_format_of_the_same_weights_fits(tmp_path, tokenizer, kind, dtype):
    low, high = build_lm(kind, tokenizer, dtype=dtype), build_lm(kind, tokenizer, dtype=torch.float32)
    check_fingerprint(through_json(low), high, tmp_path)
    check_fingerprint(through_json(high), low, tmp_path)


def of(name, change):
    """A change of one parameter, as by fine-tuning of a few, or of all that have this name."""

    def changed(lm):
        found = [value for key, value in lm.model.named_parameters() if key.endswith(name)]
        assert found
        for parameter in found:
            change(parameter)

    return changed


FINE_TUNED = {
    "one matrix": of("layers.2.mlp.up_proj.weight", lambda value: value.mul_(1.1)),
    "another matrix": of("layers.0.self_attn.k_proj.weight", lambda value: value.add_(0.1)),
    "an adapted matrix": of("layers.3.self_attn.q_proj.base_layer.weight", lambda value: value.add_(0.1)),
    "norms": of("model.norm.weight", lambda value: value.add_(0.1)),
    "all a little": of("", lambda value: value.mul_(1.001)),
}


@pytest.mark.parametrize("change", FINE_TUNED)
def test_a_fine_tuned_copy_is_refused(tmp_path, tokenizer, change):
    facts, lm = through_json(build_lm("llama", tokenizer)), build_lm("llama", tokenizer)
    FINE_TUNED[change](lm)
    with pytest.raises(PosteriorError, match=DIFFERENT):
        check_fingerprint(facts, lm, tmp_path)


def test_a_copy_that_stores_its_tied_head_is_accepted(tmp_path, tokenizer):
    tied, untied = build_lm("gemma", tokenizer), build_lm("gemma", tokenizer)
    head, embedding = untied.model.get_output_embeddings(), untied.model.get_input_embeddings()
    assert head.weight is embedding.weight
    head.weight = torch.nn.Parameter(embedding.weight.clone(), requires_grad=False)
    check_fingerprint(through_json(tied), untied, tmp_path)
    check_fingerprint(through_json(untied), tied, tmp_path)
    head.weight.mul_(1.1)
    for saved, here in ((tied, untied), (untied, tied)):
        with pytest.raises(PosteriorError, match="base weights other than those of gemma, such as lm_head.weight"):
            check_fingerprint(through_json(saved), here, tmp_path)


@pytest.mark.parametrize("change", [other_seed, in_four_bits])
def test_other_weights_are_refused(tmp_path, tokenizer, change):
    facts, lm = through_json(build_lm("llama", tokenizer)), build_lm("llama", tokenizer)
    check_fingerprint(facts, lm, tmp_path)
    change(lm)
    with pytest.raises(PosteriorError, match=DIFFERENT):
        check_fingerprint(facts, lm, tmp_path)


def test_the_sample_is_small_and_knows_nothing_of_lora(tokenizer):
    sample = weight_sample(build_lm("llama", tokenizer, top_layers=None).model)
    assert sample == weight_sample(build_lm("llama", tokenizer, top_layers=1, targets=["v_proj"]).model)
    [by_name] = sample.values()
    names = LlamaForCausalLM(LlamaConfig(**SIZES)).state_dict().keys()
    assert list(sample) == ["float64"] and by_name.keys() == names
    assert all(len(values) == NUM_VALUES and all(map(math.isfinite, values)) for values in by_name.values())


@pytest.mark.parametrize("values", [[1.0], ["a"] * NUM_VALUES, None, [[1.0]] * NUM_VALUES, [float("nan")] * NUM_VALUES])
def test_a_damaged_sample_is_refused(lm, tmp_path, values):
    facts = through_json(lm)
    names = facts[FINGERPRINT]["base_weights"]["float64"]
    for by_name in (dict.fromkeys(names, values), values):
        facts[FINGERPRINT]["base_weights"] = {"float64": by_name}
        with pytest.raises(PosteriorError, match=DIFFERENT):
            check_fingerprint(facts, lm, tmp_path)
    facts[FINGERPRINT]["base_weights"] = [1]
    with pytest.raises(PosteriorError, match="is damaged: 'fingerprint' has no mapping 'base_weights'"):
        check_fingerprint(facts, lm, tmp_path)


@pytest.fixture
def saved(lm, tmp_path):
    """A posterior, and one of two tasks, in folders with the loaders that read them."""
    config = RunConfig.from_dict({"recipe": "abmll-network", "guide": {"hidden": 4, "directions": 1, "bilinear": 1}})
    posterior = Posterior.from_objective(lm, build_objective(lm, config).double().eval())
    posterior.save(tmp_path / "posterior")
    posterior.adapt([task.split(3, seed=0) for task in list(make_tasks(2).values())]).save(tmp_path / "task_posterior")
    return {"posterior": Posterior.load, "task_posterior": TaskPosterior.load}


@pytest.mark.parametrize("kind", ["posterior", "task_posterior"])
def test_saved_posteriors_are_compared_when_they_are_loaded(saved, lm, tmp_path, tokenizer, kind):
    folder, load = tmp_path / kind, saved[kind]
    other, templated = (build_lm("llama", tokenizer, **k) for k in ({}, {"template": PromptTemplate("{input}:")}))
    load(folder, other)
    with pytest.raises(PosteriorError, match=r"fitted with template.prompt=.*Use the same template"):
        load(folder, templated)
    other_seed(other)
    with pytest.raises(PosteriorError, match=f"{kind}.json: {DIFFERENT}"):
        load(folder, other)
    file = folder / f"{kind}.json"  # a folder of a version that had no fingerprint
    facts = json.loads(file.read_text())
    del facts[FINGERPRINT]
    file.write_text(json.dumps(facts))
    with pytest.raises(PosteriorError, match=f"{kind}.json: it has no 'fingerprint' .* Fit again"):
        load(folder, lm)
