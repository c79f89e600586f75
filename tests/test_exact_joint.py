"""Guides whose weights are correlated, or samples, where the posterior is known (see conjugate.py), in float64.

Its features are not orthogonal, so that independent normals cannot be right.
"""

import math

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
    exact_posterior,
    linear_episode,
    log_evidence,
    make_data,
)
from laws import chi_squared_p, descent
from torch.distributions import MultivariateNormal, kl_divergence

from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.guides import (
    NUTS,
    SGLD,
    SWAG,
    Ensemble,
    FlowNetwork,
    Laplace,
    LowRank,
    MatrixNormal,
    MCDropout,
    MeanField,
    Point,
    SharedPoint,
)
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi

FLAT = slice(None), 0, 0, 0  # of (T, 1, 1, 1, r)


def train(objective, episode, steps=400, rate=0.03):
    parameters = [p for name, p in objective.named_parameters() if "theta" not in name]
    optimizer = torch.optim.Adam(parameters, lr=rate)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
    return objective.eval()


def moments(fn):
    """Mean ``(T, r)`` and covariance ``(T, r, r)`` of a site with one row."""
    if isinstance(fn, KroneckerNormal):
        root = torch.diag_embed(fn.scale[FLAT]) * (1.0 if fn.left is None else fn.left[:, 0, 0])
        root = root if fn.right is None else root @ fn.right[:, 0, 0]
        root = root if fn.spectrum is None else root * fn.spectrum[FLAT][:, None, :]
        return fn.loc[FLAT], root @ root.mT
    factor = fn.factor[:, 0, 0, 0]
    return fn.loc[FLAT], torch.diag_embed(fn.scale[FLAT] ** 2) + factor @ factor.mT


def kronecker_laplace(model, **kwargs):
    return Laplace(
        model,
        steps=400,
        learning_rate=0.02,
        optimizer="sgd",
        num_fisher_samples=2000,
        batch_size=18,
        curvature="kronecker",
        **kwargs,
    )


# Name to guide, steps of training, and the bound on its divergence from the posterior in nats.
GUIDES = {
    "gradient, low rank": (lambda model: descent(model, steps=400, family=LowRank(1, start=0.5)), 0, 0.005),
    "gradient, matrix normal": (lambda model: descent(model, steps=400, family=MatrixNormal()), 0, 0.005),
    "mean field, low rank": (lambda model: MeanField(model, 3, family=LowRank(1, start=0.5)), 400, 0.01),
    "mean field, matrix normal": (lambda model: MeanField(model, 3, family=MatrixNormal()), 400, 0.01),
    "Laplace, Kronecker": (kronecker_laplace, 0, 0.002),
}


@pytest.mark.parametrize("name", GUIDES)
def test_the_posterior_is_exact_with_its_correlations(name):
    make, steps, bound = GUIDES[name]
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    torch.manual_seed(1)
    guide = make(model)
    if steps:
        train(BetaELBO(model, guide, num_particles=512), episode, steps)
    with torch.no_grad():
        [fn] = guide.posterior(episode, model.initial_theta()).values()
        found = MultivariateNormal(*moments(fn))
    mean, precision = exact_posterior(x, y)
    exact = MultivariateNormal(mean, precision_matrix=precision)
    correlation = exact.covariance_matrix[:, 0, 1] / exact.variance.prod(-1).sqrt()
    assert correlation.abs().max() > 0.4
    assert kl_divergence(found, exact).max() < bound
    independent = MultivariateNormal(mean, torch.diag_embed(1.0 / precision.diagonal(dim1=-2, dim2=-1)))
    assert kl_divergence(independent, exact).max() > 10 * bound


def test_laplace_s_evidence_is_greatest_at_its_precision():
    """Against the exact marginal likelihood of one task as a function of lambda, on a grid; and the mode stays.

    The fixed point holds the mode where it is, as in the literature; it is the grid's at the mode of that lambda.
    """
    x, _, y = make_data(tasks=3, seed=5)
    episode, model = linear_episode(x, y), LinearModel()
    found, values = [], []
    guide = kronecker_laplace(model, prior_precision="marginal-likelihood")
    inner = guide._precision

    def spy(eigenvalues, mode):
        found.append((eigenvalues, mode))
        values.append(inner(eigenvalues, mode))
        return values[-1]

    guide._precision = spy
    guide.posterior(episode, model.initial_theta())
    [(eigenvalues, mode)], [precision] = found, values
    grid = torch.logspace(-2.9, 2.9, 4000, dtype=torch.float64).view(-1, 1, 1)
    f, u = eigenvalues.flatten(1)[None], mode.flatten(1)[None]
    # log p(y | lambda) = const + 1/2 sum log lambda - 1/2 lambda u^2 - 1/2 sum log(lambda + f), at the mode u.
    evidence = 0.5 * (grid.log() - grid * u.square() - (grid + f).log()).sum(-1)
    best = grid.flatten()[evidence.argmax(0)]
    torch.testing.assert_close(precision.flatten(), best, rtol=3e-3, atol=0.0)
    assert (precision.flatten() - 1.0).abs().max() > 0.2


@pytest.mark.parametrize(("f", "size"), [(0.01, 0.1), (0.1, 1.0), (1.0, 10.0), (30.0, 2000.0)])
def test_laplace_s_precision_settles_where_data_are_weak(f, size):
    """1,000 weights of one eigenvalue: lambda = n f / (f + lambda) / |u|^2, a quadratic, in closed form."""
    guide = kronecker_laplace(LinearModel(), prior_precision="marginal-likelihood")
    values = torch.full((1, 1, 1, 10, 100), f, dtype=torch.float64)
    mode = torch.full_like(values, (size / 1000) ** 0.5)
    expected = (-f + math.sqrt(f**2 + 4 * 1000 * f / size)) / 2
    assert float(guide._precision(values, mode)) == pytest.approx(expected, rel=1e-6)


def test_the_samples_of_langevin_dynamics():
    """Stationary covariance P^-1 (I - eps P / 4)^-1 in the prior's units; 3 x 400 chains, 5.5 standard errors."""
    x, _, y = make_data()
    copies, step = 400, 0.05
    episode, model = linear_episode(x.repeat(copies, 1, 1), y.repeat(copies, 1)), LinearModel()
    torch.manual_seed(0)
    guide = SGLD(model, num_samples=2, burn_in=300, thinning=100, step_size=step)
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    assert fn.batch_shape == (2, 3 * copies, 1)
    samples = fn.v[:, :, 0, 0, 0].view(2 * copies, 3, RANK)
    mean, precision = exact_posterior(x, y)
    unit = TAU**2 * precision
    covariance = TAU**2 * torch.linalg.inv(unit @ (torch.eye(RANK, dtype=unit.dtype) - step * unit / 4))
    check_samples(samples, mean, covariance)
    biased = (covariance.diagonal(dim1=-2, dim2=-1) * precision.diagonal(dim1=-2, dim2=-1)).max()
    assert biased > 1.2  # far from the independent normal


def check_samples(samples, mean, covariance, effective=None):
    """Moments ``(draws, T, r)`` within 5.5 standard errors of independent draws, or of as many as are effective."""
    count = len(samples) if effective is None else effective
    error = (covariance.diagonal(dim1=-2, dim2=-1) / count).sqrt()
    assert ((samples.mean(0) - mean) / error).abs().max() < 5.5
    centred = samples - mean
    found = torch.einsum("sti,stj->tij", centred, centred) / len(samples)
    variances = covariance.diagonal(dim1=-2, dim2=-1)
    error = ((variances[:, :, None] * variances[:, None] + covariance**2) / count).sqrt()
    assert ((found - covariance) / error).abs().max() < 5.5


def test_the_samples_of_nuts():
    """Within 5.5 standard errors of a quarter as many independent draws."""
    x, _, y = make_data(tasks=2)
    episode, model = linear_episode(x, y), LinearModel()
    torch.manual_seed(0)
    guide = NUTS(model, num_samples=400, warmup_steps=150)
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    mean, precision = exact_posterior(x, y)
    samples = fn.v[:, :, 0, 0, 0]
    assert samples.shape == (400, 2, RANK)
    check_samples(samples, mean, torch.linalg.inv(precision), effective=100)


@pytest.mark.parametrize("make", [NUTS, SGLD])
def test_samplers_temper_the_likelihood_alone(make):
    """With beta their precision is F^T F / (beta noise^2) + 1 / tau^2."""
    x, _, y = make_data(tasks=2)
    beta, copies = 0.3, 1 if make is NUTS else 300
    episode, model = linear_episode(x.repeat(copies, 1, 1), y.repeat(copies, 1)), LinearModel()
    settings = (
        dict(num_samples=400, warmup_steps=150) if make is NUTS else dict(num_samples=2, burn_in=400, step_size=0.01)
    )
    torch.manual_seed(0)
    guide = make(model, beta=beta, **settings | ({} if make is NUTS else {"thinning": 200}))
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    samples = fn.v[:, :, 0, 0, 0].reshape(-1, 2, RANK)
    f = x @ A.T
    precision = f.mT @ f / (beta * NOISE**2) + torch.eye(RANK, dtype=f.dtype) / TAU**2
    mean = torch.linalg.solve(precision, (f.mT @ y[..., None])[..., 0] / (beta * NOISE**2) + MU / TAU**2)
    check_samples(samples, mean, torch.linalg.inv(precision), effective=100)


def simulated(tasks, seed):
    """Weights of tasks with the same inputs, not orthogonal, and an episode of their answers."""
    x, b, _ = make_data(tasks=tasks, seed=seed)
    x = x[:1].expand_as(x)
    y = ((x @ A.T) * b[:, None]).sum(-1)
    return b, linear_episode(
        x, y + NOISE * torch.randn(y.shape, generator=torch.Generator().manual_seed(seed), dtype=y.dtype)
    )


@pytest.mark.parametrize("name", ["gradient, low rank", "gradient, matrix normal", "Laplace, Kronecker"])
def test_ranks_are_uniform(name):
    """Simulation-based calibration (Talts et al., arXiv 1804.06788) of both weights, their sum and their difference."""
    b, episode = simulated(600, seed=3)
    model = LinearModel()
    torch.manual_seed(2)
    guide = GUIDES[name][0](model)
    if name.startswith("gradient"):
        guide.steps, guide.num_particles = 200, 16
    else:
        guide.num_fisher_samples, guide.batch_size = 200, 3600
    with torch.no_grad():
        phi = draw_phi(model, guide, episode, 19)[SITE][:, :, 0, 0, 0]
    mix = torch.tensor([[1.0, 0.0, 1.0, 1.0], [0.0, 1.0, 1.0, -1.0]], dtype=b.dtype)
    found = ((phi @ mix) < (b @ mix)).sum(0)
    for column in found.T:
        assert chi_squared_p(column) > 0.002


def test_swag_stands_where_the_steps_end():
    x, _, y = make_data()
    model = LinearModel()
    guide = SWAG(model, steps=400, burn_in=350, learning_rate=0.02, optimizer="sgd", batch_size=None)
    [fn] = guide.posterior(linear_episode(x, y), model.initial_theta()).values()
    mean, _ = exact_posterior(x, y)
    torch.testing.assert_close(fn.mean[FLAT].detach(), mean, atol=1e-4, rtol=0.0)
    torch.testing.assert_close(fn.scale.detach(), torch.full_like(fn.scale, 1e-3 * TAU), rtol=0.05, atol=0.0)


def test_an_ensemble_of_mean_fields():
    """Every member is trained by its share of the particles, and comes near the best independent normal."""
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    torch.manual_seed(1)
    make = lambda model, theta_guide: MeanField(model, 3, theta_guide=theta_guide)  # noqa: E731
    ensemble = Ensemble(model, make=make, num_members=2)
    with torch.no_grad():
        for parameter in ensemble.members[1].tables.parameters():
            parameter += 0.5
    train(BetaELBO(model, ensemble, num_particles=256), episode, 700)
    mean, precision = exact_posterior(x, y)
    sd = precision.diagonal(dim1=-2, dim2=-1).rsqrt()
    for member in ensemble.members:
        [fn] = member.posterior(episode, model.initial_theta()).values()
        assert ((fn.mean.detach()[FLAT] - mean).abs() / sd).max() < 0.2
        assert (fn.stddev.detach()[FLAT] / sd).log().abs().max() < 0.2


def test_draws_of_an_ensemble_are_shared_out():
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    ensemble = Ensemble(
        model, num_members=3, make=lambda model, theta_guide: SharedPoint(model, theta_guide=theta_guide)
    )
    values = torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64)
    for member, value in zip(ensemble.members, values, strict=True):
        [parameter] = [p for name, p in member.named_parameters() if "value" in name]
        parameter.data.fill_(value)
    drawn = draw_phi(model, ensemble, episode, 6)[SITE]
    assert (drawn == drawn[:, :1, :, :, :, :1]).all()
    assert drawn[:, 0, 0, 0, 0, 0].sort().values.tolist() == [1.0, 1.0, 2.0, 2.0, 4.0, 4.0]


def test_dropout_regularises_by_the_features_energy():
    """Its optimum is a ridge regression with (1 - k) / k times the diagonal of F^T F added, in closed form."""
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    torch.manual_seed(1)
    guide = MCDropout(model, rate=0.3)
    train(BetaELBO(model, guide, num_particles=256), episode)
    f, extra = x @ A.T, 0.3 / 0.7
    gram = (f.mT @ f / NOISE**2).sum(0)
    eye = torch.eye(RANK, dtype=f.dtype)
    precision = gram + extra * gram.diagonal().diag() + 3 * (1 + extra) / TAU**2 * eye
    right = (f.mT @ y[..., None]).sum((0, 2)) / NOISE**2 + 3 * MU / TAU**2
    expected = torch.linalg.solve(precision, right)
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    assert ((fn.mean.detach()[0, 0, 0, 0] - expected) * precision.diagonal().sqrt()).abs().max() < 0.1
    without = torch.linalg.solve(gram + 3 / TAU**2 * eye, right)
    assert ((without - expected) * precision.diagonal().sqrt()).abs().max() > 1.0


def test_point_steps_are_the_mode():
    x, _, y = make_data()
    model = LinearModel()
    guide = descent(model, family=Point(), num_particles=1)
    [fn] = guide.posterior(linear_episode(x, y), model.initial_theta()).values()
    torch.testing.assert_close(fn.v[FLAT].detach(), exact_posterior(x, y)[0], atol=1e-4, rtol=0.0)


def test_reptile_moves_theta_to_the_mean_of_the_modes():
    """-sum_i log p(mode_i | theta) - log p(theta) has its minimum at a weighed mean; the likelihood says nothing."""
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    guide = descent(model, family=Point(), num_particles=1, steps=5, follow_theta=False)
    [theta] = [p for name, p in guide.named_parameters() if "theta" in name]
    BetaELBO(model, guide)(episode).backward()
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    modes = fn.v[FLAT].detach()
    expected = ((MU - modes) / TAU**2).sum(0) + MU / 1.5**2
    torch.testing.assert_close(theta.grad.flatten(), expected)


@pytest.mark.slow
def test_the_flow_bounds_the_evidence():
    """Closer than any independent normals can: its weights are correlated, by draws of the coefficients."""
    x, _, y = make_data()
    episode, model = linear_episode(x, y), LinearModel()
    torch.manual_seed(1)
    guide = FlowNetwork(
        model, directions=4, hidden=32, bilinear=2, dropout=0.0, start=0.5, num_components=2000
    ).double()
    objective = train(BetaELBO(model, guide, num_particles=64), episode, 900)
    with torch.no_grad():
        [fn] = guide.posterior(episode, model.initial_theta()).values()
        losses = torch.stack([objective(episode) for _ in range(50)])
    mean, precision = exact_posterior(x, y)
    exact = torch.linalg.inv(precision)
    centres = fn.mean[:, :, 0, 0, 0]
    spread = torch.einsum("kti,ktj->tij", centres - centres.mean(0), centres - centres.mean(0)) / len(centres)
    covariance = spread + torch.diag_embed(fn.variance[:, :, 0, 0, 0].mean(0))
    found = MultivariateNormal(centres.mean(0), covariance)
    assert kl_divergence(found, MultivariateNormal(mean, exact)).max() < 0.03
    prior = torch.distributions.Normal(0.0, 1.5).log_prob(MU).sum()
    gap = log_evidence(x, y).sum() + prior + losses.mean()
    error = losses.std() / math.sqrt(50)
    assert -4 * error < gap < 0.15 + 4 * error
    independent = MultivariateNormal(mean, torch.diag_embed(1.0 / precision.diagonal(dim1=-2, dim2=-1)))
    best = kl_divergence(independent, MultivariateNormal(mean, exact)).sum()  # the gap of the best independent normals
    assert gap + 4 * error < 0.7 * best
