"""Every prior with every guide: three steps of training, draws, adaptation, saving, on a tiny language model."""

import inspect
from pathlib import Path

import pyro
import pytest
import torch
from conftest import make_tasks
from zoo import GUIDES, NOT_GUIDES, NOT_PRIORS, PRIORS, REFUSED, build, episodes, pairs

import bayes_lora.guides
import bayes_lora.models
from bayes_lora.errors import ConfigError
from bayes_lora.guides import TaskGuide
from bayes_lora.infer.predictive import draw_phi
from bayes_lora.infer.training import FitConfig
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import EpisodeConfig, ObjectiveConfig, RunConfig
from bayes_lora.runs.fit import fit_posterior
from bayes_lora.types import Guide, Likelihood, Model


@pytest.mark.parametrize(("prior", "guide"), pairs())
def test_three_steps(lm, prior, guide):
    """Sites match, every parameter gets a finite gradient that is not zero, the base stays frozen."""
    objective, sampler = build(lm, prior, guide), episodes(lm)
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    moved = {name: torch.zeros_like(p) for name, p in objective.named_parameters()}
    for i in range(3):
        optimizer.zero_grad()
        loss = objective(sampler[i])
        assert loss.isfinite()
        loss.backward()
        for name, parameter in objective.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
            moved[name] += parameter.grad.abs()
        optimizer.step()
    assert all(total.max() > 0 for total in moved.values()), [n for n, total in moved.items() if not total.max() > 0]
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert not pyro.get_param_store().keys()
    model, guide_trace = objective.model, pyro.poutine.trace(objective.guide).get_trace(sampler[0])
    latent = {
        n
        for n, s in guide_trace.nodes.items()
        if s["type"] == "sample" and n.startswith(("theta.", "phi.")) and not s["infer"].get("is_auxiliary")
    }
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, guide_trace)).get_trace(sampler[0])
    sites = {n for n, s in replayed.nodes.items() if s["type"] == "sample" and not s["is_observed"]} - {
        "task",
        "example",
    }
    assert latent == sites and {f"phi.{site}" for site in model.random_sites} <= latent


CONFIG = RunConfig(
    episodes=EpisodeConfig(tasks_per_episode=2, num_support=4, num_query=3, held_out=0),
    objective=ObjectiveConfig(beta=1e-2),
    fit=FitConfig(steps=2, eval_every=2),
)


@pytest.mark.filterwarnings("ignore:TangentGuide is fitted in closed form")
@pytest.mark.parametrize(("prior", "guide"), pairs())
def test_from_a_fit_to_predictions_of_what_was_saved(lm, prior, guide, tmp_path):
    """Any pair goes the whole way; predictions come back bit for bit, after loading the posterior or a task's."""
    torch.manual_seed(3)
    model = PRIORS[prior](lm)
    posterior, _ = fit_posterior(lm, make_tasks(), CONFIG, model=model, guide=GUIDES[guide](model))
    posterior.save(tmp_path / "posterior")
    other = Posterior.load(tmp_path / "posterior", lm)
    assert type(other.model) is type(model) and other.guide.settings.keys() == posterior.guide.settings.keys()
    episode = episodes(lm)[0]
    with posterior.objective.running():
        phi = draw_phi(model, posterior.guide, episode, 3)
    lm.sites.check(phi)
    assert lm(phi, episode).shape == (3, *episode.shape)
    tasks = [task.split(4, seed=0) for task in make_tasks(2).values()]
    found = []
    for one in (posterior, other):
        adapted = one.adapt(tasks, steps=2, learning_rate=0.01)
        adapted.save(tmp_path / "task", overwrite=True)
        loaded = type(adapted).load(tmp_path / "task", lm)
        found += [p.predict([task.query for task in tasks], num_draws=3) for p in (adapted, loaded)]
    for predictions in found:
        for log_probs, first in zip(predictions, found[0], strict=True):
            torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(len(log_probs), dtype=torch.float64))
            assert torch.equal(log_probs, first)


@pytest.mark.parametrize(("prior", "guide"), pairs(works=False))
def test_pairs_that_cannot_work_say_so_when_they_are_made(lm, prior, guide):
    with pytest.raises(ConfigError, match=REFUSED[prior, guide]):
        build(lm, prior, guide)


def test_every_model_and_guide_has_a_row_and_a_page():
    """And the others' signature: ``(likelihood, initial, *, ...)`` or ``(model, ...)``, and ``forward(episode)``."""
    assert set(bayes_lora.models.__all__) - NOT_PRIORS == set(PRIORS)
    guides = {name.partition(",")[0] for name in GUIDES}
    assert set(bayes_lora.guides.__all__) - NOT_GUIDES == guides
    zoo = (Path(__file__).parent.parent / "docs" / "zoo.md").read_text(encoding="utf-8")
    for name in (*PRIORS, *guides):
        assert f"### `{name}`" in zoo and f"| `{name}`" in zoo, name
    for name in PRIORS.keys() - {"WithHead"}:  # which takes another prior
        parameters = list(inspect.signature(getattr(bayes_lora.models, name).__init__).parameters.values())[1:]
        assert [p.name for p in parameters[:2]] == ["likelihood", "initial"], name
        assert all(p.kind is p.KEYWORD_ONLY for p in parameters[2:]), name
    for name in guides:
        parameters = list(inspect.signature(getattr(bayes_lora.guides, name).__init__).parameters.values())[1:]
        assert parameters[0].name == "model" and "theta_guide" in [p.name for p in parameters], name
    for cls in (*(getattr(bayes_lora.models, n) for n in PRIORS), *(getattr(bayes_lora.guides, n) for n in guides)):
        assert list(inspect.signature(cls.forward).parameters) == ["self", "episode"], cls


@pytest.mark.parametrize("prior", PRIORS)
def test_priors_meet_their_contract(lm, prior):
    model = PRIORS[prior](lm)
    assert isinstance(model, Model) and isinstance(lm, Likelihood)
    assert not isinstance(lambda episode: None, Model)


@pytest.mark.parametrize("guide", GUIDES)
def test_guides_meet_their_contract(lm, guide):
    """And nothing but a posterior need be defined: the rest is TaskGuide's."""
    prior = next(prior for prior in ("HierarchicalNormal", "Subspace") if (prior, guide) not in REFUSED)
    made = GUIDES[guide](PRIORS[prior](lm))
    assert isinstance(made, Guide) and isinstance(made, TaskGuide)
    assert not isinstance(PRIORS["HierarchicalNormal"](lm), Guide)
    theta, posterior = made.amortized(episodes(lm)[0].support)
    assert set(posterior) == set(made.model.random_sites)
    assert set(theta) == set(made.model.initial_theta())
    assert all(fn.event_shape == made.model.initial[site].shape for site, fn in posterior.items())
