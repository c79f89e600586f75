"""The posterior of option scores under a normal prior, against weights in many dimensions, and its derivatives."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.distributions import MultivariateNormal, kl_divergence

from bayes_lora.errors import ConfigError
from bayes_lora.infer.score_posterior import CategoricalAnswers, NormalAnswers, score_posterior

DOUBLE = torch.float64


def problem(seed=0, counts=((3, 2, 4), (4, 4, 1, 2)), width=7, scale=1.0):
    """Tasks with unequal numbers of examples and options: means, Jacobians of normal weights, answers, masks."""
    generator = torch.Generator().manual_seed(seed)
    tasks, rows, options = len(counts), max(map(len, counts)), max(map(max, counts))
    mask = torch.zeros(tasks, rows, options, dtype=torch.bool)
    answer = torch.zeros(tasks, rows, dtype=torch.long)
    for t, numbers in enumerate(counts):
        for j, k in enumerate(numbers):
            mask[t, j, :k] = True
            answer[t, j] = torch.randint(k, (), generator=generator)
    mean = 1.5 * torch.randn(mask.shape, generator=generator, dtype=DOUBLE)
    jacobian = scale * torch.randn(tasks, rows * options, width, generator=generator, dtype=DOUBLE)
    return mean, jacobian, answer, mask


def log_joint(weights, mean, jacobian, answer, mask, beta):
    """Log-density of answers and weights of one task, by the definitions."""
    scores = (mean.flatten() + jacobian @ weights).view(mean.shape).masked_fill(~mask, -torch.inf)
    present = mask.any(-1)
    gold = scores[present].log_softmax(-1).gather(-1, answer[present, None])
    normal = torch.distributions.Normal(torch.zeros_like(weights), torch.ones_like(weights))
    return gold.sum() / beta + normal.log_prob(weights).sum()


def laplace(mean, jacobian, answer, mask, beta):
    """Mode, covariance and evidence in weight space, by gradient ascent with the exact Hessian."""
    weights = torch.zeros(jacobian.shape[-1], dtype=DOUBLE)
    density = lambda u: log_joint(u, mean, jacobian, answer, mask, beta)  # noqa: E731
    for _ in range(200):
        hessian = torch.autograd.functional.hessian(density, weights)
        gradient = torch.autograd.functional.jacobian(density, weights)
        direction, step = -torch.linalg.solve(hessian, gradient), 1.0
        while density(weights + step * direction) < density(weights) and step > 1e-6:
            step /= 2
        weights = weights + step * direction
    covariance = torch.linalg.inv(-torch.autograd.functional.hessian(density, weights))
    constant = 0.5 * len(weights) * torch.log(torch.tensor(2 * torch.pi, dtype=DOUBLE))
    return weights, covariance, density(weights) + constant + 0.5 * covariance.logdet()


@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("scale", [0.1, 1.0, 6.0])
def test_it_is_the_laplace_approximation_over_the_weights(scale, beta):
    mean, jacobian, answer, mask = problem(scale=scale)
    found = score_posterior(mean, jacobian @ jacobian.mT, CategoricalAnswers(answer, mask, beta))
    eye = torch.eye(jacobian.shape[-1], dtype=DOUBLE)
    for t in range(len(mean)):
        weights, covariance, evidence = laplace(mean[t], jacobian[t], answer[t], mask[t], beta)
        torch.testing.assert_close(jacobian[t].mT @ found.weights[t], weights, rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(
            eye - jacobian[t].mT @ found.removed[t] @ jacobian[t], covariance, rtol=1e-7, atol=1e-8
        )
        q, p = MultivariateNormal(weights, covariance), MultivariateNormal(torch.zeros_like(weights), eye)
        torch.testing.assert_close(found.divergence[t], kl_divergence(q, p), rtol=1e-7, atol=1e-8)
        torch.testing.assert_close(found.log_evidence[t], evidence, rtol=1e-7, atol=1e-8)
        scores = mean[t].flatten() + jacobian[t] @ weights
        there = mask[t].flatten()
        torch.testing.assert_close(found.mode[t][there], scores[there], rtol=1e-7, atol=1e-7)


def test_derivatives_are_those_of_the_whole_computation():
    mean, jacobian, answer, mask = problem(width=4)
    query = torch.randn(2, 5, 4, generator=torch.Generator().manual_seed(3), dtype=DOUBLE)

    def values(mean, log_scale):
        scaled = jacobian * log_scale.exp()
        found = score_posterior(mean, scaled @ scaled.mT, CategoricalAnswers(answer, mask, 0.7))
        cross = query * log_scale.exp() @ scaled.mT
        means = (cross @ found.weights[..., None])[..., 0]
        covariance = query @ query.mT * log_scale.exp() ** 2 - cross @ found.removed @ cross.mT
        return found.divergence, found.log_evidence, means, covariance

    inputs = (mean.requires_grad_(), torch.tensor(0.2, dtype=DOUBLE, requires_grad=True))
    assert gradcheck(values, inputs, eps=1e-6, atol=1e-6)


def test_padding_has_no_effect():
    mean, jacobian, answer, mask = problem()
    kernel = jacobian @ jacobian.mT
    found = score_posterior(mean, kernel, CategoricalAnswers(answer, mask))
    rows = 3
    alone = [mean[:1, :rows], answer[:1, :rows], mask[:1, :rows]]
    size = rows * mean.shape[-1]
    own = score_posterior(alone[0], kernel[:1, :size, :size], CategoricalAnswers(*alone[1:]))
    torch.testing.assert_close(found.weights[0, :size], own.weights[0])
    torch.testing.assert_close(found.removed[0, :size, :size], own.removed[0])
    torch.testing.assert_close(found.divergence[0], own.divergence[0])
    torch.testing.assert_close(found.log_evidence[0], own.log_evidence[0])
    assert not found.weights[~mask.flatten(1)].any() and not found.removed[0, size:].any()
    # A gold option of -1 marks an example that is padding, too.
    marked = answer.masked_fill(~mask.any(-1), -1)
    torch.testing.assert_close(score_posterior(mean, kernel, CategoricalAnswers(marked, mask)).weights, found.weights)


def test_options_in_another_order_are_the_same_problem():
    mean, jacobian, answer, mask = problem(counts=((4, 4, 4), (4, 4, 4)))
    order = torch.tensor([2, 0, 3, 1])
    columns = (torch.arange(3)[:, None] * 4 + order).flatten()
    found = score_posterior(mean, jacobian @ jacobian.mT, CategoricalAnswers(answer, mask))
    moved = jacobian[:, columns]
    answers = CategoricalAnswers(order.argsort()[answer], mask)
    other = score_posterior(mean[..., order], moved @ moved.mT, answers)
    torch.testing.assert_close(other.weights, found.weights[:, columns])
    torch.testing.assert_close(other.removed, found.removed[:, columns][..., columns])
    torch.testing.assert_close(other.log_evidence, found.log_evidence)


def test_half_of_beta_is_every_example_twice():
    mean, jacobian, answer, mask = problem(counts=((3, 2, 4),))
    tempered = score_posterior(mean, jacobian @ jacobian.mT, CategoricalAnswers(answer, mask, 0.5))
    twice = [torch.cat([value, value], 1) for value in (mean, jacobian, answer, mask)]
    doubled = score_posterior(twice[0], twice[1] @ twice[1].mT, CategoricalAnswers(*twice[2:]))
    torch.testing.assert_close(tempered.divergence, doubled.divergence)
    torch.testing.assert_close(tempered.log_evidence, doubled.log_evidence)


def test_the_evidence_is_the_integral_where_the_scores_hardly_move():
    """By Monte Carlo over weights; Laplace's error is of fourth order in their scale."""
    mean, jacobian, answer, mask = problem(scale=0.15)
    found = score_posterior(mean, jacobian @ jacobian.mT, CategoricalAnswers(answer, mask))
    draws = torch.randn(200_000, jacobian.shape[-1], generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    for t in range(len(mean)):
        scores = (mean[t].flatten() + draws @ jacobian[t].mT).view(-1, *mean[t].shape)
        log_probs = scores.masked_fill(~mask[t], -1e30).log_softmax(-1)
        present = mask[t].any(-1)
        gold = log_probs.gather(-1, answer[t].expand(len(draws), -1)[..., None])[..., 0][:, present].sum(-1)
        weights = gold.exp()
        error = weights.std() / weights.mean() / len(draws) ** 0.5
        assert abs(float(found.log_evidence[t] - weights.mean().log())) < 4 * float(error) + 2e-3


@pytest.mark.parametrize(
    ("scale", "dtype"), [(1e-4, torch.float32), (1e2, torch.float32), (1e-4, DOUBLE), (1e2, DOUBLE), (1e4, DOUBLE)]
)
def test_the_mode_is_found_whatever_the_scale(scale, dtype):
    mean, jacobian, answer, mask = problem(seed=4, scale=scale, width=40)
    mean, jacobian = (100 * mean).to(dtype), jacobian.to(dtype)
    found = score_posterior(mean, jacobian @ jacobian.mT, CategoricalAnswers(answer, mask))
    assert all(value.isfinite().all() for value in found)
    assert (found.divergence >= -1e-3).all()
    probs = found.mode.view(mask.shape).masked_fill(~mask, -torch.inf).softmax(-1).nan_to_num()
    gold = torch.nn.functional.one_hot(answer, mask.shape[-1]) * mask
    # At the mode the weights are the residuals.
    torch.testing.assert_close(
        found.weights, (gold - probs * mask).flatten(1).to(dtype), rtol=0, atol=1e-6 if dtype == DOUBLE else 3e-3
    )


def test_normal_answers_give_the_exact_posterior_of_linear_regression():
    generator = torch.Generator().manual_seed(5)
    mean, value = torch.randn(2, 6, 1, generator=generator, dtype=DOUBLE), torch.randn(2, 6, generator=generator)
    jacobian = torch.randn(2, 6, 3, generator=generator, dtype=DOUBLE)
    scale = 0.2 + torch.rand(2, 6, generator=generator, dtype=DOUBLE)
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = score_posterior(mean, jacobian @ jacobian.mT, NormalAnswers(value.double(), scale, mask, 0.8))
    for t in range(2):
        kept = mask[t]
        rows, noise = jacobian[t, kept], scale[t, kept].square() * 0.8
        precision = torch.eye(3, dtype=DOUBLE) + (rows.mT / noise) @ rows
        expected = torch.linalg.solve(precision, rows.mT @ ((value[t, kept] - mean[t, kept, 0]) / noise))
        torch.testing.assert_close(jacobian[t].mT @ found.weights[t], expected)
        covariance = torch.eye(3, dtype=DOUBLE) - jacobian[t].mT @ found.removed[t] @ jacobian[t]
        torch.testing.assert_close(covariance, torch.linalg.inv(precision))
    # With beta = 1 the evidence is the density of the answers.
    found = score_posterior(mean, jacobian @ jacobian.mT, NormalAnswers(value.double(), scale, mask))
    covariance = jacobian[0] @ jacobian[0].mT + torch.diag(scale[0].square())
    density = MultivariateNormal(mean[0, :, 0], covariance).log_prob(value[0].double())
    torch.testing.assert_close(found.log_evidence[0], density)


@pytest.mark.parametrize(("scale", "dtype"), [(3e3, torch.float32), (1e5, torch.float32), (1e9, DOUBLE)])
def test_a_prior_so_wide_that_rounding_errors_exceed_the_identity(scale, dtype):
    """In a few directions, so that the exact matrix has eigenvalues of 1, and the rounded one negative ones."""
    mean, jacobian, answer, mask = problem(seed=5, scale=scale, width=3)
    kernel = (jacobian @ jacobian.mT).to(dtype)
    matrix = torch.eye(kernel.shape[-1]) + kernel.double()
    assert torch.linalg.eigvalsh(matrix).amin() < 0
    found = score_posterior(mean.to(dtype), kernel, CategoricalAnswers(answer, mask))
    assert all(value.isfinite().all() for value in found)


def test_a_kernel_that_is_not_a_number_is_named():
    mean, jacobian, answer, mask = problem(seed=5, scale=1.0, width=3)
    kernel = jacobian @ jacobian.mT * torch.nan
    with pytest.raises(ConfigError, match="prior variance of scores, up to nan .* Give the prior smaller scales"):
        score_posterior(mean, kernel, CategoricalAnswers(answer, mask))
