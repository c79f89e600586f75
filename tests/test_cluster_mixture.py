"""The mixture over clusters of tasks: its density, its bound, and clusters that are found, in float64."""

import math

import pyro
import pytest
import torch
from conjugate import NOISE, RANK, SITE, A, LinearLikelihood, LinearModel, linear_episode
from pyro.infer import SVI, TraceMeanField_ELBO
from torch.distributions import Gamma, Independent, MultivariateNormal, Normal, kl_divergence

from bayes_lora.distributions.divergence import divergence
from bayes_lora.distributions.mixture import Mixture
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.guides import GradientGuide, MeanField, NormalTheta, PointTheta, SharedMeanField
from bayes_lora.guides.family import same_as_prior
from bayes_lora.infer.elbo import AnalyticELBO
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import ClusterMixture, LayerwiseScale
from bayes_lora.posterior.task_posterior import TaskPosterior

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
    start = same_as_prior("q_proj.lora_A", p)
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
            guide = SharedMeanField(model, theta_guide=theta)
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
    with pytest.raises(ConfigError, match="rate: expected a positive number, got -1.0"):
        mixture(rate=-1.0)
    for wrong in (dict(clusters=0), dict(spread=0.0), dict(initial_scale=(0.0, 1.0))):
        name, value = next(iter(wrong.items()))
        with pytest.raises(ConfigError, match=f"got .*{name.replace('clusters', 'num_clusters')}="):
            mixture(**wrong)
    with pytest.raises(ConfigError, match="random: expected 'A', 'B' or 'AB', got 'C'"):
        mixture(random="C")


def of_sites(model, theta, phi):
    """log p(phi | theta, k) + log pi_k by loops, ``(T, K)``."""
    log_pi, tasks = theta["theta.logits"].flatten().log_softmax(0), len(next(iter(phi.values())))
    rows = []
    for t in range(tasks):
        row = []
        for k in range(model.num_clusters):
            term = log_pi[k]
            for site, value in phi.items():
                loc, scale = theta[f"theta.loc.{site}"][k], theta[f"theta.precision.{site}"][k].rsqrt()
                term = term + Normal(loc, scale).log_prob(value[t, 0]).sum()
            row.append(term)
        rows.append(torch.stack(row))
    return torch.stack(rows)


def test_the_order_of_sites_does_not_matter():
    """Each site's density given those before it depends on the order; their product does not."""
    model, theta = mixture(spread=0.6)
    episode = linear_episode(torch.zeros(2, 3, 3), torch.zeros(2, 3))
    phi = {site: theta[f"theta.loc.{site}"][1] + 0.1 * noise(2, 1, *shape, seed=7) for site, shape in SHAPES.items()}
    data = theta | {f"phi.{site}": value for site, value in phi.items()}
    found = []
    for order in (list(SHAPES), list(SHAPES)[::-1]):
        model.random_sites = order
        trace = pyro.poutine.trace(pyro.condition(model.sample_phi, data=data)).get_trace(episode)
        trace.compute_log_prob()
        found.append(torch.stack([trace.nodes[f"phi.{site}"]["log_prob"][:, 0] for site in SHAPES]))
    expected = of_sites(model, theta, phi).logsumexp(-1)
    for each in found:
        torch.testing.assert_close(each.sum(0), expected)
    assert (found[0] - found[1]).abs().max() > 0.01


def test_one_cluster_is_a_normal_prior():
    model, theta = mixture(clusters=1)
    plain = LayerwiseScale(Silent(), model.initial)
    same = {name: value[0] if name != "theta.logits" else value for name, value in theta.items()}
    episode = linear_episode(torch.zeros(2, 3, 3), torch.zeros(2, 3))
    phi = {f"phi.{site}": noise(2, 1, *shape, seed=7) for site, shape in SHAPES.items()}
    found = []
    for program, values in ((model, theta), (plain, same)):
        trace = pyro.poutine.trace(pyro.condition(program.sample_phi, data=values | phi)).get_trace(episode)
        trace.compute_log_prob()
        found.append([trace.nodes[name]["log_prob"] for name in phi])
    torch.testing.assert_close(*found)


def test_a_task_s_sites_are_of_one_cluster():
    """Draws of the program, clusters far apart: both sites of the same one, as often as pi says (5 standard errors)."""
    model, theta = mixture(spread=40.0)
    theta["theta.logits"] = torch.tensor([0.5, 0.2, 0.3]).double().log().view(3, 1, 1)
    count = 2000
    episode = linear_episode(torch.zeros(count, 1, 3), torch.zeros(count, 1))
    with torch.no_grad():
        phi = pyro.condition(model.sample_phi, data=theta)(episode)
    nearest = [
        (value - theta[f"theta.loc.{site}"]).square().sum((-3, -2, -1)).argmin(-1) for site, value in phi.items()
    ]
    assert torch.equal(*nearest) and nearest[0].shape == (count,)
    share = torch.bincount(nearest[0], minlength=3) / count
    pi = theta["theta.logits"].flatten().exp()
    assert ((share - pi).abs() < 5 * (pi * (1 - pi) / count).sqrt()).all()


def test_gradients_of_the_bound_reach_weights_and_clusters():
    """Against autograd of the formula, written out with torch's own divergences."""
    # Near each other, for far apart one cluster would have all the weight and the others no gradient.
    parts = [noise(2, 1, 3, seed=4), 0.1 * noise(3, 2, 3, 4, seed=5), (0.1 * noise(3, 2, 1, 1, seed=6)).exp()]
    ours, theirs = ([value.clone().requires_grad_() for value in parts] for _ in range(2))
    q = Independent(Normal(0.3 * noise(2, 1, 2, 3, 4, seed=8), (0.3 * noise(2, 1, 2, 3, 4, seed=9)).exp()), 3)
    found = Mixture(ours[0], pyro.distributions.Normal(*ours[1:]).to_event(3)).divergence_from(q)
    terms = []
    for k in range(3):
        kl = torch.distributions.kl_divergence(q, Independent(Normal(theirs[1][k], theirs[2][k].expand(2, 3, 4)), 3))
        terms.append(theirs[0].log_softmax(-1)[..., k] - kl)
    expected = -torch.stack(terms).logsumexp(0)
    torch.testing.assert_close(found, expected)
    cotangent = noise(2, 1, seed=10)
    for got, want in zip(
        torch.autograd.grad(found, ours, cotangent), torch.autograd.grad(expected, theirs, cotangent), strict=True
    ):
        assert want.abs().min() > 1e-6
        torch.testing.assert_close(got, want)


def test_the_bound_of_a_point():
    """Of a point it is no bound but the negative log-density itself."""
    p = random_mixture(batch=())
    point = noise(4, 1, 2, 3, 4, seed=8)
    torch.testing.assert_close(divergence(pyro.distributions.Delta(point, event_dim=3), p), -p.log_prob(point))


def exact_clusters(theta, examples):
    """Of 12 linear tasks: log p(k | data) ``(T, K)`` of the evidence, and per cluster p(phi | data, k), ``(T, r)``."""
    # Orthogonal columns: given a cluster, a posterior's elements are independent.
    f, _ = torch.linalg.qr(noise(12, examples, RANK, seed=examples))
    f = f * torch.tensor([2.5, 1.2]).double() * (examples / 4) ** 0.5
    locs, scales = theta[f"theta.loc.{SITE}"][:, 0, 0], theta[f"theta.precision.{SITE}"].flatten().rsqrt()
    b = locs[[0, 1] * 6] + 0.6 * noise(12, RANK, seed=2)
    y = (f * b[:, None]).sum(-1) + NOISE * noise(12, examples, seed=3)
    log_joint, posteriors = [], []
    for log_pi, loc, tau in zip(theta["theta.logits"].flatten().log_softmax(0), locs, scales, strict=True):
        covariance = NOISE**2 * torch.eye(examples).double() + tau**2 * f @ f.mT
        log_joint.append(log_pi + MultivariateNormal(f @ loc, covariance).log_prob(y))
        precision = f.square().sum(1) / NOISE**2 + tau**-2
        mean = ((f * y[..., None]).sum(1) / NOISE**2 + loc / tau**2) / precision
        posteriors.append(Normal(mean, precision.rsqrt()))
    return torch.stack(log_joint, -1).log_softmax(-1), posteriors


@pytest.mark.parametrize(("examples", "within"), [(4, 0.3), (400, 0.005)])
def test_cluster_probabilities_against_the_exact_ones(examples, within):
    """Linear and conjugate: log r_k + KL(q || p(phi | data, k)) is log p(k | data) up to a constant, whatever q.

    With q the posterior given the likelier cluster they are near the exact ones, the nearer the more examples there
    are, and name the same cluster; clusters overlap.
    """
    theta = {
        "theta.logits": torch.tensor([0.3, -0.2]).double().view(2, 1, 1),
        f"theta.loc.{SITE}": torch.tensor([[0.6, -0.4], [-0.3, 0.5]]).double().view(2, 1, 1, RANK),
        f"theta.precision.{SITE}": torch.tensor([0.5, 0.8]).double().pow(-2).view(2, 1, 1, 1),
    }
    exact, posteriors = exact_clusters(theta, examples)
    likelier = exact.argmax(-1)
    assert (exact.exp().amax(-1) < 0.97).sum() > 5 and len(likelier.unique()) == 2
    best = Normal(*(torch.where(likelier[:, None] == 0, *pair) for pair in
                    ([p.mean for p in posteriors], [p.stddev for p in posteriors])))  # fmt: skip
    for q in (best, Normal(best.mean + 0.2, 1.3 * best.stddev)):
        at_site = Independent(Normal(*(value.view(12, 1, 1, 1, RANK) for value in (q.mean, q.stddev))), 3)
        probs = Clusters().cluster_probs({SITE: at_site}, theta)
        gap = torch.stack([kl_divergence(q, p).sum(-1) for p in posteriors], -1)
        torch.testing.assert_close((probs.log() + gap).log_softmax(-1), exact)
        if q is best:
            assert torch.equal(probs.argmax(-1), likelier) and (probs - exact.exp()).abs().max() < within


def test_cluster_probabilities_of_adapted_tasks(lm):
    """Those of TaskPosterior.distributions(), by loops; leading components and draws of theta are kept."""
    model = ClusterMixture(lm, lm.sites.initial(), num_clusters=3, random="B")
    theta = {name: value + 0.02 * noise(*value.shape, seed=1) for name, value in model.initial_theta().items()}
    loc = {site: 0.02 * noise(2, 1, *shape, seed=len(site)) for site, shape in lm.sites.shapes.items()}
    scale = {site: torch.full_like(loc[site], 0.04) for site in model.random_sites}
    normals = {site: pyro.distributions.Normal(loc[site], scale[site]).to_event(3) for site in model.random_sites}
    q = TaskPosterior(lm, normals, {}, ("one", "other")).distributions()
    found = model.cluster_probs(q, theta)
    assert found.shape == (2, 3)
    log_pi = theta["theta.logits"].flatten().log_softmax(0)
    for t in range(2):
        expected = log_pi.clone()
        for k in range(3):
            for site in model.random_sites:
                p = Normal(theta[f"theta.loc.{site}"][k], theta[f"theta.precision.{site}"][k].rsqrt())
                expected[k] -= kl_divergence(Normal(loc[site][t, 0], scale[site][t, 0]), p).sum()
        torch.testing.assert_close(found[t], expected.softmax(0))
    draws = {name: value.expand(5, 1, 1, *value.shape) for name, value in theta.items()}
    torch.testing.assert_close(model.cluster_probs(q, draws), found.expand(5, 2, 3))
    members = {site: fn.expand((4, 2, 1)) for site, fn in q.items()}
    torch.testing.assert_close(model.cluster_probs(members, theta), found.expand(4, 2, 3))


@pytest.mark.parametrize("theta_guide", [PointTheta, NormalTheta])
def test_pyro_s_estimator_is_the_explicit_density_s(theta_guide):
    """Of the same draws, two sites and a plate of theta's draws: log q - log p of the mixture by loops, to rounding."""
    model, _ = mixture(spread=0.6)
    guide, count = SharedMeanField(model, theta_guide=theta_guide), 6
    episode = linear_episode(torch.zeros(2, 3, 3), torch.zeros(2, 3))

    def both():
        with pyro.plate("draws", count, dim=-3):
            guide_trace = pyro.poutine.trace(guide).get_trace(episode)
            model_trace = pyro.poutine.trace(pyro.poutine.replay(model.sample_phi, guide_trace)).get_trace(episode)
        return guide_trace, model_trace

    q, p = both()
    for trace in (q, p):
        trace.compute_log_prob()
    found = sum(p.nodes[f"phi.{site}"]["log_prob"] for site in SHAPES)
    assert found.shape == (count, 2, 1)
    for s in range(count):
        names = [name for name in p.nodes if name.startswith("theta.")]
        theta = {n: v.expand(count, 1, 1, *v.shape[-p.nodes[n]["fn"].event_dim :])[s, 0, 0]
                 for n in names for v in [p.nodes[n]["value"]]}  # fmt: skip
        phi = {site: p.nodes[f"phi.{site}"]["value"][s] for site in SHAPES}
        torch.testing.assert_close(found[s, :, 0], of_sites(model, theta, phi).logsumexp(-1))


def test_estimators_agree_with_a_loop():
    """TraceMeanField_ELBO's mean is that of log q - log p by loops; the bound's is above: 4 standard errors.

    Two sites, q(phi) between two clusters, so that the bound is not tight.
    """
    model, _ = mixture(spread=0.1)
    guide, count = SharedMeanField(model), 1000
    episode = linear_episode(torch.zeros(2, 3, 3), torch.zeros(2, 3))
    losses = {}
    for name, make in (("exact", TraceMeanField_ELBO), ("bound", AnalyticELBO)):
        torch.manual_seed(4)
        elbo = make(num_particles=count, max_plate_nesting=2, vectorize_particles=True)
        objective = BetaELBO(model, guide, elbo=elbo)
        losses[name] = torch.stack([objective(episode).detach() for _ in range(4)])
    with torch.no_grad():
        theta = guide.theta()
        q = {site: fn.base_dist for site, fn in guide.posterior(episode, theta).items()}
        torch.manual_seed(5)
        draws = [{site: fn.sample() for site, fn in q.items()} for _ in range(count)]
        log_p = torch.stack([of_sites(model, theta, phi).logsumexp(-1).sum() for phi in draws])
        log_q = torch.stack([sum(fn.log_prob(phi[site]).sum() for site, fn in q.items()) for phi in draws])
        hyper = pyro.poutine.trace(pyro.condition(model.theta, data=theta)).get_trace().log_prob_sum()
    loop = log_q - log_p - hyper + 6 * math.log(2.0)  # Silent: two options alike, of 2 tasks with 3 examples
    exact, bound = losses["exact"], losses["bound"]
    error = math.sqrt(float(exact.var()) / 4 + float(loop.var()) / count)
    assert abs(float(exact.mean() - loop.mean())) < 4 * error
    assert bound.mean() > loop.mean() + 4 * error


def test_svi_runs_with_both_estimators():
    _, episode = tasks_of_two_kinds(count=3)
    for make in (TraceMeanField_ELBO, AnalyticELBO):
        model = Clusters()
        guide = SharedMeanField(model)
        svi = SVI(model, guide, pyro.optim.Adam({"lr": 0.02}), make(num_particles=8, max_plate_nesting=2,
                                                                 vectorize_particles=True))  # fmt: skip
        torch.manual_seed(0)
        losses = [svi.step(episode) for _ in range(60)]
        assert sum(losses[-10:]) < sum(losses[:10]) - 10


def test_the_start_is_fixed_and_draws_no_random_numbers():
    model, _ = mixture(spread=0.5)
    before = torch.get_rng_state()
    one, other = model.initial_theta(), model.initial_theta()
    assert torch.equal(before, torch.get_rng_state())
    for name, value in one.items():
        assert torch.equal(value, other[name]) and value.shape == model.theta()[name].shape
    for site, start in model.initial.items():
        away = (one[f"theta.loc.{site}"] - start) / (0.5 * model.initial_scale[".lora_B" in site])
        assert away.shape == (3, *start.shape) and 0.7 < away.std() < 1.3
        assert (away[0] - away[1]).abs().min() > 0


def test_shapes_are_checked(lm):
    wide = random_mixture().expand((7, 2, 1))
    with pytest.raises(ValueError, match="right-most size of value must match event_shape"):
        wide.log_prob(torch.zeros(2, 3, 1).double())
    with pytest.raises(RuntimeError, match="[Ss]hape mismatch|broadcast"):
        Mixture(torch.zeros(4), random_mixture().component_distribution)
    initial = lm.sites.initial()
    site = next(iter(initial))
    with pytest.raises(SiteError, match=site):
        ClusterMixture(lm, initial | {site: initial[site][:1]})
