"""Fisher information from gradients of single examples, against loops over them, in float64."""

import pytest
import torch
from conftest import make_tasks
from objectives import laplace, mean_theta

from bayes_lora.distributions.kronecker_normal import KroneckerNormal
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.infer.curvature import Sides, diagonal, gradients_of_examples, kronecker

SITES = ["q_proj.lora_B", "v_proj.lora_B", "o_proj.lora_B"]


@pytest.fixture
def problem(lm):
    """Two tasks with 2 and 3 examples, and values of phi."""
    support = collate([lm.encoder(task.examples[: 2 + t]) for t, task in enumerate(make_tasks(2).values())])
    model, guide = laplace(lm)
    theta = mean_theta(guide)
    torch.manual_seed(0)
    phi = {site: fn.expand((2, 1)).sample() for site, fn in model.phi_prior(theta).items()}
    return model, support, theta, phi


def collected(problem, batch_size, num_samples=1, seed=0):
    torch.manual_seed(seed)
    return list(gradients_of_examples(*problem, num_samples, batch_size))


def test_every_example_has_its_own_gradient(lm, problem):
    model, support, theta, phi = problem
    [(task, gradients)] = collected(problem, 5)
    assert task.tolist() == [0, 0, 1, 1, 1]
    torch.manual_seed(0)
    answers = model.answer(
        lm(model.shared(theta) | {s: v[task] for s, v in phi.items()}, support.per_example())
    ).sample()
    rows = [(t, example) for t, examples in enumerate(support.examples) for example in examples if example is not None]
    for i, (t, example) in enumerate(rows):
        own = {site: value[t : t + 1].clone().requires_grad_() for site, value in phi.items()}
        log_probs = lm(model.shared(theta) | own, collate([[example]])).log_softmax(-1)
        expected = torch.autograd.grad(log_probs[0, 0, answers[i, 0]], list(own.values()))
        for site, gradient in zip(own, expected, strict=True):
            torch.testing.assert_close(gradients[site][i], gradient[0])


@pytest.mark.slow
def test_passes_of_any_size_hold_the_same_examples(problem):
    """By their tasks, and with a Fisher information alike in expectation (200 passes, 6 standard errors)."""
    assert [task.tolist() for task, _ in collected(problem, 2)] == [[0, 0], [1, 1], [1]]
    assert [task.tolist() for task, _ in collected(problem, 5, num_samples=3)] == [[0, 0, 1, 1, 1]] * 3
    found = {}
    for size in (2, 5):
        draws = [diagonal(iter(collected(problem, size, seed=i)), problem[3], 1)["q_proj.lora_B"] for i in range(200)]
        stacked = torch.stack(draws)
        found[size] = stacked.mean(0), stacked.var(0) / 200
    error = (found[2][1] + found[5][1]).sqrt().clamp_min(1e-9)
    assert ((found[2][0] - found[5][0]).abs() / error).max() < 6.0


def test_both_sides_are_sums_over_examples(problem):
    """In units; a long side keeps its diagonal."""
    passes = collected(problem, 2, num_samples=2)
    phi = problem[3]
    unit = {site: 0.5 + torch.rand_like(value) for site, value in phi.items()}
    for largest in (3, 100):
        found = kronecker(iter(passes), unit, 2, largest)
        for site in SITES:
            rows = phi[site].shape[-2]
            whole = [torch.zeros(2, 2, *side, dtype=torch.float64) for side in ((rows, rows), (3, 3), ())]
            for task, gradients in passes:
                for i, t in enumerate(task.tolist()):
                    for layer in range(2):
                        g = gradients[site][i, 0, layer] * unit[site][t, 0, layer]
                        whole[0][t, layer] += g @ g.T / 2
                        whole[1][t, layer] += g.T @ g / 2
                        whole[2][t, layer] += (g**2).sum() / 2
            left, right, trace = whole
            expected = left if largest == 100 else left.diagonal(dim1=-2, dim2=-1)
            torch.testing.assert_close(found[site].left[:, 0], expected)
            torch.testing.assert_close(found[site].right[:, 0], right)
            torch.testing.assert_close(found[site].trace[:, 0], trace)


def test_a_kronecker_product_is_found_exactly():
    """From gradients L E R^T their sides give L L^T x R R^T, in expectation; here from all unit matrices E."""
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(n, n, generator=generator, dtype=torch.float64) for n in (3, 4))
    units = torch.eye(12, dtype=torch.float64).view(12, 1, 1, 3, 4)
    passes = [(torch.zeros(12, dtype=torch.long), {"site": left @ units @ right.T})]
    ones = {"site": torch.ones(1, 1, 1, 3, 4, dtype=torch.float64)}
    vectors_left, vectors_right, values = kronecker(iter(passes), ones, 1, 10)["site"].eigen()
    basis = torch.kron(vectors_left[0, 0, 0], vectors_right[0, 0, 0])
    found = basis @ torch.diag(values.flatten()) @ basis.T
    torch.testing.assert_close(found, torch.kron(left @ left.T, right @ right.T))
    diagonal_left = Sides(*(part for part in kronecker(iter(passes), ones, 1, 3)["site"])).eigen()
    assert diagonal_left[1] is None and diagonal_left[0] is not None


def test_the_kronecker_posterior_is_that_of_the_sides(lm):
    """Its precision, in the prior's units and by a dense inverse, is I + F / beta for the Kronecker product F."""
    model, guide = laplace(lm, steps=2, curvature="kronecker")
    theta, support = mean_theta(guide), collate([lm.encoder(t.examples[:3]) for t in make_tasks(2).values()])
    torch.manual_seed(0)
    found = guide.posterior(support, theta)
    prior = model.phi_prior(theta)
    torch.manual_seed(0)
    there = {site: fn.mean.expand(2, 1, *fn.event_shape) for site, fn in prior.items()}
    mode = {s: v + there[s] for s, v in guide.displacement(support, theta, there).items()}
    unit = {site: fn.stddev.expand(2, 1, *fn.event_shape) for site, fn in prior.items()}
    sides = kronecker(guide._passes(support, theta, mode), unit, 1, 64)
    for site in SITES:
        fn = found[site]
        assert isinstance(fn, KroneckerNormal)
        torch.testing.assert_close(fn.mean, mode[site])
        side = sides[site]
        fisher = torch.kron(side.left[1, 0, 0], side.right[1, 0, 0]) / side.trace[1, 0, 0]
        inverse = torch.linalg.inv(torch.eye(len(fisher), dtype=fisher.dtype) + fisher / 0.5)
        scale = unit[site][1, 0, 0].flatten()
        expected = scale.square() * inverse.diagonal()
        torch.testing.assert_close(fn.variance[1, 0, 0].flatten().detach(), expected)


def test_settings_of_laplace(lm):
    with pytest.raises(ConfigError, match="curvature: expected 'diagonal' or 'kronecker', got 'full'"):
        laplace(lm, curvature="full")
    with pytest.raises(ConfigError, match="prior_precision: expected .* got 'evidence'"):
        laplace(lm, prior_precision="evidence")
    with pytest.raises(ConfigError, match="got .*batch_size=0"):
        laplace(lm, batch_size=0)


def test_a_mode_that_stays_has_the_largest_precision_that_is_allowed(lm):
    """Where nothing moved, the marginal likelihood grows with the precision, which ends at its bound of 1000."""
    model, guide = laplace(lm, steps=0, curvature="kronecker", prior_precision="marginal-likelihood")
    theta, support = mean_theta(guide), collate([lm.encoder(t.examples[:3]) for t in make_tasks(2).values()])
    torch.manual_seed(0)
    found = guide.posterior(support, theta)
    prior = model.phi_prior(theta)
    mode, unit = (
        {s: getattr(fn, of).expand(2, 1, *fn.event_shape) for s, fn in prior.items()} for of in ("mean", "stddev")
    )
    torch.manual_seed(0)
    sides = kronecker(guide._passes(support, theta, mode), unit, 1, 64)
    for site, fn in found.items():
        values = sides[site].eigen()[2]
        assert (values.amax((-2, -1)) > 0).all()
        torch.testing.assert_close(fn.spectrum, (1000.0 + values / 0.5).rsqrt())


def test_a_layer_of_which_the_data_say_nothing_keeps_the_prior_s_precision(lm):
    _, guide = laplace(lm, prior_precision="marginal-likelihood")
    nothing = torch.zeros(2, 1, 2, 4, 3, dtype=torch.float64)
    assert (guide._precision(nothing, nothing) == 1.0).all()
    # Where the mode moved though no curvature is left there, only a precision of zero would do.
    torch.testing.assert_close(guide._precision(nothing, nothing + 1), torch.full((2, 1, 2, 1, 1), 1e-3).double())
