"""Priors and guides by name, and their settings as their constructors have them."""

import inspect
import re
from functools import partial
from pathlib import Path

import pytest
import torch

from bayes_lora import guides, models
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, GuideNetwork, LowRank, MeanField, NormalTheta, PointTheta
from bayes_lora.models import HierarchicalNormal, RankARD, Subspace
from bayes_lora.recipes.config import RunConfig
from bayes_lora.recipes.recipes import RECIPES, build_objective, recipe_of
from bayes_lora.recipes.registry import GUIDES, PRIORS, build_guide, build_prior, name_of, parameters_of

DOCS = Path(__file__).parents[1] / "docs" / "recipes.md"


def test_names_are_those_of_the_classes():
    assert PRIORS["rank-ard"] is RankARD and GUIDES["mean-field"] is MeanField
    assert [name_of(cls) for cls in (guides.SGLD, guides.MCDropout, guides.NUTS)] == ["sgld", "mc-dropout", "nuts"]
    assert set(PRIORS.values()) == {getattr(models, n) for n in models.__all__} - {
        models.FactorModel,
        models.HierarchicalModel,
        models.WithHead,
    }


@pytest.mark.parametrize("cls", [*PRIORS.values(), *GUIDES.values()])
def test_settings_are_keyword_arguments_with_their_defaults(cls):
    """Of a constructor that hands ``**settings`` on, those of its base class too."""
    signature = inspect.signature(cls.__init__).parameters
    keywords = {name: p.default for name, p in signature.items() if p.kind is p.KEYWORD_ONLY}
    known = {name: p.default for name, p in parameters_of(cls).items()}
    functions = {"make", *getattr(cls, "not_settings", ())}  # and tensors
    assert keywords.items() - known.items() <= {(name, keywords.get(name)) for name in functions}
    if any(p.kind is p.VAR_KEYWORD for p in signature.values()):
        assert "hidden" in known


@pytest.mark.parametrize("name", PRIORS)
def test_every_prior_is_made_of_its_name(lm, name):
    assert type(build_prior({"name": name}, lm)) is PRIORS[name]


@pytest.mark.parametrize("name", GUIDES)
def test_every_guide_is_made_of_its_name(lm, name):
    model = (Subspace if name == "tangent-network" else HierarchicalNormal)(lm)  # which takes no other prior
    assert type(build_guide({"name": name}, model, num_tasks=4, beta=0.1)) is GUIDES[name]


def test_settings_of_a_prior_reach_it(lm):
    model = build_prior({"name": "rank-ard", "random": "B", "initial_scale": [0.2, "3e-1"], "rate": 2}, lm)
    assert isinstance(model, RankARD) and all(".lora_B" in site for site in model.random_sites)
    assert model.initial_scale == (0.2, 0.3) and model.rate == 2.0
    assert model.settings == {"random": "B", "initial_scale": (0.2, 0.3), "rate": 2.0}


def test_parts_of_a_guide_are_made_of_their_names(lm):
    model = HierarchicalNormal(lm)
    start = {"name": "guide-network", "hidden": 5, "theta_guide": {"name": "normal", "initial_scale": 0.02}}
    guide = build_guide({"name": "gradient-guide", "start": start, "steps": 3}, model, num_tasks=4, beta=0.3)
    assert isinstance(guide, GradientGuide) and isinstance(guide.start, GuideNetwork)
    assert guide.beta == 0.3 and guide.start.encode.out_features == 5
    scale = guide.theta.distribution("theta.loc.q_proj.lora_A").stddev
    torch.testing.assert_close(scale, torch.full_like(scale, 0.02))
    family = {"name": "low-rank", "rank": 2}
    fields = build_guide(
        {"name": "mean-field", "family": family, "theta_guide": "normal"}, model, num_tasks=4, beta=1.0
    )
    assert fields.settings == {"num_tasks": 4, "family": LowRank(2), "theta_guide": NormalTheta}
    assert GuideNetwork(model, theta_guide=partial(NormalTheta, initial_scale=0.1)).settings["theta_guide"].keywords


def test_a_guide_takes_the_objective_s_beta_unless_it_has_its_own(lm):
    model = HierarchicalNormal(lm)
    for own, expected in (({}, 0.3), ({"beta": 0.7}, 0.7)):
        assert build_guide({"name": "swag", **own}, model, num_tasks=1, beta=0.3).beta == expected


def test_another_name_replaces_a_recipe_s_part_settings_and_all():
    config = RunConfig.load(None, ["recipe=blob", "prior.name=rank-ard", "guide.theta_guide=normal"])
    recipe = recipe_of(config)
    assert recipe.prior == {"name": "rank-ard"}  # not blob's random="A"
    assert recipe.guide == {"name": "shared-mean-field", "theta_guide": "normal"}
    nested = RunConfig.load(None, ["recipe=abmll-network-gradient", "guide.start.hidden=7", "guide.steps=2"])
    assert recipe_of(nested).guide == {
        "name": "gradient-guide",
        "start": {"name": "guide-network", "hidden": 7},
        "steps": 2,
    }


def test_the_order_of_settings_does_not_matter_for_a_new_name():
    for settings in (["guide.name=swag", "guide.rank=3"], ["guide={name: swag, rank: 3}"]):
        assert recipe_of(RunConfig.load(None, settings)).guide == {"name": "swag", "rank": 3}


def test_learned_starts_learn_their_locations_alone(lm):
    guide = build_objective(lm, RunConfig(recipe="reptile")).guide
    learned = {name for name, parameter in guide.theta.named_parameters() if parameter.requires_grad}
    assert learned == {name for name, _ in guide.theta.named_parameters() if "theta_loc" in name}
    assert len(learned) < len(list(guide.theta.parameters())) and type(guide.theta) is PointTheta


def test_settings_for_a_part_that_is_passed_are_refused(lm):
    with pytest.raises(ConfigError, match=r"prior: expected no settings for the HierarchicalNormal that was passed"):
        build_objective(lm, RunConfig(prior={"random": "B"}), model=HierarchicalNormal(lm))


def test_the_table_in_the_docs_is_the_recipes():
    rows = re.findall(r"^\| `(.*?)` \| `(.*?)`.*? \| `(.*?)`.*? \| (\w+) \| (.*) \|$", DOCS.read_text(), re.MULTILINE)
    assert rows == [(name, r.prior["name"], r.guide["name"], r.calibrate, r.about) for name, r in RECIPES.items()]


@pytest.mark.parametrize(
    "settings", [["guide.rank=10", "guide.name=swag"], ["recipe=abmll", "guide.steps=9", "guide.name=gradient-guide"]]
)
def test_the_order_of_settings_loses_none(settings):
    [(key, value)] = [s.removeprefix("guide.").split("=") for s in settings if "name" not in s and "recipe" not in s]
    assert recipe_of(RunConfig.load(None, settings)).guide.get(key) == int(value)


def test_theta_guide_reaches_the_start(lm):
    config = RunConfig.load(None, ["recipe=abmll-network-gradient", "guide.theta_guide=normal"])
    assert isinstance(build_objective(lm, config).guide.theta, NormalTheta)


def test_settings_of_a_start_named_by_a_text_keep_the_name():
    settings = ["recipe=abmll-network-gradient", "guide.start=shared-mean-field", "guide.start.theta_guide=normal"]
    assert recipe_of(RunConfig.load(None, settings)).guide["start"]["name"] == "shared-mean-field"


@pytest.mark.parametrize(
    "setting",
    [
        "guide.theta_guide={name: normal, initial_scale: big}",
        "guide.theta_guide={name: normal, initial_scale: -1}",
        "guide.theta_guide={name: point, locations_only: maybe}",
        "guide.family={name: low-rank, rank: ten}",
        "guide.family={name: matrix-normal, largest: abc}",
    ],
)
def test_nested_settings_are_checked(setting):
    with pytest.raises(ConfigError):
        RunConfig.load(None, ["recipe=abmll", setting])


def test_the_name_of_a_class_will_do_as_well(lm):
    assert type(build_prior({"name": "RankARD"}, lm)) is RankARD
