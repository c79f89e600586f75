"""A normal over all sites: its draws, moments and divergences, against the dense matrix."""

import pytest
import torch
from torch.distributions import MultivariateNormal, Normal, kl_divergence

from bayes_lora.distributions.joint_normal import JointNormal, SiteNormal

DOUBLE = torch.float64
SHAPES = {"q_proj.lora_B": (2, 3, 2), "o_proj.lora_B": (1, 4, 2)}
RANK, TASKS = 5, 3


def make(size=1.0, dependent=False):
    """Three tasks; with ``dependent`` two columns of G are equal, as if an example were seen twice."""
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape):
        return torch.randn(*shape, generator=generator, dtype=DOUBLE)

    sites = {}
    for site, shape in SHAPES.items():
        factor = size * drawn(TASKS, 1, *shape, RANK)
        if dependent:
            factor[..., 1] = factor[..., 0]
        sites[site] = (drawn(TASKS, 1, *shape), drawn(TASKS, 1, *shape).exp(), factor)
    gram = sum((f.flatten(-4, -2).mT @ f.flatten(-4, -2)) for _, _, f in sites.values())
    inner = torch.linalg.inv(torch.eye(RANK, dtype=DOUBLE) + gram)
    return JointNormal({site: SiteNormal(*values, inner) for site, values in sites.items()})


def flat(values):
    return torch.cat([value.flatten(-3) for value in values], -1)


def dense(joint):
    """Mean and covariance ``(T, 1, weights, weights)`` of all weights, by the definition."""
    factor = torch.cat([fn.factor.flatten(-4, -2) for fn in joint.values()], -2)
    scale = flat([fn.scale for fn in joint.values()])
    precision = torch.eye(scale.shape[-1], dtype=DOUBLE) + factor @ factor.mT
    return flat([fn.loc for fn in joint.values()]), scale[..., :, None] * torch.linalg.inv(precision) * scale[
        ..., None, :
    ]


def linear_map(draw, joint):
    """The matrix that maps the noise of a draw to the weights, and what is drawn without noise."""
    sizes = [*(fn.loc[0].numel() for fn in joint.values()), RANK]
    count = sum(sizes)
    rows = iter(torch.eye(count, dtype=DOUBLE).split(sizes, -1))

    def unit(shape):
        own = next(rows).view(count, 1, 1, *shape[3:])
        return own.expand(shape)

    moved = draw(count, unit)
    still = draw(1, lambda shape: torch.zeros(shape, dtype=DOUBLE))
    return (flat(moved.values()) - flat(still.values())).movedim(0, -1), flat(still.values())[0]


@pytest.mark.parametrize("dependent", [False, True])
@pytest.mark.parametrize("size", [1e-4, 1.0, 1e3])
def test_draws_have_the_covariance_of_all_sites(size, dependent):
    joint = make(size, dependent)
    mean, covariance = dense(joint)
    matrix, still = linear_map(joint.drawn, joint)
    torch.testing.assert_close(still, mean)
    torch.testing.assert_close(matrix @ matrix.mT, covariance, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(flat([fn.variance for fn in joint.values()]), covariance.diagonal(dim1=-2, dim2=-1),
                               rtol=1e-6, atol=1e-7)  # fmt: skip
    assert torch.equal(flat([fn.mean for fn in joint.values()]), mean)


@pytest.mark.parametrize("dependent", [False, True])
def test_a_site_alone_has_its_marginal(dependent):
    joint = make(0.7, dependent)
    _, covariance = dense(joint)
    start = 0
    for site, fn in joint.items():
        size = fn.loc[0].numel()
        own = covariance[..., start : start + size, start : start + size]
        matrix, _ = linear_map(lambda count, noise, site=site, fn=fn: {site: fn.drawn(count, noise)}, {site: fn})
        torch.testing.assert_close(matrix @ matrix.mT, own)
        start += size


def test_divergences_are_those_of_the_dense_normal():
    joint = make()
    generator = torch.Generator().manual_seed(3)
    prior = {
        site: Normal(
            torch.randn(shape, generator=generator, dtype=DOUBLE),
            torch.randn(shape, generator=generator, dtype=DOUBLE).exp(),
        )
        for site, shape in SHAPES.items()
    }
    loc, scale = (torch.cat([getattr(fn, name).flatten() for fn in prior.values()]) for name in ("loc", "scale"))
    expected = kl_divergence(MultivariateNormal(*dense(joint)), MultivariateNormal(loc, torch.diag(scale**2)))
    torch.testing.assert_close(joint.divergence(prior), expected)
    wrapped = {site: torch.distributions.Independent(fn, 3) for site, fn in prior.items()}
    torch.testing.assert_close(joint.divergence(wrapped), expected)
    start = 0
    mean, covariance = dense(joint)
    for site, fn in joint.items():
        part = slice(start, start + fn.loc[0].numel())
        own = MultivariateNormal(mean[..., part], covariance[..., part, part])
        of_prior = MultivariateNormal(prior[site].loc.flatten(), torch.diag(prior[site].scale.flatten() ** 2))
        torch.testing.assert_close(kl_divergence(fn, wrapped[site]), kl_divergence(own, of_prior))
        start = part.stop


def test_width_scales_every_standard_deviation():
    joint = make()
    for fn in joint.values():
        torch.testing.assert_close(fn.scaled(3.0).stddev, 3.0 * fn.stddev)
        assert torch.equal(fn.scaled(3.0).mean, fn.mean)
