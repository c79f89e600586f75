"""Derivatives of option scores per example and option, their kernels, and the closed-form posterior made of them."""

import pytest
import torch
from conftest import make_tasks

from bayes_lora.distributions.joint_normal import JointNormal, SiteNormal
from bayes_lora.episodes import collate
from bayes_lora.infer.score_posterior import CategoricalAnswers, score_posterior
from bayes_lora.infer.tangent import tangent
from bayes_lora.models import LayerwiseScale


def setup(lm, counts=(3, 2, 4)):
    """A model with random B, an episode of tasks with unequal numbers of examples and options, theta and phi."""
    generator = torch.Generator().manual_seed(7)
    model = LayerwiseScale(lm, lm.sites.initial(), random="B", initial_scale=(0.1, 0.3))
    tasks = list(make_tasks(len(counts)).values())
    episode = collate([lm.encoder(task.examples[:n]) for task, n in zip(tasks, counts, strict=True)])
    theta = model.initial_theta()
    prior = model.phi_prior(theta)
    phi = {
        site: fn.mean + 0.2 * torch.randn(len(counts), 1, *fn.event_shape, generator=generator, dtype=fn.mean.dtype)
        for site, fn in prior.items()
    }
    return model, episode, theta, phi, {site: fn.stddev for site, fn in prior.items()}


@pytest.mark.parametrize("batch_size", [2, 100])
def test_derivatives_are_those_of_each_score_of_the_whole_batch(any_lm, batch_size):
    model, episode, theta, phi, unit = setup(any_lm)
    found = tangent(model.likelihood, episode, model.shared(theta), phi, unit, batch_size)
    own = {site: value.clone().requires_grad_() for site, value in phi.items()}
    scores = model.likelihood(model.shared(theta) | own, episode)
    torch.testing.assert_close(found.scores, scores.masked_fill(~episode.option_mask, 0.0))
    for t, n, k in episode.option_mask.nonzero():
        gradients = torch.autograd.grad(scores[t, n, k], list(own.values()), retain_graph=True)
        for site, gradient in zip(own, gradients, strict=True):
            torch.testing.assert_close(found.gradients[site][t, n, k], (unit[site] * gradient)[t, 0])
    assert not any(value[~episode.option_mask].any() for value in found.gradients.values())


def test_kernels_and_changes_are_products_with_the_gradients(lm):
    model, episode, theta, phi, unit = setup(lm)
    found = tangent(model.likelihood, episode, model.shared(theta), phi, unit)
    tasks, rows, options = episode.shape
    weights = torch.randn(tasks, rows * options, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    change = {site: value[..., 0] for site, value in found.combined(weights[..., None]).items()}
    for site, kernel in found.kernels().items():
        assert kernel.shape == (tasks, model.initial[site].shape[0], rows * options, rows * options)
        for t in range(tasks):
            for layer in range(kernel.shape[1]):
                own = found.gradients[site][t, :, :, layer].reshape(rows * options, -1)
                torch.testing.assert_close(kernel[t, layer], own @ own.T)
                expected = (weights[t] @ own).view(model.initial[site].shape[1:])
                torch.testing.assert_close(change[site][t, 0, layer], expected)


def test_where_weights_move_little_the_mode_is_that_of_the_network(lm):
    """At the closed form's mode, the gradient of the network's log joint density is a thousandth of that before."""
    model, episode, theta, _, _ = setup(lm)
    theta = {name: value * 1e4 if "precision" in name else value for name, value in theta.items()}
    prior = model.phi_prior(theta)
    loc, unit = ({s: getattr(fn, name).expand(3, 1, *fn.event_shape) for s, fn in prior.items()} for name in
                 ("mean", "stddev"))  # fmt: skip
    found = tangent(model.likelihood, episode, model.shared(theta), loc, unit)
    kernel = sum(value.sum(1) for value in found.kernels().values())
    posterior = score_posterior(found.scores, kernel, CategoricalAnswers(episode.answer, episode.option_mask))
    change = {site: value[..., 0] for site, value in found.combined(posterior.weights[..., None]).items()}

    def slope(u):
        u = {site: value.clone().requires_grad_() for site, value in u.items()}
        phi = {site: loc[site] + unit[site] * value for site, value in u.items()}
        log_probs = model.likelihood(model.shared(theta) | phi, episode).log_softmax(-1)
        gold = log_probs.gather(-1, episode.answer[..., None])[..., 0] * episode.mask
        joint = gold.sum() - 0.5 * sum(value.square().sum() for value in u.values())
        return torch.cat([g.flatten() for g in torch.autograd.grad(joint, list(u.values()))]).norm()

    before = slope({site: torch.zeros_like(value) for site, value in change.items()})
    assert slope(change) < 1e-3 * before
    moved = sum(value.square().sum() for value in change.values()).sqrt()
    assert before > 0.3 * moved > 0


def test_the_posterior_of_the_weights_is_a_joint_normal(lm):
    """Its divergence from the prior is that of the scores, and so is the covariance of its linear scores."""
    model, episode, theta, _, _ = setup(lm)
    theta = {name: value / 100 if "precision" in name else value for name, value in theta.items()}
    prior = model.phi_prior(theta)
    loc, unit = (
        {site: getattr(fn, name).expand(3, 1, *fn.event_shape) for site, fn in prior.items()}
        for name in ("mean", "stddev")
    )
    found = tangent(model.likelihood, episode, model.shared(theta), loc, unit)
    kernel = sum(value.sum(1) for value in found.kernels().values())
    posterior = score_posterior(found.scores, kernel, CategoricalAnswers(episode.answer, episode.option_mask))
    mean, factor = (found.combined(value) for value in (posterior.weights[..., None], posterior.factor))
    inner = posterior.inner[:, None]
    joint = JointNormal({s: SiteNormal(loc[s] + unit[s] * mean[s][..., 0], unit[s], factor[s], inner) for s in loc})
    torch.testing.assert_close(joint.divergence(prior)[:, 0], posterior.divergence)
    # What a draw makes of each unit of noise.
    sizes = [*(fn.loc[0].numel() for fn in joint.values()), inner.shape[-1]]
    units = iter(torch.eye(sum(sizes), dtype=torch.float64).split(sizes, -1))
    draws = joint.drawn(sum(sizes), lambda shape: next(units).view(-1, 1, 1, *shape[3:]).expand(shape))
    moved = sum(
        torch.einsum("stloi,tjloi->tjs", ((draws[s] - joint[s].loc) / unit[s])[:, :, 0], g.flatten(1, 2))
        for s, g in found.gradients.items()
    )
    covariance = kernel - kernel @ posterior.removed @ kernel
    torch.testing.assert_close(moved @ moved.mT, covariance)
    assert (covariance.diagonal(dim1=-2, dim2=-1) < 0.7 * kernel.diagonal(dim1=-2, dim2=-1)).any()
