"""Laplace's approximation on a tiny language model: its curvature, where it stands, and what it refuses."""

import pytest
import torch
from conftest import make_tasks
from lm_helpers import make_episode
from objectives import laplace, mean_theta
from zoo import PRIORS

from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import Laplace


def test_the_fisher_information_is_that_of_a_loop(lm):
    """Over tasks, examples and options, each weighed by its probability; draws within 6 standard errors.

    The errors are exact: those of a sample are too small where no draw is of an improbable option.
    """
    rows = [lm.encoder(task.examples[: 2 + t]) for t, task in enumerate(make_tasks(2).values())]
    support = collate(rows)
    model, guide = laplace(lm, num_fisher_samples=1)
    theta = mean_theta(guide)
    phi = {site: fn.expand((2, 1)).sample() for site, fn in model.phi_prior(theta).items()}
    expected, variance = ({site: torch.zeros_like(value) for site, value in phi.items()} for _ in range(2))
    for t, examples in enumerate(rows):
        for example in examples:
            own = {site: value[t : t + 1].clone().requires_grad_() for site, value in phi.items()}
            log_probs = lm(model.shared(theta) | own, collate([[example]])).log_softmax(-1).flatten()
            gradients = [torch.autograd.grad(one, list(own.values()), retain_graph=True) for one in log_probs]
            for site, each in zip(own, zip(*gradients, strict=True), strict=True):
                squares = torch.stack([gradient[0].square() for gradient in each])
                mean, second = (torch.tensordot(log_probs.exp().detach(), x, 1) for x in (squares, squares.square()))
                expected[site][t] += mean
                variance[site][t] += second - mean.square()
    torch.manual_seed(0)
    draws = [guide.fisher(support, theta, phi) for _ in range(150)]
    for site, value in expected.items():
        found = torch.stack([draw[site] for draw in draws]).mean(0)
        assert ((found - value).abs() <= 6.0 * (variance[site] / 150).sqrt() + 1e-12).all()
        assert (variance[site] / 150).sqrt().sum() < 0.3 * value.sum()  # which is tight enough to tell


def test_it_stands_at_the_mode_with_the_prior_s_and_the_data_s_precision(lm):
    """At the end of many steps the gradient of log p(S, phi | theta), tempered, is nearly zero."""
    model, guide = laplace(lm, steps=300, learning_rate=0.02, num_fisher_samples=4)
    theta, support = mean_theta(guide), make_episode(lm).support
    torch.manual_seed(0)
    found = guide.posterior(support, theta)
    prior = model.phi_prior(theta)
    gradients = []
    for values in ({site: fn.mean for site, fn in prior.items()}, {site: fn.mean for site, fn in found.items()}):
        phi = {s: v.expand(2, 1, *v.shape[-3:]).detach().clone().requires_grad_() for s, v in values.items()}
        log_probs = lm(model.shared(theta) | phi, support).log_softmax(-1)
        log_lik = log_probs.gather(-1, support.answer[..., None])[..., 0][support.mask].sum()
        joint = log_lik + 0.5 * sum(prior[site].log_prob(value).sum() for site, value in phi.items())
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(joint, list(phi.values()))]).norm())
    assert gradients[1] < 0.02 * gradients[0]
    torch.manual_seed(0)
    fisher = guide.fisher(support, theta, {site: fn.mean.detach() for site, fn in found.items()})
    for site, fn in found.items():
        expected = prior[site].variance.reciprocal() + fisher[site] / 0.5
        torch.testing.assert_close(fn.variance.reciprocal().detach(), expected.detach())


def test_more_examples_leave_less_variance(lm):
    model, guide = laplace(lm, num_fisher_samples=8)
    task = next(iter(make_tasks(1).values()))
    few, many = (guide.posterior(collate([lm.encoder(task.examples[:count])]), mean_theta(guide)) for count in (2, 10))
    for site, prior in model.phi_prior(mean_theta(guide)).items():
        assert (many[site].stddev < prior.stddev).all()
        assert many[site].stddev.mean() < few[site].stddev.mean()


def test_theta_moves_the_posterior_as_it_moves_the_prior(lm):
    _, guide = laplace(lm)
    support, theta = make_episode(lm).support, mean_theta(guide)
    moved = {name: value + 0.1 if ".loc." in name else 4.0 * value for name, value in theta.items()}
    posteriors = []
    for one in (theta, moved):
        torch.manual_seed(1)
        posteriors.append(guide.posterior(support, one))
    precision = theta["theta.precision.q_proj.lora_B"]
    one, two = (found["q_proj.lora_B"] for found in posteriors)
    torch.testing.assert_close(two.mean, one.mean + 0.1)
    torch.testing.assert_close(two.variance.reciprocal(), one.variance.reciprocal() + 3.0 * precision)


def test_what_is_refused(lm):
    for wrong in (dict(steps=-1), dict(num_fisher_samples=0), dict(learning_rate=0.0), dict(beta=0.0)):
        with pytest.raises(ConfigError, match=f"got .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
            laplace(lm, **wrong)
    with pytest.raises(ConfigError, match="Laplace: expected p.phi | theta. to be normal, got .* of WeightSpace"):
        Laplace(PRIORS["WeightSpace"](lm))
