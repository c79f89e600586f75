"""Every recipe fits, adapts, and predicts the same after it was saved."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from conftest import make_tasks
from runs import EPISODES, NOTHING_TO_LEARN, small
from zoo import episodes

from bayes_lora.guides import GradientGuide, GuideNetwork
from bayes_lora.infer.training import FitConfig
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import (
    ObjectiveConfig,
    RunConfig,
)
from bayes_lora.recipes.recipes import CLOSED_FORM, RECIPES, build_objective
from bayes_lora.runs.fit import fit_posterior


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("demonstrations", [0, 2])
def test_a_recipe_from_fit_to_a_reloaded_posterior(lm, tmp_path, name, demonstrations):
    shown = replace(EPISODES, num_demonstrations=demonstrations)
    particles = 1 if name in CLOSED_FORM else 2
    config = small(name, objective=ObjectiveConfig(num_particles=particles), episodes=shown)
    unused = name in CLOSED_FORM and demonstrations
    with pytest.warns(UserWarning, match="episodes.num_demonstrations have no effect") if unused else nullcontext():
        posterior, state = fit_posterior(lm, make_tasks(4), config)
    assert state.step == (0 if name in NOTHING_TO_LEARN else 3)
    posterior.save(tmp_path / "posterior")
    again = Posterior.load(tmp_path / "posterior", lm=lm)
    tasks = [task.split(5, seed=0) for task in make_tasks(6).values()][4:]
    found = []
    for one in (posterior, again):
        torch.rand(1)  # adaptation draws under its own seed
        found.append(one.adapt(tasks, steps=1).evaluate(tasks, num_draws=2, num_demonstrations=demonstrations))
    assert found[0] == found[1]


def test_a_recipe_with_nothing_to_learn_says_that_it_does_not_fit(lm):
    config = small("lora", fit=FitConfig(steps=3, learning_rate=0.1))
    with pytest.warns(
        UserWarning, match="recipe 'lora' has nothing to fit: fit.steps, fit.learning_rate have no effect"
    ):
        fit_posterior(lm, make_tasks(4), config)


@pytest.mark.parametrize("name", ["fomaml", "reptile"])
def test_only_locations_are_learnt_where_the_method_has_no_more(lm, name):
    """After a step the prior's precisions are what they were, and every location has moved."""
    objective = build_objective(lm, small(name))
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.01)
    for i in range(2):  # B is zero at the start, where A has no gradient
        optimizer.zero_grad()
        objective(episodes(lm)[i]).backward()
        optimizer.step()
    for name, p in objective.named_parameters():
        assert torch.equal(p, before[name]) == ("precision" in name), name
    assert any("precision" in name for name in before)


def test_reptile_s_step_is_towards_where_the_tasks_ended(lm):
    """theta's gradient is that of -beta log p(phi | theta) alone, N / n-free, for phi after the inner steps."""
    objective = build_objective(lm, small("reptile"))
    guide = objective.guide
    episode = episodes(lm)[0]
    torch.manual_seed(0)
    objective(episode).backward()
    torch.manual_seed(0)
    theta = guide.theta()
    phi = guide.posterior(episode.support, theta)
    beta, scale = objective.target_beta, episode.num_tasks / len(episode.task_index)
    for site, fn in phi.items():
        loc, precision = theta[f"theta.loc.{site}"], theta[f"theta.precision.{site}"]
        expected = beta * (scale * precision * (loc - fn.mean).sum((0, 1)) + loc)
        [found] = [
            p.grad for name, p in guide.theta.named_parameters() if name == f"loc_theta_loc_{site}".replace(".", "_")
        ]
        torch.testing.assert_close(found, expected.detach())


def test_an_ensemble_has_a_particle_for_each_member(lm):
    objective = build_objective(lm, small("ensemble", guide={"num_members": 3}))
    assert objective.elbo.num_particles == 3 and len(objective.guide.members) == 3
    objective(episodes(lm)[0]).backward()
    gradients = [p.grad for p in objective.guide.members.parameters()]
    assert all(gradient.abs().max() > 0 for gradient in gradients)


def test_settings_reach_the_guide(lm):
    config = RunConfig(recipe="abmll-network-gradient", guide={"steps": 4, "second_order": True})
    objective = build_objective(lm, config)
    guide = objective.guide
    assert isinstance(guide, GradientGuide) and isinstance(guide.start, GuideNetwork)
    assert (guide.steps, guide.second_order, guide.beta) == (4, True, objective.target_beta)
    own = RunConfig(recipe="abmll", guide={"beta": 0.5, "learn_rates": True})
    guide = build_objective(lm, own).guide
    assert guide.start is None and guide.beta == 0.5
    assert any("log_rate" in name for name, _ in guide.named_parameters())
