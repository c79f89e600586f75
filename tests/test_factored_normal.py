"""The distribution of a weight matrix by low-rank means and scales, against independent normals over its entries."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from bayes_lora.distributions import factored_normal
from bayes_lora.distributions.deferred_weight import DeferredWeight
from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.unconstrained import constrained, scaled, unconstrained
from bayes_lora.utils.grouped_linear import linear

OUT, IN = 5, 7


def factors(*batch, rank=2, scale_rank=3, seed=0, dtype=torch.float64):
    """Ranks that differ, scales of both signs; the last of the batch are the layers."""
    generator = torch.Generator().manual_seed(seed)
    shapes = ((rank, IN), (OUT, rank), (scale_rank, IN), (OUT, scale_rank))
    return [0.4 * torch.randn(*batch, *shape, generator=generator, dtype=dtype) for shape in shapes]


def dense(normal):
    """Over the entries."""
    return Normal(
        normal.loc_B @ normal.loc_A, (normal.scale_B @ normal.scale_A + normal.offset[..., None, None, None]).abs()
    )


@pytest.fixture(params=[1 << 22, 50, 1])
def chunk(request, monkeypatch):
    """All rows at once, some, and one at a time."""
    monkeypatch.setattr(factored_normal, "CHUNK", request.param)


def test_divergence_entropy_and_density_are_those_of_the_entries(chunk):
    """Values and gradients; q for three tasks and two layers, p for two layers."""
    q_parts, p_parts = factors(3, 1, 2, seed=1), factors(2, seed=2)
    results = []
    for of_entries in (False, True):
        leaves = [[value.clone().requires_grad_() for value in parts] for parts in (q_parts, p_parts)]
        q, p = (FactoredNormal(*parts, offset=c) for parts, c in zip(leaves, (0.7, 0.9), strict=True))
        value = torch.linspace(-1, 1, OUT * IN, dtype=torch.float64).view(OUT, IN)
        if of_entries:
            terms = [kl_divergence(dense(q), dense(p)), dense(q).entropy(), dense(q).log_prob(value)]
            terms = [term.sum((-3, -2, -1)) for term in terms]
        else:
            terms = [kl_divergence(q, p), q.entropy(), q.log_prob(value)]
        assert all(term.shape == (3, 1) for term in terms)
        total = sum((i + 1) * (term[:, 0] * torch.tensor([0.5, 2.0, 1.0])).sum() for i, term in enumerate(terms))
        results.append((terms, torch.autograd.grad(total, [v for parts in leaves for v in parts])))
    torch.testing.assert_close(results[0], results[1])
    assert results[0][0][0].min() > 0.1


def test_divergence_of_stacked_layers_is_their_sum():
    parts = [factors(2, seed=seed) for seed in (1, 2)]

    def divergence(layers):
        q, p = (FactoredNormal(*(value[layers] for value in one), offset=0.8) for one in parts)
        return kl_divergence(q, p)

    torch.testing.assert_close(divergence(slice(0, 2)), divergence(slice(0, 1)) + divergence(slice(1, 2)))


def test_divergence_is_zero_from_itself_and_whatever_the_sign():
    loc_A, loc_B, scale_A, scale_B = factors(1)
    q, p = FactoredNormal(loc_A, loc_B, scale_A, scale_B), FactoredNormal(loc_A, loc_B, scale_A, -scale_B)
    assert float(kl_divergence(q, p)) == pytest.approx(0.0, abs=1e-12)


def test_draws_have_its_moments():
    """Within 5.5 standard errors."""
    torch.manual_seed(0)
    normal, count = FactoredNormal(*factors(2), offset=0.5), 4000
    draws = normal.rsample((count,))
    assert draws.shape == (count, 2, OUT, IN) and normal.event_shape == (2, OUT, IN)
    assert ((draws.mean(0) - dense(normal).loc) / (dense(normal).scale / count**0.5)).abs().max() < 5.5
    assert ((draws.std(0) / dense(normal).scale - 1).abs() < 5.5 / (2 * count) ** 0.5).all()
    assert normal.expand((3, 4)).rsample().shape == (3, 4, 2, OUT, IN)
    torch.testing.assert_close(normal.expand((3, 4)).mean[1, 2], normal.mean)


@pytest.mark.parametrize("groups", [(), (2,), (3,)])
def test_the_variance_of_what_it_maps_is_the_dense_one_in_float32(groups):
    """To 1e-5 of the largest."""
    normal = FactoredNormal(*factors(*groups, 1, scale_rank=8, dtype=torch.float32), offset=0.01)
    x = torch.randn(6, 4, IN)
    expected = linear(x.double().square(), dense(normal).scale[..., 0, :, :].double().square())
    [layer] = normal.deferred().layers()
    found = layer.variance(x)
    assert (found - expected).abs().max() < 1e-5 * expected.max()
    assert found.shape == (6, 4, OUT)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_it_maps_has_the_moments_of_drawn_matrices(groups):
    torch.manual_seed(0)
    normal, count = FactoredNormal(*factors(groups, 1), offset=0.3), 6000
    x = torch.randn(2, IN, dtype=torch.float64)  # one row a group, or two
    [layer] = normal.deferred().layers()
    drawn = torch.stack([layer(x) for _ in range(count)])
    loc, scale = dense(normal).loc[:, 0], dense(normal).scale[:, 0]
    matrices = linear(x, loc), linear(x.square(), scale.square()).sqrt()
    assert ((drawn.mean(0) - matrices[0]) / (matrices[1] / count**0.5)).abs().max() < 5
    assert (drawn.std(0) / matrices[1] - 1).abs().max() < 5 / (2 * count) ** 0.5


def test_without_a_scale_it_is_a_low_rank_map_with_finite_gradients():
    loc_A, loc_B, scale_A, scale_B = factors(1)
    scale_B = torch.zeros_like(scale_B).requires_grad_()
    x = torch.randn(3, IN, dtype=torch.float64)
    [layer] = FactoredNormal(loc_A, loc_B, scale_A, scale_B, offset=0.0).deferred().layers()
    found = layer(x)
    torch.testing.assert_close(
        found, linear(linear(x, loc_A[0]), loc_B[0])
    )  # kernels may differ, and with them rounding
    found.sum().backward()
    assert scale_B.grad.isfinite().all()


def test_parts_and_width():
    normal = FactoredNormal(*factors(2), offset=0.4)
    again = constrained(normal, unconstrained(normal))
    assert again.event_shape == (2, OUT, IN) and torch.equal(again.mean, normal.mean)
    torch.testing.assert_close(scaled(normal, 1.7).variance, 1.7**2 * normal.variance)
    assert torch.equal(scaled(normal, 1.7).mean, normal.mean)


def test_factors_that_do_not_fit_are_refused():
    loc_A, loc_B, scale_A, scale_B = factors(1)
    with pytest.raises(ValueError, match=r"expected factors \(r, in\), \(out, r\), \(R, in\) and \(out, R\), got"):
        FactoredNormal(loc_A, loc_B, scale_A[..., :3], scale_B)
    with pytest.raises(ValueError, match="offset: expected at least 0, got -1.0"):
        FactoredNormal(loc_A, loc_B, scale_A, scale_B, offset=-1.0)


def test_a_deferred_weight_knows_its_shape_and_layers():
    deferred = FactoredNormal(*factors(4, 1, 2), offset=0.4).deferred()
    assert deferred.shape == (4, 1, 2, OUT, IN)
    [first, second] = deferred.layers()
    assert isinstance(first, DeferredWeight) and first.shape == (4, 1, OUT, IN)
    assert torch.equal(second.loc_B, deferred.loc_B[:, :, 1])
