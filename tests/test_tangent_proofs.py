"""TangentGuide against the optimum: tasks whose weights are drawn from the prior and planted in a language model.

Labels are drawn from the network's own probabilities under the planted weights. The Bayes-optimal prediction is then
an average over draws of the prior, weighed by the likelihood of the support, all computed by the network itself.
"""

from typing import NamedTuple

import pytest
import torch
from conftest import build_lm
from laws import chi_squared_p
from torch import Tensor

from bayes_lora import Posterior
from bayes_lora.episodes import PromptTemplate, collate
from bayes_lora.guides import PointTheta, TangentGuide
from bayes_lora.infer.empirical_bayes import EmpiricalBayes, fit_theta, task_grams
from bayes_lora.infer.linear_scores import LinearScores
from bayes_lora.infer.score_posterior import CategoricalAnswers, score_posterior
from bayes_lora.infer.tangent import tangent
from bayes_lora.models import LayerwiseScale, WithHead
from bayes_lora.posterior.diagnose import BENT
from bayes_lora.tasks import Example, Task

OPTIONS = ("s", "u", "F")
"""Of one token each, and about equally probable at the initial weights."""

PROMPT = PromptTemplate("{input}:", option="{option}")
"""A prompt that does not list the options, so that their order does not change their scores."""

POOL, TASKS = 20, 40


@pytest.fixture
def lm(tokenizer):
    """A language model whose scores depend strongly on its weights, so that small updates move them by a nat."""
    return sensitive(tokenizer)


def sensitive(tokenizer, **kwargs):
    found = build_lm("llama", tokenizer, targets=("v_proj", "o_proj"), template=PROMPT, **kwargs)
    with torch.no_grad():
        found.model.get_output_embeddings().weight.mul_(5.0)
    return found


def questions(count=POOL):
    words = "the film was good and bad so maybe not".split()
    generator = torch.Generator().manual_seed(5)
    orders = [torch.randperm(len(words), generator=generator)[:3].tolist() for _ in range(count)]
    return [" ".join(words[k] for k in order) for order in orders]


def pool(lm, count=POOL):
    """All questions as one task."""
    return collate([lm.encoder([Example(question, OPTIONS, 0) for question in questions(count)])])


@torch.no_grad()
def drawn(lm, model, count, seed, scales=None):
    """Weights drawn from the prior, and the network's log-probabilities ``(count, POOL, K)`` under them."""
    generator = torch.Generator().manual_seed(seed)
    theta = model.initial_theta()
    phi = {}
    for site, fn in model.phi_prior(theta).items():
        noise = torch.randn(count, 1, 1, *fn.event_shape, generator=generator, dtype=torch.float64)
        phi[site] = fn.mean + (fn.stddev if scales is None else scales[site]) * noise
    return phi, lm(model.shared(theta) | phi, pool(lm))[:, 0].log_softmax(-1)


def labels(log_probs, seed):
    generator = torch.Generator().manual_seed(seed)
    flat = torch.multinomial(log_probs.exp().flatten(0, -2), 1, generator=generator)
    return flat.view(log_probs.shape[:-1])


def centred(scores):
    """Scores of which only differences between options matter."""
    return scores - scores.mean(-1, keepdim=True)


class Family(NamedTuple):
    """Tasks of planted weights, and their Bayes-optimal predictions by importance sampling.

    Attributes:
        model: the prior from which weights were drawn.
        tasks: split into support and query.
        optimum: ``(T, Q, K)`` probabilities of the queries given the support.
        prior: ``(T, Q, K)`` probabilities without the support.
        size: ``(T,)`` effective number of draws.
        bias: ``(T,)`` by how much divergences from the optimum are too large, since it is an average of draws.
        moved: standard deviation of the scores between tasks, nats.
    """

    model: LayerwiseScale
    tasks: list[Task]
    optimum: Tensor
    prior: Tensor
    size: Tensor
    bias: Tensor
    moved: float


def family(lm, scale, support, draws=4000, queries=4):
    model = LayerwiseScale(lm, random="B", initial_scale=(0.1, scale))
    truth, reference = (drawn(lm, model, count, seed)[1] for count, seed in ((TASKS, 1), (draws, 2)))
    generator = torch.Generator().manual_seed(3)
    answer = labels(truth, 4)
    order = torch.stack([torch.randperm(POOL, generator=generator) for _ in range(TASKS)])
    seen, asked = order[:, :support], order[:, -queries:]
    tasks = []
    for t in range(TASKS):
        rows = [Example(question, OPTIONS, int(answer[t, i])) for i, question in enumerate(questions())]
        parts = (tuple(rows[i] for i in places[t].tolist()) for places in (seen, asked))
        tasks.append(Task(f"task-{t}", *parts))
    log_lik = reference[:, seen, answer.gather(1, seen)].sum(-1).T  # (T, draws)
    probs = reference.exp()[:, asked]

    def averaged(chosen):
        return torch.einsum("ts,stqk->tqk", log_lik[:, chosen].softmax(-1), probs[chosen])

    size = 1 / log_lik.softmax(-1).square().sum(-1)
    one, other = averaged(slice(0, draws // 2)), averaged(slice(draws // 2, None))
    # Half of the draws have twice the variance, and their difference four times.
    bias = divergence(one, other.log()) / 4
    moved = float(centred(reference).std(0).mean())
    return Family(model, tasks, averaged(slice(None)), probs.mean(0), size, bias, moved)


def divergence(optimum, log_probs):
    """By how many nats the NLL of a task's queries exceeds the optimal one, ``(T,)``: labels are not drawn for it."""
    return (optimum * (optimum.log() - log_probs)).sum(-1).mean(-1)


def error(values):
    """The standard error of the mean over tasks."""
    return float(values.std() / len(values) ** 0.5)


def gaps(lm, found, **kwargs):
    """By how many nats the predictions of each task are worse than the optimum, ``(T,)``."""
    posterior = Posterior(lm, found.model, TangentGuide(found.model, batch_size=32, **kwargs))
    log_probs = posterior.adapt(found.tasks).predict([task.query for task in found.tasks])
    return divergence(found.optimum, torch.stack(log_probs))


def test_where_updates_are_small_it_comes_close_to_the_optimum(lm):
    """Scores move by 0.9 nats: the gap is an eighth of what the support is worth."""
    found = family(lm, scale=0.2, support=16, draws=2000)
    assert 0.8 < found.moved < 1.0
    assert found.size.min() > 10 and found.size.median() > 100 and found.bias.mean() < 2e-3
    gap, without = gaps(lm, found), divergence(found.optimum, found.prior.log())
    assert gap.mean() + 3 * error(gap) < 0.01
    assert (without - gap).mean() > 3 * error(without - gap) and gap.mean() < without.mean() / 4


def test_where_updates_are_large_linear_scores_cost_more(lm):
    """Scores move by 2.4 nats. Linearising again at the mode does not help, and draws are no worse than linear scores.

    This network's scores are bounded, and an average of draws is as good. The network at the posterior's mean is not,
    so that ``diagnose`` warns.
    """
    found = family(lm, scale=0.6, support=8, draws=3000, queries=12)
    # Some tasks have few effective draws. The bias that is subtracted below accounts for them.
    assert 2.0 < found.moved < 3.0
    assert found.size.median() > 30
    gap = gaps(lm, found)
    excess = gap - found.bias
    assert excess.mean() - 3 * error(excess) > 0.02
    some = found._replace(tasks=found.tasks[:20], optimum=found.optimum[:20])
    change = gaps(lm, some, steps=2) - gap[:20]
    assert change.mean().abs() < max(3 * error(change), 0.01)
    diagnosis = Posterior(lm, found.model, TangentGuide(found.model, batch_size=32)).diagnose(some.tasks, num_draws=10)
    assert diagnosis.nll[0] > diagnosis.linear[0] + 0.15
    assert diagnosis.nll[1] < diagnosis.linear[0] + BENT
    assert any("has left the range in which scores are linear" in warning for warning in diagnosis.warnings)


# --- learned scales ---

PLANTED = {"v_proj.lora_B": 0.35, "o_proj.lora_B": 0.2}


def grams_of(lm, model, count=POOL):
    theta = model.initial_theta()
    phi = {site: fn.mean[None, None] for site, fn in model.phi_prior(theta).items()}
    return task_grams(lm, pool(lm, count), model.shared(theta), phi, 20)


@torch.no_grad()
def log_scales_and_errors(loss, step=0.1):
    """Fitted log standard deviations, and their standard errors from the curvature of the loss."""
    named = dict(loss.theta.named_parameters())
    parameters = [named[f"loc_theta_precision_{site.replace('.', '_')}"] for site in PLANTED]
    fitted = torch.stack([parameter.flatten()[0] for parameter in parameters])  # the logarithms of precisions

    def at(*moved):
        for parameter, value in zip(parameters, fitted - 2 * step * sum(moved), strict=True):
            parameter.fill_(value)
        return float(loss())

    one = torch.eye(2, dtype=torch.float64)
    curvature = [[(at(u, v) - at(u, -v) - at(-u, v) + at(-u, -v)) / (4 * step**2) for v in one] for u in one]
    return -0.5 * fitted, torch.linalg.inv(torch.tensor(curvature)).diagonal().sqrt()


def test_planted_scales_are_found(tokenizer):
    """The evidence finds the scales of two modules of one layer within three standard errors.

    Scores move by 0.7 nats.
    """
    lm = sensitive(tokenizer, top_layers=1)
    model = LayerwiseScale(lm, random="B", initial_scale=(0.1, 0.1), rate=1e-6)
    _, log_probs = drawn(lm, model, 100, seed=7, scales=PLANTED)
    grams = grams_of(lm, model)
    tasks = {f"task-{t}": grams._replace(answer=row) for t, row in enumerate(labels(log_probs, seed=8))}
    loss = EmpiricalBayes(model, PointTheta(model), tasks, objective="evidence")
    fit_theta(loss)
    found, errors = log_scales_and_errors(loss)
    planted = torch.tensor(list(PLANTED.values()), dtype=torch.float64).log()
    assert (errors < 0.2).all()
    assert ((found - planted).abs() < 3 * errors).all(), (found, planted, errors)
    assert found[0] - found[1] > 0  # though both started alike


# --- scores without information ---


def test_noise_scores_predict_like_label_counts(tokenizer):
    """Labels that do not depend on the question, of skewed frequencies that differ between tasks."""
    lm = sensitive(tokenizer, top_layers=1)
    model = WithHead(LayerwiseScale(lm, random="B"))
    fitted, new, count, support = 40, 60, 32, 16
    torch.manual_seed(9)
    frequencies = torch.distributions.Dirichlet(torch.full((3,), 0.6, dtype=torch.float64)).sample((fitted + new,))
    answer = labels(frequencies[:, None].expand(-1, count, -1).log(), seed=10)
    grams, guide = grams_of(lm, model, count), TangentGuide(model, batch_size=32)
    tasks = {f"task-{t}": grams._replace(answer=answer[t]) for t in range(fitted)}
    fit_theta(EmpiricalBayes(model, guide.theta, tasks, objective="predictive", num_support=support, num_splits=1))
    unseen = []
    for t in range(fitted, fitted + new):
        rows = [Example(question, OPTIONS, int(answer[t, i])) for i, question in enumerate(questions(count))]
        order = torch.randperm(count).tolist()
        unseen.append(Task(f"task-{t}", *([rows[i] for i in part] for part in (order[:support], order[support:20]))))
    adapted = Posterior(lm, model, guide).adapt(unseen)
    log_probs = torch.stack(adapted.predict([task.query for task in unseen]))
    counts = torch.stack(
        [torch.bincount(torch.tensor([e.answer for e in task.support]), minlength=3) for task in unseen]
    )
    smoothed = ((counts + 1.0) / (support + 3)).log()
    # Averaged over the labels of queries, whose frequencies are known.
    cost = (frequencies[fitted:, None] * (smoothed[:, None] - log_probs)).sum(-1).mean(-1)
    assert abs(float(cost.mean())) + 3 * error(cost) < 0.02
    of_counts = -(frequencies[fitted:] * smoothed).sum(-1).mean()
    assert of_counts < torch.tensor(3.0).log() - 0.2
    assert guide.theta_mean()["theta.loc.head.slope"].abs() < 0.1


# --- permuted labels ---


def test_permuted_options_permute_predictions(lm):
    """With the head: exactly in the distribution of scores, and up to the points of the average in probabilities."""
    model = WithHead(LayerwiseScale(lm, random="B", initial_scale=(0.1, 0.2)), slope=0.7)
    posterior = Posterior(lm, model, TangentGuide(model))
    order = [2, 0, 1]
    rows = [Example(question, OPTIONS, (i * i + i // 3) % 3) for i, question in enumerate(questions())]
    options = tuple(OPTIONS[k] for k in order)
    moved = [Example(row.input, options, order.index(row.answer)) for row in rows]
    one, other = (posterior.adapt(Task("task", part[:12])) for part in (rows, moved))
    first, second = one.linear_scores(rows[12:]), other.linear_scores(moved[12:])
    assert not torch.allclose(first.mean, second.mean, atol=0.1)
    # The norms of this language model are in float32.
    torch.testing.assert_close(second.mean, first.mean[:, order], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(second.covariance, first.covariance[:, order][:, :, order], rtol=1e-4, atol=1e-4)
    for averaged, tolerance in ((False, 1e-4), (True, 5e-3)):
        before, after = (found.log_probs(averaged=averaged).exp() for found in (first, second))
        torch.testing.assert_close(after, before[:, order], rtol=0, atol=tolerance)
    torch.testing.assert_close(other.predict(moved[12:]), second.log_probs())


# --- calibration ---


def at_the_prior_s_mean(lm, model):
    """Scores ``(POOL, K)`` of all questions, and derivatives ``(POOL * K, weights)`` in units of the prior."""
    theta = model.initial_theta()
    prior = model.phi_prior(theta)
    origin = {site: fn.mean[None, None] for site, fn in prior.items()}
    found = tangent(lm, pool(lm), model.shared(theta), origin, {site: fn.stddev for site, fn in prior.items()}, POOL)
    return found.scores[0], torch.cat([value[0].flatten(0, 1).flatten(1) for value in found.gradients.values()], -1)


def linear_posterior(scores, rows, factor, answer):
    """The last question's scores given the answers ``(T, n)`` of the first n, if sigma were ``factor`` times larger."""
    tasks, support = answer.shape
    seen, kernel = slice(0, support * len(OPTIONS)), factor**2 * rows @ rows.mT
    asked = slice(-len(OPTIONS), None)
    mask = torch.ones(tasks, support, len(OPTIONS), dtype=torch.bool)
    found = score_posterior(
        scores[:support].expand(tasks, -1, -1),
        kernel[seen, seen].expand(tasks, -1, -1),
        CategoricalAnswers(answer, mask),
    )
    cross = kernel[asked, seen]
    covariance = kernel[asked, asked] - cross @ found.removed @ cross.mT
    return LinearScores(scores[-1] + found.weights @ cross.mT, covariance, mask[:, 0], torch.zeros(tasks).bool())


@torch.no_grad()
def test_ranks_of_true_scores_are_uniform_only_with_the_right_sigma(lm):
    """Simulation-based calibration (arXiv 1804.06788): sigma, half and twice of it."""
    model = LayerwiseScale(lm, random="B", initial_scale=(0.1, 0.1))
    count, support, draws = 600, 16, 19
    phi, log_probs = drawn(lm, model, count, seed=11)
    answer = labels(log_probs[:, :support], seed=12)
    scores, rows = at_the_prior_s_mean(lm, model)
    prior = model.phi_prior(model.initial_theta())
    units = torch.cat([((phi[site] - fn.mean) / fn.stddev).flatten(1) for site, fn in prior.items()], -1)
    truth = scores[-1] + units @ rows[-len(OPTIONS) :].mT

    generator = torch.Generator().manual_seed(13)
    for factor in (1.0, 0.5, 2.0):
        found = linear_posterior(scores, rows, factor, answer)
        values, vectors = torch.linalg.eigh(found.covariance)
        noise = torch.randn(draws, count, len(OPTIONS), generator=generator, dtype=torch.float64)
        drawn_scores = found.mean + torch.einsum("tkj,stj->stk", vectors * values.clamp_min(0).sqrt()[:, None], noise)
        for ranks in (centred(drawn_scores) < centred(truth)).sum(0).T:
            p = chi_squared_p(ranks, draws)
            assert (p > 1e-3) if factor == 1.0 else (p < 1e-6)
    exact = linear_posterior(scores, rows, 1.0, answer[:2])
    examples = [[Example(q, OPTIONS, int(a)) for q, a in zip(questions(), one, strict=False)] for one in answer[:2]]
    adapted = Posterior(lm, model, TangentGuide(model)).adapt([Task(f"task-{t}", e) for t, e in enumerate(examples)])
    for t, one in enumerate(adapted.linear_scores([[Example(questions()[-1], OPTIONS)]] * 2)):
        torch.testing.assert_close(one.mean[0], exact.mean[t], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(one.covariance[0], exact.covariance[t], rtol=1e-4, atol=1e-4)
