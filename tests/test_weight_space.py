"""Random weight updates in a language model: drawn, or deferred to the activations."""

from contextlib import nullcontext

import pyro
import pytest
import torch
from conftest import build_lm, make_tasks
from lm_helpers import closeness, make_episode, random_phi
from objectives import mean_theta, weight_space_objective
from torch.distributions import Normal, kl_divergence
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from bayes_lora.distributions.factored_normal import FactoredNormal
from bayes_lora.distributions.unconstrained import unconstrained
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError, SiteError
from bayes_lora.guides import NormalTheta, PointTheta
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.lm.sites import delta_site, factor_sites
from bayes_lora.models import WeightSpace
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import EpisodeConfig, ObjectiveConfig, RunConfig
from bayes_lora.recipes.recipes import build_objective


def whole(lm, phi):
    """The updates that factors make."""
    sites = {delta_site(site) for site in phi}
    return {site: phi[factor_sites(site)[1]] @ phi[factor_sites(site)[0]] for site in sites}


def test_whole_updates_score_as_their_factors(any_lm):
    episode = make_episode(any_lm)
    phi = random_phi(any_lm, 2, 2, 1)
    torch.testing.assert_close(any_lm(whole(any_lm, phi), episode), any_lm(phi, episode), rtol=1e-5, atol=1e-5)


def test_some_updates_whole_and_some_in_factors(lm):
    episode = make_episode(lm)
    phi = random_phi(lm, 2, 1)
    mixed = {site: value for site, value in phi.items() if not site.startswith("q_proj")}
    mixed["q_proj.delta_weight"] = whole(lm, phi)["q_proj.delta_weight"]
    torch.testing.assert_close(lm(mixed, episode), lm(phi, episode), rtol=1e-6, atol=1e-6)
    with pytest.raises(SiteError, match="site 'q_proj.lora_A': the model has no such site"):
        lm(mixed | {"q_proj.lora_A": phi["q_proj.lora_A"]}, episode)
    with pytest.raises(SiteError, match=r"'q_proj.delta_weight': expected event shape \(2, 16, 16\)"):
        lm(mixed | {"q_proj.delta_weight": mixed["q_proj.delta_weight"][..., :5]}, episode)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_scale_and_offset_scores_are_a_plain_lora_s_exactly(any_lm, tokenizer, dtype):
    lm = build_lm(any_lm.name, tokenizer, dtype=dtype)
    phi = {site: value.to(dtype) for site, value in random_phi(lm, 2, 2, 1).items()}
    deferred = {}
    for site in lm.sites.delta_shapes:
        a, b = (phi[factor] for factor in factor_sites(site))
        deferred[site] = FactoredNormal(a, b, a, torch.zeros_like(b), offset=0.0).deferred()
    episode = make_episode(lm)
    # Other kernels multiply the same factors: they agree up to rounding, which grows through the layers.
    tolerance = {"rtol": 1e-5, "atol": 1e-4} if dtype == torch.float32 else closeness(lm)
    torch.testing.assert_close(lm(deferred, episode), lm(phi, episode), **tolerance)


def test_a_base_in_16_bits_computes_whole_updates_in_32(tokenizer):
    full, half = (build_lm("llama", tokenizer, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    episode = make_episode(full)
    phi = {site: (0.1 * value).float() for site, value in random_phi(full, 2, 2, 1).items()}
    results = [lm(whole(lm, phi), episode)[:, episode.option_mask] for lm in (full, half)]
    assert results[1].dtype == torch.float32
    assert 0 < (results[0] - results[1]).norm() / results[0].norm() < 0.1


@pytest.mark.parametrize("handler", [LocalReparameterization, nullcontext])
def test_the_loss_is_its_definition(lm, handler):
    """Within 5 standard errors of the likelihood; the divergence, and what theta weighs, from the entries."""
    objective, episode = weight_space_objective(lm, context=handler, steps=0), make_episode(lm, num_data=[11, 5])
    model, theta = objective.model, mean_theta(objective.guide)
    terms, count = objective.terms(episode), 200
    torch.manual_seed(0)
    losses = torch.stack([objective(episode).detach() for _ in range(count)])
    draws = []
    for _ in range(count):
        phi = {site: fn.expand((2, 1)).rsample() for site, fn in model.phi_prior(theta).items()}
        log_probs = lm(phi, episode).log_softmax(-1).gather(-1, episode.answer[..., None])[..., 0].detach()
        draws.append(-(log_probs[0, :2].sum() * 11 / 2 + log_probs[1, :3].sum() * 5 / 3))
    draws = torch.stack(draws)
    prior = sum(Normal(0.0, 1.0).log_prob(value).sum() for value in theta.values())
    for fn in model.phi_prior(theta).values():
        prior = prior - (1e-6 / fn.variance).sum()
    assert terms["kl"] == pytest.approx(0.0, abs=1e-9)
    difference = losses.mean() - (draws.mean() - 0.1 * prior.detach())
    if handler is nullcontext:  # or noise differs from place to place, and so does the distribution of the loss
        assert abs(difference) < 5 * ((losses.var() + draws.var()) / count) ** 0.5
    assert losses.std() > 0.01


@pytest.mark.parametrize("handler", [LocalReparameterization, nullcontext])
def test_the_loss_adds_up(lm, handler):
    """Draw by draw; the divergence of updates is weighed by beta, all that theta has by gamma."""
    built, episode = weight_space_objective(lm), make_episode(lm, num_data=[11, 5])
    model, guide = built.model, built.guide
    objective = BetaELBO(model, guide, beta=0.1, gamma=0.7, context=handler)
    theta = mean_theta(guide)
    prior = sum(Normal(0.0, 1.0).log_prob(value).sum() for value in theta.values())
    prior = prior - sum((1e-6 / fn.variance).sum() for fn in model.phi_prior(theta).values())
    for seed in range(3):
        torch.manual_seed(seed)
        loss = float(objective(episode).detach())
        torch.manual_seed(seed)
        terms = objective.terms(episode)
        assert terms["kl"] > 1e-2
        assert loss == pytest.approx(terms["nll"] + 0.1 * terms["kl"] - 0.7 * float(prior.detach()))


def test_theta_is_weighed_by_the_gamma_density_of_precisions(lm):
    """Up to a constant: differences between two values of theta, of every entry's log-density."""
    model = WeightSpace(lm, lm.sites.initial(), offset=0.2, concentration=2.5, rate=0.05)
    gamma = torch.distributions.Gamma(*torch.tensor([2.5, 0.05], dtype=torch.float64))
    found, expected = [], []
    for seed in (0, 1):
        torch.manual_seed(seed)
        theta = {name: value + 0.1 * torch.randn_like(value) for name, value in model.initial_theta().items()}
        trace = pyro.poutine.trace(pyro.condition(model.theta, data=theta)).get_trace()
        trace.compute_log_prob()
        prior = model.phi_prior(theta)
        found.append(torch.stack([trace.nodes[f"theta.precision.{site}"]["log_prob_sum"] for site in prior]))
        expected.append(torch.stack([gamma.log_prob(1.0 / fn.variance).sum() for fn in prior.values()]))
    torch.testing.assert_close(found[0] - found[1], expected[0] - expected[1])
    assert (expected[0] - expected[1]).abs().min() > 1.0


def test_divergences_are_those_of_the_entries(lm):
    objective, episode = weight_space_objective(lm), make_episode(lm)
    model, guide = objective.model, objective.guide
    theta = mean_theta(guide)
    torch.manual_seed(7)
    terms = objective.terms(episode)
    torch.manual_seed(7)
    with LocalReparameterization():
        posterior = guide.posterior(episode.support, theta)
    for site, prior in model.phi_prior(theta).items():
        q, p = (Normal(fn.mean, fn.stddev) for fn in (posterior[site], prior))
        assert terms[f"kl.{site}"] == pytest.approx(float(kl_divergence(q, p).sum().detach()))
        assert terms[f"kl.{site}"] > 1e-3


@pytest.mark.parametrize("theta", [PointTheta, NormalTheta])
@pytest.mark.parametrize("second_order", [False, True])
def test_every_parameter_gets_a_gradient(any_lm, theta, second_order):
    objective = weight_space_objective(any_lm, theta_guide=theta, second_order=second_order, learn_rates=True)
    objective(make_episode(any_lm)).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    assert any("log_rate_scale_B" in name for name, _ in objective.named_parameters())
    assert not any(p.requires_grad or p.grad is not None for p in any_lm.model.parameters())


def test_tasks_together_equal_tasks_alone(lm, monkeypatch):
    """With draws that do not depend on the batch."""

    def noise(shape, dtype, device):
        event = torch.linspace(-1.2, 1.0, shape[-1] * shape[-2] * shape[-3], dtype=dtype, device=device)
        return event.view(shape[-3:]).expand(shape)

    monkeypatch.setattr("bayes_lora.distributions.weight_distribution._standard_normal", noise)
    guide = weight_space_objective(lm).guide
    rows = [lm.encoder(task.examples[: 2 + t]) for t, task in enumerate(make_tasks(2).values())]
    together = guide.posterior(collate(rows, num_data=[9, 9], task_index=[3, 5], num_tasks=8), mean_theta(guide))
    for t, row in enumerate(rows):
        for site, fn in guide.posterior(collate([row]), mean_theta(guide)).items():
            parts = unconstrained(together[site])
            for part, value in unconstrained(fn).items():
                torch.testing.assert_close(parts[part][t], value[0], rtol=1e-4, atol=1e-5)


class Shapes(TorchDispatchMode):
    """Notes the shapes of all tensors that operators make."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **kwargs or {})
        self.seen |= {tuple(leaf.shape) for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)}
        return result


@pytest.mark.parametrize("handler", [LocalReparameterization, nullcontext])
def test_no_task_has_a_matrix_of_its_own(tokenizer, handler, monkeypatch):
    """Neither in steps, whose divergence takes a few rows at a time, nor in prediction; where all is drawn, they do."""
    monkeypatch.setattr("bayes_lora.distributions.factored_normal.CHUNK", 3 * 2 * 2 * 16)
    lm = build_lm("llama", tokenizer, targets=("v_proj",))  # 8 by 16
    objective = weight_space_objective(lm, context=handler)
    tasks = [task.split(3, seed=1) for task in make_tasks(2).values()]
    posterior = Posterior.from_objective(lm, objective)
    lm.features(make_episode(lm))
    with Shapes() as shapes:
        objective(make_episode(lm)).backward()
        adapted = posterior.adapt(tasks, steps=2)
        adapted.predict([task.query for task in tasks], num_draws=3)
    own = {shape for shape in shapes.seen if len(shape) > 3 and set(shape[-2:]) == {8, 16} and shape[0] >= 2}
    assert bool(own) == (handler is nullcontext)


@pytest.fixture
def posterior(lm):
    config = RunConfig(
        recipe="abmll-weight",
        guide={"steps": 3, "learning_rate": 0.01},
        objective=ObjectiveConfig(beta=0.01),
        episodes=EpisodeConfig(num_support=4),
    )
    return Posterior.from_objective(lm, build_objective(lm, config))


def test_adapting_predicting_and_saving(posterior, tmp_path):
    tasks = [task.split(4, seed=1) for task in make_tasks(2).values()]
    adapted = posterior.adapt(tasks, steps=2, width=3.0)
    queries = [task.query for task in tasks]
    drawn, again = (adapted.predict(queries, num_draws=4, seed=1) for _ in range(2))
    mean = adapted.predict(queries, num_draws=0)
    assert all(torch.equal(a, b) for a, b in zip(drawn, again, strict=True))
    assert all((a - b).abs().max() > 1e-6 for a, b in zip(drawn, mean, strict=True))
    for probs in (*drawn, *mean):
        torch.testing.assert_close(probs.exp().sum(-1), torch.ones(len(probs), dtype=probs.dtype))
    posterior.save(tmp_path / "run")
    loaded = Posterior.load(tmp_path / "run", posterior.lm).adapt(tasks, steps=2, width=3.0)
    loaded.save(tmp_path / "tasks")
    kept = type(adapted).load(tmp_path / "tasks", posterior.lm)
    assert all(torch.equal(a, b) for a, b in zip(kept.predict(queries, num_draws=4, seed=1), drawn, strict=True))
    one = kept.select(tasks[1].name)
    torch.testing.assert_close(one.predict(queries[1:], num_draws=0)[0], mean[1])
    one.export_peft(tmp_path / "adapter")
    with pytest.raises(ConfigError, match="a draw of whole updates is not a LoRA"):
        one.export_peft(tmp_path / "draw", draw=1)


def test_width_multiplies_the_noise(posterior):
    task = next(iter(make_tasks(1).values())).split(4, seed=1)
    one, wide = (posterior.adapt(task, width=width) for width in (1.0, 3.0))
    for site in posterior.lm.sites.delta_shapes:
        torch.testing.assert_close(wide.phi[site].stddev, 3.0 * one.phi[site].stddev)
        assert torch.equal(wide.phi[site].loc_B, one.phi[site].loc_B)


def test_the_handler_reaches_the_steps_and_leaves_other_sites_alone(lm):
    objective = weight_space_objective(lm, context=nullcontext)
    seen = []

    def spy(phi, episode):
        seen.append({type(value) for value in phi.values()})
        return lm(phi, episode)

    objective.model.likelihood = spy
    episode = make_episode(lm)
    objective(episode)
    plain = seen.copy()
    seen.clear()
    with LocalReparameterization():
        objective(episode)
    assert len(plain) == len(seen) == 3  # two steps, and the objective
    assert all(types == {torch.Tensor} for types in plain)
    assert not any(torch.Tensor in types for types in seen)
    with LocalReparameterization():
        assert isinstance(pyro.sample("x", pyro.distributions.Normal(0.0, 1.0)), torch.Tensor)


def test_bad_settings_are_refused(lm):
    for name in ("offset", "loc_scale", "concentration", "rate"):
        with pytest.raises(ConfigError, match=f"{name}: expected a positive number, got 0.0"):
            WeightSpace(lm, lm.sites.initial(), **{name: 0.0})
