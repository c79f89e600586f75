"""A real language model: a posterior that a few steps find predicts better, and knows how little two examples say."""

import pytest
import torch
from objectives import mean_theta
from torch.distributions import kl_divergence

import bayes_lora
from bayes_lora.episodes import collate
from bayes_lora.guides import GradientGuide
from bayes_lora.lm.model_files import default_model_here
from bayes_lora.models import HierarchicalNormal

TASKS, SEEDS, DRAWS = ("message-politeness", "question-type"), 3, 12


@pytest.mark.slow
@pytest.mark.skipif(default_model_here() is None, reason="the default model is not here: run bayes-lora fetch")
def test_the_posterior_learns_and_widens_where_it_has_seen_less():
    """Two tasks and three support sets each, all in one batch: 16 examples, and the first two of these.

    B alone is random, of rank 1 on one layer, and its prior is wide: so that draws from the prior disagree, and
    independent normals can tell 16 examples from two.
    """
    torch.manual_seed(0)
    lm = bayes_lora.load_language_model(r=1, top_layers=1)
    training, unseen = bayes_lora.demo_tasks()
    tasks = [{**training, **unseen}[name].split(16, seed=seed) for seed in range(SEEDS) for name in TASKS]
    query = collate([lm.encoder(task.query[:12]) for task in tasks])
    model = HierarchicalNormal(lm, lm.sites.initial(), random="B", initial_scale=(1.0, 4.0))
    rates = {"loc": 0.1, "log_scale": 0.5}
    guide = GradientGuide(model, steps=12, learning_rate=rates, beta=0.1, num_particles=4)
    theta = mean_theta(guide)
    prior, spread = model.phi_prior(theta), {}

    def nll(posterior, episode):
        """Of the mean; per task, nats."""
        log_probs = lm(model.shared(theta) | {site: fn.mean for site, fn in posterior.items()}, episode).log_softmax(-1)
        return -log_probs.gather(-1, episode.answer[..., None])[..., 0].mean(-1)

    for shots in (16, 2):
        support = collate([lm.encoder(task.support[:shots]) for task in tasks])
        with torch.no_grad():
            posterior = guide.posterior(support, theta)
            divergence = sum(kl_divergence(fn, prior[site]) for site, fn in posterior.items())
            assert divergence.shape == (len(tasks), 1) and divergence.isfinite().all() and (divergence > 1.0).all()
            assert (nll(posterior, support) < nll(prior, support)).all()
            if shots == 16:
                assert nll(posterior, query).mean() < nll(prior, query).mean() - 0.1
            phi = {site: fn.expand((DRAWS, len(tasks), 1)).sample() for site, fn in posterior.items()}
            probs = lm(model.shared(theta) | phi, query).softmax(-1)
        variance = (probs.var(0) * query.option_mask).sum(-1).mean(-1)
        spread[shots] = variance.view(SEEDS, len(TASKS)).mean(-1)
    assert spread[2].mean() > 1.2 * spread[16].mean()
