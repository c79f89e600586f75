"""Predictions with scores that are linear in the weights, against the dense computation and against draws."""

import math

import pytest
import torch
from conftest import make_tasks
from laws import dense
from torch.distributions import MultivariateNormal

from bayes_lora import Posterior, TaskPosterior
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.guides import SGLD, GradientGuide, SharedPoint, TangentGuide
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.infer.tangent import tangent
from bayes_lora.models import HierarchicalNormal, LayerwiseScale
from bayes_lora.types import absent_score
from bayes_lora.utils.storage import read_json, write_json


def fitted(lm, scale=0.3, **kwargs):
    model = LayerwiseScale(lm, random="B", initial_scale=(0.1, scale))
    return Posterior(lm, model, TangentGuide(model, **kwargs))


def split(count=3):
    return [task.split(4, seed=1, num_query=5) for task in make_tasks(count).values()]


def test_moments_are_those_of_the_dense_posterior(lm):
    tasks = split()
    adapted = fitted(lm).adapt(tasks)
    assert adapted.predictive == "linear"
    loc, covariance = dense(adapted.phi)
    found = adapted.linear_scores([task.query for task in tasks])
    for t, task in enumerate(tasks):
        origin = {site: fn.origin[t : t + 1] for site, fn in adapted.phi.items()}
        one = {site: torch.ones((), dtype=torch.float64) for site in origin}
        shared = {site: value[0, 0, 0] for site, value in adapted.shared.items()}
        here = tangent(lm, collate([lm.encoder(task.query)]), shared, origin, one)
        rows = torch.cat([here.gradients[site][0].flatten(2) for site in origin], -1)  # (n, K, weights)
        start = torch.cat([value.flatten() for value in origin.values()])
        torch.testing.assert_close(found[t].mean, here.scores[0] + rows @ (loc[t] - start))
        torch.testing.assert_close(found[t].covariance, rows @ covariance[t] @ rows.mT)


def test_entropies_are_those_of_monte_carlo():
    """Entropy and mutual information of 200,000 draws, whose standard error is below 0.002 nats; and two limits."""
    generator = torch.Generator().manual_seed(1)
    root = torch.randn(3, 3, 3, generator=generator, dtype=torch.float64)
    mean = torch.randn(3, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True]])
    covariance = (root @ root.mT) * (mask[:, :, None] & mask[:, None, :])
    none = torch.zeros(3, dtype=torch.bool)
    total, epistemic = LinearScores(mean * mask, covariance, mask, none).entropies()
    torch.manual_seed(0)
    for i, count in enumerate(mask.sum(-1).tolist()):
        probs = MultivariateNormal(mean[i, :count], covariance[i, :count, :count]).sample((200_000,)).softmax(-1)
        average = probs.mean(0)
        whole = -(average * average.log()).sum()
        inner = -(probs * probs.clamp_min(1e-300).log()).sum(-1).mean()
        assert float(total[i]) == pytest.approx(float(whole), abs=0.02)
        assert float(epistemic[i]) == pytest.approx(float(whole - inner), abs=0.02)
        assert float(whole - inner) > 0.08
    two = torch.ones(1, 2, dtype=torch.bool)
    for variance, expected in ((0.0, 0.0), (1e8, math.log(2.0))):
        spread = variance * torch.eye(2, dtype=torch.float64)[None]
        found = LinearScores(torch.zeros(1, 2, dtype=torch.float64), spread, two, none[:1]).entropies()
        assert float(found[0]) == pytest.approx(math.log(2.0), abs=1e-3)
        assert float(found[1]) == pytest.approx(expected, abs=1e-3)


def test_probabilities_are_averaged_over_the_scores():
    """Against Monte Carlo; tasks have unequal numbers of options, and the temperature spares free text."""
    generator = torch.Generator().manual_seed(0)
    root = torch.randn(4, 3, 3, generator=generator, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, True, False], [True, True, True], [True, True, False]])
    both = mask[:, :, None] & mask[:, None, :]
    scores = LinearScores(
        torch.randn(4, 3, generator=generator, dtype=torch.float64) * mask,
        (root @ root.mT) * both,
        mask,
        torch.tensor([False, False, False, True]),
    )
    found = scores.log_probs(2.0)
    assert torch.equal(found[~mask], torch.full((2,), absent_score(found.dtype), dtype=found.dtype))
    torch.testing.assert_close(found.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    for i in range(4):
        k = int(mask[i].sum())
        normal = MultivariateNormal(scores.mean[i, :k], scores.covariance[i, :k, :k])
        torch.manual_seed(1)
        drawn = normal.sample((200_000,)) / (1.0 if scores.free_form[i] else 2.0)
        torch.testing.assert_close(found[i, :k].exp(), drawn.softmax(-1).mean(0), atol=6e-3, rtol=0)
    at_mean = scores.log_probs(averaged=False)
    torch.testing.assert_close(at_mean[0], scores.mean[0].log_softmax(-1))
    assert (at_mean.exp().amax(-1) > scores.log_probs().exp().amax(-1)).all()


def test_draws_do_not_depend_on_the_choice_of_eigenvectors():
    """Those of nearly equal eigenvalues are anything; two covariances that differ by 1e-9 have the same draws."""
    noise = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, mask, free = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    one = torch.eye(3, dtype=torch.float64)
    rank_one = torch.ones(3, 3, dtype=torch.float64)
    exact = torch.stack([one, rank_one])
    first, second = (
        LinearScores(mean.double(), exact + size * (noise + noise.mT), mask, free).draws() for size in (1e-9, -1e-9)
    )
    torch.testing.assert_close(first, second, atol=1e-3, rtol=0)  # the root of 1e-9 is 3e-5
    spread = first.transpose(0, 1).transpose(1, 2) @ first.transpose(0, 1) / len(first)
    torch.testing.assert_close(spread, exact, atol=0.05, rtol=0)


def test_a_covariance_with_rounding_errors_has_a_loss_and_a_gradient():
    """Its smallest eigenvalue is below zero by more than the jitter of other covariances, which stay as they are."""
    basis = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64))[0]
    good, bad = (
        basis @ torch.diag(torch.tensor(e).double()) @ basis.mT for e in ((4.0, 1.0, 0.5), (900.0, 2.0, -0.05))
    )
    mean = torch.tensor([[1.0, 0.0, -1.0], [20.0, 10.0, -5.0]], dtype=torch.float64)
    mask, free = torch.ones(2, 3, dtype=torch.bool), torch.zeros(2, dtype=torch.bool)
    covariance = torch.stack([good, bad]).requires_grad_()
    found = LinearScores(mean, covariance, mask, free).log_probs()
    [gradient] = torch.autograd.grad(found[:, 1].sum(), covariance)
    assert gradient.isfinite().all() and gradient[1].any()
    alone = LinearScores(mean[:1], good[None].requires_grad_(), mask[:1], free[:1]).log_probs()
    assert torch.equal(found[:1], alone)
    without = LinearScores(mean, torch.stack([good, bad]), mask, free).log_probs()  # negative eigenvalues are zero
    torch.testing.assert_close(found.exp(), without.exp(), atol=0.03, rtol=0)


def test_where_weights_vary_little_they_are_the_network_s(lm):
    tasks = split()
    adapted = fitted(lm, scale=0.01).adapt(tasks)
    queries = [task.query for task in tasks]
    linear = adapted.predict(queries)
    for draws in (0, 200):
        for one, other in zip(linear, adapted.predict(queries, num_draws=draws, predictive="draws"), strict=True):
            torch.testing.assert_close(one.exp(), other.exp(), atol=2e-3, rtol=0)
    plugged = adapted.predict(queries, num_draws=0)
    assert not torch.equal(plugged[0], linear[0])


def test_tasks_and_queries_do_not_affect_one_another(lm):
    tasks = split()
    posterior = fitted(lm)
    together = posterior.adapt(tasks).predict([task.query for task in tasks])
    for task, found in zip(tasks, together, strict=True):
        alone = posterior.adapt(task)
        torch.testing.assert_close(alone.predict(task.query), found)
        torch.testing.assert_close(alone.predict(task.query[2:3])[0], found[2])
        torch.testing.assert_close(posterior.adapt(tasks).select(task.name).predict(task.query), found)


@pytest.mark.parametrize("guide", [GradientGuide, SharedPoint])
def test_any_normal_or_point_can_predict_with_linear_scores(lm, guide):
    """Around its own mean: the scores' mean is the network's there, and a point has no covariance."""
    model = HierarchicalNormal(lm)
    tasks = split()
    adapted = Posterior(lm, model, guide(model)).adapt(tasks)
    assert adapted.predictive == "draws"
    queries = [task.query for task in tasks]
    for linear, at_mean in zip(
        adapted.predict(queries, num_draws=0, predictive="linear"), adapted.predict(queries, num_draws=0), strict=True
    ):
        torch.testing.assert_close(linear, at_mean)
    spread = adapted.linear_scores(queries)[0].covariance
    assert bool(spread.any()) == (guide is GradientGuide)


def test_components_have_no_linear_scores(lm):
    model = HierarchicalNormal(lm, random="B")
    adapted = Posterior(lm, model, SGLD(model, num_samples=2, burn_in=1, thinning=1)).adapt(split(1))
    with pytest.raises(ConfigError, match='expected "draws" for a posterior with components'):
        adapted.predict(split(1)[0].query, predictive="linear")


def test_saved_posteriors_predict_the_same(lm, tmp_path):
    tasks = split()
    adapted = fitted(lm).adapt(tasks)
    adapted.save(tmp_path / "one")
    loaded = TaskPosterior.load(tmp_path / "one", lm)
    assert type(loaded.phi) is type(adapted.phi) and loaded.predictive == "linear"
    queries = [task.query for task in tasks]
    for kwargs in ({}, {"predictive": "draws", "num_draws": 3, "seed": 4}):
        for one, other in zip(adapted.predict(queries, **kwargs), loaded.predict(queries, **kwargs), strict=True):
            assert torch.equal(one, other)
    facts = read_json(tmp_path / "one" / "task_posterior.json")
    write_json(tmp_path / "one" / "task_posterior.json", facts | {"predictive": "guess"})
    with pytest.raises(PosteriorError, match="expected 'predictive' to be one of"):
        TaskPosterior.load(tmp_path / "one", lm)


def test_draws_with_common_noise_do_not_depend_on_other_tasks(lm):
    tasks = split()
    posterior = fitted(lm)
    together = posterior.adapt(tasks).draw(3, seed=2, common_noise=True)
    alone = posterior.adapt(tasks[1]).draw(3, seed=2, common_noise=True)
    for site, value in alone.items():
        if site.endswith("lora_B"):
            torch.testing.assert_close(value[:, 0], together[site][:, 1])


def test_gradient_steps_after_the_closed_form_keep_its_correlations(lm):
    tasks = split()
    adapted = fitted(lm).adapt(tasks, steps=2)
    assert type(adapted.phi).__name__ == "JointNormal"
    assert all(fn.origin is None for fn in adapted.phi.values())
    assert all(value.isfinite().all() for value in adapted.predict([task.query for task in tasks]))


def test_diagnosis_says_when_draws_have_left_the_linear_range(lm):
    tasks = split()
    calm, wild = fitted(lm, scale=0.05).diagnose(tasks), fitted(lm, scale=30.0).diagnose(tasks)
    assert calm.linear is not None and abs(calm.linear[0] - calm.nll[1]) < 0.05
    assert not any("linear" in warning for warning in calm.warnings)
    assert any("has left the range in which scores are linear" in warning for warning in wild.warnings)
    assert "linear scores: NLL" in str(wild.table().title)
