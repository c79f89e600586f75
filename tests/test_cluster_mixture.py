"""The mixture over clusters of tasks: its density, its bound, and clusters that are found, in float64."""

import math

import pyro
import pytest
import torch
from conjugate import NOISE, RANK, SITE, A, LinearLikelihood, LinearModel, linear_episode
from pyro.infer import TraceMeanField_ELBO
from torch.distributions import Gamma, Independent, Normal

from bayes_lora.elbo import AnalyticELBO, divergence
from bayes_lora.errors import ConfigError
from bayes_lora.families import from_parts, to_parts
from bayes_lora.guides import GradientGuide, MeanField, NormalTheta, PointTheta, SharedMeanField
from bayes_lora.models import ClusterMixture
from bayes_lora.models.cluster_mixture import Mixture
from bayes_lora.objective import BetaELBO

SHAPES = {"q.lora_A": (2, 3, 4), "q.lora_B": (2, 5, 3)}


def noise(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Silent:
    """A likelihood that says nothing."""

    def __call__(self, phi, episode):
        return torch.zeros(episode.shape, dtype=torch.float64)


def mixture(clusters=3, **kwargs):
    initial = {site: noise(*shape, seed=len(site)) for site, shape in SHAPES.items()}
    model = ClusterMixture(Silent(), initial, num_clusters=clusters, **kwargs)
    theta = {name: value + 0.3 * noise(*value.shape, seed=1).abs() for name, value in model.initial_theta().items()}
    return model, theta


def random_mixture(batch=(2, 1)):
    logits = noise(*batch, 3, seed=4)
    normals = pyro.distributions.Normal(noise(3, 2, 3, 4, seed=5), noise(3, 2, 3, 4, seed=6).exp()).to_event(3)
    return Mixture(logits, normals)


def test_the_program_s_density_is_the_mixture_s():
    """Against a loop over tasks, clusters and sites; theta's own density beside it."""
    model, theta = mixture()
    episode = linear_episode(torch.zeros(2, 3, 3), torch.zeros(2, 3))
    phi = {site: noise(2, 1, *shape, seed=7) for site, shape in SHAPES.items()}
    data = theta | {f"phi.{site}": value for site, value in phi.items()}
    trace = pyro.poutine.trace(pyro.condition(model.sample_phi, data=data)).get_trace(episode)
    trace.compute_log_prob()
    expected = 0.0
    log_pi = theta["theta.logits"].flatten().log_softmax(0)
    for t in range(2):
        terms = []
        for k in range(3):
            term = log_pi[k]
            for site, value in phi.items():
                loc, scale = theta[f"theta.loc.{site}"][k], theta[f"theta.precision.{site}"][k].rsqrt()
                term = term + Normal(loc, scale).log_prob(value[t, 0]).sum()
            terms.append(term)
        expected += torch.stack(terms).logsumexp(0)
    found = sum(trace.nodes[f"phi.{site}"]["log_prob_sum"] for site in SHAPES)
    torch.testing.assert_close(found, expected)
    hyper = sum(
        (Gamma(1.0, 0.01) if ".precision." in name else Normal(0.0, 1.0)).log_prob(value).sum()
        for name, value in theta.items()
    )
    torch.testing.assert_close(sum(trace.nodes[name]["log_prob_sum"] for name in theta), hyper)


def test_the_bound_is_above_the_divergence():
    """By Monte Carlo, 4 standard errors; equal where the clusters lie far apart, or there is one."""
    p = random_mixture()
    q = Independent(Normal(noise(2, 1, 2, 3, 4, seed=8), noise(2, 1, 2, 3, 4, seed=9).exp() * 0.5), 3)
    torch.manual_seed(0)
    draws = q.sample((20_000,))
    ratios = q.log_prob(draws) - p.log_prob(draws)
    error = ratios.std(0) / 20_000**0.5
    bound = divergence(q, p)
    assert bound.shape == (2, 1) and (bound > ratios.mean(0) - 4 * error).all()
    far = pyro.distributions.Normal(50.0 * noise(3, 2, 3, 4, seed=5), torch.ones(3, 2, 3, 4).double()).to_event(3)
    apart = Mixture(noise(3, seed=4), far)
    near = Independent(Normal(far.mean[1] + 0.1, 0.7 * far.stddev[1]), 3)
    expected = divergence(near, apart.component(1)) - apart.logits[1]
    torch.testing.assert_close(divergence(near, apart), expected)
    alone = Mixture(torch.zeros(1).double(), pyro.distributions.Normal(far.mean[:1], far.stddev[:1]).to_event(3))
    torch.testing.assert_close(divergence(near, alone), divergence(near, alone.component(0)))


def test_the_bound_over_sites_is_above_the_joint_divergence():
    """Summed as the ELBO does, each site given draws of those before it: 4 standard errors of both."""
    model, theta = mixture(spread=0.6)
    components, log_pi = model.components(theta), model.log_weights(theta)
    q = {
        s: Independent(Normal(noise(*shape, seed=3), 0.1 + noise(*shape, seed=2).abs()), 3)
        for s, shape in SHAPES.items()
    }
    torch.manual_seed(0)
    count = 4000
    draws = {site: fn.sample((count,)) for site, fn in q.items()}
    log_weights, bound, log_p = log_pi.expand(count, 3), 0.0, 0.0
    for site, fn in components.items():
        p = Mixture(log_weights, fn.expand((count, 3)))
        bound = bound + divergence(q[site].expand((count,)), p)
        each = fn.log_prob(draws[site].unsqueeze(-4))
        log_p, log_weights = log_p + each, (log_weights + each).log_softmax(-1)
    joint = sum(q[s].log_prob(v) for s, v in draws.items()) - torch.logsumexp(log_pi + log_p, -1)
    error = ((bound.var(0) + joint.var(0)) / count).sqrt()
    assert bound.mean() > joint.mean() - 4 * error


def test_gradients_of_the_bound():
    p = random_mixture(batch=())
    loc, scale = noise(2, 3, 4, seed=8).requires_grad_(), (noise(2, 3, 4, seed=9).exp() * 0.5).requires_grad_()
    assert torch.autograd.gradcheck(lambda a, b: p.divergence_from(Independent(Normal(a, b), 3)), (loc, scale))


def test_guides_begin_at_its_mean_and_variance():
    """By Monte Carlo, 5.5 standard errors; expanding keeps the type."""
    p = random_mixture()
    start = from_parts(p, to_parts(p))
    torch.manual_seed(0)
    draws = p.sample((20_000,))
    assert ((draws.mean(0) - start.mean) / (start.stddev / 20_000**0.5)).abs().max() < 5.5
    assert (draws.var(0) / start.variance - 1).abs().max() < 0.12
    wide = p.expand((7, 2, 1))
    assert isinstance(wide, Mixture) and wide.sample().shape == (7, 2, 1, 2, 3, 4)


class Clusters(ClusterMixture):
    """Tasks of two kinds over the linear likelihood."""

    def __init__(self):
        super().__init__(
            LinearLikelihood(), {SITE: torch.zeros(1, 1, RANK).double()}, num_clusters=2, spread=2.0, random="B"
        )

    answer, answered = LinearModel.answer, LinearModel.answered


CENTRES = torch.tensor([[1.5, -1.0], [-1.2, 0.8]], dtype=torch.float64)
WITHIN = 0.2


def tasks_of_two_kinds(count=40, examples=8):
    generator = torch.Generator().manual_seed(3)
    kind = (torch.rand(count, generator=generator) < 0.3).long()
    x = torch.randn(count, examples, 3, generator=generator, dtype=torch.float64)
    b = CENTRES[kind] + WITHIN * torch.randn(count, RANK, generator=generator, dtype=torch.float64)
    y = ((x @ A.T) * b[:, None]).sum(-1)
    return kind, linear_episode(x, y + NOISE * torch.randn(y.shape, generator=generator, dtype=torch.float64))


def test_two_kinds_of_tasks_are_found():
    """Centres within a standard error of their tasks' mean and some, sizes, and who belongs where."""
    kind, episode = tasks_of_two_kinds()
    model = Clusters()
    guide = MeanField(model, num_tasks=len(kind))
    objective = BetaELBO(model, guide, num_particles=4)
    optimizer = torch.optim.Adam(objective.parameters(), lr=0.03)
    torch.manual_seed(0)
    for step in range(800):
        optimizer.param_groups[0]["lr"] = 0.03 * (1 - step / 800)
        optimizer.zero_grad()
        objective(episode).backward()
        optimizer.step()
    with torch.no_grad():
        theta = {name: value.detach() for name, value in guide.theta().items()}
        probs = model.cluster_probs(guide.posterior(episode, theta), theta)
    assert probs.shape == (len(kind), 2)
    torch.testing.assert_close(probs.sum(-1), torch.ones(len(kind)).double())
    centres = theta[f"theta.loc.{SITE}"][:, 0, 0]
    first = int((centres[0] - CENTRES[1]).norm() < (centres[0] - CENTRES[0]).norm())  # which kind cluster 0 is
    expected = CENTRES[[first, 1 - first]]
    assert (centres - expected).abs().max() < 0.2
    found = probs.argmax(-1) if first == 0 else 1 - probs.argmax(-1)
    assert (found == kind).double().mean() > 0.97
    share = model.log_weights(theta).detach().exp()[1 - first]  # of the cluster of kind 1
    assert abs(float(share) - float(kind.double().mean())) < 0.08


def test_cluster_probabilities_of_narrow_posteriors_are_the_exact_ones():
    """As q shrinks to a point, they are p(z | phi); stated in closed form."""
    model, theta = mixture()
    phi = {site: theta[f"theta.loc.{site}"][1] + 0.02 * noise(4, 1, *shape) for site, shape in SHAPES.items()}
    q = {site: Independent(Normal(value, torch.full_like(value, 1e-6)), 3) for site, value in phi.items()}
    exact = model.log_weights(theta) + sum(
        fn.log_prob(phi[site].unsqueeze(-4)) for site, fn in model.components(theta).items()
    )
    torch.testing.assert_close(model.cluster_probs(q, theta), exact.softmax(-1).flatten(0, -2), atol=1e-6, rtol=1e-5)


def test_estimators_and_theta_s_draws():
    """Pyro's estimator of the exact log-density does not exceed the bound's loss by more than 4 standard errors."""
    _, episode = tasks_of_two_kinds(count=3)
    for theta in (PointTheta, NormalTheta):
        losses = {}
        for name, make in (("bound", AnalyticELBO), ("exact", TraceMeanField_ELBO)):
            torch.manual_seed(2)
            model = Clusters()
            guide = SharedMeanField(model, theta=theta)
            elbo = make(num_particles=2000, max_plate_nesting=2, vectorize_particles=True)
            values = [BetaELBO(model, guide, elbo=elbo)(episode).detach() for _ in range(8)]
            losses[name] = torch.stack(values)
        error = math.sqrt(sum(float(v.var()) for v in losses.values()) / 8)
        assert losses["bound"].mean() > losses["exact"].mean() - 4 * error


def test_no_steps_of_the_gradient_guide_are_its_moments():
    _, episode = tasks_of_two_kinds(count=3)
    model = Clusters()
    guide = GradientGuide(model, steps=0)
    [fn] = guide.posterior(episode, model.initial_theta()).values()
    assert isinstance(fn, Independent) and isinstance(fn.base_dist, Normal) and fn.batch_shape == (3, 1)


def test_what_is_refused():
    for wrong in (dict(clusters=0), dict(spread=0.0), dict(rate=-1.0), dict(initial_scale=(0.0, 1.0))):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ConfigError, match=f"got .*{name.replace('clusters', 'num_clusters')}="):
            mixture(**wrong)
    with pytest.raises(ConfigError, match="random: expected 'A', 'B' or 'AB', got 'C'"):
        mixture(random="C")
