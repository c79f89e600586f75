"""Posteriors of several components, and of joint families: draws, adaptation, saving, on a tiny language model."""

import subprocess
import sys
from types import SimpleNamespace

import pyro
import pytest
import torch
from conftest import make_tasks
from objectives import mean_theta
from runs import assert_equal
from safetensors.torch import load_file
from zoo import GUIDES, PRIORS, build, episodes, start

from bayes_lora.distributions.weight_distribution import WeightDistribution
from bayes_lora.errors import ConfigError, PosteriorError
from bayes_lora.guides import (
    SGLD,
    SWAG,
    Ensemble,
    GradientGuide,
    LowRank,
    MeanField,
    NormalTheta,
    Point,
    SharedMeanField,
    SharedPoint,
)
from bayes_lora.infer.components import Components, choose_components, draws_around
from bayes_lora.infer.handlers import LocalReparameterization
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import draw_phi
from bayes_lora.lm.loading import load_language_model
from bayes_lora.models import HierarchicalNormal
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.diagnose import diagnose
from bayes_lora.utils.storage import read_json, write_json


@pytest.fixture
def split():
    return [task.split(4, seed=0) for task in make_tasks(2).values()]


def test_a_draw_is_of_one_component_for_all_sites_and_each_has_its_turn():
    from pyro.distributions import Delta

    values = {
        site: torch.arange(3.0).view(3, 1, 1, 1, 1, 1).expand(3, 2, 1, 1, 2, 2) + 10 * i for i, site in enumerate("ab")
    }
    components = Components({site: Delta(value, event_dim=3) for site, value in values.items()})
    assert components.count == 3 and draws_around() is None
    for _ in range(5):
        alone = components.of_draws()
        assert alone["a"].batch_shape == (2, 1) and (alone["b"].v - alone["a"].v == 10).all()
    with pyro.plate("draws", 7, dim=-3):
        assert draws_around() == 7
        drawn = components.of_draws()
        assert drawn["a"].batch_shape == (7, 2, 1) and (drawn["b"].v - drawn["a"].v == 10).all()
        counts = torch.bincount(drawn["a"].v[:, 0, 0, 0, 0, 0].long())
        assert sorted(counts.tolist()) == [2, 2, 3]
        assert len(choose_components(3)) == 7


@pytest.mark.parametrize("guide", ["Ensemble", "SGLD", "NUTS", "FlowNetwork"])
def test_an_adapted_posterior_has_its_components(lm, split, tmp_path, guide):
    """Its draws take turns, one of its tasks can be selected, its mean is theirs, and it can be saved."""
    objective = build(lm, "HierarchicalNormal", guide).eval()
    adapted = adapt(objective, lm, split)
    count = adapted.num_components
    assert count == {"Ensemble": 2, "SGLD": 3, "NUTS": 2, "FlowNetwork": 3}[guide]
    random = [site for site in lm.sites.shapes if "lora_B" in site]
    phi = adapted.draw(2 * count)
    for site in random:
        loc = adapted.phi[site].mean
        assert loc.shape[:3] == (count, 2, 1)
        torch.testing.assert_close(adapted.mean()[site], loc.mean(0))
        if guide != "FlowNetwork":  # points
            assert torch.equal(phi[site], torch.cat([loc] * 2)) and not adapted.distributions()
    assert (guide == "Ensemble") == (len(adapted.shared["q_proj.lora_A"]) == count)  # members have a theta of their own
    one = adapted.select(split[1].name)
    assert one.num_components == count and one.phi[random[0]].batch_shape == (count, 1, 1)
    if guide != "FlowNetwork":  # whose draws have noise of their own
        both = adapted.predict([task.query for task in split], num_draws=count)
        torch.testing.assert_close(one.predict([split[1].query], num_draws=count)[0], both[1])
    mean = one.predict([split[1].query], num_draws=0)[0]
    assert not torch.allclose(mean, one.predict([split[1].query], num_draws=count)[0])
    adapted.save(tmp_path / "task")
    again = type(adapted).load(tmp_path / "task", lm)
    assert torch.equal(again.predict([t.query for t in split])[0], adapted.predict([t.query for t in split])[0])
    one.export_peft(tmp_path / "mean")
    one.export_peft(tmp_path / "draw", draw=1)


def test_fewer_draws_than_components_are_spread_over_them(lm, split):
    model = HierarchicalNormal(lm, start(lm), random="B")
    adapted = adapt(BetaELBO(model, SGLD(model, num_samples=10, burn_in=0, thinning=1)), lm, split)
    site = "q_proj.lora_B"
    firsts = set()
    for seed in range(30):
        drawn = adapted.draw(3, seed=seed)[site]
        [first] = [k for k in range(10) if torch.equal(drawn[0], adapted.phi[site].mean[k])]
        assert torch.equal(drawn, adapted.phi[site].mean[[(first + shift) % 10 for shift in (0, 3, 6)]])
        firsts.add(first)
    assert len(firsts) > 5


def test_members_adapt_as_they_would_alone(lm, split):
    """Steps for all components side by side are those of each member by itself."""
    objective = build(lm, "HierarchicalNormal", "Ensemble").eval()
    together = adapt(objective, lm, split, steps=3, learning_rate=0.01)
    for k, member in enumerate(objective.guide.members):
        alone = adapt(BetaELBO(objective.model, member, beta=1e-2).eval(), lm, split, steps=3, learning_rate=0.01)
        for site, fn in alone.phi.items():
            torch.testing.assert_close(together.phi[site].mean[k], fn.mean)
        for site, value in alone.shared.items():
            torch.testing.assert_close(together.shared[site][k : k + 1], value)


def test_members_are_trained_by_their_share_of_the_particles(lm):
    """The loss of K particles is the mean of the members' own, where all they sample is fixed."""
    model = HierarchicalNormal(lm, start(lm), random="B")
    ensemble = Ensemble(model, num_members=3)
    episode = episodes(lm)[0]
    torch.manual_seed(0)
    loss = BetaELBO(model, ensemble, beta=0.1, num_particles=3)(episode)
    alone = [BetaELBO(model, member, beta=0.1)(episode) for member in ensemble.members]
    torch.testing.assert_close(loss, torch.stack(alone).mean())
    assert len({round(float(one.detach()), 6) for one in alone}) == 3


def test_langevin_samples_have_a_theta_that_learns_from_them(lm):
    """-log p(phi | theta) of the samples is the only way; its gradient is that of Monte Carlo EM."""
    model = HierarchicalNormal(lm, start(lm), random="B")
    guide = SGLD(model, num_samples=1, burn_in=1, thinning=1)
    episode, objective = episodes(lm)[0], BetaELBO(model, guide, beta=0.1)
    torch.manual_seed(0)
    objective(episode).backward()
    torch.manual_seed(0)
    guide.theta()
    phi = {s: fn.v[0] for s, fn in guide.posterior(episode.support, guide.theta()).items()}
    leaves = {s: v.detach().clone().requires_grad_() for s, v in guide.theta().items()}
    prior = model.phi_prior(leaves)
    scale = episode.num_tasks / len(episode.task_index)
    loss = -0.1 * scale * sum(prior[s].log_prob(v).sum() for s, v in phi.items())
    for name in [n for n in leaves if ".loc." in n and "lora_B" in n]:
        [expected] = torch.autograd.grad(loss, leaves[name], retain_graph=True)
        found = getattr(guide.theta, "loc_" + name.replace(".", "_")).grad
        torch.testing.assert_close(found, expected + 0.1 * leaves[name].detach())


def test_swag_is_the_scatter_of_its_path(lm):
    """Mean, squares and last deviations against a plain loop over recorded steps."""
    model = HierarchicalNormal(lm, start(lm), random="B")
    guide = SWAG(model, steps=7, burn_in=2, rank=3, learning_rate=0.01)
    theta = mean_theta(guide)
    support = episodes(lm)[0].support
    recorded = []
    from bayes_lora.guides import swag as module

    class Spy(module.Descent):
        def __call__(self, support, theta, points, steps, on_step):
            def both(step, moved):
                recorded.append({site: value.clone() for (_, site), value in moved.items()})
                on_step(step, moved)

            return super().__call__(support, theta, points, steps, both)

    plain, module.Descent = module.Descent, Spy
    try:
        torch.manual_seed(0)
        found = guide.posterior(support, theta)
    finally:
        module.Descent = plain
    for site, fn in found.items():
        path = torch.stack([step[site] for step in recorded[2:]])
        prior = model.phi_prior(theta)[site]
        torch.testing.assert_close(fn.mean.detach(), prior.mean + path.mean(0))
        variance = path.var(0, correction=0) / 2 + (1e-3 * prior.stddev) ** 2
        torch.testing.assert_close(fn.scale.square().detach(), variance, rtol=1e-6, atol=1e-14)
        deviations = torch.stack([path[i] - path[: i + 1].mean(0) for i in range(2, 5)], -1)
        torch.testing.assert_close(fn.factor.detach(), deviations / 4**0.5)


@pytest.mark.parametrize("guide", ["SWAG", "Laplace, Kronecker", "MCDropout", "MeanField, LowRank"])
def test_joint_families_are_drawn_selected_and_saved(lm, split, tmp_path, guide):
    """Moments of draws within 5.5 standard errors; damaged files are named."""
    objective = build(lm, "HierarchicalNormal", guide).eval()
    adapted = adapt(objective, lm, split, steps=1)
    random = adapted.distributions()
    assert random and all(isinstance(q, WeightDistribution) for q in random.values())
    draws = adapted.draw(4000, seed=3)
    for site, q in random.items():
        error = (draws[site].mean(0) - q.mean) / (q.stddev / 4000**0.5).clamp_min(1e-12)
        assert error.abs().max() < 5.5
        ratio = draws[site].std(0) / q.stddev.clamp_min(1e-12)
        assert (ratio[q.stddev > 1e-9] - 1).abs().max() < (0.25 if guide == "MCDropout" else 0.08)
    one = adapted.select(split[1].name)
    for site, fn in one.distributions().items():
        assert fn.batch_shape == (1, 1)
        torch.testing.assert_close(fn.stddev[0], random[site].stddev[1])
    adapted.save(tmp_path / "task")
    facts = read_json(tmp_path / "task" / "task_posterior.json")
    again = type(adapted).load(tmp_path / "task", lm)
    assert all(torch.equal(value, draws[site]) for site, value in again.draw(4000, seed=3).items())
    facts["sites"][next(iter(random))]["family"] = "Cauchy"
    write_json(tmp_path / "task" / "task_posterior.json", facts)
    with pytest.raises(PosteriorError, match="does not fit llama: expected one of the families .* got 'Cauchy'"):
        type(adapted).load(tmp_path / "task", lm)


def test_a_diagnosis_of_components_and_joint_families(lm, split):
    for guide in ("Ensemble", "FlowNetwork", "SWAG", "Laplace, Kronecker"):
        found = diagnose(build(lm, "HierarchicalNormal", guide).eval(), lm, split, num_draws=4)
        assert not any("is a point" in warning for warning in found.warnings)
        assert all(width.divergence > 0 for width in found.sites.values())
    found = diagnose(build(lm, "HierarchicalNormal", "SharedPoint").eval(), lm, split, num_draws=4)
    assert any("is a point" in warning for warning in found.warnings)


def test_tables_of_tasks_stay_on_the_cpu_and_follow_a_dtype(lm):
    """The meta device stands for a GPU: what is moved there has no values left."""
    model = PRIORS["HierarchicalNormal"](lm)
    guide = MeanField(model, num_tasks=1000, family=LowRank(2))
    guide.to("meta")
    tables = dict(guide.tables.named_parameters())
    assert tables and all(p.device.type == "cpu" and p.shape[:2] == (1000, 1) for p in tables.values())
    assert all(p.device.type == "meta" for p in guide.theta.parameters())
    guide = MeanField(model, num_tasks=3).float()
    assert {p.dtype for p in guide.parameters()} == {torch.float32}


def test_a_step_touches_the_episode_s_tasks_alone(lm):
    model = PRIORS["HierarchicalNormal"](lm)
    guide = MeanField(model, num_tasks=4)
    episode = episodes(lm)[0]
    BetaELBO(model, guide)(episode).backward()
    absent = [i for i in range(4) if i not in episode.task_index.tolist()]
    for parameter in guide.tables.parameters():
        assert (parameter.grad[absent] == 0).all() and (parameter.grad[episode.task_index] != 0).any()


def test_an_ensemble_over_whole_updates(lm, split, tmp_path):
    """Its factors are gathered member by member, drawn and deferred; what is saved comes back."""
    model = PRIORS["WeightSpace"](lm)
    ensemble = Ensemble(
        model, num_members=2, make=lambda model, theta_guide: SharedMeanField(model, theta_guide=theta_guide)
    )
    with torch.no_grad():
        for parameter in ensemble.members[1].parameters():
            parameter += 0.1
    for handler in ({}, {"context": LocalReparameterization}):
        objective = BetaELBO(model, ensemble, beta=0.1, num_particles=2, **handler)
        objective.zero_grad()
        objective(episodes(lm)[0]).backward()
        assert all(p.grad.isfinite().all() for p in ensemble.parameters())
    adapted = adapt(objective, lm, split)
    assert adapted.num_components == 2 and adapted.is_deferred
    adapted.save(tmp_path / "task")
    again = type(adapted).load(tmp_path / "task", lm)
    queries = [task.query for task in split]
    assert all(torch.equal(a, b) for a, b in zip(adapted.predict(queries), again.predict(queries), strict=True))


def test_the_terms_of_a_flow_are_its_loss(lm):
    """Coefficients and the reverse model among them: nll + beta kl is the loss of the same draw."""
    objective = build(lm, "IndependentNormal", "FlowNetwork").eval()
    episode = episodes(lm)[0]
    torch.manual_seed(5)
    loss = objective(episode)
    torch.manual_seed(5)
    terms = objective.terms(episode)
    assert {"kl.coefficients", "kl.reverse"} <= terms.keys()
    theta = objective.model.theta
    with torch.no_grad():
        trace = pyro.poutine.trace(objective.guide.theta).get_trace()
        prior = pyro.poutine.trace(pyro.poutine.replay(theta, trace)).get_trace()
    hyper = -float(prior.log_prob_sum().detach())
    assert terms["nll"] + 1e-2 * (terms["kl"] + hyper) == pytest.approx(float(loss.detach()))


def test_a_flow_s_own_sites_are_weighed_as_phi(lm):
    """With gamma unlike beta they are phi's, whose weight alone changes the loss as phi's terms say."""
    model = PRIORS["IndependentNormal"](lm)
    guide = GUIDES["FlowNetwork"](model).eval()
    losses, episode = [], episodes(lm)[0]
    for beta in (0.1, 0.2):
        objective = BetaELBO(model, guide, beta=beta, gamma=0.5)
        torch.manual_seed(5)
        losses.append(objective(episode).detach())
        torch.manual_seed(5)
        terms = objective.terms(episode)
    torch.testing.assert_close(losses[1] - losses[0], torch.tensor(0.1 * terms["kl"], dtype=torch.float64))


def test_no_steps_are_the_prior_at_theta_s_draw(lm):
    """Then the divergence is zero, whatever was drawn."""
    model = PRIORS["HierarchicalNormal"](lm)
    theta = lambda model: NormalTheta(model, initial_scale=0.3)  # noqa: E731
    terms = BetaELBO(model, GradientGuide(model, steps=0, theta_guide=theta)).terms(episodes(lm)[0])
    assert terms["kl"] == pytest.approx(0.0, abs=1e-9)


def test_what_is_refused(lm):
    model = PRIORS["HierarchicalNormal"](lm)
    for make, message in (
        (lambda: Ensemble(model, num_members=1), "num_members: expected at least 2, got 1"),
        (lambda: SWAG(model, rank=1), "expected rank of at least 2"),
        (lambda: SWAG(model, steps=10, burn_in=8), "rank=5, steps=10, burn_in=8"),
        (lambda: SWAG(model, floor=0.0), "floor=0.0"),
        (lambda: SGLD(model, step_size=0.0), "step_size=0.0"),
        (lambda: SGLD(model, thinning=0), "thinning=0"),
        (lambda: SGLD(model, batch_size=0), "batch_size=0"),
        (lambda: SWAG(model, batch_size=0), "batch_size=0"),
        (lambda: SWAG(model, optimizer="Adam"), "optimizer: expected 'sgd' or 'adam', got 'Adam'"),
        (lambda: GradientGuide(model, learn_rates=True, follow_theta=False), "no gradient flows through the steps"),
        (lambda: LowRank(0), r"LowRank: expected rank of at least 1 .* got LowRank\(rank=0"),
        (lambda: GradientGuide(model, start=SharedPoint(model)), r"Use SharedMeanField, or family=Point\(\)"),
        (
            lambda: GradientGuide(model, second_order=True, follow_theta=False),
            "second_order, learn_rates: no gradient flows",
        ),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    from bayes_lora.guides import NUTS, FlowNetwork, MCDropout

    for make, message in (
        (lambda: NUTS(model, max_tree_depth=0), "max_tree_depth=0"),
        (lambda: FlowNetwork(model, num_flows=0), "num_flows=0"),
        (lambda: MCDropout(model, rate=1.0), "Dropout: expected a rate between 0 and 1, got 1.0"),
    ):
        with pytest.raises(ConfigError, match=message):
            make()
    support = episodes(lm)[0].support
    of_several = GradientGuide(model, start=GUIDES["SGLD"](model))
    with pytest.raises(ConfigError, match="start: expected a guide with one component, but SGLD has several"):
        of_several.posterior(support, of_several.theta())
    ensemble = Ensemble(model, num_members=2, make=lambda model, theta_guide: SGLD(model, theta_guide=theta_guide))
    with pytest.raises(ConfigError, match="make: expected members with one component, but SGLD has several"):
        draw_phi(model, ensemble, episodes(lm)[0], 2)


def test_guides_that_do_not_fit_into_one_another(lm, split):
    """Said with a cure, when they are made or first called."""
    model = PRIORS["HierarchicalNormal"](lm)
    support = episodes(lm)[0].support
    for other in (SharedMeanField(model, family=LowRank(2)), SWAG(model), GUIDES["Laplace, Kronecker"](model)):
        guide = GradientGuide(model, start=other)
        with pytest.raises(ConfigError, match=r"with parameters \['loc', 'log_scale'\]; .* Use SharedMeanField"):
            guide.posterior(support, guide.theta())
    with pytest.raises(ConfigError, match="start: Ensemble has one q"):
        GradientGuide(model, start=Ensemble(model, num_members=2))
    inner = lambda model, theta_guide: Ensemble(model, theta_guide=theta_guide, num_members=2)  # noqa: E731
    with pytest.raises(ConfigError, match="make: an ensemble cannot be a member"):
        Ensemble(model, make=inner)
    samplers = Ensemble(
        model, num_members=2, make=lambda model, theta_guide: SGLD(model, theta_guide=theta_guide, burn_in=0)
    )
    with pytest.raises(ConfigError, match="make: expected members with one component, but SGLD has several"):
        adapt(BetaELBO(model, samplers), lm, split)


def test_a_joint_posterior_loads_where_no_guide_was_imported(model_folder, split, tmp_path):
    """In another process, from their files alone; draws are the same bit for bit."""
    lm = load_language_model(model_folder, r=3, top_layers=2, device="cpu")
    expected = {}
    for name in ("MCDropout", "Laplace, Kronecker", "SWAG"):
        adapted = adapt(build(lm, "HierarchicalNormal", name).eval(), lm, split)
        joint = {site for site, fn in adapted.phi.items() if isinstance(fn, WeightDistribution)}
        assert joint == {site for site in lm.sites.shapes if "lora_B" in site}
        adapted.save(tmp_path / name)
        expected |= {f"{name}.{site}": value for site, value in adapted.draw(3, seed=5).items()}
    code = """if True:
        import sys
        from pathlib import Path
        from safetensors.torch import save_file
        from bayes_lora import TaskPosterior, load_language_model
        lm, root, found = load_language_model(sys.argv[1], r=3, top_layers=2, device="cpu"), Path(sys.argv[2]), {}
        for folder in list(root.iterdir()):
            drawn = TaskPosterior.load(folder, lm).draw(3, seed=5)
            found |= {f"{folder.name}.{site}": value.contiguous() for site, value in drawn.items()}
        assert not [name for name in sys.modules if name.startswith("bayes_lora.guides")]
        save_file(found, root / "draws.safetensors")
    """
    command = [sys.executable, "-c", code, str(model_folder), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert_equal(load_file(tmp_path / "draws.safetensors"), expected)


def test_episodes_go_where_the_language_model_is(lm):
    """Not where the first parameter is, which for a prior without theta is a table that stays on the CPU."""
    from bayes_lora.infer.training import _device

    objective = BetaELBO(model := PRIORS["IndependentNormal"](lm), MeanField(model, num_tasks=4))
    moved = objective.to("meta")
    assert _device(moved) == lm.device
    moved.model.likelihood = SimpleNamespace(device=torch.device("meta"))
    assert _device(moved).type == "meta"


def test_steps_from_a_shared_point(lm):
    """MAML's inner loop from a learnt LoRA: with no steps it is that LoRA."""
    model = PRIORS["HierarchicalNormal"](lm)
    point = SharedPoint(model, spread=0.3)
    support = episodes(lm)[0].support
    none = GradientGuide(model, start=point, family=Point(), steps=0)
    for site, fn in none.posterior(support, none.theta()).items():
        assert torch.equal(fn.v[1, 0], getattr(point, "value_" + site.replace(".", "_")))
    start = SharedPoint(model, spread=0.3)
    some = GradientGuide(model, start=start, family=Point(), steps=2, learning_rate=0.01)
    for site, fn in some.posterior(support, some.theta()).items():
        assert not torch.equal(fn.v[0], fn.v[1]) and fn.v.shape[:2] == (2, 1), site


def test_a_shared_family_starts_at_the_prior(lm):
    """Its mean and, but for the small factor, its standard deviations."""
    model = PRIORS["HierarchicalNormal"](lm)
    guide = SharedMeanField(model, family=LowRank(3, start=0.1))
    prior = model.phi_prior(model.initial_theta())
    for site, fn in guide.posterior(episodes(lm)[0].support, model.initial_theta()).items():
        torch.testing.assert_close(fn.mean[0, 0].detach(), prior[site].mean)
        assert (fn.stddev[0, 0] / prior[site].stddev - 1).abs().max() < 0.1
