"""Noise at activations: its draws, its divergence, and the steps on minibatches that go with it."""

import math

import pytest
import torch
from conftest import build_lm, make_tasks
from lm_helpers import bloom, make_episode
from objectives import mean_theta, weight_space_objective
from torch.distributions import Normal, kl_divergence

from bayes_lora.distributions.deferred_activation import DeferredActivation, LogRatios
from bayes_lora.episodes import collate
from bayes_lora.errors import ConfigError
from bayes_lora.guides import GradientGuide, PointTheta
from bayes_lora.infer.descent import minibatch
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.models import ActivationSpace
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.recipes.config import ObjectiveConfig, RunConfig
from bayes_lora.recipes.recipes import build_objective
from bayes_lora.utils.grouped_linear import linear

OUT, IN, RANK = 5, 7, 2


def some_activation(*batch):
    generator = torch.Generator().manual_seed(0)
    shapes = [(RANK, IN), (OUT, RANK)] * 4
    factors = [0.4 * torch.randn(*batch, *shape, generator=generator, dtype=torch.float64) for shape in shapes]
    return DeferredActivation(*factors, torch.full((*batch, 1, 1), -0.5, dtype=torch.float64))


def densities(activation, x):
    """Of q and of the prior, by torch."""
    maps = [linear(linear(x, activation[i]), activation[i + 1]) for i in (0, 2, 4, 6)]
    return Normal(maps[0], ((maps[1] - 0.5) / 2).exp()), Normal(maps[2], ((maps[3] - 0.5) / 2).exp())


@pytest.mark.parametrize("groups", [(), (2,)])
def test_draws_and_log_ratios_at_one_layer(groups):
    """Moments of draws, and the mean log-ratio, the divergence, within 5 standard errors; places without a token do
    not count."""
    torch.manual_seed(1)
    activation, x = some_activation(*groups), torch.randn(2, 3, IN, dtype=torch.float64)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    q, p = densities(activation, x)
    count, draws, totals = 4000, [], []
    for _ in range(count):
        with LogRatios(mask, layers=1) as ratios:
            draws.append(activation(x))
        totals.append(ratios.total(torch.Size([2])))
    draws, totals = torch.stack(draws), torch.stack(totals)
    assert ((draws.mean(0) - q.loc) / (q.scale / count**0.5)).abs().max() < 5
    assert (draws.std(0) / q.scale - 1).abs().max() < 5 / (2 * count) ** 0.5
    expected = (kl_divergence(q, p).sum(-1) * mask).sum(-1)
    assert ((totals.mean(0) - expected) / (totals.std(0) / count**0.5)).abs().max() < 5
    log_ratio = (q.log_prob(draws[-1]) - p.log_prob(draws[-1])).sum(-1)
    torch.testing.assert_close(totals[-1], (log_ratio * mask).sum(-1))


def build(lm, *, offset=-3.0, beta=0.1, **kwargs):
    """Noise that can be seen."""
    torch.manual_seed(3)
    initial = {s: v if ".lora_A" in s else 0.1 * torch.randn_like(v) for s, v in lm.sites.initial().items()}
    model = ActivationSpace(lm, initial, offset=offset)
    guide = GradientGuide(model, **dict(steps=2, learning_rate=0.01, beta=beta) | kwargs)
    with torch.no_grad():
        for name, parameter in guide.named_parameters():
            if "log_variance" in name and name.endswith("lora_B"):
                parameter += 0.2 * torch.randn_like(parameter)
    return BetaELBO(model, guide, beta=beta)


def test_the_divergence_of_a_language_model(tokenizer, monkeypatch):
    """One adapted module, so that noise does not reach what it reads: against the closed form of its activations."""
    lm = build_lm("llama", tokenizer, top_layers=1, targets=("v_proj",))
    objective = build(lm)
    guide, model = objective.guide, objective.model
    episode = make_episode(lm, num_data=[11, 5], task_index=[1, 4], num_tasks=7)
    theta = mean_theta(guide)
    start = guide.posterior(episode.support, theta)
    monkeypatch.setattr(guide, "posterior", lambda *_: start)
    inputs = []
    slot = lm.sites._slots["v_proj.lora_A"][0]
    hook = slot.register_forward_pre_hook(lambda _, args: inputs.append(args[0].detach()))
    terms = torch.tensor([objective.terms(episode)["kl.activations"] for _ in range(400)])
    hook.remove()
    x, rows = inputs[-1], episode.rows_per_task
    assert rows == (1, 3)
    task = torch.repeat_interleave(torch.tensor(rows))
    maps = []
    for fn in (start, model.phi_prior(theta)):
        a, b, va, vb = (
            fn[site].mean.detach().reshape(-1, *lm.sites.shapes[site[-13:]][1:])
            for site in ("v_proj.lora_A", "v_proj.lora_B", "log_variance.v_proj.lora_A", "log_variance.v_proj.lora_B")
        )
        a, b, va, vb = (value.expand(2, -1, -1)[task] for value in (a, b, va, vb))
        mean = torch.einsum("nlr,nor->nlo", torch.einsum("nli,nri->nlr", x, a), b)
        log_variance = torch.einsum("nlr,nor->nlo", torch.einsum("nli,nri->nlr", x, va), vb) - 3.0
        maps.append(Normal(mean, (log_variance / 2).exp()))
    of_rows = (kl_divergence(*maps).sum(-1) * (episode.padded.segments >= 0)).sum(-1)
    each = [part.sum() for part in of_rows.split(rows)]
    expected = 7 / 2 * (each[0] * 11 / 2 + each[1] * 5 / 3)
    assert expected > 1.0
    assert abs(terms.mean() - expected) < 5 * terms.std() / 400**0.5


def test_the_loss_adds_up(lm):
    """The divergence of activations is weighed by beta, theta's density by gamma."""
    built, episode = build(lm), make_episode(lm)
    guide = built.guide
    objective = BetaELBO(built.model, guide, beta=0.1, gamma=0.7)
    theta = mean_theta(guide)
    losses, terms = [], []
    for seed in range(3):
        torch.manual_seed(seed)
        losses.append(objective(episode).detach())
        torch.manual_seed(seed)
        terms.append(objective.terms(episode))
    prior = sum(Normal(0.0, 1.0).log_prob(value).sum() for value in theta.values()).detach()
    for loss, term in zip(losses, terms, strict=True):
        assert float(loss) == pytest.approx(term["nll"] + 0.1 * term["kl"] - 0.7 * float(prior))
        assert term["kl"] == pytest.approx(term["kl.activations"])


def test_at_the_released_offset_the_divergence_is_a_proximal_penalty(lm):
    """e^20 / 2 on squared distances of what the adapters add; the noise itself does next to nothing."""
    torch.manual_seed(0)
    x = torch.randn(1, 4, IN, dtype=torch.float64)
    activation = some_activation()
    zeros = [torch.zeros_like(value) for value in activation[2:4]]
    near = [value + 1e-4 * torch.randn_like(value) for value in activation[:2]]
    offset = torch.full((1, 1), -20.0, dtype=torch.float64)
    activation = DeferredActivation(*activation[:2], *zeros, *near, *zeros, offset)
    totals = []
    for _ in range(500):
        with LogRatios(torch.ones(1, 4, dtype=torch.bool), layers=1) as ratios:
            added = activation(x)
        totals.append(ratios.total(torch.Size([1])))
    means = [linear(linear(x, activation[i]), activation[i + 1]) for i in (0, 4)]
    penalty = 0.5 * math.exp(20) * (means[0] - means[1]).square().sum()
    totals = torch.stack(totals)
    assert abs(totals.mean() - penalty) < 5 * totals.std() / 500**0.5
    assert (added - means[0]).abs().max() < 5 * math.exp(-10)


def test_every_parameter_gets_a_gradient(any_lm):
    objective = build(any_lm, learn_rates=False)
    objective(make_episode(any_lm)).backward()
    for name, parameter in objective.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all() and parameter.grad.abs().max() > 0, name
    assert not any(p.requires_grad or p.grad is not None for p in any_lm.model.parameters())


def test_draws_in_pieces_and_several_particles(tokenizer):
    """Without gradients the draws run in pieces; each has its own divergence."""
    lm = build_lm("llama", tokenizer, token_budget=1)
    objective = build(lm)
    wide = BetaELBO(objective.model, objective.guide, beta=0.1, num_particles=3)
    episode = make_episode(lm)
    pieces = []
    total = LogRatios.total

    def spy(self, batch):
        pieces.append((len(self.pieces), tuple(batch)))
        return total(self, batch)

    LogRatios.total = spy
    try:
        with torch.no_grad():
            loss = wide(episode)
    finally:
        LogRatios.total = total
    layers = sum(shape[0] for shape in lm.sites.delta_shapes.values())
    assert loss.isfinite() and pieces[-1] == (3 * layers, (3, 2))


def test_predictions_take_the_mean(lm):
    config = RunConfig(
        recipe="abmll-released",
        guide={"steps": 3, "learning_rate": 0.01, "batch_size": 2},
        objective=ObjectiveConfig(beta=1e-8),
    )
    posterior = Posterior.from_objective(lm, build_objective(lm, config))
    tasks = [task.split(5, seed=1) for task in make_tasks(2).values()]
    adapted = posterior.adapt(tasks, steps=2)
    assert adapted.is_point and adapted.mean().keys() == lm.sites.shapes.keys()
    queries = [task.query for task in tasks]
    mean, drawn = (adapted.predict(queries, num_draws=num_draws) for num_draws in (0, 3))
    for one, other in zip(mean, drawn, strict=True):
        torch.testing.assert_close(one, other)
    assert not torch.equal(*adapted.mean()["q_proj.lora_A"])


@pytest.mark.parametrize("make", [build, weight_space_objective])
def test_checkpointing_draws_the_same_noise_again(tokenizer, make):
    gradients = []
    for checkpointing in (False, True):
        lm = build_lm("llama", tokenizer, gradient_checkpointing=checkpointing)
        objective, episode = make(lm), make_episode(lm)
        lm.features(episode)
        torch.manual_seed(0)
        objective(episode).backward()
        after = torch.rand(())
        gradients.append(({name: p.grad for name, p in objective.named_parameters()}, after))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_a_key_value_cache_is_refused(tokenizer, monkeypatch):
    lm = bloom(tokenizer, monkeypatch)
    with pytest.warns(UserWarning, match="key-value cache"):
        lm.features(make_episode(lm))
    with pytest.raises(ConfigError, match="activation-space noise: expected activations of packed rows"):
        build(lm)(make_episode(lm))


def test_minibatches_take_turns(lm):
    rows = [lm.encoder(task.examples[: 3 + t]) for t, task in enumerate(make_tasks(2).values())]
    episode = collate(rows, num_data=[3, 4], task_index=[2, 0], num_tasks=5)
    seen = [[list(task) for task in minibatch(episode, step, 2).examples] for step in range(2)]
    assert [seen[k][0] for k in range(2)] == [rows[0][:2], [rows[0][2], rows[0][0]]]
    assert [seen[k][1] for k in range(2)] == [rows[1][:2], rows[1][2:]]
    part = minibatch(episode, 0, 2)
    assert part.num_data.tolist() == [3, 4] and part.task_index.tolist() == [2, 0] and part.num_tasks == 5
    whole = minibatch(episode, 0, 9)
    assert torch.equal(whole.input_ids, episode.input_ids) and torch.equal(whole.mask, episode.mask)


def test_steps_on_minibatches(lm):
    """One step of two examples is the step on these alone, their likelihood scaled to the whole set's."""
    guide = build(lm, steps=1, optimizer="sgd", batch_size=2, beta=1e-20, offset=-40.0).guide
    alone = build(lm, steps=1, optimizer="sgd", beta=1e-20, offset=-40.0).guide
    theta = mean_theta(guide)
    task = next(iter(make_tasks(1).values()))
    found = guide.posterior(collate([lm.encoder(task.examples[:6])]), theta)
    two = alone.posterior(collate([lm.encoder(task.examples[:2])]), theta)
    for site in lm.sites.shapes:
        start = theta[f"theta.loc.{site}"]
        torch.testing.assert_close(found[site].mean - start, 3 * (two[site].mean - start))
    with pytest.raises(ConfigError, match="batch_size of at least 1"):
        build(lm, batch_size=0)


def test_point_theta_knows_its_sites(lm):
    names = set(PointTheta(ActivationSpace(lm, lm.sites.initial())).positive)
    assert names == {f"theta.{part}.{site}" for part in ("loc", "log_variance") for site in lm.sites.shapes}


def test_without_steps_a_task_has_theta_s_lora(lm):
    objective = build(lm, steps=0)
    task = next(iter(make_tasks(1).values())).split(4, seed=1)
    adapted = adapt(objective, lm, [task])
    for site in lm.sites.shapes:
        expected = objective.guide.theta.distribution(f"theta.loc.{site}").mean
        assert torch.equal(adapted.mean()[site][0, 0], expected) and adapted.is_point
