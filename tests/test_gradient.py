"""The gradient guide: its gradients of first and second order, tasks together and alone, on a tiny language model."""

import pyro
import pytest
import torch
from conftest import make_tasks
from conjugate import LinearModel, linear_episode, make_data
from lm_helpers import make_episode
from objectives import mean_theta

from bayes_lora.distributions.unconstrained import unconstrained
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, GuideNetwork, NormalTheta, PointTheta, SharedPoint
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi
from bayes_lora.models import HierarchicalNormal


def fixed_noise(monkeypatch):
    """Every normal draws the same, whatever the batch; so that what has another batch can be compared."""

    def noise(shape, dtype, device):
        event = torch.linspace(-1.2, 1.0, shape[-1] * shape[-2] * shape[-3], dtype=dtype, device=device)
        return event.view(shape[-3:]).expand(shape)

    monkeypatch.setattr("torch.distributions.normal._standard_normal", noise)


def linear_objective(**kwargs):
    x, _, y = make_data(tasks=2, examples=3)
    query_x, _, query_y = make_data(tasks=2, examples=4, seed=5)
    model = LinearModel()
    guide = GradientGuide(model, steps=2, learning_rate=0.05, **kwargs).double()
    return BetaELBO(model, guide, beta=0.6), linear_episode(query_x, query_y, linear_episode(x, y))


def check_finite_differences(objective, loss, parameters, tolerance=1e-6):
    """The gradient of ``loss()``, element by element, by central differences."""
    gradients = torch.autograd.grad(loss(), parameters, allow_unused=True)
    for parameter, gradient in zip(parameters, gradients, strict=True):
        assert gradient is not None and gradient.abs().max() > 0
        flat = parameter.detach().view(-1)
        for i in range(0, flat.numel(), max(1, flat.numel() // 5)):
            value, step = float(flat[i]), 1e-5
            with torch.no_grad():
                ends = []
                for sign in (1, -1):
                    flat[i] = value + sign * step
                    with torch.enable_grad():
                        ends.append(float(loss().detach()))
                flat[i] = value
            expected = (ends[0] - ends[1]) / (2 * step)
            assert float(gradient.view(-1)[i]) == pytest.approx(expected, rel=1e-4, abs=tolerance)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_second_order_gradients_are_finite_differences(optimizer):
    objective, episode = linear_objective(second_order=True, optimizer=optimizer, learn_rates=True)

    def loss():
        torch.manual_seed(2)
        return objective(episode)

    check_finite_differences(objective, loss, list(objective.parameters()))


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_first_order_holds_the_displacement_constant(optimizer, monkeypatch):
    objective, episode = linear_objective(optimizer=optimizer)
    guide, model = objective.guide, objective.model
    [theta] = objective.parameters()
    torch.manual_seed(2)
    loss = objective(episode)
    [gradient] = torch.autograd.grad(loss, [theta])
    torch.manual_seed(2)
    start = model.phi_prior(model.initial_theta())
    mean = mean_theta(guide)
    moved = guide.displacement(episode.support, mean, start)
    state = torch.get_rng_state()
    monkeypatch.setattr(guide, "displacement", lambda *_: moved)

    def frozen():
        torch.set_rng_state(state)
        return objective(episode)

    torch.testing.assert_close(frozen(), loss)
    torch.testing.assert_close(torch.autograd.grad(frozen(), [theta])[0], gradient)
    check_finite_differences(objective, frozen, [theta])


def test_first_and_second_order_differ():
    gradients = []
    for second in (False, True):
        objective, episode = linear_objective(second_order=second, optimizer="sgd")
        torch.manual_seed(2)
        gradients.append(torch.autograd.grad(objective(episode), list(objective.parameters()))[0])
    assert not torch.allclose(*gradients, rtol=1e-2)


def build(lm, **kwargs):
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.3, 0.2))
    guide = GradientGuide(model, **dict(steps=3, learning_rate=0.01, beta=0.1) | kwargs)
    return BetaELBO(model, guide, beta=0.1)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_tasks_together_equal_tasks_alone(any_lm, optimizer, monkeypatch):
    """Also where the episode stands for a larger collection, and support sets are of different sizes."""
    fixed_noise(monkeypatch)
    guide = build(any_lm, optimizer=optimizer, num_particles=2).guide
    tasks = list(make_tasks(2).values())
    rows = [any_lm.encoder(task.examples[: 2 + t]) for t, task in enumerate(tasks)]
    theta = mean_theta(guide)
    together = guide.posterior(collate(rows, num_data=[9, 9], task_index=[3, 5], num_tasks=8), theta)
    for t, row in enumerate(rows):
        alone = guide.posterior(collate([row]), theta)
        for site, fn in together.items():
            expected = unconstrained(alone[site])
            for part, value in unconstrained(fn).items():
                # Adam's first steps are signs, so what float32 rounds inside of the model is enlarged.
                torch.testing.assert_close(value[t], expected[part][0], rtol=1e-4, atol=1e-5)


def test_one_plain_step_is_the_gradient_of_the_support_s_elbo(lm, monkeypatch):
    fixed_noise(monkeypatch)
    objective, episode = build(lm, steps=1, optimizer="sgd", learning_rate=0.05, beta=0.3), make_episode(lm)
    guide, model = objective.guide, objective.model
    theta = mean_theta(guide)
    found = guide.posterior(episode.support, theta)
    prior = {site: fn.base_dist for site, fn in model.phi_prior(theta).items()}
    loc = {s: p.loc.expand(2, 1, *p.loc.shape).detach().clone().requires_grad_() for s, p in prior.items()}
    log_scale = {s: p.scale.log().expand_as(loc[s]).detach().clone().requires_grad_() for s, p in prior.items()}
    q = {s: torch.distributions.Normal(loc[s], log_scale[s].exp()) for s in loc}
    log_probs = lm({s: q[s].rsample() for s in q}, episode.support).log_softmax(-1)
    nll = -log_probs.gather(-1, episode.support.answer[..., None]).sum()
    kl = sum(torch.distributions.kl_divergence(q[s], prior[s]).sum() for s in q)
    (nll + 0.3 * kl).backward()
    for site, fn in found.items():
        parts = unconstrained(fn)
        torch.testing.assert_close(parts["loc"], loc[site] - 0.05 * loc[site].grad)
        torch.testing.assert_close(parts["log_scale"], log_scale[site] - 0.05 * log_scale[site].grad)


@pytest.mark.parametrize("second_order", [False, True])
@pytest.mark.parametrize("theta", [PointTheta, NormalTheta])
def test_training_and_drawing(any_lm, theta, second_order):
    """Every parameter gets a gradient, particles and draws work, the base stays frozen."""
    objective = build(any_lm, theta_guide=theta, second_order=second_order, learn_rates=True)
    objective = BetaELBO(objective.model, objective.guide, beta=0.1, num_particles=2)
    episode = make_episode(any_lm)
    objective(episode).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    phi = draw_phi(objective.model, objective.guide, episode, 4)
    for site, shape in any_lm.sites.shapes.items():
        assert phi[site].shape == (4, 2, 1, *shape)
    assert not any(p.requires_grad or p.grad is not None for p in any_lm.model.parameters())
    assert not pyro.get_param_store().keys()


def test_steps_lower_the_support_s_loss(lm):
    objective, episode = build(lm, steps=30, learning_rate=0.02, num_particles=4), make_episode(lm)
    guide, model = objective.guide, objective.model
    theta = mean_theta(guide)

    def nll(normals):
        scores = lm({site: fn.mean for site, fn in normals.items()}, episode.support).log_softmax(-1)
        return -float(scores.gather(-1, episode.support.answer[..., None]).mean().detach())

    before = model.phi_prior(theta)  # where the steps begin
    assert nll(guide.posterior(episode.support, theta)) < 0.8 * nll(before)
    # Far from data the prior holds: with a large beta nothing moves much.
    heavy = GradientGuide(model, steps=30, learning_rate=0.02, beta=1e4, num_particles=4)
    free = guide.posterior(episode.support, theta)
    for site, fn in heavy.posterior(episode.support, theta).items():
        origin = before[site].mean
        assert (fn.mean - origin).abs().mean() < 0.5 * (free[site].mean - origin).abs().mean()


def test_after_the_network(lm):
    """One set of parameters, saved once; theta is the network's."""
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.3, 0.2))
    network = GuideNetwork(model, directions=2, hidden=6, bilinear=2).double()
    guide = GradientGuide(model, start=network, steps=2, learning_rate=0.01)
    assert guide.theta is network.theta
    assert set(guide.state_dict()) == {f"start.{name}" for name in network.state_dict()}
    BetaELBO(model, guide, beta=0.1)(make_episode(lm)).backward()
    # At the start c and w are zero, so the directions they mix have no gradient.
    moved = [n for n, p in network.named_parameters() if p.grad is not None and p.grad.abs().max() > 0]
    assert any("head" in name for name in moved) and any("theta" in name for name in moved)


def test_the_steps_begin_where_the_network_points(lm, monkeypatch):
    """At one and the same draw of its dropout."""
    torch.manual_seed(3)
    model = HierarchicalNormal(lm, lm.sites.initial(), initial_scale=(0.3, 0.2))
    network = GuideNetwork(model, directions=2, hidden=6, bilinear=2, dropout=0.5).double().train()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter += 0.3 * torch.randn_like(parameter) * ("head" in name)
    guide = GradientGuide(model, start=network, steps=1, learning_rate=1e-12)
    starts, posterior = [], network.posterior
    monkeypatch.setattr(network, "posterior", lambda *args: starts.append(posterior(*args)) or starts[-1])
    theta = mean_theta(guide)
    found = guide.posterior(make_episode(lm).support, theta)
    assert len(starts) == 1
    for site, fn in found.items():
        torch.testing.assert_close(unconstrained(fn), unconstrained(starts[0][site]))


def test_draws_of_theta_move_the_end_as_they_move_the_prior(lm):
    objective, support = build(lm, theta_guide=NormalTheta), make_episode(lm).support
    guide, model = objective.guide, objective.model
    mean = mean_theta(guide)
    moved = {site: value + 0.1 if ".loc." in site else 4.0 * value for site, value in mean.items()}
    torch.manual_seed(1)
    one = guide.posterior(support, mean)
    torch.manual_seed(1)
    two = guide.posterior(support, moved)
    for site in model.random_sites:
        torch.testing.assert_close(two[site].mean, one[site].mean + 0.1)
        torch.testing.assert_close(two[site].stddev, one[site].stddev / 2)


def test_each_part_may_have_its_own_rate(lm, monkeypatch):
    """A step of plain descent is proportional to it."""
    fixed_noise(monkeypatch)
    episode = make_episode(lm)
    one, two = (
        build(lm, steps=1, optimizer="sgd", learning_rate=rate) for rate in (0.01, {"loc": 0.02, "log_scale": 0.05})
    )
    theta = mean_theta(one.guide)
    start = one.model.phi_prior(theta)
    moved = [built.guide.displacement(episode.support, theta, start) for built in (one, two)]
    for (part, site), value in moved[0].items():
        torch.testing.assert_close(moved[1][part, site], {"loc": 2.0, "log_scale": 5.0}[part] * value)
    with pytest.raises(ConfigError, match=r"expected one for each of \['loc', 'log_scale'\], got {'loc': 0.1}"):
        build(lm, learning_rate={"loc": 0.1})


def test_bad_settings_are_refused(lm):
    for wrong in (dict(steps=-1), dict(num_particles=0), dict(learning_rate=0.0), dict(beta=0.0)):
        with pytest.raises(ConfigError, match=f"got .*{next(iter(wrong))}={next(iter(wrong.values()))}"):
            build(lm, **wrong)
    with pytest.raises(ConfigError, match="start: SharedPoint has no scale"):
        build(lm, start=SharedPoint(HierarchicalNormal(lm, lm.sites.initial())))
    with pytest.raises(ConfigError, match="optimizer: expected 'sgd' or 'adam', got 'lbfgs'"):
        build(lm, optimizer="lbfgs")
