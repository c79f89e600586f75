"""Every guide on a problem whose posterior is known (see conjugate.py), in float64."""

from contextlib import nullcontext

import pyro
import pytest
import torch
from conjugate import (
    MU,
    NOISE,
    RANK,
    SITE,
    TAU,
    A,
    LinearModel,
    LinearWeightSpace,
    elbo,
    exact_posterior,
    exact_theta,
    linear_episode,
    log_evidence,
    make_data,
)
from laws import chi_squared_p, descent
from pyro.infer import TraceMeanField_ELBO

from bayes_lora.guides import (
    GradientGuide,
    GuideNetwork,
    Laplace,
    MeanField,
    NormalTheta,
    PointTheta,
    SharedMeanField,
    SharedPoint,
)
from bayes_lora.infer.handlers import LocalReparameterization, Widened
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi


def network(model):
    torch.manual_seed(1)
    pyro.poutine.block(model.theta)()  # the initial values; from others the ranks of new tasks show a small bias
    return GuideNetwork(model, directions=4, hidden=32, bilinear=2, dropout=0.0).double()


def laplace(model):
    """The mode, and as many answers as its curvature needs here."""
    return Laplace(model, steps=150, learning_rate=0.03, optimizer="sgd", num_fisher_samples=2000, batch_size=36)


def of_updates(model):
    """The same steps on the factors of a whole update's mean and scale."""
    return descent(model, optimizer="adam", learning_rate=0.01, steps=600)


# Name to guide and steps of training; a guide that is exact without training has none. Some have a model of their own.
GUIDES = {
    "gradient, sgd": (descent, 0),
    "gradient, adam": (lambda model: descent(model, optimizer="adam", learning_rate=0.02, steps=400), 0),
    "gradient, learnt rates": (lambda model: descent(model, learn_rates=True), 0),
    "network": (network, 400),
    "network, then gradient": (lambda model: descent(model, start=network(model), steps=100), 0),
    "Laplace": (laplace, 0),
    "mean field": (lambda model: MeanField(model, num_tasks=6), 400),
    "weight space, drawn": (of_updates, 0),
    "weight space, deferred": (of_updates, 0),
}
MODELS = {"weight space, drawn": LinearWeightSpace, "weight space, deferred": LinearWeightSpace}
HANDLERS = {"weight space, deferred": LocalReparameterization}


def fitted(name, episode, steps=None, rate=0.03, draws=1536):
    """The model, and the guide after training with theta held at MU.

    The rate falls to zero, and the tasks have 1,536 draws a step, unless others are asked for: noise is a third of the
    bounds or less.
    """
    model = MODELS.get(name, LinearModel)()
    make, own_steps = GUIDES[name]
    steps = own_steps if steps is None else steps
    guide = make(model)
    parameters = [p for key, p in guide.named_parameters() if "theta" not in key]
    objective = BetaELBO(model, guide, num_particles=max(1, draws // len(episode.y)))
    optimizer = torch.optim.Adam(parameters, lr=rate) if steps else None
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
    return model, guide.eval()


def normals(model, guide, support):
    [fn] = guide.posterior(support, model.initial_theta()).values()
    return fn.mean.detach()[:, 0, 0, 0], fn.stddev.detach()[:, 0, 0, 0]


def contained():
    """Inputs and answers of three tasks whose posteriors are independent normals, of one precision."""
    x, _, y = make_data(orthogonal=True)
    return x[:1].expand_as(x), y + 0.1  # of other inputs now, and none the less an answer to condition on


def check_exact(x, y, loc, scale):
    """Mean, standard deviation, and the ELBO, which reaches the log evidence."""
    mean, precision = exact_posterior(x, y)
    sd = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    assert (precision - torch.diag_embed(sd**-2)).abs().max() < 1e-9
    assert ((loc - mean).abs() / sd).max() < 0.06
    assert (scale / sd).log().abs().max() < 0.05
    gap = log_evidence(x, y) - elbo(x, y, loc, scale)
    assert (gap > -1e-9).all() and gap.max() < 0.01
    assert (log_evidence(x, y) - elbo(x, y, MU.expand(3, RANK), torch.full((3, RANK), TAU))).min() > 0.3


def check_best_independent(x, y, loc, scale):
    """The exact mean, standard deviations 1 / sqrt(P_kk), and an ELBO short of the evidence by their divergence."""
    mean, precision = exact_posterior(x, y)
    sd = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    marginal = torch.linalg.inv(precision).diagonal(dim1=-2, dim2=-1).sqrt()
    assert (marginal / sd).max() > 1.1  # or there would be nothing to tell apart
    assert ((loc - mean).abs() / sd).max() < 0.1
    assert (scale / sd).log().abs().max() < 0.05
    q = torch.distributions.MultivariateNormal(mean, torch.diag_embed(sd**2))
    posterior = torch.distributions.MultivariateNormal(mean, precision_matrix=precision)
    expected = torch.distributions.kl_divergence(q, posterior)
    torch.testing.assert_close(log_evidence(x, y) - elbo(x, y, loc, scale), expected, rtol=0.02, atol=0.01)


@pytest.mark.parametrize("name", [name for name in GUIDES if name != "network"])
def test_the_posterior_is_exact_or_the_best_independent_normal(name):
    """Three tasks whose posteriors the family contains, and three that it does not, in one fit."""
    inside, outside = contained(), make_data()[::2]
    episode = linear_episode(*map(torch.cat, zip(inside, outside, strict=True)))
    model, guide = fitted(name, episode)
    with HANDLERS.get(name, nullcontext)():
        loc, scale = normals(model, guide, episode)
    check_exact(*inside, loc[:3], scale[:3])
    check_best_independent(*outside, loc[3:], scale[3:])


@pytest.mark.slow
def test_the_network_is_exact_where_tasks_share_a_precision():
    x, y = contained()
    episode = linear_episode(x, y)
    check_exact(x, y, *normals(*fitted("network", episode), episode))


@pytest.mark.parametrize("make", [SharedMeanField, SharedPoint])
def test_one_posterior_for_all_tasks(make):
    """Its ELBO summed over tasks is greatest at sum_i P_i (m - m_i) = 0, and at the mean of their precisions."""
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    guide = make(model)
    objective = BetaELBO(model, guide, num_particles=64)
    optimizer = torch.optim.Adam([p for name, p in guide.named_parameters() if "theta" not in name], lr=0.01)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.01 * (1 - step / 800)
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
    mean, precision = exact_posterior(x, y)
    expected = torch.linalg.solve(precision.sum(0), (precision @ mean[..., None]).sum(0))[:, 0]
    sd = precision.diagonal(dim1=-2, dim2=-1).mean(0).rsqrt()
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    assert ((fn.mean.detach()[:, 0, 0, 0] - expected).abs() / sd).max() < 0.1
    assert ((MU - expected).abs() / sd).max() > 0.3
    if make is SharedMeanField:
        assert (fn.stddev.detach()[:, 0, 0, 0] / sd).log().abs().max() < 0.05


def test_the_objective_is_the_elbo():
    """Against its closed form within 5 standard errors; log p(theta) beside it."""
    x, _, y = make_data(tasks=2)
    episode = linear_episode(x, y)
    model = LinearModel()
    guide = GradientGuide(model, steps=2, learning_rate=0.01, optimizer="sgd", num_particles=64)
    objective = BetaELBO(model, guide)
    losses = []
    for seed in range(400):
        torch.manual_seed(3)
        loc, scale = normals(model, guide, episode)
        torch.manual_seed(3)
        moved = guide.displacement
        guide.displacement = lambda *args: (moved(*args), torch.manual_seed(1000 + seed))[0]  # noqa: B023
        losses.append(objective(episode).detach())
        guide.displacement = moved
    losses = torch.stack(losses)
    prior = torch.distributions.Normal(0.0, 1.5).log_prob(MU).sum()
    expected = -elbo(x, y, loc, scale).sum() - prior
    assert abs(losses.mean() - expected) < 5 * losses.std() / 400**0.5


def test_theta_is_its_most_probable_value():
    """Gradient steps inside, theta's own steps outside: the maximum of p(theta) p(data | theta) by first-order steps.

    At an optimum of the inner ELBO its derivative in lambda is zero, so the constant displacement loses nothing.
    """
    x, _, y = make_data(tasks=8, orthogonal=True)
    episode = linear_episode(x, y)
    model = LinearModel()
    guide = descent(model, steps=40, num_particles=64, learning_rate=0.05)
    objective = BetaELBO(model, guide, num_particles=64)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.05)
    for step in range(100):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 100)
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
    mean, precision = exact_theta(x, y)
    [found] = [p.detach().flatten() for p in objective.parameters()]
    assert ((found - mean) * precision.diagonal().sqrt()).abs().max() < 0.1
    assert ((MU - mean) * precision.diagonal().sqrt()).abs().max() > 0.3


def test_no_steps_is_the_prior():
    x, _, y = make_data()
    for theta in (PointTheta, NormalTheta):
        model = LinearModel()
        loc, scale = normals(model, GradientGuide(model, steps=0, theta_guide=theta), linear_episode(x, y))
        # The exponential of a logarithm is the number up to rounding.
        torch.testing.assert_close(loc, MU.expand(3, RANK), rtol=1e-14, atol=0.0)
        torch.testing.assert_close(scale, torch.full((3, RANK), TAU, dtype=torch.float64), rtol=1e-14, atol=0.0)
    network_guide = network(model)
    composed = GradientGuide(model, start=network_guide, steps=0)
    for one, other in zip(*(normals(model, g, linear_episode(x, y)) for g in (network_guide, composed)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-15)


def simulated(tasks, seed):
    """Weights of tasks with the same inputs, and an episode of their answers."""
    x, b, y = make_data(tasks=tasks, orthogonal=True, seed=seed)
    x = x[:1].expand_as(x)
    generator = torch.Generator().manual_seed(seed + 1000)
    noise = NOISE * torch.randn(y.shape, generator=generator, dtype=y.dtype)
    return b, linear_episode(x, ((x @ A.T) * b[:, None]).sum(-1) + noise)


def ranks(guide_of, seed=0, tasks=600, draws=19):
    """Simulation-based calibration (Talts et al., arXiv 1804.06788): ranks of the true b among posterior draws."""
    b, episode = simulated(tasks, seed)
    model, guide = guide_of()
    with torch.no_grad():
        phi = draw_phi(model, guide, episode, draws)[SITE][:, :, 0, 0, 0]
    return (phi < b).sum(0).flatten()


def test_ranks_are_uniform_after_enough_steps():
    def guide_of():
        model = LinearModel()
        return model, descent(model, steps=150, num_particles=64)

    assert chi_squared_p(ranks(guide_of)) > 0.01


@pytest.mark.slow
def test_ranks_are_uniform_for_the_network_on_tasks_it_has_not_seen():
    """Its inputs are the same for all tasks, so one precision fits them, and the mean is linear in what it reads."""
    trained = lambda: fitted("network", simulated(600, seed=7)[1], steps=1500, rate=0.01, draws=128)  # noqa: E731
    assert chi_squared_p(ranks(trained, seed=2)) > 0.01


def test_ranks_betray_a_wrong_guide():
    def guide_of():
        model = LinearModel()
        guide = descent(model, steps=150, num_particles=64)

        def narrow(episode):
            with Widened(0.6):
                return guide(episode)

        return model, narrow

    assert chi_squared_p(ranks(guide_of)) < 1e-6


def test_pyro_s_estimator_agrees():
    x, _, y = make_data(tasks=2)
    episode = linear_episode(x, y)
    model = LinearModel()
    losses = []
    for estimator in (None, TraceMeanField_ELBO()):
        torch.manual_seed(4)
        guide = GradientGuide(model, steps=3, learning_rate=0.01)
        losses.append(BetaELBO(model, guide, elbo=estimator)(episode).detach())
    torch.testing.assert_close(*losses)
