"""What a diagnosis says of posteriors that are right, too narrow, too wide, or points."""

from dataclasses import replace

import pytest
import torch
from conftest import make_tasks
from rich.console import Console
from torch.distributions import kl_divergence
from zoo import GUIDES, PRIORS

from bayes_lora.episodes import collate
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.posterior.adapt import adapt, amortized_posterior
from bayes_lora.posterior.diagnose import diagnose
from bayes_lora.posterior.posterior import Posterior


@pytest.fixture
def tasks():
    return [task.split(4, seed=1) for task in make_tasks(2).values()]


def objective(lm, prior="HierarchicalNormal", guide="GradientGuide"):
    torch.manual_seed(3)
    model = PRIORS[prior](lm)
    handler = {"context": LocalReparameterization} if prior == "WeightSpace" else {}
    return BetaELBO(model, GUIDES[guide](model), beta=1e-2, **handler)


def test_the_numbers_are_those_of_the_predictions(lm, tasks):
    one = objective(lm)
    found = diagnose(one, lm, tasks, steps=2, width=1.5, num_draws=6, seed=3)
    adapted = adapt(one, lm, tasks, steps=2, width=1.5, seed=3)
    mean, drawn = (adapted.evaluate(tasks, num_draws=draws, seed=3) for draws in (0, 6))
    for i, side in enumerate((mean, drawn)):
        assert found.nll[i] == pytest.approx(sum(m.nll for m in side.values()) / 2)
        assert found.ece[i] == pytest.approx(sum(m.ece for m in side.values()) / 2)
    predictions = [adapted.predict([task.query for task in tasks], num_draws=draws, seed=3) for draws in (0, 6)]
    distances = [(a.exp() - b.exp()).clamp_min(0).sum(-1).mean() for a, b in zip(*predictions, strict=True)]
    assert found.moved == pytest.approx(float(sum(distances) / 2))
    episode = collate([lm.encoder(task.support) for task in tasks])
    prior = one.model.phi_prior(amortized_posterior(one, episode)[0])
    assert found.sites.keys() == adapted.distributions().keys()
    for site, width in found.sites.items():
        q = adapted.phi[site].base_dist
        assert width.divergence == pytest.approx(float(kl_divergence(q, prior[site].base_dist).sum().detach()) / 2)
        assert width.scale == pytest.approx(float(q.scale.mean()))
        assert width.prior_scale == pytest.approx(float(prior[site].stddev.mean().detach()))


@pytest.mark.parametrize(
    ("width", "word"), [(1e-4, "Collapsed: draws move probabilities by 0.00"), (60.0, "Wider than")]
)
def test_a_wrong_width_is_named(lm, tasks, width, word):
    found = diagnose(objective(lm), lm, tasks, width=width)
    assert any(warning.startswith(word) for warning in found.warnings)
    console = Console(record=True, width=160)
    console.print(found.table())
    text = console.export_text()
    for words in ("mean / draws: NLL", "q_proj.lora_B", "prior sd", word[:9]):
        assert words in text


@pytest.mark.parametrize("width", [1.0, 60.0])
def test_draws_that_ruin_predictions_are_named(lm, tasks, width):
    """Of a mean that has learnt the answers, draws cost nothing near it, and more than 0.2 nats far from it."""
    seen = [replace(task, query=task.support) for task in tasks]
    one, settings = objective(lm), dict(steps=60, learning_rate=0.05, width=width, seed=3)
    adapted = adapt(one, lm, seen, **settings)
    mean, drawn = (adapted.evaluate(seen, num_draws=draws, seed=3) for draws in (0, 10))
    cost = sum(drawn[name].nll - mean[name].nll for name in mean) / len(mean)
    named = [w for w in diagnose(one, lm, seen, num_draws=10, **settings).warnings if w.startswith("Run-away")]
    if width == 1.0:
        assert cost < 0.1 and not named
    else:
        assert cost > 0.3 and f"draws cost {cost:.2f} nats" in named[0]


def test_a_point_is_named(lm, tasks):
    found = diagnose(objective(lm, guide="SharedPoint"), lm, tasks)
    assert "The posterior is a point" in found.warnings[0]
    assert found.moved == pytest.approx(0.0, abs=1e-9)  # a batch of equal draws and one draw differ by rounding


def test_whole_updates_and_a_good_width(lm, tasks):
    found = Posterior.from_objective(lm, objective(lm, "WeightSpace")).diagnose(tasks)
    assert found.sites.keys() == lm.sites.delta_shapes.keys()
    assert found.moved > 0.01 and not found.warnings
