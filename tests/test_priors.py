"""The densities of priors against torch's own and closed forms; what each says after a fit."""

import math

import pyro
import pytest
import torch
from conftest import make_tasks
from lm_helpers import make_episode
from torch.distributions import Gamma, HalfCauchy, Normal, kl_divergence

from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, PointTheta, SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import IndependentNormal, LayerwiseScale, RankARD, RegularizedHorseshoe


@pytest.fixture(autouse=True)
def double():
    """So that torch's distributions of plain numbers are of the models' dtype."""
    torch.set_default_dtype(torch.float64)


def some_theta(model):
    """Values of all theta sites, none of them where it starts."""
    generator = torch.Generator().manual_seed(2)
    theta = {}
    for name, value in model.initial_theta().items():
        noise = torch.randn(value.shape, generator=generator, dtype=value.dtype)
        theta[name] = value + 0.1 * noise if ".loc." in name else value * (0.3 * noise).exp()
    return theta


def log_theta(model, theta):
    trace = pyro.poutine.trace(pyro.condition(model.theta, data=theta)).get_trace()
    trace.compute_log_prob()
    return {name: trace.nodes[name]["log_prob"] for name in theta}


def test_layerwise_scales(lm):
    model = LayerwiseScale(lm, lm.sites.initial(), initial_scale=(0.2, 0.3), concentration=2.0, rate=0.05)
    theta = some_theta(model)
    for name, found in log_theta(model, theta).items():
        prior = Gamma(2.0, 0.05) if ".precision." in name else Normal(0.0, 1.0)
        torch.testing.assert_close(found, prior.log_prob(theta[name]).sum())
    for site, fn in model.phi_prior(theta).items():
        layers, rows, columns = lm.sites.shapes[site]
        assert theta[f"theta.precision.{site}"].shape == (layers, 1, 1)
        expected = theta[f"theta.precision.{site}"].rsqrt().expand(layers, rows, columns)
        torch.testing.assert_close(fn.stddev, expected)
        torch.testing.assert_close(model.scales(theta)[site], expected[:, 0, 0])


def test_the_scale_of_a_layer_is_the_spread_of_its_tasks(lm):
    """Most probable given observed phi, in closed form: (a0 - 1 + n / 2) / (b0 + S / 2)."""
    model = LayerwiseScale(lm, lm.sites.initial(), concentration=2.0, rate=0.05)
    truth = {site: value.shape for site, value in lm.sites.initial().items()}
    spread = torch.tensor([0.1, 0.4], dtype=torch.float64).view(1, 1, 2, 1, 1)
    generator = torch.Generator().manual_seed(0)
    phi = {
        s: spread * torch.randn(5, 1, *shape, generator=generator, dtype=torch.float64) for s, shape in truth.items()
    }
    loc = {f"theta.loc.{site}": value.mean((0, 1)) for site, value in phi.items()}
    theta = fit_theta(model, phi, loc)
    for site, value in phi.items():
        squares = (value - loc[f"theta.loc.{site}"]).square().sum((0, 1, 3, 4))
        count = value[:, :, 0].numel()
        expected = (1.0 + count / 2) / (0.05 + squares / 2)
        torch.testing.assert_close(theta[f"theta.precision.{site}"].flatten(), expected, rtol=1e-4, atol=0)
    assert (model.scales(theta)["q_proj.lora_A"] / spread.flatten() - 1).abs().max() < 0.2


def fit_theta(model, phi, fixed=None):
    """The most probable theta given phi of several tasks, ``(T, 1, ...)``; some of it fixed."""
    guide = PointTheta(model)
    names = [name for name in guide.positive if name not in (fixed or {})]

    def program():
        theta = {name: guide.distribution(name).mean for name in names} | (fixed or {})
        trace = pyro.poutine.trace(pyro.condition(model.theta, data=theta)).get_trace()
        trace.compute_log_prob()
        log_prob = sum(site["log_prob_sum"] for name, site in trace.nodes.items() if name in theta)
        return -log_prob - sum(fn.log_prob(phi[site]).sum() for site, fn in model.phi_prior(theta).items())

    optimizer = torch.optim.LBFGS(guide.parameters(), lr=1.0, max_iter=300, line_search_fn="strong_wolfe",
                                  tolerance_grad=1e-9, tolerance_change=1e-12)  # fmt: skip

    def closure():
        optimizer.zero_grad()
        loss = program()
        loss.backward()
        return loss

    optimizer.step(closure)
    return {name: guide.distribution(name).mean.detach() for name in names} | (fixed or {})


def test_relevance_of_ranks(lm):
    """Of three ranks one differs between tasks: the precisions are those of the closed form, and one rank is left."""
    model = RankARD(lm, lm.sites.initial(), random="B", concentration=2.0, rate=0.001)
    generator = torch.Generator().manual_seed(0)
    size = torch.tensor([0.003, 0.5, 0.003], dtype=torch.float64)
    phi = {
        site: size * torch.randn(6, 1, *lm.sites.shapes[site], generator=generator, dtype=torch.float64)
        for site in model.random_sites
    }
    theta = fit_theta(model, phi)
    for site, value in phi.items():
        tasks, (_, rows, _) = len(value), lm.sites.shapes[site]
        loc = value.sum((0, 1)) / (tasks + 1)
        torch.testing.assert_close(theta[f"theta.loc.{site}"], loc, rtol=1e-3, atol=1e-6)
        squares = (value - loc).square().sum((0, 1, 3)) + loc.square().sum(1)
        expected = (1.0 + rows * (tasks + 1) / 2) / (0.001 + squares / 2)
        torch.testing.assert_close(theta[f"theta.precision.{site}"][:, 0], expected, rtol=1e-3, atol=0)
    # A is theta's alone; its rows at their start, for the most probable value of what nothing reads is zero.
    theta |= {f"theta.loc.{site}": v for site, v in lm.sites.initial().items() if ".lora_A" in site}
    for update, rank in model.effective_rank(theta).items():
        assert rank.shape == (lm.sites.delta_shapes[update][0],) and (rank < 1.05).all()
    pruned = model.prune({site: value[0, 0] for site, value in phi.items()} | model.shared(theta), theta)
    for site in lm.sites.shapes:
        dead = pruned[site][:, :, [0, 2]] if ".lora_B" in site else pruned[site][:, [0, 2]]
        assert not dead.any() and pruned[site].any()


def test_effective_rank_of_equal_ranks_is_all_of_them(lm):
    model = RankARD(lm, {site: torch.ones_like(value) for site, value in lm.sites.initial().items()})
    for rank in model.effective_rank(model.initial_theta()).values():
        torch.testing.assert_close(rank, torch.full_like(rank, 3.0))


def test_the_density_of_ranks(lm):
    model = RankARD(lm, lm.sites.initial(), concentration=2.0, rate=0.05, loc_scale=0.7)
    theta = some_theta(model)
    for name, found in log_theta(model, theta).items():
        prior = Gamma(2.0, 0.05)
        if ".loc." in name:
            prior = Normal(0.0, theta[name.replace(".loc.", ".precision.")].rsqrt())
        torch.testing.assert_close(found, prior.log_prob(theta[name]).sum())


def test_the_horseshoe(lm):
    model = RegularizedHorseshoe(lm, lm.sites.initial(), global_scale=(0.2, 0.3), slab=0.6, loc_scale=0.7)
    theta = some_theta(model)
    for name, found in log_theta(model, theta).items():
        tau = 0.3 if ".lora_B" in name else 0.2
        priors = {"loc": Normal(0.0, 0.7), "local": HalfCauchy(1.0), "global": HalfCauchy(tau)}
        torch.testing.assert_close(found, priors[name.split(".")[1]].log_prob(theta[name]).sum())
    site = "q_proj.lora_B"
    tau, lam = theta[f"theta.global.{site}"], theta[f"theta.local.{site}"]
    shrunk = 0.6**2 * lam**2 / (0.6**2 + tau**2 * lam**2)
    torch.testing.assert_close(model.phi_prior(theta)[site].variance, tau**2 * shrunk)
    for scale, expected in ((1e6, 0.6), (1e-6, 1e-6)):  # the slab, and the spike
        theta[f"theta.global.{site}"], theta[f"theta.local.{site}"] = torch.ones_like(tau), scale * torch.ones_like(lam)
        assert float(model.phi_prior(theta)[site].stddev.max()) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("random", ["A", "B", "AB"])
def test_the_independent_normal_is_fixed(lm, random):
    """The loss of a shared posterior, written out: phi_0 and s are not learnt, the other factor is."""
    model = IndependentNormal(lm, lm.sites.initial(), random=random, scale=(0.2, 0.3), loc_scale=0.7)
    guide = SharedMeanField(model)
    with torch.no_grad():
        for parameter in guide.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    objective, episode = BetaELBO(model, guide, beta=0.5), make_episode(lm)
    terms = objective.terms(episode)
    divergence = 0.0
    for site in model.random_sites:
        q = guide.posterior(episode, guide.theta())[site].base_dist
        p = Normal(lm.sites.initial()[site], 0.3 if ".lora_B" in site else 0.2)
        divergence += float(kl_divergence(q, p).sum().detach())
    assert terms["kl"] == pytest.approx(divergence)
    shared = [name for name, _ in guide.named_parameters() if name.startswith("theta")]
    assert len(shared) == (0 if random == "AB" else 3)
    assert not list(model.parameters())
    for name, found in log_theta(model, model.initial_theta()).items():
        torch.testing.assert_close(found, Normal(0.0, 0.7).log_prob(model.initial_theta()[name]).sum())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda lm: IndependentNormal(lm, lm.sites.initial(), random="C"), "random: expected 'A', 'B' or 'AB'"),
        (lambda lm: IndependentNormal(lm, lm.sites.initial(), scale=(0.1, 0.0)), "scale: expected two positive"),
        (lambda lm: RegularizedHorseshoe(lm, lm.sites.initial(), random="C"), "random: expected 'A', 'B' or 'AB'"),
        (lambda lm: RegularizedHorseshoe(lm, lm.sites.initial(), slab=0.0), "positive global_scale and slab"),
        (lambda lm: RankARD(lm, lm.sites.initial(), initial_scale=(0.1, -1.0)), "initial_scale: expected two positive"),
    ],
)
def test_bad_settings_are_refused(lm, make, message):
    with pytest.raises(ConfigError, match=message):
        make(lm)


def test_gradient_steps_keep_an_elementwise_scale(lm):
    """Where the prior has one scale a layer, a task's posterior has one for each weight."""
    model = LayerwiseScale(lm, lm.sites.initial(), initial_scale=(0.2, 0.3))
    guide = GradientGuide(model, steps=1, learning_rate=0.1, optimizer="sgd")
    support = make_episode(lm, count=len(make_tasks(2))).support
    found = guide.posterior(support, model.initial_theta())["q_proj.lora_A"]
    assert found.stddev.shape == (2, 1, *lm.sites.shapes["q_proj.lora_A"])
    assert len(found.stddev.unique()) > 10 and math.isfinite(found.stddev.sum().detach())


def test_what_a_fixed_prior_is_centred_on_is_saved(lm):
    """A posterior may be loaded with a LoRA whose initial values PEFT has drawn again."""
    model, initial = IndependentNormal(lm, lm.sites.initial()), lm.sites.initial()
    other = IndependentNormal(lm, {site: value + 1.0 for site, value in initial.items()})
    other.load_state_dict(model.state_dict())
    for site, fn in other.phi_prior({}).items():
        assert torch.equal(fn.mean, initial[site])
