"""A posterior knows the base weights that it was fitted on, in whatever format they come."""

import json
import math

import pytest
import torch
from conftest import build_lm, make_tasks

from bayes_lora.episodes import PromptTemplate
from bayes_lora.errors import PosteriorError
from bayes_lora.lm.fingerprint import FINGERPRINT, check_fingerprint, fingerprint
from bayes_lora.lm.weight_samples import NUM_MATRICES, NUM_VALUES, weight_sample
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import build_objective

DIFFERENT = "fitted on base weights other than those of llama: .* matrices differ, such as .*Use the same copy"


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
    assert len(sample) == NUM_MATRICES
    assert all(len(values) == NUM_VALUES and all(map(math.isfinite, values)) for values in sample.values())


@pytest.mark.parametrize("values", [[1.0], ["a"] * NUM_VALUES, None, [[1.0]] * NUM_VALUES, [float("nan")] * NUM_VALUES])
def test_a_damaged_sample_is_refused(lm, tmp_path, values):
    facts = through_json(lm)
    sample = facts[FINGERPRINT]["base_weights"]
    facts[FINGERPRINT]["base_weights"] = dict.fromkeys(sample, values)
    with pytest.raises(PosteriorError, match=DIFFERENT):
        check_fingerprint(facts, lm, tmp_path)
    facts[FINGERPRINT]["base_weights"] = [1]
    with pytest.raises(PosteriorError, match="is damaged: 'fingerprint' has no mapping 'base_weights'"):
        check_fingerprint(facts, lm, tmp_path)


@pytest.fixture
def saved(lm, tmp_path):
    """A posterior, and one of two tasks, in folders with the loaders that read them."""
    config = RunConfig.from_dict({"guide": {"hidden": 4, "directions": 1, "bilinear": 1}})
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
