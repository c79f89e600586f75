"""Which recipe a run has that names none, and a run by default: fit, save, resume, adapt, predict."""

import json
from dataclasses import replace

import pytest
import torch
import yaml
from conftest import make_tasks
from runs import assert_equal, names

from bayes_lora import Posterior, fit_posterior, load_posterior
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, GuideNetwork, TangentGuide
from bayes_lora.infer.training import FitConfig
from bayes_lora.models import HierarchicalNormal, LayerwiseScale, RankARD, WithHead
from bayes_lora.recipes.config import EpisodeConfig, RunConfig
from bayes_lora.recipes.recipes import RECIPES, build_objective, recipe_name, recipe_of, with_recipe

EPISODES = EpisodeConfig(tasks_per_episode=2, num_support=4, num_query=2, held_out=1, held_out_shots=4)
CONFIG = RunConfig(episodes=EPISODES)

CASES = {
    "nothing": ({}, "tangent"),
    "settings without a name": ({"prior": {"initial_scale": [0.1, 0.5]}, "guide": {"batch_size": 4}}, "tangent"),
    "a prior without its head": ({"prior": {"head": False}}, "tangent"),
    "the names of tangent": ({"prior": {"name": "layerwise-scale"}, "guide": {"name": "tangent-guide"}}, "tangent"),
    "another prior": ({"prior": {"name": "rank-ard"}}, "abmll-network"),
    "another guide": ({"guide": {"name": "swag", "rank": 3}}, "abmll-network"),
    "another prior with the guide of tangent": (
        {"prior": {"name": "rank-ard"}, "guide": {"name": "tangent-guide"}},
        "tangent",
    ),
    "a subspace": ({"prior": {"name": "subspace", "size": 9}}, "subspace"),
    "a subspace with the guide of tangent": (
        {"prior": {"name": "subspace"}, "guide": {"name": "tangent-guide"}},
        "subspace",
    ),
    "a network of derivatives": ({"guide": {"name": "tangent-network"}}, "subspace-network"),
    "a subspace with another guide": (
        {"prior": {"name": "subspace"}, "guide": {"name": "gradient-guide"}},
        "abmll-network",
    ),
    "the guide network": ({"guide": {"name": "guide-network", "hidden": 4}}, "abmll-network"),
    "beta": ({"objective": {"beta": 0.1}}, "tangent"),
    "a recipe": ({"recipe": "abmll", "guide": {"steps": 2}}, "abmll"),
    "tangent with another prior": ({"recipe": "tangent", "prior": {"name": "rank-ard"}}, "tangent"),
    "another recipe with the names of tangent": (
        {"recipe": "blob", "prior": {"name": "layerwise-scale"}, "guide": {"name": "tangent-guide"}},
        "blob",
    ),
    "null": ({"recipe": None}, "tangent"),
}


@pytest.mark.parametrize("case", CASES)
def test_the_recipe_of_settings(case, tmp_path):
    """From a mapping, from a file, and from flags."""
    values, expected = CASES[case]
    (tmp_path / "c.yaml").write_text(yaml.safe_dump(values))
    flags = [f"{key}={json.dumps(value)}" for key, value in values.items()]
    for config in (RunConfig.from_dict(values), RunConfig.load(tmp_path / "c.yaml"), RunConfig.load(None, flags)):
        named = with_recipe(config)
        assert named.recipe == expected and replace(named, recipe=config.recipe) == config
        assert recipe_of(config) == recipe_of(named)
        assert recipe_of(config).about == RECIPES[expected].about


@pytest.mark.parametrize("recipe", [None, "tangent", "lora"])
def test_parts_of_one_s_own_are_put_into_the_network_s_recipe(recipe):
    assert recipe_name(recipe, {}, {}, own_parts=True) == (recipe or "abmll-network")


def test_a_name_over_a_file_keeps_what_was_set_for_it(tmp_path):
    """The recipe is that of the result, so that settings for the network are not lost when a flag names it."""
    (tmp_path / "c.yaml").write_text("guide: {hidden: 8}\nprior: {rate: 0.5}\n")
    found = recipe_of(RunConfig.load(tmp_path / "c.yaml", ["guide.name=guide-network"]))
    assert found.guide == {"name": "guide-network", "hidden": 8}
    assert found.prior == {"name": "hierarchical-normal", "rate": 0.5}
    (tmp_path / "c.yaml").write_text("guide: {batch_size: 2}\n")
    assert recipe_of(RunConfig.load(tmp_path / "c.yaml", ["guide.name=swag"])).guide == {"name": "swag"}
    assert recipe_of(RunConfig.load(tmp_path / "c.yaml", ["guide.beta=0.5"])).guide == {
        "name": "tangent-guide",
        "batch_size": 2,
        "beta": 0.5,
    }


def test_objects_are_built_into_the_recipe(lm):
    default = build_objective(lm, RunConfig())
    assert isinstance(default.guide, TangentGuide) and isinstance(default.model, WithHead)
    assert type(default.model.prior) is LayerwiseScale and default.target_beta == default.guide.beta == 1.0
    swapped = build_objective(lm, RunConfig(), model=RankARD(lm))
    assert isinstance(swapped.guide, GuideNetwork) and swapped.target_beta == 1e-3
    swapped = build_objective(lm, RunConfig(guide={"name": "gradient-guide"}))
    assert type(swapped.model) is HierarchicalNormal and swapped.guide.beta == swapped.target_beta == 1e-3
    assert build_objective(lm, RunConfig(recipe="tangent"), model=LayerwiseScale(lm)).target_beta == 1.0


def test_settings_of_the_other_half_are_those_of_the_network(lm):
    """With a prior as an object, ``guide.hidden`` needs no name; without one it does, and the error says so."""
    values = {"guide": {"hidden": 7}, "fit": {"steps": 1, "eval_every": 1}, "episodes": EPISODES}
    posterior, _ = fit_posterior(lm, make_tasks(3), values, model=RankARD(lm))
    assert isinstance(posterior.guide, GuideNetwork) and posterior.guide.encode.out_features == 7
    with pytest.raises(ConfigError, match="not a setting of tangent-guide.*guide-network.*: set guide.name"):
        fit_posterior(lm, make_tasks(3), values)


def test_a_run_by_default(lm, tmp_path):
    run, tasks = tmp_path / "run", make_tasks(5)
    posterior, state = fit_posterior(lm, tasks, CONFIG, run=run)
    assert isinstance(posterior.guide, TangentGuide) and posterior.width == posterior.temperature == 1.0
    assert state.history[-1]["loss"] < state.history[0]["loss"] and state.history[-1]["held_out_nll"] > 0
    assert names(run) == ["checkpoint", "config.json", "curve.json", "posterior", "tasks.json"]
    assert json.loads((run / "config.json").read_text())["recipe"] == "tangent"
    resumed, again = fit_posterior(lm, tasks, CONFIG, run=run, resume=True)
    assert again.history == state.history
    assert_equal(resumed.objective.state_dict(), posterior.objective.state_dict())
    unseen = list(make_tasks(7).values())[5:]
    unseen = [task.split(4, seed=0) for task in unseen]
    queries = [task.query for task in unseen]
    found = load_posterior(run, lm=lm).adapt(unseen).predict(queries)
    for one, other, query in zip(posterior.adapt(unseen).predict(queries), found, queries, strict=True):
        assert torch.equal(one, other) and len(one) == len(query)
        torch.testing.assert_close(one.exp().sum(-1), torch.ones(len(one)).to(one))


def test_resume_compares_the_names_of_recipes(lm, tmp_path):
    """None is the name that it stands for; another name is another run."""
    run, tasks = tmp_path / "run", make_tasks(4)
    _, state = fit_posterior(lm, tasks, CONFIG, run=run)
    _, again = fit_posterior(lm, tasks, replace(CONFIG, recipe="tangent"), run=run, resume=True)
    assert again.history == state.history
    short = replace(CONFIG, fit=FitConfig(steps=2, eval_every=1))
    with pytest.raises(ConfigError, match="other settings"):
        fit_posterior(lm, tasks, replace(short, guide={"name": "gradient-guide"}), run=run, resume=True)
    assert json.loads((run / "config.json").read_text())["recipe"] == "tangent"


def test_a_longer_closed_form_fit_is_that_of_a_new_run(lm, tmp_path):
    run, tasks = tmp_path / "run", make_tasks(4)
    _, short = fit_posterior(lm, tasks, replace(CONFIG, fit=FitConfig(steps=1)), run=run)
    assert short.step == 1
    longer, state = fit_posterior(lm, tasks, replace(CONFIG, fit=FitConfig(steps=3)), run=run, resume=True)
    whole, expected = fit_posterior(lm, tasks, replace(CONFIG, fit=FitConfig(steps=3)))
    assert state.step == 3 and state.history == expected.history
    assert_equal(longer.objective.state_dict(), whole.objective.state_dict())


@pytest.mark.parametrize("passed", ["model", "guide", "both"])
def test_a_run_with_parts_of_one_s_own(lm, tmp_path, passed):
    """As before the default was the closed form: beta, the other half, and a width that is chosen."""
    model = RankARD(lm, random="B")
    parts = {
        "model": {"model": model},
        "guide": {"guide": GradientGuide(model, steps=1)},
        "both": {"model": model, "guide": GradientGuide(model, steps=1)},
    }[passed]
    config = replace(CONFIG, fit=FitConfig(steps=2, eval_every=2))
    posterior, state = fit_posterior(lm, make_tasks(4), config, run=tmp_path / "run", **parts)
    assert posterior.model is model and type(posterior.guide) is (GuideNetwork if passed == "model" else GradientGuide)
    assert posterior.objective.target_beta == 1e-3 and state.step == 2
    assert json.loads((tmp_path / "run" / "config.json").read_text())["recipe"] == "abmll-network"
    assert (tmp_path / "run" / "widths.json").exists()
    assert type(Posterior.load(tmp_path / "run" / "posterior", lm).model) is RankARD


def test_settings_of_former_runs_are_read_as_they_were():
    """They always had a name."""
    network = {"directions": 2, "hidden": 8, "bilinear": 2}
    values = replace(CONFIG, recipe="abmll-network", guide=network).to_dict()
    assert RunConfig.from_dict(values).recipe == "abmll-network"
    assert recipe_of(RunConfig.from_dict(values)).guide == {"name": "guide-network", **network}
