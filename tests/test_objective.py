import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_tasks
from lm_helpers import make_episode
from objectives import mean_theta, network_objective
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from torch.distributions import Gamma, Normal, kl_divergence

from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import NormalTheta, PointTheta
from bayes_lora.models import HierarchicalNormal


def posterior_and_prior(objective, episode):
    model, guide = objective.model, objective.guide
    theta = mean_theta(guide)
    prior = model.phi_prior(theta)
    return theta, prior, guide.posterior(episode.support, theta)


@pytest.mark.parametrize("random", ["A", "B", "AB"])
def test_loss_equals_its_definition(lm, random):
    """Scaled negative log-likelihood + beta KL + gamma (-log p(theta)), written out for one draw."""
    objective = network_objective(lm, random=random)
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    theta, prior, posterior = posterior_and_prior(objective, episode)
    torch.manual_seed(5)
    loss = objective(episode)
    torch.manual_seed(5)
    phi = {site: theta[f"theta.loc.{site}"] for site in lm.sites.shapes}
    divergence = 0.0
    for site, fn in posterior.items():
        phi[site] = fn.base_dist.rsample()
        divergence = divergence + kl_divergence(fn.base_dist, prior[site].base_dist).sum()
    log_probs = lm(phi, episode).log_softmax(-1).gather(-1, episode.answer[..., None])[..., 0]
    log_lik = log_probs[0, :2].sum() * 11 / 2 + log_probs[1, :3].sum() * 5 / 3
    log_prior = sum(
        (Normal(0.0, 1.0) if ".loc." in name else Gamma(1.0, 0.01)).log_prob(value).sum()
        for name, value in theta.items()
    )
    expected = 7 / 2 * (-log_lik + 0.3 * divergence) - 0.7 * log_prior
    torch.testing.assert_close(loss, expected)
    terms = objective.terms(episode)
    assert terms["kl"] == pytest.approx(float((7 / 2 * divergence).detach()))
    assert set(terms) == {"nll", "kl", *(f"kl.{site}" for site in posterior)}


def test_divergence_is_analytic(lm):
    """It has no variance over draws, as it would if a family without a closed form were sampled behind our back."""
    objective, episode = network_objective(lm), make_episode(lm)
    values = {objective.terms(episode)["kl"] for _ in range(4)}
    assert max(values) - min(values) < 1e-9
    sampled = network_objective(lm, elbo=Trace_ELBO())
    draws = torch.stack([sampled(episode).detach() for _ in range(120)])
    analytic = torch.stack([objective(episode).detach() for _ in range(120)])
    bound = 5 * ((draws.var() + analytic.var()) / 120).sqrt()
    assert abs(draws.mean() - analytic.mean()) < bound
    assert draws.var() > analytic.var()


def test_minibatches_average_to_the_whole(lm):
    """N enters once: the mean over all equal minibatches of a task is the full-batch loss."""
    objective = network_objective(lm)
    [task] = make_tasks(1).values()
    rows = lm.encoder(task.examples[:8])

    def loss(part):
        torch.manual_seed(7)
        return objective(collate([part], [rows[8:] or rows[:2]], num_data=[8]))

    parts = [loss(rows[i : i + 2]) for i in range(0, 8, 2)]
    torch.testing.assert_close(torch.stack(parts).mean(), loss(rows))


def test_the_guide_starts_at_the_prior(lm):
    objective, episode = network_objective(lm, move=False), make_episode(lm)
    assert objective.terms(episode)["kl"] == pytest.approx(0.0, abs=1e-9)
    theta, prior, posterior = posterior_and_prior(objective, episode)
    for site, fn in posterior.items():
        torch.testing.assert_close(fn.mean, prior[site].mean.expand_as(fn.mean))
        torch.testing.assert_close(fn.stddev, prior[site].stddev.expand_as(fn.stddev))
    torch.testing.assert_close(theta["theta.loc.q_proj.lora_A"], lm.sites.initial()["q_proj.lora_A"])


def test_the_guide_reads_the_support_alone_and_in_any_order(lm):
    objective = network_objective(lm)
    tasks = list(make_tasks(2).values())
    support = [lm.encoder(task.examples[:4]) for task in tasks]
    one, two = ([lm.encoder(task.examples[i : i + 2]) for task in tasks] for i in (4, 8))

    def means(episode):
        return {site: fn.mean for site, fn in posterior_and_prior(objective, episode)[2].items()}

    plain, other = (means(collate(query, support)) for query in (one, two))
    shuffled = means(collate(one, [rows[::-1] for rows in support]))
    padded = means(collate(one, [support[0], support[1][:2]]))
    alone = means(collate(one[:1], support[:1]))
    for site, loc in plain.items():
        assert torch.equal(loc, other[site])
        torch.testing.assert_close(shuffled[site], loc)
        torch.testing.assert_close(padded[site][0], loc[0])
        torch.testing.assert_close(alone[site][0], loc[0])
        assert not torch.allclose(padded[site][1], loc[1])
        assert not torch.allclose(loc[0], loc[1])


@pytest.mark.parametrize("theta", [PointTheta, NormalTheta])
def test_every_parameter_gets_a_gradient_and_the_base_none(lm, theta):
    objective, episode = network_objective(lm, theta_guide=theta), make_episode(lm)
    before = {name: value.clone() for name, value in lm.model.state_dict().items()}
    optimizer = torch.optim.Adam(objective.parameters(), lr=1e-2)
    objective(episode).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    optimizer.step()
    assert not any(p.requires_grad or p.grad is not None for p in lm.model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in lm.model.state_dict().items())
    assert not pyro.get_param_store().keys()
    base = {id(p) for p in lm.model.parameters()}
    assert not any(id(p) in base for p in objective.parameters())


@pytest.mark.parametrize("elbo", [TraceMeanField_ELBO, Trace_ELBO])
def test_svi_gives_the_same_loss_and_gradients(lm, elbo):
    objective, episode = network_objective(lm, beta=1.0, gamma=1.0, elbo=elbo()), make_episode(lm)
    torch.manual_seed(9)
    loss = objective(episode)
    loss.backward()
    expected = {name: p.grad.clone() for name, p in objective.named_parameters()}
    objective.zero_grad(set_to_none=True)
    seen = {}
    svi = SVI(objective.model, objective.guide, pyro.optim.Adam({"lr": 0.0}), loss=elbo())
    svi.optim = lambda params: seen.update({id(p): p.grad.clone() for p in params})
    torch.manual_seed(9)
    assert svi.step(episode) == pytest.approx(float(loss.detach()))
    assert len(seen) == len(expected)
    for name, parameter in objective.named_parameters():
        torch.testing.assert_close(seen[id(parameter)], expected[name])
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_svi_trains_as_a_pyro_user_tries_it_first(lm):
    objective, episode = network_objective(lm), make_episode(lm)
    model, guide = objective.model, objective.guide
    before = [p.detach().clone() for p in guide.parameters()]
    svi = SVI(model, guide, pyro.optim.Adam({"lr": 1e-2}), loss=TraceMeanField_ELBO())
    losses = [svi.step(episode) for _ in range(15)]
    assert all(not torch.equal(p, b) for p, b in zip(guide.parameters(), before, strict=True))
    assert sum(losses[-5:]) < sum(losses[:5])
    assert not any(p.requires_grad for p in lm.model.parameters())


def test_normal_theta_scales_its_divergence_by_gamma(lm):
    episode = make_episode(lm)
    losses = []
    for gamma in (1.0, 3.0):
        objective = network_objective(lm, theta_guide=NormalTheta, beta=1.0, gamma=gamma, move=False)
        torch.manual_seed(2)
        losses.append(objective(episode))
    guide, model = objective.guide, objective.model
    torch.manual_seed(2)
    value = 0.0
    with torch.no_grad():
        trace = pyro.poutine.trace(guide.theta).get_trace()
        prior = pyro.poutine.trace(pyro.poutine.replay(model.theta, trace)).get_trace()
    for name, site in trace.nodes.items():
        if site["type"] == "sample":
            if ".loc." in name:
                value = value + kl_divergence(site["fn"], prior.nodes[name]["fn"])
            else:
                value = value + (site["fn"].log_prob(site["value"]) - prior.nodes[name]["fn"].log_prob(site["value"]))
    torch.testing.assert_close(losses[1] - losses[0], 2.0 * value)


def test_point_theta_is_a_point_in_the_paper_s_parametrisation(lm):
    """log p(theta) takes Gamma at the precision itself: no Jacobian."""
    model = HierarchicalNormal(lm, lm.sites.initial(), random="B")
    theta = PointTheta(model)
    q = theta.distribution("theta.precision.v_proj.lora_B")
    assert isinstance(q, dist.Delta)
    torch.testing.assert_close(q.v.rsqrt(), torch.full_like(q.v, 0.05))
    assert float(q.log_prob(q.v)) == 0.0


def test_bad_settings_are_refused(lm):
    with pytest.raises(ConfigError, match="beta: expected a positive number, got 0"):
        network_objective(lm, beta=0)
    with pytest.raises(ConfigError, match="random: expected 'A', 'B' or 'AB', got 'C'"):
        HierarchicalNormal(lm, lm.sites.initial(), random="C")
    with pytest.raises(ConfigError, match="initial_scale"):
        HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.1, -1.0))
