"""AnalyticELBO against Pyro's own estimators: values, gradients, what it keeps, and what it refuses."""

import math
from contextlib import nullcontext

import pyro
import pyro.distributions as dist
import pytest
import torch
from conftest import make_tasks
from lm_helpers import make_episode
from objectives import mean_theta, network_objective
from pyro.infer import SVI, Trace_ELBO, TraceMeanField_ELBO
from pyro.infer.autoguide import AutoLowRankMultivariateNormal
from torch import nn
from torch.autograd import gradcheck, gradgradcheck

from bayes_lora.distributions.divergence import divergence
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.guides import NormalTheta, PointTheta
from bayes_lora.infer.elbo import AnalyticELBO
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import IndependentNormal
from bayes_lora.posterior.adapt import adapt


def loss_and_gradients(objective, episode):
    objective.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    loss = objective(episode)
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in objective.named_parameters()}


@pytest.mark.parametrize("theta", [PointTheta, NormalTheta])  # LogNormal against Gamma has no closed form
def test_values_and_gradients_are_pyro_s(lm, theta):
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    objective = network_objective(lm, theta_guide=theta)
    assert isinstance(objective.elbo, AnalyticELBO)
    loss, gradients = loss_and_gradients(objective, episode)
    objective.elbo = TraceMeanField_ELBO()
    expected, theirs = loss_and_gradients(objective, episode)
    torch.testing.assert_close(loss, expected)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, theirs[name])


def observations(shared=True):
    """A location of each of two tasks, of which three values are observed, one of them absent."""
    values = torch.tensor([[0.3, -1.0, 2.0], [1.5, 0.2, -0.4]], dtype=torch.float64)
    present = torch.tensor([[True, True, True], [True, True, False]])

    def model():
        with pyro.plate("task", 2, dim=-2):
            z = pyro.sample("z", dist.Normal(torch.zeros(2, 1, dtype=torch.float64), 1.0))
            with pyro.plate("example", 3, dim=-1), pyro.poutine.scale(scale=1.5), pyro.poutine.mask(mask=present):
                pyro.sample("answer", dist.Normal(z, 0.7), obs=values)

    def guide():
        with pyro.plate("task", 2, dim=-2):
            pyro.sample("z", dist.Normal(torch.tensor([[0.4], [-0.2]], dtype=torch.float64), 0.8))

    return model, guide, values, present


def test_the_predictive_loss_averages_draws_inside_the_logarithm():
    model, guide, values, present = observations()
    elbo = AnalyticELBO(5, max_plate_nesting=2, vectorize_particles=True, predictive=True)
    torch.manual_seed(2)
    [(_, trace)] = list(elbo._get_traces(model, guide, (), {}))
    z = trace.nodes["z"]["value"]
    assert z.shape == (5, 2, 1)
    likelihood = dist.Normal(z, 0.7).log_prob(values).exp().mean(0).log()
    q = torch.distributions.Normal(torch.tensor([0.4, -0.2], dtype=torch.float64), 0.8)
    divergence_of_z = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum()
    torch.manual_seed(2)
    torch.testing.assert_close(
        elbo.differentiable_loss(model, guide), divergence_of_z - 1.5 * likelihood[present].sum()
    )


def test_the_predictive_loss_of_many_draws_is_the_log_density_of_predictions():
    """By Monte Carlo, within five standard errors: the predictive distribution is normal here."""
    model, guide, values, present = observations()
    torch.manual_seed(3)
    elbo = AnalyticELBO(20_000, max_plate_nesting=2, vectorize_particles=True, predictive=True)
    loc = torch.tensor([[0.4], [-0.2]], dtype=torch.float64)
    predictive = dist.Normal(loc, math.hypot(0.8, 0.7)).log_prob(values)[present].sum()
    q = torch.distributions.Normal(loc, 0.8)
    expected = torch.distributions.kl_divergence(q, torch.distributions.Normal(0.0, 1.0)).sum() - 1.5 * predictive
    found = elbo.differentiable_loss(model, guide)
    # The variance of p(y | z) / p(y) is at most the ratio of its maximum and p(y), below 20 for each of five values.
    assert abs(float(found - expected)) < 5 * 1.5 * 5 * math.sqrt(20 / 20_000)
    plain = AnalyticELBO(20_000, max_plate_nesting=2, vectorize_particles=True).differentiable_loss(model, guide)
    assert float(plain) > float(found) + 1.0  # Jensen's inequality


def test_the_predictive_loss_needs_several_draws_in_one_forward(lm):
    model = IndependentNormal(lm)
    with pytest.raises(ConfigError, match=r"predictive: expected at least two particles.*num_particles=1"):
        BetaELBO(model, model, predictive=True)
    with pytest.raises(ConfigError, match="predictive: expected no elbo as well"):
        BetaELBO(model, model, predictive=True, num_particles=2, elbo=Trace_ELBO())
    assert BetaELBO(model, model, predictive=True, num_particles=2).elbo.predictive


def test_the_predictive_loss_trains_a_guide_network(lm):
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    objective = network_objective(lm, theta_guide=PointTheta)
    objective.elbo = AnalyticELBO(4, max_plate_nesting=2, vectorize_particles=True, predictive=True)
    torch.manual_seed(5)
    loss = objective(episode)
    objective.elbo = AnalyticELBO(4, max_plate_nesting=2, vectorize_particles=True)
    torch.manual_seed(5)
    assert float(loss.detach()) < float(objective(episode).detach())
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in objective.guide.theta.parameters())


def normals():
    """Parameters whose shapes broadcast: a task's own q, a shared scale, p of all tasks."""
    generator = torch.Generator().manual_seed(3)
    shapes = [(2, 1, 3, 4), (3, 4), (3, 1), (4,)]
    values = [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return [(value.exp() if i % 2 else value).requires_grad_() for i, value in enumerate(values)]


def test_divergence_of_normals():
    loc, scale, prior_loc, prior_scale = normals()
    q, p = (dist.Normal(*pair).to_event(2) for pair in ((loc, scale), (prior_loc, prior_scale)))
    found = divergence(q, p.expand([2, 1]))
    assert found.shape == (2, 1)
    torch.testing.assert_close(found, torch.distributions.kl_divergence(q, p.expand([2, 1])))
    draws = q.sample((200_000,))
    ratio = q.log_prob(draws) - p.log_prob(draws)
    assert ((ratio.mean(0) - found).abs() < 5 * ratio.std(0) / 200_000**0.5).all()


def test_only_plain_normals_are_normals():
    """A masked one counts where its mask is true; a transformed one is another distribution."""
    mask = torch.tensor([True, False, True])
    q, p = (dist.Normal(torch.full((3,), loc), 1.0).mask(mask) for loc in (1.0, 0.0))
    torch.testing.assert_close(divergence(q, p), torch.tensor([0.5, 0.0, 0.5]))
    moved = dist.TransformedDistribution(dist.Normal(0.0, 1.0), [dist.transforms.AffineTransform(3.0, 2.0)])
    with pytest.raises(NotImplementedError):
        divergence(moved, dist.Normal(0.0, 1.0))


def test_gradients_of_the_divergence_of_normals():
    def function(loc, scale, prior_loc, prior_scale):
        return divergence(dist.Normal(loc, scale).to_event(2), dist.Normal(prior_loc, prior_scale).to_event(2))

    assert gradcheck(function, normals())
    assert gradgradcheck(function, normals())


def saved_bytes(objective, episode):
    """Bytes of the tensors that forward keeps for backward, each memory counted once."""
    kept = {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = objective(episode)
    assert loss.requires_grad
    return sum(kept.values())


class Far(nn.Module):
    """A likelihood that keeps nothing: what is kept is the estimator's and the guide's."""

    hidden_size = 16

    def __init__(self, lm):
        super().__init__()
        self.features = lm.features

    def forward(self, phi, episode):
        return sum(value.sum() for value in phi.values()) * 1e-6 + torch.zeros(episode.shape, dtype=torch.float64)


def test_it_keeps_less(lm):
    episode, objective = make_episode(lm), network_objective(lm)
    objective.model.likelihood = Far(lm)
    ours = saved_bytes(objective, episode)
    objective.elbo = TraceMeanField_ELBO()
    phi = sum(2 * value.numel() * 8 for value in lm.sites.initial().values())  # of two tasks
    assert ours < saved_bytes(objective, episode) - 3 * phi


def test_latent_log_densities_are_not_computed(lm, monkeypatch):
    calls = []
    log_prob = dist.Normal.log_prob
    monkeypatch.setattr(dist.Normal, "log_prob", lambda self, value: calls.append(self) or log_prob(self, value))
    objective, episode = network_objective(lm), make_episode(lm)
    objective(episode)
    theta = len(objective.model.initial)  # a point's divergence is the prior's density there
    assert len(calls) == theta


def test_particles_are_averaged_in_one_forward(lm):
    """The mean over draws of phi of the loss, with the language model called once for all of them."""
    episode = make_episode(lm)
    single = network_objective(lm)
    many = BetaELBO(single.model, single.guide, beta=0.3, gamma=0.7, num_particles=3).eval()
    calls, likelihood = [], single.model.likelihood

    def watched(phi, episode):
        calls.append({site: value.detach() for site, value in phi.items()})
        return likelihood(phi, episode)

    watched.features, watched.hidden_size = likelihood.features, likelihood.hidden_size
    single.model.likelihood = watched
    torch.manual_seed(1)
    loss = many(episode)
    assert len(calls) == 1
    phi = calls[0]
    assert phi["q_proj.lora_A"].shape[:3] == (3, 2, 1)
    log_lik = likelihood(phi, episode).log_softmax(-1).gather(-1, episode.answer.expand(3, 2, -1)[..., None])[..., 0]
    nll = -(log_lik * episode.mask).sum() / 3
    terms = single.terms(episode)
    prior = (loss_and_gradients(single, episode)[0] - torch.tensor(_nll(single, episode)) - 0.3 * terms["kl"]) / 0.7
    torch.testing.assert_close(loss.detach(), nll.detach() + 0.3 * terms["kl"] + 0.7 * prior)
    with pytest.raises(ConfigError, match="num_particles: expected at least 1, got 0"):
        BetaELBO(single.model, single.guide, num_particles=0)


def _nll(objective, episode):
    torch.manual_seed(5)
    return objective.terms(episode)["nll"]


def coin():
    p = pyro.sample("p", dist.Beta(2.0, 3.0))
    with pyro.plate("data", 3, dim=-1):
        pyro.sample("x", dist.Bernoulli(p), obs=torch.tensor([1.0, 0.0, 1.0]))


class Posterior(pyro.nn.PyroModule):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(3.0)), nn.Parameter(torch.tensor(1.5))

    def forward(self):
        pyro.sample("p", dist.Beta(self.a, self.b))


def test_any_family_and_svi():
    """Beta against Beta; SVI reads the loss and the gradients."""
    guide = Posterior()
    for elbo in (AnalyticELBO(), TraceMeanField_ELBO()):
        torch.manual_seed(0)
        loss = elbo.differentiable_loss(coin, guide)
        loss.backward()
        torch.manual_seed(0)
        svi = SVI(coin, guide, pyro.optim.Adam({"lr": 0.1}), loss=elbo)
        assert svi.evaluate_loss() == pytest.approx(float(loss.detach()))
    torch.testing.assert_close(guide.a.grad / 2, _expected_gradient(guide))


def _expected_gradient(guide):
    torch.manual_seed(0)
    [gradient] = torch.autograd.grad(TraceMeanField_ELBO().differentiable_loss(coin, guide), guide.a)
    return gradient


def test_auxiliary_sites_of_the_guide_count():
    def guide():
        shift = pyro.sample("shift", dist.Normal(0.3, 2.0), infer={"is_auxiliary": True})
        pyro.sample("z", dist.Delta(shift + 1.0))

    def model():
        pyro.sample("z", dist.Normal(0.0, 1.5))

    torch.manual_seed(0)
    loss = AnalyticELBO().differentiable_loss(model, guide)
    torch.manual_seed(0)
    torch.testing.assert_close(loss, TraceMeanField_ELBO().differentiable_loss(model, guide))
    torch.manual_seed(0)
    trace = pyro.poutine.trace(guide).get_trace()
    shift = trace.nodes["shift"]["value"]
    by_hand = dist.Normal(0.3, 2.0).log_prob(shift) - dist.Normal(0.0, 1.5).log_prob(shift + 1.0)
    torch.testing.assert_close(loss, by_hand)


def test_what_cannot_be_reparameterised_is_refused():
    def model():
        pyro.sample("k", dist.Bernoulli(0.3))

    def guide():
        pyro.sample("k", dist.Bernoulli(torch.tensor(0.4, requires_grad=True)))

    with pytest.raises(NotImplementedError, match="site 'k': expected a reparameterised distribution, got Bernoulli"):
        AnalyticELBO().differentiable_loss(model, guide)
    Trace_ELBO().differentiable_loss(model, guide)


def test_misplaced_plates_are_named(lm):
    """As by Pyro's estimators: a batch dimension without a plate."""

    def model():
        pyro.sample("z", dist.Normal(torch.zeros(4), 1.0))

    with pytest.raises(ValueError, match='at site "z", invalid log_prob shape'):
        AnalyticELBO(max_plate_nesting=2).differentiable_loss(model, model)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q: q | {"phi.o_proj.lora_C": q["phi.o_proj.lora_B"]}, r"'phi.o_proj.lora_C': sampled by the guide"),
        (
            lambda q: {n: fn for n, fn in q.items() if "phi.v_" not in n},
            r"'phi.v_proj.lora_B': sampled by the model but not by the guide",
        ),
        (
            lambda q: q | {"theta.loc.q_proj.lora_A": dist.Delta(q["theta.loc.q_proj.lora_A"].v, event_dim=2)},
            r"'theta.loc.q_proj.lora_A': expected event shape \(2, 3, 16\) .*, got \(3, 16\) from the guide",
        ),
        (
            lambda q: q | {"phi.q_proj.lora_B": dist.Normal(torch.zeros(2, 3, 16), torch.ones(2, 3, 16)).to_event(3)},
            r"'q_proj.lora_B': expected event shape \(2, 16, 3\) .*, got \(2, 3, 16\). Is it transposed",
        ),
    ],
)
def test_sites_that_do_not_match_are_named(lm, change, message):
    model = IndependentNormal(lm, lm.sites.initial(), random="B")
    theta = {name: dist.Delta(value, event_dim=3) for name, value in model.initial_theta().items()}
    fns = change(theta | {f"phi.{site}": fn for site, fn in model.phi_prior({}).items()})

    def guide(episode):
        tasks = pyro.plate("task", 2, dim=-2)
        for name, fn in fns.items():
            with tasks if name.startswith("phi.") else nullcontext():
                pyro.sample(name, fn)

    with pytest.raises(SiteError, match=message):
        BetaELBO(model, guide)(make_episode(lm))


@pytest.mark.parametrize(("bad", "where"), [(0, "the first site"), (1, "the site after 'phi.q_proj.lora_B'")])
def test_a_scale_that_is_not_positive_is_placed(lm, bad, where):
    """torch names the parameter and the constraint, we the site and the cure."""
    model = IndependentNormal(lm, lm.sites.initial(), random="B")

    def narrow(episode):
        with pyro.plate("task", 2, dim=-2):
            for i, (site, fn) in enumerate(model.phi_prior({}).items()):
                scale = torch.full_like(fn.mean, -0.1 if i == bad else 0.1)
                pyro.sample(f"phi.{site}", dist.Normal(fn.mean, scale).to_event(3))

    with pytest.raises(SiteError, match=f"{where}: Expected parameter scale .* A scale must be positive: apply"):
        BetaELBO(model, narrow)(make_episode(lm))


def test_a_prior_on_modules_that_the_language_model_lacks(lm):
    """Said when the prior is made, with what there is."""
    initial = lm.sites.initial()
    wrong = initial | {"k_proj.lora_A": initial["q_proj.lora_A"]}
    with pytest.raises(
        SiteError,
        match=r"site 'k_proj.lora_A': the model has no such site \(did you mean 'v_proj.lora_A' or 'q_proj.lora_A'",
    ):
        IndependentNormal(lm, wrong)
    with pytest.raises(SiteError, match="site 'q_proj.lora_A': no value given"):
        IndependentNormal(lm, {site: value for site, value in initial.items() if site != "q_proj.lora_A"})
    with pytest.raises(SiteError, match="site 'q_proj.lora_B': expected event shape .* Is it transposed"):
        IndependentNormal(lm, initial | {"q_proj.lora_B": initial["q_proj.lora_B"].mT})


def test_pyro_s_autoguides_are_weighed_by_beta(lm):
    """The latent variable that they share is: the loss has no divergence but that of beta, and gamma cannot differ."""
    model = IndependentNormal(lm, lm.sites.initial(), random="B")
    guide, episode = AutoLowRankMultivariateNormal(model, init_scale=0.05, rank=2), make_episode(lm)
    guide(episode)  # its parameters are made, under draws of their own
    torch.manual_seed(1)
    loss = BetaELBO(model, guide, beta=0.01)(episode).detach()
    torch.manual_seed(1)
    trace = pyro.poutine.trace(guide).get_trace(episode)
    trace.compute_log_prob()
    replayed = pyro.poutine.trace(pyro.poutine.replay(model, trace)).get_trace(episode)
    replayed.compute_log_prob()
    answer = replayed.nodes["answer"]["log_prob_sum"]
    expected = -answer - 0.01 * (replayed.log_prob_sum() - answer - trace.log_prob_sum())
    torch.testing.assert_close(loss, expected.detach())
    tasks = [task.split(3, seed=1) for task in make_tasks(2).values()]
    with pytest.raises(
        ConfigError, match="adapt: expected a HierarchicalModel, and a guide that samples each phi site"
    ):
        adapt(BetaELBO(model, guide, beta=0.01), lm, tasks)
    with pytest.raises(ConfigError, match="gamma: expected beta, 0.01, because site '_AutoLowRank.*; got 0.5"):
        BetaELBO(model, guide, beta=0.01, gamma=0.5)(episode)


def test_backward_through_the_guide_network_keeps_one_tensor_per_task_and_site(lm):
    """The standard deviation; the shift of the mean is computed again, with the same gradient."""
    objective = network_objective(lm)
    support = make_episode(lm)
    theta, guide = mean_theta(objective.guide), objective.guide
    kept = []

    def pack(tensor):
        if tensor.ndim == 5 and tensor.shape[0] == 2:
            kept.append(tensor.untyped_storage().data_ptr())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        posterior = guide.posterior(support, theta)
    assert len(set(kept)) == len(posterior) > 0
    parameters = [p for name, p in guide.named_parameters() if "theta" not in name]
    found = torch.autograd.grad(sum((fn.mean**2).sum() for fn in posterior.values()), parameters, allow_unused=True)
    step = 1e-6
    for parameter, gradient in zip(parameters, found, strict=True):
        if gradient is None:
            continue
        place = gradient.abs().argmax()
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.view(-1)[place] += sign * step
                values.append(sum((fn.mean**2).sum() for fn in guide.posterior(support, theta).values()))
                parameter.view(-1)[place] -= sign * step
        slope = (values[0] - values[1]) / (2 * step)
        torch.testing.assert_close(gradient.view(-1)[place], slope, rtol=1e-5, atol=1e-7)
