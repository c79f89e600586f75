"""Low-rank, Kronecker and dropout distributions of a site, against dense normals and Monte Carlo, in float64."""

import math

import pytest
import torch
from torch.distributions import Independent, MultivariateNormal, Normal, kl_divergence

from bayes_lora.distributions.divergence import divergence
from bayes_lora.distributions.dropped_point import DroppedPoint
from bayes_lora.distributions.flat import Flat
from bayes_lora.distributions.joint_normal import SiteNormal
from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.distributions.low_rank_normal import LowRankNormal
from bayes_lora.distributions.unconstrained import (
    constrained,
    map_parameters,
    parameters,
    scaled,
    unconstrained,
    with_parameters,
)
from bayes_lora.distributions.weight_distribution import WeightDistribution
from bayes_lora.posterior.files import FAMILIES

SHAPE, BATCH = (2, 3, 4), (5, 1)  # two layers of 3 x 4 matrices


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def low_rank():
    return LowRankNormal(noise(*BATCH, *SHAPE), noise(*BATCH, *SHAPE, seed=1).exp(), noise(*BATCH, *SHAPE, 2, seed=2))


def sides():
    eyes = (torch.eye(n, dtype=torch.float64) for n in SHAPE[1:])
    return [eye + 0.4 * noise(*BATCH, 2, len(eye), len(eye), seed=3 + i) for i, eye in enumerate(eyes)]


def kronecker(left=True, right=True, spectrum=True):
    lefts, rights = sides()
    return KroneckerNormal(
        noise(*BATCH, *SHAPE),
        noise(*BATCH, *SHAPE, seed=1).exp(),
        lefts if left else None,
        rights if right else None,
        noise(*BATCH, *SHAPE, seed=6).exp() if spectrum else None,
    )


def dense(fn):
    """As a normal over flat vectors, its covariance made of what one unit of noise at a time does."""
    count = math.prod(SHAPE)
    loc, columns = fn.mean.flatten(-3), []
    sizes = [count] if isinstance(fn, KroneckerNormal) else [fn.factor.shape[-1], count]
    for i in range(sum(sizes)):
        unit = torch.zeros(*BATCH, sum(sizes), dtype=torch.float64)
        unit[..., i] = 1.0
        parts = iter(unit.split(sizes, -1))
        columns.append(fn.drawn(1, lambda shape, parts=parts: next(parts).reshape(shape))[0].flatten(-3) - loc)
    root = torch.stack(columns, -1)
    return MultivariateNormal(loc, root @ root.mT)


MAKERS = {
    "low rank": low_rank,
    "Kronecker": kronecker,
    "Kronecker, one side": lambda: kronecker(right=False, spectrum=False),
    "Kronecker, the other": lambda: kronecker(left=False),
    "Kronecker, none": lambda: kronecker(False, False, False),
}


@pytest.fixture(params=MAKERS)
def fn(request):
    return MAKERS[request.param]()


@pytest.fixture
def prior():
    return Independent(Normal(noise(*SHAPE, seed=8), noise(*SHAPE, seed=9).exp()), 3)


def test_the_covariance_is_the_documented_one():
    """Written out with Kronecker products, layer by layer."""
    fn = kronecker()
    covariance = dense(fn).covariance_matrix[2, 0]
    for layer in range(2):
        left, right = fn.left[2, 0, layer], fn.right[2, 0, layer]
        mix = torch.diag(fn.scale[2, 0, layer].flatten()) @ torch.kron(left, right)
        expected = mix @ torch.diag(fn.spectrum[2, 0, layer].flatten() ** 2) @ mix.T
        block = slice(12 * layer, 12 * layer + 12)
        torch.testing.assert_close(covariance[block, block], expected)
    assert (covariance[:12, 12:] == 0).all()
    fn = low_rank()
    factor = fn.factor.flatten(-4, -2)
    expected = torch.diag_embed(fn.scale.flatten(-3) ** 2) + factor @ factor.mT
    torch.testing.assert_close(dense(fn).covariance_matrix, expected)


def test_density_entropy_and_moments(fn):
    value = noise(*BATCH, *SHAPE, seed=11)
    torch.testing.assert_close(fn.log_prob(value), dense(fn).log_prob(value.flatten(-3)))
    torch.testing.assert_close(fn.entropy(), dense(fn).entropy())
    torch.testing.assert_close(fn.variance.flatten(-3), dense(fn).variance)
    torch.testing.assert_close(fn.stddev.square(), fn.variance)


def test_divergence_from_independent_normals(fn, prior):
    whole = MultivariateNormal(prior.mean.flatten(), torch.diag(prior.variance.flatten()))
    torch.testing.assert_close(divergence(fn, prior), kl_divergence(dense(fn), whole))
    assert divergence(fn, prior).shape == BATCH


def test_draws_have_these_moments(fn):
    """Within 5.5 standard errors, over 20,000 draws of the first element of the batch."""
    torch.manual_seed(0)
    count = 20_000
    draws = fn.rsample((count,))[:, 0, 0].flatten(1)
    assert draws.shape == (count, math.prod(SHAPE))
    expected = dense(fn)
    mean, covariance = expected.mean[0, 0], expected.covariance_matrix[0, 0]
    assert ((draws.mean(0) - mean) / (covariance.diagonal() / count).sqrt()).abs().max() < 5.5
    found, variances = draws.T.cov(), covariance.diagonal()
    error = ((variances[:, None] * variances + covariance**2) / count).sqrt()
    assert ((found - covariance) / error).abs().max() < 5.5


def test_parts_tensors_and_width(fn):
    again = constrained(fn, unconstrained(fn))
    rebuild = with_parameters(fn, parameters(fn))
    value = noise(*BATCH, *SHAPE, seed=11)
    for other in (again, rebuild):
        assert type(other) is type(fn) and other.batch_shape == BATCH and other.event_shape == SHAPE
        torch.testing.assert_close(other.log_prob(value), fn.log_prob(value))
    torch.testing.assert_close(dense(scaled(fn, 3.0)).covariance_matrix, 9.0 * dense(fn).covariance_matrix)
    assert scaled(fn, 3.0).mean.equal(fn.mean)
    wide = fn.expand((7, *BATCH))
    assert wide.batch_shape == (7, *BATCH) and wide.rsample().shape == (7, *BATCH, *SHAPE)
    assert FAMILIES[type(fn).__name__] is type(fn)


def test_every_family_can_be_saved():
    assert set(WeightDistribution.__subclasses__()) - {Flat, SiteNormal} <= set(FAMILIES.values())


def test_gradients_reach_every_part(fn, prior):
    """Of the divergence; and in float64 they are those of differences."""
    parts = {name: value[:1].clone().requires_grad_() for name, value in unconstrained(fn).items()}
    small = map_parameters(fn, lambda value: value[:1])
    names = list(parts)
    function = lambda *values: divergence(constrained(small, dict(zip(names, values, strict=True))), prior).sum()  # noqa: E731
    assert torch.autograd.gradcheck(function, list(parts.values()))
    draw = constrained(small, parts).rsample()
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(draw.square().sum(), list(parts.values())))


def test_dropped_columns(prior):
    """Whole columns, at the rate, the mean kept; moments within 5.5 standard errors; -E[log p] of the draws."""
    torch.manual_seed(0)
    value, keep, count = noise(*BATCH, *SHAPE), torch.tensor(0.7, dtype=torch.float64), 20_000
    fn = DroppedPoint(value, keep)
    draws = fn.rsample((count,))
    kept = draws / value
    assert ((kept.abs() < 1e-12) | ((kept - 1 / 0.7).abs() < 1e-12)).all()
    kept = kept.abs() > 0.5
    assert (kept == kept[..., :1, :]).all()  # all rows of a layer
    assert not (kept[..., :1, 0, :] == kept[..., 1:, 0, :]).all()  # not of all layers
    assert ((draws.mean(0) - value) / (fn.stddev / count**0.5)).abs().max() < 5.5
    torch.testing.assert_close(draws.var(0), fn.variance, rtol=0.1, atol=0.0)
    log_probs = -prior.log_prob(draws)
    error = (log_probs.mean(0) - divergence(fn, prior)) / (log_probs.std(0) / count**0.5)
    assert error.abs().max() < 5.5
    assert scaled(fn, 3.0) is fn and unconstrained(fn).keys() == {"value"}
    assert constrained(fn.expand((1, *BATCH)), {"value": value}).keep.shape == (1, *BATCH)


def test_directions_that_are_nearly_alike_in_32_bits():
    """The determinant of a million weights' covariance, against 64 bits."""
    line = noise(1, 1000, 1000)
    factor = torch.stack([line * (1 + i) + 1e-3 * noise(1, 1000, 1000, seed=i) for i in range(5)], -1)
    one = LowRankNormal(line, torch.ones_like(line), factor)
    other = one.map(lambda _, value: value.float())
    assert other.log_volume().dtype == torch.float32
    torch.testing.assert_close(other.log_volume().double(), one.log_volume(), rtol=1e-3, atol=0.0)


def test_what_does_not_fit(prior):
    with pytest.raises(ValueError, match="LowRankNormal: expected tensors with .* dimensions after the batch"):
        LowRankNormal(noise(2, 3), noise(2, 3), noise(2, 3, 2))
    for fn in (low_rank(), kronecker(), DroppedPoint(noise(*SHAPE), torch.tensor(0.5))):
        with pytest.raises(NotImplementedError, match=f"{type(fn).__name__} from .* has no closed form"):
            divergence(fn, Independent(torch.distributions.Laplace(noise(*SHAPE), 1.0), 3))
