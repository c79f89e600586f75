"""Predictions of several tasks in shared forwards: against one task at a time, on a tiny language model."""

import pytest
import torch
from conftest import build_lm, make_tasks
from pyro.distributions import Normal

from bayes_lora.episodes import collate
from bayes_lora.errors import TaskError
from bayes_lora.guides import FlowNetwork, GradientGuide, LowRank, MCDropout, SharedMeanField
from bayes_lora.infer.objective import BetaELBO
from bayes_lora.infer.predictive import mean_over_draws
from bayes_lora.models import HierarchicalNormal, WeightSpace
from bayes_lora.posterior.adapt import adapt
from bayes_lora.posterior.posterior import Posterior
from bayes_lora.posterior.predict import batches, predict_tasks
from bayes_lora.posterior.task_posterior import TaskPosterior
from bayes_lora.runs.compare import compare
from bayes_lora.tasks import Example, Task

ROUNDING = dict(rtol=1e-5, atol=1e-5)
"""Other neighbours pad a row otherwise, and the model's rotary embeddings and norms are computed in 32 bits."""


@pytest.fixture
def tasks():
    """With 8, 7, 6 and 5 query examples, and other numbers of options."""
    return [task.split(4, seed=i, num_query=8 - i) for i, task in enumerate(make_tasks(4).values())]


def posterior(lm, tasks, scale=0.2):
    generator = torch.Generator().manual_seed(7)
    phi = {}
    for site, shape in lm.sites.shapes.items():
        loc = 0.3 * torch.randn(len(tasks), 1, *shape, generator=generator, dtype=torch.float64)
        phi[site] = Normal(loc, torch.full_like(loc, scale)).to_event(3)
    return TaskPosterior(lm, phi, {}, tuple(task.name for task in tasks))


@pytest.mark.parametrize("shown", [0, 2])
@pytest.mark.parametrize("max_tokens", [20, 60, 100_000])
def test_tasks_together_are_tasks_alone(lm, tasks, shown, max_tokens):
    q = posterior(lm, tasks)
    demonstrations = [task.support[:shown] for task in tasks]
    queries = [task.query for task in tasks]
    found = q.predict(queries, num_draws=3, seed=5, demonstrations=demonstrations, max_tokens=max_tokens)
    phi = q.draw(3, seed=5)
    for t, task in enumerate(tasks):
        rows, own = lm.encoder(task.query, demonstrations[t]), {site: v[:, t : t + 1] for site, v in phi.items()}
        [alone] = predict_tasks(lm, own, [rows], 1.0, lambda: 100_000)
        torch.testing.assert_close(found[t], mean_over_draws(alone), **ROUNDING)
        for i, row in enumerate(rows):  # and one at a time, the plain way
            log_probs = lm(own, collate([[row]])).log_softmax(-1).exp().mean(0).log()[0, 0]
            torch.testing.assert_close(found[t][i, : len(log_probs)], log_probs, **ROUNDING)


@pytest.mark.parametrize("max_tokens", [25, 80, 200, 100_000])
@pytest.mark.parametrize("shown", [(0, 0, 0, 0), (2, 2, 2, 2), (0, 3, 1, 0)])
def test_forwards_hold_no_more_than_they_may(lm, tasks, shown, max_tokens):
    """Every example once; as many tokens as allowed, but for one example or for demonstrations that stand alone."""
    rows = [lm.encoder(task.query, task.support[:count]) for task, count in zip(tasks, shown, strict=True)]
    found = list(batches(rows, lambda: max_tokens))
    assert sorted((t, i) for batch in found for t, own in batch.items() for i in own) == [
        (t, i) for t, own in enumerate(rows) for i in range(len(own))
    ]
    for batch in found:
        held = collate([[rows[t][i] for i in own] for t, own in batch.items()]).input_ids.numel()
        contexts = {len(rows[t][i].context or ()) for t, own in batch.items() for i in own}
        if len(batch) > 1:
            assert held <= max_tokens
        elif sum(map(len, batch.values())) > 1:
            assert held <= max(contexts) + max(max_tokens, *contexts)
    if max_tokens == 100_000:
        assert len(found) == 1 and list(found[0]) == [0, 1, 2, 3]
    if max_tokens == 80 and not any(shown):
        assert 1 < len(found) < sum(map(len, rows)) and any(len(batch) > 1 for batch in found)


def test_the_forwards_that_run_hold_no_more_than_they_may(lm, tasks):
    q, sizes, run = posterior(lm, tasks), [], lm.budget.run
    lm.budget.run = lambda score, count, tokens: sizes.append((count, tokens)) or run(score, count, tokens)
    lm.budget.tokens = 4 * 90
    q.predict([task.query for task in tasks], num_draws=4)
    assert all(count == 4 and tokens <= 90 for count, tokens in sizes)
    assert len(sizes) < sum(len(task.query) for task in tasks) / 2


def test_examples_of_the_only_task_are_enough(lm, tasks):
    q = posterior(lm, tasks[:1])
    query, shown = tasks[0].query, tasks[0].support[:1]
    for demonstrations in (None, shown):
        [listed] = q.predict([query], demonstrations=demonstrations)
        assert torch.equal(q.predict(query, demonstrations=demonstrations), listed)
    assert torch.equal(q.predict(query, demonstrations=[shown]), listed)
    [listed] = q.generate([["film?", query[0]]], num_draws=2, max_new_tokens=3)
    assert q.generate(["film?", query[0]], num_draws=2, max_new_tokens=3) == listed
    with pytest.raises(TaskError, match="queries: expected one list of examples for each of 4 tasks, got 1"):
        posterior(lm, tasks).predict(query)
    with pytest.raises(TaskError, match="queries: expected one list of examples for each of 1 tasks, got 0"):
        q.predict([])
    both = posterior(lm, tasks[:2]).predict([query, ()])
    assert both[0].shape[0] == len(query) and len(both[1]) == 0


@pytest.mark.parametrize("budget", [30, 5000])
def test_answers_together_are_answers_alone(tokenizer, tasks, budget):
    lm = build_lm("llama", tokenizer)
    lm.budget.tokens = budget
    q = posterior(lm, tasks)
    asked = [["was the film good?", "so"], ["film"], (), ["the film was bad and so not good", "maybe", "yes?"]]
    shown = [task.support[:1] for task in tasks]
    found = q.generate(asked, num_draws=3, demonstrations=shown, max_new_tokens=4, common_noise=True)
    assert [len(own) for own in found] == [2, 1, 0, 3]
    for t in (0, 1, 3):
        alone = q.select(tasks[t].name).generate(asked[t], num_draws=3, demonstrations=shown[t], max_new_tokens=4)
        assert [one.text for one in found[t]] == [one.text for one in alone]
        assert [one.log_prob for one in found[t]] == pytest.approx([one.log_prob for one in alone], abs=1e-4)


@pytest.mark.parametrize("kind", ["normal", "low rank", "dropout", "components"])
def test_common_noise_is_a_task_s_own(lm, tasks, kind):
    """Bit for bit what the task would draw alone; else tasks draw noise of their own."""
    initial = {site: value + 0.1 for site, value in lm.sites.initial().items()}  # columns of B that can be dropped
    model = HierarchicalNormal(lm, initial, random="B")
    guides = {
        "normal": lambda: SharedMeanField(model),
        "low rank": lambda: SharedMeanField(model, family=LowRank(2)),
        "dropout": lambda: MCDropout(model),
        "components": lambda: FlowNetwork(model, num_components=3, directions=2, hidden=6, bilinear=2).double(),
    }
    q = adapt(BetaELBO(model, guides[kind](), beta=0.1), lm, tasks)
    common, own = (q.draw(4, seed=3, common_noise=common) for common in (True, False))
    for t, task in enumerate(tasks):
        alone = q.select(task.name).draw(4, seed=3)
        for site in q.distributions():
            assert torch.equal(common[site][:, t : t + 1], alone[site]), site
    assert not all(torch.equal(common[site], own[site]) for site in common)


def test_a_comparison_of_tasks_together_is_that_of_tasks_alone(lm, tasks):
    """In groups of three and one, and one at a time: the noise of the steps and of the draws is the same."""
    free = Task("free", (Example("so?", references=("yes",)),), (Example("was it?", references=("no", "not")),))
    model = HierarchicalNormal(lm, random="B")
    objective = BetaELBO(model, GradientGuide(model, steps=2, learning_rate=0.01, num_particles=2), beta=0.1)
    settings = dict(steps=(0, 3), learning_rate=0.01, num_draws=3, lora_steps=2, lora_learning_rates=(1e-3,))
    found = []
    for size in (3, 1):
        posterior = Posterior.from_objective(lm, objective)
        found.append(compare(posterior, [*tasks[:3], free], tasks_per_forward=size, **settings).to_dict())
    assert list(found[0]) == [
        "label counts",
        "pretrained",
        "LoRA, 2 steps of 0.001",
        "ABMLL (amortized)",
        "ABMLL (amortized) + 3 steps",
    ]
    for name, result in found[0].items():
        for task, metrics in result["tasks"].items():
            assert metrics == pytest.approx(found[1][name]["tasks"][task], rel=1e-4, abs=1e-4), (name, task)
    nll = [result["tasks"]["task-0"]["nll"] for result in found[0].values()]
    assert len({round(value, 6) for value in nll}) == 5


def test_whole_updates_predict_alike_together_and_alone(lm, tasks):
    """Their noise enters in forwards, and depends on what shares one: averages agree within 5 standard errors."""
    model = WeightSpace(lm, offset=0.05)
    q = adapt(BetaELBO(model, SharedMeanField(model), beta=0.1), lm, tasks[:2])
    queries = [task.query[:3] for task in tasks[:2]]
    count, runs = 100, 8

    def predictions(of):
        return torch.stack([torch.cat([p[:, :2].exp() for p in of(seed)]) for seed in range(runs)])

    together = predictions(lambda seed: q.predict(queries, num_draws=count, seed=seed))
    alone = predictions(
        lambda seed: [q.select(t.name).predict(own, num_draws=count, seed=100 + seed) for t, own in zip(tasks, queries)]  # noqa: B905
    )
    error = ((together.var(0) + alone.var(0)) / runs).sqrt()
    assert ((together.mean(0) - alone.mean(0)).abs() < 5 * error).all() and (error > 0).all()
