"""Every recipe fits, adapts, and predicts the same after it was saved."""

import pytest
import torch
from conftest import make_tasks

from bayes_lora.config import EpisodeConfig, GradientConfig, GuideConfig, ObjectiveConfig, RunConfig
from bayes_lora.guides import GradientGuide, GuideNetwork
from bayes_lora.posterior import Posterior
from bayes_lora.recipes import RECIPES, build_objective
from bayes_lora.run import fit_posterior
from bayes_lora.training import FitConfig

SMALL = dict(
    guide=GuideConfig(directions=2, hidden=6, bilinear=2),
    gradient=GradientConfig(steps=2),
    episodes=EpisodeConfig(tasks_per_episode=2, num_support=3, num_query=3, held_back=1, held_back_shots=4),
    fit=FitConfig(steps=3, eval_every=3),
)


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("demonstrations", [0, 2])
def test_a_recipe_from_fit_to_a_reloaded_posterior(lm, tmp_path, name, demonstrations):
    episodes = EpisodeConfig(**vars(SMALL["episodes"]) | {"num_demonstrations": demonstrations})
    config = RunConfig(recipe=name, objective=ObjectiveConfig(num_particles=2), **SMALL | {"episodes": episodes})
    posterior, state = fit_posterior(lm, make_tasks(4), config)
    assert state.step == 3
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior", lm=lm)
    tasks = [task.split(5, seed=0) for task in make_tasks(6).values()][4:]
    found = []
    for one in (posterior, again):
        torch.rand(1)  # adaptation draws under its own seed
        found.append(one.adapt(tasks, steps=1).evaluate(tasks, num_draws=2, num_demonstrations=demonstrations))
    assert found[0] == found[1]


def test_settings_reach_the_guide(lm):
    config = RunConfig(recipe="abmll-network-gradient", gradient=GradientConfig(steps=4, second_order=True))
    objective = build_objective(lm, config)
    guide = objective.guide.program
    assert isinstance(guide, GradientGuide) and isinstance(guide.start, GuideNetwork)
    assert (guide.steps, guide.second_order, guide.beta) == (4, True, objective.full_beta)
    own = RunConfig(recipe="abmll", gradient=GradientConfig(beta=0.5, learn_rates=True))
    guide = build_objective(lm, own).guide.program
    assert guide.start is None and guide.beta == 0.5
    assert any("log_rate" in name for name, _ in guide.named_parameters())
