"""The posterior in the tangent space: exact where scores are linear, and what its parts promise where they are not."""

import pyro
import pytest
import torch
from conftest import make_tasks
from conjugate import MU, RANK, SITE, TAU, LinearModel, exact_posterior, linear_episode, log_evidence, make_data
from laws import chi_squared_p, dense
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import MultivariateNormal

from bayes_lora.distributions.joint_normal import JointNormal
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import NormalTheta, TangentGuide
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import ClusterMixture, HierarchicalNormal, LayerwiseScale, WeightSpace


@pytest.mark.parametrize("steps", [0, 2])
def test_it_is_the_exact_posterior_of_the_conjugate_problem(steps):
    x, _, y = make_data()
    model, episode = LinearModel(), linear_episode(x, y)
    guide = TangentGuide(model, steps=steps, batch_size=4)
    theta = model.initial_theta()
    with torch.no_grad():
        joint = guide.posterior(episode, theta)
        loc, covariance = dense(joint)
        evidence = guide.log_evidence(episode, theta)
    mean, precision = exact_posterior(x, y)
    torch.testing.assert_close(loc, mean)
    torch.testing.assert_close(covariance, torch.linalg.inv(precision))
    torch.testing.assert_close(evidence, log_evidence(x, y))


def test_a_draw_of_theta_moves_the_posterior_as_it_moves_the_exact_one():
    x, _, y = make_data(seed=2)
    model, episode = LinearModel(), linear_episode(x, y)
    guide = TangentGuide(model)
    mu = MU + torch.tensor([0.4, -0.9], dtype=MU.dtype)
    with torch.no_grad():
        loc, covariance = dense(guide.posterior(episode, {f"theta.loc.{SITE}": mu.view(1, 1, RANK)}))
        evidence = guide.log_evidence(episode, {f"theta.loc.{SITE}": mu.view(1, 1, RANK)})
    mean, precision = exact_posterior(x, y, mu)
    torch.testing.assert_close(loc, mean)
    torch.testing.assert_close(covariance, torch.linalg.inv(precision))
    torch.testing.assert_close(evidence, log_evidence(x, y, mu))


@pytest.mark.parametrize("elbo", ["ours", "pyro"])
def test_the_elbo_of_all_draws_is_the_evidence(elbo):
    """The exact posterior makes every draw's ELBO with log q the evidence; in closed form its mean is."""
    x, _, y = make_data()
    model, episode = LinearModel(), linear_episode(x, y)
    guide = TangentGuide(model)
    kwargs = {"num_particles": 4000, "max_plate_nesting": 2, "vectorize_particles": True}
    objective = BetaELBO(model, guide, **({"elbo": TraceMeanField_ELBO(**kwargs)} if elbo == "pyro" else {}))
    if elbo == "ours":
        objective = BetaELBO(model, guide, num_particles=4000)
    pyro.set_rng_seed(0)
    with torch.no_grad():
        loss = float(objective(episode))
    prior = torch.distributions.Normal(torch.zeros(RANK, dtype=MU.dtype), 1.5).log_prob(MU).sum()
    assert loss == pytest.approx(-float(log_evidence(x, y).sum() + prior), abs=0.1)


def test_theta_s_gradient_is_that_of_the_evidence():
    """With the exact posterior the ELBO is the evidence as a function of mu, so that their gradients agree."""
    x, _, y = make_data()
    model, episode = LinearModel(), linear_episode(x, y)
    guide = TangentGuide(model)
    objective = BetaELBO(model, guide, num_particles=20000, gamma=1e-9)
    pyro.set_rng_seed(1)
    objective(episode).backward()
    mu = MU.clone().requires_grad_()
    (-log_evidence(x, y, mu).sum()).backward()
    torch.testing.assert_close(guide.theta.loc_theta_loc_linear_lora_B.grad.flatten(), mu.grad, atol=0.05, rtol=0.02)


@pytest.mark.parametrize(("factor", "passes"), [(1.0, True), (0.6, False), (1.6, False)])
def test_simulation_based_calibration(factor, passes):
    """Ranks of the weights that made the data among draws are uniform, unless sigma is wrong (arXiv 1804.06788)."""

    class Scaled(LinearModel):
        def phi_prior(self, theta):
            loc = theta[f"theta.loc.{SITE}"]
            return {SITE: torch.distributions.Independent(pyro.distributions.Normal(loc, factor * TAU), 3)}

    tasks, draws = 800, 19
    x, b, y = make_data(tasks=tasks, examples=1, seed=11)
    model = Scaled()
    guide = TangentGuide(model, batch_size=2000)
    pyro.set_rng_seed(2)
    with torch.no_grad():
        drawn = guide.posterior(linear_episode(x, y), model.initial_theta()).rsample((draws,))[SITE]
    ranks = (drawn[:, :, 0, 0, 0] < b).sum(0)  # (tasks, RANK)
    for k in range(RANK):
        p = chi_squared_p(ranks[:, k], draws)
        assert (p > 1e-3) if passes else (p < 1e-6)


def language_model_problem(lm, sizes=(4, 2, 3), **kwargs):
    model = LayerwiseScale(lm, lm.sites.initial(), random="B", initial_scale=(0.1, 0.4))
    tasks = list(make_tasks(len(sizes)).values())
    episode = collate([lm.encoder(task.examples[:n]) for task, n in zip(tasks, sizes, strict=True)])
    return model, episode, TangentGuide(model, **kwargs)


def test_its_divergence_and_evidence_are_those_of_the_dense_computation(lm):
    model, episode, guide = language_model_problem(lm)
    theta = model.initial_theta()
    with torch.no_grad():
        joint, prior = guide.posterior(episode, theta), guide.prior(theta)
        found = guide.linearised(episode, theta).posterior
    loc, covariance = dense(joint)
    mean, scale = (
        torch.cat([getattr(fn, name).expand(fn.event_shape).flatten() for fn in prior.values()])
        for name in ("mean", "stddev")
    )
    expected = torch.distributions.kl_divergence(
        MultivariateNormal(loc, covariance), MultivariateNormal(mean, torch.diag(scale**2))
    )
    torch.testing.assert_close(joint.divergence(prior)[:, 0], expected)
    torch.testing.assert_close(found.divergence, expected)
    assert (expected > 0.01).all()


def test_tasks_do_not_affect_one_another(lm):
    model, episode, guide = language_model_problem(lm)
    theta = model.initial_theta()
    tasks = list(make_tasks(3).values())
    with torch.no_grad():
        together = guide.posterior(episode, theta)
        for t, n in enumerate((4, 2, 3)):
            alone = guide.posterior(collate([lm.encoder(tasks[t].examples[:n])]), theta)
            for mine, other in zip(dense(alone), dense(together), strict=True):
                torch.testing.assert_close(mine[0], other[t])


def test_steps_climb_to_a_mode_of_the_network(lm):
    """The gradient of the log joint density vanishes there; without steps it does not."""

    def slope(steps):
        model, episode, guide = language_model_problem(lm, steps=steps)
        theta = model.initial_theta()
        with torch.no_grad():
            joint, prior = guide.posterior(episode, theta), guide.prior(theta)
        phi = {site: fn.loc.clone().requires_grad_() for site, fn in joint.items()}
        scores = model.likelihood(model.shared(theta) | phi, episode).log_softmax(-1)
        gold = scores.gather(-1, episode.answer[..., None])[..., 0] * episode.mask
        total = gold.sum() + sum(prior[site].log_prob(value).sum() for site, value in phi.items())
        gradients = torch.autograd.grad(total, list(phi.values()))
        # In units of the prior, where the modes of all weights are of the same size.
        units = [g * prior[site].stddev for site, g in zip(phi, gradients, strict=True)]
        return float(torch.cat([u.flatten() for u in units]).norm()), float(total.detach())

    (before, first), (after, last) = slope(0), slope(25)
    assert last > first
    assert after < 1e-2 * before


def test_all_sites_of_a_draw_belong_together(lm):
    """The covariance between sites of draws in the program is that of the dense posterior."""
    model, episode, guide = language_model_problem(lm)
    pyro.set_rng_seed(3)
    joint = guide.posterior(episode, model.initial_theta())
    assert isinstance(joint, JointNormal) and len(joint) > 1
    with torch.no_grad(), pyro.plate("draws", 4000, dim=-3):
        phi = guide(episode)
    flat = torch.cat([value[:, 0, 0].flatten(1) for value in phi.values()], 1)
    loc, covariance = (value[0].detach() for value in dense(joint))
    # In the directions that the support has narrowed most: their spread is between sites.
    values, vectors = torch.linalg.eigh(covariance / covariance.diagonal().mean())
    narrow = vectors[:, :3]
    found = ((flat - loc) @ narrow).square().mean(0)
    expected = (narrow.mT @ covariance @ narrow).diagonal()
    assert ((found / expected) - 1).abs().max() < 5 * (2 / 4000) ** 0.5


def test_it_refuses_what_it_cannot_linearise(lm):
    for model in (ClusterMixture(lm), WeightSpace(lm)):
        with pytest.raises(
            ConfigError, match="(?s)expected a normal p.phi . theta. of LoRA factors.*Use GradientGuide"
        ):
            TangentGuide(model)
    for settings in ({"steps": -1}, {"beta": 0.0}, {"batch_size": 0}):
        with pytest.raises(ConfigError, match="expected steps of at least 0"):
            TangentGuide(LayerwiseScale(lm), **settings)

    class Counts(LinearModel):
        def answer(self, log_lik):
            return pyro.distributions.Poisson(log_lik.exp())

    x, _, y = make_data()
    with pytest.raises(ConfigError, match="expected categorical or normal answers, got Poisson"):
        TangentGuide(Counts()).posterior(linear_episode(x, y), Counts().initial_theta())


@pytest.mark.parametrize("theta_guide", [NormalTheta])
@pytest.mark.parametrize("random", ["B", "AB"])
def test_gradients_reach_the_scales_of_the_prior(lm, theta_guide, random):
    model = HierarchicalNormal(lm, random=random)
    guide = TangentGuide(model, theta_guide=theta_guide)
    episode = collate([lm.encoder(task.examples[:3]) for task in make_tasks(2).values()])
    BetaELBO(model, guide)(episode).backward()
    for name, parameter in guide.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
